"""The expansion schedule, the paper's kind: the AES key expansion (FIPS 197 section 5.2) carried on without end."""

from __future__ import annotations

import ctypes
import itertools
import threading
from functools import partial

import numpy as np
import numpy.typing as npt

from deeplock_kernels.errors import ParameterError
from deeplock_kernels.kernels.signatures import (
    RECORDS,
    SEGMENTS_PER_GROUP,
    KernelName,
    segment_bytes,
)
from deeplock_kernels.keys import MasterKey, key_bytes
from deeplock_kernels.runtime import pool, tiers
from deeplock_kernels.runtime.pool import Call
from deeplock_kernels.schedules.base import RCON_ADDRESS, Schedule, check_integer
from deeplock_kernels.transform import Transform

# Schedules share a few locks, since each of them has to be held through every fork.
_LOCKS = tuple(threading.Lock() for _ in range(16))
_COUNT = itertools.count()
for _lock in _LOCKS:
    pool.hold_through_fork(_lock, rank=0)
_SEGMENTS_PER_BLOCK = 1024  # of saved states that are allocated together; a multiple of the group
_SEGMENTS_PER_RUN = 256  # of chain between two chances to interrupt it, about 2 ms


def expand_key(key: bytes | bytearray | memoryview | MasterKey, words: int) -> npt.NDArray[np.uint32]:
    """Expand a key by FIPS 197 section 5.2, on past AES's last round key if asked.

    Parameters
    ----------
    key
        16, 24 or 32 bytes, or a MasterKey.
    words
        How many words to give, from w[0] on; the first 4, 6 or 8 are the key itself. AES uses 44, 52 or 60.

    Returns
    -------
    ndarray of uint32, shape (words,)
        Each word's most significant byte is the first one in the standard's order.

    Raises
    ------
    KeyTypeError, KeyFormatError, KeyWipedError
        The key is not bytes, of another length, or wiped.
    ParameterError
        `words` is not a whole number of at least 0.
    """
    count = check_integer(words, "words")
    if 4 * count > 2**40:
        raise ParameterError(
            f"words: got {count}, accepted are up to 2^38; use ExpansionSchedule for ranges further on"
        )
    secret = key_bytes(key)
    stream = b""
    if 4 * count > len(secret):
        with ExpansionSchedule(secret) as schedule:
            stream = schedule.keystream(4 * count - len(secret)).tobytes()
    return np.frombuffer((secret + stream)[: 4 * count], ">u4").astype(np.uint32)


class ExpansionSchedule(Schedule):
    """Key bytes are the words w[Nk], w[Nk+1], ... of the endless key expansion, for a key of Nk words.

    **It does not hold under known plaintext**: the expansion is a public bijection of its own state, so one
    known block (16 bytes for a 128-bit key, 24 for 192, 32 for 256) at a known position gives back the key.
    Zero biases and normalization weights of exactly 1.0 are known plaintext in almost every model, and where nothing
    is known, the sizes of trained floats are alike: some hundred bytes of them can give back the key as well. Use it
    to reproduce or study the paper; protect real models with CounterSchedule.

    Nor does it mix the key well: with one bit of the key changed, up to 44 % of the key stream stays as it was, by the
    word of the key in which that bit lies.

    The expansion is sequential. The schedule saves its state every 4,080 rounds (63.75 KiB of key stream for a 128-bit
    key, 16 bytes each), so the chain up to the furthest offset is paid for once, whichever threads ask, and Ctrl-C can
    interrupt that; all later work starts from the saved states, side by side.

    Parameters
    ----------
    key
        16, 24 or 32 bytes, or a MasterKey.

    Raises
    ------
    KeyTypeError, KeyFormatError, KeyWipedError
        The key is not bytes, of another length, or wiped.
    """

    name = "expansion"

    def __init__(self, key: bytes | bytearray | memoryview | MasterKey) -> None:
        secret = key_bytes(key)
        super().__init__(len(secret) * 8)
        self._segment = segment_bytes(self.bits)
        self._state_bytes = len(secret)
        self._blocks: list[ctypes.Array[ctypes.c_char]] = []
        self._known = 1  # segments whose start state is saved
        self._lock = _LOCKS[next(_COUNT) % len(_LOCKS)]
        self._allocate(0)
        ctypes.memmove(self._blocks[0], secret, len(secret))

    def _secrets(self) -> list[ctypes.Array[ctypes.c_char]]:
        return self._blocks

    def _allocate(self, segment: int) -> None:
        # Blocks never move once made: kernels may be reading them. A block has a state more than it has
        # segments, since the state behind its last segment is written by the same run; that one is copied to
        # the start of the next block.
        while len(self._blocks) <= segment // _SEGMENTS_PER_BLOCK:
            self._blocks.append(ctypes.create_string_buffer((_SEGMENTS_PER_BLOCK + 1) * self._state_bytes))

    def _state(self, segment: int) -> int:
        block, index = divmod(segment, _SEGMENTS_PER_BLOCK)
        return ctypes.addressof(self._blocks[block]) + index * self._state_bytes

    def _reach(self, segment: int) -> None:
        """Save the states up to the start of a segment."""
        while self._known <= segment:
            pool.holding(self._lock, partial(self._run_chain, segment))

    def _run_chain(self, segment: int) -> None:
        """Save some more states on the way to the start of a segment."""
        self.ready()
        first = self._known - 1
        count = min(_SEGMENTS_PER_RUN, segment - first, _SEGMENTS_PER_BLOCK - first % _SEGMENTS_PER_BLOCK)
        if count <= 0:
            return
        chain = tiers.kernel(tiers.active_tier(), KernelName("expansion_chain", self.bits))
        chain(RECORDS["expansion_chain"].pack(self._state(first), count, RCON_ADDRESS))
        after = first + count
        if after % _SEGMENTS_PER_BLOCK == 0:
            self._allocate(after)
            behind = self._state(first) + count * self._state_bytes
            ctypes.memmove(self._state(after), behind, self._state_bytes)
        self._known = after + 1

    def calls(
        self, transform: Transform, target: int, source: int, nbytes: int, offset: int, piece: int
    ) -> list[Call]:
        """Plan the kernel calls; see `Schedule.calls`."""
        self.ready()
        self._reach(offset // self._segment)
        pool.holding(self._lock, partial(self._allocate, (offset + nbytes) // self._segment))
        group = SEGMENTS_PER_GROUP * self._segment
        calls = []
        done = 0
        while done < nbytes:
            segment, skip = divmod(offset + done, self._segment)
            room = min(
                piece // group, (_SEGMENTS_PER_BLOCK - segment % _SEGMENTS_PER_BLOCK) // SEGMENTS_PER_GROUP
            )
            groups = (
                min((nbytes - done) // group, max(room, 1))
                if segment % SEGMENTS_PER_GROUP == 0 and skip == 0
                else 0
            )
            t, s, states = target + done, source + done, self._state(segment)
            if groups:
                length = groups * group
                operation, where = "expansion_indexed", [t, s, groups]
                last = segment + groups * SEGMENTS_PER_GROUP - 1
            else:
                length = min(nbytes - done, group - (offset + done) % group)
                operation, where = "expansion", [t, s, length, skip]
                last = segment
            before = partial(self._reach, last)
            calls.append(transform.call(operation, self.bits, *where, states, RCON_ADDRESS, before=before))
            done += length
        return calls
