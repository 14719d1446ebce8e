"""Every exception of the package, one class a cause.

Each derives from `DeepLockError` and from the builtin that a Python user would expect. A message names the argument
first, then what was got, what is accepted, and one hint. No message ever holds key or weight bytes.
"""

from __future__ import annotations

import re

__all__ = [
    "AlreadyLockedError",
    "BufferLayoutError",
    "BufferTypeError",
    "ClosedFileError",
    "ContainerError",
    "DeepLockError",
    "ExposedKeyWarning",
    "FileAccessError",
    "HeaderError",
    "InterruptedLockError",
    "KernelError",
    "KeyFormatError",
    "KeySourceError",
    "KeyTypeError",
    "KeyWipedError",
    "LayerError",
    "MissingLibraryError",
    "NotLockedError",
    "NotSealedError",
    "OverlapError",
    "ParameterError",
    "ReadOnlyError",
    "ResumeWarning",
    "SBoxError",
    "SameFileError",
    "SelfTestError",
    "SizeMismatchError",
    "TamperedError",
    "TamperedHeaderError",
    "TensorIndexError",
    "TensorNameError",
    "UnknownNameError",
    "UnsupportedTierError",
    "WrongKeyError",
]


class DeepLockError(Exception):
    """Base of every exception that this package raises on purpose."""


class KeyTypeError(DeepLockError, TypeError):
    """A key is not bytes or a MasterKey: pass raw bytes, or MasterKey.from_hex / from_file."""


class KeyFormatError(DeepLockError, ValueError):
    """A key, iv or salt has the wrong length or spelling: see the accepted lengths in the message."""


class KeySourceError(DeepLockError, RuntimeError):
    """A key or passphrase could not be had from where it is kept: a variable, a command, a file, a terminal."""


class ExposedKeyWarning(UserWarning):
    """The file of a key or passphrase can be read by others than its owner: take the permission away."""


class KeyWipedError(DeepLockError, ValueError):
    """A MasterKey or schedule was used after wipe(): build it again from its source."""


class WrongKeyError(DeepLockError, ValueError):
    """The key is not the one that locked these tensors, or that wrapped this key; nothing was changed."""


class TamperedError(DeepLockError, ValueError):
    """A tensor's locked bytes are not those that were sealed; what was to be unlocked in place was not changed."""


class TamperedHeaderError(TamperedError):
    """A header, or the table of its file, is not the one that was locked, or carries no mac; nothing was changed."""


class ParameterError(DeepLockError, ValueError):
    """A scalar argument (offset, size, count, variable) is out of its range."""


class UnknownNameError(DeepLockError, KeyError, ValueError):
    """A schedule, S-Box or tier has no such name: choose one of those listed in the message."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes


class SBoxError(DeepLockError, ValueError):
    """A table is not a permutation of 0..255, so it cannot be undone."""


class BufferTypeError(DeepLockError, TypeError):
    """An argument is not memory (or holds Python objects): pass an array, a tensor on the CPU or a buffer."""


class BufferLayoutError(DeepLockError, ValueError):
    """Memory is not one contiguous block in C order: make it contiguous first."""


class ReadOnlyError(DeepLockError, ValueError):
    """Memory that would be written is read-only: pass a writable `out`, or leave `out` away."""


class SizeMismatchError(DeepLockError, ValueError):
    """Two buffers that must have the same number of bytes do not."""


class OverlapError(DeepLockError, ValueError):
    """Two buffers share part of their memory: only the same range, or separate ranges, are accepted."""


class TensorNameError(DeepLockError, KeyError, ValueError):
    """A tensor name is missing from the tensors or the header, or is not a name."""

    __str__ = Exception.__str__


class TensorIndexError(DeepLockError, IndexError, ValueError):
    """What was asked for of a tensor is outside its shape, or no integer, slice, Ellipsis or None."""


class ClosedFileError(DeepLockError, ValueError):
    """A file of open_locked was used after its end: open it again."""


class HeaderError(DeepLockError, ValueError):
    """A lock header is malformed or does not fit the tensors it is used with."""


class ContainerError(DeepLockError, ValueError):
    """A file is not a well-formed file of its format, or is one that cannot be locked: the message says why."""


class AlreadyLockedError(DeepLockError, ValueError):
    """The file carries a lock header already: unlock it first."""


class NotLockedError(DeepLockError, ValueError):
    """The file carries no lock header: there is nothing to unlock."""


class InterruptedLockError(DeepLockError, ValueError):
    """A file is neither old nor new, since a change of it in place was interrupted: recover it first."""


class NotSealedError(DeepLockError, ValueError):
    """The tensors were locked without seals: there is nothing to verify them by."""


class SameFileError(DeepLockError, ValueError):
    """Source and destination are the same file: write to another path."""


class FileAccessError(DeepLockError, OSError):
    """A file or directory could not be read, written or made; `errno` says why, nothing was left behind."""


class ResumeWarning(UserWarning):
    """An interrupted run over a checkpoint is not continued but begins anew, since its source or arguments changed."""


class UnsupportedTierError(DeepLockError, RuntimeError):
    """The processor (or the way Numba is configured) cannot run the tier asked for, or not in constant time."""


class SelfTestError(DeepLockError, RuntimeError):
    """A kernel gave a wrong known answer on its first use, so it is not used."""


class KernelError(DeepLockError, RuntimeError):
    """A kernel could not be compiled or loaded."""


class LayerError(DeepLockError, RuntimeError):
    """A locked tensor of a model is used while the layer that owns it does not run: see the message for a way."""


class MissingLibraryError(DeepLockError, ImportError):
    """An optional library is not installed: the message names the extra of this package that brings it."""


def shown(value: object) -> str:
    """Give a refused argument for a message, and only its type where it may be a key or weights."""
    plain = value is None or isinstance(value, (bool, int, float))
    plain = plain or (isinstance(value, str) and not re.search("[0-9A-Fa-f]{32}", value))
    return repr(value) if plain else type(value).__name__
