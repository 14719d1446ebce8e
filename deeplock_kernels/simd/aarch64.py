"""The AArch64 instructions that the kernels name themselves: AES and table look-ups in 128-bit registers.

AESE XORs the round key first and does no MixColumns: aese(x, k) = ShiftRows(SubBytes(x XOR k)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from deeplock_kernels.simd.ghash import make_hash
from deeplock_kernels.simd.vectors import (
    INVERSE_SHIFT_ROWS,
    SHIFT_ROWS,
    as_lanes,
    byte,
    cipher_stages,
    constant,
    in_blocks,
    join,
    operation,
    pointer,
    quad,
    split,
)

_REGISTER = ir.VectorType(byte, 16)

# LLVM's name of each instruction, how many registers it takes, and the feature it needs.
INSTRUCTIONS = {
    "aese": ("llvm.aarch64.crypto.aese", 2, "aes"),
    "aesd": ("llvm.aarch64.crypto.aesd", 2, "aes"),
    "aesmc": ("llvm.aarch64.crypto.aesmc", 1, "aes"),
    "pmull": ("llvm.aarch64.neon.pmull64", 2, "aes"),
    "tbl4": ("llvm.aarch64.neon.tbl4.v16i8", 5, "neon"),
    "tbx4": ("llvm.aarch64.neon.tbx4.v16i8", 6, "neon"),
}


def call(builder: Any, row: str, values: Sequence[Any]) -> Any:
    """Call the intrinsic of a row on registers."""
    name, _, _ = INSTRUCTIONS[row]
    kind = ir.FunctionType(_REGISTER, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def _round(builder: Any, state: Any, keys: Sequence[Any], number: int) -> Any:
    mixed = call(builder, "aese", (state, keys[number - 1]))
    if number < len(keys) - 1:
        return call(builder, "aesmc", (mixed,))
    return builder.xor(mixed, keys[number])


aes_stages = cipher_stages(16, "w", _round)


def _product(builder: Any, a: Any, b: Any, high_of_a: bool, high_of_b: bool) -> Any:
    halves = [
        builder.extract_element(as_lanes(builder, value, 64), ir.IntType(32)(int(high)))
        for value, high in ((a, high_of_a), (b, high_of_b))
    ]
    return call(builder, "pmull", halves)


hash_operations = make_hash(16, _product)


def _substitution(builder: Any, row: str, state: Any) -> Any:
    zero = constant([0], 16)
    return join(builder, [call(builder, row, (part, zero)) for part in split(builder, state, 16)])


@operation(2)
def aes_last_round(builder: Any, state: Any, key: Any) -> Any:
    """Give ShiftRows(SubBytes(state)) XOR key, as x86's AESENCLAST does."""
    return builder.xor(_substitution(builder, "aese", state), key)


@operation(1)
def aes_substitute(builder: Any, x: Any) -> Any:
    """Give SubBytes."""
    return _substitution(builder, "aese", in_blocks(builder, x, INVERSE_SHIFT_ROWS))


@operation(1)
def aes_substitute_inverse(builder: Any, x: Any) -> Any:
    """Give InvSubBytes."""
    return _substitution(builder, "aesd", in_blocks(builder, x, SHIFT_ROWS))


@intrinsic
def lookup_rows(typingctx, x, table):
    """Look up each byte in the 256 bytes at an address, a quarter at a time: TBX leaves alone what is outside."""

    def generate(_context, builder, _signature, values):
        x, table = values
        rows = [
            builder.load(pointer(builder, builder.add(table, quad(16 * r)), _REGISTER), align=1) for r in range(16)
        ]
        parts = split(builder, x, 16)
        found = [call(builder, "tbl4", (*rows[:4], part)) for part in parts]
        for first in range(4, 16, 4):
            parts = [builder.sub(part, constant([64], 16)) for part in parts]
            found = [
                call(builder, "tbx4", (done, *rows[first : first + 4], part))
                for done, part in zip(found, parts, strict=True)
            ]
        return join(builder, found)

    return x(x, table), generate
