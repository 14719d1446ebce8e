"""What every key schedule has: a key in memory of its own, its key stream, and its share of planning kernel calls."""

from __future__ import annotations

import ctypes
import operator
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt

from deeplock_kernels.errors import KeyTypeError, KeyWipedError, ParameterError
from deeplock_kernels.kernels.signatures import RCON_START, RCON_WORDS
from deeplock_kernels.runtime.pool import Call, resolve_threads
from deeplock_kernels.transform import IDENTITY, Transform

MAX_OFFSET = 2**63
_RCON = ctypes.create_string_buffer(RCON_WORDS, len(RCON_WORDS))
RCON_ADDRESS = ctypes.addressof(_RCON) + RCON_START


class Schedule(ABC):
    """A key stream: byte i is a function of the key and of i.

    It holds key material: it shows none in its repr and cannot be pickled or copied. `wipe()`, or the end of
    a `with` block, fills its memory with zeros (best effort) and ends its use. One object may be used by many
    threads at once.
    """

    name: ClassVar[str]
    bits: int = 0
    _wiped = False

    def __init__(self, bits: int) -> None:
        self.bits = bits

    @abstractmethod
    def calls(
        self, transform: Transform, target: int, source: int, nbytes: int, offset: int, piece: int
    ) -> list[Call]:
        """Plan the kernel calls that transform `nbytes` at `source` into `target`, in pieces of about `piece` bytes.

        The first byte takes the key byte at position `offset`. The ranges are the same or separate.
        """

    @abstractmethod
    def _secrets(self) -> list[ctypes.Array[ctypes.c_char]]:
        """List all memory that holds key material."""

    def keystream(self, nbytes: int, offset: int = 0) -> npt.NDArray[np.uint8]:
        """Give the key bytes at positions `offset` to `offset + nbytes - 1`.

        Parameters
        ----------
        nbytes
            How many.
        offset
            The position of the first one, 0 <= offset and offset + nbytes <= 2^63.

        Returns
        -------
        ndarray of uint8, shape (nbytes,)

        Raises
        ------
        ParameterError
            A number is negative, too large or not a whole number.
        KeyWipedError
            After `wipe()`.
        """
        nbytes = check_integer(nbytes, "nbytes")
        offset = check_range(offset, nbytes)
        self.ready()
        stream = np.zeros(nbytes, np.uint8)
        if nbytes:
            threads = resolve_threads(None)
            transform, address = Transform(IDENTITY, "lock"), stream.ctypes.data
            piece = transform.piece(nbytes, threads)
            transform.run(
                self.calls(transform, address, address, nbytes, offset, piece), threads, in_place=False
            )
        return stream

    def ready(self) -> None:
        """Raise KeyWipedError after `wipe()`."""
        if self._wiped:
            raise KeyWipedError(f"{type(self).__name__}: it was wiped; make a new one from its key")

    def wipe(self) -> None:
        """Fill all key material with zeros; every later use raises KeyWipedError."""
        self._wiped = True
        for block in self._secrets():
            ctypes.memset(block, 0, len(block))

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.bits} bits)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise KeyTypeError(
            f"{type(self).__name__}: it cannot be pickled or copied; make it again from its key"
        )


def check_integer(value: object, argument: str) -> int:
    """Check a whole number of at least 0.

    Raises
    ------
    ParameterError
        It is something else.
    """
    number = whole_number(value)
    if number is None or number < 0:
        got = type(value).__name__ if number is None else number
        raise ParameterError(f"{argument}: got {got}, accepted is a whole number of at least 0")
    return number


def whole_number(value: object) -> int | None:
    """Give an int for whatever is a whole number (not a bool), else None."""
    try:
        return None if isinstance(value, (bool, np.bool_)) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_range(offset: object, nbytes: int) -> int:
    """Check an offset into the key stream for a range of `nbytes`.

    Raises
    ------
    ParameterError
        It is negative, not a whole number, or the range goes beyond 2^63.
    """
    position = check_integer(offset, "offset")
    if position + nbytes > MAX_OFFSET:
        raise ParameterError(
            f"offset: got {position} for {nbytes} bytes, accepted are ranges that end at 2^63 or before"
        )
    return position
