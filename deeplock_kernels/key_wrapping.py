"""Data keys, each encrypted under a master key by AES Key Wrap (RFC 3394): for one model, and kept beside it.

A new master key then takes a new wrapping of 24 to 40 bytes, and no change of locked weights. A file holds one line:

    deeplock-wrapped-key/1 WRAPPED
    deeplock-wrapped-key/1 scrypt N R P SALT WRAPPED

with WRAPPED and SALT in lowercase hexadecimal digits and N, R and P in decimal ones. The second form is for a
passphrase in place of the master key. Nothing in it is secret.
"""

from __future__ import annotations

import os
import re
from typing import Any

from deeplock_kernels.errors import KeyFormatError, MissingLibraryError, WrongKeyError
from deeplock_kernels.files import check_distinct, file_errors, path_text, write_new
from deeplock_kernels.keys import Hidden, MasterKey, key_bytes
from deeplock_kernels.passphrases import SCRYPT_COSTS, Key, Passphrase, Scrypt

_FORMAT = "deeplock-wrapped-key/1"
_LINE = re.compile(
    rf"{_FORMAT} (?:scrypt ([1-9][0-9]*) ([1-9][0-9]*) ([1-9][0-9]*) ([0-9a-f]{{32}}) )?"
    r"([0-9a-f]{48}|[0-9a-f]{64}|[0-9a-f]{80})\n",
    re.ASCII,
)
_LONGEST = 200  # characters, more than any such line has
Path = str | os.PathLike[str]


def wrap_key(path: Path, master: Key, *, bits: int = 256) -> None:
    """Make a random data key and write it, encrypted under a master key, to a new file.

    Parameters
    ----------
    path
        The file to write; never overwritten.
    master
        The key that is to unwrap it: 16, 24 or 32 bytes, a MasterKey or a Passphrase.
    bits
        The length of the data key: 128, 192 or 256.

    Raises
    ------
    FileAccessError
        The file exists or cannot be written; nothing was left behind.
    MissingLibraryError
        `cryptography` is not installed.
    KeyTypeError, KeyFormatError, KeyWipedError, ParameterError
        Another argument is wrong.
    """
    with MasterKey.generate(bits) as key:
        _write(path, key, master, "master")


def unwrap_key(path: Path, master: Key) -> MasterKey:
    """Give the data key of a file that `wrap_key` wrote.

    Raises
    ------
    WrongKeyError
        The master key is another one, or the file was altered: RFC 3394 cannot tell these apart.
    KeyFormatError
        The file holds something else.
    FileAccessError
        It cannot be read.
    MissingLibraryError
        `cryptography` is not installed.
    KeyTypeError, KeyWipedError
        `master` is no key.
    """
    return _unwrapped(path, master, "master")


def rewrap_key(src: Path, dst: Path, old_master: Key, new_master: Key) -> None:
    """Write the data key of a file to a new file, under another master key; what it locks stays as it is.

    Whoever has the old file and the old master key still has the data key.

    Parameters
    ----------
    src, dst
        A file of `wrap_key`, and the file to write; never overwritten.
    old_master, new_master
        The key that unwraps it, and the one that is to.

    Raises
    ------
    SameFileError
        `dst` is `src`.
    WrongKeyError, KeyFormatError, FileAccessError, MissingLibraryError, KeyTypeError, KeyWipedError
        As for `unwrap_key` and `wrap_key`.
    """
    check_distinct(src, dst)
    with _unwrapped(src, old_master, "old_master") as key:
        _write(dst, key, new_master, "new_master")


def _write(path: Path, key: MasterKey, master: Key, argument: str) -> None:
    aes_key_wrap = _keywrap().aes_key_wrap
    if isinstance(master, Passphrase):
        scrypt = master.new_scrypt()
        fields = f"scrypt {scrypt.n} {scrypt.r} {scrypt.p} {scrypt.salt.hex()} "
        with master.derive(scrypt) as derived:
            wrapped = aes_key_wrap(key_bytes(derived), key_bytes(key))
    else:
        fields, wrapped = "", aes_key_wrap(key_bytes(master, argument), key_bytes(key))
    write_new(path, f"{_FORMAT} {fields}{wrapped.hex()}\n".encode(), 0o666)


def _unwrapped(path: Path, master: Key, argument: str) -> MasterKey:
    keywrap = _keywrap()
    text = path_text(path)
    scrypt, wrapped = _read(text)
    if isinstance(master, Passphrase):
        derived = master.derive(scrypt)
    else:
        derived = MasterKey.from_bytes(key_bytes(master, argument))
    try:
        with derived:
            return MasterKey.from_bytes(Hidden(keywrap.aes_key_unwrap(key_bytes(derived), wrapped)))
    except keywrap.InvalidUnwrap:
        pass
    raise WrongKeyError(f"{argument}: it is not the key that wrapped the one in {text}, or that file was altered")


def _read(path: str) -> tuple[Scrypt | None, bytes]:
    with file_errors(path, "read"), open(path, "rb") as file:
        line = Hidden(file.read(_LONGEST))  # it may be a key file, taken for another
    found = _LINE.fullmatch(line.decode("latin-1"))
    scrypt = None
    if found is not None and found[1] is not None:
        scrypt = Scrypt(int(found[1]), int(found[2]), int(found[3]), bytes.fromhex(found[4]))
        if any(value not in accepted for value, accepted in zip(scrypt, SCRYPT_COSTS.values(), strict=False)):
            found = None
    if found is None:
        raise KeyFormatError(
            f"{path}: not a wrapped key; accepted is the one line of {_FORMAT} that `deeplock wrap-key` writes"
        )
    return scrypt, bytes.fromhex(found[5])


def _keywrap() -> Any:
    try:
        from cryptography.hazmat.primitives import keywrap
    except ImportError:
        raise MissingLibraryError(
            "cryptography: it cannot be imported, and wrapped keys need it; pip install 'deeplock-kernels[wrap]'"
        ) from None
    return keywrap
