"""What a handler may be [C44]: async or plain, of one message or of a batch, with a context or without."""

import asyncio
import functools
import os
import re
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import in_processes
import pytest
from working import QUEUE, messages, running, until

from queue_runtime import (
    Action,
    BatchContext,
    Consumer,
    ConsumerConfig,
    ConsumerObserver,
    InMemoryConfig,
    InvalidReceiptError,
    ManualClock,
    Message,
    MessageContext,
    QueueClient,
    ReceivedMessage,
    RejectMessage,
    ValidationError,
)
from queue_runtime.clock import settle_tasks
from queue_runtime.errors import ConfigurationError
from queue_runtime.retry import FixedRetry


@pytest.fixture(params=["auto", "batched"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[QueueClient]:
    """Settled at once, and through the batches."""
    config = InMemoryConfig(settlement=request.param, settle_interval=0.001, max_concurrency=8, prefetch=50)
    async with QueueClient(config) as client:
        yield client


async def dead_reasons(client: QueueClient) -> dict[bytes, str | None]:
    return {dead.body: dead.dead_letter_reason for dead in await client.dead_letters(QUEUE).peek_messages(100)}


async def test_the_context_decides(client: QueueClient) -> None:
    """Each decision is settled when the handler has returned; the last one counts."""
    attempts: dict[bytes, list[int]] = {}

    async def handle(message: ReceivedMessage, context: MessageContext) -> None:
        assert context.message is message
        attempts.setdefault(message.body, []).append(context.attempt)
        match message.body:
            case b"0":
                context.dead_letter("Malformed", "no id")
            case b"1" if context.attempt == 1:
                context.abandon()
            case b"2":
                context.defer()
            case b"3":
                context.dead_letter("Mistaken")
                context.complete()
            case b"4":
                context.dead_letter("Decided")
                raise RuntimeError("too late to matter")
        assert await context.renew() > message.delivered_at  # type: ignore[operator]  # delivered, not peeked

    await client.send_messages(QUEUE, messages(5))
    consumer = Consumer(client, QUEUE, handle)
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 2 and consumer.stats.dead_lettered == 2)
        await until(lambda: consumer.stats.deferred == 1)
    assert attempts == {b"0": [1], b"1": [1, 2], b"2": [1], b"3": [1], b"4": [1]}
    assert await dead_reasons(client) == {b"0": "Malformed", b"4": "Decided"}
    assert consumer.stats.failed == 1
    (deferred,) = await client.receive_deferred_messages(QUEUE, [3])
    assert deferred.body == b"2"


async def test_the_context_in_a_thread(client: QueueClient) -> None:
    seen: list[Any] = []

    def handle(message: ReceivedMessage, context: MessageContext) -> None:
        seen.append((context.renew_from_thread() > message.delivered_at, context.is_lock_lost))  # type: ignore[operator]
        context.dead_letter("FromThread")

    await client.send_messages(QUEUE, messages(2))
    consumer = Consumer(client, QUEUE, handle)
    async with running(consumer):
        await until(lambda: consumer.stats.dead_lettered == 2)
    assert seen == [(True, False)] * 2


async def test_the_context_has_the_session_and_its_state(client: QueueClient) -> None:
    """[C30]"""

    async def handle(message: ReceivedMessage, context: MessageContext) -> None:
        assert context.session is not None
        count = int(await context.session.get_state() or b"0")
        await context.session.set_state(b"%d" % (count + 1))

    await client.send_messages(QUEUE, messages(5, session_id="s"))
    consumer = Consumer(client, QUEUE, handle)
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 5)
    session = await client.accept_session(QUEUE, "s", 5)
    assert session is not None
    assert await session.get_state() == b"5"


async def test_a_lost_lock_is_told_to_a_plain_handler() -> None:
    """[C21] It cannot be cancelled; it can look."""
    clock = ManualClock()
    started, look = threading.Event(), threading.Event()
    seen: list[Any] = []

    def handle(message: ReceivedMessage, context: MessageContext) -> None:
        started.set()
        look.wait(10)
        seen.append(context.is_lock_lost)
        try:
            context.renew_from_thread()
        except InvalidReceiptError:
            seen.append("invalid")

    config = InMemoryConfig(lock_duration=1, max_lock_renewal=2, max_delivery_count=1)
    async with QueueClient(config, clock=clock) as client:
        await client.send_message(QUEUE, Message(body=b"x"))
        consumer = Consumer(client, QUEUE, handle, ConsumerConfig(max_concurrency=1))
        async with running(consumer):
            await until(started.is_set)
            for _ in range(8):
                await clock.advance(0.5)
            assert consumer.stats.locks_lost == 1
            look.set()
            await until(lambda: len(seen) == 2)
            assert seen == [True, "invalid"]
            await until(lambda: consumer.stats.running == 0)
        assert consumer.stats.completed == consumer.stats.settle_errors == 0


@pytest.mark.parametrize("session_id", [None, "s"])
async def test_a_batch_shares_its_fate_except_for_what_is_decided(client: QueueClient, session_id: str | None) -> None:
    """Messages decided one by one; the rest completes with a return, and fails together."""
    batches: list[list[bytes]] = []

    async def handle(batch: Sequence[ReceivedMessage], context: BatchContext) -> None:
        assert list(context.messages) == list(batch)
        assert {message.session_id for message in batch} == {session_id}
        batches.append([message.body for message in batch])
        for message in batch:
            if message.body == b"3":
                context.of(message).dead_letter("Three")
        assert all(message.body != b"3" for message in context.messages)
        if batch[0].delivery_count == 1:
            raise RuntimeError("all of them again")

    await client.send_messages(QUEUE, messages(10, session_id=session_id))
    config = ConsumerConfig(handler_form="batch", max_concurrency=1, min_batch_size=10, session_batch=10, prefetch=40)
    consumer = Consumer(client, QUEUE, handle, config)
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 9)
    assert batches[0] == [b"%d" % number for number in range(10)], "all that was ready, in one call"
    again = [body for batch in batches[1:] for body in batch]
    assert again == [b"%d" % number for number in range(10) if number != 3]
    assert await dead_reasons(client) == {b"3": "Three"}
    assert consumer.stats.failed == 1, "one call of the handler"
    with pytest.raises(ValidationError, match="message"):
        BatchContext([]).of(await client.receive_message(QUEUE, 0))  # type: ignore[arg-type]


async def test_a_batch_is_settled_in_one_call_for_each_kind(
    client: QueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[C22]"""
    calls: list[tuple[Action, int]] = []
    real = client.settle_many

    async def settle_many(receipts: Any, disposition: Any) -> Any:
        calls.append((disposition.action, len(receipts)))
        return await real(receipts, disposition)

    monkeypatch.setattr(client, "settle_many", settle_many)

    async def handle(batch: Sequence[ReceivedMessage], context: BatchContext) -> None:
        for message in batch[:4]:
            context.of(message).dead_letter("First")

    await client.send_messages(QUEUE, messages(20))
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(handler_form="batch", min_batch_size=20))
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 16)
    assert calls == [(Action.DEAD_LETTER, 4), (Action.COMPLETE, 16)]


async def test_a_batch_waits_to_be_filled() -> None:
    """batch_wait: from the first message on."""
    clock = ManualClock()
    batches: list[int] = []

    async def handle(batch: Sequence[ReceivedMessage]) -> None:
        batches.append(len(batch))

    async with QueueClient("memory://", clock=clock) as client:
        config = ConsumerConfig(handler_form="batch", min_batch_size=10, max_batch_size=10, batch_wait=2.0)
        consumer = Consumer(client, QUEUE, handle, config)
        async with running(consumer):
            for _ in range(3):
                await client.send_message(QUEUE, Message(body=b"x"))
                await clock.advance(0.6)
            assert batches == [], "1.8 s"
            await clock.advance(0.3)
            assert batches == [3]
            await client.send_messages(QUEUE, messages(10))
            await settle_tasks()
            assert batches == [3, 10], "a full one waits for nothing"


@pytest.mark.parametrize("lost", [1, 2])
async def test_a_lost_lock_in_a_batch_cancels_only_with_the_last(client: QueueClient, lost: int) -> None:
    """[C21]"""
    events: list[str] = []
    go = asyncio.Event()

    async def handle(batch: Sequence[ReceivedMessage], context: BatchContext) -> None:
        try:
            await go.wait()
        except asyncio.CancelledError:
            events.append("cancelled")
            raise
        events.append("+".join(str(context.of(message).is_lock_lost) for message in batch))

    await client.send_messages(QUEUE, messages(2))
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(handler_form="batch", min_batch_size=2))
    runner = consumer._runner
    async with running(consumer):
        await until(lambda: consumer.stats.running == 2)
        receipts = list(runner._held)[:lost]
        runner.locks_lost(receipts[0].receiver_id, receipts, None)
        await settle_tasks()
        go.set()
        await until(lambda: consumer.stats.running == 0)
        assert events == (["True+False"] if lost == 1 else ["cancelled"])
    assert consumer.stats.completed == 2 - lost


async def test_plain_batch_handlers_run_in_threads(client: QueueClient) -> None:
    threads: set[int] = set()

    def handle(batch: Sequence[ReceivedMessage]) -> None:
        threads.add(threading.get_ident())

    await client.send_messages(QUEUE, messages(30))
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(handler_form="batch"))
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 30)
    assert threads
    assert threading.get_ident() not in threads


class TestProcesses:
    async def test_computing_leaves_this_process(self, client: QueueClient, tmp_path: Path) -> None:
        path = tmp_path / "squares"
        sent = [Message(body=b"%d" % number, attributes={"path": str(path)}) for number in range(20)]
        sent[3] = Message(body=b"3", attributes={"do": "reject"})
        sent[4] = Message(body=b"4", attributes={"path": str(path), "do": "put off"})
        await client.send_messages(QUEUE, sent)
        config = ConsumerConfig(executor="process", max_concurrency=2)
        consumer = Consumer(client, QUEUE, in_processes.square, config)
        async with running(consumer):
            await until(lambda: consumer.stats.completed == 19)
        written = [line.split() for line in (await asyncio.to_thread(path.read_text)).splitlines()]
        assert sorted(int(square) for _, square in written) == [n * n for n in range(20) if n != 3]
        processes = {int(process) for process, _ in written}
        assert os.getpid() not in processes
        assert len(processes) <= 2
        assert await dead_reasons(client) == {b"3": "Odd"}
        while await asyncio.to_thread(lambda: [process for process in processes if _is_alive(process)]):
            await asyncio.sleep(0.01)

    async def test_a_process_that_dies_fails_its_message_alone(self, client: QueueClient) -> None:
        sent = [Message(body=b"%d" % number, attributes={"do": "die"} if number == 5 else {}) for number in range(12)]
        sent.append(Message(body=b"12", attributes={"do": "fail"}))
        await client.send_messages(QUEUE, sent)
        config = ConsumerConfig(executor="process", max_concurrency=2, retry=FixedRetry(attempts=2))
        consumer = Consumer(client, QUEUE, in_processes.square, config)
        async with running(consumer):
            await until(lambda: consumer.stats.completed == 11 and consumer.stats.dead_lettered == 2)
        assert await dead_reasons(client) == {b"5": "HandlerDiedError", b"12": "ValueError"}
        told = {dead.body: dead.dead_letter_description for dead in await client.dead_letters(QUEUE).peek_messages(9)}
        assert re.fullmatch(
            r"no square of 12\nattempts=2 traceback=[0-9a-f]{12} at in_processes\.py:\d+ in square", told[b"12"] or ""
        ), "where it was raised, in the other process"
        assert consumer.stats.failed == 4

    async def test_what_hangs_is_killed_at_the_end_of_the_drain(self, client: QueueClient) -> None:
        """[C40]"""
        await client.send_message(QUEUE, Message(body=b"0", attributes={"do": "hang"}))
        config = ConsumerConfig(executor="process", max_concurrency=1, drain_timeout=0.2)
        consumer = Consumer(client, QUEUE, in_processes.square, config)
        async with running(consumer):
            await until(lambda: consumer.stats.running == 1)
        counts = await client.counts(QUEUE)
        assert (counts.active, counts.in_flight) == (1, 0)

    def test_what_cannot_go_there_is_refused(self) -> None:
        """[C33]"""

        async def on_loop(message: ReceivedMessage) -> None: ...

        def with_context(message: ReceivedMessage, context: MessageContext) -> None: ...

        config = ConsumerConfig(executor="process")
        for handler, field in ((on_loop, "executor"), (with_context, "handler"), (lambda message: None, "handler")):
            with pytest.raises(ConfigurationError) as caught:
                Consumer(QueueClient(), QUEUE, handler, config)
            assert caught.value.field == field


def _is_alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_parameters_with_defaults_are_no_context(client: QueueClient) -> None:
    seen: list[Any] = []

    async def handle(message: ReceivedMessage, store: str = "mine", *more: Any, **named: Any) -> None:
        seen.append(store)

    async def of_partial(store: str, message: ReceivedMessage) -> None:
        seen.append(store)

    class Handler:
        async def handle(self, message: ReceivedMessage, context: MessageContext) -> None:
            seen.append(context.attempt)

    for handler in (handle, functools.partial(of_partial, "bound"), Handler().handle):
        await client.send_message(QUEUE, Message(body=b"x"))
        consumer = Consumer(client, QUEUE, handler)
        async with running(consumer):
            await until(lambda: consumer.stats.completed == 1)  # noqa: B023
    assert seen == ["mine", "bound", 1]


@pytest.mark.parametrize(
    "handler",
    [lambda: None, lambda message, context, more: None, lambda message, *, store: None],
    ids=["none", "three", "named"],
)
async def test_other_parameters_are_refused(client: QueueClient, handler: Any) -> None:
    with pytest.raises(ConfigurationError, match="handler"):
        Consumer(client, QUEUE, handler)


async def test_poison_is_told_by_its_cause(client: QueueClient) -> None:
    """[C34] Equal for failures at the same place, different for others; long texts are cut."""

    async def handle(message: ReceivedMessage) -> None:
        if message.body == b"0":
            raise ValueError("x" * 5000)
        if message.body == b"1":
            raise RejectMessage("Kept", "as it is")
        raise ValueError(message.body.decode())

    class Observer(ConsumerObserver):
        failed: list[tuple[bytes, str]] = []  # noqa: RUF012

        def handler_failed(self, message: ReceivedMessage, error: Exception) -> None:
            self.failed.append((message.body, type(error).__name__))

    await client.send_messages(QUEUE, messages(4))
    config = ConsumerConfig(retry=FixedRetry(attempts=1))
    consumer = Consumer(client, QUEUE, handle, config, observer=Observer())
    async with running(consumer):
        await until(lambda: consumer.stats.dead_lettered == 4)
    found = {dead.body: dead.dead_letter_description or "" for dead in await client.dead_letters(QUEUE).peek_messages()}
    digests = {body: text.partition("traceback=")[2][:12] for body, text in found.items()}
    assert digests[b"2"] == digests[b"3"] != digests[b"0"]
    assert found[b"1"] == "as it is"
    assert len(found[b"0"]) < 2200
    assert sorted(Observer.failed) == [(b"0", "ValueError"), (b"2", "ValueError"), (b"3", "ValueError")]
