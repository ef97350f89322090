"""Bodies of files, mappings of them, and the reader over any body."""

import array
import ctypes
import gc
import io
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from queue_runtime._core.body import SMALLEST_VIEW, Mapping, map_file
from queue_runtime._core.message import Message
from queue_runtime.errors import ValidationError

BODY = random.Random(1).randbytes(3 * SMALLEST_VIEW + 7)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bodies") / "file"
    path.write_bytes(BODY)
    return path


def own_mapping(path: Path) -> memoryview:
    with path.open("rb") as file:
        return map_file(file.fileno(), path.stat().st_size)


def test_a_message_from_a_file(path: Path) -> None:
    message = Message.from_file(path, session_id="s", attributes={"a": "1"})
    assert message == Message(body=BODY, session_id="s", attributes={"a": "1"}, message_id=message.message_id)
    assert isinstance(message.body_view.obj, Mapping)
    assert Message.from_file(str(path)).body_view == message.body_view
    assert Message.from_file(os.fsencode(path)).body_view == message.body_view  # type: ignore[arg-type]


def test_a_file_that_is_deleted_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BODY)
    before = len(os.listdir("/proc/self/fd"))
    message = Message.from_file(tmp_path / "file")
    (tmp_path / "file").unlink()
    assert message.body == BODY
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [0, 1, SMALLEST_VIEW - 1])
def test_a_small_file_is_read(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(BODY[:size])
    message = Message.from_file(tmp_path / "file")
    assert type(message.body_view.obj) is bytes
    assert message.body == BODY[:size]


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR)
    before = len(os.listdir("/proc/self/fd"))
    for wrong in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValidationError, match="path: must be a regular file"):
            Message.from_file(wrong)
    with pytest.raises(FileNotFoundError):
        Message.from_file(tmp_path / "missing")
    (tmp_path / "file").write_bytes(BODY)
    with pytest.raises(ValidationError, match="body: is the file's content"):
        Message.from_file(tmp_path / "file", body=b"")
    with pytest.raises(ValidationError, match="session_id"):
        Message.from_file(tmp_path / "file", session_id="")
    with pytest.raises(TypeError):
        Message.from_file(tmp_path / "file", colour="red")
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(reader)


def test_mappings_that_cannot_be(path: Path) -> None:
    with path.open("rb") as file:
        assert map_file(file.fileno(), 0) == b""
        with pytest.raises(ValidationError, match="size: must be at least 1"):
            map_file(file.fileno(), -1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        map_file(-1, 10)
    with pytest.raises(TypeError):
        Mapping.__new__(Mapping)
    with pytest.raises(TypeError, match="not writable"):
        (ctypes.c_char * 4).from_buffer(own_mapping(path))  # which wants to write
    with pytest.raises(TypeError):
        own_mapping(path)[0] = 1


# The reader, beside an open file.

operations = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(-1, 120_000)),
        st.tuples(st.just("read1"), st.integers(-1, 120_000)),
        st.tuples(st.just("readline"), st.integers(-1, 300)),
        st.tuples(st.just("readinto"), st.integers(0, 120_000)),
        st.tuples(st.just("seek"), st.integers(0, 70_000), st.just(0)),
        st.tuples(st.just("seek"), st.integers(-100, 100), st.just(1)),
        st.tuples(st.just("seek"), st.integers(-70_000, 100), st.just(2)),
        st.tuples(st.just("tell")),
        st.tuples(st.just("peek"), st.integers(0, 10)),
    ),
    max_size=12,
)


def perform(file: Any, step: tuple[Any, ...]) -> object:
    name, *arguments = step
    try:
        if name == "readinto":
            into = bytearray(arguments[0])
            return file.readinto(into), into
        if name == "peek":  # as much as it likes, but for the end
            return file.peek(1)[:1]
        if name == "read1":  # may return less; never nothing before the end
            at = file.tell()
            part = file.read1(arguments[0])
            file.seek(at)
            return bool(part), file.read(len(part)) == part, file.seek(at)
        return getattr(file, name)(*arguments)
    except (ValueError, OSError):  # before the beginning
        return "refused"


READ: dict[str, bytes | memoryview] = {
    "none": b"",
    "small": b"small\nlines\n\n",
    "large": BODY,
    "view": memoryview(BODY),
}


@pytest.mark.parametrize("name", READ)
@given(steps=operations)
def test_a_reader_reads_like_any_file(
    tmp_path_factory: pytest.TempPathFactory, name: str, steps: list[tuple[Any, ...]]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"reader-{name}"
    if not path.exists():
        path.write_bytes(READ[name])
    with Message(body=READ[name]).open_body() as ours, path.open("rb") as theirs:
        for step in steps:
            assert perform(ours, step) == perform(theirs, step), step
            assert ours.tell() == theirs.tell()
        assert ours.read() == theirs.read()


def test_what_a_reader_is() -> None:
    message = Message(body=memoryview(b"line\n" * 10_000))
    with message.open_body() as file, io.TextIOWrapper(message.open_body()) as text:
        assert isinstance(file, io.BufferedIOBase)
        assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
        assert sum(1 for line in file if line == b"line\n") == 10_000
        assert sum(1 for line in text if line == "line\n") == 10_000
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"")
        with pytest.raises(io.UnsupportedOperation):
            file.fileno()
        into = array.array("i", [0] * 4)
        assert file.raw.seek(5) == 5
        assert file.raw.readinto(into) == 16  # type: ignore[attr-defined]
        assert into.tobytes() == b"line\n" * 3 + b"l"
        for wrong in ((-1,), (0, 3)):
            with pytest.raises(ValueError, match=r"position|whence"):
                file.raw.seek(*wrong)
    raw = file.raw
    for use in (file.read, raw.readall, lambda: raw.seek(0), lambda: raw.readinto(bytearray(1))):  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_reader_that_is_forgotten_warns_of_nothing() -> None:
    Message(body=b"x").open_body()
    gc.collect()
