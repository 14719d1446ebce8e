"""The portable tier: plain Python over bytes and 32-bit words, which runs wherever Numba does, or without it.

It looks bytes up in tables (FIPS 197 section 5.1 with the round's steps merged into four tables of words), so its time
depends on the data through the cache: it is the only tier that is not constant-time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deeplock_kernels.kernels.house import inlined
from deeplock_kernels.kernels.memory import (
    make_counter_list,
    make_masked_list,
    make_rekey_list,
    make_scratch,
    make_sealed_list,
    read_byte,
    read_quad,
    write_byte,
    write_quad,
)
from deeplock_kernels.kernels.signatures import (
    RCON_PERIOD,
    SEAL_KEY_BYTES,
    SEAL_KEYS_BYTES,
    SEGMENT_ROUNDS,
    SEGMENTS_PER_GROUP,
    KernelName,
    segment_bytes,
)
from deeplock_kernels.sboxes import AES

FORMS = {"identity": None, "table": None}


def _round_tables() -> tuple[Any, ...]:
    substituted = np.frombuffer(AES.table, np.uint8).astype(np.int64)
    doubled = (substituted << 1) ^ np.where(substituted & 0x80, 0x11B, 0)
    first = (doubled << 24) | (substituted << 16) | (substituted << 8) | (doubled ^ substituted)
    return substituted, *(((first >> n) | (first << (32 - n))) & 0xFFFFFFFF for n in (0, 8, 16, 24))


SUBSTITUTED, ROUND_0, ROUND_1, ROUND_2, ROUND_3 = _round_tables()


@inlined
def load_word(address):
    """Read a word, most significant byte first."""
    return (
        (read_byte(address) << 24)
        | (read_byte(address + 1) << 16)
        | (read_byte(address + 2) << 8)
        | read_byte(address + 3)
    )


@inlined
def write_word(address, w):
    """Write a word, most significant byte first."""
    for i in range(4):
        write_byte(address + i, (w >> (24 - 8 * i)) & 255)


@inlined
def substitute_word(w):
    """FIPS 197 SubWord."""
    return (
        (SUBSTITUTED[(w >> 24) & 255] << 24)
        | (SUBSTITUTED[(w >> 16) & 255] << 16)
        | (SUBSTITUTED[(w >> 8) & 255] << 8)
        | SUBSTITUTED[w & 255]
    )


@inlined
def rotate_word(w):
    """FIPS 197 RotWord."""
    return ((w << 8) | (w >> 24)) & 0xFFFFFFFF


@inlined
def round_word(a, b, c, d):
    """SubBytes, ShiftRows and MixColumns for one column, which takes a byte from each of four words."""
    return ROUND_0[(a >> 24) & 255] ^ ROUND_1[(b >> 16) & 255] ^ ROUND_2[(c >> 8) & 255] ^ ROUND_3[d & 255]


@inlined
def last_word(a, b, c, d):
    """SubBytes and ShiftRows for one column."""
    return (
        (SUBSTITUTED[(a >> 24) & 255] << 24)
        | (SUBSTITUTED[(b >> 16) & 255] << 16)
        | (SUBSTITUTED[(c >> 8) & 255] << 8)
        | SUBSTITUTED[d & 255]
    )


@inlined
def encrypt(a, b, c, d, cipher, rounds):
    """Encrypt one block given as four words, with the round keys in `cipher`."""
    a ^= load_word(cipher)
    b ^= load_word(cipher + 4)
    c ^= load_word(cipher + 8)
    d ^= load_word(cipher + 12)
    for i in range(16, 16 * rounds, 16):
        e = round_word(a, b, c, d) ^ load_word(cipher + i)
        f = round_word(b, c, d, a) ^ load_word(cipher + i + 4)
        g = round_word(c, d, a, b) ^ load_word(cipher + i + 8)
        h = round_word(d, a, b, c) ^ load_word(cipher + i + 12)
        a, b, c, d = e, f, g, h
    i = 16 * rounds
    return (
        last_word(a, b, c, d) ^ load_word(cipher + i),
        last_word(b, c, d, a) ^ load_word(cipher + i + 4),
        last_word(c, d, a, b) ^ load_word(cipher + i + 8),
        last_word(d, a, b, c) ^ load_word(cipher + i + 12),
    )


@inlined
def advance_128(w, rcon):
    """Run one round of the expansion on a tuple of words (FIPS 197 section 5.2)."""
    a = w[0] ^ substitute_word(rotate_word(w[3])) ^ (rcon << 24)
    b = w[1] ^ a
    c = w[2] ^ b
    return a, b, c, w[3] ^ c


@inlined
def advance_192(w, rcon):
    """Run one round of the expansion for a key of 6 words."""
    a = w[0] ^ substitute_word(rotate_word(w[5])) ^ (rcon << 24)
    b = w[1] ^ a
    c = w[2] ^ b
    d = w[3] ^ c
    e = w[4] ^ d
    return a, b, c, d, e, w[5] ^ e


@inlined
def advance_256(w, rcon):
    """Run one round of the expansion for a key of 8 words, with its second SubWord."""
    a = w[0] ^ substitute_word(rotate_word(w[7])) ^ (rcon << 24)
    b = w[1] ^ a
    c = w[2] ^ b
    d = w[3] ^ c
    e = w[4] ^ substitute_word(d)
    f = w[5] ^ e
    g = w[6] ^ f
    return a, b, c, d, e, f, g, w[7] ^ g


@inlined
def load_state_128(states):
    """Read a chain's state of 4 words."""
    return load_word(states), load_word(states + 4), load_word(states + 8), load_word(states + 12)


@inlined
def load_state_192(states):
    """Read a chain's state of 6 words."""
    a, b, c, d = load_state_128(states)
    return a, b, c, d, load_word(states + 16), load_word(states + 20)


@inlined
def load_state_256(states):
    """Read a chain's state of 8 words."""
    a, b, c, d = load_state_128(states)
    e, f, g, h = load_state_128(states + 16)
    return a, b, c, d, e, f, g, h


CHAINS = {
    128: (load_state_128, advance_128),
    192: (load_state_192, advance_192),
    256: (load_state_256, advance_256),
}


def build(_tier: Any, name: KernelName) -> Any:
    """Give the Python function of a kernel, ready to be compiled or run."""
    return _BUILDERS[name.operation](name)


def _change(name: KernelName) -> Any:
    """Make the function that locks or unlocks one byte with one byte of key stream."""

    @inlined
    def lock(value, key, box):
        return read_byte(box + (value ^ key))

    @inlined
    def unlock(value, key, box):
        return read_byte(box + value) ^ key

    @inlined
    def mask(value, key, box):
        return value ^ key

    return mask if name.form == "identity" else {"lock": lock, "unlock": unlock}[name.direction]


def _put(name: KernelName) -> Any:
    """Make the function that changes the bytes under a word of key stream, where 0 <= position < nbytes."""
    change = _change(name)

    @inlined
    def put(target, source, position, nbytes, word, box):
        for shift in (24, 16, 8, 0):
            if 0 <= position < nbytes:
                write_byte(
                    target + position, change(read_byte(source + position), (word >> shift) & 255, box)
                )
            position += 1

    return put


def _counter(name: KernelName) -> Any:
    put = _put(name)
    load_state, advance = CHAINS[name.bits]
    rounds, key_bytes = name.bits // 32 + 6, name.bits // 8
    expanded = 16 * (rounds + 1)
    scratch = make_scratch(expanded + key_bytes)

    def counter(target, source, nbytes, offset, key, rcon, box):
        cipher = scratch()
        words = load_state(key)
        for done in range(0, expanded, key_bytes):
            for i in range(len(words)):
                write_word(cipher + done + 4 * i, words[i])
            words = advance(words, read_byte(rcon + done // key_bytes * 4))
        start = key + key_bytes
        block, position = offset >> 4, -(offset & 15)
        while position < nbytes:
            d = load_word(start + 12) + (block & 0xFFFFFFFF)
            c = load_word(start + 8) + (block >> 32) + (d >> 32)
            b = load_word(start + 4) + (c >> 32)
            a = load_word(start) + (b >> 32)
            a, b, c, d = encrypt(
                a & 0xFFFFFFFF, b & 0xFFFFFFFF, c & 0xFFFFFFFF, d & 0xFFFFFFFF, cipher, rounds
            )
            put(target, source, position, nbytes, a, box)
            put(target, source, position + 4, nbytes, b, box)
            put(target, source, position + 8, nbytes, c, box)
            put(target, source, position + 12, nbytes, d, box)
            block += 1
            position += 16

    return counter


def _counter_list(name: KernelName) -> Any:
    return make_counter_list(inlined(_counter(name)))


_ENTRIES = 256
_TABLE = 16 * _ENTRIES


def _reductions() -> Any:
    """Give what each byte adds at the top when it is shifted out at the bottom (SP 800-38D section 6.3)."""
    found = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0xE100 if value & 1 else 0)
        found.append(value)
    return np.array(found)


REDUCTIONS = _reductions()


@inlined
def load_half(address):
    """Read 64 bits, most significant byte first."""
    return (load_word(address) << 32) | load_word(address + 4)


@inlined
def write_half(address, half):
    """Write 64 bits, most significant byte first."""
    write_word(address, (half >> 32) & 0xFFFFFFFF)
    write_word(address + 4, half & 0xFFFFFFFF)


@inlined
def shift_byte(high, low):
    """Multiply a block by x^8."""
    lost = int(REDUCTIONS[low & 255])
    low = ((low >> 8) & 0xFFFFFFFFFFFFFF) | ((high & 255) << 56)
    return ((high >> 8) & 0xFFFFFFFFFFFFFF) ^ (lost << 48), low


@inlined
def multiply_by_table(high, low, table):
    """Multiply a block by the one whose table of multiples this is, byte by byte (V. Shoup's method)."""
    product_high, product_low = 0, 0
    for half in (low, high):
        for shift in range(0, 64, 8):
            product_high, product_low = shift_byte(product_high, product_low)
            entry = table + 16 * ((half >> shift) & 255)
            product_high ^= read_quad(entry)
            product_low ^= read_quad(entry + 8)
    return product_high, product_low


@inlined
def fill_table(table, high, low):
    """Write the multiples of a block by each byte, whose top bit is the coefficient of x^0."""
    write_quad(table, 0)
    write_quad(table + 8, 0)
    bit = 128
    while bit > 0:
        write_quad(table + 16 * bit, high)
        write_quad(table + 16 * bit + 8, low)
        for other in range(bit + bit, _ENTRIES, bit + bit):
            write_quad(table + 16 * (other + bit), read_quad(table + 16 * other) ^ high)
            write_quad(table + 16 * (other + bit) + 8, read_quad(table + 16 * other + 8) ^ low)
        carry = low & 1
        low = ((low >> 1) & 0x7FFFFFFFFFFFFFFF) | ((high & 1) << 63)
        high = ((high >> 1) & 0x7FFFFFFFFFFFFFFF) ^ (carry * 0xE1 << 56)
        bit >>= 1


@inlined
def absorb(high, low, source, nbytes, table):
    """Go on with a hash over bytes, with zeros behind them up to a whole block (GHASH, SP 800-38D section 6.4)."""
    for i in range(0, nbytes, 16):
        if nbytes - i >= 16:
            high ^= load_half(source + i)
            low ^= load_half(source + i + 8)
        else:
            for j in range(nbytes - i):
                value = read_byte(source + i + j) << (56 - 8 * (j & 7))
                if j < 8:
                    high ^= value
                else:
                    low ^= value
        high, low = multiply_by_table(high, low, table)
    return high, low


@inlined
def multiply(a_high, a_low, b_high, b_low):
    """Multiply two blocks bit by bit (SP 800-38D section 6.3)."""
    high, low = 0, 0
    for i in range(128):
        half = a_high if i < 64 else a_low
        if (half >> (63 - (i & 63))) & 1:
            high ^= b_high
            low ^= b_low
        carry = b_low & 1
        b_low = ((b_low >> 1) & 0x7FFFFFFFFFFFFFFF) | ((b_high & 1) << 63)
        b_high = ((b_high >> 1) & 0x7FFFFFFFFFFFFFFF) ^ (carry * 0xE1 << 56)
    return high, low


@inlined
def publish(high, low, nbytes, offset, seal_keys, total, tag):
    """Write the tag of a piece; see `kernels/seals.py`."""
    behind = ((total + 15) >> 4) - ((offset + nbytes + 15) >> 4)
    key_high, key_low = load_half(seal_keys), load_half(seal_keys + 8)
    power_high, power_low = key_high, key_low
    while behind > 0:
        if behind & 1:
            high, low = multiply(high, low, power_high, power_low)
        power_high, power_low = multiply(power_high, power_low, power_high, power_low)
        behind >>= 1
    if offset == 0:
        high ^= total << 3
    high, low = multiply(high, low, key_high, key_low)
    if offset == 0:
        high ^= load_half(seal_keys + 16)
        low ^= load_half(seal_keys + 24)
    write_half(tag, high)
    write_half(tag + 8, low)


def _seal(_name: KernelName) -> Any:
    scratch = make_scratch(_TABLE)

    @inlined
    def sealed(_target, source, nbytes, offset, _key, seal_keys, total, tag):
        table = scratch()
        fill_table(table, load_half(seal_keys), load_half(seal_keys + 8))
        high, low = absorb(0, 0, source, nbytes, table)
        publish(high, low, nbytes, offset, seal_keys, total, tag)

    return make_sealed_list(sealed)


def _change_again(name: KernelName) -> Any:
    """Make the function that rekeys one byte with both key bytes, XORed."""
    identity = name.form == "identity"

    @inlined
    def change_again(value, mask, box, inverse_box):
        if identity:
            return value ^ mask
        return read_byte(box + (read_byte(inverse_box + value) ^ mask))

    return change_again


def _rekey_masked(name: KernelName) -> Any:
    change_again = _change_again(name)

    @inlined
    def rekey_masked(target, source, nbytes, mask, box, inverse_box):
        for i in range(nbytes):
            value = change_again(read_byte(source + i), read_byte(mask + i), box, inverse_box)
            write_byte(target + i, value)

    return make_masked_list(rekey_masked)


def _rekey(name: KernelName) -> Any:
    stream = inlined(_counter(KernelName("counter", name.bits, "identity")))
    change_again, scratch, mask_scratch = _change_again(name), make_scratch(_TABLE), make_scratch(_CHUNK)

    @inlined
    def rekey(target, source, nbytes, offset, key, seal_keys, total, tag, new_key, rcon, box, inverse_box):
        table, mask = scratch(), mask_scratch()
        fill_table(table, load_half(seal_keys), load_half(seal_keys + 8))
        high, low = 0, 0
        for i in range(0, nbytes, _CHUNK):
            length = min(_CHUNK, nbytes - i)
            for j in range(length):
                write_byte(mask + j, 0)
            stream(mask, mask, length, offset + i, key, rcon, 0)
            stream(mask, mask, length, offset + i, new_key, rcon, 0)
            for j in range(length):
                value = change_again(read_byte(source + i + j), read_byte(mask + j), box, inverse_box)
                write_byte(target + i + j, value)
            high, low = absorb(high, low, target + i, length, table)
        publish(high, low, nbytes, offset, seal_keys, total, tag)

    return make_rekey_list(rekey)


_CHUNK = 4096  # bytes that stay in the cache between locking and hashing them


def _counter_sealed(name: KernelName) -> Any:
    counter, scratch = inlined(_counter(name)), make_scratch(_TABLE)
    unlocks = name.direction == "unlock"

    @inlined
    def sealed(target, source, nbytes, offset, key, seal_keys, total, tag, rcon, box):
        table = scratch()
        fill_table(table, load_half(seal_keys), load_half(seal_keys + 8))
        high, low = 0, 0
        for i in range(0, nbytes, _CHUNK):
            length = min(_CHUNK, nbytes - i)
            if unlocks:
                high, low = absorb(high, low, source + i, length, table)
            counter(target + i, source + i, length, offset + i, key, rcon, box)
            if not unlocks:
                high, low = absorb(high, low, target + i, length, table)
        publish(high, low, nbytes, offset, seal_keys, total, tag)

    return make_sealed_list(sealed)


def _seal_keys(_name: KernelName) -> Any:
    counter = inlined(_counter(KernelName("counter", 256, "identity")))
    scratch = make_scratch(SEAL_KEY_BYTES + 16)

    def seal_keys(target, source, count, rcon):
        # The hash key and the mask are the key stream's first two blocks with a counter that starts at zero.
        key = scratch()
        for i in range(count):
            for j in range(SEAL_KEY_BYTES):
                write_byte(key + j, read_byte(source + SEAL_KEY_BYTES * i + j))
            write_quad(key + SEAL_KEY_BYTES, 0)
            write_quad(key + SEAL_KEY_BYTES + 8, 0)
            place = target + SEAL_KEYS_BYTES * i
            for j in range(0, 32, 8):
                write_quad(place + j, 0)
            counter(place, place, 32, 0, key, rcon, 0)

    return seal_keys


def _expansion(name: KernelName) -> Any:
    put = _put(name)
    load_state, advance = CHAINS[name.bits]
    round_bytes = name.bits // 8

    def expansion(target, source, nbytes, offset, states, rcon, box):
        words = load_state(states)
        position, doubling = -offset, 0
        while position < nbytes:
            words = advance(words, read_byte(rcon + 4 * doubling))
            doubling = doubling + 1 if doubling < RCON_PERIOD - 1 else 0
            if position > -round_bytes:
                for i in range(len(words)):
                    put(target, source, position + 4 * i, nbytes, words[i], box)
            position += round_bytes

    return expansion


def _expansion_indexed(name: KernelName) -> Any:
    expansion = inlined(_expansion(name))
    segment, state_bytes = segment_bytes(name.bits), name.bits // 8

    def expansion_indexed(target, source, groups, states, rcon, box):
        for i in range(groups * SEGMENTS_PER_GROUP):
            expansion(
                target + i * segment, source + i * segment, segment, 0, states + i * state_bytes, rcon, box
            )

    return expansion_indexed


def _expansion_chain(name: KernelName) -> Any:
    load_state, advance = CHAINS[name.bits]
    state_bytes = name.bits // 8

    def expansion_chain(states, segments, rcon):
        words = load_state(states)
        for _ in range(segments):
            for i in range(SEGMENT_ROUNDS):
                words = advance(words, read_byte(rcon + 4 * (i % RCON_PERIOD)))
            states += state_bytes
            for i in range(len(words)):
                write_word(states + 4 * i, words[i])

    return expansion_chain


def _substitute(name: KernelName) -> Any:
    identity = name.form == "identity"

    def substitute(target, source, nbytes, box):
        for i in range(nbytes):
            value = read_byte(source + i)
            write_byte(target + i, value if identity else read_byte(box + value))

    return substitute


def _xor(_name: KernelName) -> Any:
    def xor(target, nbytes, value):
        key = value * 0x0101010101010101
        for i in range(0, nbytes - 7, 8):
            write_quad(target + i, read_quad(target + i) ^ key)

    return xor


def _xor_sum(_name: KernelName) -> Any:
    def xor_sum(target, source, nbytes):
        for place in range(0, 64, 8):
            total = 0
            for i in range(place, nbytes - 63 + place, 64):
                total ^= read_quad(source + i)
            write_quad(target + place, total)

    return xor_sum


def _copy(_name: KernelName) -> Any:
    def copy(target, source, nbytes):
        for i in range(0, nbytes - 7, 8):
            write_quad(target + i, read_quad(source + i))

    return copy


_BUILDERS = {
    "counter": _counter,
    "counter_list": _counter_list,
    "counter_past_cache": _counter,
    "counter_sealed": _counter_sealed,
    "rekey": _rekey,
    "rekey_masked": _rekey_masked,
    "seal": _seal,
    "seal_keys": _seal_keys,
    "expansion": _expansion,
    "expansion_chain": _expansion_chain,
    "expansion_indexed": _expansion_indexed,
    "substitute": _substitute,
    "copy_past_cache": _copy,
    "xor": _xor,
    "xor_sum": _xor_sum,
}
