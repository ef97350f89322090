"""The compiled core. Its modules know no provider and no event-loop policy; README.md here defines the words."""

from importlib.util import find_spec

if find_spec("queue_runtime._core.mpcc") is None:
    raise ImportError("queue_runtime has no compiled core here: run `pip install --editable .` in its checkout")
