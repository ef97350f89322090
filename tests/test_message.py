"""Messages, receipts and ids [C1-C5]: what is kept, what is refused, what is shown."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import uuid
from collections import UserDict
from datetime import UTC, datetime, timedelta, timezone
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, strategies as st

from queue_runtime.errors import InvalidReceiptError, ValidationError
from queue_runtime.message import Message, MessageId, QueueName, Receipt, ReceivedMessage, SessionId

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class OddStr(str):
    def __hash__(self) -> int:
        raise AssertionError("user code ran")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("user code ran")

    def __len__(self) -> int:
        return 0


def received(**changes: Any) -> ReceivedMessage:
    arguments: dict[str, Any] = {
        "message": Message(body=b"b", message_id="m", session_id="s"),
        "receipt": Receipt("orders", "secret-token", 7),
        "delivery_count": 2,
        "enqueued_at": NOON.timestamp(),
        "first_delivered_at": NOON.timestamp() + 1,
        "delivered_at": NOON.timestamp() + 2,
        "locked_until": NOON.timestamp() + 32,
    }
    return ReceivedMessage(**arguments | changes)


def test_every_field_comes_back() -> None:
    message = Message(
        body=b"body",
        attributes={"a": "1", "ü": "€"},
        message_id="m",
        session_id="s",
        correlation_id="c",
        content_type="t",
        time_to_live=1.5,
        scheduled_at=NOON.astimezone(timezone(timedelta(hours=2))),
        deduplication_id="d",
    )
    assert message.body == b"body"
    assert message.body_view == b"body"
    assert message.attributes == {"a": "1", "ü": "€"}
    assert (message.message_id, message.session_id, message.correlation_id) == ("m", "s", "c")
    assert (message.content_type, message.deduplication_id) == ("t", "d")
    assert message.time_to_live == timedelta(seconds=1.5)
    assert message.scheduled_at == NOON
    assert message.scheduled_at.tzinfo is UTC
    assert message.delay is None
    assert Message(body=b"", delay=timedelta(days=2)).delay == timedelta(days=2)
    assert message.size == 4 + 2 + 5 + 5
    assert Message(body=b"1234").size == 4 + 36


def test_defaults() -> None:
    message = Message(body=b"")
    assert uuid.UUID(message.message_id).version == 4
    assert str(uuid.UUID(message.message_id)) == message.message_id
    assert message.attributes == {}
    for field in ("session_id", "correlation_id", "content_type", "time_to_live", "scheduled_at", "delay"):
        assert getattr(message, field) is None
    assert message.deduplication_id is None


def test_ids_are_unique_across_threads() -> None:
    found: list[set[str]] = []

    def make() -> None:
        found.append({Message(body=b"").message_id for _ in range(5000)})

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set().union(*found)) == 20_000
    assert all(
        uuid.UUID(each).version == 4 and uuid.UUID(each).variant == uuid.RFC_4122 for each in list(found[0])[:500]
    )


def test_ids_are_unique_after_a_fork() -> None:
    code = """if True:
        import os, sys
        from queue_runtime.message import Message
        Message(body=b"")
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, Message(body=b"").message_id.encode())
            os._exit(0)
        os.wait()
        sys.exit(os.read(read, 99).decode() == Message(body=b"").message_id)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda raw: memoryview(raw * 2)[: len(raw)]])
def test_bodies(make: Any) -> None:
    message = Message(body=make(b"body"))
    assert type(message.body) is bytes
    assert message.body == b"body"
    mutable = bytearray(b"body")
    message = Message(body=mutable)
    mutable[0] = 0
    assert message.body == b"body"
    assert Message(body=memoryview(b"b-o-d-y")[::2]).body == b"body"


@pytest.mark.parametrize("given", [dict, UserDict, MappingProxyType])
def test_attributes_are_copied_and_read_only(given: Any) -> None:
    source = {"a": "1"}
    message = Message(body=b"", attributes=given(source))
    source["a"] = "2"
    assert message.attributes == {"a": "1"}
    with pytest.raises(TypeError):
        message.attributes["a"] = "3"  # type: ignore[index]
    assert message.replace(attributes=message.attributes) == message


def test_subclasses_of_str_become_str_without_running_their_code() -> None:
    message = Message(
        body=b"", attributes=UserDict(), message_id=OddStr("m"), session_id=OddStr("s"), correlation_id=OddStr("c")
    )
    assert [type(value) for value in (message.message_id, message.session_id, message.correlation_id)] == [str] * 3
    assert type(Message(body=b"", message_id=MessageId("m"), session_id=SessionId("s")).session_id) is str


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("body", "text", "must be bytes, bytearray or memoryview, not str"),
        ("body", None, "must be bytes"),
        ("body", 5, "must be bytes"),
        ("message_id", "", "must not be empty"),
        ("message_id", 5, "must be a str, not int"),
        ("message_id", "a\ud800", "a lone surrogate at index 1"),
        ("session_id", "", "1 to 128 printable ASCII"),
        ("session_id", "x" * 129, "1 to 128 printable ASCII"),
        ("session_id", "é", "1 to 128 printable ASCII"),
        ("session_id", "tab\t", "1 to 128 printable ASCII"),
        ("session_id", "a longer id with \x7f", "1 to 128 printable ASCII"),
        ("session_id", b"s", "must be a str"),
        ("correlation_id", 1, "must be a str"),
        ("correlation_id", "\udfff", "a lone surrogate"),
        ("content_type", 1, "must be a str"),
        ("deduplication_id", "", "must not be empty"),
        ("attributes", [("a", "b")], "must be a mapping"),
        ("attributes", {"a": 1}, "must be a str, not int"),
        ("attributes", {1: "a"}, "must be a str, not int"),
        ("attributes", {"": "a"}, "must have 1 to 1024"),
        ("attributes", {"é" * 513: "a"}, "has a name of 1026 bytes"),
        ("attributes", {"a": "\ud800"}, "a lone surrogate"),
        ("attributes", {str(n): "" for n in range(257)}, "has 257 entries; the limit is 256"),
        ("time_to_live", 0, "at least a microsecond"),
        ("time_to_live", 1e-7, "at least a microsecond"),
        ("time_to_live", -1.0, "at least a microsecond"),
        ("time_to_live", float("nan"), "must be finite"),
        ("time_to_live", float("inf"), "must be finite"),
        ("time_to_live", 1e300, "at most"),
        ("time_to_live", 10**400, "at most"),
        ("time_to_live", timedelta.max, "at most"),
        ("time_to_live", True, "not bool"),
        ("time_to_live", "1", "must be seconds or a timedelta, not str"),
        ("delay", -1, "must not be negative"),
        ("delay", timedelta(-1), "must not be negative"),
        ("scheduled_at", NOON.replace(tzinfo=None), "aware"),
        ("scheduled_at", 5, "must be a datetime"),
        ("scheduled_at", datetime(1969, 12, 31, tzinfo=UTC), "before 1970"),
    ],
)
def test_bad_fields_are_refused(field: str, value: Any, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem) as caught:
        Message(**{"body": b""} | {field: value})
    assert caught.value.field == field
    if field != "body":
        with pytest.raises(ValidationError, match=problem):
            Message(body=b"").replace(**{field: value})


def test_limits_that_are_just_allowed() -> None:
    longest = timedelta(microseconds=2**63 - 1)
    message = Message(
        body=b"", time_to_live=longest, scheduled_at=datetime.max.replace(tzinfo=UTC), session_id="~" * 128
    )
    assert message.time_to_live == longest
    assert message.scheduled_at == datetime.max.replace(tzinfo=UTC)
    assert Message(body=b"", delay=0).delay == timedelta(0)
    assert Message(body=b"", delay=0.1234567).delay == timedelta(microseconds=123457)


def test_delay_and_schedule_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="excludes scheduled_at"):
        Message(body=b"", delay=1, scheduled_at=NOON)
    assert Message(body=b"", delay=1).replace(delay=None, scheduled_at=NOON).scheduled_at == NOON


def test_the_constructor_takes_keywords_only() -> None:
    with pytest.raises(TypeError):
        Message(b"body")  # type: ignore[call-arg,arg-type,misc]
    with pytest.raises(TypeError):
        Message()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Message(body=b"", colour="red")  # type: ignore[call-arg]


def test_validation_cannot_be_bypassed() -> None:
    """[C3] Not by __new__, not by a second __init__, not by a constructor that failed, not by a subclass."""
    failed = Message.__new__(Message)
    with pytest.raises(ValidationError):
        failed.__init__(body=b"", session_id="")  # type: ignore[misc]
    for bare in (Message.__new__(Message), failed):
        for field in ("body", "body_view", "message_id", "session_id", "attributes", "size"):
            with pytest.raises(ValidationError, match="without its constructor"):
                getattr(bare, field)
        assert "without its constructor" in repr(bare)
        with pytest.raises(ValidationError):
            pickle.dumps(bare)
    message = Message(body=b"")
    for made in (message, failed):
        with pytest.raises(TypeError, match="immutable"):
            made.__init__(body=b"other")  # type: ignore[misc]
    for field in ("body", "message_id", "colour", "ttl_us", "__dict__"):
        with pytest.raises(AttributeError):
            setattr(message, field, 1)
    for cls in (Message, ReceivedMessage, Receipt):
        with pytest.raises(TypeError):
            type("Sub", (cls,), {})
    restore, fields = pickle.loads(pickle.dumps(message.__reduce__()))
    with pytest.raises(ValidationError):
        restore(*fields[:3], "", *fields[4:])


def test_equality_is_by_value() -> None:
    message = Message(body=b"b", message_id="m", attributes={"a": "1"}, delay=3)
    assert message == Message(body=b"b", message_id="m", attributes={"a": "1"}, delay=3.0)
    assert len({message, message.replace()}) == 1
    changes: list[dict[str, Any]] = [
        {"body": b"c"},
        {"message_id": "n"},
        {"attributes": {}},
        {"delay": 4},
        {"delay": None},
        {"time_to_live": 1},
        {"session_id": "s"},
        {"correlation_id": "c"},
        {"content_type": "c"},
        {"deduplication_id": "c"},
    ]
    for change in changes:
        assert message.replace(**change) != message, change
        for name, value in change.items():
            if name not in {"delay", "time_to_live"}:
                assert getattr(message.replace(**change), name) == value
    assert message != "m"
    with pytest.raises(ValidationError, match="colour: is not a field"):
        message.replace(colour="red")


def test_copies_and_pickles() -> None:
    message = Message(body=b"b", attributes={"a": "1"}, scheduled_at=NOON, time_to_live=5)
    assert copy.copy(message) is message
    assert copy.deepcopy([message])[0] is message
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(message, protocol)) == message


def test_nothing_secret_is_shown() -> None:
    """[C32] Neither body nor attributes nor token in a repr, and no token in a pickle."""
    message = Message(body=b"secret-body", attributes={"key": "secret-value"})
    assert "secret" not in repr(message)
    delivery = received(message=message)
    assert "secret" not in repr(delivery)
    assert "secret" not in repr(delivery.receipt)
    assert repr(delivery.receipt) == "Receipt(queue_name='orders', receiver_id=7)"
    assert b"secret" not in pickle.dumps(delivery.receipt)
    assert "secret" not in str(InvalidReceiptError(delivery.receipt))
    assert pickle.loads(pickle.dumps(InvalidReceiptError(delivery.receipt))).receipt.queue_name == "orders"


def test_receipts_are_values() -> None:
    receipt = Receipt("q", ("lane", 5), 1)
    assert (receipt.queue_name, receipt.token, receipt.receiver_id) == ("q", ("lane", 5), 1)
    assert receipt == Receipt("q", ("lane", 5), 1)
    assert len({receipt, Receipt("q", ("lane", 5), 1), Receipt("q", ("lane", 6), 1), Receipt("q", ("lane", 5), 2)}) == 3
    assert receipt != Receipt("r", ("lane", 5), 1)
    assert receipt != 5
    assert copy.deepcopy(receipt) is receipt
    with pytest.raises(AttributeError):
        receipt.token = 6  # type: ignore[misc]
    with pytest.raises(TypeError, match="immutable"):
        receipt.__init__("q", 6, 1)  # type: ignore[misc]
    with pytest.raises(ValidationError, match="queue_name"):
        Receipt(5, 6, 1)  # type: ignore[arg-type]


def test_a_cycle_through_a_token_is_collected() -> None:
    class Token:
        receipt: Receipt

    gc.collect()
    for _ in range(10):
        token = Token()
        token.receipt = Receipt("q", token, 1)
    del token
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is Token]


def test_messages_do_not_burden_the_collector() -> None:
    assert not gc.is_tracked(Message(body=b"", attributes={"a": "1"}))


def test_a_delivery_has_all_of_the_message() -> None:
    delivery = received(sequence_number=2**70, dead_letter_reason="r", dead_letter_description="d")
    message = delivery.message()
    for field in [
        "body",
        "body_view",
        "attributes",
        "message_id",
        "session_id",
        "correlation_id",
        "content_type",
        "time_to_live",
        "scheduled_at",
        "delay",
        "deduplication_id",
        "size",
    ]:
        assert getattr(delivery, field) == getattr(message, field), field
    assert delivery.enqueued_at == NOON
    assert delivery.enqueued_at.tzinfo is UTC
    assert delivery.first_delivered_at == NOON + timedelta(seconds=1)
    assert delivery.delivered_at == NOON + timedelta(seconds=2)
    assert delivery.locked_until == NOON + timedelta(seconds=32)
    assert (delivery.delivery_count, delivery.sequence_number) == (2, 2**70)
    assert (delivery.dead_letter_reason, delivery.dead_letter_description) == ("r", "d")
    assert delivery == delivery.__copy__()
    assert received() == received()
    assert received() != received(delivery_count=3)
    assert len({received(), received()}) == 1
    assert pickle.loads(pickle.dumps(delivery)).message() == message


def test_a_peeked_message() -> None:
    peeked = received(receipt=None, delivery_count=0, first_delivered_at=None, delivered_at=None, locked_until=None)
    assert (peeked.delivered_at, peeked.first_delivered_at, peeked.locked_until) == (None, None, None)
    assert peeked.sequence_number is None
    with pytest.raises(InvalidReceiptError):
        _ = peeked.receipt


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("message", b""),
        ("receipt", "token"),
        ("delivery_count", 0),
        ("enqueued_at", float("nan")),
        ("enqueued_at", None),
        ("delivered_at", float("inf")),
        ("first_delivered_at", NOON.timestamp() + 3),
        ("sequence_number", -1),
        ("sequence_number", "1"),
        ("dead_letter_reason", 5),
    ],
)
def test_bad_deliveries(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        received(**{field: value})
    assert caught.value.field == field
    bare = ReceivedMessage.__new__(ReceivedMessage)
    with pytest.raises(ValidationError):
        _ = bare.body
    delivery = received()
    with pytest.raises(TypeError, match="immutable"):
        delivery.__init__(  # type: ignore[misc]
            message=delivery.message(),
            receipt=None,
            delivery_count=0,
            enqueued_at=0.0,
            first_delivered_at=None,
            delivered_at=None,
            locked_until=None,
        )


@pytest.mark.parametrize("good", ["q", "A1_b-c", "_", "x" * 260, "orders.fifo", "x" * 255 + ".fifo", "a-b-c"])
def test_queue_names(good: str) -> None:
    """[C1]"""
    assert QueueName(good) == good
    assert pickle.loads(pickle.dumps(QueueName(good))) == good


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "-a",
        "a-",
        "a--b",
        "a.b",
        "a.fifo.fifo",
        ".fifo",
        "é",
        "a b",
        "x" * 261,
        "a\n",
        "a-.fifo",
        "x" * 256 + ".fifo",
    ],
)
def test_what_is_no_queue_name(bad: str) -> None:
    with pytest.raises(ValidationError, match="queue_name: must be 1 to 260"):
        QueueName(bad)


@given(st.text(max_size=130))
def test_session_ids_agree_with_messages(value: str) -> None:
    """[C2] The class and the field refuse the same values."""
    good = 1 <= len(value) <= 128 and all(" " <= letter <= "~" for letter in value)
    for make in (SessionId, lambda value: Message(body=b"", session_id=value)):
        if good:
            make(value)  # type: ignore[no-untyped-call]
        else:
            with pytest.raises(ValidationError, match="session_id"):
                make(value)  # type: ignore[no-untyped-call]


def test_ids_of_the_wrong_kind() -> None:
    for make in (QueueName, SessionId, MessageId):
        with pytest.raises(ValidationError, match="must be a str"):
            make(5)  # type: ignore[arg-type]
    for bad in ("", "\ud800"):
        with pytest.raises(ValidationError, match="message_id"):
            MessageId(bad)
    assert MessageId("ü") == "ü"
