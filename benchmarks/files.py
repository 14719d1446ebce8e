"""Loading from locked files beside the safetensors library, and locking files beside `cp`, pair by pair.

`python -m benchmarks.files [--mib N] [--checkpoint-mib N] [--rounds N] [--folder DIR]`

All files lie in one folder and in the page cache. A ratio is taken from each round, of two measurements that follow
each other; the report gives the median, the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import safetensors
import safetensors.numpy

from benchmarks import environment, processes
from benchmarks.results import Spread, seconds_text, size_text
from benchmarks.rounds import repeat
from deeplock_kernels import load_file, lock_checkpoint, lock_file, open_locked
from deeplock_kernels.checkpoints import streaming

KEY = secrets.token_bytes(32)
ROW_TENSOR = "layer 0"
TENSOR_BYTES = 64 << 20
SHARDS = 6
SIDE = 4096  # elements of a row of such a tensor, as float32: 16 KiB

_PEAK = """
import sys, time
plain, locked, key = sys.argv[1:]
{imports}
begin = time.perf_counter()
loaded = {load}
seconds = time.perf_counter() - begin
"""


class Pair(NamedTuple):
    """Something of ours and what it is compared with.

    Attributes
    ----------
    name, other
        What they are called.
    ours, theirs
        The work.
    repeats
        How often the work is done in a round.
    before
        What comes before each of them, unmeasured.
    """

    name: str
    other: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    repeats: int = 1
    before: Callable[[], object] = lambda: None


class Files(NamedTuple):
    """The files of a run, in one folder."""

    folder: Path
    plain: Path
    locked: Path
    nbytes: int


def make(folder: Path, tensors: int, tensor_bytes: int = TENSOR_BYTES) -> Files:
    """Write a model of equal tensors of random bytes, and lock it."""
    plain, locked = folder / "plain.safetensors", folder / "locked.safetensors"
    block = np.frombuffer(secrets.token_bytes(tensor_bytes), np.uint8).copy()
    block[3::4] &= 0x3F  # no NaN: frameworks may not keep their bits
    weights = block.view(np.float32).reshape(-1, min(SIDE, tensor_bytes // 4))
    safetensors.numpy.save_file({f"layer {i}": weights for i in range(tensors)}, plain)
    lock_file(plain, locked, KEY)
    return Files(folder, plain, locked, tensors * tensor_bytes)


def loads(files: Files) -> list[Pair]:
    """Load everything. PyTorch's own load maps the file and reads nothing, so here all bytes are copied out of it."""
    pairs = [
        Pair(
            "load_file, NumPy",
            "safetensors.numpy.load_file",
            lambda: load_file(files.locked, KEY),
            lambda: safetensors.numpy.load_file(files.plain),
        )
    ]
    try:
        import safetensors.torch as theirs
    except ImportError:
        return pairs

    def read() -> dict[str, Any]:
        return {name: tensor.clone() for name, tensor in theirs.load_file(files.plain).items()}

    return [
        *pairs,
        Pair(
            "load_file, PyTorch",
            "safetensors.torch.load_file, and each tensor cloned",
            lambda: load_file(files.locked, KEY, framework="pt"),
            read,
        ),
    ]


@contextmanager
def rows(files: Files) -> Iterator[list[Pair]]:
    """Load single rows in random order, from a file that is open and from one that is opened for it."""
    places = random.Random(1)

    with safetensors.safe_open(files.plain, "np") as file:
        count = file.get_slice(ROW_TENSOR).get_shape()[0]

    def ours() -> object:
        with open_locked(files.locked, KEY) as file:
            return file.get_slice(ROW_TENSOR)[places.randrange(count)]

    def theirs() -> object:
        with safetensors.safe_open(files.plain, "np") as file:
            return file.get_slice(ROW_TENSOR)[places.randrange(count)]

    with open_locked(files.locked, KEY) as locked, safetensors.safe_open(files.plain, "np") as plain:
        mine, other = locked.get_slice(ROW_TENSOR), plain.get_slice(ROW_TENSOR)
        yield [
            Pair(
                "a row of an open file",
                "the same of safe_open",
                lambda: mine[places.randrange(count)],
                lambda: other[places.randrange(count)],
                repeats=500,
            ),
            Pair("a row, with opening the file", "the same of safe_open", ours, theirs, repeats=50),
        ]


def locks(files: Files) -> list[Pair]:
    """Lock a file into a new one. lock_file flushes it to the device and `cp` does not: so there is `sync` as well."""
    target = files.folder / "target"

    def clear() -> None:
        target.unlink(missing_ok=True)
        os.sync()

    def ours() -> None:
        lock_file(files.plain, target, KEY)

    def copy() -> None:
        subprocess.run(["cp", files.plain, target], check=True)

    def copy_and_flush() -> None:
        copy()
        subprocess.run(["sync", target], check=True)

    def unflushed() -> None:
        with mock.patch.object(os, "fsync"), mock.patch.object(streaming, "begin_flush"):
            ours()

    return [
        Pair("lock_file", "cp, then sync of the file", ours, copy_and_flush, before=clear),
        Pair("lock_file", "cp, which flushes nothing", ours, copy, before=clear),
        Pair("lock_file without its flush", "cp, which flushes nothing", unflushed, copy, before=clear),
    ]


def make_checkpoint(folder: Path, nbytes: int) -> Path:
    """Write a checkpoint of equal shards of random bytes, of about this size."""
    made, weight_map = folder / "checkpoint", {}
    made.mkdir()
    tensor = np.frombuffer(secrets.token_bytes(min(nbytes // SHARDS, TENSOR_BYTES)), np.uint8)
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {f"layer {shard}.{i}": tensor for i in range(nbytes // SHARDS // tensor.nbytes)}
        safetensors.numpy.save_file(tensors, made / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": len(weight_map) * tensor.nbytes}, "weight_map": weight_map}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


def lock_checkpoints(source: Path) -> list[Pair]:
    """Lock a checkpoint into a new directory, which flushes it to the device, and so does what it is beside."""
    target = source.with_name("copy")

    def clear() -> None:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()

    def theirs() -> None:
        subprocess.run(["cp", "-r", source, target], check=True)
        os.sync()

    def ours() -> None:
        lock_checkpoint(source, target, KEY)

    return [Pair("lock_checkpoint", "cp -r, then sync", ours, theirs, before=clear)]


def measure(pair: Pair, rounds: int) -> tuple[list[float], list[float]]:
    """Give the seconds of ours and theirs in each round, after one that warms; who is first changes each time."""
    found: dict[Callable[[], object], list[float]] = {pair.ours: [], pair.theirs: []}
    for turn in range(rounds + 1):
        for work in (pair.ours, pair.theirs)[:: 1 if turn % 2 else -1]:
            pair.before()
            begin = time.perf_counter()
            repeat(work, pair.repeats)
            found[work].append((time.perf_counter() - begin) / pair.repeats)
    return found[pair.ours][1:], found[pair.theirs][1:]


def peaks(files: Files, checkpoint: Path) -> dict[str, int]:
    """Give the peak memory of processes that load or lock everything, without what their imports alone take."""
    targets = files.folder / "targets"
    targets.mkdir(exist_ok=True)
    programs = {
        "load_file, NumPy": (
            "import deeplock_kernels, numpy",
            "deeplock_kernels.load_file(locked, bytes.fromhex(key))",
        ),
        "safetensors.numpy.load_file": ("import safetensors.numpy", "safetensors.numpy.load_file(plain)"),
        "lock_checkpoint": (
            "import deeplock_kernels, tempfile",
            f"deeplock_kernels.lock_checkpoint({str(checkpoint)!r}, tempfile.mkdtemp(dir={str(targets)!r}), "
            "bytes.fromhex(key))",
        ),
    }
    found = {}
    for name, (imports, load) in programs.items():
        both = [
            processes.run(
                processes.program(_PEAK.format(imports=imports, load=work)),
                processes.variables(files.folder / "cache"),
                files.folder,
                [str(files.plain), str(files.locked), KEY.hex()],
            )["peak_bytes"]
            for work in ("None", load, load)  # the first load may have to compile kernels
        ]
        found[name] = both[2] - both[0]
        shutil.rmtree(targets)
        targets.mkdir()
    return found


def report(files: Files, checkpoint: Path, rounds: int) -> str:
    """Measure everything and lay it out as Markdown."""
    lines = [
        f"Measured on: {environment.line(environment.describe(quick=False))}.",
        "",
        f"A file of {size_text(files.nbytes)}, a checkpoint of "
        f"{size_text(sum(path.stat().st_size for path in checkpoint.iterdir()))} in {SHARDS} shards, {rounds} rounds.",
        "",
        "| ours | beside | ours takes | theirs takes | ours / theirs: median [lowest to highest] |",
        "| :-- | :-- | --: | --: | --: |",
    ]
    with rows(files) as of_rows:
        for pair in [*loads(files), *of_rows, *locks(files), *lock_checkpoints(checkpoint)]:
            ours, theirs = measure(pair, rounds)
            ratio = Spread.of([mine / other for mine, other in zip(ours, theirs, strict=True)])
            times = [seconds_text(Spread.of(seconds).middle) for seconds in (ours, theirs)]
            lines.append(
                f"| {pair.name} | {pair.other} | {times[0]} | {times[1]} | "
                f"{ratio.middle:.2f} [{ratio.low:.2f} to {ratio.high:.2f}] |"
            )
    lines += ["", "| peak memory of a process, beyond its imports | |", "| :-- | --: |"]
    lines += [f"| {name} | {size_text(nbytes)} |" for name, nbytes in peaks(files, checkpoint).items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.files", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=512, help="the size of the file (default 512)")
    parser.add_argument("--checkpoint-mib", type=int, default=512, help="that of the checkpoint (default 512)")
    parser.add_argument("--rounds", type=int, default=9, help="how often each pair is measured (default 9)")
    parser.add_argument("--folder", default=None, help="where, if not in the folder for temporary files")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        nbytes = min(chosen.mib << 20, TENSOR_BYTES)
        made = make(Path(folder), max(1, (chosen.mib << 20) // nbytes), nbytes)
        print(report(made, make_checkpoint(Path(folder), chosen.checkpoint_mib << 20), chosen.rounds))


if __name__ == "__main__":
    main()
