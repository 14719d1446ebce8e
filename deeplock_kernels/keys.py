"""The master key, and what is derived from it for each lock (HKDF-SHA256, RFC 5869)."""

from __future__ import annotations

import hmac
import os
import secrets
import stat
import warnings
from types import TracebackType
from typing import Any, NoReturn

from deeplock_kernels.errors import (
    ExposedKeyWarning,
    KeyFormatError,
    KeyTypeError,
    KeyWipedError,
    ParameterError,
    shown,
)
from deeplock_kernels.files import file_errors, path_text, write_new

KEY_BITS = (128, 192, 256)
_LENGTHS = tuple(bits // 8 for bits in KEY_BITS)
_HEX_DIGITS = frozenset("0123456789abcdef")


class Hidden(bytes):
    """Bytes that reporters of errors cannot show, who collect the local variables of all frames."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"

    __str__ = __repr__

    def __getitem__(self, index: Any) -> Any:
        return Hidden(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)


class MasterKey:
    """A key of 128, 192 or 256 bits that does not show itself.

    Its bytes appear in no repr, text, pickle or copy. They are kept in one buffer of their own, which
    `wipe()` and the end of a `with` block fill with zeros. That is best effort: Python may have copied what
    was passed in, and derived keys live as long as the objects that use them.

    Use `generate`, `from_bytes`, `from_hex` or `from_file`.
    """

    __slots__ = ("__weakref__", "_bytes")

    _bytes: bytearray

    def __init__(self) -> None:
        raise KeyTypeError(
            "MasterKey: made by generate(), from_bytes(), from_hex() or from_file(), not by a call"
        )

    @classmethod
    def generate(cls, bits: int = 256) -> MasterKey:
        """Make a new random key of `bits` bits from the operating system's generator.

        Raises
        ------
        ParameterError
            `bits` is not 128, 192 or 256.
        """
        if not hasattr(bits, "__index__") or isinstance(bits, bool) or bits not in KEY_BITS:
            raise ParameterError(f"bits: got {shown(bits)}, accepted are 128, 192 and 256")
        return cls.from_bytes(Hidden(secrets.token_bytes(int(bits) // 8)))

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> MasterKey:
        """Take a key of 16, 24 or 32 bytes.

        Raises
        ------
        KeyTypeError
            `data` is not bytes.
        KeyFormatError
            `data` has another length.
        """
        key = object.__new__(cls)
        key._bytes = bytearray(key_bytes(data, "data"))
        return key

    @classmethod
    def from_hex(cls, text: str) -> MasterKey:
        """Take a key of 32, 48 or 64 lowercase hexadecimal digits.

        Raises
        ------
        KeyTypeError
            `text` is not a str.
        KeyFormatError
            `text` has another length or other characters.
        """
        if not isinstance(text, str):
            raise KeyTypeError(f"text: got {type(text).__name__}, accepted is a str of hexadecimal digits")
        if len(text) not in (32, 48, 64) or not _HEX_DIGITS.issuperset(text):
            raise KeyFormatError(
                f"text: got {len(text)} characters, accepted are 32, 48 or 64 lowercase hexadecimal digits"
            )
        return cls.from_bytes(Hidden(bytes.fromhex(text)))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> MasterKey:
        """Read a key file: one line of 32, 48 or 64 lowercase hexadecimal digits, as `deeplock keygen` writes it.

        Raises
        ------
        FileAccessError
            The file cannot be read.
        KeyFormatError
            The file holds something else.

        Warns
        -----
        ExposedKeyWarning
            Others than its owner can read the file.
        """
        text = path_text(path)
        with file_errors(text, "read"), open(text, "rb") as file:
            secret = key_in_line(Hidden(file.read(66)))  # a traceback shows nothing else of the file's content
            status = os.fstat(file.fileno())
        if secret is None:
            raise KeyFormatError(
                f"{text}: not a key file; accepted is one line of 32, 48 or 64 lowercase hexadecimal digits"
            )
        warn_of_readers(text, status)
        return cls.from_bytes(secret)

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write a key file that only its owner can read (mode 0600); an existing file is never overwritten.

        Raises
        ------
        FileAccessError
            The file exists or cannot be written; nothing was left behind.
        KeyWipedError
            After `wipe()`.
        """
        write_new(path, Hidden(key_bytes(self).hex().encode() + b"\n"), 0o600)

    @property
    def bits(self) -> int:
        """The length of the key in bits."""
        return len(self._bytes) * 8

    def wipe(self) -> None:
        """Fill the key with zeros; every later use raises KeyWipedError."""
        for i in range(len(self._bytes)):
            self._bytes[i] = 0
        self._bytes.clear()

    def __enter__(self) -> MasterKey:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return f"MasterKey({self.bits} bits)" if getattr(self, "_bytes", b"") else "MasterKey(wiped)"

    def __eq__(self, other: object) -> bool:
        return (
            hmac.compare_digest(self._bytes, other._bytes) if isinstance(other, MasterKey) else NotImplemented
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise KeyTypeError(
            "MasterKey: it cannot be pickled or copied; pass the object itself, or a key file's path"
        )

    def __copy__(self) -> NoReturn:
        raise KeyTypeError("MasterKey: it cannot be copied; pass the object itself")

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise KeyTypeError("MasterKey: it cannot be copied; pass the object itself")


PlainKey = bytes | bytearray | memoryview | MasterKey


def key_bytes(key: object, argument: str = "key") -> bytes:
    """Check a key argument and give its bytes.

    Raises
    ------
    KeyTypeError, KeyFormatError, KeyWipedError
        It is not bytes or a MasterKey, not of 16, 24 or 32 bytes, or wiped.
    """
    if isinstance(key, MasterKey):
        if not key._bytes:
            raise KeyWipedError(f"{argument}: got a MasterKey that was wiped; make it again from its source")
        return Hidden(key._bytes)
    if not isinstance(key, (bytes, bytearray, memoryview)):
        hint = (
            "; a text of hexadecimal digits goes through MasterKey.from_hex" if isinstance(key, str) else ""
        )
        raise KeyTypeError(f"{argument}: got {type(key).__name__}, accepted are bytes or a MasterKey{hint}")
    data = Hidden(key)
    if len(data) not in _LENGTHS:
        raise KeyFormatError(f"{argument}: got {len(data)} bytes, accepted are 16, 24 or 32")
    return data


def warn_of_readers(path: str, status: os.stat_result) -> None:
    """Warn the caller's caller of a file with a secret that others than its owner can read."""
    if stat.S_ISREG(status.st_mode) and status.st_mode & 0o044:
        warnings.warn(
            f"{path}: others than its owner can read it (mode {stat.S_IMODE(status.st_mode):04o}); "
            "take that permission away, as by chmod 600",
            ExposedKeyWarning,
            stacklevel=3,
        )


def key_in_line(line: bytes) -> bytes | None:
    """Give the key in a line of text as key files hold it, or None if it is no such line."""
    digits = Hidden(line.removesuffix(b"\n"))
    valid = len(digits) in (32, 48, 64) and all(chr(digit) in _HEX_DIGITS for digit in digits)
    return Hidden(bytes.fromhex(digits.decode())) if valid else None


class Derivation:
    """All that is derived from a master key and the salt of one lock, by labels (RFC 5869, HKDF-SHA256)."""

    __slots__ = ("_pseudorandom_key", "key_bits")

    def __init__(self, key: object, salt: bytes) -> None:
        if not isinstance(salt, bytes):
            raise KeyTypeError(f"salt: got {type(salt).__name__}, accepted are bytes")
        secret = key_bytes(key)
        self.key_bits = 8 * len(secret)
        self._pseudorandom_key = hmac.digest(salt, secret, "sha256")

    def __repr__(self) -> str:
        return f"Derivation({getattr(self, 'key_bits', 0)} bits)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise KeyTypeError("Derivation: it cannot be pickled or copied; make it again from its key and salt")

    def _expand(self, info: bytes, length: int) -> bytes:
        """Give up to 64 bytes for a label (RFC 5869 section 2.3)."""
        block = Hidden(hmac.digest(self._pseudorandom_key, info + b"\1", "sha256"))
        if length <= 32:
            return block if length == 32 else block[:length]
        return Hidden(
            block + hmac.digest(self._pseudorandom_key, block + info + b"\2", "sha256")[: length - 32]
        )

    def tensor_key_iv(self, schedule: str, sbox: str, name: str) -> bytes:
        """Give a tensor's own key, as long as the master key, and behind it its 16-byte iv."""
        return self._expand(f"deeplock/v1/tensor/{schedule}/{sbox}\0{name}".encode(), self.key_bits // 8 + 16)

    def check(self) -> bytes:
        """Give the 16 bytes by which a header knows its key."""
        return self._expand(b"deeplock/v1/check", 16)

    def seal_key(self, name: str) -> bytes:
        """Give the 32-byte key of a tensor's seal."""
        return self._expand(f"deeplock/v1/seal\0{name}".encode(), 32)

    def mac(self, message: bytes) -> bytes:
        """Give the 32 bytes of HMAC-SHA256 (RFC 2104) under the header's key."""
        return hmac.digest(self._expand(b"deeplock/v1/header", 32), message, "sha256")
