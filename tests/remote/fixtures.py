"""pytest's fixtures: one broker for all tests that only use it, and brokers of their own for tests that kill them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from remote.running import RunningBroker


@pytest.fixture(scope="session")
def _broker_of_the_run() -> Iterator[RunningBroker]:
    with RunningBroker() as running:
        yield running


@pytest.fixture
def broker(_broker_of_the_run: RunningBroker) -> RunningBroker:
    """The broker of the whole run, without faults. Take a space of your own: ``broker.config()`` names one."""
    _broker_of_the_run.ask("reset")
    return _broker_of_the_run


@pytest.fixture
def own_broker() -> Iterator[Callable[..., RunningBroker]]:
    """Starts brokers that the test may treat as it likes; in a fixture, as it blocks."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(RunningBroker(**options))


@pytest.fixture
def mortal_broker(own_broker: Callable[..., RunningBroker]) -> RunningBroker:
    """A broker to be killed, which keeps nothing."""
    return own_broker()


@pytest.fixture
def durable_broker(own_broker: Callable[..., RunningBroker]) -> RunningBroker:
    """A broker to be killed, which loses nothing by it."""
    return own_broker(persistent=True)
