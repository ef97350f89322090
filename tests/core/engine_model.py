"""The slow, obvious twin of the queue engine: one list of entries, searched from end to end at every step.

It has the engine's methods. Where the engine returns received messages, the twin returns ``Seen`` tuples; its
receipts are (link, entry, delivery) triples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from queue_runtime._core.message import Message

COMPLETE, ABANDON, DEAD_LETTER, DEFER = range(4)
TOO_MANY = "MaxDeliveryCountExceeded"
EXPIRED = "TTLExpired"


class Seen(NamedTuple):
    """What the receiver of a message can tell."""

    message_id: str
    number: int
    deliveries: int
    enqueued_at: float
    first_delivered_at: float | None
    delivered_at: float | None
    locked_until: float | None
    reason: str | None
    description: str | None


@dataclass(eq=False)
class ModelLink:
    dead: bool
    session: str | None
    closed: bool = False
    lost: bool = False
    end: float = 0.0
    locked_until: float = 0.0


@dataclass(eq=False)
class Entry:
    message: Message
    number: int
    enqueued_at: float
    dead: bool = False
    state: str = "ready"
    link: ModelLink | None = None
    lock_end: float = 0.0
    lock_order: int = 0  # of the delivery
    lock_stamp: int = 0  # of the delivery or its last renewal
    due: float = 0.0
    by_wall: bool = False
    expires: float = math.inf
    deliveries: int = 0
    first_delivered_at: float = 0.0
    reason: str | None = None
    description: str | None = None

    @property
    def session(self) -> str | None:
        return None if self.dead else self.message.session_id


@dataclass
class ModelEngine:
    lock_duration: float
    session_lock_duration: float
    max_delivery_count: int
    dead_letter_on_expiration: bool
    deduplication_window: float
    capacity: int
    entries: list[Entry] = field(default_factory=list)
    numbers: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    holders: dict[str, ModelLink] = field(default_factory=dict)
    states: dict[str, bytes | None] = field(default_factory=dict)
    ready_sessions: list[str] = field(default_factory=list)
    seen: list[tuple[float, str]] = field(default_factory=list)
    orders: int = 0
    now: float = 0.0

    # The parts.

    def lane(self, dead: bool, session: str | None) -> list[Entry]:
        """What a receiver of this lane would get now, in order."""
        deliverable = []
        for entry in sorted(self.entries, key=lambda entry: entry.number):
            if entry.dead == dead and (dead or entry.session == session):
                if entry.state == "held" and session is not None:
                    break
                if entry.state == "ready":
                    deliverable.append(entry)
        return deliverable

    def tend(self) -> None:
        sessions = {entry.session for entry in self.entries if entry.session is not None}
        ready = {name for name in sessions if name not in self.holders and self.lane(False, name)}
        self.ready_sessions = [name for name in self.ready_sessions if name in ready]
        fresh = ready - set(self.ready_sessions)
        assert len(fresh) <= 1, "one step makes at most one session ready"
        self.ready_sessions += fresh

    def bury(self, entry: Entry, reason: str | None, description: str | None) -> None:
        if not entry.dead:
            self.numbers[True] += 1
            entry.number = self.numbers[True]
        entry.dead = True
        entry.state = "ready"
        entry.link = None
        entry.expires = math.inf
        entry.reason, entry.description = reason, description

    def expire(self, entry: Entry) -> None:
        if self.dead_letter_on_expiration:
            self.bury(entry, EXPIRED, "the message outlived its time to live")
        else:
            self.entries.remove(entry)

    def give_back(self, entry: Entry, delay: float = 0.0) -> None:
        entry.link = None
        if not entry.dead and entry.deliveries >= self.max_delivery_count:
            self.bury(entry, TOO_MANY, f"the message was delivered {entry.deliveries} times and never completed")
        elif entry.expires <= self.now:
            self.expire(entry)
        elif delay > 0:
            entry.state, entry.due, entry.by_wall = "held", self.now + delay, False
        else:
            entry.state = "ready"
        self.tend()

    def drop_locks(self, link: ModelLink) -> None:
        held = [entry for entry in self.entries if entry.link is link]
        for entry in sorted(held, key=lambda entry: entry.lock_order):
            self.give_back(entry)

    def tick(self, now: float, wall: float) -> None:
        self.now = now
        for name, link in sorted(self.holders.items(), key=lambda item: item[1].end):
            if link.end <= now:
                link.lost = True
                del self.holders[name]
                self.drop_locks(link)
                self.tend()
        locked = [entry for entry in self.entries if entry.state == "locked" and entry.lock_end <= now]
        for entry in sorted(locked, key=lambda entry: entry.lock_stamp):
            self.give_back(entry)
        for by_wall, limit in ((False, now), (True, wall + 1e-6)):
            waiting = [entry for entry in self.entries if entry.state in ("held", "scheduled")]
            waiting = [entry for entry in waiting if entry.by_wall == by_wall and entry.due <= limit]
            for entry in sorted(waiting, key=lambda entry: (entry.due, entry.number)):
                if entry.state == "scheduled":
                    self.start_life(entry, now - (wall - entry.due) if by_wall else entry.due)
                entry.state = "ready"
                self.tend()
        for entry in sorted(self.entries, key=lambda entry: (entry.expires, entry.number)):
            if entry.expires <= now and entry.state != "locked":
                self.expire(entry)
                self.tend()
        self.seen = [(end, name) for end, name in self.seen if end > now]

    def start_life(self, entry: Entry, since: float) -> None:
        if entry.message.time_to_live is not None:
            entry.expires = since + entry.message.ttl_us / 1e6

    def deliver(self, entry: Entry, link: ModelLink, wall: float) -> tuple[Seen, Any]:
        entry.state, entry.link, entry.lock_end = "locked", link, self.now + self.lock_duration
        self.orders += 1
        entry.lock_order = entry.lock_stamp = self.orders
        entry.deliveries += 1
        if entry.deliveries == 1:
            entry.first_delivered_at = wall
        seen = Seen(
            entry.message.message_id,
            entry.number,
            entry.deliveries,
            entry.enqueued_at,
            entry.first_delivered_at,
            max(wall, entry.first_delivered_at),
            wall + self.lock_duration,
            entry.reason,
            entry.description,
        )
        return seen, (link, entry, (entry.dead, entry.number, entry.deliveries))

    def usable(self, link: ModelLink, now: float, wall: float) -> str | None:
        self.tick(now, wall)
        return "closed" if link.closed else "lost" if link.lost else None

    # The engine's methods; where it raises, these return the reason.

    @property
    def room(self) -> int:
        dead = sum(entry.dead for entry in self.entries)
        return max(0, self.capacity - (len(self.entries) - dead) - max(0, dead - self.capacity))

    def send(self, messages: list[Message], now: float, wall: float) -> int:
        self.tick(now, wall)
        for taken, message in enumerate(messages):
            name = message.deduplication_id
            if name is not None and any(name == known for _, known in self.seen):
                continue
            if self.room == 0:
                return taken
            if name is not None and self.deduplication_window > 0:
                self.seen.append((now + self.deduplication_window, name))
            self.numbers[False] += 1
            entry = Entry(message, self.numbers[False], wall)
            if message.scheduled_us >= 0 and message.scheduled_us / 1e6 > wall:
                entry.state, entry.due, entry.by_wall = "scheduled", message.scheduled_us / 1e6, True
            elif message.delay_us > 0:
                entry.state, entry.due = "scheduled", now + message.delay_us / 1e6
            else:
                self.start_life(entry, now)
            self.entries.append(entry)
            self.tend()
        return len(messages)

    def open_link(self, dead: bool) -> ModelLink:
        return ModelLink(dead, None)

    def accept(self, session: str | None, now: float, wall: float) -> ModelLink | float | None:
        """The end of the other holder's lock when it is held."""
        self.tick(now, wall)
        if session is None:
            if not self.ready_sessions:
                return None
            session = self.ready_sessions[0]
        if session in self.holders:
            return self.holders[session].locked_until
        link = ModelLink(False, session, False, False, now + self.session_lock_duration)
        link.locked_until = wall + self.session_lock_duration
        self.holders[session] = link
        self.tend()
        return link

    def close_link(self, link: ModelLink, now: float, wall: float) -> None:
        self.tick(now, wall)
        link.closed = True
        if link.session is not None and self.holders.get(link.session) is link:
            del self.holders[link.session]
        self.drop_locks(link)
        self.tend()

    def renew_session(self, link: ModelLink, now: float, wall: float) -> float | str:
        if problem := self.usable(link, now, wall):
            return problem
        link.end, link.locked_until = now + self.session_lock_duration, wall + self.session_lock_duration
        self.holders[link.session or ""] = self.holders.pop(link.session or "")
        return link.locked_until

    def set_state(self, link: ModelLink, state: bytes | None, now: float, wall: float) -> str | None:
        problem = self.usable(link, now, wall)
        if not problem:
            self.states[link.session or ""] = state
        return problem

    def get_state(self, link: ModelLink, now: float, wall: float) -> bytes | str | None:
        return self.usable(link, now, wall) or self.states.get(link.session or "")

    def receive(self, link: ModelLink, count: int, now: float, wall: float) -> list[tuple[Seen, Any]] | str:
        if problem := self.usable(link, now, wall):
            return problem
        return [self.deliver(entry, link, wall) for entry in self.lane(link.dead, link.session)[:count]]

    def receive_deferred(
        self, link: ModelLink, numbers: list[int], now: float, wall: float
    ) -> list[tuple[Seen, Any]] | str:
        if problem := self.usable(link, now, wall):
            return problem
        received = []
        for number in numbers:
            for entry in list(self.entries):
                if entry.number == number and entry.state == "deferred" and entry.dead == link.dead:
                    if entry.session != link.session:
                        continue
                    if not entry.dead and entry.deliveries >= self.max_delivery_count:
                        self.give_back(entry)
                    else:
                        received.append(self.deliver(entry, link, wall))
        return received

    def valid(self, link: ModelLink, receipt: Any) -> Entry | None:
        owner, entry, delivery = receipt
        current = (entry.dead, entry.number, entry.deliveries)
        return entry if owner is link and entry.link is link and delivery == current else None

    def refusal(self, link: ModelLink) -> str:
        return "lost" if link.lost else "invalid"

    def settle(
        self, link: ModelLink, action: int, receipts: list[Any], now: float, wall: float, delay: float, reason: str
    ) -> list[str | None]:
        self.tick(now, wall)
        outcomes: list[str | None] = []
        for receipt in receipts:
            entry = self.valid(link, receipt)
            if entry is None:
                outcomes.append(self.refusal(link))
                continue
            outcomes.append(None)
            if action == ABANDON:
                self.give_back(entry, delay)
                continue
            entry.link = None
            if action == COMPLETE:
                self.entries.remove(entry)
            elif action == DEAD_LETTER:
                self.bury(entry, reason, None)
            elif entry.expires <= now:
                self.expire(entry)
            else:
                entry.state = "deferred"
            self.tend()
        return outcomes

    def renew(self, link: ModelLink, receipts: list[Any], now: float, wall: float) -> list[float | str]:
        self.tick(now, wall)
        ends: list[float | str] = []
        for receipt in receipts:
            entry = self.valid(link, receipt)
            if entry is not None:
                entry.lock_end = now + self.lock_duration
                self.orders += 1
                entry.lock_stamp = self.orders
            ends.append(self.refusal(link) if entry is None else wall + self.lock_duration)
        return ends

    def peek(self, count: int, number: int, dead: bool) -> list[Seen]:
        entries = [entry for entry in self.entries if entry.dead == dead and entry.number >= number]
        return [
            Seen(
                entry.message.message_id,
                entry.number,
                entry.deliveries,
                entry.enqueued_at,
                None,
                None,
                None,
                entry.reason,
                entry.description,
            )
            for entry in sorted(entries, key=lambda entry: entry.number)[:count]
        ]

    def counts(self) -> tuple[int, ...]:
        states = [entry.state for entry in self.entries if not entry.dead]
        waiting = states.count("scheduled") + states.count("held")
        dead = sum(entry.dead for entry in self.entries)
        return states.count("ready"), states.count("locked"), waiting, states.count("deferred"), dead

    def next_due(self, now: float, wall: float) -> float:
        ends = [link.end for link in self.holders.values()]
        ends += [entry.lock_end for entry in self.entries if entry.state == "locked"]
        waiting = [entry for entry in self.entries if entry.state in ("held", "scheduled")]
        ends += [entry.due for entry in waiting if not entry.by_wall]
        ends += [entry.expires for entry in self.entries if entry.expires > self.now]
        due = min(ends, default=math.inf) - now
        return max(0.0, min([due] + [entry.due - wall for entry in waiting if entry.by_wall]))
