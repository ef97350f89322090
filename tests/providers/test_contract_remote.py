"""The contract over sockets: a broker in another process, whose time and the client's are turned together.

Then again on the real clock where time matters, and with a provider that lacks what can be lacking.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from contract import SendContract
from contract_sessions import SessionLockContract
from contract_settlement import LockContract, SettleContract
from contract_whole import WholeContract
from harness import Harness, Place, QueueSettings
from remote.config import REMOVABLE, RemoteConfig
from remote.provider import RemoteProvider
from remote.running import RunningBroker

from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, SystemClock, settle_tasks
from queue_runtime.errors import CapabilityError
from queue_runtime.providers.base import Capabilities
from queue_runtime.sessions import SessionKey

NAMES = itertools.count()
STEPS_OF_A_LOCK = 12
"""The two clocks pass a lock's duration in so many steps: the client's first and, all being answered, the broker's."""


class RemoteHarness(Harness):
    capabilities = Capabilities(
        sessions=True,
        session_state=True,
        peek=True,
        defer=True,
        deduplication=True,
        abandon_delay=True,
        sequence_numbers=True,
        dead_letter_on_expiration=True,
        max_message_size=1_048_576,
        max_delay=None,
        shared_between_processes=True,
    )
    lock_duration = 30.0
    unit = 5.0
    patience = 0.0

    def __init__(self, broker: RunningBroker) -> None:
        self.broker = broker
        self.clock: ManualClock | SystemClock = ManualClock()
        self.clients: dict[QueueClient, RemoteConfig] = {}

    async def open(
        self,
        settings: QueueSettings | None = None,
        *,
        max_lock_renewal: float = 0.0,
        session_key: SessionKey | None = None,
    ) -> Place:
        settings = settings or QueueSettings()
        if settings.dead_letter_on_expiration and not self.capabilities.dead_letter_on_expiration:
            raise CapabilityError("remote", "dead_letter_on_expiration")
        config = self.config(
            max_delivery_count=settings.max_delivery_count,
            dead_letter_on_expiration=settings.dead_letter_on_expiration,
            deduplication_window=settings.deduplication_window,
            lock_duration=settings.lock_duration or self.lock_duration,
            session_lock_duration=settings.session_lock_duration or self.lock_duration,
            max_lock_renewal=max_lock_renewal,
        )
        return Place(await self.client(config, session_key=session_key), f"orders-{next(NAMES)}")

    def config(self, **settings: Any) -> RemoteConfig:
        return self.broker.config(**{"manual_clock": True, "settle_interval": 0.001, **settings})

    async def client(self, config: RemoteConfig, **options: Any) -> QueueClient:
        """Make a client and its connection, on which ``answered`` waits."""
        client = QueueClient(config, clock=self.clock, **options)
        self.clients[client] = config
        await cast(RemoteProvider, client._provider).link()
        return client

    async def another(self, place: Place, **client: Any) -> QueueClient:
        return await self.client(self.clients[place.client], **client)

    async def absent(self) -> Place:
        return Place(await self.client(self.config(auto_create=False, queues=("there",))), "absent")

    async def pass_time(self, seconds: float) -> None:
        steps = max(1, round(seconds / self.lock_duration * STEPS_OF_A_LOCK))
        assert isinstance(self.clock, ManualClock)
        for _ in range(steps):
            await self.clock.advance(seconds / steps)
            await self.answered()
            for space, provider in {config.space: provider for provider, config in self.connected()}.items():
                await provider.control("advance", space=space, seconds=seconds / steps)
            await self.answered()

    async def moments(self, count: int) -> None:
        await asyncio.sleep(count * count * 0.0002)

    async def answered(self) -> None:
        """Wait for every answer that is on its way, and for what is asked in reply to it."""
        for _ in range(3):
            await settle_tasks()
            for provider, _ in self.connected():
                await provider.control("ping")
        await settle_tasks()

    def connected(self) -> list[tuple[RemoteProvider, RemoteConfig]]:
        """The providers that have a connection."""
        found = []
        for client, config in self.clients.items():
            provider = cast(RemoteProvider, client._provider)
            if provider.current is not None:
                found.append((provider, config))
        return found

    def now(self) -> float:
        return self.clock.time()

    async def close(self) -> None:
        for client in self.clients:
            await client.close()


class WeakHarness(RemoteHarness):
    """A service that can do little."""

    capabilities = Capabilities(
        sessions=True,
        session_state=False,
        peek=False,
        defer=False,
        deduplication=False,
        abandon_delay=False,
        sequence_numbers=False,
        dead_letter_on_expiration=False,
        max_message_size=262_144,
        max_delay=900.0,
        shared_between_processes=True,
    )

    def config(self, **settings: Any) -> RemoteConfig:
        return super().config(
            **settings,
            without=tuple(name for name in REMOVABLE if not getattr(self.capabilities, name)),
            max_delay=900.0,
            max_message_size=262_144,
        )


class RealHarness(RemoteHarness):
    """The same, in real time."""

    lock_duration = 0.3
    unit = 0.3

    def __init__(self, broker: RunningBroker) -> None:
        super().__init__(broker)
        self.clock = SystemClock()

    def config(self, **settings: Any) -> RemoteConfig:
        return self.broker.config(**{"settle_interval": 0.001, **settings})

    async def pass_time(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def now(self) -> float:
        return self.clock.time()


@pytest.fixture(params=[RemoteHarness, WeakHarness], ids=["full", "weak"])
async def harness(request: pytest.FixtureRequest, broker: RunningBroker) -> AsyncIterator[RemoteHarness]:
    harness = request.param(broker)
    yield harness
    await harness.close()


class TestContract(WholeContract):
    pass


class TestOnTheRealClock:
    """What only time itself shows: the service's locks and the client's renewal, each by its own clock."""

    @pytest.fixture
    async def harness(self, broker: RunningBroker) -> AsyncIterator[RealHarness]:
        harness = RealHarness(broker)
        yield harness
        await harness.close()

    test_renewal_in_a_buffer = LockContract.test_automatic_renewal_covers_what_waits_in_a_buffer
    test_renewal_of_a_session = SessionLockContract.test_a_held_session_is_renewed
    test_the_end_of_a_lock = SettleContract.test_a_receipt_ends_with_its_lock
    test_the_loss_of_a_session = SessionLockContract.test_a_holder_that_waits_is_told_that_it_lost_the_session
    test_waking = SessionLockContract.test_who_waits_for_a_session_is_woken
    test_due_messages = SendContract.test_a_waiting_receiver_gets_a_message_when_it_falls_due
