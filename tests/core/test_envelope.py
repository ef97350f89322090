"""Envelopes: golden bytes, round trips, and msgpack and msgspec as second opinions."""

import contextlib
import copy
import gc
import json
import pickle
import re
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, strategies as st

from queue_runtime._core.envelope import decode_envelope, encode_envelope, encode_envelope_into
from queue_runtime.errors import SerializationError, ValidationError
from queue_runtime.message import Message, ReceivedMessage

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DOC = Path(__file__).resolve().parents[2] / "docs" / "envelope.md"
FIELDS = (
    "message_id",
    "session_id",
    "correlation_id",
    "content_type",
    "time_to_live",
    "scheduled_at",
    "delay",
    "deduplication_id",
    "attributes",
    "body",
    "size",
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
long_text = st.one_of(
    text, st.integers(30, 70_000).map(lambda n: "x" * n), st.integers(100, 300).map(lambda n: "é" * n)
)
session_ids = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=128)
durations = st.one_of(
    st.integers(1, 2**63 - 1).map(lambda us: timedelta(microseconds=us)),
    st.sampled_from([1, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32]).map(lambda us: timedelta(microseconds=us)),
)
instants = st.datetimes(min_value=datetime(1970, 1, 1), timezones=st.just(UTC))


@st.composite
def messages(draw: st.DrawFn) -> Message:
    when = draw(st.sampled_from(["now", "scheduled", "delayed"]))
    return Message(
        body=draw(st.one_of(st.binary(max_size=80), st.sampled_from([255, 256, 65535, 65536]).map(bytes))),
        attributes=draw(st.dictionaries(text.filter(bool), long_text, max_size=20)),
        message_id=draw(st.one_of(st.none(), text.filter(bool))),
        session_id=draw(st.one_of(st.none(), session_ids)),
        correlation_id=draw(st.one_of(st.none(), text)),
        content_type=draw(st.one_of(st.none(), long_text)),
        time_to_live=draw(st.one_of(st.none(), durations)),
        scheduled_at=draw(instants) if when == "scheduled" else None,
        delay=draw(durations) if when == "delayed" else None,
        deduplication_id=draw(st.one_of(st.none(), text.filter(bool))),
    )


class Twin(msgspec.Struct, array_like=True):
    version: int
    message_id: str
    session_id: str | None
    correlation_id: str | None
    content_type: str | None
    time_to_live: int | None
    scheduled_at: int | None
    delay: int | None
    deduplication_id: str | None
    attributes: dict[str, str]
    body: bytes


def micros(duration: timedelta | None) -> int | None:
    return None if duration is None else duration // timedelta(microseconds=1)


def elements(message: Message) -> list[Any]:
    """What docs/envelope.md says, in the obvious way."""
    return [
        1,
        message.message_id,
        message.session_id,
        message.correlation_id,
        message.content_type,
        micros(message.time_to_live),
        None if message.scheduled_at is None else micros(message.scheduled_at - EPOCH),
        micros(message.delay),
        message.deduplication_id,
        dict(message.attributes),
        message.body,
    ]


def golden() -> list[tuple[dict[str, Any], bytes]]:
    blocks = re.findall(r"```json\n(.*?)```\n```hex\n(.*?)```", DOC.read_text(), re.DOTALL)
    return [(json.loads(fields), bytes.fromhex(wire)) for fields, wire in blocks]


def from_golden(fields: dict[str, Any]) -> Message:
    fields = fields | {"body": bytes.fromhex(fields["body"])}
    for name in ("time_to_live", "delay"):
        if name in fields:
            fields[name] = timedelta(microseconds=fields[name])
    if "scheduled_at" in fields:
        fields["scheduled_at"] = EPOCH + timedelta(microseconds=fields["scheduled_at"])
    return Message(**fields)


def test_the_document_has_golden_bytes() -> None:
    assert len(golden()) == 3


@pytest.mark.parametrize(
    ("fields", "wire"), golden(), ids=lambda value: value.get("message_id") if type(value) is dict else ""
)
def test_golden_bytes(fields: dict[str, Any], wire: bytes) -> None:
    message = from_golden(fields)
    assert encode_envelope(message) == wire
    assert decode_envelope(wire) == message


@given(messages())
def test_round_trip(message: Message) -> None:
    wire = encode_envelope(message)
    decoded = decode_envelope(wire)
    for field in FIELDS:
        assert getattr(decoded, field) == getattr(message, field), field
    assert decoded == message
    assert hash(decoded) == hash(message)
    assert bytes(decode_envelope(wire).body_view) == message.body
    assert encode_envelope(decoded.replace()) == wire


@given(messages())
def test_msgpack_and_msgspec_agree(message: Message) -> None:
    wire = encode_envelope(message)
    assert wire == msgpack.packb(elements(message))  # which writes the shortest forms too
    twin = msgspec.msgpack.decode(wire, type=Twin)
    assert list(msgspec.structs.astuple(twin)) == elements(message)
    assert decode_envelope(msgspec.msgpack.encode(twin)) == message


@given(messages(), st.integers(0, 9), st.integers(0, 9))
def test_encode_into_writes_the_same_bytes_and_nothing_else(message: Message, before: int, after: int) -> None:
    need = len(encode_envelope(message))
    fresh = message.replace()  # without the bytes that encode_envelope made it keep
    buffer = bytearray(b"\xaa" * (before + need + after))
    assert encode_envelope_into(fresh, buffer, before) == before + need
    assert buffer == b"\xaa" * before + encode_envelope(message) + b"\xaa" * after
    again = bytearray(need)
    assert encode_envelope_into(message, memoryview(again)) == need
    assert again == encode_envelope(message)


@pytest.mark.parametrize("cached", [False, True])
def test_a_buffer_without_room_is_left_alone(cached: bool) -> None:
    message = Message(body=b"x" * 10, message_id="m")
    need = len(encode_envelope(message if cached else message.replace()))
    buffer = bytearray(need)
    for offset in range(1, need + 1):
        with pytest.raises(ValidationError, match=rf"buffer: has room for {need - offset} bytes .* needs {need}"):
            encode_envelope_into(message, buffer, offset)
    assert buffer == bytes(need)
    for offset in (-1, need + 1):
        with pytest.raises(ValidationError, match="offset"):
            encode_envelope_into(message, buffer, offset)


@pytest.mark.parametrize("buffer", [b"x" * 99, memoryview(b"x" * 99), memoryview(bytearray(200))[::2], "text", None])
def test_an_unfit_buffer_to_write_to(buffer: Any) -> None:
    with pytest.raises(ValidationError, match="buffer: must be"):
        encode_envelope_into(Message(body=b""), buffer)


@pytest.mark.parametrize("buffer", ["text", None, 3, [1], memoryview(bytearray(200))])
def test_an_unfit_buffer_to_read_from(buffer: Any) -> None:
    if isinstance(buffer, memoryview):
        buffer.release()
    with pytest.raises(ValidationError, match="buffer: "):
        decode_envelope(buffer)


def test_only_a_message_is_encoded() -> None:
    received = ReceivedMessage(
        message=Message(body=b""),
        receipt=None,
        delivery_count=0,
        enqueued_at=0.0,
        first_delivered_at=None,
        delivered_at=None,
        locked_until=None,
    )
    for wrong in (b"", None, {"body": b""}, Message):
        with pytest.raises(ValidationError, match="message: must be a Message, not "):
            encode_envelope(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=r"pass its message\(\)"):
        encode_envelope_into(received, bytearray(99))  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="without its constructor"):
        encode_envelope(Message.__new__(Message))
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Sub", (Message,), {})


def test_a_message_is_encoded_once() -> None:
    message = Message(body=b"x")
    assert encode_envelope(message) is encode_envelope(message)
    wire = b"".join([encode_envelope(message)])
    assert encode_envelope(decode_envelope(wire)) is wire


def test_longer_forms_are_read_and_given_back() -> None:
    """What another encoder wrote in longer forms stays as it is when it is sent again."""
    message = decode_envelope(
        bytes.fromhex("dd0000000b cc01 d9016d da000173 db0000000163 d90174 d30000000000000005 c0 d07f da000164")
        + bytes.fromhex("df00000001 d90161 db0000000162 c60000000178")
    )
    assert (message.message_id, message.session_id, message.correlation_id, message.content_type) == (
        "m",
        "s",
        "c",
        "t",
    )
    assert (message.ttl_us, message.delay_us, message.deduplication_id) == (5, 127, "d")
    assert (dict(message.attributes), message.body, message.size) == ({"a": "b"}, b"x", 8)
    assert len(encode_envelope(message)) > len(encode_envelope(message.replace()))
    assert decode_envelope(encode_envelope(message.replace())) == message


def test_bytes_are_kept_and_other_buffers_copied() -> None:
    wire = encode_envelope(Message(body=b"body", message_id="m"))
    buffer = bytearray(wire)
    decoded = decode_envelope(buffer)
    buffer[:] = bytes(len(buffer))
    assert decoded.message_id == "m"
    assert decoded.body == b"body"
    assert decode_envelope(memoryview(bytearray(wire))).body == b"body"
    view = decode_envelope(wire).body_view
    assert view.obj is wire
    assert view.readonly
    gc.collect()
    assert view == b"body"  # it outlives the message


def test_a_decoded_message_is_like_any_other() -> None:
    message = Message(body=b"b", attributes={"a": "1"}, session_id="s")
    decoded = decode_envelope(encode_envelope(message))
    assert copy.deepcopy(decoded) is decoded
    assert pickle.loads(pickle.dumps(decoded)) == message
    assert repr(decoded) == repr(message)
    assert decoded.replace(body=b"c").body == b"c"
    with pytest.raises(TypeError, match="immutable"):
        decoded.__init__(body=b"other")  # type: ignore[misc]
    with pytest.raises(TypeError):
        decoded.attributes["a"] = "2"  # type: ignore[index]
    assert not gc.is_tracked(decoded)


def test_attribute_names_are_shared_between_messages() -> None:
    """Also more names than are kept, and names that take each other's place."""
    for number in range(2000):
        name = f"attribute-{number % 700}"
        assert dict(decode_envelope(encode_envelope(Message(body=b"", attributes={name: "v"}))).attributes) == {
            name: "v"
        }
    one, two = (decode_envelope(encode_envelope(Message(body=b"", attributes={"kept": "v"}))) for _ in range(2))
    assert next(iter(one.attributes)) is next(iter(two.attributes))


def test_threads_that_look_first_at_the_same_time() -> None:
    """Whoever builds a field, all see the right value."""
    message = Message(body=b"b" * 100, attributes={"a": "1", "é": "2"}, session_id="s", correlation_id="ü")
    wire = encode_envelope(message)
    decoded = [decode_envelope(wire) for _ in range(300)]
    start = threading.Barrier(4)
    wrong: list[Message] = []

    def look() -> None:
        start.wait()
        wrong.extend(each for each in decoded if each.replace() != message)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_left_behind() -> None:
    wire = encode_envelope(
        Message(body=b"b" * 100, attributes={"a": "1", "é": "2"}, session_id="s", correlation_id="ü")
    )

    def use() -> None:
        message = decode_envelope(bytearray(wire))
        [getattr(message, field) for field in FIELDS]
        encode_envelope_into(message.replace(delay=1), bytearray(1000))
        encode_envelope(message.replace(body=b"")), bytes(message.body_view)
        with contextlib.suppress(SerializationError):
            decode_envelope(wire[:-1])
        with contextlib.suppress(ValidationError):
            message.replace(session_id="")
        with contextlib.suppress(ValidationError):
            encode_envelope_into(message, bytearray(1))

    for _ in range(100):
        use()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(1000):
        use()
    gc.collect()
    assert sys.getallocatedblocks() - before < 200
