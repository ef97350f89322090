"""How to reach a broker, and what its queues are to be like."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from queue_runtime.config import ProviderConfig, Seconds, choice, flag, seconds
from queue_runtime.errors import ConfigurationError

OF_THE_SPACE = (
    "capacity",
    "on_full",
    "auto_create",
    "queues",
    "lock_duration",
    "session_lock_duration",
    "max_delivery_count",
    "dead_letter_on_expiration",
    "deduplication_window",
    "max_message_size",
    "manual_clock",
)
"""Settings that the broker gets, where they are given. All who share a space must give the same."""
REMOVABLE = (
    "sessions",
    "session_state",
    "peek",
    "defer",
    "deduplication",
    "abandon_delay",
    "sequence_numbers",
    "dead_letter_on_expiration",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig(ProviderConfig):
    """Queues in another process, through a Unix-domain socket.

    Parameters
    ----------
    path:
        The socket of the broker.
    space:
        Queues of different spaces have nothing to do with each other, so that tests can share a broker.
    linger:
        Seconds for which a lost connection's receivers and locks are kept for its return; 0 releases them at once.
    receivers:
        What becomes of a receiver without a session whose connection was lost: ``reopen`` it, or ``end`` it with
        ClosedError. A session is lost in either case.
    without:
        Capabilities to declare as absent.
    max_delay:
        The longest delay that is declared; 0 stands for any.
    connect_timeout, request_timeout:
        Seconds for a connection and, beside the time that a receive may wait, for an answer.
    retry_after:
        Seconds that the ConnectionFailedErrors ask for.

    manual_clock:
        Whether the time of the space stands still but for ``advance``. The first one who uses the space decides.

    The rest are settings of ``InMemoryConfig`` for the queues of the space, each None: the broker's own.
    """

    scheme: ClassVar[str] = "remote"
    provider: ClassVar[str] = "remote.provider:RemoteProvider"

    path: str = ""
    space: str = "default"
    linger: Seconds = 0.0
    receivers: str = "reopen"
    without: tuple[str, ...] = ()
    max_delay: Seconds = 0.0
    connect_timeout: Seconds = 2.0
    request_timeout: Seconds = 10.0
    retry_after: Seconds = 0.05

    manual_clock: bool = False
    capacity: int | None = None
    on_full: str | None = None
    auto_create: bool | None = None
    queues: tuple[str, ...] = ()
    lock_duration: float | None = None
    session_lock_duration: float | None = None
    max_delivery_count: int | None = None
    dead_letter_on_expiration: bool | None = None
    deduplication_window: float | None = None
    max_message_size: int | None = None

    def __post_init__(self) -> None:
        ProviderConfig.__post_init__(self)
        if not self.path:
            raise ConfigurationError("path", "must name the broker's socket, as in remote:///tmp/broker.sock")
        choice("receivers", self.receivers, ("reopen", "end"))
        for field in ("linger", "max_delay", "connect_timeout", "request_timeout", "retry_after"):
            self._set(field, seconds(field, getattr(self, field)))
        for name in self.without:
            choice("without", name, REMOVABLE)
        flag("manual_clock", self.manual_clock)

    @property
    def of_the_space(self) -> dict[str, Any]:
        """The settings that the broker is told."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: given[name] for name in OF_THE_SPACE if given[name] not in (None, ())}

    @classmethod
    def read_location(cls, host: str, path: str) -> dict[str, Any]:
        if host:
            raise ConfigurationError("provider", "a remote URL is remote:///path/of/the/socket?setting=value")
        return {"path": path}
