"""What is told on stderr: sentences, and the library's log."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections import Counter

ALIKE = 3
"""Log records of one kind that are shown; the others are counted in the table."""


def tell(sentence: str) -> None:
    """Say something to the user, on stderr."""
    sys.stderr.write(shown(sentence) + "\n")
    sys.stderr.flush()


def shown(text: str) -> str:
    """Return ``text`` with everything escaped that would act on a terminal instead of being seen."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


class _Lines(logging.Handler):
    """A line for each record; for an exception, its class, its text and the place, not the whole traceback."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self._whole = whole
        self._seen: Counter[tuple[str, str]] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        line = record.getMessage()
        if not self._whole:
            kind = (str(record.msg), type(error).__name__)
            self._seen[kind] += 1
            if self._seen[kind] > ALIKE:
                if self._seen[kind] == ALIKE + 1:
                    tell("note: more of these are only counted; -v shows all")
                return
            if error is not None:
                line += f": {type(error).__name__}: {error}{_place(error)}"
        tell(f"{record.levelname.lower()}: {line}")
        if self._whole and error is not None:
            sys.stderr.write("".join(traceback.format_exception(error)))


def log_to_stderr(verbose: bool) -> None:
    """Show the library's log, unless the handler's module has configured logging itself."""
    if logging.getLogger().handlers:
        return
    logger = logging.getLogger("queue_runtime")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Lines)]:
        logger.removeHandler(handler)
    logger.addHandler(_Lines(verbose))
    logger.setLevel(logging.INFO if verbose else logging.WARNING)


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
