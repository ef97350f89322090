"""The rival of the journal: the same three changes a message in SQLite, as good as we could write it.

WAL mode, prepared statements (sqlite3 caches them), one transaction for all that wait. Without syncs its calls are made
on the event loop, where they are fastest; with syncs in a thread of its own, which commits all that has come together.
It keeps no order, no sessions, no locks, no times: less than ours in every respect.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

Job = tuple[str, Sequence[tuple[object, ...]], asyncio.Future[None]]

INSERT = "INSERT INTO messages (number, deliveries, envelope) VALUES (?, 0, ?)"
UPDATE = "UPDATE messages SET deliveries = 1 WHERE number = ?"
DELETE = "DELETE FROM messages WHERE number = ?"


class SQLiteJournal:
    def __init__(self, path: Path, *, sync: bool) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if sync else 'OFF'}")
        self._connection.execute("CREATE TABLE messages (number INTEGER PRIMARY KEY, deliveries INT, envelope BLOB)")
        self._jobs: SimpleQueue[Job | None] | None = SimpleQueue() if sync else None
        if self._jobs is not None:
            self._thread = threading.Thread(target=self._work, args=(self._jobs,))
            self._thread.start()

    async def write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        if self._jobs is None:
            self._run([(statement, rows)])
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._jobs.put((statement, rows, future))
        await future

    def _run(self, changes: Sequence[tuple[str, Sequence[tuple[object, ...]]]]) -> None:
        if len(changes) == 1 and len(changes[0][1]) == 1:
            self._connection.execute(changes[0][0], changes[0][1][0])
            return
        self._connection.execute("BEGIN")
        for statement, rows in changes:
            self._connection.executemany(statement, rows)
        self._connection.execute("COMMIT")

    def _work(self, jobs: SimpleQueue[Job | None]) -> None:
        while (job := jobs.get()) is not None:
            group = [job]
            while not jobs.empty():
                more = jobs.get()
                if more is None:
                    jobs.put(None)
                    break
                group.append(more)
            self._run([(statement, rows) for statement, rows, _ in group])
            futures = [future for _, _, future in group]
            futures[0].get_loop().call_soon_threadsafe(_resolve, futures)

    def close(self) -> None:
        if self._jobs is not None:
            self._jobs.put(None)
            self._thread.join()
        self._connection.close()


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        future.set_result(None)
