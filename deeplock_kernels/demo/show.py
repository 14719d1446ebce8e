"""`deeplock demo`: a real network with and without its key, then the speed of locking on this machine."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator

from deeplock_kernels import measure
from deeplock_kernels.checkpoints.streaming import lock_file, unlock_file
from deeplock_kernels.demo.network import HELD_OUT_FILE, WEIGHTS_FILE, accuracy, load_tensors
from deeplock_kernels.keys import MasterKey
from deeplock_kernels.runtime.pool import resolve_threads
from deeplock_kernels.runtime.tiers import active_tier

_SIZES = {"1 MiB": 1 << 20, "16 MiB": 16 << 20, "64 MiB": 64 << 20, "256 MiB": 256 << 20}
_SHOWN = (measure.COPY, measure.LIMIT, "lock, counter 128, aes", "unlock, counter 128, aes")


def show(*, quick: bool = False) -> Iterator[str]:
    """Give both tables, line by line.

    Parameters
    ----------
    quick
        Whether to leave out the sizes above 16 MiB.
    """
    yield from _scores()
    yield ""
    yield from _speeds(quick)


def _scores() -> Iterator[str]:
    held_out = load_tensors(HELD_OUT_FILE)
    secret = os.urandom(32)
    flipped = bytes((secret[0] ^ 1,)) + secret[1:]
    right, wrong = MasterKey.from_bytes(secret), MasterKey.generate()

    with tempfile.TemporaryDirectory(prefix="deeplock-demo-") as folder:
        original, locked = str(WEIGHTS_FILE), os.path.join(folder, "locked.safetensors")

        def row(label: str, path: str) -> str:
            return f"  {label:62}{accuracy(load_tensors(path), **held_out):8.1%}"

        def unlocked(key: MasterKey) -> str:
            path = os.path.join(folder, "unlocked.safetensors")
            unlock_file(locked, path, key, check=False)
            return path

        yield f"A network that reads handwritten digits ({os.path.getsize(original):,} bytes of weights),"
        yield f"scored on {len(held_out['labels'])} images that it never saw; guessing scores about 10 %.\n"
        yield f"  {'weights':62}{'score':>8}"
        yield row("as trained", original)
        header = lock_file(original, locked, right)
        yield row(f"locked ({len(header.tensors)} tensors; the file still loads everywhere)", locked)
        yield row("unlocked with another key", unlocked(wrong))
        yield row("unlocked with the right key but for one bit", unlocked(MasterKey.from_bytes(flipped)))
        path = unlocked(right)
        with open(path, "rb") as restored, open(original, "rb") as before:
            same = restored.read() == before.read()
        verdict = "every byte of the file is back" if same else "THE FILE DIFFERS FROM THE ORIGINAL"
        yield row(f"unlocked with the right key ({verdict})", path)


def _speeds(quick: bool) -> Iterator[str]:
    threads = resolve_threads(None)
    yield "Speed on this machine, in place, GB/s (median), beside what its memory allows:"
    yield f"  {measure.environment(threads)}\n"
    yield f"  {'size':>9}{'copy':>9}{'XOR':>9}{'lock':>9}{'unlock':>9}   lock / XOR"
    for label, nbytes in _SIZES.items():
        if quick and nbytes > 16 << 20:
            continue
        data, copy = measure.aligned(nbytes), measure.aligned(nbytes)
        work = measure.limits(data, copy, threads) | measure.locks(data, copy, threads)
        rounds = 11 if active_tier().constant_time else 3
        figures = measure.measure({name: work[name] for name in _SHOWN}, nbytes, rounds)
        speeds = "".join(f"{statistics.median(figures[name].speed):9.1f}" for name in _SHOWN)
        yield f"  {label:>9}{speeds}{statistics.median(figures[_SHOWN[2]].ratio):13.2f}"
    yield "\nXOR reads and writes every byte and computes nothing: no lock in memory can be faster."
