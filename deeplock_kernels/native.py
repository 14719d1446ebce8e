"""The kernels as C functions: names, signatures and addresses, for C and whatever can call C.

`include/deeplock.h` declares their arguments and says what they expect; `include_directory()` is where it lies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deeplock_kernels.errors import KernelError, UnknownNameError, shown
from deeplock_kernels.kernels.signatures import INVERSE_FORMS, KernelName
from deeplock_kernels.keys import KEY_BITS
from deeplock_kernels.locking import find_sbox
from deeplock_kernels.runtime import forms, tiers
from deeplock_kernels.runtime.tiers import Tier, active_tier
from deeplock_kernels.sboxes import AES, SBox
from deeplock_kernels.schedules.base import RCON_ADDRESS


class _Function(ctypes.Structure):
    """`deeplock_function` of the header."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("rcon", ctypes.c_int64),
        ("box", ctypes.c_int64),
        ("inverse_box", ctypes.c_int64),
    )


@dataclass(frozen=True)
class NativeFunction:
    """A kernel for callers that are not Python.

    Attributes
    ----------
    name
        Such as "lock_256".
    signature
        Its declaration in C, with the argument's type as `deeplock.h` has it.
    address
        Of its code.
    pointer
        Of a `deeplock_function` of the header, which holds that address and those of the tables that it reads.
    tier
        The name of the tier that it belongs to.

    All of it stays where it is until the process ends, whichever tier is in use later. In another process it is void.
    """

    name: str
    signature: str
    address: int
    pointer: int
    tier: str


class _Kind(NamedTuple):
    operation: str
    direction: str = "lock"
    bits: int = 0


_KINDS = {
    **{
        f"{direction}_{bits}": _Kind("counter", direction, bits)
        for direction in ("lock", "unlock")
        for bits in KEY_BITS
    },
    **{
        f"{direction}_{what}_{bits}": _Kind(f"counter_{what}", direction, bits)
        for what in ("list", "sealed")
        for direction in ("lock", "unlock")
        for bits in KEY_BITS
    },
    **{f"rekey_{bits}": _Kind("rekey", bits=bits) for bits in KEY_BITS},
    "seal": _Kind("seal"),
    "seal_keys": _Kind("seal_keys"),
    "substitute": _Kind("substitute"),
    "substitute_inverse": _Kind("substitute", "unlock"),
}
_made: dict[tuple[Tier, SBox, str], tuple[NativeFunction, object]] = {}  # for good: C has their addresses


class NativeFunctions(Mapping[str, NativeFunction]):
    """The functions of a tier for an S-Box, by name; each is compiled or loaded, and tested, when it is asked for."""

    def __init__(self, sbox: SBox, tier: Tier) -> None:
        self._sbox, self._tier = sbox, tier

    def __getitem__(self, name: str) -> NativeFunction:
        if not isinstance(name, str) or name not in _KINDS:
            raise UnknownNameError(f"name: got {shown(name)}, accepted are {', '.join(_KINDS)}")
        made = _made.get((self._tier, self._sbox, name))
        if made is None:
            made = _made.setdefault((self._tier, self._sbox, name), _make(self._tier, self._sbox, name))
        return made[0]

    def __iter__(self) -> Iterator[str]:
        return iter(_KINDS)

    def __len__(self) -> int:
        return len(_KINDS)

    def __repr__(self) -> str:
        return f"NativeFunctions({self._tier.name}: {', '.join(_KINDS)})"


def native_functions(sbox: SBox | str = AES) -> NativeFunctions:
    """Give the active tier's kernels as C functions, by name.

    Parameters
    ----------
    sbox
        The S-Box that they apply, or its name.

    Returns
    -------
    mapping from str to NativeFunction
        "lock_256" and "unlock_256" lock and unlock with the counter schedule and a key of 256 bits, "lock_list_256"
        many ranges, "lock_sealed_256" makes their seals too, "rekey_256" moves to another key; the same for 128 and 192
        bits; and "substitute", "substitute_inverse", "seal", "seal_keys". None of them checks its arguments.

    Raises
    ------
    UnknownNameError
        There is no such S-Box, or, of the mapping, no such function.
    KernelError, SelfTestError
        Of the mapping: the kernel cannot be compiled here, or gave a wrong answer.
    """
    return NativeFunctions(find_sbox(sbox), active_tier())


def include_directory() -> str:
    """Give the directory of `deeplock.h`, for the compiler's `-I`."""
    return str(Path(__file__).resolve().parent / "include")


def address_of(kernel: Any, argument: str) -> int:
    """Give the address of a kernel's code.

    Raises
    ------
    KernelError
        It is plain Python, because Numba is told not to compile.
    """
    try:
        return ctypes.cast(kernel, ctypes.c_void_p).value or 0
    except ctypes.ArgumentError:
        message = f"{argument}: it is not compiled, as NUMBA_DISABLE_JIT asks for, so it has no address"
        raise KernelError(message) from None


def _make(tier: Tier, sbox: SBox, name: str) -> tuple[NativeFunction, object]:
    operation, direction, bits = _KINDS[name]
    applied = sbox if direction == "lock" else sbox.inverse
    form, box, kept = forms.choose(applied, tier.forms)
    _, inverse_box, kept_inverse = forms.choose(applied.inverse, (INVERSE_FORMS.get(form, form),))
    if operation in ("seal", "seal_keys"):
        which = KernelName(operation)
    else:
        which = KernelName(operation, bits, form, direction if operation.startswith("counter") else "")
    kernel = tiers.kernel(tier, which)
    address = address_of(kernel, name)
    place = _Function(address, RCON_ADDRESS, box, inverse_box)
    signature = f"void {name}(const deeplock_{operation} *arguments)"
    function = NativeFunction(name, signature, address, ctypes.addressof(place), tier.name)
    return function, (kernel, place, kept, kept_inverse)
