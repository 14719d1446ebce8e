"""What a table is worth as an S-Box: its differential, linear, algebraic and avalanche properties.

Terms and conventions are those of SageMath's `sage.crypto.sbox`; the avalanche and bit independence criteria,
which SageMath lacks, follow Webster and Tavares, "On the Design of S-Boxes", CRYPTO '85. Values are exact.

The numbers describe the table alone. An S-Box is public, so none of them is an argument for the secrecy of
what is locked with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deeplock_kernels.errors import SBoxError

__all__ = ["SBoxProperties", "Spread", "compute_properties"]

_Array = npt.NDArray[np.int64]


class Spread(NamedTuple):
    """The smallest, mean and largest of several values."""

    minimum: float
    mean: float
    maximum: float


@dataclass(frozen=True)
class SBoxProperties:
    """The cryptographic properties of one S-Box S with 8 input and 8 output bits.

    A component is the XOR of some output bits, chosen by a nonzero mask b: x -> b · S(x). Those with a single
    bit are the coordinates. The Walsh coefficient W(a, b) is the sum of (-1)^(a · x XOR b · S(x)) over all x.

    Attributes
    ----------
    bijective, involution : bool
        Each value occurs once; S is its own inverse.
    linearity, linearity_count : int
        The largest |W(a, b)| over nonzero b, and at how many (a, b) it occurs.
    nonlinearity : int
        128 - linearity / 2, the distance of the components to the affine functions.
    coordinate_nonlinearity : Spread
        The same over the eight coordinates.
    max_linear_bias, max_correlation : float
        linearity / 512, often called the linear approximation probability, and linearity / 256.
    differential_uniformity, differential_uniformity_count : int
        The largest number of x with S(x) XOR S(x XOR a) = d over nonzero a, and at how many (a, d) it occurs.
    max_difference_probability : float
        differential_uniformity / 256.
    boomerang_uniformity : int
        The largest number of x with S^-1(S(x) XOR b) XOR S^-1(S(x XOR a) XOR b) = a over nonzero a and b.
    max_degree, min_degree : int
        The largest algebraic degree of a coordinate, the smallest of a component.
    autocorrelation : int
        The largest |sum of (-1)^(b · (S(x) XOR S(x XOR a)))| over nonzero a and b.
    linear_structures : int
        At how many nonzero (a, b) that sum is 256 or -256: b · S changes always, or never, with a.
    fixed_points, antifixed_points : tuple of int
        Every x with S(x) = x; every x with S(x) = 255 - x, its complement.
    cycles : tuple of int
        The lengths of the permutation's cycles, longest first.
    differential_branch_number, linear_branch_number : int
        The smallest weight of a plus weight of d over the differences (a, d) that occur, a nonzero; the
        smallest weight of a plus weight of b over the W(a, b) that are not 0, b nonzero.
    strict_avalanche : Spread
        Over input bits i and output bits j, the probability that flipping bit i flips bit j; ideally 0.5.
    bit_independence_nonlinearity : Spread
        The nonlinearity of the components with two output bits.
    bit_independence_avalanche : Spread
        Over input bits i and those components, the probability that flipping bit i flips the component.
    """

    bijective: bool
    involution: bool
    linearity: int
    linearity_count: int
    nonlinearity: int
    coordinate_nonlinearity: Spread
    max_linear_bias: float
    max_correlation: float
    differential_uniformity: int
    differential_uniformity_count: int
    max_difference_probability: float
    boomerang_uniformity: int
    max_degree: int
    min_degree: int
    autocorrelation: int
    linear_structures: int
    fixed_points: tuple[int, ...]
    antifixed_points: tuple[int, ...]
    cycles: tuple[int, ...]
    differential_branch_number: int
    linear_branch_number: int
    strict_avalanche: Spread
    bit_independence_nonlinearity: Spread
    bit_independence_avalanche: Spread

    @property
    def weaknesses(self) -> tuple[str, ...]:
        """What is poor about the table, in plain sentences; empty for AES, for instance.

        Nearly every random permutation of 0..255 stays within the limits that are set here. Fixed points are
        always named, though they do little harm and occur in good ciphers too.
        """
        found = []
        if self.max_degree == 1:
            found.append("S is affine: every output bit is the XOR of some input bits and a constant.")
        elif self.linearity == 256:
            found.append("Some XOR of output bits is an affine function of the input.")
        elif self.nonlinearity < 86:
            found.append(f"The nonlinearity is {self.nonlinearity}, that of AES is 112.")
        if self.differential_uniformity > 16:
            found.append(f"The differential uniformity is {self.differential_uniformity}, that of AES is 4.")
        if self.linear_structures:
            found.append(
                f"There are {self.linear_structures} linear structures: input differences after which some "
                "XOR of output bits changes always, or never."
            )
        if self.min_degree < 5 and self.max_degree > 1:
            found.append(f"Some XOR of output bits has degree {self.min_degree}; AES has none below 7.")
        if len(self.fixed_points) > 8:
            found.append(f"{len(self.fixed_points)} values are mapped to themselves; AES has none.")
        elif self.fixed_points:
            found.append(f"Fixed points, mapped to themselves: {_listed(self.fixed_points)}.")
        if len(self.antifixed_points) > 8:
            found.append(f"{len(self.antifixed_points)} values are mapped to their complement; AES has none.")
        elif self.antifixed_points:
            found.append(f"Antifixed points, mapped to their complement: {_listed(self.antifixed_points)}.")
        return tuple(found)


def _listed(points: tuple[int, ...]) -> str:
    return ", ".join(f"{point:#04x}" for point in points)


_VALUES: _Array = np.arange(256, dtype=np.int64)
_WEIGHTS: _Array = np.array([value.bit_count() for value in range(256)], dtype=np.int64)
_COORDINATES = [1 << j for j in range(8)]
_PAIRS = [(1 << j) | (1 << k) for j in range(8) for k in range(j)]


def _butterfly(rows: _Array, sums_only: bool) -> _Array:
    """Return the Walsh-Hadamard transform over the last axis or, with `sums_only`, the Moebius one mod 2."""
    result: _Array = rows.copy()
    for step in (1, 2, 4, 8, 16, 32, 64, 128):
        halves = result.reshape(len(rows), -1, 2, step)
        low, high = halves[:, :, 0].copy(), halves[:, :, 1].copy()
        if sums_only:
            halves[:, :, 1] = low ^ high
        else:
            halves[:, :, 0], halves[:, :, 1] = low + high, low - high
    return result


def _spread(values: _Array | npt.NDArray[np.float64]) -> Spread:
    return Spread(float(values.min()), float(values.mean()), float(values.max()))


def _cycle_lengths(table: list[int]) -> tuple[int, ...]:
    lengths, unseen = [], set(range(256))
    while unseen:
        x, length = min(unseen), 0
        while x in unseen:
            unseen.remove(x)
            x, length = table[x], length + 1
        lengths.append(length)
    return tuple(sorted(lengths, reverse=True))


def _boomerang_uniformity(s: _Array) -> int:
    """Return the largest entry of the boomerang connectivity table outside row and column 0."""
    inverse = np.argsort(s)
    shifted = _VALUES[1:, np.newaxis] ^ _VALUES  # [a - 1, x] = x XOR a
    largest = 0
    for b in range(1, 256):
        returned = inverse[s ^ b]  # what x becomes if the output difference b is added
        counts = np.count_nonzero(returned[shifted] ^ returned == _VALUES[1:, np.newaxis], axis=1)
        largest = max(largest, int(counts.max()))
    return largest


def compute_properties(table: bytes) -> SBoxProperties:
    """Compute the cryptographic properties of a permutation of 0..255.

    Parameters
    ----------
    table : bytes
        The 256 values S(0), ..., S(255).

    Returns
    -------
    SBoxProperties
        Its attributes say what each property is. The computation takes a fraction of a second.

    Raises
    ------
    SBoxError
        If `table` is not a permutation of 0..255.
    """
    if sorted(table) != list(range(256)):
        raise SBoxError("table: got no permutation of 0..255, accepted are the 256 bytes of SBox.table")
    s: _Array = np.array(list(table), dtype=np.int64)
    masks = _VALUES[:, np.newaxis]
    components = _WEIGHTS[masks & s] & 1  # [b, x] = b · S(x)

    walsh = np.abs(_butterfly(1 - 2 * components, sums_only=False))  # [b, a]
    linearities = walsh.max(axis=1)  # of each component
    linearity = int(linearities[1:].max())
    nonlinearities = 128 - linearities // 2

    counts = np.bincount(((masks << 8) | (s ^ s[masks ^ _VALUES])).ravel(), minlength=1 << 16)
    differences: _Array = counts.astype(np.int64).reshape(256, 256)  # [a, d]
    uniformity = int(differences[1:].max())
    autocorrelation = _butterfly(differences, sums_only=False)  # [a, b]
    flips = (256 - autocorrelation[_COORDINATES]) / 512  # [i, b]: how often input bit i flips component b

    monomials = _butterfly(components, sums_only=True)  # [b, u]: is the product of bits u in component b?
    degrees = (monomials * _WEIGHTS).max(axis=1)

    weights = _WEIGHTS[masks] + _WEIGHTS  # [y, z]
    return SBoxProperties(
        bijective=True,
        involution=bool((s[s] == _VALUES).all()),
        linearity=linearity,
        linearity_count=int(np.count_nonzero(walsh[1:] == linearity)),
        nonlinearity=128 - linearity // 2,
        coordinate_nonlinearity=_spread(nonlinearities[_COORDINATES]),
        max_linear_bias=linearity / 512,
        max_correlation=linearity / 256,
        differential_uniformity=uniformity,
        differential_uniformity_count=int(np.count_nonzero(differences[1:] == uniformity)),
        max_difference_probability=uniformity / 256,
        boomerang_uniformity=_boomerang_uniformity(s),
        max_degree=int(degrees[_COORDINATES].max()),
        min_degree=int(degrees[1:].min()),
        autocorrelation=int(np.abs(autocorrelation[1:, 1:]).max()),
        linear_structures=int(np.count_nonzero(np.abs(autocorrelation[1:, 1:]) == 256)),
        fixed_points=tuple(np.flatnonzero(s == _VALUES).tolist()),
        antifixed_points=tuple(np.flatnonzero(s == 255 - _VALUES).tolist()),
        cycles=_cycle_lengths(s.tolist()),
        differential_branch_number=int(weights[1:][differences[1:] > 0].min()),
        linear_branch_number=int(weights[1:][walsh[1:] > 0].min()),
        strict_avalanche=_spread(flips[:, _COORDINATES]),
        bit_independence_nonlinearity=_spread(nonlinearities[_PAIRS]),
        bit_independence_avalanche=_spread(flips[:, _PAIRS]),
    )
