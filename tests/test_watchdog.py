"""Locks outlive a handler that blocks the event loop [C21, C27], and the log names it. On the real clock."""

import asyncio
import logging
import math
import select
import threading
from collections.abc import AsyncIterator
from time import monotonic

import pytest
from wrapping import wrap

from queue_runtime import watchdog as watchdog_module
from queue_runtime.client import QueueClient
from queue_runtime.config import InMemoryConfig
from queue_runtime.consumer import Consumer
from queue_runtime.errors import InvalidReceiptError
from queue_runtime.handling import ConsumerConfig
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.watchdog import Watchdog, place_of, watchdog

LOCK = 0.3
CONFIG = {"lock_duration": LOCK, "session_lock_duration": LOCK}


def block(seconds: float) -> None:
    """What a handler must not do."""
    select.poll().poll(seconds * 1000)


def spin(seconds: float) -> None:
    """The same, without giving the interpreter's lock away."""
    end = monotonic() + seconds
    while monotonic() < end:
        pass


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "watchdog" in thread.name]


@pytest.fixture(autouse=True)
async def _nothing_is_left() -> AsyncIterator[None]:
    yield
    assert not watchdog.is_running
    end = monotonic() + 5
    while threads() and monotonic() < end:
        await asyncio.sleep(0.001)
    assert threads() == []


@pytest.mark.both_loops
async def test_messages_outlive_a_handler_that_blocks_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    """That of the handler, and those that wait for it; and the handler is named, with how long it took."""
    counts: list[int] = []

    async def slow_handler(message: ReceivedMessage) -> None:
        counts.append(message.delivery_count)
        if len(counts) == 1:
            block(LOCK * 3)
        if len(counts) == 6:
            consumer.stop()

    async with QueueClient(InMemoryConfig(**CONFIG)) as client:
        await client.send_messages("q", [Message(body=b"x") for _ in range(6)])
        consumer = Consumer(client, "q", slow_handler, ConsumerConfig(max_concurrency=1))
        with caplog.at_level(logging.WARNING):
            stats = await consumer.run()
        await asyncio.sleep(LOCK)
        counted = await client.counts("q")
    assert counts == [1] * 6
    assert (stats.completed, stats.locks_lost, counted.active) == (6, 0, 0)
    told = [record.getMessage() for record in caplog.records if record.name == "queue_runtime.renewal"]
    assert len(told) == 2, "once as it is seen, and once as it is over"
    assert all("test_messages_outlive_a_handler_that_blocks_the_loop.<locals>.slow_handler" in text for text in told)
    assert "locks are renewed from another thread" in told[0]
    assert "→ block (" in told[0]
    assert __file__ in told[0]
    assert "turns again, after at least 0." in told[1]


@pytest.mark.both_loops
@pytest.mark.parametrize("busy", [block, spin])
async def test_a_session_outlives_it(busy: object) -> None:
    """[C27] The session's own lock, and those of its messages; also where the handler computes."""
    async with QueueClient(InMemoryConfig(**CONFIG)) as client:
        await client.send_messages("q", [Message(body=b"%d" % number, session_id="s") for number in range(3)])
        session = await client.accept_session("q")
        assert session is not None
        first, second = await session.receive_messages(2, 0)
        (block if busy is block else spin)(LOCK * 2)
        await client.complete_messages([first, second])
        third = await session.receive_message(0)
        assert third is not None
        assert (third.body, third.delivery_count) == (b"2", 1)
        await client.complete_message(third)


async def test_a_loop_that_is_blocked_twice_is_told_twice(caplog: pytest.LogCaptureFixture) -> None:
    async with QueueClient(InMemoryConfig(**CONFIG)) as client:
        await client.send_message("q", Message(body=b"x"))
        message = await client.receive_message("q", 0)
        assert message is not None
        for _ in range(2):
            block(LOCK * 1.5)
            await asyncio.sleep(LOCK * 0.2)
        await client.complete_message(message)
        assert client._renewer is not None
        last = client._renewer.last_block
        assert last is not None
        assert last.seconds > LOCK * 0.5
        assert "test_a_loop_that_is_blocked_twice" in last.place.handler
    assert caplog.text.count("turns again") == 2


async def test_the_longest_time_holds_for_the_thread_too(caplog: pytest.LogCaptureFixture) -> None:
    """[C21] A handler that hangs does not keep its message from others for ever."""
    async with QueueClient(InMemoryConfig(max_lock_renewal=LOCK * 0.8, **CONFIG)) as client:
        await client.send_message("q", Message(body=b"x"))
        message = await client.receive_message("q", 0)
        assert message is not None
        block(LOCK * 3)
        with pytest.raises(InvalidReceiptError):
            await client.complete_message(message)
        again = await client.receive_message("q", 1)
        assert again is not None
        assert again.delivery_count == 2
        await client.complete_message(again)


async def test_where_the_provider_cannot_it_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrap(monkeypatch, renews_from_threads=False)
    async with QueueClient(InMemoryConfig(**CONFIG)) as client:
        lost: list[int] = []
        client.on_locks_lost(lambda who, receipts, error: lost.append(len(receipts)))
        await client.send_message("q", Message(body=b"x"))
        assert await client.receive_message("q", 0)
        block(LOCK * 1.5)
        await asyncio.sleep(LOCK * 0.2)
        assert lost == [1]
    assert "no lock can be renewed until it turns" in caplog.text


async def test_no_thread_without_a_lock_that_needs_it() -> None:
    """[C23, P11] It begins with the first lock and ends with the last."""
    async with QueueClient(InMemoryConfig(lock_duration=0.2)) as client:
        await client.send_message("q", Message(body=b"x"))
        await client.counts("q")
        assert threads() == []
        message = await client.receive_message("q", 0)
        assert message is not None
        assert len(threads()) == 1
        await client.complete_message(message)
        await asyncio.sleep(0.15)
        assert not watchdog.is_running


async def test_a_loop_that_turns_costs_a_wake_up_for_each_renewal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[P11]"""
    looks = 0
    look_around = Watchdog.look_around

    def counted(dog: Watchdog) -> float:
        nonlocal looks
        looks += 1
        return look_around(dog)

    monkeypatch.setattr(Watchdog, "look_around", counted)
    async with QueueClient(InMemoryConfig(**CONFIG)) as client:
        await client.send_messages("q", [Message(body=b"x") for _ in range(100)])
        messages = await client.receive_messages("q", 100, 0)
        end = asyncio.get_running_loop().time() + LOCK * 4
        while asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.001)
        await client.complete_messages(messages)
        seen = looks
    assert seen <= 8 * 1.5 + 2, "eight renewals in that time"
    assert caplog.text == ""


async def test_a_loop_in_another_thread_is_another_s_business() -> None:
    """One thread for all loops; a blocked one does not disturb the other."""
    ready = threading.Event()
    counts: list[int] = []

    async def work() -> None:
        async with QueueClient(InMemoryConfig(**CONFIG)) as client:
            await client.send_message("q", Message(body=b"x"))
            message = await client.receive_message("q", 0)
            assert message is not None
            ready.set()
            block(LOCK * 3)
            await client.complete_message(message)
            counts.append((await client.counts("q")).active)

    async with QueueClient(InMemoryConfig(**CONFIG)) as client:
        await client.send_message("q", Message(body=b"x"))
        message = await client.receive_message("q", 0)
        assert message is not None
        thread = threading.Thread(target=lambda: asyncio.run(work()))
        thread.start()
        while not ready.is_set():
            await asyncio.sleep(0.01)
        assert len(threads()) == 1
        while thread.is_alive():
            await asyncio.sleep(0.01)
        await client.complete_message(message)
    assert counts == [0]


def test_a_loop_that_was_left_is_not_looked_after_for_ever() -> None:
    """[C23] Closed without its client: the thread ends by itself."""

    async def leave() -> QueueClient:
        client = QueueClient(InMemoryConfig(lock_duration=0.1))
        await client.send_message("q", Message(body=b"x"))
        assert await client.receive_message("q", 0)
        return client

    loop = asyncio.new_event_loop()
    client = loop.run_until_complete(leave())
    assert threads()
    block(0.2)  # stopped, and not blocked: nothing is told
    assert threads()
    loop.close()
    end = monotonic() + 5
    while threads() and monotonic() < end:
        block(0.01)
    assert threads() == []
    assert not client._closed


def test_the_place_of_a_thread() -> None:
    began = threading.Event()
    go = threading.Event()

    def inner() -> None:
        began.set()
        while not go.is_set():
            block(0.01)

    def handler(depth: int) -> None:
        if depth:
            handler(depth - 1)
        else:
            inner()

    async def main() -> None:
        handler(20)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    began.wait()
    assert thread.ident is not None
    place = place_of(thread.ident)
    go.set()
    thread.join()
    assert place is not None
    assert place.handler.startswith("test_the_place_of_a_thread.<locals>.main (")
    assert place.stack.count(" → ") == watchdog_module.DEEPEST - 1
    assert "…" in place.stack
    assert place_of(thread.ident) is None


def test_one_that_fails_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def look(self, now: float) -> float | None:
            raise ZeroDivisionError("bug")

    class Fine:
        looks = 0

        def look(self, now: float) -> float | None:
            self.looks += 1
            return None if self.looks == 3 else now

    dog, broken, fine = Watchdog(), Broken(), Fine()
    dog.watch(broken, 0.0)
    dog.watch(fine, 0.0)
    end = monotonic() + 5
    while fine.looks < 3 and monotonic() < end:
        block(0.01)
        dog.watch(fine, 0.0)
    assert fine.looks >= 3
    dog.leave(broken)
    dog.leave(fine)
    dog.leave(fine)
    assert not dog.is_running
    assert "the watchdog failed" in caplog.text


def test_without_a_thread_it_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The thread is a help: where none can be started, no receive fails for it, and the next one tries again."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    class Member:
        def look(self, now: float) -> float | None:
            looked.set()
            return math.inf

    looked = threading.Event()
    dog, member = Watchdog(), Member()
    with monkeypatch.context() as limit:
        limit.setattr(threading.Thread, "start", refuse)
        dog.watch(member, 0.0)
    assert "can't start new thread" in caplog.text
    assert not dog.is_running
    dog.watch(member, 0.0)
    assert looked.wait(5)
    dog.leave(member)
