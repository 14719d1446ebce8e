"""A small convolutional network that reads 8x8 digits, in plain NumPy.

The shapes of the weights are those of the usual frameworks (`out, in, row, column`; features in the order
`channel, row, column`), so that the weights file looks like any other model's:

    image 1x8x8 -> conv1 16x8x8 -> ReLU -> conv2 32x8x8 -> ReLU -> 2x2 maximum 32x4x4
                -> dense1 64 -> ReLU -> dense2 10

Locked weights are random bit patterns: NaN, infinities and numbers near 1e38 are what this code is made to be
fed. They flow through as IEEE 754 says, and nothing warns about them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deeplock_kernels.checkpoints.formats.safetensors_table import read_table
from deeplock_kernels.errors import ContainerError, ParameterError, TensorNameError

__all__ = [
    "HELD_OUT_FILE",
    "WEIGHTS_FILE",
    "WEIGHT_SHAPES",
    "Activations",
    "accuracy",
    "forward",
    "load_tensors",
    "propagate",
]

Array = NDArray[Any]

WEIGHTS_FILE = Path(__file__).with_name("digits.safetensors")
HELD_OUT_FILE = Path(__file__).with_name("digits_test.safetensors")

WEIGHT_SHAPES: Mapping[str, tuple[int, ...]] = {
    "conv1.weight": (16, 1, 3, 3),
    "conv1.bias": (16,),
    "conv2.weight": (32, 16, 3, 3),
    "conv2.bias": (32,),
    "dense1.weight": (64, 32 * 4 * 4),
    "dense1.bias": (64,),
    "dense2.weight": (10, 64),
    "dense2.bias": (10,),
}

_SIDE = 8
_BRIGHTEST = 16
_NUMPY_DTYPES = {"F32": "<f4", "U8": "u1"}


class Activations(NamedTuple):
    """What every layer put out for `count` images: training needs all of it, scoring only `logits`.

    `columns1` and `columns2` are the 3x3 neighbourhoods that the two convolutions saw, of shape
    (count, 8, 8, 9 * channels); `conv1`, `conv2` and `hidden` are taken after their ReLU.
    """

    columns1: Array
    conv1: Array
    columns2: Array
    conv2: Array
    pooled: Array
    features: Array
    hidden: Array
    logits: Array


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read all tensors of a safetensors file into memory.

    Parameters
    ----------
    path : str or os.PathLike
        A file whose tensors are float32 (`F32`) or uint8 (`U8`), as both files of the demo are.

    Returns
    -------
    dict of str to ndarray
        New, writable arrays in the shapes that the file states, by name.

    Raises
    ------
    ContainerError
        The file is malformed, or a tensor has another dtype.
    FileAccessError
        The file cannot be read.
    """
    table = read_table(path)
    tensors: dict[str, Array] = {}
    for name, entry in table.tensors.items():
        if entry.dtype not in _NUMPY_DTYPES:
            accepted = " and ".join(_NUMPY_DTYPES)
            raise ContainerError(f"path: got {entry.dtype} for {name!r}; {accepted} are accepted")
        dtype = np.dtype(_NUMPY_DTYPES[entry.dtype])
        count = (entry.stop - entry.start) // dtype.itemsize
        flat = np.fromfile(path, dtype=dtype, count=count, offset=table.data_start + entry.start)
        tensors[name] = flat.reshape(entry.shape)
    return tensors


def forward(weights: Mapping[str, Array], images: Array) -> Array:
    """Score each image against each digit.

    Parameters
    ----------
    weights : mapping of str to ndarray
        One floating-point array for each name and shape in `WEIGHT_SHAPES`; others are ignored. Any values
        will do, NaN and infinities included.
    images : ndarray
        Shape (count, 8, 8), any numeric dtype, brightness 0 to 16.

    Returns
    -------
    ndarray
        Logits of shape (count, 10) in the dtype of the weights; the largest of a row is the network's answer.

    Raises
    ------
    TensorNameError
        A weight is missing.
    ParameterError
        A weight or `images` has another shape.
    """
    return propagate(weights, images).logits


def accuracy(weights: Mapping[str, Array], images: Array, labels: Array) -> float:
    """Measure the share of images that the network reads correctly.

    The answer is the position of the largest logit. NaN counts as larger than any number and the first of
    several wins, as in `numpy.argmax` and `torch.argmax`. A network that puts out nothing but NaN thus always
    answers 0 and scores the share of zeros among the labels, near one in ten, as guessing does.

    Parameters
    ----------
    weights : mapping of str to ndarray
        As for `forward`.
    images : ndarray
        Shape (count, 8, 8), count at least 1, brightness 0 to 16.
    labels : ndarray
        Shape (count,), integers 0 to 9.

    Returns
    -------
    float
        Between 0.0 and 1.0.

    Raises
    ------
    TensorNameError
        A weight is missing.
    ParameterError
        An argument has another shape, or there are no images.
    """
    if len(images) == 0 or np.shape(labels) != (len(images),):
        got = f"shape {np.shape(labels)} for {len(images)} images"
        raise ParameterError(f"labels: got {got}; one label an image, and at least one, is accepted")
    answers = np.argmax(forward(weights, images), axis=1)
    return float(np.mean(answers == labels))


def propagate(weights: Mapping[str, Array], images: Array) -> Activations:
    """Run the network and keep what every layer put out.

    Parameters
    ----------
    weights : mapping of str to ndarray
        As for `forward`.
    images : ndarray
        As for `forward`.

    Returns
    -------
    Activations
        All in the dtype of the weights.

    Raises
    ------
    TensorNameError
        A weight is missing.
    ParameterError
        A weight or `images` has another shape.
    """
    _check_shapes(weights, images)
    count = len(images)
    dtype = weights["conv1.weight"].dtype
    pixels = np.asarray(images, dtype=dtype)[..., np.newaxis] / dtype.type(_BRIGHTEST)
    with np.errstate(all="ignore"):
        columns1 = _neighbourhoods(pixels)
        conv1 = _rectify(_convolve(columns1, weights["conv1.weight"], weights["conv1.bias"]))
        columns2 = _neighbourhoods(conv1)
        conv2 = _rectify(_convolve(columns2, weights["conv2.weight"], weights["conv2.bias"]))
        pooled = conv2.reshape(count, 4, 2, 4, 2, -1).max(axis=(2, 4))
        features = pooled.transpose(0, 3, 1, 2).reshape(count, -1)
        hidden = _rectify(features @ weights["dense1.weight"].T + weights["dense1.bias"])
        logits = hidden @ weights["dense2.weight"].T + weights["dense2.bias"]
    return Activations(columns1, conv1, columns2, conv2, pooled, features, hidden, logits)


def _check_shapes(weights: Mapping[str, Array], images: Array) -> None:
    for name, shape in WEIGHT_SHAPES.items():
        if name not in weights:
            raise TensorNameError(f"weights: got no {name!r}; all of {', '.join(WEIGHT_SHAPES)} are accepted")
        if weights[name].shape != shape:
            got = f"shape {weights[name].shape} for {name!r}"
            raise ParameterError(f"weights: got {got}; {shape} is accepted")
    if np.ndim(images) != 3 or np.shape(images)[1:] != (_SIDE, _SIDE):
        raise ParameterError(f"images: got shape {np.shape(images)}; (count, {_SIDE}, {_SIDE}) is accepted")


def _neighbourhoods(maps: Array) -> Array:
    """Lay the 3x3 surroundings of each pixel, zeros outside the image, side by side in the last axis."""
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, row : row + _SIDE, left : left + _SIDE] for row in range(3) for left in range(3)]
    return np.concatenate(shifted, axis=-1)


def _convolve(columns: Array, weight: Array, bias: Array) -> Array:
    matrix = weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))
    flat: Array = columns.reshape(-1, columns.shape[-1]) @ matrix + bias
    return flat.reshape(*columns.shape[:3], len(weight))


def _rectify(values: Array) -> Array:
    # numpy.maximum keeps NaN, as the ReLU of every framework does; numpy.fmax would hide it.
    result: Array = np.maximum(values, values.dtype.type(0))
    return result
