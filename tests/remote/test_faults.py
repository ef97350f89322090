"""What a client makes of faults that only a service far away has [C22, C31, C36, C37]."""

import asyncio
from typing import Any

import pytest

from queue_runtime.client import QueueClient
from queue_runtime.errors import (
    ClosedError,
    ConnectionFailedError,
    InvalidReceiptError,
    QueueTimeoutError,
    SessionLockLostError,
    ThrottledError,
)
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.retry import FixedRetry
from remote.running import RunningBroker


class Place:
    """A client over a space of its own, and faults for it alone."""

    def __init__(self, broker: RunningBroker, **settings: Any) -> None:
        settings.setdefault("retry", FixedRetry(delay=0.01, attempts=10))
        self.config = broker.config(settle_interval=0.001, **settings)
        self.client = QueueClient(self.config)
        self.broker = broker

    async def ask(self, fault: str, **options: Any) -> Any:
        return await self.broker.in_thread("ask", fault, **options)

    async def drop(self) -> None:
        assert await self.ask("drop", space=self.config.space) == 1

    async def send(self, count: int, **fields: Any) -> list[ReceivedMessage]:
        """Send, and receive."""
        await self.client.send_messages("q", [Message(body=b"%d" % number, **fields) for number in range(count)])
        if fields:
            return []
        received = await self.client.receive_messages("q", count, 2)
        assert len(received) == count
        return received

    async def counts(self) -> tuple[int, int, int]:
        counts = await self.client.counts("q")
        return counts.active, counts.in_flight, counts.dead_lettered

    async def statistics(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = await self.ask("statistics", space=self.config.space)
        return found


async def test_what_was_received_before_the_connection_was_lost(broker: RunningBroker) -> None:
    """[C37] Its receipts are void, and the message is there again, for the same client."""
    place = Place(broker)
    async with place.client as client:
        (message,) = await place.send(1)
        await place.drop()
        with pytest.raises(InvalidReceiptError) as caught:
            await client.complete_message(message)
        assert caught.value.receipt == message.receipt
        again = await client.receive_message("q", 2)
        assert again is not None
        assert (again.body, again.delivery_count) == (message.body, 2)
        await client.complete_message(again)
        assert await place.counts() == (0, 0, 0)


async def test_locks_that_outlive_their_connection(broker: RunningBroker) -> None:
    """[C37] As SQS's and Service Bus's do: settling goes on after the loss, of sessions too."""
    place = Place(broker, linger=30.0)
    async with place.client as client:
        received = await place.send(20)
        await client.send_message("q", Message(body=b"x", session_id="s"))
        session = await client.accept_session("q", None, 2)
        assert session is not None
        (ordered,) = await session.receive_messages(1, 2)
        tasks = [asyncio.create_task(client.complete_message(message)) for message in received]
        await place.drop()
        await asyncio.gather(*tasks)
        await client.complete_message(ordered)
        assert await session.receive_message(0) is None
        assert await place.counts() == (0, 0, 0)


async def test_those_who_wait_are_told_of_the_loss(broker: RunningBroker) -> None:
    """[C31] By a passing error; the next call has a connection again."""
    place = Place(broker, receivers="reopen", retry=FixedRetry(attempts=1))
    async with place.client as client:
        session = await client.accept_session("q", "s", 0)
        assert session is not None
        await client.receive_message("q", 0)
        waiting: list[asyncio.Task[Any]] = [
            asyncio.create_task(client.receive_message("q", 30)),
            asyncio.create_task(client.accept_session("q", None, 30)),
            asyncio.create_task(session.receive_message(30)),
        ]
        await client.counts("q")
        await place.drop()
        for task in waiting:
            with pytest.raises(ConnectionFailedError) as caught:
                await asyncio.wait_for(task, 5)
            assert caught.value.is_transient
        with pytest.raises(SessionLockLostError):
            await session.receive_message(0)
        await session.close()
        await client.send_message("q", Message(body=b"x"))
        assert await client.receive_message("q", 2) is not None


@pytest.mark.parametrize("seed", range(3))
async def test_any_call_on_a_connection_that_breaks_all_the_time(broker: RunningBroker, seed: int) -> None:
    """[C34, C37] Before a request, after it, in the middle of an answer: sends and settlements come through."""
    place = Place(broker, linger=30.0)
    async with place.client as client:
        sent = set()
        await place.ask("drop_share", share=0.2, seed=seed)
        for number in range(40):
            sent.add(await client.send_message("q", Message(body=b"%d" % number)))
        await client.counts("q")
        await place.ask("reset")
        there = (await client.counts("q")).active
        assert 40 <= there < 80, "a send whose answer was lost is sent again"
        received: list[ReceivedMessage] = []
        while len(received) < there:
            received += await client.receive_messages("q", 100, 2)
        assert {message.message_id for message in received} == sent
        await place.ask("drop_share", share=0.2, seed=seed)
        outcomes = await asyncio.gather(*map(client.complete_message, received), return_exceptions=True)
        await place.ask("reset")
        assert all(outcome is None or isinstance(outcome, InvalidReceiptError) for outcome in outcomes)
        assert await place.counts() == (0, 0, 0), "one that says it is void was carried out when its answer was lost"


async def test_some_of_a_batch_are_refused(broker: RunningBroker) -> None:
    """[C22] Only those are settled again, as often as it takes."""
    place = Place(broker)
    async with place.client as client:
        received = await place.send(300)
        await place.ask("refuse_every", number=3)
        await client.complete_messages(received)
        await place.ask("reset")
        assert await place.counts() == (0, 0, 0)
        calls, messages = (await place.statistics())["settle"]
        assert 400 <= messages <= 500, "300, and a third of them, and a third of those ..."
        assert calls <= 20


async def test_renewals_travel_in_batches_and_survive_refusals(broker: RunningBroker) -> None:
    """[C21] On the real clock: a hundred locks of 0.4 s live for two seconds, some renewals refused."""
    place = Place(broker, lock_duration=0.4, linger=30.0)
    async with place.client as client:
        received = await place.send(100)
        await place.ask("refuse_every", number=10)
        assert await client.receive_message("q", 2.0) is None
        await place.ask("reset")
        calls, messages = (await place.statistics())["renew"]
        assert messages >= 400
        assert calls <= messages / 20
        await client.complete_messages(received)
        assert await place.counts() == (0, 0, 0)


async def test_a_lock_that_was_stolen(broker: RunningBroker) -> None:
    """[C11, C13] Its holder is told when it settles, and by the renewal."""
    place = Place(broker, lock_duration=0.2)
    lost: list[Any] = []
    async with place.client as client:
        client.on_locks_lost(lambda *what: lost.append(what))
        await place.ask("steal", count=1)
        (message,) = await place.send(1)
        again = await client.receive_message("q", 2)
        assert again is not None
        assert again.delivery_count == 2
        while not lost:
            await asyncio.sleep(0.01)
        assert lost[0][1] == [message.receipt]
        with pytest.raises(InvalidReceiptError):
            await client.complete_message(message)
        await client.complete_message(again)


async def test_a_session_that_was_stolen(broker: RunningBroker) -> None:
    """[C27] By every call, also while it waits."""
    place = Place(broker)
    async with place.client as client:
        await place.send(2, session_id="stolen")
        session = await client.accept_session("q", None, 2)
        assert session is not None
        (message,) = await session.receive_messages(1, 2)
        await client.complete_message((await session.receive_messages(1, 2))[0])
        waiting = asyncio.create_task(session.receive_message(30))
        await client.counts("q")
        assert await place.ask("steal_session", session_id="stolen") == 1
        for call in (
            asyncio.wait_for(waiting, 5),
            client.complete_message(message),
            session.renew_lock(),
            session.get_state(),
            session.receive_message(0),
        ):
            with pytest.raises(SessionLockLostError):
                await call
        await session.close()
        again = await client.accept_session("q", None, 2)
        assert again is not None
        assert [message.body for message in await again.receive_messages(9, 2)] == [b"0"]


async def test_throttling(broker: RunningBroker) -> None:
    """[C36] What the service asks for is waited, and no more is needed; a fetch is told."""
    place = Place(broker)
    async with place.client as client:
        for method in ("send", "open", "counts"):
            await place.ask("throttle", method=method, count=2, retry_after=0.02)
        (message,) = await place.send(1)
        await place.ask("throttle", method="settle", count=2, retry_after=0.02)
        await client.complete_message(message)
        assert await place.counts() == (0, 0, 0)
        await place.ask("throttle", method="receive", count=1, retry_after=0.02)
        with pytest.raises(ThrottledError) as caught:
            await client.receive_message("q", 0)
        assert caught.value.retry_after == 0.02


async def test_no_answer(broker: RunningBroker) -> None:
    """[C38] It has taken effect or not: who asks again finds out."""
    place = Place(broker, request_timeout=0.2, retry=FixedRetry(attempts=1))
    async with place.client as client:
        first, second = await place.send(2)
        await place.ask("mute", method="settle", count=1)
        with pytest.raises(QueueTimeoutError):
            await client.complete_message(first)
        with pytest.raises(InvalidReceiptError):
            await client.complete_message(first)
        await client.complete_message(second)
        await place.ask("mute", method="receive", count=1)
        with pytest.raises(QueueTimeoutError):
            await client.receive_message("q", 0)
        assert await place.counts() == (0, 0, 0)


async def test_a_broker_that_went_away(mortal_broker: RunningBroker) -> None:
    """[C37, C38] Every call fails soon with a passing error, close included, until it is back."""
    place = Place(mortal_broker, retry=FixedRetry(delay=0.01, attempts=2))
    async with place.client as client, QueueClient(place.config) as other:
        (message,) = await place.send(1)
        await other.counts("q")
        await mortal_broker.in_thread("kill")
        for call in (
            client.send_message("q", Message(body=b"x")),
            client.receive_message("q", 1),
            client.accept_session("q", None, 1),
            client.counts("q"),
            client.complete_message(message),
            client.renew_lock(message),
        ):
            with pytest.raises(ConnectionFailedError):
                await asyncio.wait_for(call, 5)
        await asyncio.wait_for(other.close(), 5)
        with pytest.raises(ClosedError):
            await other.counts("q")
        await mortal_broker.in_thread("start")
        await client.send_message("q", Message(body=b"y"))
        received = await client.receive_message("q", 2)
        assert received is not None
        with pytest.raises(InvalidReceiptError):
            await client.complete_message(message)
        await client.complete_message(received)
        assert await place.counts() == (0, 0, 0)


async def test_a_sender_s_patience_lasts_until_the_broker_is_back(mortal_broker: RunningBroker) -> None:
    """[C34, C37]"""
    place = Place(mortal_broker, retry=FixedRetry(delay=0.05, attempts=100))
    async with place.client as client:
        await client.counts("q")
        await mortal_broker.in_thread("kill")
        tasks = [asyncio.create_task(client.send_message("q", Message(body=b"x"))) for _ in range(20)]
        await mortal_broker.in_thread("start")
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert await place.counts() == (20, 0, 0)
