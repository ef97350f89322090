"""``python -m bench``: runs every figure beside its rivals and prints a table. README.md tells the method."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.goals import is_met, is_ours

BENCH = Path(__file__).resolve().parent
WIDTH = 120
"""Columns of what is no terminal."""
RIVALS = ["msgspec", "msgpack", "ormsgpack", "janus", "culsans", "aiobreaker", "tenacity", "uvloop"]
RIVALS += ["pytest-benchmark", "Cython"]


class Row(NamedTuple):
    group: str
    label: str
    nanoseconds: float
    """Median of the rounds, per item."""
    spread: float
    """Interquartile range as a part of the median."""
    rounds: int
    items: int
    goal: str | None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", help="only these, such as mpcc for bench_mpcc.py; all by default")
    parser.add_argument("-k", metavar="WORDS", help="only rows whose names match, as pytest's -k")
    arguments = parser.parse_args()
    found = {path.stem.removeprefix("bench_"): path for path in sorted(BENCH.glob("bench_*.py"))}
    for part in arguments.parts:
        if part not in found:
            parser.error(f"there is no part {part!r}; there are {', '.join(found)}")
    files = [path for part, path in found.items() if not arguments.parts or part in arguments.parts]
    machine = describe_machine()
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(Text("\n".join(f"{name}: {value}" for name, value in machine.items())))
    code, rows = measure(files, arguments.k)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    verdicts = [verdict for group in groups.values() for verdict in show(console, group)]
    if rows:
        conclude(console, verdicts)
        console.print(Text(f"Saved to {save(machine, rows, verdicts)}"))
    return code


def describe_machine() -> dict[str, str]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = []
    for name in RIVALS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return {
        "Date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Machine": f"{model}, {os.cpu_count()} CPUs{load}",
        "System": platform.platform(),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "queue-runtime": importlib.metadata.version("queue-runtime"),
        "With": ", ".join(versions),
    }


def measure(files: list[Path], words: str | None) -> tuple[int, list[Row]]:
    """Run pytest over the files; return its exit code and the rows, in the order in which they ran."""
    with tempfile.TemporaryDirectory() as directory:
        results = Path(directory) / "results.json"
        command = [sys.executable, "-m", "pytest", *map(str, files), "-q", "--no-header", "--benchmark-quiet"]
        command += ["--benchmark-json", str(results), "-o", "python_files=bench_*.py", "-o", "timeout=900"]
        if words is not None:
            command += ["-k", words]
        code = subprocess.run(command, cwd=BENCH.parent, check=False).returncode
        if not results.exists() or not results.stat().st_size:
            return code or 1, []
        return code, [row_of(entry) for entry in json.loads(results.read_text())["benchmarks"]]


def row_of(entry: dict[str, Any]) -> Row:
    stats, items = entry["stats"], entry["extra_info"]["items"]
    return Row(
        group=entry["group"],
        label=label_of(entry["name"], entry["param"], entry["group"]),
        nanoseconds=stats["median"] / items * 1e9,
        spread=stats["iqr"] / stats["median"],
        rounds=stats["rounds"],
        items=items,
        goal=entry["extra_info"].get("goal"),
    )


def label_of(name: str, param: str | None, group: str) -> str:
    """The parameter where it is a row's name, not a size or the group; else the test's own."""
    if param is not None and param != group and not param.replace(".", "").isdigit():
        return param
    return name.partition("[")[0].removeprefix("test_").removeprefix("bench_").replace("_", " ")


def show(console: Console, rows: list[Row]) -> list[tuple[Row, bool | None]]:
    """Print one group, the fastest first; return its goals and whether each is met."""
    times = {row.label: row.nanoseconds for row in rows}
    named = [row for row in rows if is_ours(row.label)]
    ours = next((row for row in named if row.goal), named[0] if named else None)
    table = Table(box=box.SIMPLE_HEAD, title=rows[0].group, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("", overflow="fold")
    for column in ("median ns", "spread", "items/s", "x ours"):
        table.add_column(column, justify="right")
    table.add_column("goal", overflow="fold")
    verdicts = []
    for row in sorted(rows, key=lambda row: row.nanoseconds):
        ratio = "" if ours is None else f"{row.nanoseconds / ours.nanoseconds:.2f}"
        goal = ""
        if row.goal is not None:
            met = is_met(row.goal, row.nanoseconds, times)
            verdicts.append((row, met))
            goal = f"{row.goal}: {say(met)}"
        elif ours is not None and not is_ours(row.label) and row.nanoseconds < ours.nanoseconds:
            goal = "(faster than ours)"
        cells = [f"{row.nanoseconds:,.1f}", f"{row.spread:.0%}", f"{1e9 / row.nanoseconds:,.0f}", ratio, goal]
        table.add_row(Text(row.label), *map(Text, cells), style="bold" if is_ours(row.label) else "")
    console.print()
    console.print(table)
    return verdicts


def say(met: bool | None) -> str:
    return {True: "met", False: "NOT MET", None: "cannot be told"}[met]


def conclude(console: Console, verdicts: list[tuple[Row, bool | None]]) -> None:
    console.print(Text(f"\n{sum(met is True for _, met in verdicts)} of {len(verdicts)} goals met"))
    for row, met in verdicts:
        if met is not True:
            console.print(Text(f"  {say(met)}: {row.group}: {row.label}: {row.goal}"))


def save(machine: dict[str, str], rows: list[Row], verdicts: list[tuple[Row, bool | None]]) -> str:
    met = {(row.group, row.label): verdict for row, verdict in verdicts}
    listed = [{**row._asdict(), "met": met.get((row.group, row.label))} for row in rows]
    path = BENCH / "results" / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d-%H%M}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": listed}, indent=2) + "\n")
    return str(path.relative_to(BENCH.parent))


if __name__ == "__main__":
    sys.exit(main())
