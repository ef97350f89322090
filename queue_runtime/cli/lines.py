"""Lines of a file or of stdin, read in a thread so that the event loop never waits for them."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

CHUNK = 65_536
"""Bytes of one read."""
AHEAD = 4
"""Chunks that are read ahead of the event loop."""


class Line(NamedTuple):
    number: int
    """From 1 on."""
    size: int
    """Bytes, without the line's end."""
    data: bytes | None
    """The bytes as they stand in the file; None when there are more than the limit."""


class LineSplitter:
    """Cuts chunks into lines, and holds no more than ``limit`` bytes of one that does not end.

    Thread-safety: for one thread.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._number = 0
        self._size = 0
        self._parts: list[bytes] = []

    def split(self, chunk: bytes) -> list[Line]:
        """Return the lines that end in ``chunk``."""
        *ended, rest = chunk.split(b"\n")
        lines = []
        for part in ended:
            self._hold(part)
            lines.append(self._line())
        self._hold(rest)
        return lines

    def end(self) -> list[Line]:
        """Return the last line, if it did not end."""
        return [self._line()] if self._size else []

    def _hold(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self._limit + 1:  # + 1: its last byte may be the \r of its end
            self._parts.clear()
        elif part:
            self._parts.append(part)

    def _line(self) -> Line:
        data, size = b"".join(self._parts), self._size
        self._number += 1
        self._size = 0
        self._parts.clear()
        is_whole = len(data) == size
        if is_whole and data.endswith(b"\r"):
            data, size = data[:-1], size - 1
        if is_whole and self._number == 1 and data.startswith(b"\xef\xbb\xbf"):
            data, size = data[3:], size - 3  # a byte order mark belongs to the file, not to the line
        return Line(self._number, size, data if is_whole and size <= self._limit else None)


class LineReader:
    """The lines of a file, or of stdin when the path is ``-``.

    Thread-safety: for the event loop.
    """

    def __init__(self, path: str, limit: int) -> None:
        self._path = path
        self._splitter = LineSplitter(limit)
        self._room = threading.Semaphore(AHEAD)
        self._stopped = False

    def stop(self) -> None:
        """Read no further; a read that waits for input is left alone and ends with the process."""
        self._stopped = True
        self._room.release()

    async def chunks(self) -> AsyncGenerator[list[Line], None]:
        """Yield lists of some lines, as soon as they are there. Raises OSError when the file cannot be read."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[list[Line] | OSError | None] = asyncio.Queue()

        def post(item: list[Line] | OSError | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        threading.Thread(target=self._read, args=(post,), name="queue-runtime-lines", daemon=True).start()
        try:
            while (item := await arrived.get()) is not None:
                if isinstance(item, OSError):
                    raise item
                yield item
                self._room.release()
        finally:
            self.stop()

    def _read(self, post: Callable[[list[Line] | OSError | None], None]) -> None:
        try:
            self._read_all(post)
        except OSError as error:
            post(error)
        except RuntimeError:  # the loop was closed between the look and the call: nobody is there to read for
            return
        else:
            post(None)

    def _read_all(self, post: Callable[[list[Line] | OSError | None], None]) -> None:
        descriptor = _stdin_descriptor() if self._path == "-" else os.open(self._path, os.O_RDONLY | _BINARY)
        try:
            while True:
                self._room.acquire()
                if self._stopped:
                    return
                chunk = sys.stdin.buffer.read(CHUNK) if descriptor is None else os.read(descriptor, CHUNK)
                post(self._splitter.split(chunk) if chunk else self._splitter.end())
                if not chunk:
                    return
        finally:
            if descriptor is not None and self._path != "-":
                os.close(descriptor)


_BINARY: int = getattr(os, "O_BINARY", 0)


def _stdin_descriptor() -> int | None:
    """Stdin's own descriptor: a buffered read in a thread would hold a lock that the interpreter's exit needs."""
    try:
        return sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):
        return None  # replaced by an object of this process
