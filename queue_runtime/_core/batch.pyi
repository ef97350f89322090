from datetime import timedelta
from typing import NamedTuple, final

HISTORY: int
RECENT: int
MAX_SECONDS: float

class BatchRecord(NamedTuple):
    message_count: int
    total_duration: float
    processing_duration: float | None
    success_count: int | None

@final
class AdaptiveBatchSizer:
    def __init__(self, min_batch_size: int, max_batch_size: int, target_batch_duration: float | timedelta) -> None: ...
    @property
    def min_batch_size(self) -> int: ...
    @property
    def max_batch_size(self) -> int: ...
    @property
    def target_batch_duration(self) -> float: ...
    @property
    def history(self) -> tuple[BatchRecord, ...]: ...
    def record(
        self,
        message_count: int,
        total_duration: float | timedelta,
        processing_duration: float | timedelta | None = None,
        success_count: int | None = None,
    ) -> None: ...
    def calculate_optimal_batch_size(self) -> int: ...
