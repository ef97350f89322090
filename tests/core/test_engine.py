"""The queue engine against its twin: after every step, all that can be observed is equal [C8-C30]."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from engine_model import ModelEngine, ModelLink, Seen
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from queue_runtime._core.delivery import ReceivedMessage
from queue_runtime._core.engine import Engine
from queue_runtime._core.ledger import Link
from queue_runtime._core.message import Message
from queue_runtime.errors import ClosedError, InvalidReceiptError, SessionLockedError, SessionLockLostError

EPOCH = 1_700_000_000.0
SESSIONS = st.sampled_from([None, "a", "a", "b"])
STEPS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 6.0])
NAMES = {ClosedError: "closed", SessionLockLostError: "lost", InvalidReceiptError: "invalid"}


def seen(message: ReceivedMessage) -> Seen:
    def epoch(moment: datetime | None) -> float | None:
        return None if moment is None else moment.timestamp()

    enqueued = epoch(message.enqueued_at)
    assert enqueued is not None
    assert message.sequence_number is not None
    return Seen(
        message.message_id,
        message.sequence_number,
        message.delivery_count,
        enqueued,
        epoch(message.first_delivered_at),
        epoch(message.delivered_at),
        epoch(message.locked_until),
        message.dead_letter_reason,
        message.dead_letter_description,
    )


def answer(call: Callable[[], Any]) -> Any:
    """What a call returns, or the name of what it raises."""
    try:
        return call()
    except (ClosedError, SessionLockLostError) as error:
        return NAMES[type(error)]


def named(outcomes: list[Any]) -> list[Any]:
    return [NAMES[type(outcome)] if isinstance(outcome, Exception) else outcome for outcome in outcomes]


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    spec: dict[str, Any] = {"session_id": draw(SESSIONS)}
    if draw(st.integers(0, 3)) == 0:
        spec["time_to_live"] = draw(st.sampled_from([0.25, 1.0, 3.0, 5.0]))
    if draw(st.integers(0, 5)) == 0:
        spec["deduplication_id"] = draw(st.sampled_from(["x", "y"]))
    when = draw(st.integers(0, 7))
    if when == 0:
        spec["delay"] = draw(st.sampled_from([0.0, 0.5, 2.0]))
    elif when == 1:
        spec["scheduled_at"] = draw(st.sampled_from([-1.0, 0.5, 3.0]))
    return spec


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        capacity=st.sampled_from([3, 6, 12]),
        deliveries=st.sampled_from([1, 2, 5]),
        bury=st.booleans(),
        window=st.sampled_from([0.0, 3.0]),
        locks=st.sampled_from([(4.0, 6.0), (6.0, 4.0), (2.0, 2.0)]),
    )
    def start(self, capacity: int, deliveries: int, bury: bool, window: float, locks: tuple[float, float]) -> None:
        self.now, self.shift = 0.0, 0.0
        common: dict[str, Any] = {
            "lock_duration": locks[0],
            "session_lock_duration": locks[1],
            "max_delivery_count": deliveries,
            "dead_letter_on_expiration": bury,
            "deduplication_window": window,
            "capacity": capacity,
        }
        self.engine = Engine("q", max_message_size=1000, **common)
        self.model = ModelEngine(**common)
        self.links: list[tuple[Link, ModelLink]] = []
        self.receipts: list[tuple[Any, Any]] = []
        for dead in (False, False, True):
            self.links.append((self.engine.open_link(dead), self.model.open_link(dead)))

    @property
    def times(self) -> tuple[float, float]:
        return self.now, EPOCH + self.now + self.shift

    def link(self, choice: int) -> tuple[Link, ModelLink]:
        """Mostly one that has something to receive."""
        ready = [pair for pair in self.links if not pair[1].closed and self.engine.is_ready(pair[0])]
        links = ready if ready and choice % 4 else self.links
        return links[choice // 4 % len(links)]

    def take(self, real: Any, model: Any) -> None:
        if isinstance(model, str):
            assert real == model
            return
        assert [seen(message) for message in real] == [message for message, _ in model]
        self.receipts += [(message.receipt, receipt) for message, (_, receipt) in zip(real, model, strict=True)]

    @rule(specs=st.lists(specs(), min_size=1, max_size=4))
    def send(self, specs: list[dict[str, Any]]) -> None:
        messages = []
        for spec in specs:
            if "scheduled_at" in spec:
                moment = datetime.fromtimestamp(self.times[1], UTC) + timedelta(seconds=spec["scheduled_at"])
                spec = spec | {"scheduled_at": moment}
            messages.append(Message(body=b"", **spec))
        assert self.engine.send(messages, 0, *self.times) == self.model.send(messages, *self.times)

    @rule(choice=st.integers(0, 50), count=st.integers(0, 4))
    def receive(self, choice: int, count: int) -> None:
        link, twin = self.link(choice)
        real = answer(lambda: self.engine.receive(link, count, *self.times))
        self.take(real, self.model.receive(twin, count, *self.times))

    @rule(choice=st.integers(0, 50), numbers=st.lists(st.integers(0, 12), max_size=4), known=st.booleans())
    def receive_deferred(self, choice: int, numbers: list[int], known: bool) -> None:
        link, twin = self.links[-1 - choice % len(self.links)]
        if known:
            numbers += [entry.number for entry in self.model.entries if entry.state == "deferred"]
        real = answer(lambda: self.engine.receive_deferred(link, numbers, *self.times))
        self.take(real, self.model.receive_deferred(twin, numbers, *self.times))

    @rule(session=SESSIONS)
    def accept(self, session: str | None) -> None:
        model = self.model.accept(session, *self.times)
        try:
            real = self.engine.accept(session, *self.times)
        except SessionLockedError as error:
            until = error.locked_until
        else:
            until = None
        if until is not None:
            assert until.timestamp() == model
            return
        assert (real is None) == (model is None)
        if real is not None:
            assert isinstance(model, ModelLink)
            assert (real.session_id, real.locked_until) == (model.session, model.locked_until)
            self.links.append((real, model))
            self.take(self.engine.receive(real, 2, *self.times), self.model.receive(model, 2, *self.times))

    @precondition(lambda self: self.receipts)
    @rule(
        choice=st.integers(0, 50),
        recent=st.lists(st.integers(1, 6), min_size=1, max_size=4),
        action=st.integers(0, 3),
        delay=st.sampled_from([0.0, 0.0, 1.0, 3.0]),
        owner=st.integers(0, 4),
    )
    def settle(self, choice: int, recent: list[int], action: int, delay: float, owner: int) -> None:
        """Mostly on the receiver that it came from; sometimes on another, sometimes twice, sometimes late."""
        pairs = [self.receipts[-min(back, len(self.receipts))] for back in recent]
        link, twin = self.link(choice)
        if owner:
            link, twin = next(pair for pair in self.links if pair[1] is pairs[0][1][0])
        real = self.engine.settle(link, action, [pair[0] for pair in pairs], *self.times, delay, "why")
        assert named(real) == self.model.settle(twin, action, [pair[1] for pair in pairs], *self.times, delay, "why")

    @precondition(lambda self: self.receipts)
    @rule(recent=st.lists(st.integers(1, 6), min_size=1, max_size=4))
    def renew(self, recent: list[int]) -> None:
        pairs = [self.receipts[-min(back, len(self.receipts))] for back in recent]
        link, twin = next(pair for pair in self.links if pair[1] is pairs[0][1][0])
        real = named(self.engine.renew(link, [pair[0] for pair in pairs], *self.times))
        assert real == self.model.renew(twin, [pair[1] for pair in pairs], *self.times)

    @precondition(lambda self: any(twin.session for _, twin in self.links))
    @rule(choice=st.integers(0, 50), state=st.sampled_from([None, b"1", b"2"]), write=st.booleans())
    def session(self, choice: int, state: bytes | None, write: bool) -> None:
        holders = [pair for pair in self.links if pair[1].session is not None]
        link, twin = holders[choice % len(holders)]
        renewed = answer(lambda: self.engine.renew_session(link, *self.times))
        assert renewed == self.model.renew_session(twin, *self.times)
        if write:
            assert answer(lambda: self.engine.set_state(link, state, *self.times)) == self.model.set_state(
                twin, state, *self.times
            )
        real = answer(lambda: self.engine.get_state(link, *self.times))
        assert real == self.model.get_state(twin, *self.times)

    @rule(choice=st.integers(0, 50))
    def close(self, choice: int) -> None:
        link, twin = self.link(choice)
        self.engine.close_link(link, *self.times)
        self.model.close_link(twin, *self.times)
        if twin.session is None:
            self.links.append((self.engine.open_link(twin.dead), self.model.open_link(twin.dead)))

    @rule(step=STEPS)
    def pass_time(self, step: float) -> None:
        self.now += step

    @rule(shift=st.sampled_from([-2.0, 0.0, 1.0]))
    def set_the_wall_clock(self, shift: float) -> None:
        self.shift = shift

    @rule()
    def pass_to_the_next_event(self) -> None:
        due = self.engine.next_due(*self.times)
        if 0 < due < math.inf:
            self.now += due

    @invariant()
    def everything_is_equal(self) -> None:
        engine, model = self.engine, self.model
        assert engine.counts(*self.times) == (model.tick(*self.times), model.counts())[1]
        for dead in (False, True):
            real = [seen(message) for message in engine.peek(100, 0, dead, *self.times)]
            assert real == model.peek(100, 0, dead)
            if len(real) > 1:
                start = real[1].number
                assert [seen(message) for message in engine.peek(2, start, dead, *self.times)] == real[1:3]
        assert engine.room == model.room
        assert engine.has_plain == bool(model.lane(False, None))
        assert engine.has_dead == bool(model.lane(True, None))
        assert engine.has_session == bool(model.ready_sessions)
        assert engine.next_due(*self.times) == model.next_due(*self.times)
        signals = engine.take_signals()
        for link, twin in self.links:
            assert (link.closed, link.lost) == (twin.closed, twin.lost)
            ready = twin.closed or twin.lost or bool(model.lane(twin.dead, twin.session))
            assert engine.is_ready(link) == ready
            if twin.session is not None and not link.closed:
                # Whoever waits is told, once, as soon as there is something to look for.
                if link.receiver_id in signals:
                    assert ready
                    assert not link.waiting
                assert not (link.waiting and ready)
                link.waiting = not ready


EngineMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestEngineAgainstItsTwin = EngineMachine.TestCase
