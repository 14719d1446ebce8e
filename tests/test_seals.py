"""Seals: the kernels' tags against two other implementations of GMAC, and that what was altered is never unlocked."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import sys

import numpy as np
import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run
from support import BITS, KEYS, SCHEDULES, SEAL_KEY, openssl_seal, oracle_mac, oracle_seal, painted

from deeplock_kernels import named_lock, reference
from deeplock_kernels.errors import (
    NotSealedError,
    TamperedError,
    TamperedHeaderError,
    TensorNameError,
    WrongKeyError,
)
from deeplock_kernels.header import LockHeader, TensorRecord
from deeplock_kernels.kernels.signatures import (
    RCON_START,
    RCON_WORDS,
    SEAL_KEY_BYTES,
    SEAL_KEYS_BYTES,
    KernelName,
)
from deeplock_kernels.keys import Derivation
from deeplock_kernels.named_lock import NamedLock
from deeplock_kernels.pieces import Tags
from deeplock_kernels.runtime import pool
from deeplock_kernels.runtime.pool import Call
from deeplock_kernels.runtime.tiers import TIERS, use_tier
from deeplock_kernels.tensors import lock_tensors, unlock_tensor, unlock_tensors, verify_tensors
from deeplock_kernels.transform import Transform

KEY = KEYS[256]
SEAL = KernelName("seal")
# Up to a step of 256 bytes and beyond; from 4,096 bytes on the steps are aligned; and where pieces are large.
LENGTHS = [*range(301), *(middle + d for middle in (512, 4096, 4096 + 256, 1 << 16) for d in (-17, -1, 0, 1, 15, 16))]

# The kernels


def xor(*blocks):
    return functools.reduce(lambda a, b: bytes(x ^ y for x, y in zip(a, b, strict=True)), blocks)


def place_of(data):
    return data.ctypes.data


@functools.cache
def seal_of(nbytes, start=0):
    return openssl_seal(SEAL_KEY, painted(nbytes, start))


def share(piece, offset, total):
    """Give the part that a piece has in a seal: of all zeros but the piece, and behind the first one less of all zeros."""
    padded = bytes(offset) + bytes(piece) + bytes(total - offset - len(piece))
    seal = openssl_seal(SEAL_KEY, padded)
    return seal if offset == 0 else xor(seal, openssl_seal(SEAL_KEY, bytes(total)))


def test_openssl_seals_as_the_oracle_does():
    for nbytes in LENGTHS[:320:3]:
        assert reference.seal(SEAL_KEY, painted(nbytes).tobytes()) == seal_of(nbytes), nbytes


def test_every_length_is_sealed_as_openssl_does(tier):
    kernel = support.RawKernel(tier, SEAL)
    data = painted(max(LENGTHS))
    for nbytes in LENGTHS:
        kernel(0, place_of(data), nbytes)
        assert kernel.tag == seal_of(nbytes), nbytes
    assert np.array_equal(data, painted(data.size))


def test_every_alignment_is_sealed_alike_and_nothing_else_is_read_into_it(tier):
    kernel = support.RawKernel(tier, SEAL)
    lengths = (1, 16, 33, 255, 4095, 4096, 4097, 4096 + 239, 4096 + 256 + 1, 9000)
    memory = support.aligned(max(lengths) + 3 * 256)
    for alignment in range(256):
        memory[:] = 0xA5 ^ alignment
        for nbytes in lengths:
            part = memory[256 + alignment : 256 + alignment + nbytes]
            part[:] = painted(nbytes)
            kernel(0, place_of(part), nbytes)
            assert kernel.tag == seal_of(nbytes), (alignment, nbytes)
            part[:] = 0x77


@st.composite
def cuts(draw):
    """Give a number of bytes, up to five pieces of them in any order, and the alignment of the memory."""
    nbytes = draw(st.integers(0, 700) | st.integers(4000, 12_000))
    borders = draw(st.sets(st.integers(0, nbytes // 16).map(lambda block: 16 * block), max_size=4))
    borders = sorted({0, nbytes} | {border for border in borders if border < nbytes})
    pieces = list(itertools.pairwise(borders)) or [(0, 0)]
    return nbytes, draw(st.permutations(pieces)), draw(st.integers(0, 255))


@settings(max_examples=60)
@given(cuts(), st.integers(0, 250))
def test_any_pieces_in_any_order_give_the_seal_of_the_whole(tier, cut, start):
    nbytes, pieces, alignment = cut
    kernel = support.RawKernel(tier, SEAL)
    memory = support.aligned(nbytes + 256)[alignment : alignment + nbytes]
    memory[:] = painted(nbytes, start)
    tags = []
    for begin, end in pieces:
        kernel(0, place_of(memory) + begin, end - begin, begin, total=nbytes)
        tags.append(kernel.tag)
        assert tags[-1] == share(memory[begin:end], begin, nbytes), (begin, end)
    assert xor(*tags) == openssl_seal(SEAL_KEY, memory)


@settings(max_examples=60)
@given(st.data())
def test_any_flipped_bit_changes_the_seal(tier, draw):
    nbytes = draw.draw(st.integers(1, 600) | st.integers(4090, 5000))
    kernel, data = support.RawKernel(tier, SEAL), painted(nbytes)
    data[draw.draw(st.integers(0, nbytes - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    kernel(0, place_of(data), nbytes)
    assert kernel.tag == openssl_seal(SEAL_KEY, data) != seal_of(nbytes)


@functools.cache
def power(exponent):
    """Give a power of the hash key, by squaring."""
    key = reference.encrypt_state(reference.round_keys(SEAL_KEY), 0)
    if exponent == 1:
        return key
    half = power(exponent // 2)
    whole = reference.multiply_blocks(half, half)
    return reference.multiply_blocks(whole, key) if exponent % 2 else whole


@pytest.mark.parametrize("total", [2**31 + 7, 2**32, 2**36 + 1, 2**45 - 16, 2**60 - 1])
def test_pieces_of_tensors_that_no_memory_holds(tier, total):
    """A piece times the power of the hash key for the blocks behind it: GHASH by its definition."""
    kernel, data = support.RawKernel(tier, SEAL), painted(100)
    blocks = -(-total // 16)
    for offset in (0, 16, 2**31 - 64, 2**31 - 16, total - total % 16 - 96, total - total % 16 - 16):
        nbytes = min(96, total - offset)
        kernel(0, place_of(data), nbytes, offset, total)
        padded = data[:nbytes].tobytes() + bytes(-nbytes % 16)
        behind = blocks - (offset + len(padded)) // 16
        wanted = reference.ghash(power(1), padded)
        wanted = reference.multiply_blocks(wanted, power(behind)) if behind else wanted
        if offset == 0:
            wanted ^= (8 * total) << 64
        wanted = reference.multiply_blocks(wanted, power(1))
        if offset == 0:
            wanted ^= reference.encrypt_state(reference.round_keys(SEAL_KEY), 1)
        assert kernel.tag == wanted.to_bytes(16, "big"), offset


@pytest.mark.parametrize("in_place", [False, True], ids=["separate", "in_place"])
def test_seal_keys_of_many_keys(tier, in_place):
    """In place only one can be made: what is made is longer than a key."""
    make, count = support.with_integers(tier, KernelName("seal_keys")), 1 if in_place else 5
    rcon = np.frombuffer(bytearray(RCON_WORDS), np.uint8)
    keys = np.frombuffer(bytearray(painted(count * SEAL_KEY_BYTES, 9)), np.uint8)
    for alignment in (0, 1, 15, 63):
        memory = np.full(count * SEAL_KEYS_BYTES + 256, 0xA5, np.uint8)
        made = memory[64 + alignment : 64 + alignment + count * SEAL_KEYS_BYTES]
        if in_place:
            made[: keys.size] = keys
        make(place_of(made), place_of(made if in_place else keys), count, place_of(rcon) + RCON_START)
        assert (memory[: 64 + alignment] == 0xA5).all()
        assert (memory[64 + alignment + made.size :] == 0xA5).all()
        kernel, data = support.RawKernel(tier, SEAL), painted(777)
        for i in range(count):
            kernel._seal_keys = place_of(made) + i * SEAL_KEYS_BYTES
            kernel(0, place_of(data), data.size)
            key = keys[i * SEAL_KEY_BYTES : (i + 1) * SEAL_KEY_BYTES].tobytes()
            assert kernel.tag == openssl_seal(key, data)
    assert np.array_equal(keys, painted(keys.size, 9))


SEALING = [(tier, name) for tier, name in support.EVERY_KERNEL if name.operation in ("counter_sealed", "rekey")]
ROW = 5 * 1024


@pytest.mark.parametrize("in_place", [False, True], ids=["separate", "in_place"])
@pytest.mark.parametrize(("tier", "name"), SEALING, indirect=["tier"], ids=support.kernel_id)
def test_what_a_kernel_locks_and_seals_at_once(tier, name, in_place):
    """Pieces of many lengths at many alignments; in whole rows, so that neighbours on both sides are compared.

    What was locked is sealed: on the way in where it is unlocked, else on the way out. Keys of 192 bits take but part.
    """
    kernel = support.RawKernel(tier, name)
    plan = [(nbytes, 16 * (nbytes % 7)) for nbytes in (*range(0, 301, 1 if name.bits == 256 else 13), 255, 256, 257)]
    plan += [(nbytes, 0) for nbytes in (3900, 4000)] if name.bits == 256 else []
    for i, (nbytes, offset) in enumerate(plan):
        alignment, other = 37 * i % 256, (5 * i + 3) % 64
        plain = painted(nbytes, i)
        wanted = kernel.expected(plain, offset)
        target, source = support.aligned(nbytes + 512), support.aligned(nbytes + 512)
        target[:] = source[:] = 0xA5
        into = target[128 + alignment : 128 + alignment + nbytes]
        from_ = into if in_place else source[128 + other : 128 + other + nbytes]
        from_[:] = plain
        total = offset + nbytes + 33 * (i % 3)
        kernel(
            place_of(into), place_of(from_), nbytes, offset, total - total % 16 if total > offset + nbytes else total
        )
        total = total - total % 16 if total > offset + nbytes else total
        assert np.array_equal(into, wanted), (nbytes, offset)
        assert kernel.tag == share(plain if name.direction == "unlock" else wanted, offset, total), (nbytes, offset)
        assert (target[: 128 + alignment] == 0xA5).all()
        assert (target[128 + alignment + nbytes :] == 0xA5).all()
        if not in_place:
            assert np.array_equal(from_, plain)


@pytest.mark.parametrize("direction", support.DIRECTIONS)
def test_large_pieces_at_every_alignment_are_locked_and_sealed(tier, direction):
    """From 4,096 bytes on the first step is cut so that the next ones are aligned."""
    nbytes = 4096 + 256 + 21
    kernel = support.RawKernel(tier, KernelName("counter_sealed", 128, "table", direction))
    stream = np.frombuffer(support.openssl_key_stream(kernel.key, support.IV, 2 * nbytes, 0), np.uint8)
    table = support.table_of(kernel.box)
    memory, plain = support.aligned(nbytes + 512), painted(nbytes)
    for alignment in range(256):
        offset = 16 * (alignment % 5)
        mask = stream[offset : offset + nbytes]
        wanted = table[plain ^ mask] if direction == "lock" else table[plain] ^ mask
        part = memory[128 + alignment : 128 + alignment + nbytes]
        memory[:] = 0xA5
        part[:] = plain
        kernel(place_of(part), place_of(part), nbytes, offset)
        assert np.array_equal(part, wanted), alignment
        assert kernel.tag == share(plain if direction == "unlock" else wanted, offset, offset + nbytes), alignment
        assert (memory[: 128 + alignment] == 0xA5).all()
        assert (memory[128 + alignment + nbytes :] == 0xA5).all()


AS_PLAIN_PYTHON = """
import numpy as np
from deeplock_kernels import lock_tensors, reference, tensors, unlock_tensors, verify_tensors
from deeplock_kernels.runtime.tiers import active_tier

key = bytes(range(32))
for schedule in ("counter", "expansion"):
    plain = {"a": bytes(range(100)), "b": b"", "c": bytes(16)}
    weights = {name: bytearray(data) for name, data in plain.items()}
    header = lock_tensors(weights, key, schedule=schedule, threads=1)
    for name, data in weights.items():
        seal = reference.seal(reference.seal_key(key, header.salt, name), bytes(data))
        assert header.tensors[name].seal == seal
    verify_tensors(weights, key, header)
    out = bytearray(100)
    tensors.unlock_tensor(weights["a"], key, header, "a", out=out)
    assert out == plain["a"]
    unlock_tensors(weights, key, header)
    assert weights == plain
print(active_tier().name)
"""


def test_without_a_compiler_plain_python_seals_alike():
    assert run(AS_PLAIN_PYTHON, NUMBA_DISABLE_JIT="1") == "portable\n"


# Tensors: what is in the header

SIZES = {"w": 300, "empty": 0, "b": 1, "слой": 16, "a.weight": 777}


def some_tensors(sizes=SIZES):
    return {name: painted(size, 7 * size) for name, size in sizes.items()}


def with_shared_storage():
    tensors = some_tensors()
    tensors["copy"], tensors["view"] = tensors["w"], tensors["w"].reshape(10, 30)
    return tensors


def bytes_of(tensors):
    return {name: bytes(memoryview(tensor).cast("B")) for name, tensor in tensors.items()}


def refused(error, words, tensors, function, *arguments, **keywords):
    """Call a function that must refuse, for exactly this reason, without changing a byte of any tensor."""
    before = bytes_of(tensors)
    with pytest.raises(error, match=words) as caught:
        function(*arguments, **keywords)
    assert type(caught.value) is error
    assert bytes_of(tensors) == before


def remade(header, tensors, key=KEY):
    """Give a header with other records and the mac that the owner of the key would make for it."""
    text = json.loads(LockHeader(**{**vars(header), "tensors": tensors, "mac": None}).to_json())
    mac = reference.header_mac(reference.header_key(key, header.salt), text)
    return LockHeader.from_json(json.dumps(text | {"mac": mac.hex()}))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_seals_and_mac_are_the_oracle_s(tier, schedule, bits):
    tensors = with_shared_storage()
    header = lock_tensors(tensors, KEYS[bits], schedule=schedule)
    for name, record in header.tensors.items():
        assert record.same_as == ("w" if name in ("copy", "view") else None)
        seal = oracle_seal(KEYS[bits], header, name, bytes_of(tensors)[name])
        assert record.seal == (None if record.same_as else seal)
    assert header.mac == oracle_mac(KEYS[bits], header)
    assert LockHeader.from_json(header.to_json()) == header
    verify_tensors(tensors, KEYS[bits], header)


@pytest.fixture
def small_pieces(monkeypatch):
    """Cut tensors into pieces of 4 KiB, and count the calls of each run."""
    counts, original = [], pool.run
    monkeypatch.setattr(named_lock, "piece_bytes", lambda tier, nbytes, threads: 4096)
    monkeypatch.setattr(Transform, "piece", lambda self, nbytes, threads: 4096)

    def run(calls, *arguments):
        counts.append(len(calls))
        return original(calls, *arguments)

    monkeypatch.setattr(pool, "run", run)
    return counts


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_pieces_on_many_threads_give_the_same_seals(small_pieces, schedule, threads):
    tensors = some_tensors({"a": 100_001, "b": 4096, "c": 4097, "d": 16, "e": 65_536, "empty": 0, "f": 200_000})
    tensors["copy"] = tensors["f"]
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY, schedule=schedule, threads=threads)
    for name, locked in bytes_of(tensors).items():
        seal = openssl_seal(reference.seal_key(KEY, header.salt, name), locked)
        assert header.tensors[name].seal == (seal if name != "copy" else None)
    verify_tensors(tensors, KEY, header, threads=threads)
    out = np.empty_like(tensors["f"])
    for name in ("f", "copy"):
        unlock_tensor(tensors["f"], KEY, header, name, out=out, threads=threads)
        assert out.tobytes() == plain["f"]
    unlock_tensors(tensors, KEY, header, threads=threads)
    assert bytes_of(tensors) == plain
    assert min(small_pieces) > 20 or schedule == "expansion"
    assert max(small_pieces) > 20


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_seals(schedule):
    tensors = with_shared_storage()
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY, schedule=schedule, seal=False)
    assert [record.seal for record in header.tensors.values()] == [None] * 7
    assert header.mac == oracle_mac(KEY, header)
    words = r"^header: 7 of 7 tensors have no seal, as 'w'"
    refused(NotSealedError, words, tensors, verify_tensors, tensors, KEY, header)
    tensors["b"][0] ^= 1
    unlock_tensors(tensors, KEY, header)
    assert {name for name, data in bytes_of(tensors).items() if data != plain[name]} == {"b"}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_seals_of_some(schedule):
    """The format allows them: those that are there are compared."""
    tensors = some_tensors()
    header = lock_tensors(tensors, KEY, schedule=schedule)
    records = {
        name: record._replace(seal=None) if name in ("w", "b") else record for name, record in header.tensors.items()
    }
    header = remade(header, records)
    words = r"^header: 2 of 5 tensors have no seal, as 'b'"
    refused(NotSealedError, words, tensors, verify_tensors, tensors, KEY, header)
    tensors["a.weight"][5] ^= 8
    refused(TamperedError, r"^tensors\['a.weight'\]", tensors, unlock_tensors, tensors, KEY, header)
    tensors["a.weight"][5] ^= 8
    unlock_tensors(tensors, KEY, header)
    assert bytes_of(tensors) == bytes_of(some_tensors())


def test_a_wrong_seal_of_an_empty_tensor_is_noticed():
    tensors = {"empty": painted(0), "w": painted(9)}
    header = lock_tensors(tensors, KEY)
    record = header.tensors["empty"]
    wrong = remade(header, {**header.tensors, "empty": record._replace(seal=header.tensors["w"].seal)})
    words = r"^tensors\['empty'\]: .*; 1 such in all"
    refused(TamperedError, words, tensors, unlock_tensors, tensors, KEY, wrong)
    refused(TamperedError, words, tensors, verify_tensors, tensors, KEY, wrong)
    refused(TamperedError, words, tensors, unlock_tensor, tensors["empty"], KEY, wrong, "empty")


# Tensors: what was altered is not unlocked


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_byte_of_every_tensor(schedule):
    tensors = some_tensors({"w": 40, "b": 1, "слой": 16, "c": 33})
    header = lock_tensors(tensors, KEY, schedule=schedule)
    for name, tensor in tensors.items():
        for i in range(tensor.size):
            tensor[i] ^= 1 << i % 8
            words = rf"^tensors\['{name}'\]: its bytes are not those that were sealed; 1 such in all"
            refused(TamperedError, words, tensors, unlock_tensors, tensors, KEY, header)
            refused(TamperedError, words, tensors, verify_tensors, tensors, KEY, header)
            refused(TamperedError, words, tensors, unlock_tensor, tensor, KEY, header, name, out=tensor)
            refused(TamperedError, words, tensors, unlock_tensor, tensor, KEY, header, name)
            tensor[i] ^= 1 << i % 8
    verify_tensors(tensors, KEY, header)
    unlock_tensors(tensors, KEY, header)
    assert bytes_of(tensors) == bytes_of(some_tensors({"w": 40, "b": 1, "слой": 16, "c": 33}))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copies_of_shared_storage_are_compared_as_the_one_that_was_sealed(schedule):
    tensors = with_shared_storage()
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY, schedule=schedule)
    apart = {name: np.array(tensor) for name, tensor in tensors.items()}
    verify_tensors(apart, KEY, header)
    for name in ("copy", "view", "w"):
        apart[name].reshape(-1)[299] ^= 0x80
        words = rf"^tensors\['{name}'\]: .*; 1 such in all"
        refused(TamperedError, words, apart, unlock_tensors, apart, KEY, header)
        refused(TamperedError, words, apart, verify_tensors, apart, KEY, header)
        refused(TamperedError, words, apart, unlock_tensor, apart[name], KEY, header, name, out=apart[name])
        apart[name].reshape(-1)[299] ^= 0x80
    out = np.zeros(300, np.uint8)
    unlock_tensor(apart["copy"], KEY, header, "copy", out=out)
    assert out.tobytes() == plain["w"]
    unlock_tensors(apart, KEY, header)
    assert bytes_of(apart) == plain


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["w", "copy", "b", "empty"])
def test_one_tensor_out_of_place(schedule, name):
    """`out` is filled while the seal is computed: where that is another, nothing is left in it."""
    tensors = with_shared_storage()
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY, schedule=schedule)
    data = tensors[name].copy()
    guarded = np.full(data.size + 2, 0x77, np.uint8)
    out = guarded[1:-1]
    assert unlock_tensor(data, KEY, header, name, out=out) is out
    assert out.tobytes() == plain[name]
    if not data.size:
        return
    data[-1] ^= 1
    altered = data.copy()
    words = rf"^tensors\['{name}'\]: "
    out[:] = 0x77
    with pytest.raises(TamperedError, match=words):
        unlock_tensor(data, KEY, header, name, out=out)
    assert np.array_equal(data, altered)
    assert not out.any()
    assert guarded[0] == guarded[-1] == 0x77
    refused(TamperedError, words, {"": data}, unlock_tensor, data, KEY, header, name)
    for keywords in ({"seal": False}, {"check": False}):
        found = unlock_tensor(data, KEY, header, name, **keywords)
        assert found[:-1].tobytes() == plain[name][:-1]
        assert found[-1] != plain[name][-1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["w", "copy"])
def test_a_part_of_a_tensor_has_no_seal(schedule, name):
    tensors = with_shared_storage()
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY, schedule=schedule)
    tensors["w"][7] ^= 1
    for start, stop in ((1, 300), (0, 299), (0, 0), (300, 300), (8, 24)):
        found = unlock_tensor(tensors["w"][start:stop], KEY, header, name, offset=start).tobytes()
        alike = [a == b for a, b in zip(found, plain["w"][start:stop], strict=True)]
        assert alike == [i != 7 for i in range(start, stop)]
    altered = LockHeader(**{**vars(header), "mac": bytes(32)})
    for part in (tensors["w"][1:], tensors["w"]):
        refused(
            TamperedHeaderError, "^header: ", tensors, unlock_tensor, part, KEY, altered, name, offset=300 - part.size
        )
    refused(WrongKeyError, "^key: ", tensors, unlock_tensor, tensors["w"][1:], KEY[::-1], header, name, offset=1)


def altered_headers(header):
    """Yield headers that the lock did not make, though each is well formed."""
    first, second = header.tensors["w"], header.tensors["a.weight"]
    yield {"mac": None}
    yield {"mac": bytes(32)}
    yield {"mac": header.mac[::-1]}
    yield {"sbox": "sm4"}
    yield {"schedule": "expansion" if header.schedule == "counter" else "counter"}
    yield {"tensors": {}}
    for name in header.tensors:
        yield {"tensors": {other: record for other, record in header.tensors.items() if other != name}}
    yield {
        "tensors": {
            **header.tensors,
            "w": first._replace(seal=second.seal),
            "a.weight": second._replace(seal=first.seal),
        }
    }
    yield {"tensors": {**header.tensors, "w": first._replace(seal=None)}}
    yield {"tensors": {**header.tensors, "w": first._replace(nbytes=299)}}
    yield {"tensors": {**header.tensors, "one more": TensorRecord(0)}}
    yield {"tensors": {**header.tensors, "b": TensorRecord(1, None, "слой")}}
    yield {"file": "{}"}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_header_that_was_altered_unlocks_nothing_and_check_false_does_not_look(schedule):
    tensors = some_tensors()
    header = lock_tensors(tensors, KEY, schedule=schedule)
    for change in altered_headers(header):
        altered = LockHeader(**{**vars(header), **change})
        for function in (unlock_tensors, verify_tensors):
            refused(TamperedHeaderError, "^header: it ", tensors, function, tensors, KEY, altered)
        refused(TamperedHeaderError, "^header: it ", tensors, unlock_tensors, tensors, KEY, altered, seal=False)
        refused(TamperedHeaderError, "^header: it ", tensors, unlock_tensor, tensors["w"], KEY, altered, "w")
    for change in ({"check": bytes(16)}, {"salt": bytes(16)}, {"key_bits": 128}):
        altered = LockHeader(**{**vars(header), **change})
        for function in (unlock_tensors, verify_tensors):
            refused(WrongKeyError, "^key: ", tensors, function, tensors, KEY, altered)
    tensors["b"][0] ^= 1
    unlock_tensors(tensors, KEY, LockHeader(**{**vars(header), "mac": None, "check": bytes(16)}), check=False)
    tensors["b"][0] = some_tensors()["b"][0]
    assert bytes_of(tensors) == bytes_of(some_tensors())


def test_what_verifying_refuses_before_it_looks():
    tensors = some_tensors()
    header = lock_tensors(tensors, KEY)
    rest = {name: tensor for name, tensor in tensors.items() if name != "b"}
    refused(TensorNameError, "^tensors: 'b' is in the header and not here", rest, verify_tensors, rest, KEY, header)
    own = lock_tensors(others := some_tensors(), KEY, sbox=support.BOXES["random"])
    verify_tensors(others, KEY, own)  # it takes no S-Box: nothing is unlocked


# All of them or none

LOCKING = {  # what a sealed lock goes through when all kernels have run, or while they run
    "a tag is collected": (Tags, "seals"),
    "seals of what is locked": (NamedLock, "seals"),
    "a key to seal with": (Derivation, "seal_key"),
    "the header gets its seals": (NamedLock, "prove"),
    "what the mac is over": (LockHeader, "authenticated"),
    "the mac": (Derivation, "mac"),
}


def failing(monkeypatch, owner, name, error, after=0):
    """Let a method fail the next time but `after`; give the list of its calls."""
    calls, original = [], getattr(owner, name)

    def fail(*arguments, **keywords):
        calls.append(name)
        if len(calls) == after + 1:
            raise error
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, fail)
    return calls


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("step", LOCKING)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_failure_at_any_step_of_a_lock_leaves_all_as_it_was(
    monkeypatch, small_pieces, schedule, step, threads, error
):
    tensors = some_tensors({"a": 9000, "b": 1, "empty": 0, "c": 70_000})
    tensors["copy"] = tensors["c"]
    for after in range(3 if step == "a key to seal with" else 1):
        with monkeypatch.context() as patched:
            calls = failing(patched, *LOCKING[step], error, after)
            if (schedule, step) == ("counter", "seals of what is locked"):
                lock_tensors({"w": painted(9)}, KEY)
                assert calls == [], "the same kernel locks and seals"
                continue
            refused(type(error), None, tensors, lock_tensors, tensors, KEY, schedule=schedule, threads=threads)
            assert len(calls) > after
    header = lock_tensors(tensors, KEY, schedule=schedule, threads=threads)
    for owner, name in ((NamedLock, "seals"), (Tags, "seals"), (NamedLock, "expect"), (Derivation, "mac")):
        with monkeypatch.context() as patched:
            failing(patched, owner, name, error)
            for function in (unlock_tensors, verify_tensors):
                refused(type(error), None, tensors, function, tensors, KEY, header, threads=threads)
                failing(patched, owner, name, error)
    unlock_tensors(tensors, KEY, header, threads=threads)
    assert bytes_of(tensors)["c"] == painted(70_000, 490_000).tobytes()


@pytest.mark.parametrize("pieces", ["one call", "many calls"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_exception_at_any_moment_of_a_lock_leaves_all_as_it_was(request, schedule, pieces):
    """Where Python would notice Ctrl-C: at the start of each function and behind each call of a built-in one."""
    if pieces == "many calls":
        request.getfixturevalue("small_pieces")
    tensors = some_tensors({"a": 9000, "b": 1, "empty": 0, "c": 17_000})
    plain, original = bytes_of(tensors), NamedLock.lock
    steps, wanted, over = 0, 0, False

    def interrupt(frame, event, argument):
        nonlocal steps
        if event in ("call", "c_return"):
            steps += 1
            if steps == wanted:
                raise KeyboardInterrupt

    def watched(self, ranges, threads, *, seal, then):
        nonlocal over

        def last(seals):
            nonlocal over
            header = then(seals)
            sys.setprofile(None)  # from here on the caller has the header
            over = True
            return header

        sys.setprofile(interrupt)
        try:
            return original(self, ranges, threads, seal=seal, then=last)
        finally:
            sys.setprofile(None)

    lock_tensors(some_tensors(), KEY, schedule=schedule)  # all kernels loaded
    gc.collect()
    request.addfinalizer(gc.enable)
    gc.disable()  # what others have it call cannot raise
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(NamedLock, "lock", watched)
        while not over:
            wanted, steps = wanted + 1, 0
            try:
                header = lock_tensors(tensors, KEY, schedule=schedule, threads=2)
            except KeyboardInterrupt:
                assert bytes_of(tensors) == plain, wanted
    assert wanted > 100
    unlock_tensors(tensors, KEY, header)
    assert bytes_of(tensors) == plain


@pytest.mark.parametrize("after", [False, True], ids=["before it wipes", "after"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_interrupted_while_keys_are_wiped_all_is_as_it_was(monkeypatch, schedule, after):
    """The tensors are locked by then, and only the header that nobody would get could unlock them."""
    tensors, original, states = some_tensors(), NamedLock.__exit__, []
    plain = bytes_of(tensors)

    def interrupted(self, *error):
        if not states:
            states.append(bytes_of(tensors))
            if after:
                original(self, *error)
            raise KeyboardInterrupt
        original(self, *error)

    monkeypatch.setattr(NamedLock, "__exit__", interrupted)
    refused(KeyboardInterrupt, None, tensors, lock_tensors, tensors, KEY, schedule=schedule)
    assert states[0] != plain


@pytest.mark.parametrize("interruptions", [1, 2, 10])
def test_what_is_taken_back_is_taken_back_once_whatever_comes_meanwhile(interruptions):
    """Exceptions come while the call that undoes is asked for, which is before it runs."""
    state, left = dict.fromkeys("abc", 1), interruptions

    def undo(call):
        nonlocal left
        if left:
            left -= 1
            raise KeyboardInterrupt

        def back(name):
            state[name] -= 1

        return Call(back, call.arguments)

    pool.take_back([Call(None, (name,)) for name in state], undo)
    assert (state, left) == (dict.fromkeys("abc", 0), 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_interrupted_out_of_place_nothing_is_left(monkeypatch, schedule):
    tensors = {"w": painted(20_000)}
    header = lock_tensors(tensors, KEY, schedule=schedule)
    for owner, name in ((NamedLock, "expect"), (Tags, "seals"), (Transform, "run")):
        out = np.full(20_000, 0x77, np.uint8)
        with monkeypatch.context() as patched:
            failing(patched, owner, name, KeyboardInterrupt())
            refused(KeyboardInterrupt, None, tensors, unlock_tensor, tensors["w"], KEY, header, "w", out=out)
        assert not out.any()


def test_each_tier_unlocks_and_verifies_what_another_sealed():
    supported = [tier.name for tier in TIERS if tier.supported]
    for sealing, verifying in itertools.permutations(supported, 2):
        tensors = some_tensors({"a": 5000, "b": 17})
        with use_tier(sealing):
            header = lock_tensors(tensors, KEY)
        with use_tier(verifying):
            verify_tensors(tensors, KEY, header)
            unlock_tensors(tensors, KEY, header)
        assert bytes_of(tensors) == bytes_of(some_tensors({"a": 5000, "b": 17}))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_only_for_reading_is_verified(schedule):
    tensors = {"a": painted(5000), "b": np.arange(30, dtype=np.float32)}
    header = lock_tensors(tensors, KEYS[256], schedule=schedule)
    for array in tensors.values():
        array.flags.writeable = False
    frozen = {name: array.tobytes() for name, array in tensors.items()}
    for kept in (tensors, frozen):
        verify_tensors(kept, KEYS[256], header)
    frozen["a"] = frozen["a"][:-1] + bytes([frozen["a"][-1] ^ 1])
    with pytest.raises(TamperedError, match=r"^tensors\['a'\]: "):
        verify_tensors(frozen, KEYS[256], header)
