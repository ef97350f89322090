"""A consumer over a provider that can do little, whose every call is a round trip of 2 ms."""

import asyncio
from collections import defaultdict

import pytest

from queue_runtime.client import QueueClient
from queue_runtime.consumer import Consumer
from queue_runtime.errors import CapabilityError
from queue_runtime.handling import ConsumerConfig, RejectMessage, RetryMessage
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.retry import FixedRetry
from remote.config import REMOVABLE
from remote.running import RunningBroker


@pytest.mark.parametrize("without", [(), REMOVABLE[1:], REMOVABLE], ids=["full", "weak", "no sessions"])
async def test_failures_are_worked_off_in_order(broker: RunningBroker, without: tuple[str, ...]) -> None:
    """[C24, C34] Retries after a pause, rejections, poison: by capabilities, the same everywhere."""
    await broker.in_thread("ask", "latency", seconds=0.002)
    config = broker.config(without=without, max_delivery_count=20, settle_interval=0.001)
    done: dict[str | None, list[int]] = defaultdict(list)
    attempts: dict[tuple[str | None, int], int] = defaultdict(int)

    async def handle(message: ReceivedMessage) -> None:
        number = int(message.body)
        attempts[message.session_id, number] += 1
        if number == 3 and message.delivery_count == 1:
            raise RetryMessage(0.02)
        if number == 5:
            raise RejectMessage("five", "whatever it holds")
        if number == 7:
            raise ValueError("seven")
        done[message.session_id].append(number)

    names = [None] if "sessions" in without else [None, "a", "b", "c"]
    settings = ConsumerConfig(retry=FixedRetry(delay=0.02, attempts=3), session_idle=0.0)
    async with QueueClient(config) as client:
        await client.send_messages("q", [Message(body=b"%d" % n, session_id=name) for n in range(12) for name in names])
        consumer = Consumer(client, "q", handle, settings)
        task = asyncio.create_task(consumer.run())
        async with asyncio.timeout(20):
            while sum(map(len, done.values())) < 10 * len(names) or (await client.counts("q")).in_flight:
                await asyncio.sleep(0.01)
            while (await client.counts("q")).dead_lettered < 2 * len(names):
                await asyncio.sleep(0.01)
        consumer.stop()
        await task
        good = [number for number in range(12) if number not in (5, 7)]
        assert sorted(done.pop(None)) == good
        assert all(numbers == good for numbers in done.values())
        assert all(attempts[name, 7] == 3 and attempts[name, 3] == 2 and attempts[name, 5] == 1 for name in names)
        letters = await client.dead_letters("q").receive_messages(100, 1)
        assert {(letter.dead_letter_reason, letter.body) for letter in letters} == {
            ("five", b"5"),
            ("ValueError", b"7"),
        }
        if "sessions" in without:
            with pytest.raises(CapabilityError, match="sessions"):
                await client.send_message("q", Message(body=b"x", session_id="a"))
