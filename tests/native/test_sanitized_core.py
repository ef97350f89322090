"""The compiled modules under AddressSanitizer and UndefinedBehaviorSanitizer, below their own tests.

They are built once more, without optimization, into a temporary directory; then a second Python runs tests of the core
on them. What a sanitizer finds is in the failure. Nothing is skipped: without gcc and its sanitizers it fails.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TESTS = [["tests/core"], ["tests/providers", "tests/test_message.py"]]  # side by side
# These cost half of the time, and walk where the others walk: a million messages, and a broker in another process.
LEFT_OUT = [
    "--deselect=tests/core/test_engine_rules.py::test_p9_a_million_messages_in_and_out_leave_no_memory_behind",
    "--ignore=tests/providers/test_contract_remote.py",
]

# Last on the line, and so above what setup.py asks for.
FLAGS = "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package in it, its modules instrumented."""
    home = tmp_path_factory.mktemp("sanitized")
    compiler = home / "cc"
    compiler.write_text(f'#!/bin/sh\nexec gcc "$@" {FLAGS}\n')
    compiler.chmod(0o755)
    sources = shutil.ignore_patterns("*.so", "*.c", "*.pyx", "*.pxd", "*.h", "__pycache__")
    shutil.copytree(ROOT / "queue_runtime", home / "lib" / "queue_runtime", ignore=sources)
    places = ["--build-lib", str(home / "lib"), "--build-temp", str(home / "objects")]
    build = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--parallel", "2", *places],
        cwd=ROOT,
        env=os.environ | {"CC": str(compiler), "LDSHARED": f"{compiler} -shared"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    return home


def python(home: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run Python on the instrumented modules; how it ended, and what the sanitizers reported."""
    library = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    # CPython keeps some memory to its end on purpose; references have tests of their own. The reports go to files,
    # where no test's capture hides them, and from a child process too.
    reports = Path(tempfile.mkdtemp(prefix="reports", dir=home))
    report = f"log_path={reports}/of"
    environment = os.environ | {
        "LD_PRELOAD": library.stdout.strip(),
        "ASAN_OPTIONS": f"detect_leaks=0:{report}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{report}",
        "PYTHONMALLOC": "malloc",  # an object to a block, so that the sanitizer knows which are freed
        "PYTHONPATH": str(home / "lib"),
        "PYTHONSAFEPATH": "1",  # or else the package in the working directory comes first
        "PYTHONDONTWRITEBYTECODE": "1",
        "QUEUE_RUNTIME_KILLS": "20",  # each of them starts anew what is slow here
    }
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done, "\n".join(path.read_text(errors="replace") for path in reports.iterdir())


@pytest.mark.timeout(600)  # a minute on two cores that have nothing else to do
def test_the_core_is_clean(sanitized: Path) -> None:
    def under_test(tests: list[str]) -> tuple[subprocess.CompletedProcess[str], str]:
        return python(sanitized, "-m", "pytest", "-q", "-p", "no:cacheprovider", *LEFT_OUT, *tests)

    with ThreadPoolExecutor() as pool:
        for done, found in pool.map(under_test, TESTS):
            assert not found, found
            assert done.returncode == 0, done.stdout + done.stderr
            assert " passed" in done.stdout.splitlines()[-1]


@pytest.mark.timeout(600)
def test_it_would_be_seen_if_it_were_not(sanitized: Path) -> None:
    modules = sorted((sanitized / "lib" / "queue_runtime" / "_core").glob("*.so"))
    assert len(modules) == len(list((ROOT / "queue_runtime" / "_core").glob("*.pyx")))
    for module in modules:
        assert b"__asan_report_load8" in module.read_bytes(), f"{module.name} is not instrumented"
    read_beyond = (
        "import ctypes, queue_runtime._core.engine as engine; print(engine.__file__, flush=True);"
        "ctypes.string_at(id(object()) - 64, 4096)"
    )
    bad, found = python(sanitized, "-c", read_beyond)
    assert str(sanitized) in bad.stdout
    assert bad.returncode != 0
    assert "AddressSanitizer" in found
