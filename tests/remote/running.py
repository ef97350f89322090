"""Starts, asks and ends a broker's process; every test and bench that needs one comes here."""

import asyncio
import itertools
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from remote.config import RemoteConfig

TESTS = Path(__file__).resolve().parent.parent
_spaces = itertools.count()


class RunningBroker:
    """A broker in a process of its own, from ``start`` (or ``with``) to ``stop``; it ends with this process too.

    Parameters
    ----------
    persistent:
        Keep the queues in a folder, so that they survive ``kill`` and ``start``.
    latency:
        Seconds by which each request is held up.

    ``start``, ``stop``, ``kill`` and ``ask`` block for some milliseconds: in a coroutine, use ``in_thread``.
    """

    def __init__(self, *, persistent: bool = False, latency: float = 0.0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="broker-")
        self.socket = str(Path(self._folder.name) / "socket")
        self.path = Path(self._folder.name) / "queues" if persistent else None
        self.latency = latency
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was started"
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """For subprocesses: in it, ``queue-runtime`` and ``QueueClient`` know ``remote://`` URLs."""
        paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def config(self, **settings: Any) -> RemoteConfig:
        """Return a configuration, of a space of its own unless ``space`` is given."""
        return RemoteConfig(**{"path": self.socket, "space": f"s{os.getpid()}-{next(_spaces)}", **settings})

    def url(self, **settings: Any) -> str:
        """The same as a URL, for a command line."""
        given = {"space": f"s{os.getpid()}-{next(_spaces)}", **settings}
        return f"remote://{self.socket}?" + "&".join(f"{name}={value}" for name, value in given.items())

    def start(self) -> Self:
        """Return when it answers."""
        assert self._process is None, "it runs already"
        command = [sys.executable, "-m", "remote.broker", self.socket, "--with-parent"]
        command += ["--latency", str(self.latency * 1000)]
        if self.path is not None:
            self.path.mkdir(exist_ok=True)
            command += ["--path", str(self.path)]
        self._process = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=self._folder.name
        )
        assert self._process.stdout is not None
        try:
            if self._process.stdout.readline() != b"ready\n" or self.ask("ping") != self.pid:
                raise RuntimeError("the broker did not start: see its message above")
        except BaseException:
            self.kill()
            self._folder.cleanup()
            raise
        return self

    def ask(self, fault: str, **options: Any) -> Any:
        """Have it do something wrong, or tell something: see the README."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(self.socket)
            data = pickle.dumps((0, "control", fault, options))
            connection.sendall(struct.pack("<I", len(data)) + data)
            stream = connection.makefile("rb")
            (length,) = struct.unpack("<I", stream.read(4))
            _, is_fine, value = pickle.loads(stream.read(length))
            stream.close()
        if not is_fine:
            raise value
        return value

    def kill(self) -> None:
        """End it as a crash would (kill -9)."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            self._wait(process)

    def stop(self) -> None:
        """End it by the end of its standard input, and see that it ended well."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            assert self._wait(process) == 0

    def restart(self) -> None:
        """Crash and come back."""
        self.kill()
        self.start()

    async def in_thread(self, what: str, *arguments: Any, **options: Any) -> Any:
        """Call one of the methods without blocking the event loop."""
        return await asyncio.to_thread(getattr(self, what), *arguments, **options)

    def close(self) -> None:
        try:
            self.stop()
        finally:
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self, process: "subprocess.Popen[bytes]") -> int:
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        try:
            return process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
