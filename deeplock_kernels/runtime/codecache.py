"""The package's own cache of compiled kernels on disk.

An entry is an object file that names no processor but its tier's features. Entries lie in a directory named
by a stamp of all package sources and the versions of Numba and llvmlite, so that no change of any of them can
meet old code. Whoever can write the cache can run code in the process that holds the keys: a directory that
is not this user's (or root's), or that others can write, is not used. Whatever is wrong with the cache means
no cache, never an exception. The first entry of a new stamp removes all but the newest few of the others.

`DEEPLOCK_CACHE=0` turns it off, `DEEPLOCK_CACHE_DIR` moves it from `$XDG_CACHE_HOME/deeplock_kernels`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import secrets
import stat
from contextlib import suppress
from importlib import metadata
from pathlib import Path

_MAGIC = b"deeplock object 1\n"
_KIND = b"deeplock object "  # how the entries of every version begin
_STAMPS_KEPT = 8  # so many versions can be used in turn, and each change of the sources makes one


@functools.cache
def stamp() -> str:
    """Digest all package sources, the versions of the compilers and the kind of machine, as 32 hexadecimal digits."""
    digest = hashlib.sha256(platform.machine().encode() + b"\0")
    root = Path(__file__).resolve().parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    for package in ("numba", "llvmlite"):
        digest.update(metadata.version(package).encode() + b"\0")
    return digest.hexdigest()[:32]


def _base() -> Path | None:
    if os.environ.get("DEEPLOCK_CACHE", "1") == "0":
        return None
    chosen = os.environ.get("DEEPLOCK_CACHE_DIR")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "deeplock_kernels" if os.path.isabs(home) else None


def _trusted(path: Path) -> bool:
    """Say whether nobody but this user and root can change what lies in a directory, or in a file."""
    status = os.lstat(path)
    ours = not hasattr(os, "geteuid") or status.st_uid in (os.geteuid(), 0)
    return ours and not stat.S_ISLNK(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def directory(*, create: bool = False) -> Path | None:
    """Give the directory of this stamp's entries, or None where there is no cache to trust."""
    try:
        base = _base()
        if base is None:
            return None
        entries = base / stamp()
        if create:
            base.parent.mkdir(parents=True, exist_ok=True)
            base.mkdir(mode=0o700, exist_ok=True)
            entries.mkdir(mode=0o700, exist_ok=True)
        return entries if _trusted(base.resolve()) and _trusted(entries) else None
    except (OSError, RuntimeError, metadata.PackageNotFoundError):
        return None


def load(name: str) -> bytes | None:
    """Give the object code of an entry, or None."""
    entries = directory()
    if entries is None:
        return None
    path = entries / f"{name}.o"
    try:
        if not (_trusted(path) and stat.S_ISREG(os.lstat(path).st_mode)):
            return None
        data = path.read_bytes()
    except OSError:
        return None
    code = data[len(_MAGIC) + 32 :]
    return code if data == _sealed(name, code) else None


def _sealed(name: str, code: bytes) -> bytes:
    """Give the content of an entry: damage shows, and so does another kernel's name."""
    return _MAGIC + hashlib.sha256(name.encode() + b"\0" + code).digest() + code


def save(name: str, code: bytes) -> None:
    """Write an entry beside its place and rename it there; a failure leaves no entry."""
    entries = directory(create=True)
    if entries is None:
        return
    with suppress(OSError):
        if not any(entries.iterdir()):
            _remove_old(entries)
    temporary = entries / f".{name}.{secrets.token_hex(8)}"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(_sealed(name, code))
        os.replace(temporary, entries / f"{name}.o")
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if not isinstance(error, OSError):
            raise


def _remove_old(newest: Path) -> None:
    """Remove the oldest stamps beside a new one. A process that still uses one has no need of its files any more."""
    stamps = [
        path for path in newest.parent.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name) and path != newest
    ]
    stamps.sort(key=lambda path: os.lstat(path).st_mtime_ns)
    for old in stamps[: 1 - _STAMPS_KEPT]:
        with suppress(OSError):
            entries = list(old.iterdir())
            if _trusted(old) and all(map(_is_entry, entries)):
                for path in entries:
                    os.unlink(path)
                os.rmdir(old)


def _is_entry(path: Path) -> bool:
    """Say whether a file is an entry of this version or another."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    with open(path, "rb") as file:
        return file.read(len(_KIND)) == _KIND
