"""Redrive beyond the contract [C16]: failures on the way, long runs, bad arguments; nothing stays locked."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from wrapping import Recorder, fail, wrap

from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock
from queue_runtime.config import InMemoryConfig
from queue_runtime.dlq import RedriveResult
from queue_runtime.errors import ConnectionFailedError, QueueFullError, ValidationError
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.retry import NoRetry
from queue_runtime.sessions import FieldKey

QUEUE = "orders"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return wrap(monkeypatch, settles_in_process=True)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def client(recorder: Recorder, clock: ManualClock) -> AsyncIterator[QueueClient]:
    async with QueueClient(InMemoryConfig(max_lock_renewal=0, retry=NoRetry()), clock=clock) as client:
        yield client


async def bury(client: QueueClient, count: int, **fields: Any) -> None:
    if not count:
        return
    await client.send_messages(QUEUE, [Message(body=b"%d" % number, **fields) for number in range(count)])
    for message in await client.receive_messages(QUEUE, count, 0):
        await client.dead_letter_message(message, "reason")


async def free(client: QueueClient) -> list[bytes]:
    """The dead letters that are not locked."""
    return [letter.body for letter in await client.dead_letters(QUEUE).receive_messages(1000, 0)]


async def test_more_than_a_batch(client: QueueClient) -> None:
    """With a result after each batch."""
    await bury(client, 250)
    seen: list[RedriveResult] = []
    result = await client.dead_letters(QUEUE).redrive(timeout=0, progress=seen.append)
    assert result == RedriveResult(250, 250, 250, 0)
    assert seen == [RedriveResult(*[done] * 3, 0) for done in (100, 200, 250)]
    assert len(await client.receive_messages(QUEUE, 1000, 0)) == 250


async def test_an_empty_one(client: QueueClient) -> None:
    for dry_run in (False, True):
        assert await client.dead_letters(QUEUE).redrive(timeout=0, dry_run=dry_run) == RedriveResult(0, 0, 0, 0)


async def test_what_fails_again_at_once_is_moved_once(client: QueueClient) -> None:
    """It looks at no more than were there at the start."""
    await bury(client, 3)
    stop = asyncio.Event()

    async def fail_all() -> None:
        while not stop.is_set():
            for message in await client.receive_messages(QUEUE, 10, 0):
                await client.dead_letter_message(message, "again")
            await asyncio.sleep(0)

    failing = asyncio.create_task(fail_all())
    result = await client.dead_letters(QUEUE).redrive(timeout=0)
    stop.set()
    await failing
    assert result.moved == 3


async def test_what_is_not_accepted_stays_a_dead_letter(client: QueueClient, recorder: Recorder) -> None:
    """Counted as failed; the others are moved."""
    await bury(client, 4)
    refused = QueueFullError("queue", 1)
    recorder.send_faults.append(lambda messages: [None, refused, None, refused])
    result = await client.dead_letters(QUEUE).redrive(timeout=0)
    assert result == RedriveResult(4, 4, 2, 2)
    assert await free(client) == [b"1", b"3"]


async def test_a_send_that_fails_leaves_all_where_they_were(client: QueueClient, recorder: Recorder) -> None:
    await bury(client, 4)
    recorder.send_faults.append(fail(ConnectionFailedError("reset")))
    with pytest.raises(ConnectionFailedError):
        await client.dead_letters(QUEUE).redrive(timeout=0)
    assert len(await free(client)) == 4
    assert await client.receive_messages(QUEUE, 10, 0) == []


async def test_what_cannot_be_removed_after_it_was_sent_is_counted(client: QueueClient, clock: ManualClock) -> None:
    """The filter took so long that the locks of a batch ran out: it is in both places; the next batch is moved."""
    await bury(client, 150)

    def slow(letter: ReceivedMessage) -> bool:
        if letter.body == b"99":
            clock._now += 31  # a filter blocks: nothing else runs meanwhile
        return True

    result = await client.dead_letters(QUEUE).redrive(where=slow, timeout=0)
    assert result == RedriveResult(150, 150, 50, 100)
    assert len(await client.receive_messages(QUEUE, 1000, 0)) == 150
    assert len(await free(client)) == 100


async def test_a_filter_that_fails_leaves_all_where_they_were(client: QueueClient) -> None:
    await bury(client, 4)

    def broken(letter: ReceivedMessage) -> bool:
        return bool(1 / int(letter.body))

    with pytest.raises(ZeroDivisionError):
        await client.dead_letters(QUEUE).redrive(where=broken, timeout=0)
    assert len(await free(client)) == 4


async def test_a_cancelled_one_leaves_nothing_locked(client: QueueClient, clock: ManualClock) -> None:
    await bury(client, 6)
    task = asyncio.create_task(
        client.dead_letters(QUEUE).redrive(where=lambda letter: int(letter.body) % 2 == 1, rate=2.0, timeout=0)
    )
    await clock.advance(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    moved = [message.body for message in await client.receive_messages(QUEUE, 10, 0)]
    assert sorted([*moved, *await free(client)]) == [b"%d" % number for number in range(6)]


async def test_a_long_one_outlives_the_locks_of_what_it_leaves(client: QueueClient, clock: ManualClock) -> None:
    """A message that the filter leaves is free again when its lock runs out: no error in the end."""
    await bury(client, 8)
    task = asyncio.create_task(
        client.dead_letters(QUEUE).redrive(where=lambda letter: int(letter.body) >= 2, rate=0.1, timeout=0)
    )
    await clock.advance(500)
    result = await asyncio.wait_for(task, 1)
    assert result.moved == result.matched
    moved = [message.body for message in await client.receive_messages(QUEUE, 10, 0)]
    left = await free(client)
    assert b"0" in left
    assert b"1" in left
    assert sorted([*moved, *left]) == [b"%d" % number for number in range(8)]


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0, 40.0])
async def test_the_rate_holds_over_any_time(client: QueueClient, clock: ManualClock, rate: float) -> None:
    """After t seconds no more than t times the rate are moved, and one second's worth."""
    await bury(client, 60)
    task = asyncio.create_task(client.dead_letters(QUEUE).redrive(rate=rate, timeout=0))
    for _ in range(200):
        back = (await client.counts(QUEUE)).active
        assert back <= clock.monotonic() * rate + max(1, rate)
        await clock.advance(1.0)
        if task.done():
            break
    assert (await task).moved == 60
    assert clock.monotonic() >= 60 / rate - 1


async def test_what_would_keep_it_from_arriving_is_left_behind(clock: ManualClock) -> None:
    """Deduplication id, delay and schedule; a time to live starts anew."""
    async with QueueClient(InMemoryConfig(), clock=clock) as client:
        await client.send_message(
            QUEUE, Message(body=b"x", deduplication_id="d", delay=1, time_to_live=60, attributes={"a": "1"})
        )
        await clock.advance(1.1)
        (message,) = await client.receive_messages(QUEUE, 1, 0)
        await client.dead_letter_message(message, "reason")
        await clock.advance(100)
        assert (await client.dead_letters(QUEUE).redrive(timeout=0)).moved == 1
        (back,) = await client.receive_messages(QUEUE, 1, 0)
        assert back.message() == message.message().replace(deduplication_id=None, delay=None)


async def test_a_session_key_is_not_asked_again(clock: ManualClock) -> None:
    """A dead letter goes back as it was, also one that the key's strategy would refuse: a body that is no JSON."""
    name = "redrive-with-a-key"
    config = InMemoryConfig(name=name)
    async with (
        QueueClient(config, clock=clock) as plain,
        QueueClient(config, clock=clock, session_key=FieldKey("k"), session_key_source="body") as keyed,
    ):
        await plain.send_messages(QUEUE, [Message(body=b"no JSON"), Message(body=b'{"k": "s"}')])
        for message in await plain.receive_messages(QUEUE, 2, 0):
            await plain.dead_letter_message(message, "poison")
        assert (await keyed.dead_letters(QUEUE).redrive(timeout=0)).moved == 2
        back = await plain.receive_messages(QUEUE, 10, 0)
        assert [message.session_id for message in back] == [None, None]


async def test_a_dry_run_without_peek(monkeypatch: pytest.MonkeyPatch, clock: ManualClock) -> None:
    """It locks for as long as it looks, and releases."""
    wrap(monkeypatch, settles_in_process=True, peek=False)
    async with QueueClient(InMemoryConfig(), clock=clock) as client:
        await bury(client, 150)
        letters = client.dead_letters(QUEUE)
        result = await letters.redrive(dry_run=True, where=lambda letter: letter.body < b"2", timeout=0)
        assert (result.scanned, result.matched, result.moved) == (150, 62, 0)
        assert (await letters.redrive(dry_run=True, limit=7, timeout=0)).matched == 7
        assert len(await free(client)) == 150


async def test_a_dry_run_looks_no_further_than_its_limit(client: QueueClient) -> None:
    await bury(client, 250)
    result = await client.dead_letters(QUEUE).redrive(dry_run=True, limit=3, where=lambda letter: letter.body > b"1")
    assert result.matched == 3
    assert result.scanned < 10
    result = await client.dead_letters(QUEUE).redrive(dry_run=True)
    assert (result.scanned, result.matched) == (250, 250)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("limit", 0),
        ("limit", -1),
        ("limit", True),
        ("limit", 1.5),
        ("limit", "3"),
        ("rate", 0),
        ("rate", -1.0),
        ("rate", float("nan")),
        ("rate", float("inf")),
        ("rate", "fast"),
        ("rate", True),
        ("timeout", -1),
        ("timeout", "1"),
        ("timeout", float("nan")),
        ("where", "all"),
    ],
)
async def test_bad_arguments(client: QueueClient, field: str, value: object) -> None:
    """Named, and before anything is looked at: an empty queue makes no difference."""
    for count in (0, 2):
        await bury(client, count)
        with pytest.raises(ValidationError) as caught:
            await client.dead_letters(QUEUE).redrive(**{field: value})  # type: ignore[arg-type]
        assert caught.value.field == field
        assert len(await free(client)) == count


async def test_names(client: QueueClient) -> None:
    assert repr(client.dead_letters(QUEUE)) == "<DeadLetters of 'orders'>"
    with pytest.raises(ValidationError, match="queue_name"):
        client.dead_letters("not a name")
