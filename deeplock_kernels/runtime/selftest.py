"""The test that each kernel passes against the oracle before its first use in a process.

It takes a few milliseconds and fails closed: code that a broken cache, compiler or processor made wrong is not used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from hashlib import sha256

from deeplock_kernels import reference
from deeplock_kernels.errors import SelfTestError
from deeplock_kernels.kernels.signatures import (
    INVERSE_FORMS,
    RCON_START,
    RCON_WORDS,
    RECORDS,
    SEAL_KEYS_BYTES,
    SEGMENTS_PER_GROUP,
    TAG_BYTES,
    KernelName,
    segment_bytes,
)
from deeplock_kernels.runtime.forms import parameters
from deeplock_kernels.sboxes import AES, SBox

_KEY = bytes(range(1, 33))
_START = b"\xff" * 15 + b"\xf9"  # a counter that wraps within the test
_OFFSET, _NBYTES = 5, 300
_CUT = 272  # where a sealed tensor is cut in pieces
_SAMPLE = 200  # bytes of each segment that are compared

# SHA-256 of the state after the segment that starts with KEY[:16], KEY[:24], KEY[:32]: computed by the oracle.
CHAIN_DIGESTS = {
    128: "c5125bd848730e6e3da571490392713107f14b31dc93ab53eae56104e0bbf3d1",
    192: "3b7acee2c896c51788b6957c3a2b62fcb36a34a0842ad61f3747a8bc5da30c25",
    256: "e3212efc61dc9bc6434c529f81da042dac4a2846eabe883e531fec26cb672197",
}


Kernel = Callable[[bytes], None]


def check(tier: str, name: KernelName, function: Kernel, sibling: Callable[[KernelName], Kernel]) -> None:
    """Run a kernel on a known answer.

    Parameters
    ----------
    tier
        The name of its tier.
    name
        Its own name.
    function
        The kernel.
    sibling
        Gives another kernel of the tier, for one that reads what that one makes.

    Raises
    ------
    SelfTestError
        The answer is wrong.
    """
    if name.operation in _SEALING:
        passed = _SEALING[name.operation](name, _unpacked(name, function), _unpacked(_SEAL_KEYS, sibling(_SEAL_KEYS)))
    else:
        passed = _CHECKS[name.operation](name, _unpacked(name, function))
    if not passed:
        raise SelfTestError(
            f"kernel {tier}-{name}: got a wrong answer in its self-test, so it is not used; "
            "clear the cache directory, or use another tier"
        )


def _unpacked(name: KernelName, function: Kernel) -> Callable[..., None]:
    pack = RECORDS[name.operation].pack
    return lambda *arguments: function(pack(*arguments))


def _box(name: KernelName) -> tuple[bytes, bytes]:
    """Give the table that a kernel is tested with and its parameters."""
    unlocks = name.direction == "unlock"
    # One that is not its own inverse, where the form can express it: else locking could pass for unlocking.
    candidates = [AES.inverse if unlocks else AES, AES, AES.inverse, SBox(bytes(range(256)))]
    for box in candidates:
        data = parameters(box, name.form)
        if data is not None:
            return box.table, data
    raise AssertionError(name.form)


def _expected(name: KernelName, table: bytes, data: bytes, stream: bytes) -> bytes:
    if name.direction == "lock":
        return reference.lock(data, stream, table)
    # The kernel that unlocks is given the inverse table already.
    return bytes(table[c] ^ k for c, k in zip(data, stream, strict=True))


def _plain(nbytes: int) -> bytes:
    return (bytes(range(251)) * (nbytes // 251 + 1))[:nbytes]


def _check_counter(name: KernelName, function: Callable[..., None]) -> bool:
    key = _KEY[: name.bits // 8]
    both = key + _START
    table, box = _box(name)
    data = ctypes.create_string_buffer(_plain(_NBYTES))
    address = ctypes.addressof(data)
    function(
        address, address, _NBYTES, _OFFSET, _address(both), _RCON, _address(box)
    )
    stream = reference.counter_keystream(key, _START, _NBYTES, _OFFSET)
    return data.raw == _expected(name, table, _plain(_NBYTES), stream) + b"\0"


def _check_counter_list(name: KernelName, function: Callable[..., None]) -> bool:
    table, box = _box(name)
    length = name.bits // 8
    keys = [_KEY[:length] + _START, _KEY[-length:] + bytes(16)]
    data = ctypes.create_string_buffer(_plain(_NBYTES))
    address, half = ctypes.addressof(data), _NBYTES // 2
    records = (ctypes.c_int64 * 10)(
        *(address, address, half, _OFFSET, _address(keys[0])),
        *(address + half, address + half, half, 0, _address(keys[1])),
    )
    function(ctypes.addressof(records), 2, _RCON, _address(box))
    stream = reference.counter_keystream(keys[0][:length], _START, half, _OFFSET)
    stream += reference.counter_keystream(keys[1][:length], bytes(16), half)
    return data.raw == _expected(name, table, _plain(_NBYTES), stream) + b"\0"


def _check_counter_past_cache(name: KernelName, function: Callable[..., None]) -> bool:
    key = _KEY[: name.bits // 8]
    both = key + _START
    table, box = _box(name)
    room = ctypes.create_string_buffer(2 * 4096)
    plain = _plain(1000)
    target = ctypes.addressof(room) + -ctypes.addressof(room) % 64
    function(
        target, _address(plain), 1000, 16, _address(both), _RCON, _address(box)
    )
    stream = reference.counter_keystream(key, _START, 1000, 16)
    return ctypes.string_at(target, 1001) == _expected(name, table, plain, stream) + b"\0"


def _check_seal_keys(_name: KernelName, function: Callable[..., None]) -> bool:
    # What else they are made of shows when something is sealed with them.
    made = ctypes.create_string_buffer(2 * SEAL_KEYS_BYTES + 1)
    both = _KEY + _KEY[::-1]
    function(ctypes.addressof(made), _address(both), 2, _RCON)
    masks = [reference.encrypt_block(key, bytes(15) + b"\1") for key in (_KEY, _KEY[::-1])]
    return all(mask in made.raw[i * SEAL_KEYS_BYTES :] for i, mask in enumerate(masks)) and made.raw[-1] == 0


class _Sealed:
    """Records of two pieces of a sealed tensor, and their tags."""

    def __init__(self, seal_keys: Callable[..., None], address: int, key: int) -> None:
        self.keys = ctypes.create_string_buffer(SEAL_KEYS_BYTES)
        seal_keys(ctypes.addressof(self.keys), _address(_KEY), 1, _RCON)
        self.tags = ctypes.create_string_buffer(2 * TAG_BYTES)
        common, tag = (key, ctypes.addressof(self.keys), _NBYTES), ctypes.addressof(self.tags)
        self.records = (ctypes.c_int64 * 16)(
            *(address, address, _CUT, 0, *common, tag),
            *(address + _CUT, address + _CUT, _NBYTES - _CUT, _CUT, *common, tag + TAG_BYTES),
        )

    def seal(self) -> bytes:
        tags = self.tags.raw
        return bytes(a ^ b for a, b in zip(tags[:TAG_BYTES], tags[TAG_BYTES:], strict=True))


def _check_seal(_name: KernelName, function: Callable[..., None], seal_keys: Callable[..., None]) -> bool:
    data = _plain(_NBYTES)
    sealed = _Sealed(seal_keys, _address(data), 0)
    function(ctypes.addressof(sealed.records), 2)
    return sealed.seal() == reference.seal(_KEY, data)


def _check_counter_sealed(name: KernelName, function: Callable[..., None], seal_keys: Callable[..., None]) -> bool:
    key = _KEY[: name.bits // 8]
    both = key + _START
    table, box = _box(name)
    data = ctypes.create_string_buffer(_plain(_NBYTES))
    sealed = _Sealed(seal_keys, ctypes.addressof(data), _address(both))
    function(ctypes.addressof(sealed.records), 2, _RCON, _address(box))
    expected = _expected(name, table, _plain(_NBYTES), reference.counter_keystream(key, _START, _NBYTES))
    locked = expected if name.direction == "lock" else _plain(_NBYTES)
    return data.raw == expected + b"\0" and sealed.seal() == reference.seal(_KEY, locked)


def _boxes(name: KernelName) -> tuple[bytes, bytes, bytes]:
    """Give the table that a rekeying kernel is tested with, its parameters and those of its inverse."""
    for box in (AES, AES.inverse, SBox(bytes(range(256)))):
        data = parameters(box, name.form)
        inverse = parameters(box.inverse, INVERSE_FORMS.get(name.form, name.form))
        if data is not None and inverse is not None:
            return box.table, data, inverse
    raise AssertionError(name.form)


def _check_rekey(name: KernelName, function: Callable[..., None], seal_keys: Callable[..., None]) -> bool:
    length = name.bits // 8
    old, new = _KEY[:length] + _START, _KEY[-length:] + bytes(16)
    table, box, inverse = _boxes(name)
    data = ctypes.create_string_buffer(_plain(_NBYTES))
    sealed = _Sealed(seal_keys, ctypes.addressof(data), _address(old))
    fields = list(sealed.records)
    records = (ctypes.c_int64 * 18)(*fields[:8], _address(new), *fields[8:], _address(new))
    function(ctypes.addressof(records), 2, _RCON, _address(box), _address(inverse))
    old_stream, new_stream = (reference.counter_keystream(key[:length], key[length:], _NBYTES) for key in (old, new))
    expected = reference.rekey(_plain(_NBYTES), old_stream, new_stream, table)
    return data.raw == expected + b"\0" and sealed.seal() == reference.seal(_KEY, expected)


def _check_rekey_masked(name: KernelName, function: Callable[..., None]) -> bool:
    table, box, inverse = _boxes(name)
    data, mask = ctypes.create_string_buffer(_plain(_NBYTES)), _plain(_NBYTES)[::-1]
    address = ctypes.addressof(data)
    record = (ctypes.c_int64 * 4)(address, address, _NBYTES, _address(mask))
    function(ctypes.addressof(record), 1, _address(box), _address(inverse))
    return data.raw == reference.rekey(_plain(_NBYTES), mask, bytes(_NBYTES), table) + b"\0"


def _check_expansion(name: KernelName, function: Callable[..., None]) -> bool:
    key = _KEY[: name.bits // 8]
    table, box = _box(name)
    data = ctypes.create_string_buffer(_plain(_NBYTES))
    address = ctypes.addressof(data)
    function(
        address, address, _NBYTES, _OFFSET, _address(key), _RCON, _address(box)
    )
    stream = reference.expansion_keystream(key, _NBYTES, _OFFSET)
    return data.raw == _expected(name, table, _plain(_NBYTES), stream) + b"\0"


def _check_expansion_chain(name: KernelName, function: Callable[..., None]) -> bool:
    key = _KEY[: name.bits // 8]
    states = ctypes.create_string_buffer(key, 2 * len(key))
    function(ctypes.addressof(states), 1, _RCON)
    return sha256(states.raw[len(key) :]).hexdigest() == CHAIN_DIGESTS[name.bits]


def _check_expansion_indexed(name: KernelName, function: Callable[..., None]) -> bool:
    # Saved states need not follow from each other: any four keys will do, and the start of each segment is compared.
    segment, length = segment_bytes(name.bits), name.bits // 8
    keys = [(_KEY + _KEY)[i : i + length] for i in range(SEGMENTS_PER_GROUP)]
    states = b"".join(keys)
    table, box = _box(name)
    data = ctypes.create_string_buffer(segment * SEGMENTS_PER_GROUP + 1)
    address = ctypes.addressof(data)
    function(address, address, 1, _address(states), _RCON, _address(box))
    found = data.raw
    return found.endswith(b"\0") and all(
        found[i * segment : i * segment + _SAMPLE]
        == _expected(name, table, bytes(_SAMPLE), reference.expansion_keystream(key, _SAMPLE))
        for i, key in enumerate(keys)
    )


def _check_substitute(name: KernelName, function: Callable[..., None]) -> bool:
    table, box = _box(name)
    data = ctypes.create_string_buffer(_plain(_NBYTES))
    address = ctypes.addressof(data)
    function(address, address, _NBYTES, _address(box))
    return data.raw == bytes(table[x] for x in _plain(_NBYTES)) + b"\0"


def _check_xor(_name: KernelName, function: Callable[..., None]) -> bool:
    data = ctypes.create_string_buffer(_plain(256))
    function(ctypes.addressof(data), 256, 0xA5)
    return data.raw == bytes(x ^ 0xA5 for x in _plain(256)) + b"\0"


def _check_xor_sum(_name: KernelName, function: Callable[..., None]) -> bool:
    data, total = _plain(300), ctypes.create_string_buffer(65)
    function(ctypes.addressof(total), _address(data), 300)
    rows = zip(*(data[i : i + 64] for i in range(0, 256, 64)), strict=True)
    return total.raw == bytes(a ^ b ^ c ^ d for a, b, c, d in rows) + b"\0"


def _check_copy(_name: KernelName, function: Callable[..., None]) -> bool:
    room = ctypes.create_string_buffer(512)
    target = ctypes.addressof(room) + -ctypes.addressof(room) % 64
    function(target, _address(_plain(256)), 256)
    return ctypes.string_at(target, 257) == _plain(256) + b"\0"


def _address(data: bytes) -> int:
    # The object's own memory, for reading only, as long as the caller holds the object.
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


_RCON = _address(RCON_WORDS) + RCON_START
_SEAL_KEYS = KernelName("seal_keys")
_SEALING: dict[str, Callable[[KernelName, Callable[..., None], Callable[..., None]], bool]] = {
    "counter_sealed": _check_counter_sealed,
    "rekey": _check_rekey,
    "seal": _check_seal,
}
_CHECKS: dict[str, Callable[[KernelName, Callable[..., None]], bool]] = {
    "counter": _check_counter,
    "counter_list": _check_counter_list,
    "counter_past_cache": _check_counter_past_cache,
    "expansion": _check_expansion,
    "expansion_chain": _check_expansion_chain,
    "expansion_indexed": _check_expansion_indexed,
    "rekey_masked": _check_rekey_masked,
    "seal_keys": _check_seal_keys,
    "substitute": _check_substitute,
    "copy_past_cache": _check_copy,
    "xor": _check_xor,
    "xor_sum": _check_xor_sum,
}
