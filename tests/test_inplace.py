"""Locking in place: after a crash at any step, or a loss of power, recovery gives the old file or the new one."""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import operator
import os
import random
import secrets
import stat
import sys
import zlib

import processes
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BITS, KEYS, SCHEDULES, painted

from deeplock_kernels import errors
from deeplock_kernels.checkpoints import inplace, journal, streaming
from deeplock_kernels.checkpoints.formats.base import Edit, Layout, TensorEntry
from deeplock_kernels.checkpoints.inplace import lock_file_in_place, recover_file, unlock_file_in_place
from deeplock_kernels.checkpoints.streaming import (
    lock_file,
    read_header,
    unlock_file,
    verify_file,
)
from deeplock_kernels.cli import main
from deeplock_kernels.errors import (
    AlreadyLockedError,
    ContainerError,
    FileAccessError,
    InterruptedLockError,
    NotLockedError,
    TamperedError,
    WrongKeyError,
)
from deeplock_kernels.keys import MasterKey
from deeplock_kernels.sboxes import SBox

KEY = KEYS[256]
WINDOW = 1024
NAME, JOURNAL = "model", ".model.deeplock-journal"
UNNAMED = f"{JOURNAL}.new"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", WINDOW)


@pytest.fixture
def quick(monkeypatch):
    """Let nothing wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@functools.cache
def plain() -> bytes:
    tensors = {"a": painted(1500), "b": painted(777, 5), "c": painted(0), "d": painted(1000, 3)}
    return safetensors.numpy.save(tensors, {"x": "y"})


def write(folder, content: bytes):
    path = folder / NAME
    path.write_bytes(content)
    return path


def entries(folder) -> dict[str, bytes]:
    return {entry.name: (folder / entry.name).read_bytes() for entry in os.scandir(folder)}


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns) for path in folder.iterdir()}


# What becomes of a file


@pytest.fixture
def fixed_salt(monkeypatch):
    monkeypatch.setattr(secrets, "token_bytes", lambda count=32: bytes(range(50, 50 + count)))


@pytest.mark.parametrize("window", [100, 1024, 16 << 20])
@pytest.mark.parametrize("keywords", [{}, {"only": "b"}, {"seal": False}, {"only": ["a", "c"], "sbox": "sm4"}], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_file_becomes_what_the_streams_write(tmp_path, quick, fixed_salt, monkeypatch, schedule, keywords, window):
    monkeypatch.setattr(streaming, "WINDOW", window)
    (tmp_path / "source").write_bytes(plain())
    expected = lock_file(tmp_path / "source", tmp_path / "locked", KEY, schedule=schedule, **keywords)
    path = write(tmp_path, plain())
    seen = []
    assert lock_file_in_place(path, KEY, schedule=schedule, progress=seen.append, **keywords) == expected
    assert path.read_bytes() == (tmp_path / "locked").read_bytes()
    assert sum(seen) == 1500 + 777 + 1000
    unlock_file_in_place(path, KEY)
    assert path.read_bytes() == plain()
    assert sorted(os.listdir(tmp_path)) == ["locked", NAME, "source"]


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 300), max_size=6),
    st.integers(16, 400),
    st.sampled_from(SCHEDULES),
    st.sampled_from(BITS),
)
def test_any_shapes_and_windows(tmp_path_factory, sizes, window, schedule, bits):
    folder = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "WINDOW", window)
        patch.setattr(os, "fsync", lambda descriptor: None)
        raw = safetensors.numpy.save({f"{i}": painted(size, i) for i, size in enumerate(sizes)})
        path = write(folder, raw)
        header = lock_file_in_place(path, KEYS[bits], schedule=schedule)
        assert header == read_header(path) == verify_file(path, KEYS[bits])
        unlock_file(path, folder / "restored", KEYS[bits])
        assert (folder / "restored").read_bytes() == raw
        unlock_file_in_place(path, KEYS[bits])
        assert path.read_bytes() == raw
        assert len(os.listdir(folder)) == 2


def test_an_own_s_box_has_to_be_given_again(tmp_path, quick):
    box = SBox(bytes(random.Random(3).sample(range(256), 256)))
    path = write(tmp_path, plain())
    lock_file_in_place(path, KEY, sbox=box)
    with pytest.raises(errors.SBoxError):
        unlock_file_in_place(path, KEY)
    unlock_file_in_place(path, KEY, sbox=box)
    assert path.read_bytes() == plain()


def test_mode_owner_and_links_are_kept(tmp_path):
    path = write(tmp_path, plain())
    path.chmod(0o640)
    before = path.stat()
    (tmp_path / "link").symlink_to(NAME)
    lock_file_in_place(tmp_path / "link", KEY)
    after = path.stat()
    assert (after.st_ino, after.st_mode, after.st_uid) == (before.st_ino, before.st_mode, before.st_uid)
    assert after.st_mtime_ns > before.st_mtime_ns
    assert (tmp_path / "link").is_symlink()
    verify_file(path, KEY)
    assert sorted(os.listdir(tmp_path)) == ["link", NAME]


def test_the_journal_is_private_and_holds_nothing_plain_when_locking(tmp_path, monkeypatch):
    path = write(tmp_path, plain())
    seen = []

    def look(_):
        held = (tmp_path / JOURNAL).read_bytes()
        seen.append(stat.S_IMODE((tmp_path / JOURNAL).stat().st_mode))
        assert not any(bytes(painted(16, start)) in held for start in range(251))

    umask = os.umask(0)
    try:
        lock_file_in_place(path, KEY, progress=look)
    finally:
        os.umask(umask)
    assert seen == [0o600] * 4


def test_the_journal_is_overwritten_before_it_goes(tmp_path, quick, monkeypatch):
    path = write(tmp_path, plain())
    lock_file_in_place(path, KEY)
    left = []
    unlink = os.unlink

    def look(name):
        if os.path.exists(name):
            left.append(open(name, "rb").read())  # noqa: SIM115
        unlink(name)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", look)
        patch.setattr(sys, "unraisablehook", lambda unraisable: None)
        unlock_file_in_place(path, KEY)
    (held,) = left
    assert len(held) > WINDOW
    assert not any(bytes(painted(16, start)) in held for start in range(251))


# Refusals


def refused(folder, error, words, function, *arguments, **keywords):
    before = snapshot(folder)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=words) as caught:
        function(*arguments, **keywords)
    assert type(caught.value) is error
    assert snapshot(folder) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_what_is_locked_or_is_not(tmp_path, quick):
    path = write(tmp_path, plain())
    refused(tmp_path, NotLockedError, None, unlock_file_in_place, path, KEY)
    lock_file_in_place(path, KEY)
    refused(tmp_path, AlreadyLockedError, "locked already", lock_file_in_place, path, KEY)
    refused(tmp_path, WrongKeyError, None, unlock_file_in_place, path, KEY[::-1])
    raw = path.read_bytes()
    write(tmp_path, raw[:-1] + bytes([raw[-1] ^ 1]))
    refused(tmp_path, TamperedError, "'d'", unlock_file_in_place, path, KEY)


def test_files_that_cannot_be_changed_in_place(tmp_path):
    path = write(tmp_path, plain())
    os.link(path, tmp_path / "other")
    refused(tmp_path, FileAccessError, "hard link", lock_file_in_place, path, KEY)
    (tmp_path / "other").unlink()
    refused(tmp_path, FileAccessError, "no such file", lock_file_in_place, tmp_path / "nothing", KEY)
    refused(tmp_path, FileAccessError, "it is a directory", lock_file_in_place, tmp_path, KEY)
    write(tmp_path, plain()[:-1])
    refused(tmp_path, ContainerError, None, lock_file_in_place, path, KEY)


def test_two_at_once(tmp_path):
    path = write(tmp_path, plain())
    found = []

    def meanwhile(_):
        for function in (lock_file_in_place, unlock_file_in_place, recover_file):
            with pytest.raises(FileAccessError, match="another run is at it"):
                function(path, KEY)
            found.append(function)

    lock_file_in_place(path, KEY, progress=meanwhile)
    assert len(found) == 12
    verify_file(path, KEY)


class Crash(BaseException):
    """The process ends here."""


def crash(*_):
    raise Crash


def interrupted(folder, content=None, function=lock_file_in_place, steps=2, **keywords):
    """Leave a file as a process does that is killed after some steps."""
    path = write(folder, plain() if content is None else content)
    seen = []

    def count(_):
        seen.append(1)
        if len(seen) == steps:
            raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(journal.Journal, "find", crash)
        with pytest.raises(InterruptedLockError, match="and so did taking it back"):
            function(path, KEY, progress=count, **keywords)
    return path


def test_everything_refuses_a_file_that_is_neither_old_nor_new(tmp_path, monkeypatch):
    path = interrupted(tmp_path)
    (tmp_path / "whole").write_bytes(plain())
    (tmp_path / "link").symlink_to(NAME)
    words = "deeplock recover"
    for name in (NAME, "link"):
        for function in (lock_file_in_place, unlock_file_in_place, verify_file):
            refused(tmp_path, InterruptedLockError, words, function, tmp_path / name, KEY)
        refused(tmp_path, InterruptedLockError, words, lock_file, tmp_path / name, tmp_path / "new", KEY)
        refused(tmp_path, InterruptedLockError, words, unlock_file, tmp_path / name, tmp_path / "new", KEY)
        refused(tmp_path, InterruptedLockError, words, read_header, tmp_path / name)
        refused(tmp_path, InterruptedLockError, words, lock_file, tmp_path / "whole", tmp_path / name, KEY)
    recover_file(tmp_path / "link", KEY)
    verify_file(path, KEY)


@pytest.mark.parametrize("undo", [False, True])
def test_recovery_wants_the_key(tmp_path, quick, undo):
    path = interrupted(tmp_path)
    refused(tmp_path, WrongKeyError, None, recover_file, path, KEY[::-1], undo=undo)
    refused(tmp_path, WrongKeyError, None, recover_file, path, KEYS[128], undo=undo)
    recover_file(path, KEY, undo=undo)
    assert (path.read_bytes() == plain()) == undo


def test_recovery_of_a_whole_file(tmp_path, quick):
    path = write(tmp_path, plain())
    refused(tmp_path, FileAccessError, "no such file", recover_file, tmp_path / "nothing", KEY)
    assert recover_file(path, KEY) is None
    assert path.read_bytes() == plain()
    header = lock_file_in_place(path, KEY)
    assert recover_file(path, KEY, undo=True) == header


def test_an_own_s_box_is_needed_to_recover(tmp_path, quick):
    box = SBox(bytes(random.Random(3).sample(range(256), 256)))
    path = interrupted(tmp_path, sbox=box)
    refused(tmp_path, errors.SBoxError, None, recover_file, path, KEY)
    recover_file(path, KEY, sbox=box)
    verify_file(path, KEY)


def test_another_file_is_not_taken_for_the_interrupted_one(tmp_path, quick):
    """Put there by somebody who would not wait, without looking for the journal."""
    path = interrupted(tmp_path, steps=3)
    mixed = path.read_bytes()
    for undo in (False, True):
        write(tmp_path, plain())
        refused(tmp_path, InterruptedLockError, "not as the interrupted", recover_file, path, KEY, undo=undo)
    os.unlink(tmp_path / JOURNAL)
    lock_file_in_place(write(tmp_path, plain()), KEY)
    locked = path.read_bytes()
    path = interrupted(tmp_path, locked, unlock_file_in_place, 3)
    for undo in (False, True):
        write(tmp_path, locked)
        refused(tmp_path, InterruptedLockError, "not as the interrupted", recover_file, path, KEY, undo=undo)
    assert len(mixed) == len(locked)


def test_a_damaged_journal(tmp_path, quick):
    path = interrupted(tmp_path, steps=2)
    whole = (tmp_path / JOURNAL).read_bytes()
    head = 4096
    for cut in (0, 10, 60, 200):
        (tmp_path / JOURNAL).write_bytes(whole[:cut])
        refused(tmp_path, ContainerError, "was damaged", recover_file, path, KEY)
    for i in [*range(70), 150, 300]:
        (tmp_path / JOURNAL).write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        refused(tmp_path, ContainerError, "was damaged", recover_file, path, KEY)
    (tmp_path / JOURNAL).write_bytes(whole[:head] + bytes(b ^ 1 for b in whole[head:]))  # both records
    refused(tmp_path, ContainerError, "was damaged", recover_file, path, KEY)
    (tmp_path / JOURNAL).write_bytes(whole)
    recover_file(path, KEY, undo=True)
    assert path.read_bytes() == plain()


def test_the_time_of_a_file_that_is_taken_back(tmp_path, quick):
    path = write(tmp_path, plain())
    os.utime(path, ns=(10**18, 10**18))
    with pytest.raises(Crash):
        lock_file_in_place(path, KEY, progress=crash)
    assert path.read_bytes() == plain()
    assert path.stat().st_mtime_ns == 10**18


# A disk that crashes


class Disk:
    """Records what is written to the files of a directory, so that the disk can be had as after any crash.

    Parameters
    ----------
    folder
        Where the files are; they are written there as usual.
    """

    def __init__(self, folder, monkeypatch):
        self.log = []  # (operation, file number or None, arguments)
        self.start = entries(folder)
        self._folder, self._names = os.fspath(folder), {}
        for number, name in enumerate(sorted(self.start)):
            self._names[os.stat(os.path.join(self._folder, name)).st_ino] = number
        self._originals = {}
        for name in ("open", "pwrite", "ftruncate", "posix_fallocate", "fsync", "replace", "unlink"):
            self._originals[name] = getattr(os, name)
            monkeypatch.setattr(os, name, getattr(self, f"_{name}"))

    def _record(self, operation, descriptor, *arguments):
        """Of other files, such as those that hold compiled kernels, nothing is recorded."""
        number = self._names.get(os.fstat(descriptor).st_ino)
        if number is not None:
            self.log.append((operation, number, *arguments))

    def _open(self, path, flags, *mode):
        descriptor = self._originals["open"](path, flags, *mode)
        if flags & os.O_CREAT and os.path.dirname(path) == self._folder:
            assert flags & os.O_EXCL
            self._names[os.fstat(descriptor).st_ino] = number = 100 + len(self.log)
            self.log.append(("create", None, os.path.basename(path), number))
        return descriptor

    def _pwrite(self, descriptor, data, position):
        self._record("write", descriptor, position, bytes(data))
        return self._originals["pwrite"](descriptor, data, position)

    def _ftruncate(self, descriptor, size):
        self._record("resize", descriptor, size)
        return self._originals["ftruncate"](descriptor, size)

    def _posix_fallocate(self, descriptor, start, nbytes):
        self._record("extend", descriptor, start + nbytes)
        return self._originals["posix_fallocate"](descriptor, start, nbytes)

    def _fsync(self, descriptor):
        if os.path.samestat(os.fstat(descriptor), os.stat(self._folder)):
            self.log.append(("flush", None))
        else:
            self._record("flush", descriptor)

    def _replace(self, source, target):
        if os.path.dirname(source) == self._folder:
            self.log.append(("rename", None, os.path.basename(source), os.path.basename(target)))
        return self._originals["replace"](source, target)

    def _unlink(self, path):
        self._originals["unlink"](path)
        if os.path.dirname(path) == self._folder:
            self.log.append(("remove", None, os.path.basename(path)))

    def crashed(self, count, lost=None):
        """Give the files after so many operations.

        Parameters
        ----------
        lost
            A random number generator that says which of what was not flushed is lost, or torn; None to lose nothing.
        """
        done = self.log[:count]
        content = {number: bytearray(self.start[name]) for number, name in enumerate(sorted(self.start))}
        names = {name: number for number, name in enumerate(sorted(self.start))}
        flushed, kept_names = {}, 0
        for i, (operation, number, *_) in enumerate(done):
            if operation == "flush":
                flushed[number] = i
        directory = [i for i, entry in enumerate(done) if entry[1] is None and entry[0] != "flush"]
        unflushed = [i for i in directory if i > flushed.get(None, -1)]
        kept_names = len(unflushed) if lost is None else lost.randint(0, len(unflushed))
        dropped = set(unflushed[kept_names:])
        how = None if lost is None else lost.random()
        for i, (operation, number, *arguments) in enumerate(done):
            if operation == "create":
                content.setdefault(arguments[1], bytearray())
            if i in dropped or operation == "flush":
                continue
            if number is None:
                self._rename(names, operation, arguments)
                continue
            data = content[number]
            if lost is not None and i > flushed.get(number, -1) and lost.random() > how:
                if operation == "write" and lost.random() < 0.7:  # torn
                    position, written = arguments
                    cut = lost.randint(0, len(written))
                    arguments = [position, written[:cut]] if lost.random() < 0.5 else [position + cut, written[cut:]]
                else:
                    continue
            if operation == "write":
                position, written = arguments
                data.extend(bytes(max(0, position + len(written) - len(data))))
                data[position : position + len(written)] = written
            else:
                (size,) = arguments
                data.extend(bytes(max(0, size - len(data))))
                if operation == "resize":
                    del data[size:]
        return {name: bytes(content[number]) for name, number in names.items()}

    @staticmethod
    def _rename(names, operation, arguments):
        if operation == "create":
            names[arguments[0]] = arguments[1]
        elif operation == "rename":
            names[arguments[1]] = names.pop(arguments[0])
        else:
            del names[arguments[0]]


def fill(folder, content):
    for name in os.listdir(folder):
        os.unlink(folder / name)
    for name, data in content.items():
        (folder / name).write_bytes(data)


def recorded(folder, monkeypatch, function, *arguments, **keywords):
    """Call a function on a recorded disk, whose log is then the truth."""
    with monkeypatch.context() as patch:
        disk = Disk(folder, patch)
        function(*arguments, **keywords)
    assert disk.crashed(len(disk.log)) == entries(folder)
    return disk


CHANGES = {
    "lock": lambda path, schedule: lock_file_in_place(path, KEY, schedule=schedule),
    "unlock": lambda path, _: unlock_file_in_place(path, KEY),
}


@pytest.fixture
def change(tmp_path, request, monkeypatch, quick):
    """A recorded lock or unlock in place, with the old and the new file."""
    name, schedule = request.param
    path = write(tmp_path, plain())
    if name == "unlock":
        lock_file_in_place(path, KEY, schedule=schedule)
    old = path.read_bytes()
    disk = recorded(tmp_path, monkeypatch, CHANGES[name], path, schedule)
    return disk, old, path.read_bytes()


every_change = pytest.mark.parametrize(
    "change", [("lock", "counter"), ("unlock", "counter"), ("lock", "expansion")], indirect=True, ids="-".join
)


def check_recovery(folder, content, old, new, undo, *, log=None):
    """Recover files as a crash left them; the result must be one of the two, and nothing else may be there."""
    fill(folder, content)
    mixed = JOURNAL in content
    if not mixed:
        assert content[NAME] in (old, new)
    else:
        with pytest.raises(InterruptedLockError):
            read_header(folder / NAME)
    header = recover_file(folder / NAME, KEY, undo=undo)
    expected = content[NAME] if not mixed else old if undo else new
    assert entries(folder) == {NAME: expected}
    assert (header is None) == (expected == plain())


@every_change
@pytest.mark.parametrize("undo", [False, True])
def test_a_crash_at_every_step(tmp_path, change, undo):
    disk, old, new = change
    found = []
    for count in range(len(disk.log) + 1):
        content = disk.crashed(count)
        check_recovery(tmp_path, content, old, new, undo)
        found.append(JOURNAL in content)
    assert len(found) > 25
    assert sum(found) > 15


@every_change
def test_a_loss_of_power_at_every_step(tmp_path, change, quick):
    disk, old, new = change
    lost = random.Random(7)
    for count in range(len(disk.log) + 1):
        for turn in range(20):
            check_recovery(tmp_path, disk.crashed(count, lost), old, new, turn % 2 == 0)


@every_change
def test_crashes_while_recovering(tmp_path, change, monkeypatch, quick):
    """In one direction and then in any other, with power lost as well."""
    disk, old, new = change
    lost = random.Random(8)
    counts = [count for count in range(len(disk.log)) if JOURNAL in disk.crashed(count)]
    for count in lost.sample(counts, 20):
        content = disk.crashed(count, lost)
        for depth in range(3):
            if JOURNAL not in content:
                break
            fill(tmp_path, content)
            undo = lost.random() < 0.5
            again = recorded(tmp_path, monkeypatch, recover_file, tmp_path / NAME, KEY, undo=undo)
            assert entries(tmp_path) == {NAME: old if undo else new}
            for _ in range(6):
                after = again.crashed(lost.randint(0, len(again.log)), lost)
                if JOURNAL not in after:
                    assert after[NAME] == (old if undo else new)
                check_recovery(tmp_path, after, old, new, lost.random() < 0.5)
            content = again.crashed(lost.randint(0, len(again.log) - 8), lost if depth else None)


# Going wrong without a crash


MUTATING = ("open", "pwrite", "preadv", "ftruncate", "posix_fallocate", "fsync", "replace")


class Fault:
    """Lets one call of the operating system fail; those after it work again, or none does.

    Parameters
    ----------
    count
        Which call; 0 is the first one.
    error
        Gives what is raised.
    lasting
        Whether all writes after it fail as well.
    """

    def __init__(self, monkeypatch, count, error, *, lasting=False, names=MUTATING):
        self.left, self._error, self._lasting, self.hit = count, error, lasting, None
        for name in names:
            monkeypatch.setattr(os, name, self._failing(name, getattr(os, name)))

    def _failing(self, name, original):
        def call(*arguments, **keywords):
            self.left -= 1
            if self.left == -1 or (self._lasting and self.left < 0 and name != "preadv"):
                self.hit = self.hit or name
                raise self._error()
            return original(*arguments, **keywords)

        return call


def no_space():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken():
    return OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("function", [lock_file_in_place, unlock_file_in_place])
@pytest.mark.parametrize("error", [no_space, broken, KeyboardInterrupt])
def test_any_call_may_fail_and_the_file_is_as_it_was(tmp_path, quick, fixed_salt, monkeypatch, function, error):
    path = write(tmp_path, plain())
    lock_file_in_place(path, KEY)
    locked = path.read_bytes()
    unlock_file_in_place(path, KEY)  # so that no kernel has to be made below
    old = plain() if function is lock_file_in_place else locked
    seen, finished = set(), 0
    for count in itertools.count():
        path = write(tmp_path, old)
        with monkeypatch.context() as patch:
            fault = Fault(patch, count, error)
            raised = None
            try:
                function(path, KEY)
            except (FileAccessError, KeyboardInterrupt) as caught:
                raised = caught
        if fault.hit is None:
            break
        if raised is not None and path.read_bytes() == old:
            seen.add(fault.hit)
            assert type(raised) is (KeyboardInterrupt if error is KeyboardInterrupt else FileAccessError)
            assert getattr(raised, "errno", None) == getattr(error(), "errno", None)
            assert entries(tmp_path) == {NAME: old}
        else:  # what fails while the journal is cleared away is left out, and an interruption comes too late
            finished += 1
            assert path.read_bytes() == (locked if function is lock_file_in_place else plain())
            assert (raised is None) == (error is not KeyboardInterrupt)
            assert entries(tmp_path).keys() == {NAME}
    assert finished < 9
    assert seen >= {"pwrite", "preadv", "ftruncate", "posix_fallocate", "fsync", "replace"}


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("function", [lock_file_in_place, unlock_file_in_place])
def test_a_disk_that_fails_for_good_leaves_what_can_be_recovered(tmp_path, quick, monkeypatch, function, undo):
    path = write(tmp_path, plain())
    lock_file_in_place(path, KEY)
    if function is lock_file_in_place:
        unlock_file_in_place(path, KEY)
    old, left = path.read_bytes(), 0
    for count in range(0, 60, 3):
        write(tmp_path, old)
        with monkeypatch.context() as patch:
            Fault(patch, count, broken, lasting=True, names=("pwrite", "ftruncate", "posix_fallocate", "replace"))
            try:
                function(path, KEY)
                break
            except (FileAccessError, InterruptedLockError) as error:
                raised = error
        assert str(raised).startswith(f"{path}: ")
        assert isinstance(raised, InterruptedLockError) == (JOURNAL in entries(tmp_path))
        if JOURNAL in entries(tmp_path):
            left += 1
            recover_file(path, KEY, undo=undo)
            assert (path.read_bytes() == old) == undo
        else:
            assert path.read_bytes() == old
            recover_file(path, KEY)
        assert entries(tmp_path).keys() == {NAME}
    assert left > 3


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_short_reads_and_writes(tmp_path, quick, monkeypatch, most):
    path = write(tmp_path, plain()[:])
    pwrite, preadv = os.pwrite, os.preadv
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda file, data, position: pwrite(file, data[:most], position))
        patch.setattr(os, "preadv", lambda file, views, position: preadv(file, [views[0][:most]], position))
        header = lock_file_in_place(path, KEY)
    assert verify_file(path, KEY) == header
    unlock_file_in_place(path, KEY)
    assert path.read_bytes() == plain()


def test_too_little_space_is_noticed_before_a_byte_changes(tmp_path, monkeypatch):
    """For the file, and for the journal."""
    path = write(tmp_path, plain())

    def full(*_):
        raise no_space()

    for module, name in ((inplace, "reserve"), (os, "posix_fallocate")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            patch.setattr(os, "pwrite", crash)
            refused(tmp_path, FileAccessError, "there is no space left", lock_file_in_place, path, KEY)


# Processes that are killed

KILLED = """
import os, random, signal, sys, time
from deeplock_kernels.checkpoints import streaming
from deeplock_kernels.checkpoints.inplace import lock_file_in_place, recover_file, unlock_file_in_place

streaming.WINDOW = 8192
path, key, wanted = sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3])
moments, turn, interrupted = random.Random(5), 0, 0
with open(path, "rb") as file:
    plain = file.read()

def change():
    lock_file_in_place(path, key, threads=1)
    unlock_file_in_place(path, key, threads=1)

change()
start = time.perf_counter()
change()
takes = time.perf_counter() - start
while interrupted < wanted and turn < 20 * wanted:
    turn += 1
    process = os.fork()
    if not process:
        while True:
            change()
    time.sleep(moments.uniform(0, 2 * takes))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    interrupted += len([name for name in os.listdir() if name.endswith("deeplock-journal")])
    if recover_file(path, key, undo=turn % 2 == 0, threads=1) is not None:
        unlock_file_in_place(path, key, threads=1)  # compares all seals
    with open(path, "rb") as file:
        assert file.read() == plain, turn
    assert os.listdir() == [path], turn
print(interrupted)
"""


def test_a_process_is_killed_at_any_moment(tmp_path):
    write(tmp_path, safetensors.numpy.save({"a": painted(30_001), "b": painted(10_000)}))
    assert int(processes.run(KILLED, NAME, KEY.hex(), 12, cwd=tmp_path)) == 12


# The command


def test_the_command(tmp_path, capsys, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    MasterKey.from_bytes(KEY).to_file("key")
    write(tmp_path, plain())
    assert main(["lock", "--in-place", NAME, "--key", "key", "--only", "a"]) == 0
    assert capsys.readouterr().out == f"{NAME}: 1 tensors locked and sealed, 1,500 bytes\n"
    assert main(["lock", NAME, "--in-place", "--key", "key"]) == 1
    assert "it is locked already" in capsys.readouterr().err
    assert main(["unlock", "--key", "key", NAME, "--in-pl"]) == 0
    assert capsys.readouterr().out == f"{NAME}: unlocked\n"
    interrupted(tmp_path)
    for command in (["lock", NAME, "--in-place"], ["unlock", NAME, "new"], ["verify", NAME]):
        assert main([*command, "--key", "key"]) == 1
        assert "`deeplock recover` finishes it, or takes it back with --undo" in capsys.readouterr().err
    assert main(["recover", NAME, "--key", "key", "--undo"]) == 0
    assert capsys.readouterr().out == f"{NAME}: whole, not locked\n"
    assert (tmp_path / NAME).read_bytes() == plain()
    interrupted(tmp_path)
    assert main(["recover", NAME, "--key", "key"]) == 0
    assert main(["recover", NAME, "--key", "key"]) == 0
    assert capsys.readouterr().out == f"{NAME}: whole, locked\n" * 2
    verify_file(NAME, KEY)
    assert sorted(os.listdir()) == ["key", NAME]


@pytest.mark.parametrize("command", ["lock", "unlock"])
def test_the_command_wants_either_a_file_or_in_place(tmp_path, capsys, command):
    for words in ([NAME], [NAME, "out", "--in-place"], ["--", NAME, "--in-place", "--key"]):
        with pytest.raises(SystemExit) as end:
            main([command, "--key", "key", *words])
        assert end.value.code == 2


# Another format, whose parts move each by another distance


class Chained:
    """A file of links: the length of the lock header and that itself, then tensors each behind its name and length.

    Behind each tensor are bytes that are one or two more while the file is locked, and at the end is a checksum.
    """

    name = "chained"

    def matches(self, start):
        return start.startswith(b"CHAINED")

    def read(self, file, size, source):
        assert file.read(7) == b"CHAINED"
        length = int.from_bytes(file.read(2), "big")
        header = file.read(length).decode() or None
        tensors, gaps = {}, [(7, 9 + length, 0)]
        while file.tell() < size - 4:
            name, nbytes = file.read(1).decode(), int.from_bytes(file.read(2), "big")
            start = file.tell()
            file.seek(nbytes, os.SEEK_CUR)
            more = 1 + len(tensors) % 2
            padding = file.read(more * (header is not None))
            assert padding == b"-" * len(padding)
            tensors[name] = TensorEntry(name, "U8", (nbytes,), start, start + nbytes)
            gaps.append((start + nbytes, start + nbytes + len(padding), more))
        detail = [*gaps, (size - 4, size, None)]
        sums = [(tensor.start, tensor.stop) for tensor in tensors.values()]
        return Layout(source, size, tensors, header, '{"chained":1}', (), sums, detail)

    def edits(self, layout, header, checksums):
        text = (header or "").encode()
        first, *gaps, last = layout.detail
        edits = [Edit(first[0], first[1], len(text).to_bytes(2, "big") + text)]
        edits += [Edit(start, stop, b"-" * more if header is not None else b"") for start, stop, more in gaps]
        return [*edits, Edit(last[0], last[1], functools.reduce(operator.xor, checksums, 7).to_bytes(4, "big"))]


CHAINED = Chained()


def chained() -> bytes:
    tensors = {"a": bytes(painted(700)), "b": bytes(painted(2100, 5)), "c": b"", "d": bytes(painted(900, 3))}
    links = [name.encode() + len(data).to_bytes(2, "big") + data for name, data in tensors.items()]
    total = functools.reduce(operator.xor, map(zlib.crc32, tensors.values()), 7)
    return b"CHAINED\0\0" + b"".join(links) + total.to_bytes(4, "big")


@pytest.fixture
def recognised(monkeypatch):
    for module in (inplace, streaming):
        monkeypatch.setattr(module, "recognise", lambda start: CHAINED)


@pytest.mark.parametrize("only", [None, "b"])
@pytest.mark.parametrize("name", ["lock", "unlock"])
def test_crashes_with_a_format_that_is_read_here_and_there(
    tmp_path, quick, monkeypatch, fixed_salt, recognised, name, only
):
    (tmp_path / "source").write_bytes(chained())
    lock_file(tmp_path / "source", tmp_path / "target", KEY, only=only)
    locked = (tmp_path / "target").read_bytes()
    fill(tmp_path, {NAME: chained() if name == "lock" else locked})
    function = functools.partial(lock_file_in_place, only=only) if name == "lock" else unlock_file_in_place
    disk = recorded(tmp_path, monkeypatch, function, tmp_path / NAME, KEY)
    old, new = (chained(), locked) if name == "lock" else (locked, chained())
    assert entries(tmp_path) == {NAME: new}
    lost = random.Random(9)
    for count in range(len(disk.log) + 1):
        for turn in range(6):
            content = disk.crashed(count, lost if turn > 1 else None)
            if JOURNAL not in content:
                assert content[NAME] in (old, new)
                continue
            undo = turn % 2 == 0
            fill(tmp_path, content)
            if turn == 3:  # on its way into the other direction it is interrupted again
                again = recorded(tmp_path, monkeypatch, recover_file, tmp_path / NAME, KEY, undo=not undo)
                content = again.crashed(lost.randint(0, len(again.log)), lost)
                fill(tmp_path, content)
                undo = undo if JOURNAL in content else not undo
            recover_file(tmp_path / NAME, KEY, undo=undo)
            if JOURNAL in content:
                assert entries(tmp_path) == {NAME: old if undo else new}
            else:
                assert entries(tmp_path)[NAME] in (old, new)


def test_a_model_in_several_files_is_refused(tmp_path, monkeypatch, recognised):
    path = write(tmp_path, chained())
    read = Chained.read
    monkeypatch.setattr(
        Chained, "read", lambda *arguments: dataclasses.replace(read(*arguments), companions=("weights",))
    )
    refused(tmp_path, ContainerError, "a model in several files, as 'weights'", lock_file_in_place, path, KEY)
