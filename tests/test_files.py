"""A file is written whole or not at all: whatever goes wrong, the target is old or new, nothing is left."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import sys
import threading

import pytest

from deeplock_kernels import files
from deeplock_kernels.errors import FileAccessError, ParameterError, SameFileError
from deeplock_kernels.files import atomic_output, check_distinct, file_errors

OLD, NEW = b"old content", b"the new content " * 5000  # larger than the file's buffer


class Interruption(BaseException):
    """Stands for anything that no `except Exception` sees."""


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(OLD)
    return path


def entries(directory) -> list[str]:
    return sorted(os.listdir(directory))


def write(path, content=NEW, then: BaseException | None = None, **keywords) -> None:
    with atomic_output(path, **keywords) as file:
        file.write(content)
        if then is not None:
            raise then


def assert_untouched(target) -> None:
    assert target.read_bytes() == OLD
    assert entries(target.parent) == [target.name]


def mode(path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Writing


@pytest.mark.parametrize("size_hint", [None, 0, 1, len(NEW), 10 * len(NEW)])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_new_file_and_an_old_one(tmp_path, size_hint, kind):
    path = tmp_path / "model"
    for content in (NEW, OLD, b""):
        with atomic_output(kind(path), size_hint=size_hint) as file:
            file.write(content)
            assert path.exists() == (content != NEW)
        assert path.read_bytes() == content
        assert entries(tmp_path) == ["model"]


def test_the_target_is_old_until_the_block_ends(target):
    with atomic_output(target) as file:
        file.write(NEW)
        file.flush()
        assert target.read_bytes() == OLD
        hidden, visible = entries(target.parent)
        assert visible == target.name
        assert re.fullmatch(r"\.deeplock-[0-9a-f]{32}\.tmp", hidden)
    assert target.read_bytes() == NEW


def test_the_hidden_name_is_another_one_each_time_and_never_taken_over(tmp_path, monkeypatch):
    with atomic_output(tmp_path / "a") as first, atomic_output(tmp_path / "b") as second:
        assert len(entries(tmp_path)) == 2
        first.write(b"1")
        second.write(b"2")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "known")
    victim = tmp_path / "victim"
    os.symlink(victim, tmp_path / ".deeplock-known.tmp")
    with pytest.raises(FileAccessError), atomic_output(tmp_path / "a") as file:
        file.write(NEW)
    assert not victim.exists()
    assert (tmp_path / "a").read_bytes() == b"1"


def test_reading_seeking_and_writing_by_descriptor(target):
    with atomic_output(target, size_hint=1000) as file:
        os.pwrite(file.fileno(), b"0123456789", 0)
        file.seek(4)
        file.write(b"x")
        file.seek(0)
        assert file.read() == b"0123x56789"
        file.seek(2)
    assert target.read_bytes() == b"0123x56789"


def test_a_block_may_close_its_file(target):
    with atomic_output(target) as file:
        file.write(NEW)
        file.close()
    assert target.read_bytes() == NEW


def test_everything_is_flushed_before_the_rename_and_the_directory_after(target, monkeypatch):
    calls = []

    def record(name, describe):
        original = getattr(os, name)

        def recorded(*arguments):
            calls.append(describe(*arguments))
            return original(*arguments)

        monkeypatch.setattr(os, name, recorded)

    def flushed(descriptor):
        status = os.fstat(descriptor)
        return "flush directory" if stat.S_ISDIR(status.st_mode) else f"flush {status.st_size} bytes"

    record("fsync", flushed)
    record("replace", lambda source, destination: f"rename to {os.path.basename(destination)}")
    with atomic_output(target) as file:
        file.write(NEW)
    assert calls == [f"flush {len(NEW)} bytes", f"rename to {target.name}", "flush directory"]


def test_space_set_aside_in_vain_is_given_back(target):
    with atomic_output(target, size_hint=64 << 20) as file:
        file.write(OLD)
    assert target.read_bytes() == OLD
    assert os.stat(target).st_blocks * 512 < 1 << 20


def test_no_descriptor_is_left_open(target):
    before = open_descriptors()
    with atomic_output(target) as file:
        file.write(NEW)
    with pytest.raises(Interruption):
        write(target, then=Interruption())
    with pytest.raises(FileAccessError):
        write(target.parent)
    assert open_descriptors() == before


# Permissions and links


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o444, 0o755])
def test_the_permissions_of_an_old_file_are_kept(target, permissions):
    target.chmod(permissions)
    before = os.umask(0o027)
    try:
        with atomic_output(target) as file:
            file.write(NEW)
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == permissions  # also before it is finished
    finally:
        os.umask(before)
    assert mode(target) == permissions
    assert target.read_bytes() == NEW


def test_the_new_content_of_a_private_file_is_never_open_to_others(target, monkeypatch):
    target.chmod(0o600)
    made = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda *arguments: made.append(arguments) or original(*arguments))
    write(target)
    assert made[0][2] == 0o600
    assert mode(target) == 0o600


@pytest.mark.parametrize(("mask", "permissions"), [(0o022, 0o644), (0o077, 0o600), (0, 0o666)])
def test_a_new_file_gets_the_permissions_that_open_gives(tmp_path, mask, permissions):
    before = os.umask(mask)
    try:
        with atomic_output(tmp_path / "a"):
            pass
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert mode(tmp_path / "a") == permissions


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_the_owner_of_an_old_file_is_kept(target):
    os.chown(target, 12345, 54321)
    with atomic_output(target):
        pass
    assert (target.stat().st_uid, target.stat().st_gid) == (12345, 54321)


def test_an_owner_that_cannot_be_kept_is_no_error(target, monkeypatch):
    def refused(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchown", refused)
    with atomic_output(target) as file:
        file.write(NEW)
    assert target.read_bytes() == NEW


@pytest.mark.parametrize("absolute", [True, False])
def test_a_symbolic_link_stays_and_its_file_is_replaced(target, absolute):
    directory = target.parent / "links"
    directory.mkdir()
    link, chain = directory / "link", directory / "chain"
    link.symlink_to(target if absolute else f"../{target.name}")
    chain.symlink_to("link")
    with atomic_output(chain) as file:
        file.write(NEW)
        assert len(entries(directory)) == 2  # the hidden file is on the disk of the file behind the link
    assert chain.is_symlink()
    assert link.is_symlink()
    assert target.read_bytes() == NEW
    assert entries(directory) == ["chain", "link"]
    with pytest.raises(Interruption), atomic_output(chain):
        raise Interruption
    assert target.read_bytes() == NEW


def test_a_symbolic_link_to_no_file_yet(tmp_path):
    (tmp_path / "link").symlink_to("target")
    with atomic_output(tmp_path / "link") as file:
        file.write(NEW)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == NEW


def test_another_hard_link_keeps_the_old_content(target):
    other = target.parent / "other"
    os.link(target, other)
    with atomic_output(target) as file:
        file.write(NEW)
    assert (target.read_bytes(), other.read_bytes()) == (NEW, OLD)


def test_the_target_does_not_follow_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with atomic_output("a") as file:
        os.chdir("elsewhere")
        file.write(NEW)
    assert entries(tmp_path) == ["a", "elsewhere"]
    assert entries(tmp_path / "elsewhere") == []


# Going wrong


@pytest.mark.parametrize("written", [b"", b"x", NEW])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Interruption, GeneratorExit])
def test_an_exception_leaves_the_target_as_it_was(target, error, written):
    with pytest.raises(error) as caught:
        write(target, written, then=error("the block's own"), size_hint=len(written))
    assert caught.value.args == ("the block's own",)
    assert_untouched(target)


def test_an_exception_leaves_no_new_file(tmp_path):
    with pytest.raises(Interruption):
        write(tmp_path / "a", then=Interruption())
    assert entries(tmp_path) == []


@pytest.mark.parametrize("name", ["open", "fchmod", "fstat", "ftruncate", "fsync", "replace", "statvfs"])
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_any_call_may_fail(target, monkeypatch, name, reason):
    def fails(*arguments, **keywords):
        raise OSError(reason, os.strerror(reason), target)

    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails)
        with pytest.raises(FileAccessError) as caught, atomic_output(target, size_hint=5) as file:
            file.write(NEW)
    assert caught.value.errno == reason
    assert str(caught.value).startswith(f"{target}: cannot be written: ")
    assert isinstance(caught.value.__cause__, OSError)
    assert_untouched(target)
    assert open_descriptors() == before


@pytest.mark.parametrize("name", ["open", "fchmod", "fsync", "replace"])
def test_an_interruption_in_any_call(target, monkeypatch, name):
    original = getattr(os, name)

    def interrupted(*arguments):
        if name != "replace":
            original(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, name, interrupted)
        with pytest.raises(KeyboardInterrupt), atomic_output(target) as file:
            file.write(NEW)
    assert_untouched(target)


def test_a_directory_that_cannot_be_flushed_does_not_undo_the_rename(target, monkeypatch):
    original = os.open

    def fails(path, flags, *mode):
        if flags & os.O_DIRECTORY:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(path, flags, *mode)

    monkeypatch.setattr(os, "open", fails)
    with atomic_output(target) as file:
        file.write(NEW)
    assert target.read_bytes() == NEW


PLAIN_WORDS = {
    errno.ENOSPC: "there is no space left",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENOENT: "no such file or directory",
    errno.EISDIR: "it is a directory",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.EIO: os.strerror(errno.EIO),
}


@pytest.mark.parametrize("reason", PLAIN_WORDS)
def test_a_failed_write_in_the_block(target, reason):
    with pytest.raises(FileAccessError) as caught:
        write(target, then=OSError(reason, os.strerror(reason)))
    assert str(caught.value).startswith(f"{target}: cannot be written: {PLAIN_WORDS[reason]}")
    assert caught.value.errno == reason
    assert_untouched(target)


def test_an_error_of_another_file_is_not_taken_for_this_one_s(target):
    other = target.parent / "none"
    with pytest.raises(FileNotFoundError), atomic_output(target):
        open(other).close()
    words = re.escape(f"{other}: cannot be read: no such file")
    with pytest.raises(FileAccessError, match=words), atomic_output(target), file_errors(str(other), "read"):
        open(other).close()
    with pytest.raises(TimeoutError), atomic_output(target):
        raise TimeoutError("of something that is no file")
    assert_untouched(target)


def in_a_subprocess(program: str, *arguments) -> subprocess.CompletedProcess:
    preamble = "import os, sys\nfrom deeplock_kernels.files import atomic_output\n"
    return subprocess.run(
        [sys.executable, "-c", preamble + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_real_limit_on_the_file_size(target, size):
    """The kernel refuses the write itself: at the flush for a small one, in the block for a large one."""
    program = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
try:
    with atomic_output(sys.argv[1]) as file:
        file.write(bytes(int(sys.argv[2])))
        print("the block is done")
except OSError as error:
    print(type(error).__name__, error.errno, error)
"""
    done = in_a_subprocess(program, target, size)
    words = f"FileAccessError {errno.EFBIG} {target}: cannot be written: it is larger than the disk"
    assert words in done.stdout, done.stderr
    assert ("the block is done" in done.stdout) == (size == 100)
    assert done.stderr == ""
    assert_untouched(target)


def test_an_interruption_is_not_hidden_by_a_full_disk(target):
    program = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
try:
    with atomic_output(sys.argv[1]) as file:
        file.write(bytes(100))
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("interrupted")
"""
    done = in_a_subprocess(program, target)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
    assert_untouched(target)


def test_too_little_free_space_is_told_before_anything_is_made(target, monkeypatch):
    free = os.statvfs(target).f_bavail * os.statvfs(target).f_frsize
    need = free + (1 << 40)
    with pytest.raises(FileAccessError) as caught, atomic_output(target, size_hint=need):
        pytest.fail("the block ran")
    assert caught.value.errno == errno.ENOSPC
    words = re.escape(f"{target}: cannot be written: there is no space left; ")
    words += rf".* \({need} bytes are needed, \d+ are free\)"
    assert re.fullmatch(words, str(caught.value))
    assert_untouched(target)


def pretend_blocks(monkeypatch, target, count):
    """Let the file system count this many blocks, free ones and those free for this user."""
    real = list(os.statvfs(target))
    real[2:5] = [count] * 3
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(real))


def test_space_that_the_kernel_cannot_set_aside(target, monkeypatch):
    pretend_blocks(monkeypatch, target, 1 << 60)
    with pytest.raises(FileAccessError) as caught, atomic_output(target, size_hint=1 << 62):
        pytest.fail("the block ran")
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert_untouched(target)


def test_a_file_system_that_counts_no_blocks(target, monkeypatch):
    pretend_blocks(monkeypatch, target, 0)
    write(target, size_hint=len(NEW))
    assert target.read_bytes() == NEW


@pytest.mark.parametrize("reason", [None, errno.EOPNOTSUPP])
def test_without_fallocate_the_file_is_just_written(target, monkeypatch, reason):
    import ctypes

    class Library:
        def __init__(self, *arguments, **keywords):
            if reason:
                self.fallocate = Library.refuse

        def refuse(*arguments):
            ctypes.set_errno(reason)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", Library)
    write(target, size_hint=len(NEW))
    assert target.read_bytes() == NEW


def test_targets_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("directory")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").write_bytes(OLD)
    before = entries(tmp_path)
    for name, reason in {
        "directory": errno.EISDIR,
        "link": errno.EISDIR,
        "new/": errno.EISDIR,
        "none/new": errno.ENOENT,
        "file/new": errno.ENOTDIR,
        "file/": errno.ENOTDIR,
        "circle": errno.ELOOP,
        "pipe": errno.EINVAL,
        "n" * 256: errno.ENAMETOOLONG,
    }.items():
        path = f"{tmp_path}/{name}"
        with pytest.raises(FileAccessError) as caught, atomic_output(path):
            pytest.fail("the block ran")
        assert caught.value.errno == reason, name
        assert str(caught.value).startswith(f"{path}: cannot be written: ")
    assert entries(tmp_path) == before
    with pytest.raises(FileAccessError, match="device"), atomic_output("/dev/null"):
        pytest.fail("the block ran")


def test_the_longest_name_can_be_written(tmp_path):
    with atomic_output(tmp_path / ("n" * 255)) as file:
        file.write(NEW)
    assert (tmp_path / ("n" * 255)).read_bytes() == NEW


@pytest.mark.parametrize("path", [None, 3, b"model", "", "a\0b"])
def test_what_is_no_path(path):
    with pytest.raises(ParameterError, match=r"^path: got "), atomic_output(path):
        pytest.fail("the block ran")
    with pytest.raises(ParameterError, match=r"^src: got "):
        check_distinct(path, "a")
    with pytest.raises(ParameterError, match=r"^dst: got "):
        check_distinct("a", path)


@pytest.mark.parametrize("size_hint", [-1, 1.0, "1", True, False, b"", []])
def test_what_is_no_size(tmp_path, size_hint):
    with pytest.raises(ParameterError, match=r"^size_hint: got "):
        write(tmp_path / "a", size_hint=size_hint)
    assert entries(tmp_path) == []


# Killed

STEPS = ("open", "fchown", "fchmod", "write", "ftruncate", "fsync", "replace", "open 2", "fsync 2")


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_around_any_call(target, step, moment):
    program = """
import signal
target, step, moment, count = sys.argv[1:]
name, _, number = step.partition(" ")
left = int(number or 1)
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def deadly(*arguments):
    global left
    left -= 1
    if not left and moment == "before":
        kill()
    result = original(*arguments)
    if not left:
        kill()
    return result
if name != "write":
    original = getattr(os, name)
    setattr(os, name, deadly)
with atomic_output(target, size_hint=int(count)) as file:
    half = int(count) // 2
    file.write(bytes(half))
    if name == "write":
        file.flush()
        if moment == "before":
            kill()
    file.write(bytes(int(count) - half))
    if name == "write":
        kill()
"""
    done = in_a_subprocess(program, target, step, moment, len(NEW))
    assert done.returncode == -signal.SIGKILL, done.stderr
    renamed = step in ("open 2", "fsync 2") or (step, moment) == ("replace", "after")
    assert target.read_bytes() == (bytes(len(NEW)) if renamed else OLD)
    left = [name for name in entries(target.parent) if name != target.name]
    assert all(re.fullmatch(r"\.deeplock-[0-9a-f]{32}\.tmp", name) for name in left)
    assert len(left) == (not renamed and (step, moment) != ("open", "before"))


def test_readers_never_see_a_mixture(target):
    """One thread replaces the file over and over, another reads it."""
    contents = [bytes([value]) * 100_000 for value in range(4)]
    target.write_bytes(contents[0])
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(target.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(40):
            with atomic_output(target) as file:
                file.write(contents[turn % 4])
    finally:
        done.set()
        reader.join()
    assert seen
    assert seen <= set(contents)


# Source and destination


def test_the_same_file_by_any_name(target, monkeypatch):
    directory = target.parent
    (directory / "sub").mkdir()
    (directory / "link").symlink_to(target.name)
    (directory / "links").symlink_to(".")
    os.link(target, directory / "hard")
    monkeypatch.chdir(directory)
    names = [
        target,
        str(target),
        target.name,
        f"./{target.name}",
        f"sub/../{target.name}",
        f"sub/..//./{target.name}",
    ]
    names += ["link", "hard", f"links/{target.name}", f"{directory}/links/links/link"]
    for source in names:
        for destination in names:
            with pytest.raises(
                SameFileError, match=f"^dst: got {re.escape(str(destination))}, which is"
            ):
                check_distinct(source, destination)
    assert target.read_bytes() == OLD


def test_the_same_name_of_no_file_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("none")
    for destination in ("none", "./none", tmp_path / "none", "link"):
        with pytest.raises(SameFileError):
            check_distinct("none", destination)


def test_other_files_are_distinct(target):
    copy = target.parent / "copy"
    check_distinct(target, copy)
    check_distinct(copy, target)
    copy.write_bytes(OLD)
    check_distinct(target, copy)
    (target.parent / "link").symlink_to("copy")
    check_distinct(target, target.parent / "link")


def test_a_destination_that_is_no_file(target):
    with pytest.raises(FileAccessError, match="cannot be written: it is a directory"):
        check_distinct(target, target.parent)
    with pytest.raises(FileAccessError, match="cannot be written: it is a device"):
        check_distinct(target, "/dev/null")
    with pytest.raises(FileAccessError, match="cannot be written: a part of its path is no directory"):
        check_distinct(target, target / "x")
    with pytest.raises(FileAccessError, match="cannot be read: a part of its path is no directory"):
        check_distinct(target / "x", target)
