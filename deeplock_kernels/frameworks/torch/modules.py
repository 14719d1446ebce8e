"""Lock and unlock the tensors of a module, or of a state dictionary, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deeplock_kernels.errors import BufferTypeError
from deeplock_kernels.header import LockHeader
from deeplock_kernels.named_lock import Key
from deeplock_kernels.rekeying import rekey_tensors
from deeplock_kernels.sboxes import SBox
from deeplock_kernels.tensors import Selection, lock_tensors, unlock_tensors, verify_tensors


def lock_module(
    module: torch.nn.Module,
    key: Key,
    *,
    only: Selection = None,
    buffers: bool = True,
    schedule: str = "counter",
    sbox: SBox | str = "aes",
    seal: bool = True,
    threads: int | None = None,
) -> LockHeader:
    """Lock the parameters and buffers of a module in place.

    They are those of its state dictionary, by the same names: whoever loads the locked one into a module of the same
    kind can unlock it there. Tied weights are locked once. Autograd is told that they changed, so that a backward pass
    through what was computed before is refused.

    Parameters
    ----------
    module
        Its parameters and buffers have to be plain contiguous tensors on the CPU, of any dtype.
    key, only, schedule, sbox, seal, threads
        As for `lock_tensors`.
    buffers
        Whether to lock buffers as well: those that are saved with the module. Buffers that it makes anew each time
        (`persistent=False`) are never locked.

    Returns
    -------
    LockHeader
        Keep it beside the module: without its salt nothing can be unlocked.

    Raises
    ------
    BufferTypeError, BufferLayoutError, ReadOnlyError
        `module` is no module, or the tensor that the message names cannot be locked in place; nothing was changed.
    OverlapError, KeyTypeError, KeyFormatError, TensorNameError, UnknownNameError, ParameterError
        As for `lock_tensors`.
    """
    tensors = tensors_of(module, buffers=buffers)
    return lock_tensors(tensors, key, schedule=schedule, sbox=sbox, only=only, seal=seal, threads=threads)


def unlock_module(
    module: torch.nn.Module,
    key: Key,
    header: LockHeader,
    *,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> None:
    """Unlock the parameters and buffers of a module in place: those that the header lists.

    Parameters
    ----------
    module
        The one that was locked, or one of the same kind that its state dictionary was loaded into.
    key, header, check, seal, sbox, threads
        As for `unlock_tensors`.

    Raises
    ------
    WrongKeyError, TamperedHeaderError, TamperedError
        Key, header or locked bytes are others; nothing was changed.
    TensorNameError, SizeMismatchError
        The module lacks a tensor of the header, or has one of another length; nothing was changed.
    BufferTypeError, BufferLayoutError, ReadOnlyError, OverlapError
        As for `unlock_tensors`; nothing was changed.
    KeyTypeError, KeyFormatError, HeaderError, SBoxError
        Another argument is wrong.
    """
    unlock_tensors(tensors_of(module), key, header, check=check, seal=seal, sbox=sbox, threads=threads)


def verify_module(
    module: torch.nn.Module, key: Key, header: LockHeader, *, threads: int | None = None
) -> None:
    """Say whether a locked module and its header are as the lock left them; see `verify_tensors`."""
    verify_tensors(tensors_of(module), key, header, threads=threads)


def rekey_module(
    module: torch.nn.Module,
    old_key: Key,
    new_key: Key,
    header: LockHeader,
    *,
    schedule: str | None = None,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> LockHeader:
    """Move a locked module to another key in place, without unlocking it; see `rekey_tensors`."""
    return rekey_tensors(
        tensors_of(module), old_key, new_key, header, schedule=schedule, seal=seal, sbox=sbox, threads=threads
    )


def lock_state_dict(
    state_dict: Mapping[str, Any],
    key: Key,
    *,
    only: Selection = None,
    schedule: str = "counter",
    sbox: SBox | str = "aes",
    seal: bool = True,
    threads: int | None = None,
) -> LockHeader:
    """Lock the tensors of a state dictionary in place; entries that are no tensors are left alone.

    `module.state_dict()` gives the module's own memory, so the module is locked with it. Copy the tensors before, if
    the module is to go on unlocked: `{name: tensor.clone() for name, tensor in module.state_dict().items()}`.

    Parameters, return value and errors are those of `lock_tensors`.
    """
    tensors = tensors_in(state_dict)
    return lock_tensors(tensors, key, schedule=schedule, sbox=sbox, only=only, seal=seal, threads=threads)


def unlock_state_dict(
    state_dict: Mapping[str, Any],
    key: Key,
    header: LockHeader,
    *,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> None:
    """Unlock the tensors of a state dictionary in place; parameters and errors are those of `unlock_tensors`."""
    unlock_tensors(tensors_in(state_dict), key, header, check=check, seal=seal, sbox=sbox, threads=threads)


def tensors_of(module: torch.nn.Module, *, buffers: bool = True) -> dict[str, torch.Tensor]:
    """Give the parameters and saved buffers of a module, tied ones under each of their names.

    Raises
    ------
    BufferTypeError
        It is no module.
    """
    if not isinstance(module, torch.nn.Module):
        raise BufferTypeError(f"module: got {type(module).__name__}, accepted is a torch.nn.Module")
    # Not from the state dictionary, into which a module may put copies of its tensors.
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    if buffers:
        found = dict(module.named_buffers(remove_duplicate=False))
        saved = module.state_dict(keep_vars=True).keys() if found else ()
        tensors |= {name: tensor for name, tensor in found.items() if name in saved}
    return tensors


def tensors_in(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Give the entries of a state dictionary that are tensors.

    Raises
    ------
    BufferTypeError
        It is no mapping.
    """
    if not isinstance(state_dict, Mapping):
        raise BufferTypeError(
            f"state_dict: got {type(state_dict).__name__}, accepted is a mapping from names to tensors"
        )
    return {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
