from asyncio import Future
from collections.abc import Awaitable, Callable, Iterable
from datetime import timedelta
from typing import Any, Generic, Literal, TypeVar

from queue_runtime._core.outcome import Cancellation, MPCCStats
from queue_runtime._core.pumping import Pumping

_T = TypeVar("_T")

class MultiProducerConcurrentConsumer(Pumping, Generic[_T]):
    def __init__(
        self,
        batch_size: int,
        push_interval: float | timedelta,
        max_concurrency: int,
        number_of_slots: int,
        *,
        overflow: Literal["raise", "block", "drop_oldest", "unbounded"] = "raise",
        slot_capacity: int | None = None,
        low_water: int | None = None,
        on_failure: Callable[[int, list[_T], list[BaseException]], object] | None = None,
        retry: Callable[[BaseException, int], float | None] | None = None,
    ) -> None: ...
    def __class_getitem__(cls, item: Any) -> Any: ...
    def push(self, item: _T, slot_number: int) -> None: ...
    def push_many(self, items: Iterable[_T], slot_number: int) -> None: ...
    async def push_wait(self, item: _T, slot_number: int) -> None: ...
    def submit(self, item: _T, slot_number: int) -> Future[Any]: ...
    async def push_and_wait(self, item: _T, slot_number: int) -> Any: ...
    def stats(self, slot_number: int | None = None) -> MPCCStats: ...
    def start(self, pump: Callable[[list[_T], int, Any, Cancellation], Awaitable[Any]], state: Any = None) -> None: ...
    async def complete(self, drain: bool = True, timeout: float | timedelta | None = None) -> dict[int, list[_T]]: ...

MPCC = MultiProducerConcurrentConsumer
