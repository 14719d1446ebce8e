"""Files that are written whole or not at all.

The new content goes to a hidden file beside the target, is flushed to the device, and takes the target's name
in one rename (POSIX `rename`); then the directory is flushed. A reader, or the machine after a crash, finds
the old content or the new one, never a mixture.
"""

from __future__ import annotations

import errno
import fcntl
import io
import operator
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from deeplock_kernels.errors import FileAccessError, ParameterError, SameFileError

__all__ = [
    "access_error",
    "atomic_output",
    "begin_flush",
    "check_distinct",
    "check_regular",
    "file_errors",
    "flush_directory",
    "path_text",
    "read_at",
    "reserve",
    "write_at",
    "write_new",
]

_REASONS = {
    errno.ENOSPC: "there is no space left; free some, or choose a directory on another disk",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose a directory on another disk",
    errno.EFBIG: "it is larger than the disk or the process's limit; choose another disk or raise the limit",
    errno.ENOENT: "no such file or directory; check the spelling and that its directory exists",
    errno.EEXIST: "it exists already and is not overwritten; choose another name",
    errno.ENOTDIR: "a part of its path is no directory; check the spelling",
    errno.EISDIR: "it is a directory; give the path of a file",
    errno.EACCES: "permission denied; check the permissions of the file and its directory",
    errno.EPERM: "permission denied; check the owner and the permissions of the file and its directory",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.ELOOP: "its symbolic links lead in a circle; remove one of them",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


def path_text(path: str | os.PathLike[str], argument: str = "path") -> str:
    """Give a path as text.

    Parameters
    ----------
    path
        A str or an os.PathLike.
    argument
        The name of the caller's argument, for the message.

    Raises
    ------
    ParameterError
        If it is neither of them, is empty, or holds a NUL.
    """
    if not isinstance(path, (str, os.PathLike)):
        got = type(path).__name__
        raise ParameterError(f"{argument}: got {got}; a str or os.PathLike is accepted; pass a file's path")
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise ParameterError(
            f"{argument}: got {text!r}; a path is not empty and holds no NUL; pass the path of a file"
        )
    return text


def access_error(path: str, action: str, error: OSError, detail: str = "") -> FileAccessError:
    """Give the package's exception for an OSError.

    Parameters
    ----------
    path
        The path that the user knows; the message begins with it.
    action
        What failed, as in "cannot be {action}".
    error
        Its `errno` is kept.
    detail
        What else is known, for the end of the message.
    """
    reason = _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__
    translated = FileAccessError(f"{path}: cannot be {action}: {reason}{detail}")
    translated.errno = error.errno
    return translated


@contextmanager
def file_errors(path: str, action: str) -> Iterator[None]:
    """Turn an OSError of the block into FileAccessError.

    Parameters
    ----------
    path, action
        As for `access_error`.

    Raises
    ------
    FileAccessError
        In place of any OSError of the block; those of the package itself pass through.
    """
    try:
        yield
    except FileAccessError:
        raise
    except OSError as error:
        raise access_error(path, action, error) from error


def claim(descriptor: int, path: str, action: str) -> None:
    """Keep others of this package away from an open file or directory, until it is let go of or closed everywhere.

    Parameters
    ----------
    descriptor
        Of what is claimed.
    path, action
        As for `access_error`.

    Raises
    ------
    FileAccessError
        With errno EAGAIN: another run has it.
    OSError
        The file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        busy = OSError(errno.EAGAIN, "another run is at it; wait until that is over")
        raise access_error(path, action, busy) from error


def check_regular(path: str, action: str, status: os.stat_result) -> None:
    """Refuse what is not an ordinary file: a directory, a pipe, a device.

    Parameters
    ----------
    path, action
        As for `access_error`.
    status
        What `os.stat` says of it.

    Raises
    ------
    FileAccessError
        With errno EISDIR for a directory and EINVAL for the others.
    """
    if stat.S_ISDIR(status.st_mode):
        raise access_error(path, action, IsADirectoryError(errno.EISDIR, ""))
    if not stat.S_ISREG(status.st_mode):
        kind = "it is a device, a pipe or a socket; give the path of an ordinary file"
        raise access_error(path, action, OSError(errno.EINVAL, kind))


def check_distinct(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Refuse a destination that is the source under this or another name.

    Parameters
    ----------
    src, dst
        Two paths; neither has to exist.

    Raises
    ------
    SameFileError
        If they are one file, by the same path, another spelling of it, a symbolic link or a hard link.
    FileAccessError
        If `dst` is a directory or no ordinary file, or either path cannot be followed.
    ParameterError
        If one of them is not a path.
    """
    source_text, destination_text = path_text(src, "src"), path_text(dst, "dst")
    source_status = _status(source_text, "read")
    destination_status = _status(destination_text, "written")
    if source_status and destination_status:
        same = os.path.samestat(source_status, destination_status)
    else:
        same = os.path.realpath(source_text) == os.path.realpath(destination_text)
    if same:
        raise SameFileError(
            f"dst: got {destination_text}, which is the source {source_text}; "
            "another file is accepted; write to a new path, then rename"
        )
    if destination_status:
        check_regular(destination_text, "written", destination_status)


@contextmanager
def atomic_output(path: str | os.PathLike[str], *, size_hint: int | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing whose content takes its place only when the block ends well.

    If the block raises anything, KeyboardInterrupt included, the new file is removed and the target is as it
    was. A killed process may leave a file `.deeplock-*.tmp` beside the target. A target that exists keeps its
    permissions, and its owner where the process may give files away; a new one gets what `open` would give.
    Through a symbolic link the file behind it is replaced and the link stays. Another hard link to the target
    keeps the old content.

    Parameters
    ----------
    path
        The target. Its directory must exist.
    size_hint
        The number of bytes that will be written, if known: the space is checked, and set aside where the file
        system can do so, before the block starts. Writing fewer or more is no error.

    Yields
    ------
    BinaryIO
        An empty file, readable, writable and seekable; closing it early does no harm. Its `name` is the hidden
        file's path, for other processes that write to it.

    Raises
    ------
    FileAccessError
        If the file cannot be made, written, flushed or renamed. An OSError that names no file and leaves the
        block is taken for a failed write to this file; read other files under `file_errors`.
    ParameterError
        If `path` is not a path or `size_hint` is no non-negative integer.
    """
    text = path_text(path)
    size = _checked_size(size_hint)
    with file_errors(text, "written"):
        before = _status(text, "written")
        if before:
            check_regular(text, "written", before)
        elif not os.path.basename(text):
            raise IsADirectoryError(errno.EISDIR, "")
        target = os.path.realpath(text)
        directory = os.path.dirname(target)
        _check_space(text, directory, size)
    temporary = os.path.join(directory, f".deeplock-{secrets.token_hex(16)}.tmp")
    descriptor = -1
    try:
        with file_errors(text, "written"):
            mode = stat.S_IMODE(before.st_mode) & 0o777 if before else 0o666
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
            if before:
                with suppress(OSError):
                    os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, mode)
            reserve(descriptor, size)
        # The descriptor stays ours: a block that closes its file must not close what is flushed below.
        raw = io.FileIO(descriptor, "r+", closefd=False)
        raw.name = temporary
        file = io.BufferedRandom(raw)
        try:
            yield file
            file.close()
        except OSError as error:
            if error.filename is None and error.errno is not None and not isinstance(error, FileAccessError):
                raise access_error(text, "written", error) from error
            raise
        finally:
            with suppress(OSError):
                file.close()
        with file_errors(text, "written"):
            if size:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size)  # frees what was set aside in vain
            os.fsync(descriptor)
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)
    # The new file is in place by now, so that an error could undo nothing.
    with suppress(OSError):
        flush_directory(directory)


def write_new(path: str | os.PathLike[str], content: bytes, mode: int) -> None:
    """Write a small file that is not there yet, and flush it to the device.

    Parameters
    ----------
    path
        The target; what exists there, a symbolic link too, is never overwritten.
    content
        All that the file is to hold.
    mode
        Its permissions, before the umask.

    Raises
    ------
    FileAccessError
        The file exists or cannot be written; nothing was left behind.
    """
    text = path_text(path)
    with file_errors(text, "written"):
        descriptor = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
        except BaseException:
            os.unlink(text)
            raise


def _status(path: str, action: str) -> os.stat_result | None:
    """What the path leads to, or None if that does not exist."""
    with file_errors(path, action), suppress(FileNotFoundError):
        return os.stat(path)
    return None


def _checked_size(size_hint: int | None) -> int:
    if size_hint is None:
        return 0
    with suppress(TypeError):
        if not isinstance(size_hint, bool) and operator.index(size_hint) >= 0:
            return operator.index(size_hint)
    raise ParameterError(
        f"size_hint: got {size_hint!r}; an integer of at least 0 is accepted; pass a size in bytes, or None"
    )


def _check_space(path: str, directory: str, size: int) -> None:
    volume = os.statvfs(directory)
    free = volume.f_bavail * volume.f_frsize
    if volume.f_blocks and free < size:  # a file system that reports no blocks at all does not count them
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise access_error(path, "written", error, f" ({size} bytes are needed, {free} are free)")


def reserve(descriptor: int, size: int) -> None:
    """Set blocks aside without changing the file's length, where the file system can.

    `os.posix_fallocate` would make the file longer, and writes every block where the file system cannot.
    """
    if not size:
        return
    keep_size = 1  # FALLOC_FL_KEEP_SIZE of linux/falloc.h
    reason = _system_call("fallocate", descriptor, keep_size, (0, size))
    if reason in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(reason, os.strerror(reason))


def begin_flush(descriptor: int) -> None:
    """Have the system begin to write a file to its device, and do not wait: then flushing it takes little at the end.

    Parameters
    ----------
    descriptor
        Of the file, open for writing.
    """
    to_the_end, write = (0, 0), 2  # SYNC_FILE_RANGE_WRITE of linux/fs.h
    _system_call("sync_file_range", descriptor, to_the_end, write)  # an error is told by the flush at the end


def _system_call(name: str, *arguments: int | tuple[int, int]) -> int:
    """Call a function of the C library with ints and pairs of 64 bits, and give its errno, or 0 where there is none."""
    import ctypes

    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return 0
    values: list[Any] = []
    for argument in arguments:
        values += map(ctypes.c_int64, argument) if isinstance(argument, tuple) else [argument]
    return ctypes.get_errno() if function(*values) else 0


def flush_directory(directory: str) -> None:
    """Make durable which names there are in a directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, position: int, nbytes: int) -> bytearray:
    """Read bytes of a file; fewer than asked for only where the file ends."""
    data, done = bytearray(nbytes), 0
    with memoryview(data) as view:
        while done < nbytes and (count := os.preadv(descriptor, [view[done:]], position + done)):
            done += count
    del data[done:]
    return data


def write_at(descriptor: int, position: int, data: bytes | bytearray) -> None:
    """Write all of some bytes to a file, however few of them the system takes at once."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, position)
        position, rest = position + written, rest[written:]
