"""The renewal of locks [C21, C27], on a receiver that keeps the locks as a service does, by a clock turned by hand."""

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, strategies as st
from locks import LOCK, Locks, Lost, SessionLocks, make, pending
from wrapping import fail, wrap

from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import (
    BatchSettleError,
    ConnectionFailedError,
    InvalidReceiptError,
    QueueTimeoutError,
    ServiceUnavailableError,
    SessionLockLostError,
)
from queue_runtime.message import Message, Receipt
from queue_runtime.renewal import LockRenewer
from queue_runtime.retry import NoRetry


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def lost() -> Lost:
    return []


@pytest.fixture
async def renewer(clock: ManualClock, lost: Lost) -> AsyncIterator[LockRenewer]:
    renewer = make(clock, lost)
    yield renewer
    await renewer.close()


async def test_locks_live_for_as_long_as_they_are_watched(clock: ManualClock, renewer: LockRenewer, lost: Lost) -> None:
    locks = Locks(clock)
    receipts = locks.take(50)
    renewer.watch(locks, receipts)
    for _ in range(100):
        await clock.advance(LOCK / 3)
        assert all(map(locks.is_live, receipts))
    assert lost == []


async def test_the_locks_of_a_receiver_are_renewed_in_one_call(clock: ManualClock, renewer: LockRenewer) -> None:
    """Those of one receive, and those that were received a little later."""
    locks = Locks(clock)
    renewer.watch(locks, locks.take(500))
    for number in range(10):
        await clock.advance(LOCK * 0.005)
        renewer.watch(locks, locks.take(1, first=1000 + number))
    await clock.advance(LOCK * 0.5)
    assert [len(receipts) for _, receipts in locks.calls] == [510]
    await clock.advance(LOCK * 5)
    assert len(locks.calls) < 15


async def test_there_is_one_timer_however_many_receivers(clock: ManualClock, renewer: LockRenewer) -> None:
    everyone = [Locks(clock, receiver_id=number) for number in range(300)]
    for locks in everyone:
        renewer.watch(locks, locks.take(2))
        assert pending(clock) == 1
    await clock.advance(LOCK * 4)
    assert pending(clock) == 1
    assert all(locks.is_live(receipt) for locks in everyone for receipt in locks.ends)


async def test_what_is_settled_is_renewed_no_more(clock: ManualClock, renewer: LockRenewer, lost: Lost) -> None:
    """And when nothing is left, no timer is."""
    locks = Locks(clock)
    receipts = locks.take(4)
    renewer.watch(locks, receipts)
    renewer.forget(locks.id, receipts[:3])
    renewer.forget(99, receipts)
    await clock.advance(LOCK * 0.6)
    assert [asked for _, asked in locks.calls] == [receipts[3:]]
    renewer.forget(locks.id, receipts)
    await clock.advance(LOCK * 9)
    assert len(locks.calls) == 1
    assert pending(clock) == 0
    assert lost == []
    again = locks.take(1, first=10)
    renewer.watch(locks, again)
    await clock.advance(LOCK * 0.6)
    assert locks.calls[-1][1] == again


async def test_it_gives_up_after_its_longest_time(clock: ManualClock, lost: Lost) -> None:
    """Counted for each message from its receipt; told when the lock runs out, without an error."""
    renewer = make(clock, lost, max_renewal=LOCK * 2)
    locks = Locks(clock)
    early = locks.take(1)
    renewer.watch(locks, early)
    await clock.advance(LOCK)
    late = locks.take(1, first=5)
    renewer.watch(locks, late)
    await clock.advance(LOCK * 0.9)
    assert lost == []
    await clock.advance(LOCK * 0.8)
    assert lost == [(locks.id, early, None)]
    assert not locks.is_live(early[0])
    assert locks.is_live(late[0])
    await clock.advance(LOCK * 9)
    assert lost[1:] == [(locks.id, late, None)]
    assert pending(clock) == 0
    await renewer.close()


@pytest.mark.parametrize("longest", [0.001, LOCK * 0.4, LOCK * 0.5])
async def test_a_longest_time_under_a_lock_renews_nothing(clock: ManualClock, lost: Lost, longest: float) -> None:
    renewer = make(clock, lost, max_renewal=longest)
    locks = Locks(clock)
    receipts = locks.take(2)
    renewer.watch(locks, receipts)
    await clock.advance(LOCK * 0.99)
    assert lost == []
    await clock.advance(LOCK * 0.02)
    assert lost == [(locks.id, receipts, None)]
    assert locks.calls == []
    await renewer.close()


async def test_one_lost_lock_does_not_end_the_others(clock: ManualClock, renewer: LockRenewer, lost: Lost) -> None:
    locks = Locks(clock)
    receipts = locks.take(5)
    renewer.watch(locks, receipts)
    locks.ends[receipts[2]] = 0.0
    await clock.advance(LOCK * 3)
    assert [(who, which, type(error)) for who, which, error in lost] == [(locks.id, [receipts[2]], InvalidReceiptError)]
    assert all(locks.is_live(receipt) for receipt in receipts if receipt is not receipts[2])


async def test_a_passing_failure_is_tried_again_in_time(clock: ManualClock, renewer: LockRenewer, lost: Lost) -> None:
    """Of the whole call, and of one lock in it."""
    locks = Locks(clock)
    receipts = locks.take(3)
    renewer.watch(locks, receipts)
    for fault in (
        fail(ConnectionFailedError("reset")),
        lambda asked: [ServiceUnavailableError("busy")] * len(asked),
    ):
        locks.fault = fault
        await clock.advance(LOCK * 0.55)
        locks.fault = None
        calls = len(locks.calls)
        await clock.advance(LOCK * 0.2)
        assert len(locks.calls) > calls
        assert all(map(locks.is_live, receipts))
    assert lost == []


async def test_a_failure_that_does_not_pass_is_told_when_the_lock_ends(
    clock: ManualClock, renewer: LockRenewer, lost: Lost
) -> None:
    """[C21] However often it is called passing; and not before: until then the right to settle is there."""
    locks = Locks(clock)
    receipts = locks.take(3)
    renewer.watch(locks, receipts)
    locks.fault = fail(ConnectionFailedError("reset"))
    await clock.advance(LOCK * 0.99)
    assert lost == []
    assert 2 <= len(locks.calls) < 10
    await clock.advance(LOCK * 0.1)
    assert sorted(receipt.token for _, which, _ in lost for receipt in which) == [0, 1, 2]
    assert all(isinstance(error, ConnectionFailedError) for _, _, error in lost)
    calls = len(locks.calls)
    await clock.advance(LOCK * 9)
    assert len(locks.calls) == calls
    assert pending(clock) == 0


async def test_what_is_settled_during_its_renewal_stays_settled(
    clock: ManualClock, renewer: LockRenewer, lost: Lost
) -> None:
    locks = Locks(clock)
    receipts = locks.take(2)
    renewer.watch(locks, receipts)
    locks.gate = asyncio.Event()
    await clock.advance(LOCK * 0.6)
    assert len(locks.calls) == 1
    renewer.forget(locks.id, receipts[:1])
    locks.ends[receipts[0]] = 0.0
    fresh = locks.take(1, first=7)
    renewer.watch(locks, fresh)
    locks.gate.set()
    await settle_tasks()
    locks.gate = None
    await clock.advance(LOCK * 3)
    assert lost == []
    assert locks.is_live(receipts[1])
    assert locks.is_live(fresh[0])
    assert all(receipts[0] not in asked for _, asked in locks.calls[1:])


async def test_a_receiver_that_hangs_does_not_hold_up_another(
    clock: ManualClock, renewer: LockRenewer, lost: Lost
) -> None:
    """And a call that does not come back is given up in time for another one, then told; nothing waits for ever."""
    stuck, free = Locks(clock, 1), Locks(clock, 2)
    stuck.gate = asyncio.Event()
    renewer.watch(stuck, stuck.take(1))
    (receipt,) = free.take(1)
    renewer.watch(free, [receipt])
    await clock.advance(LOCK * 5)
    assert free.is_live(receipt)
    assert [round(at / LOCK, 3) for at, _ in stuck.calls] == [0.5, 0.8]
    assert [(who, type(error)) for who, _, error in lost] == [(stuck.id, QueueTimeoutError)]
    assert len(asyncio.all_tasks()) == 1


async def test_an_adapter_that_breaks_its_contract_does_not_end_renewal(
    clock: ManualClock, renewer: LockRenewer, caplog: pytest.LogCaptureFixture
) -> None:
    locks = Locks(clock)
    receipts = locks.take(1)
    renewer.watch(locks, receipts)
    locks.fault = fail(ZeroDivisionError("bug"))
    await clock.advance(LOCK * 0.501)
    locks.fault = None
    await clock.advance(LOCK * 0.4)
    assert locks.is_live(receipts[0])
    await clock.advance(LOCK * 2)
    assert locks.is_live(receipts[0])
    assert "renewal failed unexpectedly" in caplog.text


async def test_an_adapter_that_stays_broken_is_not_called_all_the_time(
    clock: ManualClock, renewer: LockRenewer
) -> None:
    locks, session = Locks(clock), SessionLocks(clock, receiver_id=2)
    renewer.watch(locks, locks.take(1))
    renewer.watch_session(session)
    locks.fault = fail(ZeroDivisionError("bug"))
    session.session_faults += [ZeroDivisionError("bug") for _ in range(100_000)]  # type: ignore[list-item]
    await clock.advance(LOCK * 2)
    assert 5 <= len(locks.calls) <= 20
    assert 5 <= len(session.session_calls) <= 20


async def test_a_dropped_receiver_is_renewed_no_more(clock: ManualClock, renewer: LockRenewer, lost: Lost) -> None:
    """While a renewal of it is under way, too."""
    locks = Locks(clock)
    locks.gate = asyncio.Event()
    renewer.watch(locks, locks.take(1))
    await clock.advance(LOCK * 0.6)
    renewer.drop(locks.id)
    renewer.drop(locks.id)
    await settle_tasks()
    assert len(asyncio.all_tasks()) == 1
    await clock.advance(LOCK * 9)
    assert (len(locks.calls), lost, pending(clock)) == (1, [], 0)


async def test_what_was_dropped_is_not_kept_until_it_would_have_been_due(
    clock: ManualClock, renewer: LockRenewer
) -> None:
    """[C39] Sessions that are held for a moment only, by the million, beside one that is held for long."""
    last = SessionLocks(clock)
    renewer.watch_session(last)
    for number in range(2, 2000):
        session = SessionLocks(clock, receiver_id=number)
        renewer.watch_session(session)
        renewer.drop(number)
    assert renewer._scheduler is not None
    assert len(renewer._scheduler._heap) < 100
    await clock.advance(LOCK * 2)
    assert last.locked_until > clock.time()


async def test_close_ends_everything(clock: ManualClock, renewer: LockRenewer, lost: Lost) -> None:
    """[C23] A renewal under way is cancelled; what is watched afterwards starts nothing."""
    one, two = Locks(clock, 1), SessionLocks(clock, receiver_id=2)
    one.gate = asyncio.Event()
    renewer.watch(one, one.take(1))
    renewer.watch_session(two)
    await clock.advance(LOCK * 0.6)
    await renewer.close()
    assert len(asyncio.all_tasks()) == 1
    short = Locks(clock, 3, lock_duration=1.0)
    renewer.watch(short, short.take(1))
    renewer.watch(one, one.take(1, first=5))
    renewer.watch_session(two)
    assert pending(clock) == 0
    await clock.advance(LOCK * 9)
    assert (len(one.calls), lost) == (1, [])
    await renewer.close()


async def test_a_session_is_renewed_without_messages(clock: ManualClock, renewer: LockRenewer, lost: Lost) -> None:
    session = SessionLocks(clock)
    renewer.watch_session(session)
    await clock.advance(LOCK * 20)
    assert session.locked_until > clock.time()
    assert lost == []
    assert len(session.session_calls) <= 41


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
async def test_a_session_is_renewed_in_time_whatever_the_service_s_clock_says(
    clock: ManualClock, renewer: LockRenewer, lost: Lost, skew: float
) -> None:
    """Neither too late nor all the time: the ends that a service tells are by its own clock."""
    session = SessionLocks(clock)
    session.skew = skew
    session.locked_until += skew
    renewer.watch_session(session)
    await clock.advance(LOCK * 20)
    assert session.locked_until > clock.time() + skew
    assert lost == []
    assert 20 <= len(session.session_calls) <= 41


@pytest.mark.parametrize(("session_lock", "lock"), [(300.0, 10.0), (10.0, 300.0), (30.0, 30.0)])
async def test_a_session_and_its_messages_have_their_own_locks(
    clock: ManualClock, renewer: LockRenewer, lost: Lost, session_lock: float, lock: float
) -> None:
    """Whichever is the shorter."""
    session = SessionLocks(clock, session_lock=session_lock, lock_duration=lock)
    renewer.watch_session(session)
    await clock.advance(1.0)
    receipts = session.take(3)
    renewer.watch(session, receipts)
    for _ in range(100):
        await clock.advance(7.0)
        assert all(map(session.is_live, receipts))
        assert session.locked_until > clock.time()
    assert lost == []


async def test_a_lost_session_takes_its_messages_with_it(clock: ManualClock, renewer: LockRenewer, lost: Lost) -> None:
    """[C27] Told once, with all receipts; then nothing of it is renewed."""
    session = SessionLocks(clock)
    renewer.watch_session(session)
    receipts = session.take(3)
    renewer.watch(session, receipts)
    session.session_faults.append(SessionLockLostError("s"))
    await clock.advance(LOCK * 9)
    assert [(who, which, type(error)) for who, which, error in lost] == [(session.id, receipts, SessionLockLostError)]
    assert (len(session.session_calls), pending(clock)) == (1, 0)


async def test_a_session_s_passing_failure_is_tried_again_in_time(
    clock: ManualClock, renewer: LockRenewer, lost: Lost
) -> None:
    session = SessionLocks(clock)
    renewer.watch_session(session)
    session.session_faults += [ConnectionFailedError("reset"), ServiceUnavailableError("busy")]
    await clock.advance(LOCK * 5)
    assert lost == []
    assert session.locked_until > clock.time()


async def test_a_session_s_failure_that_does_not_pass_is_told(
    clock: ManualClock, renewer: LockRenewer, lost: Lost
) -> None:
    """[C27] As the loss that it has become."""
    session = SessionLocks(clock)
    renewer.watch_session(session)
    session.session_faults += [ConnectionFailedError("reset") for _ in range(100_000)]
    await clock.advance(LOCK * 0.9)
    assert lost == []
    await clock.advance(LOCK * 0.2)
    assert [(who, which, type(error)) for who, which, error in lost] == [(session.id, [], SessionLockLostError)]
    assert len(session.session_calls) < 50


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("watch"), st.integers(1, 3)),
            st.tuples(st.just("forget"), st.integers(0, 30)),
            st.tuples(st.just("advance"), st.integers(1, 40)),
        ),
        max_size=40,
    )
)
async def test_no_watched_lock_ever_ends(steps: list[tuple[str, int]]) -> None:
    """[C21] Whatever comes and goes on three receivers with different locks; and settled ones are left alone."""
    clock = ManualClock()
    lost: Lost = []
    renewer = make(clock, lost)
    everyone = {number: Locks(clock, number, lock_duration=number * 10.0) for number in (1, 2, 3)}
    watched: list[tuple[Locks, Receipt]] = []
    for place, (step, value) in enumerate(steps):
        if step == "watch":
            receipts = everyone[value].take(2, first=place * 10)
            renewer.watch(everyone[value], receipts)
            watched += [(everyone[value], receipt) for receipt in receipts]
        elif step == "forget" and watched:
            locks, receipt = watched.pop(value % len(watched))
            renewer.forget(locks.id, [receipt])
            del locks.ends[receipt]  # a renewal of it would raise KeyError
        elif step == "advance":
            await clock.advance(value / 2)
        assert all(locks.is_live(receipt) for locks, receipt in watched)
    assert lost == []
    await renewer.close()
    assert pending(clock) == 0


@pytest.mark.parametrize("many", [False, True])
async def test_the_client_keeps_the_lock_of_what_failed_for_a_passing_reason(
    monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    """It may be settled again; settled for good it is renewed no more."""
    clock = ManualClock()
    recorder = wrap(monkeypatch)
    async with QueueClient(InMemoryConfig(retry=NoRetry(), settle_interval=0.001), clock=clock) as client:
        await client.send_message("q", Message(body=b"x"))
        message = await client.receive_message("q", 0)
        assert message is not None
        recorder.settle_faults.append(fail(ServiceUnavailableError("busy")))
        with pytest.raises(BatchSettleError if many else ServiceUnavailableError):
            await (client.complete_messages([message]) if many else client.complete_message(message))
        await clock.advance(100)
        renewals = len(recorder.renewed)
        assert renewals > 3
        await client.complete_message(message)
        await clock.advance(100)
        assert len(recorder.renewed) == renewals


async def test_a_lost_lock_is_logged_without_its_token(
    clock: ManualClock, renewer: LockRenewer, caplog: pytest.LogCaptureFixture
) -> None:
    """[C32, C50]"""
    locks = Locks(clock)
    receipt = Receipt("orders", "a-secret-token", locks.id)
    locks.ends[receipt] = 0.0
    renewer.watch(locks, [receipt])
    with caplog.at_level(logging.WARNING):
        await clock.advance(LOCK)
    assert "locks lost, queue=orders count=1" in caplog.text
    assert "a-secret-token" not in caplog.text
