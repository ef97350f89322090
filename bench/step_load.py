"""``python -m bench.step_load``: the depth of a queue under a step of load, with the controller and without [P14].

Handlers wait 20 ms. For 5 s there are 100 messages a second, for 15 s 800, then 100 again. Three consumers get the
same load, one after another: one with 8 handlers, one with 64, and one with 1 to 64 as the controller wants. Prints a
table, and draws it if matplotlib is there. Then a backlog whose handlers call something that serves 8 at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import NamedTuple

from queue_runtime import Consumer, ConsumerConfig, InMemoryConfig, Message, QueueClient, ReceivedMessage, ScalingConfig

RESULTS = Path(__file__).resolve().parent / "results"
SERVICE = 0.02
PHASES = [(5.0, 100), (15.0, 800), (25.0, 100)]
"""Seconds, and messages a second."""
STEP = 0.05
AT_ONCE = 8
SAMPLE = 0.25
SHRINK_AFTER = 8.0
"""Shorter than the default, so that the whole way back is seen."""


class Sample(NamedTuple):
    time: float
    sent: int
    handled: int
    depth: int
    handlers: int
    prefetch: int


def rate_at(time: float) -> int:
    for seconds, rate in PHASES:
        time -= seconds
        if time < 0:
            return rate
    return 0


async def measure(config: ConsumerConfig) -> list[Sample]:
    samples: list[Sample] = []
    loop = asyncio.get_running_loop()

    async def handle(message: ReceivedMessage) -> None:
        await asyncio.sleep(SERVICE)

    async with QueueClient(InMemoryConfig()) as client:
        consumer = Consumer(client, "q", handle, config)
        task = asyncio.ensure_future(consumer.run())
        await asyncio.sleep(STEP)
        began, sent, due, next_sample = loop.time(), 0, 0.0, 0.0
        end = sum(seconds for seconds, _ in PHASES)
        while (now := loop.time() - began) < end:
            due += rate_at(now) * STEP
            count = int(due) - sent
            if count > 0:
                await client.send_messages("q", [Message(body=b"x" * 100) for _ in range(count)])
                sent += count
            if now >= next_sample:
                stats, limits = consumer.stats, consumer.limits
                depth = (await client.counts("q")).active + stats.waiting
                samples.append(Sample(now, sent, stats.completed, depth, limits.concurrency, limits.prefetch))
                next_sample += SAMPLE
            await asyncio.sleep(max(0.0, began + (int(now / STEP) + 1) * STEP - loop.time()))
        consumer.stop_now()
        await task
    return samples


async def serve_few(name: str, config: ConsumerConfig) -> None:
    """Print what comes of handlers that wait for one another."""
    places = asyncio.Semaphore(AT_ONCE)

    async def handle(message: ReceivedMessage) -> None:
        async with places:
            await asyncio.sleep(SERVICE)

    async with QueueClient(InMemoryConfig()) as client:
        await client.send_messages("q", [Message(body=b"x") for _ in range(20_000)])
        consumer = Consumer(client, "q", handle, config)
        task = asyncio.ensure_future(consumer.run())
        await asyncio.sleep(8.0)
        before = consumer.stats
        await asyncio.sleep(12.0)
        after, limits = consumer.stats, consumer.limits
        consumer.stop_now()
        await task
    done = after.completed - before.completed
    seconds = (after.handler_seconds - before.handler_seconds) / done
    print(
        f"{name:>12}: {done / 12:.0f} messages/s, {seconds * 1000:.0f} ms in a handler, {limits.concurrency} handlers"
    )


def configurations() -> dict[str, ConsumerConfig]:
    scaling = ScalingConfig(interval=0.5, shrink_after=SHRINK_AFTER)
    return {
        "8 handlers": ConsumerConfig(max_concurrency=8, prefetch=400),
        "64 handlers": ConsumerConfig(max_concurrency=64, prefetch=400),
        "controlled": ConsumerConfig(max_concurrency=64, prefetch=400, scaling=scaling),
    }


def show(runs: dict[str, list[Sample]]) -> None:
    print(f"{'':>6} {'sent/s':>7}  " + "  ".join(f"{name:^21}" for name in runs))
    print(f"{'s':>6} {'':>7}  " + "  ".join(f"{'depth':>9} {'handlers':>11}" for _ in runs))
    for row in zip(*runs.values(), strict=False):
        if row[0].time % 1.0 < SAMPLE:
            cells = "  ".join(f"{sample.depth:>9,} {sample.handlers:>11}" for sample in row)
            print(f"{row[0].time:>6.1f} {rate_at(row[0].time):>7}  {cells}")
    print()
    for name, samples in runs.items():
        deepest = max(samples, key=lambda sample: sample.depth)
        late = [sample.time for sample in samples if sample.depth > 50]
        empty = f"worked off at {late[-1]:.1f} s" if late and late[-1] < samples[-1].time - 1 else "never worked off"
        mean = sum(sample.handlers for sample in samples) / len(samples)
        end = empty if late else "never more than 50"
        print(f"{name:>12}: deepest {deepest.depth:,} at {deepest.time:.1f} s, {end}; {mean:.1f} handlers in the mean")


def draw(runs: dict[str, list[Sample]], path: Path) -> None:
    try:
        from matplotlib import use

        use("Agg")
        import matplotlib.pyplot as plot
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    figure, (above, below) = plot.subplots(2, 1, sharex=True, figsize=(7, 5), dpi=80)
    for name, samples in runs.items():
        times = [sample.time for sample in samples]
        above.plot(times, [sample.depth for sample in samples], label=name)
        below.step(times, [sample.handlers for sample in samples], label=name, where="post")
    above.set_yscale("symlog", linthresh=10)
    above.set_ylabel("messages waiting")
    below.set_ylabel("handlers")
    below.set_xlabel("seconds; the load is 100/s, from 5 s to 20 s 800/s")
    for axes in (above, below):
        axes.axvspan(PHASES[0][0], PHASES[0][0] + PHASES[1][0], alpha=0.1)
        axes.grid(alpha=0.3)
    above.legend()
    figure.tight_layout()
    figure.savefig(path)
    print(f"drawn to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=RESULTS / "step_load.png")
    given = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    runs = {name: asyncio.run(measure(config)) for name, config in configurations().items()}
    show(runs)
    (RESULTS / "step_load.json").write_text(
        json.dumps({name: [sample._asdict() for sample in samples] for name, samples in runs.items()})
    )
    draw(runs, given.picture)
    print(f"\nA backlog, and a service of {SERVICE * 1000:.0f} ms that serves {AT_ONCE} at once, from 8 s to 20 s:")
    for name, config in configurations().items():
        asyncio.run(serve_few(name, config))


if __name__ == "__main__":
    main()
