"""Frames on a stream: a length and a pickle. Both ends trust each other: they are of one test."""

import asyncio
import pickle
import struct
from typing import Any

_LENGTH = struct.Struct("<I")


class Frames(asyncio.Protocol):
    """One end of a connection. A subclass gets each frame, and is told once when the connection is gone."""

    transport: asyncio.Transport | None = None

    def __init__(self) -> None:
        self._rest = b""
        self._out: list[bytes] = []

    def frame_received(self, frame: Any) -> None:
        raise NotImplementedError

    def gone(self, error: Exception | None) -> None:
        raise NotImplementedError

    def post(self, frame: Any) -> None:
        """Send, together with whatever else is sent in this turn of the event loop."""
        data = pickle.dumps(frame, pickle.HIGHEST_PROTOCOL)
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out += (_LENGTH.pack(len(data)), data)

    def post_torn(self, frame: Any) -> None:
        """Send half of it and drop the connection."""
        data = pickle.dumps(frame, pickle.HIGHEST_PROTOCOL)
        if self.transport is not None:
            self._flush()
            self.transport.write(_LENGTH.pack(len(data)) + data[: len(data) // 2])
            self.transport.close()

    def _flush(self) -> None:
        if self._out and self.transport is not None:
            self.transport.write(b"".join(self._out))
        self._out.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a stream's: it can write

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        view = memoryview(data)
        at, end = 0, len(data)
        while end - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, at)
            if end - at - _LENGTH.size < length:
                break
            at += _LENGTH.size + length
            self.frame_received(pickle.loads(view[at - length : at]))
        self._rest = data[at:]

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._out.clear()
        self.gone(error)
