"""Which form a tier applies an S-Box in, and the parameters that its kernels read (see `kernels/boxes.py`)."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from deeplock_kernels.sboxes import AES, SBox

_IDENTITY = bytes(range(256))


def parameters(box: SBox, form: str) -> bytes | None:
    """Give the parameters of an S-Box in a form, or None where the form cannot express it."""
    if form == "identity":
        return b"" if box.table == _IDENTITY else None
    if form == "aes":
        return b"" if box == AES else None
    if form == "aes_inverse":
        return b"" if box == AES.inverse else None
    if form == "affine":
        affine = box.affine
        return affine and (
            bytes([affine.inner_constant] * 8)
            + affine.inner_matrix.to_bytes(8, "little")
            + affine.outer_matrix.to_bytes(8, "little")
            + bytes([affine.outer_constant] * 8)
        )
    if form == "table":
        return box.table
    raise AssertionError(f"form: no such form as {form!r}")


@functools.lru_cache(maxsize=256)
def choose(box: SBox, forms: tuple[str, ...]) -> tuple[str, int, Any]:
    """Pick the first of a tier's forms that expresses an S-Box.

    Returns
    -------
    tuple of (str, int, object)
        The form, the address of its parameters, and what keeps them in memory.
    """
    for form in forms:
        data = parameters(box, form)
        if data is not None:
            memory = ctypes.create_string_buffer(data, max(len(data), 1))
            return form, ctypes.addressof(memory), memory
    raise AssertionError("forms: every tier ends with a form that takes any table")
