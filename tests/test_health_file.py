"""The file that tells probes how a run is, and the command that judges it."""

import asyncio
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from remote.running import RunningBroker

from queue_runtime.cli import health_file
from queue_runtime.cli.commands import root
from queue_runtime.cli.failure import Code, Failure
from queue_runtime.cli.health_file import HealthFile, problems_of


def write(path: Path, *problems: str, age: float = 0.0, **more: Any) -> Path:
    path.write_text(json.dumps({"monotonic": time.monotonic() - age, "problems": problems, **more}))
    return path


def judge(path: Path, *options: str) -> Result:
    return CliRunner().invoke(root, ["health", str(path), *options], prog_name="queue-runtime")


@pytest.mark.parametrize(
    ("age", "problems", "options", "told"),
    [
        (0, (), (), None),
        (29, (), (), None),
        (31, (), (), "was last written 31 s ago: its process is stuck or gone"),
        (31, (), ("--max-age", "40"), None),
        (31, (), ("--alive",), "stuck or gone"),
        (-5, (), (), "before this machine was started"),
        (0, ("the connection is lost",), (), "the connection is lost"),
        (0, ("the connection is lost",), ("--alive",), None),
        (31, ("the connection is lost",), (), "the connection is lost"),
    ],
)
def test_a_probe_s_verdict(
    tmp_path: Path, age: float, problems: tuple[str, ...], options: tuple[str, ...], told: str | None
) -> None:
    done = judge(write(tmp_path / "health.json", *problems, age=age), *options)
    assert done.exit_code == (0 if told is None else 1)
    if told is None:
        assert done.output == "healthy\n"
    else:
        assert told in done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"monotonic": "x", "problems": []}', '{"monotonic": 1}', "\xff"]
)
def test_what_is_no_health_file_is_a_problem(tmp_path: Path, text: str) -> None:
    path = tmp_path / "health.json"
    path.write_bytes(text.encode("latin-1"))
    done = judge(path)
    assert done.exit_code == 1
    assert "is no health file" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_file_is_a_problem(tmp_path: Path) -> None:
    done = judge(tmp_path / "health.json")
    assert done.exit_code == 1
    assert "there is no " in done.stderr


async def test_the_file_is_there_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "health.json"
    asked = 0

    async def health() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return {"problems": ["one"], "queue": "q"}

    async with HealthFile(path, health, pytest.fail):
        assert asked == 1
        found = await asyncio.to_thread(problems_of, path, 5.0)
        mode = (await asyncio.to_thread(path.stat)).st_mode
        names = await asyncio.to_thread(os.listdir, tmp_path)
    assert found == ["one"]
    assert stat.S_IMODE(mode) == 0o644, "another user's probe may read it"
    assert names == ["health.json"], "written whole or not at all"
    assert await asyncio.to_thread(os.listdir, tmp_path) == []


async def test_it_is_written_again_and_again_and_a_failure_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_file, "EVERY", 0.001)
    directory = tmp_path / "there"
    await asyncio.to_thread(directory.mkdir)
    written = asyncio.Event()
    asked = 0
    told: list[str] = []

    async def health() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if asked == 3:
            await asyncio.to_thread(os.rename, directory, tmp_path / "gone")
        if asked == 6:
            await asyncio.to_thread(os.rename, tmp_path / "gone", directory)
        if asked == 9:
            written.set()
        return {"problems": []}

    async with HealthFile(directory / "health.json", health, told.append):
        await written.wait()
    assert told == ["the health file cannot be written: No such file or directory; probes will find it old"]


async def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    async def health() -> dict[str, Any]:
        return {"problems": []}

    with pytest.raises(Failure, match=r"--health-file: cannot write .*: No such file or directory") as raised:
        await HealthFile(tmp_path / "none" / "health.json", health, pytest.fail).__aenter__()
    assert raised.value.code is Code.CONFIGURATION


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
def test_a_run_tells_how_it_is_and_takes_the_file_away(
    tmp_path: Path, broker: RunningBroker, processes: tuple[str, ...]
) -> None:
    (tmp_path / "handlers.py").write_text("async def quiet(message):\n    pass\n")
    path = tmp_path / "health.json"
    command = [
        sys.executable,
        "-m",
        "queue_runtime",
        "run",
        "handlers:quiet",
        "--provider",
        broker.url(),
        "--queue",
        "q",
    ]
    command += ["--health-file", str(path), *processes]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=broker.environment, stdout=pipe, stderr=pipe) as process:
        until(lambda: path.exists() and judge(path).exit_code == 0)
        told = json.loads(path.read_text())
        process.terminate()
        process.communicate(timeout=10)
    assert process.returncode == 143
    assert (told["queue"], told["provider"], told["pid"]) == ("q", "remote", process.pid)
    assert told["processes"] == (2 if processes else 1)
    if not processes:
        assert told["connection"] == "open"
        assert told["backlog"]["q"]["active"] == 0
    assert not path.exists()


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
def test_a_broker_that_is_gone_is_a_problem_and_no_reason_to_restart(
    tmp_path: Path, own_broker: Callable[..., RunningBroker], processes: tuple[str, ...]
) -> None:
    broker = own_broker()
    (tmp_path / "handlers.py").write_text("async def quiet(message):\n    pass\n")
    path = tmp_path / "health.json"
    code = "from queue_runtime.cli import health_file, main\nhealth_file.EVERY = 0.1\nmain()"
    command = [sys.executable, "-c", code, "run", "handlers:quiet", "--provider", broker.url(), "--queue", "q"]
    command += ["--health-file", str(path), "--drain-timeout", "0", *processes]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=broker.environment, stdout=pipe, stderr=pipe) as process:
        until(lambda: path.exists() and judge(path).exit_code == 0)
        broker.kill()
        until(lambda: judge(path).exit_code == 1)
        told = judge(path).stderr
        alive = judge(path, "--alive").exit_code
        process.kill()
        process.communicate()
    assert "the service did not say what is in queue q" in told
    assert ("worker 0: " in told or "worker 1: " in told) == bool(processes)
    assert alive == 0


def until(condition: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 15
        time.sleep(0.02)
