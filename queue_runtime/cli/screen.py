"""What the commands print: tables and the progress line, with nothing from outside in them that acts."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from queue_runtime.cli.telling import shown
from queue_runtime.cli.work import Report, Work
from queue_runtime.message import ReceivedMessage

WIDTH = 120
"""Columns where nothing else is known: of a pipe or a file."""


def console(*, stderr: bool = False) -> Console:
    """A console of the stream as it is now: coloured on a terminal, plain text elsewhere."""
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made = Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=WIDTH)
    return made


def _print(what: Table | Text) -> None:
    screen = console()
    if screen.is_terminal:
        screen.print(what)
        return
    with screen.capture() as captured:
        screen.print(what)
    for line in captured.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")  # rich fills lines up to the console's width


def print_json(value: object) -> None:
    """Print one JSON object on stdout, in ASCII: it is for machines."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


# A run.


def is_live(wanted: bool) -> bool:
    """Whether there is to be a line that lives."""
    return wanted and console(stderr=True).is_terminal


@contextlib.contextmanager
def progress(work: Work, live: bool) -> Iterator[None]:
    """Show a line that lives, or nothing."""
    if not live:
        yield
        return
    started = time.monotonic()

    def line() -> Text:
        stats, meter, processes = work.stats, work.meter, work.engine.processes()
        parts = [
            f"{meter.settled:,} messages",
            f"{meter.rate():,.0f}/s",
            f"{stats.running} in flight",
            f"{stats.waiting} waiting",
            f"{meter.dead_lettered} dead-lettered",
            f"{time.monotonic() - started:.0f} s",
        ]
        if work.feeder is not None:
            parts.insert(0, f"{work.feeder.result.sent:,} sent")
        if processes is not None:
            parts.insert(0, f"{work.engine.alive} of {processes['workers']} processes")
        return Text(" · ".join(parts), style="cyan", no_wrap=True, overflow="ellipsis")

    to_terminal = sys.stdout.isatty()  # else the handler's own prints would leave their file
    screen = console(stderr=True)
    with Live(get_renderable=line, console=screen, refresh_per_second=8, transient=True, redirect_stdout=to_terminal):
        yield


def print_report(report: Report) -> None:
    """Print the final table of a run, and its dead letters."""
    _print(Text())
    _print(_summary(report))
    listed, total = report.meter.dead_letters, report.dead_lettered
    if listed:
        table = _table("message", "session", "deliveries", "reason", "description")
        for dead in listed:
            count = str(dead.delivery_count)
            _row(table, dead.message_id, dead.session_id, count, dead.reason, dead.description)
        which = f", the first {len(listed)} of {total:,}" if total > len(listed) else ""
        _print(Text(f"\nDead letters{which}"))
        _print(table)


def _summary(report: Report) -> Table:
    meter, stats, plan = report.meter, report.stats, report.plan
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    ended = "the queue is empty" if report.ended_by == "empty" else report.ended_by
    _row(table, "run", f"{plan.handler_name} over {plan.queue_name} on {report.provider}, until {ended}")
    if report.processes is not None:
        many = report.processes
        died = f"{many['died']} deaths, {many['starts']} starts" if many["died"] else "none died"
        _row(table, "processes", f"{many['workers']} workers, {died}")
    if report.fed is not None:
        fed = report.fed
        refused = f", {fed.refused:,} refused" if fed.refused else ""
        unread = "" if fed.finished else ", the rest was not read"
        _row(table, "fed", f"{fed.sent:,} of {fed.lines:,} lines of {fed.source}{refused}{unread}")
    left = f"{report.left:,} left in the queue" if report.left else "none left in the queue"
    _row(table, "messages", f"{stats.completed:,} completed, {report.dead_lettered:,} dead-lettered, {left}")
    _row(table, "throughput", f"{meter.throughput:,.0f} messages/s over {_duration(meter.seconds)}")
    p50, p95, p99 = (_duration(meter.latency.percentile(percent)) for percent in (50, 95, 99))
    _row(table, "send to settled", f"p50 {p50}, p95 {p95}, p99 {p99}")
    mean = meter.batched / meter.batches if meter.batches else 0.0
    sizes = f", of {meter.smallest:,} to {meter.largest:,} messages, {mean:,.1f} on average" if meter.batches else ""
    _row(table, "batches", f"{meter.batches:,}{sizes}")
    _row(table, "sessions", f"{len(meter.sessions):,}, taken {stats.sessions:,} times")
    failures = f"; handlers raised {_counted(meter.failures)}" if meter.failures else ""
    _row(table, "retries", f"{meter.retries:,}{failures}")
    reasons = f": {_counted(meter.reasons)}" if meter.reasons else ""
    _row(table, "dead-lettered", f"{report.dead_lettered:,}{reasons}")
    if stats.locks_lost or stats.settle_errors:
        _row(table, "trouble", f"{stats.locks_lost:,} locks lost, {stats.settle_errors:,} settlements failed")
    return table


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counter.most_common())


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:,.2f} s"


# Messages.


def print_messages(messages: Sequence[ReceivedMessage]) -> None:
    """Print what peeked messages are, with the beginning of each body."""
    table = _table("number", "message", "session", "size", "deliveries", "enqueued", "body")
    for message in messages:
        _row(
            table,
            _number(message),
            message.message_id,
            message.session_id,
            f"{message.size:,}",
            str(message.delivery_count),
            _when(message),
            bytes(message.body_view[:200]).decode("utf-8", "replace")[:60],
        )
    _print(table)


def print_dead_letters(messages: Sequence[ReceivedMessage]) -> None:
    """Print why messages are dead letters."""
    table = _table("number", "message", "session", "deliveries", "enqueued", "reason", "description")
    for message in messages:
        _row(
            table,
            _number(message),
            message.message_id,
            message.session_id,
            str(message.delivery_count),
            _when(message),
            message.dead_letter_reason,
            message.dead_letter_description,
        )
    _print(table)


def message_as_json(message: ReceivedMessage) -> dict[str, Any]:
    """The object that ``--json`` prints for a message: its body as text, or in base64 when it is none."""
    body: dict[str, str]
    try:
        body = {"body": message.body.decode("utf-8")}
    except UnicodeDecodeError:
        body = {"body_base64": base64.b64encode(message.body).decode("ascii")}
    return {
        "message_id": message.message_id,
        "sequence_number": message.sequence_number,
        "session_id": message.session_id,
        "correlation_id": message.correlation_id,
        "content_type": message.content_type,
        "attributes": dict(message.attributes),
        "size": message.size,
        "delivery_count": message.delivery_count,
        "enqueued_at": message.enqueued_at.isoformat(),
        "dead_letter_reason": message.dead_letter_reason,
        "dead_letter_description": message.dead_letter_description,
        **body,
    }


def _number(message: ReceivedMessage) -> str:
    return "" if message.sequence_number is None else str(message.sequence_number)


def _when(message: ReceivedMessage) -> str:
    return message.enqueued_at.astimezone().isoformat(" ", "seconds")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for column in columns:
        right = column in ("number", "size", "deliveries")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _row(table: Table, *cells: str | None) -> None:
    table.add_row(*(Text(shown(cell or "")) for cell in cells))
