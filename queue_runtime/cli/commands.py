"""The commands, but for ``run``: arguments and printing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from queue_runtime.arguments import MAX_COUNT
from queue_runtime.cli.failure import Code
from queue_runtime.cli.feeding import Feeder, session_key_of
from queue_runtime.cli.options import (
    CODES,
    Root,
    as_pairs,
    as_queue,
    json_lines,
    json_option,
    open_client,
    provider_option,
    session_key_option,
    to_the_end,
    with_client,
)
from queue_runtime.cli.running import health, run
from queue_runtime.cli.screen import message_as_json, print_dead_letters, print_json, print_messages
from queue_runtime.cli.telling import tell
from queue_runtime.message import Message, ReceivedMessage


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]}, epilog=CODES)
@click.version_option(package_name="queue-runtime", prog_name="queue-runtime")
def root() -> None:
    """Message queues: run a handler over one, send, peek, and look after dead letters."""


root.add_command(run)
root.add_command(health)


@root.command(epilog=CODES)
@click.argument("queue_name", metavar="QUEUE", callback=as_queue)
@click.argument("bodies", metavar="[BODY]…", nargs=-1)
@provider_option
@click.option("--jsonl", type=json_lines, help="Send each line of this file of JSON lines; - is stdin.")
@session_key_option
@click.option("--session-id", help="The session of every message.")
@click.option(
    "--attribute", "attributes", metavar="NAME=VALUE", callback=as_pairs, multiple=True, help="May be repeated."
)
@click.option("--content-type", help="What the bodies are.  [default: application/json for --jsonl]")
@click.option("--correlation-id", help="What the messages belong to.")
@click.option("--deduplication-id", help="A second message with this id is not delivered again.")
@click.option("--time-to-live", type=float, metavar="SECONDS", help="Not delivered after this.")
@click.option("--delay", type=float, metavar="SECONDS", help="Not delivered before this.")
@json_option
@click.pass_context
def send(
    ctx: click.Context,
    /,
    queue_name: str,
    bodies: tuple[str, ...],
    provider: str,
    jsonl: str | None,
    session_key: tuple[str, ...],
    attributes: dict[str, str],
    as_json: bool,
    **fields: Any,
) -> None:
    """Send a message for each BODY, or for each line of --jsonl; with neither, all of stdin is one body.

    Prints the ids of the messages, or how many lines were sent.
    """
    if bodies and jsonl is not None:
        raise click.UsageError("give bodies or --jsonl, not both")
    if session_key and (jsonl is None or fields["session_id"] is not None):
        raise click.UsageError("--session-key is for the lines of --jsonl, and excludes --session-id")
    settings = {name: value for name, value in fields.items() if value is not None}
    if attributes:
        settings["attributes"] = attributes
    client = open_client(provider)
    if jsonl is not None:
        feeder = Feeder(client, queue_name, jsonl, key=session_key_of(session_key), settings=settings, tell=tell)
        Message(body=b"", **settings)  # what is wrong with an option is not the fault of each line
        code = Code.FINE
        try:
            to_the_end(with_client(client, feeder.run))
        except KeyboardInterrupt:
            code = Code.INTERRUPTED
        fed = feeder.result
        if as_json:
            refusals = [refusal._asdict() for refusal in fed.refusals]
            print_json({"queue": queue_name, "sent": fed.sent, "refused": fed.refused, "refusals": refusals})
        else:
            click.echo(f"{fed.sent:,} of {fed.lines:,} lines sent to {queue_name}")
        ctx.exit(code or (Code.FAILED if fed.refused or fed.error else Code.FINE))
    messages = [Message(body=body, **settings) for body in _bodies(bodies)]
    ids = to_the_end(with_client(client, lambda: client.send_messages(queue_name, messages)))
    if as_json:
        print_json({"queue": queue_name, "sent": len(ids), "message_ids": ids})
    else:
        for message_id in ids:
            click.echo(message_id)


def _bodies(bodies: Sequence[str]) -> list[bytes]:
    if bodies:
        return [os.fsencode(body) for body in bodies]
    if sys.stdin.isatty():
        raise click.UsageError("give a BODY, --jsonl FILE, or pipe a body into stdin")
    return [sys.stdin.buffer.read()]


@root.command(epilog=CODES)
@click.argument("queue_name", metavar="QUEUE", callback=as_queue)
@provider_option
@click.option(
    "--limit", metavar="N", type=click.IntRange(1, MAX_COUNT), default=10, show_default=True, help="Messages to show."
)
@click.option(
    "--from", "start", metavar="N", type=click.IntRange(0), default=0, help="The first sequence number to show."
)
@json_option
def peek(queue_name: str, provider: str, limit: int, start: int, as_json: bool) -> None:
    """Show messages of QUEUE, without taking them or counting a delivery."""
    client = open_client(provider)
    messages = to_the_end(
        with_client(client, lambda: client.peek_messages(queue_name, limit, from_sequence_number=start))
    )
    if as_json:
        print_json({"queue": queue_name, "messages": [message_as_json(message) for message in messages]})
    elif messages:
        print_messages(messages)
    else:
        click.echo(f"{queue_name} has no messages{f' from number {start} on' if start else ''}")


@root.group()
def dlq() -> None:
    """Look after dead letters."""


_reason = click.option("--filter-reason", "reason", help="Only those with exactly this reason.")


@dlq.command(name="list", epilog=CODES)
@click.argument("queue_name", metavar="QUEUE", callback=as_queue)
@provider_option
@_reason
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(1, MAX_COUNT),
    default=10,
    show_default=True,
    help="Dead letters to show.",
)
@json_option
def list_dead_letters(queue_name: str, provider: str, reason: str | None, limit: int, as_json: bool) -> None:
    """Show the dead letters of QUEUE and why they are there."""
    client = open_client(provider)

    async def look() -> tuple[int, list[ReceivedMessage]]:
        dead_letters = client.dead_letters(queue_name)
        total = await dead_letters.count()
        found: list[ReceivedMessage] = []
        page = await dead_letters.peek_messages(limit)
        while page and len(found) < limit:
            found += [message for message in page if reason is None or message.dead_letter_reason == reason]
            page = await dead_letters.peek_messages(limit, from_sequence_number=(page[-1].sequence_number or 0) + 1)
        return total, found[:limit]

    total, messages = to_the_end(with_client(client, look))
    if as_json:
        listed = [message_as_json(message) for message in messages]
        print_json({"queue": queue_name, "dead_lettered": total, "messages": listed})
        return
    if messages:
        print_dead_letters(messages)
    click.echo(f"{len(messages):,} of {total:,} dead letters of {queue_name} shown")


@dlq.command(epilog=CODES)
@click.argument("queue_name", metavar="QUEUE", callback=as_queue)
@provider_option
@_reason
@click.option("--limit", metavar="N", type=click.IntRange(1), help="How many to send back at most.")
@click.option("--rate", metavar="R", type=click.FloatRange(0, min_open=True), help="How many a second at most.")
@click.option("--dry-run", is_flag=True, help="Only count what would be sent back.")
@json_option
@click.pass_context
def redrive(
    ctx: click.Context,
    /,
    queue_name: str,
    provider: str,
    reason: str | None,
    limit: int | None,
    rate: float | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Send dead letters of QUEUE back into it, with their id, body, attributes and session."""
    client = open_client(provider)
    where = None if reason is None else (lambda message: message.dead_letter_reason == reason)
    result = to_the_end(
        with_client(
            client,
            lambda: client.dead_letters(queue_name).redrive(where=where, limit=limit, rate=rate, dry_run=dry_run),
        )
    )
    if as_json:
        print_json({"queue": queue_name, "dry_run": dry_run, **result._asdict()})
    elif dry_run:
        click.echo(f"{result.matched:,} of {result.scanned:,} dead letters would go back to {queue_name}")
    else:
        failed = f"; {result.failed:,} could not be moved and are dead letters still" if result.failed else ""
        click.echo(f"{result.moved:,} of {result.scanned:,} dead letters went back to {queue_name}{failed}")
    ctx.exit(Code.FAILED if result.failed else Code.FINE)
