"""Consumers in processes of their own that are killed with kill -9, over a broker that lives on [C24, C40]."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from remote.running import RunningBroker

from bench.ledger import KILLED, Ledger, Witness
from bench.traffic import QUEUE, Traffic
from queue_runtime import Action, QueueClient, QueueTimeoutError, ReceivedMessage

HERE = Path(__file__).resolve().parent
WORKERS = 3
KILLS = 4


class Place(NamedTuple):
    """A receipt as it is in the notes."""

    process: int
    receiver_id: tuple[int, int]
    token: str


class Noted(NamedTuple):
    """A message as it is in the notes."""

    message_id: str
    session_id: str | None
    sequence_number: int
    delivery_count: int
    receipt: Place


@pytest.fixture
def workers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def reckon(ledger: Ledger, directory: Path, killed: set[int]) -> None:
    """Tell the ledger all that the workers noted, in the order in which it happened."""
    notes = []
    for path in directory.glob("*.events"):
        # The last line of a killed one may be cut short.
        notes += [(int(path.stem), line.split()) for line in path.read_text().splitlines(True) if line.endswith("\n")]
    notes.sort(key=lambda note: int(note[1][0]))
    witnesses = {number: Witness(ledger) for number, _ in notes}
    last = {number: int(words[0]) for number, words in notes}
    for number, (moment, what, message_id, session, sequence, delivery, receiver, token, how) in notes:
        witness = witnesses[number]
        for other in killed:  # what a killed one had begun is open until its locks are released
            if last.get(other, 0) < int(moment):
                witnesses[other].was_killed = True
        receipt: Any = Place(number, (number, int(receiver)), token)
        if what == "lost":
            witness.locks_lost(0, [receipt], None)
            continue
        message = Noted(message_id, None if session == "-" else session, int(sequence), int(delivery), receipt)
        if what == "begin":
            witness.begin(message)
        elif what == "end":
            witness.end(message, how)
        else:
            ledger.settled(message, Action(how), None if what == "settled" else QueueTimeoutError("as noted"))
    for number in killed & witnesses.keys():
        witnesses[number].was_killed = True


@pytest.mark.parametrize(("seed", "linger"), [(1, 0.0), (2, 1.0)])
def test_workers_killed_at_any_moment(
    tmp_path: Path, broker: RunningBroker, workers: list[subprocess.Popen[bytes]], seed: int, linger: float
) -> None:
    """Their locks are free at once, or when they run out; nothing is lost, no session is handled out of order."""
    chance = random.Random(seed)
    settings: dict[str, Any] = {"space": f"killed-{seed}", "linger": linger, "max_delivery_count": 1000}
    settings |= {"lock_duration": 3.0, "session_lock_duration": 3.0}
    url, config = broker.url(**settings), broker.config(**settings)
    environment = dict(broker.environment)
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), environment.get("PYTHONPATH", "")])

    def start() -> int:
        events = tmp_path / f"{len(workers)}.events"
        arguments = [sys.executable, "-m", "killed", url, str(events), str(seed)]
        workers.append(subprocess.Popen(arguments, env=environment))
        return len(workers) - 1

    def send() -> None:
        messages = traffic.messages(100)
        ledger.sending(messages)

        async def sending() -> None:
            async with QueueClient(config) as client:
                await client.send_messages(QUEUE, messages)

        asyncio.run(sending())

    async def rest() -> tuple[list[ReceivedMessage], list[ReceivedMessage]]:
        """Wait until there is nothing to do; return what is left, and the dead letters."""
        async with QueueClient(config) as client, asyncio.timeout(60):
            while (counts := await client.counts(QUEUE)).active + counts.in_flight + counts.scheduled:
                await asyncio.sleep(0.05)
            dead = await client.dead_letters(QUEUE).peek_messages(1000)
            return await client.peek_messages(QUEUE, 1000), dead

    traffic, ledger = Traffic(seed, sessions=100), Ledger()
    alive = [start() for _ in range(WORKERS)]
    killed: set[int] = set()
    for _ in range(KILLS):
        victim = chance.choice(alive)
        events = tmp_path / f"{victim}.events"
        while not events.exists() or events.stat().st_size < 3000:
            send()  # until it is in the midst of them
            time.sleep(0.1)
        send()
        time.sleep(chance.uniform(0.0, 0.03))
        workers[victim].kill()
        workers[victim].wait()
        killed.add(victim)
        alive[alive.index(victim)] = start()
    left, dead = asyncio.run(rest())
    for number in alive:
        workers[number].send_signal(signal.SIGTERM)
        assert workers[number].wait(30) == 0
    reckon(ledger, tmp_path, killed)
    ledger.reckon(left, dead)
    assert not ledger.violations, (seed, ledger.violations)
    assert ledger.completed + ledger.answers_lost + len(dead) == ledger.sent
    assert ledger.repeated[KILLED], "no handler was killed in its midst"
