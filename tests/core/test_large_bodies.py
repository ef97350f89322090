"""Large bodies: held as views of what does not change, copied once where it may; the same to read in every form."""

import array
import contextlib
import copy
import ctypes
import gc
import mmap
import os
import pickle
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from queue_runtime._core.body import SMALLEST_VIEW, Mapping, map_file
from queue_runtime._core.delivery import ReceivedMessage
from queue_runtime._core.envelope import (
    decode_envelope,
    encode_envelope,
    encode_envelope_into,
    encode_envelope_parts,
)
from queue_runtime._core.message import Message
from queue_runtime.errors import SerializationError, ValidationError

BODY = random.Random(1).randbytes(3 * SMALLEST_VIEW + 7)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in which the body begins after a page."""
    path = tmp_path_factory.mktemp("bodies") / "file"
    path.write_bytes(bytes(4096) + BODY)
    return path


def mapped(path: Path, access: int = mmap.ACCESS_READ) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0, access=access)


def own_mapping(path: Path) -> memoryview:
    with path.open("rb") as file:
        return map_file(file.fileno(), path.stat().st_size)


def delivered(message: Message) -> ReceivedMessage:
    return ReceivedMessage(
        message=message,
        receipt=None,
        delivery_count=0,
        enqueued_at=0.0,
        first_delivered_at=None,
        delivered_at=None,
        locked_until=None,
    )


KEPT: dict[str, Callable[[Path], memoryview]] = {
    "of bytes": lambda path: memoryview(BODY),
    "of a part of bytes": lambda path: memoryview(b"before" + BODY + b"after")[6:-5],
    "of other items": lambda path: memoryview(BODY + b"!" * 5).cast("i").cast("B")[: len(BODY)],
    "of numbers": lambda path: memoryview(BODY[:-7]).cast("H"),
    "of a matrix": lambda path: memoryview(BODY[:-7]).cast("B", (3, SMALLEST_VIEW)),
    "of a mapped file": lambda path: memoryview(mapped(path))[4096:],
    "of our mapping": lambda path: own_mapping(path)[4096:],
    "just large enough": lambda path: memoryview(BODY)[:SMALLEST_VIEW],
}


class Bytes(bytes):
    pass


COPIED: dict[str, Callable[[Path], Any]] = {
    "a bytearray": lambda path: bytearray(BODY),
    "a read-only view of a bytearray": lambda path: memoryview(bytearray(BODY)).toreadonly(),
    "a view of a subclass": lambda path: memoryview(Bytes(BODY)),
    "a subclass": lambda path: Bytes(BODY),
    "an array": lambda path: array.array("B", BODY),
    "a mapping that is written through": lambda path: memoryview(mapped(path, mmap.ACCESS_WRITE)).toreadonly()[4096:],
    "a private mapping": lambda path: memoryview(mapped(path, mmap.ACCESS_COPY)).toreadonly()[4096:],
    "a mapping itself, which its owner will close": lambda path: mapped(path),
    "every second byte": lambda path: memoryview(BODY)[::2],
    "backwards": lambda path: memoryview(BODY)[::-1],
    "a view just too small": lambda path: memoryview(BODY)[: SMALLEST_VIEW - 1],
    "memory of C": lambda path: memoryview((ctypes.c_char * len(BODY)).from_buffer_copy(BODY)).toreadonly(),
    "a pickle's buffer": lambda path: pickle.PickleBuffer(BODY),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_view_of_what_does_not_change_is_kept(path: Path, name: str) -> None:
    given = KEPT[name](path)
    expected = given.tobytes()
    message = Message(body=given, message_id="m", attributes={"a": "1"})
    assert message.body_view.obj is given.obj
    assert (message.body_view.format, message.body_view.ndim, message.body_view.readonly) == ("B", 1, True)
    given.release()
    assert message.body_view == expected
    assert type(message.body) is bytes
    assert message.body == expected
    assert message.body is not message.body  # it keeps no copy
    assert message.size == len(expected) + 3
    assert repr(message) == f"Message(message_id='m', {len(expected)} bytes, 1 attributes)"


@pytest.mark.parametrize("name", COPIED)
def test_what_might_change_is_copied(path: Path, name: str) -> None:
    given = COPIED[name](path)
    expected = memoryview(given).tobytes()
    message = Message(body=given)
    assert type(message.body_view.obj) is bytes
    assert message.body_view.nbytes == len(message.body_view.obj)  # all of it, and nothing around it
    assert message.body == expected
    assert message.body is message.body
    assert message.body_view.obj is message.body


def test_a_change_behind_a_read_only_view_does_not_reach_the_message() -> None:
    source = bytearray(BODY)
    message = Message(body=memoryview(source).toreadonly())
    source[:] = bytes(len(source))
    assert message.body == BODY


def test_a_mapping_that_was_given_itself_can_be_closed(path: Path) -> None:
    with mapped(path) as mapping:
        message = Message(body=mapping)
    assert mapping.closed
    assert message.body == bytes(4096) + BODY


def test_a_mapping_whose_view_is_held_cannot_be_closed(path: Path) -> None:
    """So that nothing can end under a message."""
    mapping = mapped(path)
    message = Message(body=memoryview(mapping))
    with pytest.raises(BufferError):
        mapping.close()
    del message
    mapping.close()


@pytest.mark.parametrize("decoded", [False, True])
def test_a_view_that_was_handed_out_can_be_released(decoded: bool) -> None:
    message = Message(body=memoryview(BODY), message_id="m")
    if decoded:
        message = decode_envelope(memoryview(encode_envelope(message)))
    for view in (message.body_view, message.body_view, delivered(message).body_view, encode_envelope_parts(message)[1]):
        view.release()
    message.open_body().close()
    for buffer in message.__reduce_ex__(5)[1]:
        if isinstance(buffer, pickle.PickleBuffer):
            buffer.release()
    assert message.body_view == BODY
    assert message.body == BODY


def test_views_and_readers_outlive_the_message() -> None:
    source = bytes(BODY)
    before = sys.getrefcount(source)
    message = Message(body=memoryview(source)[1:])
    view, file = message.body_view, message.open_body()
    del message
    assert view == BODY[1:]
    assert file.read() == BODY[1:]
    del view, file
    assert sys.getrefcount(source) == before


def test_a_mapping_ends_with_the_last_that_looks(path: Path) -> None:
    mapping = mapped(path)
    gone = weakref.ref(mapping)
    message = Message(body=memoryview(mapping)[4096:])
    decoded = decode_envelope(encode_envelope(message))
    del mapping
    changed = message.replace(session_id="s")
    delivery = delivered(changed)
    view = delivery.body_view[10:20]
    del message, changed, delivery
    assert gone() is not None
    assert view == BODY[10:20]
    del view
    assert gone() is None
    assert decoded.body == BODY


def test_messages_with_views_do_not_burden_the_collector() -> None:
    assert not gc.is_tracked(Message(body=memoryview(BODY)))


def test_a_delivery_keeps_the_one_copy_that_was_asked_for() -> None:
    delivery = delivered(Message(body=memoryview(BODY)))
    assert delivery.body == BODY
    assert delivery.body is delivery.body
    small = delivered(Message(body=b"small"))
    assert small.body is small.message().body


def test_a_delivery_without_its_constructor() -> None:
    bare = ReceivedMessage.__new__(ReceivedMessage)
    for look in (lambda: bare.body, lambda: bare.body_view, bare.open_body):
        with pytest.raises(ValidationError, match="without its constructor"):
            look()
    with pytest.raises(ValidationError, match="without its constructor"):
        Message.__new__(Message).open_body()


def test_a_constructor_that_fails_lets_go_of_the_view() -> None:
    source = bytes(BODY)
    before = sys.getrefcount(source)
    with pytest.raises(ValidationError):
        Message(body=memoryview(source), session_id="")
    assert sys.getrefcount(source) == before


# Envelopes.

FORMS: dict[str, Callable[[bytes], Any]] = {
    "bytes": lambda wire: wire,
    "view": memoryview,
    "part": lambda wire: memoryview(b"<" + wire + b">")[1:-1],
    "bytearray": bytearray,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [0, 255, SMALLEST_VIEW - 1, SMALLEST_VIEW, 65_535, 65_536, 200_000])
def test_every_form_reads_the_same(form: str, size: int) -> None:
    """[C6]"""
    sent = Message(body=BODY[:size] + bytes(max(0, size - len(BODY))), attributes={"a": "é"}, message_id="m", delay=1)
    wire = encode_envelope(sent)
    buffer = FORMS[form](wire)
    message = decode_envelope(buffer)
    assert message == sent
    assert hash(message) == hash(sent)
    assert repr(message) == repr(sent)
    assert (message.body, bytes(message.body_view), message.size) == (sent.body, sent.body, sent.size)
    assert message.open_body().read() == sent.body
    assert encode_envelope(message) == wire
    assert b"".join(encode_envelope_parts(message)) == wire
    into = bytearray(len(wire) + 2)
    assert encode_envelope_into(message, into, 1) == len(wire) + 1
    assert into == b"\0" + wire + b"\0"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(message, protocol)) == sent
    assert message.replace(session_id="s").replace(session_id=None) == sent
    assert copy.deepcopy(message) is message


def test_the_body_of_a_large_envelope_is_a_part_of_it() -> None:
    wire = encode_envelope(Message(body=BODY))
    assert decode_envelope(wire).body_view.obj is wire
    assert decode_envelope(memoryview(wire)).body_view.obj is wire
    assert encode_envelope(decode_envelope(wire)) is wire
    assert decode_envelope(wire).replace(delay=1).body_view.obj is wire


def test_a_mapped_envelope_is_not_read(tmp_path: Path) -> None:
    """A journal's segment, say: what is not looked at stays on the disk."""
    sent = Message(body=BODY, message_id="m", session_id="s")
    (tmp_path / "file").write_bytes(b"before" + encode_envelope(sent))
    message = decode_envelope(own_mapping(tmp_path / "file")[6:])
    assert message == sent
    assert isinstance(message.body_view.obj, Mapping)
    assert encode_envelope(message) == encode_envelope(sent)


def test_a_large_envelope_is_not_kept_beside_the_body() -> None:
    message = Message(body=BODY)
    assert encode_envelope(message) is not encode_envelope(message)
    assert encode_envelope(message) == encode_envelope(message)
    small = Message(body=b"small")
    assert encode_envelope(small) is encode_envelope(small)


def test_longer_forms_are_given_back_from_a_view_too() -> None:
    head, body = encode_envelope_parts(Message(body=BODY, message_id="m"))
    longer = b"\xdc\x00\x0b" + head[1:-3] + b"\xc6" + len(BODY).to_bytes(4, "big") + body
    message = decode_envelope(memoryview(longer))
    assert message.body_view.obj is longer
    assert encode_envelope(message) == longer
    assert b"".join(encode_envelope_parts(message)) == longer
    assert message == decode_envelope(longer)


def test_an_envelope_that_is_mostly_attributes() -> None:
    sent = Message(body=b"small", attributes={"a": "x" * 100_000})
    message = decode_envelope(memoryview(encode_envelope(sent)))
    assert message == sent
    assert message.body == b"small"


def test_parts_of_a_message_that_was_encoded() -> None:
    for body in (b"", b"small", BODY):
        message = Message(body=body, attributes={"a": "1"})
        head, view = encode_envelope_parts(message)
        assert (type(head), view) == (bytes, body)
        assert head + view == encode_envelope(message)
        assert encode_envelope_parts(message) == (head, view)
    with pytest.raises(ValidationError, match="must be a Message"):
        encode_envelope_parts(b"")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="without its constructor"):
        encode_envelope_parts(Message.__new__(Message))


@pytest.mark.parametrize("form", FORMS)
def test_damaged_envelopes_are_refused_alike(form: str) -> None:
    wire = encode_envelope(Message(body=BODY, message_id="m", attributes={"a": "b"}))
    rng = random.Random(3)
    head = len(wire) - len(BODY)
    damaged = [wire[:-1], wire + b"\0", wire[: head + 1], b"\x9b\x02" + wire[2:]]
    for _ in range(300):
        at = rng.randrange(head)
        damaged.append(wire[:at] + bytes([rng.randrange(256)]) + wire[at + 1 :])
    for bad in damaged:
        outcomes: list[object] = []
        for buffer in (bad, FORMS[form](bad)):
            try:
                outcomes.append(decode_envelope(buffer))
            except SerializationError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


def test_released_views_are_refused() -> None:
    view = memoryview(BODY)
    view.release()
    with pytest.raises(ValidationError, match="body: cannot be read"):
        Message(body=view)
    with pytest.raises(ValidationError, match="buffer: cannot be read"):
        decode_envelope(view)


WRITER = """if True:
    import pickle, random, sys
    path, versions = pickle.load(sys.stdin.buffer)
    rng = random.Random(5)
    with open(path, "r+b", buffering=0) as file:
        print("writing", flush=True)
        while True:
            start = rng.choice([0, rng.randrange(15_000)])
            for version in (rng.choice(versions), versions[0]):  # damage it, and mend it
                file.seek(start)
                file.write(version[start : start + 1000])
"""


def test_a_file_that_changes_while_it_is_read_breaks_nothing(tmp_path: Path) -> None:
    """Another process writes into the mapped envelope: it is refused, or every field of it can be read."""
    path = tmp_path / "file"
    versions = [
        encode_envelope(
            Message(body=BODY, attributes={f"{n}{'é' * (n * step % 40)}": "ü" * (n % 50) for n in range(200)})
        )
        for step in (1, 3, 7, 11)
    ]
    size = max(map(len, versions))
    path.write_bytes(versions[0].ljust(size, b"\0"))
    view = own_mapping(path)
    good = refused = 0
    with subprocess.Popen([sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(pickle.dumps((str(path), versions)))
        writer.stdin.flush()
        assert writer.stdout.readline() == b"writing\n"
        try:
            for _ in range(20_000):
                if good >= 4000 and refused >= 1000:
                    break
                try:
                    message = decode_envelope(view[: len(versions[0])])
                except SerializationError:
                    refused += 1
                    continue
                good += 1
                assert len(message.body_view) >= SMALLEST_VIEW
                assert len(encode_envelope(message)) == len(versions[0])
                message.replace()
        finally:
            writer.kill()
    assert refused > 0


# Pickles.


def test_a_pickle_may_pass_the_body_beside_it() -> None:
    """For processes that share memory: protocol 5, out of band."""
    message = Message(body=memoryview(BODY), session_id="s")
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, 5, buffer_callback=buffers.append)
    assert len(data) < 500
    assert [buffer.raw() for buffer in buffers] == [BODY]
    shared = memoryview(BODY)
    loaded = pickle.loads(data, buffers=[shared])
    assert loaded == message
    assert loaded.body_view.obj is BODY
    assert pickle.loads(data, buffers=[bytearray(BODY)]) == message


def test_pickles_carry_no_pointers(path: Path) -> None:
    """What was a view of a file is bytes when it comes out."""
    message = Message(body=own_mapping(path)[4096:])
    code = "import pickle, sys; m = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(m.body)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(delivered(message)), capture_output=True)
    assert done.stdout == BODY, done.stderr


# Everything at once.


@given(
    st.integers(0, len(BODY)), st.sampled_from([None, "s"]), st.dictionaries(st.text("aé", min_size=1), st.text("xü")),
    st.data(),
)  # fmt: skip
def test_any_way_of_forms_ends_where_it_began(size: int, session: str | None, attributes: Any, data: Any) -> None:
    """[C6] However a message is copied, encoded, decoded, pickled or delivered, and in whatever order."""
    first = Message(body=BODY[:size], session_id=session, attributes=attributes, message_id="m")
    ways: dict[str, Callable[[Message], Message]] = {
        "as a view": lambda message: message.replace(body=message.body_view),
        "as bytes": lambda message: message.replace(body=message.body),
        "as a bytearray": lambda message: message.replace(body=bytearray(message.body_view)),
        "decoded": lambda message: decode_envelope(encode_envelope(message)),
        "decoded view": lambda message: decode_envelope(memoryview(encode_envelope(message))),
        "parts": lambda message: decode_envelope(b"".join(encode_envelope_parts(message))),
        "pickled": lambda message: pickle.loads(pickle.dumps(message, data.draw(st.integers(0, 5)))),
        "delivered": lambda message: delivered(message).message(),
        "from its reader": lambda message: message.replace(body=message.open_body().read()),
    }
    message = first
    for way in data.draw(st.lists(st.sampled_from(list(ways)), max_size=6)):
        message = ways[way](message)
        assert message == first, way
        assert (message.size, message.body) == (first.size, first.body)
        assert message.replace(body=message.body[:-1] + b"?!") != first


def test_messages_that_differ_in_the_last_byte() -> None:
    other = BODY[:-1] + bytes([BODY[-1] ^ 1])
    for form in (bytes, memoryview):
        assert Message(body=form(BODY), message_id="m") != Message(body=form(other), message_id="m")
        assert Message(body=form(BODY), message_id="m") == Message(body=BODY, message_id="m")


def test_threads_read_the_same_view() -> None:
    big = os.urandom(3 << 20)  # copied without the interpreter's lock
    message = decode_envelope(memoryview(encode_envelope(Message(body=big, message_id="m"))))
    delivery = delivered(message)
    start = threading.Barrier(4)
    wrong: list[object] = []

    def look() -> None:
        start.wait()
        for _ in range(5):
            if not message.body == delivery.body == message.open_body().read() == big:
                wrong.append(1)
            if decode_envelope(encode_envelope(message)) != message:
                wrong.append(2)
            message.body_view.release()

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_left_behind(path: Path) -> None:
    wire = encode_envelope(Message(body=BODY, attributes={"a": "1"}))

    def use() -> Iterator[object]:
        for body in (memoryview(BODY), own_mapping(path), memoryview(mapped(path))):
            message = Message(body=body, session_id="s")
            yield message.body, message.body_view, message.open_body().readline()
            yield encode_envelope(message), encode_envelope_parts(message), pickle.loads(pickle.dumps(message, 5))
            yield delivered(message).body, message == message.replace(), repr(message)
        message = decode_envelope(memoryview(wire))
        yield message.attributes, message.body, encode_envelope(message), encode_envelope_into(message, bytearray(wire))
        with contextlib.suppress(SerializationError):
            yield decode_envelope(memoryview(wire)[:-1])
        yield Message.from_file(path).body_view[1:2]

    for _ in range(20):
        list(use())
    gc.collect()
    before = sys.getallocatedblocks(), len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        list(use())
    gc.collect()
    assert sys.getallocatedblocks() - before[0] < 100
    assert len(os.listdir("/proc/self/fd")) == before[1]
