"""Lock and unlock safetensors files: all stays but the data, and the lock header goes into the metadata.

The data streams through in windows: a part of the source is mapped, locked out of place into a buffer and
written, so that the memory needed does not depend on the size of the file. The destination appears whole or
not at all.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO, NamedTuple

import numpy as np

from deeplock_kernels.checkpoints.container import (
    Table,
    TensorEntry,
    canonical_text,
    entry,
    insert_entry,
    parse_table,
    read_table,
    remove_entry,
    replace_entry,
)
from deeplock_kernels.errors import AlreadyLockedError, ContainerError, HeaderError, NotLockedError
from deeplock_kernels.files import atomic_output, check_distinct, check_regular, file_errors, path_text
from deeplock_kernels.header import LockHeader
from deeplock_kernels.locking import find_sbox
from deeplock_kernels.named_lock import Key, NamedLock, Seals
from deeplock_kernels.pieces import BLOCK, Range
from deeplock_kernels.rekeying import rekey_ranges
from deeplock_kernels.runtime.pool import resolve_threads
from deeplock_kernels.sboxes import SBox
from deeplock_kernels.tensors import Selection, select

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
    seal: bool = True,
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
    key, schedule, sbox, only, seal, threads
        As for `lock_tensors`. The header's mac proves the file's table as well: names, dtypes, shapes, metadata.
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
    check_distinct(src, dst)
    with _opened(src) as (file, table):
        if entry(table) is not None:
            raise AlreadyLockedError(f"{table.source}: it is locked already; unlock it first")
        chosen = select(table.tensors, only)
        lock.cover({name: (table.tensors[name].nbytes, None) for name in chosen})
        text = canonical_text(table)
        seals = dict.fromkeys(chosen, 0)

        def start() -> bytes:
            return insert_entry(table, lock.prove(seals if seal else None, text).to_json())

        first = start()
        with lock, atomic_output(dst, size_hint=len(first) + table.data_bytes) as output:
            output.write(first)

            def change(ranges: list[Range]) -> None:
                lock.lock(ranges, count, seal=seal, then=partial(_add, seals))

            _write(file, table, output, change, chosen, progress)
            # Seals and mac are known only now; the header is no longer for them.
            output.seek(0)
            output.write(start())
    return lock.header


def unlock_file(
    src: Path,
    dst: Path,
    key: Key,
    *,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> None:
    """Unlock a locked safetensors file into a new file, which is the file that was locked, byte for byte.

    Seals are compared in the same pass; a file that was altered leaves no output.

    Parameters
    ----------
    src, dst, threads, progress
        As for `lock_file`.
    key, check, seal, sbox
        As for `unlock_tensors`.

    Raises
    ------
    WrongKeyError
        The key is another one; nothing was written.
    TamperedHeaderError, TamperedError
        The header, the file's table or the tensor that the message names was altered; nothing was written.
    NotLockedError
        `src` has no lock header.
    ContainerError, HeaderError
        `src` is not a well-formed safetensors file, or its lock header is malformed or does not fit it.
    SameFileError, FileAccessError, KeyTypeError, KeyFormatError, SBoxError, ParameterError
        As for `lock_file`.
    """
    count = resolve_threads(threads)
    check_distinct(src, dst)
    with _opened(src) as (file, table):
        header = _header(table)
        lock = NamedLock.from_header(key, header, check=check, sbox=sbox)
        start = remove_entry(table)
        verified = check and seal and any(lock.sealed(name) for name in header.tensors)
        with lock, atomic_output(dst, size_hint=len(start) + table.data_bytes) as output:
            output.write(start)
            seals = dict.fromkeys(header.tensors, 0)

            def change(ranges: list[Range]) -> None:
                if verified:
                    _add(seals, lock.unlock_and_seal(ranges, count))
                else:
                    lock.unlock(ranges, count)

            _write(file, table, output, change, header.tensors, progress)
            if verified:
                lock.expect(seals)


def rekey_file(
    src: Path,
    dst: Path,
    old_key: Key,
    new_key: Key,
    *,
    schedule: str | None = None,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> LockHeader:
    """Lock a locked file anew under another key, without unlocking it: neither memory nor disk holds plain weights.

    Parameters
    ----------
    src, dst, threads, progress
        As for `lock_file`.
    old_key, new_key, schedule, seal, sbox
        As for `rekey_tensors`.

    Returns
    -------
    LockHeader
        As `read_header(dst)` gives it.

    Raises
    ------
    WrongKeyError, TamperedHeaderError, TamperedError
        `old_key` is another one, or the file was altered; nothing was written.
    NotLockedError, ContainerError, HeaderError, SameFileError, FileAccessError, KeyTypeError, KeyFormatError, SBoxError
        As for `unlock_file`.
    UnknownNameError, ParameterError
        Another argument is wrong.
    """
    count = resolve_threads(threads)
    check_distinct(src, dst)
    with _opened(src) as (file, table):
        header = _header(table)
        old = NamedLock.from_header(old_key, header, sbox=sbox)
        new = NamedLock.new(new_key, header.schedule if schedule is None else schedule, old.box)
        names = [name for name in table.tensors if name in header.tensors]
        new.cover({name: (table.tensors[name].nbytes, None) for name in names})
        old_seals, seals, text = dict.fromkeys(names, 0), dict.fromkeys(names, 0), canonical_text(table)

        def start() -> bytes:
            made = new.prove(seals if seal else None, text)
            return replace_entry(table, made.to_json())

        first = start()
        with old, new, atomic_output(dst, size_hint=len(first) + table.data_bytes) as output:
            output.write(first)

            def change(ranges: list[Range]) -> None:
                _add(old_seals, old.seals([one for one in ranges if old.sealed(one.name)], count))
                rekey_ranges(old, new, ranges, count, seal=seal, then=partial(_add, seals))

            _write(file, table, output, change, names, progress)
            old.expect(old_seals)
            # Seals and mac are known only now; the header is no longer for them.
            output.seek(0)
            output.write(start())
    return new.header


def verify_file(path: Path, key: Key, *, threads: int | None = None, progress: Progress = None) -> LockHeader:
    """Say whether a locked file is as the lock left it: its tensors, its header, and names, dtypes and shapes.

    Parameters
    ----------
    path
        A locked file; it is only read.
    key
        The master key that locked it.
    threads, progress
        As for `lock_file`.

    Returns
    -------
    LockHeader
        Its header.

    Raises
    ------
    WrongKeyError
        The key is another one.
    TamperedHeaderError
        The header or the file's table was altered.
    TamperedError
        The tensor that the message names was altered.
    NotSealedError
        It was locked without seals.
    NotLockedError, ContainerError, HeaderError, FileAccessError, KeyTypeError, KeyFormatError, ParameterError
        As for `unlock_file`.
    """
    count = resolve_threads(threads)
    with _opened(path, "path") as (file, table):
        header = _header(table)
        lock = NamedLock.from_header(key, header, needs_sbox=False)
        lock.must_be_sealed()
        with lock:
            seals = dict.fromkeys(header.tensors, 0)
            for window in _windows(table):
                with _mapped(file, table, window) as source:
                    ranges = [one for one in _ranges(window, source, source) if one.name in seals]
                    _add(seals, lock.seals(ranges, count))
                if progress is not None:
                    progress(window.end - window.begin)
            lock.expect(seals)
    return header


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
    return dataclasses.replace(header, file=canonical_text(table))


def _add(seals: Seals, found: Seals) -> None:
    for name, seal in found.items():
        seals[name] ^= seal


@contextmanager
def _opened(path: Path, argument: str = "src") -> Iterator[tuple[BinaryIO, Table]]:
    """Open a file and read its table."""
    text = path_text(path, argument)
    with file_errors(text, "read"):
        check_regular(text, "read", os.stat(text))
        file = open(text, "rb")  # noqa: SIM115 - closed below, outside this net for errors
    with file:
        with file_errors(text, "read"):
            size = os.fstat(file.fileno()).st_size
        yield file, parse_table(file, size, source=text)


class _Window(NamedTuple):
    """The data bytes begin to end of a file, and the parts of tensors in them: (tensor, first byte, last byte + 1)."""

    begin: int
    end: int
    parts: list[tuple[TensorEntry, int, int]]


def _windows(table: Table) -> Iterator[_Window]:
    """Cut the data of a file; a tensor that goes on in the next window is cut at a block of its seal.

    A tensor without bytes is a part of the window where it lies, as it has a seal too.
    """
    waiting = deque(table.tensors.values())
    begin = 0
    while begin < table.data_bytes or waiting:
        end = min(begin + WINDOW, table.data_bytes)
        parts = []
        while waiting and (waiting[0].start < end or waiting[0].nbytes == 0):
            tensor = waiting[0]
            low = max(tensor.start, begin)
            if tensor.stop > end:
                end -= (end - tensor.start) % BLOCK
                if low < end:
                    parts.append((tensor, low, end))
                break
            parts.append((tensor, low, tensor.stop))
            waiting.popleft()
        yield _Window(begin, end, parts)
        begin = end


def _ranges(window: _Window, target: int, source: int) -> list[Range]:
    """Give the parts of a window's tensors, whose first bytes lie at these addresses."""
    return [
        Range(tensor.name, target + low - window.begin, source + low - window.begin, high - low, low - tensor.start)
        for tensor, low, high in window.parts
    ]


def _write(
    file: BinaryIO,
    table: Table,
    output: BinaryIO,
    change: Callable[[list[Range]], None],
    names: Collection[str],
    progress: Progress,
) -> None:
    """Write the data of a file, in which `change` transforms the tensors of these names."""
    buffer = np.empty(min(WINDOW, table.data_bytes), np.uint8)
    target, chosen = buffer.ctypes.data, set(names)
    for window in _windows(table):
        length = window.end - window.begin
        with _mapped(file, table, window) as source:
            ranges = _ranges(window, target, source)
            for one in ranges:
                if one.name not in chosen:
                    ctypes.memmove(one.target, one.source, one.nbytes)
            change([one for one in ranges if one.name in chosen])
        output.write(buffer[:length].data)
        if progress is not None:
            progress(length)


@contextmanager
def _mapped(file: BinaryIO, table: Table, window: _Window) -> Iterator[int]:
    """Map a window of a file and give its address."""
    if window.begin == window.end:
        yield 0
        return
    position = table.data_start + window.begin
    aligned = position - position % mmap.ALLOCATIONGRANULARITY
    with file_errors(table.source, "read"):
        if os.fstat(file.fileno()).st_size < table.data_start + table.data_bytes:
            raise ContainerError(f"{table.source}: it became shorter while it was read; nothing was written")
        length = table.data_start + window.end - aligned
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
