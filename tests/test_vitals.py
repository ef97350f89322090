"""A consumer never stalls silently: what stands still is named, logged, told by ``health``, and fetched anew."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from wrapping import hang, wrap

from queue_runtime.breaker import BreakerConfig, BreakerState
from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.config import InMemoryConfig
from queue_runtime.consumer import Consumer
from queue_runtime.errors import ConfigurationError
from queue_runtime.handling import ConsumerConfig
from queue_runtime.message import Message, ReceivedMessage

QUEUE = "orders"
STALL = 60.0


@contextlib.asynccontextmanager
async def consuming(client: QueueClient, handler: Callable[..., Any], **config: Any) -> AsyncIterator[Consumer]:
    consumer = Consumer(client, QUEUE, handler, ConsumerConfig(**{"stall_after": STALL, **config}))
    task = asyncio.create_task(consumer.run())
    await settle_tasks()
    yield consumer
    consumer.stop_now()
    await task


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def client(clock: ManualClock) -> AsyncIterator[QueueClient]:
    async with QueueClient(InMemoryConfig(max_lock_renewal=1e6), clock=clock) as client:
        yield client


async def test_a_handler_that_hangs_is_named_with_where_it_waits(
    client: QueueClient, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    gate = asyncio.Event()

    async def inner() -> None:
        await gate.wait()

    async def handle(message: ReceivedMessage) -> None:
        await inner()

    async with consuming(client, handle, max_concurrency=2) as consumer:
        for number in range(3):
            await client.send_message(QUEUE, Message(body=b"x", message_id=f"m-{number}"))
        await clock.advance(STALL * 1.3)
        health = await client.health()
        assert not health.is_healthy
        (problem,) = health.problems
        assert problem.startswith("no handler of queue orders has ended for ")
        assert "and 2 run; the oldest: m-0 in " in problem
        assert "handle, at asyncio" not in problem
        assert f"inner ({__file__}:" in problem or "Event.wait (" in problem
        assert "m-1 in " in problem
        assert "m-2 waiting" in problem
        (told,) = health.consumers
        assert (told.queue_name, told.is_running, told.running, told.waiting) == (QUEUE, True, 2, 1)
        gate.set()
        await clock.advance(STALL / 2)
        assert (await client.health()).is_healthy
        assert consumer.stats.completed == 3
    assert "stalled: no handler" in caplog.text
    assert "it goes on" in caplog.text
    assert (await client.health()).consumers == (), "it has ended"


async def test_a_session_s_handler_and_a_batch_are_named_too(client: QueueClient, clock: ManualClock) -> None:
    async def handle(messages: list[ReceivedMessage]) -> None:
        await asyncio.Event().wait()

    async with consuming(client, handle, handler_form="batch"):
        for number in range(2):
            await client.send_message(QUEUE, Message(body=b"x", message_id=f"s-{number}", session_id="s"))
        await clock.advance(STALL * 1.3)
        (problem,) = (await client.health()).problems
        assert "s-0 in " in problem


async def test_a_plain_handler_is_named(client: QueueClient, clock: ManualClock) -> None:
    gate = threading.Event()

    def plain_handler(message: ReceivedMessage) -> None:
        gate.wait()

    async with consuming(client, plain_handler):
        await client.send_message(QUEUE, Message(body=b"x", message_id="m"))
        await settle_tasks()
        await clock.advance(STALL * 1.3)
        (problem,) = (await client.health()).problems
        gate.set()
    assert "m in test_a_plain_handler_is_named.<locals>.plain_handler" in problem


async def test_slow_is_not_stalled(client: QueueClient, clock: ManualClock) -> None:
    """As long as handlers end now and then; and an idle consumer is well."""
    gates = [asyncio.Event() for _ in range(10)]
    left = iter(gates)

    async def handle(message: ReceivedMessage) -> None:
        await next(left).wait()

    async with consuming(client, handle, max_concurrency=1):
        await clock.advance(STALL * 10)
        assert (await client.health()).is_healthy
        await client.send_messages(QUEUE, [Message(body=b"x") for _ in gates])
        for gate in gates:
            await clock.advance(STALL * 0.7)
            assert (await client.health()).is_healthy
            gate.set()
        await clock.advance(STALL * 10)
        assert (await client.health()).is_healthy


@pytest.mark.parametrize("session_id", [None, "s"])
async def test_a_fetch_that_does_not_come_back_is_begun_anew(
    monkeypatch: pytest.MonkeyPatch, clock: ManualClock, session_id: str | None
) -> None:
    """Where nobody else gives it up. Its room and its place are given back."""
    recorder = wrap(monkeypatch, settles_in_process=True)
    recorder.receive_faults += [hang] * 2
    recorder.accept_faults += [hang] * 4
    handled: list[ReceivedMessage] = []

    async def handle(message: ReceivedMessage) -> None:
        handled.append(message)

    async with QueueClient(InMemoryConfig(), clock=clock) as client:
        config = {"receive_timeout": 5.0, "pollers": 2, "prefetch": 8, "max_sessions": 4}
        async with consuming(client, handle, **config):
            await client.send_message(QUEUE, Message(body=b"x", session_id=session_id))
            await clock.advance(STALL + 4)
            assert handled == []
            await clock.advance(STALL / 4 + 1)
            assert len(handled) == 1
            assert (await client.health()).problems == (
                "a fetch from queue orders has been due for 70 s and is begun anew",
            )
            await clock.advance(STALL / 4)
            assert (await client.health()).is_healthy


async def test_messages_that_nobody_begins_are_told(client: QueueClient, clock: ManualClock) -> None:
    """Which no code of ours should bring about: this one is broken on purpose."""

    async def handle(message: ReceivedMessage) -> None: ...

    async with consuming(client, handle) as consumer:
        assert consumer._queue_feed is not None
        consumer._queue_feed.call_workers = lambda: None  # type: ignore[method-assign]
        await client.send_message(QUEUE, Message(body=b"x", message_id="m"))
        await clock.advance(STALL * 1.3)
        (problem,) = (await client.health()).problems
        assert "although 1 messages wait and 16 handlers are free; the oldest: m waiting, received" in problem


async def test_an_open_breaker_is_a_problem_and_no_stall(client: QueueClient, clock: ManualClock) -> None:
    """[C35]"""

    async def handle(message: ReceivedMessage) -> None:
        raise ZeroDivisionError

    breaker = BreakerConfig(failures=1, open_for=STALL * 10)
    async with consuming(client, handle, breaker=breaker, max_concurrency=1):
        await client.send_messages(QUEUE, [Message(body=b"x") for _ in range(3)])
        await clock.advance(STALL * 2)
        health = await client.health()
        assert health.breakers == {QUEUE: BreakerState.OPEN}
        assert health.problems == ("the circuit breaker of queue orders is open, and its fetch is paused",)


async def test_none_looks_at_nothing(client: QueueClient, clock: ManualClock) -> None:
    async def handle(message: ReceivedMessage) -> None:
        await asyncio.Event().wait()

    async with consuming(client, handle, stall_after=None):
        await client.send_message(QUEUE, Message(body=b"x"))
        await clock.advance(STALL * 20)
        assert (await client.health()).is_healthy


def test_a_wrong_time_names_the_field() -> None:
    for wrong in (0, -1, "x", float("nan")):
        with pytest.raises(ConfigurationError) as caught:
            ConsumerConfig(stall_after=wrong)  # type: ignore[arg-type]
        assert caught.value.field == "stall_after"


async def test_nothing_is_logged_while_all_is_well(
    client: QueueClient, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def handle(message: ReceivedMessage) -> None: ...

    async with consuming(client, handle):
        with caplog.at_level(logging.INFO):
            for _ in range(20):
                await client.send_messages(QUEUE, [Message(body=b"x", session_id=key) for key in (None, "a", "b")])
                await clock.advance(STALL / 3)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
