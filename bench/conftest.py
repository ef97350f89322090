"""What holds for every figure: it starts from a clean heap, and says how many items a round has."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _clean_heap(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nobody pays for the garbage of the row before."""
    gc.collect()
    yield
    benchmark: Any = request.node.funcargs.get("benchmark")
    if benchmark is not None and not benchmark.disabled:
        assert benchmark.group, "a row needs benchmark.group"
        assert benchmark.extra_info.get("items"), "a row needs extra_info['items'], the items of a round"
