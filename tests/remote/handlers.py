"""For consumers in processes of their own: what they handle goes to one file, a line each, in order."""

import asyncio
import os

from queue_runtime.message import ReceivedMessage

_file = os.open(os.environ.get("HANDLED", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)


async def log_it(message: ReceivedMessage) -> None:
    os.write(_file, f"{message.session_id} {message.body.decode()} {os.getpid()}\n".encode())
    await asyncio.sleep(0.001)
