"""The pages on consumers and on failures say what is so: their programs run, and print what is shown."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from queue_runtime.config import config_from_url
from queue_runtime.retry import ExponentialRetry, FixedRetry, LinearRetry, NoRetry

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = {name: (DOCS / name).read_text() for name in ("consumer.md", "resilience.md")}
ALL = "".join(PAGES.values())
PROGRAMS = re.findall(r"^```python\n(# (\w+\.py)\n.*?)^```\n\n```text\n(.*?)^```$", ALL, re.M | re.S)


def test_every_program_is_found() -> None:
    assert len(PROGRAMS) == ALL.count("```python") == ALL.count("```text") == 8


@pytest.mark.parametrize(("code", "name", "shown"), PROGRAMS, ids=[name for _, name, _ in PROGRAMS])
def test_a_program_prints_what_is_shown(code: str, name: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(code)
    done = subprocess.run([sys.executable, name], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (shown, "")


def test_the_table_of_policies() -> None:
    rows = re.findall(r"^\| `(retry=\S+)` \| `(\w+\(.*?\))` \|", PAGES["resilience.md"], re.M)
    names = {policy.__name__: policy for policy in (ExponentialRetry, FixedRetry, LinearRetry, NoRetry)}
    assert len(rows) == 4
    for text, code in rows:
        assert config_from_url(f"memory://?{text}").retry == eval(code, names)
