"""What a run's processes say to one another: objects in JSON, each after its length, over pipes."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping
from io import FileIO
from typing import Any

_LENGTH = struct.Struct(">I")
LARGEST = 64 * 1024 * 1024
"""Bytes of a frame; a longer one is no frame of ours."""


def pack(frame: Mapping[str, Any]) -> bytes:
    data = json.dumps(frame, separators=(",", ":")).encode()
    return _LENGTH.pack(len(data)) + data


def read(file: FileIO) -> dict[str, Any] | None:
    """Return the next frame, or None when the other end is gone, in the middle of one too."""
    head = _read_exactly(file, _LENGTH.size)
    data = None if head is None else _read_exactly(file, _size(head))
    return None if data is None else _object(data)


async def receive(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The same from a stream."""
    try:
        return _object(await reader.readexactly(_size(await reader.readexactly(_LENGTH.size))))
    except asyncio.IncompleteReadError:
        return None


def _read_exactly(file: FileIO, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            return None
        data += more
    return data


def _size(head: bytes) -> int:
    size: int = _LENGTH.unpack(head)[0]
    if size > LARGEST:
        raise ValueError(f"a frame of {size} bytes is longer than {LARGEST}")
    return size


def _object(data: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(data)
    return value
