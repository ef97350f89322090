"""The remote provider itself: what the contract does not ask of every provider."""

import asyncio
import subprocess
import sys
import time

import pytest

from queue_runtime.client import QueueClient
from queue_runtime.config import config_from_url
from queue_runtime.errors import ConfigurationError, ConnectionFailedError
from queue_runtime.message import Message
from remote.config import RemoteConfig
from remote.running import RunningBroker


async def test_two_clients_share_a_space(broker: RunningBroker) -> None:
    config = broker.config()
    async with QueueClient(config) as one, QueueClient(config) as two, QueueClient(broker.config()) as stranger:
        await one.send_message("q", Message(body=b"x"))
        assert await stranger.receive_message("q", 0) is None
        received = await two.receive_message("q", 0)
        assert received is not None
        await two.complete_message(received)


def test_the_command_reaches_it(broker: RunningBroker) -> None:
    """By its entry point, in a process of its own."""
    url = broker.url()
    for arguments, shown in ((("send", "q", "hello"), ""), (("peek", "q"), "hello")):
        command = [sys.executable, "-m", "queue_runtime", *arguments, "--provider", url]
        done = subprocess.run(command, env=broker.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout


def test_it_starts_and_ends_fast() -> None:
    started = time.monotonic()
    with RunningBroker() as running:
        assert running.ask("ping") == running.pid
    assert time.monotonic() - started < 5.0


def test_its_url(broker: RunningBroker) -> None:
    assert config_from_url(
        "remote:///a/b?space=x&lock_duration=2&auto_create=false&without=peek,defer"
    ) == RemoteConfig(path="/a/b", space="x", lock_duration=2.0, auto_create=False, without=("peek", "defer"))
    for url in ("remote://", "remote://host/path", "remote:///p?receivers=drop", "remote:///p?without=all"):
        with pytest.raises(ConfigurationError):
            config_from_url(url)


async def test_nobody_is_there() -> None:
    """[C31, C37]"""
    async with QueueClient(RemoteConfig(path="/nonexistent/socket", retry_after=0.001)) as client:
        with pytest.raises(ConnectionFailedError) as caught:
            await client.receive_message("q", 0)
        assert caught.value.is_transient
        assert isinstance(caught.value.__cause__, OSError)


async def test_settlements_travel_in_batches(broker: RunningBroker) -> None:
    """[C42]"""
    config = broker.config()
    async with QueueClient(config) as client:
        await client.send_messages("q", [Message(body=b"x") for _ in range(500)])
        received = await client.receive_messages("q", 500, 1)
        await asyncio.gather(*map(client.complete_message, received))
        statistics = await broker.in_thread("ask", "statistics", space=config.space)
        calls, messages = statistics["settle"]
        assert messages == len(received) == 500
        assert calls == 5
