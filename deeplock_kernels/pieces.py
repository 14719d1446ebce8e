"""Pieces of many named tensors, and their keys, for the kernels that work through lists of records."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from deeplock_kernels.kernels.signatures import RECORDS, SEAL_KEYS_BYTES, TAG_BYTES, KernelName
from deeplock_kernels.keys import Hidden
from deeplock_kernels.runtime.pool import Call
from deeplock_kernels.runtime.tiers import Tier, kernel
from deeplock_kernels.schedules.base import RCON_ADDRESS

BLOCK = 16  # bytes, by which the pieces of a sealed tensor are cut
_AT_ONCE = 64  # keys of a table that are made before they are put in place


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
        Makes them of what `derive` gave for some names: `complete(target, source, count)`, with the addresses of
        memory that is not their place.
    """

    def __init__(
        self,
        names: Iterable[str],
        nbytes: int,
        derive: Callable[[str], bytes],
        complete: Callable[[int, int, int], object] | None = None,
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
        missing = [name for name in dict.fromkeys(names) if name not in self._derived]
        for i in range(0, len(missing), _AT_ONCE):
            some = missing[i : i + _AT_ONCE]
            made = self._made(some)
            for at, name in enumerate(some):
                place = self._places[name]
                # Two threads may do this at once, and a kernel use the result already: it is put there whole.
                self._memory[place : place + self._nbytes] = made[at * self._nbytes : (at + 1) * self._nbytes]
            self._derived.update(some)

    def _made(self, names: list[str]) -> bytes:
        derived = Hidden(b"".join(map(self._derive, names)))
        if self._complete is None:
            return derived
        source = ctypes.create_string_buffer(derived, len(derived))
        made = ctypes.create_string_buffer(self._nbytes * len(names))
        self._complete(ctypes.addressof(made), ctypes.addressof(source), len(names))
        whole = Hidden(made.raw)
        ctypes.memset(made, 0, len(made))
        ctypes.memset(source, 0, len(source))
        return whole

    def wipe(self) -> None:
        """Fill it with zeros."""
        self._memory[:] = bytes(len(self._memory))
        self._derived.clear()


def seal_key_table(names: Iterable[str], derive: Callable[[str], bytes], tier: Tier) -> KeyTable:
    """Make the table of what a tier's kernels seal with, given the seal key of each tensor."""
    make, pack = kernel(tier, KernelName("seal_keys")), RECORDS["seal_keys"].pack
    return KeyTable(names, SEAL_KEYS_BYTES, derive, lambda *places: make(pack(*places, RCON_ADDRESS)))


class Tags:
    """A tag for each piece of some tensors; the seal of a tensor is the XOR of its pieces' tags."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._memory = bytearray(TAG_BYTES * max(len(names), 1))
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.places = iter(range(start, start + TAG_BYTES * len(names), TAG_BYTES))

    def seals(self) -> dict[str, int]:
        """Give, when all pieces are done, the seal of each tensor as a big-endian number."""
        found: dict[str, int] = {}
        for i, name in enumerate(self._names):
            tag = int.from_bytes(self._memory[TAG_BYTES * i : TAG_BYTES * (i + 1)], "big")
            found[name] = found.get(name, 0) ^ tag
        return found


Groups = list[list[Range]]


def deal(ranges: Sequence[Range], piece: int) -> Groups:
    """Cut ranges and deal them out to calls of about `piece` bytes each.

    Large ones come first, so that small ones fill up what is left at the end. The list of many small ones, whose keys
    take long to derive, is the second call: one thread can be busy with it while another works on large ones.
    """
    groups: Groups = []
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


def tags_of(groups: Groups) -> Tags:
    """Make room for the tags of all pieces."""
    return Tags([one.name for group in groups for one in group])


class Listing(NamedTuple):
    """Planned calls of a kernel that takes records.

    Attributes
    ----------
    calls
        What is to be run.
    records
        The memory that the calls read; it has to be held until they are over.
    width
        How many integers a record has.
    """

    calls: list[Call]
    records: array[int]
    width: int


def list_calls(
    groups: Groups,
    plan: Callable[..., Call],
    fields: Callable[[str], tuple[int, ...]],
    derive: Callable[[list[str]], None],
) -> Listing:
    """Plan a call for each group.

    Parameters
    ----------
    groups
        As `deal` gives them.
    plan
        Gives the call for the address and the number of its records: `plan(address, count, before=...)`.
    fields
        Gives what a record of a tensor has behind target, source, nbytes and offset; called in order.
    derive
        Makes the keys of tensors of these names, before they are needed.
    """
    records: list[int] = []
    count = 0
    for group in groups:
        count += len(group)
        for name, target, source, nbytes, offset in group:
            records += (target, source, nbytes, offset, *fields(name))
    memory, width = array("q", records), len(records) // count
    place, calls = memory.buffer_info()[0], []
    for group in groups:
        before = partial(derive, [one.name for one in group])
        calls.append(plan(place, len(group), before=before))
        place += memory.itemsize * width * len(group)
    if len(calls) == 1 and calls[0].before is not None:  # nothing to derive beside
        calls[0].before()
        calls = [calls[0]._replace(before=None)]
    return Listing(calls, memory, width)
