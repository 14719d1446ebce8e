"""The operators `deeplock::lock`, `unlock`, `lock_` and `unlock_`, which compiled and exported graphs can hold.

`torch.ops.deeplock.lock(data, key, iv, sbox="aes", offset=0)` gives a new tensor, and `lock_` changes `data` in place;
`unlock` and `unlock_` undo that. `data` is a tensor on the CPU, `key` one of 16, 24 or 32 uint8 and `iv` one of 16, as
for `CounterSchedule`; `offset` counts bytes. Key and iv are operands: hand them to a compiled function as arguments, or
they become constants of its graph.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from deeplock_kernels import locking
from deeplock_kernels.buffers import memory
from deeplock_kernels.errors import KeyTypeError
from deeplock_kernels.keys import Hidden
from deeplock_kernels.schedules import CounterSchedule

# `torch.library.custom_op` would do all of this, at ten times the cost of a call.
_OPERANDS = "Tensor key, Tensor iv, str sbox='aes', SymInt offset=0"
_NEW, _IN_PLACE = f"(Tensor data, {_OPERANDS}) -> Tensor", f"(Tensor(a!) data, {_OPERANDS}) -> ()"


def _schedule(key: Tensor, iv: Tensor) -> CounterSchedule:
    for argument, tensor in (("key", key), ("iv", iv)):
        if tensor.dtype is not torch.uint8 or tensor.dim() != 1:
            raise KeyTypeError(
                f"{argument}: got a tensor of {tensor.dtype} with {tensor.dim()} axes, "
                "accepted are bytes: torch.uint8 with one axis"
            )
        memory(tensor, argument)
    return CounterSchedule(Hidden(key.numpy().tobytes()), Hidden(iv.numpy().tobytes()))


def lock(data: Tensor, key: Tensor, iv: Tensor, sbox: str = "aes", offset: int = 0) -> Tensor:
    """Give the locked bytes of `data` as a new tensor of its shape and dtype; see `deeplock_kernels.lock`."""
    with _schedule(key, iv) as schedule:
        locked: Tensor = locking.lock(data.contiguous(), schedule, sbox=sbox, offset=offset)
        return locked


def unlock(data: Tensor, key: Tensor, iv: Tensor, sbox: str = "aes", offset: int = 0) -> Tensor:
    """Give the unlocked bytes of `data` as a new tensor of its shape and dtype; see `deeplock_kernels.unlock`."""
    with _schedule(key, iv) as schedule:
        unlocked: Tensor = locking.unlock(data.contiguous(), schedule, sbox=sbox, offset=offset)
        return unlocked


def lock_(data: Tensor, key: Tensor, iv: Tensor, sbox: str = "aes", offset: int = 0) -> None:
    """Lock `data` in place; see `deeplock_kernels.lock`."""
    with _schedule(key, iv) as schedule:
        locking.lock(data, schedule, sbox=sbox, offset=offset, out=data)


def unlock_(data: Tensor, key: Tensor, iv: Tensor, sbox: str = "aes", offset: int = 0) -> None:
    """Unlock `data` in place; see `deeplock_kernels.unlock`."""
    with _schedule(key, iv) as schedule:
        locking.unlock(data, schedule, sbox=sbox, offset=offset, out=data)


def _new_tensor(data: Tensor, key: Tensor, iv: Tensor, sbox: str = "aes", offset: int = 0) -> Tensor:
    return torch.empty_like(data, memory_format=torch.contiguous_format)


def _nothing_new(data: Tensor, key: Tensor, iv: Tensor, sbox: str = "aes", offset: int = 0) -> None:
    return None


def _no_gradient(context: Any, gradient: Tensor) -> NoReturn:
    raise NotImplementedError("deeplock: locked bytes have no gradient; lock and unlock under torch.no_grad()")


for _function, _schema, _fake in (
    (lock, _NEW, _new_tensor),
    (unlock, _NEW, _new_tensor),
    (lock_, _IN_PLACE, _nothing_new),
    (unlock_, _IN_PLACE, _nothing_new),
):
    _name = f"deeplock::{_function.__name__}"
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(_name, "cpu", _function)
    torch.library.register_fake(_name, _fake)
    if _schema is _NEW:
        torch.library.register_autograd(_name, _no_gradient)
