"""An ONNX model without the data of its tensors: small, and with what says where in the file those data lie.

A model is one protobuf message (https://protobuf.dev/programming-guides/encoding). The messages within it are followed
by the onnx library's own descriptors, and data that lie in the file as they are in memory (`raw_data`, and `float_data`
and `double_data` in the packed form) are replaced by their places. What comes out is a message again, which the library
reads. A file of gigabytes so takes the memory of its graph.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO, NamedTuple

from deeplock_kernels.checkpoints.formats.scanner import Scanner, refusal
from deeplock_kernels.errors import MissingLibraryError

HINT = "the file is damaged, cut short or no ONNX model: export it again"
MAX_SKELETON_BYTES = 100_000_000

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # the wire types
_LONGEST_VARINT = 10
_LARGEST_FIELD = 2**29 - 1
_DEEPEST = 100  # messages in each other, as protobuf itself has it
_TENSOR, _MODEL = "onnx.TensorProto", "onnx.ModelProto"
_DATA = {4: "float_data", 9: "raw_data", 10: "double_data"}  # of a tensor
_RAW_DATA, _METADATA = 9, 14
_DATA_NBYTES = {4: 4, 9: 1, 10: 8}  # of one number there
_PLACE = struct.Struct("<BQQ")


class Place(NamedTuple):
    """Where the data of a tensor lie, and which field of it they are."""

    field: str
    start: int
    stop: int


class Skeleton(NamedTuple):
    """The model without data, and where each of its `metadata_props` lies, as a whole field."""

    model: Any
    metadata: list[tuple[int, int]]


def read_skeleton(file: BinaryIO, size: int, source: str) -> Skeleton:
    """Read a model.

    Raises
    ------
    ContainerError
        It is malformed, or says something twice of which only the last is heard.
    MissingLibraryError
        There is no onnx library.
    """
    onnx, decode_error = library()
    reader = _Reader(Scanner(file, 0, size, source, HINT))
    encoded = reader.message(onnx.ModelProto.DESCRIPTOR, size, 0)
    try:
        model = onnx.ModelProto.FromString(encoded)
    except decode_error:
        raise refusal(source, "got a message that protobuf refuses", "an ONNX model is accepted", HINT) from None
    if not model.HasField("graph") or not model.ir_version:
        raise refusal(source, "got a message without a graph", "an ONNX model is accepted", HINT)
    return Skeleton(model, reader.metadata)


def library() -> tuple[Any, type[Exception]]:
    """Import the onnx library, and what protobuf raises."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise MissingLibraryError(
            "onnx: it cannot be imported, and ONNX models need it; pip install 'deeplock-kernels[onnx]'"
        ) from None
    return onnx, DecodeError


def place_of(tensor: Any) -> Place | None:
    """Give where the data of a tensor of the skeleton lie; None if they are not in the file as in memory."""
    if not tensor.HasField("raw_data"):
        return None
    number, start, stop = _PLACE.unpack(tensor.raw_data)
    return Place(_DATA[number], start, stop)


def metadata_field(key: str, value: str) -> bytes:
    """Give the bytes of one of a model's `metadata_props`."""
    texts = ((1, key.encode()), (2, value.encode()))
    entry = b"".join(_header(number, _BYTES) + _varint(len(text)) + text for number, text in texts)
    return _header(_METADATA, _BYTES) + _varint(len(entry)) + entry


class _Reader:
    """Copies messages and leaves data out."""

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._copied = 0
        self.metadata: list[tuple[int, int]] = []

    def message(self, descriptor: Any, stop: int, depth: int) -> bytes:
        """Copy the fields of a message up to its end."""
        scanner, parts = self._scanner, []
        fields, name = descriptor.fields_by_number, descriptor.full_name
        is_tensor, seen = name == _TENSOR, set()
        if depth > _DEEPEST:
            raise scanner.error("got messages too deep in each other", f"{_DEEPEST} are accepted")
        while scanner.at < stop:
            start = scanner.at
            tag = self._number(stop)
            number, wire = tag >> 3, tag & 7
            if not 0 < number <= _LARGEST_FIELD:
                raise scanner.error("got another number of a field", "those of protobuf are accepted")
            field = fields.get(number)
            if wire != _BYTES:
                parts.append(_varint(tag) + self._plain(wire, stop))
                continue
            length = self._number(stop)
            end = scanner.at + length
            if end > stop:
                raise scanner.error("got a field that is longer than its message", "shorter ones are accepted")
            inner = field.message_type if field is not None else None
            data = is_tensor and number in _DATA
            if (inner is not None and not _repeated(field)) or data:
                # Of two the library hears one, and the other would stay in the file as it is.
                once = _RAW_DATA if data else number
                if once in seen:
                    raise scanner.error(f"got {field.name} twice in one message", "once is accepted")
                seen.add(once)
            if data:
                if length % _DATA_NBYTES[number]:
                    raise scanner.error(f"got half a number in {field.name}", "whole ones are accepted")
                content = _PLACE.pack(number, scanner.at, end)
                scanner.skip(length, field.name)
                tag = _RAW_DATA << 3 | _BYTES
            elif inner is not None:
                content = self.message(inner, end, depth + 1)
            else:
                self._count(length)
                string = field is not None and field.type == field.TYPE_STRING
                content = scanner.take(length, "a field")
                if string and not _is_text(content):  # the library would give bytes in place of a str
                    raise scanner.error(f"got a {field.name} that is no UTF-8", "UTF-8 text is accepted")
            parts += (_varint(tag), _varint(len(content)), content)
            self._count(8)
            if name == _MODEL and number == _METADATA:
                self.metadata.append((start, end))
        return b"".join(parts)

    def _plain(self, wire: int, stop: int) -> bytes:
        self._count(8)
        if wire == _VARINT:
            return _varint(self._number(stop))
        if wire not in (_FIXED32, _FIXED64):
            raise self._scanner.error("got another wire type", "those of protobuf 3 are accepted")
        nbytes = 4 if wire == _FIXED32 else 8
        if self._scanner.at + nbytes > stop:
            raise self._scanner.error("got a number that is longer than its message", "shorter ones are accepted")
        return self._scanner.take(nbytes, "a number")

    def _number(self, stop: int) -> int:
        value = 0
        for place in range(_LONGEST_VARINT):
            if self._scanner.at >= stop:
                raise self._scanner.error("got the end of a message", "more of a number is accepted")
            byte = self._scanner.take(1, "a number")[0]
            value |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                if value >= 2**64:
                    break
                return value
        raise self._scanner.error("got a number that is too long", f"up to {_LONGEST_VARINT} bytes are accepted")

    def _count(self, nbytes: int) -> None:
        self._copied += nbytes
        if self._copied > MAX_SKELETON_BYTES:
            got = f"got more than {MAX_SKELETON_BYTES} bytes beside the data of tensors"
            raise self._scanner.error(got, "fewer are accepted")


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _repeated(field: Any) -> bool:
    try:
        return bool(field.is_repeated)
    except AttributeError:  # protobuf before 6.31
        return bool(field.label == field.LABEL_REPEATED)


def _header(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
