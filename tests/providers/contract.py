"""What every provider does with messages that have no session [C6-C10, C14, C16-C20, C23]."""

import asyncio
import random
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from harness import Harness, QueueSettings, bodies, numbered, turns
from hypothesis import given, strategies as st

from queue_runtime.errors import (
    CapabilityError,
    ClosedError,
    InvalidReceiptError,
    MessageTooLargeError,
    QueueNotFoundError,
    ValidationError,
)
from queue_runtime.message import Message, ReceivedMessage

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
NAMES = st.text("abcXYZ019_", min_size=1, max_size=20).map(lambda text: "n" + text)
FIELDS = st.fixed_dictionaries(
    {"body": st.binary(max_size=200)},
    optional={
        "attributes": st.dictionaries(NAMES, TEXTS, max_size=5),
        "message_id": TEXTS,
        "correlation_id": TEXTS,
        "content_type": TEXTS,
    },
)


class SendContract:
    """Sending: fields, sizes, ids, schedules, duplicates."""

    async def test_declares_what_it_can(self, harness: Harness) -> None:
        client, _ = await harness.open()
        assert client.capabilities == harness.capabilities

    @given(fields=FIELDS)
    async def test_every_field_arrives_exactly(self, harness: Harness, fields: dict[str, Any]) -> None:
        """[C2, C6]"""
        place = await harness.open()
        sent = Message(**fields)
        assert await place.client.send_message(place.queue, sent) == sent.message_id
        received = await harness.take_one(place)
        assert received.message() == sent
        assert received.attributes == fields.get("attributes", {})
        for name in ("body", "message_id", "correlation_id", "content_type"):
            assert getattr(received, name) == getattr(sent, name)
        await place.client.close()

    @pytest.mark.parametrize("body", [b"", b"\0", bytes(range(256)), b"\xff" * 20_000], ids=len)
    async def test_any_body_arrives_exactly(self, harness: Harness, body: bytes) -> None:
        """[C6] Empty, binary, long."""
        place = await harness.open()
        await harness.send(place, body)
        assert (await harness.take_one(place)).body == body

    async def test_a_first_delivery_tells_its_times(self, harness: Harness) -> None:
        """[C5]"""
        place = await harness.open()
        await harness.send(place, b"x")
        received = await harness.take_one(place)
        assert received.delivery_count == 1
        assert received.first_delivered_at is not None
        assert received.delivered_at is not None
        assert received.locked_until is not None
        assert received.enqueued_at <= received.first_delivered_at == received.delivered_at < received.locked_until
        assert (received.sequence_number is not None) == harness.capabilities.sequence_numbers
        assert received.dead_letter_reason is received.dead_letter_description is None

    async def test_a_message_that_is_too_large_is_refused(self, harness: Harness) -> None:
        """[C7] Before anything is sent, those beside it included."""
        place = await harness.open()
        limit = harness.capabilities.max_message_size
        assert limit is not None
        room = limit - Message(body=b"").size
        await harness.send(place, bytes(room))
        with pytest.raises(MessageTooLargeError) as caught:
            await harness.send(place, b"before", bytes(room + 1), b"after")
        assert (caught.value.size, caught.value.max_size) == (limit + 1, limit)
        with pytest.raises(MessageTooLargeError):
            await place.client.send_message(place.queue, Message(body=bytes(room + 1)))
        assert len((await harness.take_one(place)).body) == room
        await harness.nothing_from(place)

    async def test_an_absent_queue(self, harness: Harness) -> None:
        """[C8] Every call says so, and none creates it."""
        client, queue = await harness.absent()
        for _ in range(2):
            for call in (
                client.send_message(queue, Message(body=b"x")),
                client.send_messages(queue, [Message(body=b"x")]),
                client.receive_messages(queue, 1, 0),
            ):
                with pytest.raises(QueueNotFoundError) as caught:
                    await call
                assert caught.value.queue_name == queue

    async def test_many_are_sent_with_their_ids_in_order(self, harness: Harness) -> None:
        """[C9] More than the batches of any service."""
        place = await harness.open()
        messages = [Message(body=body) for body in numbered(250)]
        ids = await place.client.send_messages(place.queue, messages)
        assert ids == [message.message_id for message in messages]
        received = await harness.take(place, 250)
        assert {message.message_id: message.body for message in received} == dict(zip(ids, numbered(250), strict=True))
        assert await place.client.send_messages(place.queue, []) == []

    async def test_a_delay_holds_a_message_back(self, harness: Harness) -> None:
        """[C18]"""
        place = await harness.open()
        await harness.send(place, b"later", delay=harness.unit)
        await harness.nothing_from(place)
        assert (await place.client.counts(place.queue)).scheduled == 1
        await harness.pass_time(harness.unit * 1.01)
        assert (await harness.take_one(place)).body == b"later"

    async def test_a_schedule_holds_a_message_back(self, harness: Harness) -> None:
        """[C18] By the wall clock; a time in the past is now."""
        place = await harness.open()
        for body, offset in ((b"past", -10.0), (b"future", harness.unit)):
            at = datetime.fromtimestamp(harness.now(), UTC) + timedelta(seconds=offset)
            await harness.send(place, body, scheduled_at=at)
        assert (await harness.take_one(place)).body == b"past"
        await harness.nothing_from(place)
        await harness.pass_time(harness.unit * 1.01)
        assert (await harness.take_one(place)).body == b"future"

    async def test_a_waiting_receiver_gets_a_message_when_it_falls_due(self, harness: Harness) -> None:
        """[C10, C18]"""
        place = await harness.open()
        await harness.send(place, b"later", delay=harness.unit)
        task = asyncio.create_task(place.client.receive_messages(place.queue, 1, harness.unit * 3))
        await harness.pass_time(harness.unit * 1.5)
        assert task.done()
        assert bodies(await task) == [b"later"]

    async def test_the_longest_delay(self, harness: Harness) -> None:
        """[C18] Above it, an error that names the field; nothing is sent."""
        place = await harness.open()
        limit = harness.capabilities.max_delay
        if limit is None:
            await harness.send(place, b"x", delay=365 * 86_400)
            assert (await place.client.counts(place.queue)).scheduled == 1
            return
        with pytest.raises(ValidationError, match="delay"):
            await harness.send(place, b"x", delay=limit + 1)
        await harness.nothing_from(place)

    async def test_a_duplicate_is_accepted_and_not_delivered(self, harness: Harness) -> None:
        """[C19] Within the window, also after the first one is completed."""
        place = await harness.open(QueueSettings(deduplication_window=harness.unit * 4))
        if not harness.capabilities.deduplication:
            with pytest.raises(CapabilityError, match="deduplication"):
                await harness.send(place, b"x", deduplication_id="same")
            return
        await harness.send(place, b"first", deduplication_id="same")
        await harness.send(place, b"twice", b"other", deduplication_id="same")
        await harness.send(place, b"other", deduplication_id="other")
        received = await harness.take(place, 2)
        assert sorted(bodies(received)) == [b"first", b"other"]
        await place.client.complete_messages(received)
        assert await harness.send(place, b"again", deduplication_id="same")
        await harness.nothing_from(place)
        await harness.pass_time(harness.unit * 4.1)
        await harness.send(place, b"new", deduplication_id="same")
        assert (await harness.take_one(place)).body == b"new"

    async def test_a_message_that_outlived_its_time_is_dropped(self, harness: Harness) -> None:
        """[C17]"""
        place = await harness.open()
        await harness.send(place, b"short", time_to_live=harness.unit)
        await harness.send(place, b"long", time_to_live=harness.unit * 10)
        await harness.pass_time(harness.unit * 1.1)
        assert (await harness.take_one(place)).body == b"long"
        await harness.nothing_from(place)
        assert await place.client.dead_letters(place.queue).count() == 0

    async def test_a_message_that_outlived_its_time_becomes_a_dead_letter(self, harness: Harness) -> None:
        """[C17] Where the queue is told so."""
        settings = QueueSettings(dead_letter_on_expiration=True)
        if not harness.capabilities.dead_letter_on_expiration:
            with pytest.raises(CapabilityError, match="dead_letter_on_expiration"):
                await harness.open(settings)
            return
        place = await harness.open(settings)
        await harness.send(place, b"x", time_to_live=harness.unit)
        await harness.pass_time(harness.unit * 1.1)
        await harness.nothing_from(place)
        (letter,) = await harness.dead(place)
        assert (letter.body, letter.dead_letter_reason) == (b"x", "TTLExpired")


class ReceiveContract:
    """Receiving: waiting, cancelling, looking, closing, many tasks at once."""

    async def test_at_most_as_many_as_asked_for(self, harness: Harness) -> None:
        """[C10]"""
        place = await harness.open()
        await harness.send(place, *numbered(5))
        first = await place.client.receive_messages(place.queue, 3, harness.patience)
        assert 1 <= len(first) <= 3
        rest = await harness.take(place, 5 - len(first))
        assert sorted(bodies(first + rest)) == numbered(5)
        await harness.nothing_from(place)

    async def test_receive_returns_as_soon_as_one_is_there(self, harness: Harness) -> None:
        """[C10] It does not wait for ``max_count``."""
        place = await harness.open()
        task = asyncio.create_task(place.client.receive_messages(place.queue, 10, harness.unit * 4))
        await harness.pass_time(harness.unit)
        assert not task.done()
        await harness.send(place, b"x")
        assert bodies(await asyncio.wait_for(task, 5)) == [b"x"]

    async def test_the_timeout_of_a_receive(self, harness: Harness) -> None:
        """[C10] An empty list, within 100 ms of the timeout; no error."""
        place = await harness.open()
        task = asyncio.create_task(place.client.receive_messages(place.queue, 1, timedelta(seconds=harness.unit)))
        await harness.pass_time(harness.unit - 0.1)
        assert not task.done()
        await harness.pass_time(0.2)
        assert task.done()
        assert await task == []
        assert await place.client.receive_message(place.queue, 0) is None

    async def test_every_waiting_receiver_is_served(self, harness: Harness) -> None:
        """[C10, C23] One message wakes one; a batch as many as it has messages."""
        place = await harness.open()
        tasks = [asyncio.create_task(place.client.receive_message(place.queue, harness.unit * 9)) for _ in range(20)]
        await harness.pass_time(harness.unit)
        await harness.send(place, *numbered(12))
        for body in numbered(20)[12:]:
            await harness.send(place, body)
        received = await asyncio.wait_for(asyncio.gather(*tasks), 5)
        assert sorted(message.body for message in received if message) == sorted(numbered(20))

    async def test_cancelling_a_receive_loses_no_message(self, harness: Harness) -> None:
        """[C10] Whenever it comes: before, while and after the message arrives."""
        place = await harness.open()
        chance = random.Random(7)
        cancelled = 0
        for number in range(150):
            body = b"%d" % number
            task = asyncio.create_task(place.client.receive_message(place.queue, harness.unit * 9))
            await turns(chance.randrange(4))
            sending = asyncio.create_task(harness.send(place, body))
            await harness.moments(chance.randrange(6))
            task.cancel()
            await sending
            try:
                received = await task
            except asyncio.CancelledError:
                cancelled += 1
                received = await harness.take_one(place)
            assert received is not None
            assert (received.body, received.delivery_count) == (body, 1)
            await place.client.complete_message(received)
        assert 20 < cancelled < 150, "both happened"

    async def test_a_cancelled_receiver_passes_its_message_on(self, harness: Harness) -> None:
        """[C10] Of two that wait, the one that stays gets it."""
        place = await harness.open()
        for pause in range(5):
            first, second = (
                asyncio.create_task(place.client.receive_message(place.queue, harness.unit * 9)) for _ in range(2)
            )
            await turns(5)
            await harness.send(place, b"x")
            await turns(pause)
            first.cancel()
            await asyncio.wait([first])
            if first.cancelled():
                received = await asyncio.wait_for(second, 5)
            else:
                received = first.result()
                second.cancel()
                await asyncio.wait([second])
            assert received is not None
            await place.client.complete_message(received)

    async def test_peek_shows_without_locking_or_counting(self, harness: Harness) -> None:
        """[C20] In order, from a number on, locked ones too or not, twice alike."""
        place = await harness.open()
        await harness.send(place, *numbered(5))
        if not harness.capabilities.peek:
            with pytest.raises(CapabilityError, match="peek"):
                await place.client.peek_messages(place.queue)
            return
        shown = await place.client.peek_messages(place.queue, 3)
        assert bodies(shown) == numbered(3)
        assert shown == await place.client.peek_messages(place.queue, 3)
        assert [message.delivery_count for message in shown] == [0, 0, 0]
        number = shown[-1].sequence_number
        assert number is not None
        rest = await place.client.peek_messages(place.queue, from_sequence_number=number + 1)
        assert bodies(rest) == numbered(5)[3:]
        with pytest.raises(InvalidReceiptError, match="peeked"):
            await place.client.complete_message(shown[0])
        received = await harness.take(place, 5)
        assert [message.delivery_count for message in received] == [1] * 5

    async def test_counts(self, harness: Harness) -> None:
        """By state."""
        place = await harness.open()
        await harness.send(place, *numbered(6))
        await harness.send(place, b"later", delay=harness.unit)
        first, second, *_ = await harness.take(place, 3)
        await place.client.complete_message(first)
        await place.client.dead_letter_message(second, "reason")
        counts = await place.client.counts(place.queue)
        assert (counts.active, counts.in_flight, counts.scheduled, counts.dead_lettered) == (3, 1, 1, 1)

    async def test_many_tasks_on_one_client(self, harness: Harness) -> None:
        """[C23] Ten producers, ten consumers: each message is completed once, and none is delivered twice."""
        place = await harness.open()
        client, queue = place
        done: list[bytes] = []
        finished = asyncio.Event()

        async def produce(producer: int) -> None:
            for number in range(0, 40, 4):
                await harness.send(place, *(b"%d-%d" % (producer, number + i) for i in range(4)))

        async def consume() -> None:
            while not finished.is_set():
                messages = await client.receive_messages(queue, 7, 0)
                await asyncio.gather(*(client.complete_message(message) for message in messages))
                done.extend(bodies(messages))
                if len(done) == 400:
                    finished.set()
                await asyncio.sleep(0)

        await asyncio.wait_for(asyncio.gather(*map(produce, range(10)), *(consume() for _ in range(10))), 30)
        assert len(set(done)) == len(done) == 400
        counts = await client.counts(queue)
        assert (counts.active, counts.in_flight, counts.dead_lettered) == (0, 0, 0)

    async def test_close_releases_everything(self, harness: Harness) -> None:
        """[C23] What was held is at once there for others; no thread is left; a second close does nothing."""
        threads = threading.active_count()
        place = await harness.open(max_lock_renewal=300)
        other = place._replace(client=await harness.another(place))
        await harness.send(place, b"plain")
        await harness.send(place, b"in session", session_id="s")
        await harness.take_one(place)
        session = await harness.session(place, "s")
        await harness.take_one(session)
        await place.client.close()
        await place.client.close()
        assert (await harness.take_one(other)).body == b"plain"
        taken_over = await harness.session(other, "s")
        assert (await harness.take_one(taken_over)).body == b"in session"
        await session.close()
        await other.client.close()
        assert threading.active_count() == threads

    async def test_close_settles_what_is_under_way(self, harness: Harness) -> None:
        """[C23]"""
        place = await harness.open()
        other = place._replace(client=await harness.another(place))
        await harness.send(place, *numbered(10))
        received = await harness.take(place, 10)
        tasks = [asyncio.create_task(place.client.complete_message(message)) for message in received]
        await turns(1)
        await place.client.close()
        await asyncio.gather(*tasks)
        await harness.nothing_from(other)

    async def test_close_ends_what_waits(self, harness: Harness) -> None:
        """[C23] A receive and an accept that wait get ClosedError, soon; every later call too."""
        place = await harness.open()
        client, queue = place
        await harness.send(place, b"x")
        received = await harness.take_one(place)
        waiting: list[asyncio.Task[Any]] = [
            asyncio.create_task(client.receive_message(queue, harness.unit * 99)),
            asyncio.create_task(client.dead_letters(queue).receive_message(harness.unit * 99)),
            asyncio.create_task(client.accept_session(queue, None, harness.unit * 99)),
        ]
        await turns(20)
        await client.close()
        for task in waiting:
            with pytest.raises(ClosedError):
                await asyncio.wait_for(task, 5)
        for call in (
            client.send_message(queue, Message(body=b"x")),
            client.send_messages(queue, []),
            client.receive_messages(queue, 1, 0),
            client.accept_session(queue, None, 0),
            client.counts(queue),
            client.complete_message(received),
            client.complete_messages([received]),
            client.dead_letters(queue).receive_messages(1, 0),
            client.dead_letters(queue).count(),
            client.create_queue(queue),
            client.renew_lock(received),
        ):
            with pytest.raises(ClosedError):
                await call

    async def test_the_client_is_a_context_manager(self, harness: Harness) -> None:
        """[C23]"""
        place = await harness.open()
        async with place.client as client:
            await harness.send(place, b"x")
        with pytest.raises(ClosedError):
            await client.receive_message(place.queue, 0)
        with pytest.raises(ClosedError):
            async with client:
                pass

    async def test_forwarding(self, harness: Harness) -> None:
        """[C5] ``.message()`` is sent on as it is."""
        place = await harness.open()
        target = await harness.open()
        await harness.send(place, b"x", attributes={"a": "1"}, correlation_id="c")
        received: ReceivedMessage = await harness.take_one(place)
        await target.client.send_message(target.queue, received.message())
        forwarded = await harness.take_one(target)
        assert forwarded.message() == received.message()
        assert forwarded.delivery_count == 1
