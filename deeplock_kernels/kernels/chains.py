"""The expansion schedule's chain (FIPS 197 section 5.2) in vectors: a `Chain` and a `BareChain` per key length.

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
    make_load_blocks,
    make_shuffle,
    store_word,
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
    def advance(x, rcon):
        return running_xor(x) ^ last_round(fourth_word_rotated(x), load_word(x, rcon))

    @inlined
    def step(state, rcon):
        a = advance(state[0], rcon)
        b = advance(a, rcon + 4)
        c = advance(b, rcon + 8)
        d = advance(c, rcon + 12)
        return (d,), ((a, b, c, d),)

    return Chain(4, load_one, load_four, step)


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

    return Chain(8, load_one, load_four, step)


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
    def advance(a, b, rcon):
        a = running_xor(a) ^ last_round(fourth_word_rotated(b), load_word(a, rcon))
        return a, running_xor(b) ^ last_round(fourth_word(a), zero_like(a))

    @inlined
    def step(state, rcon):
        a, b = advance(state[0], state[1], rcon)
        c, d = advance(a, b, rcon + 4)
        return (c, d), ((a, b, c, d),)

    return Chain(2, load_one, load_four, step)


def round_keys(bits: int, last_round: Any) -> Any:
    """Make the function `(key, rcon) -> AES's round keys`, each repeated over a u8x64, for the key at an address.

    The round keys are the key and then the chain's key stream, cut into blocks.
    """
    step = CHAINS[bits](last_round).step
    load_first, load_second = make_load_blocks(1), make_load_blocks(2)

    @inlined
    def expand_128(key, rcon):
        (k,) = load_first(key)
        state, ((k1, k2, k3, k4),) = step((k,), rcon)
        state, ((k5, k6, k7, k8),) = step(state, rcon + 16)
        _, ((k9, k10, _, _),) = step(state, rcon + 32)
        return k, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10

    @inlined
    def straddling(a, b):
        return high_half_down(a) ^ up_two_words(b)

    @inlined
    def expand_192(key, rcon):
        (k,) = load_first(key)
        (last,) = load_first(key + 8)
        _, ((a, b, c, d), (e, f, g, h), (i, j, m, n)) = step((k, high_half_down(last)), rcon)
        return (
            k,
            straddling(last, a),
            straddling(a, b),
            straddling(b, c),
            straddling(c, d),
            straddling(d, e),
            straddling(e, f),
            straddling(f, g),
            straddling(g, h),
            straddling(h, i),
            straddling(i, j),
            straddling(j, m),
            straddling(m, n),
        )

    @inlined
    def expand_256(key, rcon):
        k, k1 = load_second(key)
        state, ((k2, k3, k4, k5),) = step((k, k1), rcon)
        state, ((k6, k7, k8, k9),) = step(state, rcon + 8)
        state, ((k10, k11, k12, k13),) = step(state, rcon + 16)
        _, ((k14, _, _, _),) = step(state, rcon + 24)
        return k, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14

    return {128: expand_128, 192: expand_192, 256: expand_256}[bits]


class BareChain(NamedTuple):
    """A chain that only goes from one saved state to a later one, without its key stream.

    The last word W of each round follows from earlier last words alone: for 4 words W' = W[-3] ^ t(W), where
    W[-3] is the one of three rounds before W (G. Leurent and C. Pernot, "New Representations of the AES Key
    Schedule", EUROCRYPT 2021, build on the same independence). A vector holds such a word four times, rotated
    right once more in each round, so that RotWord costs nothing: a round is one AESENCLAST, whose key was ready
    long before. `step` runs 4 rounds.
    """

    load: Any
    step: Any
    store: Any


rotated_once = make_shuffle([i - i % 4 + (i - 1) % 4 for i in range(16)])
rotated_twice = make_shuffle([i - i % 4 + (i - 2) % 4 for i in range(16)])
rotated_thrice = make_shuffle([i - i % 4 + (i - 3) % 4 for i in range(16)])


@inlined
def load_words(states):
    """Load four words, each repeated over a vector."""
    like = load(u8x16, states)
    return (
        load_word(like, states),
        load_word(like, states + 4),
        load_word(like, states + 8),
        load_word(like, states + 12),
    )


@inlined
def last_words(states):
    """Give the last words of the rounds before, the oldest first, of a part of 4 words of the state."""
    a, b, c, d = load_words(states)
    return rotated_once(a ^ b ^ c ^ d), rotated_twice(b ^ d), rotated_thrice(c ^ d), d


@inlined
def store_words(states, a, b, c, d):
    """Store the part of the state that `last_words` gives these for."""
    a, b, c = rotated_thrice(a), rotated_twice(b), rotated_once(c)
    store_word(states, a ^ b ^ c ^ d)
    store_word(states + 4, b ^ d)
    store_word(states + 8, c ^ d)
    store_word(states + 12, d)


def _bare_chain_128(last_round: Any) -> BareChain:
    @inlined
    def step(state, rcon):
        a, b, c, d = state
        a = last_round(d, a ^ load_word(a, rcon - 1))
        b = last_round(a, b ^ load_word(a, rcon + 4 - 2))
        c = last_round(b, c ^ load_word(a, rcon + 8 - 3))
        d = last_round(c, d ^ load_word(a, rcon + 12))
        return a, b, c, d

    @inlined
    def store_state(states, state):
        store_words(states, state[0], state[1], state[2], state[3])

    return BareChain(last_words, step, store_state)


def _bare_chain_192(last_round: Any) -> BareChain:
    @inlined
    def load_state(states):
        w0, w1, w2, w3 = load_words(states)
        _, _, w4, w5 = load_words(states + 8)
        return (
            rotated_thrice(w0 ^ w1 ^ w4 ^ w5),
            w1 ^ w5,
            rotated_once(w2 ^ w3 ^ w4 ^ w5),
            rotated_twice(w3 ^ w5),
            rotated_thrice(w4 ^ w5),
            w5,
        )

    @inlined
    def advance(oldest, third, second, newest, rcon):
        """Give the next last word from those of 5, 3, 1 and 0 rounds before."""
        return last_round(newest, third ^ rotated_twice(oldest ^ second) ^ load_word(newest, rcon))

    @inlined
    def step(state, rcon):
        a, b, c, d, e, f = state
        g = advance(a, c, e, f, rcon - 1)
        h = advance(b, d, f, g, rcon + 4 - 2)
        i = advance(c, e, g, h, rcon + 8 - 3)
        j = advance(d, f, h, i, rcon + 12)
        return e, f, g, h, i, j

    @inlined
    def store_state(states, state):
        a, b, c, d, e, f = state
        a, c, d, e = rotated_once(a), rotated_thrice(c), rotated_twice(d), rotated_once(e)
        store_word(states, a ^ b ^ e ^ f)
        store_word(states + 4, b ^ f)
        store_word(states + 8, c ^ d ^ e ^ f)
        store_word(states + 12, d ^ f)
        store_word(states + 16, e ^ f)
        store_word(states + 20, f)

    return BareChain(load_state, step, store_state)


def _bare_chain_256(last_round: Any) -> BareChain:
    @inlined
    def load_state(states):
        a, b, c, d = last_words(states)
        e, f, g, h = last_words(states + 16)
        return a, b, c, d, e, f, g, h

    @inlined
    def step(state, rcon):
        a, b, c, d, e, f, g, h = state
        a = last_round(h, a ^ load_word(a, rcon - 1))
        e = last_round(a, e)
        b = last_round(e, b ^ load_word(a, rcon + 4 - 2))
        f = last_round(b, f)
        c = last_round(f, c ^ load_word(a, rcon + 8 - 3))
        g = last_round(c, g)
        d = last_round(g, d ^ load_word(a, rcon + 12))
        h = last_round(d, h)
        return a, b, c, d, e, f, g, h

    @inlined
    def store_state(states, state):
        store_words(states, state[0], state[1], state[2], state[3])
        store_words(states + 16, state[4], state[5], state[6], state[7])

    return BareChain(load_state, step, store_state)


BARE_CHAINS: dict[int, Callable[[Any], BareChain]] = {
    128: _bare_chain_128,
    192: _bare_chain_192,
    256: _bare_chain_256,
}
CHAINS: dict[int, Callable[[Any], Chain]] = {128: _chain_128, 192: _chain_192, 256: _chain_256}
