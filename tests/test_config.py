"""Configuration: checked when it is made, each field named; every field changes behaviour [C33, C46]."""

import asyncio
import contextlib
import dataclasses
import os
import pickle
import tempfile
from collections.abc import Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from wrapping import fail, wrap

from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.config import InMemoryConfig, ProviderConfig, config_from_url
from queue_runtime.consumer import Consumer
from queue_runtime.errors import (
    BatchSendError,
    ConfigurationError,
    InvalidReceiptError,
    MessageTooLargeError,
    QueueFullError,
    QueueNotFoundError,
    QueueRuntimeError,
    ServiceUnavailableError,
)
from queue_runtime.handling import ConsumerConfig
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.retry import ExponentialRetry, FixedRetry, LinearRetry, NoRetry, RetryPolicy

QUEUE = "orders"
NAN = float("nan")
INF = float("inf")


class Policy:
    """Somebody's own."""

    def __init__(self, attempts: object = 2, deadline: object = None) -> None:
        self.attempts = attempts
        self.deadline = deadline

    def pause(self, attempt: int) -> float | None:
        return None


BAD: dict[str, list[object]] = {
    "max_concurrency": [0, -1, 1.5, True, "4", None],
    "prefetch": [0, -1, 1.5, False, "4", None],
    "max_lock_renewal": [-1, -0.001, NAN, INF, True, "1", None, timedelta(seconds=-1)],
    "settlement": ["", "direct", None, 1, ["auto"]],
    "settle_batch_size": [0, 10_001, 1.0, True, None],
    "settle_interval": [0, 0.00009, 60.1, NAN, True, "1", timedelta(minutes=2)],
    "settle_concurrency": [0, 1001, 1.0, True],
    "retry": [None, 3, ExponentialRetry, Policy(attempts=0), Policy(attempts=True), Policy(deadline=-1), {"first": -1}],
    "name": [None, 3, b"x"],
    "capacity": [0, -5, 1.0, True, None, "10"],
    "on_full": ["", "drop", None, True],
    "auto_create": [None, 0, 1, "true"],
    "queues": ["orders", ("-bad",), ("ok", ""), (None,), 5, ("a b",), ("é",)],
    "lock_duration": [0, 0.0009, 43_200.1, NAN, INF, True, "30", timedelta(days=1)],
    "session_lock_duration": [0, 0.0009, 43_200.1, NAN, INF, True, "30"],
    "max_delivery_count": [0, -1, 1.0, True, None],
    "dead_letter_on_expiration": [None, 0, "no"],
    "deduplication_window": [-1, NAN, INF, True, "5"],
    "max_message_size": [0, -1, 1.0, True],
    "body_file_threshold": [0, 16383, -1, 1e6, True],
    "body_directory": ["", 5, b"/tmp", "/tmp", True],  # without a threshold, a good one too
    "path": ["", b"x", 3, True],
    "fsync": ["", "sometimes", None, True],
    "fsync_interval": [0, 0.0009, 3600.1, NAN, INF, True, "1", None],
}
TEMPORARY = str(Path(tempfile.gettempdir()).resolve())
FIELDS = [field.name for field in dataclasses.fields(InMemoryConfig)]


def test_every_field_has_bad_values() -> None:
    assert sorted(BAD) == sorted(FIELDS)


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values], ids=repr
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    """[C33] When it is made, also from a mapping and in a preset."""
    makers: list[Callable[[], object]] = [
        lambda: InMemoryConfig(**{field: value}),  # type: ignore[arg-type]
        lambda: InMemoryConfig.for_testing(**{field: value}),
        lambda: InMemoryConfig.for_high_throughput(**{field: value}),
    ]
    if not isinstance(value, str):  # texts are read, from a mapping
        makers.append(lambda: InMemoryConfig.from_mapping({field: value}))
    for make in makers:
        with pytest.raises(ConfigurationError) as caught:
            make()
        assert caught.value.field == field
        assert str(caught.value).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("settle_batch_size", 10_001, "from 1 to 10000"),
        ("capacity", 0, "at least 1"),
        ("lock_duration", 0, "from 0.001 to 43200 s"),
        ("max_lock_renewal", -1, "at least 0 s"),
        ("on_full", "drop", "raise, wait"),
        ("auto_create", 1, "true or false"),
    ],
)
def test_the_limit_is_told(field: str, value: object, limit: str) -> None:
    with pytest.raises(ConfigurationError, match=limit):
        InMemoryConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "field", [name for name in FIELDS if "Seconds" in str(InMemoryConfig.__annotations__.get(name))]
)
def test_durations_are_kept_as_seconds(field: str) -> None:
    for duration in (2, 2.0, timedelta(seconds=2)):
        value = getattr(InMemoryConfig(**{field: duration}), field)  # type: ignore[arg-type]
        assert (type(value), value) == (float, 2.0)


def test_a_configuration_is_a_value() -> None:
    """Frozen, keyword-only, equal by its fields, hashable, pickled and changed like a dataclass."""
    config = InMemoryConfig(capacity=5, queues=["a", "b"])  # type: ignore[arg-type]
    assert config.queues == ("a", "b")
    assert config == InMemoryConfig(capacity=5, queues=("a", "b"))
    assert hash(config) == hash(InMemoryConfig(capacity=5, queues=("a", "b")))
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, capacity=6).capacity == 6
    with pytest.raises(ConfigurationError, match="capacity"):
        dataclasses.replace(config, capacity=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.capacity = 7  # type: ignore[misc]
    with pytest.raises(TypeError):
        InMemoryConfig("name")  # type: ignore[misc]


# From plain settings and URLs.


def test_texts_are_read_as_the_field_s_type() -> None:
    config = InMemoryConfig.from_mapping(
        {
            "capacity": "10",
            "lock_duration": "1.5",
            "auto_create": "False",
            "dead_letter_on_expiration": "1",
            "on_full": "wait",
            "queues": "a,b.fifo",
            "name": "x",
            "max_concurrency": 3,
        }
    )
    assert config == InMemoryConfig(
        capacity=10,
        lock_duration=1.5,
        auto_create=False,
        dead_letter_on_expiration=True,
        on_full="wait",
        queues=("a", "b.fifo"),
        name="x",
        max_concurrency=3,
    )


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("capacity", "ten"),
        ("capacity", "1.5"),
        ("capacity", ""),
        ("capacity", "0"),
        ("lock_duration", "soon"),
        ("lock_duration", "nan"),
        ("lock_duration", "inf"),
        ("auto_create", "yes"),
        ("auto_create", ""),
        ("on_full", "drop"),
        ("queues", "a,-b"),
        ("colour", "red"),
        ("scheme", "sqs"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_by_name(field: str, text: str) -> None:
    for read in (
        lambda: InMemoryConfig.from_mapping({field: text}),
        lambda: config_from_url(f"memory://?{field}={text}"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            read()
        assert caught.value.field == field


def test_an_unknown_setting_is_told_what_there_is() -> None:
    with pytest.raises(ConfigurationError, match="capacity, dead_letter_on_expiration"):
        InMemoryConfig.from_mapping({"capcity": 5})


@pytest.mark.parametrize("settings", [None, 5, "capacity=5", [("capacity", 5)]])
def test_settings_are_a_mapping(settings: Any) -> None:
    with pytest.raises(ConfigurationError, match="settings"):
        InMemoryConfig.from_mapping(settings)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("memory://", InMemoryConfig()),
        ("memory:///", InMemoryConfig()),
        ("memory://Orders", InMemoryConfig(name="Orders")),
        ("MEMORY://orders", InMemoryConfig(name="orders")),
        ("memory://orders?", InMemoryConfig(name="orders")),
        ("memory://orders?capacity=1000&on_full=wait", InMemoryConfig(name="orders", capacity=1000, on_full="wait")),
        ("memory://?queues=a,b&lock_duration=.5", InMemoryConfig(queues=("a", "b"), lock_duration=0.5)),
        ("memory://?queues=", InMemoryConfig()),
        ("memory://?on_full=w%61it", InMemoryConfig(on_full="wait")),
    ],
)
def test_a_url(url: str, expected: ProviderConfig) -> None:
    assert config_from_url(url) == expected


@pytest.mark.parametrize(
    ("text", "settings", "policy"),
    [
        ("none", {"kind": "none"}, NoRetry()),
        ("fixed", {"kind": "fixed"}, FixedRetry()),
        ("linear", {"kind": "linear"}, LinearRetry()),
        ("exponential", {}, ExponentialRetry()),
        ("exponential,attempts=5", {"attempts": 5}, ExponentialRetry(attempts=5)),
        (
            "fixed,delay=.05,jitter=0.1,deadline=9",
            {"kind": "fixed", "delay": 0.05, "jitter": "0.1", "deadline": timedelta(seconds=9)},
            FixedRetry(delay=0.05, jitter=0.1, deadline=9),
        ),
        ("linear,step=2,longest=3", {"kind": "linear", "step": 2, "longest": 3}, LinearRetry(step=2, longest=3)),
    ],
)
def test_retry_is_set_by_text_and_by_mapping(text: str, settings: dict[str, Any], policy: RetryPolicy) -> None:
    """[C34] In a URL, in plain settings, and as an object."""
    expected = InMemoryConfig(retry=policy)
    assert config_from_url(f"memory://?retry={text}") == expected
    assert InMemoryConfig.from_mapping({"retry": text}) == expected
    assert InMemoryConfig.from_mapping({"retry": settings}) == expected
    assert InMemoryConfig.from_mapping({"retry": policy}) == expected


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "must be one of none, fixed, linear, exponential"),
        ("sometimes", "not 'sometimes'"),
        ("fixed,", "cannot read ''"),
        ("fixed,delay", "cannot read 'delay'"),
        ("fixed,delay=1,delay=2", "cannot read 'delay=2'"),
        ("fixed,delay=soon", "delay: cannot read 'soon'"),
        ("fixed,delay=nan", "delay: must be at least 0 s"),
        ("fixed,attempts=1.5", "attempts: cannot read '1.5'"),
        ("fixed,attempts=0", "attempts: must be at least 1"),
        ("none,attempts=2", "attempts: is no setting of none; there are none"),
        ("linear,factor=2", "factor: is no setting of linear; there are step, longest"),
        ({"kind": ["fixed"]}, "must be one of"),
        ({"kind": "fixed", 3: 4}, "3: is no setting of fixed"),
    ],
)
def test_a_bad_retry_is_refused_by_name(value: Any, problem: str) -> None:
    """[C33]"""
    with pytest.raises(ConfigurationError) as caught:
        InMemoryConfig.from_mapping({"retry": value})
    assert caught.value.field == "retry"
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memory",
        "http://orders",
        "redis://user:hunter2@host",
        "memory://user:hunter2@orders",
        "memory://orders/hunter2",
        "memory://orders#hunter2",
        "memory://[hunter2",
        "memory://?hunter2",
        "memory://?capacity=1&hunter2",
        "memory://?capacity=1&capacity=2",
        "memory://orders?name=other",
        None,
        5,
        b"memory://",
    ],
)
def test_a_bad_url_is_refused_and_not_repeated(url: Any) -> None:
    """[C32, C33] It may hold a secret."""
    for make in (config_from_url, QueueClient):
        with pytest.raises(ConfigurationError) as caught:
            make(url)
        seen: BaseException | None = caught.value
        assert "hunter2" not in str(seen)
        assert seen is not None
        assert "hunter2" not in str(seen.__cause__)


@given(st.text(max_size=30))
def test_any_text_is_a_configuration_or_a_named_error(text: str) -> None:
    for url in (text, f"memory://{text}", f"memory://?{text}", f"memory://?capacity={text}"):
        with contextlib.suppress(ConfigurationError):
            assert isinstance(config_from_url(url), InMemoryConfig)


# Presets.


def test_presets() -> None:
    """[C46]"""
    fast = InMemoryConfig.for_high_throughput()
    assert (fast.capacity, fast.max_concurrency, fast.prefetch) == (10_000, os.cpu_count() or 1, 1000)
    testing = InMemoryConfig.for_testing()
    assert (testing.capacity, testing.max_concurrency, testing.prefetch) == (1000, 1, 100)
    assert InMemoryConfig.for_testing(capacity=3, name="x") == InMemoryConfig(
        capacity=3, name="x", max_concurrency=1, prefetch=100
    )
    with pytest.raises(TypeError, match="prefech"):
        InMemoryConfig.for_testing(prefech=3)


# What each field changes. A probe says what a client of a configuration does; it must differ for the two values.


async def sent(client: QueueClient, count: int, **fields: Any) -> list[ReceivedMessage]:
    await client.send_messages(QUEUE, [Message(body=b"%d" % number, **fields) for number in range(count)])
    return await client.receive_messages(QUEUE, count, 0)


async def most_at_once(config: InMemoryConfig, clock: ManualClock) -> int:
    """Handlers of a consumer that run together."""
    running = most = 0
    stop = asyncio.Event()

    async def handle(message: ReceivedMessage) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await stop.wait()
        running -= 1

    async with QueueClient(config, clock=clock) as client:
        await client.send_messages(QUEUE, [Message(body=b"x") for _ in range(12)])
        consumer = Consumer(client, QUEUE, handle)
        task = asyncio.create_task(consumer.run())
        await settle_tasks(100)
        stop.set()
        consumer.stop()
        await task
    return most


async def most_held(config: InMemoryConfig, clock: ManualClock) -> int:
    """Messages that a consumer of one kind holds, with handlers that do not return."""
    stop = asyncio.Event()

    async def handle(message: ReceivedMessage) -> None:
        await stop.wait()

    async with QueueClient(config, clock=clock) as client:
        await client.send_messages(QUEUE, [Message(body=b"x") for _ in range(30)])
        consumer = Consumer(client, QUEUE, handle, ConsumerConfig(source="queue"))
        task = asyncio.create_task(consumer.run())
        await settle_tasks(200)
        held = (await client.counts(QUEUE)).in_flight
        stop.set()
        consumer.stop()
        await task
    return held


async def lock_lasts(config: InMemoryConfig, clock: ManualClock) -> int:
    """Seconds until a received message is somebody else's."""
    async with QueueClient(config, clock=clock) as client:
        await sent(client, 1)
        for second in range(1, 200):
            await clock.advance(1)
            if await client.receive_messages(QUEUE, 1, 0):
                return second
    return 200


async def session_lasts(config: InMemoryConfig, clock: ManualClock) -> int:
    async with QueueClient(config, clock=clock) as client:
        session = await client.accept_session(QUEUE, "s", 0)
        assert session is not None
        for second in range(1, 200):
            await clock.advance(1)
            try:
                await session.get_state()
            except QueueRuntimeError:
                return second
    return 200


async def settled_directly(config: InMemoryConfig, clock: ManualClock) -> bool:
    async with QueueClient(config, clock=clock) as client:
        return client.settles_at_once


async def settle_calls(config: InMemoryConfig, clock: ManualClock) -> int:
    """Calls that settle ten messages handed in together."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = wrap(patch)
        async with QueueClient(config, clock=clock) as client:
            await client.complete_messages(await sent(client, 10))
        return len(recorder.settled)


async def settle_calls_over_time(config: InMemoryConfig, clock: ManualClock) -> int:
    """Calls that settle two messages, 20 ms apart."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = wrap(patch)
        async with QueueClient(config, clock=clock) as client:
            one, two = await sent(client, 2)
            first = asyncio.create_task(client.complete_message(one))
            await asyncio.sleep(0.02)
            await client.complete_message(two)
            await first
        return len(recorder.settled)


async def settle_calls_at_once(config: InMemoryConfig, clock: ManualClock) -> int:
    """Batches of one receiver that are on their way together."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = wrap(patch)
        async with QueueClient(config, clock=clock) as client:
            messages = await sent(client, 20)
            recorder.gate = asyncio.Event()
            task = asyncio.create_task(client.complete_messages(messages))
            await asyncio.sleep(0.02)
            at_once = recorder.at_gate
            recorder.gate.set()
            await task
        return at_once


async def settle_tries(config: InMemoryConfig, clock: ManualClock) -> int:
    """Calls for a message that cannot be settled at the moment."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = wrap(patch)
        recorder.settle_faults += [fail(ServiceUnavailableError("busy"))] * 5
        async with QueueClient(config, clock=clock) as client:
            (message,) = await sent(client, 1)
            with pytest.raises(ServiceUnavailableError):
                await client.complete_message(message)
        return len(recorder.settled)


async def is_shared(config: InMemoryConfig, clock: ManualClock) -> bool:
    async with QueueClient(config, clock=clock) as one, QueueClient(config, clock=clock) as two:
        await one.send_message(QUEUE, Message(body=b"x"))
        return await two.receive_message(QUEUE, 0) is not None


async def accepted(config: InMemoryConfig, clock: ManualClock) -> int:
    async with QueueClient(config, clock=clock) as client:
        try:
            return len(await client.send_messages(QUEUE, [Message(body=b"x") for _ in range(5)]))
        except BatchSendError as error:
            return sum(isinstance(outcome, str) for outcome in error.outcomes)


async def when_full(config: InMemoryConfig, clock: ManualClock) -> str:
    async with QueueClient(config, clock=clock) as client:
        await client.send_message(QUEUE, Message(body=b"x"))
        task = asyncio.create_task(client.send_message(QUEUE, Message(body=b"y")))
        await settle_tasks()
        if task.done():
            assert isinstance(task.exception(), QueueFullError)
            return "raises"
        message = await client.receive_message(QUEUE, 0)
        assert message is not None
        await client.complete_message(message)
        await task
        return "waits"


async def has_queue(config: InMemoryConfig, clock: ManualClock) -> bool:
    async with QueueClient(config, clock=clock) as client:
        try:
            await client.send_message(QUEUE, Message(body=b"x"))
        except QueueNotFoundError:
            return False
        return True


async def deliveries(config: InMemoryConfig, clock: ManualClock) -> int:
    async with QueueClient(config, clock=clock) as client:
        count = 0
        messages = await sent(client, 1)
        while messages:
            count += 1
            await client.abandon_message(messages[0])
            messages = await client.receive_messages(QUEUE, 1, 0)
        return count


async def dead_after_its_time(config: InMemoryConfig, clock: ManualClock) -> int:
    async with QueueClient(config, clock=clock) as client:
        await client.send_message(QUEUE, Message(body=b"x", time_to_live=1))
        await clock.advance(2)
        return await client.dead_letters(QUEUE).count()


async def twice_in_ten_seconds(config: InMemoryConfig, clock: ManualClock) -> int:
    async with QueueClient(config, clock=clock) as client:
        for _ in range(2):
            await client.send_message(QUEUE, Message(body=b"x", deduplication_id="d"))
            await clock.advance(10)
        return len(await client.receive_messages(QUEUE, 10, 0))


async def takes_a_kilobyte(config: InMemoryConfig, clock: ManualClock) -> bool:
    async with QueueClient(config, clock=clock) as client:
        try:
            await client.send_message(QUEUE, Message(body=bytes(1024)))
        except MessageTooLargeError as error:
            return error.max_size != config.max_message_size
        return True


async def holder_of_a_body(config: InMemoryConfig, clock: ManualClock) -> str:
    """What holds 20 000 bytes after they were sent."""
    async with QueueClient(config, clock=clock) as client:
        await client.send_message(QUEUE, Message(body=bytes(20_000)))
        message = await client.receive_message(QUEUE, 0)
        assert message is not None
        return type(message.body_view.obj).__name__


async def directory_of_a_body(config: InMemoryConfig, clock: ManualClock) -> str:
    """Where the file is that 20 000 bytes are in after they were sent."""

    def mapped() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line for line in lines if line.endswith(".queue-runtime (deleted)")}

    before = await asyncio.to_thread(mapped)
    async with QueueClient(config, clock=clock) as client:
        await client.send_message(QUEUE, Message(body=bytes(20_000)))
        (line,) = await asyncio.to_thread(mapped) - before
        return str(Path(line[line.index("/") :]).parent)


async def survives(config: InMemoryConfig, clock: ManualClock) -> bool:
    async with QueueClient(config, clock=clock) as client:
        await client.send_message(QUEUE, Message(body=b"x"))
    async with QueueClient(config, clock=clock) as client:
        return await client.receive_message(QUEUE, 0) is not None


async def synced_after(config: InMemoryConfig, clock: ManualClock) -> int | None:
    """Seconds until what was sent is on the disk; None when that is not waited for."""
    async with QueueClient(config, clock=clock) as client:
        await client.send_message(QUEUE, Message(body=b"x"))
        store = client._provider._store  # type: ignore[attr-defined]
        for seconds in range(5):
            while store._syncing:
                await asyncio.sleep(0)
            if store._synced == store.journal.written:
                return seconds
            await clock.advance(1)
    return None


Probe = Callable[[InMemoryConfig, ManualClock], Coroutine[Any, Any, object]]
CHANGES: dict[str, tuple[Probe, dict[str, Any], list[tuple[object, object]]]] = {
    "max_concurrency": (most_at_once, {}, [(1, 1), (3, 3)]),
    "prefetch": (most_held, {"max_concurrency": 2}, [(4, 4), (20, 20)]),
    "max_lock_renewal": (lock_lasts, {"lock_duration": 10}, [(0, 10), (25, 30), (1000, 200)]),
    "settlement": (settled_directly, {}, [("auto", True), ("batched", False)]),
    "settle_batch_size": (settle_calls, {}, [(3, 4), (10, 1)]),
    "settle_interval": (settle_calls_over_time, {}, [(0.002, 2), (0.1, 1)]),
    "settle_concurrency": (settle_calls_at_once, {"settle_batch_size": 2}, [(1, 1), (3, 3)]),
    "retry": (settle_tries, {"settle_interval": 0.001}, [(NoRetry(), 1), (FixedRetry(attempts=2), 2)]),
    "name": (is_shared, {}, [("", False), ("config-test", True)]),
    "capacity": (accepted, {}, [(3, 3), (100, 5)]),
    "on_full": (when_full, {"capacity": 1}, [("raise", "raises"), ("wait", "waits")]),
    "auto_create": (has_queue, {}, [(True, True), (False, False)]),
    "queues": (has_queue, {"auto_create": False}, [((), False), ((QUEUE,), True)]),
    "lock_duration": (lock_lasts, {"max_lock_renewal": 0}, [(5, 5), (30, 30)]),
    "session_lock_duration": (session_lasts, {"max_lock_renewal": 0}, [(5, 5), (30, 30)]),
    "max_delivery_count": (deliveries, {}, [(1, 1), (4, 4)]),
    "dead_letter_on_expiration": (dead_after_its_time, {}, [(False, 0), (True, 1)]),
    "deduplication_window": (twice_in_ten_seconds, {}, [(0, 2), (5, 2), (60, 1)]),
    "max_message_size": (takes_a_kilobyte, {}, [(1000, False), (2000, True)]),
    "body_file_threshold": (holder_of_a_body, {}, [(None, "bytes"), (20_001, "bytes"), (20_000, "Mapping")]),
    "body_directory": (
        directory_of_a_body,
        {"body_file_threshold": 20_000},
        [(directory, directory) for directory in (TEMPORARY, f"{TEMPORARY}/queue-runtime-test")],
    ),
    "path": (survives, {}, [(None, False), ("somewhere", True)]),
    "fsync": (synced_after, {"path": "somewhere"}, [("always", 0), ("interval", 1), ("never", None)]),
    "fsync_interval": (synced_after, {"path": "somewhere"}, [(1, 1), (3, 3)]),
}


def test_every_field_has_a_probe() -> None:
    """[C46]"""
    assert sorted(CHANGES) == sorted(FIELDS)
    for field, (_, _, values) in CHANGES.items():
        assert len({outcome for _, outcome in values}) >= 2, field


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [(field, value, expected) for field, (_, _, values) in CHANGES.items() for value, expected in values],
    ids=str,
)
async def test_every_field_changes_behaviour(field: str, value: object, expected: object, tmp_path: Path) -> None:
    """[C46]"""
    probe, base, _ = CHANGES[field]
    settings = {name: tmp_path if value == "somewhere" else value for name, value in {**base, field: value}.items()}
    assert await probe(InMemoryConfig(**settings), ManualClock()) == expected


async def test_clients_of_one_name_agree() -> None:
    """[C33] In what their queues are like; the setting is named."""
    async with QueueClient("memory://agree?capacity=5"):
        for url, field in (("memory://agree?capacity=6", "capacity"), ("memory://agree", "capacity")):
            with pytest.raises(ConfigurationError) as caught:
                QueueClient(url)
            assert caught.value.field == field
        async with QueueClient("memory://agree?capacity=5&max_concurrency=9"):
            pass


async def test_a_lock_that_is_renewed_by_hand_only() -> None:
    clock = ManualClock()
    async with QueueClient(InMemoryConfig(max_lock_renewal=0, lock_duration=1), clock=clock) as client:
        (message,) = await sent(client, 1)
        await clock.advance(0.9)
        await client.renew_lock(message)
        await clock.advance(0.9)
        await client.renew_lock(message)
        await clock.advance(1.1)
        with pytest.raises(InvalidReceiptError):
            await client.renew_lock(message)
