"""Ten thousand cases drawn by SHAKE-128, of whose answers one digest is checked in.

Size, place, key, key schedule, S-Box and direction are drawn, and where the data lies; the digest is that of all
answers one after the other. So a few bytes in the repository hold every tier to some twelve million.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterator
from typing import NamedTuple

from vectors import second

from deeplock_kernels.sboxes import SBOXES

SEED = "deeplock/1 accumulated vectors"
COUNT = 10_000
KEYS_OF_THE_EXPANSION = 8  # of each length; each key's stream has to be made from its start
STREAM_BYTES = 300_000  # more than a group of segments


class Case(NamedTuple):
    """Something to lock or unlock; where the data lies changes nothing."""

    direction: str
    data: bytes
    schedule: str
    key: bytes
    iv: bytes
    offset: int
    table: bytes
    alignment: int
    in_place: bool


def _bytes(what: str, length: int) -> bytes:
    return hashlib.shake_128(f"{SEED}: {what}".encode()).digest(length)


@functools.cache
def tables() -> list[bytes]:
    """List the S-Boxes that are drawn from: those with a name, and 16 more."""
    own = []
    for i in range(16):
        order = struct.unpack("<256Q", _bytes(f"table {i}", 2048))
        own.append(bytes(sorted(range(256), key=order.__getitem__)))
    return [SBOXES[name].table for name in sorted(SBOXES)] + own


def case(number: int) -> Case:
    """Draw one case."""
    draws = iter(struct.unpack("<16Q", _bytes(f"case {number}", 128)))
    direction = ("lock", "unlock")[next(draws) % 2]
    length = (16, 24, 32)[next(draws) % 3]
    nbytes = next(draws) % (1 << next(draws) % 15)
    table = tables()[next(draws) % len(tables())]
    alignment, in_place = next(draws) % 64, bool(next(draws) % 2)
    near, far = next(draws) % 4096, next(draws) >> next(draws) % 64
    offset = near if next(draws) % 2 else far
    data = _bytes(f"data {number}", nbytes)
    if next(draws) % 2:
        key = _bytes(f"key {length} {number % KEYS_OF_THE_EXPANSION}", length)
        offset %= STREAM_BYTES - nbytes
        return Case(direction, data, "expansion", key, b"", offset, table, alignment, in_place)
    key, iv = _bytes(f"key {number}", length), bytearray(_bytes(f"iv {number}", 16))
    ones = (0, 4, 8, 16)[next(draws) % 4]  # so that the counter carries that far, and soon
    iv[16 - ones :] = (256**ones - 1 - next(draws) % 512 * (ones > 0)).to_bytes(ones, "big")
    offset = min(offset, 2**63 - nbytes)
    return Case(direction, data, "counter", key, bytes(iv), offset, table, alignment, in_place)


@functools.cache
def _expansion_stream(key: bytes) -> bytes:
    return second.expansion_stream(key, STREAM_BYTES)


def answer(case: Case) -> bytes:
    """Give the answer of the second implementation."""
    end = case.offset + len(case.data)
    if case.schedule == "expansion":
        stream = _expansion_stream(case.key)[case.offset : end]
    else:
        stream = second.counter_stream(case.key, case.iv, len(case.data), case.offset)
    return {"lock": second.lock, "unlock": second.unlock}[case.direction](case.data, stream, case.table)


def answers() -> Iterator[bytes]:
    """Give all answers of the second implementation."""
    return map(answer, map(case, range(COUNT)))
