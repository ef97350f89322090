"""Renewal from another thread, while the engine's own may be anywhere in it [C21, C27]."""

import gc
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from queue_runtime._core.engine import ABANDON, COMPLETE, DEAD_LETTER, Engine
from queue_runtime.errors import ClosedError, InvalidReceiptError, SessionLockLostError, ValidationError
from queue_runtime.message import Message, Receipt

LOCK = 10.0


def make(**settings: Any) -> Engine:
    return Engine(
        "q",
        **{
            "lock_duration": LOCK,
            "session_lock_duration": LOCK,
            "max_delivery_count": 1000,
            "dead_letter_on_expiration": False,
            "deduplication_window": 100.0,
            "capacity": 100_000,
            "max_message_size": 1000,
        }
        | settings,
    )


def filled(count: int, session_id: str | None = None) -> Engine:
    engine = make()
    engine.send([Message(body=b"x", session_id=session_id) for _ in range(count)], 0, 0.0, 0.0)
    return engine


def test_it_extends_what_is_locked_and_refuses_the_rest() -> None:
    engine = filled(4)
    link, other = engine.open_link(), engine.open_link()
    first, second, settled = (message.receipt for message in engine.receive(link, 3, 0.0, 0.0))
    (foreign,) = (message.receipt for message in engine.receive(other, 1, 0.0, 0.0))
    engine.settle(link, COMPLETE, [settled], 0.0, 0.0)
    odd = [Receipt("q", token, link.receiver_id) for token in (None, -1, 1 << 70, 1)] + [Receipt("r", 1, 1)]
    outcomes = engine.renew_from_thread(link, [first, settled, foreign, second, *odd], 9.0, 109.0)
    assert [type(outcome) for outcome in outcomes] == [
        float,
        InvalidReceiptError,
        InvalidReceiptError,
        float,
        *[InvalidReceiptError] * 5,
    ]
    assert outcomes[0] == 119.0
    assert engine.settle(link, COMPLETE, [first], 18.9, 0.0) == [None]
    assert engine.counts(18.9, 0.0)[:2] == (1, 1), "the other's ran out"
    assert engine.counts(19.1, 0.0)[:2] == (2, 0)
    with pytest.raises(ValidationError):
        engine.renew_from_thread(link, ["x"], 0.0, 0.0)  # type: ignore[list-item]
    with pytest.raises(ValidationError):
        make().renew_from_thread(link, [], 0.0, 0.0)
    assert engine.renew_from_thread(link, [], 0.0, 0.0) == []


def test_a_lock_that_ran_out_is_not_renewed_although_nobody_noticed() -> None:
    engine = filled(1)
    link = engine.open_link()
    receipts = [message.receipt for message in engine.receive(link, 1, 0.0, 0.0)]
    assert isinstance(engine.renew_from_thread(link, receipts, LOCK, 0.0)[0], InvalidReceiptError)
    assert engine.counts(LOCK, 0.0)[0] == 1


def test_an_earlier_time_does_not_disturb_the_order_of_ends() -> None:
    """Who waited for the interpreter's lock brings one."""
    engine = filled(2)
    link = engine.open_link()
    (early,) = engine.receive(link, 1, 0.0, 0.0)
    (late,) = engine.receive(link, 1, 5.0, 0.0)
    engine.renew_from_thread(link, [early.receipt], 1.0, 0.0)
    assert engine.counts(14.9, 0.0)[1] == 2
    assert engine.counts(15.0, 0.0)[1] == 0
    assert late.delivery_count == 1


def test_a_session_is_extended_until_it_is_lost() -> None:
    engine = filled(1, "s")
    engine.send([Message(body=b"x", session_id="t")], 0, 0.0, 0.0)
    link = engine.accept("s", 0.0, 0.0)
    later = engine.accept("t", 6.0, 0.0)
    assert link is not None
    assert later is not None
    assert engine.renew_session_from_thread(link, 5.0, 105.0) == link.locked_until == 115.0
    engine.tick(15.9, 0.0)
    assert not link.lost, "it ends with the last one, so that the chain stays in order"
    with pytest.raises(SessionLockLostError):
        engine.renew_session_from_thread(link, 16.0, 0.0)
    engine.tick(16.0, 0.0)
    with pytest.raises(SessionLockLostError):
        engine.renew_session_from_thread(link, 16.0, 0.0)
    engine.close_link(later, 16.0, 0.0)
    with pytest.raises(ClosedError):
        engine.renew_session_from_thread(later, 16.0, 0.0)
    with pytest.raises(ValidationError):
        engine.renew_session_from_thread(engine.open_link(), 16.0, 0.0)
    with pytest.raises(ValidationError):
        make().renew_session_from_thread(link, 16.0, 0.0)


@pytest.fixture
def _switching() -> Iterator[None]:
    """The interpreter's lock changes hands wherever an object is made that the collector tracks."""
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()

    def give_way(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    gc.callbacks.append(give_way)
    gc.freeze()
    gc.set_threshold(1)
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*threshold)
    gc.unfreeze()
    gc.callbacks.remove(give_way)


@pytest.mark.usefixtures("_switching")
@pytest.mark.parametrize("seed", range(3))
def test_the_engine_s_own_thread_may_be_anywhere(seed: int) -> None:
    """Whatever it does, it does as if nobody else were there; and locks that are renewed do not run out."""
    randomly = random.Random(seed)
    engine = make(max_delivery_count=5)
    link, grave = engine.open_link(), engine.open_link(dead_letter=True)
    session = engine.accept("s", 0.0, 0.0)
    assert session is not None
    links = [link, grave, session]
    held: dict[Any, list[Receipt]] = {each: [] for each in links}
    now = 0.0
    state = {"inside": False, "over": False, "met": 0, "renewed": 0, "rounds": 0}

    def renew() -> None:
        while not state["over"]:
            for each in links:
                inside = state["inside"]
                outcomes = engine.renew_from_thread(each, list(held[each]), now, now)
                state["met"] += inside
                state["renewed"] += sum(isinstance(outcome, float) for outcome in outcomes)
            engine.renew_session_from_thread(session, now, now)
            state["rounds"] += 1

    thread = threading.Thread(target=renew)
    thread.start()
    end = time.monotonic() + 60
    sent = gone = rounds = leaps = 0
    try:
        while leaps < 5 or min(state["met"], state["renewed"]) < 50:
            assert time.monotonic() < end
            now += 0.000_1
            if state["rounds"] >= rounds + 3:  # all that is held has been renewed since the last leap
                rounds = state["rounds"]
                now += LOCK * 0.4
                leaps += 1
            each = randomly.choice(links)
            step = randomly.randrange(4)
            state["inside"] = True
            if step == 0:
                batch = [Message(body=b"x", session_id=randomly.choice([None, "s"])) for _ in range(5)]
                sent += engine.send(batch, 0, now, now)
            elif step == 1:
                held[each] += [message.receipt for message in engine.receive(each, 5, now, now)]
            elif held[each]:
                some = [held[each].pop(randomly.randrange(len(held[each]))) for _ in range(1 + len(held[each]) // 3)]
                action = randomly.choice([COMPLETE, ABANDON, DEAD_LETTER])
                assert engine.settle(each, action, some, now, now, 0.0) == [None] * len(some)
                gone += len(some) * (action == COMPLETE)
            state["inside"] = False
    finally:
        state["over"] = True
        thread.join()
    active, in_flight, scheduled, deferred, dead = engine.counts(now, now)
    assert in_flight == len(held[link]) + len(held[session])
    assert active + in_flight + scheduled + deferred + dead == sent - gone
    assert state["met"] >= 50, "it was entered from two threads at once"
    assert state["renewed"] >= 50
    active, in_flight, *_ = engine.counts(now + LOCK + 1.0, now)
    assert in_flight == 0
