"""What holds for every test: a skip is a failure, no task outlives its test, the event loop is never blocked."""

import asyncio
import inspect
import os
import sys
import types
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx
from hypothesis import HealthCheck, settings

import queue_runtime
from queue_runtime.clock import settle_tasks

pytest_plugins = ["remote.fixtures"]

settings.register_profile(
    "here",
    # A client is opened in each example; the machine of CI is slow at times, and a slow example is no failure.
    deadline=None,
    max_examples=40,
    # What CI says depends on the commit alone; the search for new examples goes on wherever else the tests run.
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("here")

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
if sys.platform != "win32":
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "both_loops: run the test on asyncio's own event loop and on uvloop's")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.get_closest_marker("both_loops") is not None:
        return LOOPS
    return {"asyncio": LOOPS["asyncio"]}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that did not run proves nothing: a skip, an xfail too, is a failure."""
    report = yield
    if report.skipped:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"a skip counts as a failure: {why}"
        if hasattr(report, "wasxfail"):
            del report.wasxfail
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole module."""
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"a skip counts as a failure: {report.longrepr}"
    return report


@pytest.fixture(autouse=True, scope="session")
def _no_blocking_calls() -> Iterator[None]:
    """A blocking call in a running event loop, from the library or a test, raises BlockingError."""
    tests = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).parent)]
    with blockbuster_ctx([queue_runtime, tests]) as blocking:
        for function in blocking.functions.values():
            # What is in a directory is read when the provider is made, or else there would be no error at once; and a
            # full file of the journal is followed by the next one in some 50 µs, like a write.
            function.can_block_in("queue_runtime/providers/store.py", {"__init__", "_next_file"})
            # A few bytes into an empty pipe; the second when an executor's semaphores are collected.
            function.can_block_in("concurrent/futures/process.py", {"wakeup"})
            function.can_block_in("multiprocessing/resource_tracker.py", {"_send", "_check_alive"})
            # The end of a loop: uvloop joins the thread there that its executor ends in.
            function.can_block_in("asyncio/runners.py", {"close"})
        yield


@pytest.fixture(autouse=True)
def _no_leaked_tasks(request: pytest.FixtureRequest) -> None:
    function = getattr(request.function, "hypothesis", None)
    function = request.function if function is None else function.inner_test
    if inspect.iscoroutinefunction(function):
        request.getfixturevalue("_tasks_of_the_test")


@pytest.fixture
async def _tasks_of_the_test() -> AsyncIterator[None]:
    """Set up first, so that it looks last: after every other fixture of the test is closed."""
    before = asyncio.all_tasks()
    yield
    await settle_tasks()
    leaked = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not leaked, f"tasks are left behind: {leaked}"
