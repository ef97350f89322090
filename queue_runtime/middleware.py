"""Hooks around what a consumer does: receive, handle, settle."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from queue_runtime.context import HandlerContext
from queue_runtime.message import ReceivedMessage
from queue_runtime.providers.base import Disposition, Outcome

logger = logging.getLogger("queue_runtime.consumer")

Fetch = Callable[[], Awaitable[list[ReceivedMessage]]]
Next = Callable[[], Awaitable[None]]
Settle = Callable[[Disposition], Awaitable[Outcome]]


class Middleware:
    """Override the hooks that you need; one that is not overridden costs nothing.

    The first of several is the outermost. Every hook calls its last argument once and returns what it returned.

    Thread-safety: called on the consumer's event loop, for many messages at once.
    """

    async def receive(self, fetch: Fetch) -> list[ReceivedMessage]:
        """Around each receive: the messages that came, possibly none.

        What it leaves out is released, and comes back; a session is let go with it, after what it returned. An error
        that passes is tried again after a pause.
        """
        return await fetch()

    async def handle(self, context: HandlerContext, call_next: Next) -> None:
        """Around the handler, of one message or of a batch. What it raises is a failure of the handler.

        It may decide on messages through ``context``; without calling ``call_next`` the handler is left out.
        """
        await call_next()

    async def settle(self, message: ReceivedMessage, disposition: Disposition, call_next: Settle) -> Outcome:
        """Around the settlement of one message: ``await call_next(disposition)`` gives its outcome.

        It may pass another disposition on, and again after an error. It must not raise, nor leave ``call_next`` out:
        the message would come back when its lock ends. What counts is what the last call came to.
        """
        return await call_next(disposition)


class Chain:
    """Several middlewares as one; what none of them overrides is None."""

    __slots__ = ("handle", "receive", "settle")

    def __init__(self, middlewares: Sequence[Middleware]) -> None:
        def those(hook: str) -> list[Middleware]:
            return [one for one in middlewares if getattr(type(one), hook) is not getattr(Middleware, hook)]

        self.receive = _around_receive(those("receive"))
        self.handle = _around_handle(those("handle"))
        self.settle = _around_settle(those("settle"))

    async def settled(
        self, message: ReceivedMessage, disposition: Disposition, settle: Settle
    ) -> tuple[Disposition, Outcome]:
        """Settle through the hooks; return the last disposition that they passed on, and what it came to.

        Raises what a hook raises instead, or RuntimeError when none of them passed anything on.
        """
        assert self.settle is not None
        last: tuple[Disposition, Outcome] | None = None

        async def noted(disposition: Disposition) -> Outcome:
            nonlocal last
            if last is None or last[1] is not None:  # what is settled stays as it is
                last = disposition, await settle(disposition)
            return last[1]

        try:
            await self.settle(message, noted)(disposition)
        except Exception:
            if last is None:
                raise
            logger.exception("a hook failed after settling, message_id=%s", message.message_id)
        if last is None:
            raise RuntimeError("the middleware did not settle the message")
        return last


def _around_receive(middlewares: list[Middleware]) -> Callable[[Fetch], Fetch] | None:
    def around(fetch: Fetch) -> Fetch:
        for one in reversed(middlewares):
            fetch = partial(one.receive, fetch)
        return fetch

    return around if middlewares else None


def _around_handle(middlewares: list[Middleware]) -> Callable[[HandlerContext, Next], Next] | None:
    def around(context: HandlerContext, call: Next) -> Next:
        for one in reversed(middlewares):
            call = partial(one.handle, context, call)
        return call

    return around if middlewares else None


def _around_settle(middlewares: list[Middleware]) -> Callable[[ReceivedMessage, Settle], Settle] | None:
    def around(message: ReceivedMessage, settle: Settle) -> Settle:
        for one in reversed(middlewares):
            settle = _around_one(one, message, settle)
        return settle

    return around if middlewares else None


def _around_one(one: Middleware, message: ReceivedMessage, call_next: Settle) -> Settle:
    return lambda disposition: one.settle(message, disposition, call_next)
