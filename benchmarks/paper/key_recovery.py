"""The master key of the expansion schedule, from weights that somebody guessed right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deeplock_kernels import SBOXES, LockHeader, reference

_CONFIRMED = 4  # bytes that have to follow from those before them: by chance 1 place in 2^32 looks so
SBOX = np.frombuffer(reference.AES_SBOX, np.uint8)
RCON = [1]
while len(RCON) < 51:
    RCON.append(reference.double(RCON[-1]))

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Recovery:
    """What guesses gave away.

    Attributes
    ----------
    key
        The master key, or None.
    tensors
        The names of those that were guessed right, in part at least, so that each of them gives it away.
    """

    key: bytes | None
    tensors: tuple[str, ...]


def recover(locked: Mapping[str, Bytes], header: LockHeader, guesses: Mapping[str, Bytes]) -> Recovery:
    """Look for places where guessed plain bytes give a key stream of the expansion schedule, and take the key of one.

    Nobody has to know which guesses are right: from one key's length on, each byte of the key stream follows from
    those before it, so that right ones prove themselves. Tensors are taken to lie one after the other, as that schedule
    has them.

    Parameters
    ----------
    locked, guesses
        The bytes of each locked tensor, and as many guessed ones.
    header
        Of the lock. Its S-Box is public and its `check` says whether a key is the right one.
    """
    names, size = [name for name in header.tensors if name in locked], header.key_bits // 8
    stream = np.concatenate([masked(locked[name], header) ^ guesses[name] for name in names])
    follow = follows(stream, size)
    found = [(begin, end) for begin, end in _runs(follow) if end - begin >= _CONFIRMED]
    if not found:
        return Recovery(None, ())
    ends = np.cumsum([locked[name].size for name in names])
    givers = {int(place) for begin, end in found for place in _between(ends, begin - size, end)}
    begin = found[0][0] - size
    key = run_backwards(stream[begin : begin + size].tobytes(), begin)
    if reference.check_value(key, header.salt) != header.check:
        return Recovery(None, ())
    return Recovery(key, tuple(names[place] for place in sorted(givers)))


def longest_run(true: NDArray[np.bool_]) -> tuple[int, int]:
    """Give the begin and the end of the longest run of what is true; both 0 if nothing is."""
    return max(_runs(true), key=lambda run: run[1] - run[0], default=(0, 0))


def masked(locked: Bytes, header: LockHeader) -> Bytes:
    """Undo the S-Box, which anybody can: what is left is plain bytes XOR key stream."""
    assert isinstance(header.sbox, str)
    return np.frombuffer(SBOXES[header.sbox].inverse.table, np.uint8)[locked]


def follows(stream: Bytes, size: int) -> NDArray[np.bool_]:
    """Say of each byte of a stream from position 0 on whether it follows from those before it (FIPS 197, section 5.2).

    The first `size` bytes, as many as the key has, follow from nothing.
    """
    place = np.arange(size, stream.size)
    word, lane = place // 4, place % 4
    rounds = word // (size // 4)
    before = np.where(lane == 3, stream[place - 7], stream[place - 3])  # the word before, rotated
    mask = SBOX[before] ^ np.where(lane == 0, np.array(RCON, np.uint8)[rounds % 51], np.uint8(0))
    plain = stream[place - 4]
    if size == 32:
        plain = np.where(word % 8 == 4, SBOX[plain], plain)
    mask = np.where(word % (size // 4) == 0, mask, plain)
    return np.concatenate([np.zeros(size, bool), stream[place] == stream[place - size] ^ mask])


def run_backwards(known: bytes, position: int) -> bytes:
    """Undo the key expansion from a piece of its key stream, as long as the key, back to the key itself.

    A byte of w is one that lies a key's length before it, XOR a function of the word before it; from the last byte to
    the first, both are known or found.
    """
    size, words = len(known), len(known) // 4
    w = bytearray(size + position) + known
    for i in range(len(w) - 1, size - 1, -1):
        word, lane = divmod(i, 4)
        if word % words == 0:
            mask = reference.AES_SBOX[w[4 * (word - 1) + (lane + 1) % 4]]
            mask ^= 0 if lane else RCON[(word // words - 1) % 51]
        elif words == 8 and word % words == 4:
            mask = reference.AES_SBOX[w[i - 4]]
        else:
            mask = w[i - 4]
        w[i - size] = w[i] ^ mask
    return bytes(w[:size])


def _runs(true: NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], true, [False]]).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def _between(ends: NDArray[np.int64], begin: int, end: int) -> range:
    """Give the indices of the tensors that bytes from `begin` to `end` lie in."""
    return range(int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(ends, end - 1, "right")) + 1)
