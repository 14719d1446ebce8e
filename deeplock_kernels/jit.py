"""Lock and unlock inside functions that you compile with Numba, with or without the GIL.

    from deeplock_kernels import jit

    @numba.njit(nogil=True)
    def work(weights, key, iv):
        jit.unlock(weights, key, iv)
        ...

The kernels are those of the tier that was in use when your function was compiled, and their addresses are constants of
its code. So Numba does not write such a function to its cache on disk (`cache=True` gives a NumbaWarning that says so):
in another process the addresses would be wrong. In a fork they are right.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numba.core import types as numba_types
from numba.core.errors import TypingError
from numba.extending import overload, register_jitable

from deeplock_kernels import locking
from deeplock_kernels.errors import KeyFormatError, ParameterError
from deeplock_kernels.keys import KEY_BITS
from deeplock_kernels.locking import find_sbox
from deeplock_kernels.native import address_of
from deeplock_kernels.runtime.tiers import active_tier
from deeplock_kernels.sboxes import AES, SBox
from deeplock_kernels.schedules import CounterSchedule
from deeplock_kernels.schedules.base import RCON_ADDRESS
from deeplock_kernels.transform import Transform

__all__ = ["Functions", "functions", "lock", "unlock"]

types: Any = numba_types
_Kernel = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t)  # of a type that Numba calls: it then knows of the address
_LAST = 2**63 - 1
_kept: list[Transform] = []


class Functions(NamedTuple):
    """Lock and unlock for one S-Box.

    Both are called as `lock(array, key, iv)` or `lock(array, key, iv, offset)`, in compiled functions and in Python,
    and change the array in place, on the calling thread alone.

    `array` is any C-contiguous array of numbers that may be written, `key` a contiguous uint8 array of 16, 24 or 32
    elements, `iv` one of 16, and `offset` the position of the first byte in the key stream, at least 0, the end being
    before 2^63. Another type is refused when the function is compiled (TypingError), another length or offset when it
    runs, before a byte changes (KeyFormatError, ParameterError). Key and iv are copied together for the kernel, and
    the copy is wiped. A wrong key is not noticed: it gives nonsense.
    """

    lock: Any
    unlock: Any


def functions(sbox: SBox | str = AES) -> Functions:
    """Make lock and unlock for an S-Box.

    Parameters
    ----------
    sbox
        The S-Box, or its name.

    Raises
    ------
    UnknownNameError
        There is no such S-Box.
    """
    box = find_sbox(sbox)
    return Functions(_make(box, "lock"), _make(box, "unlock"))


def _make(box: SBox, direction: str) -> Any:
    change = getattr(locking, direction)

    def function(array: Any, key: Any, iv: Any, offset: int = 0) -> None:
        with CounterSchedule(bytes(key), bytes(iv)) as schedule:
            change(array, schedule, sbox=box, offset=offset, out=array, threads=1)

    @overload(function)
    def typed(array, key, iv, offset=0):  # type: ignore[no-untyped-def]
        _check_types(direction, array, key, iv)
        transform = Transform.of(box, direction, active_tier())
        _kept.append(transform)
        run_128, run_192, run_256 = (
            _Kernel(address_of(transform.kernel("counter", bits), direction)) for bits in KEY_BITS
        )
        parameters, rcon = transform.box, RCON_ADDRESS

        def compiled(array, key, iv, offset=0):  # type: ignore[no-untyped-def]
            position, nbytes = np.int64(offset), array.size * array.itemsize
            _check(len(key), len(iv), position, nbytes)
            both = np.concatenate((key, iv))
            address = array.ctypes.data
            record = np.array((address, address, nbytes, position, both.ctypes.data, rcon, parameters), np.int64)
            if len(key) == 16:
                run_128(record.ctypes.data)
            elif len(key) == 24:
                run_192(record.ctypes.data)
            else:
                run_256(record.ctypes.data)
            both[:] = 0

        return compiled

    return function


@register_jitable
def _check(key_bytes, iv_bytes, position, nbytes):  # type: ignore[no-untyped-def]
    if key_bytes not in (16, 24, 32):
        raise KeyFormatError("key: accepted are 16, 24 or 32 bytes")
    if iv_bytes != 16:
        raise KeyFormatError("iv: accepted are 16 bytes")
    if position < 0 or position > _LAST - nbytes:
        raise ParameterError("offset: accepted are numbers of at least 0 and ranges that end before 2^63")


def _check_types(direction: str, array: Any, key: Any, iv: Any) -> None:
    if not isinstance(array, types.Array) or array.layout != "C" or not array.mutable:
        raise TypingError(f"{direction}: array: got {array}, accepted is a C-contiguous array that may be written")
    for name, value in (("key", key), ("iv", iv)):
        if not isinstance(value, types.Array) or value.dtype != types.uint8 or value.ndim != 1 or value.layout != "C":
            raise TypingError(f"{direction}: {name}: got {value}, accepted is a contiguous array of uint8 of one axis")


lock, unlock = functions()
