"""The envelope's C reader and writer, as shipped, over hostile bytes under AddressSanitizer and UBSan."""

import re
import subprocess
from pathlib import Path

from queue_runtime._core.envelope import encode_envelope
from queue_runtime.message import Message

HERE = Path(__file__).resolve().parent
CORE = HERE.parents[1] / "queue_runtime" / "_core"
SEEDS = [
    Message(body=b""),
    Message(
        body=b"x" * 300,
        attributes={f"name {number}": "v" * number for number in range(20)} | {"naïve": "€𝄞"},
        session_id="a session",
        correlation_id="ü" * 40,
        content_type="text/plain",
        time_to_live=3600,
        delay=1.5,
        deduplication_id="d" * 300,
    ),
    Message(body=b"abc", attributes={"kind": "order"}, time_to_live=1e-6, deduplication_id="1"),
]


def test_wire_fuzz(tmp_path: Path) -> None:
    program = tmp_path / "wire_fuzz"
    flags = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(
        ["gcc", *flags, f"-I{CORE}", str(HERE / "wire_fuzz.c"), "-o", str(program)],
        check=True,
    )
    seeds = []
    for number, message in enumerate(SEEDS):
        seeds.append(tmp_path / f"seed{number}")
        seeds[-1].write_bytes(encode_envelope(message))
    done = subprocess.run([program, "20000", *seeds], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    counts = re.fullmatch(r"(\d+) accepted, (\d+) refused\n", done.stdout)
    assert counts
    assert int(counts[1]) > 1000
    assert int(counts[2]) > 20_000
