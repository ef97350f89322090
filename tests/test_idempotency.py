"""Skipping what was done: the stores against a twin, and the middleware over real deliveries."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from wrapping import fail, wrap

from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.config import InMemoryConfig
from queue_runtime.consumer import Consumer
from queue_runtime.context import BatchContext, HandlerContext, MessageContext
from queue_runtime.errors import ConfigurationError, ConnectionFailedError, ServiceUnavailableError, ValidationError
from queue_runtime.handling import ConsumerConfig
from queue_runtime.idempotency import IdempotencyStore, MemoryIdempotencyStore, SkipDone
from queue_runtime.idempotency_sqlite import SQLiteIdempotencyStore
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.middleware import Chain
from queue_runtime.providers.base import Action
from queue_runtime.retry import FixedRetry

QUEUE = "orders"


# The stores.

Maker = Callable[[Path, ManualClock, float], IdempotencyStore]
MAKERS: dict[str, Maker] = {
    "memory": lambda directory, clock, window: MemoryIdempotencyStore(window=window, clock=clock),
    "sqlite": lambda directory, clock, window: SQLiteIdempotencyStore(directory / "done.db", window, clock=clock),
}
ODD_KEYS = ["", "a\0b", "a\0c", "\ud800", "\ud801", "é", "e\u0301", "ü" * 1000, "'; DROP TABLE x", "😀"]


@pytest.mark.parametrize("kind", MAKERS)
async def test_what_is_marked_is_done(kind: str, tmp_path: Path) -> None:
    """For a window after the last mark; any text is a key, and no other one."""
    clock = ManualClock()
    store = MAKERS[kind](tmp_path, clock, 10.0)
    assert await store.done(["a"]) == set()
    await store.mark(ODD_KEYS[::2])
    assert await store.done(ODD_KEYS) == set(ODD_KEYS[::2])
    assert await store.done([]) == set()
    await store.mark([])
    await clock.advance(6)
    await store.mark([ODD_KEYS[0]])
    await clock.advance(6)
    assert await store.done(ODD_KEYS) == {ODD_KEYS[0]}
    await clock.advance(3.5)
    assert await store.done(ODD_KEYS) == {ODD_KEYS[0]}
    await clock.advance(0.5)
    assert await store.done(ODD_KEYS) == set()
    await store.close()
    await store.close()


@pytest.mark.parametrize("kind", MAKERS)
async def test_many_keys_in_one_call(kind: str, tmp_path: Path) -> None:
    """More than one SELECT takes."""
    store = MAKERS[kind](tmp_path, ManualClock(), 10.0)
    keys = [str(number) for number in range(3000)]
    await store.mark(keys[::3])
    for count in (1, 2, 3, 511, 512, 513, 1024, 1025, 3000):
        assert await store.done(keys[:count]) == set(keys[:count:3])
    await store.close()


STARTS = itertools.count(1_000_000.0, 1_000_000.0)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("mark"), st.lists(st.sampled_from("abcdef"), max_size=4)),
        st.tuples(st.just("done"), st.lists(st.sampled_from("abcdef"), max_size=6)),
        st.tuples(st.just("wait"), st.sampled_from([1.0, 4.0, 5.0, 11.0])),
    ),
    max_size=20,
)


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
async def test_any_course_of_marks(kind: str, tmp_path: Path, steps: list[Any]) -> None:
    """Against a twin that keeps every mark ever made."""
    clock = ManualClock(start=next(STARTS))  # in one file: what the last example marked is long over
    store = MAKERS[kind](tmp_path, clock, 10.0)
    marks: list[tuple[float, str]] = []
    try:
        for what, argument in steps:
            now = clock.monotonic()
            if what == "wait":
                clock._now += argument
            elif what == "mark":
                await store.mark(argument)
                marks += [(now, key) for key in argument]
            else:
                assert await store.done(argument) == {
                    key for key in argument if any(key == marked and now < at + 10.0 for at, marked in marks)
                }
    finally:
        await store.close()


async def test_memory_is_bounded() -> None:
    """[C39] The one marked longest ago is forgotten first; what is too old goes with later marks."""
    clock = ManualClock()
    store = MemoryIdempotencyStore(capacity=3, window=10, clock=clock)
    await store.mark(["a", "b", "c"])
    await store.mark(["a"])
    await store.mark(["d"])
    assert await store.done("abcd") == {"a", "c", "d"}
    for number in range(1000):
        await store.mark([str(number), str(number + 1)])
        assert len(store) == 3
    await clock.advance(10)
    await store.mark(["z"])
    assert len(store) == 1
    await store.close()
    assert len(store) == 0


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: MemoryIdempotencyStore(capacity=0), "capacity"),
        (lambda: MemoryIdempotencyStore(capacity=1.5), "capacity"),  # type: ignore[arg-type]
        (lambda: MemoryIdempotencyStore(window=0), "window"),
        (lambda: MemoryIdempotencyStore(window=timedelta(seconds=-1)), "window"),
        (lambda: SQLiteIdempotencyStore("x", window=float("nan")), "window"),
        (lambda: SQLiteIdempotencyStore("x", window=True), "window"),
        (lambda: SQLiteIdempotencyStore("x", durability="maybe"), "durability"),  # type: ignore[arg-type]
        (lambda: SQLiteIdempotencyStore(""), "path"),
        (lambda: SQLiteIdempotencyStore(":memory:"), "path"),
        (lambda: SQLiteIdempotencyStore(None), "path"),  # type: ignore[arg-type]
        (lambda: SQLiteIdempotencyStore(b"x"), "path"),  # type: ignore[arg-type]
        (lambda: SkipDone(None), "store"),  # type: ignore[arg-type]
        (lambda: SkipDone(MemoryIdempotencyStore(), key="id"), "key"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_setting_is_refused_by_name(make: Callable[[], object], field: str) -> None:
    """[C33]"""
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert caught.value.field == field


# The middleware.

Handler = Callable[[HandlerContext], Awaitable[None]]


@pytest.fixture
async def client() -> AsyncIterator[QueueClient]:
    async with QueueClient(InMemoryConfig(max_delivery_count=100), clock=ManualClock()) as client:
        yield client


class Work:
    """Deliveries handled as a consumer does it: the chain around a handler, then the settlement it came to."""

    def __init__(self, client: QueueClient, skip: SkipDone) -> None:
        self.client = client
        self.chain = Chain([skip])
        self.handled: list[bytes] = []
        self.fate: Callable[[ReceivedMessage, MessageContext], object] = lambda message, context: None
        """What the handler does with a message: returns, raises, or decides through the context."""
        self.gate: asyncio.Event | None = None

    async def send(self, *bodies: str, queue: str = QUEUE) -> None:
        """The body is the message's id, so that sending twice gives a duplicate."""
        for body in bodies:
            await self.client.send_message(queue, Message(body=body.encode(), message_id=body))

    async def receive(self, count: int = 100, queue: str = QUEUE) -> list[ReceivedMessage]:
        return await self.client.receive_messages(queue, count, 0)

    async def run(self, messages: Sequence[ReceivedMessage], *, batch: bool = False) -> list[Action | None]:
        """Handle them all; return what became of each: None is a failure of the handler, to be abandoned."""
        contexts = [MessageContext(self.client, message, set()) for message in messages]
        handled: list[HandlerContext] = [BatchContext(contexts)] if batch else [*contexts]
        await asyncio.gather(*(self._handle(context) for context in handled))
        for context in contexts:
            await self.client.settle(context.message.receipt, context.decision)  # type: ignore[arg-type]
        return self.last

    async def _handle(self, context: HandlerContext) -> None:
        contexts = list(context) if isinstance(context, BatchContext) else [context]
        assert self.chain.handle is not None

        async def handler() -> None:
            assert context.messages, "called for nothing"
            for message in context.messages:
                self.handled.append(message.body)
                if self.gate is not None:
                    await self.gate.wait()
                self.fate(message, context.of(message))

        failed = False
        try:
            await self.chain.handle(context, handler)()
        except ZeroDivisionError:
            failed = True
        self.last = [
            one.decision.action if one.decision is not None else None if failed else Action.COMPLETE for one in contexts
        ]
        for one in contexts:
            if one.decision is None:
                one.abandon() if failed else one.complete()


@pytest.fixture
def store() -> MemoryIdempotencyStore:
    return MemoryIdempotencyStore()


@pytest.fixture
def skip(store: MemoryIdempotencyStore) -> SkipDone:
    return SkipDone(store)


@pytest.fixture
def work(client: QueueClient, skip: SkipDone) -> Work:
    return Work(client, skip)


def boom(*arguments: Any) -> None:
    raise ZeroDivisionError


FORMS = pytest.mark.parametrize("batch", [False, True], ids=["one by one", "batch"])


@FORMS
async def test_a_message_is_handled_once(work: Work, skip: SkipDone, batch: bool) -> None:
    """However often it comes; a skipped one is completed."""
    for _ in range(3):
        await work.send("a", "b")
        await work.run(await work.receive(), batch=batch)
    assert work.handled == [b"a", b"b"]
    assert skip.skipped == 4
    assert (await work.client.counts(QUEUE)).active == 0


@FORMS
async def test_a_failure_is_not_done(work: Work, skip: SkipDone, batch: bool) -> None:
    await work.send("a")
    work.fate = boom
    for _ in range(2):
        assert await work.run(await work.receive(), batch=batch) == [None]
    work.fate = lambda message, context: None
    assert await work.run(await work.receive(), batch=batch) == [Action.COMPLETE]
    assert work.handled == [b"a"] * 3
    assert skip.skipped == 0


@FORMS
@pytest.mark.parametrize("decision", ["abandon", "dead_letter", "defer"])
async def test_what_is_not_completed_is_not_done(
    work: Work, store: MemoryIdempotencyStore, batch: bool, decision: str
) -> None:
    """It will be handled again, by someone."""
    await work.send("a")
    arguments = ("reason",) if decision == "dead_letter" else ()
    work.fate = lambda message, context: getattr(context, decision)(*arguments)
    await work.run(await work.receive(), batch=batch)
    assert len(store) == 0


@FORMS
async def test_what_was_completed_before_a_failure_is_done(work: Work, batch: bool) -> None:
    """The decision holds although the handler raises, so the mark does."""

    def fate(message: ReceivedMessage, context: MessageContext) -> None:
        if message.body == b"c":
            raise ZeroDivisionError
        if message.body == b"a":
            context.complete()
            if not batch:
                raise ZeroDivisionError

    work.fate = fate
    await work.send("a", "b", "c")
    await work.run(await work.receive(), batch=batch)
    work.handled.clear()
    await work.send("a")
    work.fate = lambda message, context: None
    await work.run(await work.receive(), batch=batch)
    assert work.handled == ([b"b", b"c"] if batch else [b"c"])


async def test_a_batch_gets_only_what_is_not_done(work: Work, skip: SkipDone) -> None:
    await work.send("a", "c")
    await work.run(await work.receive(), batch=True)
    work.handled.clear()
    await work.send("a", "b", "c", "d", "a")
    assert await work.run(await work.receive(), batch=True) == [Action.COMPLETE] * 5
    assert work.handled == [b"b", b"d"]
    assert skip.skipped == 3


@pytest.mark.parametrize("fails", [False, True])
async def test_twins_in_one_batch(work: Work, fails: bool) -> None:
    """The first one decides: its twins are skipped when it is done, and come back when it is not."""
    await work.send("a", "b", "a", "a")
    if fails:
        work.fate = lambda message, context: context.abandon() if message.body == b"a" else None
    outcome = await work.run(await work.receive(), batch=True)
    assert work.handled == [b"a", b"b"]
    expected = Action.ABANDON if fails else Action.COMPLETE
    assert outcome == [expected, Action.COMPLETE, expected, expected]
    assert (await work.client.counts(QUEUE)).active == (3 if fails else 0)


@FORMS
async def test_a_second_delivery_waits_for_the_first(work: Work, skip: SkipDone, batch: bool) -> None:
    """In one process, at the same time: after a lock that ran out, say. It is skipped, or takes its turn."""
    for fate, handled in ((boom, [b"a"] * 3), (lambda *arguments: None, [b"a"])):
        work.handled.clear()
        work.fate = fate
        work.gate = asyncio.Event()
        await work.send("a", "a", "a")
        messages = await work.receive()
        tasks = [asyncio.create_task(work.run([message], batch=batch)) for message in messages]
        await settle_tasks()
        assert work.handled == [b"a"]
        if fate is boom:
            tasks[0].cancel()
            await settle_tasks()
            assert work.handled == [b"a"] * 2, "the others still one after the other"
        work.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert work.handled == handled
        assert skip._running == {}
        if fate is boom:
            await work.client.complete_messages([messages[0], *await work.receive()])


async def test_batches_with_the_same_keys_do_not_wait_for_each_other(work: Work) -> None:
    """Crosswise: each would hold what the other one wants."""
    await work.send(*"ab", *"ba", *"cab", *"bca")
    messages = await work.receive()
    parts = [messages[0:2], messages[2:4], messages[4:7], messages[7:10]]
    async with asyncio.timeout(5):
        await asyncio.gather(*(work.run(part, batch=True) for part in parts))
    assert sorted(work.handled) == [b"a", b"b", b"c"]


async def test_a_cancelled_handler_is_not_done_and_lets_others_pass(work: Work, skip: SkipDone) -> None:
    """[C38]"""
    work.gate = asyncio.Event()
    await work.send("a", "a")
    first, second = await work.receive()
    running = asyncio.create_task(work.run([first]))
    await settle_tasks()
    waiting = asyncio.create_task(work.run([second]))
    await settle_tasks()
    assert work.handled == [b"a"]
    running.cancel()
    await asyncio.wait([running])
    await settle_tasks()
    assert work.handled == [b"a", b"a"]
    work.gate.set()
    await waiting
    assert skip._running == {}


async def test_a_cancelled_wait_leaves_the_first_alone(work: Work, skip: SkipDone) -> None:
    work.gate = asyncio.Event()
    await work.send("a", "a")
    first, second = await work.receive()
    running = asyncio.create_task(work.run([first]))
    await settle_tasks()
    waiting = asyncio.create_task(work.run([second]))
    await settle_tasks()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert list(skip._running) == ["orders/a"]
    work.gate.set()
    assert await running == [Action.COMPLETE]
    assert skip._running == {}


async def test_another_queue_s_message_is_another_one(work: Work) -> None:
    """A message that is passed on keeps its id."""
    await work.send("a")
    await work.run(await work.receive())
    await work.send("a", queue="parcels")
    await work.run(await work.receive(queue="parcels"))
    assert work.handled == [b"a", b"a"]


async def test_a_key_of_one_s_own(client: QueueClient, store: MemoryIdempotencyStore) -> None:
    """None is for messages that are handled in any case; a long key is kept as its digest."""
    work = Work(client, SkipDone(store, key=lambda message: message.attributes.get("order")))
    orders = ["7", "7", "x" * 10_000, "x" * 10_000, "x" * 9_999, "\ud800" * 300, None, None]
    for number, order in enumerate(orders):
        attributes = {} if order is None else {"order": str(number) if "\ud800" in order else order}
        await client.send_message(QUEUE, Message(body=b"%d" % number, attributes=attributes))
    for message in await work.receive():
        await work.run([message])
    assert work.handled == [b"0", b"2", b"4", b"5", b"6", b"7"]
    assert max(map(len, store._until)) <= 256


@pytest.mark.parametrize("key", [5, b"x", ""], ids=repr)
async def test_a_bad_key_fails_the_message(client: QueueClient, store: MemoryIdempotencyStore, key: Any) -> None:
    work = Work(client, SkipDone(store, key=lambda message: key))
    await work.send("a")
    with pytest.raises(ValidationError, match="key"):
        await work.run(await work.receive())
    assert work.handled == []


class Faulty(MemoryIdempotencyStore):
    fail_done = fail_mark = False

    async def done(self, keys: Sequence[str]) -> set[str]:
        if self.fail_done:
            raise ServiceUnavailableError("done")
        return await super().done(keys)

    async def mark(self, keys: Sequence[str]) -> None:
        if self.fail_mark:
            raise ServiceUnavailableError("mark")
        await super().mark(keys)


@FORMS
async def test_a_store_that_cannot_be_asked_fails_the_delivery(client: QueueClient, batch: bool) -> None:
    """Handled unasked, its effect could be repeated."""
    store = Faulty()
    store.fail_done = True
    work = Work(client, SkipDone(store))
    await work.send("a")
    messages = await work.receive()
    with pytest.raises(ServiceUnavailableError):
        await work.run(messages, batch=batch)
    assert work.handled == []
    store.fail_done = False
    await work.run(messages, batch=batch)
    assert work.handled == [b"a"]


@FORMS
async def test_a_store_that_cannot_mark_fails_nothing(
    client: QueueClient, batch: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The effect has happened: to fail the message would repeat it."""
    store = Faulty()
    store.fail_mark = True
    work = Work(client, SkipDone(store))
    await work.send("a", "b")
    with caplog.at_level(logging.ERROR):
        assert await work.run(await work.receive(), batch=batch) in ([Action.COMPLETE], [Action.COMPLETE] * 2)
    assert "settled all the same" in caplog.text
    assert (await client.counts(QUEUE)).active == 0


# In a consumer.


@pytest.mark.parametrize("form", ["one", "batch"])
@pytest.mark.parametrize("sessions", [False, True], ids=["queue", "sessions"])
async def test_in_a_consumer(form: str, sessions: bool) -> None:
    """Duplicates, failures and lost settlements: every handler's effect happens once, nothing is left."""
    with pytest.MonkeyPatch.context() as patch:
        recorder, clock = wrap(patch, settles_in_process=True), ManualClock()
        done: list[str] = []
        failed: set[str] = set()

        async def handle(what: Any) -> None:
            for message in what if form == "batch" else [what]:
                if message.message_id not in failed:  # the first time
                    failed.add(message.message_id)
                    raise ZeroDivisionError
            done.extend(message.message_id for message in (what if form == "batch" else [what]))

        async with QueueClient(InMemoryConfig(max_delivery_count=100, max_lock_renewal=0), clock=clock) as client:
            skip = SkipDone(MemoryIdempotencyStore(clock=clock))
            config = ConsumerConfig(
                handler_form=form,  # type: ignore[arg-type]
                middleware=[skip],
                max_batch_size=4,
                retry=FixedRetry(attempts=100),
                max_concurrency=3,
            )
            lost = ConnectionFailedError("reset")
            recorder.settle_faults += [fail(lost), lambda what: None, fail(lost)] * 10
            for number in range(30):
                session = f"s{number % 2}" if sessions else None
                await client.send_message(QUEUE, Message(body=b"x", message_id=str(number % 10), session_id=session))
            consumer = Consumer(client, QUEUE, handle, config)
            running = asyncio.create_task(consumer.run())
            for _ in range(20):
                await clock.advance(31)  # locks of what was not settled run out
            consumer.stop()
            await running
            counts = await client.counts(QUEUE)
        assert sorted(done) == sorted(str(number) for number in range(10))
        assert (counts.active, counts.in_flight, counts.dead_lettered) == (0, 0, 0)
        assert skip.skipped >= 20


@given(
    bodies=st.lists(st.sampled_from("abc"), min_size=1, max_size=10),
    fates=st.lists(st.sampled_from(["return", "raise", "abandon", "complete"]), max_size=12),
    size=st.integers(1, 4),
)
async def test_any_course_of_batches(bodies: list[str], fates: list[str], size: int) -> None:
    """Nothing that is done is handled again, everything is done in the end, and exactly that is marked."""
    async with QueueClient(InMemoryConfig(max_delivery_count=1000), clock=ManualClock()) as client:
        store = MemoryIdempotencyStore()
        work = Work(client, SkipDone(store))
        left = list(fates)
        done: set[str] = set()
        returned: set[str] = set()

        def fate(message: ReceivedMessage, context: MessageContext) -> None:
            key = f"{QUEUE}/{message.message_id}"
            assert key not in done
            what = left.pop(0) if left else "return"
            if what == "abandon":
                context.abandon()
            elif what == "complete":
                context.complete()
                done.add(key)
            elif what == "return":
                returned.add(key)
            else:
                returned.clear()  # the undecided ones of the batch share its failure
                raise ZeroDivisionError

        work.fate = fate
        await work.send(*bodies)
        while messages := await work.receive(size):
            await work.run(messages, batch=True)
            done |= returned
            returned.clear()
            assert set(store._until) == done
        assert done == {f"{QUEUE}/{body}" for body in bodies}
        counts = await client.counts(QUEUE)
        assert (counts.active, counts.in_flight) == (0, 0)
