"""Lock and unlock safetensors files: all stays but the data, and the lock header goes into the metadata.

The data streams through in windows: a part of the source is mapped, locked out of place into a buffer and
written, so that the memory needed does not depend on the size of the file. The destination appears whole or
not at all.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np

from deeplock_kernels.checkpoints.container import (
    Table,
    TensorEntry,
    entry,
    insert_entry,
    parse_table,
    read_table,
    remove_entry,
)
from deeplock_kernels.errors import AlreadyLockedError, ContainerError, HeaderError, NotLockedError
from deeplock_kernels.files import atomic_output, check_distinct, check_regular, file_errors, path_text
from deeplock_kernels.header import LockHeader
from deeplock_kernels.locking import find_sbox
from deeplock_kernels.runtime.pool import Call, resolve_threads
from deeplock_kernels.sboxes import SBox
from deeplock_kernels.schedules import Schedule
from deeplock_kernels.tensors import Key, NamedLock, Selection, select
from deeplock_kernels.transform import Transform

Path = str | os.PathLike[str]
Progress = Callable[[int], object] | None
WINDOW = 16 << 20  # bytes; a multiple of every system's page size


def lock_file(
    src: Path,
    dst: Path,
    key: Key,
    *,
    schedule: str = "counter",
    sbox: SBox | str = "aes",
    only: Selection = None,
    threads: int | None = None,
    progress: Progress = None,
) -> LockHeader:
    """Lock the tensors of a safetensors file into a new file.

    The new file is a valid safetensors file that any software loads, and computes nonsense with. Its metadata
    has one more entry, `deeplock`, the lock header; nothing else changes. It takes `dst`'s place when it is
    complete and on the disk.

    Parameters
    ----------
    src, dst
        Two different files. About 32 MiB of memory are used, whatever the size of the file.
    key, schedule, sbox, only, threads
        As for `lock_tensors`.
    progress
        Called with the number of data bytes done since the last call.

    Returns
    -------
    LockHeader
        As `read_header(dst)` gives it.

    Raises
    ------
    ContainerError
        `src` is not a well-formed safetensors file.
    AlreadyLockedError
        `src` is locked.
    SameFileError, FileAccessError
        `dst` is `src` under some name, or a file cannot be read or written.
    KeyTypeError, KeyFormatError, UnknownNameError, TensorNameError, ParameterError
        Another argument is wrong.
    """
    lock = NamedLock.new(key, schedule, find_sbox(sbox))
    count = resolve_threads(threads)
    with _opened(src, dst) as (file, table):
        if entry(table) is not None:
            raise AlreadyLockedError(f"{table.source}: it is locked already; unlock it first")
        chosen = select(table.tensors, only)
        header = lock.header({name: (table.tensors[name].nbytes, None) for name in chosen})
        start = insert_entry(table, header.to_json())
        with lock:
            streams = {name: lock.stream(header, name) for name in chosen}
            _write(file, table, dst, start, Transform(lock.sbox, "lock"), streams, count, progress)
    return header


def unlock_file(
    src: Path,
    dst: Path,
    key: Key,
    *,
    check: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> None:
    """Unlock a locked safetensors file into a new file, which is the file that was locked, byte for byte.

    Parameters
    ----------
    src, dst, threads, progress
        As for `lock_file`.
    key, check, sbox
        As for `unlock_tensors`.

    Raises
    ------
    WrongKeyError
        The key is another one; nothing was written.
    NotLockedError
        `src` has no lock header.
    ContainerError, HeaderError
        `src` is not a well-formed safetensors file, or its lock header is malformed or does not fit it.
    SameFileError, FileAccessError, KeyTypeError, KeyFormatError, SBoxError, ParameterError
        As for `lock_file`.
    """
    count = resolve_threads(threads)
    with _opened(src, dst) as (file, table):
        header = _header(table)
        lock = NamedLock.from_header(key, header, check=check, sbox=sbox)
        start = remove_entry(table)
        with lock:
            streams = {name: lock.stream(header, name) for name in header.tensors}
            _write(file, table, dst, start, Transform(lock.sbox, "unlock"), streams, count, progress)


def read_header(path: Path) -> LockHeader:
    """Read the lock header of a file; no key is needed.

    Raises
    ------
    NotLockedError, ContainerError, HeaderError, FileAccessError
        The file has none, is malformed, or cannot be read.
    """
    return _header(read_table(path))


def _header(table: Table) -> LockHeader:
    text = entry(table)
    if text is None:
        raise NotLockedError(f"{table.source}: it carries no lock header, so there is nothing to unlock")
    header = LockHeader.from_json(text)
    for name, record in header.tensors.items():
        if name not in table.tensors:
            raise HeaderError(f"{table.source}: the lock header lists {name!a}, which the file has not")
        if table.tensors[name].nbytes != record.nbytes:
            raise HeaderError(
                f"{table.source}: the lock header gives {name!a} {record.nbytes} bytes, "
                f"the file {table.tensors[name].nbytes}"
            )
    return header


@contextmanager
def _opened(src: Path, dst: Path) -> Iterator[tuple[BinaryIO, Table]]:
    """Open a source that is not the destination, and read its table."""
    text = path_text(src, "src")
    check_distinct(src, dst)
    with file_errors(text, "read"):
        check_regular(text, "read", os.stat(text))
        file = open(text, "rb")  # noqa: SIM115 - closed below, outside this net for errors
    with file:
        with file_errors(text, "read"):
            size = os.fstat(file.fileno()).st_size
        yield file, parse_table(file, size, source=text)


def _write(
    file: BinaryIO,
    table: Table,
    dst: Path,
    start: bytes,
    transform: Transform,
    streams: Mapping[str, tuple[Schedule, int]],
    threads: int,
    progress: Progress,
) -> None:
    """Write a file that starts with `start` and goes on with the data, transformed where there is a stream for it."""
    tensors = [tensor for tensor in table.tensors.values() if tensor.nbytes]
    buffer = np.empty(min(WINDOW, table.data_bytes), np.uint8)
    with atomic_output(dst, size_hint=len(start) + table.data_bytes) as output:
        output.write(start)
        first = 0
        for begin in range(0, table.data_bytes, WINDOW):
            end = min(begin + WINDOW, table.data_bytes)
            while first < len(tensors) and tensors[first].stop <= begin:
                first += 1
            with _mapped(file, table, begin, end) as source:
                calls = _window(
                    tensors, first, begin, end, source, buffer.ctypes.data, transform, streams, threads
                )
                if calls:
                    transform.run(calls, threads, in_place=False)
            output.write(buffer[: end - begin].data)
            if progress is not None:
                progress(end - begin)


def _window(
    tensors: list[TensorEntry],
    first: int,
    begin: int,
    end: int,
    source: int,
    target: int,
    transform: Transform,
    streams: Mapping[str, tuple[Schedule, int]],
    threads: int,
) -> list[Call]:
    """Plan the calls for the data bytes begin to end, and copy what is not to be transformed."""
    calls: list[Call] = []
    piece = transform.piece(end - begin, threads)
    for tensor in tensors[first:]:
        if tensor.start >= end:
            break
        low, high = max(tensor.start, begin), min(tensor.stop, end)
        if tensor.name in streams:
            schedule, position = streams[tensor.name]
            offset = position + low - tensor.start
            calls += schedule.calls(
                transform, target + low - begin, source + low - begin, high - low, offset, piece
            )
        else:
            ctypes.memmove(target + low - begin, source + low - begin, high - low)
    return calls


@contextmanager
def _mapped(file: BinaryIO, table: Table, begin: int, end: int) -> Iterator[int]:
    """Map the data bytes begin to end of a file and give their address."""
    position = table.data_start + begin
    aligned = position - position % mmap.ALLOCATIONGRANULARITY
    with file_errors(table.source, "read"):
        if os.fstat(file.fileno()).st_size < table.data_start + table.data_bytes:
            raise ContainerError(f"{table.source}: it became shorter while it was read; nothing was written")
        length = table.data_start + end - aligned
        try:
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=aligned)
        except ValueError:  # it became shorter just now
            raise ContainerError(
                f"{table.source}: it became shorter while it was read; nothing was written"
            ) from None
    with mapped:
        view = np.frombuffer(mapped, np.uint8)
        try:
            yield view.ctypes.data + position - aligned
        finally:
            del view  # the map cannot be closed while something looks at it
