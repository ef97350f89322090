"""What a consumer costs a message, with a handler that does nothing.

The rivals do the same job by hand: a loop over the client that receives 100, handles and completes them one by one,
and an asyncio.Queue with as many worker tasks as the consumer runs handlers, which keeps nothing safe: no locks, no
settlement, no retry. Messages are sent outside the clock.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from queue_runtime import (
    Consumer,
    ConsumerObserver,
    Disposition,
    InMemoryConfig,
    Message,
    QueueClient,
    ReceivedMessage,
)

COUNT = 5_000
HANDLERS = 16
SESSIONS = 500
GROUP = "consumer with an empty handler, per message"


async def handle(message: ReceivedMessage) -> None:
    pass


class Countdown(ConsumerObserver):
    """Says when the last message is settled."""

    def __init__(self) -> None:
        self.left = COUNT
        self.done = asyncio.Event()

    def message_settled(self, message: ReceivedMessage, disposition: Disposition, error: Exception | None) -> None:
        self.left -= 1
        if not self.left:
            self.done.set()


class Setting:
    """One event loop with one client, and its queue filled anew for every round."""

    def __init__(self, **settings: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = self.loop.run_until_complete(self._open(settings))

    async def _open(self, settings: dict[str, Any]) -> QueueClient:
        return QueueClient(InMemoryConfig(max_concurrency=HANDLERS, prefetch=200, **settings))

    def fill(self, sessions: int) -> None:
        keys = [f"s{number % sessions}" if sessions else None for number in range(COUNT)]
        self.loop.run_until_complete(
            self.client.send_messages("q", [Message(body=b"x" * 100, session_id=key) for key in keys])
        )

    async def consume(self) -> None:
        observer = Countdown()
        consumer = Consumer(self.client, "q", handle, observer=observer)
        task = asyncio.ensure_future(consumer.run())
        await observer.done.wait()
        consumer.stop()
        await task

    async def loop_by_hand(self) -> None:
        done = 0
        while done < COUNT:
            for message in await self.client.receive_messages("q", 100, timeout=1):
                await handle(message)
                await self.client.complete_message(message)
                done += 1

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


ROWS = {
    "ours: consumer": ({}, 0, Setting.consume),
    "ours: consumer, no lock renewal": ({"max_lock_renewal": 0}, 0, Setting.consume),
    "ours: consumer, settled in batches": ({"settlement": "batched"}, 0, Setting.consume),
    f"ours: consumer, {SESSIONS} sessions": ({}, SESSIONS, Setting.consume),
    "loop by hand over our client": ({}, 0, Setting.loop_by_hand),
}


@pytest.mark.parametrize("row", ROWS)
def test_client(benchmark: Any, row: str) -> None:
    settings, sessions, job = ROWS[row]
    benchmark.group = GROUP
    benchmark.extra_info["items"] = COUNT
    setting = Setting(**settings)
    try:
        benchmark.pedantic(
            lambda: setting.loop.run_until_complete(job(setting)), setup=lambda: setting.fill(sessions), rounds=7
        )
    finally:
        setting.close()


def test_asyncio_queue_with_workers(benchmark: Any) -> None:
    benchmark.group = GROUP
    benchmark.extra_info["items"] = COUNT

    async def run() -> None:
        queue: asyncio.Queue[Any] = asyncio.Queue()

        async def work() -> None:
            while True:
                await handle(await queue.get())
                queue.task_done()

        workers = [asyncio.ensure_future(work()) for _ in range(HANDLERS)]
        for number in range(COUNT):
            queue.put_nowait(number)
        await queue.join()
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    benchmark.pedantic(lambda: asyncio.run(run()), rounds=7)
