"""RuntimeConfiguration: every field does something, and all is as before afterwards [C46]."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import uvloop

from queue_runtime import ConfigurationError, RuntimeConfiguration, ValidationError
from queue_runtime.runtime import available_cpus

WRONG: list[tuple[str, Any, str]] = [
    ("loop", "trio", "one of auto, asyncio, uvloop"),
    ("thread_pool_size", 0, "from 1 to 10000"),
    ("thread_pool_size", 1.5, "whole number"),
    ("gc_thresholds", 700, "collection of whole numbers"),
    ("gc_thresholds", "700", "collection of whole numbers"),
    ("gc_thresholds", (700, 10), "three whole numbers, not 2"),
    ("gc_thresholds", (700, -1, 10), "from 0 to"),
    ("gc_freeze", 1, "true or false"),
    ("switch_interval", 0, "from 1e-06 to 10 s"),
    ("switch_interval", float("nan"), "from 1e-06 to 10 s"),
    ("switch_interval", "5 ms", "seconds or a timedelta"),
    ("cpu_affinity", (), "at least one CPU"),
    ("cpu_affinity", 3, "collection of whole numbers"),
    ("cpu_affinity", {-1}, "from 0 to"),
    ("cpu_affinity", {True}, "whole number"),
]

Snapshot = tuple[Any, ...]


def snapshot() -> Snapshot:
    """All that a configuration changes in a process, but for its loop."""
    return gc.get_threshold(), gc.get_freeze_count(), sys.getswitchinterval(), os.sched_getaffinity(0)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = snapshot()
    yield
    assert snapshot() == before


async def busiest(threads: int) -> int:
    """How many of so many calls into the default pool run at once, when each waits for as many as there can be."""
    running, most, lock = 0, 0, threading.Lock()
    full = threading.Event()

    def call(expected: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == expected:
                full.set()
        full.wait(0.2)
        with lock:
            running -= 1

    await asyncio.gather(*(asyncio.to_thread(call, threads) for _ in range(2 * threads)))
    return most


async def seen() -> Snapshot:
    return snapshot()


# Each field.


@pytest.mark.parametrize(("loop", "module"), [("asyncio", "asyncio"), ("uvloop", "uvloop"), ("auto", "uvloop")])
def test_loop(loop: Any, module: str) -> None:
    async def main() -> str:
        return type(asyncio.get_running_loop()).__module__.partition(".")[0]

    assert RuntimeConfiguration(loop=loop).run(main) == module


@pytest.mark.parametrize("size", [1, 3])
def test_thread_pool_size(size: int) -> None:
    assert RuntimeConfiguration(thread_pool_size=size).run(lambda: busiest(size)) == size
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("queue-runtime-default")]


def test_gc_thresholds() -> None:
    async def collections() -> int:
        count = 0

        def collected(phase: str, info: dict[str, int]) -> None:
            nonlocal count
            count += phase == "stop"

        gc.callbacks.append(collected)
        kept = [[number] for number in range(20_000)]
        gc.callbacks.remove(collected)
        assert kept
        return count

    often = RuntimeConfiguration(gc_thresholds=(100, 10, 10)).run(collections)
    seldom = RuntimeConfiguration(gc_thresholds=(9000, 10, 10)).run(collections)
    assert RuntimeConfiguration(gc_thresholds=(0, 0, 0)).run(collections) == 0
    assert 150 < often < 250
    assert 1 <= seldom <= 3


def test_gc_freeze() -> None:
    there: list[Any] = [[]]

    async def main() -> tuple[bool, bool]:
        new: list[Any] = [[]]
        listed = {id(thing) for thing in gc.get_objects()}
        return id(there) in listed, id(new) in listed

    assert RuntimeConfiguration(gc_freeze=True).run(main) == (False, True)
    assert RuntimeConfiguration(gc_freeze=False).run(main) == (True, True)


def test_switch_interval() -> None:
    assert RuntimeConfiguration(switch_interval=0.25).run(seen)[2] == 0.25
    assert RuntimeConfiguration(switch_interval=timedelta(milliseconds=1)).run(seen)[2] == 0.001


def test_cpu_affinity() -> None:
    core = max(os.sched_getaffinity(0))

    async def main() -> tuple[set[int], set[int]]:
        return os.sched_getaffinity(0), await asyncio.to_thread(os.sched_getaffinity, 0)

    assert RuntimeConfiguration(cpu_affinity=[core, core]).run(main) == ({core}, {core})


def test_none_leaves_everything_as_it_is() -> None:
    before = snapshot()
    assert RuntimeConfiguration().run(seen) == before


def test_the_presets_differ_and_take_changes() -> None:
    """C46."""
    high, low = RuntimeConfiguration.for_high_throughput(), RuntimeConfiguration.for_low_resource()
    assert (high.loop, low.loop) == ("auto", "asyncio")
    assert high.thread_pool_size is not None
    assert low.thread_pool_size == 2 < high.thread_pool_size
    assert high.run(seen)[0] == (50_000, 20, 50)
    assert low.run(seen)[0] == (500, 5, 5)
    assert high.run(seen)[1] > 1000 + low.run(seen)[1]
    assert RuntimeConfiguration.for_low_resource(thread_pool_size=5).thread_pool_size == 5


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000\n", 64), ("200000 100000\n", 2), ("150000 100000\n", 2), ("1000 100000\n", 1), ("nonsense\n", 64),
     ("9900000 100000\n", 64), ("1 0\n", 64), (None, 64)],
)  # fmt: skip
def test_a_container_s_cpu_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota)
    assert available_cpus(str(file)) == expected
    monkeypatch.undo()


# What is wrong.


@pytest.mark.parametrize(("field", "value", "problem"), WRONG)
def test_a_wrong_setting_is_named(field: str, value: Any, problem: str) -> None:
    """C33."""
    with pytest.raises(ConfigurationError, match=problem) as raised:
        RuntimeConfiguration(**{field: value})
    assert raised.value.field == field


def never() -> Coroutine[Any, Any, None]:
    pytest.fail("it is called though its settings cannot be applied")


@pytest.mark.parametrize("cores", [{4095}, {0, 4095}])
def test_a_cpu_that_is_not_there_is_named(cores: set[int]) -> None:
    configuration = RuntimeConfiguration(cpu_affinity=cores, gc_freeze=True, switch_interval=1)
    with pytest.raises(ConfigurationError, match=r"4095 cannot be used here, where CPU 0") as raised:
        configuration.run(never)
    assert raised.value.field == "cpu_affinity"


def test_a_system_that_cannot_pin_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.delattr(os, "sched_setaffinity")
        with pytest.raises(ConfigurationError, match="cannot pin"):
            RuntimeConfiguration(cpu_affinity={0}).run(never)


def test_without_uvloop_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    """House rule 16; and ``auto`` does without it."""
    (tmp_path / "uvloop.py").write_text("raise ModuleNotFoundError('no uvloop', name='uvloop')")
    code = (
        "from queue_runtime import ConfigurationError, RuntimeConfiguration as R\n"
        "import asyncio\n"
        "async def main(): return type(asyncio.get_running_loop()).__module__\n"
        "print(R().run(main))\n"
        "try: R(loop='uvloop').run(main)\n"
        "except ConfigurationError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loop, sentence = done.stdout.splitlines()
    assert loop.startswith("asyncio.")
    assert sentence == "loop: uvloop is not installed: pip install 'queue-runtime[uvloop]'"


def test_main_is_a_function_of_nothing() -> None:
    with pytest.raises(ValidationError, match="a function that returns a coroutine, not coroutine") as raised:
        RuntimeConfiguration().run(seen())  # type: ignore[arg-type]
    assert raised.value.field == "main"


async def test_run_inside_a_loop_names_the_other_way() -> None:
    with pytest.raises(RuntimeError, match=r"apply\(\)"):
        RuntimeConfiguration().run(never)


# The end.


def test_all_is_restored_after_an_error() -> None:
    """The fixture compares."""

    async def main() -> None:
        raise KeyError("its own")

    cores = [min(os.sched_getaffinity(0))]
    configuration = RuntimeConfiguration.for_high_throughput(switch_interval=1, cpu_affinity=cores)
    with pytest.raises(KeyError, match="its own"):
        configuration.run(main)


def test_one_inside_another_restores_the_outer_one() -> None:
    with RuntimeConfiguration(switch_interval=0.5, gc_freeze=True).apply():
        outer = snapshot()
        with RuntimeConfiguration(switch_interval=0.25, gc_freeze=True).apply():
            assert sys.getswitchinterval() == 0.25
        assert sys.getswitchinterval() == 0.5
        assert gc.get_freeze_count() >= outer[1], "what the outer one froze stays frozen"


# A loop of one's own.


@pytest.mark.both_loops
async def test_apply_in_a_running_loop() -> None:
    with RuntimeConfiguration(thread_pool_size=2, gc_thresholds=(600, 6, 6)).apply():
        assert gc.get_threshold() == (600, 6, 6)
        assert await busiest(2) == 2
    assert gc.get_threshold() != (600, 6, 6)
    names = await asyncio.to_thread(lambda: threading.current_thread().name)
    assert not names.startswith("queue-runtime-default"), "the loop has a pool again"


@pytest.mark.both_loops
async def test_apply_refuses_another_loop() -> None:
    runs, other = (
        ("uvloop", "asyncio") if isinstance(asyncio.get_running_loop(), uvloop.Loop) else ("asyncio", "uvloop")
    )
    with RuntimeConfiguration(loop=runs).apply():  # type: ignore[arg-type]
        pass
    with pytest.raises(ConfigurationError, match=f"a loop of {runs} runs already") as raised:
        RuntimeConfiguration(loop=other, gc_freeze=True).apply().__enter__()  # type: ignore[arg-type]
    assert raised.value.field == "loop"


@pytest.mark.parametrize(("field", "value"), [("loop", "asyncio"), ("thread_pool_size", 2)])
def test_apply_without_a_loop_refuses_what_is_for_one(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="none runs here") as raised:
        RuntimeConfiguration(**{field: value}).apply().__enter__()
    assert raised.value.field == field
