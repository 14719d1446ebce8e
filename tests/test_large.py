"""Beyond 4 GiB: what 32 bits cannot count, in places far into a key stream and in one buffer that is that large."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import support
from support import BITS, BOXES, DIRECTIONS, KEYS, OPERATIONS, painted

from deeplock_kernels import reference
from deeplock_kernels.kernels.signatures import KernelName, segment_bytes
from deeplock_kernels.locking import lock, substitute
from deeplock_kernels.runtime.tiers import active_tier
from deeplock_kernels.schedules import ExpansionSchedule

GIB = 1 << 30
NBYTES = 4 * GIB + (40 << 20) + 12_345  # some pieces of work begin behind 4 GiB


def free_memory():
    """Give the bytes that this process may still take: of the machine's, and of its control group's."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) << 10
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).exists() and Path(limit).read_text().strip().isdigit():
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return free


@pytest.fixture(scope="module")
def large():
    """Give zeros of more than 4 GiB, at an odd address."""
    free = free_memory()
    if free < NBYTES + 2 * GIB:
        pytest.skip(f"a buffer of 4 GiB and a reserve need 6 GiB of memory, and {free / GIB:.1f} GiB are free")
    return np.zeros(NBYTES + 3, np.uint8)[3:]


# Where something is written and looked at: around each power of two from a piece of work on, and at both ends.
WINDOWS = [
    slice(max(place - 700, 0), min(place + 700, NBYTES))
    for place in (0, *(1 << power for power in range(20, 33)), 3 * GIB, 4 * GIB - (1 << 20), NBYTES)
]


def check(data, wanted):
    """Compare each window, whose expectation `wanted(window)` gives."""
    for window in WINDOWS:
        assert np.array_equal(data[window], wanted(window)), window


def plain(window):
    return painted(window.stop - window.start, window.start % 251)


def locked(window):
    stream = support.openssl_key_stream(KEYS[256], support.IV, window.stop - window.start, window.start)
    return support.expected("lock", plain(window), stream, BOXES["aes"])


def test_a_buffer_of_more_than_4_gib(large):
    """In pieces there, and by a single call of a kernel back; zeros stand between the windows."""
    for window in WINDOWS:
        large[window] = plain(window)
    keys = support.make_schedule("counter", 256)
    lock(large, keys, out=large)
    check(large, locked)
    assert (large[NBYTES // 2 : NBYTES // 2 + 4096] != 0).any()

    tier = active_tier()
    form, parameters = next(
        (form, data)
        for form in tier.forms
        if (data := support.forms.parameters(BOXES["aes"].inverse, form)) is not None
    )
    kernel = support.RawKernel(tier, KernelName("counter", 256, form, "unlock"))
    box = ctypes.create_string_buffer(parameters, max(len(parameters), 1))
    kernel._box = ctypes.addressof(box)
    kernel(large.ctypes.data, large.ctypes.data, NBYTES)
    check(large, plain)
    for window in WINDOWS:
        large[window] = 0
    assert not any(large[start : start + GIB].any() for start in range(0, NBYTES, GIB))


def test_substitution_of_more_than_4_gib(large):
    for window in WINDOWS:
        large[window] = plain(window)
    substitute(large, "kuznyechik", out=large)
    check(large, lambda window: support.table_of(BOXES["kuznyechik"])[plain(window)])
    assert large[NBYTES // 2] == BOXES["kuznyechik"].table[0]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("power", [31, 32, 33, 36])
def test_the_expansion_around_powers_of_two(tier, power, bits, direction):
    """With the state put there that the chain would reach: from then on the oracle follows from that state alone."""
    segment, place = segment_bytes(bits), 1 << power
    first = place // segment
    keys = ExpansionSchedule(bytes(bits // 8))
    keys._allocate(first)
    ctypes.memmove(keys._state(first), KEYS[bits], bits // 8)
    keys._known = first + 1
    stream = np.frombuffer(reference.expansion_keystream(KEYS[bits], 2 * segment), np.uint8)
    skip = place - first * segment
    for start, stop in ((-100, 100), (-1, 0), (0, 1), (1, segment)):
        length = min(stop, 2 * segment - skip) - max(start, -skip)
        begin = skip + max(start, -skip)
        data = painted(length)
        result = OPERATIONS[direction](data, keys, sbox=BOXES["random"], offset=first * segment + begin)
        wanted = support.expected(direction, data, stream[begin : begin + length], BOXES["random"])
        assert np.array_equal(result, wanted), (start, stop)
