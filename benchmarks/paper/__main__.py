"""What Deep-Lock's paper claims, measured on networks that are trained here.

`python -m benchmarks.paper [--quick] [--out DIR] [--seed N] [--threads N] [--rewrite] [STUDY ...]`

It needs PyTorch and the extra `bench`. Whatever must hold and does not is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.paper import (
    approximation,
    authorization,
    cost,
    fine_tuning,
    known_plaintext,
    locked_bytes,
    partial,
    report,
)

STUDIES: Mapping[str, ModuleType] = {
    "authorization": authorization,
    "partial": partial,
    "fine_tuning": fine_tuning,
    "approximation": approximation,
    "known_plaintext": known_plaintext,
    "cost": cost,
    "locked_bytes": locked_bytes,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the report, and give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; by default all")
    parser.add_argument("--quick", action="store_true", help="small networks and few keys; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=report.FOLDER, metavar="DIR", help="where the report goes")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of keys, salts and all else that is random")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch; figures depend on it slightly")
    parser.add_argument("--rewrite", action="store_true", help="only write the page anew from results.json in DIR")
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.studies) - STUDIES.keys()
    if unknown:
        parser.error(f"there is no study {min(unknown)!r}")
    torch.set_num_threads(chosen.threads)
    if chosen.rewrite:
        facts, results = report.read(chosen.out)
    else:
        facts, results = report.describe(quick=chosen.quick), {}
        for name in chosen.studies or STUDIES:
            begin = time.perf_counter()
            results[name] = STUDIES[name].measure(chosen.quick, chosen.seed)
            print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    broken = [f"{name}: {claim}" for name, result in results.items() for claim in STUDIES[name].check(result)]
    print(report.write(chosen.out, facts, results, STUDIES))
    for claim in broken:
        print(f"does not hold: {claim}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
