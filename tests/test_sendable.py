"""What a provider cannot do is refused before anything is sent, on every provider [C18, C19, C29]."""

from datetime import timedelta
from typing import Any

import pytest
from wrapping import wrap

from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, utc
from queue_runtime.errors import CapabilityError, QueueRuntimeError, ValidationError
from queue_runtime.message import Message

CLOCK = ManualClock()


@pytest.mark.parametrize(
    ("capabilities", "fields", "error", "named"),
    [
        ({"sessions": False}, {"session_id": "s"}, CapabilityError, "capabilities.sessions"),
        ({"deduplication": False}, {"deduplication_id": "d"}, CapabilityError, "capabilities.deduplication"),
        ({"max_delay": 900.0}, {"delay": 900.001}, ValidationError, "^delay: must be at most 900 s"),
        (
            {"max_delay": 900.0},
            {"scheduled_at": utc(CLOCK.time()) + timedelta(seconds=901)},
            ValidationError,
            "^scheduled_at: must be at most 900 s from now",
        ),
    ],
    ids=str,
)
async def test_what_cannot_be_done_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capabilities: dict[str, Any],
    fields: dict[str, Any],
    error: type[QueueRuntimeError],
    named: str,
) -> None:
    """Those beside it too; and nothing that can be done."""
    wrap(monkeypatch, **capabilities)
    async with QueueClient(clock=CLOCK) as client:
        bad = Message(body=b"bad", **fields)
        with pytest.raises(error, match=named):
            await client.send_message("q", bad)
        with pytest.raises(error, match=named):
            await client.send_messages("q", [Message(body=b"good"), bad])
        assert await client.receive_message("q", 0) is None
        allowed = [
            Message(body=b"1", delay=900),
            Message(body=b"2", scheduled_at=utc(CLOCK.time() + 900)),
            Message(body=b"3"),
        ]
        await client.send_messages("q", allowed)
        counts = await client.counts("q")
        assert (counts.scheduled, counts.active) == (2, 1)
