"""Keys of handled messages in a file, shared by the processes of one machine and kept over their crashes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from queue_runtime.clock import Clock, SystemClock
from queue_runtime.config import Seconds, choice, seconds
from queue_runtime.errors import (
    ClosedError,
    ConfigurationError,
    ProviderError,
    QueueRuntimeError,
    ServiceUnavailableError,
)

logger = logging.getLogger("queue_runtime.idempotency")

DAY = 86_400.0
BUSY_TIMEOUT = 5.0
"""Seconds to wait for another process that is writing."""
MOST_REQUESTS = 1000
"""Requests that are answered with one commit."""
MARKS_PER_PURGE = 64
"""So many marks are followed by a purge of twice as many keys that are too old: faster than they come."""
MOST_VARIABLES = 512
"""Keys in one SELECT."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS queue_runtime_done (key BLOB PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS queue_runtime_done_until ON queue_runtime_done (until);
"""
_MARK = "INSERT INTO queue_runtime_done VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET until = excluded.until"
_PURGE = (
    "DELETE FROM queue_runtime_done WHERE key IN "
    "(SELECT key FROM queue_runtime_done WHERE until <= ? ORDER BY until LIMIT ?)"
)


@dataclass(slots=True, eq=False)
class _Request:
    keys: list[bytes]
    is_mark: bool
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    result: Any = None
    error: QueueRuntimeError | None = field(default=None)


class SQLiteIdempotencyStore:
    """Keys in an SQLite file.

    Parameters
    ----------
    path:
        The file, made by ``async with`` or at the first use; its directory must be there, on a disk of this machine:
        the write-ahead log of SQLite does not work over a network.
    window:
        Seconds for which a key is remembered after it was last marked. What is older is deleted along with later
        marks, so the file holds about as many keys as are marked in a window, and does not grow beyond.
    durability:
        ``process``: what ``mark`` returned from survives the end of every process, kill -9 included.
        ``power``: it survives a loss of power as well, for a flush of the disk with each commit.
    clock:
        For tests. Its wall-clock time is used, as processes share it.

    Whatever many tasks ask and mark at the same time travels together, in one transaction, through a thread that
    begins with the first use and ends with ``close``. A cancelled ``mark`` is still done.

    Raises ConfigurationError for a bad parameter, and, in ``async with`` already, for a path that cannot be used. Later
    ServiceUnavailableError, when others keep the file locked for 5 s, or ProviderError, such as for a full disk; the
    next call tries again.

    Thread-safety: for any number of event loops and their tasks, and of processes at once, each with a store of its
    own that was made there: a forked child gets ClosedError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        window: Seconds = DAY,
        *,
        durability: Literal["process", "power"] = "process",
        clock: Clock | None = None,
    ) -> None:
        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
            raise ConfigurationError("path", f"must be a path, not {path!r}")
        self._path = os.fspath(path)
        if self._path in ("", ":memory:"):
            raise ConfigurationError("path", "must be a file's; MemoryIdempotencyStore needs none")
        self._window = seconds("window", window, minimum=0.001)
        choice("durability", durability, ("process", "power"))
        self._synchronous = "FULL" if durability == "power" else "NORMAL"
        self._clock: Clock = SystemClock() if clock is None else clock
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._closed = False

    async def __aenter__(self) -> Self:
        """Open the file: of a path that cannot be used, every message would have a failure to its count."""
        try:
            await self._ask([_encoded("opened")], is_mark=False)
        except ConfigurationError:
            await self.close()
            raise
        except QueueRuntimeError as error:
            logger.warning("not opened yet, path=%s: %s", self._path, error)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def done(self, keys: Sequence[str]) -> set[str]:
        """Return those of the keys that are marked, by whichever process."""
        if not keys:
            return set()
        encoded = {_encoded(key): key for key in keys}
        found: set[bytes] = await self._ask(list(encoded), is_mark=False)
        return {encoded[key] for key in found}

    async def mark(self, keys: Sequence[str]) -> None:
        """Remember the keys; it returns when they are committed."""
        if keys:
            await self._ask([_encoded(key) for key in keys], is_mark=True)

    async def close(self) -> None:
        """Finish what was asked for, close the file and end the thread. Safe to call twice."""
        with self._lock:
            thread, was_closed = self._thread, self._closed
            self._closed = True
            if thread is not None and not was_closed:
                self._requests.put(None)
        while thread is not None and thread.is_alive():  # noqa: ASYNC110 - the end of a thread wakes nobody
            await asyncio.sleep(0.0005)

    def _ask(self, keys: list[bytes], *, is_mark: bool) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        with self._lock:  # nothing is put behind the None of a close
            if self._closed:
                raise ClosedError("the store is closed")
            if self._process != os.getpid():  # its thread is not here, and SQLite's locks do not survive a fork
                raise ClosedError("the store was made before a fork; make one in each process")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="queue-runtime-idempotency", daemon=True)
                self._thread.start()
            self._requests.put(_Request(keys, is_mark, loop, future))
        return future

    # In the thread.

    def _work(self) -> None:
        file = _File(self._path, self._window, self._synchronous, self._clock)
        more = True
        while more:
            request = self._requests.get()
            batch: list[_Request] = []
            while request is not None:
                batch.append(request)
                if len(batch) == MOST_REQUESTS:
                    break
                try:
                    request = self._requests.get_nowait()
                except queue.Empty:
                    break
            more = request is not None
            file.answer(batch)
            for loop in {request.loop for request in batch}:
                answered = [request for request in batch if request.loop is loop]
                with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(_resolve, answered)
        file.close()


class _File:
    """The file, as its one thread sees it."""

    def __init__(self, path: str, window: float, synchronous: str, clock: Clock) -> None:
        self._path = path
        self._window = window
        self._synchronous = synchronous
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._unpurged = MARKS_PER_PURGE
        """Marks since the last purge; the first one purges, for processes that never make many."""

    def answer(self, batch: list[_Request]) -> None:
        """Write what is to be marked, in one transaction, then look the others up; note each result or error."""
        marks = [request for request in batch if request.is_mark]
        asks = [request for request in batch if not request.is_mark]
        for requests, act in ((marks, self._mark), (asks, self._look_up)):
            if requests:
                try:
                    act(self._open(), requests)
                except Exception as error:
                    for request in requests:
                        request.error = _translated(error)

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT, isolation_level=None)
            try:
                _use_write_ahead_log(connection)
                connection.execute(f"PRAGMA synchronous = {self._synchronous}")
                connection.executescript(_SCHEMA)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _mark(self, connection: sqlite3.Connection, requests: list[_Request]) -> None:
        now = self._clock.time()
        until = now + self._window
        # In the order of the keys: the pages of the tree are each gone to once.
        keys = sorted({key for request in requests for key in request.keys})
        self._unpurged += len(keys)
        if len(keys) == 1 and self._unpurged < MARKS_PER_PURGE:
            connection.execute(_MARK, (keys[0], until))  # a transaction of its own
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.executemany(_MARK, [(key, until) for key in keys])
            if self._unpurged >= MARKS_PER_PURGE:
                connection.execute(_PURGE, (now, 2 * self._unpurged))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        if self._unpurged >= MARKS_PER_PURGE:
            self._unpurged = 0

    def _look_up(self, connection: sqlite3.Connection, requests: list[_Request]) -> None:
        keys = list({key for request in requests for key in request.keys})
        now = self._clock.time()
        found: set[bytes] = set()
        for start in range(0, len(keys), MOST_VARIABLES):
            part = keys[start : start + MOST_VARIABLES]
            size = 1 << (len(part) - 1).bit_length()  # filled up, so that few statements are ever compiled
            part += part[-1:] * (size - len(part))
            marks = ",".join("?" * size)
            rows = connection.execute(
                f"SELECT key FROM queue_runtime_done WHERE key IN ({marks}) AND until > ?", (*part, now)
            )
            found.update(key for (key,) in rows)
        for request in requests:
            request.result = found.intersection(request.keys)


def _resolve(requests: list[_Request]) -> None:
    for request in requests:
        if request.future.done():  # cancelled
            continue
        if request.error is None:
            request.future.set_result(request.result)
        else:
            request.future.set_exception(request.error)


def _encoded(key: str) -> bytes:
    """SQLite's texts end at a NUL and hold no lone surrogates; bytes hold every str."""
    return key.encode("utf-8", "surrogatepass")


_TRANSLATIONS: dict[str, Callable[[str, str], QueueRuntimeError]] = {
    "SQLITE_BUSY": lambda code, text: ServiceUnavailableError(f"sqlite: {code}: {text}"),
    "SQLITE_LOCKED": lambda code, text: ServiceUnavailableError(f"sqlite: {code}: {text}"),
    "SQLITE_CANTOPEN": lambda code, text: ConfigurationError("path", f"cannot be opened ({code}: {text})"),
    "SQLITE_READONLY": lambda code, text: ConfigurationError("path", f"cannot be written to ({code}: {text})"),
    "SQLITE_NOTADB": lambda code, text: ConfigurationError("path", f"is a file of another kind ({code}: {text})"),
    "SQLITE_FULL": lambda code, text: ProviderError("sqlite", code, text, is_transient=True),
    "SQLITE_IOERR": lambda code, text: ProviderError("sqlite", code, text, is_transient=True),
}


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Whoever turns a file to it needs the file alone for a moment, and SQLite itself does not wait for that."""
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.005)


def _translated(error: Exception) -> QueueRuntimeError:
    code = getattr(error, "sqlite_errorname", None) or type(error).__name__
    for prefix, make in _TRANSLATIONS.items():
        if code.startswith(prefix):
            translated = make(code, str(error))
            break
    else:
        translated = ProviderError("sqlite", code, str(error))
    translated.__cause__ = error
    return translated
