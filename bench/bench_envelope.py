"""The envelope beside msgspec, msgpack, ormsgpack and pickle: 1 KB body, 4 attributes, 10 fields.

Every round takes 100 messages, no two alike, in one `for` loop inside the clock. "encode": messages that were never
encoded, made in the setup, outside the clock; ours keeps the bytes on the message, the rivals drop theirs at once and
get the same memory again, which is to their advantage. "encode into": the same into a buffer. "decode": ours checks
all, and builds what is read; the rivals build all. In "every field", ours returns a timedelta where the rivals have an
int, and a read-only view of the attributes. The rivals check less: msgspec types and UTF-8, msgpack and ormsgpack
UTF-8, pickle nothing.
"""
# ruff: noqa: B018 - reading a field is what is measured

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import msgpack
import msgspec
import ormsgpack
import pytest
from shapes import Rival, fields, message, rival

from queue_runtime import Message, decode_envelope, encode_envelope, encode_envelope_into

COUNT = 100
STRUCTS = [rival(number) for number in range(COUNT)]
TUPLES = [msgspec.structs.astuple(struct) for struct in STRUCTS]
WIRES = [encode_envelope(message(number)) for number in range(COUNT)]
PICKLES = [pickle.dumps(each, pickle.HIGHEST_PROTOCOL) for each in TUPLES]
FIELDS = list(Rival.__struct_fields__)
encoder = msgspec.msgpack.Encoder()
decoder = msgspec.msgpack.Decoder(Rival)


def measure(
    benchmark: Any,
    group: str,
    run: Callable[[Sequence[Any]], object],
    make: Callable[[], Sequence[Any]],
    goal: str = "",
) -> None:
    benchmark.group = group
    benchmark.extra_info["items"] = COUNT
    if goal:
        benchmark.extra_info["goal"] = goal
    benchmark.pedantic(run, setup=lambda: ((make(),), {}), rounds=1000, warmup_rounds=50)


def each(call: Callable[[Any], object]) -> Callable[[Sequence[Any]], None]:
    def run(items: Sequence[Any]) -> None:
        for item in items:
            call(item)

    return run


def fresh() -> list[Message]:
    return [message(number) for number in range(COUNT)]


ENCODERS: dict[str, tuple[Callable[[Any], object], Callable[[], Sequence[Any]], str]] = {
    "ours, fresh": (encode_envelope, fresh, ">= 1.5 x msgspec"),
    "ours, again": (encode_envelope, lambda: SENT, ""),
    "msgspec": (encoder.encode, lambda: STRUCTS, ""),
    "msgpack": (msgpack.Packer().pack, lambda: TUPLES, ""),
    "ormsgpack": (ormsgpack.packb, lambda: TUPLES, ""),
    "pickle": (lambda item: pickle.dumps(item, pickle.HIGHEST_PROTOCOL), lambda: TUPLES, ""),
}
SENT = fresh()


@pytest.mark.parametrize("name", ENCODERS)
def test_encode(benchmark: Any, name: str) -> None:
    call, make, goal = ENCODERS[name]
    measure(benchmark, "envelope: encode", each(call), make, goal)


def ours_into(items: Sequence[Message]) -> None:
    buffer = bytearray(4096)
    for item in items:
        encode_envelope_into(item, buffer)


def msgspec_into(items: Sequence[Rival]) -> None:
    buffer = bytearray(4096)
    for item in items:
        encoder.encode_into(item, buffer)


@pytest.mark.parametrize("name", ["ours", "msgspec"])
def test_encode_into(benchmark: Any, name: str) -> None:
    if name == "ours":
        measure(benchmark, "envelope: encode into a buffer", ours_into, fresh)
    else:
        measure(benchmark, "envelope: encode into a buffer", msgspec_into, lambda: STRUCTS)


def three(decode: Callable[[bytes], Any]) -> Callable[[Sequence[bytes]], None]:
    def run(items: Sequence[bytes]) -> None:
        for item in items:
            decoded = decode(item)
            decoded.message_id
            decoded.session_id
            decoded.body

    return run


def every(decode: Callable[[bytes], Any]) -> Callable[[Sequence[bytes]], None]:
    def run(items: Sequence[bytes]) -> None:
        for item in items:
            decoded = decode(item)
            decoded.message_id
            decoded.session_id
            decoded.correlation_id
            decoded.content_type
            decoded.time_to_live
            decoded.scheduled_at
            decoded.delay
            decoded.deduplication_id
            decoded.attributes
            decoded.body

    return run


WHOLE = {
    "msgpack": (msgpack.unpackb, WIRES),
    "ormsgpack": (ormsgpack.unpackb, WIRES),
    "pickle": (pickle.loads, PICKLES),
}


@pytest.mark.parametrize("name", ["ours", "msgspec", *WHOLE])
def test_decode_three(benchmark: Any, name: str) -> None:
    group = "envelope: decode, read id, session, body"
    if name == "ours":
        measure(benchmark, group, three(decode_envelope), lambda: WIRES, ">= 3 x msgspec")
    elif name == "msgspec":
        measure(benchmark, group, three(decoder.decode), lambda: WIRES)
    else:
        load, wires = WHOLE[name]
        pick = itemgetter(1, 2, 10)
        measure(benchmark, group, each(lambda item: pick(load(item))), lambda: wires)


@pytest.mark.parametrize("name", ["ours", "msgspec", *WHOLE])
def test_decode_all(benchmark: Any, name: str) -> None:
    group = "envelope: decode, read every field"
    if name == "ours":
        measure(benchmark, group, every(decode_envelope), lambda: WIRES, ">= 1.2 x msgspec")
    elif name == "msgspec":
        measure(benchmark, group, every(decoder.decode), lambda: WIRES)
    else:
        load, wires = WHOLE[name]
        measure(benchmark, group, each(load), lambda: wires)


@pytest.mark.parametrize("name", ["ours", "ours, with an id of its own", "msgspec.Struct"])
def test_construct(benchmark: Any, name: str) -> None:
    arguments = [fields(number) for number in range(COUNT)]
    without_id = [{key: value for key, value in each.items() if key != "message_id"} for each in arguments]
    group = "envelope: make a message"
    if name == "msgspec.Struct":
        keywords = [{field: getattr(struct, field) for field in FIELDS} for struct in STRUCTS]
        measure(benchmark, group, each(lambda item: Rival(**item)), lambda: keywords)
    else:
        measure(
            benchmark,
            group,
            each(lambda item: Message(**item)),
            lambda: arguments if name == "ours" else without_id,
            "<= 400 ns" if name != "ours" else "",
        )


def test_what_is_measured_is_right() -> None:
    """The rivals and we read the same from the same bytes."""
    read = attrgetter(
        "message_id", "session_id", "correlation_id", "content_type", "deduplication_id", "attributes", "body"
    )
    for wire, struct in zip(WIRES, STRUCTS, strict=True):
        assert read(decode_envelope(wire)) == read(struct)
        assert encoder.encode(struct) == wire
