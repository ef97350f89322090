"""Messages, receipts and the engine under values that are odd, huge, changing or half made."""

from __future__ import annotations

import contextlib
import math
import os
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from queue_runtime._core.delivery import Receipt, ReceivedMessage
from queue_runtime._core.engine import ABANDON, COMPLETE, Engine
from queue_runtime._core.envelope import decode_envelope, encode_envelope
from queue_runtime._core.ledger import Link
from queue_runtime._core.message import Message
from queue_runtime.errors import SessionLockLostError, ValidationError

HUGE = 10**5000


class Name(str):
    """As MessageId and SessionId are."""


def delivery(**changes: Any) -> ReceivedMessage:
    arguments: dict[str, Any] = {
        "message": Message(body=b""),
        "receipt": None,
        "delivery_count": 1,
        "enqueued_at": 1.0,
        "first_delivered_at": 2.0,
        "delivered_at": 3.0,
        "locked_until": 4.0,
    }
    return ReceivedMessage(**arguments | changes)


def engine(**changes: Any) -> Engine:
    settings: dict[str, Any] = {
        "lock_duration": 10.0,
        "session_lock_duration": 100.0,
        "max_delivery_count": 5,
        "dead_letter_on_expiration": True,
        "deduplication_window": 30.0,
        "capacity": 100,
        "max_message_size": 1000,
    }
    return Engine("q", **(settings | changes))


def test_a_size_counts_nothing_twice() -> None:
    """[C7] Plain text before a name of a subclass is checked twice, and counted once."""
    mixed = Message(body=b"b", message_id="m", attributes={"a": "12345678", "b": Name("1"), Name("c"): "2"})
    plain = Message(body=b"b", message_id="m", attributes={"a": "12345678", "b": "1", "c": "2"})
    assert mixed == plain
    assert mixed.size == plain.size == decode_envelope(encode_envelope(plain)).size == 15


def test_c3_what_can_be_made_can_be_read_and_sent() -> None:
    """The last hours of the year 9999 west of Greenwich are no more a time in UTC."""
    west = timezone(timedelta(hours=-12))
    last = Message(body=b"", scheduled_at=datetime(9999, 12, 31, 11, 59, 59, 999999, west))
    assert decode_envelope(encode_envelope(last)).scheduled_at == last.scheduled_at
    with pytest.raises(ValidationError, match="9999") as caught:
        Message(body=b"", scheduled_at=datetime(9999, 12, 31, 12, tzinfo=west))
    assert caught.value.field == "scheduled_at"


@pytest.mark.parametrize("field", ["time_to_live", "delay"])
@pytest.mark.parametrize("value", [HUGE, -HUGE], ids=["positive", "negative"])
def test_durations_too_long_to_print(field: str, value: int) -> None:
    with pytest.raises(ValidationError) as caught:
        Message(body=b"", **{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_body_that_cannot_be_read() -> None:
    view = memoryview(b"gone")
    view.release()
    with pytest.raises(ValidationError, match="body"):
        Message(body=view)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enqueued_at", 1e300),
        ("enqueued_at", -1e12),
        ("enqueued_at", HUGE),
        ("enqueued_at", "noon"),
        ("first_delivered_at", 253402300800.0),
        ("delivered_at", math.inf),
        ("locked_until", 1e12),
        ("delivery_count", HUGE),
        ("delivery_count", -HUGE),
        ("delivery_count", 2**63),
        ("delivery_count", 1.5),
        ("delivery_count", "1"),
        ("sequence_number", -HUGE),
    ],
    ids=lambda value: "int" if isinstance(value, int) else str(value),
)
def test_c3_deliveries_that_could_not_be_read(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        delivery(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["enqueued_at", "delivered_at", "locked_until"])
def test_every_time_of_a_delivery_is_a_datetime(field: str) -> None:
    for year, seconds in ((1, -62135596800.0), (1970, 0), (9999, math.nextafter(253402300800.0, 0))):
        changes = {"first_delivered_at": None, field: seconds}
        assert getattr(delivery(**changes), field).year == year


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, "7", None, 1.0])
def test_a_receipt_of_no_receiver(value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Receipt("q", "token", value)
    assert caught.value.field == "receiver_id"
    receipt = Receipt.__new__(Receipt)
    with pytest.raises(ValidationError):
        receipt.__init__("q", "token", value)  # type: ignore[misc]
    assert receipt.queue_name is None


def test_randomness_that_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's stand-in for os.urandom must not make the ids read beyond what it returned."""
    monkeypatch.setattr(os, "urandom", lambda size: b"0123456789abcdef")
    with pytest.raises(RuntimeError, match="urandom"):
        [Message(body=b"") for _ in range(300)]
    monkeypatch.undo()
    assert len(Message(body=b"").message_id) == 36


def test_a_bare_link_belongs_to_no_engine() -> None:
    bare = Link.__new__(Link)
    for each in (engine(), Engine.__new__(Engine)):
        for call in (each.is_ready, lambda link, each=each: each.receive(link, 1, 0.0, 0.0)):
            with pytest.raises(ValidationError, match="another queue"):
                call(bare)
    assert bare.session_id is None


def test_receipts_that_change_while_they_are_settled() -> None:
    """An error is made for each that is refused, and in that time another thread may write to the caller's list."""
    queue = engine()
    queue.send([Message(body=b"1")], 0, 0.0, 0.0)
    link = queue.open_link()
    (received,) = queue.receive(link, 1, 0.0, 0.0)

    class Receipts(list[Any]):
        def __iter__(self) -> Any:
            yield received.receipt
            self.append("no receipt")

    receipts = Receipts()
    assert queue.settle(link, COMPLETE, receipts, 0.0, 0.0) == [None]
    with pytest.raises(ValidationError, match="must be of type Receipt, not str"):
        queue.settle(link, COMPLETE, list.copy(receipts), 0.0, 0.0)


@pytest.mark.parametrize("now", [math.inf, -math.inf, math.nan, -1e300, 1e300, 0.5])
def test_a_clock_that_jumps_loses_no_message(now: float) -> None:
    """Times are promised not to go back; when they do, or make no sense, locks end oddly and messages stay."""
    queue = engine(lock_duration=1.0, max_delivery_count=1000)
    messages = [Message(body=b"", session_id=s, deduplication_id=d) for s in (None, "s") for d in (None, "1", "2")]
    messages += [Message(body=b"", delay=5), Message(body=b"", session_id="s", delay=5)]
    assert queue.send(messages, 0, 0.0, 0.0) == len(messages)
    for time in (now, 1.0, now, 2.0, now, 0.0) * 3:
        for link in (queue.open_link(), queue.accept(None, time, 1.0)):
            if link is None:
                continue
            with contextlib.suppress(SessionLockLostError):
                received = queue.receive(link, 3, time, 1.0)
                queue.renew(link, [one.receipt for one in received[:1]], time, 1.0)
                queue.settle(link, ABANDON, [one.receipt for one in received[1:]], time, 1.0, 1.0)
            assert queue.next_due(time, 1.0) >= 0
            queue.close_link(link, time, 1.0)
        assert sum(queue.counts(time, 1.0)) == 6  # of two with one deduplication id, the second was dropped
    assert sum(len(queue.peek(10, 0, dead, now, 1.0)) for dead in (False, True)) == 6
