"""Inference on a locked module: each layer is unlocked when it runs, and the module never as a whole."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from deeplock_kernels import buffers
from deeplock_kernels.errors import (
    BufferTypeError,
    HeaderError,
    KeyWipedError,
    ParameterError,
    SizeMismatchError,
    TensorNameError,
    shown,
)
from deeplock_kernels.frameworks.torch.modules import tensors_of
from deeplock_kernels.frameworks.torch.scratch import Layer, Locked
from deeplock_kernels.frameworks.torch.unlocking import Unlocking, Watch, tensors_within
from deeplock_kernels.header import LockHeader
from deeplock_kernels.named_lock import Key, NamedLock
from deeplock_kernels.runtime.pool import available_threads, resolve_threads
from deeplock_kernels.sboxes import SBox

# They read the weights of the modules within them without calling those.
_WHOLE: tuple[type[torch.nn.Module], ...] = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer)


class KeyedModule:
    """A locked module that computes when it is given the key: the paper's online phase.

    `keyed(x, key=key)` is `module(x)` of the unlocked module. The weights of a layer are unlocked into scratch memory
    when the layer runs, compared with their seals, and overwritten by those of another layer; the call's end wipes what
    is left. The module itself stays locked all the while.

    A layer is a module that has parameters or buffers of its own; `torch.nn.MultiheadAttention` and
    `torch.nn.TransformerEncoderLayer` are one layer each with all that is in them. Small ones are unlocked together.
    Plain at a time is hardly more than the largest layer, twice that where the next one is unlocked ahead, and what
    modules around the layers own themselves, such as a class token.

    Calls from several threads run one after the other. What the layers themselves make of their weights (as a weight
    in another layout) is PyTorch's memory, and is not wiped.

    Parameters
    ----------
    module
        A locked module in evaluation mode; its structure is copied, its tensors are not. It has to stay locked.
    header
        What `lock_module` returned.
    prefetch
        Whether to unlock the next layer beside the one that runs, on the processors that PyTorch's threads leave; None
        does where they leave any (see `torch.set_num_threads`). The first call learns the order.
    wrong_key
        "raise" refuses another key, and whatever was altered; "compute" computes nonsense with it, as in the paper.
    seal
        Whether to compare the seal of each layer's tensors, each time it is unlocked.
    layers
        More classes of modules to take as one layer with all that is in them.
    sbox
        The S-Box, where it is one of your own.
    threads
        How many threads at most unlock.

    Attributes
    ----------
    module
        The locked module.
    peak_bytes
        The greatest number of plain bytes that were in scratch memory at a time in the last call.

    Raises
    ------
    BufferTypeError, BufferLayoutError
        `module` is no module, was compiled, or cannot be copied; or a tensor is not plain CPU memory.
    TensorNameError, SizeMismatchError
        The module lacks a tensor of the header, or has one of another length.
    HeaderError, ParameterError
        Another argument is wrong, or the module is in training mode.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        header: LockHeader,
        *,
        prefetch: bool | None = None,
        wrong_key: str = "raise",
        seal: bool = True,
        layers: Iterable[type[torch.nn.Module]] = (),
        sbox: SBox | None = None,
        threads: int | None = None,
    ) -> None:
        if wrong_key not in ("raise", "compute"):
            raise ParameterError(f"wrong_key: got {shown(wrong_key)}, accepted are 'raise' and 'compute'")
        whole = (*layers,)
        if not all(isinstance(kind, type) and issubclass(kind, torch.nn.Module) for kind in whole):
            raise ParameterError("layers: accepted are classes of modules")
        resolve_threads(threads)
        locked = _locked(module, header)
        self.module, self.peak_bytes = module, 0
        self._header, self._sbox, self._threads = header, sbox, threads
        self._check, self._seal, self._prefetch = wrong_key == "raise", seal and wrong_key == "raise", prefetch
        self._settings: dict[str, Any] = {
            "prefetch": prefetch,
            "wrong_key": wrong_key,
            "seal": seal,
            "layers": whole,
            "sbox": sbox,
            "threads": threads,
        }
        self._twin = _twin(module, locked)
        stand_ins = {id(one.stand_in): one for one in locked}
        found = list(_layers_of(self._twin, stand_ins, (*_WHOLE, *whole)))
        self._unlocking = Unlocking([layer for _, layer in found])
        for part, layer in found:
            part.forward = self._running(layer, part.forward)
        self._watched: Sequence[Locked] = locked
        self._mutex, self._process = threading.Lock(), os.getpid()

    def __call__(self, *inputs: Any, key: Key, **keywords: Any) -> Any:
        """Compute with the key.

        Parameters
        ----------
        inputs, keywords
            What the module takes.
        key
            The master key that locked it.

        Returns
        -------
        What the module gives.

        Raises
        ------
        WrongKeyError
            The key is another one; nothing was computed.
        TamperedHeaderError, TamperedError
            The header, or the tensor that the message names, is not as it was locked.
        ParameterError
            Gradients are asked for.
        LayerError
            A locked tensor is used while its layer does not run.
        KeyTypeError, KeyFormatError, KeyWipedError, SBoxError
            Another argument is wrong.
        """
        with self.session(key) as compute:
            return compute(*inputs, **keywords)

    @contextmanager
    def session(self, key: Key) -> Iterator[Callable[..., Any]]:
        """Derive the keys of all tensors once, for many calls; they are wiped at the end.

        `with keyed.session(key) as compute:` gives a function that is `keyed` with that key.
        """
        with NamedLock.from_header(key, self._header, check=self._check, sbox=self._sbox) as lock:
            locks = [lock]

            def compute(*inputs: Any, **keywords: Any) -> Any:
                if not locks:
                    raise KeyWipedError("key: the session is over, and its keys are wiped; open another one")
                return self._compute(lock, inputs, keywords)

            try:
                yield compute
            finally:
                locks.clear()

    def _compute(self, lock: NamedLock, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors_within((inputs, keywords))):
            raise ParameterError(
                "inputs: got a tensor that requires grad, accepted is inference alone; call it under torch.no_grad()"
            )
        if os.getpid() != self._process:  # in a fork's child, where another thread may have held it
            self._mutex, self._process = threading.Lock(), os.getpid()
            self._unlocking.forget()
        threads = resolve_threads(self._threads)
        with self._mutex, torch.no_grad():
            with self._unlocking.call(lock, threads, ahead=self._threads_ahead(threads), seal=self._seal):
                with Watch(self._watched) if self._watched else nullcontext():
                    result = self._twin(*inputs, **keywords)
                self._watched = ()
            self.peak_bytes = self._unlocking.peak_bytes
            return result

    def _threads_ahead(self, threads: int) -> int:
        """Say how many threads unlock ahead; more than PyTorch leaves would take from it what they give."""
        spare = available_threads() - torch.get_num_threads()
        if spare <= 0 and self._prefetch:
            spare = 1
        return 0 if self._prefetch is False else max(min(spare, threads), 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._settings), (self.module, self._header)

    def _running(self, layer: Layer, forward: Callable[..., Any]) -> Callable[..., Any]:
        unlocking = self._unlocking

        @wraps(forward)
        def run(*inputs: Any, **keywords: Any) -> Any:
            held, before = unlocking.open(layer)
            try:
                return unlocking.kept(forward(*inputs, **keywords))
            finally:
                unlocking.close(layer, held, before)

        return run


def _locked(module: torch.nn.Module, header: LockHeader) -> list[Locked]:
    """Give the tensors of a module that a header lists, each with an empty one to stand in for it."""
    tensors = tensors_of(module)
    if not isinstance(header, LockHeader):
        raise HeaderError(f"header: got {type(header).__name__}, accepted is a LockHeader; see LockHeader.from_json")
    training = [name for name, part in module.named_modules() if part.training]
    if training:
        raise ParameterError(
            f"module: {training[0] or 'it'} is in training mode, accepted is inference alone; call .eval() first"
        )
    compiled = [name for name, part in module.named_modules() if hasattr(part, "_orig_mod")]
    if compiled or isinstance(module, torch.jit.ScriptModule):
        raise BufferTypeError("module: got a compiled one, accepted is the module that it was compiled from")
    missing = [name for name in header.tensors if name not in tensors]
    if missing:
        raise TensorNameError(f"module: it has no tensor {missing[0]!r}; the header lists {len(missing)} such in all")
    found, stand_ins = [], dict[int, Tensor]()
    for name, source in buffers.named_memory(tensors, header.tensors, writable=False).items():
        tensor, nbytes = tensors[name], header.tensors[name].nbytes
        if source.nbytes != nbytes:
            raise SizeMismatchError(
                f"tensors[{name!r}]: got {source.nbytes} bytes, accepted are the header's {nbytes}"
            )
        if nbytes and id(tensor) not in stand_ins:
            nothing = stand_in = torch.empty(0, dtype=tensor.dtype)
            if isinstance(tensor, torch.nn.Parameter):
                stand_in = torch.nn.Parameter(nothing, requires_grad=False)
            stand_ins[id(tensor)] = stand_in
            like = tensor.detach()  # holds the memory, whatever becomes of the module's tensor
            found.append(Locked(name, source._replace(owner=like), like, stand_in, nothing))
    return found


def _twin(module: torch.nn.Module, locked: Sequence[Locked]) -> torch.nn.Module:
    """Copy a module, sharing all its tensors but those that are locked."""
    names = {one.name: one.stand_in for one in locked}
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors.values()}
    memo |= {id(tensors[name]): stand_in for name, stand_in in names.items()}
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:
        raise BufferTypeError(
            "module: it cannot be copied, and keyed inference works on a copy of its structure; "
            f"copy.deepcopy says {type(error).__name__}: {error}"
        ) from error


def _layers_of(
    module: torch.nn.Module, locked: dict[int, Locked], whole: tuple[type[torch.nn.Module], ...]
) -> Iterable[tuple[torch.nn.Module, Layer]]:
    """Yield the modules that have locked tensors, with them."""
    seen: set[torch.nn.Module] = set()
    waiting = [module]
    while waiting:
        part = waiting.pop()
        if part in seen:
            continue
        seen.add(part)
        own = [part]
        if isinstance(part, whole):
            own = list(part.modules())
        else:
            for child in part.children():  # what has no forward is a list of parameters
                (waiting if _has_forward(child) or list(child.children()) else own).append(child)
        seen.update(own)
        tensors = {
            id(tensor): locked[id(tensor)]
            for owner in own
            for tensor in (*owner.parameters(recurse=False), *owner.buffers(recurse=False))
            if id(tensor) in locked
        }
        if tensors:
            yield part, Layer([*tensors.values()])


def _has_forward(module: torch.nn.Module) -> bool:
    return type(module).forward is not torch.nn.Module.forward
