"""One way of changing bytes: a tier, an S-Box and a direction, with the kernels for it and how to run and undo them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deeplock_kernels.kernels.signatures import KernelName
from deeplock_kernels.runtime import forms, pool
from deeplock_kernels.runtime.pool import Call
from deeplock_kernels.runtime.tiers import Tier, active_tier, kernel
from deeplock_kernels.sboxes import SBox

IDENTITY = SBox(bytes(range(256)))
_SMALLEST_PIECE = 100  # microseconds of one core's work below which another thread does not pay
_LARGEST_PIECE = 1000  # so that Ctrl-C is answered soon
_PAGE = 4096


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
        self._tier = tier or active_tier()
        self._form, self.box, self._kept = forms.choose(
            sbox if direction == "lock" else sbox.inverse, self._tier.forms
        )
        self._names: dict[int, KernelName] = {}  # by the id of a kernel, which lives as long as the process

    def kernel(self, operation: str, bits: int = 0) -> Callable[..., None]:
        """Give the kernel of an operation, for keys of `bits` bits where it takes one."""
        name = KernelName(operation, bits, self._form, self._direction if bits else "")
        function = kernel(self._tier, name)
        self._names[id(function)] = name
        return function

    def piece(self, nbytes: int, threads: int) -> int:
        """Say how many bytes one call should take out of `nbytes` in all: everything where threads do not pay."""
        pace = self._tier.pace
        if (threads == 1 and nbytes <= _LARGEST_PIECE * pace) or nbytes <= 2 * _SMALLEST_PIECE * pace:
            return max(nbytes, 1)
        wanted = min(max(nbytes // (8 * threads), _SMALLEST_PIECE * pace), _LARGEST_PIECE * pace)
        return -(-wanted // _PAGE) * _PAGE

    def run(self, calls: Sequence[Call], threads: int, *, in_place: bool) -> None:
        """Run planned calls; if that fails half way, take back what was done in place."""
        if len(calls) == 1:
            call = calls[0]
            if call.before is not None:
                call.before()
            call.function(*call.arguments)
            return
        pool.run(calls, threads, self._opposite().undo(self._names) if in_place else None)

    def _opposite(self) -> Transform:
        return Transform(self._sbox, "unlock" if self._direction == "lock" else "lock", self._tier)

    def undo(self, names: dict[int, KernelName]) -> Callable[[Call], Call]:
        """Give the function from a finished in-place call of the opposite transform to the call that reverts it."""

        def revert(call: Call) -> Call:
            name = names[id(call.function)]
            return Call(self.kernel(name.operation, name.bits), (*call.arguments[:-1], self.box))

        return revert
