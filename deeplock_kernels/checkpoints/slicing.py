"""What an index chooses of a tensor, and which bytes of the tensor that takes.

Indices are those that NumPy calls basic: integers, slices, Ellipsis and None. No tensor is looked at here.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from deeplock_kernels.errors import TensorIndexError

_GAP = 4096  # bytes: what lies closer together is read in one piece


class Choice(NamedTuple):
    """What an index chooses.

    Attributes
    ----------
    ranges
        The indices along each axis of the tensor, ascending.
    rest
        The index that, applied to an array of just those elements, gives what was asked for.
    """

    ranges: tuple[range, ...]
    rest: tuple[Any, ...]


class Runs(NamedTuple):
    """The bytes to read: pieces of one length.

    Attributes
    ----------
    first
        Where in the tensor the first piece begins, in bytes.
    steps
        How far behind it the others begin: the sums of one number of each range.
    nbytes
        The length of each piece.
    total
        The length of all of them.
    strides
        How many bytes chosen elements lie apart along each axis, with the pieces one behind the other.
    dense
        Whether that is nothing but the chosen elements, in C order.
    """

    first: int
    steps: tuple[range, ...]
    nbytes: int
    total: int
    strides: tuple[int, ...]
    dense: bool

    def starts(self) -> list[int]:
        """Give where in the tensor each piece begins, ascending."""
        return [self.first + sum(steps) for steps in itertools.product(*self.steps)]


def choose(index: Any, shape: Sequence[int]) -> Choice:
    """Say what an index chooses of a tensor of some shape.

    Raises
    ------
    TensorIndexError
        It goes past the tensor's end, has too many axes, or is of another kind.
    """
    items = index if isinstance(index, tuple) else (index,)
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    given = len(items) - len(dots) - sum(item is None for item in items)
    if len(dots) > 1 or given > len(shape):
        raise TensorIndexError(
            f"index: got one for {given} axes, accepted are the {len(shape)} of the tensor and one Ellipsis"
        )
    at = dots[0] if dots else len(items)
    ranges: list[range] = []
    rest: list[Any] = []
    for item in (*items[:at], *[slice(None)] * (len(shape) - given), *items[at + 1 :]):
        if item is None:
            rest.append(None)
        else:
            chosen, then = _along(item, shape[len(ranges)])
            ranges.append(chosen)
            rest.append(then)
    return Choice(tuple(ranges), (*rest, Ellipsis))


def _along(item: Any, length: int) -> tuple[range, Any]:
    """Give the chosen indices of one axis, and how to bring them into the order of the index."""
    try:
        if isinstance(item, slice):
            chosen = range(length)[item]
            return (chosen[::-1], slice(None, None, -1)) if chosen.step < 0 else (chosen, slice(None))
        if isinstance(item, (bool, np.bool_)):
            raise TypeError
        at = operator.index(item)
    except (TypeError, ValueError):
        raise TensorIndexError(
            f"index: got {type(item).__name__}, accepted are integers, slices of integers with a step other than 0, "
            "Ellipsis and None; index the array that they give with others"
        ) from None
    if not -length <= at < length:
        raise TensorIndexError(f"index: got {at}, accepted are {-length} to {length - 1} along this axis")
    at %= length
    return range(at, at + 1), 0


def runs_of(ranges: Sequence[range], shape: Sequence[int], itemsize: int) -> Runs:
    """Say which bytes to read of a tensor; no range is empty."""
    strides, nbytes = [0] * len(shape), itemsize
    for axis in reversed(range(len(shape))):
        strides[axis] = nbytes
        nbytes *= shape[axis]
    counts = [len(along) for along in ranges]
    apart = [along.step * stride for along, stride in zip(ranges, strides, strict=True)]
    nbytes, axis = itemsize, len(shape)
    while axis and (counts[axis - 1] == 1 or apart[axis - 1] - nbytes < _GAP):
        axis -= 1
        nbytes += (counts[axis] - 1) * apart[axis]
    pieces = math.prod(counts[:axis])
    return Runs(
        first=sum(along[0] * stride for along, stride in zip(ranges, strides, strict=True)),
        steps=tuple(range(0, count * step, step) for count, step in zip(counts[:axis], apart, strict=False)),
        nbytes=nbytes,
        total=pieces * nbytes,
        strides=(*(nbytes * math.prod(counts[i + 1 : axis]) for i in range(axis)), *apart[axis:]),
        dense=pieces * nbytes == itemsize * math.prod(counts),
    )


def halves(ranges: tuple[range, ...]) -> Iterator[tuple[tuple[range, ...], tuple[Any, ...]]]:
    """Cut a choice of more than one element in two; with each half comes where in the result it lies.

    A half of a result that is contiguous is so too.
    """
    axis = next(axis for axis, along in enumerate(ranges) if len(along) > 1)
    middle = len(ranges[axis]) // 2
    for half in (slice(None, middle), slice(middle, None)):
        yield (*ranges[:axis], ranges[axis][half], *ranges[axis + 1 :]), (slice(None),) * axis + (half,)
