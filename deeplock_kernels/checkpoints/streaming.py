"""Lock, unlock, verify and rekey files: all stays but the data of tensors, and the lock header comes into the file.

The data streams through in windows: a part of the source is mapped, locked out of place into a buffer, and written
while the next window is being locked, so that the memory needed does not depend on the size of the file. The
destination appears whole or not at all.
"""

from __future__ import annotations

import ctypes
import dataclasses
import io
import mmap
import os
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from deeplock_kernels.checkpoints.formats import recognise
from deeplock_kernels.checkpoints.formats.base import Edit, Format, Layout, TensorEntry
from deeplock_kernels.checkpoints.journal import check_whole
from deeplock_kernels.errors import (
    AlreadyLockedError,
    ContainerError,
    HeaderError,
    NotLockedError,
    SameFileError,
)
from deeplock_kernels.files import (
    access_error,
    atomic_output,
    begin_flush,
    check_distinct,
    check_regular,
    file_errors,
    path_text,
)
from deeplock_kernels.header import LockHeader
from deeplock_kernels.keys import Hidden
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
START_BYTES = 64  # by which a format is recognised


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
    """Lock the tensors of a file into a new file.

    The new file is a valid file of its format that any software loads, and computes nonsense with. It has one more
    entry, the lock header (in a safetensors file `deeplock` of the metadata); nothing else changes. It takes `dst`'s
    place when it is complete and on the disk. Data files of an ONNX model come to lie beside `dst`, under their names.

    Parameters
    ----------
    src, dst
        Two different files; the format is recognised by the content. About 48 MiB of memory are used, whatever the
        size of the file.
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
        `src` is not a well-formed file of a known format.
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
    with opened(src) as model:
        layout = model.layout
        if layout.header is not None:
            raise AlreadyLockedError(f"{layout.source}: it is locked already; unlock it first")
        chosen = select(layout.tensors, only)
        lock.cover({name: (layout.tensors[name].nbytes, None) for name in chosen})
        seals = dict.fromkeys(chosen, 0)

        def header() -> str:
            return lock.prove(seals if seal else None, layout.proved).to_json()

        def change(ranges: list[Range]) -> None:
            lock.lock(ranges, count, seal=seal, then=partial(merge_seals, seals))

        with lock:
            _write(model, _new_files(dst), header, change, chosen, progress)
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
    """Unlock a locked file into a new file, which is the file that was locked, byte for byte.

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
        `src` is not a well-formed file of a known format, or its lock header is malformed or does not fit it.
    SameFileError, FileAccessError, KeyTypeError, KeyFormatError, SBoxError, ParameterError
        As for `lock_file`.
    """
    count = resolve_threads(threads)
    check_distinct(src, dst)
    with opened(src) as model:
        _unlock(model, _new_files(dst), key, check, seal, sbox, count, progress)


def unlock_to_memory(
    path: Path,
    key: Key,
    *,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> dict[str, bytes]:
    """Unlock a file of any format into memory, for software that takes a model's bytes: no plain bytes on the disk.

    Parameters
    ----------
    path
        A locked file; it is only read.
    key, check, seal, sbox, threads, progress
        As for `unlock_file`.

    Returns
    -------
    dict
        What `unlock_file` would write: the file under "", and files that belong to it under their relative paths.

    Raises
    ------
    WrongKeyError, TamperedHeaderError, TamperedError, NotLockedError, ContainerError, HeaderError
        As for `unlock_file`; whatever was unlocked is zeros.
    FileAccessError, KeyTypeError, KeyFormatError, SBoxError, ParameterError
        As for `unlock_file`.
    """
    count = resolve_threads(threads)
    outputs: list[io.BytesIO] = []

    def in_memory(_stack: ExitStack, sizes: Sequence[tuple[OpenedFile, int]]) -> list[BinaryIO]:
        outputs.extend(io.BytesIO() for _ in sizes)
        return [*outputs]

    with opened(path, "path") as model:
        try:
            _unlock(model, in_memory, key, check, seal, sbox, count, progress)
        except BaseException:
            for output in outputs:
                with output.getbuffer() as memory:
                    memory[:] = bytes(len(memory))
            raise
        names = [file.companion for file in model.files]
    return {name: output.getvalue() for name, output in zip(names, outputs, strict=True)}


def _unlock(
    model: Model,
    outputs: Outputs,
    key: Key,
    check: bool,
    seal: bool,
    sbox: SBox | None,
    count: int,
    progress: Progress,
) -> None:
    found = header_of(model.layout)
    lock = NamedLock.from_header(key, found, check=check, sbox=sbox)
    verified = check and seal and any(lock.sealed(name) for name in found.tensors)
    seals = dict.fromkeys(found.tensors, 0)

    def header() -> None:
        return None

    def change(ranges: list[Range]) -> None:
        if verified:
            merge_seals(seals, lock.unlock_and_seal(ranges, count))
        else:
            lock.unlock(ranges, count)

    def complete() -> None:
        if verified:
            lock.expect(seals)

    with lock:
        _write(model, outputs, header, change, found.tensors, progress, complete)


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
    with opened(src) as model:
        layout = model.layout
        found = header_of(layout)
        old = NamedLock.from_header(old_key, found, sbox=sbox)
        new = NamedLock.new(new_key, found.schedule if schedule is None else schedule, old.box)
        names = [name for name in layout.tensors if name in found.tensors]
        new.cover({name: (layout.tensors[name].nbytes, None) for name in names})
        old_seals, seals = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

        def header() -> str:
            return new.prove(seals if seal else None, layout.proved).to_json()

        def change(ranges: list[Range]) -> None:
            merge_seals(old_seals, old.seals([one for one in ranges if old.sealed(one.name)], count))
            rekey_ranges(old, new, ranges, count, seal=seal, then=partial(merge_seals, seals))

        with old, new:
            _write(model, _new_files(dst), header, change, names, progress, lambda: old.expect(old_seals))
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
    with opened(path, "path") as model:
        header = header_of(model.layout)
        lock = NamedLock.from_header(key, header, needs_sbox=False)
        lock.must_be_sealed()
        with lock:
            seals = dict.fromkeys(header.tensors, 0)
            for file, edits in _replaced(model):
                for window in windows(_entries(model.layout, file.companion), file.spans(edits)):
                    with mapped(file, window) as source:
                        ranges = [one for one in ranges_of(window, source, source) if one.name in seals]
                        merge_seals(seals, lock.seals(ranges, count))
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
    return header_of(read_layout(path))


def read_layout(path: Path) -> Layout:
    """Read what is where in a file; of the data only the size is looked at.

    Raises
    ------
    ContainerError, FileAccessError, ParameterError
        It is not a well-formed file of a known format, cannot be read, or is no path.
    """
    with opened(path, "path") as model:
        return model.layout


def data_bytes(path: Path) -> int:
    """Count the bytes of a file that the functions here report progress of: all that do not change with the header.

    Raises
    ------
    ContainerError, FileAccessError, ParameterError
        As for `read_layout`.
    """
    with opened(path, "path") as model:
        return sum(stop - start for file, edits in _replaced(model) for start, stop in file.spans(edits))


def header_of(layout: Layout) -> LockHeader:
    """Give the lock header of a file, which fits its tensors.

    Raises
    ------
    NotLockedError, HeaderError
        The file has none, or it is malformed, or not one of these tensors.
    """
    if layout.header is None:
        raise NotLockedError(f"{layout.source}: it carries no lock header, so there is nothing to unlock")
    header = LockHeader.from_json(layout.header)
    for name, record in header.tensors.items():
        if name not in layout.tensors:
            raise HeaderError(f"{layout.source}: the lock header lists {name!a}, which the file has not")
        if layout.tensors[name].nbytes != record.nbytes:
            raise HeaderError(
                f"{layout.source}: the lock header gives {name!a} {record.nbytes} bytes, "
                f"the file {layout.tensors[name].nbytes}"
            )
    return dataclasses.replace(header, file=layout.proved)


class OpenedFile(NamedTuple):
    """A file that is open for reading: its path, which companion it is ("" for the main file), and its size."""

    path: str
    companion: str
    file: BinaryIO
    size: int

    def spans(self, edits: Sequence[Edit]) -> list[tuple[int, int]]:
        """Give the ranges of it that no edit replaces."""
        starts = [0, *(edit.stop for edit in edits)]
        stops = [*(edit.start for edit in edits), self.size]
        return [(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]

    def state(self) -> tuple[int, int]:
        """Give what another program changes of it when it writes to it.

        Raises
        ------
        FileAccessError
            That cannot be read.
        """
        try:
            status = os.fstat(self.file.fileno())
        except OSError as error:
            raise access_error(self.path, "read", error) from error
        return status.st_size, status.st_mtime_ns


class Model(NamedTuple):
    """An opened file of weights: the main file and its companions."""

    format: Format
    layout: Layout
    files: tuple[OpenedFile, ...]


Outputs = Callable[[ExitStack, Sequence[tuple[OpenedFile, int]]], list[BinaryIO]]


@contextmanager
def opened(path: Path, argument: str = "src") -> Iterator[Model]:
    """Open a file, and what lies beside it, and read what is where.

    Raises
    ------
    InterruptedLockError
        A change of it in place was not finished.
    ContainerError, FileAccessError, ParameterError
        As for `read_layout`.
    """
    text = path_text(path, argument)
    check_whole(text)
    with ExitStack() as stack:
        main = stack.enter_context(_opened(text, ""))
        with file_errors(text, "read"):
            start = Hidden(main.file.read(START_BYTES))  # it may be a key file, by mistake
            main.file.seek(0)
            known = recognise(start)
            layout = known.read(main.file, main.size, text)
        companions = [
            stack.enter_context(_opened(beside(text, companion), companion)) for companion in layout.companions
        ]
        for file in companions:
            _check_size(layout, file)
        yield Model(known, layout, (main, *companions))


def _check_size(layout: Layout, companion: OpenedFile) -> None:
    for tensor in _entries(layout, companion.companion):
        if tensor.stop > companion.size:
            raise ContainerError(
                f"{companion.path}: got {companion.size} bytes, accepted are at least {tensor.stop}, where "
                f"{tensor.name!a} of {layout.source} ends; it is cut short or belongs to another file"
            )


def beside(path: str, companion: str) -> str:
    """Give the path of a companion, which lies in the same directory or below.

    Raises
    ------
    ContainerError
        It would lie elsewhere.
    """
    parts = PurePosixPath(companion)
    if not companion or parts.is_absolute() or ".." in parts.parts or "\0" in companion:
        raise ContainerError(
            f"{path}: got a file {companion!a} that belongs to it, accepted are those in its directory or below"
        )
    return os.path.join(os.path.dirname(path), *parts.parts)


@contextmanager
def _opened(path: str, companion: str) -> Iterator[OpenedFile]:
    with file_errors(path, "read"):
        check_regular(path, "read", os.stat(path))  # before opening, which would wait at a pipe
        file = open(path, "rb")  # noqa: SIM115 - closed below, outside this net for errors
    with file:
        with file_errors(path, "read"):
            size = os.fstat(file.fileno()).st_size
        yield OpenedFile(path, companion, file, size)


def _replaced(model: Model) -> Iterator[tuple[OpenedFile, Sequence[Edit]]]:
    """Give each file with the edits that take its lock header out, or put one in."""
    layout = model.layout
    edits = model.format.edits(layout, None if layout.header else "", [0] * len(layout.checksums))
    for file in model.files:
        yield file, [] if file.companion else edits


def merge_seals(seals: Seals, found: Seals) -> None:
    """Bring the seals of more parts of tensors in."""
    for name, seal in found.items():
        seals[name] ^= seal


class Window(NamedTuple):
    """The bytes begin to end of a file, and the parts of tensors in them: (tensor, first byte, last byte + 1)."""

    begin: int
    end: int
    parts: list[tuple[TensorEntry, int, int]]


def _entries(layout: Layout, companion: str) -> list[TensorEntry]:
    return [tensor for tensor in layout.tensors.values() if tensor.companion == companion]


def windows(
    tensors: Iterable[TensorEntry], spans: Iterable[tuple[int, int]], most: int | None = None
) -> Iterator[Window]:
    """Cut ranges of a file into windows of up to `most` bytes, by default WINDOW.

    A tensor that goes on in the next window is cut at a block of its seal. A tensor without bytes is a part of the
    first window, wherever it lies: it has a seal too.
    """
    most = most or WINDOW
    waiting = deque(tensor for tensor in tensors if tensor.nbytes)
    parts = [(tensor, tensor.start, tensor.start) for tensor in tensors if not tensor.nbytes]
    for begin, stop in spans:
        while begin < stop:
            end = min(begin + most, stop)
            while waiting and waiting[0].start < end:
                tensor = waiting[0]
                low = max(tensor.start, begin)
                if tensor.stop > end:
                    end -= (end - tensor.start) % BLOCK
                    if low < end:
                        parts.append((tensor, low, end))
                    break
                parts.append((tensor, low, tensor.stop))
                waiting.popleft()
            yield Window(begin, end, parts)
            begin, parts = end, []
    if parts:
        yield Window(0, 0, parts)


def ranges_of(window: Window, target: int, source: int) -> list[Range]:
    """Give the parts of a window's tensors, whose first bytes lie at these addresses."""
    return [
        Range(tensor.name, target + low - window.begin, source + low - window.begin, high - low, low - tensor.start)
        for tensor, low, high in window.parts
    ]


def _write(
    model: Model,
    open_outputs: Outputs,
    header: Callable[[], str | None],
    change: Callable[[list[Range]], None],
    names: Collection[str],
    progress: Progress,
    complete: Callable[[], None] = lambda: None,
) -> None:
    """Write a file anew, in which `change` transforms the tensors of these names.

    Parameters
    ----------
    open_outputs
        Opens what is written, given the files and the sizes that the new ones will have.
    header
        Gives its lock header, which is as long at the end as at the start.
    complete
        Is called when all data are written, and may refuse them.
    """
    layout = model.layout
    checksums: Sequence[int] = [0] * len(layout.checksums)
    edits = model.format.edits(layout, header(), checksums)
    states = [file.state() for file in model.files]
    grown = sum(len(edit.data) - (edit.stop - edit.start) for edit in edits)
    with ExitStack() as stack:
        sizes = [(file, file.size + (0 if file.companion else grown)) for file in model.files]
        outputs = open_outputs(stack, sizes)
        for output, file in zip(outputs, model.files, strict=True):
            tensors = _entries(layout, file.companion)
            if file.companion:
                _stream(file, output, tensors, [], change, set(names), progress, ())
            else:
                checksums = _stream(file, output, tensors, edits, change, set(names), progress, layout.checksums)
        complete()
        for file, state in zip(model.files, states, strict=True):
            if file.state() != state:
                raise ContainerError(f"{file.path}: it was changed while it was read; nothing was written")
        # Seals, mac and checksums are known only now.
        shift = 0
        for edit in model.format.edits(layout, header(), checksums):
            outputs[0].seek(edit.start + shift)
            outputs[0].write(edit.data)
            shift += len(edit.data) - (edit.stop - edit.start)


def _new_files(dst: Path) -> Outputs:
    """Give what opens new files that appear when all is done."""

    def outputs(stack: ExitStack, sizes: Sequence[tuple[OpenedFile, int]]) -> list[BinaryIO]:
        text = path_text(dst, "dst")
        check_whole(text)
        # The main file is the first one in, and so the last one to appear.
        return [stack.enter_context(atomic_output(_target(text, file), size_hint=size)) for file, size in sizes]

    return outputs


def _target(dst: str, file: OpenedFile) -> str:
    """Give the path of a new file, which is neither that of the source nor of another new one."""
    if not file.companion:
        check_distinct(file.path, dst)
        return dst
    path = beside(dst, file.companion)
    try:
        check_distinct(file.path, path)
        check_distinct(path, dst)
    except SameFileError:
        raise SameFileError(
            f"dst: got {dst}, beside which {file.companion} would take another file's place; accepted is the path of "
            "a file in another directory; the data files keep their names"
        ) from None
    return path


def _stream(
    file: OpenedFile,
    output: BinaryIO,
    tensors: list[TensorEntry],
    edits: Sequence[Edit],
    change: Callable[[list[Range]], None],
    chosen: Collection[str],
    progress: Progress,
    summed: Sequence[tuple[int, int]],
) -> list[int]:
    """Write one file anew, and give the CRC-32 that ranges of the old one have in the new one."""
    buffers = [np.empty(min(WINDOW, file.size), np.uint8) for _ in range(2)]
    sums, waiting = [0] * len(summed), deque(edits)

    def write(window: Window, data: memoryview) -> None:
        for i, (start, stop) in enumerate(summed):
            low, high = max(start, window.begin), min(stop, window.end)
            if low < high:
                sums[i] = zlib.crc32(data[low - window.begin : high - window.begin], sums[i])
        output.write(data)
        if not isinstance(output, io.BytesIO):
            begin_flush(output.fileno())

    with Behind() as behind:
        for turn, window in enumerate(windows(tensors, file.spans(edits))):
            while waiting and waiting[0].start <= window.begin:
                behind.run(partial(output.write, waiting.popleft().data))
            buffer, length = buffers[turn % 2], window.end - window.begin
            behind.wait(1)  # for the window before the last one, whose buffer this is
            target = buffer.ctypes.data
            with mapped(file, window) as source:
                ranges = [one for one in ranges_of(window, target, source) if one.name in chosen]
                copy_others(ranges, target, source, length)
                change(ranges)
            behind.run(partial(write, window, buffer[:length].data))
            if progress is not None:
                progress(length)
        for edit in waiting:
            behind.run(partial(output.write, edit.data))
        behind.wait(0)
    return sums


def copy_others(ranges: list[Range], target: int, source: int, length: int) -> None:
    """Copy what lies between ranges, which are in order but for those without bytes."""
    position = 0
    for one in filter(lambda one: one.nbytes, ranges):
        low = one.target - target
        ctypes.memmove(target + position, source + position, low - position)
        position = low + one.nbytes
    ctypes.memmove(target + position, source + position, length - position)


class Behind:
    """Runs work one after the other on a thread of its own, or here where none is to be had."""

    def __enter__(self) -> Behind:
        self._executor = ThreadPoolExecutor(1, "deeplock-write")
        self._running: deque[Future[object]] = deque()
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def run(self, work: Callable[[], object]) -> None:
        """Begin with some work when that before it is done."""
        try:
            self._running.append(self._executor.submit(work))
        except RuntimeError:  # no thread can be started any more
            self.wait(0)
            work()

    def wait(self, left: int) -> None:
        """Wait until so many pieces of work are left, and raise what one of them raised."""
        while len(self._running) > left:
            self._running.popleft().result()


@contextmanager
def mapped(file: OpenedFile, window: Window) -> Iterator[int]:
    """Map a window of a file and give its address."""
    if window.begin == window.end:
        yield 0
        return
    aligned = window.begin - window.begin % mmap.ALLOCATIONGRANULARITY
    with file_errors(file.path, "read"):
        if os.fstat(file.file.fileno()).st_size < file.size:
            raise ContainerError(f"{file.path}: it became shorter while it was read; nothing was written")
        try:
            memory = mmap.mmap(file.file.fileno(), window.end - aligned, access=mmap.ACCESS_READ, offset=aligned)
        except ValueError:  # it became shorter just now
            raise ContainerError(f"{file.path}: it became shorter while it was read; nothing was written") from None
    with memory:
        view = np.frombuffer(memory, np.uint8)
        try:
            yield view.ctypes.data + window.begin - aligned
        finally:
            del view  # the map cannot be closed while something looks at it
