"""Load a locked safetensors file straight into the tensors of a module."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import torch

from deeplock_kernels import buffers
from deeplock_kernels.checkpoints.formats.base import Layout
from deeplock_kernels.checkpoints.formats.safetensors import SAFETENSORS
from deeplock_kernels.checkpoints.streaming import Path, header_of, opened
from deeplock_kernels.errors import BufferTypeError, ContainerError, SizeMismatchError, TensorNameError
from deeplock_kernels.files import file_errors
from deeplock_kernels.frameworks.torch.modules import tensors_of
from deeplock_kernels.named_lock import Key, NamedLock
from deeplock_kernels.pieces import Range
from deeplock_kernels.runtime.pool import resolve_threads
from deeplock_kernels.sboxes import SBox

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def load_state_dict(
    module: torch.nn.Module,
    path: Path,
    key: Key,
    *,
    strict: bool = True,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> None:
    """Load a locked safetensors file into a module: unlocked out of the mapped file into the module's own memory.

    There is no other plain copy, neither in memory nor on the disk. Seals are compared before the first byte changes;
    an interruption after that leaves some tensors loaded and others not. The file must not change meanwhile.

    Parameters
    ----------
    module
        Its tensors have to have the dtypes and shapes of those in the file.
    path
        The file; it is only read.
    key, check, seal, sbox, threads
        As for `unlock_tensors`.
    strict
        Whether the names in the file have to be those of the module. Of tensors that share their memory one suffices.

    Raises
    ------
    WrongKeyError, TamperedHeaderError, TamperedError
        The key is another one, or the file was altered; nothing was changed.
    TensorNameError, SizeMismatchError, BufferTypeError, BufferLayoutError, ReadOnlyError
        The module lacks a tensor or has another one, or one is not plain CPU memory; nothing was changed.
    NotLockedError, ContainerError, HeaderError, FileAccessError
        The file has no lock header, is not a well-formed safetensors file, or cannot be read.
    KeyTypeError, KeyFormatError, SBoxError, ParameterError
        Another argument is wrong.
    """
    tensors = tensors_of(module)
    count = resolve_threads(threads)
    with opened(path, "path") as model:
        layout = model.layout
        if model.format is not SAFETENSORS:
            raise ContainerError(f"{layout.source}: got a file of {model.format.name}, accepted is safetensors")
        header = header_of(layout)
        lock = NamedLock.from_header(key, header, check=check, sbox=sbox)
        targets = _targets(tensors, layout, strict=strict)
        with (
            lock,
            file_errors(layout.source, "read"),
            mmap.mmap(model.files[0].file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            whole = np.frombuffer(mapped, np.uint8)
            try:
                start = whole.ctypes.data
                ranges = [
                    Range(name, block.address, start + layout.tensors[name].start, block.nbytes)
                    for name, block in targets.items()
                ]
                locked = [one for one in ranges if one.name in header.tensors]
                if check and seal:
                    lock.expect(lock.seals([one for one in locked if lock.sealed(one.name)], count))
                buffers.note_written(*(tensors[name] for name in targets))
                lock.unlock([one for one in locked if one.nbytes], count)
                for one in ranges:
                    if one.name not in header.tensors:
                        ctypes.memmove(one.target, one.source, one.nbytes)
            finally:
                del whole  # the map cannot be closed while it is looked at


def _targets(tensors: dict[str, torch.Tensor], layout: Layout, *, strict: bool) -> dict[str, buffers.Memory]:
    """Give the memory for each tensor of a file that is to be loaded, memory that several share once."""
    names = [name for name in layout.tensors if name in tensors]
    blocks = buffers.named_memory(tensors, names)
    for name in names:
        tensor, entry = tensors[name], layout.tensors[name]
        if entry.shape != tuple(tensor.shape):
            raise SizeMismatchError(
                f"tensors[{name!r}]: got the shape {tuple(tensor.shape)}, accepted is that in the file, {entry.shape}"
            )
        if getattr(torch, _DTYPES.get(entry.dtype, ""), None) is not tensor.dtype:
            raise BufferTypeError(
                f"tensors[{name!r}]: got {tensor.dtype}, accepted is the dtype in the file, {entry.dtype}; "
                "convert the module first, as with .to(dtype)"
            )
    if strict:
        loaded = {block[:2] for block in blocks.values()}
        absent = [name for name in tensors if name not in blocks]
        missing = [name for name, block in buffers.named_memory(tensors, absent).items() if block[:2] not in loaded]
        others = [name for name in layout.tensors if name not in tensors]
        if missing or others:
            raise TensorNameError(
                f"tensors[{(missing or others)[0]!r}]: {len(missing)} tensors of the module are not in the file, and "
                f"{len(others)} of the file not in the module; strict=False loads those that are in both"
            )
    return {name: blocks[name] for name in {(b.address, b.nbytes or name): name for name, b in blocks.items()}.values()}
