"""The memory that is measured in: allocated once, with a new random start in its page for every round."""

from __future__ import annotations

import secrets
from typing import NamedTuple

import numpy as np

from benchmarks.models import Bytes

PAGE = 4096
ROOM = 4096  # bytes behind the data, for those who append tags


class Spot(NamedTuple):
    """Where one round works.

    Attributes
    ----------
    data
        The bytes to lock. They start at a multiple of 64 somewhere in a page.
    out
        As many bytes elsewhere, with a random start of their own.
    room
        `data` and the free bytes behind it, as one.
    """

    data: Bytes
    out: Bytes
    room: Bytes


class Workspace:
    """Two blocks that hold up to `nbytes` each; the system gives their memory when it is first used."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._data, self._out = (np.empty(nbytes + 2 * PAGE + ROOM, np.uint8) for _ in range(2))
        self._filled = 0

    def spot(self, nbytes: int) -> Spot:
        """Choose a place for `nbytes` bytes of data, and another for the output."""
        if nbytes > self._nbytes:
            raise ValueError(f"nbytes: got {nbytes}, accepted are up to {self._nbytes}")
        self._fill(nbytes + 2 * PAGE + ROOM)
        start, target = _random_start(self._data), _random_start(self._out)
        return Spot(
            self._data[start : start + nbytes],
            self._out[target : target + nbytes],
            self._data[start : start + nbytes + ROOM],
        )

    def _fill(self, nbytes: int) -> None:
        """Write random bytes, the same in each page, up to `nbytes`."""
        page = np.frombuffer(secrets.token_bytes(PAGE), np.uint8)
        while self._filled < nbytes:
            part = self._data[self._filled : min(self._filled + (PAGE << 12), len(self._data))]
            part[:] = np.resize(page, len(part))
            self._filled += len(part)


def _random_start(block: Bytes) -> int:
    return int(-block.ctypes.data % PAGE) + 64 * secrets.randbelow(PAGE // 64)


def available_memory() -> int:
    """Count the bytes that new work may take without swapping."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 4 << 30  # where the system does not say
