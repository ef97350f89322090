"""The engine with a journal, reopened again and again, against the twin that never forgets [C24, C47]."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from engine_model import ModelEngine
from hypothesis import settings, strategies as st
from hypothesis.stateful import initialize, rule
from journaled import Journaled
from test_engine import EPOCH, EngineMachine

from queue_runtime._core.engine import ABANDON, COMPLETE, DEAD_LETTER
from queue_runtime._core.message import Message


def restarted(model: ModelEngine) -> None:
    """What a crash does to the queue: nobody holds anything any more."""
    model.holders.clear()
    for entry in sorted(model.entries, key=lambda entry: entry.number):
        if entry.state == "locked":
            entry.link = None
            if not entry.dead and entry.deliveries >= model.max_delivery_count:
                text = f"the message was delivered {entry.deliveries} times and never completed"
                model.bury(entry, "MaxDeliveryCountExceeded", text)
            else:
                entry.state = "ready"
    names = [entry.session for entry in sorted(model.entries, key=lambda entry: entry.number) if not entry.dead]
    model.ready_sessions = [name for name in dict.fromkeys(names) if name is not None and model.lane(False, name)]


class JournaledMachine(EngineMachine):
    @initialize(
        capacity=st.sampled_from([3, 6, 12]),
        deliveries=st.sampled_from([1, 2, 5]),
        bury=st.booleans(),
        window=st.sampled_from([0.0, 3.0]),
        locks=st.sampled_from([(4.0, 6.0), (6.0, 4.0), (2.0, 2.0)]),
    )
    def start(self, capacity: int, deliveries: int, bury: bool, window: float, locks: tuple[float, float]) -> None:
        super().start(capacity, deliveries, bury, window, locks)
        self.common: dict[str, Any] = {
            "lock_duration": locks[0],
            "session_lock_duration": locks[1],
            "max_delivery_count": deliveries,
            "dead_letter_on_expiration": bury,
            "deduplication_window": window,
            "capacity": capacity,
        }
        self.directory = Path(tempfile.mkdtemp())
        self.kept: Journaled | None = None
        self.open()

    def open(self) -> None:
        self.kept = Journaled(self.directory, self.common, *self.times)
        self.engine = self.kept.engine
        self.links = [(self.engine.open_link(dead), self.model.open_link(dead)) for dead in (False, False, True)]
        self.receipts = []

    @rule()
    def crash_and_reopen(self) -> None:
        assert self.kept is not None
        self.kept.crash()
        restarted(self.model)
        self.open()

    @rule(begins=st.booleans())
    def take_a_snapshot(self, begins: bool) -> None:
        assert self.kept is not None
        if begins:
            self.kept.begin_snapshot()
        self.kept.tell(*self.times)

    @rule(shift=st.just(0.0))
    def set_the_wall_clock(self, shift: float) -> None:
        """What is kept is kept by the wall clock: it stands still here."""

    def teardown(self) -> None:
        if getattr(self, "kept", None) is not None:
            assert self.kept is not None
            self.kept.crash()
            shutil.rmtree(self.directory)


JournaledMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestJournaledEngineAgainstItsTwin = JournaledMachine.TestCase


COMMON: dict[str, Any] = {
    "lock_duration": 30.0,
    "session_lock_duration": 30.0,
    "max_delivery_count": 1,
    "dead_letter_on_expiration": True,
    "deduplication_window": 0.0,
    "capacity": 1000,
}


def test_dead_letters_that_were_seen_keep_their_numbers(tmp_path: Path) -> None:
    """Those by the count of deliveries too, which recovery could find out anew, but in another order."""
    kept = Journaled(tmp_path, COMMON, 0.0, EPOCH)
    link = kept.engine.open_link()
    kept.engine.send([Message(body=b"", message_id=name) for name in "ab"], 0, 0.0, EPOCH)
    first, second = kept.engine.receive(link, 2, 0.0, EPOCH)
    for message in (second, first):
        kept.engine.settle(link, ABANDON, [message.receipt], 0.0, EPOCH)
    for _ in range(2):
        letters = kept.engine.peek(9, 0, True, 0.0, EPOCH)
        assert [(letter.message_id, letter.sequence_number) for letter in letters] == [("b", 1), ("a", 2)]
        kept.crash()
        kept = Journaled(tmp_path, COMMON, 0.0, EPOCH)
    kept.crash()


def test_numbers_go_on_after_a_snapshot_of_nothing(tmp_path: Path) -> None:
    """A number is not given twice, even where nothing is left that has one."""
    kept = Journaled(tmp_path, COMMON, 0.0, EPOCH)
    link, dead = kept.engine.open_link(), kept.engine.open_link(True)
    kept.engine.send([Message(body=b"") for _ in range(4)], 0, 0.0, EPOCH)
    receipts = [message.receipt for message in kept.engine.receive(link, 4, 0.0, EPOCH)]
    kept.engine.settle(link, COMPLETE, receipts[:3], 0.0, EPOCH)
    kept.engine.settle(link, DEAD_LETTER, receipts[3:], 0.0, EPOCH)
    receipts = [message.receipt for message in kept.engine.receive(dead, 4, 0.0, EPOCH)]
    kept.engine.settle(dead, COMPLETE, receipts, 0.0, EPOCH)
    kept.begin_snapshot()
    while kept.snapshot is not None:
        kept.tell(0.0, EPOCH)
    kept.crash()
    kept = Journaled(tmp_path, COMMON, 0.0, EPOCH)
    link = kept.engine.open_link()
    kept.engine.send([Message(body=b"")], 0, 0.0, EPOCH)
    (message,) = kept.engine.receive(link, 1, 0.0, EPOCH)
    assert message.sequence_number == 5
    kept.engine.settle(link, DEAD_LETTER, [message.receipt], 0.0, EPOCH)
    (letter,) = kept.engine.peek(9, 0, True, 0.0, EPOCH)
    assert letter.sequence_number == 2
    kept.crash()


def test_what_dies_while_a_snapshot_is_made_is_there_once(tmp_path: Path) -> None:
    """It was told as a message, is told as a dead letter, and the log says that it died."""
    kept = Journaled(tmp_path, COMMON, 0.0, EPOCH)
    link, dead = kept.engine.open_link(), kept.engine.open_link(True)
    kept.engine.send([Message(body=b"", message_id=str(number)) for number in range(20)], 0, 0.0, EPOCH)
    receipts = [message.receipt for message in kept.engine.receive(link, 20, 0.0, EPOCH)]
    kept.begin_snapshot()
    for _ in range(6):
        kept.tell(0.0, EPOCH)  # the first ones, and not all
    assert 300 < len(kept.told) < 1200
    kept.engine.settle(link, DEAD_LETTER, receipts[:3], 0.0, EPOCH, 0.0, "why")
    (letter, *_) = kept.engine.receive(dead, 1, 0.0, EPOCH)
    kept.engine.settle(dead, COMPLETE, [letter.receipt], 0.0, EPOCH)
    while kept.snapshot is not None:
        kept.tell(0.0, EPOCH)
    kept.crash()
    kept = Journaled(tmp_path, {**COMMON, "max_delivery_count": 5}, 0.0, EPOCH)
    letters = [(m.message_id, m.sequence_number) for m in kept.engine.peek(99, 0, True, 0.0, EPOCH)]
    assert letters == [("1", 2), ("2", 3)]
    assert [m.message_id for m in kept.engine.peek(99, 0, False, 0.0, EPOCH)] == [str(n) for n in range(3, 20)]
    kept.crash()
