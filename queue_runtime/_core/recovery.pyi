from collections.abc import Callable, Sequence
from mmap import mmap
from typing import final

from queue_runtime._core.engine import Engine
from queue_runtime._core.journal import Records
from queue_runtime._core.message import Message

def has_record(buffer: bytes | mmap, segment: int, start: int) -> bool: ...
def checksum(data: bytes) -> int: ...

@final
class Recovery:
    def __init__(
        self,
        make: Callable[[str], Engine],
        now: float,
        wall: float,
        threshold: int = 0,
        moved: Callable[[Message], Message] | None = None,
    ) -> None: ...
    @property
    def queues(self) -> dict[int, Engine]: ...
    @property
    def ended(self) -> bool: ...
    @property
    def records(self) -> int: ...
    def feed(self, buffer: bytes | mmap, segment: int, offset: int) -> int: ...
    def finish(self) -> None: ...

@final
class Snapshot:
    def __init__(self, engines: Sequence[Engine]) -> None: ...
    def more(self, size: int, now: float, wall: float) -> Records | None: ...
