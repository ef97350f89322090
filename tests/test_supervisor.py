"""The supervisor of worker processes, with real processes: deaths, orders, last resorts, and nothing left behind."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from queue_runtime import Message, ReceivedMessage
from queue_runtime.cli import frames, supervisor
from queue_runtime.cli.failure import Code, Failure
from queue_runtime.cli.meter import Meter
from queue_runtime.cli.supervisor import Death, Supervisor
from queue_runtime.providers.base import COMPLETE, Action, Disposition
from queue_runtime.retry import FixedRetry

WORKER = """
import json, os, subprocess, sys, time
orders, reports = map(int, sys.argv[1:])

def read():
    size = int.from_bytes(os.read(orders, 4))
    return json.loads(os.read(orders, size)) if size else None

def pack(frame):
    data = json.dumps(frame).encode()
    return len(data).to_bytes(4) + data

def say(frame):
    os.write(reports, pack(frame))

job = read()

lives = job.get("lives")
if lives is not None:
    with open(lives, "a") as notes:
        notes.write("x")
    with open(lives) as notes:
        first = len(notes.read()) <= job.get("deaths", 1)
say({"pid": os.getpid(), "group": os.getpgrp(), "parent": os.getppid()})
match job["mode"]:
    case "die":
        sys.exit(3)
    case "die first" if first:
        sys.exit(3)
    case "leave a child":
        if first:
            say({"child": subprocess.Popen(["sleep", "60"], pass_fds=[reports]).pid})
            sys.exit(3)
    case "problem":
        say({"problem": "there is no such queue", "code": 3})
        sys.exit(3)
    case "half":
        os.write(reports, pack({"whole": False})[:-1])
        sys.exit(3)
    case "print":
        print("on stdout")
        print("on stderr", file=sys.stderr)
        sys.stdout.write("x" * 100_000 + " and no end")
    case "deaf":
        time.sleep(60)
while (order := read()) is not None:
    say(order)
    if job["mode"] != "busy" or order["order"] == "release":
        break
say({"final": True})
"""


class Log:
    """Keeps what a supervisor tells, and lets a test wait for it."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, Mapping[str, Any]]] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.deaths: list[tuple[Death, float | None]] = []
        self._changed = asyncio.Event()

    def started(self, number: int, pid: int) -> None:
        self.starts.append(number)
        self._changed.set()

    def heard(self, number: int, frame: Mapping[str, Any]) -> None:
        self.frames.append((number, frame))
        self._changed.set()

    def ended(self, number: int) -> None:
        self.ends.append(number)
        self._changed.set()

    def died(self, death: Death, again_in: float | None) -> None:
        self.deaths.append((death, again_in))
        self._changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def said(self, key: str) -> list[Any]:
        return [frame[key] for _, frame in self.frames if key in frame]


Start = Callable[..., tuple[Supervisor, "asyncio.Task[None]"]]


@pytest.fixture
def log() -> Iterator[Log]:
    """Set up before anything runs, so that it looks last: no process and no descriptor is left."""
    log = Log()
    descriptors = set(os.listdir("/proc/self/fd"))
    yield log
    assert sorted(log.starts) == sorted(log.ends)
    for pid in log.said("pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    for child in log.said("child"):
        os.kill(child, signal.SIGKILL)
    assert set(os.listdir("/proc/self/fd")) <= descriptors


@pytest.fixture
def program(tmp_path: Path) -> str:
    (tmp_path / "worker.py").write_text(WORKER)
    return str(tmp_path / "worker.py")


@pytest.fixture
async def start(log: Log, program: str) -> AsyncIterator[Start]:
    """Start a supervisor of tiny workers; end it at the end."""
    runs: list[tuple[Supervisor, asyncio.Task[None]]] = []

    def start(*modes: str | dict[str, Any], **settings: Any) -> tuple[Supervisor, asyncio.Task[None]]:
        jobs = [{"mode": mode} if isinstance(mode, str) else mode for mode in modes]
        defaults = {
            "policy": FixedRetry(delay=0.01, attempts=3),
            "drain_timeout": 5.0,
            "command": (sys.executable, "-I", "-S", program),
        }
        made = Supervisor(jobs, log, **(defaults | settings))
        runs.append((made, asyncio.create_task(made.run())))
        return runs[-1]

    yield start
    for made, run in runs:
        made.stop_now()
        await asyncio.gather(run, return_exceptions=True)


async def test_workers_get_their_jobs_and_drain(log: Log, start: Start) -> None:
    made, run = start("wait", "wait")
    await log.until(lambda: len(log.said("pid")) == 2)
    groups = log.said("group")
    assert len({os.getpgrp(), *groups}) == 3, "a terminal's Ctrl-C reaches the supervisor alone"
    assert log.said("parent") == [os.getpid()] * 2
    made.stop()
    await run
    assert log.said("order") == ["drain", "drain"]
    assert log.said("final") == [True, True]
    assert not log.deaths


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
async def test_a_killed_worker_is_started_again_and_its_death_is_told(
    log: Log, start: Start, number: signal.Signals
) -> None:
    made, run = start("wait", "wait")
    await log.until(lambda: len(log.said("pid")) == 2)
    killed, pid = next((number, frame["pid"]) for number, frame in log.frames)
    os.kill(pid, number)
    await log.until(lambda: len(log.said("pid")) == 3)
    ((death, again_in),) = log.deaths
    assert (death.worker, death.pid, death.exit_code, death.signal) == (killed, pid, None, number.name)
    assert str(death) == f"worker {killed} (process {pid}) was killed by {number.name} after {death.lived:.1f} s"
    assert again_in == 0.01
    assert log.starts.count(killed) == 2
    made.stop()
    await run
    assert log.said("order") == ["drain", "drain"]


async def test_deaths_in_a_row_end_the_run_and_the_others_drain(log: Log, start: Start) -> None:
    _, run = start("die", "wait")
    with pytest.raises(Failure, match=r"worker 0 .* ended with exit code 3 .*, the 3rd such end in a row: too many"):
        await run
    assert [again_in for _, again_in in log.deaths] == [0.01, 0.01, None]
    assert log.said("order") == ["drain"]


async def test_deaths_after_a_steady_life_are_no_row(log: Log, start: Start, tmp_path: Path) -> None:
    made, run = start({"mode": "die first", "lives": str(tmp_path / "lives"), "deaths": 4}, steady=0.0)
    await log.until(lambda: len(log.said("pid")) == 5)
    made.stop()
    await run
    assert len(log.deaths) == 4


async def test_a_job_that_cannot_be_done_ends_the_run_at_once(log: Log, start: Start) -> None:
    _, run = start("problem", "wait")
    with pytest.raises(Failure, match="there is no such queue") as raised:
        await run
    assert raised.value.code is Code.CONFIGURATION
    assert log.starts.count(0) == 1
    assert not log.deaths


async def test_a_program_that_cannot_be_started_is_an_error(start: Start) -> None:
    _, run = start("wait", command=("/nowhere/python",))
    with pytest.raises(Failure, match="worker 0 cannot be started: No such file"):
        await run


async def test_the_second_order_releases(log: Log, start: Start) -> None:
    made, run = start("busy")
    await log.until(lambda: log.said("pid"))
    made.stop()
    made.stop()
    await log.until(lambda: log.said("order") == ["drain"])
    assert not run.done()
    made.stop_now()
    await run
    assert log.said("order") == ["drain", "release"]


async def test_an_order_that_comes_before_the_worker_is_given_to_it(log: Log, start: Start) -> None:
    made, run = start("wait", "busy")
    await asyncio.sleep(0)
    made.stop_now()
    await run
    assert sorted(log.said("order")) in ([], ["drain"], ["release"], ["drain", "release"], ["release", "release"])
    assert not log.deaths


async def test_who_does_not_drain_in_time_is_hurried_and_then_killed(
    log: Log, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "GRACE", 0.1)
    monkeypatch.setattr(supervisor, "HURRY", 0.1)
    made, run = start("deaf", "busy", drain_timeout=0.1)
    await log.until(lambda: len(log.said("pid")) == 2)
    began = time.monotonic()
    made.stop()
    await run
    assert 0.3 < time.monotonic() - began < 3
    assert log.said("order") == ["drain", "release"], "the busy one ends in time"
    ((death, again_in),) = log.deaths
    assert (death.worker, death.signal, again_in) == (0, "SIGKILL", None)


async def test_a_stop_ends_the_wait_for_a_restart(log: Log, start: Start) -> None:
    made, run = start("die", policy=FixedRetry(delay=60, attempts=3))
    await log.until(lambda: log.deaths)
    made.stop()
    await run
    assert log.starts == [0]


async def test_a_grandchild_that_holds_the_pipes_holds_up_nothing(
    log: Log, start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervisor, "LATE", 0.1)
    made, run = start({"mode": "leave a child", "lives": str(tmp_path / "lives")}, stdout=-1)
    await log.until(lambda: len(log.said("pid")) == 2)
    made.stop()
    await run
    assert len(log.deaths) == 1


async def test_what_is_half_said_at_death_is_no_report(log: Log, start: Start) -> None:
    _, run = start("half")
    with pytest.raises(Failure, match="exit code 3"):
        await run
    assert not log.said("whole")


async def test_what_workers_print_goes_through_the_supervisor(
    log: Log, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    made, run = start("print", stdout=-1)
    await log.until(lambda: log.said("pid"))
    made.stop()
    await run
    printed = capsys.readouterr()
    assert printed.out == "on stdout\n" + "x" * 100_000 + " and no end"
    assert printed.err == "on stderr\n"


async def test_a_cancelled_run_leaves_no_process(log: Log, start: Start) -> None:
    _, run = start("wait", "deaf")
    await log.until(lambda: len(log.said("pid")) == 2)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


# Frames.


@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none()), max_size=5))
def test_frames_come_as_they_were_sent(sent: list[dict[str, Any]]) -> None:
    data = b"".join(map(frames.pack, sent))
    there, here = os.pipe()
    os.write(here, data[:60_000])
    os.close(here)
    with FileIO(there) as file:
        read = list(iter(lambda: frames.read(file), None))
    assert read == sent[: len(read)]
    assert len(read) == len(sent) or len(data) > 60_000


@given(st.integers(0, 11))
def test_the_beginning_of_a_frame_is_none(length: int) -> None:
    there, here = os.pipe()
    os.write(here, frames.pack({"order": 1})[:length])
    os.close(here)
    with FileIO(there) as file:
        assert frames.read(file) is None


# What several processes measured adds up.


def received(number: int, session: str | None, count: int) -> ReceivedMessage:
    return ReceivedMessage(
        message=Message(body=b"", message_id=f"m{number}", session_id=session), receipt=None, delivery_count=count,
        enqueued_at=time.time() - 1.5 * number, first_delivered_at=0.0, delivered_at=0.0, locked_until=None,
    )  # fmt: skip


Event = Callable[[Meter], None]


@st.composite
def events(draw: st.DrawFn) -> tuple[int, Event]:
    """Something that happens, and the process that it happens in."""
    message = received(draw(st.integers(0, 50)), draw(st.sampled_from([None, "a", "b"])), draw(st.integers(1, 3)))
    dead = Disposition(Action.DEAD_LETTER, reason=draw(st.sampled_from(["R1", "R2"])))
    size = draw(st.integers(1, 5))
    event: Event = draw(
        st.sampled_from(
            [
                lambda meter: meter.batch_received([message] * size),
                lambda meter: meter.message_settled(message, COMPLETE, None),
                lambda meter: meter.message_settled(message, dead, None),
                lambda meter: meter.handler_failed(message, KeyError()),
                lambda meter: meter.session_opened(str(message.session_id)),
            ]
        )
    )
    return draw(st.integers(0, 2)), event


def told(meter: Meter) -> dict[str, Any]:
    """All that a report shows, but for what the time of its measuring decides."""
    return {
        "sums": (meter.batches, meter.batched, meter.retries, meter.settled, meter.dead_lettered, meter.latency.count),
        "sizes": (meter.smallest, meter.largest),
        "latency": [round(meter.latency.percentile(p) or 0.0, 1) for p in (0, 50, 95, 100)],
        "reasons": meter.reasons,
        "failures": meter.failures,
        "dead": sorted(meter.dead_letters, key=repr),
        "sessions": meter.sessions,
    }


@given(st.lists(events(), max_size=30), st.sets(st.integers(0, 30)))
def test_meters_of_processes_add_up_to_one(happened: Sequence[tuple[int, Event]], reports: set[int]) -> None:
    """Whenever and however often each of them reports."""
    whole, total, parts = Meter(100), Meter(100), [Meter(100) for _ in range(3)]
    for place, (number, event) in enumerate(happened):
        event(whole)
        event(parts[number])
        if place in reports:
            total.add(parts[number].take())
    for part in parts:
        total.add(frames_of(part.take()))
    assert told(total) == told(whole)
    assert (total.first is None, total.last is None) == (whole.first is None, whole.last is None)
    if whole.seconds:
        assert total.seconds == pytest.approx(whole.seconds, abs=0.1)


def frames_of(state: dict[str, Any]) -> Mapping[str, Any]:
    """As it comes through a pipe."""
    there, here = os.pipe()
    os.write(here, frames.pack(state))
    os.close(here)
    with FileIO(there) as file:
        frame = frames.read(file)
    assert frame is not None
    return frame
