"""The seals of the vector tiers: GMAC (SP 800-38D) over locked bytes, by itself or beside the loop that locks them.

The seal keys of a tensor are the raised powers H^16 to H^1 of its hash key (see `simd/ghash.py`) and the mask of its
tag. Each piece of a tensor gives a tag of its own: its hash times the power of H for the blocks behind it, and for the
first piece the block of lengths and the mask. The seal is the XOR of them, so pieces are hashed in any order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from deeplock_kernels.kernels.chains import round_keys
from deeplock_kernels.kernels.house import inlined
from deeplock_kernels.kernels.memory import make_sealed_list
from deeplock_kernels.kernels.signatures import SEAL_KEY_BYTES, SEAL_KEYS_BYTES, TAG_BYTES
from deeplock_kernels.simd.ghash import STEP, key_blocks, lengths, raised, turned
from deeplock_kernels.simd.vectors import copy, load, make_scratch, prefetch, splat, store, u8x16, u8x64

_FIRST_POWER = STEP - TAG_BYTES  # where H^1 lies
_MASK = STEP
_LONG = 4096  # bytes from which on it pays to align the steps
_AHEAD = 2048  # bytes between a load and the prefetch beside it


class Seal(NamedTuple):
    """What a loop does with the locked bytes of its steps of 256 bytes.

    `start() -> state`; for a whole step `begin(state, seal_keys) -> sums`, `absorb` of a `Hash` with the first three
    rows, and `pend(sums, row) -> state` with the fourth, which is hashed when the next step begins: what is computed
    just now is waited for less. For a part of a step `absorb_part(state, step, skip, taken, left, seal_keys) -> state`,
    where the part lies at step + skip and `left` are the bytes from its start on; a part that is not the last one is
    the first. And `finish(state, seal_keys) -> hash`.
    """

    start: Any
    begin: Any
    absorb: tuple[Any, ...]
    pend: Any
    absorb_part: Any
    finish: Any


@inlined
def _start_nothing():
    return 0


@inlined
def _begin_nothing(state, seal_keys):
    return state


@inlined
def _absorb_nothing(state, row, seal_keys):
    return state


@inlined
def _pend_nothing(state, row):
    return state


@inlined
def _absorb_no_part(state, step, skip, taken, left, seal_keys):
    return state


NO_SEAL = Seal(
    _start_nothing, _begin_nothing, (_absorb_nothing,) * 3, _pend_nothing, _absorb_no_part, _begin_nothing
)


def make_seal(tier: Any) -> Seal:
    """Make the seal of a tier.

    Its state is the sums and the last row of a step that is not ended, and where the last step was cut, the hash.
    """
    start, begin, (first, second, third), end, fold, last_step, _ = hashed = tier.hash_operations
    scratch = make_scratch(2 * STEP)

    @inlined
    def start_seal():
        nothing = start()
        return (nothing, nothing, nothing), splat(u8x64, 0), splat(u8x16, 0), False

    @inlined
    def begin_step(state, seal_keys):
        return begin(end(state[0], state[1], seal_keys), seal_keys)

    @inlined
    def pend(sums, row):
        return sums, row, splat(u8x16, 0), False

    @inlined
    def absorb_part(state, step, skip, taken, left, seal_keys):
        room = scratch()
        for i in range(0, 2 * STEP, 64):
            store(room + i, splat(u8x64, 0))
        place = room + STEP
        copy(place + skip, step + skip, taken)
        if taken < left:  # the first step: the zeros before it change nothing
            sums = begin_step(state, seal_keys)
            sums = first(sums, load(u8x64, place), seal_keys)
            sums = second(sums, load(u8x64, place + 64), seal_keys)
            sums = third(sums, load(u8x64, place + 128), seal_keys)
            return pend(sums, load(u8x64, place + 192))
        # The last one: the hash of all before joins its first block, and zeros before them fill 256 bytes.
        store(place, load(u8x16, place) ^ turned(fold(end(state[0], state[1], seal_keys), seal_keys)))
        stop = (skip + taken + TAG_BYTES - 1) & -TAG_BYTES
        return state[0], state[1], last_step(room + stop, seal_keys), True

    @inlined
    def finish(state, seal_keys):
        if state[3]:
            return state[2]
        return fold(end(state[0], state[1], seal_keys), seal_keys)

    return Seal(start_seal, begin_step, hashed.absorb, pend, absorb_part, finish)


def make_publish(tier: Any) -> Any:
    """Make the function that writes the tag of a piece: `(hash, nbytes, offset, seal_keys, total, tag)`."""
    multiply = tier.hash_operations.multiply

    @inlined
    def publish(digest, nbytes, offset, seal_keys, total, tag):
        power = load(u8x16, seal_keys + _FIRST_POWER)
        behind = ((total + 15) >> 4) - ((offset + nbytes + 15) >> 4)
        doubled = power
        while behind > 0:
            if behind & 1:
                digest = multiply(digest, doubled)
            doubled = multiply(doubled, doubled)
            behind >>= 1
        if offset == 0:
            digest = digest ^ lengths(total)
        digest = turned(multiply(digest, power))
        if offset == 0:
            digest = digest ^ load(u8x16, seal_keys + _MASK)
        store(tag, digest)

    return publish


def make_seal_list(tier: Any) -> Any:
    """Make the kernel that hashes the pieces of a list of records as they are."""
    seal, publish = make_seal(tier), make_publish(tier)
    begin, (first, second, third), pend = seal.begin, seal.absorb, seal.pend
    start, absorb_part, finish = seal.start, seal.absorb_part, seal.finish

    @inlined
    def row(address):
        prefetch(address + _AHEAD)
        return load(u8x64, address)

    @inlined
    def sealed(_target, source, nbytes, offset, _key, seal_keys, total, tag):
        state = start()
        at, left = source, nbytes
        skip = source & 240 if nbytes >= _LONG else 0
        if skip > 0:
            state = absorb_part(state, source - skip, skip, STEP - skip, left, seal_keys)
            at += STEP - skip
            left -= STEP - skip
        for _ in range(left >> 8):
            sums = begin(state, seal_keys)
            sums = first(sums, row(at), seal_keys)
            sums = second(sums, row(at + 64), seal_keys)
            sums = third(sums, row(at + 128), seal_keys)
            state = pend(sums, row(at + 192))
            at += STEP
        left &= STEP - 1
        if left > 0:
            state = absorb_part(state, at, 0, left, left, seal_keys)
        publish(finish(state, seal_keys), nbytes, offset, seal_keys, total, tag)

    return make_sealed_list(sealed)


def make_seal_keys(tier: Any, encrypt: Any) -> Any:
    """Make the kernel that makes the seal keys of a list of keys of 256 bits."""
    expand, multiply = round_keys(256, tier.aes_last_round), tier.hash_operations.multiply
    scratch = make_scratch(64)

    def seal_keys(target, source, count, rcon):
        part = scratch()
        for i in range(count):
            place = target + SEAL_KEYS_BYTES * i
            store(part, encrypt(key_blocks(), expand(source + SEAL_KEY_BYTES * i, rcon))[0])
            first = raised(load(u8x16, part))
            power = first
            store(place + _FIRST_POWER, power)
            for at in range(_FIRST_POWER - TAG_BYTES, -1, -TAG_BYTES):
                power = multiply(power, first)
                store(place + at, power)
            store(place + _MASK, load(u8x16, part + TAG_BYTES))

    return seal_keys
