"""What every provider does with sessions: order, one holder at a time, locks, state [C24-C30]."""

import asyncio
import random
from collections import defaultdict
from datetime import timedelta

import pytest
from harness import Harness, Place, QueueSettings, bodies, numbered, turns
from hypothesis import given, strategies as st

from queue_runtime.client import Session
from queue_runtime.errors import (
    CapabilityError,
    InvalidReceiptError,
    SessionLockedError,
    SessionLockLostError,
    ValidationError,
)
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.sessions import CompositeKey, FallbackKey, FieldKey, NoKey

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("receive"), st.integers(1, 4)),
        st.tuples(st.sampled_from(["complete", "abandon"]), st.integers(0, 3)),
        st.tuples(st.sampled_from(["expire", "release", "send"]), st.just(0)),
    ),
    max_size=25,
)


class SessionOrderContract:
    """[C24, C28]"""

    async def test_a_message_of_a_session_is_for_its_holder_only(self, harness: Harness) -> None:
        """[C24] And a holder gets nothing else."""
        place = await harness.open()
        if not harness.capabilities.sessions:
            with pytest.raises(CapabilityError, match="sessions"):
                await place.client.accept_session(place.queue, None, 0)
            return
        await harness.send(place, b"plain")
        await harness.send(place, b"a", session_id="a")
        await harness.send(place, b"b", session_id="b")
        session = await harness.session(place, "b")
        received = await harness.take_one(session)
        assert (received.body, received.session_id) == (b"b", "b")
        assert received.receipt.receiver_id == session.receiver_id
        await harness.nothing_from(session)
        assert bodies(await harness.take(place)) == [b"plain"]
        await harness.nothing_from(place)
        await session.close()

    async def test_the_order_of_a_thousand(self, harness: Harness) -> None:
        """[C24, C28]"""
        place = await harness.open()
        await harness.send(place, *numbered(1200), session_id="s")
        async with await harness.session(place) as session:
            received: list[ReceivedMessage] = []
            while len(received) < 1200:
                batch = await harness.take(session, min(100, 1200 - len(received)))
                await place.client.complete_messages(batch)
                received += batch
            assert bodies(received) == numbered(1200)
            await harness.nothing_from(session)

    async def test_the_abandoned_message_comes_before_its_followers(self, harness: Harness) -> None:
        """[C12, C24]"""
        place = await harness.open()
        await harness.send(place, *numbered(3), session_id="s")
        async with await harness.session(place) as session:
            for delivery in range(1, 4):
                received = await harness.take_one(session)
                assert (received.body, received.delivery_count) == (b"0", delivery)
                await place.client.abandon_message(received)
            assert bodies(await harness.take(session, 3)) == numbered(3)

    async def test_a_message_abandoned_with_a_delay_holds_its_session_back(self, harness: Harness) -> None:
        """[C12, C24] Its followers wait for it."""
        if not harness.capabilities.abandon_delay:
            return
        place = await harness.open()
        await harness.send(place, *numbered(2), session_id="s")
        async with await harness.session(place) as session:
            await place.client.abandon_message(await harness.take_one(session), harness.unit)
            await harness.nothing_from(session)
            await harness.pass_time(harness.unit * 1.1)
            assert bodies(await harness.take(session, 2)) == numbered(2)

    async def test_the_message_whose_lock_ran_out_comes_before_its_followers(self, harness: Harness) -> None:
        """[C13, C24]"""
        place = await harness.open(QueueSettings(session_lock_duration=harness.lock_duration * 4))
        await harness.send(place, *numbered(3), session_id="s")
        async with await harness.session(place) as session:
            assert (await harness.take_one(session)).body == b"0"
            await harness.pass_lock()
            assert bodies(await harness.take(session, 3)) == numbered(3)

    async def test_the_next_holder_goes_on_where_the_last_one_stopped(self, harness: Harness) -> None:
        """[C24, C27] By release and by the loss of the lock."""
        place = await harness.open()
        await harness.send(place, *numbered(6), session_id="s")
        async with await harness.session(place) as session:
            first, *_ = await harness.take(session, 3)
            await place.client.complete_message(first)
        lost = await harness.session(place)
        assert bodies(await harness.take(lost, 2)) == [b"1", b"2"]
        await harness.pass_lock()
        async with await harness.session(place) as session:
            assert bodies(await harness.take(session, 5)) == numbered(6)[1:]
        await lost.close()

    @given(steps=STEPS)
    async def test_order_under_any_schedule(self, harness: Harness, steps: list[tuple[str, int]]) -> None:
        """[C24] Against the obvious model: what is delivered are the first of those that are not locked, in order."""
        place = await harness.open(QueueSettings(max_delivery_count=1000))
        await harness.send(place, *numbered(4), session_id="s")
        sent = 4
        free = list(range(4))
        held: dict[int, ReceivedMessage] = {}
        session: Session | None = None
        for step, value in steps:
            if step == "receive":
                session = session or await harness.session(place, "s")
                received = await session.receive_messages(value, harness.patience)
                places = [int(message.body) for message in received]
                assert places == free[: len(places)]
                assert places or held or not free
                free = free[len(places) :]
                held.update(zip(places, received, strict=True))
            elif step in ("complete", "abandon") and held:
                number = sorted(held)[value % len(held)]
                message = held.pop(number)
                if step == "complete":
                    await place.client.complete_message(message)
                else:
                    await place.client.abandon_message(message)
                    free = sorted([*free, number])
            elif step == "send":
                await harness.send(place, b"%d" % sent, session_id="s")
                free.append(sent)
                sent += 1
            elif step in ("expire", "release") and session is not None:
                if step == "expire":
                    await harness.pass_lock()
                    with pytest.raises(SessionLockLostError):
                        await session.receive_messages(1, 0)
                await session.close()
                session = None
                free = sorted([*free, *held])
                held.clear()
        if session is not None:
            await session.close()
        if free or held:
            async with await harness.session(place, "s") as session:
                rest = bodies(await harness.take(session, len(free) + len(held)))
                assert rest == [b"%d" % number for number in sorted([*free, *held])]
        await place.client.close()

    async def test_hundreds_of_sessions_at_once(self, harness: Harness) -> None:
        """[C24, C28] Thirty holders, three hundred sessions, failures among them: the order of each is kept."""
        place = await harness.open(QueueSettings(max_delivery_count=100))
        messages = [Message(body=b"%d" % (number // 300), session_id=f"s{number % 300}") for number in range(1200)]
        await place.client.send_messages(place.queue, messages)
        chance = random.Random(3)
        done: dict[str, list[int]] = defaultdict(list)
        holders: set[str] = set()
        most = 0

        async def work() -> None:
            nonlocal most
            while (session := await place.client.accept_session(place.queue, None, harness.patience)) is not None:
                assert session.session_id not in holders, "one holder at a time"
                holders.add(session.session_id)
                most = max(most, len(holders))
                for message in await session.receive_messages(chance.randrange(1, 4), harness.patience):
                    await turns(chance.randrange(3))
                    if chance.random() < 0.2:
                        await place.client.abandon_message(message)
                        break  # what follows may not overtake
                    await place.client.complete_message(message)
                    done[session.session_id].append(int(message.body))
                holders.discard(session.session_id)
                await session.close()

        while sum(map(len, done.values())) < 1200:
            await asyncio.wait_for(asyncio.gather(*(work() for _ in range(30))), 30)
        assert most > 10, "the sessions were held at the same time"
        assert all(numbers == [0, 1, 2, 3] for numbers in done.values())

    async def test_a_stalled_session_stalls_only_itself(self, harness: Harness) -> None:
        """[C28]"""
        place = await harness.open()
        for number in range(200):
            await harness.send(place, b"1", b"2", session_id=f"s{number}")
        stalled = await harness.session(place, "s7")
        await harness.take_one(stalled)
        others = [await harness.session(place) for _ in range(199)]
        assert sorted(session.session_id for session in [stalled, *others]) == sorted(f"s{n}" for n in range(200))
        for session in others:
            assert bodies(await harness.take(session, 2)) == [b"1", b"2"]
            await session.close()
        await harness.nothing_from(place)
        await stalled.close()


class SessionLockContract:
    """[C25-C27]"""

    async def test_a_session_has_one_holder(self, harness: Harness) -> None:
        """[C25] Among the tasks of one client and among clients; a release frees it at once."""
        place = await harness.open()
        other = place._replace(client=await harness.another(place))
        session = await harness.session(place, "s")
        for client in (place.client, other.client):
            with pytest.raises(SessionLockedError) as caught:
                await client.accept_session(place.queue, "s", 0)
            assert caught.value.session_id == "s"
            assert caught.value.locked_until in (None, session.locked_until)
        await session.close()
        await session.close()
        await (await harness.session(other, "s")).close()

    async def test_an_empty_session_can_be_taken_by_its_id(self, harness: Harness) -> None:
        """[C25] Its holder waits for the first message."""
        place = await harness.open()
        session = await harness.session(place, "new")
        task = asyncio.create_task(session.receive_message(harness.unit * 9))
        await harness.pass_time(harness.unit)
        assert not task.done()
        await harness.send(place, b"x", session_id="new")
        received = await asyncio.wait_for(task, 5)
        assert received is not None
        assert received.body == b"x"
        await session.close()

    async def test_the_timeout_of_a_session_s_receive(self, harness: Harness) -> None:
        """[C10]"""
        place = await harness.open()
        async with await harness.session(place, "s") as session:
            task = asyncio.create_task(session.receive_messages(1, harness.unit))
            await harness.pass_time(harness.unit - 0.1)
            assert not task.done()
            await harness.pass_time(0.2)
            assert await asyncio.wait_for(task, 5) == []

    async def test_the_next_session_with_messages(self, harness: Harness) -> None:
        """[C26] Held and empty ones are passed over; None at the timeout."""
        place = await harness.open()
        client, queue = place
        assert await client.accept_session(queue, None, 0) is None
        for name in ("a", "b", "c"):
            await harness.send(place, b"x", session_id=name)
        held = await harness.session(place, "b")
        empty = await harness.session(place, "a")
        await client.complete_message(await harness.take_one(empty))
        await empty.close()
        third = await harness.session(place)
        assert third.session_id == "c"
        task = asyncio.create_task(client.accept_session(queue, None, timedelta(seconds=harness.unit)))
        await harness.pass_time(harness.unit - 0.1)
        assert not task.done()
        await harness.pass_time(0.2)
        assert await asyncio.wait_for(task, 5) is None
        await held.close()
        await third.close()

    async def test_who_waits_for_a_session_is_woken(self, harness: Harness) -> None:
        """[C26] By a message, by a release, by the loss of a lock."""
        place = await harness.open()
        client, queue = place
        task = asyncio.create_task(client.accept_session(queue, None, harness.lock_duration * 9))
        await turns(20)
        await harness.send(place, b"x", session_id="s")
        first = await asyncio.wait_for(task, 5)
        assert first is not None
        task = asyncio.create_task(client.accept_session(queue, None, harness.lock_duration * 9))
        await turns(20)
        assert not task.done()
        await first.close()
        second = await asyncio.wait_for(task, 5)
        assert second is not None
        task = asyncio.create_task(client.accept_session(queue, None, harness.lock_duration * 9))
        await turns(20)
        await harness.pass_lock()
        third = await asyncio.wait_for(task, 5)
        assert third is not None
        assert third.session_id == "s"
        for session in (second, third):
            await session.close()

    async def test_cancelling_an_accept_loses_no_session(self, harness: Harness) -> None:
        """[C26]"""
        place = await harness.open()
        chance = random.Random(5)
        for number in range(60):
            task = asyncio.create_task(place.client.accept_session(place.queue, None, harness.unit * 9))
            await turns(chance.randrange(4))
            sending = asyncio.create_task(harness.send(place, b"x", session_id=f"s{number}"))
            await harness.moments(chance.randrange(6))
            task.cancel()
            await sending
            try:
                session = await task
            except asyncio.CancelledError:
                session = await harness.session(place)
            assert session is not None
            assert session.session_id == f"s{number}"
            await place.client.complete_message(await harness.take_one(session))
            await session.close()

    async def test_a_held_session_is_renewed(self, harness: Harness) -> None:
        """[C27] With nothing received, and with messages in hand; a release ends it."""
        place = await harness.open(max_lock_renewal=harness.lock_duration * 100)
        other = place._replace(client=await harness.another(place))
        await harness.send(place, b"x", session_id="s")
        session = await harness.session(place, "s")
        received = None
        for number in range(4):
            await harness.pass_lock()
            with pytest.raises(SessionLockedError):
                await other.client.accept_session(place.queue, "s", 0)
            if number == 1:
                received = await harness.take_one(session)
        assert received is not None
        assert session.locked_until.timestamp() > harness.now()
        await place.client.complete_message(received)
        await session.close()
        taken = await harness.session(other, "s")
        await taken.close()

    async def test_a_session_is_renewed_by_hand(self, harness: Harness) -> None:
        """[C27]"""
        place = await harness.open()
        session = await harness.session(place, "s")
        for _ in range(3):
            await harness.pass_time(harness.lock_duration * 0.7)
            assert await session.renew_lock() == session.locked_until
        with pytest.raises(SessionLockedError):
            await place.client.accept_session(place.queue, "s", 0)
        await session.close()

    async def test_the_old_holder_is_told_that_it_lost_the_session(self, harness: Harness) -> None:
        """[C27] By every call; the new holder is not disturbed."""
        place = await harness.open()
        await harness.send(place, b"x", b"y", session_id="s")
        old = await harness.session(place, "s")
        received = await harness.take_one(old)
        await harness.pass_lock()
        new = await harness.session(place, "s")
        assert bodies(await harness.take(new, 2)) == [b"x", b"y"]
        for call in (
            old.receive_messages(1, 0),
            old.renew_lock(),
            place.client.complete_message(received),
            place.client.abandon_message(received),
        ):
            with pytest.raises(SessionLockLostError) as caught:
                await call
            assert caught.value.session_id == "s"
        await old.close()
        with pytest.raises(SessionLockedError):
            await place.client.accept_session(place.queue, "s", 0)
        await new.close()

    async def test_a_holder_that_waits_is_told_that_it_lost_the_session(self, harness: Harness) -> None:
        """[C27] When it happens, not at its timeout."""
        place = await harness.open()
        session = await harness.session(place, "s")
        task = asyncio.create_task(session.receive_messages(1, harness.lock_duration * 9))
        await harness.pass_lock()
        with pytest.raises(SessionLockLostError):
            await asyncio.wait_for(task, 5)
        await session.close()

    async def test_what_is_settled_after_close(self, harness: Harness) -> None:
        """[C27] The right to settle went with the session."""
        place = await harness.open()
        await harness.send(place, b"x", session_id="s")
        session = await harness.session(place, "s")
        received = await harness.take_one(session)
        await session.close()
        with pytest.raises(InvalidReceiptError):
            await place.client.complete_message(received)
        async with await harness.session(place, "s") as again:
            assert (await harness.take_one(again)).delivery_count == 2


class SessionKeyContract:
    """Session keys on send [C29] and session state [C30]."""

    @pytest.mark.parametrize(
        ("strategy", "attributes", "expected"),
        [
            (FieldKey("repo", prefix="r/"), {"repo": "a"}, "r/a"),
            (FieldKey("repo"), {}, None),
            (CompositeKey("repo", "number"), {"repo": "a", "number": "7"}, "a:7"),
            (CompositeKey("repo", "number"), {"repo": "a"}, None),
            (FallbackKey(CompositeKey("repo", "number"), FieldKey("repo")), {"repo": "a"}, "a"),
            (NoKey(), {"repo": "a"}, None),
        ],
        ids=repr,
    )
    async def test_a_key_gives_the_session(
        self, harness: Harness, strategy: FieldKey, attributes: dict[str, str], expected: str | None
    ) -> None:
        """[C29]"""
        place = await harness.open(session_key=strategy)
        await harness.send(place, b"x", attributes=attributes)
        source: Place | Session = place if expected is None else await harness.session(place, expected)
        received = await harness.take_one(source)
        assert received.session_id == expected

    async def test_a_session_given_by_the_sender_stays(self, harness: Harness) -> None:
        """[C29]"""
        place = await harness.open(session_key=FieldKey("repo"))
        await harness.send(place, b"x", attributes={"repo": "a"}, session_id="mine")
        assert (await harness.session(place)).session_id == "mine"

    async def test_a_bad_key_is_an_error(self, harness: Harness) -> None:
        """[C29] Never silently unordered; nothing is sent."""
        place = await harness.open(session_key=FieldKey("repo"))
        for bad in ("é", "x" * 129, "a\nb"):
            with pytest.raises(ValidationError, match="session_id"):
                await place.client.send_messages(
                    place.queue, [Message(body=b"good"), Message(body=b"bad", attributes={"repo": bad})]
                )
        await harness.nothing_from(place)

    async def test_session_state(self, harness: Harness) -> None:
        """[C30] It outlives its holder, and the session's messages; None removes it."""
        place = await harness.open()
        session = await harness.session(place, "s")
        if not harness.capabilities.session_state:
            for call in (session.get_state(), session.set_state(b"x")):
                with pytest.raises(CapabilityError, match="session_state"):
                    await call
            return
        assert await session.get_state() is None
        await session.set_state(b"\0state")
        await session.close()
        async with await harness.session(place, "other") as other:
            assert await other.get_state() is None
        session = await harness.session(place, "s")
        assert await session.get_state() == b"\0state"
        with pytest.raises(ValidationError, match="state"):
            await session.set_state("text")  # type: ignore[arg-type]
        await session.set_state(None)
        assert await session.get_state() is None
        await session.set_state(b"")
        assert await session.get_state() == b""
        await harness.pass_lock()
        for call in (session.get_state(), session.set_state(b"x")):
            with pytest.raises(SessionLockLostError):
                await call
        await session.close()
