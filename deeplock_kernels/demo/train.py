"""Train the demo's network and write its two data files: `python -m deeplock_kernels.demo.train`.

Needs scikit-learn, which carries the images, and safetensors; nothing else in the package does. Adam with
decoupled weight decay, a cosine learning rate, and images warped anew each time. The settings were chosen by
five-fold cross-validation among the training images; the last epoch is kept, whatever it scores.

The random numbers are seeded, so one machine gives the same files each time. Another matrix library adds in
another order: expect the last bits, then the weights, then an image or two of the score to differ.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeplock_kernels.demo.network import (
    HELD_OUT_FILE,
    WEIGHT_SHAPES,
    WEIGHTS_FILE,
    Activations,
    accuracy,
    propagate,
)

__all__ = ["Adam", "gradients", "initial_weights", "loss", "main", "split", "train", "warped"]

Array = NDArray[Any]
Weights = dict[str, Array]

SEED = 2008_05966
EPOCHS = 60
BATCH_LEN = 32
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 1e-1
WARP = 0.15
MOVE_PIXELS = 0.5

_SOURCE = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak (1998), "
    "UCI Machine Learning Repository, doi 10.24432/C50P49, CC BY 4.0, as shipped with scikit-learn"
)


def split(labels: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Choose which images to train on and which to hold out: of each digit, the third of every five.

    Neither chance nor a library's version has a say, so anyone can make the same split again.

    Parameters
    ----------
    labels : ndarray
        Shape (count,), integers.

    Returns
    -------
    training, held_out : ndarray of intp
        Positions in ascending order. Each position is in exactly one of the two.
    """
    rank_within_class = np.zeros(len(labels), dtype=np.intp)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank_within_class[members] = np.arange(len(members))
    is_held_out = rank_within_class % 5 == 2
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def initial_weights(random: np.random.Generator) -> Weights:
    """Draw starting weights: normal with variance 2 / inputs (He et al., arXiv 1502.01852), biases zero.

    Parameters
    ----------
    random : numpy.random.Generator
        Where the numbers come from.

    Returns
    -------
    dict of str to ndarray
        float32 arrays, named and shaped as in `WEIGHT_SHAPES`.
    """
    weights: Weights = {}
    for name, shape in WEIGHT_SHAPES.items():
        deviation = math.sqrt(2 / math.prod(shape[1:])) if name.endswith(".weight") else 0.0
        weights[name] = (deviation * random.standard_normal(shape)).astype(np.float32)
    return weights


def loss(logits: Array, labels: Array) -> float:
    """Measure the mean cross-entropy between the softmax of the logits and the labels.

    Parameters
    ----------
    logits : ndarray
        Shape (count, 10), floating point.
    labels : ndarray
        Shape (count,), integers 0 to 9.

    Returns
    -------
    float
        In nats; 0 is perfect, log(10) is guessing.
    """
    chosen = _log_softmax(logits)[np.arange(len(labels)), labels]
    return float(-chosen.mean())


def gradients(weights: Weights, activations: Activations, labels: Array) -> Weights:
    """Differentiate `loss` by every weight.

    Parameters
    ----------
    weights : dict of str to ndarray
        Those that `activations` were computed with.
    activations : Activations
        From `propagate`, for `count` images.
    labels : ndarray
        Shape (count,), integers 0 to 9.

    Returns
    -------
    dict of str to ndarray
        Same names, shapes and dtype as `weights`.
    """
    count = len(labels)
    by_logits = np.exp(_log_softmax(activations.logits))
    by_logits[np.arange(count), labels] -= 1
    by_logits /= count

    by_hidden = (by_logits @ weights["dense2.weight"]) * (activations.hidden > 0)
    by_features = by_hidden @ weights["dense1.weight"]
    by_pooled = by_features.reshape(count, -1, 4, 4).transpose(0, 2, 3, 1)
    by_conv2 = _unpool(by_pooled, activations) * (activations.conv2 > 0)
    by_conv1 = _gather(by_conv2, weights["conv2.weight"]) * (activations.conv1 > 0)

    return {
        "conv1.weight": _by_kernel(activations.columns1, by_conv1),
        "conv1.bias": by_conv1.sum(axis=(0, 1, 2)),
        "conv2.weight": _by_kernel(activations.columns2, by_conv2),
        "conv2.bias": by_conv2.sum(axis=(0, 1, 2)),
        "dense1.weight": by_hidden.T @ activations.features,
        "dense1.bias": by_hidden.sum(axis=0),
        "dense2.weight": by_logits.T @ activations.hidden,
        "dense2.bias": by_logits.sum(axis=0),
    }


class Adam:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101); biases do not decay.

    Parameters
    ----------
    weights : dict of str to ndarray
        Arrays that `step` changes in place.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._means = {name: np.zeros_like(weight) for name, weight in weights.items()}
        self._squares = {name: np.zeros_like(weight) for name, weight in weights.items()}
        self._steps = 0

    def step(self, by_weight: Weights, learning_rate: float, weight_decay: float = 0.0) -> None:
        """Move the weights against their gradients.

        Parameters
        ----------
        by_weight : dict of str to ndarray
            From `gradients`.
        learning_rate : float
            How far to move: about this much a weight.
        weight_decay : float
            Share of itself, times the learning rate, that each weight loses.
        """
        self._steps += 1
        mean_correction = 1 - 0.9**self._steps
        square_correction = 1 - 0.999**self._steps
        for name, weight in self._weights.items():
            gradient, mean, square = by_weight[name], self._means[name], self._squares[name]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient * gradient - square)
            if name.endswith(".weight"):
                weight *= 1 - learning_rate * weight_decay
            weight -= learning_rate / mean_correction * mean / (np.sqrt(square / square_correction) + 1e-8)


def warped(images: Array, random: np.random.Generator) -> Array:
    """Turn, stretch, slant and move each image a little, by chance; what enters from outside is blank.

    Parameters
    ----------
    images : ndarray
        Shape (count, 8, 8), brightness 0 to 16.
    random : numpy.random.Generator
        Where the warps come from.

    Returns
    -------
    ndarray
        float32, same shape, brightness 0 to 16.
    """
    count = len(images)
    matrices = np.eye(2) + random.uniform(-WARP, WARP, size=(count, 2, 2))
    moves = random.uniform(-MOVE_PIXELS, MOVE_PIXELS, size=(count, 2, 1))
    from_centre = np.indices((8, 8)).reshape(2, 64) - 3.5
    # One blank pixel all round is enough: whatever lies further out is blank as well.
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1))).astype(np.float32)
    sources = np.clip(matrices @ from_centre + moves + 4.5, 0, 9)
    corners = np.minimum(sources.astype(np.intp), 8)
    row, column = corners.swapaxes(0, 1)
    down, right = (sources - corners).astype(np.float32).swapaxes(0, 1)
    image = np.arange(count)[:, np.newaxis]
    upper = (1 - right) * padded[image, row, column] + right * padded[image, row, column + 1]
    lower = (1 - right) * padded[image, row + 1, column] + right * padded[image, row + 1, column + 1]
    result: Array = ((1 - down) * upper + down * lower).reshape(images.shape)
    return result


def train(
    weights: Weights, images: Array, labels: Array, random: np.random.Generator, epochs: int
) -> Iterator[float]:
    """Train a network, one epoch a turn.

    Parameters
    ----------
    weights : dict of str to ndarray
        Arrays that every turn changes in place.
    images : ndarray
        Shape (count, 8, 8), brightness 0 to 16.
    labels : ndarray
        Shape (count,), integers 0 to 9.
    random : numpy.random.Generator
        Where the order and the warps of images come from.
    epochs : int
        How often each image is shown.

    Yields
    ------
    float
        Mean loss over this epoch's batches.
    """
    adam = Adam(weights)
    batch_count = math.ceil(len(images) / BATCH_LEN)
    for epoch in range(epochs):
        order = random.permutation(len(images))
        losses = []
        for index, batch in enumerate(np.array_split(order, batch_count)):
            progress = (epoch * batch_count + index) / (epochs * batch_count)
            activations = propagate(weights, warped(images[batch], random))
            losses.append(loss(activations.logits, labels[batch]))
            by_weight = gradients(weights, activations, labels[batch])
            adam.step(by_weight, LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * progress)), WEIGHT_DECAY)
        yield float(np.mean(losses))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on the digits and write both files.

    Parameters
    ----------
    arguments : sequence of str, optional
        Command line without the program's name; `sys.argv` by default.

    Returns
    -------
    int
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="train", description="Train the network of `deeplock demo`.")
    default = WEIGHTS_FILE.parent
    parser.add_argument("--folder", type=Path, default=default, help="where to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        datasets = importlib.import_module("sklearn.datasets")
        safetensors = importlib.import_module("safetensors.numpy")
    except ModuleNotFoundError as error:
        print(f"train: {error.name} is missing", file=sys.stderr)
        print("hint: pip install scikit-learn safetensors", file=sys.stderr)
        return 1

    digits = datasets.load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    training, held_out = split(labels)
    started = time.perf_counter()
    random = np.random.default_rng(SEED)
    weights = initial_weights(random)
    losses = train(weights, images[training], labels[training], random, EPOCHS)
    for epoch, mean_loss in enumerate(losses, start=1):
        if epoch % 5 == 0:
            print(f"epoch {epoch:3d} of {EPOCHS}  loss {mean_loss:.4f}", flush=True)
    seconds = time.perf_counter() - started

    options.folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in (
        (WEIGHTS_FILE.name, weights),
        (HELD_OUT_FILE.name, {"images": images[held_out], "labels": labels[held_out]}),
    ):
        # Not save_file: that leaves files which only their owner can read, also once they are in a wheel.
        (options.folder / name).write_bytes(safetensors.save(tensors, metadata={"images": _SOURCE}))
    print(f"trained on  {len(training)} images in {seconds:.0f} s")
    for name, part in (("training", training), ("held out", held_out)):
        print(f"{name}    {accuracy(weights, images[part], labels[part]):.2%} of {len(part)} images")
    return 0


def _log_softmax(logits: Array) -> Array:
    centred = logits - logits.max(axis=1, keepdims=True)
    result: Array = centred - np.log(np.exp(centred).sum(axis=1, keepdims=True))
    return result


def _unpool(by_pooled: Array, activations: Activations) -> Array:
    """Hand each 2x2 maximum's gradient to the pixel that won; those that tie, as on blank paper, share it."""
    blocks = activations.conv2.reshape(len(by_pooled), 4, 2, 4, 2, -1)
    won = blocks == activations.pooled[:, :, np.newaxis, :, np.newaxis]
    winners = won.sum(axis=(2, 4), dtype=by_pooled.dtype)
    shares = (by_pooled / winners)[:, :, np.newaxis, :, np.newaxis]
    result: Array = (won * shares).reshape(activations.conv2.shape)
    return result


def _gather(by_output: Array, weight: Array) -> Array:
    """Add up what each input pixel of a convolution passed on to its neighbours."""
    by_columns = by_output @ weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    padded = np.zeros((len(by_output), 10, 10, weight.shape[1]), dtype=by_output.dtype)
    for position, by_shifted in enumerate(np.split(by_columns, 9, axis=-1)):
        row, column = divmod(position, 3)
        padded[:, row : row + 8, column : column + 8] += by_shifted
    inner: Array = padded[:, 1:9, 1:9]
    return inner


def _by_kernel(columns: Array, by_output: Array) -> Array:
    flat = columns.reshape(-1, columns.shape[-1]).T @ by_output.reshape(-1, by_output.shape[-1])
    kernel: Array = flat.reshape(3, 3, -1, by_output.shape[-1]).transpose(3, 2, 0, 1)
    return kernel


if __name__ == "__main__":
    sys.exit(main())
