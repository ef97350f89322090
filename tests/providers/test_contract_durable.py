"""The in-memory provider with a journal under the whole contract, for each way to sync [C47]."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from contract_whole import WholeContract
from test_contract_memory import NAMES, MemoryHarness

from queue_runtime.client import QueueClient
from queue_runtime.sessions import SessionKey


class DurableHarness(MemoryHarness):
    def __init__(self, directory: Path, fsync: str) -> None:
        super().__init__("auto")
        self.directory = directory
        self.fsync = fsync

    def client(self, session_key: SessionKey | None = None, **settings: Any) -> QueueClient:
        kept = {"path": self.directory / f"{next(NAMES)}", "fsync": self.fsync}
        return super().client(session_key, **kept, **settings)


@pytest.fixture(params=["always", "interval"])
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DurableHarness]:
    harness = DurableHarness(tmp_path, request.param)
    yield harness
    await harness.close()


class TestContract(WholeContract):
    pass
