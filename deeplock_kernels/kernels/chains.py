"""The expansion schedule's chain (FIPS 197 section 5.2) in vectors, one factory per key length.

A chain's state is a tuple of vectors, and each 16-byte block of a vector belongs to a chain of its own: u8x16 runs one
chain, u8x64 four side by side. In a round, w'[i] = w[0] ^ ... ^ w[i] ^ t with t = SubWord(RotWord(last word)) ^ Rcon.
The running XOR of the words does not wait for t, so a round takes no longer than the way to t: a shuffle that fills the
block with the rotated word (where AESENCLAST's ShiftRows changes nothing), AESENCLAST with Rcon as its key, and an XOR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from deeplock_kernels.kernels.house import inlined
from deeplock_kernels.simd.vectors import (
    concatenate,
    load,
    load_word,
    make_shuffle,
    store,
    store_half,
    u8x16,
    u8x64,
    zero_like,
)


class Chain(NamedTuple):
    """The pieces of a chain: how states lie in memory, and a step that runs `rounds` rounds.

    `step(state, rcon)` returns the next state and a tuple of groups of 4 vectors, the key stream in order.
    """

    rounds: int
    load_one: Any
    load_four: Any
    store_one: Any
    step: Any


up_one_word = make_shuffle([-1] * 4 + list(range(12)))
up_two_words = make_shuffle([-1] * 8 + list(range(8)))
low_half = make_shuffle([*range(8), *[-1] * 8])
high_half_down = make_shuffle([*range(8, 16), *[-1] * 8])
second_word_rotated = make_shuffle([5, 6, 7, 4] * 4)
fourth_word = make_shuffle([12, 13, 14, 15] * 4)
fourth_word_rotated = make_shuffle([13, 14, 15, 12] * 4)


@inlined
def running_xor(x):
    """Make word i of each block the XOR of its words 0 to i."""
    x = x ^ up_one_word(x)
    return x ^ up_two_words(x)


def _chain_128(last_round: Any) -> Chain:
    @inlined
    def load_one(states):
        return (load(u8x16, states),)

    @inlined
    def load_four(states):
        return (load(u8x64, states),)

    @inlined
    def store_one(states, state):
        store(states, state[0])

    @inlined
    def advance(x, rcon):
        return running_xor(x) ^ last_round(fourth_word_rotated(x), load_word(x, rcon))

    @inlined
    def step(state, rcon):
        a = advance(state[0], rcon)
        b = advance(a, rcon + 4)
        c = advance(b, rcon + 8)
        d = advance(c, rcon + 12)
        return (d,), ((a, b, c, d),)

    return Chain(4, load_one, load_four, store_one, step)


def _chain_192(last_round: Any) -> Chain:
    @inlined
    def load_one(states):
        return load(u8x16, states), high_half_down(load(u8x16, states + 8))

    @inlined
    def load_four(states):
        a, b = load_one(states)
        c, d = load_one(states + 24)
        e, f = load_one(states + 48)
        g, h = load_one(states + 72)
        return concatenate((a, c, e, g)), concatenate((b, d, f, h))

    @inlined
    def store_one(states, state):
        store(states, state[0])
        store_half(states + 16, state[1])

    @inlined
    def advance(a, b, rcon):
        """Run a round on words 0 to 3 in a and 4, 5 in the low half of b, whose high half stays zero."""
        a = running_xor(a) ^ last_round(second_word_rotated(b), load_word(a, rcon))
        return a, low_half(b ^ up_one_word(b) ^ fourth_word(a))

    @inlined
    def advance_twice(a, b, rcon):
        c, d = advance(a, b, rcon)
        e, f = advance(c, d, rcon + 4)
        return e, f, c, d ^ up_two_words(e), high_half_down(e) ^ up_two_words(f)

    @inlined
    def step(state, rcon):
        a, b, r0, r1, r2 = advance_twice(state[0], state[1], rcon)
        a, b, r3, r4, r5 = advance_twice(a, b, rcon + 8)
        a, b, r6, r7, r8 = advance_twice(a, b, rcon + 16)
        a, b, r9, r10, r11 = advance_twice(a, b, rcon + 24)
        return (a, b), ((r0, r1, r2, r3), (r4, r5, r6, r7), (r8, r9, r10, r11))

    return Chain(8, load_one, load_four, store_one, step)


def _chain_256(last_round: Any) -> Chain:
    @inlined
    def load_one(states):
        return load(u8x16, states), load(u8x16, states + 16)

    @inlined
    def load_four(states):
        a, b = load_one(states)
        c, d = load_one(states + 32)
        e, f = load_one(states + 64)
        g, h = load_one(states + 96)
        return concatenate((a, c, e, g)), concatenate((b, d, f, h))

    @inlined
    def store_one(states, state):
        store(states, state[0])
        store(states + 16, state[1])

    @inlined
    def advance(a, b, rcon):
        a = running_xor(a) ^ last_round(fourth_word_rotated(b), load_word(a, rcon))
        return a, running_xor(b) ^ last_round(fourth_word(a), zero_like(a))

    @inlined
    def step(state, rcon):
        a, b = advance(state[0], state[1], rcon)
        c, d = advance(a, b, rcon + 4)
        return (c, d), ((a, b, c, d),)

    return Chain(2, load_one, load_four, store_one, step)


CHAINS: dict[int, Callable[[Any], Chain]] = {128: _chain_128, 192: _chain_192, 256: _chain_256}
