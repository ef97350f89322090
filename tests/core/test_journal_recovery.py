"""Recovery from whatever the files hold: no crash, nothing taken that is wrong, and all that comes before it [C47]."""

from __future__ import annotations

import os
import random
import struct
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings, strategies as st
from journaled import Journaled

from queue_runtime._core.engine import ABANDON, COMPLETE, DEAD_LETTER, DEFER, Engine
from queue_runtime._core.journal import Journal
from queue_runtime._core.message import Message
from queue_runtime._core.recovery import Recovery, checksum, has_record

WALL = 1_700_000_000.0
COMMON: dict[str, Any] = {
    "lock_duration": 30.0,
    "session_lock_duration": 30.0,
    "max_delivery_count": 3,
    "dead_letter_on_expiration": True,
    "deduplication_window": 60.0,
    "capacity": 1000,
}


@cache
def log() -> bytes:
    """A log with every kind of record that logs have."""
    with TemporaryDirectory() as name:
        kept = Journaled(Path(name), COMMON, 0.0, WALL)
        kept.journal.segment_size = 1 << 30
        engine, lot = kept.engine, random.Random(1)
        plain, dead = engine.open_link(), engine.open_link(True)
        held = engine.accept("a", 0.0, WALL)
        assert held is not None
        for step in range(60):
            now, wall = step / 4, WALL + step / 4
            messages = [
                Message(
                    body=bytes(lot.randrange(40)),
                    message_id=f"{step}.{i}",
                    session_id=lot.choice([None, "a"]),
                    time_to_live=lot.choice([None, 2.0]),
                    deduplication_id=lot.choice([None, "x", str(step)]),
                    delay=lot.choice([None, 1.0]),
                )
                for i in range(lot.randrange(4))
            ]
            engine.send(messages, 0, now, wall)
            engine.set_state(held, lot.choice([None, b"state"]), now, wall)
            for link in (plain, dead, held):
                for message in engine.receive(link, 2, now, wall):
                    action = lot.choice([COMPLETE, COMPLETE, ABANDON, DEAD_LETTER, DEFER])
                    delay = lot.choice([0.0, 1.0])
                    engine.settle(link, action, [message.receipt], now, wall, delay, lot.choice([None, "why"]), "how")
        kept.journal.flush()
        kept.crash()
        return (Path(name) / "1").read_bytes()


@cache
def starts() -> list[int]:
    """Where the records begin, and the end of the last."""
    found, at = [0], 0
    while at < len(log()):
        at += 8 + int.from_bytes(log()[at : at + 4], "little")
        found.append(at)
    return found


def make(name: str) -> Engine:
    return Engine(name, max_message_size=1000, **COMMON)


def read(content: bytes) -> tuple[int, Any]:
    """Where recovery ends, and all that can be seen then."""
    recovery = Recovery(make, 100.0, WALL + 8.0)
    end = recovery.feed(content, 1, 0)
    journal = Journal(-1, 2, 0, next_file=lambda: (-1, 2, 0), segment_size=1 << 30, total_bytes=0)
    for number, engine in recovery.queues.items():
        engine.attach(journal, number)
    recovery.finish()
    return end, [
        [
            [(m.message_id, m.sequence_number, m.delivery_count, m.dead_letter_reason, m.enqueued_at) for m in peeked]
            for peeked in (engine.peek(1000, 0, dead, 100.0, WALL + 8.0) for dead in (False, True))
        ]
        + [engine.counts(100.0, WALL + 8.0)]
        for engine in recovery.queues.values()
    ]


def test_the_log_has_every_kind_of_record() -> None:
    """Or else the tests below say little."""
    kinds = {log()[at + 8] for at in starts()[:-1]}
    assert kinds == {1, 2, 3, 4, 5, 6, 7, 8}
    end, ((messages, letters, _),) = read(log())
    assert end == len(log())
    assert len(messages) > 10
    assert len(letters) > 5


@given(st.data())
@settings(max_examples=150)
def test_a_torn_end(data: st.DataObject) -> None:
    """What comes before the tear is there, and nothing of what comes after it."""
    cut = data.draw(st.integers(0, len(log())))
    tail = data.draw(st.sampled_from([b"", bytes(50), b"\xff" * 50, log()[:50], log()[cut + 1 :]]))
    content = log()[:cut] + tail
    same = min(len(content), len(log()))
    same = next((i for i in range(same) if content[i] != log()[i]), same)
    whole = max(start for start in starts() if start <= same)
    end, seen = read(content)
    assert end == whole
    assert seen == read(log()[:whole])[1]


@given(st.integers(0, 10**9), st.integers(0, 7))
@settings(max_examples=300)
def test_a_flipped_bit(place: int, bit: int) -> None:
    """It is found, whatever bit it is; and what follows shows that it is no torn end."""
    content = bytearray(log())
    place %= len(content)
    content[place] ^= 1 << bit
    broken = max(start for start in starts() if start <= place)
    end, seen = read(bytes(content))
    assert end == broken
    assert seen == read(log()[:broken])[1]
    followed = broken != starts()[-2]
    assert has_record(bytes(content), 1, broken + 1) == followed


def test_a_record_in_another_place_is_none() -> None:
    """As when a disk gives back a block that is not the one that was asked for."""
    first, second = starts()[1:3]
    assert read(log()[:first] + log()[second:])[0] == first
    assert Recovery(make, 0.0, WALL).feed(log(), 2, 0) == 0


PAYLOADS = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda kind, rest: bytes([kind, 1, 0, 0, 0]) + rest, st.integers(0, 12), st.binary(max_size=80)),
)


@given(st.lists(st.one_of(PAYLOADS, st.integers(0, 10**9)), max_size=8))
@settings(max_examples=300)
def test_records_that_nobody_wrote(payloads: list[bytes | int]) -> None:
    """With right checksums; a number stands for a record that somebody wrote. They are taken or end it."""
    content = log()[: starts()[3]]
    for payload in payloads:
        if isinstance(payload, int):
            which = payload % (len(starts()) - 1)
            payload = log()[starts()[which] + 8 : starts()[which + 1]]
        place = struct.pack("<qq", 1, len(content))
        content += struct.pack("<II", len(payload), checksum(place + payload)) + payload
    end, seen = read(content)
    assert starts()[3] <= end <= len(content)
    assert read(content[:end])[1] == seen


def reopened(directory: Path, back: float, **changed: Any) -> Journaled:
    """Reopened when the wall clock says so many seconds less than when it began."""
    return Journaled(directory, {**COMMON, **changed}, 0.0, WALL - back)


def test_a_clock_that_goes_back_withholds_nothing(tmp_path: Path) -> None:
    """What was ready is ready, and a delay is never longer than it was asked for [C24]."""
    kept = Journaled(tmp_path, COMMON, 0.0, WALL)
    delayed = Message(body=b"", message_id="delayed", delay=5.0, time_to_live=10.0)
    kept.engine.send([Message(body=b"", message_id="ready", time_to_live=10.0), delayed], 0, 0.0, WALL)
    kept.crash()
    kept = reopened(tmp_path, 3600.0)
    engine, link = kept.engine, kept.engine.open_link()
    assert [m.message_id for m in engine.receive(link, 9, 0.0, WALL - 3600.0)] == ["ready"]
    assert [m.message_id for m in engine.receive(link, 9, 5.0, WALL - 3595.0)] == ["delayed"]
    kept.crash()
    kept = reopened(tmp_path, 3600.0)
    engine, link = kept.engine, kept.engine.open_link()
    assert [m.message_id for m in engine.receive(link, 9, 0.0, WALL - 3600.0)] == ["ready", "delayed"]
    kept.engine.tick(10.1, WALL - 3589.9)
    kept.engine.close_link(link, 10.1, WALL - 3589.9)
    assert kept.engine.counts(10.1, WALL - 3589.9)[4] == 2, "times to live end too"
    kept.crash()


def test_a_clock_that_went_back_forgets_no_id_early(tmp_path: Path) -> None:
    """The one of before it went back stands first, and ends last; neither is remembered longer than its window."""
    kept = Journaled(tmp_path, COMMON, 0.0, WALL)
    for now, wall, name in ((0.0, WALL, "a"), (1.0, WALL - 20.0, "b")):
        kept.engine.send([Message(body=b"", deduplication_id=name)], 0, now, wall)
    kept.crash()
    kept = reopened(tmp_path, 10.0)  # of a, 70 s would be left, and of b 50
    again = [Message(body=b"", deduplication_id=name) for name in "ab"]
    for now, count in ((51.0, 2), (59.0, 2), (61.0, 4)):
        kept.engine.send(again, 0, now, WALL - 10.0 + now)
        assert sum(kept.engine.counts(now, WALL - 10.0 + now)) == count
    kept.crash()


def test_looking_for_a_record_ends() -> None:
    """What was torn off may be large, and look like the beginning of a large record at each of its bytes."""
    size = 12 << 20
    torn = struct.pack("<I", size // 2) * (size // 4)
    assert has_record(torn, 1, 0), "what was not looked at might be one"
    assert not has_record(torn[: 1 << 12], 1, 0)


def test_a_full_disk_and_much_that_dies(tmp_path: Path) -> None:
    """What waits for the disk is not tried anew for each message that outlives its time."""
    common = {**COMMON, "capacity": 200_000}
    kept = Journaled(tmp_path, common, 0.0, WALL)
    kept.journal.segment_size = 1 << 30
    kept.engine.send([Message(body=b"", time_to_live=1.0)] * 60_000, 0, 0.0, WALL)
    read_only = os.open(tmp_path / "1", os.O_RDONLY)
    os.dup2(read_only, kept.files[0])
    os.close(read_only)
    began = time.process_time()
    kept.engine.tick(2.0, WALL + 2.0)
    assert time.process_time() - began < 1.0
    assert kept.engine.counts(2.0, WALL + 2.0)[4] == 60_000
    assert kept.journal.size > 5_000_000
    kept.crash()
