"""The commands and their options."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import click

from queue_runtime.cli.failure import Code, Failure
from queue_runtime.cli.feeding import Feeder, session_key_of
from queue_runtime.cli.handlers import load_handler
from queue_runtime.cli.screen import (
    log_to_stderr,
    message_as_json,
    print_dead_letters,
    print_json,
    print_messages,
    print_report,
    progress,
    tell,
)
from queue_runtime.cli.work import Plan, Report, Work
from queue_runtime.client import MAX_COUNT, QueueClient
from queue_runtime.errors import ConfigurationError, QueueRuntimeError, ValidationError
from queue_runtime.handling import ConsumerConfig, Handler
from queue_runtime.message import Message, QueueName, ReceivedMessage

T = TypeVar("T")

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

CODES = """\b
Exit codes:
  0    all is well; dead letters alone are no failure
  1    something failed: a line or a message was not sent or not settled, the
       handler cannot be loaded, the queue does not exist
  2    the command line is wrong
  3    the configuration is wrong, or an extra is not installed
  4    there are dead letters, and --fail-on-dead-letters was given
  130  ended by SIGINT (Ctrl-C)
  143  ended by SIGTERM
"""


class _Root(click.Group):
    """Turns the library's errors into one sentence and a code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            raise Failure(_named(error), Code.CONFIGURATION) from error
        except ValidationError as error:
            raise Failure(_named(error), Code.USAGE) from error
        except QueueRuntimeError as error:
            raise Failure(str(error)) from error
        except KeyboardInterrupt:
            ctx.exit(Code.INTERRUPTED)


def _named(error: ConfigurationError | ValidationError) -> str:
    """The error's sentence, with the option instead of the field."""
    problem = str(error).removeprefix(f"{error.field}: ")
    return f"{OPTION_OF.get(error.field, error.field)}: {problem}"


def _queue(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        return QueueName(value)
    except ValidationError as error:
        raise click.BadParameter(str(error).removeprefix(f"{error.field}: ")) from None


def _fields(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    fields = () if value is None else tuple(part.strip() for part in value.split(","))
    if not all(fields):
        raise click.BadParameter(f"has an empty field name in {value!r}")
    return fields


def _pairs(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"must be NAME=VALUE, not {value!r}")
        pairs[name] = text
    return pairs


_file = click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True)
_provider = click.option(
    "--provider", metavar="URL", required=True, envvar="QUEUE_RUNTIME_PROVIDER", show_envvar=True,
    help="Where the queue is, such as memory:// or memory://?capacity=1000&lock_duration=10.",
)  # fmt: skip
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there.")
_session_key = click.option(
    "--session-key", metavar="FIELD,…", callback=_fields,
    help="Fields of each line that make its session id, with dots into nested objects; a line without them has none.",
)  # fmt: skip


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"]}, epilog=CODES)
@click.version_option(package_name="queue-runtime", prog_name="queue-runtime")
def root() -> None:
    """Message queues: run a handler over one, send, peek, and look after dead letters."""


@root.command(epilog=CODES)
@click.argument("handler", metavar="HANDLER")
@_provider
@click.option("--queue", "queue_name", callback=_queue, required=True, help="The queue.")
@click.option("--feed", type=_file, help="Send each line of this file of JSON lines meanwhile; - is stdin.")
@_session_key
@click.option(
    "--concurrency", metavar="N", type=click.IntRange(1), help="Handlers at once.  [default: the provider's, 16]"
)
@click.option(
    "--prefetch", metavar="N", type=click.IntRange(1), help="Messages held at most.  [default: the provider's, 100]"
)
@click.option(
    "--max-sessions", metavar="N", type=click.IntRange(1), default=100, show_default=True, help="Sessions held at once."
)
@click.option(
    "--max-attempts",
    metavar="N",
    type=click.IntRange(1),
    help="The failure of this delivery dead-letters a message.  [default: 5]",
)
@click.option(
    "--drain-timeout", type=click.FloatRange(0), default=30.0, show_default=True, metavar="SECONDS",
    help="What running handlers get to finish in at the end.",
)  # fmt: skip
@click.option(
    "--until-empty/--forever", default=None,
    help="When to stop; until empty by default where memory:// is fed, else on a signal.",
)  # fmt: skip
@click.option("--fail-on-dead-letters", is_flag=True, help="Exit with 4 when there are any at the end.")
@click.option(
    "--show",
    metavar="N",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="Dead letters to list at the end.",
)
@click.option("--progress/--no-progress", "wanted", default=True, help="A line that lives, on a terminal.")
@_json
@click.option("-v", "--verbose", is_flag=True, help="Show the whole log, with tracebacks.")
@click.pass_context
def run(
    ctx: click.Context,
    /,
    handler: str,
    provider: str,
    queue_name: str,
    feed: str | None,
    session_key: tuple[str, ...],
    until_empty: bool | None,
    fail_on_dead_letters: bool,
    show: int,
    wanted: bool,
    as_json: bool,
    verbose: bool,
    **limits: Any,
) -> None:
    """Run HANDLER, a function given as module:function, over the messages of a queue.

    The module is found from the current directory. The function may be async or plain, and takes a ReceivedMessage:
    when it returns, the message is completed; when it raises, the message comes back, and after --max-attempts it
    becomes a dead letter.

    The first SIGINT or SIGTERM lets running handlers finish and releases the rest; a second one releases all at once.
    """
    if session_key and feed is None:
        raise click.UsageError("--session-key is for the lines of --feed; without it, messages have their sessions")
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        function = load_handler(handler)
        log_to_stderr(verbose)
        client = _open(provider)
        in_memory = client.capabilities.settles_in_process
        if in_memory and feed is None:
            tell("note: memory:// is this process's own, and there is no --feed: only HANDLER's module can send to it")
        plan = Plan(
            queue_name=queue_name,
            handler_name=handler,
            feed=feed,
            session_key=session_key_of(session_key),
            until_empty=(in_memory and feed is not None) if until_empty is None else until_empty,
            show=show,
            fail_on_dead_letters=fail_on_dead_letters,
        )
        config = _consumer_config(client, limits)
        report = _to_the_end(_run(client, plan, function, config, wanted))
    if as_json:
        print_json(report.as_json())
    else:
        print_report(report)
    _leave(ctx, report)


async def _run(client: QueueClient, plan: Plan, handler: Handler, config: ConsumerConfig, wanted: bool) -> Report:
    async with client:
        work = Work(client, plan, handler, config, tell)
        with progress(work, wanted):
            return await work.run()


def _consumer_config(client: QueueClient, limits: dict[str, Any]) -> ConsumerConfig:
    """The settings from the options, within what the queue itself allows."""
    allowed: int | None = getattr(client.config, "max_delivery_count", None)
    attempts: int | None = limits["max_attempts"]
    if attempts is not None and allowed is not None and attempts > allowed:
        raise ConfigurationError(
            "max_attempts",
            f"the queue itself gives a message up after {allowed} deliveries; "
            f"add max_delivery_count={attempts} to the provider's URL",
        )
    return ConsumerConfig(
        max_concurrency=limits["concurrency"],
        prefetch=limits["prefetch"],
        max_sessions=limits["max_sessions"],
        drain_timeout=limits["drain_timeout"],
        max_attempts=attempts or min(5, allowed or 5),
    )


def _leave(ctx: click.Context, report: Report) -> None:
    """Exit with the report's code, also when a plain handler still sits in its thread."""
    code = int(report.code)
    stuck = [thread for thread in threading.enumerate() if thread.name.startswith("queue-runtime-handler")]
    for thread in stuck:
        thread.join(0.05)
    if any(thread.is_alive() for thread in stuck):
        tell("a handler still runs in its thread; its message was released, and the process ends without it")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    ctx.exit(code)


@root.command(epilog=CODES)
@click.argument("queue_name", metavar="QUEUE", callback=_queue)
@click.argument("bodies", metavar="[BODY]…", nargs=-1)
@_provider
@click.option("--jsonl", type=_file, help="Send each line of this file of JSON lines; - is stdin.")
@_session_key
@click.option("--session-id", help="The session of every message.")
@click.option(
    "--attribute", "attributes", metavar="NAME=VALUE", callback=_pairs, multiple=True, help="May be repeated."
)
@click.option("--content-type", help="What the bodies are.  [default: application/json for --jsonl]")
@click.option("--correlation-id", help="What the messages belong to.")
@click.option("--deduplication-id", help="A second message with this id is not delivered again.")
@click.option("--time-to-live", type=float, metavar="SECONDS", help="Not delivered after this.")
@click.option("--delay", type=float, metavar="SECONDS", help="Not delivered before this.")
@_json
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
    client = _open(provider)
    if jsonl is not None:
        feeder = Feeder(client, queue_name, jsonl, key=session_key_of(session_key), settings=settings, tell=tell)
        Message(body=b"", **settings)  # what is wrong with an option is not the fault of each line
        code = Code.FINE
        try:
            _to_the_end(_with(client, feeder.run))
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
    ids = _to_the_end(_with(client, lambda: client.send_messages(queue_name, messages)))
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
@click.argument("queue_name", metavar="QUEUE", callback=_queue)
@_provider
@click.option(
    "--limit", metavar="N", type=click.IntRange(1, MAX_COUNT), default=10, show_default=True, help="Messages to show."
)
@click.option(
    "--from", "start", metavar="N", type=click.IntRange(0), default=0, help="The first sequence number to show."
)
@_json
def peek(queue_name: str, provider: str, limit: int, start: int, as_json: bool) -> None:
    """Show messages of QUEUE, without taking them or counting a delivery."""
    client = _open(provider)
    messages = _to_the_end(_with(client, lambda: client.peek_messages(queue_name, limit, from_sequence_number=start)))
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
@click.argument("queue_name", metavar="QUEUE", callback=_queue)
@_provider
@_reason
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(1, MAX_COUNT),
    default=10,
    show_default=True,
    help="Dead letters to show.",
)
@_json
def list_dead_letters(queue_name: str, provider: str, reason: str | None, limit: int, as_json: bool) -> None:
    """Show the dead letters of QUEUE and why they are there."""
    client = _open(provider)

    async def look() -> tuple[int, list[ReceivedMessage]]:
        dead_letters = client.dead_letters(queue_name)
        total = await dead_letters.count()
        found: list[ReceivedMessage] = []
        page = await dead_letters.peek_messages(limit)
        while page and len(found) < limit:
            found += [message for message in page if reason is None or message.dead_letter_reason == reason]
            page = await dead_letters.peek_messages(limit, from_sequence_number=(page[-1].sequence_number or 0) + 1)
        return total, found[:limit]

    total, messages = _to_the_end(_with(client, look))
    if as_json:
        listed = [message_as_json(message) for message in messages]
        print_json({"queue": queue_name, "dead_lettered": total, "messages": listed})
        return
    if messages:
        print_dead_letters(messages)
    click.echo(f"{len(messages):,} of {total:,} dead letters of {queue_name} shown")


@dlq.command(epilog=CODES)
@click.argument("queue_name", metavar="QUEUE", callback=_queue)
@_provider
@_reason
@click.option("--limit", metavar="N", type=click.IntRange(1), help="How many to send back at most.")
@click.option("--rate", metavar="R", type=click.FloatRange(0, min_open=True), help="How many a second at most.")
@click.option("--dry-run", is_flag=True, help="Only count what would be sent back.")
@_json
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
    client = _open(provider)
    where = None if reason is None else (lambda message: message.dead_letter_reason == reason)
    result = _to_the_end(
        _with(
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


def _open(url: str) -> QueueClient:
    try:
        return QueueClient(url)
    except ConfigurationError as error:
        problem = str(error).removeprefix("provider: ")
        raise Failure(f"--provider: {problem}", Code.CONFIGURATION) from error


async def _with(client: QueueClient, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    async with client:
        return await call()


def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)
