"""The loops of the vector tiers, written once over a tier's primitives.

A tier is a module with `aes_stages`, functions (blocks, round_keys) that encrypt in turn, `aes_last_round(state,
round_key)`, and `FORMS`: for each form of S-Box that it has, a pair of functions `load(address) -> parameters` and
`apply(x, parameters) -> x`.

Each loop goes through memory once, in steps of whole blocks. A step that is not whole (the first one, the last one)
goes through a scratch copy. Within a step each vector is loaded, changed and stored before the next one is loaded:
in memory that order is up to twice as fast as loading all of them first. The key stream of the next step is encrypted
in between, so that the units which AES leaves free find work: a table look-up takes up to a fifth less time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from deeplock_kernels.kernels.chains import BARE_CHAINS, CHAINS, round_keys
from deeplock_kernels.kernels.house import inlined
from deeplock_kernels.kernels.memory import (
    make_counter_list,
    make_masked_list,
    make_rekey_list,
    make_sealed_list,
)
from deeplock_kernels.kernels.seals import (
    NO_SEAL,
    Seal,
    make_publish,
    make_seal,
    make_seal_keys,
    make_seal_list,
)
from deeplock_kernels.kernels.signatures import (
    INVERSE_FORMS,
    RCON_PERIOD,
    SEGMENT_ROUNDS,
    SEGMENTS_PER_GROUP,
    KernelName,
    segment_bytes,
)
from deeplock_kernels.simd.ghash import STEP
from deeplock_kernels.simd.vectors import (
    concatenate,
    copy,
    counter_blocks,
    fence,
    load,
    make_scratch,
    prefetch,
    splat,
    store,
    store_past_cache,
    transpose,
    u8x64,
    xor,
)

LONG = 4096  # bytes from which on it pays to align the steps: up to a fifth of the speed in memory
AHEAD = 2048  # bytes between a load and the prefetch beside it


def build(tier: Any, name: KernelName) -> Any:
    """Give the Python function of a kernel of a tier, ready to be compiled."""
    return _BUILDERS[name.operation](tier, name)


@inlined
def next_doubling(doubling, rounds):
    """Move on in Rcon's period."""
    doubling += rounds
    return doubling - RCON_PERIOD if doubling >= RCON_PERIOD else doubling


def _put(tier: Any, name: KernelName, store: Any = store) -> Any:
    """Make the function that locks or unlocks 64 bytes with 64 bytes of key stream, and gives the locked ones."""
    _, apply = tier.FORMS[name.form]

    @inlined
    def lock(target, source, stream, box):
        prefetch(source + AHEAD)
        locked = apply(load(u8x64, source) ^ stream, box)
        store(target, locked)
        return locked

    @inlined
    def unlock(target, source, stream, box):
        prefetch(source + AHEAD)
        locked = load(u8x64, source)
        store(target, apply(locked, box) ^ stream)
        return locked

    return {"lock": lock, "unlock": unlock}[name.direction]


def _encrypt(tier: Any) -> Any:
    """Make the function that encrypts a tuple of vectors of blocks."""
    first, second, third, fourth = tier.aes_stages

    @inlined
    def encrypt(blocks, keys):
        return fourth(third(second(first(blocks, keys), keys), keys), keys)

    return encrypt


class _Stream(NamedTuple):
    """Where a loop's key stream comes from, 256 bytes at a time, and what it does with it.

    `expand(key, new_key, rcon) -> keys`; `blocks(key, new_key, number) -> blocks`, which the four `stages`
    (blocks, keys) encrypt and `stream(blocks)` makes the key stream of. `load_boxes(box, inverse_box) -> box` and
    `put(target, source, stream, box) -> locked bytes` are for 64 bytes of it.
    """

    expand: Any
    blocks: Any
    stages: tuple[Any, ...]
    stream: Any
    load_boxes: Any
    put: Any


def _one_stream(tier: Any, name: KernelName) -> _Stream:
    """Lock or unlock with one key."""
    expand_key, key_bytes = round_keys(name.bits, tier.aes_last_round), name.bits // 8
    load_box = tier.FORMS[name.form][0]

    @inlined
    def expand(key, new_key, rcon):
        return expand_key(key, rcon)

    @inlined
    def blocks(key, new_key, number):
        return counter_blocks(key + key_bytes, number)

    @inlined
    def stream(encrypted):
        return encrypted

    @inlined
    def load_boxes(box, inverse_box):
        return load_box(box)

    return _Stream(expand, blocks, tier.aes_stages, stream, load_boxes, _put(tier, name))


def _two_streams(tier: Any, name: KernelName) -> _Stream:
    """Unlock with one key and lock with another; the plain bytes are in registers alone."""
    expand_key, key_bytes = round_keys(name.bits, tier.aes_last_round), name.bits // 8
    load_box, load_inverse = (tier.FORMS[form][0] for form in _forms_both_ways(name))

    @inlined
    def expand(key, new_key, rcon):
        return expand_key(key, rcon), expand_key(new_key, rcon)

    @inlined
    def blocks(key, new_key, number):
        return counter_blocks(key + key_bytes, number), counter_blocks(new_key + key_bytes, number)

    def twice(stage: Any) -> Any:
        @inlined
        def both(encrypted, keys):
            return stage(encrypted[0], keys[0]), stage(encrypted[1], keys[1])

        return both

    @inlined
    def stream(encrypted):
        return xor(encrypted[0], encrypted[1])

    @inlined
    def load_boxes(box, inverse_box):
        return load_box(box), load_inverse(inverse_box)

    stages = tuple(twice(stage) for stage in tier.aes_stages)
    return _Stream(expand, blocks, stages, stream, load_boxes, _put_again(tier, name))


def _forms_both_ways(name: KernelName) -> tuple[str, str]:
    return name.form, INVERSE_FORMS.get(name.form, name.form)


def _put_again(tier: Any, name: KernelName) -> Any:
    """Make the function that rekeys 64 bytes with both key streams, XORed."""
    apply, apply_inverse = (tier.FORMS[form][1] for form in _forms_both_ways(name))

    @inlined
    def put(target, source, stream, box):
        prefetch(source + AHEAD)
        locked = apply(apply_inverse(load(u8x64, source), box[1]) ^ stream, box[0])
        store(target, locked)
        return locked

    return put


def _counter_loop(name: KernelName, cipher: _Stream, seal: Seal) -> Any:
    """Make the loop of the counter schedule, which seals what it locks, or checks what it unlocks, as it goes by."""
    expand, blocks, (first, second, third, fourth), make_stream, load_boxes, put = cipher
    scratch = make_scratch(STEP)
    begin, (absorb, absorb_second, absorb_third), pend = seal.begin, seal.absorb, seal.pend
    start_seal, absorb_part, finish = seal.start, seal.absorb_part, seal.finish
    unlocks = name.direction == "unlock"

    @inlined
    def encrypt(plain, keys):
        return fourth(third(second(first(plain, keys), keys), keys), keys)

    @inlined
    def loop(target, source, nbytes, offset, key, new_key, rcon, box_address, inverse_box, seal_keys):
        keys = expand(key, new_key, rcon)
        box = load_boxes(box_address, inverse_box)
        part = scratch()
        state = start_seal()
        skip = offset & 15
        if nbytes >= LONG:
            skip |= target & 240  # the first step is cut so that the others lie on boundaries of 256 bytes
        block = (offset - skip) >> 4
        while nbytes > 0:
            stream = make_stream(encrypt(blocks(key, new_key, block), keys))
            if skip == 0:
                for _ in range(nbytes >> 8):
                    block += 16
                    sums = begin(state, seal_keys)
                    following = first(blocks(key, new_key, block), keys)
                    row = put(target, source, stream[0], box)
                    following = second(following, keys)
                    row_second = put(target + 64, source + 64, stream[1], box)
                    sums = absorb(sums, row, seal_keys)
                    following = third(following, keys)
                    row_third = put(target + 128, source + 128, stream[2], box)
                    sums = absorb_second(sums, row_second, seal_keys)
                    following = fourth(following, keys)
                    row_fourth = put(target + 192, source + 192, stream[3], box)
                    sums = absorb_third(sums, row_third, seal_keys)
                    state = pend(sums, row_fourth)
                    stream = make_stream(following)
                    target += STEP
                    source += STEP
                nbytes &= STEP - 1
            taken = min(STEP - skip, nbytes)
            if taken > 0:
                copy(part + skip, source, taken)
                if unlocks:
                    state = absorb_part(state, part, skip, taken, nbytes, seal_keys)
                put(part, part, stream[0], box)
                put(part + 64, part + 64, stream[1], box)
                put(part + 128, part + 128, stream[2], box)
                put(part + 192, part + 192, stream[3], box)
                if not unlocks:
                    state = absorb_part(state, part, skip, taken, nbytes, seal_keys)
                copy(target, part + skip, taken)
            skip = 0
            block += 16
            target += taken
            source += taken
            nbytes -= taken
        return finish(state, seal_keys)

    return loop


def _counter(tier: Any, name: KernelName) -> Any:
    loop = _counter_loop(name, _one_stream(tier, name), NO_SEAL)

    def counter(target, source, nbytes, offset, key, rcon, box):
        loop(target, source, nbytes, offset, key, key, rcon, box, box, 0)

    return counter


def _counter_past_cache(tier: Any, name: KernelName) -> Any:
    """Make the counter kernel for large separate buffers, which starts at a whole block and an aligned target."""
    counter, put = inlined(_counter(tier, name)), _put(tier, name, store_past_cache)
    encrypt, load_box = _encrypt(tier), tier.FORMS[name.form][0]
    expand = round_keys(name.bits, tier.aes_last_round)
    key_bytes = name.bits // 8

    def counter_past_cache(target, source, nbytes, offset, key, rcon, box_address):
        keys = expand(key, rcon)
        box = load_box(box_address)
        whole = nbytes & ~255
        for i in range(0, whole, 256):
            stream = encrypt(counter_blocks(key + key_bytes, (offset + i) >> 4), keys)
            put(target + i, source + i, stream[0], box)
            put(target + i + 64, source + i + 64, stream[1], box)
            put(target + i + 128, source + i + 128, stream[2], box)
            put(target + i + 192, source + i + 192, stream[3], box)
        fence()
        counter(target + whole, source + whole, nbytes - whole, offset + whole, key, rcon, box_address)

    return counter_past_cache


def _counter_list(tier: Any, name: KernelName) -> Any:
    return make_counter_list(inlined(_counter(tier, name)))


def _counter_sealed(tier: Any, name: KernelName) -> Any:
    loop, publish = _counter_loop(name, _one_stream(tier, name), make_seal(tier)), make_publish(tier)

    @inlined
    def counter_sealed(target, source, nbytes, offset, key, seal_keys, total, tag, rcon, box):
        digest = loop(target, source, nbytes, offset, key, key, rcon, box, box, seal_keys)
        publish(digest, nbytes, offset, seal_keys, total, tag)

    return make_sealed_list(counter_sealed)


def _rekey(tier: Any, name: KernelName) -> Any:
    loop, publish = _counter_loop(name, _two_streams(tier, name), make_seal(tier)), make_publish(tier)

    @inlined
    def rekey(target, source, nbytes, offset, key, seal_keys, total, tag, new_key, rcon, box, inverse_box):
        digest = loop(target, source, nbytes, offset, key, new_key, rcon, box, inverse_box, seal_keys)
        publish(digest, nbytes, offset, seal_keys, total, tag)

    return make_rekey_list(rekey)


def _rekey_masked(tier: Any, name: KernelName) -> Any:
    load_box, load_inverse = (tier.FORMS[form][0] for form in _forms_both_ways(name))
    put, scratch, mask_scratch = _put_again(tier, name), make_scratch(64), make_scratch(64)

    @inlined
    def rekey_masked(target, source, nbytes, mask, box_address, inverse_box):
        box = load_box(box_address), load_inverse(inverse_box)
        part, mask_part = scratch(), mask_scratch()
        whole = nbytes & ~63
        for i in range(0, whole, 64):
            put(target + i, source + i, load(u8x64, mask + i), box)
        left = nbytes - whole
        if left > 0:
            copy(part, source + whole, left)
            copy(mask_part, mask + whole, left)
            put(part, part, load(u8x64, mask_part), box)
            copy(target + whole, part, left)

    return make_masked_list(rekey_masked)


def _seal(tier: Any, _name: KernelName) -> Any:
    return make_seal_list(tier)


def _seal_keys(tier: Any, _name: KernelName) -> Any:
    return make_seal_keys(tier, _encrypt(tier))


def _expansion(tier: Any, name: KernelName) -> Any:
    put = _put(tier, name)
    load_box = tier.FORMS[name.form][0]
    chain = CHAINS[name.bits](tier.aes_last_round)
    load_state, step, rounds = chain.load_one, chain.step, chain.rounds
    quarters = rounds * name.bits // 512
    step_bytes = 64 * quarters
    scratch = make_scratch(step_bytes)

    def expansion(target, source, nbytes, offset, states, rcon, box_address):
        box = load_box(box_address)
        state = load_state(states)
        part = scratch()
        doubling = 0
        while nbytes > 0:
            state, rows = step(state, rcon + 4 * doubling)
            doubling = next_doubling(doubling, rounds)
            if offset >= step_bytes:
                offset -= step_bytes
                continue
            taken = min(step_bytes - offset, nbytes)
            t, s = target, source
            if taken < step_bytes:
                copy(part + offset, source, taken)
                t, s = part, part
            put(t, s, concatenate(rows[0]), box)
            if quarters == 3:
                put(t + 64, s + 64, concatenate(rows[1]), box)
                put(t + 128, s + 128, concatenate(rows[2]), box)
            if taken < step_bytes:
                copy(target, part + offset, taken)
                offset = 0
            target += taken
            source += taken
            nbytes -= taken

    return expansion


def _expansion_chain(tier: Any, name: KernelName) -> Any:
    load_state, step, store_state = BARE_CHAINS[name.bits](tier.aes_last_round)
    state_bytes = name.bits // 8
    rounds = 4
    steps = SEGMENT_ROUNDS // rounds

    def expansion_chain(states, segments, rcon):
        state = load_state(states)
        for _ in range(segments):
            doubling = 0
            for _ in range(steps):
                state = step(state, rcon + 4 * doubling)
                doubling = next_doubling(doubling, rounds)
            states += state_bytes
            store_state(states, state)

    return expansion_chain


def _expansion_indexed(tier: Any, name: KernelName) -> Any:
    put = _put(tier, name)
    load_box = tier.FORMS[name.form][0]
    chain = CHAINS[name.bits](tier.aes_last_round)
    load_states, step = chain.load_four, chain.step
    rounds, state_bytes = chain.rounds, name.bits // 8
    quarters = rounds * name.bits // 512
    steps = SEGMENT_ROUNDS // rounds
    segment = segment_bytes(name.bits)

    @inlined
    def put_four(target, source, rows, box):
        streams = transpose(rows)
        put(target, source, streams[0], box)
        put(target + segment, source + segment, streams[1], box)
        put(target + 2 * segment, source + 2 * segment, streams[2], box)
        put(target + 3 * segment, source + 3 * segment, streams[3], box)

    def expansion_indexed(target, source, groups, states, rcon, box_address):
        box = load_box(box_address)
        for _ in range(groups):
            state = load_states(states)
            states += SEGMENTS_PER_GROUP * state_bytes
            doubling = 0
            for _ in range(steps):
                state, rows = step(state, rcon + 4 * doubling)
                doubling = next_doubling(doubling, rounds)
                put_four(target, source, rows[0], box)
                if quarters == 3:
                    put_four(target + 64, source + 64, rows[1], box)
                    put_four(target + 128, source + 128, rows[2], box)
                target += 64 * quarters
                source += 64 * quarters
            target += (SEGMENTS_PER_GROUP - 1) * segment
            source += (SEGMENTS_PER_GROUP - 1) * segment

    return expansion_indexed


def _substitute(tier: Any, name: KernelName) -> Any:
    load_box, apply = tier.FORMS[name.form]
    scratch = make_scratch(64)

    def substitute(target, source, nbytes, box_address):
        box = load_box(box_address)
        part = scratch()
        while nbytes > 0:
            taken = min(64, nbytes)
            t, s = target, source
            if taken < 64:
                copy(part, source, taken)
                t, s = part, part
            prefetch(source + AHEAD)
            store(t, apply(load(u8x64, s), box))
            if taken < 64:
                copy(target, part, taken)
            target += taken
            source += taken
            nbytes -= taken

    return substitute


def _xor_in_place(_tier: Any, _name: KernelName) -> Any:
    """Make the measure of what memory allows: XOR a buffer in place with one byte, whole steps of 64 bytes only."""

    def xor_in_place(target, nbytes, value):
        key = splat(u8x64, value)
        for i in range(0, nbytes - 63, 64):
            prefetch(target + i + AHEAD)
            store(target + i, load(u8x64, target + i) ^ key)

    return xor_in_place


def _xor_sum(_tier: Any, _name: KernelName) -> Any:
    """Make the measure of what reading allows: the XOR of all 64-byte rows, whole ones only."""

    def xor_sum(target, source, nbytes):
        total = splat(u8x64, 0)
        for i in range(0, nbytes - 63, 64):
            prefetch(source + i + AHEAD)
            total = total ^ load(u8x64, source + i)
        store(target, total)

    return xor_sum


def _copy_past_cache(_tier: Any, _name: KernelName) -> Any:
    """Make the measure of what memory allows out of place: a copy to an aligned target, whole steps only."""

    def copy_past_cache(target, source, nbytes):
        for i in range(0, nbytes - 63, 64):
            prefetch(source + i + AHEAD)
            store_past_cache(target + i, load(u8x64, source + i))
        fence()

    return copy_past_cache


_BUILDERS = {
    "counter": _counter,
    "counter_list": _counter_list,
    "counter_past_cache": _counter_past_cache,
    "counter_sealed": _counter_sealed,
    "rekey": _rekey,
    "rekey_masked": _rekey_masked,
    "seal": _seal,
    "seal_keys": _seal_keys,
    "expansion": _expansion,
    "expansion_chain": _expansion_chain,
    "expansion_indexed": _expansion_indexed,
    "substitute": _substitute,
    "copy_past_cache": _copy_past_cache,
    "xor": _xor_in_place,
    "xor_sum": _xor_sum,
}
