"""The master key of the expansion schedule from locked floats alone: no weight has to be known.

Trained weights lie between 2^-15 and 2 in magnitude, and mostly near one size. So of the high byte of each, which
holds the sign and seven bits of the exponent, four bits are 0111 and the lower three are mostly the same few. In the
expansion (FIPS 197, section 5.2) the bytes at one place of each word, a lane, follow from each other by XOR, but for
one byte in each round that comes from the next lane through the S-Box. The likeliest course of the lane that masks
the high bytes is found by Viterbi's algorithm, where the sign stays open. What was injected into it gives the last
word of the next lane, and several rounds of that the whole lane; so on through all four, until the first lane comes
out once more and says which signs were right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.key_recovery import RCON, SBOX, Bytes, masked, run_backwards
from deeplock_kernels import LockHeader, reference

_INVERSE = np.argsort(SBOX).astype(np.uint8)
_EXPONENT = 0x38  # of magnitudes from 2^-15 to 2, without its lower three bits
_DEVIATIONS = (0.008, 0.03, 0.06, 0.12, 0.25)  # that weights may have
_FLOOR = 1e-3  # no size of a weight is less likely
_MARGIN = 2  # rounds at each end of which too little is known
_MOST_SIGNS = 1 << 12
_COURSES = 2  # the likeliest ones, for the deviations that were tried


@dataclass(frozen=True)
class Found:
    """A key, and what gave it away.

    Attributes
    ----------
    key
        The master key.
    tensors
        The names of the tensors that gave it away.
    nbytes
        How many of their locked bytes in a row did.
    """

    key: bytes
    tensors: tuple[str, ...]
    nbytes: int


def window_rounds(words: int) -> int:
    """Say how many rounds of the key stream an attack looks at, for a key of so many words."""
    return _begin(words) + 4 * words + 1 + _MARGIN


def find_key(locked: Mapping[str, Bytes], header: LockHeader, widths: Mapping[str, int], tries: int) -> Found | None:
    """Look for the master key.

    Parameters
    ----------
    locked
        The bytes of each locked tensor.
    header
        Of the lock. Its S-Box is public and its `check` says whether a key is the right one. Tensors are taken to lie
        one after the other, as the expansion schedule has them.
    widths
        Of the tensors of float32 and bfloat16 the number of bytes of an element: 4 or 2.
    tries
        How many places to try at most.
    """
    words = header.key_bits // 32
    size, nbytes = 4 * words, 4 * words * window_rounds(words)
    stream = masked(np.concatenate([*locked.values()]), header)
    ends = dict(zip(locked, itertools.accumulate(tensor.size for tensor in locked.values()), strict=True))
    tried = 0
    for begin, end, width in _floats(locked, widths):
        for place in range(begin + -begin % size, end - nbytes + 1, size * (window_rounds(words) // 2)):
            window, lane = stream[place : place + nbytes].reshape(-1, words, 4), (width - 1 + begin) % 4
            if not _plausible(window[:, :, lane]):
                continue
            tried += 1
            for block, state in _states(window, lane, place // size):
                key = run_backwards(state, place + block * size)
                if reference.check_value(key, header.salt) == header.check:
                    names = (name for name, last in ends.items() if place < last < place + nbytes + locked[name].size)
                    return Found(key, tuple(names), nbytes)
            if tried == tries:
                return None
    return None


def _floats(locked: Mapping[str, Bytes], widths: Mapping[str, int]) -> Iterator[tuple[int, int, int]]:
    """Give the begin, the end and the width of all that floats of one width fill without a gap."""
    begin = 0
    for width, group in itertools.groupby(locked, lambda name: widths.get(name, 0)):
        end = begin + sum(locked[name].size for name in group)
        if width:
            yield begin, end, width
        begin = end


def _begin(words: int) -> int:
    """Say from which round of a window on its lanes are followed."""
    return _MARGIN + (3 if words == 8 else 0)


def _chained(words: int) -> int:
    """Say of how many words of a round each but the first is the one before it XOR the one a round before."""
    return 4 if words == 8 else words


def _seven(high: Bytes) -> Bytes:
    """Give bits 3 to 6 of the lane that masks high bytes, for its chained words."""
    return (high[:, : _chained(high.shape[1])] & 0x78) ^ _EXPONENT


def _plausible(high: Bytes) -> bool:
    """Say whether all magnitudes may lie between 2^-15 and 2."""
    seven = _seven(high)
    return not np.any(seven[1:, 1:] ^ seven[:-1, 1:] ^ seven[1:, :-1])


def _states(window: Bytes, lane: int, first: int) -> Iterator[tuple[int, bytes]]:
    """Give whole rounds of the key stream that a window allows: the index of the round in the window, and its bytes.

    Parameters
    ----------
    window
        Plain bytes XOR key stream: [round][word][place].
    lane
        The place of high bytes.
    first
        The number of the window's first round in the key stream.
    """
    high, words = window[:, :, lane], window.shape[1]
    begin = _begin(words)
    courses = {course.tobytes(): cost for cost, course in (_likeliest(high, deviation) for deviation in _DEVIATIONS)}
    for course in sorted(courses, key=lambda course: courses[course])[:_COURSES]:
        seven = _seven(high)
        seven |= np.frombuffer(course, np.uint8).reshape(seven.shape)
        if words < 8:
            injected = (seven[begin + 1 :, 0] ^ seven[begin:-1, 0])[: 4 * words]
            yield from _rounds(injected, seven[begin:, -1], 0x7F, lane, first, begin, open_signs=True)
        for signs in _signs(seven, high) if words == 8 else ():
            whole = seven[:, 0] | signs << 7
            injected = (whole[begin + 1 :] ^ whole[begin:-1])[: 4 * words]
            yield from _rounds(injected, high[begin:, -1] ^ _EXPONENT, 0x78, lane, first, begin, open_signs=False)


def _likeliest(high: Bytes, deviation: float) -> tuple[float, Bytes]:
    """Give the likeliest lower three bits of the lane that masks high bytes, [round][word], with what they cost."""
    chained = _chained(high.shape[1])
    cost = -np.log(_sizes(deviation))
    symbols = np.arange(8)
    axes = [symbols.reshape([8 if axis == word else 1 for axis in range(chained)]) for word in range(chained)]

    def observed(index: int) -> NDArray[np.float64]:
        return sum(cost[axis ^ int(high[index, word] & 7)] for word, axis in enumerate(axes))

    before = tuple(np.broadcast_to(axes[word] ^ axes[word - 1], (8,) * chained) for word in range(1, chained))
    total, choices = observed(0), []
    for index in range(1, len(high)):
        choices.append(total.argmin(0))  # the first word is injected into, so any may have come before it
        total = total.min(0)[before] + observed(index)
        if high.shape[1] == 8:
            total = total + _after_substitution(high, index, cost).reshape(1, 1, 1, 8)
    least = float(total.min())
    state = [int(part) for part in np.unravel_index(int(total.argmin()), total.shape)]
    course = [state]
    for choice in reversed(choices):
        later = [state[word] ^ state[word - 1] for word in range(1, chained)]
        state = [int(choice[tuple(later)]), *later]
        course.append(state)
    return least, np.array(course[::-1], np.uint8)


def _sizes(deviation: float) -> NDArray[np.float64]:
    """Give the probabilities of the lower three bits of a high byte, for normally distributed weights."""
    edges = [math.erf(4.0 ** (exponent - 7) / 2 / deviation / 2**0.5) for exponent in range(9)]
    edges[0] = 0.0  # what is smaller yet is not told apart
    share = np.diff(edges) + _FLOOR
    return share / share.sum()


def _after_substitution(high: Bytes, index: int, cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the cost of each lower three bits of word 3, by what its substitution makes of word 4 (keys of 256 bits)."""
    share = np.exp(-cost)
    change = np.array([(share * share[np.arange(8) ^ difference]).sum() for difference in range(8)])
    best = np.full(8, 1e-6)
    for low, sign in itertools.product(range(8), range(2)):
        if _agrees(high, index, low, sign):
            best[low] = max(best[low], change[_difference(high, index, low, sign) & 7])
    return -np.log(best)


def _difference(high: Bytes, index: int, low: int, sign: int) -> int:
    third = (int(high[index, 3]) & 0x78) ^ _EXPONENT | low | sign << 7
    return int(high[index, 4] ^ high[index - 1, 4] ^ SBOX[third])


def _agrees(high: Bytes, index: int, low: int, sign: int) -> bool:
    return not _difference(high, index, low, sign) & 0x78


def _signs(seven: Bytes, high: Bytes) -> Iterator[Bytes]:
    """Give the signs that word 0 of the lane can have in each round; those of the first four say nothing."""
    options = [[0]]
    for index in range(1, len(high)):
        options.append([sign for sign in range(2) if _agrees(high, index, int(seven[index, 3]) & 7, sign)] or [0])
    if math.prod(map(len, options)) > _MOST_SIGNS:
        return
    for chosen in itertools.product(*options):
        signs = np.array(chosen, np.uint8)
        for _ in range(3):  # from word 3 to word 0
            signs = np.concatenate([signs[:1], signs[1:] ^ signs[:-1]])
        yield signs


def _rounds(
    injected: Bytes, known: Bytes, bits: int, lane: int, first: int, begin: int, *, open_signs: bool
) -> Iterator[tuple[int, bytes]]:
    """Go through all four lanes, and give the last round that is wholly found, with its index in the window.

    Parameters
    ----------
    first, begin
        The number of the window's first round, and which one of the window the others begin with.
    injected
        What the S-Box gave to the lane in each round, in the lower seven bits if `open_signs`.
    known, bits
        The last word of the lane in each round, and which bits of it are right.
    """
    count = len(injected)
    words = count // 4
    guesses = injected[:, None]
    if open_signs:
        enough = 3 * words + 1  # for a first comparison
        every = np.arange(1 << enough, dtype=np.uint32)
        guesses = injected[:enough, None] ^ ((every >> np.arange(enough)[:, None] & 1).astype(np.uint8) << 7)
        for rounds in range(enough, count + 1):
            if rounds > enough:
                more = np.repeat(injected[rounds - 1], guesses.shape[1])
                guesses = np.hstack([np.vstack([guesses, more]), np.vstack([guesses, more ^ 0x80])])
            right = _returns(guesses, words, lane, first + begin)[-1][words - 1][-1]
            guesses = guesses[:, (right ^ known[rounds - 4]) & bits == 0]
    lanes = _returns(guesses, words, lane, first + begin)
    fits = np.all((lanes[-1][words - 1] ^ known[3 * words - 3 : count - 3, None]) & bits == 0, axis=0)
    block = count - 4
    for guess in np.flatnonzero(fits):
        state = bytearray(4 * words)
        for step, found in enumerate(lanes):
            for word in range(words):
                state[4 * word + (lane + 1 + step) % 4] = int(found[word][step - 4, guess])
        yield begin + block, bytes(state)


def _returns(injected: Bytes, words: int, lane: int, first: int) -> list[dict[int, Bytes]]:
    """Give the four lanes that follow from what was injected into one, that one as the last: by word, [round][guess].

    Each array ends with the last round that is known of that lane; which one it begins with differs.
    """
    lanes, begin = [], first + 1  # the round that the first injection leads to
    for step in range(4):
        place = (lane + step) % 4
        if place == 0:
            number = np.arange(begin, begin + len(injected))
            injected = injected ^ np.array(RCON, np.uint8)[number % 51][:, None]
        found = {words - 1: _INVERSE[injected]}
        for word in range(words - 1, 0, -1):
            later = found[word][1:] ^ found[word][:-1]
            found[word - 1] = _INVERSE[later] if words == 8 and word == 4 else later
        lanes.append(found)
        injected = found[0][1:] ^ found[0][:-1]
        begin += words - 1
    return lanes
