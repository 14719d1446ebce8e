"""Lock, unlock, verify and rekey checkpoints: directories with the weights in shards, and other files beside them.

A checkpoint has one lock: one salt and one check. The header of the whole, with the seals of all tensors, is the entry
`deeplock` of the index's `metadata`; its mac proves the rest of the index too, and which shards there are, by their
macs. So a shard that is missing, extra, exchanged, renamed or from another checkpoint is noticed and named. Each shard
carries that header cut down to its own tensors, with a mac over its own table: so it is a locked file like any other,
which `unlock_file` and all other functions take, and a worker elsewhere needs nothing but one shard. A directory with
a single file of weights and no index has the header in that file alone. Other files are copied byte for byte, and not
proved: they are what people edit.

The work is cut into tasks (see `tasks`), which run here or on any executor. A shard appears when it is complete and on
the disk, and the index last of all. While the work is not done, the target holds the file `.deeplock-run`: the salt of
the run, the state in which it found each file of the source, and a mac over both. A run that died is taken up by the
next call with the same arguments, which verifies what is there and keeps it. If the source has changed, the next call
begins anew with a fresh salt: no salt is ever used for two contents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import posixpath
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from functools import partial
from typing import Any

from deeplock_kernels.checkpoints import tasks
from deeplock_kernels.checkpoints.directory import (
    RUN_FILE,
    Checkpoint,
    Shard,
    authenticate,
    is_own,
    proved_by,
    read_checkpoint,
)
from deeplock_kernels.checkpoints.driving import Batch, Runner, Steps
from deeplock_kernels.checkpoints.formats import FORMATS
from deeplock_kernels.checkpoints.formats.safetensors import SAFETENSORS
from deeplock_kernels.checkpoints.shard_index import parse_index
from deeplock_kernels.checkpoints.stores import Store, check_apart, copy_file, store_at
from deeplock_kernels.checkpoints.streaming import Path, Progress, Window, windows
from deeplock_kernels.checkpoints.tasks import Outcome, Placed, Put, Task
from deeplock_kernels.errors import (
    AlreadyLockedError,
    ContainerError,
    FileAccessError,
    ResumeWarning,
    TamperedError,
    UnknownNameError,
    WrongKeyError,
    shown,
)
from deeplock_kernels.files import file_errors
from deeplock_kernels.header import LockHeader
from deeplock_kernels.keys import Hidden, key_in_line
from deeplock_kernels.locking import find_sbox
from deeplock_kernels.named_lock import Key, NamedLock, Seals
from deeplock_kernels.sboxes import SBox
from deeplock_kernels.tensors import Selection, select

_WEIGHTS = (  # endings of files that may hold weights which nobody would lock here
    *(".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".ot", ".pkl", ".pickle", ".joblib", ".msgpack", ".npy", ".npz"),
    *(".h5", ".hdf5", ".keras", ".pb", ".tflite", ".onnx", ".engine", ".gguf", ".ggml", ".mar", ".mlmodel", ".nemo"),
)


def lock_checkpoint(
    src_dir: Path,
    dst_dir: Path,
    key: Key,
    *,
    schedule: str = "counter",
    sbox: SBox | str = "aes",
    only: Selection = None,
    seal: bool = True,
    exclude: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = None,
    executor: Executor | None = None,
) -> LockHeader:
    """Lock the tensors of a checkpoint into a new directory.

    Parameters
    ----------
    src_dir
        A directory with safetensors shards and their index, or with one safetensors file; or a URL of fsspec. Other
        files in it are copied, but for those that look like weights, which are refused: they would stay readable.
    dst_dir
        A new or empty directory, or one that an interrupted run of this has left, which is then continued; or a URL.
        One run at a time may write there: another one is refused, where files can be locked, but not at a URL.
    key, sbox, only, seal
        As for `lock_tensors`.
    schedule
        "counter": the key stream of the expansion is one for all tensors and takes the master key, so it is none for
        shards.
    exclude
        Glob patterns of files that are to be left out, by their names relative to the directory.
    threads
        How many threads at most; with an executor by default 1 for each task.
    progress
        Called with the number of data bytes done since the last call, those kept from an interrupted run included.
    executor
        Runs the work, in tasks of about 256 MiB: a `concurrent.futures` pool of threads or processes, `get_executor()`
        of a Dask client, or another one. Tasks carry the keys of their tensors, and never the master key. Workers need
        source and target under the same paths or URLs. It is not shut down.

    Returns
    -------
    LockHeader
        That of the whole checkpoint.

    Raises
    ------
    ContainerError
        `src_dir` is no such checkpoint, its index does not fit its shards, or it changed meanwhile.
    AlreadyLockedError
        It is locked.
    SameFileError, FileAccessError
        One directory lies in the other, `dst_dir` holds something else or another run is at it, or a file cannot be
        read or written.
    KeyTypeError, KeyFormatError, UnknownNameError, TensorNameError, ParameterError
        Another argument is wrong.

    Warns
    -----
    ResumeWarning
        An interrupted run is not continued, for the source or the arguments are others.
    """
    if schedule != "counter":
        raise UnknownNameError(
            f"schedule: got {shown(schedule)}, accepted is 'counter': a checkpoint is locked in parts; "
            "lock_file takes the expansion"
        )
    lock = NamedLock.new(key, schedule, find_sbox(sbox))
    with Work(src_dir, dst_dir, threads, progress, executor, exclude) as work:
        checkpoint = work.source
        if checkpoint.is_locked:
            raise AlreadyLockedError(f"{checkpoint.store.place}: it is locked already; unlock it first")
        _refuse_secrets(checkpoint)
        work.lock_anew("lock", lock, key, select(checkpoint.tensors, only), seal)
        return work.finish()


def unlock_checkpoint(
    src_dir: Path,
    dst_dir: Path,
    key: Key,
    *,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
    progress: Progress = None,
    executor: Executor | None = None,
) -> None:
    """Unlock a locked checkpoint into a new directory, which holds what was locked, byte for byte.

    Seals are compared in the same pass, before a shard appears.

    Parameters
    ----------
    src_dir, dst_dir, threads, progress, executor
        As for `lock_checkpoint`.
    key, seal, sbox
        As for `unlock_tensors`.

    Raises
    ------
    WrongKeyError
        The key is another one; nothing was written.
    TamperedHeaderError, TamperedError
        The index, or the shard and tensor that the message names, was altered or is from elsewhere.
    NotLockedError
        It is not locked, or a run that locks it is not finished.
    ContainerError, HeaderError, SameFileError, FileAccessError, KeyTypeError, KeyFormatError, SBoxError, ParameterError
        As for `lock_checkpoint` and `unlock_file`.
    """
    with Work(src_dir, dst_dir, threads, progress, executor) as work:
        lock, _header = authenticate(work.source, key, sbox=sbox)
        work.unlock(lock, key, seal)
        work.finish()


def rekey_checkpoint(
    src_dir: Path,
    dst_dir: Path,
    old_key: Key,
    new_key: Key,
    *,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
    progress: Progress = None,
    executor: Executor | None = None,
) -> LockHeader:
    """Lock a locked checkpoint anew under another key, without unlocking it.

    Parameters
    ----------
    src_dir, dst_dir, threads, progress, executor
        As for `lock_checkpoint`.
    old_key, new_key, seal, sbox
        As for `rekey_tensors`.

    Returns
    -------
    LockHeader
        That of the whole checkpoint.

    Raises
    ------
    WrongKeyError, TamperedHeaderError, TamperedError, NotLockedError, ContainerError, HeaderError, SameFileError,
    FileAccessError, KeyTypeError, KeyFormatError, SBoxError, ParameterError
        As for `unlock_checkpoint`.
    """
    with Work(src_dir, dst_dir, threads, progress, executor) as work:
        old, header = authenticate(work.source, old_key, sbox=sbox)
        work.old = old
        new = NamedLock.new(new_key, "counter", old.box)
        work.lock_anew("rekey", new, new_key, list(header.tensors), seal)
        return work.finish()


def verify_checkpoint(
    src_dir: Path,
    key: Key,
    *,
    threads: int | None = None,
    progress: Progress = None,
    executor: Executor | None = None,
) -> LockHeader:
    """Say whether a locked checkpoint is as the lock left it: its index, its shards and their tensors.

    Parameters
    ----------
    src_dir
        A locked checkpoint; it is only read.
    key
        The master key that locked it.
    threads, progress, executor
        As for `lock_checkpoint`.

    Returns
    -------
    LockHeader
        That of the whole checkpoint.

    Raises
    ------
    NotSealedError
        It was locked without seals.
    WrongKeyError, TamperedHeaderError, TamperedError, NotLockedError, ContainerError, HeaderError, FileAccessError,
    KeyTypeError, KeyFormatError, ParameterError
        As for `unlock_checkpoint`.
    """
    checkpoint = read_checkpoint(src_dir)
    lock, header = authenticate(checkpoint, key, needs_sbox=False)
    lock.must_be_sealed()
    runner = Runner(executor, threads, progress)
    cut = partial(_cut, checkpoint.store, "seal", lock, None, None, frozenset(header.tensors), runner.threads)

    def verify(shard: Shard) -> Steps:
        outcomes = yield Batch(cut(shard, shard.name, shard.version), counted=True)
        _expect(lock, shard, _total(outcome.seals for outcome in outcomes))

    with lock:
        runner.drive(map(verify, checkpoint.shards.values()))
    return header


def _refuse_secrets(checkpoint: Checkpoint) -> None:
    """Refuse to copy what the lock is to keep: other weights, and keys."""
    store = checkpoint.store
    for name in checkpoint.others:
        with store.open(name) as reader, file_errors(store.path(name), "read"):
            start = Hidden(reader.file.read(66))
        weights = posixpath.splitext(name)[1].lower() in _WEIGHTS or any(known.matches(start) for known in FORMATS)
        if weights or key_in_line(start) is not None:
            raise ContainerError(
                f"{store.path(name)}: it may hold {'weights' if weights else 'a key'}, and would be copied as it is; "
                "accepted are other files beside the shards; leave it out by `exclude`, or take it away"
            )


def _expect(lock: NamedLock, shard: Shard, seals: Seals) -> None:
    try:
        lock.expect({name: seal for name, seal in seals.items() if lock.sealed(name)})
    except TamperedError as error:
        raise TamperedError(f"{shard.layout.source}: {error}") from None


def _total(parts: Iterable[Seals]) -> Seals:
    seals: Seals = {}
    for part in parts:
        for name, seal in part.items():
            seals[name] = seals.get(name, 0) ^ seal
    return seals


def _cut(
    store: Store,
    kind: str,
    lock: NamedLock,
    old: NamedLock | None,
    sbox: SBox | None,
    sealed: frozenset[str],
    threads: int,
    shard: Shard,
    name: str,
    version: str,
    *,
    shift: int = 0,
    target: Placed | Put | None = None,
    group: int | None = None,
) -> list[Task]:
    """Cut the work on a shard into tasks.

    Parameters
    ----------
    shard
        The shard as the source has it, which says where its tensors lie.
    name, version
        The file to be read, in which everything lies `shift` later.
    group
        How many bytes a task takes.
    """
    chosen = [
        dataclasses.replace(tensor, start=tensor.start + shift, stop=tensor.stop + shift)
        for tensor in shard.layout.tensors.values()
        if tensor.name in lock.header.tensors
    ]
    start = shard.data_start + shift
    found = []
    size = tasks.GROUP if group is None else group
    for window in [*windows(chosen, [(start, start + shard.data_bytes)], size)] or [Window(0, 0, [])]:
        parts = tuple(tensor for tensor, _low, _high in window.parts)
        names = [tensor.name for tensor in parts]
        seals = [one for one in names if one in sealed]
        if kind == "rekey":
            keys, old_keys = lock.keys_of(names, names), old.keys_of(names, seals) if old is not None else None
        else:
            keys, old_keys = lock.keys_of([] if kind == "seal" else names, seals), None
        begin = window.begin if window.end else start  # where there are no data at all
        found.append(
            Task(
                kind, store, name, version, begin, window.end or start, parts, sbox, keys, old_keys,
                frozenset(seals), threads, target,
            )
        )  # fmt: skip
    return found


class Work:
    """One run over a checkpoint: from a source into a target, which appears shard by shard and is resumed."""

    kind: str
    lock: NamedLock
    old: NamedLock | None = None
    sealed: frozenset[str]

    def __init__(
        self,
        src_dir: Path,
        dst_dir: Path,
        threads: int | None,
        progress: Progress,
        executor: Executor | None,
        exclude: Sequence[str] = (),
    ) -> None:
        self._runner = Runner(executor, threads, progress)
        self._flush = executor is not None
        self.target = store_at(dst_dir, "dst_dir")
        check_apart(store_at(src_dir, "src_dir"), self.target)
        self.source = read_checkpoint(src_dir, exclude=exclude)
        self._stack = ExitStack()
        self._seals: Seals = {}
        self._macs: dict[str, str] = {}
        self._resumed = False
        self._present: frozenset[str] = frozenset()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def lock_anew(self, kind: str, lock: NamedLock, key: Key, chosen: list[str], seal: bool) -> None:
        """Say that these tensors are to be locked or rekeyed, with this new lock unless a run can be continued."""
        self.kind, self._prove, self._seal = kind, True, seal
        tensors = self.source.tensors
        sizes = {name: (tensors[name].nbytes, None) for name in chosen}
        lock.cover(sizes)
        self._begin(lock, key, continued=lambda found: found.cover(sizes))
        whole = frozenset(chosen)
        self.sealed = whole if seal and kind == "lock" else frozenset()
        if self.old is not None:
            self._stack.enter_context(self.old)
            self.sealed = frozenset(name for name in chosen if self.old.sealed(name))

    def unlock(self, lock: NamedLock, key: Key, seal: bool) -> None:
        """Say that all that is locked is to be unlocked."""
        self.kind, self._prove, self._seal = "unlock", False, seal and any(map(lock.sealed, lock.header.tensors))
        self.sealed = frozenset(lock.header.tensors) if self._seal else frozenset()
        self._begin(lock, key, continued=None)

    def _begin(self, lock: NamedLock, key: Key, continued: Callable[[NamedLock], None] | None) -> None:
        """Take up the run that the target holds, or write down a new one, before any byte of a shard."""
        self._stack.enter_context(self.target.alone())
        names = self.target.names()
        kept = [name for name in names if not is_own(name)]
        box = lock.box
        if RUN_FILE not in names:
            if kept:
                raise FileAccessError(
                    f"{self.target.place}: it holds {kept[0]!a}; accepted is a new or empty directory, or one that an "
                    "interrupted run of this has left"
                )
        else:
            found, text = self._read_run()
            try:
                earlier = NamedLock.from_header(key, found, sbox=None if isinstance(found.sbox, str) else box)
            except WrongKeyError:
                raise WrongKeyError(
                    f"{self.target.place}: it holds an interrupted run with another key; give that one, or choose "
                    "another directory"
                ) from None
            same = text == self._plan(lock) and (continued is not None or found.salt == lock.header.salt)
            known = json.loads(text)
            foreign = sorted({*kept} - {*known["shards"], *known["files"], known["index"]})
            if foreign:
                raise FileAccessError(
                    f"{self.target.place}: it holds {foreign[0]!a}, which is not of the run that was interrupted; "
                    "remove it, or choose another directory"
                )
            if same:
                self._resumed, self._present = True, frozenset(kept)
                if continued is not None:
                    lock = earlier
                    continued(lock)
            else:
                warnings.warn(
                    f"{self.target.place}: the run that was interrupted there is not continued: the source or the "
                    "arguments are others now; it begins anew",
                    ResumeWarning,
                    stacklevel=4,
                )
                for name in sorted(kept, key=lambda name: name != known["index"]):
                    self.target.remove(name)
        self.lock = lock
        self._stack.enter_context(lock)
        for name in names:
            if is_own(name) and name != RUN_FILE:
                self.target.remove(name)  # half a file of a run that was killed
        if not self._resumed:
            text = self._plan(lock)
            run = lock.part([]).prove(None, text)
            with self.target.put(RUN_FILE) as output:
                output.write(json.dumps({"header": run.to_json(), "plan": json.loads(text)}).encode())

    def _read_run(self) -> tuple[LockHeader, str]:
        path = self.target.path(RUN_FILE)
        with self.target.open(RUN_FILE) as reader, file_errors(path, "read"):
            data = reader.file.read()
        try:
            run = json.loads(data)
            text = _canonical(run["plan"])
            return dataclasses.replace(LockHeader.from_json(run["header"]), file=text), text
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ContainerError(
                f"{path}: it is no record of an interrupted run; remove it and all else in its directory"
            ) from None

    def _plan(self, lock: NamedLock) -> str:
        """Give all that makes a run the same one, as canonical JSON."""
        source = self.source
        shards = {
            shard.name: [shard.version, hashlib.sha256(shard.layout.detail.text.encode()).hexdigest()]
            for shard in source.shards.values()
        }
        header = lock.header
        index = "" if source.index is None else source.index.text
        return _canonical(
            {
                "run": self.kind,
                "shards": shards,
                "files": list(source.others),
                "index": source.index_name,
                "index_digest": hashlib.sha256(index.encode()).hexdigest(),
                "tensors": hashlib.sha256(_canonical(sorted(header.tensors)).encode()).hexdigest(),
                "sealed": self._seal,
                "key": [header.schedule, header.key_bits],
                "sbox": header.sbox if isinstance(header.sbox, str) else dict(header.sbox),
            }
        )

    def finish(self) -> LockHeader:
        """Do it, and give the header of the whole."""
        source, target = self.source, self.target
        for name in source.others:
            copy_file(source.store, target, name)
        self._runner.drive(map(self._shard, source.shards.values()))
        header = self.lock.header
        if source.index is not None and source.index_name is not None:
            index = source.index
            if source.index.header is not None:
                data = source.index.without_header()
                if self.kind == "rekey":
                    index = parse_index(io.BytesIO(data), len(data), source.index.source)
            if self._prove:
                header = self.lock.prove(self._seals if self._seal else None, proved_by(index, self._macs))
                data = index.with_header(header.to_json())
            with target.put(source.index_name) as output:
                output.write(data)
        elif self._prove:
            (shard,) = source.shards.values()
            header = self.lock.prove(self._seals if self._seal else None, shard.layout.proved)
        target.remove(RUN_FILE)
        return header

    def start(self, shard: Shard, seals: Seals | None) -> bytes:
        """Give what comes before the data in the new shard."""
        text = None
        if self._prove:
            part = self.lock.part(shard.layout.tensors.keys())
            header = part.prove(seals, shard.layout.proved)
            self._macs[shard.name] = (header.mac or b"").hex()
            text = header.to_json()
        (edit,) = SAFETENSORS.edits(shard.layout, text, [])
        return edit.data

    def _checked(self, shard: Shard, outcomes: list[Outcome]) -> Seals:
        """Give the seals of the new shard, once those of the old one are compared."""
        seals = _total(outcome.seals for outcome in outcomes)
        if self.kind == "unlock" and self._seal:
            _expect(self.lock, shard, seals)
        if self.old is not None:
            _expect(self.old, shard, _total(outcome.old_seals for outcome in outcomes))
        return seals

    def _tasks(self, shard: Shard, target: Placed | Put | None, group: int | None = None) -> list[Task]:
        arguments = self.source.store, self.kind, self.lock, self.old, self.lock.box, self.sealed
        return _cut(*arguments, self._runner.threads, shard, shard.name, shard.version, target=target, group=group)

    def _shard(self, shard: Shard) -> Steps:
        """Make one shard: its tasks, and what is done between them."""
        names = [name for name in shard.layout.tensors if name in self.lock.header.tensors]
        nothing = dict.fromkeys(names, 0)
        if self._resumed and self._seal and (yield from self._kept(shard)):
            if self._runner.progress is not None:
                self._runner.progress(shard.data_bytes)
            return
        shift = len(self.start(shard, nothing if self._seal else None)) - shard.data_start
        if self.target.writes_anywhere:
            with self.target.put(shard.name, shard.layout.size + shift) as output:
                outcomes = yield Batch(self._tasks(shard, Placed(output.name, shift, self._flush)), counted=True)
                seals = self._checked(shard, outcomes)
                output.seek(0)
                output.write(self.start(shard, seals if self._seal else None))
        else:
            outcomes = yield Batch(self._tasks(shard, None), counted=False)
            seals = self._checked(shard, outcomes)
            start = self.start(shard, seals if self._seal else None)
            put = Put(self.target, shard.name, start)
            outcomes = yield Batch(self._tasks(shard, put, max(shard.layout.size, 1)), counted=True)
            if self._checked(shard, outcomes) != seals:
                self.target.remove(shard.name)
                raise ContainerError(f"{shard.layout.source}: it changed while it was read; begin anew")
        self._seals |= seals

    def _kept(self, shard: Shard) -> Generator[Batch, list[Outcome], bool]:
        """Say whether the new shard is there already, as this run would make it.

        What it should be is made of the seals that its bytes have, or would have if they were locked.
        """
        names = [name for name in shard.layout.tensors if name in self.lock.header.tensors]
        size = len(self.start(shard, dict.fromkeys(names, 0)))
        shift = size - shard.data_start
        if shard.name not in self._present:
            return False
        with self.target.open(shard.name) as reader:
            if reader.size != shard.layout.size + shift:
                return False
            version = reader.version
            with file_errors(self.target.path(shard.name), "read"):
                start = reader.file.read(size)
        kind = "lock" if self.kind == "unlock" else "seal"
        cut = _cut(
            self.target, kind, self.lock, None, self.lock.box, frozenset(names), self._runner.threads,
            shard, shard.name, version, shift=shift,
        )  # fmt: skip
        seals = _total(outcome.seals for outcome in (yield Batch(cut, counted=False)))
        if self.kind == "unlock":
            try:
                _expect(self.lock, shard, seals)
            except TamperedError:
                return False
        if start != self.start(shard, seals):
            return False
        self._seals |= seals
        return True


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

