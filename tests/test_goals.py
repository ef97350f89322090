"""The judge of the figures in bench/, and how their rows are called."""

import pytest

from bench.__main__ import label_of
from bench.goals import is_met

ROWS = {"ours push": 20.0, "deque append": 8.0, "plain python mpcc": 100.0, "janus": 900.0, "msgspec": 30.0}


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        ("<= 2.5 x deque.append", True),
        ("<= 2.4 x deque.append", False),
        ("<= 1/4 of the plain-Python MPCC", True),
        ("<= 1/6 of the plain-Python MPCC", False),
        ("<= deque.append + 12 ns an item", True),
        ("<= deque.append + 11 ns an item", False),
        (">= 1.5 x msgspec", True),
        (">= 1.6 x msgspec", False),
        (">= 40 x janus", True),
        (">= 50 x janus", False),
        (">= 0.4 x each rival", True),
        (">= 0.5 x each rival", False),
        ("<= 20 ns", True),
        ("<= 0.019 µs", False),
        (">= 50,000,000/s", True),
        (">= 50,000,001/s", False),
        ("<= 2 x nobody", None),
        ("as fast as light", None),
    ],
)
def test_goals_are_judged(goal: str, met: bool | None) -> None:
    assert is_met(goal, 20.0, ROWS) is met


@pytest.mark.parametrize(
    ("name", "param", "label"),
    [
        ("test_deque_append", None, "deque append"),
        ("test_ours_mpcc[500]", "500", "ours mpcc"),
        ("test_encode[ours, fresh]", "ours, fresh", "ours, fresh"),
        ("test_asyncio_queue_pair[the group]", "the group", "asyncio queue pair"),
    ],
)
def test_rows_have_names(name: str, param: str | None, label: str) -> None:
    assert label_of(name, param, "the group") == label
