"""Where everything lies in a ZIP file of stored members: a strict reader, and the text of new records.

The layout is that of PKWARE's APPNOTE.TXT, sections 4.3 and 4.4. Read is only what `zipfile` writes to a file in which
it can seek, with ZIP64 and without: members one after the other from the first byte on, nothing between them, the
directory in their order, no comment behind it. The standard library's reader says neither where all of that lies nor
whether there is more.
"""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO, NamedTuple

from deeplock_kernels.checkpoints.formats.scanner import Scanner, shown
from deeplock_kernels.errors import ContainerError

HINT = "the file is damaged, or not one that numpy.savez wrote: save it with numpy.savez"
LARGEST_DIRECTORY = 100_000_000  # bytes

_LOCAL = struct.Struct("<4s5H3I2H")
_LOCAL_START = b"PK\3\4"
_LOCAL_CHECKSUM = 14  # where it lies in the record
_ENTRY = struct.Struct("<4s6H3I5H2I")
_ENTRY_START = b"PK\1\2"
_ENTRY_CHECKSUM = 16
_END = struct.Struct("<4s4H2IH")
_END_START = b"PK\5\6"
_END64 = struct.Struct("<4sQ2H2I4Q")
_END64_START = b"PK\6\6"
_END64_NBYTES = _END64.size - 12  # as the record gives it: without its start and this number
_LOCATOR = struct.Struct("<4sIQI")
_LOCATOR_START = b"PK\6\7"
_ZIP64 = 1  # the number of the extra field with large numbers
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # in place of what is in the extra field or the other end
_FAR = _FULL32  # a place that has to be in the extra field
_UTF8 = 0x800
_ENCRYPTED, _STREAMED = 0x1, 0x8


class Member(NamedTuple):
    """A member: its name, its CRC-32, and where its records and its data lie."""

    name: str
    checksum: int
    local: int
    start: int
    stop: int
    entry: int
    entry_stop: int

    @property
    def checksum_places(self) -> tuple[int, int]:
        """Where its CRC-32 stands, 4 bytes each: before the data, and in the directory."""
        return self.local + _LOCAL_CHECKSUM, self.entry + _ENTRY_CHECKSUM


class Directory(NamedTuple):
    """What is where in the file.

    Attributes
    ----------
    members
        In their order.
    start, stop
        Where the entries of the directory lie.
    zip64, end
        The records behind it as they are; the first one is empty where there is none.
    """

    members: tuple[Member, ...]
    start: int
    stop: int
    zip64: bytes
    end: bytes


def read_directory(file: BinaryIO, size: int, source: str) -> Directory:
    """Read a whole directory, and the record before each member.

    Raises
    ------
    ContainerError
        It is malformed, or has compressed, encrypted, streamed or repeated members.
    """
    scanner = Scanner(file, 0, size, source, HINT)
    if size < _END.size:
        raise scanner.error(f"got {size} bytes", f"at least {_END.size} are accepted")
    scanner.go(size - _END.size)
    end = scanner.take(_END.size, "the end of the directory")
    signature, disk, first_disk, here, count, nbytes, start, comment = _END.unpack(end)
    if signature != _END_START or disk or first_disk or comment or here != count:
        raise scanner.error("got another end of the file", "a directory of one disk and without comment is accepted")
    stop, zip64 = size - _END.size, _read_zip64(scanner, size)
    if zip64:
        stop -= len(zip64)
        *_, same, count64, nbytes64, start64 = _END64.unpack(zip64[: _END64.size])
        found = ((count, count64, _FULL16), (nbytes, nbytes64, _FULL32), (start, start64, _FULL32))
        if same != count64 or any(short not in (large, full) for short, large, full in found):
            raise scanner.error("got two ends of the directory that differ", "equal ones are accepted")
        count, nbytes, start = count64, nbytes64, start64
    if start + nbytes != stop:
        raise scanner.error("got a directory of another size or place", "one just before its end is accepted")
    if nbytes > LARGEST_DIRECTORY:
        raise scanner.error("got a directory that is too large", f"up to {LARGEST_DIRECTORY} bytes are accepted")
    members = _read_members(scanner, start, stop)
    if len(members) != count:
        raise scanner.error(f"got {len(members)} members", f"{shown(count)}, as the directory says, are accepted")
    return Directory(members, start, stop, zip64, end)


def version_places(directory: Directory) -> tuple[int, int]:
    """Give the range of the versions that the record of ZIP64 names; an empty one where there is none."""
    return (directory.stop + 12, directory.stop + 16) if directory.zip64 else (directory.stop, directory.stop)


def new_member(name: str, data: bytes, local: int) -> tuple[bytes, bytes]:
    """Give a stored member that begins at `local`: its record with the data, and its entry of the directory."""
    encoded, size, checksum = name.encode(), len(data), zlib.crc32(data)
    extra = b"" if local < _FAR else struct.pack("<2HQ", _ZIP64, 8, local)
    version, system = 45 if extra else 20, 3 << 8  # Unix
    date, mode = 1 << 5 | 1, 0o600 << 16  # 1980-01-01: no time is told
    common = (0, 0, 0, date, checksum, size, size, len(encoded))
    record = _LOCAL.pack(_LOCAL_START, version, *common, 0) + encoded + data
    entry = _ENTRY.pack(
        _ENTRY_START, system | version, version, *common, len(extra), 0, 0, 0, mode, _FULL32 if extra else local
    )
    return record, entry + encoded + extra


def new_end(directory: Directory, count: int, nbytes: int, start: int, source: str) -> bytes:
    """Give the end of a directory in the manner of the one that is there, with other numbers.

    Raises
    ------
    ContainerError
        They need a longer record than the one that is there.
    """
    fields = list(_END.unpack(directory.end))
    for place, value, full in ((3, count, _FULL16), (4, count, _FULL16), (5, nbytes, _FULL32), (6, start, _FULL32)):
        if fields[place] == full and directory.zip64:
            continue
        if value >= full:
            raise ContainerError(
                f"{source}: got a file with as many members or bytes as its kind of directory can hold; "
                "one more is not possible; save it with numpy.savez in two files"
            )
        fields[place] = value
    zip64 = b""
    if directory.zip64:
        *kept, _, _, _, _ = _END64.unpack(directory.zip64[: _END64.size])
        zip64 = _END64.pack(*kept, count, count, nbytes, start)
        zip64 += _LOCATOR.pack(_LOCATOR_START, 0, start + nbytes, 1)
    return zip64 + _END.pack(*fields)


def _read_zip64(scanner: Scanner, size: int) -> bytes:
    """Give the two records of ZIP64, or nothing where there are none."""
    place = size - _END.size - _LOCATOR.size - _END64.size
    if place < 0:
        return b""
    scanner.go(place)
    found = scanner.take(_END64.size + _LOCATOR.size, "the end of the directory")
    signature, disk, where, disks = _LOCATOR.unpack(found[_END64.size :])
    if signature != _LOCATOR_START:
        return b""
    signature64, nbytes, _, _, disk64, first_disk, *_ = _END64.unpack(found[: _END64.size])
    expected = (_END64_START, _END64_NBYTES, place, 0, 1, 0, 0)
    if (signature64, nbytes, where, disk, disks, disk64, first_disk) != expected:
        raise scanner.error("got another end of a ZIP64 directory", "one just before its locator is accepted")
    return found


def _read_members(scanner: Scanner, start: int, stop: int) -> tuple[Member, ...]:
    members: list[Member] = []
    names: set[str] = set()
    scanner.go(start)
    local = 0
    while scanner.at < stop:
        place = scanner.at
        raw = _ENTRY.unpack(scanner.take(_ENTRY.size, "an entry of the directory"))
        signature, _, _, flags, method, _, _, checksum, packed, size, *lengths, disk, _, _, offset = raw
        name_length, extra_length, comment_length = lengths
        encoded = scanner.take(name_length, "a name")
        extra = scanner.take(extra_length, "an extra field")
        scanner.skip(comment_length, "a comment")
        name = _decoded(scanner, encoded, flags)
        what = f"member {shown(name)}"
        if signature != _ENTRY_START or scanner.at > stop or disk:
            raise scanner.error(f"{what}: got another entry", "entries of a directory are accepted")
        if flags & _ENCRYPTED:
            raise scanner.error(f"{what}: got an encrypted member", "plain ones are accepted")
        if method:
            raise scanner.error(f"{what}: got a compressed member", "stored ones are accepted")
        if flags & _STREAMED:
            raise scanner.error(f"{what}: got its sizes behind the data", "sizes before the data are accepted")
        if flags & ~_UTF8:
            raise scanner.error(f"{what}: got unknown flags", "members as zipfile writes them are accepted")
        if name in names:
            raise scanner.error(f"{what}: got it twice", "each name is accepted once")
        size, packed, offset = _large(scanner, what, extra, [size, packed, offset])
        if packed != size or offset != local:
            raise scanner.error(f"{what}: got another size or place", "members without holes are accepted")
        entry_stop = scanner.at
        data = _read_local(scanner, what, offset, start, (flags, checksum, size, encoded))
        members.append(Member(name, checksum, local, data, data + size, place, entry_stop))
        names.add(name)
        local = data + size
        scanner.go(entry_stop)
    if local != start:
        raise scanner.error("got bytes between the members and the directory", "none are accepted")
    return tuple(members)


def _read_local(scanner: Scanner, what: str, place: int, stop: int, expected: tuple[int, int, int, bytes]) -> int:
    """Hold the record before a member against its entry, and give where its data begin."""
    scanner.go(place)
    raw = _LOCAL.unpack(scanner.take(_LOCAL.size, f"{what}: the record before it"))
    signature, _, flags, method, _, _, checksum, packed, size, name_length, extra_length = raw
    encoded = scanner.take(name_length, f"{what}: the name before it")
    extra = scanner.take(extra_length, f"{what}: the extra field before it")
    size, packed = _large(scanner, what, extra, [size, packed])
    found = (flags, checksum, size, encoded)
    if signature != _LOCAL_START or method or packed != size or found != expected or scanner.at + size > stop:
        raise scanner.error(f"{what}: got another record before it", "what the directory says is accepted")
    return scanner.at


def _large(scanner: Scanner, what: str, extra: bytes, values: list[int]) -> list[int]:
    """Give numbers, each from the extra field where the record has no room for it."""
    fields, at = {}, 0
    while at < len(extra):
        if at + 4 > len(extra):
            break
        number, nbytes = struct.unpack_from("<2H", extra, at)
        if number in fields:
            break
        fields[number] = extra[at + 4 : at + 4 + nbytes]
        at += 4 + nbytes
    large = fields.get(_ZIP64, b"")
    missing = [place for place, value in enumerate(values) if value == _FULL32]
    if at != len(extra) or len(large) != 8 * len(missing):
        raise scanner.error(f"{what}: got another extra field", "those of zipfile are accepted")
    for place, (value,) in zip(missing, struct.iter_unpack("<Q", large), strict=True):
        values[place] = value
    return values


def _decoded(scanner: Scanner, encoded: bytes, flags: int) -> str:
    try:
        return encoded.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        raise scanner.error("got a name that is no UTF-8", "UTF-8 is accepted") from None
