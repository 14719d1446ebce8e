"""The only place that turns arrays, tensors and other memory into addresses, and the only overlap check.

Accepted is whatever is one contiguous block of memory in C order: NumPy arrays of any dtype without Python
objects (those of ml_dtypes too), what has Python's buffer protocol (bytearray, memoryview, mmap, array.array,
bytes for reading), and PyTorch tensors on the CPU.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from deeplock_kernels.errors import (
    BufferLayoutError,
    BufferTypeError,
    OverlapError,
    ReadOnlyError,
    SizeMismatchError,
)


class Memory(NamedTuple):
    """A block of memory.

    Attributes
    ----------
    address
        Of its first byte.
    nbytes
        Its length.
    owner
        The object that keeps it alive; its memory stays where it is as long as this object lives.
    """

    address: int
    nbytes: int
    owner: Any

    @property
    def stop(self) -> int:
        """The address behind its last byte."""
        return self.address + self.nbytes


_from_buffer, _addressof = ctypes.c_char.from_buffer, ctypes.addressof
_FIELD_NAMES = re.compile(":[^:]*:")  # in the format of a record
_CONTIGUOUS = "accepted is one contiguous block in C order; make it so first, as with numpy.ascontiguousarray"


def memory(data: object, argument: str = "data", *, writable: bool = False) -> Memory:
    """Give the memory of an array, tensor or buffer.

    Parameters
    ----------
    data
        Any of what the module lists.
    argument
        The name of the caller's argument, for messages.
    writable
        Whether it will be written.

    Raises
    ------
    BufferTypeError
        It is no memory, holds Python objects, or lies on another device.
    BufferLayoutError
        It is not one contiguous block in C order.
    ReadOnlyError
        It is read-only and `writable` is asked for.
    """
    if isinstance(data, np.ndarray):
        return _array_memory(data, argument, writable)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(data, torch.Tensor):
        return _tensor_memory(data, argument, writable)
    try:
        view = memoryview(data)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        hint = "; encode text to bytes first" if isinstance(data, str) else ""
        raise BufferTypeError(
            f"{argument}: got {type(data).__name__}, accepted are arrays, CPU tensors and buffers{hint}"
        ) from None
    if "O" in _FIELD_NAMES.sub("", view.format):
        raise BufferTypeError(f"{argument}: got a buffer of Python objects, accepted are plain numbers")
    if not view.c_contiguous:
        raise BufferLayoutError(f"{argument}: got a buffer with gaps or another order, {_CONTIGUOUS}")
    if writable and view.readonly:
        raise _read_only(argument, type(data).__name__)
    if view.nbytes == 0:
        return Memory(0, 0, view)
    flat = np.frombuffer(view, np.uint8)
    return Memory(flat.ctypes.data, flat.nbytes, flat)


def named_memory(tensors: Mapping[str, Any], names: Iterable[str], *, writable: bool = True) -> dict[str, Memory]:
    """Give the memory of named tensors, to be written or only read.

    Raises
    ------
    BufferTypeError, BufferLayoutError, ReadOnlyError
        As for `memory`; the message names the tensor.
    """
    blocks = {}
    for name in names:
        data = tensors[name]
        address = writable_address(data) if isinstance(data, np.ndarray) else 0
        blocks[name] = (
            Memory(address, data.nbytes, data) if address else memory(data, f"tensors[{name!r}]", writable=writable)
        )
    return blocks


def writable_address(data: Any) -> int:
    """Give the address of an array or tensor that may be written, or 0 where it takes longer to find out.

    This is three times as fast as asking the array, which matters for many small ones.
    """
    try:
        if isinstance(data, np.ndarray):
            return 0 if data.dtype.hasobject else _addressof(_from_buffer(data))  # type: ignore[arg-type]
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(data, torch.Tensor):
            return _tensor_memory(data, "data", True).address
    except (TypeError, ValueError, BufferError):
        pass  # empty, read-only, with gaps, or of a dtype that is no buffer
    return 0


def _read_only(argument: str, kind: str) -> ReadOnlyError:
    return ReadOnlyError(
        f"{argument}: got a read-only {kind}, accepted is writable memory; pass a writable `out`, or leave `out` away"
    )


def _array_memory(array: Any, argument: str, writable: bool) -> Memory:
    address = writable_address(array)
    if address:
        return Memory(address, array.nbytes, array)
    if array.dtype.hasobject:
        raise BufferTypeError(
            f"{argument}: got an array of dtype {array.dtype}, accepted are dtypes without Python objects"
        )
    if not array.flags.c_contiguous:
        raise BufferLayoutError(f"{argument}: got an array with strides {array.strides}, {_CONTIGUOUS}")
    if writable and not array.flags.writeable:
        raise _read_only(argument, "array")
    return Memory(array.__array_interface__["data"][0], array.nbytes, array)


def _tensor_memory(tensor: Any, argument: str, writable: bool) -> Memory:
    torch = sys.modules["torch"]
    if torch.nn.parameter.is_lazy(tensor):
        raise BufferTypeError(f"{argument}: got a parameter without a shape; run its module once, so that it gets one")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise BufferTypeError(
            f"{argument}: got a {type(tensor).__name__}, which may have no memory of its own, accepted are plain "
            "tensors; take what it is made of, as with .to_local()"
        )
    if not tensor.is_cpu:
        raise BufferTypeError(
            f"{argument}: got a tensor on device {tensor.device}, accepted are CPU tensors; call .cpu()"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise BufferTypeError(
            f"{argument}: got a tensor with a layout of its own, accepted are plain strided tensors; "
            "call .to_dense(), .int_repr(), .resolve_conj() or .resolve_neg()"
        )
    if not tensor.is_contiguous():
        raise BufferLayoutError(
            f"{argument}: got a tensor with strides {tensor.stride()}, accepted is one contiguous block in C order; "
            "call .contiguous()"
        )
    if writable and (tensor.is_inference() and not torch.is_inference_mode_enabled()):
        raise _read_only(argument, "inference tensor")
    try:
        return Memory(tensor.data_ptr(), tensor.nbytes, tensor)
    except RuntimeError:
        raise BufferTypeError(
            f"{argument}: got a tensor inside a transformation (vmap, grad), which has no memory; "
            "lock and unlock outside of it"
        ) from None


def extent(data: object, argument: str = "data") -> Memory:
    """Give the range of memory from the first to the last byte of an array, tensor or buffer, gaps included.

    Raises
    ------
    BufferTypeError
        It is no memory, holds Python objects, or lies on another device.
    """
    try:
        return memory(data, argument)
    except BufferLayoutError:
        pass
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(data, torch.Tensor):
        storage = data.untyped_storage()
        return Memory(storage.data_ptr(), storage.nbytes(), data)
    array = np.asarray(data if isinstance(data, np.ndarray) else memoryview(data))  # type: ignore[arg-type]
    first = array.__array_interface__["data"][0]
    reaches = [(count - 1) * stride for count, stride in zip(array.shape, array.strides, strict=True)]
    low, high = sum(min(reach, 0) for reach in reaches), sum(max(reach, 0) for reach in reaches)
    return Memory(first + low, high - low + array.itemsize if array.size else 0, array)


def note_written(*written: object) -> None:
    """Tell autograd that the memory of tensors was changed, so that it refuses stale values."""
    torch = sys.modules.get("torch")
    if torch is not None:
        for data in written:
            if isinstance(data, torch.Tensor) and not data.is_inference():
                torch.autograd.graph.increment_version(data)


def new_like(data: object) -> Any:
    """Make memory of the same shape and dtype: a tensor for a tensor, else a NumPy array."""
    if isinstance(data, np.ndarray):
        return np.empty_like(data, order="C", subok=False)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(data, torch.Tensor):
        return torch.empty_like(data.detach(), memory_format=torch.contiguous_format)
    view = memoryview(data)  # type: ignore[arg-type]
    try:
        dtype = np.dtype(view.format)
    except TypeError:
        return np.empty(view.nbytes, np.uint8)
    return np.empty(view.shape if dtype.itemsize == view.itemsize else view.nbytes, dtype)


def output_memory(out: object, source: Memory) -> Memory:
    """Give the memory of `out`, checked against the source.

    Raises
    ------
    SizeMismatchError
        They differ in length.
    OverlapError
        They share some bytes but are not the same range.
    """
    target = memory(out, "out", writable=True)
    if target.nbytes != source.nbytes:
        raise SizeMismatchError(
            f"out: got {target.nbytes} bytes, accepted are the {source.nbytes} bytes of data"
        )
    check_overlap(target, source, "out", "data")
    return target


def check_overlap(a: Memory, b: Memory, first: str, second: str) -> None:
    """Accept the same range or separate ranges.

    Raises
    ------
    OverlapError
        The two share some bytes but are not the same range.
    """
    same = a.address == b.address and a.nbytes == b.nbytes
    if not same and a.address < b.stop and b.address < a.stop:
        raise OverlapError(
            f"{first}: got memory that overlaps {second} in part; accepted are the same range or separate ranges"
        )


def wipe(block: Memory) -> None:
    """Fill a block with zeros."""
    ctypes.memset(block.address, 0, block.nbytes)
