"""How a run is, in a small file for probes that run a command: Kubernetes' exec, ECS' and Docker's health checks.

The library binds no port.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from queue_runtime.cli.failure import Code, Failure

FIRST = 0.5
"""Seconds until it is written again after the start, when much changes; then twice as many, up to EVERY."""
EVERY = 5.0
"""Seconds between two writings."""
MAX_AGE = 30.0
"""Seconds after which a file is too old, unless the probe says otherwise."""


class HealthFile:
    """Writes the file while it is open, and removes it at the end.

    Parameters
    ----------
    path:
        The file; None writes nothing.
    health:
        Returns what to write, in JSON's own types, with ``problems``, a list of texts.
    tell:
        Called with a sentence when it cannot be written any more.

    Raises Failure when it cannot be written at the beginning.
    """

    def __init__(
        self, path: Path | None, health: Callable[[], Awaitable[dict[str, Any]]], tell: Callable[[str], None]
    ) -> None:
        self._path = path
        self._health = health
        self._tell = tell
        self._told = False
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._path is not None:
            try:
                await self._write(self._path)
            except OSError as error:
                problem = f"--health-file: cannot write {self._path}: {error.strerror or error}"
                raise Failure(problem, Code.CONFIGURATION) from error
            self._writing = asyncio.create_task(self._write_again(self._path))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is not None and self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._path.unlink, missing_ok=True)

    async def _write_again(self, path: Path) -> None:
        pause = min(FIRST, EVERY)
        while True:
            await asyncio.sleep(pause)
            pause = min(2 * pause, EVERY)
            try:
                await self._write(path)
            except OSError as error:
                if not self._told:
                    self._told = True
                    self._tell(f"the health file cannot be written: {error.strerror or error}; probes will find it old")

    async def _write(self, path: Path) -> None:
        health = await self._health()
        written = {"pid": os.getpid(), "time": time.time(), "monotonic": time.monotonic(), **health}
        await asyncio.to_thread(_replace, path, json.dumps(written).encode() + b"\n")


def _replace(path: Path, data: bytes) -> None:
    """Put the file there whole or not at all: a probe reads it at any moment."""
    directory = path.parent
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)  # the probe may be another user's
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def problems_of(path: Path, max_age: float, *, only_alive: bool = False) -> list[str]:
    """Return what is wrong, in words: with the process that writes the file, or with the file.

    With ``only_alive``, what the process itself tells does not count: that it can tell it is enough.
    """
    try:
        written = json.loads(path.read_bytes())
        age = time.monotonic() - written["monotonic"]  # the same clock for all processes since the machine's start
        problems = [] if only_alive else [str(problem) for problem in written["problems"]]
    except FileNotFoundError:
        return [f"there is no {path}: nothing runs with this --health-file, or it has just begun"]
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror or error}"]
    except (ValueError, KeyError, TypeError):
        return [f"{path} is no health file"]
    if not 0 <= age <= max_age:
        since = f"{age:.0f} s ago" if age >= 0 else "before this machine was started"
        problems.insert(0, f"{path} was last written {since}: its process is stuck or gone")
    return problems
