"""What waiting costs [P11]: wake-ups a second of a process in which nothing is to be done.

``python bench/bench_idle.py`` prints the table; ``python -m bench idle`` has the CPU time of a second as rows. Each
row is a process of its own, watched for some seconds after it has come to rest: iterations of the event loop, timers
that fire, the kernel's count of voluntary context switches, and CPU time. The rivals are a bare loop in which one task
sleeps, and the usual loop that asks each 100 ms.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 41.0
"""Of the table: two receives of a consumer and their timeouts, which are its only timers."""
WATCHER = """
import asyncio, json, sys, time
from pathlib import Path
from queue_runtime import *

name, loop_name, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])

def switches():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("voluntary")).split()[1])

async def consumer(source, **settings):
    client = QueueClient(InMemoryConfig(max_concurrency=64, prefetch=1000))
    async def handle(message): pass
    running = Consumer(client, "q", handle, ConsumerConfig(source=source, **settings))
    task = asyncio.create_task(running.run())
    await client.send_messages("q", [Message(body=b"x", session_id=key) for key in [None, "a"]])
    return client, task

async def poll():
    queue = []
    while True:
        if not queue:
            await asyncio.sleep(0.1)

async def start():
    if name == "a loop that sleeps":
        return asyncio.create_task(asyncio.sleep(3600))
    if name == "a consumer that polls each 100 ms":
        return asyncio.create_task(poll())
    if name == "ours: client":
        client = QueueClient()
        await client.send_message("q", Message(body=b"x"))
        await client.complete_message(await client.receive_message("q"))
        return client
    if name == "ours: client that holds 100 messages":
        client = QueueClient()
        await client.send_messages("q", [Message(body=b"x") for _ in range(100)])
        return client, await client.receive_messages("q", 100)
    if name == "ours: consumer without sessions":
        return await consumer("queue")
    if name == "ours: consumer":
        return await consumer("all")
    if name == "ours: consumer with a controller":
        return await consumer("all", scaling=ScalingConfig())
    raise ValueError(name)

async def main():
    kept = await start()
    await asyncio.sleep(2.5)  # an idle session is let go after a second
    loop = asyncio.get_running_loop()
    counted = {"iterations": 0, "timers": 0}
    if loop_name == "asyncio":
        select, run = loop._selector.select, asyncio.TimerHandle._run
        def counting(timeout=None):
            counted["iterations"] += 1
            return select(timeout)
        def firing(self):
            counted["timers"] += 1
            return run(self)
        loop._selector.select = counting
        asyncio.TimerHandle._run = firing
    before, cpu = switches(), time.process_time()
    await asyncio.sleep(seconds)
    counted["switches"] = switches() - before - 1  # the one that ends this watch
    counted["cpu"] = time.process_time() - cpu
    if loop_name == "asyncio":
        counted["iterations"] -= 2
        counted["timers"] -= 1
    print(json.dumps(counted))
    sys.stdout.flush()
    import os
    os._exit(0)

if loop_name == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""
ROWS = [
    "a loop that sleeps",
    "a consumer that polls each 100 ms",
    "ours: client",
    "ours: client that holds 100 messages",
    "ours: consumer without sessions",
    "ours: consumer",
    "ours: consumer with a controller",
]


def watch(rows: Sequence[tuple[str, str]], seconds: float) -> list[dict[str, float]]:
    """Return what is counted a second in processes that do only this, side by side: idle ones do not disturb."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WATCHER, name, loop, str(seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for name, loop in rows
    ]
    found = [json.loads(process.communicate()[0]) for process in started]
    return [{what: count / seconds for what, count in counted.items()} for counted in found]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("row", ROWS)
def test_idle(benchmark: Any, row: str, loop: str) -> None:
    """The row's time is the CPU time of an idle second."""
    (counted,) = watch([(row, loop)], 2.0)
    benchmark.group = f"CPU time of an idle second, {loop}"
    benchmark.extra_info.update(items=1, **counted)
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.stats.stats.data[:] = [max(counted["cpu"], 1e-9)]


def main() -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"An idle process, a second, over {SECONDS:g} s", title_justify="left")
    table.add_column("")
    for column in ("loop", "loop turns", "timers", "context switches", "CPU µs"):
        table.add_column(column, justify="right")
    rows = [(row, loop) for row in ROWS for loop in ("asyncio", "uvloop")]
    for (row, loop), counted in zip(rows, watch(rows, SECONDS), strict=True):
        turns, timers = (f"{counted[what]:.2f}" if loop == "asyncio" else "" for what in ("iterations", "timers"))
        table.add_row(row, loop, turns, timers, f"{counted['switches']:.2f}", f"{counted['cpu'] * 1e6:.0f}")
    Console(width=120 if not sys.stdout.isatty() else None).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
