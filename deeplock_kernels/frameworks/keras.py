"""Keras 3 models, on any backend: their weights are locked by name, and the model stays as it is.

PyTorch's variables are memory, which is locked in place. Those of other backends need not be, so weights are locked as
NumPy arrays and assigned when all is done: a model of n bytes takes 2 n bytes more while that lasts. Assigning copies
bits, NaN payloads too, since nothing casts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deeplock_kernels.errors import BufferTypeError, MissingLibraryError, TensorNameError
from deeplock_kernels.header import LockHeader
from deeplock_kernels.named_lock import Key
from deeplock_kernels.sboxes import SBox
from deeplock_kernels.tensors import Selection, lock_tensors, unlock_tensors, verify_tensors

try:
    import keras
except ImportError:
    raise MissingLibraryError(
        "keras: it cannot be imported, and deeplock_kernels.frameworks.keras needs it; "
        "pip install 'deeplock-kernels[tensorflow]', or keras and one of its backends"
    ) from None
if int(keras.__version__.split(".")[0]) < 3:
    raise MissingLibraryError(f"keras: got {keras.__version__}, accepted is 3 or later; pip install --upgrade keras")

__all__ = ["lock_model", "unlock_model", "verify_model"]


def lock_model(
    model: keras.Model,
    key: Key,
    *,
    schedule: str = "counter",
    sbox: SBox | str = "aes",
    only: Selection = None,
    seal: bool = True,
    threads: int | None = None,
) -> LockHeader:
    """Lock the weights of a model: all in `model.weights`, trainable or not.

    Parameters
    ----------
    model
        A built Keras 3 model or layer. Weights are named by their paths, as "dense/kernel".
    key, schedule, sbox, seal, threads
        As for `lock_tensors`.
    only
        Which weights, by path, as for `lock_tensors`.

    Returns
    -------
    LockHeader
        Keep it beside the model, as beside its saved weights.

    Raises
    ------
    BufferTypeError
        `model` has no weights; or a weight is no plain array.
    TensorNameError
        Two weights have one path: give their layers names.
    KeyTypeError, KeyFormatError, UnknownNameError, ParameterError
        Another argument is wrong; nothing was changed.
    """

    def work(values: dict[str, Any]) -> LockHeader:
        options = {"schedule": schedule, "sbox": sbox, "only": only, "seal": seal, "threads": threads}
        return lock_tensors(values, key, **options)  # type: ignore[arg-type]

    return _changed(_weights(model), work)


def unlock_model(
    model: keras.Model,
    key: Key,
    header: LockHeader,
    *,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> None:
    """Unlock the weights of a model.

    Parameters
    ----------
    model
        One with the same paths and shapes as the one that was locked.
    key, header, check, seal, sbox, threads
        As for `unlock_tensors`.

    Raises
    ------
    WrongKeyError, TamperedHeaderError, TamperedError
        The key is another one, or header or weights are not as they were locked; nothing was changed.
    TensorNameError, SizeMismatchError
        A weight is missing or has another size.
    BufferTypeError, KeyTypeError, KeyFormatError, HeaderError, SBoxError, ParameterError
        Another argument is wrong.
    """

    def work(values: dict[str, Any]) -> LockHeader:
        unlock_tensors(values, key, header, check=check, seal=seal, sbox=sbox, threads=threads)
        return header

    _changed(_weights(model), work)


def verify_model(model: keras.Model, key: Key, header: LockHeader, *, threads: int | None = None) -> None:
    """Say whether locked weights and their header are as the lock left them.

    Raises
    ------
    WrongKeyError, TamperedHeaderError, TamperedError, NotSealedError
        As for `verify_tensors`.
    TensorNameError, SizeMismatchError, BufferTypeError, KeyTypeError, KeyFormatError, HeaderError, ParameterError
        An argument is wrong.
    """
    values = {name: _value(name, weight) for name, weight in _weights(model).items()}
    verify_tensors(values, key, header, threads=threads)


def _weights(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    weights = getattr(model, "weights", None)
    if not isinstance(weights, list) or not weights:
        raise BufferTypeError(
            f"model: got {type(model).__name__} without weights, accepted is a built Keras model; call build() first"
        )
    for weight in weights:
        path = getattr(weight, "path", None)
        if not isinstance(path, str):
            raise BufferTypeError(f"model: got a weight of type {type(weight).__name__}, accepted are Keras variables")
        if path in found:
            raise TensorNameError(f"model: got the path {path!r} twice, accepted is each once; give its layers names")
        found[path] = weight
    return found


def _value(name: str, weight: Any) -> Any:
    """Give what a weight holds: its memory on PyTorch, else an array that may be a copy."""
    if keras.backend.backend() == "torch":
        return weight.value.detach()  # as an array, bfloat16 would go through float32, which changes NaNs
    array = np.asarray(keras.ops.convert_to_numpy(weight))
    if array.dtype.name != keras.backend.standardize_dtype(weight.dtype):
        raise BufferTypeError(
            f"model: weight {name!r} is {weight.dtype} and comes as {array.dtype}, accepted are weights that keep "
            "their dtype; leave it out with only="
        )
    return array


def _changed(weights: Mapping[str, Any], work: Callable[[dict[str, Any]], LockHeader]) -> LockHeader:
    """Change weights, in place or by assigning those that the header lists: all of them, or none."""
    values = {name: _value(name, weight) for name, weight in weights.items()}
    if keras.backend.backend() == "torch":
        return work(values)
    # Some backends show their own memory, which assigning changes.
    kept = {name: np.array(value, order="C") for name, value in values.items()}
    arrays = {name: array.copy() for name, array in kept.items()}
    header = work(arrays)
    for name in header.tensors:
        if arrays[name].dtype == bool:
            raise BufferTypeError(
                f"model: weight {name!r} is of bools, of which backends keep one bit each, accepted are numbers; "
                "leave it out with only="
            )
    done: list[str] = []
    try:
        for name in header.tensors:
            done.append(name)
            weights[name].assign(arrays[name])
    except BaseException:
        for name in done:
            weights[name].assign(kept[name])
        raise
    return header
