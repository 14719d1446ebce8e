"""The x86 instructions that the kernels name themselves, as operations on 64-byte or 16-byte vectors.

`INSTRUCTIONS` is the whole table: LLVM's name of each and the processor features it needs. A kernel that uses an
instruction on a machine without its features would abort the process, so tiers list those features and are gated on
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from deeplock_kernels.simd.ghash import Hash, make_hash
from deeplock_kernels.simd.vectors import (
    INVERSE_SHIFT_ROWS,
    SHIFT_ROWS,
    byte,
    cipher_stages,
    constant,
    in_blocks,
    join,
    operation,
    permute,
    pointer,
    quad,
    split,
    types,
    u8x32,
)


class Instruction(NamedTuple):
    """One LLVM intrinsic: its name, the bytes of its vectors, and the features it needs."""

    llvm_name: str
    nbytes: int
    requires: frozenset[str]
    lane_bits: int = 8


def _row(llvm_name: str, nbytes: int, requires: str, lane_bits: int = 8) -> Instruction:
    return Instruction(llvm_name, nbytes, frozenset(requires.split()), lane_bits)


INSTRUCTIONS = {
    "aesenc_128": _row("llvm.x86.aesni.aesenc", 16, "aes", 64),
    "aesenclast_128": _row("llvm.x86.aesni.aesenclast", 16, "aes", 64),
    "aesdeclast_128": _row("llvm.x86.aesni.aesdeclast", 16, "aes", 64),
    "aesdeclast_256": _row("llvm.x86.aesni.aesdeclast.256", 32, "vaes avx2", 64),
    "aesdeclast_512": _row("llvm.x86.aesni.aesdeclast.512", 64, "vaes avx512f", 64),
    "aesenc_256": _row("llvm.x86.aesni.aesenc.256", 32, "vaes avx2", 64),
    "aesenclast_256": _row("llvm.x86.aesni.aesenclast.256", 32, "vaes avx2", 64),
    "aesenc_512": _row("llvm.x86.aesni.aesenc.512", 64, "vaes avx512f", 64),
    "aesenclast_512": _row("llvm.x86.aesni.aesenclast.512", 64, "vaes avx512f", 64),
    "gf2p8affineqb_256": _row("llvm.x86.vgf2p8affineqb.256", 32, "gfni avx2"),
    "gf2p8affineinvqb_256": _row("llvm.x86.vgf2p8affineinvqb.256", 32, "gfni avx2"),
    "gf2p8affineqb_512": _row("llvm.x86.vgf2p8affineqb.512", 64, "gfni avx512f avx512bw"),
    "gf2p8affineinvqb_512": _row("llvm.x86.vgf2p8affineinvqb.512", 64, "gfni avx512f avx512bw"),
    "pclmulqdq_128": _row("llvm.x86.pclmulqdq", 16, "pclmul", 64),
    "pclmulqdq_256": _row("llvm.x86.pclmulqdq.256", 32, "vpclmulqdq avx2", 64),
    "pclmulqdq_512": _row("llvm.x86.pclmulqdq.512", 64, "vpclmulqdq avx512f", 64),
    "pshufb_256": _row("llvm.x86.avx2.pshuf.b", 32, "avx2"),
    "vpermi2b_512": _row("llvm.x86.avx512.vpermi2var.qi.512", 64, "avx512f avx512vbmi"),
}


def call(builder: Any, row: str, values: Sequence[Any], immediate: int | None = None) -> Any:
    """Call the intrinsic of a row on vectors of exactly its size."""
    instruction = INSTRUCTIONS[row]
    bits = instruction.lane_bits
    lanes = ir.VectorType(ir.IntType(bits), instruction.nbytes * 8 // bits)
    arguments = [builder.bitcast(value, lanes) for value in values]
    kinds: list[Any] = [lanes] * len(arguments)
    if immediate is not None:
        arguments.append(ir.IntType(8)(immediate))
        kinds.append(ir.IntType(8))
    kind = ir.FunctionType(lanes, kinds)
    function = cgutils.get_or_insert_function(builder.module, kind, instruction.llvm_name)
    return builder.bitcast(builder.call(function, arguments), ir.VectorType(byte, instruction.nbytes))


def widened(row: str, values: Sequence[Any], builder: Any, immediate: int | None = None) -> Any:
    """Apply a row to vectors of any multiple of its size, part by part."""
    nbytes = INSTRUCTIONS[row].nbytes
    parts = zip(*(split(builder, value, nbytes) for value in values), strict=True)
    return join(builder, [call(builder, row, part, immediate) for part in parts])


def aes_stages(width: int) -> tuple[Any, ...]:
    """Give the stages of AES in registers of `width` bits."""

    def one_round(builder: Any, state: Any, keys: Sequence[Any], number: int) -> Any:
        if number == 1:
            state = builder.xor(state, keys[0])
        row = "aesenc" if number < len(keys) - 1 else "aesenclast"
        return call(builder, f"{row}_{width}", (state, keys[number]))

    return cipher_stages(width // 8, "v" if width == 512 else "x", one_round)


def aes_last_round(width: int) -> Any:
    """Give the operation AESENCLAST (state, round key), in registers of at most `width` bits."""

    @operation(2)
    def last_round(builder: Any, state: Any, key: Any) -> Any:
        return widened(f"aesenclast_{min(width, state.type.count * 8)}", (state, key), builder)

    return last_round


def hash_operations(width: int) -> Hash:
    """Give GHASH in registers of `width` bits."""

    def product(builder: Any, a: Any, b: Any, high_of_a: bool, high_of_b: bool) -> Any:
        return call(builder, f"pclmulqdq_{width}", (a, b), high_of_a | high_of_b << 4)

    return make_hash(width // 8, product)


def galois_affine(width: int) -> tuple[Any, Any]:
    """Give GF2P8AFFINEQB and GF2P8AFFINEINVQB (x, matrix) with no constant, in registers of `width` bits."""

    @operation(2)
    def affine(builder: Any, x: Any, matrix: Any) -> Any:
        return widened(f"gf2p8affineqb_{width}", (x, matrix), builder, 0)

    @operation(2)
    def affine_inverse(builder: Any, x: Any, matrix: Any) -> Any:
        return widened(f"gf2p8affineinvqb_{width}", (x, matrix), builder, 0)

    return affine, affine_inverse


def galois_sub_bytes(width: int) -> Any:
    """Give SubBytes as one GF2P8AFFINEINVQB: the inverse, then the affine map of FIPS 197 section 5.1.1."""
    matrix = (0xF1E3C78F1F3E7CF8).to_bytes(8, "little")

    @operation(1)
    def substitute(builder: Any, x: Any) -> Any:
        return widened(f"gf2p8affineinvqb_{width}", (x, constant(matrix, x.type.count)), builder, 0x63)

    return substitute


@operation(3)
def permute_two(builder: Any, indices: Any, a: Any, b: Any) -> Any:
    """Look up the low 7 bits of each index in the 128 bytes a, b (VPERMI2B)."""
    return call(builder, "vpermi2b_512", (a, indices, b))


def aes_substitutions(width: int) -> tuple[Any, Any]:
    """Give SubBytes and InvSubBytes in registers of `width` bits.

    AESENCLAST and AESDECLAST move bytes as well: what they will undo is done before.
    """

    def substitution(row: str, order: Sequence[int]) -> Any:
        @operation(1)
        def substitute(builder: Any, x: Any) -> Any:
            return widened(f"{row}_{width}", (in_blocks(builder, x, order), constant([0], x.type.count)), builder)

        return substitute

    return substitution("aesenclast", INVERSE_SHIFT_ROWS), substitution("aesdeclast", SHIFT_ROWS)


_ROW_BYTES = INSTRUCTIONS["pshufb_256"].nbytes


@intrinsic
def load_row_differences(typingctx, address):
    """Load a table of 256 bytes as rows of 16: in each half of it, each row XORed with the one before.

    Each is repeated over its register.
    """
    rows = types.UniTuple(u8x32, 16)

    def generate(_context, builder, _signature, values):
        row = ir.VectorType(byte, 16)
        loaded = [
            builder.load(pointer(builder, builder.add(values[0], quad(16 * r)), row), align=1) for r in range(16)
        ]
        found = [loaded[r] if r % 8 == 0 else builder.xor(loaded[r], loaded[r - 1]) for r in range(16)]
        repeated = [permute(builder, row, row, [i % 16 for i in range(_ROW_BYTES)]) for row in found]
        return cgutils.pack_array(builder, repeated)

    return rows(address), generate


@intrinsic
def lookup_rows(typingctx, x, differences):
    """Look up each byte in a table by 16 shuffles (VPSHUFB), which give zero where the top bit of an index is set.

    In a half of the table an index goes down by 16 from row to row, until it is below zero and stays there: the XOR of
    what the rows gave until then is the entry. The other half's indices are negative from the start.
    """

    def generate(_context, builder, _signature, values):
        rows = [builder.extract_value(values[1], r) for r in range(16)]
        kind = ir.VectorType(byte, _ROW_BYTES)
        subtract = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind, kind]), f"llvm.ssub.sat.v{_ROW_BYTES}i8"
        )
        parts = split(builder, values[0], _ROW_BYTES)
        found = [constant([0], _ROW_BYTES)] * len(parts)
        for r in range(16):
            if r == 0:
                indices = parts
            elif r == 8:
                indices = [builder.xor(part, constant([0x80], _ROW_BYTES)) for part in parts]
            else:
                indices = [builder.call(subtract, [index, constant([16], _ROW_BYTES)]) for index in indices]
            entries = [call(builder, "pshufb_256", (rows[r], index)) for index in indices]
            found = [builder.xor(total, entry) for total, entry in zip(found, entries, strict=True)]
        return join(builder, found)

    return x(x, differences), generate
