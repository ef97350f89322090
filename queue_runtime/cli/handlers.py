"""Finds the handler that ``run`` was given as ``module:function``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from types import ModuleType, TracebackType

import click

from queue_runtime.cli.failure import Failure
from queue_runtime.handling import Handler


def load_handler(spec: str) -> Handler:
    """Import the module, from the current directory first, and return its function.

    Raises click.BadParameter when ``spec`` has another form, and Failure when there is no such module or function or
    the module cannot be imported; then with the module's own traceback, shortened.
    """
    module_name, colon, path = spec.partition(":")
    if module_name.endswith(".py") or "/" in module_name or os.sep in module_name:
        directory, file = os.path.split(module_name)
        where = f" from its directory, {directory}" if directory else ""
        raise click.BadParameter(
            f"{spec!r} names a file; give the module, {file.removesuffix('.py')}:{path or 'FUNCTION'}{where}",
            param_hint="HANDLER",
        )
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")]):
        raise click.BadParameter(f"must be module:function, not {spec!r}", param_hint="HANDLER")
    found: object = _import(module_name)
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise Failure(_no_such(found, part)) from None
    if not callable(found) or inspect.isclass(found):
        raise Failure(f"{spec} is no function of a message, but {_kind(found)}")
    return found


def _import(name: str) -> ModuleType:
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise Failure(f"there is no module {error.name!r} in {directory} or on Python's path") from None
        raise _broken(name, error) from error
    except (Exception, SystemExit) as error:
        raise _broken(name, error) from error


def _broken(name: str, error: BaseException) -> Failure:
    """The module's own part of the traceback: from the first frame outside the import machinery."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and _is_machinery(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    told = "".join(traceback.format_exception(type(error), error.with_traceback(trace), trace, limit=-3, chain=False))
    return Failure(f"the module {name!r} cannot be imported:\n{told.rstrip()}")


def _is_machinery(file: str) -> bool:
    return file == __file__ or file == importlib.__file__ or file.startswith("<frozen importlib")


def _no_such(owner: object, name: str) -> str:
    what = f"the module {owner.__name__!r}" if isinstance(owner, ModuleType) else repr(type(owner).__name__)
    names = [key for key in dir(owner) if not key.startswith("_") and callable(getattr(owner, key, None))]
    close = difflib.get_close_matches(name, names, n=1)
    return f"{what} has no {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _kind(found: object) -> str:
    return f"the class {found.__name__}" if inspect.isclass(found) else f"of type {type(found).__name__}"
