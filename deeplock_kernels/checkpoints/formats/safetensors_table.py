"""The safetensors container: a strict reader of its table, and the lock header that is kept in it.

A file is 8 bytes (the table's length, little-endian), the table (a JSON object, padded with spaces) and the
bytes of the tensors. The format is that of https://github.com/huggingface/safetensors (README, "Format").
Whatever that library refuses is refused here. It lets pass, and this reader does not: repeated names, unknown
keys, an array in place of a tensor's object, an object in place of its dtype, a `__metadata__` of null, and
around the table any white space but spaces after it.

The lock header is one entry of the table's `__metadata__`. It is put in and taken out as text, so that taking
it out gives back the very bytes that the file had before.
"""

from __future__ import annotations

import io
import json
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from deeplock_kernels.checkpoints.formats.base import TensorEntry
from deeplock_kernels.errors import AlreadyLockedError, ContainerError, NotLockedError, ParameterError
from deeplock_kernels.files import check_regular, file_errors, path_text

__all__ = [
    "DTYPE_BITS",
    "ENTRY_KEY",
    "MAX_TABLE_BYTES",
    "Table",
    "TensorEntry",
    "canonical_table",
    "canonical_text",
    "entry",
    "insert_entry",
    "parse_table",
    "read_table",
    "remove_entry",
    "replace_entry",
]

ENTRY_KEY = "deeplock"
MAX_TABLE_BYTES = 100_000_000

_DTYPES = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "I64 U64 F64 C64",
}
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {name: bits for bits, names in _DTYPES.items() for name in names.split()}
)

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")

_NOT_WHITE = re.compile(r"[^ \t\n\r]")
_BARE_WORD = re.compile(r'[^ \t\n\r,:\[\]{}"]*')
_INTEGER = re.compile(r"0|[1-9][0-9]{0,19}")
_NUMBER = "(?:0|[1-9][0-9]{0,18})"
_PLAIN_TENSOR = re.compile(  # as writers spell it: read in one step
    rf'{{"dtype":"([A-Z0-9_]+)","shape":\[({_NUMBER}(?:,{_NUMBER})*|)\],"data_offsets":\[({_NUMBER}),({_NUMBER})\]}}'
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_KEPT_OBJECT = re.compile(" {1,8}:")
_JSON = json.JSONDecoder()


@dataclass(frozen=True)
class Table:
    """The table of a file.

    Attributes
    ----------
    text
        The JSON text exactly as in the file, with the spaces after it.
    data_start
        Where the data begins in the file, in bytes: 8 + the table's length.
    data_bytes
        The size of the data.
    tensors
        Every tensor by name, in the order of the data; `start` and `stop` count from `data_start`.
    metadata
        The `__metadata__` strings, or None if the table has none.
    source
        What messages call the file.
    """

    text: str = field(repr=False)
    data_start: int
    data_bytes: int
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] | None
    source: str = field(default="file", compare=False)


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read the table of a file; of the data only the size is looked at.

    Parameters
    ----------
    path
        A safetensors file.

    Raises
    ------
    ContainerError
        If it is not a well-formed safetensors file.
    FileAccessError
        If it cannot be read or is no ordinary file.
    ParameterError
        If `path` is not a path.
    """
    text = path_text(path)
    with file_errors(text, "read"):
        check_regular(text, "read", os.stat(text))  # before opening, which would wait at a pipe
        with open(text, "rb") as file:
            return parse_table(file, os.fstat(file.fileno()).st_size, source=text)


def parse_table(file: BinaryIO, size: int, *, source: str = "file") -> Table:
    """Read the table at the start of an open file.

    Parameters
    ----------
    file
        Open for reading in binary mode, buffered and seekable; it is left at the start of the data.
    size
        The file's size in bytes.
    source
        What messages call the file.

    Raises
    ------
    ContainerError
        If it is not a well-formed safetensors file.
    """
    text = _read_text(file, size, source)
    data_start = _LENGTH_BYTES + len(text.encode())
    members = _members(text, source)
    metadata = members.pop(_METADATA, None)
    found: list[TensorEntry] = [member.value for member in members.values()]
    tensors = sorted(found, key=lambda tensor: (tensor.start, tensor.stop))
    _check_coverage(tensors, size - data_start, source)
    strings = {name: member.value for name, member in metadata.value.items()} if metadata else None
    return Table(
        text=text,
        data_start=data_start,
        data_bytes=size - data_start,
        tensors=MappingProxyType({tensor.name: tensor for tensor in tensors}),
        metadata=None if strings is None else MappingProxyType(strings),
        source=source,
    )


def entry(table: Table) -> str | None:
    """Give the lock header in a table, or None if there is none."""
    return None if table.metadata is None else table.metadata.get(ENTRY_KEY)


def insert_entry(table: Table, value: str) -> bytes:
    """Give the start of the locked file: the table with a lock header in it, and its length.

    The inserted text is a multiple of 8 bytes long, so the data stays as aligned as it was, and everything
    else in the table stays as it is.

    Parameters
    ----------
    table
        The table of the file before it is locked.
    value
        The lock header.

    Returns
    -------
    bytes
        All that comes before the data: 8 bytes of length and the new table.

    Raises
    ------
    AlreadyLockedError
        If the table has a lock header.
    ContainerError
        If the table would become larger than `MAX_TABLE_BYTES`.
    ParameterError
        If `value` is no str, or one that UTF-8 cannot hold.
    """
    if not isinstance(value, str) or _SURROGATE.search(value):
        raise ParameterError("value: got what is not Unicode text; a str without lone surrogates is accepted")
    if entry(table) is not None:
        raise AlreadyLockedError(
            f"{table.source}: got a file with a lock header; one without is accepted; unlock it first"
        )
    members = _members(table.text, table.source)
    metadata = members.get(_METADATA)
    key, string = json.dumps(ENTRY_KEY), json.dumps(value, ensure_ascii=False)
    # Where the filling spaces stand tells `remove_entry` what to take out. After the string: the whole object
    # is ours. Before the colon, where other JSON writers put none: the object was there, even if empty.
    if metadata is None:
        position = 1
        before, after = f'"{_METADATA}":{{{key}:{string}', "}" + ("," if members else "")
    else:
        position = metadata.value_start + 1
        before, after = key, f":{string}" + ("," if metadata.value else "")
    spaces = " " * (8 - len((before + after).encode()) % 8)
    text = table.text[:position] + before + spaces + after + table.text[position:]
    return _with_length(text.encode(), table.source)


def remove_entry(table: Table) -> bytes:
    """Give the start of the unlocked file: the table without its lock header, and its length.

    If `insert_entry` made the table, these are exactly the bytes from before. If another program wrote it
    anew, the entry is dropped, `__metadata__` too if nothing else is in it, and the data stays as aligned as
    it was.

    Parameters
    ----------
    table
        The table of a locked file.

    Returns
    -------
    bytes
        All that comes before the data: 8 bytes of length and the new table.

    Raises
    ------
    NotLockedError
        If the table has no lock header.
    """
    if entry(table) is None:
        raise NotLockedError(
            f"{table.source}: got a file without a lock header; a locked one is accepted; is it unlocked?"
        )
    members = _members(table.text, table.source)
    strings: dict[str, _Member] = members[_METADATA].value
    own = strings[ENTRY_KEY]
    if len(strings) > 1 or _KEPT_OBJECT.fullmatch(table.text, own.key_stop, own.value_start):
        text = _without(table.text, strings, ENTRY_KEY)
    else:
        text = _without(table.text, members, _METADATA)
    encoded = text.encode()
    removed = table.data_start - _LENGTH_BYTES - len(encoded)
    return _with_length(encoded + b" " * (removed % 8), table.source)


def replace_entry(table: Table, value: str) -> bytes:
    """Give the start of a locked file with another lock header in it; see `insert_entry` and `remove_entry`.

    Raises
    ------
    NotLockedError, ContainerError, ParameterError
        As for those.
    """
    start = remove_entry(table)
    return insert_entry(parse_table(io.BytesIO(start), len(start) + table.data_bytes, source=table.source), value)


def canonical_table(table: Table) -> dict[str, Any]:
    """Give the table as a Python object without its lock header: what the mac covers as "file".

    It is equal before locking and after: `__metadata__` is always there, empty if it has no other strings.

    Parameters
    ----------
    table
        The table of a file, locked or not.

    Returns
    -------
    dict
        For each tensor {"dtype", "shape", "data_offsets"}, and "__metadata__" with its other strings.
    """
    canonical: dict[str, Any] = {
        tensor.name: {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.stop],
        }
        for tensor in table.tensors.values()
    }
    canonical[_METADATA] = {name: text for name, text in (table.metadata or {}).items() if name != ENTRY_KEY}
    return canonical


def canonical_text(table: Table) -> str:
    """Give `canonical_table` as canonical JSON: sorted keys, no white space, no escapes for what is not ASCII."""
    return json.dumps(canonical_table(table), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class _Member(NamedTuple):
    """A member of a JSON object: its value, and where in the text it stands."""

    start: int
    key_stop: int
    value_start: int
    stop: int
    value: Any


_Fields = tuple[str, tuple[int, ...], tuple[int, ...]]


class _Scanner:
    """Reads the only JSON that a table can be, three levels deep, and stops at anything else.

    So neither nesting nor long numbers nor values of other kinds can cost stack, time or memory.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        self.at = 0

    def error(self, got: str, accepted: str) -> ContainerError:
        return _refusal(self.source, f"{got} (character {self.at} of the table)", accepted)

    def peek(self) -> str:
        """Go to the next character that is no white space and give it, or "" at the end."""
        found = _NOT_WHITE.search(self.text, self.at)
        self.at = found.start() if found else len(self.text)
        return self.text[self.at : self.at + 1]

    def take(self, accepted: str, what: str) -> str:
        got = self.peek()
        if not got or got not in accepted:
            found = _shown(got) if got else "the end"
            raise self.error(f"{what}: got {found}", f"{' or '.join(map(repr, accepted))} is accepted")
        self.at += 1
        return got

    def sequence(self, brackets: str, what: str, item: Callable[[], None]) -> None:
        self.take(brackets[0], what)
        if self.peek() == brackets[1]:
            self.at += 1
            return
        item()
        while self.take("," + brackets[1], what) == ",":
            item()

    def members(self, what: str, value: Callable[[str], Any]) -> dict[str, _Member]:
        """Read an object whose values `value` reads, given their key."""
        found: dict[str, _Member] = {}

        def member() -> None:
            self.peek()
            start = self.at
            key = self.string(f"a key of {what}")
            if key in found:
                raise self.error(f"{what}: got the key {_shown(key)} twice", "each key is accepted once")
            key_stop = self.at
            self.take(":", what)
            self.peek()
            value_start = self.at
            parsed = value(key)
            found[key] = _Member(start, key_stop, value_start, self.at, parsed)

        self.sequence("{}", what, member)
        return found

    def string(self, what: str) -> str:
        if self.peek() != '"':
            raise self.error(f"{what}: got no string", "a JSON string is accepted")
        try:
            value, stop = _JSON.raw_decode(self.text, self.at)
        except json.JSONDecodeError:
            raise self.error(f"{what}: got a broken string", "a JSON string is accepted") from None
        if not isinstance(value, str) or _SURROGATE.search(value):
            raise self.error(f"{what}: got a lone surrogate", "Unicode text is accepted")
        self.at = stop
        return value

    def integers(self, what: str) -> tuple[int, ...]:
        found: list[int] = []

        def integer() -> None:
            self.peek()
            word = _BARE_WORD.match(self.text, self.at)
            digits = word[0] if word else ""
            if not _INTEGER.fullmatch(digits) or int(digits) >= 2**64:
                got = _shown(digits or self.text[self.at : self.at + 1])
                raise self.error(f"{what}: got {got}", "an integer of at least 0 and below 2**64 is accepted")
            self.at += len(digits)
            found.append(int(digits))

        self.sequence("[]", what, integer)
        return tuple(found)

    def value(self, key: str) -> dict[str, _Member] | TensorEntry:
        """Read what stands in the table under a key."""
        if key == _METADATA:
            return self.members(_METADATA, lambda name: self.string(f"{_METADATA} {_shown(name)}"))
        return self.tensor(key)

    def tensor(self, name: str) -> TensorEntry:
        dtype, shape, offsets = self.plain_fields() or self.fields(f"tensor {_shown(name)}")

        def refusal(got: str, accepted: str) -> ContainerError:
            return self.error(f"tensor {_shown(name)}: got {got}", accepted)

        if dtype not in DTYPE_BITS:
            raise refusal(f"dtype {_shown(dtype)}", f"one of {', '.join(DTYPE_BITS)} is accepted")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise refusal(f"data_offsets {_shown(list(offsets))}", "[begin, end] with begin <= end is accepted")
        tensor = TensorEntry(name, dtype, shape, *offsets)
        elements = 1
        for length in shape:
            elements *= length
            if elements >= 2**64:
                raise refusal(f"shape {_shown(list(shape))}", "fewer than 2**64 elements are accepted")
        bits = elements * DTYPE_BITS[dtype]
        if bits != tensor.nbytes * 8:
            needed = f"{bits} bits are needed" if bits % 8 else f"{bits // 8} bytes are needed"
            raise refusal(f"{tensor.nbytes} bytes for {dtype} of shape {_shown(list(shape))}", needed)
        return tensor

    def plain_fields(self) -> _Fields | None:
        """Read the fields of a tensor if they are spelled as usual."""
        found = _PLAIN_TENSOR.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        dtype, shape, start, stop = found.groups()
        return dtype, tuple(map(int, shape.split(","))) if shape else (), (int(start), int(stop))

    def fields(self, what: str) -> _Fields:
        """Read the fields of a tensor, in any order and with any white space."""

        def value(key: str) -> str | tuple[int, ...]:
            if key not in _FIELDS:
                raise self.error(f"{what}: got the key {_shown(key)}", f"{', '.join(_FIELDS)} are accepted")
            return self.string(f"{what}: dtype") if key == "dtype" else self.integers(f"{what}: {key}")

        found = self.members(what, value)
        if len(found) < len(_FIELDS):
            missing = next(key for key in _FIELDS if key not in found)
            raise self.error(f"{what}: got no {missing}", f"{', '.join(_FIELDS)} are accepted, all of them")
        dtype, shape, offsets = (found[key].value for key in _FIELDS)
        return dtype, shape, offsets


_SHORT = reprlib.Repr()
_SHORT.maxstring = 80
_SHORT.maxlist = 8
_SHORT.maxlong = 80


def _shown(value: str | list[int]) -> str:
    """A value out of the file, short and without control characters."""
    return _SHORT.repr(value)


def _refusal(source: str, got: str, accepted: str) -> ContainerError:
    hint = "the file is damaged, cut short or no safetensors file: get it again"
    return ContainerError(f"{source}: {got}; {accepted}; {hint}")


def _read_text(file: BinaryIO, size: int, source: str) -> str:
    """Read the table as text, once its claimed length has been held against the file's size."""
    if size < _LENGTH_BYTES:
        raise _refusal(source, f"got {size} bytes", f"at least {_LENGTH_BYTES} are accepted")
    file.seek(0)
    length = int.from_bytes(_read(file, _LENGTH_BYTES, source), "little")
    room = min(size - _LENGTH_BYTES, MAX_TABLE_BYTES)
    if length > room:
        # The number is not shown: of a key file it would be eight digits of the key.
        got = f"got a table that is too long, by its first {_LENGTH_BYTES} bytes"
        raise _refusal(source, got, f"at most {room} are accepted for this file")
    encoded = _read(file, length, source)
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        got = f"got no UTF-8 at byte {error.start} of the table"
        raise _refusal(source, got, "a UTF-8 text is accepted") from None
    if not text.startswith("{"):
        raise _refusal(source, f"got a table that starts with {text[:1]!r}", "'{' is accepted")
    return text


def _read(file: BinaryIO, count: int, source: str) -> bytes:
    found = file.read(count)
    if len(found) != count:
        raise _refusal(source, f"got an end of file after {len(found)} bytes", f"{count} are needed")
    return found


def _members(text: str, source: str) -> dict[str, _Member]:
    scanner = _Scanner(text, source)
    members = scanner.members("the table", scanner.value)
    if text[scanner.at :].strip(" "):
        raise scanner.error("got more text after the table's end", "spaces are accepted there")
    return members


def _check_coverage(tensors: list[TensorEntry], data_bytes: int, source: str) -> None:
    """The tensors, in the order of the data, must follow each other without hole or overlap up to its end."""
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            got = f"tensor {_shown(tensor.name)}: got byte {tensor.start} as its begin"
            raise _refusal(source, got, f"{end}, where the tensor before it ends, is accepted")
        end = tensor.stop
    if end != data_bytes:
        got = f"got {data_bytes} bytes of data"
        raise _refusal(source, got, f"{end}, the size of its tensors, are accepted")


def _without(text: str, members: Mapping[str, _Member], key: str) -> str:
    """Cut a member and one comma beside it out of the text."""
    names = list(members)
    index = names.index(key)
    start, stop = members[key].start, members[key].stop
    if index + 1 < len(names):
        stop = text.index(",", stop) + 1
    elif index:
        start = members[names[index - 1]].stop
    return text[:start] + text[stop:]


def _with_length(encoded: bytes, source: str) -> bytes:
    if len(encoded) > MAX_TABLE_BYTES:
        raise ContainerError(
            f"{source}: got {len(encoded)} bytes for the table with its lock header; "
            f"at most {MAX_TABLE_BYTES} are accepted; lock fewer tensors, or split the file"
        )
    return len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded
