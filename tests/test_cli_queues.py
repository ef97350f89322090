"""The commands around a queue, send, peek and dlq, and parts of the command line on their own."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, strategies as st

from queue_runtime.cli.commands import root
from queue_runtime.cli.lines import LineSplitter
from queue_runtime.cli.meter import Histogram
from queue_runtime.cli.telling import shown
from queue_runtime.client import QueueClient
from queue_runtime.message import Message
from queue_runtime.providers.base import QueueCounts


def invoke(*arguments: str, stdin: bytes = b"") -> Result:
    """Run a command in this process, so that a shared memory:// outlives it."""
    return CliRunner().invoke(root, arguments, input=stdin, prog_name="queue-runtime")


# Send, peek and dead letters: on memory:// shared with a client of this process.


class Kept:
    """Keeps shared queues alive from command to command, each of which has an event loop of its own."""

    def __init__(self, name: str) -> None:
        self.url = f"memory://{name}"
        self.keeper = QueueClient(self.url)

    def counts(self) -> QueueCounts:
        async def count() -> QueueCounts:
            async with QueueClient(self.url) as client:
                return await client.counts("q")

        return asyncio.run(count())

    def bury(self, count: int, reason: str) -> None:
        async def bury() -> None:
            async with QueueClient(self.url) as client:
                for number in range(count):
                    await client.send_message("q", Message(body=b"\xff", message_id=f"{reason}-{number}"))
                    message = await client.receive_message("q", 1)
                    assert message is not None
                    await client.dead_letter_message(message, reason, "because \x1b[2J")

        asyncio.run(bury())

    def __call__(self, *arguments: str, stdin: bytes = b"") -> Result:
        return invoke(*arguments, "--provider", self.url, stdin=stdin)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(tmp_path.name)
    yield kept
    asyncio.run(kept.keeper.close())


def test_send_and_peek(kept: Kept) -> None:
    sent = kept("send", "q", "one", "zwei ü", "--session-id", "s", "--attribute", "a=b=c", "--content-type", "text/x")
    assert sent.exit_code == 0, sent.output
    ids = sent.stdout.split()
    told = json.loads(kept("peek", "q", "--json").stdout)
    assert [message["message_id"] for message in told["messages"]] == ids
    assert [message["body"] for message in told["messages"]] == ["one", "zwei ü"]
    first = told["messages"][0]
    assert (first["session_id"], first["attributes"], first["content_type"]) == ("s", {"a": "b=c"}, "text/x")
    assert first["delivery_count"] == 0
    table = kept("peek", "q", "--limit", "1").stdout
    assert ids[0] in table
    assert ids[1] not in table
    start = str(told["messages"][1]["sequence_number"])
    assert ids[1] in kept("peek", "q", "--from", start).stdout
    assert "has no messages" in kept("peek", "empty").stdout


def test_send_takes_stdin_whole_or_line_by_line(kept: Kept) -> None:
    assert kept("send", "q", stdin=b"a\nb\x00\xff").exit_code == 0
    lines = kept("send", "q", "--jsonl", "-", "--session-key", "k", "--json", stdin=b'{"k": "x"}\n{"k": 1}\n{bad\n')
    assert lines.exit_code == 1
    told = json.loads(lines.stdout)
    assert (told["sent"], told["refused"]) == (2, 1)
    assert told["refusals"][0]["line"] == 3
    assert "stdin:3: not sent: is not JSON" in lines.stderr
    whole, *others = json.loads(kept("peek", "q", "--json").stdout)["messages"]
    assert whole["body_base64"] == "YQpiAP8="
    assert [(message["session_id"], message["body"]) for message in others] == [("x", '{"k": "x"}'), ("1", '{"k": 1}')]
    assert {message["content_type"] for message in others} == {"application/json"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("body", "--jsonl", "-"), "give bodies or --jsonl, not both"),
        (("body", "--session-key", "k"), "--session-key is for the lines of --jsonl"),
        (("body", "--attribute", "novalue"), "must be NAME=VALUE"),
        (("body", "--session-id", "ü"), "--session-id: must be 1 to 128 printable ASCII"),
        (("body", "--time-to-live", "-1"), "--time-to-live: "),
        (("--jsonl", "-", "--session-id", "ü"), "--session-id: must be"),
    ],
)
def test_send_refuses_with_the_option_s_name(kept: Kept, arguments: tuple[str, ...], problem: str) -> None:
    done = kept("send", "q", *arguments, stdin=b"1\n")
    assert done.exit_code == 2, done.output
    assert problem in " ".join(done.stderr.split())
    assert kept.counts().active == 0


def test_dead_letters_are_listed_and_sent_back(kept: Kept) -> None:
    """C16."""
    kept.bury(3, "Bad")
    kept.bury(2, "Worse")
    told = json.loads(kept("dlq", "list", "q", "--json", "--filter-reason", "Worse").stdout)
    assert told["dead_lettered"] == 5
    assert [message["message_id"] for message in told["messages"]] == ["Worse-0", "Worse-1"]
    assert told["messages"][0]["dead_letter_description"] == "because \x1b[2J"
    table = kept("dlq", "list", "q", "--limit", "4").stdout
    assert "4 of 5 dead letters of q shown" in table
    assert "\x1b" not in table
    assert r"because \x1b[2J" in table

    dry = json.loads(kept("dlq", "redrive", "q", "--filter-reason", "Bad", "--dry-run", "--json").stdout)
    assert (dry["matched"], dry["moved"], dry["dry_run"]) == (3, 0, True)
    assert kept.counts().dead_lettered == 5
    assert (
        "3 of 5 dead letters would go back" in kept("dlq", "redrive", "q", "--filter-reason", "Bad", "--dry-run").stdout
    )
    back = kept("dlq", "redrive", "q", "--filter-reason", "Bad", "--limit", "2")
    assert back.exit_code == 0
    assert "2 of " in back.stdout
    counts = kept.counts()
    assert (counts.active, counts.dead_lettered) == (2, 3)
    rest = json.loads(kept("dlq", "redrive", "q", "--rate", "1000", "--json").stdout)
    assert rest["moved"] == 3
    counts = kept.counts()
    assert (counts.active, counts.dead_lettered) == (5, 0)


def test_the_commands_read_the_provider_from_the_environment(kept: Kept) -> None:
    done = CliRunner().invoke(root, ["peek", "q"], env={"QUEUE_RUNTIME_PROVIDER": kept.url})
    assert done.exit_code == 0


# Parts.


@given(st.binary(max_size=300), st.lists(st.integers(1, 20), max_size=40), st.integers(1, 30))
def test_lines_are_the_same_however_they_are_cut(data: bytes, cuts: list[int], limit: int) -> None:
    data = data.replace(b"\xef\xbb\xbf", b"")
    splitter, lines, place = LineSplitter(limit), [], 0
    for cut in [*cuts, max(1, len(data))]:
        if chunk := data[place : place + cut]:
            lines += splitter.split(chunk)
        place += cut
    lines += splitter.end()
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    expected = [line.removesuffix(b"\r") for line in expected]
    assert [line.number for line in lines] == list(range(1, len(expected) + 1))
    for line, whole in zip(lines, expected, strict=True):
        assert line.data == (whole if len(whole) <= limit else None)


@given(st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=200), st.sampled_from([50, 95, 99, 100]))
def test_percentiles_are_right_to_within_a_bucket(durations: list[float], percent: int) -> None:
    histogram = Histogram()
    for duration in durations:
        histogram.record(duration)
    rank = -(-len(durations) * percent // 100)
    assert histogram.percentile(percent) == pytest.approx(sorted(durations)[rank - 1], rel=0.011)


def test_texts_from_outside_cannot_act_on_a_terminal() -> None:
    assert shown("naïve 日本 🚀") == "naïve 日本 🚀"
    assert shown("a\x1b[2Jb\r\n\x07\u202e\ud800") == r"a\x1b[2Jb\r\n\x07\u202e\ud800"
