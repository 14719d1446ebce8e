"""The forms in which a vector tier applies an S-Box: `load(address) -> parameters`, `apply(x, parameters) -> x`.

| form        | parameters in memory                                               | which S-Boxes                    |
|-------------|--------------------------------------------------------------------|----------------------------------|
| identity    | none                                                               | the identity (a bare key stream) |
| affine      | inner constant and matrix, outer matrix and constant, 8 bytes each | aes, sm4, camellia, aria         |
| aes         | none                                                               | aes                              |
| aes_inverse | none                                                               | the inverse of aes               |
| table       | the table, 256 bytes                                               | any                              |
"""

from __future__ import annotations

from typing import Any

from deeplock_kernels.kernels.house import inlined
from deeplock_kernels.simd import x86
from deeplock_kernels.simd.vectors import load, load_quad, select_negative, u8x64


@inlined
def _load_nothing(address):
    return 0


@inlined
def _apply_identity(x, box):
    return x


IDENTITY = (_load_nothing, _apply_identity)


def without_parameters(substitute: Any) -> tuple[Any, Any]:
    """Make a form of an operation that is the S-Box itself."""

    @inlined
    def apply_operation(x, box):
        return substitute(x)

    return _load_nothing, apply_operation


def galois(width: int) -> tuple[Any, Any]:
    """Make the affine form with GFNI in registers of `width` bits."""
    affine, affine_inverse = x86.galois_affine(width)

    @inlined
    def load_affine(address):
        return (
            load_quad(u8x64, address),
            load_quad(u8x64, address + 8),
            load_quad(u8x64, address + 16),
            load_quad(u8x64, address + 24),
        )

    @inlined
    def apply_affine(x, box):
        return affine_inverse(affine(x ^ box[0], box[1]), box[2]) ^ box[3]

    return load_affine, apply_affine


@inlined
def _load_quarters(address):
    return (
        load(u8x64, address),
        load(u8x64, address + 64),
        load(u8x64, address + 128),
        load(u8x64, address + 192),
    )


@inlined
def _apply_quarters(x, box):
    """Look up in both halves of the table by 7 bits, then choose by the top bit."""
    low = x86.permute_two(x, box[0], box[1])
    high = x86.permute_two(x, box[2], box[3])
    return select_negative(x, high, low)


@inlined
def _load_rows(address):
    return x86.load_row_differences(address)


@inlined
def _apply_rows(x, rows):
    return x86.lookup_rows(x, rows)


TABLE_BY_ROWS = (_load_rows, _apply_rows)
TABLE_BY_PERMUTE = (_load_quarters, _apply_quarters)


@inlined
def _load_address(address):
    return address


def table_by_rows(lookup_rows: Any) -> tuple[Any, Any]:
    """Make the table form of an operation that looks bytes up in a table at an address."""

    @inlined
    def apply_rows(x, address):
        return lookup_rows(x, address)

    return _load_address, apply_rows
