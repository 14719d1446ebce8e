"""Where checkpoints lie: a local directory, or whatever fsspec has a URL for, behind one small interface.

A store lists its files, opens one for reading at any range, and puts one in place whole or not at all. It is a plain
value that travels to other processes, which then need the same directory under the same path, or the same access.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import posixpath
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from deeplock_kernels.checkpoints.streaming import OpenedFile, Path, Window, mapped
from deeplock_kernels.errors import (
    ContainerError,
    FileAccessError,
    MissingLibraryError,
    ParameterError,
    SameFileError,
)
from deeplock_kernels.files import access_error, atomic_output, check_regular, claim, file_errors, path_text

_COPIED = 1 << 20  # bytes that are copied at a time


class Reader(Protocol):
    """A file that is open for reading."""

    @property
    def file(self) -> BinaryIO:
        """It, seekable and buffered."""

    @property
    def size(self) -> int:
        """Its size in bytes."""

    @property
    def version(self) -> str:
        """What changes whenever its content does."""

    def window(self, window: Window) -> Any:
        """Give, for the length of a `with` block, the address of some of its bytes."""


class Store(Protocol):
    """A place that holds the files of one checkpoint, by names with "/" between their parts."""

    @property
    def place(self) -> str:
        """What messages call it."""

    @property
    def writes_anywhere(self) -> bool:
        """Whether a file can be written at any position."""

    def path(self, name: str) -> str:
        """Give what messages call a file of it."""

    def names(self) -> list[str]:
        """List all files, sorted; none if the place does not exist."""

    def open(self, name: str) -> Any:
        """Open a file for reading, as a `with` block that gives a `Reader`."""

    def put(self, name: str, size_hint: int | None = None) -> Any:
        """Open a file for writing, as a `with` block at whose good end it takes the name's place."""

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""

    def alone(self) -> Any:
        """Keep other runs from writing there, for the length of a `with` block, where there is a way to."""


def store_at(place: Path, argument: str) -> Store:
    """Give the store of a path or URL.

    Raises
    ------
    ParameterError
        It is neither.
    """
    text = path_text(place, argument)
    if text.startswith("file://"):
        return Directory(text.removeprefix("file://"))
    return ObjectStore(text.rstrip("/")) if "://" in text else Directory(text)


def check_apart(source: Store, target: Store) -> None:
    """Refuse a target that is the source, or lies within it, or holds it.

    Raises
    ------
    SameFileError
        It does.
    """
    if type(source) is not type(target):
        return
    places = [_whole_place(source), _whole_place(target)]
    if any(one == other or other.startswith(one.rstrip("/") + "/") for one, other in (places, places[::-1])):
        raise SameFileError(
            f"dst_dir: got {target.place}, which is the source {source.place}, or within it, or around it; "
            "accepted is a directory apart from it"
        )


def _whole_place(store: Store) -> str:
    return os.path.realpath(store.place) if isinstance(store, Directory) else store.place


@dataclass(frozen=True)
class Directory:
    """A local directory; symbolic links in it are followed, as those into the cache of a hub."""

    place: str
    writes_anywhere = True

    def path(self, name: str) -> str:
        """Give the path of a file."""
        return os.path.join(self.place, *name.split("/"))

    def names(self) -> list[str]:
        """List all files below, sorted; see `Store.names`.

        Raises
        ------
        ContainerError
            A link leads back to a directory that it lies in.
        FileAccessError
            Something is neither file nor directory, leads nowhere, or cannot be read.
        """
        with file_errors(self.place, "read"):
            if not os.path.lexists(self.place):
                return []
            return sorted(self._below("", ()))

    def _below(self, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        path = self.path(prefix) if prefix else self.place
        status = os.stat(path)
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise ContainerError(f"{path}: it leads back to a directory that it lies in; remove that link")
        for entry in os.listdir(path):
            name = f"{prefix}/{entry}" if prefix else entry
            full = self.path(name)
            with file_errors(full, "read"):
                found = os.stat(full)
                if stat.S_ISDIR(found.st_mode):
                    yield from self._below(name, (*above, here))
                    continue
                check_regular(full, "read", found)
            yield name

    @contextmanager
    def open(self, name: str) -> Iterator[LocalReader]:
        """Open a file for reading; see `Store.open`."""
        path = self.path(name)
        with file_errors(path, "read"):
            check_regular(path, "read", os.stat(path))  # before opening, which would wait at a pipe
            file = open(path, "rb")  # noqa: SIM115 - closed below, outside this net for errors
        with file:
            with file_errors(path, "read"):
                size = os.fstat(file.fileno()).st_size
            yield LocalReader(OpenedFile(path, "", file, size))

    @contextmanager
    def put(self, name: str, size_hint: int | None = None) -> Iterator[BinaryIO]:
        """Write a file whole or not at all; see `atomic_output`."""
        path = self.path(name)
        with file_errors(path, "written"):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with atomic_output(path, size_hint=size_hint) as output:
            yield output

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        path = self.path(name)
        with file_errors(path, "removed"), suppress(FileNotFoundError):
            os.unlink(path)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs out, and make the directory if there is none; see `Store.alone`.

        A process that dies lets go of it. A file system without locks, as some in a network, keeps nobody out.

        Raises
        ------
        FileAccessError
            Another run is at it, or the directory cannot be made.
        """
        with file_errors(self.place, "written"):
            os.makedirs(self.place, exist_ok=True)
            descriptor = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                claim(descriptor, self.place, "written")
            except FileAccessError:
                raise
            except OSError:
                pass
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: forked workers have the descriptor too
            os.close(descriptor)


@dataclass(frozen=True)
class LocalReader:
    """A local file that is open for reading."""

    opened: OpenedFile

    @property
    def file(self) -> BinaryIO:
        """The file."""
        return self.opened.file

    @property
    def size(self) -> int:
        """Its size when it was opened, in bytes."""
        return self.opened.size

    @property
    def version(self) -> str:
        """Its size and times: that of its content, and that of its inode, which nobody can set back."""
        with file_errors(self.opened.path, "read"):
            found = os.fstat(self.file.fileno())
        return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"

    @contextmanager
    def window(self, window: Window) -> Iterator[int]:
        """Map some of its bytes."""
        with mapped(self.opened, window) as address:
            yield address


@dataclass(frozen=True)
class ObjectStore:
    """Objects below a URL of fsspec (https://filesystem-spec.readthedocs.io), such as s3://bucket/prefix.

    Access is configured as fsspec and the store's own library say: by their files and environment variables.
    """

    place: str
    writes_anywhere = False

    def _filesystem(self) -> tuple[Any, str]:
        try:
            import fsspec

            system, root = fsspec.core.url_to_fs(self.place)
        except ImportError as error:
            raise MissingLibraryError(
                f"{self.place}: fsspec is needed for URLs, with what it needs for this one ({error}); "
                "pip install 'deeplock-kernels[distributed]'"
            ) from error
        except ValueError as error:
            raise ParameterError(f"{self.place}: fsspec knows no such URL ({error})") from None
        return system, root.rstrip("/")

    def path(self, name: str) -> str:
        """Give the URL of a file."""
        return f"{self.place}/{name}"

    def _key(self, name: str) -> tuple[Any, str]:
        system, root = self._filesystem()
        return system, posixpath.join(root, name)

    def names(self) -> list[str]:
        """List all objects below, sorted; see `Store.names`.

        Raises
        ------
        ContainerError
            The name of one would lead out of a directory.
        FileAccessError
            They cannot be listed.
        """
        system, root = self._filesystem()
        with file_errors(self.place, "read"):
            system.invalidate_cache()
            try:
                found = system.find(root)
            except FileNotFoundError:
                return []
        return sorted(checked_name(name.removeprefix(root).lstrip("/"), self.path(name)) for name in found)

    @contextmanager
    def open(self, name: str) -> Iterator[ObjectReader]:
        """Open an object for reading; see `Store.open`."""
        system, key = self._key(name)
        with ExitStack() as stack:
            with file_errors(self.path(name), "read"):
                system.invalidate_cache()
                size = int(system.info(key)["size"])
                file = stack.enter_context(system.open(key, "rb", block_size=1 << 20))
            yield ObjectReader(self.path(name), key, system, file, size)

    @contextmanager
    def put(self, name: str, size_hint: int | None = None) -> Iterator[BinaryIO]:
        """Write an object, which is there when the block has ended well."""
        del size_hint
        system, key = self._key(name)
        path = self.path(name)
        with file_errors(path, "written"):
            file = system.open(key, "wb", autocommit=False)
        try:
            try:
                yield file
                file.close()
                file.commit()
            except OSError as error:
                if error.filename is None and not isinstance(error, FileAccessError):
                    raise access_error(path, "written", error) from error
                raise
        except BaseException:
            with suppress(Exception):
                if hasattr(file, "autocommit"):
                    file.closed = True  # or its end would send what there is
                    file.discard()
                else:  # as of memory://, whose files are there from the start
                    system.rm_file(key)
            raise

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""
        system, key = self._key(name)
        with file_errors(self.path(name), "removed"), suppress(FileNotFoundError):
            system.rm_file(key)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Do nothing: stores of objects have no locks in common."""
        yield


@dataclass(frozen=True)
class ObjectReader:
    """An object of a store that is open for reading."""

    path: str
    key: str
    system: Any
    file: BinaryIO
    size: int

    @property
    def version(self) -> str:
        """Its tag, or its size and times."""
        with file_errors(self.path, "read"):
            self.system.invalidate_cache()
            found = self.system.info(self.key)
        tag = found.get("ETag") or found.get("etag") or found.get("generation") or found.get("md5")
        times = [str(found.get(name)) for name in ("created", "mtime", "LastModified", "last_modified")]
        return f"{found['size']}:{tag or times}"

    @contextmanager
    def window(self, window: Window) -> Iterator[int]:
        """Fetch some of its bytes."""
        if window.begin == window.end:
            yield 0
            return
        with file_errors(self.path, "read"):
            found = self.system.cat_file(self.key, start=window.begin, end=window.end)
        if len(found) != window.end - window.begin:
            raise ContainerError(f"{self.path}: it became shorter while it was read; nothing was written")
        held = ctypes.c_char_p(found)  # the bytes themselves, not a copy
        yield ctypes.cast(held, ctypes.c_void_p).value or 0


def copy_file(source: Store, target: Store, name: str) -> None:
    """Copy a file byte for byte.

    Raises
    ------
    FileAccessError
        It cannot be read or written.
    """
    with source.open(name) as reader, target.put(name, reader.size) as output:
        _copy(reader.file, output, source.path(name))


def _copy(reader: BinaryIO, output: BinaryIO, path: str) -> None:
    while True:
        with file_errors(path, "read"):
            data = reader.read(_COPIED)
        if not data:
            return
        output.write(data)


def checked_name(name: str, where: str) -> str:
    """Give the name of a file that lies within its directory.

    Raises
    ------
    ContainerError
        It would lie elsewhere, or is no name.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name or "\\" in name:
        raise ContainerError(f"{where}: got the file name {name!a}, accepted are those within its directory")
    return name
