"""The data that networks are trained on; nothing is downloaded.

Each test set has as many samples of one class as of another, so that whoever always answers the same is right as often
as whoever guesses: once in as many times as there are classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn.datasets
import torch
from torch import Tensor

_SEED = 2008_05966
_SIDE = 32
_SHAPES: tuple[Callable[[Any, Any], Any], ...] = (  # of u to the right and v downwards, both about -1 to 1 in the shape
    lambda u, v: np.hypot(u, v) < 1,
    lambda u, v: abs(np.hypot(u, v) - 0.8) < 0.2,
    lambda u, v: _square(u, v) < 0.85,
    lambda u, v: abs(_square(u, v) - 0.7) < 0.15,
    lambda u, v: (v < 0.7) & (v > 2 * abs(u) - 1),
    lambda u, v: (_square(u, v) < 1) & ((abs(u) < 0.25) | (abs(v) < 0.25)),
    lambda u, v: (_square(u, v) < 0.9) & (abs(abs(u) - abs(v)) < 0.3),
    lambda u, v: (_square(u, v) < 0.9) & (np.floor(v * 3.3) % 2 == 0),
    lambda u, v: (_square(u, v) < 0.9) & (np.floor(u * 3.3) % 2 == 0),
    lambda u, v: (_square(u, v) < 0.9) & ((np.floor(u * 2.2) + np.floor(v * 2.2)) % 2 == 0),
)


@dataclass(frozen=True)
class Dataset:
    """Samples to learn from, and others to be judged by.

    Attributes
    ----------
    name
        What tables call it.
    train_x, test_x
        float32, a sample a row.
    train_y, test_y
        int64, the classes from 0 on; `test_y` has as many of each.
    classes
        How many there are.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def chance(self) -> float:
        """The accuracy of a guess, and of an answer that is always the same."""
        return 1 / self.classes

    def judges(self, most: int) -> tuple[Tensor, Tensor]:
        """Give at most that many samples of the test set, with their classes, as many of each class."""
        each = most // self.classes
        chosen = torch.cat([(self.test_y == label).nonzero()[:each, 0] for label in range(self.classes)])
        return self.test_x[chosen], self.test_y[chosen]


@functools.cache
def digits() -> Dataset:
    """Give scikit-learn's handwritten digits, 1 x 8 x 8: 1437 to learn from, 360 to be judged by."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    return _split("digits", x.reshape(-1, 1, 8, 8) / 8 - 1, y, each=36, standardise=False)


@functools.cache
def digits_enlarged() -> Dataset:
    """Give the same digits, interpolated to 1 x 32 x 32."""
    plain = digits()
    train_x, test_x = (
        torch.nn.functional.interpolate(x, (_SIDE, _SIDE), mode="bilinear") for x in (plain.train_x, plain.test_x)
    )
    return Dataset("digits, 32x32", train_x, plain.train_y, test_x, plain.test_y, plain.classes)


@functools.cache
def breast_cancer() -> Dataset:
    """Give scikit-learn's breast cancer data, 30 features: 449 to learn from, 120 to be judged by."""
    x, y = sklearn.datasets.load_breast_cancer(return_X_y=True)
    return _split("breast cancer", x, y, each=60, standardise=True)


@functools.cache
def wine() -> Dataset:
    """Give scikit-learn's wine data, 13 features: 118 to learn from, 60 to be judged by."""
    x, y = sklearn.datasets.load_wine(return_X_y=True)
    return _split("wine", x, y, each=20, standardise=True)


@functools.cache
def scenes(train: int = 3000, test: int = 400) -> Dataset:
    """Make colour images, 3 x 32 x 32, each of one of ten shapes.

    A disc, a ring, a square, a frame, a triangle, an upright and a slanting cross, lying and standing bars, or a
    chequerboard lies anywhere, in any colour, of any size from 14 to 24 pixels, turned by up to 15 degrees, before
    another colour with a slope of brightness, with two spots of other colours somewhere and noise over it all. Neither
    colour, size nor place tells the class.
    """
    random = np.random.default_rng(_SEED)
    count = train + test
    y = np.arange(count) % len(_SHAPES)
    y[:train] = random.permutation(y[:train])
    x = _pictures(y, random)
    parts = [torch.from_numpy(part) for part in (x[:train], y[:train], x[train:], y[train:])]
    return Dataset("scenes", *parts, classes=len(_SHAPES))


def _split(name: str, x: Any, y: Any, *, each: int, standardise: bool) -> Dataset:
    """Take that many samples of each class for the test set, and all others to learn from."""
    random = np.random.default_rng(_SEED)
    classes = int(y.max()) + 1
    order = random.permutation(len(y))
    tested = np.sort(np.concatenate([order[y[order] == label][:each] for label in range(classes)]))
    rest = np.setdiff1d(order, tested)
    if standardise:
        x = (x - x[rest].mean(0)) / x[rest].std(0)
    x, y = torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.int64))
    return Dataset(name, x[rest], y[rest], x[tested], y[tested], classes)


def _pictures(y: Any, random: np.random.Generator) -> Any:
    count = len(y)

    def each(low: float, high: float) -> Any:
        return random.uniform(low, high, (count, 1, 1))

    down, right = np.mgrid[:_SIDE, :_SIDE][:, None]
    radius, turn = each(7, 12), np.radians(each(-15, 15))
    below = (down - each(0.4, 0.6) * (_SIDE - 1)) / radius
    beside = (right - each(0.4, 0.6) * (_SIDE - 1)) / radius
    u, v = np.cos(turn) * beside + np.sin(turn) * below, np.cos(turn) * below - np.sin(turn) * beside
    shown = np.select([y[:, None, None] == label for label in range(len(_SHAPES))], [shape(u, v) for shape in _SHAPES])

    ground = random.uniform(0, 1, (count, 3, 1, 1))
    colour = (ground + random.choice([-1, 1], (count, 3, 1, 1)) * random.uniform(0.3, 0.7, (count, 3, 1, 1))) % 1
    picture = np.where(shown[:, None], colour, ground)
    for _ in range(2):
        spot = np.hypot(down - each(0, _SIDE), right - each(0, _SIDE)) < each(1, 3)
        picture = np.where(spot[:, None], random.uniform(0, 1, (count, 3, 1, 1)), picture)
    slope = each(-0.3, 0.3) * (down / _SIDE - 0.5) + each(-0.3, 0.3) * (right / _SIDE - 0.5)
    picture = picture + slope[:, None] + random.normal(0, 0.08, picture.shape)
    return ((picture - 0.5) / 0.3).astype(np.float32)


def _square(u: Any, v: Any) -> Any:
    return np.maximum(abs(u), abs(v))
