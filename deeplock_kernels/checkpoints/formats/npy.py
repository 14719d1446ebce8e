"""NumPy's .npy files: the lock header lies behind the data, where NumPy does not look."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib.format import MAGIC_PREFIX, descr_to_dtype

from deeplock_kernels.checkpoints.formats.base import Edit, Layout, TensorEntry
from deeplock_kernels.checkpoints.formats.places import in_order, proof
from deeplock_kernels.checkpoints.formats.scanner import Scanner

TENSOR = "array"
_HINT = "the file is damaged, cut short or not one that numpy.save wrote: save the array again"
_TRAILER = b"deeplock"
_LENGTH_BYTES = 8
_LENGTHS = {b"\1\0": 2, b"\2\0": 4, b"\3\0": 4}  # by version: the bytes of the length of the text
_LARGEST_TEXT = 10_000  # as numpy.load has it: the text is parsed as Python
_KEYS = {"descr", "fortran_order", "shape"}


class Array(NamedTuple):
    """What the start of an array says: its dtype, its shape, and how many bytes of data follow."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Npy:
    """The format of `numpy.save`, versions 1 to 3 (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).

    The one tensor is called "array". Its data stay in their order, Fortran's or C's. Behind them the locked file has
    "deeplock", the length of the lock header in 8 bytes (little-endian), and the lock header.
    """

    name = "npy"

    def matches(self, start: bytes) -> bool:
        """Say whether a file starts like those of `numpy.save`."""
        return start.startswith(MAGIC_PREFIX)

    def read(self, file: BinaryIO, size: int, source: str) -> Layout:
        """Read the start, and what lies behind the data."""
        scanner = Scanner(file, 0, size, source, _HINT)
        array = read_array(scanner)
        begin = scanner.at
        scanner.skip(array.nbytes, "the data")
        end, header = scanner.at, None
        if end < size:
            if scanner.take(min(len(_TRAILER), size - end), "what follows the data") != _TRAILER:
                raise scanner.error("got more bytes after the data", "one array in a file is accepted")
            length = scanner.number(_LENGTH_BYTES, "the length of the lock header")
            header = scanner.text(length, "the lock header")
            if scanner.at != size:
                raise scanner.error("got more bytes after the lock header", "none are accepted")
        tensor = TensorEntry(TENSOR, array.dtype, array.shape, begin, end)
        tensors = in_order([tensor], size, source, _HINT)
        return Layout(source, size, tensors, header, proof(file, size, tensors, [(end, size)]), detail=end)

    def edits(self, layout: Layout, header: str | None, _checksums: Sequence[int]) -> list[Edit]:
        """Give what follows the data."""
        text = b"" if header is None else header.encode()
        trailer = b"" if header is None else _TRAILER + len(text).to_bytes(_LENGTH_BYTES, "little") + text
        return [Edit(layout.detail, layout.size, trailer)]


def read_array(scanner: Scanner) -> Array:
    """Read the start of an array and stop where its data begin.

    Raises
    ------
    ContainerError
        It is malformed, or the array holds Python objects.
    """
    if scanner.take(len(MAGIC_PREFIX), "the start of an array") != MAGIC_PREFIX:
        raise scanner.error("got another start of an array", "that of numpy.save is accepted")
    version = scanner.take(2, "the version")
    if version not in _LENGTHS:
        raise scanner.error(f"got version {version[0]}.{version[1]}", "1.0, 2.0 and 3.0 are accepted")
    length = scanner.number(_LENGTHS[version], "the length of the text")
    if length > _LARGEST_TEXT:
        raise scanner.error("got a text that is too long", f"up to {_LARGEST_TEXT} bytes are accepted")
    encoded = scanner.take(length, "the text")
    text = encoded.decode("utf-8" if version == b"\3\0" else "latin-1", errors="replace")
    fields = _literal(text)
    if not isinstance(fields, dict) or fields.keys() != _KEYS:
        raise scanner.error("got another text", "a dict of descr, fortran_order and shape is accepted")
    shape = fields["shape"]
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise scanner.error("got another shape", "a tuple of whole numbers is accepted")
    if not isinstance(fields["fortran_order"], bool):
        raise scanner.error("got another fortran_order", "True and False are accepted")
    try:
        dtype: np.dtype[Any] = descr_to_dtype(fields["descr"])
    except Exception:  # NumPy has no one class for what is no dtype
        raise scanner.error("got another descr", "those of NumPy's dtypes are accepted") from None
    if dtype.subdtype is not None:
        raise scanner.error("got an array as its dtype", "numbers and fields are accepted")
    if dtype.hasobject:
        raise scanner.error(
            "got an array of Python objects, which is a pickle", "numbers are accepted; keep objects elsewhere"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= 2**63:
        raise scanner.error("got a shape of 2**63 bytes or more", "smaller ones are accepted")
    return Array(dtype.str, shape, nbytes)


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


NPY = Npy()
