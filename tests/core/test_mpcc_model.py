"""The MPCC against its slow, obvious twin, step by step, on a loop whose time stands still."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loops import JumpingLoop, turns
from models import ModelMPCC

from queue_runtime._core.mpcc import MultiProducerConcurrentConsumer as MPCC
from queue_runtime.errors import AlreadyStartedError, ClosedError, QueueFullError


class Twins(RuleBasedStateMachine):
    @initialize(
        batch_size=st.integers(1, 5),
        max_concurrency=st.integers(1, 3),
        slots=st.integers(1, 3),
        spare=st.integers(0, 9),
        overflow=st.sampled_from(["raise", "drop_oldest", "unbounded"]),
    )
    def make(self, batch_size: int, max_concurrency: int, slots: int, spare: int, overflow: Any) -> None:
        capacity = batch_size + spare
        self.slots = slots
        self.counter = 0
        self.model = ModelMPCC(batch_size, max_concurrency, slots, capacity, overflow)
        self.real: MPCC[int] = MPCC(batch_size, 100, max_concurrency, slots, overflow=overflow, slot_capacity=capacity)
        self.begun: list[list[list[int]]] = [[] for _ in range(slots)]
        self.gates: list[list[tuple[asyncio.Future[None], list[int]]]] = [[] for _ in range(slots)]
        self.loop = JumpingLoop()
        self.completion: asyncio.Task[Any] | None = None
        self.expected_left: dict[int, list[int]] = {}

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.run_until_complete(self.real.complete(timeout=0))
            self.loop.close()

    async def pump(self, items: list[int], slot: int, state: Any, cancellation: Any) -> None:
        self.begun[slot].append(list(items))
        gate = asyncio.get_running_loop().create_future()
        self.gates[slot].append((gate, list(items)))
        await gate

    def settle(self) -> None:
        self.settled = True
        self.model.look()
        self.loop.run_until_complete(turns(12))
        if self.completion is not None and self.model.idle:
            assert self.completion.done()
            assert self.completion.result() == self.expected_left
            self.completion = None
            self.model.completed()

    @rule(slot=st.integers(0, 2), count=st.integers(1, 12), many=st.booleans(), wait=st.booleans())
    def push(self, slot: int, count: int, many: bool, wait: bool) -> None:
        slot %= self.slots
        self.settled = False  # the pushes of several rules may come before the loop's next turn
        items = list(range(self.counter, self.counter + count))
        self.counter += count
        for group in [items] if many else [[item] for item in items]:
            try:
                if many:
                    self.real.push_many(group, slot)
                else:
                    self.real.push(group[0], slot)
                answer = "ok"
            except QueueFullError:
                answer = "full"
            except ClosedError:
                answer = "closed"
            assert answer == self.model.push(group, slot)
        if wait:
            self.settle()

    @rule()
    def look(self) -> None:
        self.settle()

    @rule()
    def start(self) -> None:
        async def start() -> None:
            self.real.start(self.pump)

        try:
            self.loop.run_until_complete(start())
        except AlreadyStartedError:
            assert self.model.started
        else:
            assert not self.model.started
            self.model.start()
        self.settle()

    @rule(slot=st.integers(0, 2), which=st.integers(0, 2))
    def end_a_pump(self, slot: int, which: int) -> None:
        slot %= self.slots
        self.settle()
        if not self.gates[slot]:
            return
        which %= len(self.gates[slot])
        gate, _ = self.gates[slot].pop(which)
        gate.set_result(None)
        self.model.end(slot, which)
        self.settle()

    @precondition(lambda self: self.completion is None and self.model.started)
    @rule()
    def pass_the_interval(self) -> None:
        self.settle()
        self.loop.run_until_complete(asyncio.sleep(100))
        self.model.interval_passes()
        self.settle()

    @precondition(lambda self: self.completion is None)
    @rule(drain=st.booleans())
    def complete(self, drain: bool) -> None:
        self.settle()
        left = self.model.complete(drain)
        was_started = self.model.started
        self.expected_left = left
        completion = self.loop.create_task(self.real.complete(drain=drain))
        if was_started:
            self.completion = completion
        else:
            assert self.loop.run_until_complete(completion) == left
            self.model.closed = True
        self.settle()

    @invariant()
    def alike(self) -> None:
        if not getattr(self, "settled", False):
            return
        for number in range(self.slots):
            if len(self.begun[number]) > len(self.model.begun[number]):
                self.model.take_early(number)
        assert self.begun == self.model.begun
        for number, slot in enumerate(self.model.slots):
            stats = self.real.stats(number)
            assert stats.waiting == (
                len(slot.waiting) if self.completion is None or self.model.draining else stats.waiting
            )
            assert stats.pumps == len(slot.running)
            assert stats.in_flight == sum(map(len, slot.running))
            assert stats.delivered == sum(map(len, self.begun[number])) - stats.in_flight
            assert stats.pushed == stats.waiting + stats.in_flight + stats.delivered + stats.dropped + stats.left


Twins.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTwins = Twins.TestCase
