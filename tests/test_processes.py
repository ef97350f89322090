"""``run --processes`` with real workers over a broker that they share: one sum, kills, signals, and no orphans."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from remote.running import RunningBroker

from queue_runtime.cli.commands import root

HANDLERS = """
import asyncio, json, os, signal, sys, time

async def quiet(message):
    pass

async def note(message):
    print("handled by", os.getpid(), flush=True)
    await asyncio.sleep(0.03)

async def where(message):
    print("handled on", sorted(os.sched_getaffinity(0)), type(asyncio.get_running_loop()).__module__, flush=True)
    await asyncio.sleep(0.03)

async def ordered(message):
    event = json.loads(message.body)
    with open(f"{event['s']}.seen", "a") as seen:
        seen.write(f"{event['n']}\\n")

async def picky(message):
    from queue_runtime import RejectMessage
    number = json.loads(message.body)["n"]
    if number == 3:
        raise RejectMessage("Poison", "three")
    if number == 5 and message.delivery_count == 1:
        raise KeyError("five")

async def slow(message):
    print("begun", flush=True)
    await asyncio.sleep(0.3)
    print("done", flush=True)

async def endless(message):
    print("begun", flush=True)
    await asyncio.sleep(3600)

async def blocked(message):
    print("begun", flush=True)
    time.sleep(3600)

async def deadly(message):
    print("begun", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

async def deadly_once(message):
    try:
        open("killed", "x").close()
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "handlers.py").write_text(HANDLERS)
    lines = [json.dumps({"s": f"s{n % 5}", "n": n // 5}) for n in range(100)]
    (tmp_path / "feed.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def start(here: Path, broker: RunningBroker) -> Iterator[Start]:
    """Start ``run`` with two processes over queues of its own; look that no worker outlives it."""
    started: list[subprocess.Popen[str]] = []
    workers: set[int] = set()

    def start(handler: str, *more: str, processes: str = "2", **settings: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            arguments(broker.url(**settings), handler, "--processes", processes, *more),
            cwd=here, env=broker.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        workers |= children(process.pid)
        if process.poll() is None:
            process.kill()
        process.communicate()
    gone(workers)


def arguments(url: str, handler: str, *more: str) -> list[str]:
    command = [sys.executable, "-W", "error", "-m", "queue_runtime", "run", f"handlers:{handler}"]
    return [*command, "--provider", url, "--queue", "q", *more]


def children(pid: int) -> set[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return set()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: set[int], within: float = 10.0) -> float:
    """Wait until none of them runs; return how long it took."""
    began = time.monotonic()
    while running := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() - began < within, f"left behind: {running}"
        time.sleep(0.01)
    return time.monotonic() - began


def until(condition: Callable[[], Any], what: str) -> Any:
    began = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() - began < 10, what
        time.sleep(0.01)
    return value


def read_until(process: subprocess.Popen[str], text: str, stream: str = "stdout") -> list[str]:
    """Lines up to one with ``text``."""
    lines: list[str] = []
    file = getattr(process, stream)
    while not lines or text not in lines[-1]:
        ready, _, _ = select.select([file], [], [], 10)
        assert ready, f"it does not say {text!r}, only {lines}"
        lines.append(file.readline())
        assert lines[-1], f"it ended before {text!r}: {lines}"
    return lines


def report(process: subprocess.Popen[str], code: int = 0) -> tuple[dict[str, Any], str]:
    output, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    told: dict[str, Any] = json.loads(output)
    return told, errors


FED = ("--feed", "feed.jsonl", "--session-key", "s", "--until-empty")


# One sum.


def test_processes_share_the_work_and_tell_one_sum(start: Start, here: Path) -> None:
    process = start("ordered", *FED, "--json")
    told, errors = report(process)
    assert told["messages"] == {"received": 100, "completed": 100, "dead_lettered": 0, "abandoned": 0, "left": 0}
    assert told["fed"]["sent"] == 100, "fed once, by the supervisor"
    assert told["processes"] == {"workers": 2, "starts": 2, "died": 0, "deaths": []}
    assert told["sessions"]["different"] == 5
    assert 0 < told["latency"]["p50"] <= told["latency"]["p99"] <= told["latency"]["max"] < 20
    assert told["batches"]["count"] * told["batches"]["mean"] == pytest.approx(100, abs=1)
    assert told["ended_by"] == "empty"
    assert errors == ""
    for session in range(5):
        assert (here / f"s{session}.seen").read_text().split() == [str(n) for n in range(20)], "C24, across processes"


def test_both_processes_work_and_print_on_stdout(start: Start) -> None:
    process = start("note", *FED[:2], "--until-empty", "--concurrency", "2", "--prefetch", "2")
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert len(set(re.findall(r"handled by (\d+)", output))) == 2
    assert re.search(r"^processes +2 workers, none died$", output, re.MULTILINE)
    assert "100 completed, 0 dead-lettered, none left" in output


def test_failures_and_dead_letters_of_all_are_in_the_sum(start: Start) -> None:
    process = start("picky", *FED, "--json", "--show", "3", "--fail-on-dead-letters")
    told, _ = report(process, 4)
    assert told["messages"]["completed"] == 95
    assert told["dead_letters"]["reasons"] == {"Poison": 5}
    assert [dead["description"] for dead in told["dead_letters"]["first"]] == ["three"] * 3
    assert told["failures"] == {"KeyError": 5}
    assert told["retries"] == 5


def test_auto_is_a_process_for_each_cpu_and_json_alone_is_on_stdout(start: Start) -> None:
    told, errors = report(start("note", *FED, "--json", processes="auto"))
    assert 1 <= told["processes"]["workers"] <= len(os.sched_getaffinity(0))
    assert told["messages"]["completed"] == 100
    assert errors.count("handled by") == 100


def test_each_process_has_a_cpu_and_the_runtime_that_was_asked_for(start: Start) -> None:
    """C46; worker i is on CPU i mod n."""
    cores = sorted(os.sched_getaffinity(0))
    more = ("--until-empty", "--concurrency", "2", "--prefetch", "2", "--cpu-affinity", "--runtime", "low-resource")
    process = start("where", *FED[:2], *more, processes="3")
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    seen = set(re.findall(r"handled on (\[.*?\]) (\w+)", output))
    assert seen == {(f"[{core}]", "asyncio") for core in cores[:3]}


def test_a_terminal_shows_all_of_it_in_one_line(here: Path, broker: RunningBroker) -> None:
    master, slave = pty.openpty()
    environment = {name: value for name, value in broker.environment.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    process = subprocess.Popen(
        arguments(broker.url(), "slow", "--processes", "2", *FED[:2], "--until-empty"),
        cwd=here, env=environment, stdin=slave, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    seen = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while chunk := os.read(master, 65_536):
            seen += chunk
    os.close(master)
    assert process.wait(timeout=10) == 0
    output = seen.decode()
    assert re.search(r"2 of 2 processes · 100 sent · \d+ messages · [\d,]+/s · \d+ in flight", output)
    assert re.findall(r"(?<!abun)(begun|done)", output).count("begun") == 100, output
    assert output.count("done") == 100, output
    assert "100 completed" in output


# Deaths.


def test_a_killed_worker_is_replaced_and_nothing_is_lost(start: Start, here: Path) -> None:
    process = start("deadly_once", *FED, "--json")
    told, errors = report(process)
    ((death),) = told["processes"]["deaths"]
    assert (death["signal"], death["exit_code"]) == ("SIGKILL", None)
    assert re.search(
        rf"^worker {death['worker']} \(process {death['pid']}\) was killed by SIGKILL after [\d.]+ s; "
        r"it is started again in 0\.\d+ s$",
        errors,
        re.MULTILINE,
    )
    assert told["messages"]["left"] == 0
    assert told["messages"]["completed"] >= 90, "what the dead one did since its last report is not known"


def test_workers_that_die_again_and_again_end_the_run(start: Start) -> None:
    process = start("deadly", *FED, "--max-deaths", "2", "--json")
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert re.search(r"Error: worker \d .* was killed by SIGKILL .*, the 2nd such end in a row: too many", errors)
    assert output == ""


def test_an_idle_worker_that_is_killed_is_replaced(start: Start) -> None:
    process = start("note")
    workers = until(lambda: len(found := children(process.pid)) == 2 and found, "two workers")
    victim = min(workers)
    os.kill(victim, signal.SIGKILL)
    assert process.stderr is not None
    assert f"(process {victim}) was killed by SIGKILL" in process.stderr.readline()
    until(lambda: len(children(process.pid)) == 2, "two workers again")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 143
    assert re.search(r"^processes +2 workers, 1 deaths, 3 starts$", output, re.MULTILINE)


# Signals.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_all_handlers_finish_and_releases_the_rest(
    start: Start, number: signal.Signals, code: int
) -> None:
    """C40."""
    process = start("slow", "--feed", "feed.jsonl", "--concurrency", "2")
    read_until(process, "begun")
    process.send_signal(number)
    output, errors = process.communicate(timeout=10)
    assert process.returncode == code, errors
    completed = int(re.search(r"(\d+) completed", output)[1])  # type: ignore[index]
    assert output.count("done") == completed >= 1
    assert errors.count("finishing what runs") == 1
    assert "died" not in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("handler", ["endless", "blocked"])
def test_a_second_signal_releases_all_at_once(start: Start, handler: str) -> None:
    """A worker whose event loop is blocked is killed, so that the broker frees what it held."""
    process = start(handler, "--feed", "feed.jsonl", "--drain-timeout", "60")
    read_until(process, "begun")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    read_until(process, "finishing what runs", "stderr")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143, errors
    assert time.monotonic() - began < (3 if handler == "endless" else 6)
    assert "Traceback" not in errors
    assert ("killed by SIGKILL" in errors) == (handler == "blocked")


def test_a_signal_to_the_whole_group_counts_once(start: Start) -> None:
    """As systemd and a container's runtime may send it; a terminal's does not even reach the workers."""
    process = start("slow", "--feed", "feed.jsonl", "--concurrency", "2")
    read_until(process, "begun")
    workers = children(process.pid)
    assert all(os.getpgid(worker) == worker for worker in workers)
    for pid in [process.pid, *workers]:
        os.kill(pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=10)
    assert process.returncode == 143, errors
    assert output.count("done") >= 1, "drained, not released"
    assert "Traceback" not in errors


# Orphans.


@pytest.mark.parametrize("handler", ["slow", "blocked"])
def test_workers_end_when_their_supervisor_is_killed(start: Start, handler: str, broker: RunningBroker) -> None:
    process = start(handler, "--feed", "feed.jsonl", "--concurrency", "2", "--drain-timeout", "1")
    read_until(process, "begun")
    workers = until(lambda: len(found := children(process.pid)) == 2 and found, "two workers")
    process.kill()
    process.wait()
    took = gone(workers, within=12)
    if handler == "slow":
        assert took < 3
        assert process.stdout is not None
        assert "done" in process.stdout.read(), "what ran was finished"


def test_workers_that_have_just_begun_end_too(start: Start) -> None:
    process = start("quiet")
    workers = until(lambda: children(process.pid), "a worker")
    process.kill()
    process.wait()
    gone(workers, within=5)


# What is wrong is said in a sentence, with a code.


@pytest.mark.parametrize(
    ("handler", "more", "code", "problem"),
    [
        ("quite", (), 1, "the module 'handlers' has no 'quite'; did you mean 'quiet'?"),
        ("quiet", ("--prefetch", "1"), 3, "--prefetch: must be at least 2"),
    ],
)
def test_a_user_s_error_is_told_once(start: Start, handler: str, more: Sequence[str], code: int, problem: str) -> None:
    process = start(handler, *more)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert errors.count(problem) == 1, errors
    assert "Traceback" not in errors


def test_a_queue_that_is_not_there_ends_the_run(start: Start) -> None:
    process = start("quiet", auto_create="false")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors == "Error: queue 'q' does not exist\n"


@pytest.mark.parametrize(
    ("more", "code", "problem"),
    [
        (
            ("--processes", "2"), 3,
            "Error: --processes: queues of memory:// are in the memory of one process, and others cannot reach them; "
            "raise --concurrency instead, or use a provider with a broker of its own",
        ),
        (("--processes", "0"), 2, "'--processes': must be auto or a number from 1 to 1024, not '0'"),
        (("--processes", "two"), 2, "'--processes': must be auto or a number from 1 to 1024, not 'two'"),
        (("--processes", "2", "--max-deaths", "0"), 2, "'--max-deaths'"),
        (("--cpu-affinity",), 2, "--cpu-affinity is for --processes"),
        (("--runtime", "fast"), 2, "'fast' is not one of 'default', 'high-throughput', 'low-resource'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_started(
    here: Path, monkeypatch: pytest.MonkeyPatch, more: Sequence[str], code: int, problem: str
) -> None:
    monkeypatch.chdir(here)
    options = ("--provider", "memory://", "--queue", "q", "--feed", "feed.jsonl")
    done = CliRunner().invoke(root, ["run", "handlers:quiet", *options, *more], prog_name="queue-runtime")
    assert done.exit_code == code, done.output
    assert problem in " ".join(done.stderr.split())


def test_no_secret_is_on_a_command_line_or_in_the_environment(start: Start) -> None:
    """C32: the URL reaches a worker through its pipe."""
    process = start("note", prefetch="77")
    its_own = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    for worker in until(lambda: len(found := children(process.pid)) == 2 and found, "two workers"):
        command = Path(f"/proc/{worker}/cmdline")
        until(lambda command=command: command.read_bytes() != its_own, "the worker, which was a copy until its exec")
        for file in ("cmdline", "environ"):
            assert b"prefetch=77" not in Path(f"/proc/{worker}/{file}").read_bytes()
