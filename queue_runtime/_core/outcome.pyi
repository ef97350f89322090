import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

logger: logging.Logger

class MPCCStats(NamedTuple):
    pushed: int
    waiting: int
    in_flight: int
    pumps: int
    batches: int
    delivered: int
    failed: int
    retried: int
    dropped: int
    refused: int
    left: int
    wakes: int

@final
class Cancellation:
    @property
    def cancelled(self) -> bool: ...
    async def wait(self) -> None: ...

def time_to_retry(
    retry: Callable[[BaseException, int], float | None] | None, error: BaseException, attempt: int
) -> float | None: ...
def log_failure(slot_number: int, items: Sequence[object], exceptions: Sequence[BaseException]) -> None: ...
