"""How often a body is copied: the table of docs/bodies.md, measured."""

import gc
import mmap
import pickle
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from queue_runtime._core.delivery import ReceivedMessage
from queue_runtime._core.engine import Engine
from queue_runtime._core.envelope import decode_envelope, encode_envelope, encode_envelope_into, encode_envelope_parts
from queue_runtime._core.message import Message

DOC = Path(__file__).resolve().parent.parent / "docs" / "bodies.md"
SIZE = 4 << 20
BODY = bytes(range(256)) * (SIZE // 256)
WIRE = encode_envelope(Message(body=BODY))
ROOM = bytearray(len(WIRE) + 100)
COPY = bytearray(WIRE)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("copies") / "body"
    path.write_bytes(BODY)
    return path


def decoded(wire: bytes = WIRE) -> Message:
    return decode_envelope(wire)


def through_a_queue(message: Message) -> ReceivedMessage:
    engine = Engine(
        "q",
        lock_duration=10.0,
        session_lock_duration=10.0,
        max_delivery_count=5,
        dead_letter_on_expiration=False,
        deduplication_window=0.0,
        capacity=10,
        max_message_size=2 * SIZE,
    )
    engine.send([message], 0, 1.0, 1.0)
    return engine.receive(engine.open_link(), 1, 1.0, 1.0)[0]


def mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


Made = Callable[[Path], Any]
MADE: dict[str, Made] = {  # of which the result is kept: it is the message that counts
    "`Message(body=bytes)`": lambda path: Message(body=BODY),
    "`Message(body=bytearray)`": lambda path: Message(body=ROOM),
    "`Message(body=memoryview of bytes)`": lambda path: Message(body=memoryview(BODY)),
    "`Message(body=memoryview of a mapped file)`": lambda path: Message(body=mapped(path)),
    "`Message.from_file`": Message.from_file,
    "`decode_envelope(bytes)`": lambda path: decode_envelope(WIRE),
    "`decode_envelope(bytearray)`": lambda path: decode_envelope(COPY),
    "`decode_envelope(memoryview of bytes)`": lambda path: decode_envelope(memoryview(WIRE)),
}
# What is there before, and the step.
DONE: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "`message.replace(session_id=...)`, of a decoded one": (decoded, lambda message: message.replace(session_id="s")),
    "send, queue, receive": (lambda: Message(body=BODY), through_a_queue),
    "`received.body`, bytes": (lambda: through_a_queue(Message(body=BODY)), lambda received: received.body),
    "`received.body`, held as a view, looked at twice": (
        lambda: through_a_queue(decoded()),
        lambda received: (received.body, received.body),
    ),
    "`received.body_view`": (lambda: through_a_queue(decoded()), lambda received: received.body_view),
    "`received.open_body()`": (lambda: through_a_queue(decoded()), lambda received: received.open_body().read(9)),
    "`encode_envelope`": (lambda: Message(body=BODY), encode_envelope),
    "`encode_envelope`, of a decoded one": (decoded, encode_envelope),
    "`encode_envelope_parts`": (lambda: Message(body=BODY), encode_envelope_parts),
    "`encode_envelope_into`": (lambda: Message(body=BODY), lambda message: encode_envelope_into(message, ROOM)),
    "`message.body`, of a decoded one": (decoded, lambda message: message.body),
    "`==`, of two decoded ones": (lambda: (decoded(), decoded(bytes(bytearray(WIRE)))), lambda two: two[0] == two[1]),
    "`pickle.dumps`, protocol 5, of a decoded one": (decoded, lambda message: pickle.dumps(message, 5)),
    "`pickle.dumps`, protocol 5 with a `buffer_callback`": (
        decoded,
        lambda message: pickle.dumps(message, 5, buffer_callback=lambda buffer: None),
    ),
}


def table() -> dict[str, tuple[float, float]]:
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \|", DOC.read_text(), re.M)
    return {step: (float(new), float(kept)) for step, new, kept in rows}


def test_the_table_has_every_step() -> None:
    assert set(table()) == set(MADE) | set(DONE)


def measure(step: Callable[[], object], held: list[object] | None = None) -> tuple[float, float]:
    """Bodies' worth of memory: newly taken at the highest, and there afterwards."""
    gc.collect()
    tracemalloc.start()
    try:
        start = tracemalloc.get_traced_memory()[0]
        result = step()
        new = tracemalloc.get_traced_memory()[1] - start
        if held is not None:
            held.append(result)
        del result
        kept = tracemalloc.get_traced_memory()[0] - start
    finally:
        tracemalloc.stop()
    return round(new / SIZE, 1), round(kept / SIZE, 1)


@pytest.mark.parametrize("step", MADE)
def test_a_message_that_is_made(step: str, path: Path) -> None:
    held: list[object] = []
    assert measure(lambda: MADE[step](path), held) == table()[step]


@pytest.mark.parametrize("step", DONE)
def test_what_is_done_with_it(step: str) -> None:
    make, act = DONE[step]
    subject = make()
    assert measure(lambda: act(subject)) == table()[step]


def test_the_measure_measures() -> None:
    assert measure(lambda: bytes(SIZE)) == (1.0, 0.0)
    assert measure(lambda: bytes(SIZE), []) == (1.0, 1.0)
