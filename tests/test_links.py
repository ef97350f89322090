"""Receivers that hang, die or lose their connection are replaced, and the client is not rebuilt [C37, C38, C23]."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from wrapping import Recorder, fail, hang, wrap

from queue_runtime.client import QueueClient
from queue_runtime.clock import Late, ManualClock, settle_tasks, within
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import (
    ClosedError,
    ConnectionFailedError,
    InvalidReceiptError,
    QueueTimeoutError,
    ServiceUnavailableError,
    SessionLockLostError,
)
from queue_runtime.links import GRACE
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.retry import FixedRetry, NoRetry
from queue_runtime.settlement import LONGEST_CALL

LOCK = 30.0
QUEUE = "orders"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return wrap(monkeypatch)


@pytest.fixture
async def client(recorder: Recorder, clock: ManualClock) -> AsyncIterator[QueueClient]:
    config = InMemoryConfig(settle_interval=0.0001, settle_batch_size=1, lock_duration=LOCK, retry=NoRetry())
    async with QueueClient(config, clock=clock) as client:
        yield client


async def sent(client: QueueClient, count: int = 1, **fields: Any) -> None:
    await client.send_messages(QUEUE, [Message(body=b"%d" % number, **fields) for number in range(count)])


async def one(client: QueueClient) -> ReceivedMessage:
    message = await client.receive_message(QUEUE, 0)
    assert message is not None
    return message


async def test_a_receive_that_does_not_come_back_is_given_up(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    """Told as a passing error; the next receive has a new receiver."""
    await sent(client)
    recorder.receive_faults.append(hang)
    task = asyncio.create_task(client.receive_message(QUEUE, 5))
    await clock.advance(5 + GRACE - 0.1)
    assert not task.done()
    await clock.advance(0.2)
    with pytest.raises(QueueTimeoutError) as caught:
        await task
    assert caught.value.is_transient
    assert (await one(client)).body == b"0"
    old, new = recorder.received
    await settle_tasks()
    assert recorder.open == {new}
    assert old != new


async def test_a_receive_that_hangs_can_be_cancelled(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    """[C38]"""
    recorder.receive_faults.append(hang)
    task = asyncio.create_task(client.receive_message(QUEUE, 5))
    await settle_tasks()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [timer for _, _, timer in clock._timers if timer.callback is not None]


@pytest.mark.parametrize("dead_letter", [False, True])
async def test_a_receiver_that_is_closed_is_replaced_within_the_call(
    client: QueueClient, recorder: Recorder, dead_letter: bool
) -> None:
    await sent(client)
    if dead_letter:
        await client.dead_letter_message(await one(client), "x")
    recorder.receive_faults.append(fail(ClosedError("detached")))
    message = await (client.dead_letters(QUEUE).receive_message(0) if dead_letter else client.receive_message(QUEUE, 0))
    assert message is not None
    await settle_tasks()
    assert recorder.received[-1] in recorder.open
    assert recorder.received[-2] not in recorder.open
    await client.complete_message(message)


async def test_one_that_is_always_closed_is_a_passing_error(client: QueueClient, recorder: Recorder) -> None:
    recorder.receive_faults += [fail(ClosedError("detached"))] * 2
    with pytest.raises(ConnectionFailedError):
        await client.receive_message(QUEUE, 0)
    assert len(set(recorder.received)) == 2
    await sent(client)
    await one(client)


async def test_everybody_who_waits_on_a_dead_receiver_goes_on(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    """One of them notices; the others are told by its end, and none fails."""
    tasks = [asyncio.create_task(client.receive_message(QUEUE, 60)) for _ in range(5)]
    await settle_tasks()
    recorder.receive_faults.append(fail(ConnectionFailedError("reset")))
    with pytest.raises(ConnectionFailedError):
        await client.receive_message(QUEUE, 0)
    await settle_tasks()
    await sent(client, 5)
    assert sorted([message.body async for message in each(tasks)]) == [b"0", b"1", b"2", b"3", b"4"]
    assert len(recorder.open) == 1


async def each(tasks: list[asyncio.Task[ReceivedMessage | None]]) -> AsyncIterator[ReceivedMessage]:
    for task in tasks:
        message = await task
        assert message is not None
        yield message


async def test_what_a_retired_receiver_delivered_is_settled_on_it(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    """[C41] As long as the service knows it; its lock is renewed; then the receiver is closed."""
    await sent(client, 2)
    message = await one(client)
    recorder.receive_faults.append(fail(ConnectionFailedError("reset")))
    with pytest.raises(ConnectionFailedError):
        await client.receive_message(QUEUE, 0)
    other = await one(client)
    assert other.receipt.receiver_id != message.receipt.receiver_id
    await clock.advance(LOCK * 3)
    assert message.receipt.receiver_id in recorder.open
    await client.complete_message(message)
    await clock.advance(LOCK * 1.1)
    assert recorder.open == {other.receipt.receiver_id}
    await client.complete_message(other)
    with pytest.raises(InvalidReceiptError):
        await client.complete_message(message)


async def test_it_is_so_for_the_time_of_a_lock_where_none_is_renewed(recorder: Recorder, clock: ManualClock) -> None:
    """[C41]"""
    config = InMemoryConfig(
        settle_interval=0.0001, settle_batch_size=1, lock_duration=LOCK, max_lock_renewal=0, retry=NoRetry()
    )
    async with QueueClient(config, clock=clock) as client:
        await sent(client, 2)
        messages = [await one(client), await one(client)]
        recorder.receive_faults.append(fail(ConnectionFailedError("reset")))
        with pytest.raises(ConnectionFailedError):
            await client.receive_message(QUEUE, 0)
        await clock.advance(LOCK * 0.5)
        await client.complete_message(messages[0])
        assert recorder.open
        await clock.advance(LOCK * 0.6)
        assert not recorder.open
        with pytest.raises(InvalidReceiptError):
            await client.complete_message(messages[1])


async def test_what_a_lost_receiver_delivered_cannot_be_settled(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    """It comes back, and its receipt is told invalid, at once and not as if the client were closed."""
    await sent(client)
    message = await one(client)
    real = client._links.main[QUEUE].receiver._real  # type: ignore[attr-defined]
    await real.close()
    with pytest.raises(InvalidReceiptError):
        await client.complete_message(message)
    recorder.settle_faults.append(fail(ClosedError("detached")))
    with pytest.raises(InvalidReceiptError):
        await client.complete_message(message)
    again = await one(client)
    assert again.delivery_count == 2
    await client.complete_message(again)


async def test_a_session_whose_receiver_is_closed_is_lost(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    """[C27] Whoever holds it closes it and takes it again."""
    for fault, wait in ((fail(ClosedError("detached")), 0.0), (hang, GRACE + 0.1)):
        await sent(client, session_id="s")
        session = await client.accept_session(QUEUE, "s")
        assert session is not None
        recorder.receive_faults.append(fault)
        task = asyncio.create_task(session.receive_message(0))
        await clock.advance(wait)
        with pytest.raises(SessionLockLostError) as caught:
            await task
        assert caught.value.session_id == "s"
        await session.close()
        await session.close()
        with pytest.raises(ClosedError):
            await session.receive_message(0)


async def test_a_session_that_is_lost_unheard_is_told_by_its_next_receive(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    """The connection is broken for as long as the lock lasts: to try again would be for ever."""
    session = await client.accept_session(QUEUE, "s")
    assert session is not None
    recorder.receive_faults.append(fail(ConnectionFailedError("reset")))
    with pytest.raises(ConnectionFailedError):
        await session.receive_message(0)
    recorder.renew_faults += [fail(ConnectionFailedError("reset"))] * 100
    await clock.advance(LOCK * 1.1)
    with pytest.raises(SessionLockLostError):
        await session.receive_message(0)
    await session.close()


async def test_an_accept_that_does_not_come_back_is_given_up(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    recorder.accept_faults.append(hang)
    task = asyncio.create_task(client.accept_session(QUEUE, timeout=5))
    await clock.advance(5 + GRACE + 0.1)
    with pytest.raises(QueueTimeoutError):
        await task
    assert await client.accept_session(QUEUE, timeout=0) is None


async def test_an_open_that_does_not_come_back_holds_up_no_other_queue(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    recorder.open_faults.append(hang)
    task = asyncio.create_task(client.receive_message(QUEUE, 0))
    await settle_tasks()
    await client.send_message("other", Message(body=b"x"))
    assert await client.receive_message("other", 0)
    await clock.advance(GRACE + 0.1)
    with pytest.raises(QueueTimeoutError):
        await task
    assert await client.receive_message(QUEUE, 0) is None


async def test_a_settlement_that_does_not_come_back_is_given_up(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    """[C38] The caller hears of it, and may try again."""
    await sent(client)
    message = await one(client)
    recorder.settle_faults.append(hang)
    task = asyncio.create_task(client.complete_message(message))
    while not recorder.settled:
        await asyncio.sleep(0.001)
    await clock.advance(LONGEST_CALL + 0.1)
    with pytest.raises(QueueTimeoutError):
        await task
    await client.complete_message(message)


@pytest.mark.parametrize("fault", [hang, fail(ServiceUnavailableError("busy"))])
async def test_a_close_ends_at_its_deadline(recorder: Recorder, clock: ManualClock, fault: Any) -> None:
    """[C23] Settlements that hang or are tried again for ever; their callers are told, and the messages come back."""
    config = InMemoryConfig(settle_interval=0.0001, retry=FixedRetry(delay=0.01, attempts=10**6))
    client = QueueClient(config, clock=clock)
    await sent(client)
    message = await one(client)
    recorder.settle_faults += [fault] * 10_000
    task = asyncio.create_task(client.complete_message(message))
    while not recorder.settled:
        await asyncio.sleep(0.001)
    closing = asyncio.create_task(client.close(timeout=5))
    await clock.advance(4.9)
    assert not closing.done()
    await clock.advance(0.2)
    async with asyncio.timeout(5):
        await closing
        with pytest.raises(ClosedError):
            await task
    assert recorder.open == {message.receipt.receiver_id}, "the provider closes what is open"


async def test_a_service_that_does_not_answer_does_not_keep_a_client_from_closing(
    recorder: Recorder, clock: ManualClock
) -> None:
    client = QueueClient(InMemoryConfig(), clock=clock)
    await one_session(client)
    recorder.close_faults.append(hang)
    closing = asyncio.create_task(client.close())
    await clock.advance(GRACE + 0.1)
    assert closing.done()
    await closing
    await client._provider._real.close()  # type: ignore[attr-defined]


async def test_a_session_that_does_not_close_holds_up_nobody(
    client: QueueClient, recorder: Recorder, clock: ManualClock
) -> None:
    session = await one_session(client)
    recorder.close_faults.append(hang)
    closing = asyncio.create_task(session.close())
    await clock.advance(GRACE + 0.1)
    with pytest.raises(QueueTimeoutError):
        await closing
    await session.close()
    recorder.open.clear()


async def one_session(client: QueueClient) -> Any:
    session = await client.accept_session(QUEUE, "s")
    assert session is not None
    return session


async def test_within_is_as_asyncio_s_timeout(clock: ManualClock) -> None:
    async def seven() -> int:
        return 7

    assert await within(clock, 1.0, seven()) == 7
    task = asyncio.create_task(within(clock, 1.0, asyncio.Event().wait()))
    await clock.advance(1.1)
    with pytest.raises(Late):
        await task
    assert not task.cancelling()

    async def both() -> None:
        await within(clock, 1.0, asyncio.Event().wait())

    task = asyncio.create_task(both())  # type: ignore[arg-type]
    await settle_tasks()
    task.cancel()
    await clock.advance(1.1)
    assert task.cancelled(), "a cancellation from outside wins"
    with pytest.raises(ZeroDivisionError):
        await within(clock, 1.0, failing())


async def failing() -> None:
    raise ZeroDivisionError


async def test_within_leaves_no_cancellation_behind_where_the_call_goes_on_all_the_same(clock: ManualClock) -> None:
    """As asyncio's timeout: else a timeout or a task group further out would take the cancellation for its own."""

    async def stubborn(error: Exception | None) -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        if error is not None:
            raise error
        return "done"

    async def call(error: Exception | None) -> int:
        with contextlib.suppress(ConnectionFailedError):
            assert await within(clock, 1.0, stubborn(error)) == "done"
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    for error in (None, ConnectionFailedError("reset")):
        task = asyncio.create_task(call(error))
        await clock.advance(2.0)
        assert await task == 0
