"""Lock and unlock tensors by name: a fresh salt for each lock, a key for each tensor, all of them or none."""

from __future__ import annotations

import fnmatch
import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter, le
from types import MappingProxyType
from typing import Any

from deeplock_kernels import buffers
from deeplock_kernels.buffers import Memory
from deeplock_kernels.errors import (
    BufferTypeError,
    HeaderError,
    OverlapError,
    ParameterError,
    SBoxError,
    SizeMismatchError,
    TensorNameError,
    UnknownNameError,
    WrongKeyError,
)
from deeplock_kernels.header import SALT_BYTES, LockHeader, TensorRecord, sbox_field
from deeplock_kernels.keys import Derivation, MasterKey
from deeplock_kernels.locking import find_sbox, unlock
from deeplock_kernels.runtime.pool import Call, resolve_threads
from deeplock_kernels.sboxes import SBOXES, SBox
from deeplock_kernels.schedules import SCHEDULES, CounterSchedule, ExpansionSchedule, Schedule
from deeplock_kernels.schedules.base import check_range
from deeplock_kernels.schedules.counter import CounterList
from deeplock_kernels.transform import Transform

Key = bytes | bytearray | memoryview | MasterKey
Selection = str | Iterable[str] | Callable[[str], bool] | None


def lock_tensors(
    tensors: Mapping[str, Any],
    key: Key,
    *,
    schedule: str = "counter",
    sbox: SBox | str = "aes",
    only: Selection = None,
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
        "counter" (the default), or "expansion", the paper's kind, which **one known block of plain bytes breaks**.
    sbox
        The S-Box or its name. One of your own has to be given again to unlock.
    only
        Which tensors to lock: a glob pattern, several of them, or a function of the name. By default all.
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
    header = lock.header({name: (block.nbytes, same_as) for name, (block, same_as) in storages.items()})
    buffers.note_written(*(tensors[name] for name in chosen))
    _run(lock, header, storages, "lock", count)
    return header


def unlock_tensors(
    tensors: Mapping[str, Any],
    key: Key,
    header: LockHeader,
    *,
    check: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> None:
    """Unlock named tensors in place: those that the header lists; others are left alone.

    Tensors that shared their storage when they were locked may still share it, or have become copies by now.

    Parameters
    ----------
    tensors
        Buffers by name, as for `lock_tensors`.
    key
        The master key that locked them.
    header
        What `lock_tensors` returned.
    check
        Whether to refuse a wrong key. Without that a wrong key gives nonsense weights, as in the paper.
    sbox
        The S-Box, where it is one of your own.
    threads
        How many threads at most.

    Raises
    ------
    WrongKeyError
        The key is another one; nothing was changed.
    TensorNameError, SizeMismatchError
        A tensor of the header is missing or has another length; nothing was changed.
    BufferTypeError, BufferLayoutError, ReadOnlyError, OverlapError
        A tensor cannot be unlocked in place; nothing was changed.
    KeyTypeError, KeyFormatError, HeaderError, SBoxError
        Another argument is wrong.
    """
    _check_names(tensors)
    lock = NamedLock.from_header(key, header, check=check, sbox=sbox)
    count = resolve_threads(threads)
    missing = [name for name in header.tensors if name not in tensors]
    if missing:
        raise TensorNameError(
            f"tensors: {missing[0]!r} is in the header and not here; {len(missing)} such in all"
        )
    storages = _storages(tensors, list(header.tensors))
    for name, (block, same_as) in storages.items():
        record = header.tensors[name]
        if block.nbytes != record.nbytes:
            raise SizeMismatchError(
                f"tensors[{name!r}]: got {block.nbytes} bytes, accepted are the header's {record.nbytes}"
            )
        if same_as is not None and _root(header, same_as) != _root(header, name):
            raise OverlapError(
                f"tensors[{name!r}]: got the memory of {same_as!r}, which was locked as another tensor; give it its own"
            )
    buffers.note_written(*(tensors[name] for name in header.tensors))
    _run(lock, header, storages, "unlock", count)


def unlock_tensor(
    data: Any,
    key: Key,
    header: LockHeader,
    name: str,
    *,
    offset: int = 0,
    out: Any = None,
    check: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> Any:
    """Unlock one tensor, or any range of its bytes.

    Parameters
    ----------
    data
        The locked bytes, from byte `offset` of the tensor on.
    key, header, check, sbox, threads
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
    TensorNameError
        The header has no such tensor.
    SizeMismatchError
        The range goes past the tensor's end.
    ParameterError, BufferTypeError, BufferLayoutError, ReadOnlyError, OverlapError, HeaderError, SBoxError
        Another argument is wrong; nothing was changed.
    """
    lock = NamedLock.from_header(key, header, check=check, sbox=sbox)
    if not isinstance(name, str) or name not in header.tensors:
        raise TensorNameError(
            f"name: got {name!r}, which is not one of the header's {len(header.tensors)} tensors"
        )
    block = buffers.memory(data)
    offset = check_range(offset, block.nbytes)
    if offset + block.nbytes > header.tensors[name].nbytes:
        raise SizeMismatchError(
            f"data: got bytes {offset} to {offset + block.nbytes} of tensor {name!r}, "
            f"which has {header.tensors[name].nbytes}"
        )
    schedule, start = lock.stream(header, name)
    with lock:
        return unlock(data, schedule, sbox=lock.sbox, offset=start + offset, out=out, threads=threads)


class NamedLock:
    """The key streams of one lock: of every tensor that a header lists. Its end wipes them.

    Use `new` to lock and `from_header` to unlock.
    """

    def __init__(self, key: Key, salt: bytes, schedule: str, sbox: SBox) -> None:
        self.sbox, self.salt = sbox, salt
        self._key, self._schedule = key, schedule
        self._derivation = Derivation(key, salt)
        self._streams: dict[str, Schedule] = {}
        self._list: CounterList | None = None

    @classmethod
    def new(cls, key: Key, schedule: str, sbox: SBox) -> NamedLock:
        """Draw a new salt."""
        if not isinstance(schedule, str) or schedule not in SCHEDULES:
            raise UnknownNameError(f"schedule: got {schedule!r}, accepted are {', '.join(SCHEDULES)}")
        return cls(key, secrets.token_bytes(SALT_BYTES), schedule, sbox)

    @classmethod
    def from_header(cls, key: Key, header: LockHeader, *, check: bool, sbox: SBox | None) -> NamedLock:
        """Take up the lock of a header.

        Raises
        ------
        WrongKeyError
            The key is not the one of the lock.
        HeaderError, SBoxError
            It is no header, or its S-Box is not at hand.
        """
        if not isinstance(header, LockHeader):
            raise HeaderError(
                f"header: got {type(header).__name__}, accepted is a LockHeader; see LockHeader.from_json"
            )
        derivation = Derivation(key, header.salt)
        if check:
            if derivation.key_bits != header.key_bits:
                raise WrongKeyError(
                    f"key: got {derivation.key_bits} bits, the tensors were locked with {header.key_bits}"
                )
            if not hmac.compare_digest(derivation.check(), header.check):
                raise WrongKeyError("key: it is not the one that locked these tensors; nothing was changed")
        return cls(key, header.salt, header.schedule, _header_sbox(header, sbox))

    def header(self, sizes: Mapping[str, tuple[int, str | None]]) -> LockHeader:
        """Describe a lock of tensors given as (number of bytes, name of the tensor it shares storage with, or None)."""
        records, start, placed = {}, 0, self._schedule == ExpansionSchedule.name
        for name, (nbytes, same_as) in sizes.items():
            if same_as is None and placed:
                records[name] = TensorRecord(nbytes, start)
                start += nbytes
            else:
                records[name] = TensorRecord(nbytes, None, same_as)
        return LockHeader(
            schedule=self._schedule,
            sbox=sbox_field(self.sbox),
            key_bits=self._derivation.key_bits,
            salt=self.salt,
            check=self._derivation.check(),
            tensors=MappingProxyType(records),
        )

    def stream(self, header: LockHeader, name: str) -> tuple[Schedule, int]:
        """Give the key stream of a tensor: a schedule, and the position where the tensor starts."""
        root = _root(header, name)
        if self._schedule == ExpansionSchedule.name:
            if "" not in self._streams:
                self._streams[""] = ExpansionSchedule(self._key)
            return self._streams[""], header.tensors[root].start or 0
        if root not in self._streams:
            key_iv = self._derivation.tensor_key_iv(self._schedule, _label(header), root)
            self._streams[root] = CounterSchedule(key_iv[:-16], key_iv[-16:])
        return self._streams[root], 0

    def calls(
        self, header: LockHeader, blocks: Mapping[str, Memory], transform: Transform, piece: int
    ) -> list[Call]:
        """Plan the kernel calls that transform tensors in place."""
        if self._schedule == CounterSchedule.name:
            ranges = [(block.address, block.nbytes) for block in blocks.values()]
            names = [_root(header, name) for name in blocks]
            label = _label(header)
            self._list = CounterList(
                ranges,
                lambda i: self._derivation.tensor_key_iv(self._schedule, label, names[i]),
                self._derivation.key_bits,
            )
            return self._list.calls(transform, piece)
        calls: list[Call] = []
        for name, block in blocks.items():
            schedule, start = self.stream(header, name)
            calls += schedule.calls(transform, block.address, block.address, block.nbytes, start, piece)
        return calls

    def __enter__(self) -> NamedLock:
        return self

    def __exit__(self, *_: object) -> None:
        for schedule in self._streams.values():
            schedule.wipe()
        self._streams.clear()
        if self._list is not None:
            self._list.wipe()

    def __repr__(self) -> str:
        return f"NamedLock({self._schedule}, {self._derivation.key_bits} bits)"


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


def _root(header: LockHeader, name: str) -> str:
    """Give the name as which a tensor was locked."""
    return header.tensors[name].same_as or name


def _label(header: LockHeader) -> str:
    """Give what stands for the S-Box where keys are derived."""
    return header.sbox if isinstance(header.sbox, str) else header.sbox["sha256"]


def _header_sbox(header: LockHeader, sbox: SBox | None) -> SBox:
    if sbox is not None and not isinstance(sbox, SBox):
        raise SBoxError(
            f"sbox: got {type(sbox).__name__}, accepted is the SBox that the tensors were locked with, or None"
        )
    if isinstance(header.sbox, str):
        expected = SBOXES[header.sbox]
        if sbox is not None and sbox != expected:
            raise SBoxError(f"sbox: got another S-Box than the header's, {header.sbox!r}; leave it away")
        return expected
    if sbox is None or sbox.sha256 != header.sbox["sha256"]:
        raise SBoxError(
            f"sbox: the tensors were locked with one whose SHA-256 is {header.sbox['sha256']}; give that one"
        )
    return sbox


def _storages(tensors: Mapping[str, Any], chosen: list[str]) -> dict[str, tuple[Memory, str | None]]:
    """Give the memory of the chosen tensors, and for one that has the memory of an earlier one, that one's name."""
    blocks = buffers.named_memory(tensors, chosen)
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


def _run(
    lock: NamedLock,
    header: LockHeader,
    storages: Mapping[str, tuple[Memory, str | None]],
    direction: str,
    threads: int,
) -> None:
    blocks = {name: block for name, (block, same_as) in storages.items() if same_as is None and block.nbytes}
    if not blocks:
        return
    transform = Transform(lock.sbox, direction)
    piece = transform.piece(sum(block.nbytes for block in blocks.values()), threads)
    with lock:
        transform.run(lock.calls(header, blocks, transform, piece), threads, in_place=True)
