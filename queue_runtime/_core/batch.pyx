"""How many messages to take at once: as many as the last batches say fit in a target duration [C43]."""

cimport cython

from collections import deque
from datetime import timedelta
from typing import NamedTuple

from queue_runtime.errors import ValidationError, shown

HISTORY = 50
RECENT = 10
# Longer than any batch and far from where arithmetic on seconds overflows; about 317 years.
MAX_SECONDS = 1e10


class BatchRecord(NamedTuple):
    """One batch as it was recorded; durations in seconds, None where it was not told."""

    message_count: int
    total_duration: float
    processing_duration: float | None
    success_count: int | None


cdef object seconds_of(object value, str field):
    cdef object seconds
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = value
    else:
        raise ValidationError(field, f"must be seconds or a timedelta, not {type(value).__name__}")
    if not 0 <= seconds <= MAX_SECONDS:  # a NaN fails too
        raise ValidationError(field, f"must be 0 to {MAX_SECONDS:g} seconds, not {shown(value)}")
    return float(seconds)


cdef long long count_of(object value, str field, long long least, long long most) except? -1:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValidationError(field, f"must be an int, not {type(value).__name__}")
    if not least <= value <= most:
        raise ValidationError(field, f"must be {least} to {most}, not {shown(value)}")
    return value


@cython.final
@cython.auto_pickle(False)
cdef class AdaptiveBatchSizer:
    """Finds the batch size whose processing takes about a target duration.

    The mean time per message over the last 10 batches (all their time by all their messages) divides the target;
    the result is cut to the limits. Batches of no messages say nothing about it and are left out of the mean.

    Parameters
    ----------
    min_batch_size, max_batch_size:
        The limits in messages: 1 <= min <= max <= 1,000,000,000. The minimum is also the answer before any history.
    target_batch_duration:
        What a batch should take, in seconds or as a timedelta; more than 0.

    Raises
    ------
    ValidationError
        Naming the field and its limit.

    Thread-safety: any thread may call it; each call is made whole under the interpreter's lock.
    """

    cdef readonly long long min_batch_size
    cdef readonly long long max_batch_size
    cdef readonly double target_batch_duration
    cdef object _history

    def __init__(self, min_batch_size, max_batch_size, target_batch_duration):
        cdef long long least = count_of(min_batch_size, "min_batch_size", 1, 10**9)
        cdef long long most = count_of(max_batch_size, "max_batch_size", least, 10**9)
        target = seconds_of(target_batch_duration, "target_batch_duration")
        if target == 0:
            raise ValidationError("target_batch_duration", "must be more than 0 seconds")
        self.min_batch_size = least
        self.max_batch_size = most
        self.target_batch_duration = target
        self._history = deque(maxlen=HISTORY)

    def record(self, message_count, total_duration, processing_duration=None, success_count=None):
        """Add a finished batch to the history.

        Parameters
        ----------
        message_count:
            How many messages it had; 0 is allowed.
        total_duration:
            From receiving them to settling them, in seconds or as a timedelta; 0 is allowed.
        processing_duration:
            The handlers' part of it, likewise; kept in the history.
        success_count:
            How many succeeded, at most ``message_count``; kept in the history.

        Raises
        ------
        ValidationError
            Naming the field and its limit; nothing is recorded then.
        """
        cdef long long count = count_of(message_count, "message_count", 0, 10**12)
        total = seconds_of(total_duration, "total_duration")
        processing = None
        if processing_duration is not None:
            processing = seconds_of(processing_duration, "processing_duration")
        succeeded = None
        if success_count is not None:
            succeeded = count_of(success_count, "success_count", 0, count)
        self._history.append(BatchRecord(count, total, processing, succeeded))

    def calculate_optimal_batch_size(self):
        """Return how many messages the next batch should have."""
        cdef long long messages = 0
        cdef double seconds = 0.0
        cdef double size
        for record in list(self._history)[-RECENT:]:
            if record.message_count:
                messages += record.message_count
                seconds += record.total_duration
        if messages == 0:
            return self.min_batch_size
        if seconds == 0.0:
            return self.max_batch_size
        size = self.target_batch_duration * messages / seconds
        if size >= self.max_batch_size:
            return self.max_batch_size
        return max(self.min_batch_size, <long long>size)

    @property
    def history(self):
        """The last 50 batches, oldest first, as a tuple of ``BatchRecord``."""
        return tuple(self._history)

    def __repr__(self):
        return (
            f"AdaptiveBatchSizer(min_batch_size={self.min_batch_size}, max_batch_size={self.max_batch_size}, "
            f"target_batch_duration={self.target_batch_duration}): {self.calculate_optimal_batch_size()}"
        )
