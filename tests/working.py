"""What tests of the consumer share: it runs while the test looks on."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from queue_runtime.consumer import Consumer
from queue_runtime.message import Message

QUEUE = "orders"


@asynccontextmanager
async def running(consumer: Consumer) -> AsyncIterator[asyncio.Task[Any]]:
    task = asyncio.create_task(consumer.run())
    try:
        yield task
        consumer.stop()
    finally:
        if not task.done() and sys.exc_info()[0] is not None:
            consumer.stop_now()  # a failed test must not wait for handlers that never end
        await asyncio.wait([task])


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that real tasks bring about; the test's own timeout ends it."""
    while not condition():
        await asyncio.sleep(0.001)


def messages(count: int, **fields: Any) -> list[Message]:
    return [Message(body=str(number).encode(), **fields) for number in range(count)]
