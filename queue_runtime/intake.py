"""How a consumer's messages come in: within its bounds, past the breaker, whatever passing errors there are."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from queue_runtime.arguments import MAX_COUNT
from queue_runtime.breaker import BreakerState
from queue_runtime.clock import sleep
from queue_runtime.errors import ConnectionFailedError, QueueRuntimeError, QueueTimeoutError
from queue_runtime.message import Receipt, ReceivedMessage
from queue_runtime.runner import Runner

logger = logging.getLogger("queue_runtime.consumer")

T = TypeVar("T")
Receive = Callable[[int], Awaitable[list[ReceivedMessage]]]

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds between attempts to fetch after passing errors: doubled from the first to the longest."""

NO_ANSWER = (ConnectionFailedError, QueueTimeoutError)
"""After these, messages may be locked for a receive that they never reached. Whoever received on from a session would
pass them over: the session is let go, and with it they are free again, in their order."""


class LeftOutError(Exception):
    """A hook around receive failed after messages of a session had come: it is let go, as one without an answer."""


class Intake:
    """What the feeds of one consumer fetch with.

    Thread-safety: for the client's event loop.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.under_way: dict[object, float] = {}
        """When the calls that are under way have to be back, by the monotonic clock."""
        self.left_out: set[int] = set()
        """Receivers of sessions of which a hook left messages out: nothing may be fetched before they come back."""

    async def allowed(self) -> int:
        """Wait while the breaker is open; return how many messages may be fetched: one while it probes."""
        breaker, runner = self.runner.breaker, self.runner
        while breaker is not None and (state := breaker.state) is not BreakerState.CLOSED:
            if state is BreakerState.OPEN:
                await breaker.wait_until_allowed()
            elif runner.will_try:  # that probes
                runner.breaker_moved.clear()
                await runner.breaker_moved.wait()
            else:
                return 1
        return MAX_COUNT

    async def fetch(
        self, granted: int, receive: Receive, *, timeout: float, of_session: bool = False, is_awaited: bool = False
    ) -> list[ReceivedMessage]:
        """Receive into the room that was granted, and give back what was not needed of it.

        The room of a session is its own as long as it is held; and it is let go after a receive without an answer.
        What messages that are held wait for comes past the bound on bytes, which they may use up.
        """
        runner = self.runner
        messages: list[ReceivedMessage] = []
        reserved = 0.0
        try:
            count = granted
            if not is_awaited:
                count, reserved = await runner.bytes.reserve(granted)
            call = partial(receive, count)
            hooked = call if runner.chain.receive is None else partial(self._hooked, call, of_session)
            messages = await self.persistently(hooked, timeout=timeout, once=NO_ANSWER if of_session else ())
        finally:
            if not of_session:
                runner.room.give(granted - len(messages))
            runner.bytes.arrived(reserved, [message.size for message in messages])
        if messages:
            runner.hold(messages)
        return messages

    async def persistently(
        self,
        call: Callable[[], Awaitable[T]],
        *,
        timeout: float,
        once: tuple[type[QueueRuntimeError], ...] = (),
    ) -> T:
        """Call, again after a pause while the error is a passing one, but for those of ``once``.

        A call that does not come back long after its ``timeout``, in seconds, is a stall.
        """
        pause = FIRST_PAUSE
        while True:
            token = object()
            try:
                self.under_way[token] = self.runner.client.clock.monotonic() + timeout
                return await call()
            except QueueRuntimeError as error:
                if not error.is_transient or isinstance(error, once):
                    raise
                wait = max(pause, error.retry_after or 0.0)
                logger.warning("cannot fetch, queue=%s, again in %.1f s: %s", self.runner.queue_name, wait, error)
            finally:
                self.under_way.pop(token, None)
            await sleep(self.runner.client.clock, wait)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def release(self, messages: Sequence[ReceivedMessage]) -> None:
        """Give back messages that no handler has begun."""
        runner = self.runner
        try:
            await runner.client.abandon_messages(messages)
        except Exception as error:
            is_bug = not isinstance(error, QueueRuntimeError)
            logger.warning("not all released, queue=%s: %s", runner.queue_name, error, exc_info=is_bug)

    async def _hooked(
        self, call: Callable[[], Awaitable[list[ReceivedMessage]]], of_session: bool
    ) -> list[ReceivedMessage]:
        """Receive through the middleware, and release what it leaves out, or all when it fails.

        What it leaves out of a session comes back with the end of the hold on it, so that nothing overtakes it.
        """
        assert self.runner.chain.receive is not None
        came: dict[Receipt, ReceivedMessage] = {}

        async def noted() -> list[ReceivedMessage]:
            messages = await call()
            came.update((message.receipt, message) for message in messages)
            return messages

        try:
            messages = await self.runner.chain.receive(noted)()
            for message in messages:
                came.pop(message.receipt, None)
            return messages
        except QueueRuntimeError as error:
            if came and of_session and error.is_transient:  # not to be tried again here
                raise LeftOutError(str(error)) from error
            raise
        finally:
            if came and of_session:
                self.left_out.update(receipt.receiver_id for receipt in came)
            elif came:
                self.runner.spawn(self.release([*came.values()]))
