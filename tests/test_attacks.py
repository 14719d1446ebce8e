"""What somebody without the key can do and cannot do: every attack that SECURITY.md names, carried out."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import random

import numpy as np
import pytest
import safetensors.numpy
from support import BITS, BOXES, KEYS, SCHEDULES

import deeplock_kernels
from benchmarks.paper.key_recovery import run_backwards
from deeplock_kernels import (
    AES,
    SBOXES,
    CounterSchedule,
    ExpansionSchedule,
    LockHeader,
    MasterKey,
    TamperedError,
    TamperedHeaderError,
    WrongKeyError,
    expand_key,
    lock,
    lock_file,
    lock_tensors,
    read_header,
    reference,
    substitute,
    unlock,
    unlock_file,
    unlock_tensor,
    unlock_tensors,
    verify_file,
    verify_tensors,
)

CHOICES = {**SBOXES, "own": BOXES["random"]}
WHAT_ANYBODY_KNOWS = {  # of a network, without having seen it
    "block.norm.weight": np.ones(48, np.float32),
    "block.norm.bias": np.zeros(48, np.float32),
    "head.bias": np.zeros(10, np.float32),
}


def model(seed=1):
    """Give a network as training leaves it; the key stream's first 64 KiB are used up before the known tensors."""
    weights = np.random.default_rng(seed)
    return {
        "embedding.weight": weights.normal(0, 0.02, (360, 48)).astype(np.float32),
        "block.quantized": weights.integers(-127, 128, 1001, np.int8),  # so that what follows is not aligned
        "block.norm.weight": WHAT_ANYBODY_KNOWS["block.norm.weight"].copy(),
        "block.norm.bias": WHAT_ANYBODY_KNOWS["block.norm.bias"].copy(),
        "head.weight": weights.normal(0, 0.1, (10, 48)).astype(np.float32),
        "head.bias": WHAT_ANYBODY_KNOWS["head.bias"].copy(),
    }


def flat(tensor):
    return tensor.reshape(-1).view(np.uint8)


def same(tensors, others):
    return tensors.keys() == others.keys() and all(
        np.array_equal(flat(tensors[name]), flat(others[name])) for name in tensors
    )


def given_again(box):
    """Give an S-Box as unlocking wants to have it: only if it has no name."""
    return None if box in SBOXES.values() else box


def masked(locked, box):
    """Undo the S-Box, which anybody can: what is left is plain bytes XOR key stream."""
    return flat(substitute(locked, box, inverse=True))


def share_of_equal(one, other):
    """Give the share of equal bytes; it is 1/256 where nothing relates them."""
    assert one.size == other.size >= 1 << 16
    return float((one == other).mean())


UNRELATED = pytest.approx(1 / 256, abs=0.002)  # eight standard deviations for 64 KiB


# The expansion schedule under known plaintext


def found_key(locked, header, name, known, box, skip=0):
    """Attack a locked tensor of which the plain bytes from `skip` on are known, as many as the key has."""
    size = header.key_bits // 8
    stream = masked(locked, box)[skip : skip + size] ^ flat(known)[skip : skip + size]
    return run_backwards(stream.tobytes(), (header.tensors[name].start or 0) + skip)


@pytest.mark.parametrize("name", WHAT_ANYBODY_KNOWS)
@pytest.mark.parametrize("bits", BITS)
def test_one_known_block_gives_up_the_master_key_of_the_expansion_schedule(bits, name):
    tensors, known = model(), WHAT_ANYBODY_KNOWS[name]
    header = lock_tensors(tensors, KEYS[bits], schedule="expansion")
    assert not same(tensors, model())
    for skip in (0, 1, 2, 3, 4, known.nbytes - bits // 8):
        key = found_key(tensors[name], header, name, known, AES, skip)
        assert key == KEYS[bits]
    unlock_tensors(tensors, key, header)
    assert same(tensors, model())


@pytest.mark.parametrize("bits", BITS)
def test_a_known_block_may_begin_at_any_byte_of_a_round(bits):
    for before in range(2 * bits // 8 + 1):
        tensors = {"before": np.full(before, 3, np.uint8), "bias": np.zeros(bits // 32, np.float32)}
        header = lock_tensors(tensors, KEYS[bits], schedule="expansion")
        assert header.tensors["bias"].start == before
        assert found_key(tensors["bias"], header, "bias", np.zeros(bits // 32, np.float32), AES) == KEYS[bits]


@pytest.mark.parametrize("bits", BITS)
def test_a_locked_file_alone_gives_up_the_master_key_of_the_expansion_schedule(tmp_path, bits):
    plain, locked, found = (tmp_path / name for name in ("plain", "locked", "found"))
    safetensors.numpy.save_file(model(), plain)
    lock_file(plain, locked, MasterKey.from_bytes(KEYS[bits]), schedule="expansion")
    header, tensors = read_header(locked), safetensors.numpy.load_file(locked)
    key = found_key(
        tensors["head.bias"], header, "head.bias", np.zeros_like(tensors["head.bias"]), SBOXES[header.sbox]
    )
    unlock_file(locked, found, key)
    assert found.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("box", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("bits", BITS)
def test_no_sbox_keeps_the_expansion_schedule_from_giving_up_its_master_key(bits, box):
    tensors = model()
    header = lock_tensors(tensors, KEYS[bits], schedule="expansion", sbox=box)
    key = found_key(
        tensors["head.bias"], header, "head.bias", WHAT_ANYBODY_KNOWS["head.bias"], box, skip=7
    )
    assert key == KEYS[bits]
    unlock_tensors(tensors, key, header, sbox=given_again(box))
    assert same(tensors, model())


# The counter schedule under known plaintext


@pytest.mark.parametrize("box", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("bits", BITS)
def test_known_plaintext_gives_no_key_of_the_counter_schedule(bits, box):
    """The attack that breaks the expansion: where the tensor would lie in one, and in the first 51 rounds."""
    tensors, size = model(), bits // 8
    header = lock_tensors(tensors, KEYS[bits], sbox=box)
    starts = itertools.accumulate((tensor.nbytes for tensor in tensors.values()), initial=0)
    places = dict(zip(tensors, starts, strict=False))
    for name, known in WHAT_ANYBODY_KNOWS.items():
        stream = (masked(tensors[name], box) ^ flat(known))[:size].tobytes()
        tried = {run_backwards(stream, position) for position in (places[name], *range(0, 51 * size, size))}
        assert len(tried) == 52
        own_key, _ = reference.tensor_key_iv(KEYS[bits], header.salt, "counter", label(header), name)
        assert not tried & {KEYS[bits], own_key}
        for key in tried:
            with pytest.raises(WrongKeyError):
                unlock_tensors(tensors, key, header, sbox=given_again(box))
    unlock_tensors(tensors, key, header, check=False, sbox=given_again(box))
    nonsense, weights = tensors["embedding.weight"], model()["embedding.weight"]
    assert share_of_equal(flat(nonsense), flat(weights)) == UNRELATED


def label(header):
    return header.sbox if isinstance(header.sbox, str) else header.sbox["sha256"]


@pytest.mark.parametrize("bits", BITS)
def test_key_streams_of_tensors_and_locks_are_unrelated(bits):
    """Somebody who knows all of one tensor has its key stream, and nothing of any other tensor's or lock's."""
    streams, keys = [], set()
    for _ in range(3):
        tensors = {name: np.zeros(1 << 16, np.uint8) for name in ("a", "b", "a.", "A")}
        header = lock_tensors(tensors, KEYS[bits])
        streams += [masked(tensor, AES) for tensor in tensors.values()]
        keys |= {reference.tensor_key_iv(KEYS[bits], header.salt, "counter", "aes", name) for name in tensors}
    assert len({key for key, _ in keys}) == len({iv for _, iv in keys}) == len(streams) == 12
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert share_of_equal(one, other) == UNRELATED
            assert np.unpackbits(one ^ other).mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("bits", BITS)
def test_the_key_of_one_tensor_unlocks_nothing_else(bits):
    plain = model()
    plain["other"] = plain["embedding.weight"].copy()
    tensors = {name: tensor.copy() for name, tensor in plain.items()}
    header = lock_tensors(tensors, KEYS[bits])
    key, iv = reference.tensor_key_iv(KEYS[bits], header.salt, "counter", "aes", "embedding.weight")
    stolen = CounterSchedule(key, iv)
    assert np.array_equal(unlock(tensors["embedding.weight"], stolen), plain["embedding.weight"])
    assert share_of_equal(flat(unlock(tensors["other"], stolen)), flat(plain["other"])) == UNRELATED
    with pytest.raises(WrongKeyError):
        unlock_tensor(tensors["other"], key, header, "other")
    taken_as_master_key = unlock_tensor(tensors["other"], key, header, "other", check=False)
    assert share_of_equal(flat(taken_as_master_key), flat(plain["other"])) == UNRELATED


# A key stream used twice


def two_contents():
    return model(1)["embedding.weight"], model(2)["embedding.weight"]


@pytest.mark.parametrize("box", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_contents_under_one_key_stream_give_up_their_xor(schedule, bits, box):
    one, other = two_contents()
    keys = ExpansionSchedule(KEYS[bits]) if schedule == "expansion" else CounterSchedule(KEYS[bits], bytes(16))
    difference = masked(lock(one, keys, sbox=box), box) ^ masked(lock(other, keys, sbox=box), box)
    assert np.array_equal(difference, flat(one) ^ flat(other))


@pytest.mark.parametrize("box", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("bits", BITS)
def test_two_models_under_one_master_key_give_up_nothing_with_the_counter_schedule(bits, box):
    difference, plain_difference = difference_of_models("counter", bits, box)
    assert share_of_equal(difference, plain_difference) == UNRELATED


@pytest.mark.parametrize("box", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("bits", BITS)
def test_two_models_under_one_master_key_give_up_their_xor_with_the_expansion_schedule(bits, box):
    """It is the paper's: the master key alone makes the key stream, and the salt has no part in it."""
    difference, plain_difference = difference_of_models("expansion", bits, box)
    assert np.array_equal(difference, plain_difference)


def difference_of_models(schedule, bits, box):
    masks, (one, other) = [], two_contents()
    for content in (one.copy(), other.copy()):
        lock_tensors({"w": content}, KEYS[bits], schedule=schedule, sbox=box)
        masks.append(masked(content, box))
    return masks[0] ^ masks[1], flat(one) ^ flat(other)


def test_ten_thousand_locks_draw_ten_thousand_salts(tmp_path):
    tensors = {"w": np.zeros(16, np.uint8)}
    salts = [lock_tensors(tensors, KEYS[256]).salt for _ in range(10_000)]
    safetensors.numpy.save_file(tensors, tmp_path / "plain")
    salts += [lock_file(tmp_path / "plain", tmp_path / "locked", KEYS[256]).salt for _ in range(10)]
    assert len(set(salts)) == len(salts) == 10_010
    drawn = np.frombuffer(b"".join(salts), np.uint8)
    assert np.unpackbits(drawn).mean() == pytest.approx(0.5, abs=0.005)


def test_nobody_chooses_the_salt_of_a_lock():
    """No public function locks with a salt or a header that it is given; a header carries its salt to unlock."""
    takes = {}
    for name in deeplock_kernels.__all__:
        public = getattr(deeplock_kernels, name)
        if callable(public) and not (inspect.isclass(public) and issubclass(public, Exception)):
            methods = {
                f"{name}.{method}": getattr(public, method)
                for method in (vars(public) if inspect.isclass(public) else ())
                if not method.startswith("_") and callable(getattr(public, method))
            }
            for where, function in {name: public, **methods}.items():
                takes[where] = set(inspect.signature(function).parameters)
    assert {"lock", "lock_tensors", "lock_file", "MasterKey.from_hex"} <= takes.keys()
    assert {where for where, names in takes.items() if "salt" in names} == {"LockHeader"}
    takers = {where for where, names in takes.items() if "header" in names}
    assert takers == {"rekey_tensors", "unlock_tensor", "unlock_tensors", "verify_tensors"}
    tensors, key = {"a": np.zeros(100, np.uint8)}, bytes(16)
    header = lock_tensors(tensors, key)
    assert deeplock_kernels.rekey_tensors(tensors, key, key, header).salt != header.salt
    assert {where for where, names in takes.items() if "iv" in names} == {"CounterSchedule"}


@pytest.mark.parametrize("box", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_unlocked_twice_bears_the_key_stream_of_the_locked_model(schedule, box):
    """Unless the seals are compared. Of it XOR the locked one, undone, p XOR S^-1[p] is left, without a key."""
    tensors, plain = model(), flat(model()["embedding.weight"])
    header = lock_tensors(tensors, KEYS[256], schedule=schedule, sbox=box)
    mask = masked(tensors["embedding.weight"], box)
    unlock_tensors(tensors, KEYS[256], header, sbox=given_again(box))
    noticed(TamperedError, tensors, header, box)
    assert same(tensors, model())
    unlock_tensors(tensors, KEYS[256], header, seal=False, sbox=given_again(box))
    assert np.array_equal(mask ^ flat(tensors["embedding.weight"]), plain ^ masked(plain, box))


# Integrity: seals of the tensors, and the header's mac


def noticed(error, tensors, header, box=AES):
    """Check that neither unlocking nor verifying takes the tensors, and that nothing is changed."""
    before = {name: tensor.copy() for name, tensor in tensors.items()}
    with pytest.raises(error) as caught:
        unlock_tensors(tensors, KEYS[256], header, sbox=given_again(box))
    assert type(caught.value) is error
    with pytest.raises(error):
        verify_tensors(tensors, KEYS[256], header)
    assert same(tensors, before)


@pytest.mark.parametrize("box", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_known_weights_cannot_be_replaced_by_chosen_ones_unnoticed(schedule, box):
    """Whoever leaves the seals uncompared loads the attacker's weights."""
    tensors, wanted = model(), np.arange(10, dtype=np.float32)
    header = lock_tensors(tensors, KEYS[256], schedule=schedule, sbox=box)
    stream = masked(tensors["head.bias"], box) ^ flat(WHAT_ANYBODY_KNOWS["head.bias"])
    flat(tensors["head.bias"])[:] = substitute(flat(wanted) ^ stream, box)
    noticed(TamperedError, tensors, header, box)
    unlock_tensors(tensors, KEYS[256], header, seal=False, sbox=given_again(box))
    assert same(tensors, model() | {"head.bias": wanted})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_tensor_taken_out_of_the_header_is_noticed(schedule):
    tensors = model()
    header = lock_tensors(tensors, KEYS[256], schedule=schedule)
    locked = tensors["head.bias"].copy()
    fields = {name: record for name, record in header.tensors.items() if name != "head.bias"}
    for mac in (None, header.mac, bytes(32)):
        altered = LockHeader.from_json(dataclasses.replace(header, tensors=fields, mac=mac).to_json())
        noticed(TamperedHeaderError, tensors, altered)
    unlock_tensors(tensors, KEYS[256], altered, check=False)
    assert same(tensors, model() | {"head.bias": locked})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_seals_taken_out_or_made_anew_are_noticed(schedule):
    """Nobody without the key can make a seal or a mac; those of another lock under the same key are of no use."""
    tensors, others = model(), model(2)
    header = lock_tensors(tensors, KEYS[256], schedule=schedule)
    other = lock_tensors(others, KEYS[256], schedule=schedule)
    flat(tensors["head.bias"])[0] ^= 1
    without = {name: record._replace(seal=None) for name, record in header.tensors.items()}
    theirs = {name: record._replace(seal=other.tensors[name].seal) for name, record in header.tensors.items()}
    for fields in (without, theirs):
        for mac in (None, header.mac, other.mac):
            noticed(TamperedHeaderError, tensors, dataclasses.replace(header, tensors=fields, mac=mac))
    noticed(TamperedError, tensors, other)
    noticed(TamperedError, tensors, header)


def test_a_file_put_together_of_two_locked_ones_is_noticed(tmp_path):
    """The older weights of one tensor beside the newer ones of the others, in a file that is well formed."""
    plain, old, new, mixed, found = (tmp_path / name for name in ("plain", "old", "new", "mixed", "found"))
    for path, seed in ((old, 1), (new, 2)):
        safetensors.numpy.save_file(model(seed), plain)
        lock_file(plain, path, KEYS[256])
    tensors = safetensors.numpy.load_file(new) | {"head.weight": safetensors.numpy.load_file(old)["head.weight"]}
    with safetensors.safe_open(new, "np") as file:
        safetensors.numpy.save_file(tensors, mixed, file.metadata())
    assert read_header(mixed) == read_header(new)
    for use in (lambda: unlock_file(mixed, found, KEYS[256]), lambda: verify_file(mixed, KEYS[256])):
        with pytest.raises(TamperedError, match=r"^tensors\['head.weight'\]: .*; 1 such in all"):
            use()
    assert not found.exists()


# How well the schedules mix


def period_up_to(bound, keystream):
    """Give the period of a key stream if it is at most `bound` bytes, else None.

    A schedule whose step can be undone has no way into a cycle but from its start, so only the start can come again.
    """
    step, first = 1 << 26, keystream(64, 0).tobytes()
    for offset in range(0, bound, step):
        begin = max(offset, 1)
        end = min(offset + step, bound) + len(first)
        found = keystream(end - begin, begin).tobytes().find(first)
        if found >= 0:
            return begin + found
    return None


@pytest.mark.parametrize("bits", BITS)
def test_the_expansion_has_no_period_of_up_to_2_to_the_30_bytes(bits):
    assert period_up_to(1 << 30, ExpansionSchedule(KEYS[bits]).keystream) is None


@pytest.mark.parametrize("bits", BITS)
def test_the_expansion_has_no_period_of_up_to_2_to_the_20_bytes_for_any_of_many_keys(bits):
    """The keys: every byte alike, and 50 random ones. A schedule that leaves a word as it is has one of 3,264 bytes."""
    values = random.Random(bits)
    keys = [bytes([value]) * (bits // 8) for value in range(0, 256, 5)]
    for key in keys + [values.randbytes(bits // 8) for _ in range(50)]:
        assert period_up_to(1 << 20, ExpansionSchedule(key).keystream) is None


@pytest.mark.parametrize("period", [64, 3264, 13_056, 1_000_003, (1 << 20) - 1, 1 << 20])
def test_a_period_would_be_found(period):
    once = np.frombuffer(random.Random(period).randbytes(period), np.uint8)

    def keystream(nbytes, offset):
        return once[np.arange(offset, offset + nbytes) % period]

    assert period_up_to(1 << 20, keystream) == period
    assert period_up_to(period - 1, keystream) is None


@pytest.mark.parametrize("bits", BITS)
def test_the_round_constants_of_the_expansion_have_period_51(bits):
    words = bits // 32
    w = expand_key(KEYS[bits], 120 * words).tolist()
    constants = [
        w[i] ^ w[i - words] ^ reference.sub_word(reference.rot_word(w[i - 1])) for i in range(words, len(w), words)
    ]
    assert constants[0] == 1 << 24
    assert len(set(constants[:51])) == 51
    assert constants[51:] == constants[:-51]


@functools.cache
def shares_left_by_one_bit(schedule, bits):
    """Give for each bit of the key the share of key bytes that stay as they are when that bit is changed."""

    def stream(key):
        keys = ExpansionSchedule(key) if schedule == "expansion" else CounterSchedule(key, bytes(16))
        return keys.keystream(1 << 18)

    number, size = int.from_bytes(KEYS[bits], "big"), bits // 8
    whole = stream(KEYS[bits])
    changed = [stream((number ^ 1 << bit).to_bytes(size, "big")) for bit in reversed(range(bits))]
    return np.array([share_of_equal(whole, other) for other in changed])


@pytest.mark.parametrize(
    ("bits", "sixteenths"), [(128, [7, 3, 4, 0]), (192, 3 * [4, 0]), (256, 2 * [7, 3, 4, 0])]
)
def test_the_expansion_leaves_up_to_44_percent_as_it_was_when_one_bit_of_the_key_changes(bits, sixteenths):
    """How much depends on the word in which the bit lies. Of the rest, one byte in 256 is the same by chance."""
    shares = shares_left_by_one_bit("expansion", bits).reshape(-1, 32)
    for word, sixteen in zip(shares, sixteenths, strict=True):
        untouched = sixteen / 16
        assert word == pytest.approx(untouched + (1 - untouched) / 256, abs=0.01)
    assert shares.max() == pytest.approx(0.44 if bits != 192 else 0.25, abs=0.01)


@pytest.mark.parametrize("bits", BITS)
def test_the_counter_schedule_leaves_nothing_but_chance_when_one_bit_of_the_key_changes(bits):
    assert shares_left_by_one_bit("counter", bits) == pytest.approx(1 / 256, abs=0.001)
