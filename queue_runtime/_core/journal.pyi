from collections.abc import Callable
from typing import final

from typing_extensions import disjoint_base

from queue_runtime.errors import ProviderError

NO_ROOM: frozenset[int]

class Gone(OSError): ...

def failed(error: OSError) -> ProviderError: ...
def refusal_of(error: OSError) -> ProviderError: ...

@disjoint_base
class Records:
    @property
    def size(self) -> int: ...
    def take(self, segment: int, offset: int) -> bytes: ...

@final
class Journal(Records):
    def __init__(
        self,
        file: int,
        segment: int,
        offset: int,
        *,
        next_file: Callable[[], tuple[int, int, int]],
        segment_size: int,
        total_bytes: int,
    ) -> None: ...
    @property
    def segment(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def written(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    live_bytes: int
    segment_size: int
    failure: OSError | None
    def turn(self) -> None: ...
    def flush(self) -> ProviderError | None: ...
    def add_queue(self, queue: int, name: str) -> None: ...
    def replaced(self, gone: int, come: int) -> None: ...
