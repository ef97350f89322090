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
from test_engine import EngineMachine


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
