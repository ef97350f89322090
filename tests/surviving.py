"""``python -m surviving URL``: a consumer of large messages, for tests of memory pressure. Prints what it came to."""

import argparse
import asyncio
import json
import resource
from pathlib import Path

from queue_runtime import Consumer, ConsumerConfig, MemoryConfig, QueueClient, ReceivedMessage


def of_status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


async def main(url: str, room: int, is_watching: bool) -> dict[str, int]:
    async with QueueClient(url) as client:
        await client.counts("q")  # the connection is there
        largest = 0

        async def handle(message: ReceivedMessage) -> None:
            nonlocal largest
            largest = max(largest, consumer.stats.held_bytes)
            await asyncio.sleep(0.02)  # longer than the next messages take to come

        memory = MemoryConfig(interval=0.05) if is_watching else None
        consumer = Consumer(client, "q", handle, ConsumerConfig(max_concurrency=4, prefetch=1000, memory=memory))
        before = of_status("VmSize")
        limit = before + (room << 20) if room else 0
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        task = asyncio.ensure_future(consumer.run())
        while not task.done() and (await client.counts("q")).active + consumer.stats.waiting + consumer.stats.running:
            await asyncio.sleep(0.05)
        consumer.stop()
        stats = await task
    return {
        "completed": stats.completed,
        "before": before,
        "limit": limit,
        "peak": of_status("VmPeak"),
        "largest_prefetch_bytes": largest,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--room", type=int, default=0, help="MiB beyond what it has when it begins; 0: any")
    parser.add_argument("--watch", action="store_true", help="look at the memory")
    given = parser.parse_args()
    print(json.dumps(asyncio.run(main(given.url, given.room, given.watch))))
