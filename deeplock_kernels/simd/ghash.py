"""GHASH (SP 800-38D section 6.4) in vectors, over whatever carry-less multiplication a machine has.

A block is turned around on loading, so that bit 127 of a lane is the coefficient of x^0. The product of two such lanes
comes out one bit too low; powers of the key are therefore kept multiplied by x ("raised" below). Products are reduced
by two further multiplications, 64 bits each (S. Gueron and M. Kounavis, "Intel Carry-Less Multiplication Instruction
and its Usage for Computing the GCM Mode").

A step takes 256 bytes. A register has as many lanes as blocks fit in it, and each lane has a hash of its own that goes
on by the same power of the key; the lanes come together at the end. So a step has one reduction, and nothing crosses
lanes in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from deeplock_kernels.simd.vectors import (
    BLOCK,
    Vector,
    as_lanes,
    byte,
    constant,
    in_blocks,
    permute,
    pointer,
    quad,
    split,
    types,
    u8x16,
    u8x64,
)

POWERS = 16  # of the key in memory, H^16 first: as many as a step has blocks
STEP = POWERS * BLOCK
ROWS = STEP // u8x64.nbytes

_REVERSED = range(BLOCK - 1, -1, -1)
_SWAPPED = (*range(8, 16), *range(8))
_POLYNOMIAL = 0xC2000000_00000000_00000000_00000001  # x^128 + x^7 + x^2 + x + 1, turned around, raised

Sums = tuple[Any, Any, Any]  # of low, crossed and high products


class Hash(NamedTuple):
    """GHASH over steps. `powers` is the address of the raised powers of the key.

    Attributes
    ----------
    start
        `() -> state`: of nothing.
    begin, absorb, end
        `begin(state, powers) -> sums`, then `absorb[i](sums, row, powers) -> sums` with the first three rows of 64
        bytes, then `end(sums, row, powers) -> state` with the fourth.
    fold
        `(state, powers) -> hash`: the hash of all steps, a u8x16.
    last_step
        `(address, powers) -> hash` of 256 bytes in memory.
    multiply
        `(a, b) -> product` of a hash and a raised power, or of two raised powers.
    """

    start: Any
    begin: Any
    absorb: tuple[Any, ...]
    end: Any
    fold: Any
    last_step: Any
    multiply: Any


def make_hash(nbytes: int, product: Callable[..., Any]) -> Hash:
    """Make GHASH in registers of `nbytes`.

    Parameters
    ----------
    nbytes
        16, 32 or 64.
    product
        Emits the carry-less products of one half of each lane: `product(builder, a, b, high_of_a, high_of_b)`.
    """
    register, lanes = Vector(nbytes), nbytes // BLOCK

    def products(builder: Any, a: Any, b: Any) -> Sums:
        crossed = builder.xor(product(builder, a, b, False, True), product(builder, a, b, True, False))
        return product(builder, a, b, False, False), crossed, product(builder, a, b, True, True)

    def plus(builder: Any, a: Sums, b: Sums) -> Sums:
        low, crossed, high = (builder.xor(x, y) for x, y in zip(a, b, strict=True))
        return low, crossed, high

    def reduce(builder: Any, sums: Sums) -> Any:
        low, crossed, high = sums
        size = low.type.count
        zero, polynomial = constant([0], size), constant(_POLYNOMIAL.to_bytes(BLOCK, "little"), size)
        up = [size if i % BLOCK < 8 else i - 8 for i in range(size)]
        down = [i + 8 if i % BLOCK < 8 else size for i in range(size)]
        low = builder.xor(low, permute(builder, crossed, zero, up))
        high = builder.xor(high, permute(builder, crossed, zero, down))
        for _ in range(2):
            low = builder.xor(in_blocks(builder, low, _SWAPPED), product(builder, low, polynomial, False, True))
        return builder.xor(low, high)

    def repeated_power(builder: Any, powers: Any, exponent: int) -> Any:
        power = load_power(builder, powers, exponent, BLOCK)
        return permute(builder, power, power, [i % BLOCK for i in range(nbytes)])

    def parts(builder: Any, row: Any) -> list[Any]:
        return split(builder, in_blocks(builder, row, _REVERSED), nbytes)

    def absorbed(builder: Any, sums: Sums, number: int, values: Sequence[Any], powers: Any) -> Sums:
        """Add parts of row `number`, as far as they are to be multiplied."""
        for i, part in enumerate(values):
            exponent = POWERS - number * 4 - lanes * (i + 1)
            if exponent:
                sums = plus(builder, sums, products(builder, part, repeated_power(builder, powers, exponent)))
        return sums

    def together(builder: Any, value: Any) -> Any:
        """Add the lanes up."""
        while value.type.count > BLOCK:
            low, high = split(builder, value, value.type.count // 2)
            value = builder.xor(low, high)
        return value

    def unpack(builder: Any, sums: Any) -> Sums:
        return tuple(builder.extract_value(sums, i) for i in range(3))

    kind = types.UniTuple(register, 3)

    @intrinsic
    def start(typingctx):
        return register(), lambda *_: constant([0], nbytes)

    @intrinsic
    def begin(typingctx, state, powers):
        def generate(_context, builder, _signature, values):
            state, powers = values
            power = repeated_power(builder, powers, POWERS)
            return cgutils.pack_array(builder, products(builder, state, power))

        return kind(state, powers), generate

    def make_absorb(number: int) -> Any:
        @intrinsic
        def absorb(typingctx, sums, row, powers):
            def generate(_context, builder, _signature, values):
                sums, row, powers = values
                added = absorbed(builder, unpack(builder, sums), number, parts(builder, row), powers)
                return cgutils.pack_array(builder, added)

            return kind(sums, row, powers), generate

        return absorb

    @intrinsic
    def end(typingctx, sums, row, powers):
        def generate(_context, builder, _signature, values):
            sums, row, powers = values
            each = parts(builder, row)
            added = absorbed(builder, unpack(builder, sums), ROWS - 1, each, powers)
            return builder.xor(reduce(builder, added), each[-1])

        return register(sums, row, powers), generate

    @intrinsic
    def fold(typingctx, state, powers):
        def generate(_context, builder, _signature, values):
            state, powers = values
            power = load_power(builder, powers, lanes, nbytes)
            return together(builder, reduce(builder, products(builder, state, power)))

        return u8x16(state, powers), generate

    @intrinsic
    def last_step(typingctx, address, powers):
        def generate(_context, builder, _signature, values):
            address, powers = values
            zero = constant([0], nbytes)
            sums: Sums = zero, zero, zero
            for exponent in range(POWERS, 0, -lanes):
                place = builder.add(address, quad(BLOCK * (POWERS - exponent)))
                part = builder.load(pointer(builder, place, ir.VectorType(byte, nbytes)), align=1)
                part = in_blocks(builder, part, _REVERSED)
                sums = plus(builder, sums, products(builder, part, load_power(builder, powers, exponent, nbytes)))
            return together(builder, reduce(builder, sums))

        return u8x16(address, powers), generate

    @intrinsic
    def multiply(typingctx, a, b):
        def generate(_context, builder, _signature, values):
            # In the tier's own registers, whose lanes are alike then: narrower ones have another instruction.
            a, b = (permute(builder, value, value, [i % BLOCK for i in range(nbytes)]) for value in values)
            return split(builder, reduce(builder, products(builder, a, b)), BLOCK)[0]

        return u8x16(a, b), generate

    return Hash(start, begin, tuple(make_absorb(number) for number in range(ROWS - 1)), end, fold, last_step, multiply)


def load_power(builder: Any, powers: Any, exponent: int, nbytes: int) -> Any:
    """Load H^exponent and the powers below it, as many as fit."""
    place = builder.add(powers, quad(BLOCK * (POWERS - exponent)))
    return builder.load(pointer(builder, place, ir.VectorType(byte, nbytes)), align=1)


@intrinsic
def raised(typingctx, block):
    """Turn a block around and multiply it by x, in vectors: as an integer it would go through general registers."""

    def generate(_context, builder, _signature, values):
        halves = as_lanes(builder, in_blocks(builder, values[0], _REVERSED), 64)
        one, last = (ir.Constant(halves.type, [bits, bits]) for bits in (1, 63))
        shifted = builder.shl(halves, one), builder.lshr(halves, last), builder.ashr(halves, last)
        doubled, carried, top = (builder.bitcast(each, values[0].type) for each in shifted)
        carried = permute(builder, carried, constant([0], BLOCK), [BLOCK] * 8 + list(range(8)))
        lost = in_blocks(builder, top, [*range(8, 16)] * 2)  # all ones or none
        polynomial = constant(_POLYNOMIAL.to_bytes(BLOCK, "little"), BLOCK)
        return builder.xor(builder.xor(doubled, carried), builder.and_(lost, polynomial))

    return u8x16(block), generate


@intrinsic
def turned(typingctx, block):
    """Turn a block around: a hash as the standard writes it, or back."""

    def generate(_context, builder, _signature, values):
        return in_blocks(builder, values[0], _REVERSED)

    return u8x16(block), generate


@intrinsic
def lengths(typingctx, nbytes):
    """Give the last block of GCM (SP 800-38D section 7.1) for `nbytes` of associated data alone, turned around."""

    def generate(_context, builder, _signature, values):
        wide = ir.IntType(128)
        bits = builder.shl(builder.zext(values[0], wide), wide(3 + 64))
        return builder.bitcast(bits, ir.VectorType(byte, BLOCK))

    return u8x16(nbytes), generate


@intrinsic
def key_blocks(typingctx):
    """Give a tuple of one row whose first two blocks, encrypted, are GCM's hash key and the mask of its tag.

    The nonce is 12 zero bytes (SP 800-38D section 7.1: H from the block of zeros, the mask from nonce || 1).
    """

    def generate(_context, builder, _signature, _values):
        return cgutils.pack_array(builder, [constant([0] * (2 * BLOCK - 1) + [1] + [0] * (2 * BLOCK), 64)])

    return types.UniTuple(u8x64, 1)(), generate
