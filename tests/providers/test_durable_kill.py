"""A process with a journal is killed at random moments, again and again: nothing acknowledged gets lost [C47]."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from queue_runtime.clock import SystemClock
from queue_runtime.config import InMemoryConfig
from queue_runtime.message import Message
from queue_runtime.providers import open_provider

KILLS = int(os.environ.get("QUEUE_RUNTIME_KILLS", "200"))
PATIENCE = 60.0


class Zygote:
    """A warm process that forks a worker in milliseconds."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("killed.py")
        self.process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout.fileno()
        self.buffer = b""
        self.worker = self.process.pid

    def start(self, *words: object) -> int:
        self.input.write((" ".join(map(str, words)) + "\n").encode())
        self.input.flush()
        (said,) = self.lines(1)
        assert said[0] == "pid"
        self.worker = int(said[1])
        return self.worker

    def lines(self, most: int = 10**9, *, seconds: float = PATIENCE, until: tuple[str, ...] = ()) -> list[list[str]]:
        """At most so many lines: until one begins with one of these words, or the time is over."""
        end = time.monotonic() + seconds
        found: list[list[str]] = []
        while len(found) < most and not (found and found[-1][0] in until):
            line, newline, rest = self.buffer.partition(b"\n")
            if newline:
                found.append(line.decode().split())
                self.buffer = rest
                continue
            if not select.select([self.output], [], [], max(0.0, end - time.monotonic()))[0]:
                assert seconds < PATIENCE, f"nothing but {found[-3:]}"
                break
            got = os.read(self.output, 1 << 16)
            assert got, "the workers' parent is gone"
            self.buffer += got
        return found

    def close(self) -> None:
        self.input.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.worker, signal.SIGKILL)
        self.process.kill()  # it may wait for somebody to read what it tells
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


class Account:
    """What the workers were told, and so what has to be there."""

    def __init__(self) -> None:
        self.sent: dict[str, str] = {}  # name: session
        self.order: dict[str, list[str]] = {}  # session: names, as they were acknowledged
        self.tried: dict[str, set[str]] = {}
        self.completed: set[str] = set()
        self.buried: set[str] = set()
        self.delivered: dict[str, int] = {}
        self.numbers: dict[tuple[str, str], int] = {}
        self.owners: dict[tuple[str, int], str] = {}

    def hear(self, line: list[str]) -> None:
        match line:
            case ["sent", name, session]:
                self.sent[name] = session
                self.order.setdefault(session, []).append(name)
            case ["try", action, name]:
                self.tried.setdefault(name, set()).add(action)
            case ["done", "complete", name]:
                self.completed.add(name)
            case ["done", "dead_letter", name]:
                self.buried.add(name)
            case ["done", _, _]:
                pass
            case ["got", name, count]:
                self.delivered[name] = int(count)
            case _:
                raise AssertionError(line)

    def check(self, lines: list[list[str]]) -> None:
        """Compare with what the next worker found."""
        found = {line[2]: line for line in lines}
        assert len(found) == len(lines), "nothing is there twice"
        for name in self.sent:
            if "complete" not in self.tried.get(name, ()):
                assert name in found, f"{name} was acknowledged and is lost"
        assert not self.completed & found.keys(), "what was completed stays away"
        for name in self.buried:
            if name in found:
                assert found[name][1] == "dead"
                assert found[name][6] in ("chosen", "MaxDeliveryCountExceeded"), found[name]
            else:
                assert "complete" in self.tried[name]
        sessions: dict[str, list[str]] = {}
        for _, place, name, number, count, session, _ in lines:
            assert int(count) >= self.delivered.get(name, 0), f"{name}: a delivery was forgotten"
            assert self.owners.setdefault((place, int(number)), name) == name, "a number was given twice"
            assert self.numbers.setdefault((place, name), int(number)) == int(number), f"{name} has another number"
            if place == "main":
                sessions.setdefault(session, []).append(name)
        for session, names in self.order.items():
            left = sessions.get(session, [])
            there, acknowledged = set(left), set(names)
            if session != "None":
                assert [name for name in left if name in acknowledged] == [name for name in names if name in there]
            self.order[session] = [name for name in names if name in there]
        for name in [name for name in self.sent if name not in found]:  # gone, as was tried or acknowledged
            self.completed.add(name)
            del self.sent[name]
            self.tried.pop(name, None)
            self.buried.discard(name)


@pytest.mark.timeout(600)
def test_killed_at_any_moment(zygote: Zygote, tmp_path: Path) -> None:
    """[C24, C47]"""
    lot = random.Random(os.environ.get("QUEUE_RUNTIME_SEED", "47"))
    account = Account()
    snapshots = acknowledged = 0
    for run in range(KILLS):
        pid = zygote.start("everything", tmp_path / "kept", lot.choice(["always", "interval", "never"]), run)
        found = zygote.lines(until=("ready", "dead"))
        assert found[-1][0] == "ready", found[-1]
        account.check([line for line in found if line[0] == "found"])
        said = zygote.lines(seconds=lot.choice([0.0, 0.001, 0.005, 0.02, 0.05]))
        os.kill(pid, signal.SIGKILL)
        said += zygote.lines(until=("dead",))
        assert said.pop() == ["dead", "-9"]
        for line in said:
            account.hear(line)
        acknowledged += len(said)
        snapshots += any(path.name.startswith("snapshot") for path in (tmp_path / "kept").iterdir())
    assert acknowledged > KILLS * 10
    assert KILLS < 100 or snapshots > 10, "there were files to compact"


async def send_poison(directory: Path) -> None:
    provider = open_provider(InMemoryConfig(path=directory), SystemClock())
    await provider.send("q", [Message(body=b"x", message_id="poison")])
    await provider.close()


def test_a_message_that_kills_its_process_reaches_the_dead_letters(zygote: Zygote, tmp_path: Path) -> None:
    """[C14, C47] The delivery is in the kernel before the handler sees the message."""
    asyncio.run(send_poison(tmp_path))
    for attempt in range(5):
        zygote.start("poison", tmp_path, "never", 0)
        assert zygote.lines(until=("dead",)) == [["got", "poison", str(attempt + 1)], ["dead", "-9"]]
    zygote.start("poison", tmp_path, "never", 0)
    found, *_ = zygote.lines(until=("dead",))
    assert found == ["found", "dead", "poison", "1", "5", "None", "MaxDeliveryCountExceeded"]
