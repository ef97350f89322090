"""A worker process of ``run --processes``: a client and a consumer of its own, orders from a pipe, reports to another.

``python -m queue_runtime.cli.worker ORDERS REPORTS``, the numbers of the two pipes; the first frame of the orders is
the job. When that pipe ends, whoever started the process is gone: it drains and ends too, however that one died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from io import FileIO
from typing import Any

import click

from queue_runtime.cli import frames
from queue_runtime.cli.failure import Code, end_in_spite_of_handlers, failure_of
from queue_runtime.cli.handlers import load_handler
from queue_runtime.cli.telling import log_to_stderr, tell
from queue_runtime.cli.work import RUNTIMES, OneProcess, consumer_config
from queue_runtime.client import QueueClient
from queue_runtime.errors import QueueRuntimeError
from queue_runtime.handling import Handler

BEAT = 0.5
"""Seconds between two reports."""
LAST_RESORT = 2.0
"""Seconds beyond the time to drain after which an orphan ends in spite of everything."""
LEVELS = {"drain": 1, "release": 2}


class Orders:
    """Listens to the pipe and to signals of its own: the first order drains, the second one releases at once.

    An operator's SIGTERM to the whole container comes both ways and counts once.
    Thread-safety: ``listen`` is for a thread of its own, the rest for the main thread.
    """

    def __init__(self, file: FileIO, drain_timeout: float) -> None:
        self._file = file
        self._drain_timeout = drain_timeout
        self._lock = threading.Lock()
        self._ordered = 0
        self._signalled = 0
        self._obey: Callable[[int], None] | None = None
        self.is_orphan = False
        self.first_signal: int | None = None

    def listen(self) -> None:
        """Return when the pipe ends."""
        while (frame := frames.read(self._file)) is not None:
            self._level(ordered=LEVELS[frame["order"]])
        self.is_orphan = True
        # A handler may block the event loop for ever, and nobody is left to kill this process.
        last_resort = threading.Timer(self._drain_timeout + LAST_RESORT, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()
        self._level(ordered=1)

    def signalled(self, number: int) -> None:
        self.first_signal = self.first_signal or number
        self._level(signalled=self._signalled + 1)

    def _level(self, *, ordered: int = 0, signalled: int = 0) -> None:
        with self._lock:
            self._ordered = max(self._ordered, ordered)
            self._signalled = max(self._signalled, signalled)
            if self._obey is not None:
                self._obey(max(self._ordered, self._signalled))

    @contextlib.contextmanager
    def obeyed(self, obey: Callable[[int], None]) -> Any:
        """Call ``obey`` on the running loop with the level of what was ordered, also of what was before."""
        loop = asyncio.get_running_loop()

        def call(level: int) -> None:
            if level:
                with contextlib.suppress(RuntimeError):  # the loop is closed: it ended by itself
                    loop.call_soon_threadsafe(obey, level)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.signalled, number)
        with self._lock:
            self._obey = call
            call(max(self._ordered, self._signalled))
        try:
            yield
        finally:
            with self._lock:
                self._obey = None


class Reports:
    """Writes frames to the pipe, never waiting on the event loop.

    Thread-safety: for the main thread.
    """

    def __init__(self, end: int) -> None:
        self._end = end
        self._rest = b""
        self._gone = False

    @property
    def is_clear(self) -> bool:
        """Whether the last report is on its way, so that another one can follow."""
        return not self._rest and not self._gone

    def send(self, frame: Mapping[str, Any]) -> None:
        """Write what the pipe takes now, and the rest when it takes it. For the event loop."""
        os.set_blocking(self._end, False)
        self._rest += frames.pack(frame)
        self._write()
        if self._rest:
            asyncio.get_running_loop().add_writer(self._end, self._write_more)

    def send_last(self, frame: Mapping[str, Any]) -> None:
        """Write it all, and wait for that. For after the event loop."""
        os.set_blocking(self._end, True)
        self._rest += frames.pack(frame)
        while self._rest:
            self._write()

    def _write_more(self) -> None:
        self._write()
        if not self._rest:
            asyncio.get_running_loop().remove_writer(self._end)

    def _write(self) -> None:
        try:
            written = os.write(self._end, self._rest)
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._gone = True
            written = len(self._rest)
        self._rest = self._rest[written:]


class Worker:
    """Does one job.

    Thread-safety: for the main thread.
    """

    def __init__(self, job: Mapping[str, Any], orders: Orders, reports: Reports) -> None:
        self._job = job
        self._orders = orders
        self._reports = reports
        self._engine: OneProcess | None = None
        self._problems: list[str] = []

    def work(self) -> int:
        """Work until an order ends it; return the exit code. Raises what makes the job impossible."""
        job = self._job
        handler = load_handler(job["handler"])
        log_to_stderr(job["verbose"])
        configuration = RUNTIMES[job["runtime"]](cpu_affinity=job["cores"])
        configuration.run(lambda: self._run(handler))
        self._reports.send_last(self._report(final=True))
        if self._orders.first_signal is not None:
            return Code.INTERRUPTED if self._orders.first_signal == signal.SIGINT else Code.TERMINATED
        return Code.FINE

    async def _run(self, handler: Handler) -> None:
        job = self._job
        async with QueueClient(job["provider"]) as client:
            config = consumer_config(client, job["limits"])
            engine = self._engine = OneProcess(client, job["queue"], handler, config, keep=job["keep"])

            def obey(level: int) -> None:
                if self._orders.is_orphan:
                    tell(f"worker {job['number']}: the process that started it is gone; it finishes what runs and ends")
                if level > 1:
                    engine.stop_now()
                else:
                    engine.stop()

            with self._orders.obeyed(obey):
                beside = [asyncio.create_task(self._beat())]
                if job["examine_every"] is not None:
                    beside.append(asyncio.create_task(self._examine(engine)))
                try:
                    await engine.run()
                finally:
                    for task in beside:
                        task.cancel()
                    await asyncio.gather(*beside, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            if self._reports.is_clear:
                self._reports.send(self._report())
            await asyncio.sleep(BEAT)

    async def _examine(self, engine: OneProcess) -> None:
        while True:
            self._problems = (await engine.health())["problems"]
            await asyncio.sleep(self._job["examine_every"])

    def _report(self, *, final: bool = False) -> dict[str, Any]:
        assert self._engine is not None
        return {
            "final": final,
            "stats": self._engine.stats._asdict(),
            "meter": self._engine.meter.take(),
            "problems": self._problems,
        }


def main() -> None:
    """Do the job that comes through the pipe, and exit."""
    orders_end, reports_end = (int(argument) for argument in sys.argv[1:3])
    for end in (orders_end, reports_end):
        os.set_inheritable(end, False)  # whoever a handler starts must not keep them open
    file = FileIO(orders_end, "rb")
    job = frames.read(file)
    if job is None:
        return
    orders, reports = Orders(file, job["limits"]["drain_timeout"]), Reports(reports_end)
    threading.Thread(target=orders.listen, name="queue-runtime-orders", daemon=True).start()
    try:
        code = Worker(job, orders, reports).work()
    except QueueRuntimeError as error:
        if error.is_transient:
            raise  # another start may find it passed
        code = _report_failure(reports, failure_of(error))
    except click.ClickException as error:
        code = _report_failure(reports, error)
    end_in_spite_of_handlers(code)
    sys.exit(code)


def _report_failure(reports: Reports, failure: click.ClickException) -> int:
    reports.send_last({"problem": failure.format_message(), "code": failure.exit_code})
    return failure.exit_code


if __name__ == "__main__":
    main()
