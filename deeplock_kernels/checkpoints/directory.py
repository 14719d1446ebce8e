"""What lies in a directory of shards, and whether it is what one lock has made: nothing is changed here."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from deeplock_kernels.checkpoints.formats.base import Layout, TensorEntry
from deeplock_kernels.checkpoints.formats.safetensors import SAFETENSORS
from deeplock_kernels.checkpoints.shard_index import INDEX_SUFFIX, ShardIndex, parse_index
from deeplock_kernels.checkpoints.stores import Store, store_at
from deeplock_kernels.checkpoints.streaming import Path, header_of
from deeplock_kernels.errors import (
    ContainerError,
    HeaderError,
    NotLockedError,
    ParameterError,
    TamperedHeaderError,
)
from deeplock_kernels.files import file_errors
from deeplock_kernels.header import LockHeader
from deeplock_kernels.named_lock import Key, NamedLock
from deeplock_kernels.sboxes import SBox

RUN_FILE = ".deeplock-run"
_OWN_PREFIX = ".deeplock-"  # of that file, and of those that are being written
_SUFFIX = ".safetensors"
_OF_MANY = re.compile(r"-\d+-of-0*([2-9]|1\d)\d*\.safetensors$")  # as shards are called


@dataclass(frozen=True)
class Shard:
    """One file of weights.

    Attributes
    ----------
    name
        Relative to the directory.
    layout
        What is where in it.
    version
        What changes with its content; see `stores`.
    """

    name: str
    layout: Layout
    version: str

    @property
    def data_start(self) -> int:
        """Where its data begin: all before that is the table, which changes with the lock header."""
        start: int = self.layout.detail.data_start
        return start

    @property
    def data_bytes(self) -> int:
        """The size of its data in bytes."""
        return self.layout.size - self.data_start


@dataclass(frozen=True)
class Checkpoint:
    """What lies in a directory of shards.

    Attributes
    ----------
    store
        Where.
    index_name, index
        The index; None where a single file needs none.
    shards
        By name, sorted.
    others
        The names of all other files.
    """

    store: Store
    index_name: str | None
    index: ShardIndex | None
    shards: Mapping[str, Shard]
    others: Sequence[str]

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """All tensors by name."""
        return {name: tensor for shard in self.shards.values() for name, tensor in shard.layout.tensors.items()}

    @property
    def data_bytes(self) -> int:
        """How many bytes progress is reported of."""
        return sum(shard.data_bytes for shard in self.shards.values())

    @property
    def is_locked(self) -> bool:
        """Whether anything in it carries a lock header."""
        shards = any(shard.layout.header is not None for shard in self.shards.values())
        return shards or (self.index is not None and self.index.header is not None)

    def header(self) -> LockHeader:
        """Give the lock header of the whole, which fits the headers of all shards.

        Raises
        ------
        NotLockedError
            It has none, or a run that locks it is not finished.
        TamperedHeaderError
            A shard, which the message names, is not of this lock.
        HeaderError
            A header is malformed or fits other tensors.
        """
        if self.index is None:
            (shard,) = self.shards.values()
            return header_of(shard.layout)
        if self.index.header is None:
            hint = "the run that locks it is not finished" if self.is_locked else "there is nothing to unlock"
            raise NotLockedError(f"{self.index.source}: it carries no lock header; {hint}")
        whole = LockHeader.from_json(self.index.header)
        listed, macs = set(whole.tensors), {}
        for shard in self.shards.values():
            found = _shard_header(shard)
            if found.salt != whole.salt:
                raise TamperedHeaderError(
                    f"{shard.layout.source}: it is from another checkpoint, or from another lock of this one"
                )
            if found.tensors != {name: whole.tensors.get(name) for name in found.tensors}:
                raise TamperedHeaderError(f"{shard.layout.source}: its lock header is not that of the index")
            listed -= found.tensors.keys()
            macs[shard.name] = (found.mac or b"").hex()
        if listed:
            raise HeaderError(f"{self.index.source}: the lock header lists {min(listed)!a}, which no shard has locked")
        return dataclasses.replace(whole, file=proved_by(self.index, macs))


def read_checkpoint(path: Path, argument: str = "src_dir", *, exclude: Sequence[str] = ()) -> Checkpoint:
    """Read what a directory holds; of the data only the sizes are looked at.

    Parameters
    ----------
    path
        A directory or a URL.
    argument
        The name of the caller's argument.
    exclude
        Glob patterns of files that are to be taken as not there.

    Raises
    ------
    ContainerError
        It has no file of weights, or an index that does not fit the shards, or a malformed file.
    FileAccessError, ParameterError
        A file cannot be read, or an argument is wrong.
    """
    store = store_at(path, argument)
    listed = isinstance(exclude, Iterable) and not isinstance(exclude, str)
    if not listed or not all(isinstance(pattern, str) for pattern in exclude):
        raise ParameterError("exclude: accepted are glob patterns of file names, relative to the directory")
    everything = store.names()
    names = [name for name in everything if not is_own(name)]
    for pattern in exclude:
        if not fnmatch.filter(names, pattern):
            raise ParameterError(f"exclude: got {pattern!a}, accepted are patterns of files that are there")
    names = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)]
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    weights = [name for name in names if name.endswith(_SUFFIX)]
    if not names:
        raise ContainerError(f"{store.place}: it is not there, or empty; accepted is a directory with a checkpoint")
    if len(indexes) > 1 or (indexes and "/" in indexes[0]):
        raise ContainerError(
            f"{store.place}: got the indexes {', '.join(indexes)}; accepted is one, in the directory itself; "
            "take each model on its own"
        )
    index = None
    if indexes:
        with store.open(indexes[0]) as reader, file_errors(store.path(indexes[0]), "read"):
            index = parse_index(reader.file, reader.size, store.path(indexes[0]))
        _check_names(store, index, weights)
    elif len(weights) != 1 or "/" in weights[0] or _OF_MANY.search(weights[0]):
        unfinished = "; the run that makes it is not finished" if RUN_FILE in everything else ""
        raise ContainerError(
            f"{store.place}: got {len(weights)} safetensors files and no index; accepted is one that holds all "
            f"tensors, in the directory itself, or an index that lists all{unfinished}"
        )
    shards = {name: _read_shard(store, name) for name in weights}
    if index is not None:
        _check_index(index, shards)
    others = [name for name in names if name not in shards and name not in indexes]
    return Checkpoint(store, indexes[0] if indexes else None, index, MappingProxyType(shards), others)


def checkpoint_at(path: str) -> str | None:
    """Give the directory or URL of a checkpoint that a path or its index file names, or None for another file."""
    if path.endswith(INDEX_SUFFIX):
        return posixpath.dirname(path) or "."
    return path if os.path.isdir(path) or "://" in path else None


def authenticate(
    checkpoint: Checkpoint, key: Key, *, sbox: SBox | None = None, needs_sbox: bool = True
) -> tuple[NamedLock, LockHeader]:
    """Give the lock of a locked checkpoint, and its header, all of whose macs are right.

    Raises
    ------
    WrongKeyError, TamperedHeaderError, NotLockedError, HeaderError, KeyTypeError, KeyFormatError, SBoxError
        As for `unlock_checkpoint`.
    """
    header = checkpoint.header()
    if header.schedule != "counter":
        raise HeaderError(
            f"{checkpoint.store.place}: it is locked with the schedule {header.schedule!r}, accepted is 'counter'; "
            "unlock_file takes its file"
        )
    lock = NamedLock.from_header(key, header, check=False, sbox=sbox, needs_sbox=needs_sbox)
    for shard in checkpoint.shards.values():
        try:
            lock.authenticate(header_of(shard.layout))
        except TamperedHeaderError as error:
            raise TamperedHeaderError(f"{shard.layout.source}: {error}") from None
    lock.authenticate(header)
    return lock, header


def is_own(name: str) -> bool:
    """Say whether a file is one that a run has while it is not done."""
    return posixpath.basename(name).startswith(_OWN_PREFIX)


def _shard_header(shard: Shard) -> LockHeader:
    try:
        return header_of(shard.layout)
    except NotLockedError:
        raise TamperedHeaderError(f"{shard.layout.source}: it is not locked, but the index says so") from None


def _read_shard(store: Store, name: str) -> Shard:
    source = store.path(name)
    with store.open(name) as reader:
        version = reader.version
        with file_errors(source, "read"):
            layout = SAFETENSORS.read(reader.file, reader.size, source)
    return Shard(name, layout, version)


def _check_names(store: Store, index: ShardIndex, weights: Collection[str]) -> None:
    expected = set(index.weight_map.values())
    missing, extra = sorted(expected.difference(weights)), sorted(set(weights) - expected)
    if missing or extra:
        said = [f"{store.path(name)} is missing" for name in missing[:3]]
        said += [f"{store.path(name)} is extra" for name in extra[:3]]
        more = max(len(missing) - 3, 0) + max(len(extra) - 3, 0)
        said += [f"and {more} more"] if more else []
        raise ContainerError(f"{index.source}: got other shards than it lists: {', '.join(said)}")


def _check_index(index: ShardIndex, shards: Mapping[str, Shard]) -> None:
    places: dict[str, str] = {}
    for shard in shards.values():
        for name in shard.layout.tensors:
            if name in places:
                raise ContainerError(f"{shard.layout.source}: it holds {name!a}, which {places[name]} holds too")
            if index.weight_map.get(name) != shard.name:
                said = f"places in {index.weight_map[name]}" if name in index.weight_map else "does not list"
                raise ContainerError(f"{shard.layout.source}: it holds {name!a}, which the index {said}")
            places[name] = shard.name
    for name, shard_name in index.weight_map.items():
        if name not in places:
            raise ContainerError(f"{index.source}: it places {name!a} in {shard_name}, which does not hold it")
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard.layout.tensors.values())
    if index.total_size is not None and index.total_size != total:
        raise ContainerError(f"{index.source}: it gives a total_size of {index.total_size}, the shards hold {total}")


def proved_by(index: ShardIndex, macs: Mapping[str, str]) -> str:
    """Give what the mac of the whole header covers beside it, as canonical JSON."""
    shards = json.dumps(dict(macs), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f'{{"index":{index.proved},"shards":{shards}}}'
