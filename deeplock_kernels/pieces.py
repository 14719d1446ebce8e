"""Pieces of many named tensors, and their keys, for the kernels that work through lists of records."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from deeplock_kernels.kernels.signatures import (
    RECORD_BYTES,
    RECORDS,
    SEAL_KEYS_BYTES,
    SEALED_RECORD_BYTES,
    TAG_BYTES,
    KernelName,
)
from deeplock_kernels.runtime.pool import Call
from deeplock_kernels.runtime.tiers import Tier, kernel
from deeplock_kernels.schedules.base import RCON_ADDRESS

BLOCK = 16  # bytes, by which the pieces of a sealed tensor are cut


class Range(NamedTuple):
    """Some bytes of a tensor.

    Attributes
    ----------
    name
        Of the tensor.
    target, source
        The addresses to write at and to read from: the same or separate.
    nbytes
        How many there are.
    offset
        Where in the tensor they begin; a multiple of 16 where they are sealed.
    """

    name: str
    target: int
    source: int
    nbytes: int
    offset: int = 0


class KeyTable:
    """Something secret for each of many names, in one block of memory, derived on the thread that first needs it.

    Parameters
    ----------
    names
        Whose.
    nbytes
        How long each is.
    derive
        Gives it, or what `complete` makes it of, by name.
    complete
        Makes it at an address where `derive` has left the first bytes, and which is not its place.
    """

    def __init__(
        self,
        names: Iterable[str],
        nbytes: int,
        derive: Callable[[str], bytes],
        complete: Callable[[int], object] | None = None,
    ) -> None:
        self._places = {name: i * nbytes for i, name in enumerate(names)}
        self._memory = bytearray(nbytes * max(len(self._places), 1))
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._nbytes, self._derive, self._complete = nbytes, derive, complete
        self._derived: set[str] = set()

    def address(self, name: str) -> int:
        """Say where it lies; it is there after `need`."""
        return self._start + self._places[name]

    def need(self, names: Iterable[str]) -> None:
        """Derive what is needed now."""
        for name in names:
            if name not in self._derived:
                # Two threads may do this at once, and a kernel use the result already: it is put there whole.
                made = ctypes.create_string_buffer(self._derive(name), self._nbytes)
                if self._complete is not None:
                    self._complete(ctypes.addressof(made))
                place = self._places[name]
                self._memory[place : place + self._nbytes] = made.raw
                self._derived.add(name)
                ctypes.memset(made, 0, self._nbytes)

    def wipe(self) -> None:
        """Fill it with zeros."""
        self._memory[:] = bytes(len(self._memory))
        self._derived.clear()


def seal_key_table(names: Iterable[str], derive: Callable[[str], bytes], tier: Tier) -> KeyTable:
    """Make the table of what a tier's kernels seal with, given the seal key of each tensor."""
    # A key of 32 bytes is made to what is longer, in its own place.
    make, pack = kernel(tier, KernelName("seal_keys")), RECORDS["seal_keys"].pack
    return KeyTable(names, SEAL_KEYS_BYTES, derive, lambda place: make(pack(place, place, 1, RCON_ADDRESS)))


class Tags:
    """A tag for each piece of some tensors; the seal of a tensor is the XOR of its pieces' tags."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._memory = bytearray(TAG_BYTES * max(len(names), 1))
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def seals(self) -> dict[str, int]:
        """Give, when all pieces are done, the seal of each tensor as a big-endian number."""
        found: dict[str, int] = {}
        for i, name in enumerate(self._names):
            tag = int.from_bytes(self._memory[TAG_BYTES * i : TAG_BYTES * (i + 1)], "big")
            found[name] = found.get(name, 0) ^ tag
        return found


def deal(ranges: Sequence[Range], piece: int) -> list[list[Range]]:
    """Cut ranges and deal them out to calls of about `piece` bytes each.

    Large ones come first, so that small ones fill up what is left at the end. The list of many small ones, whose keys
    take long to derive, is the second call: one thread can be busy with it while another works on large ones.
    """
    groups: list[list[Range]] = []
    group: list[Range] = []
    size = 0
    for one in sorted(ranges, key=lambda one: -one.nbytes):
        name, target, source, nbytes, offset = one
        for start in range(0, nbytes or 1, piece):
            if nbytes <= piece:
                group.append(one)
                size += nbytes
            else:
                length = min(piece, nbytes - start)
                group.append(Range(name, target + start, source + start, length, offset + start))
                size += length
            if size >= piece:
                groups.append(group)
                group, size = [], 0
    if group:
        groups.append(group)
    return groups[:1] + groups[:0:-1]


class Listing(NamedTuple):
    """Planned calls of a kernel that takes records.

    Attributes
    ----------
    calls
        What is to be run.
    tags
        What sealed records leave their tags in.
    records
        The memory that the calls read; it has to be held until they are over.
    """

    calls: list[Call]
    tags: Tags
    records: array[int]


def list_calls(
    groups: Sequence[Sequence[Range]],
    plan: Callable[..., Call],
    root: Callable[[str], str],
    keys: KeyTable | None = None,
    seal_keys: KeyTable | None = None,
    total: Callable[[str], int] = len,
) -> Listing:
    """Plan a call for each group.

    Parameters
    ----------
    groups
        As `deal` gives them.
    plan
        Gives the call for the address and the number of its records: `plan(address, count, before=...)`.
    root
        Gives the name as which a tensor is locked.
    keys
        A table of tensor keys, if the kernel takes them.
    seal_keys, total
        For sealed records: a table of seal keys, and what gives the number of bytes of a whole tensor by name.
    """
    sealed = seal_keys is not None
    tags = Tags([one.name for group in groups for one in group] if sealed else ())
    records: list[int] = []
    tag = tags.start
    for group in groups:
        for name, target, source, nbytes, offset in group:
            own = root(name)
            records += (target, source, nbytes, offset, keys.address(own) if keys is not None else 0)
            if seal_keys is not None:
                records += (seal_keys.address(own), total(own), tag)
                tag += TAG_BYTES
    memory = array("q", records)
    place, width = memory.buffer_info()[0], SEALED_RECORD_BYTES if sealed else RECORD_BYTES
    tables = [table for table in (keys, seal_keys) if table is not None]
    calls = []
    for group in groups:
        before = partial(_derive, tables, [root(one.name) for one in group])
        calls.append(plan(place, len(group), before=before))
        place += width * len(group)
    if len(calls) == 1 and calls[0].before is not None:  # nothing to derive beside
        calls[0].before()
        calls = [calls[0]._replace(before=None)]
    return Listing(calls, tags, memory)


def _derive(tables: Sequence[KeyTable], names: Sequence[str]) -> None:
    for table in tables:
        table.need(names)
