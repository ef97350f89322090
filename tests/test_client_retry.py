"""What a client tries again [C9, C34]: sends, links, peeks, counts and creations, by its policy and its clock."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, strategies as st
from wrapping import Recorder, fail, wrap

from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import (
    BatchSendError,
    ConnectionFailedError,
    QueueFullError,
    QueueNotFoundError,
    QueueRuntimeError,
    ServiceUnavailableError,
    ThrottledError,
)
from queue_runtime.message import Message
from queue_runtime.retry import FixedRetry, NoRetry, RetryPolicy

QUEUE = "orders"
BUSY = ServiceUnavailableError("busy")
RESET = ConnectionFailedError("reset")
FULL = QueueFullError("queue", 1)
GONE = QueueNotFoundError(QUEUE)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return wrap(monkeypatch)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def open_client(clock: ManualClock, retry: RetryPolicy | None = None) -> QueueClient:
    return QueueClient(InMemoryConfig(retry=retry or FixedRetry(delay=1.0), max_lock_renewal=0), clock=clock)


def batch(count: int) -> list[Message]:
    return [Message(body=b"x", message_id=str(number)) for number in range(count)]


class Scripted:
    """Send faults that note what was sent and when; an outcome of None sends that message to the real queue's list."""

    def __init__(self, recorder: Recorder, clock: ManualClock, *answers: list[Any] | Exception) -> None:
        self.calls: list[list[str]] = []
        self.times: list[float] = []
        self.accepted: list[str] = []

        def fault(given: list[Any] | Exception) -> Callable[[Sequence[Any]], list[Any]]:
            def answer(messages: Sequence[Message]) -> list[Any]:
                self.calls.append([message.message_id for message in messages])
                self.times.append(clock.monotonic())
                if isinstance(given, Exception):
                    raise given
                pairs = zip(messages, given, strict=True)
                self.accepted += [message.message_id for message, outcome in pairs if outcome is None]
                return given

            return answer

        recorder.send_faults += [fault(given) for given in answers]


async def finished(clock: ManualClock, call: Awaitable[Any], seconds: float = 100.0) -> Any:
    """What a call comes to while the clock runs: its result, or its error."""
    task = asyncio.ensure_future(call)
    await clock.advance(seconds)
    assert task.done()
    return task.exception() or task.result()


# Sending.


async def test_only_what_failed_for_a_passing_reason_is_sent_again(recorder: Recorder, clock: ManualClock) -> None:
    """[C9] In the order in which it was; what was accepted or refused is left alone."""
    async with open_client(clock) as client:
        script = Scripted(recorder, clock, [None, BUSY, FULL, BUSY, None], [BUSY, None], [None])
        error = await finished(clock, client.send_messages(QUEUE, batch(5)))
        assert isinstance(error, BatchSendError)
        assert error.outcomes == ("0", "1", FULL, "3", "4")
        assert not error.is_transient
        assert script.calls == [["0", "1", "2", "3", "4"], ["1", "3"], ["1"]]
        assert script.times == [0.0, 1.0, 2.0]


async def test_all_sent_in_the_end_is_no_failure(recorder: Recorder, clock: ManualClock) -> None:
    """[C9] The ids, in input order."""
    async with open_client(clock) as client:
        Scripted(recorder, clock, [BUSY, None, BUSY], RESET, [None, None])
        assert await finished(clock, client.send_messages(QUEUE, batch(3))) == ["0", "1", "2"]


async def test_the_final_outcomes_are_told(recorder: Recorder, clock: ManualClock) -> None:
    """[C9] The last error of each, also where the last attempt failed as a whole."""
    last = ServiceUnavailableError("still")
    async with open_client(clock) as client:
        Scripted(recorder, clock, [None, BUSY, BUSY], [BUSY, None], [last])
        error = await finished(clock, client.send_messages(QUEUE, batch(3)))
        assert error.outcomes == ("0", last, "2")
        assert error.is_transient
        script = Scripted(recorder, clock, [None, BUSY, BUSY], GONE)
        error = await finished(clock, client.send_messages(QUEUE, batch(3)))
        assert error.outcomes == ("0", GONE, GONE)
        assert len(script.calls) == 2


async def test_a_send_that_fails_as_a_whole_raises_its_own_error(recorder: Recorder, clock: ManualClock) -> None:
    """Until one message has an outcome of its own there are no outcomes to tell."""
    async with open_client(clock) as client:
        for answers, expected in (([RESET, RESET, RESET], RESET), ([RESET, GONE], GONE), ([GONE], GONE)):
            script = Scripted(recorder, clock, *answers)
            assert await finished(clock, client.send_messages(QUEUE, batch(2))) is expected
            assert len(script.calls) == len(answers)
            assert recorder.send_faults == []


async def test_one_message(recorder: Recorder, clock: ManualClock) -> None:
    """[C8, C34]"""
    async with open_client(clock) as client:
        script = Scripted(recorder, clock, [BUSY], BUSY, [None])
        assert await finished(clock, client.send_message(QUEUE, batch(1)[0])) == "0"
        assert script.times == [0.0, 1.0, 2.0]
        for answer in (FULL, GONE):
            script = Scripted(recorder, clock, [answer])
            assert await finished(clock, client.send_message(QUEUE, batch(1)[0])) is answer
            assert len(script.calls) == 1


async def test_the_longest_pause_asked_for_is_kept(recorder: Recorder, clock: ManualClock) -> None:
    """[C34, C36]"""
    async with open_client(clock) as client:
        script = Scripted(recorder, clock, [BUSY, ThrottledError(retry_after=7.0), ThrottledError()], [None] * 3)
        await finished(clock, client.send_messages(QUEUE, batch(3)))
        assert script.times == [0.0, 7.0]


async def test_the_deadline_of_the_policy(recorder: Recorder, clock: ManualClock) -> None:
    """[C34]"""
    async with open_client(clock, FixedRetry(delay=1, attempts=9, deadline=2.5)) as client:
        script = Scripted(recorder, clock, *[[BUSY]] * 9)
        assert await finished(clock, client.send_message(QUEUE, batch(1)[0])) is BUSY
        assert script.times == [0.0, 1.0, 2.0]


async def test_nothing_is_tried_again_without_retry(recorder: Recorder, clock: ManualClock) -> None:
    async with open_client(clock, NoRetry()) as client:
        script = Scripted(recorder, clock, [BUSY, None])
        error = await finished(clock, client.send_messages(QUEUE, batch(2)), 0)
        assert error.outcomes == (BUSY, "1")
        assert len(script.calls) == 1


OUTCOMES = st.sampled_from([None, None, BUSY, ThrottledError(retry_after=0.1), FULL])


@given(st.integers(1, 6), st.lists(st.one_of(st.lists(OUTCOMES, min_size=6, max_size=6), st.just(RESET)), max_size=5))
async def test_any_course_of_events(count: int, course: list[Any]) -> None:
    """[C9] Against a twin that follows every message alone: its fate, the tries it took, and never one too many."""
    with pytest.MonkeyPatch.context() as patch:
        recorder, clock = wrap(patch), ManualClock()
        calls: list[list[str]] = []
        answers = list(course)

        def provider(messages: Sequence[Message]) -> list[Any]:
            calls.append([message.message_id for message in messages])
            recorder.send_faults.append(provider)
            answer = answers.pop(0) if answers else [None] * 6
            if isinstance(answer, Exception):
                raise answer
            return [answer[int(message.message_id)] for message in messages]

        recorder.send_faults.append(provider)
        async with open_client(clock, FixedRetry(delay=0.5, attempts=4)) as client:
            result = await finished(clock, client.send_messages(QUEUE, batch(count)))

    rounds = (course + [[None] * 6] * 4)[:4]
    fates: list[QueueRuntimeError | None] = []
    tries: list[int] = []
    for number in range(count):
        for attempt, answer in enumerate(rounds, 1):  # noqa: B007
            fate = answer if isinstance(answer, QueueRuntimeError) else answer[number]
            if fate is None or not fate.is_transient:
                break
        fates.append(fate)
        tries.append(attempt)
    assert calls == [
        [str(number) for number in range(count) if tries[number] >= attempt] for attempt in range(1, max(tries) + 1)
    ]
    if not any(fates):
        assert result == [str(number) for number in range(count)]
    elif all(isinstance(answer, QueueRuntimeError) for answer in rounds):
        assert result is RESET
    else:
        assert isinstance(result, BatchSendError)
        assert result.outcomes == tuple(fate or str(number) for number, fate in enumerate(fates))


# Everything else that is tried again.


def failing(client: QueueClient, name: str, *errors: Exception) -> list[float]:
    """Have this method of the provider fail first; return when it is called."""
    left, times = list(errors), []
    real = getattr(client._provider, name)

    async def call(*arguments: Any, **options: Any) -> Any:
        times.append(client.clock.monotonic())
        if left:
            raise left.pop(0)
        return await real(*arguments, **options)

    setattr(client._provider, name, call)
    return times


CALLS: dict[str, tuple[str, Callable[[QueueClient], Awaitable[Any]]]] = {
    "counts": ("counts", lambda client: client.counts(QUEUE)),
    "peek": ("peek", lambda client: client.peek_messages(QUEUE)),
    "peek of dead letters": ("peek", lambda client: client.dead_letters(QUEUE).peek_messages()),
    "create": ("create_queue", lambda client: client.create_queue(QUEUE)),
    "open": ("open_receiver", lambda client: client.receive_messages(QUEUE, 1, 2.5)),
    "open for one": ("open_receiver", lambda client: client.receive_message(QUEUE, 2.5)),
    "open for dead letters": ("open_receiver", lambda client: client.dead_letters(QUEUE).receive_messages(1, 2.5)),
    "open for deferred": ("open_receiver", lambda client: client.receive_deferred_messages(QUEUE, [1])),
}


@pytest.mark.parametrize("kind", CALLS)
async def test_a_call_is_tried_again(recorder: Recorder, clock: ManualClock, kind: str) -> None:
    """[C34, C37] After a passing error, as often as the policy says."""
    name, call = CALLS[kind]
    async with open_client(clock) as client:
        times = failing(client, name, BUSY, BUSY)
        assert not isinstance(await finished(clock, call(client)), Exception)
        assert times == [0.0, 1.0, 2.0]
    async with open_client(ManualClock()) as client:
        times = failing(client, name, GONE)
        with pytest.raises(QueueNotFoundError):
            await call(client)
        assert times == [0.0]


async def test_opening_is_not_tried_for_longer_than_the_receive_would_wait(
    recorder: Recorder, clock: ManualClock
) -> None:
    """[C38] ``timeout`` counts from the call; a receive that must not wait fails at once."""
    async with open_client(clock, FixedRetry(delay=1, attempts=9)) as client:
        for timeout, expected in ((0, 1), (2.5, 3), (3, 4)):
            times = failing(client, "open_receiver", *[BUSY] * expected)
            assert await finished(clock, client.receive_messages(QUEUE, 1, timeout), 50) is BUSY
            assert len(times) == expected


async def test_a_queue_that_cannot_be_opened_holds_up_no_other(recorder: Recorder, clock: ManualClock) -> None:
    async with open_client(clock, FixedRetry(delay=10)) as client:
        failing(client, "open_receiver", BUSY)
        waiting = asyncio.create_task(client.receive_messages("slow", 1, 20))
        await settle_tasks()
        assert await client.receive_messages(QUEUE, 1, 0) == []
        assert not waiting.done()
        await clock.advance(50)
        assert await waiting == []


@pytest.mark.parametrize("kind", [*CALLS, "send", "send many"])
async def test_closing_ends_a_retry_at_once(recorder: Recorder, clock: ManualClock, kind: str) -> None:
    """[C23] The caller is told the last error, and BatchSendError what was sent."""
    client = open_client(clock, FixedRetry(delay=2.5, attempts=5))
    if kind in CALLS:
        name, call = CALLS[kind]
        failing(client, name, *[BUSY] * 5)
    else:
        Scripted(recorder, clock, [None, BUSY][-2 if kind == "send many" else -1 :], *[[BUSY]] * 4)
        call = (
            (lambda client: client.send_messages(QUEUE, batch(2)))
            if kind == "send many"
            else (lambda client: client.send_message(QUEUE, batch(1)[0]))
        )
    task = asyncio.ensure_future(call(client))
    await settle_tasks()
    assert not task.done()
    await client.close()
    await settle_tasks()
    assert task.done()
    error = task.exception()
    if kind == "send many":
        assert isinstance(error, BatchSendError)
        assert error.outcomes == ("0", BUSY)
    else:
        assert error is BUSY
    assert all(timer.callback is None for _, _, timer in clock._timers)


async def test_receiving_is_left_to_its_caller(recorder: Recorder, clock: ManualClock) -> None:
    """Who waits for messages calls again anyhow: a consumer persists by rules of its own."""
    async with open_client(clock) as client:
        await client.receive_messages(QUEUE, 1, 0)
        receiver: Any = client._links.main[QUEUE].receiver

        async def broken(*arguments: Any) -> Any:
            raise BUSY

        receiver.receive = broken
        with pytest.raises(ServiceUnavailableError):
            await client.receive_messages(QUEUE, 1, 10)
        times = failing(client, "accept_session", BUSY)
        with pytest.raises(ServiceUnavailableError):
            await client.accept_session(QUEUE, None, 10)
        assert len(times) == 1


async def test_dead_letters_are_sent_back_by_the_same_rules(recorder: Recorder, clock: ManualClock) -> None:
    """[C16]"""
    async with open_client(clock) as client:
        await client.send_message(QUEUE, Message(body=b"x"))
        message = await client.receive_message(QUEUE, 0)
        assert message is not None
        await client.dead_letter_message(message, "reason")
        recorder.send_faults.append(fail(BUSY))
        task = asyncio.create_task(client.dead_letters(QUEUE).redrive(timeout=0))
        await clock.advance(1)
        for _ in range(20):  # settled in batches, by the real clock
            await asyncio.sleep(0.002)
        assert (await task).moved == 1
