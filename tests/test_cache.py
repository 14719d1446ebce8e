"""The cache of compiled kernels: what is wrong with it means no cache, never an exception, old code or a leak."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import platform
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, Process, run

from deeplock_kernels import reference
from deeplock_kernels.runtime import codecache

KEY, IV = bytes.fromhex("9fc5e1f04b7a33d2876c0e95b8a1d46f"), bytes.fromhex("d3b07a61c94e58f22f85e49c16a70bd3")
PLAIN = bytes(i % 251 for i in range(1000))
LOCKED = reference.lock(PLAIN, reference.counter_keystream(KEY, IV, len(PLAIN))).hex()

PROGRAM = f"""
import os, sys
import numpy as np
import deeplock_kernels as deeplock
key = bytes.fromhex({KEY.hex()!r})
schedule = deeplock.CounterSchedule(key, bytes.fromhex({IV.hex()!r}))
data = (np.arange(1000) % 251).astype(np.uint8)
print("numba" in sys.modules)
print(deeplock.lock(data, schedule).tobytes().hex())
print("numba" in sys.modules)
"""
COLD, WARM = f"False\n{LOCKED}\nTrue\n", f"False\n{LOCKED}\nFalse\n"  # with and without Numba


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Give the directory of the cache, which is not there yet."""
    monkeypatch.delenv("DEEPLOCK_CACHE", raising=False)
    monkeypatch.setenv("DEEPLOCK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Give a cache that one process has filled."""
    return fill(tmp_path_factory.mktemp("filled") / "cache")


def fill(path, **tier):
    assert run(PROGRAM, DEEPLOCK_CACHE_DIR=path, **tier) == COLD
    return path


@pytest.fixture
def warm(filled, cache):
    shutil.copytree(filled, cache)
    return cache


def entries(cache) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if not path.is_dir())


def entry(cache) -> Path:
    """Give the one entry of a cache that PROGRAM has filled."""
    (path,) = entries(cache)
    return path


def mode(path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


# Cold and warm


def test_a_second_process_does_without_numba(warm):
    before = entry(warm).read_bytes()
    assert run(PROGRAM, DEEPLOCK_CACHE_DIR=warm) == WARM
    assert entry(warm).read_bytes() == before


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o077])
def test_nobody_else_can_write_it_whatever_the_umask(tmp_path, monkeypatch, umask):
    monkeypatch.delenv("DEEPLOCK_CACHE", raising=False)
    monkeypatch.setenv("DEEPLOCK_CACHE_DIR", str(tmp_path / "some" / "cache"))
    before = os.umask(umask)
    try:
        codecache.save("name", b"code")
    finally:
        os.umask(before)
    directory = tmp_path / "some" / "cache" / codecache.stamp()
    assert mode(directory) == 0o700
    assert mode(directory.parent) & 0o022 == 0
    assert [path.name for path in directory.iterdir()] == ["name.o"]
    assert mode(directory / "name.o") == 0o600
    assert codecache.load("name") == b"code"


def test_a_later_entry_takes_the_place_of_an_earlier_one(cache):
    for code in (b"one", b"", b"three" * 10_000):
        codecache.save("name", code)
        assert codecache.load("name") == code
    assert [path.name for path in entries(cache)] == ["name.o"]
    assert codecache.load("other") is None


def test_switched_off_it_is_neither_read_nor_written(cache, warm, monkeypatch):
    assert run(PROGRAM, DEEPLOCK_CACHE_DIR=warm, DEEPLOCK_CACHE="0") == COLD
    monkeypatch.setenv("DEEPLOCK_CACHE", "0")
    codecache.save("name", b"code")
    assert codecache.load(entry(warm).stem) is None
    monkeypatch.setenv("DEEPLOCK_CACHE", "1")
    assert codecache.load(entry(warm).stem) is not None
    shutil.rmtree(cache)
    monkeypatch.setenv("DEEPLOCK_CACHE", "0")
    codecache.save("name", b"code")
    assert not cache.exists()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_start_at_once_on_a_cold_cache(cache, count):
    processes = [Process(PROGRAM, DEEPLOCK_CACHE_DIR=cache) for _ in range(count)]
    outputs = [process.finish() for process in processes]
    assert set(outputs) <= {COLD, WARM}
    assert COLD in outputs
    assert codecache.load(entry(cache).stem) is not None
    assert run(PROGRAM, DEEPLOCK_CACHE_DIR=cache) == WARM


# Entries of other versions


def save_as(version, monkeypatch, name="name"):
    """Save an entry as another version of the package does, whose stamp is the number's hexadecimal digits."""
    with monkeypatch.context() as patch:
        patch.setattr(codecache, "stamp", lambda: f"{version:032x}")
        codecache.save(name, b"code")
        assert codecache.load(name) == b"code"


def versions(cache) -> set[int]:
    return {int(path.name, 16) for path in cache.iterdir()}


@pytest.fixture
def aged(cache, monkeypatch):
    """Give a cache of as many versions as it keeps, the higher the newer."""
    for version in range(1, codecache._STAMPS_KEPT + 1):
        save_as(version, monkeypatch)
        os.utime(cache / f"{version:032x}", (version, version))
    return cache


def test_the_first_entry_of_a_new_version_removes_the_oldest_one(aged, monkeypatch):
    kept = codecache._STAMPS_KEPT
    assert versions(aged) == set(range(1, kept + 1))
    for version in range(kept + 1, kept + 4):
        save_as(version, monkeypatch)
        assert versions(aged) == set(range(version - kept + 1, version + 1))
        before = entries(aged)
        for name in ("name", "other"):
            save_as(version, monkeypatch, name)  # not its first one
        assert set(before) < set(entries(aged))


def test_versions_that_are_used_in_turn_keep_their_entries(aged, monkeypatch):
    shutil.copytree(aged / f"{1:032x}", aged / f"{99:032x}")  # one more than are kept beside a new one
    before = entries(aged)
    for version in (*versions(aged), *versions(aged)):
        save_as(version, monkeypatch)
    assert entries(aged) == before


def test_a_version_whose_entries_were_removed_saves_new_ones(aged, monkeypatch):
    save_as(100, monkeypatch)
    assert 1 not in versions(aged)
    save_as(1, monkeypatch, "other")
    assert [path.name for path in (aged / f"{1:032x}").iterdir()] == ["other.o"]


@pytest.mark.parametrize(
    "thing",
    ["a foreign file", "a foreign object", "an empty file", "a directory", "a link", "a pipe", "for others to write"],
)
def test_what_is_not_all_entries_stays_whole(aged, tmp_path, monkeypatch, thing):
    oldest = aged / f"{1:032x}"
    (elsewhere := tmp_path / "elsewhere").write_bytes(b"deeplock object 1\n")
    path = oldest / "thing.o"
    if thing == "a foreign file":
        path.write_bytes(b"deeplock")
    elif thing == "a foreign object":
        path.write_bytes(b"\x7fELF" * 100)
    elif thing == "an empty file":
        path.touch()
    elif thing == "a directory":
        path.mkdir()
    elif thing == "a link":
        path.symlink_to(elsewhere)
    elif thing == "a pipe":
        os.mkfifo(path)
    else:
        oldest.chmod(0o777)
    os.utime(oldest, (1, 1))
    before = sorted(oldest.iterdir())
    save_as(100, monkeypatch)
    assert sorted(oldest.iterdir()) == before
    assert elsewhere.exists()
    assert versions(aged) == {*range(1, codecache._STAMPS_KEPT + 1), 100}
    save_as(101, monkeypatch)  # the next one is removed all the same
    assert 2 not in versions(aged)


def test_what_has_another_name_or_is_elsewhere_stays(aged, tmp_path, monkeypatch):
    names = ["0" * 31, "0" * 33, "A" * 32, "g" * 32, "." + "0" * 31, "0" * 31 + "\n"]
    for name in names:
        shutil.copytree(aged / f"{1:032x}", aged / name)
        os.utime(aged / name, (0, 0))
    os.rename(aged / f"{1:032x}", tmp_path / "elsewhere")
    link, file = aged / ("e" * 32), aged / ("f" * 32)
    link.symlink_to(tmp_path / "elsewhere")
    file.write_bytes(b"deeplock object 1\n")
    os.utime(link, (0, 0), follow_symlinks=False)
    os.utime(file, (0, 0))
    for version in (100, 101):
        save_as(version, monkeypatch)
    for name in (*names, link.name):
        assert [path.name for path in (aged / name).iterdir()] == ["name.o"]
    assert link.is_symlink()
    assert file.is_file()
    assert not (aged / f"{2:032x}").exists()


@pytest.mark.parametrize(
    ("module", "name"), [(os, "unlink"), (os, "rmdir"), (os, "lstat"), (Path, "iterdir")], ids=str
)
def test_what_cannot_be_removed_stays(aged, monkeypatch, module, name):
    original = getattr(module, name)

    def fails(path, *arguments):
        if f"{1:032x}" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return original(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fails)
        save_as(100, monkeypatch)
        save_as(101, monkeypatch)
    assert {1, 100, 101} <= versions(aged)
    assert (2 in versions(aged)) == (name == "lstat")  # without it nobody knows which are the oldest


# Damage


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE = {
    "empty": lambda data: b"",
    "cut in the magic": lambda data: data[:5],
    "cut after the magic": lambda data: data[:18],
    "cut in the digest": lambda data: data[:30],
    "cut after the digest": lambda data: data[:50],
    "half": lambda data: data[: len(data) // 2],
    "a byte short": lambda data: data[:-1],
    "a byte long": lambda data: data + b"\0",
    "another magic": lambda data: flip(data, 0),
    "another version": lambda data: data.replace(b"object 1", b"object 2", 1),
    "a bit of the digest": lambda data: flip(data, 20),
    "a bit of the code": lambda data: flip(data, 60),
    "the last bit": lambda data: flip(data, -1)[: len(data)],
    "zeros": lambda data: bytes(len(data)),
    "an object as it comes from a compiler": lambda data: data[50:],
    "a text": lambda data: b"a text\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_not_read(warm, damage):
    path = entry(warm)
    whole = path.read_bytes()
    assert codecache.load(path.stem) == whole[50:]
    path.write_bytes(DAMAGE[damage](whole))
    assert path.read_bytes() != whole
    assert codecache.load(path.stem) is None


GARBAGE = {
    "nothing": lambda code: b"",
    "noise": lambda code: np.random.default_rng(1).bytes(5000),
    "half an object": lambda code: code[: len(code) // 2],
    "an object without the kernel": lambda code: code.replace(b"deeplock_kernel\0", b"deeplock_kerne1\0"),
}


def test_what_is_damaged_or_whole_but_garbage_is_compiled_again_and_replaced(cache):
    program = """
import sys
import numpy as np
import deeplock_kernels as deeplock
data = (np.arange(1000) % 251).astype(np.uint8)
for length in (16, 24, 32):
    schedule = deeplock.CounterSchedule(bytes(length), bytes(16))
    locked = deeplock.lock(data, schedule)
    print(locked.tobytes().hex())
assert (deeplock.unlock(locked, schedule) == data).all()
print(deeplock.substitute(data, "aes").tobytes().hex())
print("numba" in sys.modules)
"""
    cold = run(program, DEEPLOCK_CACHE_DIR=cache)
    warm = cold.replace("True", "False")
    assert cold.endswith("True\n")
    assert run(program, DEEPLOCK_CACHE_DIR=cache) == warm
    paths = entries(cache)
    assert len(paths) == 5
    for path, garbage in zip(paths, GARBAGE.values(), strict=False):
        code = codecache.load(path.stem)
        codecache.save(path.stem, garbage(code))
        assert codecache.load(path.stem) == garbage(code) != code
    paths[-1].write_bytes(DAMAGE["half"](paths[-1].read_bytes()))
    damaged = {path: path.read_bytes() for path in paths}
    assert run(program, DEEPLOCK_CACHE_DIR=cache) == cold
    assert entries(cache) == paths
    assert [path.name for path in paths if path.read_bytes() == damaged[path]] == []
    assert run(program, DEEPLOCK_CACHE_DIR=cache) == warm


def test_the_entry_of_another_kernel_is_not_used(warm):
    """Whoever renames an entry gets neither wrong bytes nor an error."""
    path = entry(warm)
    codecache.save("another", b"code")
    os.replace(path, path.with_name("other.o"))
    os.replace(path.with_name("another.o"), path)
    assert codecache.load(path.stem) is None
    assert codecache.load("other") is None


# Whom it trusts


@pytest.mark.parametrize("extra", [0o020, 0o002, 0o022, 0o077])
@pytest.mark.parametrize("place", ["base", "directory", "entry"])
def test_what_others_can_write_is_not_used(warm, place, extra):
    path = entry(warm)
    target = {"base": warm, "directory": path.parent, "entry": path}[place]
    assert codecache.load(path.stem) is not None
    os.chmod(target, mode(target) | extra)
    assert codecache.load(path.stem) is None
    codecache.save("name", b"code")
    if place == "entry":
        codecache.save(path.stem, b"new")  # takes its place
        assert codecache.load(path.stem) == b"new"
        assert mode(path) == 0o600
    else:
        assert entries(warm) == [path]


@pytest.mark.parametrize("place", ["base", "directory", "entry"])
def test_what_belongs_to_another_user_is_not_used(warm, place, monkeypatch):
    path = entry(warm)
    target = {"base": warm, "directory": path.parent, "entry": path}[place]
    assert codecache.load(path.stem) is not None
    if os.geteuid() == 0:
        os.chown(target, 12345, 12345)
    else:  # all three belong to another user than this one
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 12345)
    assert codecache.load(path.stem) is None
    if place != "entry":
        codecache.save("name", b"code")
        assert entries(warm) == [path]


def test_what_belongs_to_root_is_used(warm, monkeypatch):
    path = entry(warm)
    original = os.lstat

    def of_root(target):
        values = list(original(target))
        values[4] = 0
        return os.stat_result(values)

    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "lstat", of_root)
    assert codecache.load(path.stem) is not None


def test_a_link_in_the_place_of_an_entry_is_not_used(warm, tmp_path):
    path = entry(warm)
    os.replace(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert codecache.load(path.stem) is None
    codecache.save(path.stem, b"new")
    assert not path.is_symlink()
    assert codecache.load(path.stem) == b"new"
    assert (tmp_path / "elsewhere").read_bytes() != path.read_bytes()


def test_a_link_in_the_place_of_the_directory_is_not_used(warm, tmp_path):
    path = entry(warm)
    os.replace(path.parent, tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    assert codecache.load(path.stem) is None
    codecache.save("name", b"code")
    assert [found.name for found in (tmp_path / "elsewhere").iterdir()] == [path.name]


def test_a_link_to_the_cache_itself_is_followed_and_what_it_leads_to_is_checked(warm, tmp_path, monkeypatch):
    path = entry(warm)
    (tmp_path / "link").symlink_to(warm)
    monkeypatch.setenv("DEEPLOCK_CACHE_DIR", str(tmp_path / "link"))
    assert codecache.load(path.stem) is not None
    os.chmod(warm, 0o777)
    assert codecache.load(path.stem) is None


@pytest.mark.parametrize("thing", ["a directory", "a pipe", "a device"])
def test_no_file_in_the_place_of_an_entry(warm, thing):
    path = entry(warm)
    path.unlink()
    if thing == "a directory":
        path.mkdir()
    elif thing == "a pipe":
        os.mkfifo(path, 0o600)
    else:
        path.symlink_to("/dev/zero")
    program = "from deeplock_kernels.runtime import codecache; import sys; print(codecache.load(sys.argv[1]))"
    assert run(program, path.stem, DEEPLOCK_CACHE_DIR=warm) == "None\n"


# No place for it


@pytest.mark.parametrize("place", ["a file", "under a file", "under a device", "a name too long", "a circle"])
def test_where_no_cache_can_be_it_goes_without(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_bytes(b"a file")
    (tmp_path / "circle").symlink_to("circle")
    path = {
        "a file": tmp_path / "file",
        "under a file": tmp_path / "file" / "cache",
        "under a device": "/dev/null/cache",
        "a name too long": tmp_path / ("n" * 300),
        "a circle": tmp_path / "circle",
    }[place]
    monkeypatch.delenv("DEEPLOCK_CACHE", raising=False)
    monkeypatch.setenv("DEEPLOCK_CACHE_DIR", str(path))
    assert codecache.load("name") is None
    codecache.save("name", b"code")
    assert codecache.load("name") is None
    assert sorted(os.listdir(tmp_path)) == ["circle", "file"]
    assert (tmp_path / "file").read_bytes() == b"a file"
    if place == "under a file":
        assert run(PROGRAM, DEEPLOCK_CACHE_DIR=path) == COLD


@pytest.mark.parametrize("reason", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("names", [["open"], ["replace"], ["open", "unlink"], ["replace", "unlink"]], ids="+".join)
def test_what_cannot_be_written_is_left(warm, monkeypatch, names, reason):
    """A read-only file system refuses to unlink even what is not there."""

    def fails(*arguments, **keywords):
        raise OSError(reason, os.strerror(reason))

    path = entry(warm)
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(os, name, fails)
        codecache.save(path.stem, b"new")
    assert codecache.load(path.stem) not in (None, b"new")
    if "unlink" not in names:
        assert entries(warm) == [path]


# Modes do not bind root, until it gives up its capabilities.
BOUND_BY_MODES = """
import ctypes, os
if os.geteuid() == 0:
    version, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(version, none) == 0
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes are those of POSIX")
def test_a_read_only_cache_is_read_and_never_written(cache, filled):
    """As it is shipped in an image; a kernel that it has not is compiled in every process."""
    program = BOUND_BY_MODES + f"""
assert not os.access({str(cache)!r}, os.W_OK)
""" + PROGRAM
    cache.mkdir(mode=0o555)
    assert run(program, DEEPLOCK_CACHE_DIR=cache) == COLD
    assert list(cache.iterdir()) == []
    cache.rmdir()
    shutil.copytree(filled, cache)
    paths = [entry(cache), entry(cache).parent, cache]
    for path in paths:
        os.chmod(path, 0o444 if path.suffix else 0o555)
    try:
        assert run(program, DEEPLOCK_CACHE_DIR=cache) == WARM
        assert run(program, DEEPLOCK_CACHE_DIR=cache, DEEPLOCK_TIER="portable") == COLD
        assert entries(cache) == paths[:1]
    finally:
        for path in paths:
            os.chmod(path, 0o700)


def test_a_full_disk_leaves_nothing(cache):
    program = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))" + PROGRAM
    assert run(program, DEEPLOCK_CACHE_DIR=cache) == COLD
    assert entries(cache) == []


def test_a_lesser_processor_does_not_run_what_a_better_one_left(warm):
    """One home directory may serve both."""
    lesser = "from deeplock_kernels.runtime import tiers; tiers.host_features = frozenset" + PROGRAM
    left = entry(warm)
    assert (run(lesser, DEEPLOCK_CACHE_DIR=warm) == COLD) == (not left.name.startswith("portable"))
    assert run(lesser, DEEPLOCK_CACHE_DIR=warm) == WARM
    assert {path.name.split("-")[0] for path in entries(warm)} == {left.name.split("-")[0], "portable"}
    assert run(PROGRAM, DEEPLOCK_CACHE_DIR=warm) == WARM


def test_an_interrupted_write_leaves_nothing(warm, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    path = entry(warm)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            codecache.save(path.stem, b"new")
    assert entries(warm) == [path]
    assert codecache.load(path.stem) != b"new"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DEEPLOCK_CACHE_DIR": "{}/a", "XDG_CACHE_HOME": "{}/b", "HOME": "{}/c"}, "a"),
        ({"XDG_CACHE_HOME": "{}/b", "HOME": "{}/c"}, "b/deeplock_kernels"),
        ({"DEEPLOCK_CACHE_DIR": "", "XDG_CACHE_HOME": "{}/b"}, "b/deeplock_kernels"),
        ({"HOME": "{}/c"}, "c/.cache/deeplock_kernels"),
        ({"XDG_CACHE_HOME": "", "HOME": "{}/c"}, "c/.cache/deeplock_kernels"),
        ({"XDG_CACHE_HOME": "b", "HOME": "c"}, None),
        ({"HOME": "c"}, None),
        ({"HOME": "."}, None),
        ({"HOME": "/dev/null"}, None),
        ({"XDG_CACHE_HOME": "~/b", "HOME": "{}/c"}, None),
    ],
)
def test_where_it_lies(tmp_path, monkeypatch, variables, expected):
    for name in ("DEEPLOCK_CACHE", "DEEPLOCK_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    monkeypatch.chdir(tmp_path)
    codecache.save("name", b"code")
    if expected is None:  # a relative path would be another place in each directory
        assert codecache.load("name") is None
        assert entries(tmp_path) == []
    else:
        assert codecache.load("name") == b"code"
        assert entries(tmp_path) == [tmp_path / expected / codecache.stamp() / "name.o"]


def test_without_a_home_directory(tmp_path, monkeypatch):
    def unknown(*arguments):
        raise KeyError("no such user")

    pwd = pytest.importorskip("pwd")
    for name in ("DEEPLOCK_CACHE", "DEEPLOCK_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    codecache.save("name", b"code")
    assert codecache.load("name") is None
    assert os.listdir(tmp_path) == []


# What it holds


@pytest.fixture
def package(tmp_path):
    """Give the parent of a copy of the package."""
    shutil.copytree(
        ROOT / "deeplock_kernels", tmp_path / "deeplock_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


def edit(path, old, new):
    text = path.read_text()
    assert old in text, f"{path.name} has changed: choose something else to edit"
    path.write_text(text.replace(old, new))


def test_any_change_of_any_source_changes_the_stamp(package):
    program = "from deeplock_kernels.runtime import codecache; print(codecache.stamp())"
    sources = package / "deeplock_kernels"

    def stamp():
        return run(program, root=package, PYTHONDONTWRITEBYTECODE=1)

    stamps = [stamp()]
    os.utime(sources / "sboxes.py", (1, 1))
    (sources / "notes.txt").write_text("no source")
    assert stamp() == stamps[0]
    assert len(stamps[0].strip()) == 32
    for name in ("sboxes.py", "kernels/signatures.py", "simd/vectors.py", "demo/__init__.py"):
        with open(sources / name, "a") as file:
            file.write("# more\n")
        stamps.append(stamp())
    (sources / "simd" / "more.py").write_text("")
    stamps.append(stamp())
    os.rename(sources / "simd" / "more.py", sources / "simd" / "other.py")
    stamps.append(stamp())
    assert len(set(stamps)) == len(stamps)


def test_another_machine_changes_the_stamp(monkeypatch):
    """One home directory may serve both kinds, and LLVM ends the process over an object for another machine."""
    stamps = set()
    for name in ("x86_64", "aarch64"):
        with monkeypatch.context() as patch:
            patch.setattr(platform, "machine", lambda name=name: name)
            codecache.stamp.cache_clear()
            stamps.add(codecache.stamp())
    codecache.stamp.cache_clear()
    assert len(stamps) == 2


@pytest.mark.parametrize("compiler", ["numba", "llvmlite"])
def test_another_compiler_changes_the_stamp(monkeypatch, compiler):
    before, original = codecache.stamp(), codecache.metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(
            codecache.metadata, "version", lambda name: "99.0" if name == compiler else original(name)
        )
        codecache.stamp.cache_clear()
        try:
            assert codecache.stamp() != before
        finally:
            codecache.stamp.cache_clear()
    assert codecache.stamp() == before


# Each changes what the kernel computes, most in another file than the kernel's, where Numba's own cache is blind.
EDITS = [
    ("portable", "kernels/portable.py", "ROUND_0[(a >> 24) & 255] ^", "ROUND_1[(a >> 24) & 255] ^"),
    ("portable", "kernels/memory.py", "builder.trunc(values[1], ir.IntType(bits))", "ir.Constant(ir.IntType(bits), 7)"),
    ("portable", "sboxes.py", "return self._table\n", "return self._table[::-1]\n"),
    ("best", "kernels/vectorized.py", "apply(load(u8x64, source) ^ stream, box)", "apply(load(u8x64, source), box)"),
    ("best", "simd/vectors.py", "builder.xor(", "builder.or_("),
]


@pytest.fixture(scope="module")
def portable_filled(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("portable") / "cache", DEEPLOCK_TIER="portable")


@pytest.mark.parametrize(("tier", "file", "old", "new"), EDITS)
def test_no_old_code_runs_after_a_change_of_the_sources(
    package, cache, filled, portable_filled, tier, file, old, new
):
    program = """
from deeplock_kernels.runtime import selftest
selftest.check = lambda *arguments: None  # it would notice
""" + PROGRAM
    shutil.copytree(portable_filled if tier == "portable" else filled, cache)
    tiers = {"DEEPLOCK_TIER": "portable"} if tier == "portable" else {}
    settings = {"root": package, "DEEPLOCK_CACHE_DIR": cache, "PYTHONDONTWRITEBYTECODE": 1} | tiers
    assert run(program, **settings) == WARM
    edit(package / "deeplock_kernels" / file, old, new)
    changed = run(program, **settings)
    assert changed.startswith("False\n")
    assert changed.endswith("\nTrue\n")
    assert changed != COLD


def holds(content, secret) -> bool:
    """Say whether bytes hold any four neighbours of a secret, as they are or as text."""
    for start in range(len(secret) - 3):
        part = secret[start : start + 4]
        decimal = b", ".join(b"%d" % byte for byte in part)
        if any(form in content for form in (part, part[::-1], decimal, base64.b64encode(part)[:5])):
            return True
    hexadecimal = content.lower()
    return any(secret[start : start + 4].hex().encode() in hexadecimal for start in range(len(secret) - 3))


def test_everything_warm_does_without_numba_and_no_entry_holds_a_byte_of_a_key(cache):
    program = """
import sys
import numpy as np
import deeplock_kernels as deeplock
data = (np.arange(300_000) % 251).astype(np.uint8)
for key in map(bytes.fromhex, sys.argv[1:]):
    with deeplock.MasterKey.from_bytes(key) as master:
        for schedule in (deeplock.CounterSchedule(master, key[:16]), deeplock.ExpansionSchedule(master)):
            locked = deeplock.lock(data, schedule, offset=3)
            assert (deeplock.unlock(locked, schedule, offset=3) == data).all()
        deeplock.expand_key(master, 100_000)
        deeplock.lock_tensors({"weight": data.copy()}, master)
deeplock.substitute(data, "whirlpool")
print("numba" in sys.modules)
"""
    keys = [np.random.default_rng(bits).bytes(bits // 8) for bits in (128, 256)]
    arguments = [key.hex() for key in keys]
    assert run(program, *arguments, DEEPLOCK_CACHE_DIR=cache) == "True\n"
    assert run(program, *arguments, DEEPLOCK_CACHE_DIR=cache) == "False\n"
    paths = entries(cache)
    assert len(paths) > 10
    for path in paths:
        for key in keys:
            for secret in (key, hashlib.sha256(key).digest()):
                assert not holds(path.name.encode() + b"\0" + path.read_bytes(), secret)
