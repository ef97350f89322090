"""The command line, as a user meets it: most tests start real processes, some with real signals."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from queue_runtime.cli.commands import root

HANDLERS = """
import asyncio, json, time

seen = []

async def note(message):
    print("handled", message.session_id, message.body.decode())

async def quiet(message):
    pass

def plain(message):
    json.loads(message.body)

async def ordered(message):
    event = json.loads(message.body)
    if event["n"] % 7 == 3 and message.delivery_count == 1:
        raise RuntimeError("the first attempt fails")
    await asyncio.sleep(0)
    seen.append((event["s"], event["n"]))
    numbers = [n for s, n in seen if s == event["s"]]
    assert numbers == list(range(len(numbers))), numbers

async def picky(message):
    from queue_runtime.handling import RejectMessage
    event = json.loads(message.body)
    if event["n"] == 3:
        raise RejectMessage("Poison", "three is not welcome \\x1b[31m")
    if event["n"] == 5:
        raise KeyError("five")

async def slow(message):
    print("begun", flush=True)
    await asyncio.sleep(0.3)
    print("done", flush=True)

async def endless(message):
    print("begun", flush=True)
    await asyncio.sleep(3600)

def stuck(message):
    print("begun", flush=True)
    time.sleep(3600)

class Both:
    async def __call__(self, message):
        pass

instance = Both()
constant = 7
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with spaces in its name, a module of handlers and a feed in it."""
    directory = tmp_path / "a place"
    directory.mkdir()
    (directory / "handlers.py").write_text(HANDLERS)
    lines = [json.dumps({"s": f"s{n % 5}", "n": n // 5}) for n in range(100)]
    (directory / "feed.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-X", "dev", "-W", "error", "-m", "queue_runtime", *arguments]


def run_arguments(handler: str, *more: str) -> list[str]:
    return command("run", handler, "--provider", "memory://", "--queue", "q", *more)


@pytest.fixture
def run(here: Path) -> Run:
    """Run a handler in a process of its own."""

    def run(handler: str, *more: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        arguments = run_arguments(handler, *more)
        return subprocess.run(arguments, cwd=here, input=stdin, capture_output=True, text=True, timeout=30)

    return run


@pytest.fixture
def start(here: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start such a process; kill it if the test does not end it."""
    started: list[subprocess.Popen[str]] = []

    def start(handler: str, *more: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            run_arguments(handler, *more), cwd=here, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def invoke(*arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(root, arguments, prog_name="queue-runtime")


# A run and what it tells.


def test_a_feed_is_run_to_its_end_and_told_in_a_table(run: Run) -> None:
    done = run("handlers:quiet", "--feed", "feed.jsonl", "--session-key", "s")
    assert done.returncode == 0, done.stderr
    assert "100 of 100 lines of feed.jsonl" in done.stdout
    assert "100 completed, 0 dead-lettered, none left" in done.stdout
    for row in ("throughput", "p50", "p95", "p99", "batches", "sessions", "retries", "dead-lettered"):
        assert row in done.stdout
    assert done.stderr == ""


def test_what_is_no_terminal_gets_no_control_characters(run: Run) -> None:
    done = run("handlers:picky", "--feed", "feed.jsonl", "--session-key", "s")
    assert "three is not welcome" in done.stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout + done.stderr)


def test_json_is_one_object_whatever_the_handler_prints(run: Run) -> None:
    done = run("handlers:note", "--feed", "feed.jsonl", "--session-key", "s", "--json")
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert done.stderr.count("handled s") == 100
    assert set(told) == {
        "handler", "provider", "queue", "ended_by", "exit_code", "duration", "throughput", "messages", "latency",
        "batches", "sessions", "retries", "failures", "locks_lost", "settle_errors", "dead_letters", "processes", "fed",
    }  # fmt: skip
    assert told["messages"] == {"received": 100, "completed": 100, "dead_lettered": 0, "abandoned": 0, "left": 0}
    assert told["sessions"]["different"] == 5
    assert told["fed"]["sent"] == told["fed"]["lines"] == 100
    assert told["fed"]["finished"] is True
    assert 0 < told["latency"]["p50"] <= told["latency"]["p95"] <= told["latency"]["p99"] <= told["latency"]["max"]
    batches = told["batches"]
    assert 1 <= batches["min"] <= batches["mean"] <= batches["max"] <= 100
    assert batches["count"] * batches["mean"] == pytest.approx(100, abs=1)
    assert told["throughput"] == pytest.approx(100 / told["duration"], rel=0.01)
    assert (told["ended_by"], told["exit_code"]) == ("empty", 0)


def test_sessions_stay_in_order_when_handlers_fail(run: Run) -> None:
    """C24, through everything: the handler asserts it."""
    done = run("handlers:ordered", "--feed", "feed.jsonl", "--session-key", "s", "--json")
    told = json.loads(done.stdout)
    assert told["failures"] == {"RuntimeError": 15}
    assert told["retries"] == 15
    assert told["messages"]["completed"] == 100
    assert told["messages"]["dead_lettered"] == 0


def test_dead_letters_are_told_with_their_reasons(run: Run) -> None:
    done = run("handlers:picky", "--feed", "feed.jsonl", "--max-attempts", "2", "--show", "3", "--json")
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert told["dead_letters"]["reasons"] == {"Poison": 5, "KeyError": 5}
    assert told["messages"]["dead_lettered"] == 10
    first = told["dead_letters"]["first"]
    assert len(first) == 3
    poison = next(dead for dead in first if dead["reason"] == "Poison")
    assert poison["description"] == "three is not welcome \x1b[31m"
    assert poison["delivery_count"] == 1
    assert told["failures"] == {"KeyError": 10}


def test_the_queue_s_own_dead_letters_count_too(run: Run, here: Path) -> None:
    """C14: the queue gives up before the consumer does."""
    (here / "stubborn.py").write_text(
        "from queue_runtime.handling import RetryMessage\nasync def handle(message):\n    raise RetryMessage()\n"
    )
    done = run("stubborn:handle", "--feed", "-", "--json", stdin="1\n")
    assert json.loads(done.stdout)["dead_letters"]["reasons"] == {"MaxDeliveryCountExceeded": 1}


def test_dead_letters_fail_the_run_when_asked(run: Run) -> None:
    assert run("handlers:picky", "--feed", "feed.jsonl", "--fail-on-dead-letters").returncode == 4


def test_failures_of_a_kind_are_shown_a_few_times(run: Run) -> None:
    done = run("handlers:picky", "--feed", "feed.jsonl")
    assert done.stderr.count("KeyError: 'five' (handlers.py:") == 3
    assert "more of these are only counted" in done.stderr
    assert "Traceback" not in done.stderr
    assert run("handlers:picky", "--feed", "feed.jsonl", "-v").stderr.count("Traceback") == 25


@pytest.mark.parametrize("handler", ["plain", "instance"])
def test_plain_functions_and_callable_objects_are_handlers(run: Run, handler: str) -> None:
    done = run(f"handlers:{handler}", "--feed", "feed.jsonl", "--concurrency", "3", "--prefetch", "7", "--json")
    told = json.loads(done.stdout)
    assert told["messages"]["completed"] == 100
    assert told["batches"]["max"] <= 7


def test_a_small_queue_is_fed_as_it_empties(run: Run, here: Path) -> None:
    """C39: the feed waits for room; nothing is refused."""
    arguments = command("run", "handlers:quiet", "--provider", "memory://?capacity=4", "--queue", "q", "--json")
    arguments += ["--feed", "feed.jsonl", "--session-key", "s"]
    done = subprocess.run(arguments, cwd=here, capture_output=True, text=True, timeout=30)
    assert json.loads(done.stdout)["messages"]["completed"] == 100, done.stderr


def test_a_terminal_shows_progress_and_keeps_what_the_handler_prints(here: Path) -> None:
    master, slave = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    arguments = run_arguments("handlers:slow", "--feed", "feed.jsonl", "--concurrency", "50")
    process = subprocess.Popen(arguments, cwd=here, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while chunk := os.read(master, 65_536):
            seen += chunk
    os.close(master)
    assert process.wait(timeout=10) == 0
    output = seen.decode()
    assert re.search(r"100 sent · \d+ messages · [\d,]+/s · 50 in flight · \d+ waiting · 0 dead-lettered", output)
    assert output.count("begun") == output.count("done") == 100
    assert "100 completed, 0 dead-lettered, none left" in output
    assert output.endswith("\r\n")
    assert "\x1b[?25l" in output, "the cursor is hidden while the line lives"
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


# Lines that cannot be sent.


def test_bad_lines_are_named_and_counted_and_the_rest_is_sent(run: Run, here: Path) -> None:
    lines = [
        b'{"s": "fine"}',
        b"{",
        b"",
        b'{"s": ["list"]}',
        b'{"s": "\xe6\x97\xa5"}',
        b'{"s": NaN}',
        b'"\xff"',
        b"[" * 100_000,
        b'{"no": "key"}',
        b"[1, 2]",
        b'{"s": "' + b"x" * 129 + b'"}',
        b'"' + b"y" * 1_100_000 + b'"',
        b'{"s": 7}\r',
        b'{"s": "last, without an end"}',
    ]
    (here / "bad.jsonl").write_bytes(b"\n".join(lines))
    done = run("handlers:note", "--feed", "bad.jsonl", "--session-key", "s", "--json")
    assert done.returncode == 1
    fed = json.loads(done.stdout)["fed"]
    assert (fed["lines"], fed["sent"], fed["refused"]) == (13, 5, 8)
    assert [refusal["line"] for refusal in fed["refusals"]] == [2, 4, 5, 6, 7, 8, 11, 12]
    for number, problem in [
        (2, "is not JSON: .* at column 2"),
        (4, "s: a session key is made of texts and whole numbers, not list"),
        (5, "session_id: must be 1 to 128 printable ASCII"),
        (6, "NaN is no JSON number"),
        (7, "is not UTF-8: 0xff at byte 2"),
        (8, "nested too deeply"),
        (11, "session_id: must be 1 to 128"),
        (12, "the message has 1100002 bytes; the limit is 1048576"),
    ]:
        assert re.search(rf"^bad\.jsonl:{number}: not sent: .*{problem}", done.stderr, re.MULTILINE), done.stderr
    handled = sorted(line for line in done.stderr.splitlines() if line.startswith("handled"))
    assert handled == [
        'handled 7 {"s": 7}',
        'handled None [1, 2]',
        'handled None {"no": "key"}',
        'handled fine {"s": "fine"}',
        'handled last, without an end {"s": "last, without an end"}',
    ]  # fmt: skip


def test_a_composite_session_key_needs_all_its_fields(run: Run) -> None:
    """C29."""
    lines = '{"a": {"b": "x"}, "n": 1}\n{"a": {"b": "x"}}\n{"a.b": "dotted", "n": 2}\n'
    done = run("handlers:note", "--feed", "-", "--session-key", "a.b, n", stdin=lines)
    assert "handled x:1 " in done.stdout
    assert 'handled None {"a": {"b": "x"}}' in done.stdout
    assert "handled dotted:2 " in done.stdout


def test_lines_from_stdin_are_handled_while_it_stays_open(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("handlers:note", "--feed", "-")
    assert process.stdin is not None
    assert process.stdout is not None
    for text in ("1\n", '"half', '"\n'):
        process.stdin.write(text)
        process.stdin.flush()
        if text.endswith("\n"):
            assert read_line(process).startswith("handled None ")
    output, _ = process.communicate(timeout=10)
    assert "2 of 2 lines of stdin" in output
    assert process.returncode == 0


# Signals.


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 10)
    assert ready, "it says nothing"
    return process.stdout.readline()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_running_handlers_finish_and_releases_the_rest(
    start: Callable[..., subprocess.Popen[str]], number: signal.Signals, code: int
) -> None:
    """C40."""
    process = start("handlers:slow", "--feed", "feed.jsonl", "--concurrency", "2")
    read_line(process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=10)
    assert process.returncode == code, errors
    completed = int(re.search(r"(\d+) completed", output)[1])  # type: ignore[index]
    assert output.count("done") == completed
    assert 1 <= completed <= 4
    assert f"{100 - completed} left in the queue" in output
    assert f"until {number.name}" in output
    assert "finishing what runs" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("handler", ["endless", "stuck"])
def test_a_second_signal_releases_everything_at_once(start: Callable[..., subprocess.Popen[str]], handler: str) -> None:
    process = start(f"handlers:{handler}", "--feed", "feed.jsonl", "--concurrency", "1")
    read_line(process)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert "finishing what runs" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=10)
    assert process.returncode == 143, errors
    assert "100 left in the queue" in output
    assert "Traceback" not in errors


def test_the_drain_ends_at_its_timeout(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("handlers:endless", "--feed", "feed.jsonl", "--drain-timeout", "0.1")
    read_line(process)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output, _ = process.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert process.returncode == 143
    assert "100 left in the queue" in output


def test_a_run_for_ever_waits_for_more_while_stdin_blocks(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("handlers:note", "--feed", "-", "--forever")
    assert process.stdin is not None
    process.stdin.write("1\n")
    process.stdin.flush()
    read_line(process)
    process.send_signal(signal.SIGINT)  # stdin is open, and its thread waits for it
    assert process.wait(timeout=10) == 130


def test_an_interrupted_send_says_how_far_it_came() -> None:
    arguments = command("send", "q", "--jsonl", "-", "--provider", "memory://")
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("1\n2\nno\n")
        process.stdin.flush()
        assert "stdin:3: not sent" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert process.stdout is not None
        assert process.stdout.read() == "2 of 3 lines sent to q\n"


# What is wrong is said in a sentence, with a code.


@pytest.mark.parametrize(
    ("handler", "more", "code", "problem"),
    [
        ("handlers:quite", (), 1, "the module 'handlers' has no 'quite'; did you mean 'quiet'?"),
        ("nowhere:handle", (), 1, "there is no module 'nowhere' in "),
        ("handlers:constant", (), 1, "handlers:constant is no function of a message, but of type int"),
        ("handlers:Both", (), 1, "handlers:Both is no function of a message, but the class Both"),
        ("handlers", (), 2, "must be module:function, not 'handlers'"),
        ("handlers.py:quiet", (), 2, "give the module, handlers:quiet"),
        ("some/handlers.py:quiet", (), 2, "give the module, handlers:quiet from its directory, some"),
        ("handlers:quiet", ("--feed", "none.jsonl"), 2, "'--feed': File 'none.jsonl' does not exist"),
        ("handlers:quiet", ("--session-key", "s"), 2, "--session-key is for the lines of --feed"),
        ("handlers:quiet", ("--feed", "feed.jsonl", "--session-key", "s,,t"), 2, "'--session-key': has an empty field"),
        ("handlers:quiet", ("--concurrency", "0"), 2, "'--concurrency'"),
        ("handlers:quiet", ("--queue", "a--b"), 2, "'--queue': must be 1 to 260 ASCII letters"),
        ("handlers:quiet", ("--prefetch", "1"), 3, "--prefetch: must be at least 2"),
        ("handlers:quiet", ("--max-attempts", "9"), 3, "--max-attempts: the queue itself gives a message up after 5"),
        ("handlers:quiet", ("--provider", "redis://u:secret@h"), 3, "--provider: unknown scheme 'redis'"),
        ("handlers:quiet", ("--provider", "memory://?capacity=0"), 3, "--provider: capacity: must be at least 1"),
        ("handlers:quiet", ("--provider", "memory://?colour=red"), 3, "--provider: colour: is no setting"),
        ("handlers:quiet", ("--provider", "memory://?auto_create=false"), 1, "queue 'q' does not exist"),
    ],
)
def test_a_user_s_error_is_one_sentence(
    here: Path, monkeypatch: pytest.MonkeyPatch, handler: str, more: tuple[str, ...], code: int, problem: str
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    sys.modules.pop("handlers", None)
    done = invoke("run", handler, "--provider", "memory://", "--queue", "q", *more)
    sys.modules.pop("handlers", None)
    assert done.exit_code == code, done.output
    assert problem in " ".join(done.stderr.split())
    assert "Traceback" not in done.output
    assert "secret" not in done.output


@pytest.mark.parametrize(
    ("text", "told"),
    [("import json\n1 / 0\n", "ZeroDivisionError: division by zero"), ("def handle(:\n", "SyntaxError"),
     ("import not_there\n", "No module named 'not_there'"), ("raise SystemExit(9)\n", "SystemExit: 9")],
)  # fmt: skip
def test_a_module_that_cannot_be_imported_shows_its_own_traceback(run: Run, here: Path, text: str, told: str) -> None:
    (here / "broken.py").write_text(text)
    done = run("broken:handle")
    assert done.returncode == 1
    assert "Error: the module 'broken' cannot be imported:" in done.stderr
    assert "broken.py" in done.stderr
    assert told in done.stderr
    assert "importlib" not in done.stderr
    assert "queue_runtime/cli" not in done.stderr


def test_a_missing_extra_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ModuleNotFoundError('no click here', name='click')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command("--help"), env=environment, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == "The command line needs click and rich: pip install 'queue-runtime[cli]'\n"


@pytest.mark.parametrize(
    "arguments", [(), ("run",), ("health",), ("send",), ("peek",), ("dlq",), ("dlq", "list"), ("dlq", "redrive")]
)
def test_help_is_there(arguments: tuple[str, ...]) -> None:
    done = invoke(*arguments, "--help")
    assert done.exit_code == 0
    assert "Usage: queue-runtime" in done.output
    if arguments != ("dlq",):
        for code in (0, 1, 2, 3, 4, 130, 143):
            assert re.search(rf"^ +{code}  ", done.output, re.MULTILINE), done.output
