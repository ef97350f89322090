"""How a command ends: with one sentence, and with a code."""

from __future__ import annotations

import enum
import os
import sys
import threading

import click

from queue_runtime.errors import ConfigurationError, QueueRuntimeError, ValidationError

OPTION_OF = {
    "max_concurrency": "--concurrency",
    "prefetch": "--prefetch",
    "max_sessions": "--max-sessions",
    "max_attempts": "--max-attempts",
    "drain_timeout": "--drain-timeout",
    "handler": "HANDLER",
    "rate": "--rate",
    "limit": "--limit",
    "session_id": "--session-id",
    "attributes": "--attribute",
    "content_type": "--content-type",
    "correlation_id": "--correlation-id",
    "deduplication_id": "--deduplication-id",
    "time_to_live": "--time-to-live",
    "delay": "--delay",
    "reason": "--filter-reason",
}
"""How the fields that errors name are called here."""


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


def failure_of(error: QueueRuntimeError) -> Failure:
    """Return the library's error as one sentence and a code, with the option's name for the field's."""
    if isinstance(error, ConfigurationError | ValidationError):
        problem = str(error).removeprefix(f"{error.field}: ")
        code = Code.CONFIGURATION if isinstance(error, ConfigurationError) else Code.USAGE
        return Failure(f"{OPTION_OF.get(error.field, error.field)}: {problem}", code)
    return Failure(str(error))


def end_in_spite_of_handlers(code: int) -> None:
    """End the process here when a plain handler still sits in its thread; else return."""
    stuck = [thread for thread in threading.enumerate() if thread.name.startswith("queue-runtime-handler")]
    for thread in stuck:
        thread.join(0.05)
    if any(thread.is_alive() for thread in stuck):
        sys.stderr.write(
            "a handler still runs in its thread; its message was released, and the process ends without it\n"
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
