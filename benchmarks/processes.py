"""Programs for processes of their own: what a first use costs, in time and memory.

Peak memory is what the kernel calls VmHWM. The better known `ru_maxrss` is no use here: a new process starts
with that of the one that made it, and a process that measures has held gigabytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deeplock_kernels

PACKAGE_ROOT = Path(deeplock_kernels.__file__).resolve().parent.parent

_REPORT = """
import json, time
def peak():
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) << 10
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
"""

_LOCK = """
import numpy
import deeplock_kernels
data = numpy.zeros(1 << 20, numpy.uint8)
begin = time.perf_counter()
deeplock_kernels.lock(data, deeplock_kernels.CounterSchedule(bytes(16), bytes(16)), out=data)
seconds = time.perf_counter() - begin
"""

_ENCRYPT = """
import numpy
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
data = memoryview(numpy.zeros(1 << 20, numpy.uint8))
begin = time.perf_counter()
Cipher(algorithms.AES(bytes(16)), modes.CTR(bytes(16))).encryptor().update_into(data, data)
seconds = time.perf_counter() - begin
"""

_COMPILE = """
import sys
from deeplock_kernels.kernels.signatures import KernelName
from deeplock_kernels.runtime import tiers
import numba
tier = next(tier for tier in tiers.TIERS if tier.name == {tier!r})
begin = time.perf_counter()
tiers.kernel(tier, KernelName(*{name!r}))
seconds = time.perf_counter() - begin
"""

_END = """
print(json.dumps({"seconds": seconds, "peak_bytes": peak()}))
"""


def program(body: str) -> str:
    """Give a program that runs this, which sets `seconds`, and reports."""
    return _REPORT + body + _END


NOTHING = program("seconds = 0.0")
IMPORT_NUMPY = program("import numpy; seconds = 0.0")
IMPORT_PACKAGE = program("import deeplock_kernels; seconds = 0.0")
FIRST_LOCK = program(_LOCK)
FIRST_ENCRYPTION = program(_ENCRYPT)


def compilation(tier: str, name: tuple[Any, ...]) -> str:
    """Give the program that compiles one kernel of a tier, with Numba imported before the clock starts."""
    return program(_COMPILE.format(tier=tier, name=tuple(name)))


def variables(cache: Path | None, *roots: Path) -> dict[str, str]:
    """Give the environment of a process that uses this cache, or none.

    It finds its packages in these folders first; without any, it uses this process's copy of the package.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DEEPLOCK_CACHE")}
    chosen = {"DEEPLOCK_CACHE": "0"} if cache is None else {"DEEPLOCK_CACHE_DIR": str(cache)}
    path = [str(root) for root in roots or (PACKAGE_ROOT,)]
    return {**kept, **chosen, "PYTHONPATH": os.pathsep.join([*path, *_path_of_this_process()])}


def _path_of_this_process() -> list[str]:
    return [entry for entry in [os.environ.get("PYTHONPATH")] if entry]


def run(text: str, environment: dict[str, str], directory: Path, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Run a program in a new interpreter with arguments, and give what it reports: seconds, and peak memory in bytes.

    Raises
    ------
    RuntimeError
        It failed; the message ends with its own last words.
    """
    ended = subprocess.run(
        [sys.executable, "-c", text, *arguments], env=environment, cwd=directory, capture_output=True, text=True
    )
    if ended.returncode != 0:
        raise RuntimeError(
            f"a measured process failed with {ended.returncode}: {ended.stderr.strip()[-400:]}"
        )
    report: dict[str, Any] = json.loads(ended.stdout)
    return report
