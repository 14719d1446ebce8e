"""What of this package is measured, each kind as its users call it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.models import Model
from benchmarks.rounds import Prepare, Work
from benchmarks.workspace import Spot
from deeplock_kernels import measure
from deeplock_kernels.kernels.signatures import RECORDS, KernelName
from deeplock_kernels.locking import lock, substitute, unlock
from deeplock_kernels.named_lock import NamedLock
from deeplock_kernels.pieces import Range
from deeplock_kernels.rekeying import rekey
from deeplock_kernels.runtime import forms
from deeplock_kernels.runtime.tiers import Tier, active_tier, kernel, use_tier
from deeplock_kernels.sboxes import AES, SBOXES, SBox
from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule, Schedule
from deeplock_kernels.tensors import lock_tensors, unlock_tensors
from deeplock_kernels.transform import IDENTITY, Transform

_KEY = bytes(range(32))
_IV = bytes(16)


class Operation(NamedTuple):
    """One way to use the package.

    Attributes
    ----------
    name
        What tables and charts call it.
    prepare
        Gives the work for a place and a number of threads.
    memory
        How many times the size of the data it takes at most, the data included.
    in_place
        Whether the result replaces the data.
    """

    name: str
    prepare: Callable[[Spot, int], Work]
    memory: int = 1
    in_place: bool = True

    def at(self, threads: int) -> Prepare:
        """Fix the number of threads."""
        return lambda spot: self.prepare(spot, threads)


@functools.cache
def schedule(kind: str, bits: int = 128) -> Schedule:
    """Give a schedule that stays the same through the run, so that the expansion's states are saved once."""
    key = _KEY[: bits // 8]
    return CounterSchedule(key, _IV) if kind == "counter" else ExpansionSchedule(key)


def _locking(function: Callable[..., object], kind: str, bits: int = 128) -> Callable[[Spot, int], Work]:
    def prepare(spot: Spot, threads: int) -> Work:
        keys, data = schedule(kind, bits), spot.data
        return lambda: function(data, keys, out=data, threads=threads)

    return prepare


def _locking_elsewhere(function: Callable[..., object]) -> Callable[[Spot, int], Work]:
    def prepare(spot: Spot, threads: int) -> Work:
        keys, data, out = schedule("counter"), spot.data, spot.out
        return lambda: function(data, keys, out=out, threads=threads)

    return prepare


def _new_array(spot: Spot, threads: int) -> Work:
    keys, data = schedule("counter"), spot.data
    return lambda: lock(data, keys, threads=threads)


def _first_pass(spot: Spot, threads: int) -> Work:
    data = spot.data
    return lambda: lock(data, ExpansionSchedule(_KEY[:16]), out=data, threads=threads)


def _lock_and_seal(bits: int) -> Callable[[Spot, int], Work]:
    def prepare(spot: Spot, threads: int) -> Work:
        tensors = {"weights": spot.data}
        return lambda: lock_tensors(tensors, _KEY[: bits // 8], threads=threads)

    return prepare


def _verify(spot: Spot, threads: int) -> Work:
    # All but the comparison, which would fail: the limit changes the data between two rounds.
    sealer = NamedLock.from_header(_KEY[:16], lock_tensors({"weights": spot.data}, _KEY[:16]))
    whole = [Range("weights", 0, spot.data.ctypes.data, spot.data.nbytes)]
    return lambda: sealer.seals(whole, threads)


def _rekey(bits: int) -> Callable[[Spot, int], Work]:
    def prepare(spot: Spot, threads: int) -> Work:
        old, new, data = schedule("counter", bits), CounterSchedule(_KEY[-(bits // 8) :], _IV), spot.data
        return lambda: rekey(data, old, new, out=data, threads=threads)

    return prepare


def _substitute(inverse: bool) -> Callable[[Spot, int], Work]:
    def prepare(spot: Spot, threads: int) -> Work:
        data = spot.data
        return lambda: substitute(data, AES, inverse=inverse, out=data, threads=threads)

    return prepare


def _keystream(kind: str) -> Callable[[Spot, int], Work]:
    def prepare(spot: Spot, _threads: int) -> Work:
        keys, nbytes = schedule(kind), len(spot.data)
        return lambda: keys.keystream(nbytes)

    return prepare


LOCK = Operation("lock", _locking(lock, "counter"))
UNLOCK = Operation("unlock", _locking(unlock, "counter"))

OPERATIONS = (
    LOCK,
    UNLOCK,
    Operation("lock and seal", _lock_and_seal(128)),
    Operation("verify", _verify),
    Operation("rekey", _rekey(128)),
    Operation("lock into other memory", _locking_elsewhere(lock), memory=2, in_place=False),
    Operation("unlock into other memory", _locking_elsewhere(unlock), memory=2, in_place=False),
    Operation("lock into a new array", _new_array, memory=2, in_place=False),
    Operation("lock, expansion", _locking(lock, "expansion")),
    Operation("unlock, expansion", _locking(unlock, "expansion")),
    Operation("lock, expansion, first pass", _first_pass),
    Operation("substitute", _substitute(inverse=False)),
    Operation("substitute back", _substitute(inverse=True)),
    Operation("key stream", _keystream("counter"), memory=2, in_place=False),
    Operation("key stream, expansion", _keystream("expansion"), memory=2, in_place=False),
)
"""On one buffer, in place, counter schedule, 128 bits, the S-Box of AES, unless the name says otherwise."""

KEY_LENGTHS = (
    *(
        Operation(f"lock, {kind}, {bits} bits", _locking(lock, kind, bits))
        for kind in ("counter", "expansion")
        for bits in (128, 192, 256)
    ),
    *(Operation(f"lock and seal, {bits} bits", _lock_and_seal(bits)) for bits in (128, 192, 256)),
    *(Operation(f"rekey, {bits} bits", _rekey(bits)) for bits in (128, 192, 256)),
)


# ------------------------------------------------------------------------------
# References


def limit(threads: int) -> Prepare:
    """Give the XOR in place on these threads, by the best tier, whichever one is measured."""

    def prepare(spot: Spot) -> Work:
        with use_tier(None):
            if pieces(len(spot.data), threads) > 1:
                return measure.limits(spot.data, spot.out, threads)[measure.LIMIT]
            xor = kernel(active_tier(), KernelName("xor"))
        record = RECORDS["xor"].pack(spot.data.ctypes.data, len(spot.data), 0x5A)
        return lambda: xor(record)

    return prepare


def copy(threads: int) -> Prepare:
    """Give the copy to other memory on these threads."""

    def prepare(spot: Spot) -> Work:
        with use_tier(None):
            if pieces(len(spot.data), threads) > 1:
                return measure.limits(spot.data, spot.out, threads)[measure.COPY]
        target, source, nbytes = spot.out.ctypes.data, spot.data.ctypes.data, len(spot.data)
        return lambda: ctypes.memmove(target, source, nbytes)

    return prepare


def best_copy(threads: int) -> Prepare:
    """Give the copy to other memory that does not read the target's cache lines first."""

    def prepare(spot: Spot) -> Work:
        with use_tier(None):
            return measure.limits(spot.data, spot.out, threads)[measure.BEST_COPY]

    return prepare


# ------------------------------------------------------------------------------
# Named tensors


def locking_tensors(model: Model, kind: str, threads: int) -> Prepare:
    """Lock a model's tensors by name in place."""

    def prepare(spot: Spot) -> Work:
        tensors = model.place(spot.data)
        return lambda: lock_tensors(tensors, _KEY[:16], schedule=kind, threads=threads)

    return prepare


def unlocking_tensors(model: Model, kind: str, threads: int) -> Prepare:
    """Unlock a model's tensors by name in place; which bytes they hold does not matter to its speed.

    Nor do seals, which are not compared: a second round would find unlocked tensors.
    """

    def prepare(spot: Spot) -> Work:
        tensors = model.place(spot.data)
        header = lock_tensors(tensors, _KEY[:16], schedule=kind, threads=threads)
        return lambda: unlock_tensors(tensors, _KEY[:16], header, seal=False, threads=threads)

    return prepare


# ------------------------------------------------------------------------------
# S-Boxes


def box_of_form(tier: Tier, form: str) -> tuple[str, SBox]:
    """Find a box that a tier applies in a form, and what to call it."""
    candidates = {
        "identity": IDENTITY,
        "aes": AES,
        "inverse of aes": AES.inverse,
        "sm4": SBOXES["sm4"],
        "kuznyechik": SBOXES["kuznyechik"],
    }
    for name, box in candidates.items():
        if forms.choose(box, tier.forms)[0] == form:
            return name, box
    raise AssertionError(f"form: no box is known that tier {tier.name} applies in form {form!r}")


def locking_with_box(box: SBox, direction: str, threads: int) -> Prepare:
    """Lock with S = box, or unlock with S^-1 = box, so that the kernel applies this very box."""
    keys = schedule("counter")

    def prepare(spot: Spot) -> Work:
        data = spot.data
        if direction == "lock":
            return lambda: lock(data, keys, sbox=box, out=data, threads=threads)
        return lambda: unlock(data, keys, sbox=box.inverse, out=data, threads=threads)

    return prepare


# ------------------------------------------------------------------------------
# The pool


def locking_in_pieces(threads: int) -> Prepare:
    """Lock by one piece for each thread, however short the data, as the pool could below its threshold."""
    keys = schedule("counter")

    def prepare(spot: Spot) -> Work:
        address, nbytes = spot.data.ctypes.data, len(spot.data)
        piece = -(-nbytes // (threads * 4096)) * 4096

        def split() -> None:
            transform = Transform(AES, "lock")
            transform.run(keys.calls(transform, address, address, nbytes, 0, piece), threads, in_place=True)

        return split

    return prepare


def pieces(nbytes: int, threads: int) -> int:
    """Say in how many pieces the package cuts a buffer."""
    return -(-nbytes // Transform(AES, "lock").piece(nbytes, threads))
