"""The real in-memory provider behind a recorder: what the client asked of it, and failures on order."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from queue_runtime import client as client_module
from queue_runtime.clock import Clock
from queue_runtime.config import ProviderConfig
from queue_runtime.errors import QueueRuntimeError
from queue_runtime.message import Message, Receipt, ReceivedMessage
from queue_runtime.providers import open_provider
from queue_runtime.providers.base import Disposition, Outcome

Fault = Callable[[Sequence[Any]], list[Any] | None]
"""Given what is settled, renewed or sent, or who is asked: raises, or says the outcomes, or returns an awaitable that
does; None passes the call on."""


class Recorder:
    """What all receivers of a client were asked to do."""

    def __init__(self) -> None:
        self.settled: list[tuple[int, Disposition, list[Receipt]]] = []
        self.renewed: list[list[Receipt]] = []
        self.settle_faults: list[Fault] = []
        self.renew_faults: list[Fault] = []
        self.send_faults: list[Fault] = []
        self.receive_faults: list[Fault] = []
        self.accept_faults: list[Fault] = []
        self.open_faults: list[Fault] = []
        self.count_faults: list[Fault] = []
        self.close_faults: list[Fault] = []
        """Of receivers and of the provider."""
        self.received: list[int] = []
        """The ids of the receivers that were asked for messages."""
        self.gate: asyncio.Event | None = None
        """Where settle, open_receiver and accept_session wait."""
        self.is_late = False
        """Whether settle waits there with its answer, after the service did what it was asked."""
        self.at_gate = 0
        self.open: set[int] = set()
        """The ids of the receivers that are open."""

    async def pass_gate(self) -> None:
        if self.gate is not None:
            self.at_gate += 1
            await self.gate.wait()


class RecordedReceiver:
    def __init__(self, real: Any, recorder: Recorder) -> None:
        self._real = real
        self._recorder = recorder
        recorder.open.add(real.id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def settle(self, disposition: Disposition, receipts: Sequence[Receipt]) -> list[Outcome]:
        self._recorder.settled.append((self._real.id, disposition, list(receipts)))
        if not self._recorder.is_late:
            await self._recorder.pass_gate()
        given = await came(answer(self._recorder.settle_faults, receipts))
        outcomes: list[Outcome] = await self._real.settle(disposition, receipts) if given is None else given
        if self._recorder.is_late:
            await self._recorder.pass_gate()
        return outcomes

    async def receive(self, max_count: int, timeout: float) -> list[ReceivedMessage]:
        self._recorder.received.append(self._real.id)
        await came(answer(self._recorder.receive_faults, [self]))
        messages: list[ReceivedMessage] = await self._real.receive(max_count, timeout)
        return messages

    async def renew(self, receipts: Sequence[Receipt]) -> list[float | QueueRuntimeError]:
        self._recorder.renewed.append(list(receipts))
        given = answer(self._recorder.renew_faults, receipts)
        return await self._real.renew(receipts) if given is None else given

    async def renew_session(self) -> float:
        answer(self._recorder.renew_faults, ())
        end: float = await self._real.renew_session()
        return end

    async def close(self) -> None:
        await came(answer(self._recorder.close_faults, [self]))
        self._recorder.open.discard(self._real.id)
        await self._real.close()


class RecordedProvider:
    def __init__(self, real: Any, recorder: Recorder, **capabilities: Any) -> None:
        self._real = real
        self._recorder = recorder
        self.capabilities = replace(real.capabilities, **{"settles_in_process": False, **capabilities})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def send(self, queue_name: str, messages: Sequence[Message]) -> list[Outcome]:
        given = answer(self._recorder.send_faults, messages)
        return await self._real.send(queue_name, messages) if given is None else given

    async def open_receiver(self, *arguments: Any, **options: Any) -> Any:
        await self._recorder.pass_gate()
        await came(answer(self._recorder.open_faults, arguments))
        return RecordedReceiver(await self._real.open_receiver(*arguments, **options), self._recorder)

    async def accept_session(self, *arguments: Any) -> Any:
        await self._recorder.pass_gate()
        await came(answer(self._recorder.accept_faults, arguments))
        real = await self._real.accept_session(*arguments)
        return None if real is None else RecordedReceiver(real, self._recorder)

    async def counts(self, queue_name: str) -> Any:
        await came(answer(self._recorder.count_faults, [queue_name]))
        return await self._real.counts(queue_name)

    async def close(self) -> None:
        await came(answer(self._recorder.close_faults, [self]))
        await self._real.close()


async def came(given: Any) -> Any:
    """What a fault says, or what it says when it has been waited for."""
    return await given if inspect.isawaitable(given) else given


def hang(what: Sequence[Any]) -> Any:
    """A fault: the call does not come back."""
    return asyncio.Event().wait()


def answer(faults: list[Fault], what: Sequence[Any]) -> list[Any] | None:
    return faults.pop(0)(what) if faults else None


def fail(error: Exception) -> Fault:
    """A fault of the whole call."""

    def fault(what: Sequence[Any]) -> None:
        raise error

    return fault


def wrap(monkeypatch: pytest.MonkeyPatch, **capabilities: Any) -> Recorder:
    """Have clients that are made from now on use a recorded provider, with these capabilities changed."""
    recorder = Recorder()

    def opened(config: ProviderConfig, clock: Clock) -> RecordedProvider:
        return RecordedProvider(open_provider(config, clock), recorder, **capabilities)

    monkeypatch.setattr(client_module, "open_provider", opened)
    return recorder
