"""What Deep-Lock's paper claims, measured on networks that are trained here.

`python -m benchmarks.paper [--quick] [--out DIR] [--seed N] [--processes N] [--threads N] [--rewrite] [STUDY ...]`

It needs PyTorch and the extra `bench`. Whatever must hold and does not is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.paper import report
from benchmarks.paper.studies import STUDIES, measured
from deeplock_kernels.runtime.pool import available_threads


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the report, and give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; by default all")
    parser.add_argument("--quick", action="store_true", help="small networks and few keys; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=report.FOLDER, metavar="DIR", help="where the report goes")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of keys, salts and all else that is random")
    parser.add_argument(
        "--processes", type=int, default=available_threads(), metavar="N", help="that studies run in, side by side"
    )
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
        facts = report.describe(quick=chosen.quick)
        names = chosen.studies or [*STUDIES]
        results = measured(names, chosen.quick, chosen.seed, processes=chosen.processes, threads=chosen.threads)
    broken = [f"{name}: {claim}" for name, result in results.items() for claim in STUDIES[name].check(result)]
    print(report.write(chosen.out, facts, results, STUDIES))
    for claim in broken:
        print(f"does not hold: {claim}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
