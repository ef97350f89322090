from typing import final

SMALLEST_VIEW: int

@final
class Mapping: ...

def map_file(fd: int, size: int) -> memoryview: ...
