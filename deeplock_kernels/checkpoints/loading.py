"""Load tensors straight from a locked safetensors file: all, some, or slices. No plain bytes reach the disk.

Whole tensors are unlocked out of the mapped file into the memory of the arrays that are returned. Parts are read into
that memory and unlocked there.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from deeplock_kernels.checkpoints.arrays import Arrays, Bytes
from deeplock_kernels.checkpoints.formats.base import TensorEntry
from deeplock_kernels.checkpoints.formats.safetensors import SAFETENSORS
from deeplock_kernels.checkpoints.formats.safetensors_table import DTYPE_BITS, ENTRY_KEY
from deeplock_kernels.checkpoints.slicing import choose, halves, runs_of
from deeplock_kernels.checkpoints.streaming import (
    OpenedFile,
    Path,
    Window,
    header_of,
    mapped,
    merge_seals,
    opened,
    windows,
)
from deeplock_kernels.errors import (
    ClosedFileError,
    ContainerError,
    FileAccessError,
    KeyTypeError,
    NotSealedError,
    ParameterError,
    TensorIndexError,
    TensorNameError,
    shown,
)
from deeplock_kernels.files import access_error
from deeplock_kernels.locking import unlock
from deeplock_kernels.named_lock import Key, NamedLock, Seals
from deeplock_kernels.pieces import Range
from deeplock_kernels.runtime.pool import holding, resolve_threads
from deeplock_kernels.sboxes import SBox

Elements = npt.NDArray[np.unsignedinteger[Any]]
_Result = TypeVar("_Result")
_WINDOW = 64 << 20  # bytes of the file that are mapped at once
_SCRATCH = 4 << 20  # bytes that are unlocked to pick elements out of them


def load_file(
    path: Path,
    key: Key,
    *,
    tensors: Iterable[str] | None = None,
    framework: str = "np",
    device: Any = None,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Load unlocked tensors from a locked safetensors file, in one pass and with no other copy of them.

    Besides the tensors about 64 MiB of the file are mapped at a time. Tensors that the lock left out are loaded as they
    are, unverified.

    Parameters
    ----------
    path
        The file; it is only read.
    key
        The master key that locked it.
    tensors
        The names of those to load; None for all.
    framework
        What to make of them: "np" for NumPy arrays, "pt" for PyTorch tensors, "jax" for JAX arrays. BF16 and F8 are
        dtypes of `ml_dtypes` in NumPy. F4 and F6 come as their bytes, flat and of dtype uint8. JAX has 64-bit dtypes
        only where `jax_enable_x64` is set; they are not rounded to 32 bits.
    device
        Where to put them, as the framework calls it. They are unlocked on the CPU.
    check, seal, sbox
        As for `unlock_tensors`; seals are compared in the same pass.
    threads
        How many threads at most.

    Returns
    -------
    dict
        By name, in the order of the file, or of `tensors`.

    Raises
    ------
    WrongKeyError
        The key is another one.
    TamperedHeaderError, TamperedError
        The header, the file's table or the tensor that the message names was altered. Whatever was unlocked is zeros.
    TensorNameError
        The file has no such tensor.
    NotLockedError, ContainerError, HeaderError, FileAccessError
        It has no lock header, is not well-formed, changed meanwhile, or cannot be read.
    MissingLibraryError, BufferTypeError
        The framework is not installed, or has no such dtype.
    KeyTypeError, KeyFormatError, SBoxError, UnknownNameError, ParameterError
        Another argument is wrong.
    """
    if key is None:
        raise KeyTypeError("key: got None, accepted are bytes or a MasterKey")
    with LockedFile(path, key, framework, device, check=check, seal=seal, sbox=sbox, threads=threads) as file:
        return file.get_tensors(file.keys() if tensors is None else tensors)


def open_locked(
    path: Path,
    key: Key | None = None,
    *,
    framework: str = "np",
    device: Any = None,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> LockedFile:
    """Open a locked safetensors file to look into it, and to load single tensors and slices of them.

    Use it in a `with` statement, like `safe_open` of the safetensors library: at the end keys are wiped.

    Parameters
    ----------
    path
        The file; it is only read.
    key
        The master key that locked it. Names, shapes, dtypes and metadata need none; without one they are not proved.
    framework, device, check, seal, sbox, threads
        As for `load_file`.

    Raises
    ------
    WrongKeyError, TamperedHeaderError
        The key is another one, or the header or the file's table was altered.
    NotLockedError, ContainerError, HeaderError, FileAccessError, MissingLibraryError, KeyTypeError, KeyFormatError,
    SBoxError, UnknownNameError, ParameterError
        As for `load_file`.
    """
    return LockedFile(path, key, framework, device, check=check, seal=seal, sbox=sbox, threads=threads)


class LockedFile:
    """A locked safetensors file that is open for reading; made by `open_locked`.

    Threads may share it, and take turns. The file must not be changed while it is open: another size or time of
    modification is an error at the next read, and a program that cuts it short during a read can end this process.
    """

    def __init__(
        self,
        path: Path,
        key: Key | None,
        framework: str,
        device: Any,
        *,
        check: bool,
        seal: bool,
        sbox: SBox | None,
        threads: int | None,
    ) -> None:
        self._arrays, self._threads = Arrays(framework, device), resolve_threads(threads)
        self._compares_seals = bool(check and seal)
        self._guard = threading.RLock()
        self._verified: set[str] = set()
        with ExitStack() as stack:
            model = stack.enter_context(opened(path, "path"))
            if model.format is not SAFETENSORS:
                source, kind = model.layout.source, model.format.name
                raise ContainerError(f"{source}: got a file of {kind}, accepted is safetensors; use unlock_file")
            header = header_of(model.layout)
            self._lock = None
            if key is not None:
                self._lock = stack.enter_context(NamedLock.from_header(key, header, check=check, sbox=sbox))
            self._layout, self._locked, self._file = model.layout, frozenset(header.tensors), model.files[0]
            self._state = self._file.state()
            self._stack: ExitStack | None = stack.pop_all()
        _open_files.add(self)

    def keys(self) -> list[str]:
        """Give the names of all tensors, in the order of the data."""
        return list(self._layout.tensors)

    def metadata(self) -> dict[str, str] | None:
        """Give the file's metadata without the lock header, or None if there is no other."""
        return {name: text for name, text in self._layout.detail.metadata.items() if name != ENTRY_KEY} or None

    def get_tensor(self, name: str) -> Any:
        """Load a tensor; its seal is compared.

        Raises
        ------
        TamperedError
            The tensor was altered; what was unlocked is zeros.
        TensorNameError
            The file has no such tensor.
        KeyTypeError
            It is locked, and there is no key.
        ContainerError, ClosedFileError, BufferTypeError, MissingLibraryError
            The file has changed or is closed, or the framework has no such dtype.
        """
        return self.get_tensors([name])[name]

    def get_tensors(self, names: Iterable[str]) -> dict[str, Any]:
        """Load several tensors in one pass; otherwise as `get_tensor`."""
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ParameterError(f"tensors: got {shown(names)}, accepted are several names, as in a list")
        entries = {name: self._entry(name) for name in names}
        for entry in entries.values():
            self._arrays.dtype(entry.dtype)
        loaded = self._while_open(lambda: self._load(entries))
        return {name: self._arrays.wrap(loaded.pop(name), entry.dtype, entry.shape) for name, entry in entries.items()}

    def get_slice(self, name: str, *, verify: bool = False) -> TensorSlice:
        """Give what loads parts of a tensor: `file.get_slice(name)[rows, ...]`.

        A seal is one of a whole tensor. So **parts are not verified**: whoever can write the file can change what
        comes out of them, bit by bit.

        Parameters
        ----------
        name
            Of the tensor.
        verify
            Whether to read the whole tensor once, before its first part, and compare its seal: see `verify`.

        Raises
        ------
        TensorNameError
            The file has no such tensor.
        """
        return TensorSlice(self, self._entry(name), verify=bool(verify))

    def verify(self, name: str) -> None:
        """Read a tensor and compare its seal, unless that was done since the file was opened.

        Raises
        ------
        TamperedError
            It was altered.
        NotSealedError
            It has no seal.
        TensorNameError, KeyTypeError, ContainerError, ClosedFileError
            As for `get_tensor`.
        """
        self._while_open(lambda: self._verify(self._entry(name)))

    def close(self) -> None:
        """Close the file and wipe what was derived of the key; doing so again does nothing."""
        holding(self._guard, self._close)

    # ------------------------------------------------------------------------------

    def _entry(self, name: str) -> TensorEntry:
        if not isinstance(name, str) or name not in self._layout.tensors:
            raise TensorNameError(
                f"name: got {shown(name)}, which is none of the {len(self._layout.tensors)} tensors; see keys()"
            )
        return self._layout.tensors[name]

    def _lock_of(self, name: str) -> NamedLock | None:
        """Give the lock if a tensor is locked."""
        if name not in self._locked:
            return None
        if self._lock is None:
            raise KeyTypeError(f"key: got None, and {name!r} is locked; give open_locked the key to read it")
        return self._lock

    @property
    def _given_lock(self) -> NamedLock:
        """The lock, after `_lock_of` has given it for a tensor."""
        assert self._lock is not None
        return self._lock

    def _while_open(self, work: Callable[[], _Result]) -> _Result:
        def guarded() -> _Result:
            if self._stack is None:
                raise ClosedFileError(f"{self._layout.source}: it is closed; open it again with open_locked")
            try:
                self._check_unchanged()
                return work()
            except FileAccessError:
                raise
            except OSError as error:
                raise access_error(self._file.path, "read", error) from error

        return holding(self._guard, guarded)

    def _check_unchanged(self) -> None:
        if self._file.state() != self._state:
            raise ContainerError(f"{self._layout.source}: it was changed while it was open; open it again")

    def _close(self) -> None:
        if self._stack is not None:
            self._stack.close()
            self._stack = self._lock = None

    def _load(self, entries: dict[str, TensorEntry]) -> dict[str, Bytes]:
        """Give the unlocked bytes of some tensors, or wipe them."""
        locks = {name: lock for name in entries if (lock := self._lock_of(name))}
        seals = {name: 0 for name, lock in locks.items() if self._compares_seals and lock.sealed(name)}
        found: dict[str, Bytes] = {}
        try:
            for name, entry in entries.items():
                found[name] = np.empty(entry.nbytes, np.uint8)
            for window in self._windows([tensor for name, tensor in self._layout.tensors.items() if name in entries]):
                with mapped(self._file, window) as source:
                    ranges = [
                        Range(
                            tensor.name,
                            found[tensor.name].ctypes.data + low - tensor.start,
                            source + low - window.begin,
                            high - low,
                            low - tensor.start,
                        )
                        for tensor, low, high in window.parts
                    ]
                    merge_seals(seals, self._unlock(ranges, sealed=seals))
            if seals:
                self._given_lock.expect(seals)
            self._check_unchanged()
        except BaseException:
            for data in found.values():
                data.fill(0)
            raise
        self._verified.update(seals)
        return found

    def _windows(self, tensors: list[TensorEntry]) -> Iterator[Window]:
        """Give the windows in which parts of some tensors lie, which are in order."""
        span = [(tensors[0].start, tensors[-1].stop)] if tensors else []
        return (window for window in windows(tensors, span, _WINDOW) if window.parts)

    def _unlock(self, ranges: list[Range], *, sealed: Collection[str] = ()) -> Seals:
        """Unlock ranges, or copy them where their tensor is not locked, and give the seals of some tensors."""
        for one in ranges:
            if one.name not in self._locked:
                ctypes.memmove(one.target, one.source, one.nbytes)
        bare = [one for one in ranges if one.name in self._locked and one.name not in sealed]
        if bare:
            self._given_lock.unlock(bare, self._threads)
        whole = [one for one in ranges if one.name in sealed]
        return self._given_lock.unlock_and_seal(whole, self._threads) if whole else {}

    def _verify(self, tensor: TensorEntry) -> None:
        name = tensor.name
        if name in self._verified:
            return
        lock = self._lock_of(name)
        if lock is None or not lock.sealed(name):
            raise NotSealedError(f"name: {name!r} has no seal in this file, so nothing can be said of it")
        seals = {name: 0}
        for window in self._windows([tensor]):
            with mapped(self._file, window) as source:
                parts = [
                    Range(name, 0, source + low - window.begin, high - low, low - tensor.start)
                    for _, low, high in window.parts
                ]
                merge_seals(seals, lock.seals(parts, self._threads))
        lock.expect(seals)
        self._check_unchanged()
        self._verified.add(name)

    def _row(self, tensor: TensorEntry, row: int, *, verify: bool) -> Bytes:
        """Give the bytes at an index of the first axis; they lie together, and this takes as few steps as it can."""
        nbytes = tensor.nbytes // tensor.shape[0]
        target = np.empty(nbytes, np.uint8)
        self._while_open(lambda: self._part(target, tensor, verify, lambda: self._read(target, tensor, [row * nbytes])))
        return target

    def _slice(self, tensor: TensorEntry, ranges: tuple[range, ...], *, verify: bool) -> Elements:
        """Give the elements at these indices."""
        target = np.empty([len(along) for along in ranges], f"u{DTYPE_BITS[tensor.dtype] // 8}")
        self._while_open(lambda: self._part(target, tensor, verify, lambda: self._fill(target, tensor, ranges)))
        return target

    def _part(
        self, target: npt.NDArray[Any], tensor: TensorEntry, verify: bool, fill: Callable[[], object]
    ) -> None:
        """Fill memory with a part of a tensor, or wipe it."""
        self._lock_of(tensor.name)
        if verify:
            self._verify(tensor)
        try:
            if target.size:
                fill()
            self._check_unchanged()
        except BaseException:
            target.fill(0)
            raise

    def _fill(self, out: Elements, tensor: TensorEntry, ranges: tuple[range, ...]) -> None:
        """Fill contiguous memory with the elements at some indices."""
        runs = runs_of(ranges, tensor.shape, out.itemsize)
        if runs.total > (_WINDOW if runs.dense else _SCRATCH) and out.size > 1:
            for part, where in halves(ranges):
                self._fill(out[where], tensor, part)
        elif runs.dense:
            self._read(out.reshape(-1).view(np.uint8), tensor, runs.starts())
        else:
            scratch = np.empty(runs.total, np.uint8)
            self._read(scratch, tensor, runs.starts())
            out[...] = np.ndarray(out.shape, out.dtype, scratch, strides=runs.strides)

    def _read(self, target: Bytes, tensor: TensorEntry, starts: list[int]) -> None:
        """Read pieces of a tensor, of one length and one behind the other, and unlock them there."""
        nbytes = target.size // len(starts)
        for i, start in enumerate(starts):
            read_into(self._file, target[i * nbytes : (i + 1) * nbytes], tensor.start + start)
        if tensor.name not in self._locked:
            return
        lock = self._given_lock
        if len(starts) == 1:
            schedule, begin = lock.stream(tensor.name)
            unlock(target, schedule, sbox=lock.box, offset=begin + starts[0], out=target, threads=self._threads)
            return
        places = range(target.ctypes.data, target.ctypes.data + target.size, nbytes)
        parts = [Range(tensor.name, at, at, nbytes, start) for at, start in zip(places, starts, strict=True)]
        lock.unlock(parts, self._threads)

    def __enter__(self) -> LockedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if not hasattr(self, "_stack"):
            return "LockedFile(unfinished)"
        state = "closed" if self._stack is None else "no key" if self._lock is None else "with its key"
        return f"LockedFile({self._layout.source!r}, {len(self._layout.tensors)} tensors, {state})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise KeyTypeError("LockedFile: it cannot be pickled or copied; open the file again")


class TensorSlice:
    """Loads parts of a tensor; made by `LockedFile.get_slice`."""

    def __init__(self, file: LockedFile, tensor: TensorEntry, *, verify: bool) -> None:
        self._file, self._tensor, self._verify = file, tensor, verify

    def get_shape(self) -> list[int]:
        """Give the tensor's number of elements along each axis."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Give the tensor's dtype as in the file, such as "F32"."""
        return self._tensor.dtype

    def __getitem__(self, index: Any) -> Any:
        """Load what an index chooses; only its bytes are read, and little more.

        Parameters
        ----------
        index
            Integers, slices, Ellipsis and None, as NumPy takes them.

        Returns
        -------
        array
            Of its own memory, also for a single element.

        Raises
        ------
        TensorIndexError
            The index does not fit the tensor, or the dtype's elements are of less than a byte (F4 and F6).
        TamperedError, NotSealedError
            With `verify`: the tensor was altered, or has no seal.
        KeyTypeError, ContainerError, ClosedFileError, BufferTypeError, MissingLibraryError
            As for `LockedFile.get_tensor`.
        """
        file, tensor = self._file, self._tensor
        if DTYPE_BITS[tensor.dtype] % 8:
            raise TensorIndexError(
                f"index: {tensor.name!r} is of {tensor.dtype}, of which no part can be taken; use get_tensor"
            )
        file._arrays.dtype(tensor.dtype)
        length = tensor.shape[0] if tensor.shape else 0
        if type(index) is int and -length <= index < length:
            row = file._row(tensor, index % length, verify=self._verify)
            return file._arrays.wrap(row, tensor.dtype, tensor.shape[1:])
        chosen = choose(index, tensor.shape)
        found = file._slice(tensor, chosen.ranges, verify=self._verify)[chosen.rest]
        data = found if found.flags.c_contiguous else found.copy()
        return file._arrays.wrap(data.reshape(-1).view(np.uint8), tensor.dtype, data.shape)

    def __repr__(self) -> str:
        return f"TensorSlice({self._tensor.name!a}, {self._tensor.dtype}, {list(self._tensor.shape)})"


def read_into(file: OpenedFile, target: Bytes, start: int) -> None:
    """Fill memory from a place in a file.

    Raises
    ------
    ContainerError
        It became shorter.
    """
    while target.size:
        count = os.preadv(file.file.fileno(), [target.data], start)
        if not count:
            raise ContainerError(f"{file.path}: it became shorter while it was open; open it again")
        target, start = target[count:], start + count


_open_files: weakref.WeakSet[LockedFile] = weakref.WeakSet()


def _after_fork() -> None:
    """Let go of what threads hold that a child has not got."""
    for file in _open_files:
        file._guard = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
