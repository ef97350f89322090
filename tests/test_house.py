"""The house rules that a machine can check: who may import whom, sizes, orders that say why."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "queue_runtime"
MODULES = sorted(PACKAGE.rglob("*.py"))
CORE = PACKAGE / "_core"

# From the cellar to the roof. A module imports from lower floors, and from its own only where this says so.
FLOORS = [
    {"errors", "clock", "watchdog"},
    {"_core"},
    {"message", "settings"},
    {"arguments", "bodies", "breaker", "retry", "runtime"},
    {"config", "providers.base"},
    {"providers.disk", "schedule"},
    {"providers.memory", "providers.store"},
    {"providers", "providers.durable"},
    {"idempotency_sqlite", "renewal", "room", "scaling", "sending", "settlement"},
    {"dlq", "links", "pressure", "progress", "scaler", "sessions"},
    {"control", "health"},
    {"client"},
    {"calling", "context"},
    {"middleware"},
    {"handling", "idempotency"},
    {"runner"},
    {"intake"},
    {"feeds"},
    {"session_feed"},
    {"vitals"},
    {"consumer"},
    {"processors"},
    {""},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SDKS = {"azure", "aiobotocore", "botocore", "boto3", "prometheus_client", "opentelemetry"}
SOLE_IMPORTERS = {"click": "cli", "rich": "cli", "uvloop": "runtime"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The name in FLOORS that a module belongs to."""
    for depth in range(module.count(".") + 1, 0, -1):
        prefix = ".".join(module.split(".")[:depth])
        if prefix in FLOOR_OF:
            return prefix
    return module


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Every imported module, and whether only for type checkers."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, typing_only: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            typing_only = True
        if isinstance(node, ast.Import):
            found.extend((alias.name, typing_only) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module or "", typing_only))
        for child in ast.iter_child_nodes(node):
            visit(child, typing_only)

    visit(ast.parse(path.read_text()), False)
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    here = room_of(name_of(path))
    assert here in FLOOR_OF, f"{here} has no floor: give it one in FLOORS"
    for module, typing_only in imports_of(path):
        if module.split(".")[0] != "queue_runtime" or typing_only:
            continue
        there = room_of(module.removeprefix("queue_runtime").lstrip("."))
        same_room = here == there
        assert same_room or FLOOR_OF[there] < FLOOR_OF[here], f"{here} imports {there}, which is not below it"


def test_every_floor_is_lived_on() -> None:
    assert set(FLOOR_OF) == {room_of(name_of(path)) for path in MODULES}


@pytest.mark.parametrize("path", sorted(CORE.glob("*.pyx")), ids=lambda path: path.name)
def test_the_core_knows_only_errors(path: Path) -> None:
    for line in path.read_text().splitlines():
        if match := re.match(r"\s*(?:from|c?import)\s+(queue_runtime[\w.]*)", line):
            assert match[1] == "queue_runtime.errors" or match[1].startswith("queue_runtime._core"), line


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_an_sdk_has_one_importer(path: Path) -> None:
    for module, _ in imports_of(path):
        top = module.split(".")[0]
        assert top not in SDKS, f"{name_of(path)} imports {module}"
        if top in SOLE_IMPORTERS:
            assert room_of(name_of(path)) == SOLE_IMPORTERS[top], f"{name_of(path)} imports {module}"


def test_no_file_is_too_long() -> None:
    """About 500 lines; a reader keeps no more in mind."""
    suffixes = {".py", ".pyx", ".pxd", ".pyi", ".h"}
    files = [path for path in PACKAGE.rglob("*") if path.suffix in suffixes]
    assert len(files) > 20
    long = {str(path.relative_to(ROOT)): count for path in files if (count := len(path.read_text().splitlines())) > 560}
    assert not long


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_constructors_are_small(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            count = len(node.args.args) - 1 + len(node.args.kwonlyargs)
            assert count <= 8, f"{path}:{node.lineno} takes {count} parameters"


def test_every_compiled_module_has_its_stub() -> None:
    assert {path.stem for path in CORE.glob("*.pyx")} == {path.stem for path in CORE.glob("*.pyi")}


def test_there_is_no_utils_room() -> None:
    assert not [path for path in PACKAGE.rglob("*") if re.search(r"util|helper|common|misc", path.stem)]


def test_no_atomic_is_bare() -> None:
    """Orders are named and explained in the header (test_native shows that each is needed); no .pyx has any."""
    ring = (CORE / "ring.h").read_text()
    orders = re.findall(r"#define (QR_ORD_\w+)", ring)
    assert orders
    for order in orders:
        definition = ring.index(f"#ifndef {order}")
        assert ring[:definition].rstrip().endswith("*/"), f"{order} has no comment above it"
    for path in [*CORE.glob("*.pyx"), *CORE.glob("*.pxd")]:
        assert "stdatomic" not in path.read_text()
        assert "atomic_thread_fence" not in path.read_text()


def test_no_generated_c_is_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in tracked if name.startswith("queue_runtime/") and name.endswith((".c", ".so", ".pxi"))]


def test_the_import_loads_no_extra() -> None:
    """Not even when every public name is used."""
    code = (
        "import sys, queue_runtime\n"
        "[getattr(queue_runtime, name) for name in queue_runtime.__all__]\n"
        "print(' '.join({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"queue_runtime", "asyncio"} <= loaded
    assert not loaded & {*SDKS, *SOLE_IMPORTERS, "aiohttp", "msgpack", "msgspec"}
