"""What is left when a consumer ends, in whatever way: nothing [C23, C40]. Real processes, real signals, both loops."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import asyncio, gc, multiprocessing, os, signal, sys, threading, time
from queue_runtime import *

case, loop_name = sys.argv[1:]
threads_before = threading.enumerate()

def files():
    return len(os.listdir("/proc/self/fd"))

def begun(*_):
    print("begun", flush=True)

async def hangs(message):
    begun()
    await asyncio.sleep(3600)

async def raises_in_the_drain(message):
    begun()
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        raise ValueError("while draining")

async def ignores_cancellation_for_a_while(message):
    begun()
    for _ in range(20):
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            pass

def blocks_a_thread(message):
    begun()
    time.sleep(0.5)

def blocks_a_thread_for_ever(message):
    begun()
    time.sleep(3600)

async def well(message):
    begun()
    await asyncio.sleep(0.2)

HANDLERS = {name: thing for name, thing in list(globals().items()) if callable(thing)}

async def main():
    loop = asyncio.get_running_loop()
    tasks_before, files_before = asyncio.all_tasks(), files()
    async with QueueClient(InMemoryConfig(max_concurrency=2)) as client:
        await client.send_messages("q", [Message(body=b"x", session_id=key) for key in [None, None, None, "a", "b"]])
        config = ConsumerConfig(drain_timeout=float(os.environ["DRAIN"]))
        consumer = Consumer(client, "q", HANDLERS[case], config)
        stop = consumer.stop
        def noted():
            stop()
            print("draining", flush=True)
        consumer.stop = noted  # it is what the first signal calls
        stats = await consumer.run(handle_signals=True)
        counts = await client.counts("q")
        print("counts", stats.completed, stats.running, stats.waiting, counts.in_flight,
              counts.active + counts.scheduled + stats.completed + counts.dead_lettered, flush=True)
    await asyncio.sleep(0)
    gc.collect()
    for _ in range(100):  # the watchdog is told to end, and not waited for
        more = [thread.name for thread in threading.enumerate() if thread not in threads_before]
        if more != ["queue-runtime-watchdog"]:
            break
        await asyncio.sleep(0.02)
    print("left", len(asyncio.all_tasks() - tasks_before), files() - files_before,
          len(multiprocessing.active_children()), signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, *more, flush=True)

if loop_name == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
print("over", flush=True)
"""


def run(case: str, loop: str, *, signals: int, drain: float) -> tuple[list[str], list[str], float, int]:
    """Send so many signals, each when the one before shows; return the counts, what is left, the time and the code."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, case, loop],
        cwd=ROOT, env={"DRAIN": str(drain), "PATH": ""}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process:
        try:
            for _ in range(2):
                assert process.stdout.readline() == "begun\n"
            started = time.monotonic()
            process.terminate()
            while process.stdout.readline() != "draining\n":
                pass
            if signals == 2:
                process.terminate()
            found = {}
            for line in process.stdout:
                words = line.split()
                found[words[0]] = words[1:]
                if words[0] == "left":
                    took = time.monotonic() - started
            process.wait(20)
        finally:
            process.kill()
    return found["counts"], found["left"], took, process.returncode


LOOPS = ["asyncio", "uvloop"]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("case", ["well", "hangs", "raises_in_the_drain", "ignores_cancellation_for_a_while"])
def test_nothing_is_left_of_async_handlers(case: str, signals: int, loop: str) -> None:
    """The first signal lets them finish for as long as the drain may take; the second cancels them at once."""
    drain = 60.0 if signals == 2 or case == "well" else 0.3
    counts, left, took, code = run(case, loop, signals=signals, drain=drain)
    assert counts[1:] == ["0", "0", "0", "5"], "nothing runs, waits or is locked; five messages are somewhere"
    assert left == ["0", "0", "0", "True"], "no task, file, process or signal handler, and no thread"
    assert took < 15
    assert code == 0
    if case == "ignores_cancellation_for_a_while":
        assert counts[0] == "2", "who does not heed the cancellation is waited for, and its work counts"
        assert took >= 0.7
    if case == "well" and signals == 1:
        assert counts[0] == "2"


@pytest.mark.parametrize("loop", LOOPS)
def test_a_thread_that_ends_is_not_waited_for_beyond_the_drain(loop: str) -> None:
    counts, left, took, code = run("blocks_a_thread", loop, signals=1, drain=30.0)
    assert counts[0] == "2"
    assert counts[1:] == ["0", "0", "0", "5"]
    assert left[:4] == ["0", "0", "0", "True"]
    assert took < 15
    assert code == 0


def test_a_thread_that_hangs_for_ever_holds_up_the_exit_until_the_next_signal() -> None:
    """The run ends in time and its messages are free; Python itself waits for the thread, until told again."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "blocks_a_thread_for_ever", "asyncio"],
        cwd=ROOT, env={"DRAIN": "0.2", "PATH": ""}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process:
        try:
            assert [process.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
            process.terminate()
            assert [process.stdout.readline() for _ in range(2)] == ["draining\n", "counts 0 0 0 0 5\n"]
            assert process.stdout.readline().startswith("left 0 0 0 True")
            assert process.stdout.readline() == "over\n"
            process.terminate()
            assert process.wait(20) == -signal.SIGTERM
        finally:
            process.kill()


CUT_OFF = """
import asyncio, gc, os, sys, warnings
from queue_runtime import *

warnings.simplefilter("error")
sys.unraisablehook = lambda told: print("unraisable", told.exc_value)

def files():
    return len(os.listdir("/proc/self/fd"))

async def begin(kept):
    client = QueueClient(InMemoryConfig(max_concurrency=4))
    await client.send_messages("q", [Message(body=b"x", session_id=key) for key in (None, None, "a", "b")])
    async def handle(message):
        await asyncio.sleep(3600)
    consumer = Consumer(client, "q", handle)
    kept += [client, consumer, asyncio.ensure_future(consumer.run())]
    while consumer.stats.running < 4:
        await asyncio.sleep(0.001)

def once(is_used):
    if sys.argv[1] == "uvloop":
        import uvloop
        loop = uvloop.new_event_loop()
    else:
        loop = asyncio.new_event_loop()
    before, kept = files(), []
    loop.run_until_complete(begin(kept) if is_used else asyncio.sleep(0))
    loop.close()
    loop.set_exception_handler(lambda loop, context: None)  # that tasks are destroyed is what this is about
    del loop
    kept.clear()
    gc.collect()
    return files() - before

once(False)
bare = once(False)
print("more files than a bare loop:", once(True) - bare)
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_that_is_closed_abruptly_leaves_no_file_and_the_process_ends(loop: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CUT_OFF, loop], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "more files than a bare loop: 0\n"
