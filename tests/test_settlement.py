"""From receipts to outcomes through the MPCC [C22, C41, C42]: batches, failures, retries, lanes."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from wrapping import Recorder, fail, wrap

from queue_runtime.client import QueueClient
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import (
    BatchSettleError,
    ClosedError,
    ConnectionFailedError,
    InvalidReceiptError,
    ServiceUnavailableError,
    ThrottledError,
)
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.providers.base import Action
from queue_runtime.retry import FixedRetry
from queue_runtime.sessions import Session

QUEUE = "orders"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return wrap(monkeypatch)


@pytest.fixture
async def client(recorder: Recorder) -> AsyncIterator[QueueClient]:
    """In batches, as on a cloud provider: nothing here declares that settling is done in process."""
    async with QueueClient(InMemoryConfig(settle_interval=0.005, settle_batch_size=100)) as client:
        yield client


async def received(client: QueueClient, count: int) -> list[ReceivedMessage]:
    await client.send_messages(QUEUE, [Message(body=b"%d" % number) for number in range(count)])
    messages = await client.receive_messages(QUEUE, count, 0)
    assert len(messages) == count
    return messages


async def held(client: QueueClient, name: str) -> tuple[Session, ReceivedMessage]:
    """A session and its message."""
    await client.send_message(QUEUE, Message(body=b"x", session_id=name))
    session = await client.accept_session(QUEUE, name, 0)
    assert session is not None
    message = await session.receive_message(0)
    assert message is not None
    return session, message


async def in_flight(client: QueueClient) -> int:
    return (await client.counts(QUEUE)).in_flight


@pytest.mark.both_loops
async def test_a_thousand_tasks_become_a_few_calls(client: QueueClient, recorder: Recorder) -> None:
    """[C42] As few as batches of a hundred allow."""
    messages = await received(client, 1000)
    await asyncio.gather(*(client.complete_message(message) for message in messages))
    sizes = [len(receipts) for _, _, receipts in recorder.settled]
    assert sum(sizes) == 1000
    assert max(sizes) <= 100
    assert len(sizes) <= 12
    assert await in_flight(client) == 0


async def test_one_call_with_many_is_split_as_well(client: QueueClient, recorder: Recorder) -> None:
    await client.complete_messages(await received(client, 250))
    assert sorted(len(receipts) for _, _, receipts in recorder.settled) == [50, 100, 100]


async def test_a_single_settlement_waits_no_longer_than_the_interval(client: QueueClient, recorder: Recorder) -> None:
    (message,) = await received(client, 1)
    async with asyncio.timeout(0.5):
        await client.complete_message(message)
    assert [len(receipts) for _, _, receipts in recorder.settled] == [1]


async def test_different_dispositions_travel_in_calls_of_their_own(client: QueueClient, recorder: Recorder) -> None:
    """Equal ones together, whoever asked; each message meets its own fate."""
    messages = await received(client, 40)
    calls: list[Any] = []
    for number, message in enumerate(messages):
        kind = number % 4
        if kind == 0:
            calls.append(client.complete_message(message))
        elif kind == 1:
            calls.append(client.abandon_message(message))
        elif kind == 2:
            calls.append(client.dead_letter_message(message, "reason", "why"))
        else:
            calls.append(client.dead_letter_message(message, "other", "why"))
    await asyncio.gather(*calls)
    assert len(recorder.settled) == 4
    assert all(len(receipts) == 10 for _, _, receipts in recorder.settled)
    assert len({disposition for _, disposition, _ in recorder.settled}) == 4
    letters = await client.dead_letters(QUEUE).receive_messages(40, 0)
    assert sorted(letter.dead_letter_reason or "" for letter in letters) == ["other"] * 10 + ["reason"] * 10
    assert len(await client.receive_messages(QUEUE, 40, 0)) == 10


async def test_a_failure_is_told_to_its_own_caller(client: QueueClient, recorder: Recorder) -> None:
    """[C22, C42] And to nobody else in the same batch."""
    messages = await received(client, 30)
    await client.complete_messages(messages[::3])
    recorder.settled.clear()
    outcomes = await asyncio.gather(*(client.complete_message(message) for message in messages), return_exceptions=True)
    assert len(recorder.settled) == 1
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, InvalidReceiptError) == (number % 3 == 0)
        if isinstance(outcome, InvalidReceiptError):
            assert outcome.receipt == messages[number].receipt


async def test_what_fails_for_a_passing_reason_is_tried_again_alone(client: QueueClient, recorder: Recorder) -> None:
    """[C22] Two of five, in the order in which they were."""
    busy = ServiceUnavailableError("busy")
    messages = await received(client, 5)
    recorder.settle_faults.append(lambda receipts: [None, busy, None, busy, None])
    await client.complete_messages(messages)
    tried = [receipts for _, _, receipts in recorder.settled]
    assert tried == [[message.receipt for message in messages], [messages[1].receipt, messages[3].receipt]]


async def test_a_call_that_fails_for_a_passing_reason_is_tried_again(client: QueueClient, recorder: Recorder) -> None:
    recorder.settle_faults.append(fail(ServiceUnavailableError("busy")))
    await client.complete_messages(await received(client, 5))
    assert [len(receipts) for _, _, receipts in recorder.settled] == [5, 5]
    assert await in_flight(client) == 0


async def test_attempts_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """[C34] The policy's attempts count the first one; then the caller is told the last error."""
    recorder = wrap(monkeypatch)
    async with QueueClient(InMemoryConfig(retry=FixedRetry(attempts=2), settle_interval=0.001)) as client:
        errors = [ServiceUnavailableError(str(number)) for number in range(3)]
        recorder.settle_faults += map(fail, errors)
        (message,) = await received(client, 1)
        with pytest.raises(ServiceUnavailableError, match="1"):
            await client.complete_message(message)
        assert len(recorder.settled) == 2
        recorder.settle_faults.clear()
        await client.complete_message(message)  # nothing was settled: the right is still there


async def test_what_will_not_pass_is_not_tried_again(client: QueueClient, recorder: Recorder) -> None:
    messages = await received(client, 2)
    refused = InvalidReceiptError(messages[0].receipt)
    recorder.settle_faults.append(lambda receipts: [refused, None])
    with pytest.raises(BatchSettleError) as caught:
        await client.complete_messages(messages)
    assert caught.value.outcomes == (refused, None)
    assert len(recorder.settled) == 1


async def test_an_error_s_own_pause_wins_when_it_is_longer(client: QueueClient, recorder: Recorder) -> None:
    """ThrottledError knows best; its lane alone waits."""
    recorder.settle_faults.append(fail(ThrottledError(retry_after=0.3)))
    (message,) = await received(client, 1)
    loop = asyncio.get_running_loop()
    started = loop.time()
    throttled = asyncio.create_task(client.complete_message(message))
    await asyncio.sleep(0.02)
    session, other = await held(client, "s")
    await client.complete_message(other)
    assert loop.time() - started < 0.25
    await throttled
    assert loop.time() - started >= 0.299
    await session.close()


async def test_a_bug_of_an_adapter_reaches_the_caller(client: QueueClient, recorder: Recorder) -> None:
    """What is no QueueRuntimeError is never turned into an outcome, and the lane goes on."""
    messages = await received(client, 2)
    recorder.settle_faults.append(fail(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError):
        await client.complete_message(messages[0])
    await client.complete_messages(messages)


async def test_every_message_is_settled_on_the_receiver_that_it_came_from(
    client: QueueClient, recorder: Recorder
) -> None:
    """[C41] With more receivers than an MPCC has slots."""
    pairs = [await held(client, f"s{number}") for number in range(150)]
    await asyncio.gather(*(client.complete_message(message) for _, message in pairs))
    assert len(recorder.settled) == 150
    for receiver_id, _, receipts in recorder.settled:
        assert [receipt.receiver_id for receipt in receipts] == [receiver_id]
    assert {receiver_id for receiver_id, _, _ in recorder.settled} == {session.receiver_id for session, _ in pairs}
    for session, _ in pairs:
        await session.close()


async def test_slots_are_used_again(client: QueueClient, recorder: Recorder) -> None:
    """Two hundred sessions one after the other take one MPCC; nothing of an old one reaches a new one."""
    for number in range(200):
        session, message = await held(client, f"s{number}")
        closing = asyncio.create_task(client.complete_message(message))
        await asyncio.sleep(0)
        await session.close()
        await closing
        assert recorder.settled.pop()[0] == session.receiver_id
    assert len(client._settler._mpccs) == 1
    assert len(client._settler._free) == 64
    assert recorder.open == set()


async def test_closing_a_session_waits_for_its_settlements(client: QueueClient, recorder: Recorder) -> None:
    session, message = await held(client, "s")
    recorder.gate = asyncio.Event()
    settling = asyncio.create_task(client.complete_message(message))
    while not recorder.at_gate:
        await asyncio.sleep(0.001)
    closing = asyncio.create_task(session.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    recorder.gate.set()
    await asyncio.gather(closing, settling)
    assert (await client.counts(QUEUE)).active == 0


async def test_closing_the_client_waits_for_its_settlements(client: QueueClient, recorder: Recorder) -> None:
    """[C23] Those of the last moment, and those that are tried again."""
    messages = await received(client, 10)
    recorder.settle_faults.append(fail(ServiceUnavailableError("busy")))
    tasks = [asyncio.create_task(client.complete_message(message)) for message in messages]
    await asyncio.sleep(0)
    await client.close()
    await asyncio.gather(*tasks)
    assert [len(receipts) for _, _, receipts in recorder.settled] == [10, 10]
    with pytest.raises(ClosedError):
        await client.complete_message(messages[0])


async def test_nobody_hears_of_a_failure_that_its_caller_did_not_wait_for(
    client: QueueClient, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """[C38] A cancelled caller: its settlement goes on, and its error is not reported as forgotten."""
    messages = await received(client, 10)
    await client.complete_messages(messages)
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
    tasks = [asyncio.create_task(client.complete_message(message)) for message in messages]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    with caplog.at_level(logging.ERROR):
        await client.close()
        del tasks
        for _ in range(5):
            await asyncio.sleep(0.001)
    assert len(recorder.settled) == 2
    assert unhandled == []


async def test_settling_on_batches_when_asked_for() -> None:
    """settlement="batched" goes through the batches where settling at once would do; "auto" does not."""
    for settlement, direct in (("batched", False), ("auto", True)):
        async with QueueClient(InMemoryConfig(settlement=settlement)) as client:  # type: ignore[arg-type]
            assert client.settles_at_once is direct
            await client.complete_messages(await received(client, 3))
            assert len(client._settler._mpccs) == (0 if direct else 1)


async def test_settling_soon_tells_each_outcome(client: QueueClient, recorder: Recorder) -> None:
    """What a consumer uses: no task for each message; a transient failure keeps the lock renewed."""
    from queue_runtime.providers.base import COMPLETE

    messages = await received(client, 3)
    outcomes: dict[bytes, object] = {}
    recorder.settle_faults.append(lambda receipts: [None, InvalidReceiptError(receipts[1]), None])
    futures = [
        client.settle_soon(message.receipt, COMPLETE, lambda outcome, key=message.body: outcomes.update({key: outcome}))
        for message in messages
    ]
    assert len(asyncio.all_tasks()) == 1
    await asyncio.wait(futures)
    await asyncio.sleep(0)
    assert [type(outcomes[key]) for key in (b"0", b"1", b"2")] == [type(None), InvalidReceiptError, type(None)]
    assert len(recorder.settled) == 1
    assert recorder.settled[0][1].action is Action.COMPLETE


@pytest.mark.parametrize(
    ("field", "value", "calls"), [("settle_batch_size", 5, 4), ("settle_batch_size", 20, 1)], ids=str
)
async def test_the_batch_size(monkeypatch: pytest.MonkeyPatch, field: str, value: int, calls: int) -> None:
    recorder = wrap(monkeypatch)
    async with QueueClient(InMemoryConfig(settle_interval=0.01, **{field: value})) as client:
        await client.complete_messages(await received(client, 20))
        assert len(recorder.settled) == calls


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_the_concurrency_of_batches(monkeypatch: pytest.MonkeyPatch, concurrency: int) -> None:
    """settle_concurrency: so many batches of one receiver are on their way at once."""
    recorder = wrap(monkeypatch)
    config = InMemoryConfig(settle_interval=0.001, settle_batch_size=2, settle_concurrency=concurrency)
    async with QueueClient(config) as client:
        messages = await received(client, 20)
        recorder.gate = asyncio.Event()
        task = asyncio.create_task(client.complete_messages(messages))
        await asyncio.sleep(0.03)
        assert recorder.at_gate == concurrency
        recorder.gate.set()
        await task


async def test_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """settle_interval: a longer one gathers what comes later."""
    for interval, calls in ((0.001, 2), (0.1, 1)):
        recorder = wrap(monkeypatch)
        async with QueueClient(InMemoryConfig(settle_interval=interval)) as client:
            first, second = await received(client, 2)
            tasks = [asyncio.create_task(client.complete_message(first))]
            await asyncio.sleep(0.02)
            tasks.append(asyncio.create_task(client.complete_message(second)))
            await asyncio.gather(*tasks)
            assert len(recorder.settled) == calls


async def test_a_broken_connection_is_survived(client: QueueClient, recorder: Recorder) -> None:
    """[C37] No try of the client's is lost: here the pause is cut short by the test's own error."""
    error = ConnectionFailedError("reset")
    error.retry_after = 0.0
    recorder.settle_faults += [fail(error), fail(error)]
    await client.complete_messages(await received(client, 3))
    assert len(recorder.settled) == 3
