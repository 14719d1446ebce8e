"""`python -m tests.fuzz TARGET [--seconds N] [--seed N]`, from the root of the repository.

`differential` draws its cases. The others are fuzzed by coverage with atheris (`pip install '.[fuzz]'`, for Python 3.11
to 3.13 on x86-64), which begins with the stored cases. After so many seconds the exit code is 0; at the first finding it
is another one, and the case lies in `tests/fuzz/found/`. An hour for each target:

    for target in container format header command differential; do python -m tests.fuzz $target --seconds 3600; done
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random, SystemRandom

from . import CASES, TARGETS, target

FOUND = Path(__file__).parent / "found"
CORPUS = Path(__file__).parent / "corpus"
LARGEST_CASE = 4096  # bytes
LONGEST_RUN = 300  # seconds, after which a case counts as one that hangs


def by_coverage(name: str, seconds: int, seed: int) -> None:
    """Fuzz with atheris, which ends the process."""
    try:
        import atheris
    except ImportError:
        sys.exit("fuzz: atheris is not installed; pip install '.[fuzz]', with Python 3.11 to 3.13 on x86-64")
    with atheris.instrument_imports(include=["deeplock_kernels"]):
        chosen = target(name)

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        changed = chosen.mutate(data, Random(seed), lambda part: atheris.Mutate(part, largest))
        return changed[:largest]

    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    tokens = CORPUS / f"{name}.tokens"
    escaped = ("".join(f"\\x{byte:02x}" for byte in token.encode()) for token in chosen.TOKENS)
    tokens.write_text("".join(f'"{token}"\n' for token in escaped))
    options = {
        "max_total_time": seconds,
        "seed": seed,
        "max_len": LARGEST_CASE,
        "timeout": LONGEST_RUN,
        "dict": tokens,
        "artifact_prefix": FOUND / f"{name}-",
        "print_final_stats": 1,
    }
    arguments = [f"-{option}={value}" for option, value in options.items()]
    atheris.Setup(
        [sys.argv[0], *arguments, str(corpus), str(CASES / name)], chosen.run, custom_mutator=mutate
    )
    atheris.Fuzz()


def by_chance(name: str, seconds: int, seed: int) -> None:
    """Run cases that the target draws."""
    chosen = target(name)
    random, end, count = Random(seed), time.monotonic() + seconds, 0
    current = FOUND / f"{name}-{seed}"
    while time.monotonic() < end:
        case = chosen.random_case(random)
        current.write_bytes(case)  # beforehand, for a wrong address can end the process
        try:
            chosen.run(case)
        except Exception:
            print(f"fuzz: {name}: case {count} of seed {seed}: {case.decode()}", file=sys.stderr)
            raise
        count += 1
    current.unlink(missing_ok=True)
    print(f"fuzz: {name}: {count} cases of seed {seed}, nothing found")


def main() -> None:
    """Read the command line and fuzz."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="how long (default 60)")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the random numbers (default another each time)"
    )
    parsed = parser.parse_args()
    seed = SystemRandom().getrandbits(31) if parsed.seed is None else parsed.seed
    FOUND.mkdir(exist_ok=True)
    # What the targets write goes where the parent clears up: atheris ends its process without doing so.
    tempfile.tempdir = tempfile.mkdtemp(
        prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    )
    child = os.fork()
    if not child:
        (by_chance if parsed.target == "differential" else by_coverage)(parsed.target, parsed.seconds, seed)
        return
    try:
        _, status = os.waitpid(child, 0)
    finally:
        shutil.rmtree(tempfile.tempdir)
    if status:
        sys.exit(f"fuzz: {parsed.target}, seed {seed}: the case lies in {FOUND}")


if __name__ == "__main__":
    main()
