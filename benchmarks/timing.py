"""Does the time of a kernel depend on the key or the data? A t-test for each tier, after dudect.

`python -m benchmarks.timing [--measurements N] [--tier NAME]`

A kernel is timed on inputs of two classes in random order: always the same bytes, or new random ones (O. Reparaz,
J. Balasch and I. Verbauwhede, "Dude, is my code constant time?", DATE 2017). Welch's t says how sure it is that the
means of the two classes differ: above 10 the time depends on the input; below, maybe it does and this did not show it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks import environment
from deeplock_kernels import SBOXES
from deeplock_kernels.kernels.signatures import (
    RCON_START,
    RCON_WORDS,
    RECORDS,
    SEAL_KEYS_BYTES,
    TAG_BYTES,
    KernelName,
)
from deeplock_kernels.runtime.tiers import TIERS, Tier, kernel

CERTAIN = 10.0  # dudect's threshold
CROPS = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)  # interrupted measurements say nothing: only that many of the shortest count
BATCH = 5000
NBYTES = 256

Times = npt.NDArray[np.float64]


class Subject(NamedTuple):
    """Something to time.

    Attributes
    ----------
    call
        What is timed.
    memory
        Where the input of each measurement is put before.
    fixed
        The input of the first class; those of the second are as long, and random.
    """

    call: Callable[[], object]
    memory: ctypes.Array[ctypes.c_char]
    fixed: bytes


def _kernel(tier: Tier, name: KernelName, secret: str) -> Subject:
    data = ctypes.create_string_buffer(NBYTES)
    key = ctypes.create_string_buffer(secrets.token_bytes(48), 48)  # behind a key of 32 bytes, the counter's start
    rcon = ctypes.create_string_buffer(RCON_WORDS)
    box = ctypes.create_string_buffer(SBOXES["kuznyechik"].table, 256)
    sealing = ctypes.create_string_buffer(SEAL_KEYS_BYTES + TAG_BYTES)
    place, keys, rounds = ctypes.addressof(data), ctypes.addressof(key), ctypes.addressof(rcon) + RCON_START
    seal = ctypes.addressof(sealing)
    sealed = (ctypes.c_int64 * 8)(place, place, NBYTES, 0, keys, seal, NBYTES, seal + SEAL_KEYS_BYTES)
    arguments: tuple[int, ...]
    if name.operation == "seal_keys":
        arguments = seal, keys, 1, rounds
    elif name.operation in ("seal", "counter_sealed"):
        make = kernel(tier, KernelName("seal_keys"))
        make(RECORDS["seal_keys"].pack(seal, keys, 1, rounds))
        arguments = ctypes.addressof(sealed), 1
        if name.operation == "counter_sealed":
            arguments += rounds, ctypes.addressof(box)
    else:
        schedule = () if name.operation == "substitute" else (0, keys, rounds)
        arguments = place, place, NBYTES, *schedule, ctypes.addressof(box)
    record = RECORDS[name.operation].pack(*arguments)
    function, kept = kernel(tier, name), (data, key, rcon, box, sealing, sealed)

    def call(function: Callable[[bytes], None] = function, record: bytes = record, kept: object = kept) -> None:
        function(record)

    memory = {"key": key, "data": data}[secret]
    return Subject(call, memory, bytes(len(memory)))


QUESTIONS = {
    "counter: key": (KernelName("counter", 256, "identity", "lock"), "key"),
    "counter: data": (KernelName("counter", 256, "table", "lock"), "data"),
    "expansion: key": (KernelName("expansion", 256, "identity", "lock"), "key"),
    "substitution: data": (KernelName("substitute", form="table"), "data"),
    "sealed counter: key": (KernelName("counter_sealed", 256, "table", "lock"), "key"),
    "seal: data": (KernelName("seal"), "data"),
    "seal: key": (KernelName("seal_keys"), "key"),
}


def control() -> Subject:
    """Give what is known to depend on its input: a comparison that ends where the bytes differ."""
    memory = ctypes.create_string_buffer(1 << 14)
    wanted = bytes(len(memory))
    return Subject(lambda: memory.raw == wanted, memory, wanted)


def times_of(subject: Subject, measurements: int) -> tuple[Times, Times]:
    """Time both classes in random order, each time with the first-level cache full of something else."""
    call, memory, fixed = subject
    length, address = len(fixed), ctypes.addressof(memory)
    other = ctypes.create_string_buffer(1 << 18)
    generator = np.random.default_rng(secrets.randbits(128))
    taken, classes = np.empty(measurements), generator.integers(0, 2, measurements)
    clock, copy, fill = time.perf_counter_ns, ctypes.memmove, ctypes.memset
    collected = gc.isenabled()
    gc.disable()
    try:
        for first in range(0, measurements, BATCH):
            batch = classes[first : first + BATCH]
            inputs = generator.integers(0, 256, (len(batch), length), np.uint8)
            inputs[batch == 0] = np.frombuffer(fixed, np.uint8)
            begin = inputs.ctypes.data
            for i in range(len(batch)):
                copy(address, begin + i * length, length)
                fill(other, i & 255, len(other))
                before = clock()
                call()
                taken[first + i] = clock() - before
    finally:
        if collected:
            gc.enable()
    return taken[classes == 0], taken[classes == 1]


def welch(a: Times, b: Times) -> float:
    """Give Welch's t of two samples, 0 where they do not vary or are too few."""
    if min(len(a), len(b)) < 2:
        return 0.0
    error = a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)
    return float((a.mean() - b.mean()) / np.sqrt(error)) if error > 0 else 0.0


def largest_t(a: Times, b: Times) -> float:
    """Give the t that is furthest from zero of those of all measurements and of the shortest ones."""
    limits = np.quantile(np.concatenate([a, b]), CROPS)
    return max((welch(a[a <= limit], b[b <= limit]) for limit in limits), key=abs)


def verdict(t: float) -> str:
    """Say what a t means."""
    return "yes" if abs(t) > CERTAIN else "maybe"


def report(measurements: int, tiers: list[Tier]) -> str:
    """Measure everything and lay it out as a table."""
    lines = ["| tier | constant time | " + " | ".join(QUESTIONS) + " |", "| :-- | :-- |" + " --: |" * len(QUESTIONS)]
    for tier in tiers:
        found = [largest_t(*times_of(_kernel(tier, *question), measurements)) for question in QUESTIONS.values()]
        cells = " | ".join(f"{t:+.1f} {verdict(t)}" for t in found)
        lines.append(f"| {tier.name} | {'yes' if tier.constant_time else 'no'} | {cells} |")
    seen = largest_t(*times_of(control(), measurements))
    return "\n".join(
        [
            f"Measured on: {environment.line(environment.describe(quick=False))}.",
            "",
            *lines,
            "",
            f"{measurements} measurements each. Does the time depend on it: yes, or maybe, as no test can say no.",
            f"A comparison that ends at the first difference: {seen:+.1f} {verdict(seen)}.",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the report for the tiers of this machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timing", description=__doc__.splitlines()[0])
    parser.add_argument("--measurements", type=int, default=200_000, metavar="N", help="of each kernel")
    names = [tier.name for tier in TIERS if tier.supported]
    parser.add_argument("--tier", choices=names, action="append", help="only this one; may be repeated")
    chosen = parser.parse_args(arguments)
    wanted = chosen.tier or names
    print(report(chosen.measurements, [tier for tier in TIERS if tier.name in wanted]))


if __name__ == "__main__":
    main()
