"""The messages that the benchmarks move: one place, so that their figures can be compared."""

from __future__ import annotations

from typing import Any

import msgspec

from queue_runtime import Message

BODY = bytes(range(256)) * 4


class Rival(msgspec.Struct, array_like=True):
    """What the rivals encode and decode: the elements of an envelope, times as whole microseconds."""

    version: int
    message_id: str
    session_id: str | None
    correlation_id: str | None
    content_type: str | None
    time_to_live: int | None
    scheduled_at: int | None
    delay: int | None
    deduplication_id: str | None
    attributes: dict[str, str]
    body: bytes


def fields(number: int) -> dict[str, Any]:
    """A body of 1 KB, 4 attributes, 10 fields; no two messages are alike, as on a real queue."""
    return {
        "body": BODY,
        "attributes": {
            "traceparent": f"00-4bf92f3577b34da6a3ce929d{number:08x}-00f067aa{number:08x}-01",
            "tenant": f"acme-production-{number % 10}",
            "event": "pull_request.opened",
            "region": "eu-central-1",
        },
        "message_id": f"6a1b0f3e-44f1-4c1d-9d5c-{number:012d}",
        "session_id": f"acme/website#{number}",
        "correlation_id": f"0b0c5d5e-8a5a-4a42-9d3a-{number:012x}",
        "content_type": "application/json",
        "time_to_live": 3600,
        "deduplication_id": f"delivery-{number:012d}",
    }


def message(number: int) -> Message:
    return Message(**fields(number))


def rival(number: int) -> Rival:
    made = message(number)
    return Rival(
        1,
        made.message_id,
        made.session_id,
        made.correlation_id,
        made.content_type,
        3_600_000_000,
        None,
        None,
        made.deduplication_id,
        dict(made.attributes),
        made.body,
    )
