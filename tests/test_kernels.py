"""Every kernel of every tier against the oracle: lengths, alignments, values, counters, saved states."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import support
from processes import Process, run
from support import BITS, BOXES, DIRECTIONS, IV, KEYS, OPERATIONS, SCHEDULES, painted

from deeplock_kernels import reference, transform
from deeplock_kernels.errors import KeyWipedError, ParameterError
from deeplock_kernels.kernels.signatures import (
    RCON_START,
    RCON_WORDS,
    RECORDS,
    SEGMENTS_PER_GROUP,
    KernelName,
    segment_bytes,
)
from deeplock_kernels.locking import lock, substitute, unlock
from deeplock_kernels.runtime import tiers
from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule, counter, expand_key, expansion

VECTORS = json.loads((Path(__file__).parent / "vectors" / "scheme_v1.json").read_text(encoding="utf-8"))

# Steps of the loops are 64, 192 or 256 bytes, scratch memory as much; 31 is 16 + 8 + 4 + 2 + 1 of each width.
LENGTHS = [
    *range(258),
    *(middle + d for middle in (31 * 16, 512, 1024, 31 * 64, 4096, 31 * 192, 31 * 256) for d in (-1, 0, 1)),
]
PHASES = 97  # offsets vary over these


def kernels(*operations):
    """Parametrize a test by each tier and its kernels for some operations."""
    chosen = [pair for pair in support.EVERY_KERNEL if pair[1].operation in operations]
    return pytest.mark.parametrize(("tier", "name"), chosen, indirect=["tier"], ids=support.kernel_id)


def same(result, wanted):
    return np.array_equal(np.asarray(result).view(np.uint8), wanted)


def test_table_look_ups_expect_what_the_oracle_computes():
    data, box = painted(1000), BOXES["random"]
    stream = support.key_stream("counter", 192, 1000)
    for direction, oracle in (("lock", reference.lock), ("unlock", reference.unlock)):
        wanted = oracle(data.tobytes(), stream.tobytes(), box.table)
        assert support.expected(direction, data, stream, box).tobytes() == wanted


# Lengths, alignments, neighbours


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_length_at_many_phases(tier, schedule, bits, box, direction):
    total = max(LENGTHS) + PHASES
    data = painted(total)
    wanted = support.expected(direction, data, support.key_stream(schedule, bits, total), BOXES[box])
    keys, operation = support.make_schedule(schedule, bits), OPERATIONS[direction]
    for length in LENGTHS:
        for offset in (0, 61 * length % PHASES):
            part = slice(offset, offset + length)
            result = operation(data[part], keys, sbox=BOXES[box], offset=offset)
            assert same(result, wanted[part]), (length, offset)


@pytest.mark.parametrize("inverse", [False, True], ids=["S", "S^-1"])
@pytest.mark.parametrize("box", BOXES)
def test_substitute_every_length(tier, box, inverse):
    data = painted(max(LENGTHS))
    data[:256] = np.arange(256)
    wanted = support.table_of(BOXES[box].inverse if inverse else BOXES[box])[data]
    for length in LENGTHS:
        assert same(substitute(data[:length], BOXES[box], inverse=inverse), wanted[:length]), length


ROW = 512  # bytes of a window and its neighbours


@functools.cache
def windows(tail_only):
    """List (length, offset): every tail length alone, and behind a whole step of every loop."""
    tails = range(64)
    return [(base + tail, 13 * tail % PHASES) for base in ((0,) if tail_only else (0, 256)) for tail in tails]


@pytest.mark.parametrize("in_place", [False, True], ids=["separate", "in_place"])
@kernels("counter", "counter_list", "expansion", "substitute")
def test_every_start_alignment_with_every_tail_length_changes_nothing_else(tier, name, in_place):
    """Each window lies in a row of its own; whole rows are compared, so that neighbours on both sides are."""
    kernel = support.RawKernel(tier, name)
    plan = windows(tail_only=in_place)
    plain = painted(len(plan) * ROW)
    background = plain if in_place else painted(len(plan) * ROW, 100)
    wanted = background.copy()
    for row, (length, offset) in enumerate(plan):
        window = slice(row * ROW + 64, row * ROW + 64 + length)
        wanted[window] = kernel.expected(plain[window], offset)
    target, source = support.aligned(plain.size), support.aligned(plain.size)
    for alignment in range(64):
        other = alignment if in_place else (5 * alignment + 3) % 64
        target[:] = np.roll(background, alignment)
        source[:] = np.roll(plain, other)
        into = target.ctypes.data + alignment + 64
        from_ = into if in_place else source.ctypes.data + other + 64
        for row, (length, offset) in enumerate(plan):
            kernel(into + row * ROW, from_ + row * ROW, length, offset)
        assert np.array_equal(target, np.roll(wanted, alignment)), alignment
        assert np.array_equal(source, np.roll(plain, other)), alignment


@kernels("counter_past_cache")
def test_kernel_past_the_cache_at_every_alignment_of_the_source_changes_nothing_else(tier, name):
    """The target starts at a multiple of 64, and the place in the key stream at one of 16."""
    kernel = support.RawKernel(tier, name)
    plan = [(base + tail, 16 * (tail % 5)) for base in (0, 256, 512) for tail in range(64)]
    row = 2 * ROW
    plain, background = painted(len(plan) * row), painted(len(plan) * row, 100)
    wanted = background.copy()
    for i, (length, offset) in enumerate(plan):
        window = slice(i * row + 64, i * row + 64 + length)
        wanted[window] = kernel.expected(plain[window], offset)
    target, source = support.aligned(plain.size), support.aligned(plain.size)
    for alignment in (*range(0, 64, 5), 63):
        target[:] = background
        source[:] = np.roll(plain, alignment)
        into, from_ = target.ctypes.data + 64, source.ctypes.data + 64 + alignment
        for i, (length, offset) in enumerate(plan):
            kernel(into + i * row, from_ + i * row, length, offset)
        assert np.array_equal(target, wanted), alignment
        assert np.array_equal(source, np.roll(plain, alignment)), alignment


@kernels("counter_list")
def test_list_kernel_takes_each_record_with_its_own_key_and_place(tier, name):
    kernel = support.RawKernel(tier, name)
    length, count = name.bits // 8, 12
    random = np.random.default_rng(name.bits)
    keys = [random.bytes(length + 16) for _ in range(count)]
    plain = painted(count * ROW)
    wanted, target = plain.copy(), plain.copy()
    source = plain.copy()
    records = (ctypes.c_int64 * (5 * count))()
    for i, key in enumerate(keys):
        nbytes, offset = (0, 1, 17, 64, 255, 300)[i % 6], (0, 5, 2**40 + 3)[i % 3]
        start = i * ROW + 7 * i
        window = slice(start, start + nbytes)
        stream = np.frombuffer(
            reference.counter_keystream(key[:length], key[length:], nbytes, offset), np.uint8
        )
        table = support.table_of(kernel.box)
        wanted[window] = (
            table[plain[window] ^ stream] if name.direction == "lock" else table[plain[window]] ^ stream
        )
        place = target.ctypes.data + start
        origin = place if i % 2 else source.ctypes.data + start
        records[5 * i : 5 * i + 5] = place, origin, nbytes, offset, kernel._place(key)
    kernel.function(ctypes.addressof(records), 0, *kernel._schedule[1:], kernel._box)
    assert np.array_equal(target, plain)
    kernel.function(ctypes.addressof(records), count, *kernel._schedule[1:], kernel._box)
    assert np.array_equal(target, wanted)
    assert np.array_equal(source, plain)


@kernels("expansion_indexed")
def test_indexed_kernel_at_many_alignments_changes_nothing_else(tier, name):
    kernel = support.RawKernel(tier, name)
    for groups, alignments in ((0, (0,)), (1, (0, 1, 15, 17, 31, 63)), (2, (32,))):
        nbytes = groups * SEGMENTS_PER_GROUP * segment_bytes(name.bits)
        plain = painted(nbytes)
        wanted = kernel.expected(plain)
        for alignment in alignments:
            other = (5 * alignment + 3) % 64
            target, source = support.aligned(nbytes + 256), support.aligned(nbytes + 256)
            window, origin = (slice(64 + start, 64 + start + nbytes) for start in (alignment, other))
            source[origin] = plain
            kernel(target.ctypes.data + window.start, source.ctypes.data + origin.start, nbytes)
            assert np.array_equal(target[window], wanted), alignment
            assert not target[: window.start].any()
            assert not target[window.stop :].any()
            assert np.array_equal(source[origin], plain)
            kernel(source.ctypes.data + origin.start, source.ctypes.data + origin.start, nbytes)
            assert np.array_equal(source[origin], wanted), alignment
            assert not source[: origin.start].any()
            assert not source[origin.stop :].any()


forbids_pages = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="pages are forbidden by mprotect"
)


@kernels("xor")
def test_xor_kernel_changes_whole_steps_only(tier, name):
    step = 8 if tier.name == "portable" else 64
    kernel = support.with_integers(tier, name)
    for alignment in (0, 1, 63):
        for nbytes in range(300):
            memory = support.aligned(512)
            memory[:] = wanted = painted(512)
            changed = slice(64 + alignment, 64 + alignment + nbytes // step * step)
            wanted[changed] ^= 0x5A
            kernel(memory.ctypes.data + changed.start, nbytes, 0x5A)
            assert np.array_equal(memory, wanted), (alignment, nbytes)


@kernels("copy_past_cache")
def test_copy_kernel_copies_whole_steps_only(tier, name):
    step = 8 if tier.name == "portable" else 64
    kernel = support.with_integers(tier, name)
    source = painted(512, start=3)
    for alignment in (0, 1, 63):
        for nbytes in range(300):
            target = support.aligned(512)
            target[:] = wanted = painted(512)
            length = nbytes // step * step
            wanted[64 : 64 + length] = source[alignment : alignment + length]
            kernel(target.ctypes.data + 64, source.ctypes.data + alignment, nbytes)
            assert np.array_equal(target, wanted), (alignment, nbytes)


@forbids_pages
def test_no_kernel_touches_a_byte_outside_its_memory(tier):
    """Reads too: buffers and parameters end where a page begins that may not even be read."""
    program = "import sys, support; support.run_kernels_between_forbidden_pages(sys.argv[1])"
    assert run(program, tier.name) == ""


@forbids_pages
def test_forbidden_pages_end_the_process_that_reads_them():
    program = "import ctypes, support; ctypes.string_at(support.place_before_forbidden_page(b'abc'), {})"
    assert run(program.format(3)) == ""
    Process(program.format(4)).finish(returncode=-signal.SIGSEGV, errors=None)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("box", ["aes", "sm4", "random"])
def test_large_output_elsewhere_is_written_past_the_cache_from_any_address(tier, box, direction, monkeypatch):
    """Buffers are large from one byte on here, and small pieces make many calls of one buffer."""
    monkeypatch.setattr(counter, "_PAST_CACHE", 1)
    monkeypatch.setattr(transform, "_SMALLEST_JOB", 2)
    monkeypatch.setattr(transform, "_SMALLEST_PIECE", 1)
    monkeypatch.setattr(transform, "_LARGEST_PIECE", 1)
    support.forget_transforms()
    asked = set()
    original = transform.kernel

    def kernel(tier, name):
        asked.add(name.operation)
        return original(tier, name)

    monkeypatch.setattr(transform, "kernel", kernel)
    keys = support.make_schedule("counter", 256)
    stream = np.frombuffer(support.openssl_key_stream(KEYS[256], IV, 40_000, 0), np.uint8)
    plain = painted(40_000)
    wanted = support.expected(direction, plain, stream, BOXES[box])
    out = support.aligned(40_000)
    for address in range(64):
        for length in (1, 15, 16, 63, 64, 65, 256, 1000, 3 * 4096 + 100, 39_000):
            for offset in (address % 16, address % 16 + 16, 5):
                out[:] = 0xA5
                window, part = slice(address, address + length), slice(offset, offset + length)
                options = {"sbox": BOXES[box], "offset": offset, "threads": 1 + address % 3}
                OPERATIONS[direction](plain[part], keys, out=out[window], **options)
                assert np.array_equal(out[window], wanted[part]), (address, length, offset)
                assert (out[: window.start] == 0xA5).all()
                assert (out[window.stop :] == 0xA5).all()
    assert asked == {"counter", "counter_past_cache"}
    support.forget_transforms()


def test_output_elsewhere_at_the_size_from_which_it_goes_past_the_cache(tier):
    largest = counter._PAST_CACHE + 3
    plain, keys = painted(largest), support.make_schedule("counter", 128)
    stream = support.openssl_key_stream(KEYS[128], IV, largest, 0)
    wanted = support.expected("lock", plain, stream, BOXES["aes"])
    out = support.aligned(largest + 80)
    for length in (largest - 4, largest - 3, largest):
        for address in (0, 16, 17):
            lock(plain[:length], keys, out=out[address : address + length])
            assert np.array_equal(out[address : address + length], wanted[:length]), (address, length)


# Values


@functools.cache
def every_pair(schedule):
    """Give a key stream and data such that every byte meets every key byte."""
    if schedule == "counter":
        stream = np.frombuffer(reference.counter_keystream(KEYS[128], IV, 90_000), np.uint8)
    else:
        stream = support.key_stream(schedule, 128, 90_000)
    data = np.zeros_like(stream)
    for value in range(256):
        places = np.flatnonzero(stream == value)
        data[places] = np.arange(len(places)) % 256
    assert len(np.unique(stream.astype(int) * 256 + data)) == 65_536
    return stream, data


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_byte_with_every_key_byte(tier, schedule, box, direction):
    stream, data = every_pair(schedule)
    result = OPERATIONS[direction](data, support.make_schedule(schedule, 128), sbox=BOXES[box])
    assert same(result, support.expected(direction, data, stream, BOXES[box]))


# The counter


@functools.cache
def stream_around(bits, wrap):
    """Give the oracle's key stream of 64 blocks, the counter starting 32 blocks before `wrap`."""
    start = (wrap - 32) % 2**128
    return np.frombuffer(reference.counter_keystream(KEYS[bits], start.to_bytes(16, "big"), 1024), np.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wrap", [2**32, 2**64, 2**96, 2**128], ids=["2^32", "2^64", "2^96", "2^128"])
@pytest.mark.parametrize("block", [0, 2**32 - 20, 2**59 - 100], ids=["by_iv", "by_offset", "by_far_offset"])
def test_counter_carries_at_every_phase(tier, bits, wrap, block):
    """The kernels take 16 blocks at a time: the wrap comes at each of them, and the range starts anywhere."""
    stream = stream_around(bits, wrap)
    zeros = np.zeros(500, np.uint8)
    wanted = support.table_of(BOXES["aes"])[stream]
    for start in range(33):
        iv = (wrap - 32 + start - block) % 2**128
        keys = CounterSchedule(KEYS[bits], iv.to_bytes(16, "big"))
        for skip in range(16) if start % 8 == 0 else (start % 16,):
            place = 16 * start + skip
            result = lock(zeros[: 480 - skip], keys, offset=16 * block + skip)
            assert np.array_equal(result, wanted[place : 16 * start + 480]), (start, skip)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("iv", [bytes(16), IV, b"\xff" * 16], ids=["zeros", "carry", "ones"])
@pytest.mark.parametrize("nbytes", [1, 15, 16, 17, 300])
def test_counter_at_far_offsets(tier, bits, iv, nbytes):
    keys = CounterSchedule(KEYS[bits], iv)
    for power in (4, 31, 32, 35, 36, 40, 62, 63):
        for before in (nbytes, nbytes + 1, nbytes + 16, nbytes // 2, 0, -1):
            offset = 2**power - before
            if offset < 0 or offset + nbytes > 2**63:
                continue
            wanted = reference.counter_keystream(KEYS[bits], iv, nbytes, offset)
            assert keys.keystream(nbytes, offset).tobytes() == wanted, (power, before)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranges_beyond_2_to_the_63_are_refused(schedule):
    keys = support.make_schedule(schedule, 128)
    data = painted(16)
    for offset in (2**63 - 15, 2**63, 2**64, 2**70):
        for call in (lock, unlock):
            with pytest.raises(ParameterError, match=r"^offset: got \d+ for 16 bytes"):
                call(data, keys, offset=offset, out=data)
        with pytest.raises(ParameterError, match=r"^offset: got"):
            keys.keystream(16, offset)
    assert np.array_equal(data, painted(16))
    assert keys.keystream(0, 2**63).size == 0


# Checked-in vectors, made by an independent implementation


def schedule_of(case):
    key = bytes.fromhex(case["key"])
    return CounterSchedule(key, bytes.fromhex(case["iv"])) if case.get("iv") else ExpansionSchedule(key)


def case_name(case):
    shown = (case.get("schedule"), f"{4 * len(case['key'])}-bit", case.get("iv"), case["offset"])
    return "-".join(str(part) for part in shown if part is not None)


def test_key_stream_vectors(tier):
    for case in VECTORS["expansion"] + VECTORS["counter"]:
        keys = schedule_of(case)
        nbytes = case.get("length", len(case.get("stream", "")) // 2)
        stream = keys.keystream(nbytes, case["offset"]).tobytes()
        if "stream_sha256" in case:
            assert hashlib.sha256(stream).hexdigest() == case["stream_sha256"], case_name(case)
        else:
            assert stream.hex() == case["stream"], case_name(case)


def test_lock_vectors(tier):
    for case in VECTORS["lock"]:
        plain = painted(case["plain_length"], case["plain_start"])
        keys = schedule_of(case)
        locked = lock(plain, keys, sbox=case["sbox"], offset=case["offset"])
        assert locked.tobytes().hex() == case["locked"], case_name(case)
        assert same(unlock(locked, keys, sbox=case["sbox"], offset=case["offset"]), plain), case_name(case)


def test_tensor_vectors(tier):
    for case in VECTORS["tensors"]:
        keys = CounterSchedule(bytes.fromhex(case["tensor_key"]), bytes.fromhex(case["iv"]))
        plain = painted(case["plain_length"], case["plain_start"])
        locked = lock(plain, keys)
        assert hashlib.sha256(locked).hexdigest() == case["locked_sha256"], case["name"]
        assert locked[:32].tobytes().hex() == case["locked_head"], case["name"]
        assert same(unlock(locked, keys), plain), case["name"]


# Key streams and key expansion


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_keystream(tier, schedule, bits):
    keys = support.make_schedule(schedule, bits)
    whole = support.key_stream(schedule, bits, 4096)
    for nbytes in (0, 1, 16, 63, 64, 257, 1000):
        for offset in (0, 1, 15, 64, 191, 192, 1000, 3000):
            stream = keys.keystream(nbytes, offset)
            assert stream.dtype == np.uint8
            assert np.array_equal(stream, whole[offset : offset + nbytes])


@pytest.mark.parametrize(
    ("key", "words", "after_the_key", "last"),
    [
        (
            "2b7e151628aed2a6abf7158809cf4f3c",
            44,
            "a0fafe1788542cb123a339392a6c7605",
            "d014f9a8c9ee2589e13f0cc8b6630ca6",
        ),
        (
            "8e73b0f7da0e6452c810f32b809079e562f8ead2522c6b7b",
            52,
            "fe0c91f72402f5a5ec12068e6c827f6b",
            "e98ba06f448c773c8ecc720401002202",
        ),
        (
            "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
            60,
            "9ba354118e6925afa51a8b5f2067fcdea8b09c1a93d194cdbe49846eb75d5b9a",
            "fe4890d1e6188d0b046df344706c631e",
        ),
    ],
    ids=["A.1", "A.2", "A.3"],
)
def test_expand_key_gives_fips_197_appendix_a(tier, key, words, after_the_key, last):
    expanded = expand_key(bytes.fromhex(key), words)
    assert expanded.dtype == np.uint32
    text = expanded.astype(">u4").tobytes().hex()
    assert len(text) == 8 * words
    assert text.startswith(key + after_the_key)
    assert text.endswith(last)


@pytest.mark.parametrize("bits", BITS)
def test_expand_key_gives_any_number_of_words(tier, bits):
    wanted = reference.expand_key(KEYS[bits], 40_000)
    for words in (*range(70), 40_000):
        assert expand_key(KEYS[bits], words).tolist() == wanted[:words]
    for byte in (b"\x00", b"\xff"):
        assert expand_key(byte * (bits // 8), 2000).tolist() == reference.expand_key(byte * (bits // 8), 2000)
    for words in (-1, 1.0, True, 2**38 + 1):
        with pytest.raises(ParameterError, match=r"^words: got"):
            expand_key(KEYS[bits], words)


# The expansion's saved states


@pytest.mark.parametrize("bits", BITS)
def test_chain_kernel_saves_the_state_before_each_segment(tier, bits):
    segments, length = 9, bits // 8
    stream = support.key_stream("expansion", bits, segments * segment_bytes(bits)).tobytes()
    ends = [(i + 1) * segment_bytes(bits) for i in range(segments)]
    wanted = KEYS[bits] + b"".join(stream[end - length : end] for end in ends)
    chain = support.with_integers(tier, KernelName("expansion_chain", bits))
    rcon = ctypes.create_string_buffer(RCON_WORDS)
    for count in (0, 1, 2, segments):
        states = ctypes.create_string_buffer(KEYS[bits] + b"\xa5" * (segments + 1) * length)
        chain(ctypes.addressof(states), count, ctypes.addressof(rcon) + RCON_START)
        known = (count + 1) * length
        assert states.raw[:known] == wanted[:known]
        assert set(states.raw[known:-1]) == {0xA5}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("box", ["aes", "aes_inverse", "identity", "random"])
@pytest.mark.parametrize("bits", BITS)
def test_expansion_across_segments_and_groups(tier, bits, box, direction):
    """The boxes are one for each form of each tier, in either direction."""
    segment, group = segment_bytes(bits), SEGMENTS_PER_GROUP * segment_bytes(bits)
    total = 2 * group + segment
    data = painted(total)
    wanted = support.expected(direction, data, support.key_stream("expansion", bits, total), BOXES[box])
    keys = ExpansionSchedule(KEYS[bits])
    ranges = [(0, total), (1, total), (63, 2 * group + 1), (group - 1, 2 * group + 2), (segment + 5, total)]
    ranges += [(0, group + d) for d in (-1, 0, 1)] + [(group, 2 * group), (group, total - 7)]
    for i in range(1, 9):
        border = i * segment
        ranges += [(border - 65, border + 1), (border - 1, border + 64), (border, border + 1)]
        ranges += [(border + 63, border + 64), (border + 1, border + 200)]
    for start, stop in ranges:
        result = OPERATIONS[direction](data[start:stop], keys, sbox=BOXES[box], offset=start)
        assert np.array_equal(result, wanted[start:stop]), (start, stop)


@pytest.mark.parametrize("bits", BITS)
def test_expansion_across_small_blocks(tier, bits, monkeypatch):
    """With blocks of saved states as small as can be and runs that end within them, all borders come soon."""
    segment = segment_bytes(bits)
    monkeypatch.setattr(expansion, "_SEGMENTS_PER_BLOCK", SEGMENTS_PER_GROUP)
    monkeypatch.setattr(expansion, "_SEGMENTS_PER_RUN", 3)
    whole = support.key_stream("expansion", bits, 9 * segment)
    places = [4 * segment - 50, 4 * segment, 8 * segment - 1, 8 * segment + 70, segment, 0]
    for order in (places, places[::-1], places[2:] + places[:2]):
        keys = ExpansionSchedule(KEYS[bits])
        for start in order:
            assert np.array_equal(keys.keystream(100, start), whole[start : start + 100]), start
    for start in (
        100,
        0,
    ):  # from 0 on, two groups in a row could be one call, but each has a block of its own
        keys = ExpansionSchedule(KEYS[bits])
        assert np.array_equal(keys.keystream(whole.size - start, start), whole[start:])


# The state before segment 1023, the last one of the first block of saved states, for each of `KEYS`: made by
# the oracle and by a program in C that shares nothing with it. To make them again takes half a minute:
# reference.expansion_keystream(KEYS[bits], bits // 8, 1023 * segment_bytes(bits) - bits // 8)
STATES_BEFORE_SEGMENT_1023 = {
    128: "621925c2413b255a18023cac7d78d9cd",
    192: "6b61629283a424786dad342acfc4316f6ccd51cff156dd5c",
    256: "01dab17f7522fe8f53f5f3a818b61ecbadfaff10421cc080b68502eb505d504b",
}


@pytest.mark.parametrize("bits", BITS)
def test_expansion_across_the_blocks_of_saved_states(tier, bits):
    """A state and the oracle give all that follows: Rcon's period divides the rounds of a segment."""
    segment = segment_bytes(bits)
    first = 1023 * segment
    total = (1 + SEGMENTS_PER_GROUP) * segment + 300
    stream = later_stream(bits, total)
    ranges = [(segment - 100, segment + 100), (0, 64), (segment, segment + 1), (5, total), (segment, total)]
    for start, stop in ranges:
        keys = ExpansionSchedule(KEYS[bits])
        assert np.array_equal(keys.keystream(stop - start, first + start), stream[start:stop]), (start, stop)
        assert np.array_equal(keys.keystream(100, 50), support.key_stream("expansion", bits, 4096)[50:150])


@functools.cache
def later_stream(bits, nbytes):
    state = bytes.fromhex(STATES_BEFORE_SEGMENT_1023[bits])
    return np.frombuffer(reference.expansion_keystream(state, nbytes), np.uint8)


@pytest.mark.parametrize("start", [0, 2**64 - 9, 2**128 - 9], ids=["zero", "carry", "wrap"])
def test_long_ranges_at_every_alignment(tier, start):
    """The first step of a long range is cut so that the next one is aligned: it may begin before the key stream does."""
    iv = start.to_bytes(16, "big")
    length = 4096 + 700
    stream = np.frombuffer(support.openssl_key_stream(KEYS[192], iv, length + 500, 0), np.uint8)
    keys, plain = CounterSchedule(KEYS[192], iv), painted(length)
    memory = support.aligned(length + 256)
    for alignment in range(256):
        for offset in (0, alignment % 16, 16 + alignment % 240, 500):
            part = memory[alignment : alignment + length]
            part[:] = plain
            lock(part, keys, out=part, offset=offset)
            wanted = support.expected("lock", plain, stream[offset : offset + length], BOXES["aes"])
            assert np.array_equal(part, wanted), (alignment, offset)


@pytest.fixture
def chained(monkeypatch):
    """Count the segments that chain kernels run through."""
    counts = []
    original = tiers.kernel

    def kernel(tier, name):
        function = original(tier, name)
        if name.operation != "expansion_chain":
            return function

        def counted(record):
            counts.append(RECORDS["expansion_chain"].unpack(record)[1])
            function(record)

        return counted

    monkeypatch.setattr(tiers, "kernel", kernel)
    return counts


def test_saved_states_are_not_computed_again(tier, chained):
    segment = segment_bytes(128)
    whole = support.key_stream("expansion", 128, 9 * segment)
    keys = ExpansionSchedule(KEYS[128])
    steps = [(5, 0), (segment - 10, 0), (segment - 9, 0), (segment, 1)]
    steps += [(7 * segment + 3, 7), (7 * segment + 3, 7), (2 * segment, 7), (0, 7), (8 * segment, 8)]
    for start, segments in steps:
        assert np.array_equal(keys.keystream(9, start), whole[start : start + 9])
        assert sum(chained) == segments, start
    lock(painted(9 * segment), keys)
    assert sum(chained) == 8
    assert keys.keystream(0, 2000 * segment).size == 0
    assert sum(chained) == 8


@pytest.mark.parametrize("bits", BITS)
def test_many_threads_may_share_a_fresh_expansion(tier, bits, chained, monkeypatch):
    """Each starts elsewhere, all at once; the chain is run through once."""
    monkeypatch.setattr(expansion, "_SEGMENTS_PER_BLOCK", SEGMENTS_PER_GROUP)
    monkeypatch.setattr(expansion, "_SEGMENTS_PER_RUN", 2)
    segment, count = segment_bytes(bits), 8
    whole = support.key_stream("expansion", bits, 9 * segment)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for turn in range(5):
            keys = ExpansionSchedule(KEYS[bits])
            barrier = threading.Barrier(count)
            results = {}

            def work(i, turn=turn, keys=keys, barrier=barrier, results=results):
                start = (3 * i + turn) % count * segment + 500 * i
                barrier.wait()
                results[i] = start, keys.keystream(70_000, start)

            threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(results) == list(range(count))
            for start, stream in results.values():
                assert np.array_equal(stream, whole[start : start + 70_000]), start
            assert sum(chained) == max(start + 69_999 for start, _ in results.values()) // segment
            chained.clear()
    finally:
        sys.setswitchinterval(interval)


def test_a_state_is_not_used_before_it_is_there(tier, monkeypatch):
    """While a chain kernel has not run yet, another thread asks for what that will give."""
    segment = segment_bytes(192)
    whole = support.key_stream("expansion", 192, 9 * segment)
    keys = ExpansionSchedule(KEYS[192])
    results, readers, known = [], [], []
    original = tiers.kernel

    def kernel(chosen, name):
        function = original(chosen, name)

        def late(record):
            known.append(keys._known)
            reader = threading.Thread(target=lambda: results.append(keys.keystream(10, 2 * segment)))
            reader.start()
            reader.join(0.05)  # it waits, or it has what is not right
            readers.append(reader)
            function(record)

        return late if name.operation == "expansion_chain" else function

    keys.keystream(1)  # so that the reader has its kernel already
    monkeypatch.setattr(tiers, "kernel", kernel)
    keys.keystream(10, 3 * segment)
    for reader in readers:
        reader.join()
    assert known == [1], "calls that are planned already go by this alone"
    assert len(results) == len(readers) == 1
    assert np.array_equal(results[0], whole[2 * segment : 2 * segment + 10])


# Wiping


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_wipe_clears_all_key_memory_and_ends_all_use(tier, schedule, monkeypatch):
    monkeypatch.setattr(expansion, "_SEGMENTS_PER_BLOCK", SEGMENTS_PER_GROUP)
    keys = support.make_schedule(schedule, 256)
    keys.keystream(100, 6 * segment_bytes(256))  # two blocks of saved states
    secrets = keys._secrets()
    assert len(secrets) == (1 if schedule == "counter" else 2)
    assert all(any(secret.raw) for secret in secrets)
    keys.wipe()
    assert not any(any(secret.raw) for secret in secrets)
    data = painted(100)
    for use in (
        lambda: keys.keystream(1),
        lambda: keys.keystream(0),
        lambda: lock(data, keys, out=data),
        lambda: unlock(data, keys, out=data),
        lambda: lock(data[:0], keys),
    ):
        with pytest.raises(KeyWipedError, match="it was wiped"):
            use()
    assert np.array_equal(data, painted(100))
    keys.wipe()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_end_of_a_with_block_wipes(schedule):
    with support.make_schedule(schedule, 128) as keys:
        assert keys.keystream(1).size == 1
        secrets = keys._secrets()
    assert not any(any(secret.raw) for secret in secrets)

    def fail():
        with support.make_schedule(schedule, 128) as keys:
            secrets.extend(keys._secrets())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(any(secret.raw) for secret in secrets)
