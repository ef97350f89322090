"""One frozen, keyword-only configuration per provider, checked when it is made [C33]."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from queue_runtime._core.body import SMALLEST_VIEW
from queue_runtime.errors import ConfigurationError, ValidationError
from queue_runtime.message import QueueName
from queue_runtime.retry import ExponentialRetry, RetryPolicy, checked_policy, policy_from
from queue_runtime.settings import (
    Seconds as Seconds,
    choice as choice,
    flag as flag,
    integer as integer,
    path as path,
    seconds as seconds,
    share as share,
    wait_seconds as wait_seconds,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderConfig:
    """What every provider's configuration has.

    Parameters
    ----------
    max_concurrency:
        Handlers that a consumer runs at once, unless it is told otherwise.
    prefetch:
        Messages that a consumer holds at most, waiting and in handlers, unless it is told otherwise.
    max_lock_renewal:
        Seconds for which the lock of a received message is kept renewed, from its receipt on; 0 renews nothing.
        300 s is what Azure's own renewer takes.
    settlement:
        ``auto`` settles at once where settling is a call in this process and in batches elsewhere; ``batched``
        always goes through the batches.
    settle_batch_size, settle_interval, settle_concurrency:
        A batch of settlements goes out when it has so many messages or its oldest has waited so many seconds;
        so many batches of one receiver may be on their way at once.
    retry:
        When a send, a settlement, the opening of a link, a peek, a count or the creation of a queue is tried again
        after a passing error [C34]. In plain settings: ``none``, ``fixed``, ``linear`` or ``exponential``, and more
        where the defaults are not meant, such as ``fixed,delay=0.05,attempts=5``. A policy's deadline does not
        hold for settlements, which end with the lock of their message.

    Raises ConfigurationError, which names the field.
    """

    scheme: ClassVar[str]
    """What its URLs begin with, and the name of its entry point."""
    provider: ClassVar[str]
    """``module:name`` of what ``open_provider`` imports then, and calls with the configuration and ``clock=``."""

    max_concurrency: int = 16
    prefetch: int = 100
    max_lock_renewal: Seconds = 300.0
    settlement: Literal["auto", "batched"] = "auto"
    settle_batch_size: int = 100
    settle_interval: Seconds = 0.005
    settle_concurrency: int = 4
    retry: RetryPolicy = ExponentialRetry()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        integer("max_concurrency", self.max_concurrency, minimum=1)
        integer("prefetch", self.prefetch, minimum=1)
        self._set("max_lock_renewal", seconds("max_lock_renewal", self.max_lock_renewal))
        choice("settlement", self.settlement, ("auto", "batched"))
        integer("settle_batch_size", self.settle_batch_size, minimum=1, maximum=10_000)
        self._set("settle_interval", seconds("settle_interval", self.settle_interval, minimum=0.0001, maximum=60.0))
        integer("settle_concurrency", self.settle_concurrency, minimum=1, maximum=1000)
        checked_policy("retry", self.retry)

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Make a configuration from plain settings, such as a parsed file's; texts are read as the field's type.

        Raises ConfigurationError for a name that is no field, and whatever the constructor raises.
        """
        if not isinstance(settings, Mapping):
            raise ConfigurationError("settings", f"must be a mapping of names to values, not {type(settings).__name__}")
        hints = typing.get_type_hints(cls)
        fields = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, value in settings.items():
            if name not in fields:
                raise ConfigurationError(
                    name, f"is no setting of {cls.__name__}; there are {', '.join(sorted(fields))}"
                )
            if hints[name] is RetryPolicy and isinstance(value, str | Mapping):
                values[name] = policy_from(name, value)
            else:
                values[name] = _parsed(name, value, hints[name]) if isinstance(value, str) else value
        return cls(**values)

    @classmethod
    def read_location(cls, host: str, path: str) -> dict[str, Any]:
        """Return the settings, as texts, that a URL's ``//host/path`` stands for; here there are none."""
        if host or path not in ("", "/"):
            raise ConfigurationError("provider", f"a {cls.scheme} URL is {cls.scheme}://?setting=value, with no name")
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class InMemoryConfig(ProviderConfig):
    """The embedded provider: queues in this process's memory, gone with it unless there is a ``path``.

    Parameters
    ----------
    name:
        Clients of one process that give the same name share their queues, for as long as one of them is open; an
        empty name shares with nobody.
    capacity:
        Messages that one queue holds at most, in whatever state; its dead letters are counted apart,
        with the same bound.
    on_full:
        What a send to a full queue does: ``raise`` QueueFullError, or ``wait`` for room.
    auto_create:
        Create a queue at its first use; otherwise such a use raises QueueNotFoundError.
    queues:
        Queues that are there from the start.
    lock_duration, session_lock_duration:
        Seconds that a delivery stays invisible to others, and that a session stays held without renewal.
    max_delivery_count:
        Deliveries of one message; when the last one fails, the message becomes a dead letter.
    dead_letter_on_expiration:
        Whether a message that outlived its time_to_live becomes a dead letter; otherwise it is dropped.
    deduplication_window:
        Seconds for which a deduplication id is remembered; 0 remembers none.
    max_message_size:
        Bytes of one message, as ``Message.size`` counts them.
    body_file_threshold:
        Bytes from which a body is moved out of memory into a file, so that a queue of large messages does not fill the
        memory; at least 16384. It is delivered as a view of the mapped file: read it by ``body_view`` or
        ``open_body()``, which copy nothing. None: every body stays where it is.
    body_directory:
        Where these files are, on a disk; they have no names, and end with their messages or with the process. None:
        ``TMPDIR`` if that is set, else ``/var/tmp``, else the system's choice.
    path:
        A directory, made when it is not there, in which everything is kept: what was acknowledged survives the end of
        the process, however it comes. One process at a time can use it. None keeps nothing.
    fsync:
        What survives a crash of the machine as well. ``always``: all that was acknowledged; ``interval``: all but what
        was acknowledged in the last ``fsync_interval`` seconds; ``never``: what the system happened to write.
    fsync_interval:
        Seconds, for ``interval``.
    """

    scheme: ClassVar[str] = "memory"
    provider: ClassVar[str] = "queue_runtime.providers.durable:open_memory"

    name: str = ""
    capacity: int = 1_000_000
    on_full: Literal["raise", "wait"] = "raise"
    auto_create: bool = True
    queues: tuple[str, ...] = ()
    lock_duration: Seconds = 30.0
    session_lock_duration: Seconds = 30.0
    max_delivery_count: int = 5
    dead_letter_on_expiration: bool = False
    deduplication_window: Seconds = 300.0
    max_message_size: int = 1_048_576
    body_file_threshold: int | None = None
    body_directory: str | os.PathLike[str] | None = None
    path: str | os.PathLike[str] | None = None
    fsync: Literal["always", "interval", "never"] = "interval"
    fsync_interval: Seconds = 1.0

    def __post_init__(self) -> None:
        ProviderConfig.__post_init__(self)
        if not isinstance(self.name, str):
            raise ConfigurationError("name", f"must be a text, not {type(self.name).__name__}")
        integer("capacity", self.capacity, minimum=1)
        choice("on_full", self.on_full, ("raise", "wait"))
        flag("auto_create", self.auto_create)
        if isinstance(self.queues, str):
            raise ConfigurationError("queues", "must be a sequence of names, not one text")
        try:
            self._set("queues", tuple(QueueName(name) for name in self.queues))
        except (ValidationError, TypeError) as error:
            raise ConfigurationError("queues", str(error)) from error
        for field in ("lock_duration", "session_lock_duration"):
            self._set(field, seconds(field, getattr(self, field), minimum=0.001, maximum=43_200.0))
        integer("max_delivery_count", self.max_delivery_count, minimum=1)
        flag("dead_letter_on_expiration", self.dead_letter_on_expiration)
        self._set("deduplication_window", seconds("deduplication_window", self.deduplication_window))
        integer("max_message_size", self.max_message_size, minimum=1)
        if self.body_file_threshold is not None:
            integer("body_file_threshold", self.body_file_threshold, minimum=SMALLEST_VIEW)
        if self.body_directory is not None:
            self._set("body_directory", path("body_directory", self.body_directory))
            if self.body_file_threshold is None:
                raise ConfigurationError("body_directory", "is used with body_file_threshold only; set that too")
        if self.path is not None:
            self._set("path", path("path", self.path))
        choice("fsync", self.fsync, ("always", "interval", "never"))
        self._set("fsync_interval", seconds("fsync_interval", self.fsync_interval, minimum=0.001, maximum=3600.0))

    @classmethod
    def for_high_throughput(cls, **changes: Any) -> Self:
        """10 000 messages a queue, a handler per CPU, up to 1000 messages held by a consumer [C46]."""
        preset: dict[str, Any] = {"capacity": 10_000, "max_concurrency": os.cpu_count() or 1, "prefetch": 1000}
        return cls(**(preset | changes))

    @classmethod
    def for_testing(cls, **changes: Any) -> Self:
        """1000 messages a queue and one handler at a time, so that the order of a test is always the same [C46]."""
        preset: dict[str, Any] = {"capacity": 1000, "max_concurrency": 1, "prefetch": 100}
        return cls(**(preset | changes))

    @classmethod
    def read_location(cls, host: str, path: str) -> dict[str, Any]:
        """Return the name that the queues are shared by."""
        if path not in ("", "/"):
            raise ConfigurationError("provider", "a memory URL is memory://NAME?setting=value, with nothing else in it")
        return {"name": host} if host else {}


BUILT_IN: dict[str, type[ProviderConfig]] = {InMemoryConfig.scheme: InMemoryConfig}
"""The configurations of this package by their scheme; others are found by their entry points."""
GROUP = "queue_runtime.providers"
"""The group of entry points in which another package names its configuration by its scheme."""


def config_from_url(url: str) -> ProviderConfig:
    """Read a configuration from a URL such as ``memory://orders?capacity=1000&on_full=wait``.

    The scheme names the provider: one of this package, or one that another package announces by an entry point of
    the group ``queue_runtime.providers``, which is imported only then. What the host and the path mean is the
    provider's to say; the query holds settings by field name, lists separated by commas.
    Raises ConfigurationError, which names the field; the URL itself is never repeated, as it may hold a secret.
    """
    if not isinstance(url, str):
        raise ConfigurationError("provider", f"must be a URL or a configuration, not {type(url).__name__}")
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ConfigurationError("provider", "is no URL; use SCHEME://NAME?setting=value&...") from None
    cls = BUILT_IN.get(parts.scheme) or _plugged_in(parts.scheme)
    if parts.fragment or "@" in parts.netloc:
        raise ConfigurationError("provider", f"a {cls.scheme} URL has neither a user, as in user@host, nor a #fragment")
    settings = cls.read_location(unquote(parts.netloc), unquote(parts.path))
    for name, value in query:
        if name in settings:
            raise ConfigurationError(name, "is given twice")
        settings[name] = value
    return cls.from_mapping(settings)


def _plugged_in(scheme: str) -> type[ProviderConfig]:
    """Return the configuration that another package has for a scheme."""
    from importlib.metadata import entry_points  # some 30 ms: for those who need it only

    points = entry_points(group=GROUP)
    known = f"there are {', '.join(sorted({*BUILT_IN, *points.names}))}"
    found = {point.value: point for point in points if point.name == scheme}
    if not found:
        raise ConfigurationError("provider", f"unknown scheme {scheme!r}; {known}")
    if len(found) > 1:
        raise ConfigurationError("provider", f"scheme {scheme!r} is announced twice: {' and '.join(sorted(found))}")
    (point,) = found.values()
    try:
        cls = point.load()
    except Exception as error:
        raise ConfigurationError(
            "provider",
            f"{point.value}, for scheme {scheme!r}, cannot be imported ({type(error).__name__}: {error}); {known}",
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, ProviderConfig)) or getattr(cls, "scheme", None) != scheme:
        raise ConfigurationError(
            "provider", f"{point.value} is no subclass of ProviderConfig with the scheme {scheme!r}; {known}"
        )
    return cls


def _parsed(name: str, text: str, hint: Any) -> Any:
    """Read the text of a setting as the type that its field is declared with."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    try:
        if bool in options:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if int in options:
            return int(text)
        if float in options:
            return float(text)
    except (ValueError, KeyError):
        raise ConfigurationError(name, f"cannot read {text!r} as {getattr(options[0], '__name__', hint)}") from None
    if typing.get_origin(hint) is tuple:
        return tuple(part for part in text.split(",") if part)
    return text
