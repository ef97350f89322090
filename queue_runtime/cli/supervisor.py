"""Keeps worker processes running: starts them anew when they die, passes orders on, and leaves none behind.

No library does this as it is needed here: cotyledon forks and keeps the end to itself, circus brings a daemon of its
own, simpervisor has neither back-off nor orders. asyncio's subprocesses are enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from queue_runtime.cli import frames
from queue_runtime.cli.failure import Code, Failure

FLAGS = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing passes them on
WORKER = (sys.executable, *FLAGS, "-m", "queue_runtime.cli.worker")
"""The program of a worker."""
GRACE = 5.0
"""Seconds that a worker gets beyond its time to drain."""
HURRY = 2.0
"""Seconds that it gets when it was told to release all at once, before it is killed."""
LATE = 1.0
"""Seconds for the last words of a dead worker: whoever it started may hold its pipes open for ever."""


class Death(NamedTuple):
    """An end that nobody asked for."""

    worker: int
    pid: int
    exit_code: int | None
    signal: str | None
    """Such as SIGKILL, instead of an exit code."""
    lived: float
    """Seconds."""

    def __str__(self) -> str:
        how = f"was killed by {self.signal}" if self.signal is not None else f"ended with exit code {self.exit_code}"
        return f"worker {self.worker} (process {self.pid}) {how} after {self.lived:.1f} s"


class RestartPolicy(Protocol):
    def pause(self, attempt: int) -> float | None:
        """Seconds before the start after so many deaths in a row; None to give up."""
        ...


class Listener(Protocol):
    """Told of what becomes of workers, by their numbers from 0 on. Called on the event loop."""

    def started(self, number: int, pid: int) -> None: ...

    def heard(self, number: int, frame: Mapping[str, Any]) -> None: ...

    def ended(self, number: int) -> None: ...

    def died(self, death: Death, again_in: float | None) -> None:
        """It is started again in so many seconds, or never."""
        ...


class _Worker(NamedTuple):
    process: asyncio.subprocess.Process
    control: int
    """The pipe that it hears orders from; its end tells it that nobody is left to give any."""
    reading: tuple[asyncio.Task[Any], ...]
    """Of its reports, and of what it prints."""


class Supervisor:
    """Runs a worker process for each job.

    Parameters
    ----------
    jobs:
        What each worker is to do; the first frame that it gets.
    listener:
        Told of what they do.
    policy:
        How long to wait before a worker that died is started again, and when to give up.
    drain_timeout:
        Seconds that a worker may take to end after ``stop``; GRACE later it is told to hurry, and HURRY later killed.
    steady:
        Seconds of life after which the deaths before are forgotten.
    stdout:
        The file descriptor that is stdout to workers; None for this process's own, and -1 to have what they print go
        through ``sys.stdout`` and ``sys.stderr`` of this process line by line.
    command:
        The program; the numbers of two pipes are added: the one for orders, and the one to report on.

    Workers are in process groups of their own: a terminal's Ctrl-C comes to this process alone, which passes it on.
    Thread-safety: for one event loop's thread.
    """

    def __init__(
        self,
        jobs: Sequence[Mapping[str, Any]],
        listener: Listener,
        *,
        policy: RestartPolicy,
        drain_timeout: float,
        steady: float = 30.0,
        stdout: int | None = None,
        command: Sequence[str] = WORKER,
    ) -> None:
        self._jobs = jobs
        self._listener = listener
        self._policy = policy
        self._drain_timeout = drain_timeout
        self._steady = steady
        self._stdout = stdout
        self._command = command
        self._workers: dict[int, _Worker] = {}
        self._stopping = asyncio.Event()
        self._hurrying = asyncio.Event()

    async def run(self) -> None:
        """Work until ``stop``. Raises Failure when a worker cannot do its job or dies again and again."""
        keepers = [asyncio.create_task(self._keep(number)) for number in range(len(self._jobs))]
        hurry = asyncio.create_task(self._hurry_in_time())
        try:
            await asyncio.wait(keepers, return_when=asyncio.FIRST_EXCEPTION)
            self.stop()
            await asyncio.wait(keepers)
        finally:
            await _end(hurry, *keepers)
        for keeper in keepers:
            keeper.result()

    def stop(self) -> None:
        """Let every worker drain."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._order("drain")

    def stop_now(self) -> None:
        """Let every worker release what it has, and end."""
        self.stop()
        if not self._hurrying.is_set():
            self._hurrying.set()
            self._order("release")

    async def _hurry_in_time(self) -> None:
        await self._stopping.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_timeout + GRACE):
                await self._hurrying.wait()
        self.stop_now()
        await asyncio.sleep(HURRY)
        for worker in self._workers.values():
            worker.process.kill()

    def _order(self, what: str) -> None:
        for worker in self._workers.values():
            _give(worker.control, {"order": what})

    async def _keep(self, number: int) -> None:
        """One worker after another, until there is to be none any more."""
        deaths = 0
        while not self._stopping.is_set():
            death = await self._live(number)
            if death is None:
                return
            deaths = 1 if death.lived >= self._steady else deaths + 1
            pause = None if self._stopping.is_set() else self._policy.pause(deaths)
            self._listener.died(death, pause)
            if pause is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._stopping.wait()
            elif not self._stopping.is_set():
                times = f", the {_ordinal(deaths)} such end in a row" if deaths > 1 else ""
                raise Failure(f"{death}{times}: too many to go on")

    async def _live(self, number: int) -> Death | None:
        """The life of one worker. Raises Failure when it says that its job cannot be done."""
        began = time.monotonic()
        try:
            worker = await self._start(number)
        except OSError as error:
            raise Failure(f"worker {number} cannot be started: {error.strerror or error}") from error
        process, control, reading = worker
        self._workers[number] = worker
        try:
            self._listener.started(number, process.pid)
            _give(control, self._jobs[number])
            if self._stopping.is_set():  # while it was being started
                _give(control, {"order": "release" if self._hurrying.is_set() else "drain"})
            code = await process.wait()
            await asyncio.wait(reading, timeout=LATE)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            del self._workers[number]
            os.close(control)
            await _end(*reading)
            self._listener.ended(number)
        said: _LastWords = reading[0].result() if not reading[0].cancelled() else _LastWords(None, False)
        if said.failure is not None:
            raise said.failure
        if said.finished and code == 0 and self._stopping.is_set():
            return None
        name = _signal_name(-code) if code < 0 else None
        return Death(number, process.pid, None if name else code, name, time.monotonic() - began)

    async def _start(self, number: int) -> _Worker:
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:

            def pipe(mine: int) -> tuple[int, int]:
                """A pipe, of which the end ``mine`` stays here, and is closed when the start fails."""
                ends = os.pipe()
                ours.callback(os.close, ends[mine])
                theirs.callback(os.close, ends[1 - mine])
                return ends

            orders, control = pipe(1)
            os.set_blocking(control, False)
            reports, report = pipe(0)
            stdout, stderr, environment = self._stdout, None, None
            readers: list[Coroutine[Any, Any, Any]] = [self._hear(number, reports)]
            if stdout == -1:
                printed, stdout = pipe(0)
                warned, stderr = pipe(0)
                environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
                readers += [_relay(printed, "stdout"), _relay(warned, "stderr")]
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    str(orders),
                    str(report),
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    env=environment,
                    pass_fds=(orders, report),
                    process_group=0,
                )
            except BaseException:
                for reader in readers:
                    reader.close()
                raise
            ours.pop_all()  # the readers close theirs, and ``_live`` closes the control
            return _Worker(process, control, tuple(asyncio.create_task(reader) for reader in readers))

    async def _hear(self, number: int, reports: int) -> _LastWords:
        """Pass on what a worker reports, to its end."""
        words = _LastWords(None, False)
        async with _stream(reports) as stream:
            while (frame := await frames.receive(stream)) is not None:
                if "problem" in frame:
                    words = _LastWords(Failure(frame["problem"], Code(frame["code"])), False)
                else:
                    words = _LastWords(None, bool(frame.get("final")))
                    self._listener.heard(number, frame)
        return words


class _LastWords(NamedTuple):
    failure: Failure | None
    """Why it cannot work."""
    finished: bool
    """Whether it said all that it had to."""


@contextlib.asynccontextmanager
async def _stream(end: int) -> AsyncIterator[asyncio.StreamReader]:
    """Read a pipe, and close it."""
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(end, "rb", 0)
    )
    try:
        yield stream
    finally:
        transport.close()


async def _relay(end: int, name: str) -> None:
    async with _stream(end) as stream:
        while True:
            try:
                line = await stream.readuntil()
            except asyncio.IncompleteReadError as error:
                line = error.partial
            except asyncio.LimitOverrunError as error:
                line = await stream.read(error.consumed)
            if not line:
                return
            getattr(sys, name).write(line.decode("utf-8", "replace"))  # looked up anew: the progress replaces it


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _give(control: int, frame: Mapping[str, Any]) -> None:
    # When it is gone, its keeper will notice; when it does not even read, it will be killed.
    with contextlib.suppress(BrokenPipeError, BlockingIOError):
        os.write(control, frames.pack(frame))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _ordinal(number: int) -> str:
    ending = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
