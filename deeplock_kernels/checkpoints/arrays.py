"""Arrays of NumPy, PyTorch and JAX around the bytes of a safetensors file's tensors, by its names of dtypes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from deeplock_kernels.checkpoints.formats.safetensors_table import DTYPE_BITS
from deeplock_kernels.errors import (
    BufferTypeError,
    MissingLibraryError,
    ParameterError,
    UnknownNameError,
    shown,
)

Bytes = npt.NDArray[np.uint8]

_NUMPY = {
    "BOOL": "bool",
    "C64": "complex64",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
_BY_ML_DTYPES = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_NAMES = _NUMPY | _BY_ML_DTYPES  # PyTorch has the same ones


class Arrays:
    """Makes arrays of one framework.

    Elements of less than a byte (F4 and F6) have no dtype in common: such a tensor comes as its bytes, of dtype uint8.

    Parameters
    ----------
    framework
        "np", "pt" or "jax".
    device
        Where arrays go, as the framework calls it; None for its default, which for "pt" is the CPU.

    Raises
    ------
    UnknownNameError, ParameterError
        There is no such framework, or no such device.
    MissingLibraryError
        The framework is not installed.
    """

    def __init__(self, framework: str, device: Any = None) -> None:
        if not isinstance(framework, str) or framework not in _FRAMEWORKS:
            raise UnknownNameError(f"framework: got {shown(framework)}, accepted are {', '.join(_FRAMEWORKS)}")
        self._make_dtype, self._wrap = _FRAMEWORKS[framework](device)
        self._dtypes: dict[str, Any] = {}

    def dtype(self, name: str) -> Any:
        """Give the framework's dtype for one of a file.

        Raises
        ------
        BufferTypeError, MissingLibraryError
            It has none, or has it from a library that is not installed.
        """
        if name not in self._dtypes:
            self._dtypes[name] = self._make_dtype("uint8" if DTYPE_BITS[name] % 8 else _NAMES[name])
        return self._dtypes[name]

    def wrap(self, data: Bytes, name: str, shape: Sequence[int]) -> Any:
        """Give an array of a file's dtype over these bytes."""
        return self._wrap(data, self.dtype(name), data.shape if DTYPE_BITS[name] % 8 else tuple(shape))


_Wrap = Callable[[Bytes, Any, tuple[int, ...]], Any]
_Maker = tuple[Callable[[str], Any], _Wrap]


def _numpy_dtype(name: str) -> Any:
    if name not in _BY_ML_DTYPES.values():
        return np.dtype(name)
    library = _library("ml_dtypes", "ml-dtypes", f'dtype {name}: NumPy has it from ml_dtypes (or use framework="pt")')
    try:
        return np.dtype(getattr(library, name))
    except AttributeError:
        raise BufferTypeError(f"dtype {name}: this version of ml_dtypes has it not; accepted is a newer one") from None


def _numpy_view(data: Bytes, dtype: Any, shape: tuple[int, ...]) -> Any:
    return data.view(dtype).reshape(shape)


def _for_numpy(device: Any) -> _Maker:
    if device is not None and device != "cpu":
        raise ParameterError(f'device: got {shown(device)}, accepted for "np" is "cpu"; use framework "pt" or "jax"')
    return _numpy_dtype, _numpy_view


def _for_torch(device: Any) -> _Maker:
    torch = _library("torch", "torch", 'framework "pt": it needs PyTorch')
    try:
        place = torch.device("cpu" if device is None else device)
        torch.empty(0, device=place)
    except Exception as error:  # each kind of device has errors of its own
        raise ParameterError(
            f'device: got {shown(device)}, accepted is one that PyTorch can use here, as "cpu" or "cuda:0" '
            f"({type(error).__name__})"
        ) from error

    def dtype(name: str) -> Any:
        found = getattr(torch, name, None)
        if found is None:
            raise BufferTypeError(f'dtype {name}: this version of PyTorch has it not; accepted is a newer one, or "np"')
        return found

    def wrap(data: Bytes, dtype: Any, shape: tuple[int, ...]) -> Any:
        if not data.size:  # which has no strides to view it with
            return torch.empty(shape, dtype=dtype, device=place)
        return torch.from_numpy(data).view(dtype).reshape(shape).to(place)

    return dtype, wrap


def _for_jax(device: Any) -> _Maker:
    jax = _library("jax", "jax", 'framework "jax": it needs JAX')
    try:
        place = jax.devices(device)[0] if isinstance(device, str) else device
    except RuntimeError as error:
        raise ParameterError(
            f'device: got {shown(device)}, accepted is a jax.Device or a platform such as "cpu" or "gpu"'
        ) from error

    def dtype(name: str) -> Any:
        found = _numpy_dtype(name)
        if jax.dtypes.canonicalize_dtype(found) != found:
            raise BufferTypeError(
                f"dtype {name}: JAX would round it to 32 bits; accepted it is where "
                'jax.config.update("jax_enable_x64", True) was called, and with "np"'
            )
        return found

    return dtype, lambda data, dtype, shape: jax.device_put(_numpy_view(data, dtype, shape), place)


_FRAMEWORKS: dict[str, Callable[[Any], _Maker]] = {"np": _for_numpy, "pt": _for_torch, "jax": _for_jax}


def _library(module: str, extra: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingLibraryError(f"{what}; pip install 'deeplock-kernels[{extra}]'") from error
