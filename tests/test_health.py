"""``QueueClient.health``: what is wrong, in plain sentences."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from wrapping import Recorder, fail, hang, wrap

from queue_runtime.breaker import BreakerState
from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import (
    CapabilityError,
    ConnectionFailedError,
    PermissionDeniedError,
    QueueTimeoutError,
    ServiceUnavailableError,
    ValidationError,
)
from queue_runtime.health import FORGOTTEN, GROWING_FOR, REMEMBERED, ConsumerHealth
from queue_runtime.links import GRACE
from queue_runtime.message import Message
from queue_runtime.retry import NoRetry
from queue_runtime.schedule import Block
from queue_runtime.watchdog import Place

QUEUE = "orders"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return wrap(monkeypatch)


@pytest.fixture
async def client(recorder: Recorder, clock: ManualClock) -> AsyncIterator[QueueClient]:
    config = InMemoryConfig(settle_interval=0.0001, settle_batch_size=1, retry=NoRetry())
    async with QueueClient(config, clock=clock) as client:
        yield client


class Reporter:
    def __init__(self, *problems: str, breaker: BreakerState | None = None) -> None:
        self.answer = ConsumerHealth(QUEUE, True, breaker=breaker, problems=problems)

    def health(self) -> ConsumerHealth:
        return self.answer


async def send(client: QueueClient, count: int) -> None:
    await client.send_messages(QUEUE, [Message(body=b"x") for _ in range(count)])


async def test_all_is_well(client: QueueClient, clock: ManualClock) -> None:
    health = await client.health()
    assert (health.is_healthy, health.problems, health.connection, health.provider) == (True, (), "open", "memory")
    assert (health.last_receive, health.last_settle, health.backlog, health.consumers) == (None, None, {}, ())
    await send(client, 3)
    message = await client.receive_message(QUEUE, 0)
    assert message is not None
    await clock.advance(2)
    await client.complete_message(message)
    await clock.advance(3)
    health = await client.health(QUEUE)
    assert health.is_healthy
    assert (health.last_receive, health.last_settle) == (5.0, 3.0)
    assert health.backlog[QUEUE].active == 2


async def test_a_closed_client(clock: ManualClock) -> None:
    client = QueueClient(clock=clock)
    await client.close()
    health = await client.health(QUEUE)
    assert (health.is_healthy, health.problems, health.connection) == (False, ("the client is closed",), "closed")


async def test_bad_arguments(client: QueueClient) -> None:
    for arguments in (("",), (QUEUE, -1), (QUEUE, "x")):
        with pytest.raises(ValidationError):
            await client.health(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fault", "connection", "problem"),
    [
        (hang, "failing", "the service did not say within 5 s what is in queue orders"),
        (
            fail(ConnectionFailedError("reset")),
            "failing",
            "the service did not say what is in queue orders: reset",
        ),
        (fail(PermissionDeniedError("no")), "open", "the service did not say what is in queue orders: no"),
        (fail(CapabilityError("memory", "counts")), "open", None),
    ],
)
async def test_a_service_that_does_not_answer(
    client: QueueClient, recorder: Recorder, clock: ManualClock, fault: Any, connection: str, problem: str | None
) -> None:
    recorder.count_faults.append(fault)
    task = asyncio.create_task(client.health(QUEUE, timeout=5))
    await clock.advance(5.1)
    health = await task
    assert health.connection == connection
    assert health.problems == (() if problem is None else (problem,))
    assert health.is_healthy is (problem is None)


async def test_a_receive_that_was_given_up_is_told_until_the_service_is_heard_of(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    recorder.receive_faults.append(hang)
    task = asyncio.create_task(client.receive_message(QUEUE, 0))
    await clock.advance(GRACE + 1)
    with pytest.raises(QueueTimeoutError):
        await task
    health = await client.health()
    assert health.connection == "failing"
    assert health.problems == (
        "a receive from queue orders did not come back, and its receiver is replaced, 1 s ago, and nothing was heard "
        "since",
    )
    await client.receive_message(QUEUE, 0)
    assert (await client.health()).is_healthy


async def test_a_backlog_that_grows_while_nothing_is_settled(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    """Not one that grows while something is; nor one that only stays; nor of a client that only sends."""
    for _ in range(10):
        await send(client, 5)
        assert (await client.health(QUEUE)).is_healthy
        await clock.advance(GROWING_FOR)
    message = await client.receive_message(QUEUE, 0)
    assert message is not None
    recorder.settle_faults.append(fail(ServiceUnavailableError("busy")))
    with pytest.raises(ServiceUnavailableError):
        await client.complete_message(message)
    await send(client, 5)
    health = await client.health(QUEUE)
    assert health.problems == (
        f"the backlog of queue {QUEUE} has grown from 5 to 54 in {10 * GROWING_FOR:.0f} s, and nothing was settled",
    )
    await client.complete_message(message)
    assert (await client.health(QUEUE)).is_healthy
    await clock.advance(GROWING_FOR * 2)
    assert (await client.health(QUEUE)).is_healthy


async def test_consumers_tell_of_themselves(client: QueueClient) -> None:
    reporter = Reporter("nothing has begun for 60 s", breaker=BreakerState.OPEN)
    forget = client.add_reporter(reporter)
    await send(client, 1)
    health = await client.health()
    assert health.problems == (
        "nothing has begun for 60 s",
        "the circuit breaker of queue orders is open, and its fetch is paused",
    )
    assert health.breakers == {QUEUE: BreakerState.OPEN}
    assert health.backlog[QUEUE].active == 1, "of the queues that have consumers"
    forget()
    forget()
    assert (await client.health()).is_healthy


async def test_a_consumer_that_cannot_tell_is_a_problem(client: QueueClient) -> None:
    class Broken:
        def health(self) -> ConsumerHealth:
            raise ZeroDivisionError("bug")

    client.add_reporter(Broken())
    (problem,) = (await client.health()).problems
    assert "ZeroDivisionError" in problem


async def test_a_loop_that_was_blocked_is_told_for_a_while(client: QueueClient, clock: ManualClock) -> None:
    await send(client, 1)
    assert await client.receive_message(QUEUE, 0)
    assert client._renewer is not None
    assert client._renewer._scheduler is not None
    block = Block((0.0, 0.0), Place("handle (app.py:7)", ""), True, 12.34, 0.0)
    client._renewer._scheduler.last_block = block
    await clock.advance(5)
    assert (await client.health()).problems == (
        "the event loop was blocked for at least 12.3 s by handle (app.py:7), until 5 s ago",
    )
    await clock.advance(REMEMBERED)
    assert (await client.health()).is_healthy


async def test_one_queue_that_is_worked_on_does_not_hide_another_that_is_not(
    client: QueueClient, clock: ManualClock
) -> None:
    client.add_reporter(Reporter())
    for _ in range(8):
        await send(client, 1)
        await client.send_message("invoices", Message(body=b"x"))
        message = await client.receive_message("invoices", 0)
        assert message is not None
        await client.complete_message(message)
        health = await client.health()
        await clock.advance(5.0)
    assert health.last_settle == 0.0
    assert health.problems == ("the backlog of queue orders has grown from 1 to 8 in 35 s, and nothing was settled",)


async def test_a_provider_with_a_bug_is_a_problem_and_no_exception(client: QueueClient, recorder: Recorder) -> None:
    recorder.count_faults.append(fail(RuntimeError("oops")))
    health = await client.health(QUEUE)
    assert health.problems == ("the service did not say what is in queue orders: RuntimeError('oops')",)


async def test_who_only_sends_is_told_of_a_service_that_cannot_be_reached(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    recorder.send_faults += 2 * [fail(ConnectionFailedError("reset"))]
    for failing in (client.send_message(QUEUE, Message(body=b"x")), send(client, 2)):
        with pytest.raises(ConnectionFailedError):
            await failing
    await clock.advance(2.0)
    health = await client.health()
    assert health.connection == "failing"
    assert health.problems == ("sending to queue orders failed: reset, 2 s ago, and nothing was heard since",)
    await send(client, 1)
    assert (await client.health()).is_healthy


async def test_trouble_that_nobody_met_again_is_forgotten(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    """Else a process that gets no work while it is not healthy would never be healthy again."""
    for faults in (recorder.send_faults, recorder.open_faults):
        faults.append(fail(ConnectionFailedError("reset")))
    with pytest.raises(ConnectionFailedError):
        await send(client, 1)
    with pytest.raises(ConnectionFailedError):
        await client.receive_message(QUEUE, 0)
    await clock.advance(FORGOTTEN - 1)
    assert len((await client.health()).problems) == 2
    await clock.advance(2)
    assert (await client.health()).is_healthy
