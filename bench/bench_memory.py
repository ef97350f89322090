"""What the in-memory provider costs a message: send, receive and complete.

The rival is one ``put_nowait`` and one ``get_nowait`` of an ``asyncio.Queue``, which locks nothing, settles nothing
and redelivers nothing. Messages are made outside the clock. The deep rows do the same work in a queue that already
holds a million messages, or messages of ten thousand sessions: the cost must not grow with depth.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from queue_runtime.client import QueueClient
from queue_runtime.clock import SystemClock
from queue_runtime.config import InMemoryConfig
from queue_runtime.message import Message
from queue_runtime.providers.base import COMPLETE
from queue_runtime.providers.memory import InMemoryProvider, InMemoryReceiver

BATCH = 100
SINGLE = 200
DEEP = 1_000_000
SESSIONS = 10_000
BY_HUNDRED = "memory: send, receive, complete 100 in a call, per message"
ONE_BY_ONE = "memory: send, receive, complete one at a time, per message"
CONFIG = InMemoryConfig(capacity=DEEP + 1000, max_lock_renewal=0.0)


class Setting:
    """A provider with one receiver on an event loop, and messages to send."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.provider = InMemoryProvider(CONFIG, clock=SystemClock())
        receiver = self.run(self.provider.open_receiver("q"))
        assert isinstance(receiver, InMemoryReceiver)
        self.receiver = receiver
        self.client = self.run(make_client())
        self.messages = [Message(body=b"x" * 100) for _ in range(BATCH)]

    def run(self, call: Any) -> Any:
        return self.loop.run_until_complete(call)

    def close(self) -> None:
        self.run(self.client.close())
        self.run(self.provider.close())
        self.loop.close()

    async def by_hundred(self) -> None:
        for _ in range(10):
            await self.provider.send("q", self.messages)
            received = await self.receiver.receive(BATCH, 0.0)
            await self.receiver.settle(COMPLETE, [message.receipt for message in received])

    async def one_by_one(self) -> None:
        send, receive, settle = self.provider.send, self.receiver.receive, self.receiver.settle
        one = self.messages[:1]
        for _ in range(SINGLE):
            await send("q", one)
            received = await receive(1, 0.0)
            await settle(COMPLETE, [received[0].receipt])

    async def client_by_hundred(self) -> None:
        for _ in range(10):
            await self.client.send_messages("q", self.messages)
            await self.client.complete_messages(await self.client.receive_messages("q", BATCH, 0.0))

    async def client_one_by_one(self) -> None:
        client, one = self.client, self.messages[0]
        for _ in range(SINGLE):
            await client.send_message("q", one)
            received = await client.receive_message("q", 0.0)
            assert received is not None
            await client.complete_message(received)

    async def sessions_one_by_one(self) -> None:
        """Take the next session, one message of it, and put another in at the end of some session."""
        provider = self.provider
        for number in range(SINGLE):
            await provider.send("s", self.in_sessions[number : number + 1])
            receiver = await provider.accept_session("s", None, 0.0)
            assert receiver is not None
            received = await receiver.receive(1, 0.0)
            await receiver.settle(COMPLETE, [received[0].receipt])
            await receiver.close()

    async def sessions_held(self) -> None:
        """The same with every session held by a receiver of its own."""
        send = self.provider.send
        for number in range(SINGLE):
            place = number * 41 % SESSIONS
            await send("s", self.in_sessions[place : place + 1])
            receiver = self.holders[place]
            received = await receiver.receive(1, 0.0)
            await receiver.settle(COMPLETE, [received[0].receipt])

    # What a row starts from.

    def as_it_is(self) -> None:
        pass

    def renew(self) -> None:
        self.run(self.client.close())
        self.client = self.run(make_client(max_lock_renewal=300.0))

    def fill(self) -> None:
        for _ in range(DEEP // 1000):
            assert not any(self.run(self.provider.send("q", self.messages[:1] * 1000)))

    def make_sessions(self) -> None:
        self.in_sessions = [Message(body=b"x" * 100, session_id=f"session-{i}") for i in range(SESSIONS)]

    def hold_sessions(self) -> None:
        self.make_sessions()
        self.holders = [self.run(self.provider.accept_session("s", f"session-{i}", 0.0)) for i in range(SESSIONS)]

    def fill_sessions(self) -> None:
        self.make_sessions()
        self.run(self.provider.send("s", self.in_sessions * 2))


async def make_client(**changes: Any) -> QueueClient:
    return QueueClient(dataclasses.replace(CONFIG, **changes))


async def asyncio_queue_pair() -> None:
    queue: asyncio.Queue[int] = asyncio.Queue()
    for number in range(1000):
        queue.put_nowait(number)
        queue.get_nowait()


@pytest.fixture
def setting() -> Any:
    setting = Setting()
    yield setting
    setting.close()


FOUR_PAIRS = "<= 4 x asyncio.Queue"
ROWS: dict[str, tuple[str, int, str, Callable[[Setting], Awaitable[None]], Callable[[Setting], None]]] = {
    "ours": (BY_HUNDRED, 1000, FOUR_PAIRS, Setting.by_hundred, Setting.as_it_is),
    "ours, a million deep": (BY_HUNDRED, 1000, ">= 100,000/s", Setting.by_hundred, Setting.fill),
    "ours, client": (BY_HUNDRED, 1000, FOUR_PAIRS, Setting.client_by_hundred, Setting.as_it_is),
    "ours, client that renews locks": (BY_HUNDRED, 1000, FOUR_PAIRS, Setting.client_by_hundred, Setting.renew),
    "ours, singly": (ONE_BY_ONE, SINGLE, ">= 200,000/s", Setting.one_by_one, Setting.as_it_is),
    "ours, singly, a million deep": (ONE_BY_ONE, SINGLE, ">= 100,000/s", Setting.one_by_one, Setting.fill),
    "ours, singly, client": (ONE_BY_ONE, SINGLE, ">= 200,000/s", Setting.client_one_by_one, Setting.as_it_is),
    "ours, singly, client that renews locks": (
        ONE_BY_ONE,
        SINGLE,
        ">= 200,000/s",
        Setting.client_one_by_one,
        Setting.renew,
    ),
    "ours, 10,000 sessions held": (ONE_BY_ONE, SINGLE, ">= 100,000/s", Setting.sessions_held, Setting.hold_sessions),
    "ours, 10,000 sessions, accepted for a message each": (
        ONE_BY_ONE,
        SINGLE,
        ">= 100,000/s",
        Setting.sessions_one_by_one,
        Setting.fill_sessions,
    ),
}


@pytest.mark.parametrize("group", [BY_HUNDRED, ONE_BY_ONE])
def test_asyncio_queue_pair(benchmark: Any, setting: Setting, group: str) -> None:
    benchmark.group = group
    benchmark.extra_info["items"] = 1000
    benchmark.pedantic(lambda: setting.run(asyncio_queue_pair()), rounds=100, warmup_rounds=5)


@pytest.mark.parametrize("row", ROWS)
def test_memory(benchmark: Any, setting: Setting, row: str) -> None:
    benchmark.group, items, goal, job, prepare = ROWS[row]
    benchmark.extra_info["items"] = items
    benchmark.extra_info["goal"] = goal
    prepare(setting)
    benchmark.pedantic(lambda: setting.run(job(setting)), rounds=100, warmup_rounds=5)
