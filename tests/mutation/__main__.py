"""Break the product in each way that is listed, and demand that a test fails.

Exit codes: 0 all were noticed; 1 one was not; 2 the command line is wrong, or tests fail with nothing broken.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from deeplock_kernels.runtime.tiers import TIERS

from . import results
from .mutants import MUTANTS
from .trial import GREEN, RED, Copy, Mutant


def sample(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """Choose mutants far apart in the list; seeds that follow each other come to all of them in turn."""
    count = min(count, len(mutants))
    stride = -(-len(mutants) // count)
    return [mutants[i] for i in range(seed % stride, len(mutants), stride)]


def tier_of(mutant: Mutant, supported: Sequence[str]) -> str | None:
    """Give the tier to force, "" for any, or None if this machine has none that the mutant concerns."""
    if not mutant.tiers:
        return ""
    return next((name for name in mutant.tiers if name in supported), None)


def unbroken(copy: Copy, work: Sequence[tuple[Mutant, str]]) -> list[str]:
    """Run the tests with nothing broken; give complaints of those that fail or do not run."""
    complaints = []
    for tier in dict.fromkeys(tier for _, tier in work):
        wanted = list(dict.fromkeys(test for mutant, t in work if t == tier for test in mutant.tests_on(tier)))
        outcome = copy.run(wanted, tier=tier)
        if outcome.verdict != GREEN:
            complaints.append(f"with nothing broken: {outcome.verdict}\n{outcome.output}")
        elif silent := [test for test in wanted if not _ran(test, outcome.passed)]:
            complaints.append(f"with nothing broken: no case passed of {', '.join(silent)}")
    return complaints


def _ran(test: str, passed: Sequence[str]) -> bool:
    return any(name == test or name.startswith((f"{test}[", f"{test}::")) for name in passed)


def main() -> int:
    """Run the command line and give its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", choices=[m.name for m in MUTANTS])
    parser.add_argument("--sample", type=int, metavar="N", help="about so many, not all")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which ones; the next seed gives others")
    parser.add_argument("--write", action="store_true", help=f"write the results to {results.FILE.name}")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.only or mutant.name in arguments.only]
    if arguments.sample:
        chosen = sample(chosen, arguments.sample, arguments.seed)
    supported = [tier.name for tier in TIERS if tier.supported]
    work = []
    for mutant in chosen:
        tier = tier_of(mutant, supported)
        if tier is None:
            print(f"{mutant.name}: not run, it takes a machine with {' or '.join(mutant.tiers)}")
        else:
            work.append((mutant, tier))
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="deeplock-mutation-") as place:
        copy = Copy(Path(place))
        if complaints := unbroken(copy, work):
            print("\n".join(complaints), file=sys.stderr)
            return 2
        for mutant, tier in work:
            start = time.monotonic()
            outcome = outcomes[mutant.name] = copy.try_out(mutant, tier)
            noticed = f" by {outcome.failed[0]}" if outcome.failed else ""
            print(f"{mutant.name}: {outcome.verdict}{noticed} ({time.monotonic() - start:.1f} s)", flush=True)
            if outcome.verdict != RED:
                print(f"    {mutant.breaks}; {mutant.file}\n{outcome.output}", flush=True)
    if arguments.write:
        old = results.FILE.read_text(encoding="utf-8") if results.FILE.exists() else ""
        results.FILE.write_text(results.updated(old, MUTANTS, outcomes), encoding="utf-8")
    unnoticed = [name for name, outcome in outcomes.items() if outcome.verdict != RED]
    print(f"{len(outcomes) - len(unnoticed)} of {len(outcomes)} mutants were noticed", *unnoticed)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
