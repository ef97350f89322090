"""An account of every message, kept apart from the runtime: for the soak in bench/ and the chaos tests in tests/.

It is told what is sent, what handlers see and do, and what consumers say of settlements and lost locks; at the end it
is shown what is still in the queue. From that alone it tells what must not happen:

- a message that is nowhere [C11, C15], or is handled after it was completed;
- in a session, a first handling before that of an earlier message, two handlings at once, or a step back within one
  holding [C24];
- a second delivery while the first one's right to settle still holds: whoever was overtaken must find it gone [C13];
- a handling twice, where nothing that at-least-once delivery allows for has happened. What is allowed is counted.

It remembers only what is not completed yet, so that it stays small in a run of days.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from queue_runtime import Action, ConsumerObserver, Disposition, Message, QueueRuntimeError

MOST_TOLD = 20

RETURNED, FAILED, CANCELLED = "returned", "failed", "cancelled"
"""How a handler ended."""
LOCK_LOST, NOT_SETTLED, KILLED, HELD = "lock lost", "not settled", "killed", "held while the breaker was open"
"""Why a message is delivered again although its handler did not fail (HELD: is handled
again, although it is not delivered again); FAILED and CANCELLED are the other reasons."""


class Seen(Protocol):
    """What the ledger reads of a received message."""

    @property
    def message_id(self) -> str: ...
    @property
    def session_id(self) -> str | None: ...
    @property
    def sequence_number(self) -> int | None: ...
    @property
    def delivery_count(self) -> int: ...
    @property
    def receipt(self) -> Any: ...


class _Entry:
    """A message that is not completed."""

    __slots__ = (
        "attempts",
        "end",
        "has_returned",
        "is_dead",
        "is_gone",
        "latest",
        "line",
        "open",
        "place",
        "redriven",
        "redriven_before",
        "why",
        "witness",
    )

    def __init__(self, place: int) -> None:
        self.place = place
        """Its place among the messages of its session."""
        self.attempts = 0
        self.latest = (0, 0)
        """The sequence number and the delivery count of the newest delivery that a handler got."""
        self.open: Any = None
        """The receipt of the latest handling, until its right to settle is used or known to be gone."""
        self.end: str | None = None
        self.why: str | None = None
        """Why the latest handling was not the last."""
        self.has_returned = False
        self.is_dead = False
        self.redriven = self.redriven_before = 0
        """Times that it was sent back from the dead letters: so far, and when the latest handling began."""
        self.line: _Line | None = None
        """Its session, once it was handled."""
        self.is_gone = False
        """Completed, although the consumer never heard of it."""
        self.witness: Witness | None = None


class _Overtaken:
    """A handling of what was delivered to somebody else, whose right to settle must turn out to be gone."""

    __slots__ = ("end", "is_stale", "number", "witness")

    def __init__(self, number: int, end: str | None, witness: Witness | None, is_stale: bool = False) -> None:
        self.number = number
        self.end = end
        self.witness = witness
        self.is_stale = is_stale
        """Begun when the other one had got it already: its consumer had not noticed yet that the lock was lost."""


class _Line:
    """A session."""

    __slots__ = ("broken", "expected", "front", "holder", "last", "running", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self.expected = 0
        """The place of the message whose first handling is next."""
        self.front = 0
        """The last place at which a handler, or a batch, has begun."""
        self.holder: Any = None
        self.broken: Any = None
        """The holder that was told that a message could not be settled: it may handle nothing more."""
        self.last = -1
        """The sequence number handled last by this holder."""
        self.running: dict[Any, tuple[int, Witness | None]] = {}
        """What is in handlers now, by receipt."""


class Ledger:
    """The account of one queue. Messages have whole numbers as ids, each used once.

    Thread-safety: one thread at a time.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.handled = 0
        self.completed = 0
        self.dead_lettered = 0
        self.redriven = 0
        self.repeated: Counter[str] = Counter()
        """Handlings that were not the first, by the reason."""
        self.twice: Counter[str] = Counter()
        """Of these: after an earlier handler had returned, so that the work was done twice."""
        self.answers_lost = 0
        """Messages that are gone as they should be, although nobody heard of it."""
        self.violations: list[str] = []
        self.violation_count = 0
        self._entries: dict[int, _Entry] = {}
        self._lines: dict[str, _Line] = {}
        self._overtaken: dict[Any, _Overtaken] = {}
        """By receipts, which must turn out to be worthless."""

    @property
    def pending(self) -> int:
        """Messages that are not completed, dead letters included."""
        return len(self._entries)

    def sending(self, messages: Iterable[Message]) -> None:
        """These are about to be sent, in this order."""
        for message in messages:
            place = 0
            if message.session_id is not None:
                line = self._lines.get(message.session_id)
                if line is None:
                    line = self._lines[message.session_id] = _Line()
                place = line.sent
                line.sent += 1
            self._entries[int(message.message_id)] = _Entry(place)
            self.sent += 1

    def redriving(self, message: Seen) -> bool:
        """This dead letter is about to be sent back; usable as the filter of ``redrive``."""
        entry = self._entries.get(int(message.message_id))
        if entry is None:
            self.violate(f"message {message.message_id} is a dead letter, though it was completed")
        else:
            entry.is_dead = False
            entry.redriven += 1
            self.redriven += 1
        return True

    def begin(self, message: Seen, witness: Witness | None = None, together: bool = False) -> int:
        """A handler begins; return how often this message was handled, this time included.

        ``together``: in one batch with the message before.
        """
        self.handled += 1
        number, receipt = int(message.message_id), message.receipt
        entry = self._entries.get(number)
        delivery = (message.sequence_number or 0, message.delivery_count)
        if entry is not None and entry.open == receipt and entry.end is not None:
            self.repeated[HELD] += 1
            entry.end = None
            return entry.attempts
        if entry is None or entry.is_dead or entry.is_gone or delivery <= entry.latest:
            self._overtaken[receipt] = _Overtaken(number, None, witness, is_stale=True)
            return 1 if entry is None else entry.attempts + 1
        if entry.open is not None and entry.witness is not None and entry.witness.was_killed:
            self._resolve(entry, entry.open, KILLED)
        if entry.open is not None:
            self._overtaken[entry.open] = _Overtaken(number, entry.end, entry.witness)
        elif entry.why is not None:
            self._repeat(number, entry.end, entry.why)
        if message.session_id is not None:
            self._in_order(message.session_id, number, entry, message, together)
        entry.latest = delivery
        entry.attempts += 1
        entry.open = receipt
        entry.redriven_before = entry.redriven
        entry.end = entry.why = None
        entry.witness = witness
        if entry.line is not None:
            entry.line.running[receipt] = number, witness
        return entry.attempts

    def end(self, message: Seen, how: str) -> None:
        """A handler has returned, failed or been cancelled."""
        entry = self._entries.get(int(message.message_id))
        if entry is not None and entry.open == message.receipt:
            entry.end = how
            entry.has_returned |= how == RETURNED
        overtaken = self._overtaken.get(message.receipt)
        if overtaken is not None:
            overtaken.end = how
        if message.session_id is not None:
            self._lines[message.session_id].running.pop(message.receipt, None)

    def settled(self, message: Seen, action: Action, error: QueueRuntimeError | None) -> None:
        """A consumer has settled this, or failed to."""
        number, receipt = int(message.message_id), message.receipt
        entry = self._entries.get(number)
        overtaken = self._overtaken.get(receipt)
        if error is not None:
            if message.session_id is not None:
                self._lines[message.session_id].broken = receipt.receiver_id
            self._resolve(entry, receipt, NOT_SETTLED)
        elif overtaken is not None and overtaken.is_stale:
            self.violate(f"message {number} is settled ({action.value}) by one whose lock somebody else had got before")
        elif action is Action.ABANDON:
            self._resolve(entry, receipt, None)
        elif entry is None:
            self.violate(f"message {number} is settled ({action.value}) after it was completed")
        elif action is Action.DEAD_LETTER:
            self.dead_lettered += 1
            if entry.open == receipt:
                entry.is_dead = entry.redriven == entry.redriven_before  # else it was sent back before we heard of it
            elif not entry.redriven:
                self.violate(f"message {number} is dead-lettered by one who does not hold it")
            self._resolve(entry, receipt, FAILED)
        elif receipt in self._overtaken:
            self.violate(f"message {number} is completed by one whose lock somebody else had got")
        elif entry.open != receipt or entry.end != RETURNED:
            self.violate(f"message {number} is completed, though its handler has not returned (it has {entry.end})")
        else:
            del self._entries[number]
            self.completed += 1

    def answer_lost(self, number: int, receipt: Any, action: Action) -> None:
        """The service settled this, and its consumer only hears of an error."""
        entry = self._entries.get(number)
        if entry is None or entry.open != receipt:
            if action is Action.COMPLETE:
                self.violate(f"message {number} is completed by one who does not hold it")
        elif action is Action.COMPLETE:
            entry.is_gone = True
        elif action is Action.DEAD_LETTER:
            entry.is_dead = entry.redriven == entry.redriven_before

    def applied_late(self, number: int, action: Action) -> None:
        """The service settled this after its consumer had given that up."""
        entry = self._entries.get(number)
        if action is Action.COMPLETE and entry is not None:
            if entry.end != RETURNED or entry.why != NOT_SETTLED:
                self.violate(f"message {number} is completed late by one who does not hold it")
            entry.is_gone = True

    def lost(self, number: int, receipt: Any) -> None:
        """The consumer that handles this message was told that it lost the lock."""
        entry = self._entries.get(number)
        if entry is not None and entry.open == receipt:
            if entry.end is not None:
                return  # its settlement is under way, and will be told
            if entry.line is not None:
                entry.line.running.pop(receipt, None)  # it may run on, but holds up nobody
        self._resolve(entry, receipt, LOCK_LOST)

    def reckon(self, left: Iterable[Seen], dead: Iterable[Seen]) -> None:
        """All is at rest: ``left`` is what the queue still holds, ``dead`` the dead letters."""
        found: Counter[int] = Counter(int(message.message_id) for messages in (left, dead) for message in messages)
        for number, count in found.items():
            if number not in self._entries:
                self.violate(f"message {number} is still there, though it was completed")
            elif count > 1:
                self.violate(f"message {number} is there {count} times")
        for number, entry in self._entries.items():
            was_killed = entry.witness is not None and entry.witness.was_killed
            if entry.open is not None and not was_killed:
                self.violate(f"message {number}: nobody heard how its last handling was settled ({entry.end})")
            if entry.is_gone and number in found:
                self.violate(f"message {number} is still there, though it was completed")
            if number not in found:
                if entry.is_gone or (was_killed and entry.end == RETURNED):
                    self.answers_lost += 1
                else:
                    self.violate(f"message {number} is lost, after {entry.attempts} handlings ({entry.why})")
        for overtaken in self._overtaken.values():
            if overtaken.witness is None or not overtaken.witness.was_killed:
                self.violate(f"message {overtaken.number}: nobody heard how an overtaken handling was settled")

    def violate(self, what: str) -> None:
        self.violation_count += 1
        if len(self.violations) < MOST_TOLD:
            self.violations.append(what)

    def _resolve(self, entry: _Entry | None, receipt: Any, why: str | None) -> None:
        """The right to settle this handling is used or gone; with no ``why``, by how the handler ended."""
        overtaken = self._overtaken.pop(receipt, None)
        if entry is not None and entry.open == receipt:
            entry.open = None
            entry.why = why or entry.end or FAILED
        elif overtaken is not None:
            self._repeat(overtaken.number, overtaken.end, why or overtaken.end or FAILED)

    def _repeat(self, number: int, end: str | None, why: str) -> None:
        self.repeated[why] += 1
        if end == RETURNED:
            self.twice[why] += 1
            if why not in (LOCK_LOST, NOT_SETTLED, KILLED):
                self.violate(f"message {number} is handled again, though its handler had returned ({why})")

    def _in_order(self, session_id: str, number: int, entry: _Entry, message: Seen, together: bool) -> None:
        line = entry.line = self._lines[session_id]
        receiver_id, sequence = message.receipt.receiver_id, message.sequence_number
        if not entry.attempts:
            if entry.place != line.expected:
                self.violate(
                    f"session {session_id}: message {number} (place {entry.place}) is first handled when place "
                    f"{line.expected} is next"
                )
            line.expected = max(line.expected, entry.place + 1)
        elif entry.place < line.front and not entry.redriven and not entry.has_returned:
            # (When a handler has returned, the next one may begin before it is known whether that could be settled.)
            self.violate(f"session {session_id}: message {number} comes back after its followers were handled")
        if line.holder == receiver_id:
            if line.broken == receiver_id:
                self.violate(f"session {session_id}: message {number} begins, though one before it was not settled")
            if line.running and not together:
                self.violate(f"session {session_id}: message {number} begins beside another one of the same holder")
            if sequence is not None and sequence < line.last:
                self.violate(f"session {session_id}: message {number} steps back behind {line.last} in one holding")
        else:
            for other, (busy, witness) in line.running.items():
                if witness is None or not witness.was_killed:
                    self._overtaken.setdefault(other, _Overtaken(busy, None, witness))
            line.running.clear()
        line.holder = receiver_id
        if not together:  # a batch that fails comes back from its first message on
            line.last = -1 if sequence is None else sequence
            line.front = max(line.front, entry.place)


class Witness(ConsumerObserver):
    """What one consumer tells the ledger. Give it to the consumer as its observer.

    Thread-safety: as the ledger.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.completed = 0
        self.was_killed = False
        """Set it when the consumer is gone and will tell nothing more."""
        self._numbers: dict[Any, int] = {}
        """What its handlers have begun and it has not settled."""
        self._applied: dict[Any, Action] = {}
        self._given_up: dict[Any, int] = {}
        """Those whose settlement was told to have failed; it may be applied all the same, later."""

    def begin(self, message: Seen, together: bool = False) -> int:
        self._numbers[message.receipt] = int(message.message_id)
        return self.ledger.begin(message, self, together)

    def end(self, message: Seen, how: str) -> None:
        self.ledger.end(message, how)

    def message_settled(self, message: Any, disposition: Disposition, error: QueueRuntimeError | None) -> None:
        self._numbers.pop(message.receipt, None)
        applied = self._applied.pop(message.receipt, None)
        if error is not None and applied is not None:
            self.ledger.answer_lost(int(message.message_id), message.receipt, applied)
        elif error is not None:
            self._given_up[message.receipt] = int(message.message_id)
        self.completed += error is None and disposition.action is Action.COMPLETE
        self.ledger.settled(message, disposition.action, error)

    def applied(self, receipts: Iterable[Any], action: Action) -> None:
        """Whoever stands between the consumer and the service knows: these are settled, whatever the consumer hears."""
        for receipt in receipts:
            number = self._given_up.pop(receipt, None)
            if number is None:
                self._applied[receipt] = action
            else:
                self.ledger.applied_late(number, action)

    def locks_lost(self, receiver_id: int, receipts: Sequence[Any], error: QueueRuntimeError | None) -> None:
        """For ``QueueClient.on_locks_lost``."""
        for receipt in receipts:
            number = self._numbers.pop(receipt, None)
            if number is not None:
                self.ledger.lost(number, receipt)
