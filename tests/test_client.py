"""QueueClient: what it checks, what it forbids, and that closing leaves nothing behind, whenever it comes."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from datetime import UTC, timedelta
from typing import Any

import pytest
from wrapping import Recorder, fail, wrap

from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import (
    BatchSendError,
    BatchSettleError,
    CapabilityError,
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidReceiptError,
    ServiceUnavailableError,
    ThrottledError,
    ValidationError,
)
from queue_runtime.message import Message, Receipt, ReceivedMessage
from queue_runtime.retry import NoRetry

QUEUE = "orders"


@pytest.fixture(params=["auto", "batched"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[QueueClient]:
    async with QueueClient(InMemoryConfig(settlement=request.param, settle_interval=0.001)) as client:
        yield client


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return wrap(monkeypatch)


async def one(client: QueueClient) -> ReceivedMessage:
    await client.send_message(QUEUE, Message(body=b"x"))
    message = await client.receive_message(QUEUE, 0)
    assert message is not None
    return message


# Arguments.

BAD_NAMES = ["", "-a", "a-", "a--b", "a b", "é", "a/b", "x" * 261, ".fifo", "a.fifo.fifo", None, 5, b"orders"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
async def test_a_bad_queue_name_is_refused_everywhere(client: QueueClient, name: Any) -> None:
    """[C1, C3] And creates nothing."""
    message = Message(body=b"x")
    for call in (
        lambda: client.send_message(name, message),
        lambda: client.send_messages(name, [message]),
        lambda: client.send_messages(name, []),
        lambda: client.receive_messages(name, 1, 0),
        lambda: client.receive_message(name, 0),
        lambda: client.receive_deferred_messages(name, [1]),
        lambda: client.peek_messages(name),
        lambda: client.accept_session(name, "s", 0),
        lambda: client.counts(name),
        lambda: client.create_queue(name),
        lambda: client.dead_letters(name),
    ):
        with pytest.raises(ValidationError) as caught:
            await call()
        assert caught.value.field == "queue_name"


@pytest.mark.parametrize("count", [0, -1, 10_001, 1.0, True, None, "1"], ids=repr)
async def test_a_bad_count_is_refused_everywhere(client: QueueClient, count: Any) -> None:
    async with await held(client) as session:
        for call in (
            client.receive_messages(QUEUE, count, 0),
            client.peek_messages(QUEUE, count),
            client.dead_letters(QUEUE).receive_messages(count, 0),
            client.dead_letters(QUEUE).peek_messages(count),
            session.receive_messages(count, 0),
        ):
            with pytest.raises(ValidationError, match="from 1 to 10000") as caught:
                await call
            assert caught.value.field == "max_count"


async def held(client: QueueClient, name: str = "s") -> Any:
    session = await client.accept_session(QUEUE, name, 0)
    assert session is not None
    return session


@pytest.mark.parametrize(
    "pause", [-1, -0.1, float("nan"), float("inf"), True, None, "1", timedelta(seconds=-1)], ids=repr
)
async def test_a_bad_duration_is_refused_everywhere(client: QueueClient, pause: Any) -> None:
    """Named; the message can still be settled."""
    message = await one(client)
    async with await held(client) as session:
        for call, field in (
            (client.receive_messages(QUEUE, 1, pause), "timeout"),
            (client.receive_message(QUEUE, pause), "timeout"),
            (client.accept_session(QUEUE, None, pause), "timeout"),
            (session.receive_message(pause), "timeout"),
            (client.dead_letters(QUEUE).receive_message(pause), "timeout"),
            (client.abandon_message(message, pause), "delay"),
            (client.abandon_messages([message], pause), "delay"),
        ):
            with pytest.raises(ValidationError) as caught:
                await call
            assert caught.value.field == field
    await client.complete_message(message)


@pytest.mark.parametrize("session_id", ["", "x" * 129, "é", "a\nb", 5, b"s"], ids=repr)
async def test_a_bad_session_id_is_refused(client: QueueClient, session_id: Any) -> None:
    """[C2]"""
    with pytest.raises(ValidationError) as caught:
        await client.accept_session(QUEUE, session_id, 0)
    assert caught.value.field == "session_id"


@pytest.mark.parametrize("message", [None, b"x", "x", {"body": b"x"}, 5], ids=repr)
async def test_only_messages_are_sent(client: QueueClient, message: Any) -> None:
    """[C3] Nothing of the batch is; the place in it is told."""
    with pytest.raises(ValidationError) as caught:
        await client.send_message(QUEUE, message)
    assert caught.value.field == "message"
    with pytest.raises(ValidationError) as caught:
        await client.send_messages(QUEUE, [Message(body=b"x"), message])
    assert caught.value.field == "messages[1]"
    with pytest.raises(ValidationError, match="messages: must be several; send_message takes one"):
        await client.send_messages(QUEUE, Message(body=b"x"))  # type: ignore[arg-type]
    assert await client.receive_message(QUEUE, 0) is None


async def test_a_received_message_is_sent_by_its_message(client: QueueClient) -> None:
    with pytest.raises(ValidationError, match=r"use its \.message\(\)"):
        await client.send_message(QUEUE, await one(client))  # type: ignore[arg-type]


@pytest.mark.parametrize("thing", [None, b"x", "receipt", 5, Message(body=b"x")], ids=repr)
async def test_only_deliveries_are_settled(client: QueueClient, thing: Any) -> None:
    """And of many, none when one is no delivery."""
    message = await one(client)
    for call in (
        client.complete_message(thing),
        client.complete_messages([message, thing]),
        client.abandon_message(thing),
        client.dead_letter_message(thing, "reason"),
        client.defer_message(thing),
        client.renew_lock(thing),
        client.renew_locks([message, thing]),
    ):
        with pytest.raises(ValidationError) as caught:
            await call
        assert caught.value.field == "message"
    await client.complete_message(message)


async def test_a_bad_reason_or_description_is_refused(client: QueueClient) -> None:
    """[C15] Others who settle at the same time are not disturbed."""
    message, other = await one(client), await one(client)
    beside = asyncio.create_task(client.dead_letter_message(other, "good"))
    for reason, description, field in (("", None, "reason"), (5, None, "reason"), ("r", 5, "description")):
        with pytest.raises(ValidationError) as caught:
            await client.dead_letter_message(message, reason, description)  # type: ignore[arg-type]
        assert caught.value.field == field
    await beside
    await client.dead_letter_message(message, "r", "")
    assert await client.dead_letters(QUEUE).count() == 2


@pytest.mark.parametrize("number", [-1, 1.5, None, "1", True], ids=repr)
async def test_bad_sequence_numbers_are_refused(client: QueueClient, number: Any) -> None:
    with pytest.raises(ValidationError, match="sequence_number"):
        await client.receive_deferred_messages(QUEUE, [number])
    with pytest.raises(ValidationError, match="sequence_number"):
        await client.peek_messages(QUEUE, from_sequence_number=number)


async def test_receipts_of_others_are_refused(client: QueueClient) -> None:
    """[C41] Of another client, another queue, of nobody; of a receiver with another's token."""
    async with QueueClient() as stranger:
        theirs = await one(stranger)
        mine = await one(client)
        for receipt in (
            theirs.receipt,
            Receipt(QUEUE, 1, 10**9),
            Receipt(QUEUE, 12345, mine.receipt.receiver_id),
            Receipt("other", mine.receipt.token, mine.receipt.receiver_id),
            Receipt(QUEUE, None, mine.receipt.receiver_id),
            Receipt(QUEUE, "token", mine.receipt.receiver_id),
        ):
            for call in (client.complete_message(receipt), client.renew_lock(receipt)):
                with pytest.raises(InvalidReceiptError) as caught:
                    await call
                assert caught.value.receipt == receipt
        with pytest.raises(BatchSettleError) as batch:
            await client.complete_messages([theirs, mine])
        assert [outcome is None for outcome in batch.value.outcomes] == [False, True]
        await stranger.complete_message(theirs)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"provider": "sqs://"}, "provider"),
        ({"provider": None}, "provider"),
        ({"provider": object()}, "provider"),
        ({"session_key": "repo"}, "session_key"),
        ({"session_key": 5}, "session_key"),
        ({"session_key_source": "headers"}, "session_key_source"),
        ({"session_key_source": None}, "session_key_source"),
    ],
    ids=repr,
)
def test_a_wrong_client_is_refused_when_it_is_made(options: dict[str, Any], field: str) -> None:
    """[C33]"""
    with pytest.raises(ConfigurationError) as caught:
        QueueClient(**options)
    assert caught.value.field == field


@pytest.mark.parametrize("capability", ["sessions", "session_state", "peek", "defer", "abandon_delay"], ids=str)
async def test_what_the_provider_cannot_do_is_an_error(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    """By name, before the provider is asked; all else works."""
    wrap(monkeypatch, **{capability: False})
    async with QueueClient(InMemoryConfig(settle_interval=0.001)) as client:
        assert not getattr(client.capabilities, capability)
        message = await one(client)
        session = None if capability == "sessions" else await held(client)
        calls: dict[str, list[Any]] = {
            "sessions": [lambda: client.accept_session(QUEUE, "s", 0), lambda: client.accept_session(QUEUE, None, 0)],
            "session_state": [lambda: session.get_state(), lambda: session.set_state(b"x")],  # type: ignore[union-attr]
            "peek": [lambda: client.peek_messages(QUEUE), lambda: client.dead_letters(QUEUE).peek_messages()],
            "defer": [
                lambda: client.defer_message(message),
                lambda: client.receive_deferred_messages(QUEUE, [1]),
            ],
            "abandon_delay": [
                lambda: client.abandon_message(message, 1),
                lambda: client.abandon_messages([message], 1),
            ],
        }
        for call in calls[capability]:
            with pytest.raises(CapabilityError) as caught:
                await call()
            assert (caught.value.provider, caught.value.capability) == ("memory", capability)
        await client.abandon_message(message, 0)


async def test_what_it_is(client: QueueClient) -> None:
    """[C32] Nothing of the configuration is in a repr."""
    assert repr(client) == "<QueueClient memory>"
    assert client.provider_name == "memory"
    session = await held(client)
    assert repr(session) == "<Session 's' of 'orders'>"
    assert session.locked_until.tzinfo is UTC
    await session.close()
    await client.close()
    assert repr(client) == "<QueueClient memory closed>"


# Sending.


async def test_a_failed_batch_tells_each_outcome_in_order(recorder: Recorder) -> None:
    """[C9] It is transient when all that failed is."""
    async with QueueClient(InMemoryConfig(retry=NoRetry())) as client:
        busy, slow = ServiceUnavailableError("busy"), ThrottledError()
        messages = [Message(body=b"%d" % number) for number in range(4)]
        recorder.send_faults.append(lambda sent: [None, busy, None, slow])
        with pytest.raises(BatchSendError) as caught:
            await client.send_messages(QUEUE, messages)
        assert caught.value.outcomes == (messages[0].message_id, busy, messages[2].message_id, slow)
        assert caught.value.is_transient
        recorder.send_faults.append(lambda sent: [busy])
        with pytest.raises(ServiceUnavailableError):
            await client.send_message(QUEUE, messages[0])
        recorder.send_faults.append(fail(ConnectionFailedError("reset")))
        with pytest.raises(ConnectionFailedError):
            await client.send_messages(QUEUE, messages)


async def test_any_iterable_is_sent(client: QueueClient) -> None:
    ids = await client.send_messages(QUEUE, (Message(body=b"x", message_id=str(number)) for number in range(3)))
    assert ids == ["0", "1", "2"]


# Receivers and closing.


async def test_one_receiver_serves_a_queue(recorder: Recorder) -> None:
    """However many tasks ask for it first."""
    async with QueueClient() as client:
        recorder.gate = asyncio.Event()
        tasks = [asyncio.create_task(client.receive_messages(QUEUE, 1, 0)) for _ in range(10)]
        await settle_tasks()
        recorder.gate.set()
        await asyncio.gather(*tasks)
        await client.receive_deferred_messages(QUEUE, [])
        assert len(recorder.open) == 1
        await client.dead_letters(QUEUE).receive_messages(1, 0)
        await client.receive_messages("other", 1, 0)
        assert len(recorder.open) == 3


async def test_a_receiver_that_could_not_be_opened_is_tried_again(recorder: Recorder) -> None:
    """[C37] Nothing of the failure is kept."""
    async with QueueClient() as client:
        real = client._provider.open_receiver
        client._provider.open_receiver = fail_once(real)  # type: ignore[method-assign]
        with pytest.raises(ConnectionFailedError):
            await client.receive_messages(QUEUE, 1, 0)
        assert await client.receive_messages(QUEUE, 1, 0) == []


def fail_once(real: Any) -> Any:
    failures = [ConnectionFailedError("reset")]

    async def call(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return await real(*arguments, **options)

    return call


@pytest.mark.parametrize("settlement", ["auto", "batched"])
async def test_what_was_being_opened_when_the_client_closed_is_closed(recorder: Recorder, settlement: str) -> None:
    """[C23] A receiver and a session that the service grants a moment too late."""
    client = QueueClient(InMemoryConfig(settlement=settlement))  # type: ignore[arg-type]
    recorder.gate = asyncio.Event()
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(client.receive_message(QUEUE, 0)),
        asyncio.create_task(client.accept_session(QUEUE, "s", 0)),
    ]
    real = client._provider._real  # type: ignore[attr-defined]
    close, real.close = real.close, settle_tasks  # a service that does not know of the close yet
    await settle_tasks()
    closing = asyncio.create_task(client.close())
    await settle_tasks()
    recorder.gate.set()
    for task in tasks:
        with pytest.raises(ClosedError):
            await task
    await closing
    assert recorder.open == set()
    assert client._settler._mpccs == []
    await close()


async def test_a_close_that_fails_still_closes_the_provider(recorder: Recorder) -> None:
    """[C23]"""
    client = QueueClient()
    message = await one(client)
    assert client._renewer is not None

    async def broken(timeout: float) -> None:
        raise ZeroDivisionError

    client._settler.close = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        await client.close()
    with pytest.raises(ClosedError):
        await client._provider.counts(QUEUE)
    with pytest.raises(ClosedError):
        await client.complete_message(message)


async def test_two_closes_at_once(client: QueueClient) -> None:
    """[C23] Neither fails, and what was under way is settled."""
    message = await one(client)
    task = asyncio.create_task(client.complete_message(message))
    await asyncio.sleep(0)
    first = asyncio.create_task(client.close())
    await asyncio.sleep(0)
    await client.close()
    assert first.done(), "the second waits for the first"
    assert task.done()
    await task
    await client.close()


@pytest.mark.both_loops
async def test_a_closed_client_is_collected() -> None:
    """[C23] Nothing, such as a timer, refers to it any more."""
    client = QueueClient(InMemoryConfig(settlement="batched", settle_interval=0.001))
    await client.complete_message(await one(client))
    await one(client)
    session = await held(client)
    await client.close()
    seen = weakref.ref(client._renewer), weakref.ref(client._settler), weakref.ref(client)  # type: ignore[arg-type]
    del client, session
    await settle_tasks()
    gc.collect()
    assert [reference() for reference in seen] == [None, None, None]


async def test_leaving_by_an_error_closes_as_well() -> None:
    with pytest.raises(ZeroDivisionError):
        async with QueueClient() as client:
            raise ZeroDivisionError
    with pytest.raises(ClosedError):
        await client.counts(QUEUE)


async def test_a_session_closes_when_its_last_settlement_fails(recorder: Recorder) -> None:
    """And its lock is given back, not left to run out."""
    async with QueueClient(InMemoryConfig(retry=NoRetry(), settle_interval=0.001)) as client:
        await client.send_message(QUEUE, Message(body=b"x", session_id="s"))
        async with await held(client) as session:
            message = await session.receive_message(0)
            recorder.settle_faults.append(fail(ConnectionFailedError("reset")))
            task = asyncio.create_task(client.complete_message(message))
            await asyncio.sleep(0)
        with pytest.raises(ConnectionFailedError):
            await task
        assert recorder.open == set()
        async with await held(client) as session:
            assert (await session.receive_message(0)).delivery_count == 2


async def test_an_idle_client_does_nothing() -> None:
    """[P11] Without messages there is no timer, with them one."""
    clock = ManualClock()
    async with QueueClient(InMemoryConfig(), clock=clock) as client:
        await client.receive_messages(QUEUE, 1, 0)
        assert clock._timers == []
        messages = [await one(client) for _ in range(5)]
        assert len(clock._timers) == 1
        await client.complete_messages(messages)
        assert len(asyncio.all_tasks()) == 1


async def test_listeners_are_told_until_they_are_taken_back() -> None:
    clock = ManualClock()
    told: list[str] = []
    async with QueueClient(InMemoryConfig(max_lock_renewal=1), clock=clock) as client:
        stop = client.on_locks_lost(lambda *what: told.append("first"))
        client.on_locks_lost(lambda *what: told.append("second"))
        await one(client)
        await clock.advance(31)
        stop()
        await client.receive_message(QUEUE, 0)
        await clock.advance(31)
    assert told == ["first", "second", "second"]


async def test_a_close_that_is_cancelled_gives_up_what_is_not_settled_yet(recorder: Recorder) -> None:
    """Such as by a ``wait_for`` around it: nothing settles behind a connection that is closed."""
    client = QueueClient(InMemoryConfig(settle_interval=0.0001, settle_batch_size=1))
    await client.send_message(QUEUE, Message(body=b"x"))
    message = await one(client)
    recorder.gate = asyncio.Event()
    completing = asyncio.create_task(client.complete_message(message))
    while not recorder.at_gate:
        await asyncio.sleep(0)
    closing = asyncio.create_task(client.close())
    await settle_tasks()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(ClosedError):
        await completing
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await client.close()
