"""The shipped C headers under sanitizers and in a model of weak memory; mutants prove that both see a weaker order.

``README.md`` beside this file tells how to read it. Nothing here is skipped: without gcc and its sanitizers it fails.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CORE = HERE.parent.parent / "queue_runtime" / "_core"
RING = (CORE / "ring.h").read_text()
ORDERS: dict[str, str] = dict(re.findall(r"^#define (QR_ORD_\w+) memory_order_(\w+)$", RING, re.MULTILINE))

RACE = "a race on a plain variable"
LOST_WAKE = "a thread sleeps for ever: a wake was lost"
NO_ROOM = "a producer sleeps beside a ring with room"

# order: (scene of ring_orders.c that has a race without it, scenario of ring_model.c that breaks, how it breaks).
CAUGHT_BY = {
    "QR_ORD_CELL_STORE": ("cell", "wake", RACE),
    "QR_ORD_CELL_LOAD": ("cell", "wake", RACE),
    "QR_ORD_HEAD_STORE": ("head", "lap", RACE),
    "QR_ORD_HEAD_LOAD": ("head", "lap", RACE),
    "QR_ORD_LIMIT_STORE": ("limit", "limit", RACE),
    "QR_ORD_LIMIT_LOAD": ("limit", "limit", RACE),
    "QR_ORD_CLAIM": ("wake", "wake", LOST_WAKE),
    "QR_ORD_ARM": ("wake", "wake", LOST_WAKE),
    "QR_ORD_DRAIN_TRY": ("drain", "drop", RACE),
    "QR_ORD_DRAIN_END": ("drain", "drop", RACE),
    "QR_ORD_WAIT_BEGIN": ("wait", "lap", NO_ROOM),
    "QR_ORD_WAIT_LOOK": ("wait", "lap", NO_ROOM),
    "QR_ORD_BELL_POST": ("bell", "bell", RACE),
    "QR_ORD_BELL_ANSWER": ("bell", "bell", RACE),
}

# Orders of read-modify-writes, which C11 lets be the other half of the pair by mistake.
HALVES = {
    order: {"acquire": "release", "release": "acquire"}[ORDERS[order]]
    for order in CAUGHT_BY
    if re.search(rf"qr_(cas_weak|exchange|fetch_\w+)\([^;]*\b{order}\b", RING)
}

# What a slip of the pen would do to ring.h: text, what takes its place, scenario that breaks, how it breaks.
SLIPS = {
    "the watermark is one late": ("wake_at <= start + count", "wake_at < start + count", "wake", LOST_WAKE),
    "the tail is read before the watermark is stored": (
        "qr_store(&ring->wake_at, wake_at, memory_order_relaxed);\n"
        "    return qr_fetch_add(&ring->tail, 0, QR_ORD_ARM) & QR_POSITION;",
        "uint64_t tail = qr_fetch_add(&ring->tail, 0, QR_ORD_ARM) & QR_POSITION;\n"
        "    qr_store(&ring->wake_at, wake_at, memory_order_relaxed);\n"
        "    return tail;",
        "wake",
        LOST_WAKE,
    ),
    "a closed ring is not looked at": (
        "if (QR_UNLIKELY(tail & QR_CLOSED)) return QR_SHUT;",
        "",
        "close",
        "a claim succeeded after the close",
    ),
    "a full ring takes one more": (
        "if (tail + count > limit) return QR_FULL;",
        "if (tail + count > limit + 1) return QR_FULL;",
        "lap",
        "",
    ),
    "a taken cell is not emptied": ("qr_store(cell, NULL, memory_order_relaxed);", "", "lap", "taken twice"),
    "a drain ends without saying so": (
        "qr_store(&ring->draining, 0, QR_ORD_DRAIN_END);",
        "(void)ring;",
        "drop",
        "the consumer's flag was left behind",
    ),
    "the bell is answered without taking the flag": (
        "(void)qr_exchange(&bell->posted, 0, QR_ORD_BELL_ANSWER);",
        "(void)qr_load(&bell->posted, QR_ORD_BELL_ANSWER);",
        "bell",
        RACE,
    ),
}


def build(folder: Path, source: str, *flags: str, core: Path = CORE) -> Path:
    """Compile one harness over the headers in ``core``; fail, never skip, where that cannot be done."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.fail("these tests need gcc (Debian, Ubuntu: apt-get install gcc)", pytrace=False)
    program = folder / Path(source).stem
    command = [compiler, "-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    done = subprocess.run(
        [*command, f"-I{core}", *flags, str(HERE / source), "-o", str(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(
            f"gcc {' '.join(flags)} does not build {source} (if a sanitizer's library is missing: libtsan, libasan and "
            f"libubsan come with gcc on most systems):\n{done.stderr}",
            pytrace=False,
        )
    return program


def run(program: Path, *arguments: str) -> tuple[int, str]:
    """Run it; its exit code and all that it printed."""
    settings = {"TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "exitcode=66:detect_leaks=1", "UBSAN_OPTIONS": ""}
    command = [str(program), *arguments]

    def once(command: list[str]) -> tuple[int, str]:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **settings}
        )
        return done.returncode, done.stdout + done.stderr

    code, printed = once(command)
    if "unexpected memory mapping" in printed or "Shadow memory range interleaves" in printed:
        # Where the kernel places programs at more random addresses than this sanitizer knows how to live with.
        setarch = shutil.which("setarch")
        if setarch is None:
            pytest.fail(f"the sanitizer needs `setarch -R` here (package util-linux):\n{printed}", pytrace=False)
        code, printed = once([setarch, "-R", *command])
        if "unexpected memory mapping" in printed or "failed to set personality" in printed:
            pytest.fail(
                f"the sanitizer does not start, not even under setarch -R; try sysctl vm.mmap_rnd_bits=28:\n{printed}",
                pytrace=False,
            )
    return code, printed


THREAD = "-fsanitize=thread"
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


# --- the ring as it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sanitizer", [(THREAD,), ADDRESS], ids=["thread", "address+undefined"])
@pytest.mark.parametrize("trial", ["push", "many", "close", "drop", "bell"])
def test_threads_lose_nothing_and_no_sanitizer_complains(
    tmp_path_factory: pytest.TempPathFactory, sanitizer: tuple[str, ...], trial: str
) -> None:
    """Nothing lost, nothing twice, each producer's order, no lost wake; push_many together; close is a cut (D6, D7)."""
    folder = tmp_path_factory.getbasetemp() / f"threads-{len(sanitizer)}"
    program = folder / "ring_threads"
    if not program.exists():
        folder.mkdir(exist_ok=True)
        build(folder, "ring_threads.c", *sanitizer)
    assert run(program, "3000", trial) == (0, f"trial {trial}\n")


@pytest.mark.parametrize("sanitizer", [(THREAD,), ADDRESS], ids=["thread", "address+undefined"])
def test_every_scene_plays_without_a_race(tmp_path: Path, sanitizer: tuple[str, ...]) -> None:
    code, printed = run(build(tmp_path, "ring_orders.c", *sanitizer))
    assert code == 0, printed
    played = {line.removeprefix("scene ") for line in printed.splitlines()}
    assert played >= {scene for scene, _, _ in CAUGHT_BY.values()}


def test_no_schedule_of_the_model_breaks_the_ring(tmp_path: Path) -> None:
    code, printed = run(build(tmp_path, "ring_model.c", "-O2"))
    assert code == 0, printed
    assert {line.split(":")[0] for line in printed.splitlines()} >= {scenario for _, scenario, _ in CAUGHT_BY.values()}


# --- mutants: each must be caught -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_thread_sanitizer_catches_a_weakened_order(tmp_path: Path, order: str) -> None:
    """Each order made relaxed, alone, is a data race that is reported."""
    scene = CAUGHT_BY[order][0]
    code, printed = run(build(tmp_path, "ring_orders.c", THREAD, f"-D{order}=memory_order_relaxed"), scene)
    assert code == 66, printed
    assert "WARNING: ThreadSanitizer: data race" in printed


def broken(program: Path, scenario: str) -> str:
    """How the model says that the scenario breaks."""
    code, printed = run(program, scenario)
    assert code == 1, printed
    return printed.splitlines()[0].removeprefix(f"{scenario}: BROKEN in run ")


@pytest.mark.parametrize("order", ORDERS)
def test_model_catches_a_weakened_order(tmp_path: Path, order: str) -> None:
    """Each order made relaxed, alone, breaks a promise in some schedule, also where no race betrays it."""
    _, scenario, how = CAUGHT_BY[order]
    assert how in broken(build(tmp_path, "ring_model.c", f"-D{order}=memory_order_relaxed"), scenario)


@pytest.mark.parametrize("order", HALVES)
def test_model_catches_the_wrong_half_of_a_pair(tmp_path: Path, order: str) -> None:
    """Acquire in place of release and the other way about, where the compiler would not mind."""
    _, scenario, how = CAUGHT_BY[order]
    assert how in broken(build(tmp_path, "ring_model.c", f"-D{order}=memory_order_{HALVES[order]}"), scenario)


@pytest.mark.parametrize(("scenario", "how"), [("wake", LOST_WAKE), ("lap", NO_ROOM)])
def test_model_catches_a_load_in_place_of_a_read_modify_write(tmp_path: Path, scenario: str, how: str) -> None:
    """Arming the watermark, and looking for waiters, by an acquire load: the lost wake of libuv's issue 4584."""
    assert how in broken(build(tmp_path, "ring_model.c", "-DMODEL_ADD_0_IS_LOAD"), scenario)


@pytest.mark.parametrize("slip", SLIPS)
def test_model_catches_a_slip(tmp_path: Path, slip: str) -> None:
    """The harness sees wrong behaviour too, not only weak orders."""
    text, instead, scenario, how = SLIPS[slip]
    assert RING.count(text) == 1, "ring.h was rewritten: so must this slip be"
    (tmp_path / "ring.h").write_text(RING.replace(text, instead))
    shutil.copy(CORE / "port.h", tmp_path)
    assert how in broken(build(tmp_path, "ring_model.c", core=tmp_path), scenario)


# --- the headers themselves -----------------------------------------------------------------------------------------


def test_every_order_is_named_and_in_the_table() -> None:
    """An order without a name has no mutant; a named one needs its row here and in README.md."""
    assert set(ORDERS) == set(CAUGHT_BY)
    assert HALVES.keys() == {order for order in ORDERS if not re.search(r"(CELL|HEAD|LIMIT)_|DRAIN_END", order)}
    code = re.sub(r"/\*.*?\*/|^#define QR_ORD_[^\n]*", "", RING, flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"memory_order_\w+", code)) == {"memory_order_relaxed"}
    assert "fence" not in code
    assert not re.search(r"\batomic_\w+\(", code), "an atomic that the model does not see"
    readme = (HERE / "README.md").read_text()
    for order, (scene, scenario, _) in CAUGHT_BY.items():
        name = order.removeprefix("QR_ORD_")
        row = re.search(rf"^\| {name} \|.*$", readme, re.MULTILINE)
        assert row is not None, f"no row for {name}"
        assert f"`{scene}`" in row[0]
        assert f"`{scenario}`" in row[0]


def test_ring_is_plain_c11_without_python(tmp_path: Path) -> None:
    source = tmp_path / "alone.c"
    source.write_text('#include "ring.h"\nint main(void) { return 0; }\n')
    build(tmp_path, str(source), "-U_GNU_SOURCE", "-Wpedantic", "-Wconversion", "-Wsign-conversion")
    for header in ("port.h", "ring.h"):
        includes = re.findall(r"#include [<\"](.+)[>\"]", (CORE / header).read_text())
        assert not [name for name in includes if "ython" in name], header
