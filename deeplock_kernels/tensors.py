"""Lock and unlock tensors by name: a fresh salt for each lock, a key for each tensor, all of them or none."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter, le
from typing import Any

from deeplock_kernels import buffers
from deeplock_kernels.buffers import Memory
from deeplock_kernels.errors import (
    BufferTypeError,
    OverlapError,
    ParameterError,
    SizeMismatchError,
    TensorNameError,
    shown,
)
from deeplock_kernels.header import LockHeader
from deeplock_kernels.locking import find_sbox, unlock
from deeplock_kernels.named_lock import Key, NamedLock
from deeplock_kernels.pieces import Range
from deeplock_kernels.runtime.pool import resolve_threads
from deeplock_kernels.sboxes import SBox
from deeplock_kernels.schedules.base import check_range

Selection = str | Iterable[str] | Callable[[str], bool] | None


def lock_tensors(
    tensors: Mapping[str, Any],
    key: Key,
    *,
    schedule: str = "counter",
    sbox: SBox | str = "aes",
    only: Selection = None,
    seal: bool = True,
    threads: int | None = None,
) -> LockHeader:
    """Lock named tensors in place, each with its own key stream.

    Tensors that share their storage are locked once. Everything is checked before the first byte changes, and whatever
    then goes wrong, all tensors are as they were.

    Parameters
    ----------
    tensors
        Buffers by name: arrays, CPU tensors, anything that `lock` takes for writing.
    key
        The master key: 16, 24 or 32 bytes, or a MasterKey.
    schedule
        "counter" (the default), or "expansion", the paper's kind, which **one known block, or locked floats alone,
        can break**.
    sbox
        The S-Box or its name. One of your own has to be given again to unlock.
    only
        Which tensors to lock: a glob pattern, several of them, or a function of the name. By default all.
    seal
        Whether to seal the locked bytes of each tensor (GMAC, SP 800-38D), so that unlocking notices every change. The
        header proves itself in any case. It happens in the pass that locks, and with "expansion" in one of its own.
    threads
        How many threads at most; None for `get_num_threads()`.

    Returns
    -------
    LockHeader
        Keep it beside the tensors: without its salt they cannot be unlocked.

    Raises
    ------
    BufferTypeError, BufferLayoutError, ReadOnlyError
        A tensor cannot be locked in place; the message names it.
    OverlapError
        Two tensors share part of their memory, or one to be locked shares it with one that is not.
    KeyTypeError, KeyFormatError, TensorNameError, UnknownNameError, ParameterError
        Another argument is wrong.
    """
    names = _check_names(tensors)
    lock = NamedLock.new(key, schedule, find_sbox(sbox))
    count = resolve_threads(threads)
    chosen = select(names, only)
    storages = _storages(tensors, chosen)
    lock.cover({name: (block.nbytes, same_as) for name, (block, same_as) in storages.items()})
    buffers.note_written(*(tensors[name] for name in chosen))
    ranges, header = ranges_of(storages, empty=seal), None
    try:
        with lock:
            header = lock.lock(ranges, count, seal=seal, then=lambda seals: lock.prove(seals if seal else None))
    except BaseException:
        if header is not None:  # interrupted while the keys were wiped: nobody else will ever have this header
            with NamedLock.from_header(key, header, check=False, sbox=lock.box) as again:
                again.unlock(ranges, count)
        raise
    return header


def unlock_tensors(
    tensors: Mapping[str, Any],
    key: Key,
    header: LockHeader,
    *,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> None:
    """Unlock named tensors in place: those that the header lists; others are left alone.

    All seals are compared before the first byte changes. Tensors that shared their storage when they were locked may
    still share it, or have become copies by now.

    Parameters
    ----------
    tensors
        Buffers by name, as for `lock_tensors`.
    key
        The master key that locked them.
    header
        What `lock_tensors` returned, or for tensors from a locked file what `read_header` gives.
    check
        Whether to refuse a wrong key, and a header or tensors that were altered. Without that nothing is refused, and
        a wrong key gives nonsense weights, as in the paper.
    seal
        Whether to compare the seals, which takes a pass over the tensors.
    sbox
        The S-Box, where it is one of your own.
    threads
        How many threads at most.

    Raises
    ------
    WrongKeyError
        The key is another one; nothing was changed.
    TamperedHeaderError, TamperedError
        The header, or the tensor that the message names, is not as it was locked; nothing was changed.
    TensorNameError, SizeMismatchError
        A tensor of the header is missing or has another length; nothing was changed.
    BufferTypeError, BufferLayoutError, ReadOnlyError, OverlapError
        A tensor cannot be unlocked in place; nothing was changed.
    KeyTypeError, KeyFormatError, HeaderError, SBoxError
        Another argument is wrong.
    """
    lock, storages, count = take_up(tensors, key, header, check=check, sbox=sbox, threads=threads)
    ranges = ranges_of(storages, empty=False)
    with lock:
        if check and seal:
            lock.expect(lock.seals(sealed_ranges(lock, storages), count))
        buffers.note_written(*(tensors[name] for name in header.tensors))
        lock.unlock(ranges, count)


def verify_tensors(
    tensors: Mapping[str, Any], key: Key, header: LockHeader, *, threads: int | None = None
) -> None:
    """Say whether locked tensors and their header are as the lock left them; nothing is changed.

    Parameters
    ----------
    tensors, key, header, threads
        As for `unlock_tensors`, but what is only for reading will do too.

    Raises
    ------
    WrongKeyError
        The key is another one.
    TamperedHeaderError
        The header was altered.
    TamperedError
        The tensor that the message names was altered, or unlocked already.
    NotSealedError
        They were locked without seals.
    TensorNameError, SizeMismatchError, OverlapError, BufferTypeError, BufferLayoutError
        As for `unlock_tensors`.
    KeyTypeError, KeyFormatError, HeaderError, ParameterError
        Another argument is wrong.
    """
    lock, storages, count = take_up(tensors, key, header, only_read=True, threads=threads)
    ranges = sealed_ranges(lock, storages)
    with lock:
        lock.must_be_sealed()
        lock.expect(lock.seals(ranges, count))


def sealed_ranges(lock: NamedLock, storages: Mapping[str, tuple[Memory, str | None]]) -> list[Range]:
    """Give the ranges of all storages that have a seal."""
    return [one for one in ranges_of(storages, empty=True) if lock.sealed(one.name)]


def take_up(
    tensors: Mapping[str, Any],
    key: Key,
    header: LockHeader,
    *,
    check: bool = True,
    sbox: SBox | None = None,
    only_read: bool = False,
    threads: int | None = None,
) -> tuple[NamedLock, dict[str, tuple[Memory, str | None]], int]:
    """Check all that can be checked of locked tensors, and give their lock, their memory and the number of threads."""
    _check_names(tensors)
    lock = NamedLock.from_header(key, header, check=check, sbox=sbox, needs_sbox=not only_read)
    count = resolve_threads(threads)
    missing = [name for name in header.tensors if name not in tensors]
    if missing:
        raise TensorNameError(
            f"tensors: {missing[0]!r} is in the header and not here; {len(missing)} such in all"
        )
    storages = _storages(tensors, [name for name in tensors if name in header.tensors], writable=not only_read)
    for name, (block, same_as) in storages.items():
        record = header.tensors[name]
        if block.nbytes != record.nbytes:
            raise SizeMismatchError(
                f"tensors[{name!r}]: got {block.nbytes} bytes, accepted are the header's {record.nbytes}"
            )
        if same_as is not None and lock.root(same_as) != lock.root(name):
            raise OverlapError(
                f"tensors[{name!r}]: got the memory of {same_as!r}, which was locked as another tensor; give it its own"
            )
    return lock, storages, count


def unlock_tensor(
    data: Any,
    key: Key,
    header: LockHeader,
    name: str,
    *,
    offset: int = 0,
    out: Any = None,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> Any:
    """Unlock one tensor, or any range of its bytes.

    A seal is one of a whole tensor: only where all of it is given is it compared, in place before a byte changes, and
    out of place in the same pass. Then nothing is left in `out` if the seal is another.

    Parameters
    ----------
    data
        The locked bytes, from byte `offset` of the tensor on.
    key, header, check, seal, sbox, threads
        As for `unlock_tensors`.
    name
        The tensor's name in the header.
    offset
        Where in the tensor `data` begins, in bytes.
    out
        Where to write, as for `unlock`: `data` for in place, other memory, or None for a new array.

    Returns
    -------
    `out`, or the new array or tensor.

    Raises
    ------
    WrongKeyError
        The key is another one; nothing was changed.
    TamperedHeaderError, TamperedError
        The header or the tensor is not as it was locked; `data` was not changed, other memory in `out` is zeros.
    TensorNameError
        The header has no such tensor.
    SizeMismatchError
        The range goes past the tensor's end.
    ParameterError, BufferTypeError, BufferLayoutError, ReadOnlyError, OverlapError, HeaderError, SBoxError
        Another argument is wrong; nothing was changed.
    """
    names = [name] if isinstance(name, str) else []
    lock = NamedLock.from_header(key, header, check=check, sbox=sbox, names=names)
    if not isinstance(name, str) or name not in header.tensors:
        raise TensorNameError(
            f"name: got {shown(name)}, which is not one of the header's {len(header.tensors)} tensors"
        )
    source = buffers.memory(data)
    offset = check_range(offset, source.nbytes)
    total = header.tensors[name].nbytes
    if offset + source.nbytes > total:
        raise SizeMismatchError(
            f"data: got bytes {offset} to {offset + source.nbytes} of tensor {name!r}, which has {total}"
        )
    if not (check and seal and source.nbytes == total and lock.sealed(name)):
        with lock:
            schedule, start = lock.stream(name)
            return unlock(data, schedule, sbox=lock.box, offset=start + offset, out=out, threads=threads)
    count = resolve_threads(threads)
    result = buffers.new_like(data) if out is None else out
    target = buffers.output_memory(result, source)
    whole = [Range(name, target.address, source.address, total)]
    with lock:
        if target.address == source.address:
            lock.expect(lock.seals(whole, count))
            buffers.note_written(result)
            lock.unlock(whole, count)
            return result
        try:
            buffers.note_written(result)
            lock.expect(lock.unlock_and_seal(whole, count))
        except BaseException:
            buffers.wipe(target)
            raise
    return result


def select(names: Iterable[str], only: Selection) -> list[str]:
    """Choose names by a glob pattern, several patterns or a function; None chooses all.

    Raises
    ------
    ParameterError
        `only` is something else.
    TensorNameError
        It chooses none.
    """
    names = list(names)
    if only is None:
        return names
    if callable(only):
        chosen = [name for name in names if only(name)]
    else:
        patterns = [only] if isinstance(only, str) else list(only) if isinstance(only, Iterable) else [None]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise ParameterError(
                "only: accepted are a glob pattern, several of them, or a function of the name"
            )
        chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise TensorNameError(
            f"only: it chooses none of the {len(names)} tensors; see their names for what to give"
        )
    return chosen


def _check_names(tensors: Mapping[str, Any]) -> list[str]:
    if not isinstance(tensors, Mapping):
        raise BufferTypeError(
            f"tensors: got {type(tensors).__name__}, accepted is a mapping from names to buffers"
        )
    try:
        "\0".join(tensors).encode()
        return list(tensors)
    except (TypeError, UnicodeEncodeError):  # find out which one it is
        pass
    for name in tensors:
        if not isinstance(name, str):
            raise TensorNameError(f"tensors: got a name of type {type(name).__name__}, accepted are str")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise TensorNameError(f"tensors: got the name {name!a}, which is no Unicode text") from None
    return list(tensors)


def _storages(
    tensors: Mapping[str, Any], chosen: list[str], *, writable: bool = True
) -> dict[str, tuple[Memory, str | None]]:
    """Give the memory of the chosen tensors, and for one that has the memory of an earlier one, that one's name."""
    blocks = buffers.named_memory(tensors, chosen, writable=writable)
    others = {}
    if len(blocks) < len(tensors):
        for name in tensors.keys() - blocks.keys():
            try:
                others[name] = buffers.extent(tensors[name])
            except BufferTypeError:
                continue  # what is not locked need not be lockable
    ranges = [(start, start + nbytes, name) for name, (start, nbytes, _) in blocks.items() if nbytes]
    ranges += [(start, start + nbytes, name) for name, (start, nbytes, _) in others.items() if nbytes]
    ranges.sort()
    if all(map(le, map(itemgetter(1), ranges), map(itemgetter(0), ranges[1:]))):
        return {name: (block, None) for name, block in blocks.items()}
    reach, holder = 0, ""
    for address, stop, name in ranges:
        if address < reach:
            same_range = (blocks | others)[holder][:2] == (address, stop - address)
            if not (same_range and name in blocks and holder in blocks) and (
                name in blocks or holder in blocks
            ):
                raise OverlapError(
                    f"tensors[{name!r}]: got memory that it shares with {holder!r} "
                    f"{'(not chosen by `only`)' if same_range else 'in part'}; accepted is all or nothing shared"
                )
        if stop > reach:
            reach, holder = stop, name
    first: dict[tuple[int, int], str] = {}
    storages: dict[str, tuple[Memory, str | None]] = {}
    for name, block in blocks.items():
        same = first.setdefault((block.address, block.nbytes), name) if block.nbytes else name
        storages[name] = (block, None if same == name else same)
    return storages


def ranges_of(storages: Mapping[str, tuple[Memory, str | None]], *, empty: bool) -> list[Range]:
    """Give the ranges of all storages once, in place, and on demand those that are empty."""
    return [
        Range(name, block.address, block.address, block.nbytes)
        for name, (block, same_as) in storages.items()
        if same_as is None and (block.nbytes or empty)
    ]
