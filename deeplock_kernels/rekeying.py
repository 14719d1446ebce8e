"""Move locked bytes from one key to another in one pass: c2[i] = S[S^-1[c1[i]] XOR k1[i] XOR k2[i]].

The plain bytes are in registers alone. Where both key streams are of the counter schedule with keys of one length, a
kernel makes both as it goes; for all other pairs the streams, XORed, lie in a piece of memory of the thread's own.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from deeplock_kernels import buffers
from deeplock_kernels.errors import BufferTypeError
from deeplock_kernels.header import LockHeader
from deeplock_kernels.kernels.signatures import (
    INVERSE_FORMS,
    RECORDS,
    SEAL_KEYS_BYTES,
    TAG_BYTES,
    KernelName,
)
from deeplock_kernels.locking import find_sbox
from deeplock_kernels.named_lock import Key, NamedLock, Seals
from deeplock_kernels.pieces import Range, deal, list_calls, tags_of
from deeplock_kernels.runtime import forms, pool
from deeplock_kernels.runtime.pool import Call, resolve_threads
from deeplock_kernels.runtime.tiers import Tier, active_tier, kernel
from deeplock_kernels.sboxes import AES, SBox
from deeplock_kernels.schedules import SCHEDULES, CounterSchedule, Schedule
from deeplock_kernels.schedules.base import RCON_ADDRESS, check_range
from deeplock_kernels.tensors import ranges_of, sealed_ranges, take_up
from deeplock_kernels.transform import IDENTITY, Transform, piece_bytes

_MASK_BYTES = 256 << 10  # of both key streams at a time: they stay in the cache
_Result = TypeVar("_Result")


def rekey(
    data: Any,
    old: Schedule,
    new: Schedule,
    *,
    sbox: SBox | str = AES,
    offset: int = 0,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """Move locked bytes to another key: the result is that of `lock` with `new` on what was locked with `old`.

    Parameters
    ----------
    data
        The locked bytes, as for `lock`.
    old, new
        The schedule that locked them, and the one that is to unlock them: of any kinds and lengths of key.
    sbox, offset, out, threads
        As for `lock`; both key streams are taken from `offset` on.

    Returns
    -------
    `out`, or the new array or tensor.

    Raises
    ------
    BufferTypeError, BufferLayoutError, ReadOnlyError, SizeMismatchError, OverlapError
        `data`, `out` or a schedule is no such thing; nothing was changed.
    ParameterError, UnknownNameError, KeyWipedError
        Another argument is wrong.
    """
    source = buffers.memory(data)
    for argument, schedule in (("old", old), ("new", new)):
        if not isinstance(schedule, Schedule):
            accepted = ", ".join(kind.__name__ for kind in SCHEDULES.values())
            raise BufferTypeError(f"{argument}: got {type(schedule).__name__}, accepted is a schedule ({accepted})")
    box = find_sbox(sbox)
    offset = check_range(offset, source.nbytes)
    count = resolve_threads(threads)
    old.ready()
    new.ready()
    result = buffers.new_like(data) if out is None else out
    target = buffers.output_memory(result, source)
    if source.nbytes == 0:
        return result
    tier = active_tier()
    whole = Range("", target.address, source.address, source.nbytes, offset)
    if isinstance(old, CounterSchedule) and isinstance(new, CounterSchedule) and old.bits == new.bits:
        # Nobody asked for a seal: it costs nothing beside two key streams.
        keys = ctypes.create_string_buffer(SEAL_KEYS_BYTES + TAG_BYTES)
        fields = (old.address, ctypes.addressof(keys), 0, ctypes.addressof(keys) + SEAL_KEYS_BYTES, new.address)
        plan = _fused([whole], box, tier, old.bits, count, lambda _name: fields, lambda _names: None)
    else:
        plan = _masked([whole], box, tier, lambda _name: ((old, 0), (new, 0)))
    buffers.note_written(result)
    try:
        pool.run(plan.calls, count, plan.undo if target.address == source.address else None)
    finally:
        plan.wipe()
    return result


def rekey_tensors(
    tensors: Mapping[str, Any],
    old_key: Key,
    new_key: Key,
    header: LockHeader,
    *,
    schedule: str | None = None,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> LockHeader:
    """Lock locked tensors anew under another key, in place, without unlocking them.

    The old seals are compared before the first byte changes. The new lock has a salt of its own and new seals. Whatever
    goes wrong, all tensors are as they were.

    Parameters
    ----------
    tensors, header, sbox, threads
        As for `unlock_tensors`.
    old_key
        The master key that locked them.
    new_key
        The master key that is to unlock them, of any length; the same one is accepted too, for a new salt.
    schedule
        The new lock's key schedule; by default that of the old one.
    seal
        Whether to make new seals.

    Returns
    -------
    LockHeader
        The new header; the old one is of no use any more.

    Raises
    ------
    WrongKeyError
        `old_key` is another one.
    TamperedHeaderError, TamperedError
        The header, or the tensor that the message names, is not as it was locked.
    TensorNameError, SizeMismatchError, BufferTypeError, BufferLayoutError, ReadOnlyError, OverlapError
        As for `unlock_tensors`.
    KeyTypeError, KeyFormatError, HeaderError, SBoxError, UnknownNameError, ParameterError
        Another argument is wrong.
    """
    old, storages, count = take_up(tensors, old_key, header, sbox=sbox, threads=threads)
    new = NamedLock.new(new_key, header.schedule if schedule is None else schedule, old.box)
    new.cover({name: (block.nbytes, same_as) for name, (block, same_as) in storages.items()})
    ranges, proved = ranges_of(storages, empty=seal), None
    try:
        with old, new:
            old.expect(old.seals(sealed_ranges(old, storages), count))
            buffers.note_written(*(tensors[name] for name in header.tensors))
            proved = rekey_ranges(
                old, new, ranges, count, seal=seal, then=lambda seals: new.prove(seals if seal else None)
            )
    except BaseException:
        if proved is not None:  # interrupted while the keys were wiped: nobody else will ever have this header
            with (
                NamedLock.from_header(old_key, header, check=False, sbox=old.box) as before,
                NamedLock.from_header(new_key, proved, check=False, sbox=old.box) as after,
            ):
                rekey_ranges(after, before, ranges, count, seal=False, then=lambda _seals: None)
        raise
    return proved


def rekey_ranges(
    old: NamedLock,
    new: NamedLock,
    ranges: Sequence[Range],
    threads: int,
    *,
    seal: bool,
    then: Callable[[Seals], _Result],
) -> _Result:
    """Move ranges from one lock to another and seal what becomes of them; otherwise as `NamedLock.lock`."""
    fused = old.schedule == new.schedule == CounterSchedule.name and old.key_bits == new.key_bits
    in_place = all(one.target == one.source for one in ranges)
    if fused:
        old_keys, new_keys, seal_keys = old.keys(), new.keys(), new.seal_keys()
        tags = tags_of(deal(ranges, piece_bytes(new.tier, sum(one.nbytes for one in ranges), threads)))

        def fields(name: str) -> tuple[int, ...]:
            sealing = new.seal_fields(name, seal_keys, tags)
            return old_keys.address(old.root(name)), *sealing, new_keys.address(new.root(name))

        def derive(names: list[str]) -> None:
            old.deriving(old_keys)(names)
            new.deriving(new_keys, seal_keys)(names)

        plan = _fused(ranges, new.box, new.tier, new.key_bits, threads, fields, derive)
    else:
        plan = _masked(ranges, new.box, new.tier, lambda name: (old.stream(name), new.stream(name)))
    try:
        pool.run(plan.calls, threads, plan.undo if in_place else None)
        try:
            if fused:
                return then(tags.seals())
            written = [one._replace(source=one.target) for one in ranges]
            return then(new.seals(written, threads) if seal else {})
        except BaseException:
            if in_place:
                pool.take_back(plan.calls, plan.undo)
            raise
    finally:
        plan.wipe()


def _again(finished: Call) -> Call:
    """Give the way back: from the new key to the old one is the same XOR."""
    return finished


class _Plan(NamedTuple):
    """Planned calls, what gives the call that takes back a finished one, and the memory that they need meanwhile."""

    calls: list[Call]
    undo: pool.Undo
    masks: list[ctypes.Array[ctypes.c_char]]
    held: object

    def wipe(self) -> None:
        """Fill what held key streams with zeros."""
        for mask in self.masks:
            ctypes.memset(mask, 0, len(mask))


def _boxes(sbox: SBox, tier: Tier) -> tuple[str, int, int, object]:
    """Give the form of an S-Box, the addresses of its parameters and of its inverse's, and what keeps them."""
    form, box, kept = forms.choose(sbox, tier.forms)
    inverse_form = INVERSE_FORMS.get(form, form)
    _, inverse, kept_inverse = forms.choose(sbox.inverse, (inverse_form,))
    return form, box, inverse, (kept, kept_inverse)


def _fused(
    ranges: Sequence[Range],
    sbox: SBox,
    tier: Tier,
    bits: int,
    threads: int,
    fields: Callable[[str], tuple[int, ...]],
    derive: Callable[[list[str]], None],
) -> _Plan:
    """Plan calls of the kernel that makes both key streams."""
    form, box, inverse, kept = _boxes(sbox, tier)
    function, pack = kernel(tier, KernelName("rekey", bits, form)), RECORDS["rekey"].pack
    if not ranges:
        return _Plan([], _again, [], ())

    def plan(address: int, count: int, before: Callable[[], None] | None) -> Call:
        return Call(function, (pack(address, count, RCON_ADDRESS, box, inverse),), before)

    groups = deal(ranges, piece_bytes(tier, sum(one.nbytes for one in ranges), threads))
    listing = list_calls(groups, plan, fields, derive)
    return _Plan(listing.calls, _again, [], (kept, listing))


def _masked(
    ranges: Sequence[Range],
    sbox: SBox,
    tier: Tier,
    streams: Callable[[str], tuple[tuple[Schedule, int], tuple[Schedule, int]]],
) -> _Plan:
    """Plan calls of the kernel that takes both key streams from memory, XORed: it is its own way back."""
    form, box, inverse, kept = _boxes(sbox, tier)
    function = kernel(tier, KernelName("rekey_masked", form=form))
    bare = Transform.of(IDENTITY, "lock", tier)
    pieces = [one for group in deal(ranges, _MASK_BYTES) for one in group if one.nbytes]
    records = array("q", [0]) * (4 * len(pieces))
    masks: list[ctypes.Array[ctypes.c_char]] = []
    own = threading.local()
    start, width = records.buffer_info()[0], 4 * records.itemsize

    def fill(number: int) -> None:
        """Make the mask of a piece in this thread's memory, and enter it in the record."""
        if not hasattr(own, "mask"):
            own.mask = ctypes.create_string_buffer(_MASK_BYTES)
            masks.append(own.mask)
        mask, one = ctypes.addressof(own.mask), pieces[number]
        ctypes.memset(mask, 0, one.nbytes)
        for schedule, position in streams(one.name):
            for call in schedule.calls(bare, mask, mask, one.nbytes, position + one.offset, one.nbytes):
                if call.before is not None:
                    call.before()
                call.function(*call.arguments)
        records[4 * number : 4 * number + 4] = array("q", (one.target, one.source, one.nbytes, mask))

    def plan(number: int) -> Call:
        record = RECORDS["rekey_masked"].pack(start + width * number, 1, box, inverse)
        return Call(function, (record,), lambda: fill(number))

    def undo(finished: Call) -> Call:
        number = (RECORDS["rekey_masked"].unpack(finished.arguments[0])[0] - start) // width
        fill(number)
        return finished

    return _Plan([plan(number) for number in range(len(pieces))], undo, masks, (kept, records))
