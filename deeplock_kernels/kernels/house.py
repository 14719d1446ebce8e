"""How every piece of a kernel is compiled: the house decorators."""

from __future__ import annotations

from typing import Any

import numba

# No fast mathematics, no parallel regions, no exceptions: a kernel is serial and cannot fail.
OPTIONS = {"nopython": True, "error_model": "numpy", "boundscheck": False}

inlined = numba.njit(forceinline=True, no_cpython_wrapper=True, **{k: v for k, v in OPTIONS.items() if k != "nopython"})


def compile_kernel(function: Any, arity: int) -> Any:
    """Compile a kernel to a C function `void (int64, ...)` and return Numba's CFunc."""
    return numba.cfunc(numba.types.void(*[numba.types.int64] * arity), **OPTIONS)(function)
