"""A passphrase in place of a key: scrypt (RFC 7914) makes it into one, with a salt and a cost that anybody may see.

The cost is bounded on both sides: a guess is to cost an attacker something, and a hostile header its reader not much.
"""

from __future__ import annotations

import hashlib
import secrets
import unicodedata
from types import TracebackType
from typing import NamedTuple, NoReturn

from deeplock_kernels.errors import (
    KeyFormatError,
    KeyTypeError,
    KeyWipedError,
    ParameterError,
    WrongKeyError,
    shown,
)
from deeplock_kernels.keys import Hidden, MasterKey, PlainKey

PASSPHRASE_KEY_BITS = 256
SCRYPT_SALT_BYTES = 16
SCRYPT_COSTS = {"n": tuple(1 << bits for bits in range(14, 19)), "r": (8,), "p": (1, 2, 3, 4)}
_MOST_MEMORY = (128 * 8 * SCRYPT_COSTS["n"][-1]) + (1 << 20)  # bytes: 128 r n, and what else there is


class Scrypt(NamedTuple):
    """How a passphrase becomes a key; nothing of it is secret.

    Attributes
    ----------
    n, r, p
        The cost (RFC 7914 section 2): 128 r n bytes of memory, and time in proportion to n r p.
    salt
        16 random bytes.
    """

    n: int
    r: int
    p: int
    salt: bytes


class Passphrase:
    """A passphrase, for whatever takes a master key.

    Each lock draws a salt of its own for scrypt, and its header keeps that and the cost. Whoever has a locked model can
    try passphrases as fast as scrypt lets them: take a long one, of random words. Where many calls need one lock, make
    its key once: `passphrase.derive(header.passphrase)`.

    It shows itself in no repr, text, pickle or copy. `wipe()` and the end of a `with` block clear its own copy.

    Parameters
    ----------
    text
        Not empty, without control characters such as a line end. Spellings that look the same are the same one (Unicode
        normalization form C).
    n, r, p
        The cost of new locks: n a power of two from 2^14 to 2^18, r 8, p from 1 to 4. The default takes 128 MiB.

    Raises
    ------
    KeyTypeError
        `text` is not a str.
    KeyFormatError
        It is empty, has a control character, or is no Unicode text.
    ParameterError
        The cost is another.
    """

    __slots__ = ("__weakref__", "_bytes", "_cost")

    _bytes: bytearray
    _cost: tuple[int, int, int]

    def __init__(self, text: str, *, n: int = 1 << 17, r: int = 8, p: int = 1) -> None:
        if not isinstance(text, str):
            raise KeyTypeError(f"text: got {type(text).__name__}, accepted is a passphrase as a str")
        self._bytes, self._cost = _encoded(text), (n, r, p)
        del text  # a traceback would show it
        if not self._bytes:
            raise KeyFormatError(
                "text: accepted is a passphrase of one character or more, without control characters such as a line end"
            )
        for (name, accepted), value in zip(SCRYPT_COSTS.items(), self._cost, strict=True):
            if type(value) is not int or value not in accepted:
                raise ParameterError(f"{name}: got {shown(value)}, accepted are {', '.join(map(str, accepted))}")

    def new_scrypt(self) -> Scrypt:
        """Draw the salt for a new lock."""
        return Scrypt(*self._cost, secrets.token_bytes(SCRYPT_SALT_BYTES))

    def derive(self, scrypt: Scrypt | None) -> MasterKey:
        """Make the 256-bit key of a lock.

        Parameters
        ----------
        scrypt
            What the lock's header says, `header.passphrase`.

        Raises
        ------
        WrongKeyError
            `scrypt` is None: the lock is one of a key, not of a passphrase.
        KeyTypeError
            It is something else.
        KeyWipedError
            After `wipe()`.
        ParameterError
            The cost is out of range, or there is not enough memory for it.
        """
        if scrypt is None:
            raise WrongKeyError("key: got a passphrase, but a key made this, which is in a key file or the like")
        if not isinstance(scrypt, Scrypt):
            raise KeyTypeError(f"scrypt: got {type(scrypt).__name__}, accepted is the `passphrase` of a lock's header")
        if not self._bytes:
            raise KeyWipedError("key: got a Passphrase that was wiped; make it again from its source")
        n, r, p, salt = scrypt
        try:
            return MasterKey.from_bytes(
                Hidden(
                    hashlib.scrypt(
                        self._bytes, salt=salt, n=n, r=r, p=p, maxmem=_MOST_MEMORY, dklen=PASSPHRASE_KEY_BITS // 8
                    )
                )
            )
        except (ValueError, TypeError):  # the latter for what is no C integer
            failed = f"scrypt: it cannot be computed with n={n}, r={r}, p={p}; it takes {128 * r * n:,} bytes of memory"
        raise ParameterError(failed)

    def wipe(self) -> None:
        """Fill the passphrase with zeros; every later use raises KeyWipedError."""
        for i in range(len(self._bytes)):
            self._bytes[i] = 0
        self._bytes.clear()

    def __enter__(self) -> Passphrase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return "Passphrase(set)" if getattr(self, "_bytes", b"") else "Passphrase(wiped)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise KeyTypeError("Passphrase: it cannot be pickled or copied; pass the object itself")

    def __copy__(self) -> NoReturn:
        raise KeyTypeError("Passphrase: it cannot be copied; pass the object itself")

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise KeyTypeError("Passphrase: it cannot be copied; pass the object itself")


Key = PlainKey | Passphrase


def _encoded(text: str) -> bytearray:
    """Give the bytes that scrypt works on, or none if it is no passphrase."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        return bytearray()
    return bytearray(unicodedata.normalize("NFC", text).encode())
