"""What holds whatever is locked: inverse, splitting, place, dtype, threads, a second oracle, overlap."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BITS, BOXES, IV, KEYS, OPERATIONS, SCHEDULES, openssl_key_stream, painted

from deeplock_kernels import transform
from deeplock_kernels.errors import OverlapError
from deeplock_kernels.locking import lock, substitute, unlock
from deeplock_kernels.runtime import pool
from deeplock_kernels.sboxes import SBox
from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule


class Case(NamedTuple):
    """Something to lock."""

    data: np.ndarray
    keys: Any
    options: dict[str, Any]  # S-Box and offset


@st.composite
def cases(draw):
    """Draw data, key, box and an offset: anywhere for counter, in the first segments for expansion."""
    key = draw(st.sampled_from(BITS).flatmap(lambda bits: st.binary(min_size=bits // 8, max_size=bits // 8)))
    length = draw(st.integers(0, 700))
    data = painted(length, draw(st.integers(0, 250)))
    random_bytes = draw(st.binary(max_size=64))
    data[: len(random_bytes)] = np.frombuffer(random_bytes, np.uint8)[:length]
    box = draw(st.sampled_from(sorted(BOXES)).map(BOXES.get) | st.permutations(range(256)).map(SBox))
    if draw(st.sampled_from(SCHEDULES)) == "counter":
        keys = CounterSchedule(key, draw(st.binary(min_size=16, max_size=16)))
        offset = draw(st.integers(0, 100_000) | st.integers(0, 2**63 - 700))
    else:
        keys = ExpansionSchedule(key)
        offset = draw(st.integers(0, 1000) | st.integers(0, 600_000))
    return Case(data, keys, {"sbox": box, "offset": offset})


def same(a, b):
    return np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


# Laws of locking


@given(case=cases())
def test_unlocking_what_was_locked_and_locking_what_was_unlocked_give_it_back(tier, case):
    locked = lock(case.data, case.keys, **case.options)
    assert same(unlock(locked, case.keys, **case.options), case.data)
    unlocked = unlock(case.data, case.keys, **case.options)
    assert same(lock(unlocked, case.keys, **case.options), case.data)
    box = case.options["sbox"]
    assert same(substitute(substitute(case.data, box), box, inverse=True), case.data)


@pytest.mark.parametrize("direction", OPERATIONS)
@given(case=cases(), cuts=st.lists(st.integers(0, 700), max_size=5))
def test_data_may_be_cut_anywhere(tier, direction, case, cuts):
    """Which says too that an offset gives the tail of the whole."""
    operation, (data, keys, options) = OPERATIONS[direction], case
    whole = operation(data, keys, **options)
    borders = sorted({0, data.size, *(min(cut, data.size) for cut in cuts)})
    for start, stop in itertools.pairwise(borders):
        part = options | {"offset": options["offset"] + start}
        assert same(operation(data[start:stop], keys, **part), whole[start:stop])
        assert same(operation(data[start:], keys, **part), whole[start:])


@pytest.mark.parametrize("direction", OPERATIONS)
@given(case=cases())
def test_in_place_or_elsewhere_gives_the_same(tier, direction, case):
    operation, (data, keys, options) = OPERATIONS[direction], case
    before = data.copy()
    wanted = operation(data, keys, **options)
    assert same(data, before)
    other = np.zeros_like(data)
    assert operation(data, keys, out=other, **options) is other
    assert same(other, wanted)
    assert operation(data, keys, out=data, **options) is data
    assert same(data, wanted)
    box, inverse = options["sbox"], direction == "unlock"
    wanted = substitute(data, box, inverse=inverse)
    assert substitute(data, box, inverse=inverse, out=data) is data
    assert same(data, wanted)


@given(case=cases())
def test_locked_zeros_are_the_substituted_key_stream(tier, case):
    data, keys, options = case
    stream = keys.keystream(data.size, options["offset"])
    locked = lock(np.zeros_like(data), keys, **options)
    assert same(locked, support.table_of(options["sbox"])[stream])
    assert same(locked, substitute(stream, options["sbox"]))


@given(
    key=st.sampled_from(BITS).flatmap(lambda bits: st.binary(min_size=bits // 8, max_size=bits // 8)),
    iv=st.binary(min_size=16, max_size=16)
    | st.builds(
        lambda power, before: ((1 << power) - before).to_bytes(17, "big")[1:],
        st.sampled_from([32, 64, 96, 128]),
        st.integers(1, 40),
    ),
    nbytes=st.integers(0, 1000) | st.integers(0, 20_000),
    offset=st.integers(0, 1000) | st.integers(0, 2**63 - 20_000),
)
def test_counter_key_stream_is_that_of_openssl(tier, key, iv, nbytes, offset):
    stream = CounterSchedule(key, iv).keystream(nbytes, offset)
    assert same(stream, openssl_key_stream(key, iv, nbytes, offset))


# Dtypes and shapes

DTYPES = [
    *(np.dtype(text) for text in ("?", "i1", "u1", "<i2", ">i2", "<u4", ">u4", "<i8", ">i8")),
    *(np.dtype(text) for text in ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "g")),
    *(np.dtype(text) for text in ("<c8", ">c8", "<c16", ">c16")),
    *(np.dtype(text) for text in ("M8[ns]", "m8[s]", "S5", "U3", "V7", "i1,<f4,3u2")),
    *(np.dtype(getattr(ml_dtypes, name)) for name in sorted(vars(ml_dtypes)) if name.startswith("float")),
    *(np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "int4", "uint4")),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name + dtype.str)
def test_the_bytes_of_any_dtype_and_shape_are_locked(tier, schedule, dtype):
    keys = support.make_schedule(schedule, 256)
    random = np.random.default_rng(3)
    for shape in ((), (1,), (0,), (7,), (3, 0, 2), (3, 5, 2), (1, 1, 41, 1)):
        count = int(np.prod(shape))
        data = random.integers(0, 256, count * dtype.itemsize, np.uint8)
        array = data.view(dtype).reshape(shape)
        for operation, inverse in ((lock, unlock), (unlock, lock)):
            changed = operation(array, keys, sbox="sm4", offset=5)
            assert (changed.dtype, changed.shape) == (array.dtype, array.shape)
            assert changed.tobytes() == operation(data, keys, sbox="sm4", offset=5).tobytes()
            assert inverse(changed, keys, sbox="sm4", offset=5).tobytes() == data.tobytes()
            own = array.copy()
            assert operation(own, keys, sbox="sm4", offset=5, out=own) is own
            assert own.tobytes() == changed.tobytes()


SPECIAL = {  # zero below zero, quiet and signalling NaN with payloads, subnormal, infinity
    "<f2": (0x8000, 0x7E01, 0xFE55, 0x7D01, 0x0001, 0x7C00),
    "<f4": (0x80000000, 0x7FC12345, 0xFFC54321, 0x7F812345, 1, 0x7F800000),
    "<f8": (1 << 63, 0x7FF8123456789ABC, 0xFFF8CBA987654321, 0x7FF0123456789ABC, 1, 0x7FF << 52),
    "bfloat16": (0x8000, 0x7FC1, 0xFFD5, 0x7F81, 0x0001, 0x7F80),
    "float8_e5m2": (0x80, 0x7E, 0xFF, 0x7D, 0x01, 0x7C),
    "float8_e4m3fn": (0x80, 0x7F, 0xFF, 0x01, 0x7E, 0x78),
}


@pytest.mark.parametrize("dtype", SPECIAL)
def test_every_bit_of_special_numbers_comes_back(tier, dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    array = np.array(SPECIAL[dtype], f"<u{kind.itemsize}").view(kind)
    with np.errstate(invalid="ignore"):
        assert np.isnan(array).any()
    keys = support.make_schedule("counter", 128)
    assert unlock(lock(array, keys), keys).tobytes() == array.tobytes()
    stream = support.key_stream("counter", 128, array.nbytes)
    wanted = support.expected("lock", array.view(np.uint8), stream, BOXES["aes"])
    assert lock(array, keys).tobytes() == wanted.tobytes()


# Threads

THREADS = (1, 2, 3, 7)


@pytest.fixture
def jobs(monkeypatch):
    """Note (number of pieces, threads) of whatever is cut into pieces."""
    jobs = []
    original = pool.run

    def run(calls, threads, undo=None):
        if len(calls) > 1:
            jobs.append((len(calls), threads))
        original(calls, threads, undo)

    monkeypatch.setattr(pool, "run", run)
    return jobs


@pytest.fixture
def small_pieces(monkeypatch, jobs):
    """Make pieces as small as a tier's pace allows."""
    monkeypatch.setattr(transform, "_SMALLEST_JOB", 2)
    monkeypatch.setattr(transform, "_SMALLEST_PIECE", 1)
    monkeypatch.setattr(transform, "_LARGEST_PIECE", 1)
    support.forget_transforms()
    yield jobs
    support.forget_transforms()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_count_never_matters(tier, schedule, small_pieces):
    """With many pieces, of lengths around each threshold of `Transform.piece`."""
    piece = -(-tier.pace // 4096) * 4096
    lengths = [tier.pace + d for d in (-1, 0, 1)] + [2 * tier.pace + d for d in (-1, 0, 1)]
    lengths += [4 * piece + d for d in (-1, 0, 1)] + [5 * piece + 1234]
    total = max(lengths) + 1000
    stream = support.key_stream(schedule, 256, total) if schedule == "expansion" else openssl_stream(total)
    data, keys = painted(total), support.make_schedule(schedule, 256)
    box = BOXES["aes"]
    for direction, operation in OPERATIONS.items():
        wanted = support.expected(direction, data, stream, box)
        for length in lengths:
            for offset in (0, 999):
                part = slice(offset, offset + length)
                for threads in THREADS:
                    result = operation(data[part], keys, offset=offset, threads=threads)
                    assert same(result, wanted[part]), (direction, length, offset, threads)
                    own = data[part].copy()
                    operation(own, keys, offset=offset, threads=threads, out=own)
                    assert same(own, wanted[part]), (direction, length, offset, threads)
    if schedule == "counter":
        assert {threads for _, threads in small_pieces} == set(THREADS)
        assert max(count for count, _ in small_pieces) == 6


def openssl_stream(nbytes):
    return openssl_key_stream(KEYS[256], IV, nbytes, 0)


@pytest.mark.parametrize("direction", OPERATIONS)
def test_thread_count_never_matters_to_whole_groups_of_the_expansion(tier, direction, small_pieces):
    segment = support.segment_bytes(128)
    total = 9 * segment
    data, keys = painted(total), support.make_schedule("expansion", 128)
    wanted = support.expected(direction, data, support.key_stream("expansion", 128, total), BOXES["random"])
    for start, stop in ((0, total), (segment - 3, total), (0, 8 * segment), (17, 8 * segment + 1)):
        for threads in THREADS:
            fresh = support.make_schedule("expansion", 128)
            for used in (fresh, keys):
                own = data[start:stop].copy()
                OPERATIONS[direction](own, used, sbox=BOXES["random"], offset=start, threads=threads, out=own)
                assert same(own, wanted[start:stop]), (start, stop, threads)
    assert {threads for _, threads in small_pieces} == set(THREADS)


def test_thread_count_never_matters_to_substitute(tier, small_pieces):
    data = painted(5 * (tier.pace + 4096))
    for inverse in (False, True):
        box = BOXES["kuznyechik"]
        wanted = support.table_of(box.inverse if inverse else box)[data]
        for threads in THREADS:
            assert same(substitute(data, box, inverse=inverse, threads=threads), wanted), threads
            own = data.copy()
            substitute(own, box, inverse=inverse, threads=threads, out=own)
            assert same(own, wanted), threads
    assert {threads for _, threads in small_pieces} == set(THREADS)


def test_thread_count_never_matters_at_the_thresholds_as_they_are(tier, jobs):
    """Work is cut into pieces from 500 microseconds on, or from 1000 for a single thread."""
    lengths = [500 * tier.pace + d for d in (0, 1)] + [1000 * tier.pace + d for d in (0, 1)]
    data, keys = painted(max(lengths)), support.make_schedule("counter", 256)
    wanted = support.table_of(BOXES["aes"])[data ^ openssl_stream(data.size)]
    own = np.empty_like(data)
    for length in lengths:
        for threads in (1, 3):
            own[:length] = data[:length]
            lock(own[:length], keys, threads=threads, out=own[:length])
            assert np.array_equal(own[:length], wanted[:length]), (length, threads)
            assert bool(jobs) == (length > (1000 if threads == 1 else 500) * tier.pace), (length, threads)
            jobs.clear()


@given(length=st.integers(1, 200_000), threads=st.integers(1, 9), start=st.integers(0, 5000))
@settings(max_examples=30)
def test_pieces_never_matter(tier, small_pieces, length, threads, start):
    data, keys = painted(length), support.make_schedule("counter", 256)
    stream = openssl_key_stream(KEYS[256], IV, length, start)
    result = lock(data, keys, sbox="whirlpool", offset=start, threads=threads)
    assert same(result, support.expected("lock", data, stream, BOXES["whirlpool"]))


# Overlap


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("action", ["lock", "unlock", "substitute"])
def test_only_the_same_or_separate_memory_is_written(tier, action, length):
    keys = support.make_schedule("counter", 192)
    stream = support.key_stream("counter", 192, length)
    for shift in range(-65, 66):
        memory = painted(400)
        before = memory.copy()
        data, out = memory[100 : 100 + length], memory[100 + shift : 100 + shift + length]
        if action == "substitute":
            wanted = support.table_of(BOXES["aria"])[data]
            arguments, options = (data, "aria"), {"out": out}
        else:
            wanted = support.expected(action, data, stream, BOXES["aria"])
            arguments, options = (data, keys), {"out": out, "sbox": "aria"}
        operation = OPERATIONS.get(action, substitute)
        if 0 < abs(shift) < length:
            with pytest.raises(OverlapError, match=r"^out: got memory that overlaps data in part"):
                operation(*arguments, **options)
        else:
            assert operation(*arguments, **options) is out
            before[100 + shift : 100 + shift + length] = wanted
        assert same(memory, before), shift


def test_memory_that_overlaps_as_another_type_is_seen(tier):
    memory = bytearray(painted(128).tobytes())
    data = np.frombuffer(memory, np.float32, 16)
    keys = support.make_schedule("counter", 192)
    others = np.frombuffer(memory, ">i8", 8, 8), np.frombuffer(memory, "?", 64, 63)
    for out in (memoryview(memory)[4:68], *others):
        with pytest.raises(OverlapError):
            lock(data, keys, out=out)
        assert memory == painted(128).tobytes()
    wanted = lock(data, keys).tobytes()
    lock(data, keys, out=memoryview(memory)[64:])
    lock(data, keys, out=memoryview(memory)[:64])
    assert memory == 2 * wanted
