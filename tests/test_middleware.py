"""Hooks around receive, handle and settle [C44]."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from working import QUEUE, messages, running, until

from queue_runtime import (
    Action,
    Consumer,
    ConsumerConfig,
    InMemoryConfig,
    Message,
    Middleware,
    QueueClient,
    ReceivedMessage,
    ServiceUnavailableError,
)
from queue_runtime.errors import ConfigurationError
from queue_runtime.middleware import Fetch, Next, Settle
from queue_runtime.providers.base import COMPLETE, Disposition, Outcome


@pytest.fixture(params=["auto", "batched"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[QueueClient]:
    config = InMemoryConfig(settlement=request.param, settle_interval=0.001, max_concurrency=8, prefetch=50)
    async with QueueClient(config) as client:
        yield client


class Logbook(Middleware):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    async def receive(self, fetch: Fetch) -> list[ReceivedMessage]:
        got = await fetch()
        if got:
            self.log.append(f"{self.name} receive {len(got)}")
        return got

    async def handle(self, context: Any, call_next: Next) -> None:
        self.log.append(f"{self.name} handle {len(context.messages)}")
        await call_next()
        self.log.append(f"{self.name} handled")

    async def settle(self, message: ReceivedMessage, disposition: Disposition, call_next: Settle) -> Outcome:
        self.log.append(f"{self.name} settle {disposition.action.value}")
        outcome = await call_next(disposition)
        self.log.append(f"{self.name} settled {outcome}")
        return outcome


@pytest.mark.parametrize("form", ["one", "batch"])
@pytest.mark.parametrize("session_id", [None, "s"])
async def test_the_first_is_the_outermost(client: QueueClient, form: Any, session_id: str | None) -> None:
    log: list[str] = []

    async def handle(argument: Any) -> None:
        log.append("handler")

    await client.send_message(QUEUE, Message(body=b"x", session_id=session_id))
    middleware = [Logbook("outer", log), Logbook("inner", log)]
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(middleware=middleware, handler_form=form))
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 1)
    assert log == [
        "inner receive 1",
        "outer receive 1",
        "outer handle 1",
        "inner handle 1",
        "handler",
        "inner handled",
        "outer handled",
        "outer settle complete",
        "inner settle complete",
        "inner settled None",
        "outer settled None",
    ]


async def test_a_hook_around_the_handler_may_decide_and_leave_it_out(client: QueueClient) -> None:
    class Even(Middleware):
        async def handle(self, context: Any, call_next: Next) -> None:
            for message in list(context.messages):
                if int(message.body) % 2:
                    context.of(message).dead_letter("Odd")
            await call_next()

    seen: list[bytes] = []

    async def handle(batch: Sequence[ReceivedMessage]) -> None:
        seen.extend(message.body for message in batch)

    await client.send_messages(QUEUE, messages(10))
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(middleware=[Even()], handler_form="batch"))
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 5 and consumer.stats.dead_lettered == 5)
    assert sorted(seen) == [b"0", b"2", b"4", b"6", b"8"]


async def test_what_a_hook_around_the_handler_raises_is_a_failure_of_the_handler(client: QueueClient) -> None:
    class Once(Middleware):
        async def handle(self, context: Any, call_next: Next) -> None:
            if context.attempt == 1:
                raise ValueError("not yet")
            await call_next()

    async def handle(message: ReceivedMessage) -> None: ...

    await client.send_messages(QUEUE, messages(3))
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(middleware=[Once()]))
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 3)
    assert consumer.stats.failed == consumer.stats.abandoned == 3


async def test_what_a_hook_around_receive_leaves_out_comes_back(client: QueueClient) -> None:
    """[C39] Also when it fails, and when it is cancelled after the messages came: none stays locked."""

    class Dropper(Middleware):
        calls = 0

        async def receive(self, fetch: Fetch) -> list[ReceivedMessage]:
            got = await fetch()
            if not got:
                return got
            self.calls += 1
            if self.calls == 1:
                return got[1:]
            if self.calls == 2:
                raise ServiceUnavailableError("later")
            if self.calls == 3:
                stuck.set()
                await asyncio.Event().wait()
            return got

    stuck = asyncio.Event()
    done: list[bytes] = []

    async def handle(message: ReceivedMessage) -> None:
        done.append(message.body)

    await client.send_messages(QUEUE, messages(6))
    config = ConsumerConfig(middleware=[Dropper()], min_batch_size=3, source="queue")
    consumer = Consumer(client, QUEUE, handle, config)
    async with running(consumer):
        await asyncio.wait_for(stuck.wait(), 10)
    counts = await client.counts(QUEUE)
    assert counts.in_flight == 0
    assert counts.active + consumer.stats.completed == 6
    assert consumer._runner.room.taken == consumer._runner.bytes.held == 0


async def test_a_hook_around_settle_may_change_it_and_may_break(client: QueueClient) -> None:
    class Changed(Middleware):
        async def settle(self, message: ReceivedMessage, disposition: Disposition, call_next: Settle) -> Outcome:
            if message.body == b"0":
                return await call_next(Disposition.dead_letter("Changed"))
            if message.body == b"1":
                raise RuntimeError("a bug")
            assert disposition is COMPLETE
            return await call_next(disposition)

    async def handle(message: ReceivedMessage) -> None: ...

    await client.send_messages(QUEUE, messages(3))
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(middleware=[Changed()]))
    async with running(consumer):
        await until(lambda: consumer.stats.completed + consumer.stats.dead_lettered + consumer.stats.settle_errors == 3)
    assert (consumer.stats.completed, consumer.stats.dead_lettered, consumer.stats.settle_errors) == (1, 1, 1)
    assert (await client.counts(QUEUE)).in_flight == 1, "it comes back when its lock ends"


def test_only_middleware_is_middleware() -> None:
    """[C33]"""
    for wrong in ("hooks", [print], [Middleware], Middleware()):
        with pytest.raises(ConfigurationError, match="middleware"):
            ConsumerConfig(middleware=wrong)  # type: ignore[arg-type]


async def test_a_hook_that_is_not_overridden_costs_nothing(client: QueueClient) -> None:
    class Nothing(Middleware):
        pass

    consumer = Consumer(client, QUEUE, print, ConsumerConfig(middleware=[Nothing()]))
    chain = consumer._runner.chain
    assert chain.receive is chain.handle is chain.settle is None
    assert Action.COMPLETE is COMPLETE.action
