"""The public face: one sorted list, every name documented, nothing missing."""

import inspect
import types

import queue_runtime


def test_the_list_is_sorted_and_whole() -> None:
    assert queue_runtime.__all__ == sorted(queue_runtime.__all__)
    found = {
        name
        for name, value in vars(queue_runtime).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert found | {"__version__"} == set(queue_runtime.__all__)


def test_every_name_is_documented() -> None:
    for name in queue_runtime.__all__:
        value = getattr(queue_runtime, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert (inspect.getdoc(value) or "").strip(), f"{name} has no docstring"


def test_the_short_name_is_the_long_one() -> None:
    assert queue_runtime.MPCC is queue_runtime.MultiProducerConcurrentConsumer


def test_errors_are_all_at_the_face() -> None:
    from queue_runtime import errors

    tree = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert tree <= set(queue_runtime.__all__)
