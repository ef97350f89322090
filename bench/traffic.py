"""Messages and handlers of every kind, the same for one seed: for the soak in bench/ and the chaos tests in tests/.

What the handling of a message comes to is drawn from the seed, the message's number and the attempt, not from a
stream of random numbers: however the runtime interleaves them, message 17 fails at its second attempt, or it never
does. After some attempts every message is handled well, so that everything comes to an end.
"""

from __future__ import annotations

import asyncio
import enum
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields

from bench.ledger import CANCELLED, FAILED, RETURNED, Witness
from queue_runtime import Message, ReceivedMessage, RejectMessage, RetryMessage

QUEUE = "traffic"
DRAWS = 65_521
"""Fates drawn beforehand: a prime, so that no step of numbers hits few of them."""


class Fate(enum.Enum):
    """What a handler does with a message."""

    GOOD = "returns at once"
    BUSY = "gives way to others a few times, then returns"
    SLOW = "waits for something, then returns"
    FAILING = "raises"
    RETRYING = "raises RetryMessage, with or without a delay"
    REJECTING = "raises RejectMessage"
    BREAKING = "awaits something that is cancelled"
    HANGING = "waits until it is cancelled"
    STUBBORN = "waits until it is cancelled, and then goes on for a while and returns"
    BLOCKING = "blocks the event loop for a while"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How many of a thousand attempts have which fate; the rest is good."""

    busy: float = 100.0
    slow: float = 50.0
    failing: float = 20.0
    retrying: float = 10.0
    rejecting: float = 5.0
    breaking: float = 1.0
    hanging: float = 0.2
    stubborn: float = 0.2
    blocking: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long things take, in seconds: the longest of each, drawn evenly."""

    slow: float = 0.05
    retry_delay: float = 0.5
    block: float = 0.05
    stubborn: float = 0.05


class Traffic:
    """An endless stream of messages, and what becomes of each.

    Parameters
    ----------
    seed:
        Equal seeds give equal traffic.
    sessions:
        How many sessions the messages are spread over, at random; a few of them get much more than the others.
    plain:
        The share of messages without a session.
    sizes:
        The sizes of the bodies in bytes, each as frequent as it is listed.
    good_from:
        From this attempt on every message is handled well.

    Thread-safety: ``fate`` for any thread, the rest for one at a time.
    """

    def __init__(
        self,
        seed: int,
        *,
        sessions: int,
        plain: float = 0.2,
        sizes: Sequence[int] = (16, 100, 100, 1000, 1000, 10_000),
        mix: Mix | None = None,
        good_from: int = 6,
    ) -> None:
        chance = random.Random(seed)
        mix = mix or Mix()
        self.seed = seed
        self.made = 0
        self._chance = chance
        self._sessions = [f"s{number}" for number in range(sessions)]
        self._hot = self._sessions[: max(1, sessions // 500)]
        self._plain = plain
        self._bodies = [chance.randbytes(size) for size in sizes]
        self._good_from = good_from
        weights = {Fate[field.name.upper()]: getattr(mix, field.name) for field in fields(mix)}
        weights[Fate.GOOD] = 1000.0 - sum(weights.values())
        self._fates = chance.choices(list(weights), list(weights.values()), k=DRAWS)
        self._portions = [chance.random() for _ in range(DRAWS)]

    def messages(self, count: int) -> list[Message]:
        """Make the next so many."""
        chance, sessions, bodies = self._chance.random, self._sessions, self._bodies
        made = []
        for number in range(self.made, self.made + count):
            session_id = None
            if chance() >= self._plain:
                pool = self._hot if chance() < 0.02 else sessions
                session_id = pool[int(chance() * len(pool))]
            body = bodies[int(chance() * len(bodies))]
            made.append(Message(body=body, message_id=str(number), session_id=session_id))
        self.made += count
        return made

    def fate(self, number: int, attempt: int) -> Fate:
        """What this attempt comes to."""
        if attempt >= self._good_from:
            return Fate.GOOD
        return self._fates[(number * 7919 + attempt * 104_729) % DRAWS]

    def portion(self, number: int, attempt: int) -> float:
        """From 0 to 1: how much of the longest time it takes."""
        return self._portions[(number * 6007 + attempt * 15_485_863) % DRAWS]


class Handlers:
    """The handlers of one consumer, which do what the traffic says and tell the witness.

    Parameters
    ----------
    sleep, block:
        Wait so many seconds, and hold up the event loop for so many.

    Thread-safety: for the event loop's thread.
    """

    def __init__(
        self,
        traffic: Traffic,
        witness: Witness,
        *,
        pace: Pace | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        block: Callable[[float], object] = time.sleep,
    ) -> None:
        self._traffic = traffic
        self._witness = witness
        self._pace = pace or Pace()
        self._sleep = sleep
        self._block = block

    async def handle(self, message: ReceivedMessage) -> None:
        """Handle one message."""
        number = int(message.message_id)
        attempt = self._witness.begin(message)
        fate = self._traffic.fate(number, attempt)
        if fate is Fate.GOOD:
            self._witness.end(message, RETURNED)
            return
        end = FAILED
        try:
            await self._do(fate, self._traffic.portion(number, attempt))
            end = RETURNED
        except asyncio.CancelledError:
            if fate is not Fate.BREAKING:
                end = CANCELLED
            raise
        finally:
            self._witness.end(message, end)

    async def _do(self, fate: Fate, portion: float) -> None:
        pace = self._pace
        match fate:
            case Fate.BUSY:
                for _ in range(1 + int(portion * 4)):
                    await asyncio.sleep(0)
            case Fate.SLOW:
                await self._sleep(portion * pace.slow)
            case Fate.FAILING:
                raise ValueError("as it happens")
            case Fate.RETRYING:
                raise RetryMessage(max(0.0, portion * 2 - 1) * pace.retry_delay)
            case Fate.REJECTING:
                raise RejectMessage("Unwanted", "this one is not for us")
            case Fate.BREAKING:
                broken = asyncio.get_running_loop().create_future()
                broken.cancel()
                await broken
            case Fate.HANGING:
                await asyncio.get_running_loop().create_future()
            case Fate.STUBBORN:
                try:
                    await asyncio.get_running_loop().create_future()
                except asyncio.CancelledError:
                    await self._sleep(portion * pace.stubborn)
            case Fate.BLOCKING:
                self._block(portion * pace.block)
