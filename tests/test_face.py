"""The public face: one sorted list, the same for the interpreter and for type checkers, every name documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import queue_runtime
from queue_runtime import errors

STUB = Path(queue_runtime.__file__).with_suffix(".pyi")


def test_the_list_is_sorted_and_the_stub_says_the_same() -> None:
    assert list(queue_runtime.__all__) == sorted(queue_runtime.__all__)
    homes: dict[str, str] = {}
    listed: list[str] = []
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            homes |= {alias.name: (node.module or "").removeprefix("queue_runtime.") for alias in node.names}
        if isinstance(node, ast.Assign):
            listed = ast.literal_eval(node.value)
    assert homes == queue_runtime._HOME  # type: ignore[attr-defined]
    assert listed == list(queue_runtime.__all__)


@pytest.mark.parametrize("name", queue_runtime.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(queue_runtime, name)
    assert name in dir(queue_runtime)
    if inspect.isclass(value) or inspect.isroutine(value):
        assert (inspect.getdoc(value) or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="QueueClint"):
        queue_runtime.QueueClint  # type: ignore[attr-defined]  # noqa: B018


def test_the_short_name_is_the_long_one() -> None:
    assert queue_runtime.MPCC is queue_runtime.MultiProducerConcurrentConsumer


def test_errors_are_all_at_the_face() -> None:
    tree = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert tree <= set(queue_runtime.__all__)


def test_the_envelope_loads_no_event_loop() -> None:
    code = "import sys, queue_runtime; queue_runtime.encode_envelope; print('asyncio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
