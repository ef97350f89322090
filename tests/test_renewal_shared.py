"""The scheduler that the clients of one event loop and clock share, and renewals that race a settlement [C21]."""

import asyncio
import contextlib
import logging
from typing import Any

import pytest
from locks import LOCK, Locks, Lost, SessionLocks, make, pending
from wrapping import Recorder, fail, wrap

from queue_runtime import schedule
from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, SystemClock
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import InvalidReceiptError, ServiceUnavailableError
from queue_runtime.message import Message, Receipt, ReceivedMessage
from queue_runtime.providers.base import COMPLETE
from queue_runtime.renewal import LockRenewer
from queue_runtime.retry import NoRetry


async def test_the_renewers_of_a_loop_and_a_clock_share_one_timer() -> None:
    """Each with its own longest time and its own listener; what one closes is nothing to the other."""
    clock, lost, other_lost = ManualClock(), Lost(), Lost()
    one, other = make(clock, lost), make(clock, other_lost, max_renewal=LOCK * 2)
    mine, yours = Locks(clock, 1), Locks(clock, 2)
    one.watch(mine, mine.take(3))
    other.watch(yours, yours.take(3))
    assert pending(clock) == 1
    assert one._scheduler is other._scheduler
    await clock.advance(LOCK * 3.1)
    assert (lost, [(who, error) for who, _, error in other_lost]) == ([], [(2, None)])
    await other.close()
    assert pending(clock) == 1
    await clock.advance(LOCK)
    assert all(map(mine.is_live, mine.ends))
    await one.close()
    assert pending(clock) == 0


async def test_another_clock_is_another_time() -> None:
    renewers = [make(ManualClock(), []) for _ in range(2)]
    for renewer in renewers:
        locks = Locks(renewer._clock)  # type: ignore[arg-type]
        renewer.watch(locks, locks.take(1))
    assert renewers[0]._scheduler is not renewers[1]._scheduler
    for renewer in renewers:
        await renewer.close()


@pytest.mark.both_loops
async def test_every_system_clock_is_the_same_clock() -> None:
    """And nothing is left of a scheduler that nobody uses."""
    before = len(schedule._schedulers)
    renewers = [LockRenewer(SystemClock(), 100.0, lambda *lost: None) for _ in range(2)]
    for number, renewer in enumerate(renewers):
        locks = Locks(ManualClock(), number)
        renewer.watch(locks, locks.take(1))
    assert renewers[0]._scheduler is renewers[1]._scheduler
    assert len(schedule._schedulers) == before + 1
    for renewer in renewers:
        await renewer.close()
    assert len(schedule._schedulers) == before


def test_a_renewer_goes_on_where_its_loop_was_closed() -> None:
    """On the next one."""
    clock = ManualClock()
    renewer = make(clock, [])

    async def use(number: int) -> Locks:
        locks = Locks(clock, number)
        renewer.watch(locks, locks.take(1))
        await clock.advance(LOCK * 0.6)
        return locks

    async def end() -> Locks:
        locks = await use(2)
        await renewer.close()
        return locks

    assert len(asyncio.run(use(1)).calls) == 1
    assert len(asyncio.run(end()).calls) == 1


async def test_sessions_taken_together_are_renewed_one_after_another() -> None:
    """A service is not asked for hundreds of locks at the same moment, first or later."""
    clock = ManualClock()
    renewer = make(clock, [])
    sessions = [SessionLocks(clock, receiver_id=number) for number in range(1000, 1500)]
    for session in sessions:
        renewer.watch_session(session)
    for _ in range(1000):
        await clock.advance(LOCK * 0.005)
    assert all(session.locked_until > clock.time() for session in sessions)
    times = sorted(at for session in sessions for at in session.session_calls)
    slot = LOCK * 0.01
    in_slots: dict[int, int] = {}
    for at in times:
        in_slots[int(at / slot)] = in_slots.get(int(at / slot), 0) + 1
    assert max(in_slots.values()) <= 65, "of 500, about a tenth in each of the ten parts of the spread"
    assert len(times) <= 500 * 10.5, "and not more often for it"
    await renewer.close()


async def test_sessions_that_fell_due_together_are_spread_again() -> None:
    """As after the loop was blocked: all were late at once."""
    clock = ManualClock()
    renewer = make(clock, [])
    sessions = [SessionLocks(clock, receiver_id=number) for number in range(100)]
    for session in sessions:
        renewer.watch_session(session)
    clock._now += LOCK * 0.9
    await clock.advance(LOCK * 3)
    last = sorted(session.session_calls[-1] for session in sessions)
    assert last[-1] - last[0] > LOCK * 0.05
    await renewer.close()


async def received(client: QueueClient, recorder: Recorder, clock: ManualClock) -> ReceivedMessage:
    await client.send_message("q", Message(body=b"x"))
    message = await client.receive_message("q", 0)
    assert message is not None
    return message


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return wrap(monkeypatch)


CONFIG: dict[str, Any] = {"settle_interval": 0.001, "settle_batch_size": 1, "lock_duration": LOCK}


async def test_a_renewal_that_finds_a_settlement_under_way_is_no_lost_lock(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """The service has settled it, and its answer is still on the way."""
    clock, lost = ManualClock(), []
    async with QueueClient(InMemoryConfig(**CONFIG), clock=clock) as client:
        client.on_locks_lost(lambda who, receipts, error: lost.append(error))
        message = await received(client, recorder, clock)
        recorder.gate = asyncio.Event()  # after the service did what it was asked
        recorder.is_late = True
        task = asyncio.create_task(client.complete_message(message))
        while not recorder.at_gate:
            await asyncio.sleep(0.001)
        with caplog.at_level(logging.WARNING):
            await clock.advance(LOCK * 0.7)
            assert recorder.renewed
            recorder.gate.set()
            await task
            await clock.advance(LOCK * 3)
        assert (lost, caplog.text) == ([], "")


async def test_the_answer_of_a_settlement_ends_the_renewal_before_its_caller_hears_of_it(recorder: Recorder) -> None:
    """So that no renewal in between finds the lock gone."""
    async with QueueClient(InMemoryConfig(**CONFIG), clock=ManualClock()) as client:
        message = await received(client, recorder, ManualClock())
        assert client._renewer is not None
        (watch,) = client._renewer.watches.values()
        lane = client._lanes[message.receipt.receiver_id]
        assert list(watch.held) == [message.receipt]
        future = lane.submit(COMPLETE, message.receipt)
        assert lane.is_settling(message.receipt)
        await future
        assert not watch.held
        assert not lane.is_settling(message.receipt)


async def test_a_lock_lost_during_a_settlement_that_fails_is_told_after_it(recorder: Recorder) -> None:
    """What could not be settled for a passing reason is watched again, and found lost."""
    clock = ManualClock()
    lost: list[Any] = []
    async with QueueClient(InMemoryConfig(retry=NoRetry(), **CONFIG), clock=clock) as client:
        client.on_locks_lost(lambda who, receipts, error: lost.append((receipts, type(error))))
        message = await received(client, recorder, clock)
        recorder.gate = asyncio.Event()
        recorder.settle_faults.append(fail(ServiceUnavailableError("busy")))
        task = asyncio.create_task(client.complete_message(message))
        while not recorder.at_gate:
            await asyncio.sleep(0.001)

        def gone(receipts: Any) -> list[Any]:
            return [InvalidReceiptError(receipt) for receipt in receipts]

        recorder.renew_faults += [gone] * 10
        await clock.advance(LOCK * 0.7)
        assert lost == []
        recorder.gate.set()
        with pytest.raises(ServiceUnavailableError):
            await task
        await clock.advance(LOCK * 0.7)
        assert lost == [([message.receipt], InvalidReceiptError)]


async def test_a_settlement_under_way_outlasts_the_longest_time() -> None:
    """The lock runs out with nobody to cancel: the settlement says what came of it."""
    clock, lost = ManualClock(), Lost()
    settling: set[Receipt] = set()
    renewer = LockRenewer(
        clock,
        LOCK,
        lambda *told: lost.append(told),
        is_settling=settling.__contains__,  # type: ignore[arg-type]
    )
    locks = Locks(clock)
    first, second = locks.take(2)
    renewer.watch(locks, [first, second])
    settling.add(first)
    await clock.advance(LOCK * 4)
    assert [(list(receipts), error) for _, receipts, error in lost] == [([second], None)]
    settling.clear()
    await clock.advance(LOCK)
    assert [list(receipts) for _, receipts, _ in lost] == [[second], [first]]
    await renewer.close()


async def test_a_provider_that_swallows_the_end_of_a_call_is_believed(recorder: Recorder) -> None:
    """A renewal that answers although it was given up has answered."""
    clock, lost = ManualClock(), Lost()
    renewer = make(clock, lost)
    locks = Locks(clock)

    async def renew(receipts: Any) -> list[float]:
        locks.calls.append((clock.monotonic(), receipts))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        locks.ends.update(dict.fromkeys(receipts, clock.monotonic() + LOCK))
        return [0.0] * len(receipts)

    locks.renew = renew  # type: ignore[method-assign, assignment]
    (receipt,) = locks.take(1)
    renewer.watch(locks, [receipt])
    await clock.advance(LOCK * 3)
    assert lost == []
    assert locks.is_live(receipt)
    await renewer.close()


@pytest.mark.parametrize(("lock", "session_lock"), [(0.0, 0.0), (0.0, LOCK), (LOCK, 0.0)])
async def test_where_there_is_no_lock_nothing_is_renewed(lock: float, session_lock: float) -> None:
    """A provider whose deliveries, or whose sessions, never run out says 0 seconds."""
    clock = ManualClock()
    lost: Lost = []
    renewer = make(clock, lost)
    session = SessionLocks(clock, session_lock, lock_duration=lock)
    renewer.watch_session(session)
    renewer.watch(session, session.take(1))
    for _ in range(40):
        await clock.advance(LOCK * 0.1)
    assert lost == []
    assert len(session.calls) == (8 if lock else 0)
    assert (7 <= len(session.session_calls) <= 9) if session_lock else not session.session_calls
    assert pending(clock) == bool(lock or session_lock)
    await renewer.close()
