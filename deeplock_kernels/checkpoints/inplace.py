"""Lock and unlock files in place, for models that do not fit on the disk twice.

The lock header makes a file longer, so that its data move. Locking begins at the end of such a file, unlocking at its
start, and each window of data goes through the journal: a crash at any moment leaves a file that `recover_file` makes
new or old.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import numpy as np

from deeplock_kernels.checkpoints import streaming
from deeplock_kernels.checkpoints.formats import recognise
from deeplock_kernels.checkpoints.formats.base import Edit, Format, Layout
from deeplock_kernels.checkpoints.journal import Change, Journal, check_whole, remove_leftover
from deeplock_kernels.checkpoints.streaming import (
    Path,
    Progress,
    Window,
    header_of,
    merge_seals,
    ranges_of,
    windows,
)
from deeplock_kernels.errors import AlreadyLockedError, ContainerError, InterruptedLockError
from deeplock_kernels.files import (
    access_error,
    check_regular,
    claim,
    file_errors,
    path_text,
    read_at,
    reserve,
    write_at,
)
from deeplock_kernels.header import SEAL_BYTES, LockHeader
from deeplock_kernels.locking import find_sbox
from deeplock_kernels.named_lock import Key, NamedLock, Seals
from deeplock_kernels.pieces import Range
from deeplock_kernels.runtime.pool import resolve_threads
from deeplock_kernels.sboxes import SBox
from deeplock_kernels.tensors import Selection, select

_ACTION = "changed in place"


def lock_file_in_place(
    path: Path,
    key: Key,
    *,
    schedule: str = "counter",
    sbox: SBox | str = "aes",
    only: Selection = None,
    seal: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> LockHeader:
    """Lock the tensors of a file in place: the file becomes what `lock_file` would have written.

    Needs free space of about 32 MiB, whatever the size of the file, and takes longer than `lock_file`, since all data
    are written twice and flushed window by window. While it runs, and after a crash until `recover_file`, a journal
    `.NAME.deeplock-journal` lies beside the file; every function here then refuses the file, but other software that
    reads it may see a mixture. If anything goes wrong in the running process, Ctrl-C included, the file is as it was.

    Parameters
    ----------
    path
        The file. A symbolic link is followed; a file with more than one hard link is refused, since the journal could
        not be seen beside the others. The blocks that held the plain data are overwritten, but a device may keep
        copies of them.
    key, schedule, sbox, only, seal, threads
        As for `lock_file`.
    progress
        Called with the number of bytes changed since the last call.

    Returns
    -------
    LockHeader
        As `read_header(path)` gives it.

    Raises
    ------
    InterruptedLockError
        An earlier change in place was not finished; or this one went wrong and could not be taken back.
    AlreadyLockedError, ContainerError
        The file is locked, malformed, or one of several that make up a model.
    FileAccessError
        It, or its directory, cannot be written, or there is too little space; nothing was changed.
    KeyTypeError, KeyFormatError, UnknownNameError, TensorNameError, ParameterError
        As for `lock_file`.
    """
    lock = NamedLock.new(key, schedule, find_sbox(sbox))
    count = resolve_threads(threads)
    with _exclusive(path) as file, lock:
        known, layout = _read(file.path, _View(file), file.size)
        if layout.header is not None:
            raise AlreadyLockedError(f"{file.path}: it is locked already; unlock it first")
        chosen = select(layout.tensors, only)
        lock.cover({name: (layout.tensors[name].nbytes, None) for name in chosen})
        bare = lock.prove(None, layout.proved).to_json()
        seals = dict.fromkeys(chosen, 0)
        text = lock.prove(seals if seal else None, layout.proved).to_json()
        edits = known.edits(layout, text, [0] * len(layout.checksums))
        change = _change(file, edits, bare, seals if seal else {})
        _Work(file, known, layout, change, lock, count, progress).carry_out()
    return lock.header


def unlock_file_in_place(
    path: Path,
    key: Key,
    *,
    sbox: SBox | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> None:
    """Unlock a locked file in place: it becomes the file that was locked, byte for byte.

    All seals are compared before the first byte changes. The journal holds plain data meanwhile, as the file does; it
    is readable by its owner alone, and overwritten at the end.

    Parameters
    ----------
    path, threads, progress
        As for `lock_file_in_place`.
    key, sbox
        As for `unlock_file`.

    Raises
    ------
    WrongKeyError, TamperedHeaderError, TamperedError, NotLockedError, HeaderError, SBoxError
        As for `unlock_file`; nothing was changed.
    InterruptedLockError, ContainerError, FileAccessError, KeyTypeError, KeyFormatError, ParameterError
        As for `lock_file_in_place`.
    """
    count = resolve_threads(threads)
    with _exclusive(path) as file:
        known, layout = _read(file.path, _View(file), file.size)
        lock = NamedLock.from_header(key, header_of(layout), sbox=sbox)
        edits = known.edits(layout, None, [0] * len(layout.checksums))
        work = _Work(file, known, layout, _change(file, edits, None, {}), lock, count, progress)
        with lock:
            work.compare_seals()
            work.carry_out()


def recover_file(
    path: Path,
    key: Key,
    *,
    undo: bool = False,
    sbox: SBox | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> LockHeader | None:
    """Finish a lock or unlock in place that was interrupted, or take it back; a file that is whole stays as it is.

    This may be interrupted as well, and be called again with `undo` or without.

    Parameters
    ----------
    path, threads, progress
        As for `lock_file_in_place`.
    key
        The master key that the interrupted call was given.
    undo
        Whether to make the file what it was before, and not what it was to become.
    sbox
        The S-Box, where it has no name.

    Returns
    -------
    LockHeader or None
        The header of the file, or None if it is not locked now.

    Raises
    ------
    WrongKeyError
        The key is another one.
    InterruptedLockError
        The file is not as the interrupted call left it; nothing was changed.
    ContainerError
        The journal is damaged, or the file is none of a known format.
    TamperedHeaderError, HeaderError, SBoxError, FileAccessError, KeyTypeError, KeyFormatError, ParameterError
        As for `unlock_file`.
    """
    count = resolve_threads(threads)
    with _exclusive(path, interrupted=True) as file, Journal.find(file.path) as journal:
        if journal is None:
            remove_leftover(file.path)
        else:
            change = journal.change
            known, layout = _read(file.path, _View(file, journal), change.size)
            header = header_of(layout if change.header is None else dataclasses.replace(layout, header=change.header))
            with NamedLock.from_header(key, header, sbox=sbox) as lock:
                work = _Work(file, known, layout, change, lock, count, progress)
                work.check_untouched(journal)
                work.go_on(journal, undo=undo)
    layout = streaming.read_layout(path)
    return None if layout.header is None else header_of(layout)


class _File(NamedTuple):
    """A file that nobody else changes in place: its path without symbolic links, descriptor and size."""

    path: str
    descriptor: int
    size: int


@contextmanager
def _exclusive(path: Path, *, interrupted: bool = False) -> Iterator[_File]:
    """Open a file for a change in place, or for recovering from one."""
    text = os.path.realpath(path_text(path))
    with file_errors(text, _ACTION):
        check_regular(text, _ACTION, os.stat(text))
        descriptor = os.open(text, os.O_RDWR | os.O_NOFOLLOW)
        try:
            claim(descriptor, text, _ACTION)
            status = os.fstat(descriptor)
            if not interrupted:
                check_whole(text)
                if status.st_nlink > 1:
                    shared = OSError(errno.EMLINK, "it has another hard link; remove that, or lock into a new file")
                    raise access_error(text, _ACTION, shared)
            yield _File(text, descriptor, status.st_size)
        finally:
            os.close(descriptor)


class _View(io.RawIOBase):
    """A file as it was before the change of a journal; of tensors' bytes some may be locked and others not."""

    def __init__(self, file: _File, journal: Journal | None = None) -> None:
        self._descriptor = file.descriptor
        self._newest = newest = journal.newest if journal else None
        if journal is None:
            self._parts: list[tuple[int, int, int | bytes]] = [(0, file.size, 0)]
        else:
            change = journal.change
            self._parts = [*change.parts(newest.boundary if newest else change.first_boundary)]
        self._position = 0

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that any part of it can be read."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to another position."""
        end = max(stop for _, stop, _ in self._parts)
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: end}[whence]
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read some of what comes next."""
        for start, stop, where in self._parts:
            if start <= self._position < stop:
                count = min(len(buffer), stop - self._position)
                if isinstance(where, bytes):
                    data = where[self._position - start :][:count]
                else:
                    data = self._moved(self._position + where, count)
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
        return 0

    def _moved(self, position: int, count: int) -> bytes:
        """Read what is in the file, or will be when the newest record is written there."""
        data = read_at(self._descriptor, position, count)
        if self._newest is not None:
            skipped = self._newest.position - position
            fresh = self._newest.data[max(-skipped, 0) : max(count - skipped, 0)]
            place = max(skipped, 0)
            data[place : place + len(fresh)] = fresh
        return bytes(data)


def _read(path: str, view: _View, size: int) -> tuple[Format, Layout]:
    """Read what is where in a file."""
    with io.BufferedReader(view) as reader:
        known = recognise(reader.read(streaming.START_BYTES))
        reader.seek(0)
        layout = known.read(reader, size, path)
    if layout.companions:
        raise ContainerError(
            f"{path}: got a model in several files, as {layout.companions[0]!a}; accepted in place is one that is "
            "one file; lock it into another directory"
        )
    return known, layout


def _change(file: _File, edits: Sequence[Edit], header: str | None, seals: Seals) -> Change:
    window = max(1, min(streaming.WINDOW, file.size))
    change = Change(
        size=file.size,
        modified=os.fstat(file.descriptor).st_mtime_ns,
        edits=[(edit.start, edit.stop, len(edit.data)) for edit in edits],
        window=window,
        room=window + len(seals) * SEAL_BYTES,
        header=header,
        sealed=bool(seals),
        kept=b"".join(read_at(file.descriptor, edit.start, edit.stop - edit.start) for edit in edits),
    )
    if not change.possible:
        raise ContainerError(f"{file.path}: its parts would move both ways; lock or unlock it into a new file")
    return change


class _Step(NamedTuple):
    """A window of the old file that is transformed and moves."""

    window: Window
    shift: int


class _Work:
    """A change and all that carries it out, from any step on and in either direction."""

    def __init__(
        self,
        file: _File,
        known: Format,
        layout: Layout,
        change: Change,
        lock: NamedLock,
        threads: int,
        progress: Progress,
    ) -> None:
        self._file, self._format, self._layout, self._change = file, known, layout, change
        self._lock, self._threads, self._progress = lock, threads, progress
        self._names, self._begun = lock.header.tensors, False
        self._seals = dict.fromkeys(self._names, 0)
        self._steps = [
            step
            for step in self._windows()
            if step.shift or any(tensor.name in self._names for tensor, _, _ in step.window.parts)
        ]
        if change.backwards:
            self._steps.reverse()

    def carry_out(self) -> None:
        """Make the change, or leave the file as it was."""
        file, change = self._file, self._change
        try:
            reserve(file.descriptor, max(change.size, change.new_size))
            with Journal.create(file.path, change) as journal:
                self.go_on(journal)
        except BaseException:
            self._progress = None
            try:
                # What is on the disk counts, as after a crash: the exception may have come between any two steps.
                with Journal.find(file.path) as found:
                    if found is not None:
                        self.go_on(found, undo=True)
                    else:
                        self._give_up()
            except BaseException as error:
                raise InterruptedLockError(
                    f"{file.path}: its change in place failed, and so did taking it back ({type(error).__name__}); "
                    "`deeplock recover` finishes it, or takes it back with --undo"
                ) from error
            raise

    def go_on(self, journal: Journal, *, undo: bool = False) -> None:
        """Finish the change of a journal, or take it back."""
        self._begun = True
        descriptor, change, newest = self._file.descriptor, self._change, journal.newest
        largest = max(change.size, change.new_size)
        if os.fstat(descriptor).st_size < largest:
            os.ftruncate(descriptor, largest)
        done = 0
        if newest is not None:
            write_at(descriptor, newest.position, newest.data)
            done, self._seals = newest.done, self._read_state(newest.state)
        os.fsync(descriptor)
        if undo:
            for index in reversed(range(done)):
                self._take(index, journal, undo=True)
        else:
            for index in range(done, len(self._steps)):
                self._take(index, journal, undo=False)
        for position, data in change.replaced if undo else self._replacing():
            write_at(descriptor, position, data)
        os.ftruncate(descriptor, change.size if undo else change.new_size)
        os.fsync(descriptor)
        if undo:
            self._restore_time()
        journal.retire()

    def _give_up(self) -> None:
        """Leave a file that was not touched yet, or is finished, without what was made for the change."""
        descriptor = self._file.descriptor
        with suppress(OSError):
            remove_leftover(self._file.path)
            os.ftruncate(descriptor, os.fstat(descriptor).st_size)  # frees what was set aside
        if not self._begun:
            self._restore_time()

    def compare_seals(self) -> None:
        """Refuse a locked file that was altered."""
        seals = dict.fromkeys((name for name in self._names if self._lock.sealed(name)), 0)
        for window, _ in self._windows():
            data = self._window(window, 0)
            ranges = [one for one in self._ranges(window, data) if one.name in seals]
            merge_seals(seals, self._lock.seals(ranges, self._threads))
        self._lock.expect(seals)

    def check_untouched(self, journal: Journal) -> None:
        """Refuse a file that is not as the interrupted change left it, as far as that can be seen."""
        change, descriptor = self._change, self._file.descriptor
        size, sizes = os.fstat(descriptor).st_size, {change.size, change.new_size}
        done = journal.newest.done if journal.newest else 0
        fits = size in sizes if done in (0, len(self._steps)) else size == max(sizes)
        if fits and done not in (0, len(self._steps)) and len(journal.records) == 2:
            before, after = journal.records
            # What was written before the newest record is still there, but for what that one was written over.
            start, stop = before.position, before.position + len(before.data)
            for low, high in (start, min(stop, after.position)), (max(start, after.position + len(after.data)), stop):
                if low < high:
                    fits = fits and read_at(descriptor, low, high - low) == before.data[low - start : high - start]
        if not fits:
            raise InterruptedLockError(
                f"{self._file.path}: it is not as the interrupted change left it, which can be neither finished nor "
                "taken back; if this is another file by now, remove the journal beside it"
            )

    def _take(self, index: int, journal: Journal, *, undo: bool) -> None:
        """Do one step, or take it back: through the journal, so that it may be cut short anywhere."""
        window, shift = self._steps[index]
        data = self._window(window, shift if undo else 0)
        ranges = [one for one in self._ranges(window, data) if one.name in self._names]
        locking, sealed = self._change.header is not None, self._change.sealed
        if locking != undo:
            add = partial(merge_seals, self._seals)
            self._lock.lock(ranges, self._threads, seal=sealed and not undo, then=add)
        else:
            if sealed:  # a seal is an XOR over windows: this takes one out
                merge_seals(self._seals, self._lock.seals(ranges, self._threads))
            self._lock.unlock(ranges, self._threads)
        ahead = self._change.backwards != undo
        position = window.begin if undo else window.begin + shift
        boundary = window.begin if ahead else window.end
        done = index if undo else index + 1
        journal.append(done, boundary, position, self._state(), data)
        write_at(self._file.descriptor, position, data)
        os.fsync(self._file.descriptor)
        if self._progress is not None:
            self._progress(len(data))

    def _replacing(self) -> Iterator[tuple[int, bytes]]:
        """Give the bytes that replace others in the new file, whose data are all in place, and where they go."""
        header = None
        if self._change.header is not None:
            header = self._lock.prove(self._seals if self._change.sealed else None, self._layout.proved).to_json()
        edits = self._format.edits(self._layout, header, self._checksums())
        if [(edit.start, edit.stop, len(edit.data)) for edit in edits] != [*self._change.edits]:
            raise ContainerError(f"{self._file.path}: its header does not fit the place that was made for it")
        shift = 0
        for edit in edits:
            yield edit.start + shift, edit.data
            shift += len(edit.data) - (edit.stop - edit.start)

    def _checksums(self) -> list[int]:
        sums = [0] * len(self._layout.checksums)
        for window, shift in self._windows() if sums else ():
            data = memoryview(self._window(window, shift))
            for i, (start, stop) in enumerate(self._layout.checksums):
                low, high = max(start, window.begin), min(stop, window.end)
                if low < high:
                    sums[i] = zlib.crc32(data[low - window.begin : high - window.begin], sums[i])
        return sums

    def _windows(self) -> Iterator[_Step]:
        """Give all windows of the old file, in its order."""
        spans = deque(self._change.spans)
        for window in windows(self._layout.tensors.values(), [span[:2] for span in spans], self._change.window):
            while len(spans) > 1 and spans[0].stop <= window.begin:
                spans.popleft()
            yield _Step(window, spans[0].shift if spans else 0)

    def _window(self, window: Window, shift: int) -> bytearray:
        """Read a window, which may have moved."""
        data = read_at(self._file.descriptor, window.begin + shift, window.end - window.begin)
        if len(data) < window.end - window.begin:
            raise ContainerError(f"{self._file.path}: it became shorter while it was changed")
        return data

    def _ranges(self, window: Window, data: bytearray) -> list[Range]:
        start = np.frombuffer(data, np.uint8).ctypes.data if data else 0
        return ranges_of(window, start, start)

    def _state(self) -> bytes:
        """Give what a record says of the seals."""
        seals = self._seals.values() if self._change.sealed else ()
        return b"".join(seal.to_bytes(SEAL_BYTES, "big") for seal in seals)

    def _read_state(self, state: bytes) -> Seals:
        seals = (state[i : i + SEAL_BYTES] for i in range(0, len(state), SEAL_BYTES))
        return dict.fromkeys(self._names, 0) | {
            name: int.from_bytes(seal, "big") for name, seal in zip(self._names, seals, strict=False)
        }

    def _restore_time(self) -> None:
        with suppress(OSError):
            accessed = os.fstat(self._file.descriptor).st_atime_ns
            os.utime(self._file.descriptor, ns=(accessed, self._change.modified))
