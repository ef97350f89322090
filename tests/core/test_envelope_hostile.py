"""Malformed and hostile bytes: a plain reading of docs/envelope.md through msgpack decides what is an envelope."""

import random
import re
import struct
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, strategies as st

from queue_runtime._core.envelope import decode_envelope, encode_envelope
from queue_runtime.errors import SerializationError
from queue_runtime.message import Message

FULL = Message(
    body=b"\x00\xffbody",
    attributes={"kind": "order", "naïve": "", "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"},
    message_id="order-17",
    session_id="customer 4",
    correlation_id="ü€𝄞",
    content_type="application/json",
    time_to_live=3600,
    delay=1.5,
    deduplication_id="17",
)
WIRE = encode_envelope(FULL)
GOOD: list[Any] = [1, "m", "s", "c", "t", 1, None, 0, "d", {"a": "b"}, b"x"]


def is_int(value: Any, least: int, most: int) -> bool:
    return value is None or (type(value) is int and least <= value <= most)


def is_text(value: Any, least: int = 0, optional: bool = True) -> bool:
    return (value is None and optional) or (type(value) is str and len(value) >= least)


def model(wire: bytes) -> list[Any] | None:
    """The elements when this is an envelope, else None: docs/envelope.md, slowly."""
    try:
        value = msgpack.unpackb(wire, object_pairs_hook=lambda pairs: ("map", pairs), timestamp=0)
    except Exception:
        return None
    if type(value) is not list or len(value) != 11 or type(value[0]) is not int or value[0] != 1:
        return None
    _, message_id, session_id, correlation_id, content_type, ttl, scheduled, delay, dedup, attributes, body = value
    good = (
        is_text(message_id, 1, optional=False)
        and is_text(session_id, 1)
        and (session_id is None or re.fullmatch(r"[\x20-\x7e]{1,128}", session_id))
        and is_text(correlation_id)
        and is_text(content_type)
        and is_int(ttl, 1, 2**63 - 1)
        and is_int(scheduled, 0, 253402300799999999)
        and is_int(delay, 0, 2**63 - 1)
        and (scheduled is None or delay is None)
        and is_text(dedup, 1)
        and type(attributes) is tuple
        and len(attributes[1]) <= 256
        and all(type(name) is str and 1 <= len(name.encode()) <= 1024 for name, _ in attributes[1])
        and all(type(text) is str for _, text in attributes[1])
        and len({name for name, _ in attributes[1]}) == len(attributes[1])
        and type(body) is bytes
    )
    return value if good else None


def check(wire: bytes) -> bool:
    """Both agree on these bytes. Returns whether they are an envelope."""
    expected = model(wire)
    if expected is None:
        with pytest.raises(SerializationError, match=r"^not an envelope: .*, at byte \d+$") as caught:
            decode_envelope(wire)
        assert 0 <= int(str(caught.value).rsplit(" ", 1)[1]) <= len(wire)
        return False
    message = decode_envelope(wire)
    found = [message.message_id, message.session_id, message.correlation_id, message.content_type]
    found += [us if us >= 0 else None for us in (message.ttl_us, message.scheduled_us, message.delay_us)]
    found += [message.deduplication_id, ("map", list(message.attributes.items())), message.body]
    assert found == expected[1:]
    assert encode_envelope(message) is wire
    assert encode_envelope(message.replace()) == encode_envelope(message.replace())
    return True


def test_every_prefix_is_refused() -> None:
    for size in range(len(WIRE)):
        assert not check(WIRE[:size])
    assert check(WIRE)
    assert not check(WIRE + b"\x00")


def test_every_change_of_one_byte() -> None:
    """Every bit of the structure, and a spread of values for each byte of it."""
    accepted = 0
    for index in range(len(WIRE)):
        for value in {WIRE[index] ^ (1 << bit) for bit in range(8)} | {0x00, 0x7F, 0x80, 0xC0, 0xC1, 0xDB, 0xDF, 0xFF}:
            accepted += check(WIRE[:index] + bytes([value]) + WIRE[index + 1 :])
    assert accepted > 100  # changed letters are still letters


def test_mutations() -> None:
    rng = random.Random(7)
    accepted = 0
    for _ in range(4000):
        wire = bytearray(WIRE)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(wire))
            match rng.randrange(5):
                case 0:
                    wire[at] = rng.randrange(256)
                case 1:
                    del wire[at : at + rng.randint(1, 5)]
                case 2:
                    wire[at:at] = rng.randbytes(rng.randint(1, 5))
                case 3:
                    wire[at:at] = wire[at : at + rng.randint(1, 20)]
                case _:
                    wire[at : at + 1] = rng.choice([b"\xc0", b"\xd9\x01", b"\xdb\xff\xff\xff\xff", b"\xc1", b"\x90"])
            wire = wire or bytearray(b"\x00")
        accepted += check(bytes(wire))
    assert 0 < accepted < 4000


@given(st.binary(max_size=60))
def test_random_bytes(tail: bytes) -> None:
    check(tail)
    check(b"\x9b\x01" + tail)
    check(b"\x9b\x01\xa1m\xc0\xc0\xc0\xc0\xc0\xc0\xc0" + tail)


anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=5),
        st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4)),
        st.just(msgpack.Timestamp(1)),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


@given(st.integers(0, 10), anything)
def test_any_value_in_any_place(index: int, value: Any) -> None:
    elements = list(GOOD)
    elements[index] = value
    check(msgpack.packb(elements))
    elements[index : index + 1] = []
    check(msgpack.packb(elements))
    elements[index:index] = [value, value]
    check(msgpack.packb(elements))


@pytest.mark.parametrize(
    ("index", "value", "problem"),
    [
        (0, 2, "version is not 1, the one known here, at byte 1"),
        (0, None, "version is not 1"),
        (0, "1", "version must be an int"),
        (1, "", "message_id must not be empty, at byte 2"),
        (1, None, "message_id must be a str, at byte 2"),
        (1, b"m", "message_id must be a str, at byte 2"),
        (2, "", "session_id must not be empty, at byte 4"),
        (2, "é", "session_id must be printable ASCII"),
        (2, "a\n", "session_id must be printable ASCII"),
        (2, "longer than 8 \x7f", "session_id must be printable ASCII"),
        (2, "x" * 129, "session_id is longer than 128 characters"),
        (4, 7, "content_type must be a str or nil"),
        (5, 0, "time_to_live is too small, at byte 10"),
        (5, -1, "time_to_live must not be negative"),
        (5, 2**63, "time_to_live is too large"),
        (5, 1.0, "time_to_live must be an int or nil"),
        (6, 1, "delay excludes scheduled_at, which is there too, at byte 12"),
        (6, 253402300800000000, "scheduled_at is too large"),
        (7, True, "delay must be an int or nil"),
        (8, "", "deduplication_id must not be empty"),
        (9, None, "attributes must be a map"),
        (9, [], "attributes must be a map"),
        (9, {"": "v"}, "name of an attribute must not be empty"),
        (9, {"n" * 1025: "v"}, "name of an attribute is longer than 1024 bytes"),
        (9, {"n": None}, "value of an attribute must be a str"),
        (9, {"n": {}}, "value of an attribute must be a str"),
        (9, {1: "v"}, "name of an attribute must be a str"),
        (9, {str(n): "v" for n in range(257)}, "attributes has more than 256 entries"),
        (10, "x", "body must be a bin"),
        (10, None, "body must be a bin"),
    ],
)
def test_what_is_wrong_is_said(index: int, value: Any, problem: str) -> None:
    elements = list(GOOD)
    elements[index] = value
    wire = msgpack.packb(elements)
    assert not check(wire)
    with pytest.raises(SerializationError, match=problem):
        decode_envelope(wire)


def test_sizes_of_the_array() -> None:
    for wire, problem in [
        (b"", "envelope is missing: the bytes end here, at byte 0"),
        (b"\x90", "version is missing: the array is empty, at byte 0"),
        (b"\xc4\x00", "envelope must be an array, at byte 0"),
        (b"\x9b", "version is missing: the bytes end here, at byte 1"),
        (msgpack.packb(GOOD[:10]), "envelope must have 11 elements"),
        (msgpack.packb([*GOOD, 1]), "envelope must have 11 elements"),
        (msgpack.packb(GOOD) + b"x", "envelope has bytes after its end, at byte 23"),
    ]:
        with pytest.raises(SerializationError, match=problem):
            decode_envelope(wire)


def test_attributes_at_their_limits() -> None:
    most = {f"{number:03d}" + "n" * 1021: "v" * number for number in range(256)}
    assert check(encode_envelope(Message(body=b"", attributes=most)))


@pytest.mark.parametrize("count", [2, 3, 17, 256])
def test_a_name_that_is_there_twice(count: int) -> None:
    names = [f"{'same' * 5}{number}{'same' * 5}" for number in range(count)]
    head = msgpack.packb(GOOD[:9])[1:]
    for first, second in {(0, 1), (0, count - 1), (count - 2, count - 1)}:
        twice = list(names)
        twice[second] = twice[first]
        for chosen in (names, twice):
            attributes = struct.pack(">BH", 0xDE, count) + b"".join(
                msgpack.packb(name) + msgpack.packb("v") for name in chosen
            )
            assert check(b"\x9b" + head + attributes + b"\xc4\x00") is (chosen is names)


@pytest.mark.parametrize(
    "text",
    [
        b"\x80", b"\xc0\x80", b"\xc1\xbf", b"\xc2", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xed\xbf\xbf",
        b"\xe2\x82", b"\xf0\x80\x80\x80", b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80",
        b"\xf0\x9f\x98", b"\xff", b"abcdefgh\xff", b"\xe2\x28\xa1",
    ],
)  # fmt: skip
def test_text_that_is_not_utf8(text: bytes) -> None:
    for padding in (b"", b"1234567", b"12345678901234567890"):
        for raw in (padding + text, text + padding, padding + "é".encode() + text):
            for name in (3, 9):
                elements = [*GOOD]
                elements[name] = {"n": "PLACE"} if name == 9 else "PLACE"
                wire = msgpack.packb(elements).replace(b"\xa5PLACE", b"\xd9" + bytes([len(raw)]) + raw)
                assert not check(wire)
                with pytest.raises(SerializationError, match="is not valid UTF-8"):
                    decode_envelope(wire)


@given(st.binary(max_size=12))
def test_utf8_as_python_reads_it(raw: bytes) -> None:
    check(b"\x9b\x01" + b"\xd9" + bytes([len(raw) + 1]) + raw + b"m" + b"\xc0" * 7 + b"\x80\xc4\x00")


@pytest.mark.parametrize("lead", [b"\xd9\xff", b"\xda\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff"])
def test_huge_claims_take_no_memory(lead: bytes) -> None:
    bodies = {0xD9: b"\xc4\xff", 0xDA: b"\xc5\xff\xff", 0xDB: b"\xc6\xff\xff\xff\xff"}
    claims = [
        b"\x9b\x01" + lead + b"xx",
        b"\x9b\x01\xa1m\xc0\xc0\xc0\xc0\xc0\xc0\xc0\x81" + lead + b"xx",
        b"\x9b\x01\xa1m\xc0\xc0\xc0\xc0\xc0\xc0\xc0\x80" + bodies[lead[0]] + b"xx",
    ]
    tracemalloc.start()
    try:
        for wire in claims:
            with pytest.raises(SerializationError, match=r"it claims \d+ bytes, and 2 are left"):
                decode_envelope(wire)
        for wire in (
            b"\xdd\xff\xff\xff\xff",
            b"\x9b\x01\xa1m\xc0\xc0\xc0\xc0\xc0\xc0\xc0\xdf\xff\xff\xff\xff",
            b"\xdf" * 99,
        ):
            with pytest.raises(SerializationError):
                decode_envelope(wire)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_deep_nesting() -> None:
    for byte in (b"\x91", b"\x9b", b"\x81", b"\xdc\x00\x0b"):
        with pytest.raises(SerializationError):
            decode_envelope(byte * 100_000)
        with pytest.raises(SerializationError):
            decode_envelope(b"\x9b\x01" + byte * 100_000)
