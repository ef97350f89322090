"""What is special to the in-memory provider: who is woken, timers, room, sharing, event loops."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from queue_runtime.clock import ManualClock, SystemClock, Timer, settle_tasks
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import (
    ClosedError,
    ConfigurationError,
    MessageTooLargeError,
    ProviderError,
    QueueFullError,
    QueueNotFoundError,
    SessionLockLostError,
    ValidationError,
)
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.providers.base import ABANDON, COMPLETE, Provider
from queue_runtime.providers.memory import InMemoryProvider


def numbered(count: int, **fields: Any) -> list[Message]:
    return [Message(body=str(number).encode(), **fields) for number in range(count)]


def bodies(received: list[ReceivedMessage]) -> list[int]:
    return [int(message.body) for message in received]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def provider(clock: ManualClock) -> AsyncIterator[InMemoryProvider]:
    provider = InMemoryProvider(InMemoryConfig(), clock=clock)
    yield provider
    await provider.close()


def timers(clock: ManualClock) -> int:
    return sum(timer.callback is not None for _, _, timer in clock._timers)


async def started(*calls: Any) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.ensure_future(call) for call in calls]
    await settle_tasks()
    return tasks


def test_it_is_a_provider(clock: ManualClock) -> None:
    provider: Provider = InMemoryProvider(InMemoryConfig(), clock=clock)
    assert provider.name == "memory"


# Waiting.


async def test_c10_each_message_wakes_one_waiter_in_the_order_in_which_they_came(provider: InMemoryProvider) -> None:
    receiver = await provider.open_receiver("q")
    tasks = await started(*(receiver.receive(1, 100.0) for _ in range(5)))
    for expected in range(1, 6):
        await provider.send("q", numbered(1))
        await settle_tasks()
        assert [task.done() for task in tasks] == [True] * expected + [False] * (5 - expected)


async def test_c10_one_send_of_many_wakes_as_many_as_it_feeds(provider: InMemoryProvider) -> None:
    receivers = [await provider.open_receiver("q") for _ in range(4)]
    tasks = await started(*(receiver.receive(2, 100.0) for receiver in receivers))
    await provider.send("q", numbered(5))
    await settle_tasks()
    assert [bodies(task.result()) for task in tasks[:3]] == [[0, 1], [2, 3], [4]]
    assert not tasks[3].done()
    tasks[3].cancel()


async def test_c10_a_cancelled_waiter_passes_its_wake_on_and_loses_no_message(provider: InMemoryProvider) -> None:
    receiver = await provider.open_receiver("q")
    first, second = await started(receiver.receive(1, 100.0), receiver.receive(1, 100.0))
    await provider.send("q", numbered(1))
    first.cancel()  # woken, and gone before it could look
    await settle_tasks()
    assert first.cancelled()
    assert bodies(second.result()) == [0]
    assert second.result()[0].delivery_count == 1


async def test_c10_the_timeout_is_kept_also_by_one_who_was_woken_in_vain(
    provider: InMemoryProvider, clock: ManualClock
) -> None:
    receiver = await provider.open_receiver("q")
    waiting, *_ = await started(receiver.receive(1, 10.0))
    await clock.advance(4.0)
    await provider.send("q", numbered(1))
    assert bodies(await receiver.receive(1, 0.0)) == [0]  # somebody was quicker
    await clock.advance(5.9)
    assert not waiting.done()
    await clock.advance(0.1)
    assert waiting.result() == []


async def test_p11_idle_means_idle(provider: InMemoryProvider, clock: ManualClock) -> None:
    receiver = await provider.open_receiver("q")
    await provider.send("q", [*numbered(3), Message(body=b"9", delay=50.0, time_to_live=5.0)])
    await receiver.receive(2, 0.0)
    assert timers(clock) == 0, "nobody waits, so nothing is timed"
    await receiver.receive(1, 0.0)
    waiting, *_ = await started(receiver.receive(9, 1000.0), receiver.receive(9, 1000.0), receiver.receive(9, 1000.0))
    assert timers(clock) == 3 + 1, "a timeout each, and one for the queue"
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await settle_tasks()
    assert timers(clock) == 0
    assert waiting.cancelled()


async def test_c13_c18_what_falls_due_wakes_who_waits(provider: InMemoryProvider, clock: ManualClock) -> None:
    receiver = await provider.open_receiver("q")
    await provider.send("q", [Message(body=b"0"), Message(body=b"1", delay=7.0)])
    await receiver.receive(1, 0.0)
    waiting, *_ = await started(receiver.receive(9, 100.0))
    await clock.advance(7.0)
    assert bodies(waiting.result()) == [1]
    waiting, *_ = await started(receiver.receive(9, 100.0))
    await clock.advance(22.9)
    assert not waiting.done()
    await clock.advance(0.1)
    assert bodies(waiting.result()) == [0]


async def test_a_time_that_was_set_while_somebody_waits_moves_the_timer(
    provider: InMemoryProvider, clock: ManualClock
) -> None:
    receiver = await provider.open_receiver("q")
    await provider.send("q", [Message(body=b"0", delay=50.0)])
    waiting, *_ = await started(receiver.receive(9, 100.0))
    await provider.send("q", [Message(body=b"1", delay=1.0)])
    await clock.advance(1.0)
    assert bodies(waiting.result()) == [1]


async def test_waiters_of_other_kinds_are_woken_each_by_their_own(
    provider: InMemoryProvider, clock: ManualClock
) -> None:
    plain, dead = await provider.open_receiver("q"), await provider.open_receiver("q", dead_letter=True)
    held = await provider.accept_session("q", "held", 0.0)
    assert held is not None
    tasks = await started(
        plain.receive(1, 100.0), dead.receive(1, 100.0), provider.accept_session("q", None, 100.0), held.receive(1, 9.0)
    )

    async def done() -> list[bool]:
        await settle_tasks()
        return [task.done() for task in tasks]

    await provider.send("q", numbered(1, session_id="held"))
    assert await done() == [False, False, False, True]
    await provider.send("q", numbered(1, session_id="free"))
    assert await done() == [False, False, True, True]
    await provider.send("q", numbered(1))
    assert await done() == [True, False, True, True]
    for _ in range(5):
        await plain.settle(ABANDON, [tasks[0].result()[0].receipt])
        tasks[0] = (await started(plain.receive(1, 0.0)))[0]
    assert await done() == [True, True, True, True]
    assert tasks[1].result()[0].dead_letter_reason == "MaxDeliveryCountExceeded"
    free = tasks[2].result()
    assert free.session_id == "free"


class CountingClock(SystemClock):
    """The machine's clock, and how many timers were asked of it."""

    timers = 0

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        self.timers += 1
        return super().call_later(delay, callback)


@pytest.mark.both_loops
async def test_p11_on_the_real_clock_waiting_takes_a_handful_of_timers_and_no_polling() -> None:
    clock = CountingClock()
    provider = InMemoryProvider(InMemoryConfig(lock_duration=0.05, session_lock_duration=0.05), clock=clock)
    receiver = await provider.open_receiver("q")
    await provider.send("q", [*numbered(1), *numbered(1, session_id="s"), Message(body=b"1", delay=0.08)])
    assert bodies(await receiver.receive(9, 0.0)) == [0]
    session = await provider.accept_session("q", None, 0.0)
    assert session is not None
    again, taken = await asyncio.gather(receiver.receive(9, 5.0), provider.accept_session("q", None, 5.0))
    assert (bodies(again), again[0].delivery_count) == ([0], 2)
    assert taken is not None
    await receiver.settle(COMPLETE, [again[0].receipt])
    assert bodies(await receiver.receive(9, 5.0)) == [1]
    assert await receiver.receive(9, 0.02) == []
    assert clock.timers <= 20
    await provider.close()


# Sessions.


async def test_c24_several_waiters_of_one_session_each_get_their_message(provider: InMemoryProvider) -> None:
    session = await provider.accept_session("q", "s", 0.0)
    assert session is not None
    tasks = await started(*(session.receive(1, 100.0) for _ in range(3)))
    await provider.send("q", numbered(2, session_id="s"))
    await settle_tasks()
    assert [bodies(task.result()) for task in tasks[:2]] == [[0], [1]]
    await provider.send("q", numbered(1, session_id="s"))
    await settle_tasks()
    assert bodies(tasks[2].result()) == [0]


async def test_c27_a_waiting_holder_is_told_when_its_lock_is_lost(
    provider: InMemoryProvider, clock: ManualClock
) -> None:
    session = await provider.accept_session("q", "s", 0.0)
    assert session is not None
    one, two = await started(session.receive(1, 100.0), session.receive(1, 100.0))
    await clock.advance(30.0)
    for task in (one, two):
        with pytest.raises(SessionLockLostError):
            task.result()
    for call in (session.get_state(), session.set_state(b""), session.renew_session(), session.receive_deferred([1])):
        with pytest.raises(SessionLockLostError):
            await call


async def test_c26_the_next_session_goes_to_who_waited_first(provider: InMemoryProvider, clock: ManualClock) -> None:
    first, second = await started(provider.accept_session("q", None, 100.0), provider.accept_session("q", None, 5.0))
    await provider.send("q", numbered(1, session_id="a"))
    await settle_tasks()
    assert (await first).session_id == "a"
    await clock.advance(5.0)
    assert second.result() is None
    third, *_ = await started(provider.accept_session("q", None, 100.0))
    await first.result().close()
    await settle_tasks()
    assert third.result().session_id == "a"


# Room.


async def test_c39_a_full_queue_refuses_what_has_no_room(clock: ManualClock) -> None:
    provider = InMemoryProvider(InMemoryConfig(capacity=3), clock=clock)
    outcomes = await provider.send("q", numbered(5))
    assert outcomes[:3] == [None] * 3
    assert all(isinstance(outcome, QueueFullError) and outcome.capacity == 3 for outcome in outcomes[3:])
    assert (await provider.counts("q")).active == 3
    await provider.close()


async def test_c39_senders_wait_for_room_in_turn_and_a_cancelled_one_passes_it_on(clock: ManualClock) -> None:
    provider = InMemoryProvider(InMemoryConfig(capacity=2, on_full="wait"), clock=clock)
    receiver = await provider.open_receiver("q")
    first = numbered(6)[:4]
    tasks = await started(*(provider.send("q", part) for part in (first, numbered(6)[4:5], numbered(6)[5:])))
    first.clear()  # what was handed in is sent, whatever becomes of the list
    seen: list[int] = []
    tasks[1].cancel()
    while len(seen) < 5:
        received = await receiver.receive(1, 1.0)
        seen += bodies(received)
        await receiver.settle(COMPLETE, [received[0].receipt])
        if len(seen) == 1:
            tasks += await started(provider.send("q", numbered(1)))
        await settle_tasks()
    assert seen == [0, 1, 2, 3, 5]
    assert tasks[0].result() == [None] * 4
    await provider.close()
    assert [task.done() for task in tasks] == [True] * 4


async def test_c39_a_waiting_sender_learns_what_was_sent_when_the_provider_is_closed(clock: ManualClock) -> None:
    provider = InMemoryProvider(InMemoryConfig(capacity=2, on_full="wait"), clock=clock)
    sending, *_ = await started(provider.send("q", numbered(3)))
    await provider.close()
    outcomes = await sending
    assert outcomes[:2] == [None, None]
    assert isinstance(outcomes[2], ClosedError)


async def test_c7_one_too_large_message_keeps_all_from_being_sent(clock: ManualClock) -> None:
    provider = InMemoryProvider(InMemoryConfig(max_message_size=100), clock=clock)
    with pytest.raises(MessageTooLargeError):
        await provider.send("q", [*numbered(2), Message(body=b"x" * 200)])
    assert (await provider.counts("q")).active == 0


async def test_c8_a_queue_that_is_not_there(clock: ManualClock) -> None:
    provider = InMemoryProvider(InMemoryConfig(auto_create=False, queues=("there",)), clock=clock)
    for call in (
        provider.send("q", numbered(1)),
        provider.open_receiver("q"),
        provider.accept_session("q", None, 0.0),
        provider.peek("q", 1),
        provider.counts("q"),
    ):
        with pytest.raises(QueueNotFoundError):
            await call
    assert await provider.send("there", numbered(1)) == [None]
    await provider.create_queue("q")
    await provider.create_queue("q")
    assert (await provider.counts("q")).active == 0
    with pytest.raises(ValidationError):
        await provider.create_queue("--")


# Sharing and closing.


async def test_clients_of_one_name_share_their_queues_and_others_do_not(clock: ManualClock) -> None:
    shared = InMemoryConfig(name="shared-by-two")
    one, two = InMemoryProvider(shared, clock=clock), InMemoryProvider(shared, clock=clock)
    alone = InMemoryProvider(InMemoryConfig(), clock=clock)
    waiting, *_ = await started((await two.open_receiver("q")).receive(1, 10.0))
    await one.send("q", numbered(2))
    await one.close()
    await settle_tasks()
    assert bodies(waiting.result()) == [0]
    assert ((await two.counts("q")).active, (await two.counts("q")).in_flight) == (1, 1)
    assert (await alone.counts("q")).active == 0
    await two.close()


async def test_a_name_is_forgotten_when_its_last_provider_closes(clock: ManualClock) -> None:
    config = InMemoryConfig(name="counted")
    one, two = InMemoryProvider(config, clock=clock), InMemoryProvider(config, clock=clock)
    await one.send("q", numbered(1))
    await one.close()
    await one.close()
    three = InMemoryProvider(config, clock=clock)
    assert (await three.counts("q")).active == 1, "two is open still"
    await two.close()
    await three.close()
    four = InMemoryProvider(config, clock=clock)
    assert (await four.counts("q")).active == 0, "although the first ones are still referred to"
    await one.close()
    assert InMemoryProvider(config, clock=clock)._broker is four._broker


def test_a_name_is_forgotten_with_its_last_provider(clock: ManualClock) -> None:
    one = InMemoryProvider(InMemoryConfig(name="weak"), clock=clock)
    broker = weakref.ref(one._broker)
    del one
    gc.collect()
    assert broker() is None
    InMemoryProvider(InMemoryConfig(name="weak", capacity=5), clock=clock)


def test_c33_those_who_share_must_agree(clock: ManualClock) -> None:
    kept = InMemoryProvider(InMemoryConfig(name="agreed", lock_duration=5.0), clock=clock)
    with pytest.raises(ConfigurationError) as caught:
        InMemoryProvider(InMemoryConfig(name="agreed", lock_duration=6.0), clock=clock)
    assert caught.value.field == "lock_duration"
    with pytest.raises(ConfigurationError) as caught:
        InMemoryProvider(InMemoryConfig(name="agreed", lock_duration=5.0), clock=SystemClock())
    assert caught.value.field == "clock"
    assert InMemoryProvider(InMemoryConfig(name="agreed", lock_duration=5.0), clock=clock)._broker is kept._broker


def test_queues_belong_to_one_event_loop_at_a_time(clock: ManualClock) -> None:
    provider = InMemoryProvider(InMemoryConfig(), clock=clock)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        first.run_until_complete(provider.send("q", numbered(1)))
        receiver = first.run_until_complete(provider.open_receiver("q"))
        for call in (provider.send("q", numbered(1)), receiver.receive(1, 0.0)):
            with pytest.raises(ProviderError, match="another event loop"):
                second.run_until_complete(call)
        first.close()
        assert bodies(second.run_until_complete(receiver.receive(1, 0.0))) == [0]
    finally:
        first.close()
        second.close()


async def test_c23_close_releases_every_lock_and_ends_every_wait(clock: ManualClock) -> None:
    config = InMemoryConfig(name="closing")
    provider, other = InMemoryProvider(config, clock=clock), InMemoryProvider(config, clock=clock)
    await provider.send("q", [*numbered(2), *numbered(2, session_id="s")])
    receiver = await provider.open_receiver("q")
    session = await provider.accept_session("q", None, 0.0)
    assert session is not None
    await receiver.receive(9, 0.0)
    await session.receive(9, 0.0)
    tasks = await started(receiver.receive(1, 50.0), session.receive(1, 50.0), provider.accept_session("q", None, 50.0))
    await provider.close()
    await provider.close()
    for task in tasks:
        with pytest.raises(ClosedError):
            await task
    assert timers(clock) == 0
    again = await other.open_receiver("q")
    assert bodies(await again.receive(9, 0.0)) == [0, 1]
    taken = await other.accept_session("q", "s", 0.0)
    assert taken is not None
    assert bodies(await taken.receive(9, 0.0)) == [0, 1]
    with pytest.raises(ClosedError):
        await provider.send("q", [])
    await other.close()
