"""The commands ``run`` and ``health``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import click

from queue_runtime.cli import health_file
from queue_runtime.cli.failure import Code, Failure, end_in_spite_of_handlers
from queue_runtime.cli.feeding import session_key_of
from queue_runtime.cli.handlers import load_handler
from queue_runtime.cli.health_file import MAX_AGE, HealthFile, problems_of
from queue_runtime.cli.options import (
    CODES,
    as_count,
    as_queue,
    json_lines,
    json_option,
    open_client,
    provider_option,
    session_key_option,
)
from queue_runtime.cli.processes import ManyProcesses
from queue_runtime.cli.screen import is_live, print_json, print_report, progress
from queue_runtime.cli.telling import log_to_stderr, tell
from queue_runtime.cli.work import RUNTIMES, Engine, OneProcess, Plan, Report, Work, consumer_config
from queue_runtime.client import QueueClient
from queue_runtime.retry import ExponentialRetry
from queue_runtime.runtime import available_cpus


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """How ``run`` goes about its plan."""

    handler: str
    provider: str
    runtime: str
    limits: dict[str, Any]
    processes: int | None
    pinned: bool
    max_deaths: int
    health_file: Path | None
    live: bool
    as_json: bool
    verbose: bool


@click.command(epilog=CODES)
@click.argument("handler", metavar="HANDLER")
@provider_option
@click.option("--queue", "queue_name", callback=as_queue, required=True, help="The queue.")
@click.option("--feed", type=json_lines, help="Send each line of this file of JSON lines meanwhile; - is stdin.")
@session_key_option
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
    "--processes", metavar="N", callback=as_count,
    help="Work in so many processes, each with these limits, and start anew those that die; auto is one per CPU.",
)  # fmt: skip
@click.option("--cpu-affinity", "pinned", is_flag=True, help="Keep each of the processes on a CPU of its own.")
@click.option(
    "--max-deaths", metavar="N", type=click.IntRange(1), default=5, show_default=True,
    help="Deaths of one process in a row, less than 30 s after its start, that end the run.",
)  # fmt: skip
@click.option(
    "--runtime", type=click.Choice(sorted(RUNTIMES)), default="default", show_default=True,
    help="The event loop, threads and garbage collection.",
)  # fmt: skip
@click.option(
    "--health-file", metavar="PATH", type=click.Path(dir_okay=False, path_type=Path),
    help=f"Write there every {health_file.EVERY:g} s how it is, for the command health.",
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
@json_option
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
    processes: int | None,
    pinned: bool,
    max_deaths: int,
    runtime: str,
    health_file: Path | None,
    wanted: bool,
    as_json: bool,
    verbose: bool,
    **limits: Any,
) -> None:
    """Run HANDLER, a function given as module:function, over the messages of a queue.

    The module is found from the current directory. The function may be async or plain, and takes a ReceivedMessage,
    and a MessageContext if it has a second parameter: when it returns, the message is completed; when it raises, the
    message comes back, and after --max-attempts it becomes a dead letter.

    The first SIGINT or SIGTERM lets running handlers finish and releases the rest; a second one releases all at once.
    """
    if session_key and feed is None:
        raise click.UsageError("--session-key is for the lines of --feed; without it, messages have their sessions")
    if pinned and processes is None:
        raise click.UsageError("--cpu-affinity is for --processes")
    ways = Ways(
        handler=handler,
        provider=provider,
        runtime=runtime,
        limits=limits,
        processes=processes,
        pinned=pinned,
        max_deaths=max_deaths,
        health_file=health_file,
        live=is_live(wanted),
        as_json=as_json,
        verbose=verbose,
    )
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        client = open_client(provider)
        in_memory = client.capabilities.settles_in_process
        if in_memory and feed is None and getattr(client.config, "path", None) is None:
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
        engine = _one_process(client, plan, ways) if processes is None else _many_processes(client, plan, ways)
        log_to_stderr(verbose)  # after the handler's module, which may do it otherwise
        # Workers have the runtime that was asked for; their supervisor needs asyncio's own subprocesses.
        configuration = RUNTIMES[runtime]() if processes is None else RUNTIMES["default"](loop="asyncio")
        report = configuration.run(lambda: _run(client, plan, engine, ways))
    if as_json:
        print_json(report.as_json())
    else:
        print_report(report)
    end_in_spite_of_handlers(report.code)
    ctx.exit(report.code)


async def _run(client: QueueClient, plan: Plan, engine: Engine, ways: Ways) -> Report:
    async with client:
        work = Work(client, plan, engine, tell)
        with progress(work, ways.live):
            async with HealthFile(ways.health_file, work.health, tell):
                return await work.run()


def _one_process(client: QueueClient, plan: Plan, ways: Ways) -> Engine:
    handler = load_handler(ways.handler)
    return OneProcess(client, plan.queue_name, handler, consumer_config(client, ways.limits), keep=plan.show)


def _many_processes(client: QueueClient, plan: Plan, ways: Ways) -> Engine:
    assert ways.processes is not None
    if not client.capabilities.shared_between_processes:
        raise Failure(
            f"--processes: queues of {client.provider_name}:// are in the memory of one process, and others cannot "
            "reach them; raise --concurrency instead, or use a provider with a broker of its own",
            Code.CONFIGURATION,
        )
    if sys.platform == "win32":
        raise Failure("--processes needs a POSIX system; start several of these instead", Code.CONFIGURATION)
    if ways.pinned and not hasattr(os, "sched_getaffinity"):
        raise Failure("--cpu-affinity: this system cannot pin a process to CPUs", Code.CONFIGURATION)
    consumer_config(client, ways.limits)  # what is wrong with it is told here, once
    cores = sorted(os.sched_getaffinity(0)) if ways.pinned else []
    jobs = [
        {
            "number": number,
            "handler": ways.handler,
            "provider": ways.provider,
            "queue": plan.queue_name,
            "limits": ways.limits,
            "runtime": ways.runtime,
            "cores": [cores[number % len(cores)]] if cores else None,
            "keep": plan.show,
            "examine_every": None if ways.health_file is None else health_file.EVERY,
            "verbose": ways.verbose,
        }
        for number in range(ways.processes or available_cpus())
    ]
    return ManyProcesses(
        jobs,
        keep=plan.show,
        policy=ExponentialRetry(first=0.5, longest=30.0, attempts=ways.max_deaths),
        drain_timeout=ways.limits["drain_timeout"],
        stdout=-1 if ways.live else 2 if ways.as_json else None,
        tell=tell,
    )


@click.command(epilog=CODES)
@click.argument("path", metavar="PATH", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--max-age", metavar="SECONDS", type=click.FloatRange(0, min_open=True), default=MAX_AGE, show_default=True,
    help="An older file is that of a process that is stuck or gone.",
)  # fmt: skip
@click.option(
    "--alive", "only_alive", is_flag=True,
    help="Only ask whether its process goes on; for probes that have it killed when this fails.",
)  # fmt: skip
@click.pass_context
def health(ctx: click.Context, /, path: Path, max_age: float, only_alive: bool) -> None:
    """Look at what run --health-file PATH writes: exit with 0 when all is well, with 1 and the problems when not.

    For the probes of Kubernetes, ECS and others that run a command.
    """
    problems = problems_of(path, max_age, only_alive=only_alive)
    for problem in problems:
        tell(problem)
    if not problems:
        click.echo("healthy")
    ctx.exit(Code.FAILED if problems else Code.FINE)
