"""What is shipped: an sdist that builds from scratch, and a wheel with what it needs and nothing else."""

import email.parser
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of what git knows, and the wheel that is built from the sdist alone, in a path with spaces."""
    source = tmp_path_factory.mktemp("a checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run("-m", "build", "--no-isolation", "--sdist", "--outdir", "dist", cwd=source)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    unpacked = tmp_path_factory.mktemp("un packed")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (tree,) = unpacked.iterdir()
    compiler = tmp_path_factory.mktemp("quick") / "cc"  # what is in the wheel is asked here, not how fast it is
    compiler.write_text('#!/bin/sh\nexec gcc "$@" -O0\n')
    compiler.chmod(0o755)
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", unpacked / "dist", cwd=tree, CC=str(compiler))
    (wheel,) = (unpacked / "dist").glob("*.whl")
    return sdist, wheel


@pytest.mark.timeout(600)
def test_the_sdist_holds_sources_and_no_generated_ones(shipped: tuple[Path, Path]) -> None:
    with tarfile.open(shipped[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "queue_runtime/_core/ring.h"} <= names
    assert {f"queue_runtime/_core/{module}.pyx" for module in ("mpcc", "batch", "envelope", "engine")} <= names
    assert not [name for name in names if name.startswith("queue_runtime") and name.endswith((".c", ".so"))]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in tracked if not name.startswith(".")} <= names


@pytest.mark.timeout(600)
def test_the_wheel_holds_what_is_run_and_typed(shipped: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(shipped[1]) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
        metadata = email.parser.Parser().parsestr(
            archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
        )
    kinds = {Path(name).suffix for name in names if name.startswith("queue_runtime/")}
    assert kinds == {".py", ".pyi", ".so", ".typed"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "queue_runtime").rglob("*.py*") if path.suffix != ".pyc"}
    assert {name for name in sources if not name.endswith(".pyx")} == {n for n in names if n.endswith((".py", ".pyi"))}
    compiled = {Path(name).name.split(".")[0] for name in names if name.endswith(".so")}
    assert compiled == {path.stem for path in (ROOT / "queue_runtime" / "_core").glob("*.pyx")}
    assert {name.split("/")[0] for name in names} == {
        "queue_runtime",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    required = [name for name in metadata.get_all("Requires-Dist") or [] if "extra ==" not in name]
    assert required == [], "light to install"
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert {"azure", "sqs", "metrics", "tracing", "cli", "bench", "uvloop", "all"} <= extras
    code = "import queue_runtime; print(queue_runtime.__file__, queue_runtime.MPCC)"
    assert str(tmp_path) in run("-c", code, cwd=tmp_path)


def test_without_its_compiled_core_the_package_says_what_to_run(tmp_path: Path) -> None:
    for path in (ROOT / "queue_runtime").rglob("*.py"):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    done = subprocess.run([sys.executable, "-c", "import queue_runtime"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install" in done.stderr.splitlines()[-1]
