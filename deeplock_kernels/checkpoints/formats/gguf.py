"""GGUF files of llama.cpp: the lock header is the last of the metadata, `deeplock.header`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

from deeplock_kernels.checkpoints.formats.base import Edit, Layout, TensorEntry
from deeplock_kernels.checkpoints.formats.places import in_order, proof
from deeplock_kernels.checkpoints.formats.scanner import ByteOrder, Scanner, shown
from deeplock_kernels.errors import MissingLibraryError

KEY = "deeplock.header"
MAX_TABLE_BYTES = 100_000_000

_HINT = "the file is damaged, cut short or no GGUF file: get it again"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_COUNT = (16, 24)  # where the number of metadata stands
_ALIGNMENT, _LARGEST_ALIGNMENT, _ALIGNMENT_KEY = 32, 1 << 16, "general.alignment"
_UINT32, _STRING, _ARRAY = 4, 8, 9
_NBYTES = {0: 1, 1: 1, 2: 2, 3: 2, _UINT32: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value, by its type
_MOST_AXES = 8  # ggml has 4
_DEEPEST_ARRAY = 4  # llama.cpp has 1


class _Table(NamedTuple):
    """What the metadata say that matters here, and where the lock header stands or would."""

    order: ByteOrder
    alignment: int
    others: int  # how many metadata, without the lock header
    header: str | None
    own_start: int
    own_stop: int


class Gguf:
    """The format of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, of either byte order.

    All types of tensors are bytes here, quantised ones too; how many bytes, the `gguf` library knows. The table is
    read here and not by that library, whose reader goes on without end in a table that lies, and takes seconds and
    hundreds of megabytes for a vocabulary. Shapes are those of NumPy: the last axis is the one that lies together.
    """

    name = "gguf"

    def matches(self, start: bytes) -> bool:
        """Say whether a file starts with the letters GGUF."""
        return start.startswith(_MAGIC)

    def read(self, file: BinaryIO, size: int, source: str) -> Layout:
        """Read the metadata and the table of tensors."""
        types = _types()
        scanner = Scanner(file, len(_MAGIC), min(size, MAX_TABLE_BYTES), source, _HINT)
        order = _byte_order(scanner)
        tensor_count = scanner.number(8, "the number of tensors", order)
        table = _read_metadata(scanner, order)
        infos = [_read_info(scanner, order, types, table.alignment) for _ in range(tensor_count)]
        begin = scanner.at + -scanner.at % table.alignment  # what their places count from
        tensors = [dataclasses.replace(info, start=begin + info.start, stop=begin + info.stop) for info in infos]
        found = in_order(tensors, size, source, _HINT)
        own = [_COUNT, (table.own_start, table.own_stop)]
        proved = proof(file, size, found, own)
        return Layout(source, size, found, table.header, proved, detail=table)

    def edits(self, layout: Layout, header: str | None, _checksums: Sequence[int]) -> list[Edit]:
        """Give the number of metadata, and the last one of them."""
        table: _Table = layout.detail
        count, own = table.others, b""
        if header is not None:
            count, own = count + 1, _own(header, table)
        return [
            Edit(*_COUNT, count.to_bytes(8, table.order)),
            Edit(table.own_start, table.own_stop, own),
        ]


def _types() -> Any:
    """Give the library's types of tensors with their blocks: elements, and bytes."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError:
        raise MissingLibraryError(
            "gguf: it cannot be imported, and GGUF files need it; pip install 'deeplock-kernels[gguf]'"
        ) from None
    return GGML_QUANT_SIZES


def _byte_order(scanner: Scanner) -> ByteOrder:
    version = scanner.take(4, "the version")
    orders: tuple[ByteOrder, ByteOrder] = ("little", "big")
    for order in orders:
        if int.from_bytes(version, order) in _VERSIONS:
            return order
    raise scanner.error("got another version", f"{' and '.join(map(str, _VERSIONS))} are accepted")


def _read_metadata(scanner: Scanner, order: ByteOrder) -> _Table:
    count = scanner.number(8, "the number of metadata", order)
    keys: set[str] = set()
    alignment, header, own_start, own_stop = _ALIGNMENT, None, 0, 0
    for _ in range(count):
        start = scanner.at
        key = _read_text(scanner, order, "a key")
        what = f"metadata {shown(key)}"
        if key in keys:
            raise scanner.error(f"{what}: got it twice", "each key is accepted once")
        keys.add(key)
        kind = scanner.number(4, what, order)
        if key == KEY and kind == _STRING:
            header = _read_text(scanner, order, what).rstrip(" ")
            own_start, own_stop = start, scanner.at
        elif key == _ALIGNMENT_KEY and kind == _UINT32:
            alignment = scanner.number(4, what, order)
        elif key in (KEY, _ALIGNMENT_KEY):
            raise scanner.error(f"{what}: got another type", "a string for the one, 32 bits for the other")
        else:
            _pass_value(scanner, order, kind, what)
    if not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        got = f"{_ALIGNMENT_KEY}: got {alignment}"
        raise scanner.error(got, f"powers of two up to {_LARGEST_ALIGNMENT} are accepted")
    if header is None:
        return _Table(order, alignment, count, None, scanner.at, scanner.at)
    if (own_stop - own_start) % alignment:
        raise scanner.error(f"{KEY}: got another size of it", f"multiples of {alignment} bytes are accepted")
    return _Table(order, alignment, count - 1, header, own_start, own_stop)


def _read_text(scanner: Scanner, order: ByteOrder, what: str) -> str:
    return scanner.text(scanner.number(8, what, order), what)


def _pass_value(scanner: Scanner, order: ByteOrder, kind: int, what: str, depth: int = 0) -> None:
    if kind == _STRING:
        scanner.skip(scanner.number(8, what, order), what)
    elif kind == _ARRAY and depth < _DEEPEST_ARRAY:
        inner, count = scanner.number(4, what, order), scanner.number(8, what, order)
        if inner in _NBYTES:
            scanner.skip(count * _NBYTES[inner], what)
        else:
            for _ in range(count):
                _pass_value(scanner, order, inner, what, depth + 1)
    elif kind in _NBYTES:
        scanner.skip(_NBYTES[kind], what)
    else:
        raise scanner.error(f"{what}: got another type", "values, strings and arrays of them are accepted")


def _read_info(scanner: Scanner, order: ByteOrder, types: Any, alignment: int) -> TensorEntry:
    """Read what the table says of a tensor; its place counts from the beginning of the data."""
    name = _read_text(scanner, order, "the name of a tensor")
    what = f"tensor {shown(name)}"
    axes = scanner.number(4, what, order)
    if axes > _MOST_AXES:
        raise scanner.error(f"{what}: got {axes} axes", f"up to {_MOST_AXES} are accepted")
    shape = tuple(scanner.number(8, what, order) for _ in range(axes))
    number = scanner.number(4, what, order)
    start = scanner.number(8, what, order)
    kind = next((kind for kind in types if kind == number), None)
    if kind is None:
        known = "those of the gguf library are accepted; a newer one may know it"
        raise scanner.error(f"{what}: got the type {number}", known)
    elements, nbytes = types[kind]
    first = math.prod(shape[:1])
    if first % elements:
        raise scanner.error(f"{what}: got {first} as its first length", f"multiples of {elements} are accepted")
    if start % alignment:
        raise scanner.error(f"{what}: got the offset {start}", f"multiples of {alignment} are accepted")
    stop = start + math.prod(shape) // elements * nbytes
    return TensorEntry(name, kind.name, shape[::-1], start, stop)


def _own(header: str, table: _Table) -> bytes:
    """Give the lock header as metadata: so many spaces behind it that the data stay aligned as they are."""
    key, text = KEY.encode(), header.encode()
    spaces = -(8 + len(key) + 4 + 8 + len(text)) % table.alignment
    text += b" " * spaces
    fields = (len(key).to_bytes(8, table.order), key, _STRING.to_bytes(4, table.order))
    return b"".join((*fields, len(text).to_bytes(8, table.order), text))


GGUF = Gguf()
