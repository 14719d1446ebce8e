"""What a file format has to say of a file, so that everything else here can lock it.

To all formats a file is bytes. Some of them are the data of named tensors, and stay where they are in relation to each
other; some others have to be replaced, so that the lock header comes in or goes out. A format is one object that reads
the first and names the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, Protocol


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes
    ----------
    name, dtype
        As in the file.
    shape
        Elements along each axis; empty for a scalar.
    start, stop
        Where its bytes lie.
    companion
        The file beside the main one that they lie in, as a relative path; empty for the main one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    companion: str = ""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.stop - self.start


class Edit(NamedTuple):
    """Bytes that take the place of those from `start` to `stop` of a file."""

    start: int
    stop: int
    data: bytes


@dataclass(frozen=True)
class Layout:
    """What is where in a file.

    Attributes
    ----------
    source
        What messages call the file.
    size
        Its size in bytes.
    tensors
        Every tensor by name, in the order of the data; `start` and `stop` count from the start of its file. No edit
        touches their bytes.
    header
        The text of the lock header, or None.
    proved
        What the header's mac covers of the file, as canonical JSON: equal before locking and after.
    companions
        Files beside the main one that hold tensors, as relative paths with "/"; none of them is edited.
    checksums
        Ranges of the main file of which the format needs the CRC-32 that they have in the new file.
    detail
        What the format keeps for itself.
    """

    source: str
    size: int
    tensors: Mapping[str, TensorEntry]
    header: str | None
    proved: str
    companions: Sequence[str] = ()
    checksums: Sequence[tuple[int, int]] = ()
    detail: Any = field(default=None, repr=False)


class Format(Protocol):
    """A file format."""

    @property
    def name(self) -> str:
        """What users call it."""

    def matches(self, start: bytes) -> bool:
        """Say whether a file that starts like this (up to 64 bytes) is of this format."""

    def read(self, file: BinaryIO, size: int, source: str) -> Layout:
        """Read what is where.

        Parameters
        ----------
        file
            Open for reading in binary mode and seekable, at its start.
        size
            Its size in bytes.
        source
            Its path, which messages begin with.

        Raises
        ------
        ContainerError
            The file is malformed, or a kind that cannot be locked.
        """

    def edits(self, layout: Layout, header: str | None, checksums: Sequence[int]) -> list[Edit]:
        """Give what to change in the main file so that it has this lock header, or none; the rest of it stays.

        Parameters
        ----------
        layout
            Of the file that is read.
        header
            The text of the header. The lengths of all edits depend on that of the text alone.
        checksums
            Those that the layout asks for; zeros where they are not known yet.

        Returns
        -------
        list of Edit
            In the order of the file, not touching each other.

        Raises
        ------
        ContainerError
            There is no room for the header.
        """

