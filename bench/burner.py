"""``python -m bench.burner URL QUEUE``: a consumer whose handlers compute, in a process of its own.

It says ``ready`` and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys
import threading

from queue_runtime import Consumer, ConsumerConfig, QueueClient, ReceivedMessage

ADDITIONS = 60_000
"""Additions for each message: about 2 ms of one core, all of it under the GIL."""


def work() -> None:
    sum(number & 3 for number in range(ADDITIONS))


async def burn(message: ReceivedMessage) -> None:
    work()


async def main(url: str, queue_name: str) -> None:
    async with QueueClient(url) as client:
        consumer = Consumer(client, queue_name, burn, ConsumerConfig(max_concurrency=2, prefetch=20, max_batch_size=10))
        loop = asyncio.get_running_loop()

        def wait_for_the_end() -> None:
            sys.stdin.read()
            loop.call_soon_threadsafe(consumer.stop)

        threading.Thread(target=wait_for_the_end, daemon=True).start()
        print("ready", flush=True)
        await consumer.run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
