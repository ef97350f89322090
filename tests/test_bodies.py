"""Bodies in files: whole or not there, readable for as long as somebody looks, and clear about what went wrong."""

import errno
import gc
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from queue_runtime.bodies import BodyStore, StoredBody
from queue_runtime.errors import ProviderError, ValidationError

BODY = bytes(range(256)) * 1000


@pytest.fixture
def store(tmp_path: Path) -> BodyStore:
    return BodyStore(tmp_path / "deep" / "bodies")


def failing(call: Callable[..., int], number: int, after: int) -> Callable[..., int]:
    """The call, which fails with this errno from its so-manieth use on."""
    uses = 0

    def fail(*arguments: object) -> int:
        nonlocal uses
        uses += 1
        if uses > after:
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    return fail


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("size", [0, 1, 4096, 2**20 - 1, 2**20, 3 * 2**20 + 1])
def test_a_body_comes_back(store: BodyStore, size: int, sync: bool) -> None:
    """[C6]"""
    body = os.urandom(size)
    stored = store.store(bytearray(body), sync=sync)
    assert (stored.size, stored.crc) == (size, zlib.crc32(body))
    view = store.open(stored, check=True)
    assert view == body
    assert view.readonly
    assert list(store.names()) == [stored.name]


def test_bodies_are_for_this_user_alone(store: BodyStore) -> None:
    stored = store.store(b"secret")
    assert (store.directory / stored.name).stat().st_mode & 0o077 == 0
    assert store.directory.stat().st_mode & 0o077 == 0


def test_a_view_outlives_the_file_and_the_store(store: BodyStore) -> None:
    stored = store.store(BODY)
    view = store.open(stored)
    store.delete(stored.name)
    store.delete(stored.name)
    assert list(store.names()) == []
    part = view[1000:2000]
    del view, store
    gc.collect()
    assert part == BODY[1000:2000]


def mappings_of(directory: Path) -> int:
    return sum(str(directory) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_mapping_ends_with_its_last_view_and_holds_no_descriptor(store: BodyStore) -> None:
    before = len(os.listdir("/proc/self/fd"))
    views = [store.open(store.store(BODY)) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert mappings_of(store.directory) == 50
    parts = [view[5:10] for view in views[:3]]
    del views
    assert mappings_of(store.directory) == 3
    del parts
    assert mappings_of(store.directory) == 0


def test_what_is_missing_or_was_changed(store: BodyStore) -> None:
    stored = store.store(BODY)
    path = store.directory / stored.name
    with path.open("r+b") as file:
        file.seek(70_000)
        file.write(b"!")
    assert len(store.open(stored)) == len(BODY)
    with pytest.raises(ProviderError, match="another checksum") as caught:
        store.open(stored, check=True)
    assert caught.value.code == "damaged"
    os.truncate(path, 100)
    with pytest.raises(ProviderError, match="has 100 bytes; 256000 were stored") as caught:
        store.open(stored)
    assert caught.value.code == "damaged"
    store.delete(stored.name)
    with pytest.raises(ProviderError, match="cannot open the body") as caught:
        store.open(stored)
    assert (caught.value.code, caught.value.is_transient) == ("missing", False)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("name", ["../x.body", "/etc/passwd", "a/b.body", "x", "", "..body/../x.body"])
def test_a_name_leads_nowhere_else(store: BodyStore, name: str) -> None:
    """[C3]"""
    for call in (lambda: store.open(StoredBody(name, 1, 0)), lambda: store.delete(name)):
        with pytest.raises(ValidationError, match="not of a stored body"):
            call()


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize(
    ("number", "code", "transient"),
    [(errno.ENOSPC, "disk-full", True), (errno.EROFS, "read-only", False), (errno.EIO, "io", False)],
)
def test_a_failure_leaves_nothing_behind(
    store: BodyStore, monkeypatch: pytest.MonkeyPatch, call: str, number: int, code: str, transient: bool
) -> None:
    """Wherever it comes, also after others of the same call were stored."""
    monkeypatch.setattr(os, call, failing(getattr(os, call), number, after=1))
    with pytest.raises(ProviderError, match=r"cannot store a body in .*bodies: ") as caught:
        store.store_many([bytes(2_000_000), BODY, BODY], sync=True)
    assert (caught.value.code, caught.value.is_transient) == (code, transient)
    assert os.listdir(store.directory) == []


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """As near to it as a test may go: the system refuses to let a file grow."""
    code = f"""if True:
        import os, resource
        from queue_runtime.bodies import BodyStore
        from queue_runtime.errors import ProviderError
        store = BodyStore({str(tmp_path)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, resource.RLIM_INFINITY))
        store.store(bytes(1_400_000))
        try:
            store.store(bytes(1_600_000))
        except ProviderError as error:
            print(error.code, error.is_transient, len(os.listdir(store.directory)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "disk-full True 1\n"


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ProviderError, match="cannot keep bodies in"):
        BodyStore(tmp_path / "file")
    if Path("/sys/kernel").is_dir():  # not even root writes there
        with pytest.raises(ProviderError, match="give a directory that this process can write to") as caught:
            BodyStore("/sys/kernel").store(b"x")
        assert caught.value.code == "read-only"
    store = BodyStore(tmp_path / "gone")
    store.directory.rmdir()
    for call in (lambda: store.store(b"x"), lambda: store.sweep([]), lambda: list(store.names())):
        with pytest.raises(ProviderError) as caught:
            call()
        assert caught.value.code == "missing"


def test_a_sweep_leaves_what_is_kept(store: BodyStore) -> None:
    kept, orphan = store.store_many([b"kept", b"orphan"])
    (store.directory / "0123.partial").write_bytes(b"cut off by a crash")
    (store.directory / "README").write_bytes(b"somebody else's")
    assert store.sweep([kept.name]) == 2
    assert sorted(os.listdir(store.directory)) == sorted([kept.name, "README"])
    assert store.open(kept, check=True) == b"kept"
    assert orphan.name != kept.name


def test_a_crash_leaves_a_whole_body_or_none(tmp_path: Path) -> None:
    """[C47] Killed in the middle of writing, at different bytes."""
    code = f"""if True:
        import os, sys
        from queue_runtime.bodies import BodyStore
        left = int(sys.argv[1])
        write = os.write
        def write_some(fd, data):
            global left
            if left < len(data):
                write(fd, data[:left])
                os._exit(9)
            left -= len(data)
            return write(fd, data)
        os.write = write_some
        store = BodyStore({str(tmp_path)!r})
        store.store(bytes(1_500_000))
        store.store(bytes(1_500_000))
    """
    for left in (0, 1_100_000, 1_500_000, 2_999_999):
        done = subprocess.run([sys.executable, "-c", code, str(left)])
        assert done.returncode == 9
        store = BodyStore(tmp_path)
        sizes = [(store.directory / name).stat().st_size for name in store.names()]
        assert sizes == [1_500_000] * (left // 1_500_000)
        assert store.sweep([]) == len(sizes) + 1


def test_threads_store_side_by_side(store: BodyStore) -> None:
    bodies = [os.urandom(100_000 + n) for n in range(24)]
    found: dict[int, StoredBody] = {}

    def work(first: int) -> None:
        for n in range(first, len(bodies), 4):
            found[n] = store.store(bodies[n])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(store.open(found[n], check=True) == body for n, body in enumerate(bodies))


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_many_at_once(tmp_path_factory: pytest.TempPathFactory, bodies: list[bytes]) -> None:
    store = BodyStore(tmp_path_factory.mktemp("bodies"))
    assert [bytes(store.open(stored, check=True)) for stored in store.store_many(bodies)] == bodies
    assert len(set(store.names())) == len(bodies)
