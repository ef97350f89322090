"""What a type checker must answer to users; checked by mypy in test_types.py, never run."""

from datetime import datetime, timedelta
from typing import assert_type

import queue_runtime as qr


async def client() -> None:
    async with qr.QueueClient("memory://") as client:
        assert_type(client, qr.QueueClient)
        message = qr.Message(body=b"x", attributes={"a": "b"}, time_to_live=timedelta(seconds=1))
        assert_type(message.body, bytes)
        assert_type(message.session_id, str | None)
        assert_type(message.time_to_live, timedelta | None)
        assert_type(message.replace(session_id="s"), qr.Message)
        assert_type(await client.send_message("q", message), str)
        assert_type(await client.send_messages("q", [message]), list[str])
        received = await client.receive_message("q", timeout=1)
        assert_type(received, qr.ReceivedMessage | None)
        messages = await client.receive_messages("q", 10, timeout=timedelta(seconds=1))
        assert_type(messages, list[qr.ReceivedMessage])
        assert_type(messages[0].message(), qr.Message)
        assert_type(messages[0].delivered_at, datetime | None)
        assert_type(await client.renew_lock(messages[0]), datetime)
        assert_type(await client.renew_locks(messages), list[datetime | qr.QueueRuntimeError])
        session = await client.accept_session("q", timeout=1)
        assert_type(session, qr.Session | None)
        assert_type(await client.dead_letters("q").redrive(dry_run=True), qr.RedriveResult)
        assert_type(client.capabilities.sessions, bool)


async def core() -> None:
    async def pump(items: list[int], slot: int, state: str, cancellation: object) -> None: ...

    mpcc = qr.MPCC[int](100, 0.01, 4, 4)
    mpcc.start(pump, "state")
    mpcc.push(1, 0)
    mpcc.push_many([1, 2], 0)
    assert_type(await mpcc.complete(), dict[int, list[int]])
    assert_type(mpcc.stats().pushed, int)
    assert_type(qr.encode_envelope(qr.Message(body=b"")), bytes)
    assert_type(qr.decode_envelope(b""), qr.Message)
    assert_type(qr.AdaptiveBatchSizer(1, 10, 0.1).calculate_optimal_batch_size(), int)


async def consumer(client: qr.QueueClient) -> None:
    async def handle(message: qr.ReceivedMessage) -> None: ...

    def handle_in_thread(message: qr.ReceivedMessage) -> int:
        return 1

    assert_type(await qr.Consumer(client, "q", handle, qr.ConsumerConfig(max_sessions=3)).run(), qr.ConsumerStats)
    qr.Consumer(client, "q", handle_in_thread)
