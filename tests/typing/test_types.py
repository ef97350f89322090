"""The package under mypy's strict rules, the stubs against the compiled modules, and the answers users get."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILED = sorted(path.stem for path in (ROOT / "queue_runtime" / "_core").glob("*.pyx"))


def run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_package_and_answers_are_strictly_typed() -> None:
    run("mypy", "--strict", "queue_runtime", "tests/typing/answers.py")


@pytest.mark.timeout(300)
def test_stubs_say_what_the_compiled_modules_do() -> None:
    assert COMPILED
    run("mypy.stubtest", "--ignore-missing-stub", *(f"queue_runtime._core.{name}" for name in COMPILED))


@pytest.mark.timeout(300)
def test_style() -> None:
    run("ruff", "check", ".")
    run("ruff", "format", "--check", ".")
