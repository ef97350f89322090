"""Whatever handlers and the provider do, and however a run ends: nothing lost, nothing twice, nothing left behind."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from wrapping import wrap

from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.config import InMemoryConfig
from queue_runtime.consumer import Consumer
from queue_runtime.errors import QueueRuntimeError, ServiceUnavailableError
from queue_runtime.handling import ConsumerConfig, ConsumerObserver, RejectMessage, RetryMessage
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.providers.base import Action, Disposition
from queue_runtime.retry import FixedRetry, NoRetry

QUEUE = "orders"
SEEDS = 30


class Completions(ConsumerObserver):
    """The numbers of the messages that were completed, by session."""

    def __init__(self) -> None:
        self.numbers: dict[str | None, list[int]] = defaultdict(list)

    def message_settled(
        self, message: ReceivedMessage, disposition: Disposition, error: QueueRuntimeError | None
    ) -> None:
        if error is None and disposition.action is Action.COMPLETE:
            self.numbers[message.session_id].append(int(message.body))


def settings(chance: random.Random) -> tuple[InMemoryConfig, ConsumerConfig]:
    pick = chance.choice
    lock = pick([2.0, 30.0])
    return InMemoryConfig(
        settlement=pick(["auto", "batched"]),
        settle_interval=0.0005,
        retry=NoRetry(),
        lock_duration=lock,
        session_lock_duration=pick([2.0, 30.0]),
        max_lock_renewal=pick([0.0, 5.0, 300.0]),
        max_delivery_count=pick([3, 100]),
        max_concurrency=pick([1, 2, 8]),
        prefetch=pick([2, 3, 50]),
    ), ConsumerConfig(
        max_sessions=pick([1, 2, 100]),
        session_turn=pick([1, 3, 100]),
        drain_timeout=pick([0.0, 5.0]),
        retry=FixedRetry(attempts=pick([2, 50])),
        receive_timeout=pick([0.5, 20.0]),
    )


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_nothing_is_lost_done_twice_or_left_behind(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """[C23] [C24] [C39] [C40]"""
    chance = random.Random(seed)
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
    recorder = wrap(monkeypatch) if chance.random() < 0.5 else None

    def broken(what: Sequence[Any]) -> list[Any]:
        raise chance.choice([ServiceUnavailableError("busy"), ZeroDivisionError("bug")])

    async def handle(message: ReceivedMessage) -> None:
        await settle_tasks(chance.choice([0, 0, 1, 4]))
        kind = chance.random()
        if kind < 0.03:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if chance.random() < 0.5:
                    raise
        elif kind < 0.1:
            raise ValueError("as it happens")
        elif kind < 0.15:
            raise RetryMessage(chance.choice([0, 1, 3]))
        elif kind < 0.17:
            raise RejectMessage("no")
        elif kind < 0.19:
            raise asyncio.CancelledError
        elif kind < 0.25 and recorder is not None:
            recorder.settle_faults.append(broken)

    clock, done = ManualClock(), Completions()
    config, consumer_config = settings(chance)
    async with QueueClient(config, clock=clock) as client:
        count = chance.randrange(5, 60)
        await client.send_messages(
            QUEUE,
            [Message(body=b"%d" % number, session_id=chance.choice([None, "a", "b", "c"])) for number in range(count)],
        )
        consumer = Consumer(client, QUEUE, handle, consumer_config, observer=done)
        task = asyncio.create_task(consumer.run())
        for _ in range(chance.randrange(20)):
            await clock.advance(chance.choice([0.0, 0.1, 1.0, 3.0]))
            await asyncio.sleep(0.0005)  # for the batches, whose clock is the real one
        for end in chance.choice(
            [
                [consumer.stop],
                [consumer.stop_now],
                [task.cancel],
                [task.cancel, task.cancel],
                [consumer.stop, task.cancel],
            ]
        ):
            end()
            await settle_tasks(chance.randrange(6))
        while not task.done():
            await clock.advance(0.5)
            await asyncio.sleep(0.0005)
        assert task.cancelled() or task.exception() is None
        stats, runner = consumer.stats, consumer._runner
        assert stats.waiting == stats.running == stats.sessions_open == 0
        assert runner.room.taken == runner.permits.taken == 0
        assert [*runner._held, *runner._lost, *runner.settling] == []
        for session_id, numbers in done.numbers.items():
            assert len(numbers) == len(set(numbers))
            assert session_id is None or numbers == sorted(numbers)
        counts = await client.counts(QUEUE)
        there = counts.active + counts.in_flight + counts.scheduled + counts.dead_lettered
        assert there + stats.completed == count
        if not (stats.settle_errors or stats.locks_lost):
            assert counts.in_flight == 0
    assert unhandled == []
