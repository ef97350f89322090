"""An engine with a journal in files, as small as can be: without threads, locks and syncs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from queue_runtime._core.engine import Engine
from queue_runtime._core.journal import Journal
from queue_runtime._core.recovery import Recovery, Snapshot


class Journaled:
    """Opens what is in ``directory``: files whose names are numbers, and ``base``, a snapshot of what came before."""

    def __init__(self, directory: Path, common: dict[str, Any], now: float, wall: float) -> None:
        self.directory = directory
        self.common = common
        recovery = Recovery(self.make, now, wall)
        base, logs = self.parts()
        if base is not None:
            content = base.read_bytes()
            assert recovery.feed(content, 0, 0) == len(content)
            assert recovery.ended
        for log in logs:
            content = log.read_bytes()
            assert recovery.feed(content, int(log.name), 0) == len(content)
        self.files: list[int] = []
        self.segment = max((int(log.name) for log in logs), default=0)
        file, segment, offset = self.next_file()
        self.journal = Journal(file, segment, offset, next_file=self.next_file, segment_size=2000, total_bytes=0)
        for number, engine in recovery.queues.items():
            engine.attach(self.journal, number)
        recovery.finish()
        if not recovery.queues:
            engine = self.make("q")
            self.journal.add_queue(1, "q")
            engine.attach(self.journal, 1)
            recovery.queues[1] = engine
        (self.engine,) = recovery.queues.values()
        self.snapshot: Snapshot | None = None

    def make(self, name: str) -> Engine:
        return Engine(name, max_message_size=1000, **self.common)

    def parts(self) -> tuple[Path | None, list[Path]]:
        logs = sorted(
            (path for path in self.directory.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)
        )
        base = self.directory / "base"
        return base if base.exists() else None, logs

    def next_file(self) -> tuple[int, int, int]:
        self.segment += 1
        self.files.append(os.open(self.directory / str(self.segment), os.O_RDWR | os.O_CREAT))
        return self.files[-1], self.segment, 0

    def begin_snapshot(self) -> None:
        if self.snapshot is None:
            self.covered = self.segment
            self.journal.turn()
            self.snapshot = Snapshot([self.engine])
            self.told = b""

    def tell(self, now: float, wall: float) -> None:
        """A little more of the snapshot; the last bit puts it in place."""
        if self.snapshot is None:
            return
        records = self.snapshot.more(100, now, wall)
        if records is not None:
            self.told += records.take(0, len(self.told))
            return
        self.snapshot = None
        (self.directory / "base").write_bytes(self.told)
        for log in self.parts()[1]:
            if int(log.name) <= self.covered:
                log.unlink()

    def crash(self) -> None:
        """What was not written is gone."""
        for file in self.files:
            os.close(file)
