"""The client's end of a connection: many requests at once, and what becomes of answers that come too late."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from queue_runtime.errors import ClosedError, ConnectionFailedError, QueueRuntimeError, QueueTimeoutError
from remote.frames import Frames

Late = Callable[[Any], None]


def _ignored(value: object) -> None:
    """Nothing has to be done about a late answer."""


class Link(Frames):
    """A connection to the broker, and who waits for which answer."""

    def __init__(self, retry_after: float) -> None:
        super().__init__()
        self.attachment = 0
        self.error: QueueRuntimeError | None = None
        self._retry_after = retry_after
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._late: dict[int, Late] = {}
        """Whom an answer is given to when its future has ended otherwise."""
        self._lost = asyncio.get_running_loop().create_future()

    @property
    def is_up(self) -> bool:
        return self.error is None

    def tell(self, method: str, *arguments: Any) -> None:
        """Ask for something and ignore the answer."""
        if self.is_up:
            number = next(self._numbers)
            self._late[number] = _ignored
            self.post((number, method, *arguments))

    async def request(
        self,
        method: str,
        *arguments: Any,
        timeout: float,
        late: Late = _ignored,
        begun: Callable[[int], None] = _ignored,
    ) -> Any:
        """Return the answer. ``late`` gets one that comes when nobody waits for it any more."""
        if self.error is not None:
            raise self.failure()
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        future = self._waiting[number] = loop.create_future()
        self._late[number] = late
        timer = loop.call_later(timeout, self._expire, number, method, timeout)
        self.post((number, method, *arguments))
        begun(number)
        try:
            return await future
        except (asyncio.CancelledError, QueueTimeoutError):
            if self._waiting.pop(number, None) is not None:
                self.withdraw(number, late)
            elif not future.cancelled() and future.exception() is None:
                late(future.result())  # it was there in the turn of the cancellation
            raise
        finally:
            timer.cancel()

    def withdraw(self, number: int, late: Late) -> None:
        """Have a request ended, and whatever was its answer already given to ``late``."""
        if self.is_up:
            self._late[number] = late
            self.post((0, "cancel", number))

    def divert(self, number: int, value: Any, late: Late) -> bool:
        """Answer a request from here; whether it waited still."""
        future = self._waiting.pop(number, None)
        if future is None or future.done():
            return False
        future.set_result(value)
        self.withdraw(number, late)
        return True

    def failure(self) -> QueueRuntimeError:
        """The error of this call, its own object: whoever raises it adds his traceback."""
        if isinstance(self.error, ClosedError):
            return ClosedError(str(self.error))
        failure = ConnectionFailedError(str(self.error))
        failure.retry_after = self._retry_after
        failure.__cause__ = self.error and self.error.__cause__
        return failure

    def frame_received(self, frame: Any) -> None:
        number, is_fine, value = frame
        future = self._waiting.pop(number, None)
        late = self._late.pop(number, _ignored)
        if future is None or future.done():
            if is_fine:
                late(value)
        elif is_fine:
            future.set_result(value)
        else:
            future.set_exception(value or ClosedError("the broker ended the request"))

    def gone(self, error: Exception | None) -> None:
        self.fail(ConnectionFailedError("the connection to the broker broke"), error)
        if not self._lost.done():
            self._lost.set_result(None)

    def fail(self, error: QueueRuntimeError, cause: Exception | None = None) -> None:
        if self.error is None:
            error.__cause__ = cause
            self.error = error
            waiting = list(self._waiting.values())
            self._waiting.clear()
            self._late.clear()
            for future in waiting:
                if not future.done():
                    future.set_exception(self.failure())

    async def close(self) -> None:
        self._flush()
        if self.transport is not None:
            self.transport.close()
        await self._lost

    def _expire(self, number: int, method: str, timeout: float) -> None:
        future = self._waiting.get(number)
        if future is not None and not future.done():
            future.set_exception(QueueTimeoutError(f"no answer to {method} within {timeout:g} s"))
