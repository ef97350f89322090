"""A handler of GitHub-like webhooks, and what a handler may do with a message.

Run it with ``make run``, or in this directory::

    queue-runtime run webhooks:handle --provider memory:// --queue webhooks \
        --feed webhooks.jsonl --session-key repository.full_name,pull_request.number

The events of one pull request have its repository and number as their session: they come in order, one at a time,
while those of other pull requests, and all events without one, run beside them. The handler checks that itself.
"""

import asyncio
import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Any

from queue_runtime import ReceivedMessage, RejectMessage

SECRET = b"not a secret: this is an example"


@dataclass
class PullRequest:
    """What is known of a pull request so far."""

    head: str
    updated_at: str
    state: str
    last_delivery: str
    events: int


class OutOfOrder(Exception):
    """An event that does not follow from the one before."""


class NotReadyYet(Exception):
    """The service has not worked out whether it can be merged."""


pull_requests: dict[tuple[str, int], PullRequest] = {}


async def handle(message: ReceivedMessage) -> None:
    """Verify the event, and follow its pull request."""
    event = json.loads(message.body)
    if not hmac.compare_digest(event["signature"], signature(event)):
        # Another attempt would not help: straight to the dead letters, with the reason.
        raise RejectMessage("SignatureMismatch", f"{event['event']} {event['delivery']} is not what was signed")
    await asyncio.sleep(0.001)  # a real handler would ask a database or a service
    if "pull_request" in event:
        follow(event, message)


def follow(event: dict[str, Any], message: ReceivedMessage) -> None:
    """Take the pull request's next step, if it is the next one. Raises OutOfOrder."""
    pull, repository = event["pull_request"], event["repository"]["full_name"]
    key = (repository, pull["number"])
    known = pull_requests.get(key)
    if known is not None and known.last_delivery == event["delivery"]:
        return  # delivered twice: at least once is the promise, so a handler must bear it
    if known is None:
        if event["action"] != "opened":
            raise OutOfOrder(f"{key}: {event['action']} before it was opened")
    else:
        head_before = event["before"] if event["action"] == "synchronize" else pull["head"]["sha"]
        if event["action"] == "opened" or head_before != known.head or pull["updated_at"] <= known.updated_at:
            raise OutOfOrder(f"{key}: {event['action']} of {pull['updated_at']} after {known}")
        if event["action"] in ("closed", "reopened") and known.state == pull["state"]:
            raise OutOfOrder(f"{key}: {event['action']}, and it was {known.state} already")
    if pull["mergeable"] is None and message.delivery_count == 1:
        # Any exception means: try again. The followers wait, so that the order holds.
        raise NotReadyYet(f"{repository} #{pull['number']}: mergeable is not known yet")
    events = 1 if known is None else known.events + 1
    pull_requests[key] = PullRequest(pull["head"]["sha"], pull["updated_at"], pull["state"], event["delivery"], events)
    if pull["merged"] and event["action"] == "closed":
        lines = f"+{pull['additions']} -{pull['deletions']}"
        print(f"{repository} #{pull['number']} merged after {events} events, {lines}: {pull['title']!r}")


def signature(event: dict[str, Any]) -> str:
    """The HMAC of everything but itself."""
    signed = {name: value for name, value in event.items() if name != "signature"}
    text = json.dumps(signed, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    return "sha256=" + hmac.new(SECRET, text.encode(), hashlib.sha256).hexdigest()
