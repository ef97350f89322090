"""What every provider does with a delivery: settling, locks, renewal, dead letters [C11-C16, C20-C22]."""

import asyncio
from collections.abc import Sequence

import pytest
from harness import Harness, Place, QueueSettings, bodies, numbered, turns

from queue_runtime.errors import (
    BatchSettleError,
    CapabilityError,
    InvalidReceiptError,
    QueueRuntimeError,
    ValidationError,
)
from queue_runtime.message import Receipt, ReceivedMessage


class SettleContract:
    """Complete, abandon, defer, dead-letter; one by one and many at once."""

    async def test_complete_removes_for_good(self, harness: Harness) -> None:
        """[C11] Lock expiry does not bring it back."""
        place = await harness.open()
        await harness.send(place, b"x")
        await place.client.complete_message(await harness.take_one(place))
        await harness.pass_lock()
        await harness.nothing_from(place)

    async def test_a_receipt_is_used_once(self, harness: Harness) -> None:
        """[C11] A second use names the receipt and changes nothing."""
        place = await harness.open()
        client = place.client
        await harness.send(place, b"x", b"y")
        first, second = await harness.take(place, 2)
        await client.complete_message(first)
        await client.abandon_message(second.receipt)
        for used in (first, second):
            for call in (
                client.complete_message(used),
                client.abandon_message(used),
                client.dead_letter_message(used, "reason"),
                client.renew_lock(used),
            ):
                with pytest.raises(InvalidReceiptError) as caught:
                    await call
                assert caught.value.receipt == used.receipt
                assert not caught.value.is_transient
        assert bodies(await harness.take(place)) == [second.body]
        await harness.nothing_from(place)
        assert await client.dead_letters(place.queue).count() == 0

    async def test_a_receipt_ends_with_its_lock(self, harness: Harness) -> None:
        """[C11, C13] The next delivery has another receipt, and the old one cannot touch it."""
        place = await harness.open()
        client = place.client
        await harness.send(place, b"x")
        old = await harness.take_one(place)
        await harness.pass_lock()
        with pytest.raises(InvalidReceiptError):
            await client.complete_message(old)
        new = await harness.take_one(place)
        assert new.receipt != old.receipt
        assert (new.delivery_count, new.message_id) == (2, old.message_id)
        assert new.first_delivered_at == old.first_delivered_at
        assert new.delivered_at is not None
        assert old.delivered_at is not None
        assert new.delivered_at > old.delivered_at
        with pytest.raises(InvalidReceiptError):
            await client.dead_letter_message(old, "reason")
        await client.complete_message(new)
        await harness.pass_lock()
        await harness.nothing_from(place)

    async def test_a_locked_message_is_hidden_until_its_lock_ends(self, harness: Harness) -> None:
        """[C13] From other clients too; a waiting receiver gets it then."""
        place = await harness.open()
        other = place._replace(client=await harness.another(place))
        await harness.send(place, b"x")
        await harness.take_one(place)
        await harness.nothing_from(place)
        await harness.nothing_from(other)
        task = asyncio.create_task(other.client.receive_message(place.queue, harness.lock_duration * 2))
        await harness.pass_time(harness.lock_duration * 0.9)
        assert not task.done()
        await harness.pass_time(harness.lock_duration * 0.2)
        received = await asyncio.wait_for(task, 5)
        assert received is not None
        assert received.delivery_count == 2

    async def test_abandon_makes_it_visible_at_once(self, harness: Harness) -> None:
        """[C12]"""
        place = await harness.open()
        await harness.send(place, b"x")
        for delivery in range(1, 4):
            received = await harness.take_one(place)
            assert received.delivery_count == delivery
            await place.client.abandon_message(received)

    async def test_abandon_after_a_delay(self, harness: Harness) -> None:
        """[C12]"""
        place = await harness.open()
        await harness.send(place, b"x")
        received = await harness.take_one(place)
        if not harness.capabilities.abandon_delay:
            with pytest.raises(CapabilityError, match="abandon_delay"):
                await place.client.abandon_message(received, harness.unit)
            return
        await place.client.abandon_message(received, harness.unit)
        await harness.nothing_from(place)
        await harness.pass_time(harness.unit * 0.5)
        await harness.nothing_from(place)
        await harness.pass_time(harness.unit * 0.6)
        assert (await harness.take_one(place)).delivery_count == 2

    async def test_defer_sets_aside(self, harness: Harness) -> None:
        """Only its sequence number gets it; then it is settled like any other."""
        place = await harness.open()
        client, queue = place
        await harness.send(place, *numbered(3))
        received = await harness.take(place, 3)
        if not harness.capabilities.defer:
            for call in (client.defer_message(received[0]), client.receive_deferred_messages(queue, [1])):
                with pytest.raises(CapabilityError, match="defer"):
                    await call
            return
        for message in received:
            await client.defer_message(message)
        await harness.pass_lock()
        await harness.nothing_from(place)
        assert (await client.counts(queue)).deferred == 3
        numbers = [message.sequence_number for message in received]
        assert None not in numbers
        asked = [number for number in numbers if number is not None]
        again = await client.receive_deferred_messages(queue, [asked[2], 10**9, asked[0]])
        assert [message.sequence_number for message in again] == [asked[2], asked[0]]
        assert [message.delivery_count for message in again] == [2, 2]
        await client.complete_message(again[0])
        await client.abandon_message(again[1])
        with pytest.raises(InvalidReceiptError):
            await client.complete_message(received[0])
        assert [message.sequence_number for message in await client.receive_deferred_messages(queue, asked)] == [
            asked[1]
        ]

    async def test_too_many_deliveries_end_in_the_dead_letter_queue(self, harness: Harness) -> None:
        """[C14] By abandon and by expiry; gone from the main queue."""
        place = await harness.open(QueueSettings(max_delivery_count=3))
        await harness.send(place, b"x", attributes={"a": "1"})
        for delivery in range(1, 4):
            received = await harness.take_one(place)
            assert received.delivery_count == delivery
            if delivery == 2:
                await harness.pass_lock()
            else:
                await place.client.abandon_message(received)
        await harness.nothing_from(place)
        (letter,) = await harness.dead(place)
        assert letter.dead_letter_reason == "MaxDeliveryCountExceeded"
        assert letter.message() == received.message()
        await harness.pass_lock()
        await harness.nothing_from(place)

    async def test_settling_many(self, harness: Harness) -> None:
        """[C22]"""
        place = await harness.open()
        await harness.send(place, *numbered(60))
        received = await harness.take(place, 60)
        await place.client.complete_messages(received[:30])
        await place.client.abandon_messages(message.receipt for message in received[30:])
        assert sorted(bodies(await harness.take(place, 30))) == sorted(bodies(received[30:]))
        await place.client.complete_messages([])

    async def test_partial_failure_is_told_by_message(self, harness: Harness) -> None:
        """[C22] In input order; what could be settled is settled."""
        place = await harness.open()
        await harness.send(place, *numbered(6))
        received = await harness.take(place, 6)
        await place.client.complete_messages(received[1:3])
        with pytest.raises(BatchSettleError) as caught:
            await place.client.complete_messages(received)
        outcomes = caught.value.outcomes
        assert [type(outcome) for outcome in outcomes] == [type(None)] + [InvalidReceiptError] * 2 + [type(None)] * 3
        for message, outcome in zip(received, outcomes, strict=True):
            assert outcome is None or (isinstance(outcome, InvalidReceiptError) and outcome.receipt == message.receipt)
        assert not caught.value.is_transient
        await harness.pass_lock()
        await harness.nothing_from(place)

    async def test_one_receipt_twice_in_one_call(self, harness: Harness) -> None:
        """[C11, C22] Settled once."""
        place = await harness.open()
        await harness.send(place, b"x")
        received = await harness.take_one(place)
        with pytest.raises(BatchSettleError) as caught:
            await place.client.complete_messages([received, received])
        assert sorted(outcome is None for outcome in caught.value.outcomes) == [False, True]

    async def test_a_thousand_tasks_settle_at_once(self, harness: Harness) -> None:
        """[C42] Each gets the outcome of its own message."""
        place = await harness.open()
        await harness.send(place, *numbered(1000))
        received = await harness.take(place, 1000)
        await place.client.complete_messages(received[::10])
        outcomes = await asyncio.gather(
            *(place.client.complete_message(message) for message in received), return_exceptions=True
        )
        for number, (message, outcome) in enumerate(zip(received, outcomes, strict=True)):
            if number % 10:
                assert outcome is None
            else:
                assert isinstance(outcome, InvalidReceiptError)
                assert outcome.receipt == message.receipt
        counts = await place.client.counts(place.queue)
        assert (counts.active, counts.in_flight) == (0, 0)

    async def test_messages_of_several_receivers_in_one_call(self, harness: Harness) -> None:
        """[C41] Each is settled where it came from: queue, session, dead letters."""
        place = await harness.open()
        client = place.client
        await harness.send(place, b"plain", b"dead")
        await harness.send(place, b"in session", session_id="s")
        plain, dead = await harness.take(place, 2)
        await client.dead_letter_message(dead, "reason")
        (letter,) = await harness.dead(place)
        session = await harness.session(place, "s")
        ordered = await harness.take_one(session)
        await client.complete_messages([ordered, plain, letter])
        counts = await client.counts(place.queue)
        assert (counts.active, counts.in_flight, counts.dead_lettered) == (0, 0, 0)
        await session.close()

    async def test_a_cancelled_caller_does_not_harm_the_others(self, harness: Harness) -> None:
        """[C38, C42]"""
        place = await harness.open()
        await harness.send(place, *numbered(50))
        received = await harness.take(place, 50)
        tasks = [asyncio.create_task(place.client.complete_message(message)) for message in received]
        await turns(1)
        for task in tasks[::5]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        kept = [outcome for number, outcome in enumerate(outcomes) if number % 5]
        assert kept == [None] * 40


class LockContract:
    """Renewal, by hand and automatic [C21]."""

    async def test_renewal_extends_a_lock(self, harness: Harness) -> None:
        place = await harness.open()
        await harness.send(place, b"x")
        received = await harness.take_one(place)
        for _ in range(3):
            await harness.pass_time(harness.lock_duration * 0.7)
            end = await place.client.renew_lock(received)
            assert abs(end.timestamp() - harness.now() - harness.lock_duration) < 1.0
        await harness.nothing_from(place)
        await place.client.complete_message(received)

    async def test_renewing_many(self, harness: Harness) -> None:
        """An end or an error for each, in order."""
        place = await harness.open()
        await harness.send(place, *numbered(4))
        received = await harness.take(place, 4)
        await place.client.complete_message(received[1])
        outcomes = await place.client.renew_locks(received)
        assert [isinstance(outcome, InvalidReceiptError) for outcome in outcomes] == [False, True, False, False]
        assert await place.client.renew_locks([]) == []

    async def test_automatic_renewal_covers_what_waits_in_a_buffer(self, harness: Harness) -> None:
        """[C21] Nobody has touched the messages since they were received, for four times their lock's duration."""
        place = await harness.open(max_lock_renewal=harness.lock_duration * 100)
        other = place._replace(client=await harness.another(place))
        await harness.send(place, *numbered(30))
        received = await harness.take(place, 30)
        for _ in range(4):
            await harness.pass_lock()
            await harness.nothing_from(other)
        await place.client.complete_messages(received)
        await harness.pass_lock()
        await harness.nothing_from(other)

    async def test_automatic_renewal_ends(self, harness: Harness) -> None:
        """[C21] After its maximum the lock runs out, and the listener is told which."""
        place = await harness.open(max_lock_renewal=harness.lock_duration * 2)
        lost: list[tuple[int, Sequence[Receipt], QueueRuntimeError | None]] = []
        stop = place.client.on_locks_lost(lambda *what: lost.append(what))
        await harness.send(place, b"x")
        received = await harness.take_one(place)
        await harness.pass_time(harness.lock_duration * 1.9)
        assert lost == []
        await harness.pass_time(harness.lock_duration * 1.3)
        assert lost == [(received.receipt.receiver_id, [received.receipt], None)]
        with pytest.raises(InvalidReceiptError):
            await place.client.complete_message(received)
        assert (await harness.take_one(place)).delivery_count == 2
        stop()

    async def test_no_renewal_unless_configured(self, harness: Harness) -> None:
        place = await harness.open(max_lock_renewal=0)
        await harness.send(place, b"x")
        await harness.take_one(place)
        await harness.pass_lock()
        assert (await harness.take_one(place)).delivery_count == 2


class DeadLetterContract:
    """Dead letters keep what they were and why, and can be sent back [C15, C16]."""

    async def fill(self, harness: Harness, count: int, **fields: str) -> tuple[Place, list[ReceivedMessage]]:
        place = await harness.open()
        await harness.send(place, *numbered(count), attributes={"kind": "test"}, **fields)
        received = await harness.take(place, count)
        for message in received:
            await place.client.dead_letter_message(message, f"reason-{message.body.decode()}", "why: é, 日本")
        return place, received

    async def test_reason_and_description_are_kept(self, harness: Harness) -> None:
        """[C15] And all else; a session's message too."""
        place, received = await self.fill(harness, 3, correlation_id="c")
        letters = {letter.message_id: letter for letter in await harness.dead(place, 3)}
        for message in received:
            letter = letters[message.message_id]
            assert letter.dead_letter_reason == f"reason-{message.body.decode()}"
            assert letter.dead_letter_description == "why: é, 日本"
            assert letter.message() == message.message()
        await harness.pass_lock()
        await harness.nothing_from(place)

    async def test_without_a_description(self, harness: Harness) -> None:
        place = await harness.open()
        await harness.send(place, b"x")
        received = await harness.take_one(place)
        for reason in ("", None):
            with pytest.raises(ValidationError, match="reason"):
                await place.client.dead_letter_message(received, reason)  # type: ignore[arg-type]
        await place.client.dead_letter_message(received, "bad")
        (letter,) = await harness.dead(place)
        assert (letter.dead_letter_reason, letter.dead_letter_description) == ("bad", None)

    async def test_dead_letters_are_locked_and_settled(self, harness: Harness) -> None:
        """[C16] Abandoned they stay, however often; completed they are gone."""
        place, _ = await self.fill(harness, 1)
        letters = place.client.dead_letters(place.queue)
        for _ in range(7):
            (letter,) = await harness.dead(place)
            assert await letters.receive_message(harness.patience) is None
            await place.client.abandon_message(letter)
        (letter,) = await harness.dead(place)
        assert letter.dead_letter_reason == "reason-0"
        await harness.pass_lock()
        (letter,) = await harness.dead(place)
        assert await letters.count() == 1
        await place.client.complete_message(letter)
        assert await letters.count() == 0

    async def test_dead_letters_can_be_peeked(self, harness: Harness) -> None:
        place, _ = await self.fill(harness, 3)
        letters = place.client.dead_letters(place.queue)
        if not harness.capabilities.peek:
            with pytest.raises(CapabilityError, match="peek"):
                await letters.peek_messages()
            return
        shown = await letters.peek_messages(2)
        assert [letter.dead_letter_reason for letter in shown] == ["reason-0", "reason-1"]
        assert len(await harness.dead(place, 3)) == 3

    async def test_redrive(self, harness: Harness) -> None:
        """[C16] Id, body, attributes and session are kept; the count of deliveries starts anew."""
        place, received = await self.fill(harness, 5, correlation_id="c")
        result = await place.client.dead_letters(place.queue).redrive(timeout=harness.patience)
        assert (result.scanned, result.matched, result.moved, result.failed) == (5, 5, 5, 0)
        assert await place.client.dead_letters(place.queue).count() == 0
        back = {message.message_id: message for message in await harness.take(place, 5)}
        for message in received:
            returned = back[message.message_id]
            assert returned.message() == message.message()
            assert returned.delivery_count == 1
            assert returned.dead_letter_reason is None

    async def test_redrive_of_a_filter(self, harness: Harness) -> None:
        """[C16] The others stay, and are free at once."""
        place, _ = await self.fill(harness, 6)
        letters = place.client.dead_letters(place.queue)
        result = await letters.redrive(
            where=lambda letter: letter.dead_letter_reason in ("reason-1", "reason-4"), timeout=harness.patience
        )
        assert (result.matched, result.moved) == (2, 2)
        assert sorted(bodies(await harness.take(place, 2))) == [b"1", b"4"]
        assert sorted(bodies(await harness.dead(place, 4))) == [b"0", b"2", b"3", b"5"]

    async def test_redrive_up_to_a_limit(self, harness: Harness) -> None:
        """[C16] With a filter the limit counts what matches."""
        place, _ = await self.fill(harness, 6)
        letters = place.client.dead_letters(place.queue)
        result = await letters.redrive(limit=2, timeout=harness.patience)
        assert result.moved == 2
        result = await letters.redrive(where=lambda letter: True, limit=3, timeout=harness.patience)
        assert result.moved == 3
        assert await letters.count() == 1
        await harness.take(place, 5)
        assert len(await harness.dead(place, 1)) == 1

    async def test_redrive_at_a_rate(self, harness: Harness) -> None:
        """[C16] Four at one a second take three seconds at least."""
        place, _ = await self.fill(harness, 4)
        letters = place.client.dead_letters(place.queue)
        task = asyncio.create_task(letters.redrive(rate=1.0, timeout=harness.patience))
        await harness.pass_time(1.5)
        assert 1 <= (await place.client.counts(place.queue)).active <= 2
        await harness.pass_time(1.0)
        assert not task.done()
        await harness.pass_time(3.0)
        assert (await asyncio.wait_for(task, 5)).moved == 4

    async def test_redrive_without_moving(self, harness: Harness) -> None:
        """[C16] A dry run counts and leaves everything as it was, unlocked."""
        place, _ = await self.fill(harness, 5)
        letters = place.client.dead_letters(place.queue)
        result = await letters.redrive(
            where=lambda letter: letter.body != b"0", limit=3, dry_run=True, timeout=harness.patience
        )
        assert (result.matched, result.moved, result.failed) == (3, 0, 0)
        await harness.nothing_from(place)
        assert len(await harness.dead(place, 5)) == 5

    async def test_redrive_back_into_a_session(self, harness: Harness) -> None:
        """[C16]"""
        place = await harness.open()
        await harness.send(place, b"x", session_id="s")
        session = await harness.session(place, "s")
        await place.client.dead_letter_message(await harness.take_one(session), "reason")
        (letter,) = await harness.dead(place)
        assert letter.session_id == "s"
        await place.client.abandon_message(letter)
        assert (await place.client.dead_letters(place.queue).redrive(timeout=harness.patience)).moved == 1
        assert (await harness.take_one(session)).body == b"x"
        await session.close()
