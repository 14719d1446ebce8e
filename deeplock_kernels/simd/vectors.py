"""Numba types whose data model is an LLVM vector of bytes, and the operations that every machine has.

An operation is one rule that emits LLVM for vectors. Given tuples of vectors it is applied element by element, so a
batch of independent vectors reads like one vector and its instructions come out interleaved.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core import types as numba_types
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic, overload

types: Any = numba_types

BLOCK = 16  # bytes of an AES block, the unit within which shuffles move bytes

byte = ir.IntType(8)
quad = ir.IntType(64)


class Vector(types.Type):
    """The Numba type of `nbytes` bytes in vector registers."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        super().__init__(name=f"u8x{nbytes}")


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(byte, kind.nbytes))


u8x16 = Vector(16)
u8x32 = Vector(32)
u8x64 = Vector(64)


def operation(arity: int) -> Callable[[Callable[..., Any]], Any]:
    """Turn a rule `emit(builder, *values) -> value` into a Numba operation on vectors or tuples of vectors.

    The result has the type of the first argument; a value given beside tuples is used with each of their elements.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        def typed(arguments: Sequence[Any]) -> tuple[Any, Callable[..., Any]]:
            count = next((len(kind) for kind in arguments if isinstance(kind, types.BaseTuple)), None)
            first = arguments[0]
            tupled = isinstance(first, types.BaseTuple)
            result = first if count is None or tupled else types.UniTuple(first, count)

            def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
                if count is None:
                    return emit(builder, *values)
                rows = [
                    [
                        builder.extract_value(value, i) if isinstance(kind, types.BaseTuple) else value
                        for kind, value in zip(arguments, values, strict=True)
                    ]
                    for i in range(count)
                ]
                return cgutils.pack_array(builder, [emit(builder, *row) for row in rows])

            return result(*arguments), generate

        def unary(typingctx, a):
            return typed((a,))

        def binary(typingctx, a, b):
            return typed((a, b))

        def ternary(typingctx, a, b, c):
            return typed((a, b, c))

        entry: Any = (unary, binary, ternary)[arity - 1]
        entry.__name__ = entry.__qualname__ = emit.__name__
        entry.__doc__ = emit.__doc__
        return intrinsic(entry)

    return decorate


def constant(pattern: Sequence[int], nbytes: int) -> ir.Constant:
    """Repeat a pattern of bytes to a constant vector of `nbytes`."""
    return ir.Constant(ir.VectorType(byte, nbytes), [pattern[i % len(pattern)] for i in range(nbytes)])


def as_lanes(builder: Any, value: Any, bits: int) -> Any:
    """See a byte vector as lanes of `bits` bits."""
    return builder.bitcast(value, ir.VectorType(ir.IntType(bits), value.type.count * 8 // bits))


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    """Turn an address into a pointer to `kind`."""
    return builder.inttoptr(address, kind.as_pointer())


def permute(builder: Any, a: Any, b: Any, indices: Sequence[int]) -> Any:
    """Pick bytes of a and b (numbered on from a's) at constant indices."""
    return builder.shuffle_vector(
        a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), list(indices))
    )


def split(builder: Any, value: Any, nbytes: int) -> list[Any]:
    """Cut a vector into parts of `nbytes`."""
    return [permute(builder, value, value, range(i, i + nbytes)) for i in range(0, value.type.count, nbytes)]


def join(builder: Any, parts: Sequence[Any]) -> Any:
    """Put equal vectors one after the other; their number is a power of two."""
    while len(parts) > 1:
        parts = [
            permute(builder, a, b, range(2 * a.type.count))
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def pinned(builder: Any, register: str, values: Sequence[Any]) -> list[Any]:
    """Have all these values in registers at this point, by an empty piece of assembly that takes and gives them.

    To save registers LLVM else delays some chains of AES rounds, runs one behind the other and waits for each. Once,
    half way, is best: after every round it costs up to a seventh of the speed.
    """
    kinds = [value.type for value in values]
    constraints = [f"={register}"] * len(kinds) + [str(i) for i in range(len(kinds))]
    result = ir.LiteralStructType(kinds) if len(kinds) > 1 else kinds[0]
    kind = ir.FunctionType(result, kinds)
    together = builder.call(ir.InlineAsm(kind, "", ",".join(constraints), side_effect=True), values)
    if len(kinds) == 1:
        return [together]
    return [builder.extract_value(together, i) for i in range(len(kinds))]


STAGES = 4
_IN_FLIGHT = 8  # registers of AES states: enough at once to hide a round's latency, few enough to stay in registers


def cipher_stages(nbytes: int, register: str, one_round: Callable[..., Any]) -> tuple[Any, ...]:
    """Make the operations (blocks, round keys) that in turn encrypt a tuple of vectors of blocks (FIPS 197).

    A kernel does other work between them, for units of the processor that AES leaves free.

    Parameters
    ----------
    nbytes
        The size of a register.
    register
        LLVM's letter for the kind of register.
    one_round
        Emits round `number` of 1 to len(keys) - 1: `one_round(builder, state, keys, number)`.
    """

    def make(stage: int) -> Any:
        @intrinsic
        def run(typingctx, blocks, keys):
            def generate(_context, builder, _signature, values):
                vectors = [builder.extract_value(values[0], i) for i in range(len(blocks))]
                whole = [builder.extract_value(values[1], i) for i in range(len(keys))]
                round_keys = [split(builder, key, nbytes)[0] for key in whole]
                parts = [part for vector in vectors for part in split(builder, vector, nbytes)]
                firsts, numbers = range(0, len(parts), _IN_FLIGHT), range(1, len(keys))
                work = [(first, number) for first in firsts for number in numbers]
                for first, number in work[len(work) * stage // STAGES : len(work) * (stage + 1) // STAGES]:
                    group = slice(first, first + _IN_FLIGHT)
                    parts[group] = [one_round(builder, part, round_keys, number) for part in parts[group]]
                if stage == STAGES // 2 - 1:
                    parts[group] = pinned(builder, register, parts[group])
                each = len(parts) // len(vectors)
                joined = [join(builder, parts[i : i + each]) for i in range(0, len(parts), each)]
                return cgutils.pack_array(builder, joined)

            return blocks(blocks, keys), generate

        return run

    return tuple(make(stage) for stage in range(STAGES))


# ---------------------------------------------------------------------------------------------- memory


@intrinsic
def load(typingctx, vector, address):
    """Load a vector of the given type from any address."""
    kind = vector.instance_type

    def generate(context, builder, _signature, values):
        return builder.load(pointer(builder, values[1], context.get_value_type(kind)), align=1)

    return kind(vector, address), generate


@intrinsic
def load_quad(typingctx, vector, address):
    """Load 8 bytes and repeat them over the whole vector."""
    kind = vector.instance_type

    def generate(_context, builder, _signature, values):
        part = builder.load(pointer(builder, values[1], ir.VectorType(byte, 8)), align=1)
        return permute(builder, part, part, [i % 8 for i in range(kind.nbytes)])

    return kind(vector, address), generate


@intrinsic
def load_word(typingctx, like, address):
    """Load 4 bytes and repeat them over a vector of the type of `like`."""

    def generate(_context, builder, _signature, values):
        part = builder.load(pointer(builder, values[1], ir.VectorType(byte, 4)), align=1)
        return permute(builder, part, part, [i % 4 for i in range(like.nbytes)])

    return like(like, address), generate


@intrinsic
def splat(typingctx, vector, value):
    """Repeat the low byte of an integer over a vector of the given type."""
    kind = vector.instance_type

    def generate(_context, builder, _signature, values):
        one = builder.insert_element(
            ir.Constant(ir.VectorType(byte, 1), ir.Undefined),
            builder.trunc(values[1], byte),
            ir.IntType(32)(0),
        )
        return permute(builder, one, one, [0] * kind.nbytes)

    return kind(vector, value), generate


def make_load_blocks(count: int) -> Any:
    """Make an operation that loads `count` blocks in a row, each repeated over a u8x64."""
    result = types.UniTuple(u8x64, count)

    @intrinsic
    def load_blocks(typingctx, address):
        def generate(_context, builder, _signature, values):
            vectors = []
            for i in range(count):
                place = pointer(builder, builder.add(values[0], quad(BLOCK * i)), ir.VectorType(byte, BLOCK))
                block = builder.load(place, align=1)
                vectors.append(permute(builder, block, block, [j % BLOCK for j in range(u8x64.nbytes)]))
            return cgutils.pack_array(builder, vectors)

        return result(address), generate

    return load_blocks


@intrinsic
def store(typingctx, address, value):
    """Store a vector at any address."""

    def generate(_context, builder, _signature, values):
        builder.store(values[1], pointer(builder, values[0], values[1].type), align=1)

    return types.void(address, value), generate


@intrinsic
def store_past_cache(typingctx, address, value):
    """Store a vector at an aligned address without reading its cache line first; `fence` has to follow in the end."""

    def generate(_context, builder, _signature, values):
        stored = builder.store(values[1], pointer(builder, values[0], values[1].type), align=values[1].type.count)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))

    return types.void(address, value), generate


@intrinsic
def fence(typingctx):
    """Make all stores before visible before any after."""

    def generate(_context, builder, _signature, _values):
        builder.fence("seq_cst")

    return types.void(), generate


@intrinsic
def store_word(typingctx, address, value):
    """Store the first 4 bytes of a vector at any address."""

    def generate(_context, builder, _signature, values):
        word = split(builder, values[1], 4)[0]
        builder.store(word, pointer(builder, values[0], word.type), align=1)

    return types.void(address, value), generate


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address, which need not be mapped."""

    def generate(_context, builder, _signature, values):
        place = pointer(builder, values[0], byte)
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, flag(0), flag(3), flag(1)])

    return types.void(address), generate


@intrinsic
def copy(typingctx, target, source, nbytes):
    """Copy bytes between ranges that do not overlap."""

    def generate(_context, builder, _signature, values):
        target, source, nbytes = values
        cgutils.raw_memcpy(
            builder, pointer(builder, target, byte), pointer(builder, source, byte), nbytes, quad(1), align=1
        )

    return types.void(target, source, nbytes), generate


def make_scratch(nbytes: int) -> Any:
    """Make an operation that gives the address of `nbytes` of 64-byte aligned stack, one per call site."""

    @intrinsic
    def scratch(typingctx):
        def generate(_context, builder, _signature, _values):
            place = cgutils.alloca_once(builder, ir.ArrayType(byte, nbytes))
            place.align = 64
            return builder.ptrtoint(place, quad)

        return types.intp(), generate

    return scratch


# ------------------------------------------------------------------------------------------ arithmetic


@operation(2)
def xor(builder: Any, a: Any, b: Any) -> Any:
    """Exclusive or."""
    return builder.xor(a, b)


@overload(python_operator.xor)
def _xor_operator(a, b):
    if isinstance(a, Vector) and isinstance(b, Vector):
        return lambda a, b: xor(a, b)
    return None


def make_shuffle(indices: Sequence[int]) -> Any:
    """Make an operation that picks, in each 16-byte block, the bytes at constant indices; -1 gives zero."""

    @operation(1)
    def shuffle(builder: Any, a: Any) -> Any:
        count = a.type.count
        zero = constant([0], count)
        picks = [
            count if indices[i % BLOCK] < 0 else i - i % BLOCK + indices[i % BLOCK] for i in range(count)
        ]
        return permute(builder, a, zero, picks)

    return shuffle


@operation(1)
def zero_like(_builder: Any, a: Any) -> Any:
    """Give zeros in the type of a."""
    return constant([0], a.type.count)


@operation(3)
def select_negative(builder: Any, x: Any, a: Any, b: Any) -> Any:
    """Take a's byte where x's byte has its top bit set, b's elsewhere."""
    return builder.select(builder.icmp_signed("<", x, constant([0], x.type.count)), a, b)


# ------------------------------------------------------------------------------------------ AES blocks


# FIPS 197 sections 5.1.2 and 5.3.2, as the index that each byte of a block is taken from.
SHIFT_ROWS = (0, 5, 10, 15, 4, 9, 14, 3, 8, 13, 2, 7, 12, 1, 6, 11)
INVERSE_SHIFT_ROWS = (0, 13, 10, 7, 4, 1, 14, 11, 8, 5, 2, 15, 12, 9, 6, 3)


def in_blocks(builder: Any, value: Any, indices: Sequence[int]) -> Any:
    """Move the bytes of each 16-byte block alike."""
    return permute(builder, value, value, [i - i % BLOCK + indices[i % BLOCK] for i in range(value.type.count)])


@intrinsic
def transpose(typingctx, rows):
    """Turn 4 vectors of 4 blocks around: vector j of the result holds block j of each row, in order."""

    def generate(_context, builder, _signature, values):
        blocks = [split(builder, builder.extract_value(values[0], i), BLOCK) for i in range(4)]
        return cgutils.pack_array(builder, [join(builder, [row[j] for row in blocks]) for j in range(4)])

    return rows(rows), generate


@intrinsic
def concatenate(typingctx, blocks):
    """Put 4 vectors of one block side by side."""

    def generate(_context, builder, _signature, values):
        return join(builder, [builder.extract_value(values[0], i) for i in range(4)])

    return u8x64(blocks), generate


_REVERSED = list(range(BLOCK - 1, -1, -1))


@intrinsic
def counter_blocks(typingctx, start, index):
    """Give 16 counter blocks (SP 800-38A): the 128-bit big-endian number at `start` + index, + index + 1, ...

    The result is a tuple of 4 vectors. The index is signed. Sums wrap mod 2^128.
    """
    result = types.UniTuple(u8x64, 4)

    def generate(context, builder, _signature, values):
        wide = ir.IntType(128)
        kind = ir.VectorType(quad, 8)
        stored = builder.load(pointer(builder, values[0], wide), align=1)
        number = builder.add(builder.bswap(stored), builder.sext(values[1], wide))
        low = builder.trunc(number, quad)
        high = builder.trunc(builder.lshr(number, wide(64)), quad)

        def emit(exact: bool) -> Any:
            pair = ir.Constant(kind, ir.Undefined)
            pair = builder.insert_element(pair, low, ir.IntType(32)(0))
            pair = builder.insert_element(pair, high, ir.IntType(32)(1))
            base = builder.shuffle_vector(
                pair, pair, ir.Constant(ir.VectorType(ir.IntType(32), 8), [0, 1] * 4)
            )
            vectors = []
            for first in range(0, 16, 4):
                steps = ir.Constant(kind, [v for i in range(first, first + 4) for v in (i, 0)])
                total = builder.add(base, steps)
                if exact:
                    carried = builder.zext(builder.icmp_unsigned("<", total, steps), kind)
                    moved = ir.Constant(ir.VectorType(ir.IntType(32), 8), [8, 0, 8, 2, 8, 4, 8, 6])
                    zero = ir.Constant(kind, [0] * 8)
                    total = builder.add(total, builder.shuffle_vector(carried, zero, moved))
                data = builder.bitcast(total, ir.VectorType(byte, 64))
                vectors.append(
                    permute(builder, data, data, [i - i % 16 + _REVERSED[i % 16] for i in range(64)])
                )
            return cgutils.pack_array(builder, vectors)

        place = cgutils.alloca_once(builder, context.get_value_type(result))
        fits = builder.icmp_unsigned("<=", low, quad(2**64 - 16))
        with builder.if_else(fits, likely=True) as (quick, slow):
            with quick:
                builder.store(emit(exact=False), place)
            with slow:
                builder.store(emit(exact=True), place)
        return builder.load(place)

    return result(start, index), generate
