"""Consumers killed at random, handlers that raise, hang and block, clocks that jump, networks that fail: nothing is
lost, no order is broken, and a message is handled twice only where at-least-once delivery allows it.

``make chaos`` runs the full size: MESSAGES=1000000 in SESSIONS=10000, from SEED, which is printed.
"""

import os

import pytest
from simulation import NARROW, WIDE, World

SEED = int(os.environ.get("CHAOS_SEED", "1"))
MESSAGES = int(os.environ.get("CHAOS_MESSAGES", "100000"))
SESSIONS = int(os.environ.get("CHAOS_SESSIONS", "10000"))


@pytest.mark.parametrize("seed", range(16))
def test_small_consumers(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """[C24] [C39] [C40] where everything is tight: a handler or two, a session or two, a message held or two."""
    world = World(seed, count=2000, sessions=60, bounds=NARROW, wave=100, quiet=60)
    world.run(monkeypatch)
    assert sum(world.events.values()) >= 3
    assert world.ledger.completed + world.ledger.answers_lost == 2000


def test_many_messages_in_many_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """[C24] [C28] [C39] [C40] at size."""
    world = World(SEED, count=MESSAGES, sessions=SESSIONS, bounds=WIDE, wave=2000, quiet=1000)
    try:
        world.run(monkeypatch)
    finally:
        print(world.report())
    ledger = world.ledger
    assert ledger.completed + ledger.answers_lost == MESSAGES
    assert not ledger.pending - ledger.answers_lost
    for reason in ("failed", "cancelled", "lock lost", "not settled"):
        assert ledger.repeated[reason], f"no message was handled again because it was {reason}"
