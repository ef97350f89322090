"""Providers of other packages: found by entry point, imported only when asked for, and named when they are broken."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from queue_runtime.client import QueueClient
from queue_runtime.clock import SystemClock
from queue_runtime.config import InMemoryConfig, ProviderConfig, config_from_url
from queue_runtime.errors import ConfigurationError
from queue_runtime.message import Message
from queue_runtime.providers import open_provider

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from queue_runtime.config import InMemoryConfig, ProviderConfig

@dataclass(frozen=True, slots=True, kw_only=True)
class OtherConfig(ProviderConfig):
    scheme: ClassVar[str] = "other"
    provider: ClassVar[str] = "other_provider:opened"
    place: str = ""
    depth: int = 3

    @classmethod
    def read_location(cls, host, path):
        return {"place": host + path}

def opened(config, *, clock):
    from queue_runtime.providers.memory import InMemoryProvider
    return InMemoryProvider(InMemoryConfig(capacity=config.depth), clock=clock)

@dataclass(frozen=True, slots=True, kw_only=True)
class PlainConfig(ProviderConfig):
    scheme: ClassVar[str] = "plain"

function = print
"""
POINTS = """[queue_runtime.providers]
other = other_provider:OtherConfig
plain = other_provider:PlainConfig
absent = not_there.at_all:Config
nameless = other_provider:Nothing
function = other_provider:function
wrong = other_provider:OtherConfig
"""
KNOWN = "there are absent, function, memory, nameless, other, plain, (remote, )?wrong"
"""With the one of these tests, where their folder is on the path."""


def install(folder: Path, name: str, points: str) -> None:
    """Lay down what pip would, so far as entry points are concerned."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "other_provider.py").write_text(PLUGIN)
    install(tmp_path, "other_provider", POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other_provider", raising=False)
    return tmp_path


def test_a_plug_in_is_found_by_its_scheme(site: Path) -> None:
    assert config_from_url("memory://orders") == InMemoryConfig(name="orders")
    assert "other_provider" not in sys.modules, "imported when it is asked for"
    config: Any = config_from_url("other://a%20host/b/c?depth=2&prefetch=7")
    assert (config.scheme, config.place, config.depth, config.prefetch) == ("other", "a host/b/c", 2, 7)
    assert QueueClient(config).provider_name == "memory"


async def test_a_configuration_opens_its_provider(site: Path) -> None:
    import other_provider  # type: ignore[import-not-found]

    async with QueueClient(other_provider.OtherConfig(depth=1)) as client:
        await client.send_message("q", Message(body=b"x"))
        with pytest.raises(Exception, match="full"):
            await client.send_message("q", Message(body=b"y"))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("nowhere://hunter2", f"unknown scheme 'nowhere'; {KNOWN}"),
        (
            "absent://hunter2",
            r"not_there\.at_all:Config, for scheme 'absent', cannot be imported \(ModuleNotFound",
        ),
        ("absent://hunter2", KNOWN),
        ("nameless://", r"other_provider:Nothing, for scheme 'nameless', cannot be imported \(AttributeError"),
        ("function://", "other_provider:function is no subclass of ProviderConfig with the scheme 'function'"),
        ("wrong://", f"other_provider:OtherConfig is no subclass of ProviderConfig with the scheme 'wrong'; {KNOWN}"),
        ("other://user:hunter2@host", "an? other URL has neither a user"),
        ("other://host#hunter2", "neither"),
        ("plain://hunter2", r"a plain URL is plain://\?setting=value"),
        ("plain:///hunter2", r"a plain URL is plain://\?setting=value"),
    ],
)
def test_what_is_broken_is_named(site: Path, url: str, problem: str) -> None:
    """[C32, C33] With what there is, and without the URL, which may hold a secret."""
    with pytest.raises(ConfigurationError, match=problem) as caught:
        config_from_url(url)
    assert caught.value.field == "provider"
    assert "hunter2" not in str(caught.value)


def test_a_bad_setting_of_a_plug_in_is_named(site: Path) -> None:
    for url, field in (("other://?depth=x", "depth"), ("other://?colour=red", "colour"), ("other://?place=b", "place")):
        with pytest.raises(ConfigurationError) as caught:
            config_from_url(url)
        assert caught.value.field == field
    assert config_from_url("plain://") == config_from_url("plain:///")


def test_two_packages_for_one_scheme(site: Path) -> None:
    install(site, "another", "[queue_runtime.providers]\nother = another:Config\nplain = other_provider:PlainConfig\n")
    with pytest.raises(ConfigurationError, match="'other' is announced twice: another:Config and other_provider:Other"):
        config_from_url("other://")
    assert config_from_url("plain://").scheme == "plain", "the same one twice, as an editable install may show it"
    install(site, "memory", "[queue_runtime.providers]\nmemory = another:Config\n")
    assert config_from_url("memory://") == InMemoryConfig(), "a built-in scheme is not taken over"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (None, "must be 'module:name'"),
        ("module_without_a_name", "must be 'module:name'"),
        (
            "not_there.at_all:Provider",
            r"not_there\.at_all:Provider, of Broken, cannot be imported \(ModuleNotFound",
        ),
        ("queue_runtime.config:Nothing", "queue_runtime.config:Nothing, of Broken, cannot be imported"),
    ],
)
def test_a_provider_that_cannot_be_opened(name: str | None, problem: str) -> None:
    """[C33]"""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Broken(ProviderConfig):
        scheme: ClassVar[str] = "broken"

    if name is not None:
        Broken.provider = name
    for make in (lambda: QueueClient(Broken()), lambda: open_provider(Broken(), SystemClock())):
        with pytest.raises(ConfigurationError, match=problem) as caught:
            make()
        assert caught.value.field == "provider"


def test_the_command_finds_plug_ins(site: Path) -> None:
    """And says in one sentence when there is none."""

    def run(url: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "queue_runtime", "peek", "q", "--provider", url]
        return subprocess.run(command, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False)

    assert run("other://").returncode == 0
    failed = run("nowhere://")
    assert failed.returncode == 3
    assert failed.stderr.count("\n") == 1
    assert re.search(KNOWN, failed.stderr)
