"""Measure locking against what the machine's memory allows, as ratios within one run.

The limits are an in-place XOR with a constant, by the tier's widest vectors and on the same threads, and a copy by
the same threads. All work is measured in turn, round after round, so that a machine that changes its speed changes
all figures alike.
"""

from __future__ import annotations

import ctypes
import os
import platform
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from deeplock_kernels.kernels.signatures import RCON_START, RCON_WORDS, RECORDS, KernelName, segment_bytes
from deeplock_kernels.locking import lock, substitute, unlock
from deeplock_kernels.named_lock import NamedLock
from deeplock_kernels.pieces import Range
from deeplock_kernels.rekeying import rekey
from deeplock_kernels.runtime.pool import Call, run
from deeplock_kernels.runtime.tiers import active_tier, kernel
from deeplock_kernels.sboxes import AES
from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule
from deeplock_kernels.tensors import lock_tensors
from deeplock_kernels.transform import IDENTITY, Transform

Work = Callable[[], object]
LIMIT = "XOR in place (the limit)"
READ = "XOR sum (reading alone)"
COPY = "copy (memcpy)"
BEST_COPY = "copy past the caches"


class Figure(NamedTuple):
    """One kind of work, measured.

    Attributes
    ----------
    speed
        GB/s of each round, 10^9 bytes.
    ratio
        Each round's speed divided by the limit's in the same round.
    """

    speed: list[float]
    ratio: list[float]

    def row(self) -> str:
        """Give median, range and ratio as text."""
        speed, ratio = self.speed, self.ratio
        return (
            f"{statistics.median(speed):7.2f} GB/s  [{min(speed):6.2f} to {max(speed):6.2f}]"
            f"  {statistics.median(ratio):5.2f} of the limit"
        )


def measure(work: Mapping[str, Work], nbytes: int, rounds: int, limit: str = LIMIT) -> dict[str, Figure]:
    """Run each kind of work once a round and give its speed and its ratio to the limit, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for function in work.values():
        function()
    for _ in range(rounds):
        for name, function in work.items():
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    return {
        name: Figure(
            [nbytes / second / 1e9 for second in taken],
            [base / second for base, second in zip(seconds[limit], taken, strict=True)],
        )
        for name, taken in seconds.items()
    }


def aligned(nbytes: int) -> Any:
    """Make a buffer of random bytes that starts at a random place of a page, a multiple of 64."""
    block = np.empty(nbytes + 8192, np.uint8)
    start = -block.ctypes.data % 4096 + 64 * secrets.randbelow(64)
    data = block[start : start + nbytes]
    data[:] = (
        np.frombuffer(secrets.token_bytes(4096), np.uint8)[np.arange(nbytes) % 4096] if nbytes < 4096 else 0
    )
    if nbytes >= 4096:
        data[: nbytes // 4096 * 4096].reshape(-1, 4096)[:] = np.frombuffer(
            secrets.token_bytes(4096), np.uint8
        )
    return data


def limits(data: Any, copy: Any, threads: int) -> dict[str, Work]:
    """Give the XOR and the copies that locking is compared with, on the same threads in the same pieces."""
    tier = active_tier()
    xor = kernel(tier, KernelName("xor"))
    address, target, nbytes = data.ctypes.data, copy.ctypes.data, data.nbytes
    piece = Transform(IDENTITY, "lock").piece(nbytes, threads)
    pieces = [(i, min(piece, nbytes - i)) for i in range(0, nbytes, piece)]
    xors = [Call(xor, (RECORDS["xor"].pack(address + i, n, 0x5A),)) for i, n in pieces]
    memmove: Any = ctypes.memmove
    copies = [Call(memmove, (target + i, address + i, n)) for i, n in pieces]
    total = ctypes.create_string_buffer(64 * len(pieces))
    read, place = kernel(tier, KernelName("xor_sum")), ctypes.addressof(total)
    reads = [
        Call(read, (RECORDS["xor_sum"].pack(place + 64 * number, address + i, n),))
        for number, (i, n) in enumerate(pieces)
    ]
    past = kernel(tier, KernelName("copy_past_cache"))
    edge = -target % 64  # it takes an aligned target
    passing = [
        Call(past, (RECORDS["copy_past_cache"].pack(target + i + edge, address + i, n - 64),)) for i, n in pieces
    ]
    return {
        LIMIT: lambda: run(xors, threads),
        READ: lambda: run(reads, threads) if total else None,
        COPY: lambda: run(copies, threads),
        BEST_COPY: lambda: run(passing, threads),
    }


def locks(data: Any, copy: Any, threads: int) -> dict[str, Work]:
    """Give the kinds of locking that are measured, in place but for one."""
    counter_128 = CounterSchedule(bytes(range(16)), bytes(16))
    counter_256 = CounterSchedule(bytes(range(32)), bytes(16))
    indexed = ExpansionSchedule(bytes(range(16)))

    def first_pass() -> None:
        lock(data, ExpansionSchedule(bytes(range(16))), out=data, threads=threads)

    tensors = {"weights": data}
    sealer = NamedLock.from_header(bytes(16), lock_tensors({"weights": np.zeros(1)}, bytes(16)))
    sealer.cover({"weights": (data.nbytes, None)})
    whole = [Range("weights", data.ctypes.data, data.ctypes.data, data.nbytes)]
    other_128, other_256 = (CounterSchedule(bytes(bits // 8), bytes(16)) for bits in (128, 256))
    states = ctypes.create_string_buffer(bytes(range(16)), 16 * (data.nbytes // segment_bytes(128) + 2))
    rcon = ctypes.create_string_buffer(RCON_WORDS)
    chain = kernel(active_tier(), KernelName("expansion_chain", 128))
    segments = max(data.nbytes // segment_bytes(128), 1)

    def bare_chain() -> None:
        chain(
            RECORDS["expansion_chain"].pack(
                ctypes.addressof(states), segments, ctypes.addressof(rcon) + RCON_START
            )
        )

    return {
        "lock, counter 128, aes": lambda: lock(data, counter_128, out=data, threads=threads),
        "unlock, counter 128, aes": lambda: unlock(data, counter_128, out=data, threads=threads),
        "lock, counter 256, aes": lambda: lock(data, counter_256, out=data, threads=threads),
        "lock, counter 128, sm4": lambda: lock(data, counter_128, sbox="sm4", out=data, threads=threads),
        "lock, counter 128, kuznyechik": lambda: lock(
            data, counter_128, sbox="kuznyechik", out=data, threads=threads
        ),
        "unlock, counter 128, kuznyechik": lambda: unlock(
            data, counter_128, sbox="kuznyechik", out=data, threads=threads
        ),
        "lock_tensors, sealed, 128": lambda: lock_tensors(tensors, bytes(16), threads=threads),
        "lock_tensors, sealed, 256": lambda: lock_tensors(tensors, bytes(32), threads=threads),
        "seals alone (what verifying takes)": lambda: sealer.seals(whole, threads),
        "rekey, counter 128, aes": lambda: rekey(data, counter_128, other_128, out=data, threads=threads),
        "rekey, counter 256, aes": lambda: rekey(data, counter_256, other_256, out=data, threads=threads),
        "lock into other memory, counter 128, aes": lambda: lock(data, counter_128, out=copy, threads=threads),
        "substitute, aes": lambda: substitute(data, AES, out=data, threads=threads),
        "expansion 128, its bare chain": bare_chain,
        "lock, expansion 128, first pass": first_pass,
        "lock, expansion 128, indexed": lambda: lock(data, indexed, out=data, threads=threads),
    }


def peers(data: Any) -> dict[str, Work]:
    """Give what users could call in place of this package, as far as it is installed: one thread, as it comes."""
    table, stream = np.frombuffer(AES.table, np.uint8), data[::-1].copy()
    found: dict[str, Work] = {
        "NumPy S[x]": lambda: table[data],
        "NumPy S[x ^ k], k given": lambda: table[data ^ stream],
    }
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError:
        return found
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    def encrypt() -> None:
        encryptor = Cipher(algorithms.AES(bytes(range(16))), modes.CTR(bytes(16))).encryptor()
        view = memoryview(data)
        step = 1 << 30  # it takes no more than 2^31 - 1 bytes at once
        for i in range(0, len(view), step):
            encryptor.update_into(view[i : i + step], view[i : i + step])

    found["cryptography AES-128-CTR, update_into"] = encrypt
    if data.nbytes < 1 << 30:  # it takes no more than 2^31 - 1 bytes at once
        sealed = np.empty(data.nbytes + 16, np.uint8)
        cipher = AESGCM(bytes(range(16)))
        found["cryptography AES-128-GCM, encrypt_into"] = lambda: cipher.encrypt_into(
            bytes(12), data.data, None, sealed.data
        )
    return found


def environment(threads: int) -> str:
    """Describe the machine and the versions, on one line."""
    import llvmlite

    tier = active_tier()
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model
            )
    except OSError:
        pass
    return (
        f"{model}, {os.cpu_count()} processors, tier {tier.name}, {threads} threads, "
        f"Python {platform.python_version()}, numpy {np.__version__}, llvmlite {llvmlite.__version__}, "
        f"{time.strftime('%Y-%m-%d')}"
    )


def first_lock_seconds(rounds: int = 5) -> list[float]:
    """Time fresh processes from their start to the first locked MiB, with compiled kernels in the cache."""
    program = (
        "import numpy, deeplock_kernels as d; a = numpy.zeros(1 << 20, numpy.uint8);"
        "d.lock(a, d.CounterSchedule(bytes(16), bytes(16)), out=a)"
    )
    taken = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True)
        taken.append(time.perf_counter() - begin)
    return taken[1:]
