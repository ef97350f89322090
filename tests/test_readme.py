"""The README says what is so: its code runs or at least parses, its names and links exist, its output is real."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import queue_runtime

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"), ROOT / "queue_runtime/_core/README.md"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_the_twenty_lines_are_the_example_and_print_what_is_shown() -> None:
    example = ROOT / "examples" / "quickstart.py"
    assert example.read_text() in blocks("python")
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=True)
    assert f"$ python examples/quickstart.py\n{done.stdout}" in blocks("console")


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.split("\n")[0][:40])
def test_every_block_of_python_parses_and_imports_what_exists(block: str) -> None:
    wrapped = "async def block():\n" + "".join(f"    {line}\n" for line in block.splitlines())
    for node in ast.walk(ast.parse(wrapped)):
        if isinstance(node, ast.ImportFrom) and node.module == "queue_runtime":
            for alias in node.names:
                assert alias.name in queue_runtime.__all__


def headings(page: Path) -> list[str]:
    """As GitHub makes links of them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
            assert not heading or heading in headings(page.parent / target), f"{target}#{heading}"


def test_the_run_output_is_that_of_the_command() -> None:
    """Its shape, that is: ids and times differ from run to run."""
    (shown,) = [block for block in blocks("console") if "send to settled" in block]
    command = "run webhooks:handle --provider memory:// --queue webhooks --feed webhooks.jsonl --session-key"
    done = subprocess.run(
        [sys.executable, "-m", "queue_runtime", *command.split(), "repository.full_name,pull_request.number"],
        cwd=ROOT / "examples",
        capture_output=True,
        text=True,
        check=True,
    )

    def labels(text: str) -> list[str]:
        return re.findall(r"^(\w[\w -]*?) {2,}\S", text, re.M)

    assert labels(done.stdout)[:9] == labels(shown)[:9]
    for certain in ("422 completed, 1 dead-lettered, none left", "36, taken ", "1: SignatureMismatch (1)"):
        assert certain in done.stdout
        assert certain in shown
