"""How a command fails: with one sentence and a code."""

from __future__ import annotations

import enum

import click


class Code(enum.IntEnum):
    """The exit codes; a usage error is click's own 2."""

    FINE = 0
    FAILED = 1
    USAGE = 2
    CONFIGURATION = 3
    DEAD_LETTERS = 4
    INTERRUPTED = 130
    TERMINATED = 143


class Failure(click.ClickException):
    """Printed as ``Error: …``, without a traceback."""

    def __init__(self, message: str, code: Code = Code.FAILED) -> None:
        super().__init__(message)
        self.code = code

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # click has it as a class variable
        return int(self.code)
