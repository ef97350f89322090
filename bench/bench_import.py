"""What `import queue_runtime` costs a process: every row starts a new interpreter, ours imports more in it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

ROWS = {
    "bare python": "pass",
    "asyncio alone": "import asyncio",
    "ours: import queue_runtime": "import queue_runtime",
    "ours: the envelope": "from queue_runtime import decode_envelope, encode_envelope",
    "ours: client and consumer": "from queue_runtime import Consumer, QueueClient",
}


@pytest.mark.parametrize("row", ROWS)
def test_import(benchmark: Any, row: str) -> None:
    benchmark.group = "start an interpreter and import"
    benchmark.extra_info["items"] = 1
    if row == "ours: import queue_runtime":
        benchmark.extra_info["goal"] = "<= bare python + 50000000 ns an item"
    benchmark.pedantic(lambda: subprocess.run([sys.executable, "-c", ROWS[row]], check=True), rounds=9, warmup_rounds=2)
