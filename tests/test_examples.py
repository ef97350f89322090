"""The examples run, and the one with events shows what it says it shows."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from queue_runtime import Message, ReceivedMessage, RejectMessage

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def webhooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("webhooks", None)
    import webhooks

    yield webhooks
    sys.modules.pop("webhooks", None)


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    return (EXAMPLES / "webhooks.jsonl").read_bytes().splitlines()


@pytest.fixture(scope="module")
def events(lines: list[bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


def received(line: bytes, delivery_count: int = 1) -> ReceivedMessage:
    return ReceivedMessage(
        message=Message(body=line), receipt=None, delivery_count=delivery_count, enqueued_at=0.0,
        first_delivered_at=0.0, delivered_at=0.0, locked_until=None,
    )  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "dev", "-W", "error", *arguments]
    return subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=60)


def test_the_quickstart() -> None:
    done = run("quickstart.py")
    assert done.returncode == 0, done.stderr
    *handled, last = done.stdout.splitlines()
    assert [line for line in handled if "order-0" in line] == [f"order-0 step {number}" for number in (0, 2, 4)]
    assert [line for line in handled if "order-1" in line] == [f"order-1 step {number}" for number in (1, 3, 5)]
    assert last == "6 completed in 2 sessions"


def test_the_webhooks_as_make_run_runs_them(events: list[dict[str, Any]]) -> None:
    arguments = ["-m", "queue_runtime", "run", "webhooks:handle", "--provider", "memory://", "--queue", "webhooks"]
    makefile = " ".join((EXAMPLES.parent / "Makefile").read_text().replace("\\\n", " ").split())
    arguments += ["--feed", "webhooks.jsonl", "--session-key", "repository.full_name,pull_request.number"]
    assert " ".join(arguments) in makefile
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["fed"]["sent"] == len(events)
    assert told["messages"] == {
        "received": len(events) + 3, "completed": len(events) - 1, "dead_lettered": 1, "abandoned": 3, "left": 0,
    }  # fmt: skip
    assert told["dead_letters"]["reasons"] == {"SignatureMismatch": 1}
    assert re.fullmatch(r"push [0-9a-f-]{36} is not what was signed", told["dead_letters"]["first"][0]["description"])
    assert told["failures"] == {"NotReadyYet": 3}, "an event came out of order"
    assert told["retries"] == 3
    pulls = {(event["repository"]["full_name"], event["number"]) for event in events if "pull_request" in event}
    assert told["sessions"]["different"] == len(pulls)
    merged = [event for event in events if "pull_request" in event and event["pull_request"]["merged"]]
    assert done.stderr.count(" merged after ") == len(merged) > 10


def test_the_events_are_varied_and_real_in_size(lines: list[bytes], events: list[dict[str, Any]]) -> None:
    kinds = Counter(event["event"] for event in events)
    assert {"push", "pull_request", "issues", "issue_comment", "check_run", "release", "ping"} <= set(kinds)
    assert len({event["repository"]["full_name"] for event in events}) >= 5
    assert 300 <= len(lines) <= 600
    assert sum(map(len, lines)) < 1_500_000
    assert sum(10_000 <= len(line) <= 30_000 for line in lines) >= 10
    assert any(not line.isascii() for line in lines)
    places = defaultdict(list)
    for place, event in enumerate(events):
        if "pull_request" in event:
            places[event["repository"]["full_name"], event["number"]].append(place)
    interleaved = [key for key, found in places.items() if found[-1] - found[0] >= len(found)]
    assert len(interleaved) > len(places) // 2


def test_the_generator_writes_this_very_file(monkeypatch: pytest.MonkeyPatch, lines: list[bytes]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import make_webhooks

    assert make_webhooks.make().splitlines() == lines


async def test_the_handler_notices_a_wrong_order(webhooks: ModuleType, lines: list[bytes]) -> None:
    """So that a run without a complaint means something: each swap of neighbours in one pull request is caught."""

    async def handle_all(story: Iterable[bytes]) -> None:
        for line in story:
            await webhooks.handle(received(line, delivery_count=2))

    by_pull = defaultdict(list)
    for line in lines:
        event = json.loads(line)
        if "pull_request" in event:
            by_pull[event["repository"]["full_name"], event["number"]].append(line)
    story = max(by_pull.values(), key=len)
    assert len(story) >= 8
    for place in range(len(story) - 1):
        webhooks.pull_requests.clear()
        swapped = [*story[:place], story[place + 1], story[place], *story[place + 2 :]]
        with pytest.raises(webhooks.OutOfOrder):
            await handle_all(swapped)
    webhooks.pull_requests.clear()
    await handle_all(line for line in story for _ in range(2))  # delivered twice is fine


async def test_exactly_one_line_is_poison(webhooks: ModuleType, lines: list[bytes]) -> None:
    wrong = [line for line in lines if (event := json.loads(line))["signature"] != webhooks.signature(event)]
    assert len(wrong) == 1
    with pytest.raises(RejectMessage) as rejected:
        await webhooks.handle(received(wrong[0]))
    assert rejected.value.reason == "SignatureMismatch"
