"""Reads the parts of a file one after the other, never past a limit, and refuses what is cut short."""

from __future__ import annotations

import reprlib
from typing import BinaryIO, Literal

from deeplock_kernels.errors import ContainerError

ByteOrder = Literal["little", "big"]


class Scanner:
    """Reads forward from the current place of a file.

    Attributes
    ----------
    at
        Where the next part begins in the file.
    stop
        Where the file, or what is read of it, ends.
    """

    def __init__(self, file: BinaryIO, at: int, stop: int, source: str, hint: str) -> None:
        self._file = file
        self._source = source
        self._hint = hint
        self.stop = stop
        self.go(at)

    def go(self, at: int) -> None:
        """Go on from another place."""
        self.at = at
        self._file.seek(at)

    def take(self, count: int, what: str) -> bytes:
        """Read so many bytes."""
        self._check(count, what)
        found = self._file.read(count)
        if len(found) != count:  # it became shorter just now
            raise self.error(f"{what}: got the end of the file", f"{count} more bytes are accepted")
        self.at += count
        return found

    def skip(self, count: int, what: str) -> None:
        """Pass over so many bytes."""
        self._check(count, what)
        self.go(self.at + count)

    def number(self, nbytes: int, what: str, order: ByteOrder = "little") -> int:
        """Read a whole number."""
        return int.from_bytes(self.take(nbytes, what), order)

    def text(self, count: int, what: str) -> str:
        """Read so many bytes of UTF-8."""
        try:
            return self.take(count, what).decode()
        except UnicodeDecodeError:
            raise self.error(f"{what}: got no UTF-8", "UTF-8 text is accepted") from None

    def error(self, got: str, accepted: str) -> ContainerError:
        """Give the refusal of what was read last."""
        return refusal(self._source, f"{got} (before byte {self.at})", accepted, self._hint)

    def _check(self, count: int, what: str) -> None:
        if count > self.stop - self.at:
            got = f"{what}: got the need of {shown(count)} bytes where {self.stop - self.at} are left"
            raise self.error(got, "whole files are accepted")


def refusal(source: str, got: str, accepted: str, hint: str) -> ContainerError:
    """Give the error for a file that cannot be locked."""
    return ContainerError(f"{source}: {got}; {accepted}; {hint}")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = 80


def shown(value: str | int) -> str:
    """Give a value out of a file for a message: escaped and short."""
    return ascii(value) if isinstance(value, str) and len(value) <= 40 else ascii(_SHORT.repr(value))[1:-1]
