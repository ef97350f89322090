"""Event loops for the tests of the MPCC: asyncio, uvloop, and one whose time jumps instead of passing."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
    loop: JumpingLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(0)
        if not ready:
            self.loop.now += timeout  # nothing to do until the next timer: be there
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """Timers fire in order and at their time exactly, and no test waits for one. For one thread only."""

    def __init__(self) -> None:
        self.now = 1000.0
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
    "jumping": JumpingLoop,
}


def run(
    main: Coroutine[Any, Any, T], loop_factory: Callable[[], asyncio.AbstractEventLoop] = JumpingLoop, limit: float = 20
) -> T:
    """Run `main` on a loop of its own; a test that hangs fails in `limit` seconds of the loop's time."""

    async def limited() -> T:
        if loop_factory is JumpingLoop:
            return await main
        return await asyncio.wait_for(main, limit)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(limited())


async def turns(count: int = 10) -> None:
    """Let what is ready run, without passing time."""
    for _ in range(count):
        await asyncio.sleep(0)


class Recorder:
    """A pump that notes its batches."""

    def __init__(self, answer: Callable[[list[Any], int], Awaitable[Any]] | None = None) -> None:
        self.batches: list[tuple[int, list[Any]]] = []
        self.running: dict[int, int] = {}
        self.most: dict[int, int] = {}
        self._answer = answer

    async def __call__(self, items: list[Any], slot: int, state: Any, cancellation: Any) -> Any:
        self.batches.append((slot, list(items)))
        self.running[slot] = self.running.get(slot, 0) + 1
        self.most[slot] = max(self.most.get(slot, 0), self.running[slot])
        try:
            if self._answer is not None:
                return await self._answer(items, slot)
        finally:
            self.running[slot] -= 1

    def items(self, slot: int | None = None) -> list[Any]:
        return [item for number, batch in self.batches if slot in (None, number) for item in batch]

    def sizes(self, slot: int | None = None) -> list[int]:
        return [len(batch) for number, batch in self.batches if slot in (None, number)]
