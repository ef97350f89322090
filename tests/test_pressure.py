"""How near the memory's limit is [C39]: read from real directory trees, as the kernel lays them out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from queue_runtime import ConfigurationError, Limits, MemoryConfig
from queue_runtime.pressure import NO_LIMIT, MemoryLevel, MemoryPressure

PAGE = os.sysconf("SC_PAGE_SIZE")
V2_MOUNT = "29 23 0:26 {root} /sys/fs/cgroup rw,nosuid,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V1_OTHER = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
LOWEST, MOST = Limits(1, 2), Limits(32, 1000)


class Machine:
    """A root directory with the files that count."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/self/statm", "2000 1000 500 1 0 800 0\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def group(self, path: str, **files: object) -> None:
        for name, value in files.items():
            self.write(f"sys/fs/cgroup/{path}/{name.replace('memory_', 'memory.', 1)}", f"{value}\n")

    def v2(self, path: str, root: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{path}\n")
        self.write("proc/self/mountinfo", "23 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + V2_MOUNT.format(root=root))

    def v1(self, path: str, root: str = "/") -> None:
        self.write("proc/self/cgroup", f"9:cpu,cpuacct:/\n4:memory:{path}\n1:name=systemd:/\n0::/\n")
        self.write("proc/self/mountinfo", V1_OTHER + V1_MOUNT.format(root=root))

    def pressure(self, config: MemoryConfig | None = None) -> MemoryPressure:
        return MemoryPressure(config, self.root)

    def uses(self) -> list[tuple[int, int, str]]:
        return [(use.used, use.limit, Path(use.source).name) for use in self.pressure().uses()]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_control_group_counts_with_what_it_uses_but_for_idle_file_cache(machine: Machine) -> None:
    machine.v2("/app.slice/worker")
    machine.group("app.slice", memory_max="max", memory_high="max", memory_current=900, memory_stat="anon 1")
    stat = "anon 600\nfile 200\ninactive_file 150\nactive_file 50"
    machine.group("app.slice/worker", memory_max=1000, memory_high="max", memory_current=800, memory_stat=stat)
    assert machine.uses() == [(650, 1000, "worker")]


def test_the_soft_limit_counts_where_it_is_lower(machine: Machine) -> None:
    """Above memory.high the kernel slows the group down: that is too late already."""
    machine.v2("/worker")
    machine.group("worker", memory_max=1000, memory_high=700, memory_current=500)
    assert machine.uses() == [(500, 700, "worker")]


def test_the_nearest_limit_of_nested_groups_counts(machine: Machine) -> None:
    """The parent is shared with others, and fuller."""
    machine.v2("/pod/worker")
    machine.group("pod/worker", memory_max=1000, memory_current=300)
    machine.group("pod", memory_max=2000, memory_current=1900)
    assert machine.uses() == [(300, 1000, "worker"), (1900, 2000, "pod")]
    pressure = machine.pressure()
    assert pressure.look() is MemoryLevel.CRITICAL
    assert pressure.use is not None
    assert pressure.use.limit == 2000


def test_a_container_that_sees_only_its_own_group(machine: Machine) -> None:
    machine.v2("/")
    machine.group("", memory_max=1000, memory_current=10)
    assert machine.uses() == [(10, 1000, "cgroup")]


@pytest.mark.parametrize("path", ["/docker/abc", "/docker/abc/inner"])
def test_a_container_whose_group_is_mounted_as_the_root(machine: Machine, path: str) -> None:
    machine.v1(path, root="/docker/abc")
    machine.group("memory", memory_limit_in_bytes=1000, memory_usage_in_bytes=500, memory_stat="total_inactive_file 90")
    machine.group("memory/inner", memory_limit_in_bytes=600, memory_usage_in_bytes=100)
    expected = [(410, 1000, "memory")]
    assert machine.uses() == ([(100, 600, "inner"), *expected] if path.endswith("inner") else expected)


@pytest.mark.parametrize("path", ["/../other", "/elsewhere"])
def test_a_group_outside_of_what_is_mounted_is_left_alone(machine: Machine, path: str) -> None:
    machine.v1(path, root="/docker/abc" if path == "/elsewhere" else "/")
    machine.group("memory", memory_limit_in_bytes=1000, memory_usage_in_bytes=500)
    assert machine.uses() == [(500, 1000, "memory")]


def test_version_1_says_none_with_a_huge_number(machine: Machine) -> None:
    machine.v1("/job")
    machine.group("memory/job", memory_limit_in_bytes=NO_LIMIT * 7, memory_usage_in_bytes=500)
    machine.write("proc/meminfo", "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 400 kB\n")
    assert machine.uses() == [(600 * 1024, 1000 * 1024, "the machine's memory")]


def test_a_mount_point_with_a_space(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/\n")
    machine.write("proc/self/mountinfo", "29 23 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw\n")
    machine.write("my groups/memory.max", "100")
    machine.write("my groups/memory.current", "50")
    assert machine.uses() == [(50, 100, "my groups")]


def test_the_given_limit_is_for_resident_memory(machine: Machine) -> None:
    machine.write("proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 1 kB\n")
    pressure = machine.pressure(MemoryConfig(limit=2000 * PAGE))
    pressure.look()
    assert pressure.use == (1000 * PAGE, 2000 * PAGE, "the configured limit")


def test_the_limit_of_the_address_space_counts(machine: Machine) -> None:
    """In a child process: an address space cannot be widened again."""
    code = (
        "import resource, sys\n"
        "from queue_runtime.pressure import MemoryPressure\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, resource.RLIM_INFINITY))\n"
        "print(*MemoryPressure(root=sys.argv[1]).uses()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, machine.root], capture_output=True, text=True, check=True)
    assert done.stdout == f"{2000 * PAGE} {1 << 40} RLIMIT_AS\n"


@pytest.mark.parametrize("content", ["", "nonsense", "1 2 3", "0::\n", ":::::\n\n"])
def test_what_cannot_be_read_is_no_pressure(tmp_path: Path, content: str) -> None:
    """As on systems without these files."""
    assert MemoryPressure(root=tmp_path).look() is MemoryLevel.NORMAL
    machine = Machine(tmp_path)
    for path in ("proc/self/cgroup", "proc/self/mountinfo", "proc/self/statm", "proc/meminfo"):
        machine.write(path, content)
    pressure = machine.pressure()
    assert pressure.look() is MemoryLevel.NORMAL
    assert pressure.use is None


def test_a_group_that_vanishes_limits_no_more(machine: Machine) -> None:
    machine.v2("/worker")
    machine.group("worker", memory_max=1000, memory_current=990)
    pressure = machine.pressure()
    assert pressure.look() is MemoryLevel.CRITICAL
    (machine.root / "sys/fs/cgroup/worker/memory.max").unlink()
    assert pressure.look() is MemoryLevel.NORMAL


def test_this_machine_can_be_read() -> None:
    pressure = MemoryPressure(MemoryConfig(limit=1 << 50))
    assert pressure.look() in MemoryLevel
    assert pressure.use is not None
    assert {use.source for use in pressure.uses()} >= {"the configured limit"}


def test_the_level_goes_up_at_once_and_down_with_hysteresis(machine: Machine) -> None:
    machine.v2("/")
    machine.group("", memory_max=1000, memory_current=0)
    pressure = machine.pressure(MemoryConfig(low=0.5, high=0.7, critical=0.9))
    normal, high, critical = MemoryLevel
    for used, level in (
        (699, normal),
        (700, high),
        (501, high),
        (499, normal),
        (900, critical),
        (701, critical),
        (699, high),
        (501, high),
        (499, normal),
        (999, critical),
        (499, normal),
    ):
        machine.group("", memory_current=used)
        assert pressure.look() is level, used


def looked(machine: Machine, used: int) -> MemoryPressure:
    """A limit of 1000 bytes, of which so many are used."""
    machine.v2("/")
    machine.group("", memory_max=1000, memory_current=used)
    pressure = machine.pressure()
    pressure.look()
    return pressure


def test_without_pressure_it_allows_what_is_wanted_step_by_step(machine: Machine) -> None:
    pressure = looked(machine, 300)
    assert pressure.allowed(MOST, Limits(8, 10), LOWEST) == (32, 20, 1, 1), "prefetch doubles at most"
    assert pressure.allowed(Limits(8, 30, 2, 3), Limits(32, 500), LOWEST) == (8, 30, 2, 3)


def test_bytes_are_bounded_by_what_is_left_below_the_high_level(machine: Machine) -> None:
    assert looked(machine, 300).allowed_bytes(100) == 600
    assert looked(machine, 799).allowed_bytes(100) == 101
    assert looked(machine, 850).allowed_bytes(100) == 50, "and halved above it"
    assert looked(machine, 950).allowed_bytes(1) == 1


def test_the_limit_that_leaves_fewest_bytes_bounds_them(machine: Machine) -> None:
    """Not the fullest: of a large one there may be more left."""
    machine.v2("/pod/worker")
    machine.group("pod/worker", memory_max=1000, memory_current=600)
    machine.group("pod", memory_max=1_000_000, memory_current=650_000)
    pressure = machine.pressure()
    pressure.look()
    assert pressure.use is not None
    assert pressure.use.limit == 1_000_000
    assert pressure.allowed_bytes(0) == 200


def test_where_nothing_is_known_bytes_are_not_bounded(tmp_path: Path) -> None:
    pressure = MemoryPressure(root=tmp_path)
    pressure.look()
    assert pressure.allowed_bytes(100) is None


def test_under_high_pressure_prefetch_is_halved_and_nothing_grows(machine: Machine) -> None:
    pressure = looked(machine, 850)
    assert pressure.allowed(MOST, Limits(16, 100, 2, 5), LOWEST) == (16, 50, 1, 1)
    assert pressure.allowed(MOST._replace(pollers=4), Limits(16, 3, 2, 5), LOWEST) == (16, 2, 2, 1)


def test_under_critical_pressure_only_the_least_is_held_and_handlers_are_halved(machine: Machine) -> None:
    pressure = looked(machine, 950)
    assert pressure.allowed(MOST, Limits(16, 100), LOWEST) == (8, 2, 1, 1)
    assert pressure.allowed(MOST, Limits(1, 100), LOWEST) == (1, 2, 1, 1)


@given(
    used=st.integers(0, 2000),
    wanted=st.builds(Limits, *[st.integers(1, 1000)] * 4),
    now=st.builds(Limits, *[st.integers(1, 1000)] * 4),
)
def test_it_never_allows_more_than_wanted_nor_less_than_the_lowest(
    tmp_path_factory: pytest.TempPathFactory, used: int, wanted: Limits, now: Limits
) -> None:
    machine = Machine(tmp_path_factory.mktemp("root"))
    allowed = looked(machine, used).allowed(wanted, now, Limits(1, 1))
    assert all(1 <= value <= most for value, most in zip(allowed, wanted, strict=True))
    assert allowed.prefetch <= 2 * now.prefetch


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("limit", 0),
        ("limit", 1.5),
        ("low", 0),
        ("high", 0.6),
        ("high", "80%"),
        ("critical", 0.75),
        ("critical", 1.1),
        ("interval", 0),
    ],
)
def test_a_wrong_setting_is_named(field: str, value: object) -> None:
    """[C33]"""
    with pytest.raises(ConfigurationError) as caught:
        MemoryConfig(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field
