"""What the commands share: options, what their values must be, and how an error becomes a sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import click

from queue_runtime.cli.failure import Code, Failure, failure_of
from queue_runtime.client import QueueClient
from queue_runtime.errors import ConfigurationError, QueueRuntimeError, ValidationError
from queue_runtime.message import QueueName

T = TypeVar("T")

MOST_PROCESSES = 1024

CODES = """\b
Exit codes:
  0    all is well; dead letters alone are no failure
  1    something failed: a line or a message was not sent or not settled, the
       handler cannot be loaded, the queue does not exist, worker processes die
       again and again; health: a problem was found
  2    the command line is wrong
  3    the configuration is wrong, or an extra is not installed
  4    there are dead letters, and --fail-on-dead-letters was given
  130  ended by SIGINT (Ctrl-C)
  143  ended by SIGTERM
"""


class Root(click.Group):
    """Turns the library's errors into one sentence and a code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QueueRuntimeError as error:
            raise failure_of(error) from error
        except KeyboardInterrupt:
            ctx.exit(Code.INTERRUPTED)


def as_queue(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        return QueueName(value)
    except ValidationError as error:
        raise click.BadParameter(str(error).removeprefix(f"{error.field}: ")) from None


def as_fields(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    fields = () if value is None else tuple(part.strip() for part in value.split(","))
    if not all(fields):
        raise click.BadParameter(f"has an empty field name in {value!r}")
    return fields


def as_pairs(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"must be NAME=VALUE, not {value!r}")
        pairs[name] = text
    return pairs


def as_count(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """How many processes: None where it is not given, and 0 for ``auto``."""
    if value is None or value == "auto":
        return None if value is None else 0
    if not value.isascii() or not value.isdecimal() or not 1 <= int(value) <= MOST_PROCESSES:
        raise click.BadParameter(f"must be auto or a number from 1 to {MOST_PROCESSES}, not {value!r}")
    return int(value)


json_lines = click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True)
provider_option = click.option(
    "--provider", metavar="URL", required=True, envvar="QUEUE_RUNTIME_PROVIDER", show_envvar=True,
    help="Where the queue is, such as memory:// or memory://?capacity=1000&lock_duration=10.",
)  # fmt: skip
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there."
)
session_key_option = click.option(
    "--session-key", metavar="FIELD,…", callback=as_fields,
    help="Fields of each line that make its session id, with dots into nested objects; a line without them has none.",
)  # fmt: skip


def open_client(url: str) -> QueueClient:
    try:
        return QueueClient(url)
    except ConfigurationError as error:
        problem = str(error).removeprefix("provider: ")
        raise Failure(f"--provider: {problem}", Code.CONFIGURATION) from error


async def with_client(client: QueueClient, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    async with client:
        return await call()


def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)
