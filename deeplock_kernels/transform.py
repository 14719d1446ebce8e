"""One way of changing bytes: a tier, an S-Box and a direction, with the kernels for it and how to run and undo them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from struct import Struct

from deeplock_kernels.kernels.signatures import RECORDS, KernelName
from deeplock_kernels.runtime import forms, pool
from deeplock_kernels.runtime.pool import Call
from deeplock_kernels.runtime.tiers import Kernel, Tier, active_tier, kernel
from deeplock_kernels.sboxes import SBox

IDENTITY = SBox(bytes(range(256)))
_SMALLEST_JOB = 500  # microseconds of one core's work up to which the pool's threads take longer to wake than they save
_SMALLEST_PIECE = 100  # microseconds of one core's work that a call takes at least
_LARGEST_PIECE = 1000  # so that Ctrl-C is answered soon
_PAGE = 4096
_BOX = Struct("q")


def piece_bytes(tier: Tier, nbytes: int, threads: int) -> int:
    """Say how many bytes one call should take out of `nbytes` in all: everything where threads do not pay."""
    pace = tier.pace
    if (threads == 1 and nbytes <= _LARGEST_PIECE * pace) or nbytes <= _SMALLEST_JOB * pace:
        return max(nbytes, 1)
    wanted = min(max(nbytes // (8 * threads), _SMALLEST_PIECE * pace), _LARGEST_PIECE * pace)
    return -(-wanted // _PAGE) * _PAGE


class Transform:
    """The kernels of a tier for an S-Box and a direction.

    Parameters
    ----------
    sbox
        The S-Box S, whatever the direction.
    direction
        "lock": S[x XOR k], or "unlock": S^-1[x] XOR k. A bare substitution is S or S^-1.
    tier
        The tier, by default the one in use.
    """

    def __init__(self, sbox: SBox, direction: str, tier: Tier | None = None) -> None:
        self._sbox, self._direction = sbox, direction
        self.tier = tier or active_tier()
        self._form, self.box, self._kept = forms.choose(
            sbox if direction == "lock" else sbox.inverse, self.tier.forms
        )
        self.small = _SMALLEST_JOB * self.tier.pace
        self._kernels: dict[tuple[str, int], Kernel] = {}
        self._undoable = 0

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, sbox: SBox, direction: str, tier: Tier) -> Transform:
        """Give the transform of these, made once."""
        return cls(sbox, direction, tier)

    def kernel(self, operation: str, bits: int = 0) -> Kernel:
        """Give the kernel of an operation, for keys of `bits` bits where it takes one."""
        function = self._kernels.get((operation, bits))
        if function is None:
            name = KernelName(operation, bits, self._form, self._direction if bits else "")
            function = self._kernels[operation, bits] = kernel(self.tier, name)
        return function

    def call(
        self, operation: str, bits: int, *arguments: int, before: Callable[[], None] | None = None
    ) -> Call:
        """Plan a call of an operation's kernel; the parameters of the S-Box come behind the other arguments."""
        record = RECORDS[operation].pack(*arguments, self.box)
        return Call(self.kernel(operation, bits), (record,), before)

    def piece(self, nbytes: int, threads: int) -> int:
        """Say how many bytes one call should take; see `piece_bytes`."""
        return piece_bytes(self.tier, nbytes, threads)

    def run(self, calls: Sequence[Call], threads: int, *, in_place: bool) -> None:
        """Run planned calls; if that fails half way, take back what was done in place."""
        if in_place:
            self.prepare_undo()
        pool.run(calls, threads, self.revert if in_place else None)

    def take_back(self, calls: Sequence[Call]) -> None:
        """Undo planned calls that were all run in place, whatever exceptions come meanwhile."""
        pool.take_back(calls, self.revert)

    def prepare_undo(self) -> None:
        """Have the kernels that undo at hand before anything is done."""
        if self._undoable != len(self._kernels):
            opposite = self._opposite()
            for operation, bits in tuple(self._kernels):
                opposite.kernel(operation, bits)
            self._undoable = len(self._kernels)

    def revert(self, finished: Call) -> Call:
        """Give the call that takes back a finished one."""
        opposite = self._opposite()
        what = next(key for key, function in self._kernels.items() if function is finished.function)
        return Call(opposite.kernel(*what), (finished.arguments[0][:-8] + _BOX.pack(opposite.box),))

    def _opposite(self) -> Transform:
        return Transform.of(self._sbox, "unlock" if self._direction == "lock" else "lock", self.tier)
