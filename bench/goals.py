"""Reads what a figure is to reach, as ``extra_info["goal"]`` says it, and tells whether it does.

The forms, where TIME is ours and the numbers are per item::

    <= 2.5 x deque.append             TIME is at most 2.5 times the rival's      also "<= 1/4 of the plain MPCC"
    <= list.extend + 12 ns an item    TIME is at most the rival's and 12 ns
    <= 400 ns                         TIME is at most that; also us, µs, ms
    >= 1.5 x msgspec                  ours is at least 1.5 times as fast
    >= 50 x each rival                the same, for every row that is not ours
    >= 200,000/s                      ours does at least so many a second
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

NUMBER = r"(?P<number>[\d.,]+(?:/\d+)?)"
UNIT = {"ns": 1.0, "us": 1e3, "µs": 1e3, "ms": 1e6}
TIMES = re.compile(rf"(?P<sign><=|>=) {NUMBER} (?:x|of) (?P<rival>.+)")
PLUS = re.compile(rf"<= (?P<rival>.+) \+ {NUMBER} (?P<unit>ns|us|µs|ms)(?: an item| per item)?")
BOUND = re.compile(rf"<= {NUMBER} (?P<unit>ns|us|µs|ms)(?: an item| per item)?")
RATE = re.compile(rf">= {NUMBER} ?(?:/ ?s|a second|per second)")
FILLERS = {"the", "a", "an", "of"}


def is_met(goal: str, ours: float, rows: Mapping[str, float]) -> bool | None:
    """Return whether ``ours``, in ns an item, reaches the goal beside its group; None where that is not clear."""
    if match := BOUND.fullmatch(goal):
        return ours <= _number(match) * UNIT[match["unit"]]
    if match := RATE.fullmatch(goal):
        return 1e9 / ours >= _number(match)
    if match := PLUS.fullmatch(goal):
        rivals = _rivals(match["rival"], rows)
        extra = _number(match) * UNIT[match["unit"]]
        return all(ours <= rival + extra for rival in rivals) if rivals else None
    if match := TIMES.fullmatch(goal):
        rivals = _rivals(match["rival"], rows)
        if not rivals:
            return None
        if match["sign"] == "<=":
            return all(ours <= _number(match) * rival for rival in rivals)
        return all(rival / ours >= _number(match) for rival in rivals)
    return None


def is_ours(label: str) -> bool:
    return label.startswith("ours")


def _number(match: re.Match[str]) -> float:
    return float(Fraction(match["number"].replace(",", "")))


def _rivals(name: str, rows: Mapping[str, float]) -> list[float]:
    """The rows that the name means: all rivals, the one of this very name, or those that have all of its words."""
    if name in ("each rival", "every rival", "all rivals"):
        return [time for label, time in rows.items() if not is_ours(label)]
    if name in rows:
        return [rows[name]]
    wanted = _words(name)
    return [time for label, time in rows.items() if wanted <= _words(label) and (not is_ours(label) or is_ours(name))]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower())) - FILLERS
