"""Single rules of the queue engine that a random walk meets too seldom, its costs, and its memory."""

from __future__ import annotations

import gc
import math
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, strategies as st

from queue_runtime._core.delivery import Receipt
from queue_runtime._core.engine import ABANDON, COMPLETE, DEAD_LETTER, DEFER, Engine
from queue_runtime._core.ledger import Link
from queue_runtime._core.message import Message
from queue_runtime.errors import InvalidReceiptError, MessageTooLargeError, SessionLockedError, ValidationError


def make(**changes: Any) -> Engine:
    settings: dict[str, Any] = {
        "lock_duration": 10.0,
        "session_lock_duration": 100.0,
        "max_delivery_count": 5,
        "dead_letter_on_expiration": True,
        "deduplication_window": 30.0,
        "capacity": 2_000_000,
        "max_message_size": 1000,
    }
    return Engine("q", **(settings | changes))


def message(number: int, **fields: Any) -> Message:
    return Message(body=str(number).encode(), **fields)


def bodies(received: list[Any]) -> list[int]:
    return [int(one.body) for one in received]


def send(engine: Engine, *messages: Message, now: float = 0.0) -> None:
    assert engine.send(messages, 0, now, now) == len(messages)


def accept(engine: Engine, session: str | None = "s", now: float = 0.0) -> Link:
    link = engine.accept(session, now, now)
    assert link is not None
    return link


def test_c24_what_is_held_back_holds_its_followers_back_and_not_its_forerunners() -> None:
    engine = make()
    send(engine, *(message(i, session_id="s") for i in range(5)))
    link = accept(engine)
    first, second = engine.receive(link, 2, 0, 0)
    assert engine.settle(link, ABANDON, [second.receipt], 0, 0, 4.0) == [None]
    assert engine.receive(link, 9, 1, 1) == []
    engine.settle(link, ABANDON, [first.receipt], 1, 1)
    assert bodies(engine.receive(link, 9, 1, 1)) == [0]
    assert engine.next_due(1, 1) == 3.0
    assert bodies(engine.receive(link, 9, 4, 4)) == [1, 2, 3, 4]


def test_c12_without_a_session_a_delay_holds_nobody_back() -> None:
    engine = make()
    link = engine.open_link()
    send(engine, message(0), message(1), message(2))
    first = engine.receive(link, 1, 0, 0)[0]
    engine.settle(link, ABANDON, [first.receipt], 0, 0, 4.0)
    assert bodies(engine.receive(link, 1, 0, 0)) == [1]
    assert bodies(engine.receive(link, 9, 4, 4)) == [0, 2]


def test_c24_a_deferred_message_does_not_block() -> None:
    engine = make()
    send(engine, *(message(i, session_id="s") for i in range(3)))
    link = accept(engine)
    first = engine.receive(link, 1, 0, 0)[0]
    engine.settle(link, DEFER, [first.receipt], 0, 0)
    assert bodies(engine.receive(link, 9, 0, 0)) == [1, 2]
    assert engine.receive_deferred(engine.open_link(), [1], 0, 0) == []
    assert bodies(engine.receive_deferred(link, [7, 1, 1], 0, 0)) == [0]


@given(st.permutations(range(12)), st.integers(0, 12))
def test_c24_whatever_comes_back_in_whatever_order_is_delivered_in_order(order: list[int], completed: int) -> None:
    for session in (None, "s"):
        engine = make()
        send(engine, *(message(i, session_id=session) for i in range(15)))
        link = accept(engine) if session else engine.open_link()
        received = engine.receive(link, 12, 0, 0)
        for place in order[:completed]:
            engine.settle(link, COMPLETE, [received[place].receipt], 0, 0)
        for place in order[completed:]:
            engine.settle(link, ABANDON, [received[place].receipt], 0, 0)
        left = [*sorted(order[completed:]), 12, 13, 14]
        one_by_one = [engine.receive(link, 1, 0, 0)[0] for _ in left]
        assert bodies(one_by_one) == left


def test_c13_a_renewed_lock_ends_after_those_that_were_not() -> None:
    engine = make()
    link = engine.open_link()
    send(engine, message(0), message(1))
    kept, lapsed = engine.receive(link, 2, 0, 0)
    assert engine.renew(link, [kept.receipt], 5, 1005) == [1015.0]
    again = engine.receive(link, 9, 10, 10)
    assert bodies(again) == [1]
    assert again[0].delivery_count == 2
    late, good = engine.settle(link, COMPLETE, [lapsed.receipt, kept.receipt], 14, 14)
    assert isinstance(late, InvalidReceiptError)
    assert late.receipt is lapsed.receipt
    assert good is None


def test_c13_the_receipt_of_an_earlier_delivery_to_the_same_receiver_is_refused() -> None:
    engine = make()
    link = engine.open_link()
    send(engine, message(0))
    old = engine.receive(link, 1, 0, 0)[0].receipt
    new = engine.receive(link, 1, 10, 10)[0].receipt
    assert isinstance(engine.renew(link, [old], 10, 10)[0], InvalidReceiptError)
    assert isinstance(engine.settle(link, COMPLETE, [old], 10, 10)[0], InvalidReceiptError)
    assert engine.settle(link, COMPLETE, [new], 10, 10) == [None]


@pytest.mark.parametrize("token", [0, -1, 2**64, 2**80, "text", None, 1.5])
def test_c11_an_invented_receipt_is_refused(token: object) -> None:
    engine = make()
    link = engine.open_link()
    send(engine, message(0))
    real = engine.receive(link, 1, 0, 0)[0].receipt
    assert real.token not in (token, 1)
    for forged in (Receipt("q", token, link.receiver_id), Receipt("other", real.token, link.receiver_id)):
        assert isinstance(engine.settle(link, COMPLETE, [forged], 0, 0)[0], InvalidReceiptError)
    other = engine.open_link()
    assert isinstance(engine.settle(other, COMPLETE, [real], 0, 0)[0], InvalidReceiptError)
    assert engine.counts(0, 0) == (0, 1, 0, 0, 0)


def test_c19_an_id_is_forgotten_when_its_window_ends_and_not_when_its_message_goes() -> None:
    engine = make(capacity=1)
    link = engine.open_link()
    send(engine, message(0, deduplication_id="x"))
    send(engine, message(1, deduplication_id="x"), now=29.0)  # accepted, full or not: it needs no room
    assert engine.settle(link, COMPLETE, [engine.receive(link, 9, 29, 29)[0].receipt], 29, 29) == [None]
    send(engine, message(2, deduplication_id="x"), now=29.5)
    assert engine.counts(29.5, 29.5) == (0, 0, 0, 0, 0)
    send(engine, message(3, deduplication_id="x"), now=30.0)
    assert bodies(engine.receive(link, 9, 30, 30)) == [3]


def test_c19_a_message_that_found_no_room_is_not_remembered() -> None:
    engine = make(capacity=1)
    send(engine, message(0))
    assert engine.send([message(1, deduplication_id="x")], 0, 0, 0) == 0
    link = engine.open_link()
    engine.settle(link, COMPLETE, [engine.receive(link, 1, 0, 0)[0].receipt], 0, 0)
    send(engine, message(1, deduplication_id="x"))
    assert bodies(engine.receive(link, 1, 0, 0)) == [1]


def test_c39_dead_letters_beyond_the_capacity_take_the_room_of_messages() -> None:
    engine = make(capacity=2)
    link = engine.open_link()
    for expected in (2, 2, 2, 1, 0):
        assert engine.room == expected
        assert engine.send([message(0)], 0, 0, 0) == (1 if expected else 0)
        for received in engine.receive(link, 1, 0, 0):
            engine.settle(link, DEAD_LETTER, [received.receipt], 0, 0, 0.0, "bad", None)
    assert engine.counts(0, 0) == (0, 0, 0, 0, 4)


def test_c17_a_locked_message_may_outlive_its_time_and_be_completed() -> None:
    engine = make()
    link = engine.open_link()
    send(engine, message(0, time_to_live=2), message(1, time_to_live=2))
    kept, returned = engine.receive(link, 2, 1, 1)
    assert engine.settle(link, COMPLETE, [kept.receipt], 5, 5) == [None]
    engine.settle(link, ABANDON, [returned.receipt], 5, 5)
    assert engine.counts(5, 5) == (0, 0, 0, 0, 1)
    dead = engine.receive(engine.open_link(True), 9, 5, 5)[0]
    assert (dead.dead_letter_reason, dead.sequence_number, dead.delivery_count) == ("TTLExpired", 1, 2)


def test_c18_a_time_to_live_counts_from_when_the_message_is_due() -> None:
    engine = make(dead_letter_on_expiration=False)
    send(engine, message(0, delay=10, time_to_live=3))
    assert engine.counts(12.9, 12.9) == (1, 0, 0, 0, 0)
    assert engine.next_due(12.9, 12.9) == pytest.approx(0.1)
    assert engine.counts(13, 13) == (0, 0, 0, 0, 0)
    assert engine.next_due(13, 13) == math.inf


def test_c25_a_session_belongs_to_one_and_falls_to_the_next_with_its_message_locks() -> None:
    engine = make(lock_duration=500.0)
    send(engine, message(0, session_id="s"), message(1, session_id="s"))
    old = accept(engine)
    held = engine.receive(old, 1, 0, 0)[0]
    with pytest.raises(SessionLockedError) as caught:
        engine.accept("s", 50, 1050)
    assert caught.value.locked_until is not None
    assert caught.value.locked_until.timestamp() == 100
    assert engine.accept(None, 99, 99) is None
    new = accept(engine, None, 100)
    assert old.lost
    assert "SessionLockLostError" in repr(engine.settle(old, COMPLETE, [held.receipt], 100, 100))
    assert bodies(engine.receive(new, 9, 100, 100)) == [0, 1]


def test_c26_sessions_take_turns() -> None:
    engine = make()
    send(engine, *(message(i, session_id=f"s{i % 3}") for i in range(9)))
    turns = []
    for _ in range(9):
        link = accept(engine, None)
        received = engine.receive(link, 1, 0, 0)
        turns += bodies(received)
        engine.settle(link, COMPLETE, [received[0].receipt], 0, 0)
        engine.close_link(link, 0, 0)
    assert turns == list(range(9))
    assert engine.accept(None, 0, 0) is None


def test_bad_input_changes_nothing() -> None:
    engine = make()
    other = make().open_link()
    link = engine.open_link()
    send(engine, message(0))
    receipt = engine.receive(link, 1, 0, 0)[0].receipt
    with pytest.raises(MessageTooLargeError):
        engine.check([message(1), Message(body=b"x" * 2000)])
    for call in (
        lambda: engine.check([message(1), "text"]),  # type: ignore[list-item]
        lambda: engine.settle(link, COMPLETE, [receipt, "text"], 0, 0),  # type: ignore[list-item]
        lambda: engine.settle(link, ABANDON, [receipt], 0, 0, -1.0),
        lambda: engine.settle(link, ABANDON, [receipt], 0, 0, math.nan),
        lambda: engine.settle(link, 4, [receipt], 0, 0),
        lambda: engine.settle(other, COMPLETE, [receipt], 0, 0),
        lambda: engine.receive(other, 1, 0, 0),
        lambda: engine.is_ready(Link()),
        lambda: engine.peek(1, "text", False, 0, 0),  # type: ignore[arg-type]
        lambda: engine.receive_deferred(link, [None], 0, 0),  # type: ignore[list-item]
        lambda: engine.accept("", 0, 0),
        lambda: engine.accept("s\n", 0, 0),
        lambda: engine.set_state(link, b"", 0, 0),
    ):
        with pytest.raises(ValidationError):
            call()
    assert engine.counts(0, 0) == (0, 1, 0, 0, 0)


def test_c20_peek_finds_its_place_among_holes() -> None:
    engine = make(lock_duration=1e6)
    link = engine.open_link()
    send(engine, *(message(i) for i in range(1, 1001)))
    received = engine.receive(link, 1000, 0, 0)
    keep = {1, 2, 77, 500, 998}
    engine.settle(link, COMPLETE, [one.receipt for one in received if int(one.body) not in keep], 0, 0)
    send(engine, *(message(i) for i in range(1001, 1004)))
    there = [*sorted(keep), 1001, 1002, 1003]
    for start in range(1005):
        assert bodies(engine.peek(2, start, False, 0, 0)) == [number for number in there if number >= start][:2]
    assert engine.peek(9, 10**30, False, 0, 0) == []
    assert bodies(engine.peek(1, -(10**30), False, 0, 0)) == [1]
    assert engine.settle(link, COMPLETE, [received[i - 1].receipt for i in sorted(keep)], 0, 0) == [None] * 5


def test_p9_a_million_messages_in_and_out_leave_no_memory_behind() -> None:
    engine = make()
    link = engine.open_link()
    batch = [message(i) for i in range(1000)]

    def cycle(depth: int) -> None:
        for _ in range(depth):
            engine.send(batch, 0, 0, 0)
        for _ in range(depth):
            receipts = [one.receipt for one in engine.receive(link, 1000, 0, 0)]
            assert not any(engine.settle(link, COMPLETE, receipts, 0, 0))

    cycle(1)
    before = sys.getrefcount(batch[0])
    gc.collect()
    tracemalloc.start()
    try:
        cycle(20)
        assert tracemalloc.get_traced_memory()[0] < 100_000
        assert tracemalloc.get_traced_memory()[1] > 2_000_000
    finally:
        tracemalloc.stop()
    cycle(200)
    cycle(780)
    after = sys.getrefcount(batch[0])  # not within the assert, which holds a reference of its own
    assert after == before


def test_p9_an_engine_frees_what_it_still_holds() -> None:
    """In every state: ready, returned, locked, held back, scheduled, deferred, dead; sessions held and not."""
    reason = "a reason that nobody else has".upper()
    everything = [message(i, time_to_live=1000) for i in range(50)]
    sessions = [message(i, session_id=f"s{i % 5}") for i in range(50)]
    later = [message(i, delay=50) for i in range(50)]
    before = [sys.getrefcount(one) for one in (everything[0], sessions[0], later[0], reason)]
    engine = make()
    send(engine, *everything, *sessions, *later)
    for link in (engine.open_link(), accept(engine, "s0"), accept(engine, None)):
        received = [one.receipt for one in engine.receive(link, 9, 0, 0)]
        engine.settle(link, ABANDON, received[1:3], 0, 0)
        engine.settle(link, ABANDON, received[3:4], 0, 0, 5.0)
        engine.settle(link, DEFER, received[4:5], 0, 0)
        engine.settle(link, DEAD_LETTER, received[5:6], 0, 0, 0.0, reason, reason)
        engine.set_state(link, b"state", 0, 0) if link.session_id else None
    dead = engine.open_link(True)
    letters = engine.receive(dead, 2, 0, 0)
    del received, letters, engine, link
    assert [sys.getrefcount(one) for one in (everything[0], sessions[0], later[0], reason)] == before
    references = sys.getrefcount(dead)
    assert references == 2, "the engine let go of the receiver that held locks"


def test_p9_empty_sessions_are_forgotten() -> None:
    engine = make()
    tracemalloc.start()
    try:
        for turn in range(20):
            for i in range(200):
                link = accept(engine, f"session-{turn}-{i}")
                engine.close_link(link, 0, 0)
            if turn == 0:
                base = tracemalloc.get_traced_memory()[0]
        assert tracemalloc.get_traced_memory()[0] < base + 20_000
    finally:
        tracemalloc.stop()
