"""The soak itself, for two seconds: it watches, draws, and accounts for every message."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_short_soak(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.soak", "--minutes", "0.034", "--rate", "2000", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flat; every message accounted for" in done.stdout
    (details,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(details["samples"]) >= 2
    assert sum(account["completed"] for account in details["accounts"]) > 100
    for account in details["accounts"]:
        assert account["violations"] == []
        assert account["sent"] == account["completed"] + account["dead letters"] + account["left"]
    (picture,) = tmp_path.glob("*.png")
    assert picture.stat().st_size > 10_000
