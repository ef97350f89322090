# What a pump is told, what its answer means, and what is told of it.

import asyncio
import logging
import math
from typing import NamedTuple

from queue_runtime.errors import BatchError

logger = logging.getLogger("queue_runtime.mpcc")

MPCCStats = NamedTuple("MPCCStats", [
    ("pushed", int), ("waiting", int), ("in_flight", int), ("pumps", int), ("batches", int), ("delivered", int),
    ("failed", int), ("retried", int), ("dropped", int), ("refused", int), ("left", int), ("wakes", int),
])
MPCCStats.__module__ = __name__
MPCCStats.__doc__ = """Figures of a MultiProducerConcurrentConsumer, or of one slot of it, since it was made.

Attributes
----------
pushed: items that were accepted.
waiting: items in the slots now.
in_flight: items held by pumps that run now.
pumps: pumps that run now.
batches: batches handed to a pump.
delivered: items whose pump succeeded.
failed: items whose pump failed for good.
retried: times that an item was put back for another attempt.
dropped: items pushed out by newer ones (``overflow="drop_oldest"``).
refused: pushes that raised QueueFullError.
left: items that ``complete`` returned.
wakes: times that the event loop was called from a push; 0 where the figures are of one slot.

Each figure is right by itself; together they may be a moment apart while other threads push.
"""


cdef class Cancellation:
    """Tells a pump that ``complete`` ran out of time. Thread-safety: for the event loop's thread."""

    def __cinit__(self):
        self.event = asyncio.Event()

    @property
    def cancelled(self):
        """Whether the time ran out. False while a drain goes on as it should."""
        return self.event.is_set()

    async def wait(self):
        """Wait until the time runs out."""
        await self.event.wait()

    cdef int cancel(self) except -1:
        self.event.set()
        return 0


cdef dict failures_of(object outcome, object error, Py_ssize_t count):
    """The error of each item that failed, by index; None when all went well."""
    cdef Py_ssize_t index
    cdef dict failures
    if error is None:
        if outcome is None:
            return None
        if type(outcome) is not list and type(outcome) is not tuple:
            error = TypeError(f"a pump returns None or a list of results, not {type(outcome).__name__}")
        elif len(outcome) != count:
            error = ValueError(f"the pump returned {len(outcome)} results for {count} items")
        else:
            failures = {index: result for index, result in enumerate(outcome) if isinstance(result, BaseException)}
            return failures or None
    elif isinstance(error, BatchError):
        failures = {}
        for key, failure in error.failures.items():
            if type(key) is not int or not 0 <= key < count or not isinstance(failure, BaseException):
                break
            failures[key] = failure
        else:
            return failures or None
    return dict.fromkeys(range(count), error)


cdef int resolve(object future, object home, object result, object error) except -1:
    """Give a caller its outcome, on its own loop."""
    loop = future.get_loop()
    if loop is home:
        _settle(future, result, error)
    else:
        try:
            loop.call_soon_threadsafe(_settle, future, result, error)
        except RuntimeError:
            pass  # its loop is closed, and nobody waits any more
    return 0


def _settle(future, result, error):
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):  # which no future takes
        future.set_exception(RuntimeError(f"the pump raised {error!r}"))
    else:
        future.set_exception(error)


def time_to_retry(retry, error, attempt):
    """The pause in seconds before another attempt, or None to give up; a rule that fails gives up."""
    if retry is None or not isinstance(error, Exception):
        return None
    try:
        pause = retry(error, attempt)
        if pause is None:
            return None
        pause = float(pause)
        if not (math.isfinite(pause) and pause >= 0):
            raise ValueError(f"a pause of {pause} seconds")
        return pause
    except Exception:
        logger.exception("the retry rule failed; its item is given up")
        return None


def log_failure(slot_number, items, exceptions):
    """Say once per batch that a pump failed. Never what the items are: they may be secret."""
    logger.error(
        "a pump of slot %d failed for %d items; the first error: %r",
        slot_number, len(items), exceptions[0], exc_info=exceptions[0],
    )
