"""The command ``queue-runtime``: run a handler over a queue, send, peek, and look after dead letters.

Arguments and printing only; what it does, the library does.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code; ``queue-runtime --help`` tells the codes."""
    try:
        from queue_runtime.cli.commands import root
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        sys.stderr.write("The command line needs click and rich: pip install 'queue-runtime[cli]'\n")
        sys.exit(3)
    root(prog_name="queue-runtime")
