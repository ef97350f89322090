from typing import final

@final
class Carried: ...

@final
class Slot:
    @property
    def number(self) -> int: ...
