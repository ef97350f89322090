"""What becomes of items whose pump failed: behaviour 16, D8, outcomes, retries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from loops import Recorder, run, turns

from queue_runtime._core.mpcc import MultiProducerConcurrentConsumer as MPCC
from queue_runtime.errors import BatchError, ClosedError, QueueFullError

DAY = 86400


class Failures:
    def __init__(self) -> None:
        self.seen: list[tuple[int, list[Any], list[str]]] = []

    def __call__(self, slot: int, items: list[Any], exceptions: list[BaseException]) -> None:
        self.seen.append((slot, items, [repr(error) for error in exceptions]))


def fails_at_once(items: list[Any], slot: int, state: Any, cancellation: Any) -> Any:
    raise ValueError("no")  # D8: before there is anything to await


async def fails_in_its_first_step(items: list[Any], slot: int, state: Any, cancellation: Any) -> Any:
    raise ValueError("no")


async def fails_later(items: list[Any], slot: int, state: Any, cancellation: Any) -> Any:
    await asyncio.sleep(1)
    raise ValueError("no")


@pytest.mark.parametrize("bad", [fails_at_once, fails_in_its_first_step, fails_later])
def test_16_a_failing_pump_stops_nothing(bad: Callable[..., Any]) -> None:
    async def main() -> None:
        good = Recorder()
        failures = Failures()

        def pump(items: list[Any], slot: int, state: Any, cancellation: Any) -> Any:
            return (bad if items[0] == 0 else good)(items, slot, state, cancellation)

        mpcc: MPCC[Any] = MPCC(2, DAY, 1, 3, on_failure=failures)
        mpcc.start(pump)
        for slot in range(3):
            mpcc.push_many([0, 1, 2, 3], slot)
        assert await mpcc.complete() == {}
        assert sorted(good.batches) == [(slot, [2, 3]) for slot in range(3)]
        assert sorted(failures.seen) == [(slot, [0, 1], ["ValueError('no')"] * 2) for slot in range(3)]
        stats = mpcc.stats()
        assert (stats.delivered, stats.failed, stats.batches) == (6, 6, 6)

    run(main())


def test_16_a_failure_is_logged_once_without_the_items(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        mpcc: MPCC[Any] = MPCC(2, DAY, 1, 1)
        mpcc.start(fails_in_its_first_step)
        mpcc.push_many(["secret", "secret"], 0)
        await mpcc.complete()

    with caplog.at_level(logging.ERROR):
        run(main())
    (record,) = caplog.records
    assert record.name == "queue_runtime.mpcc"
    assert record.exc_info is not None
    assert "secret" not in caplog.text
    assert "2 items" in caplog.text


def test_16_on_failure_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        def on_failure(*arguments: Any) -> None:
            raise ZeroDivisionError

        mpcc: MPCC[Any] = MPCC(1, DAY, 1, 1, on_failure=on_failure)
        mpcc.start(fails_in_its_first_step)
        mpcc.push_many([1, 2], 0)
        assert await mpcc.complete() == {}
        assert mpcc.stats().failed == 2

    run(main())
    assert caplog.text.count("on_failure failed") == 2


@pytest.mark.parametrize(
    ("answer", "good", "error"),
    [
        ([1, "x", None], [1, "x", None], None),
        ((1, 2, 3), [1, 2, 3], None),
        ([1, KeyError("k"), 3], [1, None, 3], KeyError),
        ([1, 2], [], ValueError),
        (7, [], TypeError),
    ],
)
def test_results_per_item(answer: Any, good: list[Any], error: type[Exception] | None) -> None:
    async def main() -> None:
        async def pump(items: list[Any], slot: int, state: Any, cancellation: Any) -> Any:
            assert items == [0, 1, 2]
            return answer

        failures = Failures()
        mpcc: MPCC[Any] = MPCC(3, DAY, 1, 1, on_failure=failures)
        mpcc.start(pump)
        callers = [asyncio.ensure_future(mpcc.push_and_wait(i, 0)) for i in range(3)]
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        for index, outcome in enumerate(outcomes):
            if error is not None and (not good or index == 1):
                assert isinstance(outcome, error)
            else:
                assert outcome == good[index]
        assert failures.seen == []  # each caller knows
        mpcc.push_many([0, 1, 2], 0)
        await mpcc.complete()
        if error is not None:
            assert [items for _, items, _ in failures.seen] == [[0, 1, 2] if not good else [1]]

    run(main())


@pytest.mark.parametrize(
    ("failures", "failed"),
    [
        ({1: KeyError(1)}, {1}),
        ({0: KeyError(0), 2: KeyError(2)}, {0, 2}),
        ({}, set()),
        ({3: KeyError(3)}, {0, 1, 2}),  # an index that is none fails all: nobody knows what was meant
        ({-1: KeyError(3)}, {0, 1, 2}),
    ],
)
def test_batch_error(failures: dict[int, BaseException], failed: set[int]) -> None:
    async def main() -> None:
        async def pump(items: list[Any], slot: int, state: Any, cancellation: Any) -> Any:
            raise BatchError(failures)

        mpcc: MPCC[Any] = MPCC(3, DAY, 1, 1)
        mpcc.start(pump)
        outcomes = await asyncio.gather(*[mpcc.push_and_wait(i, 0) for i in range(3)], return_exceptions=True)
        assert {i for i, outcome in enumerate(outcomes) if isinstance(outcome, Exception)} == failed
        assert mpcc.stats().failed == len(failed)
        await mpcc.complete()

    run(main())


def test_retry_puts_items_back_at_the_head_in_order() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        begun: list[tuple[float, list[int]]] = []
        attempts: list[tuple[str, int]] = []

        async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> Any:
            begun.append((loop.time() - begin, items))
            if len(begun) <= 2:
                return [KeyError(item) if item % 2 else item for item in items]
            return None

        def retry(error: BaseException, attempt: int) -> float | None:
            attempts.append((repr(error), attempt))
            return 3.0 * attempt if attempt < 3 else None

        begin = loop.time()
        mpcc: MPCC[int] = MPCC(4, DAY, 1, 1, retry=retry)
        mpcc.start(pump)
        mpcc.push_many(range(6), 0)
        assert await mpcc.complete() == {}
        assert begun == [(0, [0, 1, 2, 3]), (3, [1, 3, 4, 5]), (9, [1, 3, 5])]
        assert attempts == [
            ("KeyError(1)", 1), ("KeyError(3)", 1), ("KeyError(1)", 2), ("KeyError(3)", 2), ("KeyError(5)", 1),
        ]  # fmt: skip
        stats = mpcc.stats()
        assert (stats.delivered, stats.retried, stats.failed) == (6, 5, 0)

    run(main())


def test_retry_of_batches_that_fail_out_of_order() -> None:
    """Of two batches at once, the later fails first: the older items still come first again."""

    async def main() -> None:
        begun: list[list[int]] = []

        async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> Any:
            begun.append(items)
            if len(begun) <= 2:
                await asyncio.sleep(2 if items[0] == 0 else 1)
                raise KeyError
            return None

        mpcc: MPCC[int] = MPCC(2, DAY, 2, 1, retry=lambda error, attempt: 5.0)
        mpcc.start(pump)
        mpcc.push_many(range(4), 0)
        await mpcc.complete()
        assert begun == [[0, 1], [2, 3], [0, 1], [2, 3]]

    run(main())


def test_retry_gives_up() -> None:
    async def main() -> None:
        failures = Failures()
        mpcc: MPCC[Any] = MPCC(2, DAY, 1, 1, retry=lambda e, n: 0.5 if n < 4 else None, on_failure=failures)
        mpcc.start(fails_later)
        caller = asyncio.ensure_future(mpcc.push_and_wait("a", 0))
        await turns()
        mpcc.push("b", 0)
        with pytest.raises(ValueError, match="no"):
            await caller
        assert failures.seen == [(0, ["b"], ["ValueError('no')"])]
        assert mpcc.stats().retried == 6
        await mpcc.complete()

    run(main())


@pytest.mark.parametrize("bad", [float("nan"), -1, "soon", KeyError("in the rule")])
def test_a_bad_retry_rule_gives_up(bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        def retry(error: BaseException, attempt: int) -> Any:
            if isinstance(bad, Exception):
                raise bad
            return bad

        failures = Failures()
        mpcc: MPCC[Any] = MPCC(1, DAY, 1, 1, retry=retry, on_failure=failures)
        mpcc.start(fails_in_its_first_step)
        mpcc.push(1, 0)
        await mpcc.complete()
        assert len(failures.seen) == 1

    run(main())
    assert "retry rule" in caplog.text


def test_push_and_wait_of_an_item_that_is_left_or_dropped() -> None:
    async def main() -> None:
        mpcc: MPCC[Any] = MPCC(2, DAY, 1, 1, overflow="drop_oldest", slot_capacity=2, low_water=1)
        dropped = asyncio.ensure_future(mpcc.push_and_wait("a", 0))
        left = asyncio.ensure_future(mpcc.push_and_wait("b", 0))
        await turns()
        mpcc.push("c", 0)
        with pytest.raises(QueueFullError):
            await dropped
        assert await mpcc.complete() == {0: ["b", "c"]}
        with pytest.raises(ClosedError, match="undelivered"):
            await left
        with pytest.raises(ClosedError):
            await mpcc.push_and_wait("d", 0)

    run(main())


def test_push_and_wait_from_another_loop() -> None:
    async def main() -> None:
        async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> list[int]:
            return [item * 2 for item in items]

        mpcc: MPCC[int] = MPCC(3, 0.01, 1, 1)
        mpcc.start(pump)

        async def others() -> list[int]:
            return await asyncio.gather(*[mpcc.push_and_wait(i, 0) for i in range(5)])

        assert await asyncio.to_thread(asyncio.run, others()) == [0, 2, 4, 6, 8]
        await mpcc.complete()

    run(main(), asyncio.SelectorEventLoop)


def test_a_caller_that_went_away() -> None:
    """Its item's error goes to on_failure, and nothing breaks."""

    async def main() -> None:
        failures = Failures()
        mpcc: MPCC[Any] = MPCC(1, DAY, 1, 1, on_failure=failures)
        mpcc.start(fails_later)
        caller = asyncio.ensure_future(mpcc.push_and_wait("a", 0))
        await turns()
        caller.cancel()
        await mpcc.complete()
        assert failures.seen == [(0, ["a"], ["ValueError('no')"])]

    run(main())


def test_a_pump_that_is_cancelled_from_outside() -> None:
    """Also before its task's first step: the batch ends, its failure is told, and the slot goes on."""

    async def main() -> None:
        failures = Failures()
        pump = Recorder(lambda items, slot: asyncio.sleep(1))
        mpcc: MPCC[Any] = MPCC(1, DAY, 1, 1, on_failure=failures)
        mpcc.start(pump)
        mpcc.push_many([1, 2, 3], 0)
        for step in (2, 6):
            for _ in range(step):
                await asyncio.sleep(0)
                others = asyncio.all_tasks() - {asyncio.current_task()}
                if step == 2 and others:
                    break
            for task in others:
                task.cancel()
        assert await mpcc.complete() == {}
        assert [items for _, items, _ in failures.seen] == [[1], [2]]
        assert mpcc.stats().delivered == 1

    run(main())
