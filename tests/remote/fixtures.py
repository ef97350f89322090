"""pytest's fixtures: one broker for all tests that only use it, and brokers of their own for tests that kill them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from remote.running import RunningBroker


@pytest.fixture(scope="session")
def broker() -> Iterator[RunningBroker]:
    """The broker of the whole run. Take a space of your own in it: ``broker.config()`` gives one."""
    with RunningBroker() as running:
        yield running


@pytest.fixture
def own_broker() -> Iterator[Callable[..., RunningBroker]]:
    """Makes brokers that a test may treat as it likes."""
    with ExitStack() as stack:

        def start(**options: object) -> RunningBroker:
            return stack.enter_context(RunningBroker(**options))  # type: ignore[arg-type]

        yield start
