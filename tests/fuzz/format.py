"""Files of any bytes, read as npy, npz, GGUF or ONNX by the package and by each format's library; lock headers in and out.

A case is a whole file. The format is the one that it is recognised as.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import gguf
import numpy as np
import onnx

from deeplock_kernels.checkpoints.formats import recognise
from deeplock_kernels.checkpoints.formats.base import Edit, Format, Layout
from deeplock_kernels.errors import ContainerError

TOKENS = [
    *("PK\x03\x04", "PK\x01\x02", "PK\x05\x06", "PK\x06\x06", "PK\x06\x07", ".npy", "deeplock.json"),
    *("'descr'", "'fortran_order'", "'shape'", "(1,)", "'<f4'", "'|O'", "True", "deeplock"),
    *("GGUF", "general.alignment", "deeplock.header", "Constant", "Resize", "location", "offset", "length"),
]
_NUMBERS = (0, 1, 2, 8, 9, 31, 32, 127, 128, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
_PATH = f"/proc/self/fd/{os.memfd_create('case')}"
# What the libraries raise of files that are read here; only they know why.
_THEIRS = (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError, NotImplementedError, zipfile.BadZipFile)


def run(data: bytes) -> None:
    """Read a file, and lock and unlock it if it can be read."""
    known = recognise(data[:64])
    if known.name == "safetensors":  # which has a target of its own
        return
    try:
        layout = _read(known, data)
    except ContainerError as error:
        message = str(error)
        assert message.isprintable(), message
        assert message.startswith("file: "), message
        assert len(message) < 600, message
        return
    _check_places(layout)
    with open(_PATH, "wb") as file:
        file.write(data)
    _SEEN_BY[known.name](layout, data)
    unlocked = data
    if layout.header is not None:
        unlocked = _check_edit(known, layout, data, None)
        layout = _read(known, unlocked)
    locked = _check_edit(known, layout, unlocked, '{"a":"ä"}')
    back = _check_edit(known, _read(known, locked), locked, None)
    again = _check_edit(known, _read(known, locked), locked, "another one")
    assert _check_edit(known, _read(known, again), again, None) == back
    if _sums(layout, unlocked) == _sums_in_file(known, layout):
        assert back == unlocked


def mutate(data: bytes, random: Random, mutate_bytes: Callable[[bytes], bytes]) -> bytes:
    """Change bytes, or put a number that tempts where another one may be."""
    if not data or random.random() < 0.5:
        return mutate_bytes(data)
    nbytes = random.choice([1, 2, 4, 8])
    number = random.choice(_NUMBERS) % 256**nbytes
    place = random.randrange(len(data))
    return data[:place] + number.to_bytes(nbytes, random.choice(["little", "big"])) + data[place + nbytes :]


def _read(known: Format, data: bytes) -> Layout:
    return known.read(io.BytesIO(data), len(data), "file")


def _check_places(layout: Layout) -> None:
    end = 0
    for tensor in layout.tensors.values():
        if tensor.companion:
            assert tensor.companion in layout.companions
        else:
            assert end <= tensor.start <= tensor.stop <= layout.size
            end = tensor.stop


def _data_of(layout: Layout, data: bytes) -> list[tuple[Any, ...]]:
    return [
        (one.name, one.dtype, one.shape, one.companion, data[one.start : one.stop] if not one.companion else one.start)
        for one in layout.tensors.values()
    ]


def _check_edit(known: Format, layout: Layout, data: bytes, header: str | None) -> bytes:
    """Give the file with this lock header: all else is as it was, but for checksums."""
    edits = known.edits(layout, header, _sums(layout, data))
    assert sorted(edits) == edits
    assert [len(edit.data) for edit in edits] == [
        len(edit.data) for edit in known.edits(layout, header, [0] * len(layout.checksums))
    ]
    changed = _applied(edits, data)
    found = _read(known, changed)
    assert found.header == header
    assert found.proved == layout.proved
    assert _data_of(found, changed) == _data_of(layout, data)
    assert _sums(found, changed) == _sums(layout, data)
    return changed


def _applied(edits: list[Edit], data: bytes) -> bytes:
    parts, position = [], 0
    for edit in edits:
        assert position <= edit.start <= edit.stop
        parts += [data[position : edit.start], edit.data]
        position = edit.stop
    return b"".join([*parts, data[position:]])


def _sums(layout: Layout, data: bytes) -> list[int]:
    return [zlib.crc32(data[start:stop]) for start, stop in layout.checksums]


def _sums_in_file(known: Format, layout: Layout) -> list[int]:
    return [array.checksum for array in layout.detail.arrays] if known.name == "npz" else []


def _seen_by_numpy(layout: Layout, data: bytes) -> None:
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except _THEIRS:
        return
    (tensor,) = layout.tensors.values()
    assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype.str)
    assert data[tensor.start : tensor.stop] == array.tobytes("A")


def _seen_by_zipfile(layout: Layout, data: bytes) -> None:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except _THEIRS:
        return
    with archive:
        arrays = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        assert [member.filename for member in arrays] == [f"{name}.npy" for name in layout.tensors]
        for member in arrays:
            try:
                content = archive.read(member)
            except _THEIRS:
                continue
            tensor = layout.tensors[member.filename.removesuffix(".npy")]
            assert content.endswith(data[tensor.start : tensor.stop])


def _seen_by_gguf(layout: Layout, data: bytes) -> None:
    try:
        with np.errstate(all="raise"):
            reader = gguf.GGUFReader(_PATH)
    except (*_THEIRS, FloatingPointError):
        return
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert theirs.keys() == layout.tensors.keys()
    for name, tensor in layout.tensors.items():
        assert (tensor.start, tensor.nbytes) == (theirs[name].data_offset, theirs[name].n_bytes)
        assert tensor.shape == tuple(reversed(theirs[name].shape.tolist()))


def _seen_by_onnx(layout: Layout, data: bytes) -> None:
    model = onnx.ModelProto.FromString(data)
    for name, tensor in layout.tensors.items():
        theirs = [one for one in model.graph.initializer if one.name == name]
        if theirs and all(one.HasField("raw_data") for one in theirs) and not tensor.companion:
            assert data[tensor.start : tensor.stop] in [one.raw_data for one in theirs]


_SEEN_BY: dict[str, Callable[[Layout, bytes], None]] = {
    "npy": _seen_by_numpy,
    "npz": _seen_by_zipfile,
    "gguf": _seen_by_gguf,
    "onnx": _seen_by_onnx,
}
