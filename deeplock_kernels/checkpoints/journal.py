"""The journal of a change in place: what finishes the change of a file, or takes it back, after a crash.

It lies beside the file as long as that is neither old nor new. Its head says what the change is, and is complete and on
the disk before the journal gets its name. Behind the head are two slots, used in turn, for records. A record holds
bytes and the place in the file that they are for; it is on the disk before the file is touched there, and its slot is
used again only when the file has those bytes on the disk. So the newest record that is whole says how far the change
has come, and writing its bytes once more makes up for a write that was cut short.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from deeplock_kernels.errors import ContainerError, InterruptedLockError
from deeplock_kernels.files import flush_directory, read_at, write_at
from deeplock_kernels.keys import Hidden

_FORMAT = "deeplock-journal/1"
_HEAD = struct.Struct("<18s32sQQ")  # format, digest of all that follows, lengths of the text and of what is kept
_RECORD = struct.Struct("<32sQQQQQ")  # digest of all that follows, then number to position of Record and data's length
_SECTOR = 4096  # bytes that a device may lose together; the slots share none with each other, nor with the head


class Span(NamedTuple):
    """Bytes of the old file that stay, and how much further back they lie in the new one."""

    start: int
    stop: int
    shift: int


@dataclass(frozen=True)
class Change:
    """What becomes of a file.

    Attributes
    ----------
    size
        Of the old file, in bytes.
    modified
        When the old file was last modified, in nanoseconds.
    edits
        (start, stop, length) of each range of the old file that others bytes replace, and their number.
    window
        The most bytes that are changed at once.
    room
        The most bytes of a record, data and state.
    header
        The text of the lock header that the new file gets, without seals, or None if it is unlocked.
    sealed
        Whether the new file gets seals.
    kept
        The bytes of the old file that are replaced.
    """

    size: int
    modified: int
    edits: Sequence[tuple[int, int, int]]
    window: int
    room: int
    header: str | None
    sealed: bool
    kept: bytes = dataclasses.field(default=b"", repr=False)

    @cached_property
    def spans(self) -> list[Span]:
        """All that is not replaced."""
        grown = itertools.accumulate((length - (stop - start) for start, stop, length in self.edits), initial=0)
        starts = [0, *(stop for _, stop, _ in self.edits)]
        stops = [*(start for start, _, _ in self.edits), self.size]
        spans = [Span(*span) for span in zip(starts, stops, grown, strict=True)]
        return [span for span in spans if span.start < span.stop]

    @cached_property
    def replaced(self) -> list[tuple[int, bytes]]:
        """Where the replaced bytes of the old file are, and what they are."""
        found, position = [], 0
        for start, stop, _ in self.edits:
            found.append((start, self.kept[position : position + stop - start]))
            position += stop - start
        return found

    @property
    def new_size(self) -> int:
        """Of the new file."""
        return self.size + sum(length - (stop - start) for start, stop, length in self.edits)

    @property
    def backwards(self) -> bool:
        """Whether to begin at the end, so that what moves never meets what has still to be moved."""
        return any(span.shift > 0 for span in self.spans)

    @property
    def possible(self) -> bool:
        """Whether one direction will do."""
        return not (self.backwards and any(span.shift < 0 for span in self.spans))

    @property
    def first_boundary(self) -> int:
        """The boundary of a record, before the first step."""
        return self.size if self.backwards else 0

    def parts(self, boundary: int) -> Iterator[tuple[int, int, int | bytes]]:
        """Say where the bytes of the old file are: (first, last + 1, shift, or the bytes themselves)."""
        for start, stop, shift in self.spans:
            middle = min(max(boundary, start), stop)
            yield start, middle, 0 if self.backwards else shift
            yield middle, stop, shift if self.backwards else 0
        for start, data in self.replaced:
            yield start, start + len(data), data


class Record(NamedTuple):
    """One step of a change, or one that is taken back.

    Attributes
    ----------
    number
        Counts records, from 1 on.
    done
        How many steps are done after it.
    boundary
        Up to where, or from where on if the change goes backwards, the old file's bytes have moved after it.
    position
        Where in the file its data belong.
    state
        What the seals of the new file are so far.
    data
        The bytes.
    """

    number: int
    done: int
    boundary: int
    position: int
    state: bytes
    data: bytes | bytearray


class Journal:
    """An open journal. Use `create` or `find`."""

    def __init__(self, path: str, descriptor: int, change: Change, digest: bytes, start: int) -> None:
        self.path, self.change = path, change
        self._descriptor, self._digest, self._start = descriptor, digest, start
        self._slot = _whole_sectors(_RECORD.size + change.room)
        self.records: list[Record] = []  # the newest one last

    @classmethod
    @contextmanager
    def create(cls, path: str, change: Change) -> Iterator[Journal]:
        """Make the journal of a file, with all the space that it will need.

        Raises
        ------
        OSError
            That cannot be done.
        """
        remove_leftover(path)
        fields = dataclasses.asdict(change)
        del fields["kept"]
        text = json.dumps(fields | {"format": _FORMAT, "identity": secrets.token_hex(16)}).encode()
        lengths = struct.pack("<QQ", len(text), len(change.kept))
        digest = hashlib.sha256(b"".join((lengths, text, change.kept))).digest()
        head = b"".join((_FORMAT.encode(), digest, lengths, text, change.kept))
        start, unnamed = _whole_sectors(len(head)), _unnamed(path)
        descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            journal = cls(journal_path(path), descriptor, change, digest, start)
            os.posix_fallocate(descriptor, 0, start + 2 * journal._slot)
            write_at(descriptor, 0, head)
            os.fsync(descriptor)
            os.replace(unnamed, journal.path)
            flush_directory(os.path.dirname(path))
            yield journal
        finally:
            os.close(descriptor)

    @classmethod
    @contextmanager
    def find(cls, path: str) -> Iterator[Journal | None]:
        """Open the journal of a file, or give None.

        Raises
        ------
        ContainerError
            It is damaged.
        """
        try:
            descriptor = os.open(journal_path(path), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            yield None
            return
        try:
            yield cls._read(journal_path(path), descriptor)
        finally:
            os.close(descriptor)

    @classmethod
    def _read(cls, path: str, descriptor: int) -> Journal:
        head = Hidden(read_at(descriptor, 0, _HEAD.size))  # whatever file has this name
        size = os.fstat(descriptor).st_size
        if len(head) < _HEAD.size or not head.startswith(_FORMAT.encode()):
            raise _damaged(path)
        _, digest, text_length, kept_length = _HEAD.unpack(head)
        if max(text_length, kept_length) > size:
            raise _damaged(path)
        rest = read_at(descriptor, _HEAD.size, text_length + kept_length)
        if hashlib.sha256(head[_HEAD.size - 16 :] + rest).digest() != digest:
            raise _damaged(path)
        change = _read_change(path, bytes(rest[:text_length]), bytes(rest[text_length:]), size)
        journal = cls(path, descriptor, change, digest, _whole_sectors(_HEAD.size + len(rest)))
        found = [record for record in map(journal._read_record, (1, 2)) if record is not None]
        journal.records = sorted(found, key=lambda record: record.number)
        if not found and any(read_at(descriptor, journal._place(2), _RECORD.size)):
            raise _damaged(path)  # the second record is begun when the first one is on the disk
        return journal

    @property
    def newest(self) -> Record | None:
        """The last record that is whole."""
        return self.records[-1] if self.records else None

    def append(self, done: int, boundary: int, position: int, state: bytes, data: bytes | bytearray) -> None:
        """Write a record, and have it on the disk."""
        number = self.newest.number + 1 if self.newest else 1
        record = Record(number, done, boundary, position, state, data)
        place = self._place(number)
        write_at(self._descriptor, place, self._checked(record) + state)
        write_at(self._descriptor, place + _RECORD.size + len(state), data)
        os.fsync(self._descriptor)
        self.records = [*self.records[-1:], record]

    def retire(self) -> None:
        """Take the journal away, now that the file is whole and on the disk, and overwrite what it held."""
        path, name = os.path.split(self.path)
        unnamed = os.path.join(path, name + _BEFORE_ITS_TIME)
        os.replace(self.path, unnamed)
        with suppress(OSError):  # nothing looks at it any more
            flush_directory(path)  # before that, a journal without records would be wrong
            for number in (1, 2):
                write_at(self._descriptor, self._place(number), bytes(self._slot))
            os.fsync(self._descriptor)
        with suppress(OSError):
            os.unlink(unnamed)
            flush_directory(path)

    def _place(self, number: int) -> int:
        return self._start + (number - 1) % 2 * self._slot

    def _checked(self, record: Record) -> bytes:
        """Give the fields of a record, with the digest of this journal, them and its bytes before them."""
        fields = struct.pack("<QQQQQ", *record[:4], len(record.data))
        digest = hashlib.sha256(self._digest + fields + record.state)
        digest.update(record.data)
        return digest.digest() + fields

    def _read_record(self, number: int) -> Record | None:
        place = self._place(number)
        fields = bytes(read_at(self._descriptor, place, _RECORD.size))
        if len(fields) < _RECORD.size:
            return None
        _, number, done, boundary, position, length = _RECORD.unpack(fields)
        state_length = self.change.room - self.change.window
        if length > self.change.window:
            return None
        body = read_at(self._descriptor, place + _RECORD.size, state_length + length)
        record = Record(number, done, boundary, position, bytes(body[:state_length]), body[state_length:])
        return record if self._checked(record) == fields else None


_BEFORE_ITS_TIME = ".new"


def journal_path(path: str) -> str:
    """Give where the journal of a file is; the path holds no symbolic links."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.deeplock-journal")


def remove_leftover(path: str) -> None:
    """Remove a journal that was not begun yet, or is over."""
    with suppress(FileNotFoundError):
        os.unlink(_unnamed(path))


def check_whole(path: str) -> None:
    """Refuse a file that a change in place has left between old and new.

    Raises
    ------
    InterruptedLockError
        It has a journal.
    """
    if os.path.lexists(journal_path(os.path.realpath(path))):
        raise InterruptedLockError(
            f"{path}: a change of it in place was interrupted, or is under way; "
            "`deeplock recover` finishes it, or takes it back with --undo"
        )


def _unnamed(path: str) -> str:
    return journal_path(path) + _BEFORE_ITS_TIME


def _whole_sectors(nbytes: int) -> int:
    return -(-nbytes // _SECTOR) * _SECTOR


def _read_change(path: str, text: bytes, kept: bytes, size: int) -> Change:
    try:
        fields: dict[str, Any] = json.loads(text)
        del fields["format"], fields["identity"]
        fields["edits"] = [(int(start), int(stop), int(length)) for start, stop, length in fields["edits"]]
        change = Change(**fields, kept=kept)
        places = [0, *itertools.chain.from_iterable(edit[:2] for edit in change.edits), change.size]
        fits = places == sorted(places) and len(kept) == sum(stop - start for start, stop, _ in change.edits)
        fits = fits and 0 < change.window <= change.room <= size and change.possible
    except (ValueError, TypeError, KeyError, RecursionError):
        fits = False
    if not fits:
        raise _damaged(path)
    return change


def _damaged(path: str) -> ContainerError:
    return ContainerError(f"{path}: it is no journal of a change in place, or was damaged; take a copy of its file")
