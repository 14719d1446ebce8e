"""TensorFlow: variables, and tensors inside and outside of `tf.function`.

In a graph the work is a call back into Python (`tf.numpy_function`): a graph with it can be neither saved nor compiled
by XLA, and runs where its Python does. The key and the counter's start are operands, so no graph holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from deeplock_kernels import locking
from deeplock_kernels.errors import BufferTypeError, MissingLibraryError, TensorNameError
from deeplock_kernels.header import LockHeader
from deeplock_kernels.locking import find_sbox
from deeplock_kernels.named_lock import Key
from deeplock_kernels.sboxes import AES, SBox
from deeplock_kernels.schedules import CounterSchedule
from deeplock_kernels.schedules.base import check_range
from deeplock_kernels.tensors import Selection, lock_tensors, unlock_tensors

try:
    import tensorflow as tf
except ImportError:
    raise MissingLibraryError(
        "tensorflow: it cannot be imported, and deeplock_kernels.frameworks.tensorflow needs it; "
        "pip install 'deeplock-kernels[tensorflow]'"
    ) from None

__all__ = ["lock", "lock_variables", "unlock", "unlock_variables"]


def lock(tensor: Any, key: Any, iv: Any, *, sbox: SBox | str = AES, offset: int = 0) -> Any:
    """Lock a tensor with the counter schedule: as `deeplock_kernels.lock`, eagerly or in a `tf.function`.

    Parameters
    ----------
    tensor
        A dense tensor of numbers, of any shape. Not bools, of which TensorFlow keeps one bit, nor dtypes below a byte.
    key
        16, 24 or 32 bytes as a tensor or array of uint8. One (key, iv) is for one content only.
    iv
        The counter's start, 16 bytes likewise.
    sbox
        The S-Box or its name.
    offset
        The position in the key stream of the first byte.

    Returns
    -------
    tf.Tensor
        Of the same shape and dtype. It has no gradient: asking for one is an error.

    Raises
    ------
    BufferTypeError
        `tensor` is no dense tensor of numbers.
    KeyTypeError, KeyFormatError, UnknownNameError, SBoxError, ParameterError
        Another argument is wrong. What a graph sees only when it runs comes as TensorFlow's own errors.
    """
    return _transformed("lock", tensor, key, iv, sbox, offset)


def unlock(tensor: Any, key: Any, iv: Any, *, sbox: SBox | str = AES, offset: int = 0) -> Any:
    """Unlock what `lock` locked; parameters, result and errors are as there."""
    return _transformed("unlock", tensor, key, iv, sbox, offset)


def lock_variables(
    variables: Mapping[str, tf.Variable] | Iterable[tf.Variable],
    key: Key,
    *,
    schedule: str = "counter",
    sbox: SBox | str = "aes",
    only: Selection = None,
    seal: bool = True,
    threads: int | None = None,
) -> LockHeader:
    """Lock variables.

    Parameters
    ----------
    variables
        By name, or one or several whose own names differ, as `tf.Module.variables`. For Keras models take
        `deeplock_kernels.frameworks.keras`.
    key, schedule, sbox, only, seal, threads
        As for `lock_tensors`.

    Returns
    -------
    LockHeader
        Keep it beside the variables.

    Raises
    ------
    BufferTypeError, TensorNameError
        Something is no variable, or two have one name; nothing was changed.
    KeyTypeError, KeyFormatError, UnknownNameError, ParameterError
        Another argument is wrong; nothing was changed.
    """
    named = _named(variables)
    arrays = _copies(named)
    options = {"schedule": schedule, "sbox": sbox, "only": only, "seal": seal, "threads": threads}
    header = lock_tensors(arrays, key, **options)  # type: ignore[arg-type]
    _assign(named, arrays, header)
    return header


def unlock_variables(
    variables: Mapping[str, tf.Variable] | Iterable[tf.Variable],
    key: Key,
    header: LockHeader,
    *,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> None:
    """Unlock variables.

    Parameters
    ----------
    variables
        As for `lock_variables`.
    key, header, check, seal, sbox, threads
        As for `unlock_tensors`.

    Raises
    ------
    WrongKeyError, TamperedHeaderError, TamperedError
        The key is another one, or header or variables are not as they were locked; nothing was changed.
    BufferTypeError, TensorNameError, SizeMismatchError, KeyTypeError, KeyFormatError, HeaderError, ParameterError
        An argument is wrong; nothing was changed.
    """
    named = _named(variables)
    arrays = _copies(named)
    unlock_tensors(arrays, key, header, check=check, seal=seal, sbox=sbox, threads=threads)
    _assign(named, arrays, header)


def _transformed(direction: str, tensor: Any, key: Any, iv: Any, sbox: SBox | str, offset: int) -> Any:
    box, offset = find_sbox(sbox), check_range(offset, 0)
    if isinstance(tensor, (tf.SparseTensor, tf.RaggedTensor)):
        raise BufferTypeError(f"tensor: got {type(tensor).__name__}, accepted are dense tensors; take its values")
    tensor = tf.convert_to_tensor(tensor)
    dtype = tensor.dtype
    if not (dtype.is_floating or dtype.is_complex or dtype.is_integer) or dtype.name.endswith("int4"):
        raise BufferTypeError(f"tensor: got dtype {dtype.name}, accepted are numbers of whole bytes; cast it first")
    function = getattr(locking, direction)

    def run(array: Any, key: Any, iv: Any) -> Any:
        schedule = CounterSchedule(key.tobytes(), iv.tobytes())
        try:
            return function(np.asarray(array, order="C"), schedule, sbox=box, offset=offset)
        finally:
            schedule.wipe()

    @tf.custom_gradient
    def apply(tensor: Any, key: Any, iv: Any) -> Any:
        if tf.executing_eagerly():
            result = tf.convert_to_tensor(run(tensor.numpy(), key.numpy(), iv.numpy()), dtype)
        else:
            result = tf.numpy_function(run, (tensor, key, iv), dtype, stateful=False)
            result.set_shape(tensor.shape)

        def gradient(*_: Any) -> Any:
            raise TypeError(f"tensor: {direction}ing has no gradient; take tf.stop_gradient of its result")

        return result, gradient

    return apply(tensor, tf.convert_to_tensor(key, tf.uint8), tf.convert_to_tensor(iv, tf.uint8))


def _named(variables: Any) -> dict[str, Any]:
    if isinstance(variables, tf.Variable) or not isinstance(variables, Iterable):
        variables = [variables]
    if isinstance(variables, Mapping):
        pairs = list(variables.items())
    else:
        pairs = [(getattr(variable, "name", None), variable) for variable in variables]
    named: dict[str, Any] = {}
    for name, variable in pairs:
        if not isinstance(variable, tf.Variable):
            raise BufferTypeError(f"variables: got {type(variable).__name__}, accepted are tf.Variable")
        if name in named:
            raise TensorNameError(f"variables: got the name {name!r} twice; give a mapping with names of your own")
        named[name] = variable
    return named


def _copies(named: Mapping[str, Any]) -> dict[str, Any]:
    # One variable under two names is one storage, also as a copy.
    copies = {id(variable): np.array(variable.numpy(), order="C") for variable in named.values()}
    return {name: copies[id(variable)] for name, variable in named.items()}


def _assign(named: Mapping[str, Any], arrays: Mapping[str, Any], header: LockHeader) -> None:
    """Assign arrays to the variables that a header lists: all of them, or none."""
    for name in header.tensors:
        if arrays[name].dtype == bool:
            raise BufferTypeError(
                f"variables[{name!r}]: got bools, of which TensorFlow keeps one bit each, accepted are numbers; "
                "leave it out with only="
            )
    kept = {name: np.array(named[name].numpy()) for name in header.tensors}
    done: list[str] = []
    try:
        for name in header.tensors:
            done.append(name)
            named[name].assign(arrays[name])
    except BaseException:
        for name in done:
            named[name].assign(kept[name])
        raise
