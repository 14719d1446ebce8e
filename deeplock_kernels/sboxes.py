"""S-Boxes: the byte permutations that lock and unlock, each named one built from its published definition.

An S-Box is public. Whoever holds locked bytes can apply the inverse S-Box first, so in this one-layer
construction it adds no secrecy: secrecy rests on the key stream alone. Nonlinearity and the other properties
describe a table, they are no security argument here. "skinny8" is weak even as a table (it was made to be
cheap, inside a cipher of many rounds); it is here for study and speed.

Any permutation of 0..255 is accepted, a weak one too: `SBox.properties` says what it is worth.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from deeplock_kernels.errors import SBoxError, SelfTestError, UnknownNameError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deeplock_kernels.properties import SBoxProperties

__all__ = ["AES", "SBOXES", "AffineForm", "SBox"]

# ------------------------------------------------------------------------------
# GF(2^8), and linear maps of bytes as 64-bit matrices (the format is that of `AffineForm`)

_AES_MODULUS = 0x11B
_IDENTITY = 0x0102040810204080


def _multiply(a: int, b: int, modulus: int = _AES_MODULUS) -> int:
    """Multiply in GF(2^8) = GF(2)[x] / modulus."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a <<= 1
        if a & 0x100:
            a ^= modulus
        b >>= 1
    return product


@functools.cache
def _inverses() -> bytes:
    """Return the table of inversion in the field of AES, with 0 for 0 (FIPS 197 section 4.4)."""
    powers = [1]  # of 3, which generates the multiplicative group
    for _ in range(254):
        powers.append(_multiply(powers[-1], 3))
    inverses = bytearray(256)
    for exponent, power in enumerate(powers):
        inverses[power] = powers[-exponent % 255]
    return bytes(inverses)


def _matrix(images: Iterable[int]) -> int:
    """Return the matrix of the linear map that sends the bytes 1, 2, 4, ..., 128 to the eight `images`."""
    columns = list(images)
    rows = bytes(sum(((column >> i) & 1) << j for j, column in enumerate(columns)) for i in range(8))
    return int.from_bytes(rows, "big")


def _map(matrix: int) -> bytes:
    """Return the table of x -> matrix · x."""
    rows = matrix.to_bytes(8, "big")
    table = [0]
    for j in range(8):
        column = sum(((row >> j) & 1) << i for i, row in enumerate(rows))
        table += [image ^ column for image in table]
    return bytes(table)


def _compose(outer: int, inner: int) -> int:
    """Return the matrix of x -> outer · (inner · x)."""
    inner_map, outer_map = _map(inner), _map(outer)
    return _matrix(outer_map[inner_map[1 << j]] for j in range(8))


def _invert(matrix: int) -> int:
    """Return the matrix of the inverse map; `matrix` must be invertible."""
    table = _map(matrix)
    return _matrix(table.index(1 << j) for j in range(8))


def _circulant(row: int) -> int:
    """Return the matrix whose row for output bit i is `row` rotated left i times."""
    return int.from_bytes(bytes(((row << i) | (row >> (8 - i))) & 0xFF for i in range(8)), "big")


def _into_aes_field(modulus: int) -> int:
    """Return the matrix of a field isomorphism from GF(2)[x] / modulus to the field of AES.

    It sends x to a root of `modulus` (the smallest of the eight; each would do).
    """

    def powers(root: int) -> list[int]:
        result = [1]
        for _ in range(8):
            result.append(_multiply(result[-1], root))
        return result

    def is_root(x: int) -> bool:
        terms = (power for i, power in enumerate(powers(x)) if (modulus >> i) & 1)
        return functools.reduce(operator.xor, terms) == 0

    return _matrix(powers(next(filter(is_root, range(256))))[:8])


class AffineForm(NamedTuple):
    """An S-Box written as field inversion between two affine maps, which is what GFNI evaluates.

    S(x) = outer_matrix · inv(inner_matrix · (x XOR inner_constant)) XOR outer_constant, where inv is the
    inversion in GF(2^8) modulo 0x11B, with inv(0) = 0. The inner constant is added before the inner matrix.

    A matrix is a 64-bit integer in the format of x86's GF2P8AFFINEQB (Intel 64 and IA-32 Architectures
    Software Developer's Manual, volume 2): bits 8(7 - i) to 8(7 - i) + 7 are the row for output bit i, which
    is the parity of (row AND x). The identity is 0x0102040810204080.

    Parameters
    ----------
    outer_matrix, outer_constant : int
        The affine map after the inversion, 64 and 8 bits.
    inner_matrix, inner_constant : int
        The affine map before the inversion, 64 and 8 bits.
    """

    outer_matrix: int
    outer_constant: int
    inner_matrix: int
    inner_constant: int

    @property
    def inverse(self) -> AffineForm:
        """The form of S^-1(y) = inner^-1 · inv(outer^-1 · (y XOR outer_constant)) XOR inner_constant."""
        return AffineForm(
            outer_matrix=_invert(self.inner_matrix),
            outer_constant=self.inner_constant,
            inner_matrix=_invert(self.outer_matrix),
            inner_constant=self.outer_constant,
        )

    def table(self) -> bytes:
        """Return the 256 bytes S(0), ..., S(255)."""
        inner, outer, inverses = _map(self.inner_matrix), _map(self.outer_matrix), _inverses()
        return bytes(
            outer[inverses[inner[x ^ self.inner_constant]]] ^ self.outer_constant for x in range(256)
        )


# ------------------------------------------------------------------------------
# The named boxes, from their definitions


def _aes() -> AffineForm:
    """FIPS 197 section 5.1.1: b'[i] = b[i] + b[i+4] + b[i+5] + b[i+6] + b[i+7] + c[i], with c = 0x63."""
    return AffineForm(_circulant(0xF1), 0x63, _IDENTITY, 0)


def _sm4() -> AffineForm:
    """GB/T 32907-2016, by the structure found by Liu et al., "Analysis of the SMS4 Block Cipher", ACISP 2007.

    S(x) = A · inv(A · x + c) + c, where A is circulant and the inversion is modulo
    x^8 + x^7 + x^6 + x^5 + x^4 + x^2 + 1. The standard itself prints a table.
    """
    a, c = _circulant(0xA7), 0xD3
    into = _into_aes_field(0x1F5)
    return AffineForm(
        outer_matrix=_compose(a, _invert(into)),
        outer_constant=c,
        inner_matrix=_compose(into, a),
        inner_constant=_map(_invert(a))[c],
    )


def _camellia() -> AffineForm:
    """s1(x) = h(g(f(0xC5 XOR x))) XOR 0x6E (Aoki et al., "Specification of Camellia"; SBOX1 of RFC 3713).

    f and h are linear, and bit 1 is the most significant. g inverts in GF(2^8) over GF(2^4): with b a root of
    x^8 + x^6 + x^5 + x^3 + 1 and a = b^238, a root of x^4 + x + 1, bits 1 to 8 stand for the element
    (x8 + x7 a + x6 a^2 + x5 a^3) + (x4 + x3 a + x2 a^2 + x1 a^3) b.
    """

    def sums(*outputs: tuple[int, ...]) -> int:
        """Return the matrix whose output bits 1 to 8 are the sums of the input bits listed."""
        return int.from_bytes(bytes(sum(1 << (8 - bit) for bit in bits) for bits in outputs), "little")

    f = sums((6, 2), (7, 1), (8, 5, 3), (8, 3), (7, 4), (5, 2), (8, 1), (6, 4))
    h = sums((5, 6, 2), (6, 2), (7, 4), (8, 2), (7, 3), (8, 1), (5, 1), (6, 3))
    modulus, b = 0x169, 2
    a = functools.reduce(lambda x, y: _multiply(x, y, modulus), [b] * 238)
    basis = [1]
    for _ in range(3):
        basis.append(_multiply(basis[-1], a, modulus))
    basis += [_multiply(element, b, modulus) for element in basis]
    into = _compose(_into_aes_field(modulus), _matrix(basis))
    return AffineForm(
        outer_matrix=_compose(h, _invert(into)),
        outer_constant=0x6E,
        inner_matrix=_compose(into, f),
        inner_constant=0xC5,
    )


def _aria() -> AffineForm:
    """S2(x) = B · x^247 + 0xE2 (Kwon et al., "New Block Cipher: ARIA", ICISC 2003; SB2 of RFC 5794).

    x^247 is the eighth power of the inverse, and raising to the eighth power is linear.
    """
    b = int.from_bytes(bytes.fromhex("7abcebb93481bacb"), "big")  # the rows for output bits 0 to 7
    eighth_powers = []
    for j in range(8):
        power = 1 << j
        for _ in range(3):
            power = _multiply(power, power)
        eighth_powers.append(power)
    return AffineForm(_compose(b, _matrix(eighth_powers)), 0xE2, _IDENTITY, 0)


def _kuznyechik() -> bytes:
    """GOST R 34.12-2015: the table of RFC 7801 section 4.1.1, for which the standard gives no formula."""
    return bytes.fromhex(
        "fceedd11cf6e3116fbc4fada23c5044de977f0db932e99ba1736f1bb14cd5fc1"
        "f918655ae25cef21811c3c428b018e4f058402aee36a8fa0060bed987fd4d31f"
        "eb342c51eac848abf22a68a2fd3aceccb5700e56080c7612bf7213479cb75d87"
        "15a19629107b9ac7f391786f9d9eb2b13275193dff358a7e6d54c680c3bd0d57"
        "dff524a93ea843c9d779d6f67c22b903e00fecde7a94b0bcdce828504e330a4a"
        "a79760731e0062441ab83882649f2641ad454692275e552f8ca3a57d69d5953b"
        "0758b34086ac1df730376be488d9e789e11b83494c3ff8fe8d53aa90cad88561"
        "207167a42d2b095bcb9b25d0bee56c5259a674d2e6f4b4c0d166afc2394b63b6"
    )


def _whirlpool() -> bytes:
    """Barreto and Rijmen, "The WHIRLPOOL Hashing Function" (ISO/IEC 10118-3): mini-boxes E, E^-1 and R."""
    e = bytes.fromhex("010b090c0d060f030e0807040a020500")
    r = bytes.fromhex("070c0b0d0e04090f0603080a02050100")

    def substitute(x: int) -> int:
        upper, lower = e[x >> 4], e.index(x & 15)
        middle = r[upper ^ lower]
        return (e[upper ^ middle] << 4) | e.index(lower ^ middle)

    return bytes(map(substitute, range(256)))


def _skinny8() -> bytes:
    """S8 of Beierle et al., "The SKINNY Family of Block Ciphers", CRYPTO 2016, section 2.

    Four steps of bit 4 ^= NOR(bit 7, bit 6) and bit 0 ^= NOR(bit 3, bit 2); the bits change places after each
    of them, after the last one only bits 1 and 2.
    """

    def substitute(x: int) -> int:
        for sources in [(5, 3, 0, 4, 6, 7, 1, 2)] * 3 + [(0, 2, 1, 3, 4, 5, 6, 7)]:
            bits = [(x >> i) & 1 for i in range(8)]
            bits[4] ^= 1 - (bits[7] | bits[6])
            bits[0] ^= 1 - (bits[3] | bits[2])
            x = sum(bits[source] << i for i, source in enumerate(sources))
        return x

    return bytes(map(substitute, range(256)))


class _Definition(NamedTuple):
    build: Callable[[], AffineForm | bytes]
    sha256: str  # of the published table


_DEFINITIONS: Final = {
    "aes": _Definition(_aes, "c2d8e5eed6cbebd8625fc18f81486a7733c04f9b0129ffbe974c68b90308b4f2"),
    "sm4": _Definition(_sm4, "1674d0631a2e37b60ec748bc3899fee1550c108af30b85ce96a70c5ca4682d03"),
    "camellia": _Definition(_camellia, "4867a63842b7afbf7a120c1310940f29048d0b73ef1747e15ad67a3aa0d9af9d"),
    "aria": _Definition(_aria, "360e7dadb4427717af4cb4e82f530229193e21b1bfb8dbedbc46f77ff251ca15"),
    "kuznyechik": _Definition(
        _kuznyechik, "46957e9c7524f6f34909ad7dc4aaf2060ce536ec24413efe0f4a02ecf943f757"
    ),
    "whirlpool": _Definition(_whirlpool, "967bb3029010a81ba3948b598654cb8d58825e06b3bb153df9dbbe7abbbcff7c"),
    "skinny8": _Definition(_skinny8, "4fd3a7fe3cf6f8075789fd5f9ecb933ff78ea3aa8ced250dc2f56ff583cf07ae"),
}
_NAMES_BY_SHA256: Final = {definition.sha256: name for name, definition in _DEFINITIONS.items()}


@functools.cache
def _build(name: str) -> tuple[bytes, AffineForm | None]:
    """Return the table and the affine form of a named box, after a look at the table's digest."""
    built = _DEFINITIONS[name].build()
    table, affine = (built.table(), built) if isinstance(built, AffineForm) else (built, None)
    if hashlib.sha256(table).hexdigest() != _DEFINITIONS[name].sha256:
        raise SelfTestError(f"sbox: the table built for {name!r} is not the published one; reinstall")
    return table, affine


# ------------------------------------------------------------------------------
# Any box

_ACCEPTED = "accepted are 256 bytes or integers in which each of 0..255 occurs once"


def _table_bytes(table: object) -> bytes:
    """Return the values of `table` as bytes, or raise SBoxError if they are not 256 integers of 0..255."""
    if isinstance(table, str):
        raise SBoxError(f"table: got str, {_ACCEPTED}; take a named box from SBOXES")
    try:
        view = memoryview(table)  # type: ignore[arg-type]
    except TypeError:
        pass
    else:
        if view.format.lstrip("@=<>!") in ("B", "c"):
            if view.nbytes != 256:
                raise SBoxError(f"table: got {view.nbytes} bytes, {_ACCEPTED}")
            return view.tobytes()
    try:
        if not hasattr(table, "__getitem__") or isinstance(table, Mapping):
            raise TypeError("not a sequence")
        count, values = len(table), list(itertools.islice(table, 257))  # type: ignore[arg-type, call-overload]
    except TypeError:
        raise SBoxError(f"table: got {type(table).__name__}, {_ACCEPTED}; make it bytes or a list") from None
    if count != 256 or len(values) != 256:
        raise SBoxError(f"table: got {count} values, {_ACCEPTED}")
    result = bytearray()
    for position, value in enumerate(values):
        try:
            result.append(operator.index(value))
        except TypeError:
            got = f"{type(value).__name__} at position {position}"
            raise SBoxError(f"table: got {got}, {_ACCEPTED}; convert it to int") from None
        except (ValueError, OverflowError):
            got = f"an integer outside 0..255 at position {position}"
            raise SBoxError(f"table: got {got}, {_ACCEPTED}; a value is a byte") from None
    return bytes(result)


def _permutation(table: object) -> bytes:
    """Return `table` as 256 bytes, or raise SBoxError unless it is a permutation of 0..255."""
    values = _table_bytes(table)
    for position, value in enumerate(values):
        first = values.index(value)
        if first != position:
            raise SBoxError(
                f"table: got {value:#04x} at positions {first} and {position}, {_ACCEPTED}; "
                "with a value twice, locked bytes could not be unlocked"
            )
    return values


class SBox:
    """A permutation of the 256 byte values, which replaces each byte of what is locked.

    Any permutation is accepted, a weak one too: see `properties`. Boxes are immutable, equal if their tables
    are, and may be hashed, copied and pickled: an S-Box is no secret.

    Parameters
    ----------
    table : bytes-like or sequence of 256 int
        S(0), ..., S(255). A bytes-like object, or an array of dtype uint8, is read in C order.
    name : str, optional
        A name of your own for it. Without one, a table that equals a named box's carries that box's name.

    Raises
    ------
    SBoxError
        If `table` is not a permutation of 0..255, or `name` belongs to a named box with another table.
    """

    __slots__ = ("__weakref__", "_affine", "_inverse", "_name", "_properties", "_sha256", "_table")

    _table: bytes
    _name: str | None
    _sha256: str
    _inverse: SBox
    _affine: AffineForm | None
    _properties: SBoxProperties

    def __init__(
        self,
        table: bytes | bytearray | memoryview | Sequence[int] | npt.NDArray[np.integer[Any]],
        name: str | None = None,
    ) -> None:
        values = _permutation(table)
        sha256 = hashlib.sha256(values).hexdigest()
        if name is None:
            name = _NAMES_BY_SHA256.get(sha256)
        elif not isinstance(name, str) or not name:
            raise SBoxError(f"name: got {type(name).__name__}, accepted are None or a text that is not empty")
        elif name in _DEFINITIONS and _DEFINITIONS[name].sha256 != sha256:
            raise SBoxError(f"name: got {name!r}, a named box with another table; choose another name")
        self._set("_table", values)
        self._set("_name", name)
        self._set("_sha256", sha256)

    def _set(self, attribute: str, value: object) -> None:
        object.__setattr__(self, attribute, value)

    def __setattr__(self, attribute: str, value: object) -> None:
        raise AttributeError(f"{attribute}: an SBox is immutable; make another one")

    def __delattr__(self, attribute: str) -> None:
        raise AttributeError(f"{attribute}: an SBox is immutable")

    @property
    def table(self) -> bytes:
        """The 256 bytes S(0), ..., S(255)."""
        return self._table

    @property
    def name(self) -> str | None:
        """The name, or None."""
        return self._name

    @property
    def sha256(self) -> str:
        """The SHA-256 of `table` in lowercase hex, which names a box without a name."""
        return self._sha256

    @property
    def inverse(self) -> SBox:
        """The box S^-1; its own inverse is this object."""
        try:
            return self._inverse
        except AttributeError:
            inverse = SBox(bytes(map(self._table.index, range(256))))
            inverse._set("_inverse", self)
            self._set("_inverse", inverse)
            return self._inverse

    @property
    def affine(self) -> AffineForm | None:
        """The box as field inversion between affine maps, or None where no such form is known.

        The tables of "aes", "sm4", "camellia" and "aria" and of their inverses have one.
        """
        try:
            return self._affine
        except AttributeError:
            affine = None
            if self._sha256 in _NAMES_BY_SHA256:
                affine = _build(_NAMES_BY_SHA256[self._sha256])[1]
            elif self.inverse._sha256 in _NAMES_BY_SHA256:
                affine = _build(_NAMES_BY_SHA256[self.inverse._sha256])[1]
                affine = affine.inverse if affine is not None else None
            self._set("_affine", affine)
            return affine

    def properties(self) -> SBoxProperties:
        """Return the table's cryptographic properties, computed on the first call (a fraction of a second).

        They describe the table; in this construction they add no secrecy.
        """
        try:
            return self._properties
        except AttributeError:
            from deeplock_kernels.properties import compute_properties

            self._set("_properties", compute_properties(self._table))
            return self._properties

    def __eq__(self, other: object) -> bool:
        return self._table == other._table if isinstance(other, SBox) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._table)

    def __repr__(self) -> str:
        if not hasattr(self, "_sha256"):  # its table or name was refused
            return "SBox(unfinished)"
        return f"SBox({self._name!r})" if self._name else f"SBox(sha256='{self._sha256[:8]}…')"

    def __copy__(self) -> SBox:
        return self

    def __deepcopy__(self, memo: object) -> SBox:
        return self

    def __reduce__(self) -> tuple[type[SBox], tuple[bytes, str | None]]:
        return SBox, (self._table, self._name)


class _NamedBoxes(Mapping[str, SBox]):
    """The named boxes: a read-only mapping from name to SBox, each built when it is first asked for."""

    __slots__ = ("_built",)

    def __init__(self) -> None:
        self._built: dict[str, SBox] = {}

    def __getitem__(self, name: str) -> SBox:
        if name not in self:
            raise UnknownNameError(
                f"sbox: got {name!r}, accepted are {', '.join(_DEFINITIONS)}; any other box is SBox(table)"
            )
        if name not in self._built:
            self._built.setdefault(name, SBox(_build(name)[0], name))
        return self._built[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in _DEFINITIONS

    def __iter__(self) -> Iterator[str]:
        return iter(_DEFINITIONS)

    def __len__(self) -> int:
        return len(_DEFINITIONS)

    def __repr__(self) -> str:
        return f"<named S-Boxes: {', '.join(_DEFINITIONS)}>"


SBOXES: Final[Mapping[str, SBox]] = _NamedBoxes()
"""The named boxes by name; an unknown name raises UnknownNameError."""

AES: Final[SBox] = SBOXES["aes"]
"""The AES S-Box (FIPS 197), the default."""
