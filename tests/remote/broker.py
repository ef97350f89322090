"""The broker: ``python -m remote.broker SOCKET`` serves in-memory queues to any number of connections.

Every connection has a provider of its own over the queues of its space, so that what it holds is released when it is
lost. A frame asks ``(number, method, *arguments)``; the answer is ``(number, is_fine, value)``, in any order.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import sys
from collections import Counter, deque
from pathlib import Path
from typing import Any

from queue_runtime import decode_envelope, encode_envelope
from queue_runtime.clock import ManualClock, SystemClock
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import (
    ClosedError,
    InvalidReceiptError,
    ProviderError,
    QueueRuntimeError,
    ServiceUnavailableError,
    SessionLockLostError,
    ThrottledError,
)
from queue_runtime.message import Receipt, ReceivedMessage
from queue_runtime.providers.base import ABANDON, Disposition, Outcome
from queue_runtime.providers.durable import open_memory
from queue_runtime.providers.memory import InMemoryProvider, InMemoryReceiver, InMemorySessionReceiver
from remote.frames import Frames


def packed(message: ReceivedMessage) -> tuple[Any, ...]:
    """A delivery as it travels: the envelope, and what else there is to tell of it."""
    times = (message.enqueued_at, message.first_delivered_at, message.delivered_at, message.locked_until)
    return (
        encode_envelope(message.message()),
        message.receipt.token if message.delivery_count and message.locked_until else None,
        message.delivery_count,
        *(None if time is None else time.timestamp() for time in times),
        message.sequence_number,
        message.dead_letter_reason,
        message.dead_letter_description,
    )


class Faults:
    """What goes wrong, as it was asked for in ``control`` frames."""

    def __init__(self) -> None:
        self.chance = random.Random()
        self.drop_share = 0.0
        """Of the requests: the connection is dropped before it, after it, or in the middle of its answer."""
        self.throttled: Counter[str] = Counter()
        self.muted: Counter[str] = Counter()
        """Requests of a method that are carried out and never answered."""
        self.refuse_every = 0
        """Of the messages of a settlement or a renewal, each so many-th is refused for a passing reason."""
        self.refused = 0
        self.stolen = 0
        """Messages handed out next that are given back at once, behind their receiver's back."""
        self.retry_after = 0.01

    def refuses(self) -> bool:
        self.refused += bool(self.refuse_every)
        return bool(self.refuse_every) and self.refused % self.refuse_every == 0


class Attachment:
    """What a connection has: a provider and receivers, kept for a while when it is to return."""

    def __init__(self, client: str, provider: InMemoryProvider) -> None:
        self.client = client
        self.provider = provider
        self.number = random.getrandbits(62)
        self.receivers: dict[int, InMemoryReceiver] = {}
        self.stolen: set[int] = set()
        """Receivers of sessions that were taken from them."""
        self.connection: Connection | None = None
        self.leaving: asyncio.TimerHandle | None = None


class Broker:
    """The spaces, the connections, and the faults."""

    def __init__(self, folder: Path | None, latency: float) -> None:
        self.folder = folder
        self.latency = self.first_latency = latency
        self.keepers: dict[str, InMemoryProvider] = {}
        self.clocks: dict[str, ManualClock | SystemClock] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        self.attachments: dict[str, Attachment] = {}
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.faults = Faults()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.items: Counter[tuple[str, str]] = Counter()
        self.end = asyncio.Event()

    def provider(self, space: str, settings: dict[str, Any]) -> InMemoryProvider:
        """Open a provider of a space. The first one says what its queues are like; one more keeps them there."""
        is_manual = settings.pop("manual_clock")
        clock = self.clocks.setdefault(space, ManualClock() if is_manual else SystemClock())
        values = {"name": space, **self.settings.get(space, {}), **settings}
        if self.folder is not None:
            values["path"] = str(self.folder / space)
        provider = open_memory(InMemoryConfig(**values), clock=clock)
        if space not in self.keepers:
            self.settings[space] = {name: value for name, value in settings.items() if name != "queues"}
            self.keepers[space] = open_memory(InMemoryConfig(**values), clock=clock)
        return provider

    def later(self, coroutine: Any) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def control(self, fault: str, **options: Any) -> Any:
        """Do what a test asks for; see the README."""
        return getattr(self, f"do_{fault}")(**options)

    def do_ping(self) -> int:
        return os.getpid()

    async def do_advance(self, space: str, seconds: float) -> None:
        """Turn the clock of a space."""
        clock = self.clocks[space]
        assert isinstance(clock, ManualClock)
        await clock.advance(seconds)

    def do_latency(self, seconds: float) -> None:
        self.latency = seconds

    def do_reset(self) -> None:
        """Let nothing go wrong from now on."""
        self.faults = Faults()
        self.latency = self.first_latency

    def do_drop(self, count: int = 1_000_000, space: str | None = None) -> int:
        """Drop connections, all or so many chosen at random."""
        found = [c for c in self.connections if c.attachment is not None and space in (None, c.space)]
        self.faults.chance.shuffle(found)
        for connection in found[:count]:
            connection.drop()
        return len(found[:count])

    def do_drop_share(self, share: float, seed: int = 0) -> None:
        self.faults.drop_share = share
        self.faults.chance.seed(seed)

    def do_throttle(self, method: str, count: int, retry_after: float = 0.01) -> None:
        self.faults.throttled[method] = count
        self.faults.retry_after = retry_after

    def do_mute(self, method: str, count: int) -> None:
        self.faults.muted[method] = count

    def do_refuse_every(self, number: int) -> None:
        self.faults.refuse_every = number

    def do_steal(self, count: int) -> None:
        self.faults.stolen = count

    async def do_steal_session(self, session_id: str) -> int:
        return await self._close_receivers(
            lambda r: isinstance(r, InMemorySessionReceiver) and r.session_id == session_id
        )

    async def do_detach(self, queue: str, space: str | None = None) -> int:
        """End the receivers of a queue that have no session."""
        return await self._close_receivers(
            lambda r: r.queue_name == queue and not isinstance(r, InMemorySessionReceiver), space
        )

    async def _close_receivers(self, wanted: Any, space: str | None = None) -> int:
        count = 0
        for attachment in self.attachments.values():
            if space not in (None, attachment.connection and attachment.connection.space):
                continue
            for number, receiver in attachment.receivers.items():
                if wanted(receiver):
                    await receiver.close()
                    count += 1
                    if isinstance(receiver, InMemorySessionReceiver):
                        attachment.stolen.add(number)
        return count

    def do_statistics(self, space: str | None = None) -> dict[str, tuple[int, int]]:
        """For each method: calls, and the messages in them."""
        keys = [key for key in self.calls if space in (None, key[0])]
        total: dict[str, tuple[int, int]] = {}
        for key in keys:
            calls, items = total.get(key[1], (0, 0))
            total[key[1]] = (calls + self.calls[key], items + self.items[key])
        return total

    async def leave(self, attachment: Attachment) -> None:
        if self.attachments.get(attachment.client) is attachment:
            del self.attachments[attachment.client]
        await attachment.provider.close()

    async def serve(self, path: str, *, with_parent: bool) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: Connection(self), path, backlog=1024)
        if with_parent:
            loop.add_reader(0, self._parent_wrote)
        print("ready", flush=True)
        await self.end.wait()
        server.close()
        for connection in list(self.connections):
            connection.drop()
        for provider in [*(a.provider for a in self.attachments.values()), *self.keepers.values()]:
            await provider.close()

    def _parent_wrote(self) -> None:
        """Nothing but the end of its life can come from there."""
        if not os.read(0, 4096):
            asyncio.get_running_loop().remove_reader(0)
            self.end.set()


class Connection(Frames):
    """One client, from its hello on."""

    def __init__(self, broker: Broker) -> None:
        super().__init__()
        self.broker = broker
        self.space = ""
        self.attachment: Attachment | None = None
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.accepted: dict[int, int] = {}
        """The latest requests that got a session, and the numbers of its receivers."""
        self._delayed: deque[tuple[float, Any]] = deque()
        broker.connections.add(self)

    def frame_received(self, frame: Any) -> None:
        if not self.broker.latency and not self._delayed:
            self.begin(frame)
            return
        loop = asyncio.get_running_loop()
        self._delayed.append((loop.time() + self.broker.latency, frame))
        if len(self._delayed) == 1:
            loop.call_at(self._delayed[0][0], self._begin_delayed)

    def _begin_delayed(self) -> None:
        loop = asyncio.get_running_loop()
        while self._delayed and self._delayed[0][0] <= loop.time() + 0.0005:
            self.begin(self._delayed.popleft()[1])
        if self._delayed:
            loop.call_at(self._delayed[0][0], self._begin_delayed)

    def begin(self, frame: Any) -> None:
        number, method, *arguments = frame
        if method == "cancel":
            if (task := self.tasks.get(arguments[0])) is not None:
                task.cancel()
            elif (receiver := self.accepted.get(arguments[0])) is not None:  # the answer will find nobody
                self.broker.later(self.on_close(receiver))
            return
        task = self.tasks[number] = self.broker.later(self.answer(number, method, arguments))
        task.add_done_callback(lambda task: self.tasks.pop(number, None))

    async def answer(self, number: int, method: str, arguments: list[Any]) -> None:
        faults = self.broker.faults
        drops = ""
        if method not in ("hello", "control", "bye") and faults.drop_share:
            drops = faults.chance.choice(("before", "after", "torn")) * (faults.chance.random() < faults.drop_share)
        if drops == "before":
            self.drop()
            return
        reply: tuple[int, bool, Any]
        try:
            if faults.throttled[method] > 0:
                faults.throttled[method] -= 1
                raise ThrottledError(retry_after=faults.retry_after)
            reply = (number, True, await getattr(self, f"on_{method}")(*arguments))
            if method == "accept" and reply[2] is not None:
                self.accepted[number] = arguments[0]
                if len(self.accepted) > 100:
                    del self.accepted[next(iter(self.accepted))]
        except asyncio.CancelledError:
            reply = (number, False, None)
        except QueueRuntimeError as error:
            reply = (number, False, error)
        except Exception as error:
            reply = (number, False, ProviderError("remote", type(error).__name__, str(error)))
        if faults.muted[method] > 0:
            faults.muted[method] -= 1
        elif drops == "after":
            self.drop()
        elif drops == "torn":
            self.post_torn(reply)
        elif self.transport is not None:
            self.post(reply)

    def drop(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def gone(self, error: Exception | None) -> None:
        broker, attachment = self.broker, self.attachment
        broker.connections.discard(self)
        self._delayed.clear()
        for task in self.tasks.values():
            task.cancel()
        if attachment is None or attachment.connection is not self:
            return
        attachment.connection = None
        if self.linger:
            loop = asyncio.get_running_loop()
            attachment.leaving = loop.call_later(self.linger, lambda: broker.later(broker.leave(attachment)))
        else:
            broker.later(broker.leave(attachment))

    # What is asked. Receivers go by the numbers that their client gives them.

    @property
    def provider(self) -> InMemoryProvider:
        assert self.attachment is not None
        return self.attachment.provider

    def receiver(self, number: int) -> InMemoryReceiver:
        assert self.attachment is not None
        receiver = self.attachment.receivers.get(number)
        if receiver is None:
            raise ClosedError("there is no such receiver")
        return receiver

    def held(self, number: int) -> InMemorySessionReceiver:
        receiver = self.receiver(number)
        assert isinstance(receiver, InMemorySessionReceiver)
        assert self.attachment is not None
        if number in self.attachment.stolen:
            raise SessionLockLostError(receiver.session_id)
        return receiver

    def count(self, method: str, items: int) -> None:
        self.broker.calls[self.space, method] += 1
        self.broker.items[self.space, method] += items

    async def on_control(self, fault: str, options: dict[str, Any]) -> Any:
        result = self.broker.control(fault, **options)
        return await result if asyncio.iscoroutine(result) else result

    async def on_hello(self, client: str, space: str, settings: dict[str, Any], linger: float) -> int:
        """Attach; return a number which is the same as before only if nothing was lost."""
        broker = self.broker
        self.space, self.linger = space, linger
        attachment = broker.attachments.get(client)
        if attachment is None:
            attachment = Attachment(client, broker.provider(space, settings))
            broker.attachments[client] = attachment
        if attachment.leaving is not None:
            attachment.leaving.cancel()
            attachment.leaving = None
        if (before := attachment.connection) is not None:
            attachment.connection = None
            before.drop()
        attachment.connection = self
        self.attachment = attachment
        return attachment.number

    async def on_bye(self) -> None:
        assert self.attachment is not None
        attachment, self.attachment = self.attachment, None
        await self.broker.leave(attachment)

    async def on_send(self, queue: str, envelopes: list[bytes]) -> list[Outcome]:
        self.count("send", len(envelopes))
        return await self.provider.send(queue, [decode_envelope(envelope) for envelope in envelopes])

    async def on_open(self, number: int, queue: str, dead_letter: bool) -> float:
        assert self.attachment is not None
        receiver = self.attachment.receivers.get(number)
        if receiver is None:
            receiver = await self.provider.open_receiver(queue, dead_letter=dead_letter)  # type: ignore[assignment]
            assert isinstance(receiver, InMemoryReceiver)
            self.attachment.receivers[number] = receiver
        return receiver.lock_duration

    async def on_accept(self, number: int, queue: str, session_id: str | None, timeout: float) -> Any:
        assert self.attachment is not None
        self.count("accept", 1)
        receiver = await self.provider.accept_session(queue, session_id, timeout)
        if receiver is None:
            return None
        assert isinstance(receiver, InMemorySessionReceiver)
        self.attachment.receivers[number] = receiver
        return receiver.session_id, receiver.lock_duration, receiver.session_lock_duration, receiver.locked_until

    async def on_close(self, number: int) -> None:
        assert self.attachment is not None
        receiver = self.attachment.receivers.pop(number, None)
        if receiver is not None:
            await receiver.close()

    async def on_receive(self, number: int, max_count: int, timeout: float) -> list[tuple[Any, ...]]:
        receiver = self.receiver(number)
        try:
            messages = await receiver.receive(max_count, timeout)
        except ClosedError:
            if isinstance(receiver, InMemorySessionReceiver):
                self.held(number)
            raise
        self.count("receive", len(messages))
        found = [packed(message) for message in messages]
        if self.broker.faults.stolen and messages:
            self.broker.faults.stolen = max(0, self.broker.faults.stolen - len(messages))
            await receiver.settle(ABANDON, [message.receipt for message in messages])
        return found

    async def on_deferred(self, number: int, sequence_numbers: list[int]) -> list[tuple[Any, ...]]:
        return [packed(message) for message in await self.receiver(number).receive_deferred(sequence_numbers)]

    def allowed(self, number: int, tokens: list[Any]) -> tuple[list[Receipt], list[int], list[Any]]:
        """The receipts that no fault refuses, their places, and what there is to answer so far."""
        receiver = self.receiver(number)
        answers: list[Any] = [None] * len(tokens)
        receipts, places = [], []
        for place, token in enumerate(tokens):
            if self.broker.faults.refuses():
                error = answers[place] = ServiceUnavailableError("busy")
                error.retry_after = self.broker.faults.retry_after
            else:
                receipts.append(Receipt(receiver.queue_name, token, receiver.id))
                places.append(place)
        return receipts, places, answers

    async def on_settle(self, number: int, disposition: Disposition, tokens: list[Any]) -> list[Outcome]:
        self.count("settle", len(tokens))
        if (lost := self.lost(number)) is not None:
            return [lost] * len(tokens)
        receipts, places, answers = self.allowed(number, tokens)
        for place, outcome in zip(places, await self.receiver(number).settle(disposition, receipts), strict=True):
            answers[place] = outcome
        return answers

    async def on_renew(self, number: int, tokens: list[Any]) -> list[float | QueueRuntimeError]:
        self.count("renew", len(tokens))
        if (lost := self.lost(number)) is not None:
            return [lost] * len(tokens)
        receipts, places, answers = self.allowed(number, tokens)
        for place, end in zip(places, await self.receiver(number).renew(receipts), strict=True):
            answers[place] = end
        return answers

    def lost(self, number: int) -> QueueRuntimeError | None:
        """What became of the right to settle, where the receiver is gone."""
        assert self.attachment is not None
        receiver = self.attachment.receivers.get(number)
        if receiver is None:
            return InvalidReceiptError(None)
        if number in self.attachment.stolen and isinstance(receiver, InMemorySessionReceiver):
            return SessionLockLostError(receiver.session_id)
        return None

    async def on_renew_session(self, number: int) -> float:
        self.count("renew_session", 1)
        return await self.held(number).renew_session()

    async def on_get_state(self, number: int) -> bytes | None:
        return await self.held(number).get_state()

    async def on_set_state(self, number: int, state: bytes | None) -> None:
        await self.held(number).set_state(state)

    async def on_peek(self, queue: str, max_count: int, first: int, dead_letter: bool) -> list[tuple[Any, ...]]:
        messages = await self.provider.peek(queue, max_count, from_sequence_number=first, dead_letter=dead_letter)
        return [packed(message) for message in messages]

    async def on_counts(self, queue: str) -> dict[str, int]:
        return dataclasses.asdict(await self.provider.counts(queue))

    async def on_create(self, queue: str) -> None:
        await self.provider.create_queue(queue)


def main() -> None:
    parser = argparse.ArgumentParser(prog="remote.broker")
    parser.add_argument("socket")
    parser.add_argument("--path", type=Path, help="folder in which the queues are kept, over a crash")
    parser.add_argument("--latency", type=float, default=0.0, metavar="MS", help="by which each request is held up")
    parser.add_argument("--with-parent", action="store_true", help="end with the standard input")
    options = parser.parse_args()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(options.socket)

    async def serve() -> None:
        await Broker(options.path, options.latency / 1000).serve(options.socket, with_parent=options.with_parent)

    factory = None
    if sys.platform != "win32":
        with contextlib.suppress(ImportError):
            import uvloop

            factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner, contextlib.suppress(KeyboardInterrupt):
        runner.run(serve())


if __name__ == "__main__":
    main()
