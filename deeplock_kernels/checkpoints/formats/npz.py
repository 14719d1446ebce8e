"""NumPy's .npz files, stored and not compressed: the lock header is one more member, the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from deeplock_kernels.checkpoints.formats.base import Edit, Layout, TensorEntry
from deeplock_kernels.checkpoints.formats.npy import read_array
from deeplock_kernels.checkpoints.formats.places import in_order, proof
from deeplock_kernels.checkpoints.formats.scanner import Scanner, refusal, shown
from deeplock_kernels.checkpoints.formats.zip_directory import (
    HINT,
    LARGEST_DIRECTORY,
    Directory,
    Member,
    new_end,
    new_member,
    read_directory,
    version_places,
)

ENTRY_NAME = "deeplock.json"
_SUFFIX = ".npy"


class _Detail(NamedTuple):
    """The arrays among the members, and the directory and its bytes without the lock header's."""

    arrays: list[Member]
    directory: Directory
    entries: bytes
    others: int  # how many members, without it
    stop: int  # where the data of the members end


class Npz:
    """The format of `numpy.savez`.

    Each member NAME.npy is a tensor NAME. Members of other kinds stay as they are. In the locked file `deeplock.json`
    is one more of those: `numpy.load` lists it in `files`, and gives it as bytes. The checksums of the members are
    those of the locked bytes, and again those of the plain ones when it is unlocked.
    """

    name = "npz"

    def matches(self, start: bytes) -> bool:
        """Say whether a file starts like a ZIP file."""
        return start.startswith((b"PK\3\4", b"PK\5\6"))

    def read(self, file: BinaryIO, size: int, source: str) -> Layout:
        """Read the directory, and the start of each array."""
        directory = read_directory(file, size, source)
        members = list(directory.members)
        header, stop, entries_stop = None, directory.start, directory.stop
        if any(member.name == ENTRY_NAME for member in members):
            own = members.pop()
            header = _read_header(file, own, directory, source)
            stop, entries_stop = own.local, own.entry
        arrays = [member for member in members if member.name.endswith(_SUFFIX)]
        if members and not arrays:
            raise refusal(source, "got a ZIP file without arrays", "a file of numpy.savez is accepted", HINT)
        tensors = in_order([_tensor(file, array, source) for array in arrays], size, source, HINT)
        file.seek(directory.start)
        entries = file.read(entries_stop - directory.start)
        checksums = [(place, place + 4) for array in arrays for place in array.checksum_places]
        # Of the directory's end the numbers are those that follow from the rest, the versions are not.
        versions = version_places(directory)
        own_bytes = [*checksums, (stop, directory.start), (entries_stop, versions[0]), (versions[1], size)]
        return Layout(
            source,
            size,
            tensors,
            header,
            proof(file, size, tensors, own_bytes),
            checksums=[(array.start, array.stop) for array in arrays],
            detail=_Detail(arrays, directory, entries, len(members), stop),
        )

    def edits(self, layout: Layout, header: str | None, checksums: Sequence[int]) -> list[Edit]:
        """Give the checksums before the arrays, and the directory with all that is behind the arrays."""
        detail: _Detail = layout.detail
        entries = bytearray(detail.entries)
        edits = []
        for array, checksum in zip(detail.arrays, checksums, strict=True):
            encoded = checksum.to_bytes(4, "little")
            local, entry = array.checksum_places
            edits.append(Edit(local, local + 4, encoded))
            place = entry - detail.directory.start
            entries[place : place + 4] = encoded
        count, start, record = detail.others, detail.stop, b""
        if header is not None:
            record, entry_bytes = new_member(ENTRY_NAME, header.encode(), start)
            entries += entry_bytes
            count, start = count + 1, start + len(record)
        if len(entries) > LARGEST_DIRECTORY:
            raise refusal(layout.source, "got too large a directory", "one with room for a member is accepted", HINT)
        end = new_end(detail.directory, count, len(entries), start, layout.source)
        return [*edits, Edit(detail.stop, layout.size, record + entries + end)]


def _read_header(file: BinaryIO, own: Member, directory: Directory, source: str) -> str:
    """Give the text of the lock header, which has to be where and as `edits` puts it."""
    if own.name == ENTRY_NAME:
        scanner = Scanner(file, own.start, own.stop, source, HINT)
        header = scanner.text(own.stop - own.start, ENTRY_NAME)
        record, entry = new_member(ENTRY_NAME, header.encode(), own.local)
        file.seek(own.local)
        if file.read(len(record)) == record and own.local + len(record) == own.stop:
            file.seek(own.entry)
            if file.read(len(entry)) == entry and own.entry + len(entry) == directory.stop:
                return header
    got = f"got {ENTRY_NAME} as another program wrote it"
    raise refusal(source, got, "the file that was locked is accepted as it is", "get the locked file again")


def _tensor(file: BinaryIO, member: Member, source: str) -> TensorEntry:
    name = member.name.removesuffix(_SUFFIX)
    hint = f"see member {shown(member.name)}; save the arrays again with numpy.savez"
    scanner = Scanner(file, member.start, member.stop, source, hint)
    array = read_array(scanner)
    if scanner.at + array.nbytes != member.stop:
        raise scanner.error(f"got {member.stop - scanner.at} bytes of data", f"{array.nbytes} are accepted")
    return TensorEntry(name, array.dtype, array.shape, scanner.at, member.stop)


NPZ = Npz()
