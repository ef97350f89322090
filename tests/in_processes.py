"""Handlers for other processes: these import them by name."""

import os
import signal
import time

from queue_runtime import ReceivedMessage, RejectMessage, RetryMessage


def square(message: ReceivedMessage) -> None:
    number = int(message.body)
    if message.attributes.get("do") == "reject":
        raise RejectMessage("Odd", f"{number} of process {os.getpid()}")
    if message.attributes.get("do") == "put off" and message.delivery_count == 1:
        raise RetryMessage(delay=0)
    if message.attributes.get("do") == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if message.attributes.get("do") == "fail":
        raise ValueError(f"no square of {number}")
    if message.attributes.get("do") == "hang":
        time.sleep(600)
    path = message.attributes.get("path")
    if path is not None:
        with open(path, "a") as file:
            file.write(f"{os.getpid()} {number * number}\n")
