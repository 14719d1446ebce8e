"""Whatever the system does to the files that are locked, unlocked, rekeyed and verified: the target is old or new."""

from __future__ import annotations

import errno
import io
import itertools
import mmap
import os
import signal
import stat

import pytest
import safetensors.numpy
from support import KEYS, painted

from deeplock_kernels.checkpoints import streaming
from deeplock_kernels.checkpoints.streaming import (
    lock_file,
    read_header,
    rekey_file,
    unlock_file,
    verify_file,
)
from deeplock_kernels.errors import ContainerError, FileAccessError, TamperedError

KEY, OTHER_KEY = KEYS[256], KEYS[256][::-1]
OLD = b"the old target"

STREAMS = {
    "lock": (lambda source, target: lock_file(source, target, KEY), "plain"),
    "unlock": (lambda source, target: unlock_file(source, target, KEY), "locked"),
    "rekey": (lambda source, target: rekey_file(source, target, KEY, OTHER_KEY), "locked"),
}
streams = pytest.mark.parametrize("stream", STREAMS)
targets = pytest.mark.parametrize("target", ["old", "new"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A plain file and a locked one of several windows, and an old target."""
    monkeypatch.setattr(streaming, "WINDOW", 15_000)
    tensors = {"a": painted(30_000), "b": painted(20_000), "c": painted(5), "d": painted(0)}
    (tmp_path / "plain").write_bytes(safetensors.numpy.save(tensors, {"x": "y"}))
    lock_file(tmp_path / "plain", tmp_path / "locked", KEY)
    (tmp_path / "old").write_bytes(OLD)
    for function, name in STREAMS.values():  # so that no kernel has to be made below
        function(tmp_path / name, tmp_path / "new")
    (tmp_path / "new").unlink()
    return tmp_path


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mode) for path in folder.iterdir()}


def run(folder, stream, target):
    function, source = STREAMS[stream]
    function(folder / source, folder / target)


def check_new(folder, stream, target):
    """Check that a target is what it was to become."""
    path = folder / target
    if stream == "unlock":
        assert path.read_bytes() == (folder / "plain").read_bytes()
    else:
        verify_file(path, KEY if stream == "lock" else OTHER_KEY)


def failing(error, count):
    """Give a function that raises at one call, and a list that tells what it did."""
    calls = []

    def before_each_call():
        calls.append(1)
        if len(calls) == count + 1:
            raise error()

    return before_each_call, calls


def os_error(reason):
    return lambda: OSError(reason, os.strerror(reason))


# Writing


class Output(io.FileIO):
    """A file that is written in parts of some bytes, or not at all."""

    most = 1 << 30
    before = staticmethod(lambda: None)

    def write(self, data):
        self.before()
        return super().write(memoryview(data)[: self.most])


@pytest.fixture
def outputs(monkeypatch):
    """The class of the files that are written."""
    kind = type("Output", (Output,), {})
    monkeypatch.setattr(io, "FileIO", kind)
    return kind


@targets
@streams
@pytest.mark.parametrize("most", [13, 700, 8191])
def test_short_writes(folder, outputs, stream, target, most):
    outputs.most = most
    run(folder, stream, target)
    check_new(folder, stream, target)


@targets
@streams
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_every_write_may_fail(folder, outputs, stream, target, reason):
    before = snapshot(folder)
    for count in itertools.count():
        check, calls = failing(os_error(reason), count)
        outputs.before = staticmethod(check)
        try:
            run(folder, stream, target)
            break
        except FileAccessError as error:
            raised = error
        assert str(raised).startswith(f"{folder / target}: cannot be written: ")
        assert raised.errno == reason
        assert snapshot(folder) == before
    assert count == len(calls) > 2
    check_new(folder, stream, target)


@targets
@streams
@pytest.mark.parametrize("name", ["open", "fchmod", "statvfs", "ftruncate", "fsync", "replace", "stat", "fstat"])
@pytest.mark.parametrize("error", [os_error(errno.EIO), os_error(errno.EACCES), KeyboardInterrupt])
def test_every_call_may_fail(folder, monkeypatch, stream, target, name, error):
    before, descriptors, failed = snapshot(folder), len(os.listdir("/proc/self/fd")), 0
    original = getattr(os, name)
    for count in range(50):
        with monkeypatch.context() as patch:
            check, calls = failing(error, count)

            def call(*arguments, check=check, **keywords):
                check()
                return original(*arguments, **keywords)

            patch.setattr(os, name, call)
            raised = None
            try:
                run(folder, stream, target)
            except (FileAccessError, KeyboardInterrupt) as caught:
                raised = caught
        if raised is None:  # there are no more calls, or what failed is left out: then the target is new
            check_new(folder, stream, target)
            if len(calls) <= count:
                break
        elif snapshot(folder) == before:
            failed += 1
            assert getattr(raised, "errno", None) == getattr(error(), "errno", None)
        else:  # an interruption while the directory is flushed comes too late
            assert isinstance(raised, KeyboardInterrupt)
            check_new(folder, stream, target)
        assert snapshot(folder).keys() <= before.keys() | {"new"}
        assert len(os.listdir("/proc/self/fd")) == descriptors
        (folder / "old").write_bytes(OLD)
        (folder / "new").unlink(missing_ok=True)
    else:
        raise AssertionError("it does not end")
    assert failed or (name, target) == ("fchmod", "new")


# Reading


class Input(io.FileIO):
    """A file that is read in parts of some bytes, or not at all."""

    most = 1 << 30
    before = staticmethod(lambda: None)

    def readinto(self, buffer):
        self.before()
        return super().readinto(memoryview(buffer)[: self.most])


@pytest.fixture
def inputs(monkeypatch):
    """The class of the files that are read."""
    kind = type("Input", (Input,), {})
    monkeypatch.setattr(streaming, "open", lambda path, _mode: io.BufferedReader(kind(path)), raising=False)
    return kind


def verify(folder):
    verify_file(folder / "locked", KEY)


@streams
@pytest.mark.parametrize("most", [1, 7])
def test_short_reads(folder, inputs, stream, most):
    inputs.most = most
    run(folder, stream, "new")
    check_new(folder, stream, "new")


@pytest.mark.parametrize("stream", [*STREAMS, "verify"])
@pytest.mark.parametrize("reason", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_source_that_cannot_be_read(folder, inputs, monkeypatch, stream, reason):
    """Neither its table nor, later, its data."""
    before = snapshot(folder)
    source = folder / ("plain" if stream == "lock" else "locked")
    call = (lambda: verify(folder)) if stream == "verify" else (lambda: run(folder, stream, "old"))
    for place in ("table", 0, 1, 3):
        with monkeypatch.context() as patch:
            check, calls = failing(os_error(reason), 0 if place == "table" else place)
            if place == "table":
                patch.setattr(inputs, "before", staticmethod(check))
            else:
                original = mmap.mmap

                def mapped(*arguments, check=check, original=original, **keywords):
                    check()
                    return original(*arguments, **keywords)

                patch.setattr(mmap, "mmap", mapped)
            with pytest.raises(FileAccessError, match=f"^{source}: cannot be read: ") as caught:
                call()
            assert calls
        assert caught.value.errno == reason
        assert snapshot(folder) == before


@streams
def test_interrupted_system_calls_go_on(folder, stream):
    """Python itself repeats a call that a signal interrupts, unless its handler raises."""
    fired = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        run(folder, stream, "new")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert fired
    check_new(folder, stream, "new")


# What lies around the files


def test_a_sparse_file(tmp_path):
    table = b'{"w":{"dtype":"U8","shape":[3000000],"data_offsets":[0,3000000]}}'
    with open(tmp_path / "plain", "wb") as file:
        file.write(len(table).to_bytes(8, "little") + table)
        file.truncate(8 + len(table) + 3_000_000)
    assert os.stat(tmp_path / "plain").st_blocks * 512 < 100_000
    lock_file(tmp_path / "plain", tmp_path / "locked", KEY)
    unlock_file(tmp_path / "locked", tmp_path / "restored", KEY)
    assert (tmp_path / "restored").read_bytes() == (tmp_path / "plain").read_bytes()


@streams
def test_modes_and_times(folder, stream):
    """The source is only read; an old target keeps its mode, and its time is that of the change."""
    source = folder / STREAMS[stream][1]
    source.chmod(0o440)
    os.utime(source, ns=(10**18, 10**18))
    (folder / "old").chmod(0o604)
    os.utime(folder / "old", ns=(10**18, 10**18))
    run(folder, stream, "old")
    assert source.stat().st_mtime_ns == 10**18
    assert stat.S_IMODE(source.stat().st_mode) == 0o440
    assert stat.S_IMODE((folder / "old").stat().st_mode) == 0o604
    assert (folder / "old").stat().st_mtime_ns > 10**18


@streams
def test_links_to_the_source_and_the_target(folder, stream):
    (folder / "source link").symlink_to(STREAMS[stream][1])
    (folder / "target link").symlink_to("new")
    function, _ = STREAMS[stream]
    function(folder / "source link", folder / "target link")
    assert (folder / "target link").is_symlink()
    check_new(folder, stream, "new")


@streams
@targets
def test_a_source_that_is_changed_meanwhile(folder, monkeypatch, stream, target):
    """Half of it would be locked as it was, and half as it is: no file that anybody ever had."""
    source = folder / STREAMS[stream][1]
    raw = source.read_bytes()
    before = snapshot(folder)
    original = streaming.copy_others
    turns = []

    def change(*arguments):
        original(*arguments)
        turns.append(1)
        if len(turns) == 1:
            source.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "copy_others", change)
        error = ContainerError if stream == "lock" else TamperedError  # seals notice it as well
        with pytest.raises(error, match="changed while it was read" if stream == "lock" else None):
            run(folder, stream, target)
    source.write_bytes(raw)
    assert snapshot(folder) == before


def test_a_source_that_is_replaced_meanwhile(folder, monkeypatch):
    """What is open stays what it was."""
    before = (folder / "locked").read_bytes()
    original = streaming.copy_others

    def replace(*arguments):
        original(*arguments)
        (folder / "other").write_bytes(b"another file")
        os.replace(folder / "other", folder / "locked")

    monkeypatch.setattr(streaming, "copy_others", replace)
    unlock_file(folder / "locked", folder / "new", KEY)
    check_new(folder, "unlock", "new")
    assert before != (folder / "locked").read_bytes() == b"another file"
    with pytest.raises(ContainerError):
        read_header(folder / "locked")
