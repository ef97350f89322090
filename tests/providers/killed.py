"""The other side of test_durable_kill.py: forks a worker for each line on stdin, and tells when it is dead.

A worker works on the directory it was given until somebody kills it. It tells what it is about to do and what was
acknowledged, a line each, before it goes on; and first, what it found.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from itertools import count

from queue_runtime.clock import SystemClock
from queue_runtime.config import InMemoryConfig
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.providers import open_provider, store
from queue_runtime.providers.base import ABANDON, COMPLETE, DEFER, Action, Disposition, Provider, Receiver

QUEUE = "q"
SESSIONS = 4
BURY = Disposition(Action.DEAD_LETTER, reason="chosen", description="by lot")
LATER = Disposition(Action.ABANDON, delay=0.005)

# Small enough that every worker sees several files and snapshots.
store.SEGMENT_SIZE = 10_000
store.LEAST_GARBAGE = 15_000
store.PIECE = 2_000


def tell(*words: object) -> None:
    """One line, whole: it is shorter than what a pipe takes at once."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Worker:
    def __init__(self, provider: Provider, run: str, seed: int) -> None:
        self.provider = provider
        self.run = run
        self.random = random.Random(seed)

    async def look(self) -> None:
        """Tell all that is there."""
        for dead in (False, True):
            for message in await self.provider.peek(QUEUE, 100_000, dead_letter=dead):
                place = "dead" if dead else "main"
                first = message.message_id, message.sequence_number, message.delivery_count
                tell("found", place, *first, message.session_id, message.dead_letter_reason)
        tell("ready")

    async def send(self, sender: int) -> None:
        for number in count():
            session = self.random.choice([None, *(f"s{i}" for i in range(SESSIONS))])
            names = [f"{self.run}.{sender}.{number}.{i}" for i in range(self.random.choice([1, 1, 1, 5]))]
            messages = [Message(body=bytes(self.random.choice([0, 50, 3000])), message_id=name) for name in names]
            messages = [message.replace(session_id=session) for message in messages]
            outcomes = await self.provider.send(QUEUE, messages)
            for name, outcome in zip(names, outcomes, strict=True):
                assert outcome is None, outcome
                tell("sent", name, session)
            while (await self.provider.counts(QUEUE)).active > 100:
                await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def settle(self, receiver: Receiver, message: ReceivedMessage) -> None:
        how = self.random.choices([COMPLETE, ABANDON, LATER, BURY, DEFER], [20, 1, 1, 1, 1])[0]
        if how is DEFER and (message.dead_letter_reason or message.session_id):
            how = COMPLETE
        tell("try", how.action.value, message.message_id)
        (outcome,) = await receiver.settle(how, [message.receipt])
        assert outcome is None, outcome
        tell("done", how.action.value, message.message_id)

    async def work(self, receiver: Receiver) -> None:
        while True:
            for message in await receiver.receive(self.random.choice([1, 3]), 1.0):
                tell("got", message.message_id, message.delivery_count)
                await self.settle(receiver, message)
            await asyncio.sleep(0)

    async def work_in_sessions(self) -> None:
        while True:
            session = await self.provider.accept_session(QUEUE, None, 1.0)
            if session is not None:
                for message in await session.receive(5, 0.0):
                    tell("got", message.message_id, message.delivery_count)
                    await self.settle(session, message)
                await session.set_state(b"%d" % self.random.randrange(9))
                await session.close()
            await asyncio.sleep(0)

    async def everything(self) -> None:
        await self.look()
        receiver = await self.provider.open_receiver(QUEUE)
        numbers = [message.sequence_number for message in await self.provider.peek(QUEUE, 1000)]
        for message in await receiver.receive_deferred([number for number in numbers if number is not None]):
            tell("got", message.message_id, message.delivery_count)
            await self.settle(receiver, message)
        async with asyncio.TaskGroup() as group:
            for work in (self.send(1), self.send(2), self.work_in_sessions(), self.work_in_sessions()):
                group.create_task(work)
            for dead in (False, False, True):
                group.create_task(self.work(await self.provider.open_receiver(QUEUE, dead_letter=dead)))

    async def poison(self) -> None:
        """Die of the first message, without a word."""
        receiver = await self.provider.open_receiver(QUEUE)
        for message in await receiver.receive(1, 0.0):
            tell("got", message.message_id, message.delivery_count)
            os.kill(os.getpid(), signal.SIGKILL)
        await self.look()


async def work(job: str, directory: str, fsync: str, run: str) -> None:
    config = InMemoryConfig(path=directory, fsync=fsync, fsync_interval=0.002)  # type: ignore[arg-type]
    worker = Worker(open_provider(config, SystemClock()), run, int(run))
    await (worker.everything() if job == "everything" else worker.poison())


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            tell("pid", os.getpid())
            try:
                asyncio.run(work(*line.split()))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        tell("dead", -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
