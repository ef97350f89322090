"""How a handler is called: a coroutine function on the loop, a plain one in a thread or in another process."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Literal, Protocol

from queue_runtime.errors import ConfigurationError

Executor = Literal["auto", "thread", "process"]


class Call(Protocol):
    """Calls the handler with its message or messages, and with the context when it takes one."""

    takes_context: bool

    @property
    def alone(self) -> Callable[[Any], Coroutine[Any, Any, object]]:
        """The call without a context."""
        ...

    def __call__(self, argument: Any, context: Any) -> Coroutine[Any, Any, object]: ...

    def close(self) -> None:
        """Let go of threads and processes. A thread that runs on in a handler is not waited for."""
        ...


def call_of(handler: Callable[..., object], executor: Executor, workers: int) -> Call:
    """Return the way to call ``handler``.

    Parameters
    ----------
    executor:
        Where a plain function runs: ``auto`` and ``thread`` in a thread, ``process`` in another process.
    workers:
        Threads at most; processes, of which more than there are processors would only wait, as well.

    Raises ConfigurationError, which names the field.
    """
    if not callable(handler):
        raise ConfigurationError("handler", f"must be a function of a message, not {type(handler).__name__}")
    takes_context = _takes_context(handler)
    if _is_async(handler):
        if executor != "auto":
            raise ConfigurationError("executor", f"an async handler runs on the event loop, not in a {executor}")
        return _OnLoop(handler, takes_context)
    if executor == "process":
        if takes_context:
            raise ConfigurationError("handler", "takes a context, which cannot go to another process; take the message")
        return _InProcesses(handler, workers)
    return _InThreads(handler, takes_context, workers)


class HandlerDiedError(RuntimeError):
    """The process that ran a handler ended under it: killed, or out of memory."""


class _OnLoop:
    def __init__(self, handler: Callable[..., Any], takes_context: bool) -> None:
        self.alone: Callable[[Any], Coroutine[Any, Any, object]] = handler
        self.takes_context = takes_context
        self._handler = handler

    def __call__(self, argument: Any, context: Any) -> Coroutine[Any, Any, object]:
        call: Coroutine[Any, Any, object] = (
            self._handler(argument, context) if self.takes_context else self._handler(argument)
        )
        return call

    def close(self) -> None:
        """Nothing is held."""


class _InThreads:
    def __init__(self, handler: Callable[..., Any], takes_context: bool, workers: int) -> None:
        self._handler = handler
        self.takes_context = takes_context
        self.alone = partial(self, context=None)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="queue-runtime-handler")

    async def __call__(self, argument: Any, context: Any) -> object:
        arguments = (argument, context) if self.takes_context else (argument,)
        run = contextvars.copy_context().run
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self._threads, run, _called, self._handler, arguments)
        return await result if inspect.isawaitable(result) else result

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class _InProcesses:
    """Processes of one worker each: one that dies takes no other message with it, and can be killed alone."""

    takes_context = False

    def __init__(self, handler: Callable[..., Any], workers: int) -> None:
        try:
            pickle.dumps(handler)
        except Exception as error:
            raise ConfigurationError(
                "handler", f"cannot go to another process; it must be a function at the top of a module: {error}"
            ) from error
        self._handler = handler
        self.alone = partial(self, context=None)
        self._idle: list[_Process] = []
        self._workers = asyncio.Semaphore(min(workers, os.cpu_count() or 1))
        self._closed = False

    async def __call__(self, argument: Any, context: Any) -> object:
        async with self._workers:
            # Made in a thread: semaphores and a process are.
            process = self._idle.pop() if self._idle else await asyncio.to_thread(_Process)
            try:
                result = await process.run(self._handler, argument)
            except asyncio.CancelledError:  # nobody wants the result: the lock is lost, or the drain is over
                process.kill()
                raise
            except BrokenProcessPool as error:
                process.kill()
                raise HandlerDiedError("the handler's process died") from error
            finally:
                if process.is_alive and not self._closed:
                    self._idle.append(process)
                else:
                    process.kill()
            return result

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().kill()


class _Process:
    """One process, started here and now."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self._executor = ProcessPoolExecutor(1, mp_context=context, initializer=_begin)
        self._pid = self._executor.submit(os.getpid)
        self.is_alive = True

    async def run(self, handler: Callable[..., Any], argument: Any) -> object:
        return await asyncio.get_running_loop().run_in_executor(self._executor, _called, handler, (argument,))

    def kill(self) -> None:
        if self.is_alive:
            self.is_alive = False
            self._pid.add_done_callback(_kill)  # at once, or when the process has begun
            self._executor.shutdown(wait=False, cancel_futures=True)


def _kill(pid: Future[int]) -> None:
    if not pid.cancelled() and pid.exception() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid.result(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


def _begin() -> None:
    """In the new process: signals are the parent's business, and without the parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _called(handler: Callable[..., object], arguments: tuple[Any, ...]) -> object:
    try:
        return handler(*arguments)
    except StopIteration as error:  # Python 3.11 cannot put it into a future: its waiter would never hear of it
        raise RuntimeError("the handler raised StopIteration") from error


def _is_async(handler: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004


def _takes_context(handler: Callable[..., object]) -> bool:
    """Whether it has a second parameter that must be given."""
    try:
        parameters = inspect.signature(handler).parameters.values()
    except (TypeError, ValueError):  # of some builtins
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is not p.KEYWORD_ONLY and p.kind is not p.VAR_KEYWORD for p in parameters)
    if any(p.kind is p.KEYWORD_ONLY for p in needed) or len(needed) > 2 or not takes_any:
        raise ConfigurationError("handler", "must take a message, and a context if it wants one, and nothing else")
    return len(needed) == 2
