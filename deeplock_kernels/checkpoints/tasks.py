"""What workers do for a checkpoint: change some bytes of one shard, and give the seals of the parts of its tensors.

A task is a plain value that can be pickled. It holds the keys of the tensors that it changes, and never the master
key or the key of headers. It never writes to what it reads; done twice, or by two workers at once, it leaves the same
bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from deeplock_kernels.checkpoints import streaming
from deeplock_kernels.checkpoints.formats.base import TensorEntry
from deeplock_kernels.checkpoints.stores import Store
from deeplock_kernels.checkpoints.streaming import (
    Behind,
    Progress,
    copy_others,
    merge_seals,
    ranges_of,
    windows,
)
from deeplock_kernels.errors import ContainerError
from deeplock_kernels.files import begin_flush, file_errors
from deeplock_kernels.keys import TensorKeys
from deeplock_kernels.named_lock import NamedLock, Seals
from deeplock_kernels.pieces import Range
from deeplock_kernels.rekeying import rekey_ranges
from deeplock_kernels.sboxes import SBox

GROUP = 256 << 20  # bytes that one task takes, about


class Placed(NamedTuple):
    """Where a task writes into a file that others write to as well.

    Attributes
    ----------
    path
        Of the file, which exists.
    shift
        How much later its bytes lie there than in the source.
    flush
        Whether to flush them to the device.
    """

    path: str
    shift: int
    flush: bool


class Put(NamedTuple):
    """The file that a task makes as a whole: where, its name, and what comes before the bytes that the task gives."""

    store: Store
    name: str
    start: bytes


class Outcome(NamedTuple):
    """What a task found: the seals of its parts of tensors as they are now, and under the old key where rekeyed."""

    seals: Seals
    old_seals: Seals


@dataclass(frozen=True)
class Task:
    """A part of the work on one shard.

    Attributes
    ----------
    kind
        "lock", "unlock" or "rekey", or "seal", which only looks. The seals are those of the locked bytes.
    source, name, version
        The store, the shard, and the state of it that the task is for.
    begin, end
        The bytes of the shard that it takes.
    tensors
        Those with bytes among them that are to be changed or sealed.
    sbox
        The S-Box, unless it only looks.
    keys
        Theirs: the new ones where they are rekeyed.
    old_keys
        Those from which they are rekeyed.
    sealed
        Which of them to seal; where they are rekeyed, under the old key.
    threads
        How many threads at most.
    target
        Where to write, or None to write nothing.
    """

    kind: str
    source: Store
    name: str
    version: str
    begin: int
    end: int
    tensors: tuple[TensorEntry, ...]
    sbox: SBox | None
    keys: TensorKeys
    old_keys: TensorKeys | None
    sealed: frozenset[str]
    threads: int
    target: Placed | Put | None = field(default=None)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.end - self.begin


def run(task: Task, progress: Progress = None) -> Outcome:
    """Do a task.

    Parameters
    ----------
    task
        The task.
    progress
        Called with the number of bytes done since the last call.

    Raises
    ------
    ContainerError
        The shard is not the one that the task is for, or changed meanwhile.
    FileAccessError
        Something cannot be read or written.
    """
    seals: Seals = dict.fromkeys((tensor.name for tensor in task.tensors), 0)
    old_seals = dict(seals)
    with ExitStack() as stack:
        source = stack.enter_context(task.source.open(task.name))
        _check_version(task, source.version)
        change = stack.enter_context(_change(task, seals, old_seals))
        write = stack.enter_context(_writing(task))
        size = min(streaming.WINDOW, task.nbytes)
        buffers = [np.empty(size, np.uint8) for _ in range(2)] if task.kind != "seal" else []
        behind = stack.enter_context(Behind())
        for turn, window in enumerate(windows(task.tensors, [(task.begin, task.end)])):
            with source.window(window) as address:
                length = window.end - window.begin
                if not buffers:
                    change(ranges_of(window, address, address))
                else:
                    buffer = buffers[turn % 2]
                    behind.wait(1)  # for the window before the last one, whose buffer this is
                    ranges = ranges_of(window, buffer.ctypes.data, address)
                    if task.target is not None:
                        copy_others(ranges, buffer.ctypes.data, address, length)
                    change(ranges)
                    behind.run(partial(write, window.begin, buffer[:length].data))
            if progress is not None:
                progress(length)
        behind.wait(0)
        _check_version(task, source.version)  # before a whole file takes its place
    return Outcome(seals, old_seals)


def _check_version(task: Task, version: str) -> None:
    if version != task.version:
        raise ContainerError(f"{task.source.path(task.name)}: it changed while it was read; begin anew")


@contextmanager
def _change(task: Task, seals: Seals, old_seals: Seals) -> Iterator[Callable[[list[Range]], None]]:
    """Give what changes ranges, and adds up their seals."""
    sizes = {tensor.name: tensor.nbytes for tensor in task.tensors}
    with ExitStack() as stack:
        lock = stack.enter_context(NamedLock.of_keys(task.keys, task.sbox, sizes))
        old = None
        if task.old_keys is not None:
            old = stack.enter_context(NamedLock.of_keys(task.old_keys, task.sbox, sizes))

        def sealed(ranges: list[Range]) -> list[Range]:
            return [one for one in ranges if one.name in task.sealed]

        def change(ranges: list[Range]) -> None:
            if task.kind == "seal":
                merge_seals(seals, lock.seals(sealed(ranges), task.threads))
            elif task.kind == "lock":
                lock.lock(ranges, task.threads, seal=bool(task.sealed), then=partial(merge_seals, seals))
            elif task.kind == "unlock":
                if task.sealed:
                    merge_seals(seals, lock.unlock_and_seal(ranges, task.threads))
                else:
                    lock.unlock(ranges, task.threads)
            else:
                assert old is not None
                merge_seals(old_seals, old.seals(sealed(ranges), task.threads))
                rekey_ranges(old, lock, ranges, task.threads, seal=True, then=partial(merge_seals, seals))

        yield change


@contextmanager
def _writing(task: Task) -> Iterator[Callable[[int, memoryview], object]]:
    """Give what writes bytes, given where they lie in the source."""
    target = task.target
    if target is None:
        yield lambda _begin, _data: None
    elif isinstance(target, Put):
        with target.store.put(target.name) as output:
            output.write(target.start)
            yield lambda _begin, data: output.write(data)
    else:
        with file_errors(target.path, "written"):
            descriptor = os.open(target.path, os.O_WRONLY)  # it is made by who waits for this
        shift, path = target.shift, target.path

        def write(begin: int, data: memoryview) -> None:
            with file_errors(path, "written"):
                while data:
                    written = os.pwrite(descriptor, data, begin + shift)
                    begin, data = begin + written, data[written:]
            begin_flush(descriptor)

        try:
            yield write
            if target.flush:
                with file_errors(path, "written"):
                    os.fsync(descriptor)
        finally:
            os.close(descriptor)

