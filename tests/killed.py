"""``python -m killed URL EVENTS SEED``: a consumer to be killed, which notes what it does, for tests/test_chaos.py."""

import asyncio
import logging
import os
import sys
import time
from typing import Any

from bench.ledger import Ledger, Witness
from bench.traffic import QUEUE, Handlers, Mix, Pace, Traffic
from queue_runtime import Consumer, ConsumerConfig, Disposition, QueueClient, QueueRuntimeError

MIX = Mix(hanging=0.0, stubborn=0.0, blocking=0.5, rejecting=0.0)


class Notes(Witness):
    """Writes each event into a file at once: what is written outlives a kill."""

    def __init__(self, path: str) -> None:
        super().__init__(Ledger())
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, what: str, message: Any, how: str = "-") -> None:
        receipt = message.receipt
        line = (
            f"{time.monotonic_ns()} {what} {message.message_id} {message.session_id or '-'} {message.sequence_number} "
            f"{message.delivery_count} {receipt.receiver_id} {_word(receipt.token)} {how}\n"
        )
        os.write(self._file, line.encode())

    def begin(self, message: Any, together: bool = False) -> int:
        self.note("begin", message)
        return int(message.delivery_count)

    def end(self, message: Any, how: str) -> None:
        self.note("end", message, how)

    def message_settled(self, message: Any, disposition: Disposition, error: QueueRuntimeError | None) -> None:
        self.note("settled" if error is None else "unsettled", message, disposition.action.value)

    def locks_lost(self, receiver_id: int, receipts: Any, error: QueueRuntimeError | None) -> None:
        for receipt in receipts:
            os.write(
                self._file, f"{time.monotonic_ns()} lost - - 0 0 {receiver_id} {_word(receipt.token)} -\n".encode()
            )


def _word(token: object) -> str:
    return str(token).replace(" ", "")


async def main(url: str, path: str, seed: int) -> None:
    notes = Notes(path)
    async with QueueClient(url) as client:
        client.on_locks_lost(notes.locks_lost)
        handlers = Handlers(Traffic(seed, sessions=1, mix=MIX), notes, pace=Pace(slow=0.02, block=0.02))
        config = ConsumerConfig(max_concurrency=16, prefetch=100, max_sessions=20, session_turn=20)
        await Consumer(client, QUEUE, handlers.handle, config, observer=notes).run(handle_signals=True)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
