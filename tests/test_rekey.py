"""Rekeying: the oracle's bytes on every tier, refusals that change nothing, all tensors or none, files."""

from __future__ import annotations

import dataclasses
import functools
import secrets
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import support
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BITS, BOXES, IV, KEYS, SCHEDULES, oracle_mac, oracle_seal, painted, refuse, table_of

from deeplock_kernels import reference, rekeying, transform
from deeplock_kernels.checkpoints import streaming as checkpoints
from deeplock_kernels.checkpoints.streaming import lock_file, read_header, rekey_file, unlock_file
from deeplock_kernels.errors import (
    BufferLayoutError,
    BufferTypeError,
    HeaderError,
    KeyTypeError,
    KeyWipedError,
    NotLockedError,
    OverlapError,
    ParameterError,
    ReadOnlyError,
    SameFileError,
    SBoxError,
    SizeMismatchError,
    TamperedError,
    TamperedHeaderError,
    TensorNameError,
    UnknownNameError,
    WrongKeyError,
)
from deeplock_kernels.header import LockHeader
from deeplock_kernels.keys import MasterKey
from deeplock_kernels.locking import lock, unlock
from deeplock_kernels.named_lock import NamedLock
from deeplock_kernels.rekeying import rekey, rekey_tensors
from deeplock_kernels.runtime import pool
from deeplock_kernels.runtime.tiers import kernel
from deeplock_kernels.sboxes import AES
from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule
from deeplock_kernels.tensors import lock_tensors, unlock_tensors, verify_tensors

NEW_KEYS = {bits: key[::-1] for bits, key in KEYS.items()}
NEW_IV = IV[::-1]
KINDS = [(schedule, bits) for schedule in SCHEDULES for bits in BITS]
PAIRS = {  # what is made by one kernel, and the ways to be made by two
    "fused": (("counter", 192), ("counter", 192)),
    "other bits": (("counter", 128), ("counter", 256)),
    "to expansion": (("counter", 256), ("expansion", 256)),
    "from expansion": (("expansion", 128), ("counter", 128)),
    "expansions": (("expansion", 192), ("expansion", 256)),
}
PIECE = 4096  # bytes, where pieces are small
each_pair = pytest.mark.parametrize("pair", PAIRS)


def schedules(old, new):
    """Give the schedules of two kinds, the new one with a key of its own."""
    schedule, bits = new
    key = NEW_KEYS[bits]
    return support.make_schedule(*old), CounterSchedule(key, NEW_IV) if schedule == "counter" else ExpansionSchedule(key)


@functools.cache
def expansion_stream(key, nbytes):
    return np.frombuffer(reference.expansion_keystream(key, nbytes), np.uint8)


def stream_of(kind, keys, iv, nbytes, offset):
    schedule, bits = kind
    if schedule == "counter":
        return support.openssl_key_stream(keys[bits], iv, nbytes, offset)
    return expansion_stream(keys[bits], 1_100_000)[offset : offset + nbytes]


def mask_of(old, new, nbytes, offset=0):
    """Give both key streams, XORed."""
    return stream_of(old, KEYS, IV, nbytes, offset) ^ stream_of(new, NEW_KEYS, NEW_IV, nbytes, offset)


def expected(data, old, new, box=AES, offset=0):
    """Compute with table look-ups what `reference.rekey` gives."""
    return table_of(box)[table_of(box.inverse)[data] ^ mask_of(old, new, len(data), offset)]


@pytest.fixture
def small_pieces(monkeypatch):
    """Cut some KiB into many pieces, whichever kernel takes them."""
    for name, value in (("_SMALLEST_JOB", 2), ("_SMALLEST_PIECE", 1), ("_LARGEST_PIECE", 1)):
        monkeypatch.setattr(transform, name, value)
    monkeypatch.setattr(rekeying, "_MASK_BYTES", PIECE)
    support.forget_transforms()
    yield
    support.forget_transforms()


# Bytes


def test_the_expectation_is_the_oracle_s():
    for old, new in PAIRS.values():
        data, offset = painted(600), 5
        streams = (
            stream_of(kind, keys, iv, 600, offset).tobytes() for kind, keys, iv in ((old, KEYS, IV), (new, NEW_KEYS, NEW_IV))
        )
        box = BOXES["random"]
        assert expected(data, old, new, box, offset).tobytes() == reference.rekey(data.tobytes(), *streams, box.table)


@pytest.mark.parametrize("new", KINDS, ids=str)
@pytest.mark.parametrize("old", KINDS, ids=str)
def test_every_pair_of_schedules_and_lengths_of_key(tier, old, new):
    keys = schedules(old, new)
    for nbytes in (0, 1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 600):
        for offset in (0, 5, 16, 1601):
            data = painted(nbytes)
            wanted = expected(data, old, new, offset=offset)
            assert np.array_equal(rekey(data, *keys, offset=offset), wanted), (nbytes, offset)
            assert np.array_equal(data, painted(nbytes))
            assert rekey(data, *keys, offset=offset, out=data) is data
            assert np.array_equal(data, wanted), (nbytes, offset)


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("pair", ["fused", "from expansion"])
def test_every_s_box_and_every_byte(tier, pair, name):
    old, new = PAIRS[pair]
    data = painted(256 * 251)
    result = rekey(data, *schedules(old, new), sbox=BOXES[name])
    assert np.array_equal(result, expected(data, old, new, BOXES[name]))


@each_pair
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_long_data(tier, pair, threads):
    """Around the size of a mask, and more than one piece of each kind."""
    old, new = PAIRS[pair]
    keys = schedules(old, new)
    for nbytes, offset in ((1 << 18, 0), ((1 << 18) + 1, 7), ((1 << 20) + 77, 13)):
        data = painted(nbytes)
        wanted = expected(data, old, new, offset=offset)
        assert np.array_equal(rekey(data, *keys, offset=offset, threads=threads), wanted)
        rekey(data, *keys, offset=offset, out=data, threads=threads)
        assert np.array_equal(data, wanted)


@each_pair
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_pieces(tier, pair, threads, small_pieces):
    old, new = PAIRS[pair]
    for nbytes, offset in ((PIECE - 1, 3), (PIECE, 0), (PIECE + 1, 1), (40 * PIECE + 100, 40_001)):
        data = painted(nbytes)
        result = rekey(data, *schedules(old, new), offset=offset, threads=threads)
        assert np.array_equal(result, expected(data, old, new, offset=offset)), nbytes


@each_pair
def test_memory_beside_is_left_alone(tier, pair):
    old, new = PAIRS[pair]
    keys = schedules(old, new)
    for start, nbytes in ((1, 1), (17, 63), (64, 256), (33, 1000)):
        memory, source = painted(1400), painted(nbytes)
        rekey(source, *keys, out=memory[start : start + nbytes])
        assert np.array_equal(memory[:start], painted(start))
        assert np.array_equal(memory[start + nbytes :], painted(1400 - start - nbytes, start + nbytes))
        assert np.array_equal(memory[start : start + nbytes], expected(source, old, new))
        assert np.array_equal(source, painted(nbytes))


@pytest.mark.parametrize("offset", [(1 << 32) - 40, (1 << 36) + 1, (1 << 62) + 13, 2**63 - 300])
@pytest.mark.parametrize("pair", ["fused", "other bits"])
def test_far_into_both_key_streams(tier, pair, offset):
    old, new = PAIRS[pair]
    result = rekey(painted(300), *schedules(old, new), offset=offset)
    assert np.array_equal(result, expected(painted(300), old, new, offset=offset))


@settings(max_examples=40)
@given(data=st.data())
def test_it_is_unlock_and_lock_and_has_a_way_back(data):
    old, new = (data.draw(st.sampled_from(KINDS)) for _ in range(2))
    keys = schedules(old, new)
    box = BOXES[data.draw(st.sampled_from(sorted(BOXES)))]
    offset = data.draw(st.integers(0, 5000))
    plain = np.frombuffer(data.draw(st.binary(max_size=700)), np.uint8)
    locked = lock(plain, keys[0], sbox=box, offset=offset)
    result = rekey(locked, *keys, sbox=box, offset=offset)
    assert np.array_equal(result, lock(plain, keys[1], sbox=box, offset=offset))
    assert np.array_equal(unlock(result, keys[1], sbox=box, offset=offset), plain)
    assert np.array_equal(rekey(result, *keys[::-1], sbox=box, offset=offset), locked)
    cut = data.draw(st.integers(0, len(plain)))
    parts = rekey(locked[:cut], *keys, sbox=box, offset=offset), rekey(locked[cut:], *keys, sbox=box, offset=offset + cut)
    assert np.array_equal(np.concatenate(parts), result)


def test_the_result_is_of_the_data_s_kind():
    keys = schedules(*PAIRS["fused"])
    data = np.linspace(0, 1, 60, dtype=np.float32).reshape(3, 20)
    result = rekey(data, *keys)
    assert (result.dtype, result.shape) == (data.dtype, data.shape)
    assert np.array_equal(result.view(np.uint8).ravel(), expected(data.view(np.uint8).ravel(), *PAIRS["fused"]))
    out = bytearray(240)
    assert rekey(data, *keys, out=out) is out
    assert bytes(out) == result.tobytes()


@each_pair
def test_from_a_key_to_itself(pair):
    schedule = schedules(*PAIRS[pair])[1]
    assert np.array_equal(rekey(painted(999), schedule, schedule), painted(999))


# The plain bytes


@each_pair
def test_no_plain_byte_is_in_memory(pair, monkeypatch, small_pieces):
    """Between any two calls: memory holds locked bytes of either key, and the mask is both key streams, XORed."""
    old, new = PAIRS[pair]
    keys = schedules(old, new)
    plain = painted(3 * PIECE + 50)
    locked, moved = (lock(plain, schedule) for schedule in keys)
    data, masks = locked.copy(), SimpleNamespace()
    monkeypatch.setattr(rekeying, "threading", SimpleNamespace(local=lambda: masks))
    seen = []

    def look():
        assert ((data == locked) | (data == moved)).all()
        if hasattr(masks, "mask"):
            seen.append(masks.mask.raw)

    def watched(tier, name):
        function = kernel(tier, name)

        def call(record):
            look()
            function(record)
            look()

        return call

    monkeypatch.setattr(rekeying, "kernel", watched)
    rekey(data, *keys, out=data, threads=1)
    assert np.array_equal(data, moved)
    mask = mask_of(old, new, len(plain)).tobytes()
    pieces = [mask[start : start + PIECE] for start in range(0, len(mask), PIECE)]
    assert all(any(found.startswith(piece) for piece in pieces) for found in seen)
    assert len(seen) == (0 if pair == "fused" else 2 * len(pieces))
    assert pair == "fused" or not any(masks.mask.raw), "wiped in the end"


# Refusals


def overlapping():
    memory = painted(100)
    return memory[:60], memory[1:61]


def read_only():
    memory = painted(60)
    memory.flags.writeable = False
    return memory


def wiped():
    schedule = CounterSchedule(KEYS[128], IV)
    schedule.wipe()
    return schedule


WRONG = {
    "data of text": (BufferTypeError, TypeError, "data: got str", {"data": "text"}),
    "old of bytes": (BufferTypeError, TypeError, "old: got bytes, accepted is a schedule (", {"old": KEYS[256]}),
    "new of bytes": (BufferTypeError, TypeError, "new: got bytes, accepted is a schedule (", {"new": KEYS[256]}),
    "new of None": (BufferTypeError, TypeError, "new: got NoneType", {"new": None}),
    "old wiped": (KeyWipedError, ValueError, "CounterSchedule: it was wiped", {"old": wiped()}),
    "new wiped": (KeyWipedError, ValueError, "CounterSchedule: it was wiped", {"new": wiped()}),
    "unknown S-Box": (UnknownNameError, KeyError, "sbox: got 'none'", {"sbox": "none"}),
    "table as S-Box": (UnknownNameError, KeyError, "sbox: got ", {"sbox": AES.table}),
    "negative offset": (ParameterError, ValueError, "offset: got -1", {"offset": -1}),
    "offset of a half": (ParameterError, ValueError, "offset: got float", {"offset": 0.5}),
    "offset too far": (ParameterError, ValueError, "offset: got ", {"offset": 2**63 - 59}),
    "no threads": (ParameterError, ValueError, "threads: got 0", {"threads": 0}),
    "out too small": (SizeMismatchError, ValueError, "out: got 59 bytes", {"out": bytearray(59)}),
    "out too large": (SizeMismatchError, ValueError, "out: got 61 bytes", {"out": bytearray(61)}),
    "out read-only": (ReadOnlyError, ValueError, "out: ", {"out": read_only()}),
    "data read-only in place": (ReadOnlyError, ValueError, "out: ", dict.fromkeys(("data", "out"), read_only())),
    "out of steps": (BufferLayoutError, ValueError, "out: ", {"out": np.zeros(120, np.uint8)[::2]}),
    "overlap": (OverlapError, ValueError, "out: ", dict(zip(("data", "out"), overlapping(), strict=True))),
}


@each_pair
@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused_changes_nothing(case, pair):
    kind, builtin, start, wrong = WRONG[case]
    old, new = schedules(*PAIRS[pair])
    arguments = {"data": painted(60), "old": old, "new": new} | wrong
    memory = [arguments["data"], arguments.get("out", b"")]
    before = [part if isinstance(part, str) else bytes(memoryview(np.asarray(part))) for part in memory]
    refuse(kind, builtin, start, rekey, **arguments)
    assert before == [part if isinstance(part, str) else bytes(memoryview(np.asarray(part))) for part in memory]


def test_what_is_wrong_is_refused_without_a_byte_too():
    old, new = schedules(*PAIRS["fused"])
    for wrong in ({"old": wiped()}, {"new": b""}, {"sbox": "none"}, {"threads": 0}, {"out": b""}):
        with pytest.raises((KeyWipedError, BufferTypeError, UnknownNameError, ParameterError, ReadOnlyError)):
            rekey(**{"data": b"", "old": old, "new": new} | wrong)
    assert rekey(b"", old, new).size == 0


# Tensors

OLD_KEY, NEW_KEY = KEYS[256], NEW_KEYS[256]
OLD_SALT, NEW_SALT = bytes(range(50, 66)), bytes(range(70, 86))
OWN_BOX = BOXES["random"]
CHANGES = {  # of a lock: the old key and schedule, and what rekeying is given
    "counter": (256, "counter", 256, None),
    "expansion": (256, "expansion", 256, None),
    "to expansion": (256, "counter", 256, "expansion"),
    "to counter": (128, "expansion", 128, "counter"),
    "to a longer key": (128, "counter", 256, None),
    "to a shorter key": (256, "expansion", 192, "counter"),
}
each_change = pytest.mark.parametrize("change", CHANGES)
FUSED_AND_MASKED = pytest.mark.parametrize("change", ["counter", "to expansion"])


def some_tensors():
    tensors = {"a": painted(3000), "empty": painted(0), "слой/重み": painted(1), "b": painted(70, 9), "c": painted(40_001)}
    tensors["shared"] = tensors["b"].view(np.uint16)
    return tensors


def bytes_of(tensors):
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


@pytest.fixture
def salts(monkeypatch):
    """Give a function that says which salt comes next."""

    def choose(salt):
        monkeypatch.setattr(secrets, "token_bytes", lambda count: salt[:count])

    return choose


def unchanged(tensors, error, words, function, /, *arguments, **keywords):
    """Call a function that must fail without changing a byte of any tensor; give its message."""
    before = bytes_of(tensors)
    with pytest.raises(error, match=words) as caught:
        function(*arguments, **keywords)
    assert bytes_of(tensors) == before
    return str(caught.value)


def copies_of(tensors):
    """Copy them, what is shared once."""
    copies = {name: tensor.copy() for name, tensor in tensors.items()}
    copies["shared"] = copies["b"].view(np.uint16)
    return copies


@pytest.mark.parametrize(("sbox", "seal"), [("aes", True), (OWN_BOX, False)], ids=["named", "own"])
@each_change
def test_tensors_become_what_a_lock_with_the_new_key_gives(tier, salts, small_pieces, change, seal, sbox):
    old_bits, old_schedule, new_bits, schedule = CHANGES[change]
    old_key, new_key, own = KEYS[old_bits], NEW_KEYS[new_bits], sbox if sbox is OWN_BOX else None
    salts(OLD_SALT)
    tensors = some_tensors()
    header = lock_tensors(tensors, old_key, schedule=old_schedule, sbox=sbox)
    salts(NEW_SALT)
    wanted = some_tensors()
    wanted_header = lock_tensors(wanted, new_key, schedule=schedule or old_schedule, sbox=sbox, seal=seal)
    for threads in (1, 3):
        moved, options = copies_of(tensors), {"sbox": own, "threads": threads}
        new_header = rekey_tensors(moved, old_key, new_key, header, schedule=schedule, seal=seal, **options)
        assert new_header == wanted_header
        assert bytes_of(moved) == bytes_of(wanted)
    unlock_tensors(moved, new_key, LockHeader.from_json(new_header.to_json()), sbox=own)
    assert bytes_of(moved) == bytes_of(some_tensors())


@each_change
def test_seals_and_mac_are_the_oracle_s(change):
    old_bits, old_schedule, new_bits, schedule = CHANGES[change]
    tensors = {"a": painted(600), "empty": painted(0), "b": painted(17)}
    header = lock_tensors(tensors, KEYS[old_bits], schedule=old_schedule)
    key = NEW_KEYS[new_bits]
    header = rekey_tensors(tensors, KEYS[old_bits], key, header, schedule=schedule)
    assert (header.key_bits, header.schedule) == (new_bits, schedule or old_schedule)
    assert header.check == reference.check_value(key, header.salt)
    assert header.mac == oracle_mac(key, header)
    for name, tensor in tensors.items():
        assert header.tensors[name].seal == oracle_seal(key, header, name, tensor.tobytes())


@each_change
def test_only_the_new_key_with_the_new_header_unlocks(change):
    old_bits, old_schedule, new_bits, schedule = CHANGES[change]
    old_key, new_key = KEYS[old_bits], NEW_KEYS[new_bits]
    tensors = some_tensors()
    old = lock_tensors(tensors, old_key, schedule=old_schedule)
    new = rekey_tensors(tensors, old_key, new_key, old, schedule=schedule)
    unchanged(tensors, WrongKeyError, "^key: ", unlock_tensors, tensors, old_key, new)
    unchanged(tensors, WrongKeyError, "^key: ", unlock_tensors, tensors, new_key, old)
    unchanged(tensors, TamperedError, "^tensors", unlock_tensors, tensors, old_key, old)
    unchanged(tensors, TamperedError, "^tensors", rekey_tensors, tensors, old_key, new_key, old)
    verify_tensors(tensors, new_key, new)
    unlock_tensors(tensors, new_key, new)
    assert bytes_of(tensors) == bytes_of(some_tensors())


@pytest.mark.parametrize("key", [OLD_KEY, NEW_KEY], ids=["the same key", "another key"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_has_a_salt_of_its_own(schedule, key):
    """Also for the same key: that is how a salt is changed. The paper's schedule has no use for one."""
    tensors = some_tensors()
    headers = [lock_tensors(tensors, OLD_KEY, schedule=schedule)]
    states = [tensors["a"].tobytes()]
    for keys in ((OLD_KEY, key), (key, OLD_KEY)):
        headers.append(rekey_tensors(tensors, *keys, headers[-1]))
        states.append(tensors["a"].tobytes())
    assert len({header.salt for header in headers}) == len({header.check for header in headers}) == 3
    assert len(set(states)) == (3 if schedule == "counter" else 1 if key == OLD_KEY else 2)
    unlock_tensors(tensors, OLD_KEY, headers[-1])
    assert bytes_of(tensors) == bytes_of(some_tensors())


@pytest.mark.parametrize("only", ["b", "shared"])
@each_change
def test_tensors_that_have_become_copies(change, only):
    """Each goes on as a tensor of its own, with a key stream and a seal of its own."""
    old_bits, old_schedule, new_bits, schedule = CHANGES[change]
    tensors = some_tensors()
    header = lock_tensors(tensors, KEYS[old_bits], schedule=old_schedule)
    assert header.tensors["shared"].same_as == "b"
    separate = {name: tensor.copy() for name, tensor in tensors.items()}
    wrong = {**separate, only: separate[only].copy()}
    wrong[only][3] ^= 1
    words = rf"^tensors\['{only}'\]: .*; 1 such in all"
    unchanged(wrong, TamperedError, words, rekey_tensors, wrong, KEYS[old_bits], NEW_KEYS[new_bits], header)
    header = rekey_tensors(separate, KEYS[old_bits], NEW_KEYS[new_bits], header, schedule=schedule)
    assert header.tensors["shared"].same_as is None
    assert separate["shared"].tobytes() != separate["b"].tobytes()
    unlock_tensors(separate, NEW_KEYS[new_bits], header)
    assert bytes_of(separate) == bytes_of(some_tensors())


@each_change
def test_what_is_not_locked_is_left_alone(change):
    old_bits, old_schedule, new_bits, schedule = CHANGES[change]
    tensors = some_tensors()
    header = lock_tensors(tensors, KEYS[old_bits], schedule=old_schedule, only=["a", "empty"])
    header = rekey_tensors(tensors, KEYS[old_bits], NEW_KEYS[new_bits], header, schedule=schedule)
    assert list(header.tensors) == ["a", "empty"]
    plain = bytes_of(some_tensors())
    assert {name for name, data in bytes_of(tensors).items() if data != plain[name]} == {"a"}
    nothing = lock_tensors({}, OLD_KEY)
    assert not rekey_tensors({"other": painted(5)}, OLD_KEY, NEW_KEY, nothing, schedule=schedule).tensors


@FUSED_AND_MASKED
def test_tensors_without_seals_get_some(change):
    tensors = some_tensors()
    header = lock_tensors(tensors, OLD_KEY, seal=False)
    header = rekey_tensors(tensors, OLD_KEY, NEW_KEY, header, schedule=CHANGES[change][3])
    verify_tensors(tensors, NEW_KEY, header)
    unlock_tensors(tensors, NEW_KEY, header)
    assert bytes_of(tensors) == bytes_of(some_tensors())


@FUSED_AND_MASKED
@pytest.mark.parametrize("name", ["a", "слой/重み", "b", "c"])
def test_one_wrong_bit_and_nothing_is_done(name, change):
    tensors = some_tensors()
    header = lock_tensors(tensors, OLD_KEY)
    tensors[name][-1] ^= 0x80
    words = rf"^tensors\['{name}'\]: its bytes are not those that were sealed"
    options = {"schedule": CHANGES[change][3]}
    unchanged(tensors, TamperedError, words, rekey_tensors, tensors, OLD_KEY, NEW_KEY, header, **options)


WRONG_TENSORS = {
    "another key": (WrongKeyError, "^key: it is not the one", {"old_key": NEW_KEY}),
    "keys exchanged": (WrongKeyError, "^key: it is not the one", {"old_key": NEW_KEY, "new_key": OLD_KEY}),
    "a shorter key": (WrongKeyError, "^key: got 128 bits", {"old_key": KEYS[128]}),
    "no old key": (KeyTypeError, "^key: ", {"old_key": None}),
    "no new key": (KeyTypeError, "^key: ", {"new_key": None}),
    "unknown schedule": (UnknownNameError, "^schedule: got 'none'", {"schedule": "none"}),
    "an S-Box for a named one": (SBoxError, "^sbox: ", {"sbox": OWN_BOX}),
    "no header": (HeaderError, "^header: got dict", {"header": {}}),
    "no threads": (ParameterError, "^threads: ", {"threads": 0}),
    "no mapping": (BufferTypeError, "^tensors: got list", {"tensors": []}),
    "a tensor is missing": (TensorNameError, "^tensors: ", {"tensors": {"a": painted(3000)}}),
}


@FUSED_AND_MASKED
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_arguments_change_no_tensor(case, change):
    error, words, wrong = WRONG_TENSORS[case]
    tensors = some_tensors()
    header = lock_tensors(tensors, OLD_KEY)
    arguments = {"tensors": tensors, "old_key": OLD_KEY, "new_key": NEW_KEY, "header": header}
    arguments["schedule"] = CHANGES[change][3]
    unchanged(tensors, error, words, rekey_tensors, **(arguments | wrong))
    wrong_size = {**tensors, "a": tensors["a"][1:]}
    arguments["tensors"] = wrong_size
    unchanged(wrong_size, SizeMismatchError, "'a'", rekey_tensors, **arguments)


@FUSED_AND_MASKED
def test_a_tampered_header(change):
    tensors = some_tensors()
    header = lock_tensors(tensors, OLD_KEY)
    other = lock_tensors({"a": painted(5)}, OLD_KEY)
    for field in ({"mac": bytes(32)}, {"mac": None}, {"sbox": "sm4"}, {"salt": other.salt, "check": other.check}):
        altered = dataclasses.replace(header, **field)
        options = {"schedule": CHANGES[change][3]}
        unchanged(tensors, TamperedHeaderError, "^header: ", rekey_tensors, tensors, OLD_KEY, NEW_KEY, altered, **options)


def test_an_own_s_box_has_to_be_given_again():
    tensors = some_tensors()
    header = lock_tensors(tensors, OLD_KEY, sbox=OWN_BOX)
    for wrong in ({}, {"sbox": AES}, {"sbox": OWN_BOX.inverse}):
        unchanged(tensors, SBoxError, "^sbox: ", rekey_tensors, tensors, OLD_KEY, NEW_KEY, header, **wrong)


def test_a_wiped_key_is_refused():
    tensors = some_tensors()
    header = lock_tensors(tensors, OLD_KEY)
    key = MasterKey.from_bytes(NEW_KEY)
    key.wipe()
    unchanged(tensors, KeyWipedError, None, rekey_tensors, tensors, OLD_KEY, key, header)
    assert rekey_tensors(tensors, MasterKey.from_bytes(OLD_KEY), MasterKey.from_bytes(NEW_KEY), header).key_bits == 256


# All of them or none


def failing_run(monkeypatch, count, error, where, seen):
    """Let the call at place `count` of the next rekeying fail, and call `seen` just before that."""

    def fail(*arguments):
        seen()
        raise error

    def run_and_fail(calls, threads, undo):
        monkeypatch.setattr(rekeying, "pool", pool)
        calls = list(calls)
        bad = calls[count]
        calls[count] = bad._replace(before=fail) if where == "before" else bad._replace(function=fail)
        pool.run(calls, threads, undo)

    monkeypatch.setattr(rekeying, "pool", SimpleNamespace(run=run_and_fail, take_back=pool.take_back))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("where", ["before", "kernel"])
@pytest.mark.parametrize("threads", [1, 3])
@each_change
def test_a_failure_leaves_all_tensors_as_they_were(monkeypatch, small_pieces, change, threads, where, error):
    old_bits, old_schedule, new_bits, schedule = CHANGES[change]
    tensors = some_tensors()
    header = lock_tensors(tensors, KEYS[old_bits], schedule=old_schedule)
    keys, states, locked = (KEYS[old_bits], NEW_KEYS[new_bits]), [], bytes_of(tensors)
    options = {"schedule": schedule, "threads": threads}
    for count in (0, 1, 2, -2, -1):
        failing_run(monkeypatch, count, error, where, lambda: states.append(bytes_of(tensors)))
        unchanged(tensors, type(error), None, rekey_tensors, tensors, *keys, header, **options)
    assert len(states) == 5
    if threads == 1:  # in the order of the calls: something was there to be taken back
        assert [state == locked for state in states] == [True] + 4 * [False]
    header = rekey_tensors(tensors, *keys, header, **options)
    unlock_tensors(tensors, keys[1], header)
    assert bytes_of(tensors) == bytes_of(some_tensors())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("step", ["prove", "seals"])
@pytest.mark.parametrize("pieces", ["small", "whole"])
@each_change
def test_a_failure_behind_the_last_kernel(monkeypatch, request, change, pieces, step, error):
    """Of the seals of what was written, or of the header: all is taken back."""
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    old_bits, old_schedule, new_bits, schedule = CHANGES[change]
    fused = change == "counter"
    tensors = some_tensors()
    locked_header = lock_tensors(tensors, KEYS[old_bits], schedule=old_schedule)
    locked, states = bytes_of(tensors), []
    original = getattr(NamedLock, step)

    def fail(self, *arguments):
        if bytes_of(tensors) == locked:  # the old seals
            return original(self, *arguments)
        states.append(bytes_of(tensors))
        raise error

    arguments = tensors, KEYS[old_bits], NEW_KEYS[new_bits], locked_header
    if step == "seals" and fused:
        step = "prove"  # a fused kernel has sealed what it wrote
    monkeypatch.setattr(NamedLock, step, fail)
    unchanged(tensors, type(error), None, rekey_tensors, *arguments, schedule=schedule)
    assert len(states) == 1
    assert states[0]["c"] != locked["c"]
    monkeypatch.undo()
    header = rekey_tensors(*arguments, schedule=schedule)
    unlock_tensors(tensors, NEW_KEYS[new_bits], header)
    assert bytes_of(tensors) == bytes_of(some_tensors())


@each_change
def test_interrupted_while_keys_are_wiped_all_is_as_it_was(monkeypatch, change):
    """The tensors are under the new key by then, and only the header that nobody would get could unlock them."""
    old_bits, old_schedule, new_bits, schedule = CHANGES[change]
    tensors = some_tensors()
    header = lock_tensors(tensors, KEYS[old_bits], schedule=old_schedule)
    locked, original, states = bytes_of(tensors), NamedLock.__exit__, []

    def interrupted(self, *error):
        original(self, *error)
        if not states:
            states.append(bytes_of(tensors))
            raise KeyboardInterrupt

    monkeypatch.setattr(NamedLock, "__exit__", interrupted)
    arguments = tensors, KEYS[old_bits], NEW_KEYS[new_bits], header
    unchanged(tensors, KeyboardInterrupt, None, rekey_tensors, *arguments, schedule=schedule)
    assert states[0] != locked


@each_pair
@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_leaves_bytes_as_they_were(monkeypatch, small_pieces, pair, threads):
    keys = schedules(*PAIRS[pair])
    for where in ("before", "kernel"):
        for count in (0, 3, -1):
            data, states = painted(40 * PIECE), []
            failing_run(monkeypatch, count, KeyboardInterrupt(), where, lambda d=data, s=states: s.append(d.copy()))
            with pytest.raises(KeyboardInterrupt):
                rekey(data, *keys, out=data, threads=threads)
            assert np.array_equal(data, painted(40 * PIECE))
            if threads == 1:
                assert np.array_equal(states[0], data) == (count == 0)


# Files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a plain file, an old target and nothing else."""
    monkeypatch.chdir(tmp_path)
    # Their data lie in the order of the names.
    tensors = {"a": np.zeros(5, np.float32), "b": painted(3000).reshape(30, 100), "c": painted(2001), "none": painted(0)}
    safetensors.numpy.save_file(tensors, "plain", metadata={"x": "y", "": "ä"})
    (tmp_path / "old").write_bytes(b"what the target held before")
    return tmp_path


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def data_of(path):
    # Sorted, for the library gives them in any order, and the key stream of expansion runs in that of the tensors.
    found = sorted((name, entry["data"]) for name, entry in safetensors.deserialize(path.read_bytes()))
    return {name: np.frombuffer(data, np.uint8).copy() for name, data in found}


@pytest.mark.parametrize("window", [4096, None])
@pytest.mark.parametrize(("sbox", "seal"), [("aes", True), (OWN_BOX, False)], ids=["named", "own"])
@each_change
def test_a_file_becomes_what_a_lock_with_the_new_key_gives(folder, salts, monkeypatch, change, sbox, seal, window):
    if window is not None:
        monkeypatch.setattr(checkpoints, "WINDOW", window)
    old_bits, old_schedule, new_bits, schedule = CHANGES[change]
    old_key, new_key, own = KEYS[old_bits], NEW_KEYS[new_bits], sbox if sbox is OWN_BOX else None
    salts(OLD_SALT)
    lock_file("plain", "locked", old_key, schedule=old_schedule, sbox=sbox)
    salts(NEW_SALT)
    wanted = lock_file("plain", "wanted", new_key, schedule=schedule or old_schedule, sbox=sbox, seal=seal)
    done = []
    options = {"schedule": schedule, "seal": seal, "sbox": own, "progress": done.append}
    header = rekey_file("locked", "new", old_key, new_key, **options)
    assert header == wanted == read_header("new")
    assert (folder / "new").read_bytes() == (folder / "wanted").read_bytes()
    assert sum(done) == 5021
    unlock_file("new", "back", new_key, sbox=own)
    assert (folder / "back").read_bytes() == (folder / "plain").read_bytes()
    in_memory = data_of(folder / "locked")
    rekey_tensors(in_memory, old_key, new_key, read_header("locked"), schedule=schedule, sbox=own)
    assert bytes_of(in_memory) == bytes_of(data_of(folder / "new"))


@each_change
def test_only_some_tensors_of_a_file(folder, change):
    old_bits, old_schedule, new_bits, schedule = CHANGES[change]
    lock_file("plain", "locked", KEYS[old_bits], schedule=old_schedule, only=["b", "none"])
    header = rekey_file("locked", "new", KEYS[old_bits], NEW_KEYS[new_bits], schedule=schedule)
    assert set(header.tensors) == {"b", "none"}
    plain, new = bytes_of(data_of(folder / "plain")), bytes_of(data_of(folder / "new"))
    assert {name for name in plain if plain[name] != new[name]} == {"b"}
    with safetensors.safe_open("new", framework="np") as file:
        assert file.metadata() == {"x": "y", "": "ä", "deeplock": header.to_json()}
    unlock_file("new", "back", NEW_KEYS[new_bits])
    assert (folder / "back").read_bytes() == (folder / "plain").read_bytes()


def altered(folder, change):
    """Alter the locked file."""
    raw = bytearray((folder / "locked").read_bytes())
    change(raw)
    (folder / "locked").write_bytes(raw)


def flip_last_bit(raw):
    raw[-1] ^= 1


def exchange(old, new):
    def change(raw):
        assert raw.count(old) == 1
        raw[:] = raw.replace(old, new)

    return change


WRONG_FILES = {
    "altered weights": (TamperedError, "its bytes are not those", flip_last_bit, {}),
    "another shape": (TamperedHeaderError, "^header: ", exchange(b"[30,100]", b"[100,30]"), {}),
    "other metadata": (TamperedHeaderError, "^header: ", exchange(b'"x":"y"', b'"x":"z"'), {}),
    "another key": (WrongKeyError, "^key: ", None, {"old_key": NEW_KEY}),
    "no new key": (KeyTypeError, "^key: ", None, {"new_key": ""}),
    "unknown schedule": (UnknownNameError, "^schedule: ", None, {"schedule": "aes"}),
    "not locked": (NotLockedError, "^plain: it carries no lock header", None, {"src": "plain"}),
    "onto itself": (SameFileError, "locked", None, {"dst": "./locked"}),
    "an S-Box for a named one": (SBoxError, "^sbox: ", None, {"sbox": OWN_BOX}),
    "no threads": (ParameterError, "^threads: ", None, {"threads": 0}),
}


@FUSED_AND_MASKED
@pytest.mark.parametrize("target", ["old", "new"])
@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_file_that_is_refused_leaves_the_directory_as_it_was(folder, case, target, change):
    error, words, alter, wrong = WRONG_FILES[case]
    lock_file("plain", "locked", OLD_KEY)
    if alter is not None:
        altered(folder, alter)
    before = snapshot(folder)
    arguments = {"src": "locked", "dst": target, "old_key": OLD_KEY, "new_key": NEW_KEY}
    arguments["schedule"] = CHANGES[change][3]
    with pytest.raises(error, match=words):
        rekey_file(**(arguments | wrong))
    assert snapshot(folder) == before


@FUSED_AND_MASKED
@pytest.mark.parametrize("failing_window", [0, 1, -1])
def test_a_file_that_fails_half_way_leaves_the_directory_as_it_was(folder, monkeypatch, change, failing_window):
    monkeypatch.setattr(checkpoints, "WINDOW", 1000)
    lock_file("plain", "locked", OLD_KEY)
    before, windows = snapshot(folder), []
    count = failing_window % 6

    def progress(nbytes):
        windows.append(nbytes)
        if len(windows) > count:
            raise KeyboardInterrupt

    options = {"schedule": CHANGES[change][3], "progress": progress}
    with pytest.raises(KeyboardInterrupt):
        rekey_file("locked", "new", OLD_KEY, NEW_KEY, **options)
    assert len(windows) == count + 1
    assert snapshot(folder) == before
