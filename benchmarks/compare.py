"""Compare two revisions of the package on this machine, in turn, in one run.

`python -m benchmarks.compare REV_A REV_B [--mib 256] [--rounds 15] [--processes 3] [--only NAME]`

The package of each revision is taken out of the repository into a temporary folder and gets a kernel cache of
its own; the revision `.` is the checkout as it lies. A process for each of the two measures A, B, A, B, ...
Since where a process has its memory makes a difference that stays as long as it lives, new processes take
over a few times. A ratio above 1 says that B is the faster one. Compare a revision with itself to see what
difference means nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import environment, processes
from benchmarks.headline import MEASUREMENTS
from benchmarks.results import Spread, seconds_text
from benchmarks.rounds import seconds_of

PACKAGE = "deeplock_kernels"
FIRST_LOCK = "first lock of a process"
NAMES = (*MEASUREMENTS, FIRST_LOCK)
_CHECKOUT = "."


class ComparisonError(Exception):
    """A revision cannot be taken out or measured; the message says which, and why."""


class Side(NamedTuple):
    """One of the two revisions.

    Attributes
    ----------
    revision
        What it is called on the command line.
    name
        The short name of its commit.
    root
        The folder that holds its package.
    cache
        The folder of its compiled kernels.
    """

    revision: str
    name: str
    root: Path
    cache: Path

    def variables(self) -> dict[str, str]:
        """Give the environment of a process that uses this revision, and these benchmarks."""
        return processes.variables(self.cache, self.root, environment.ROOT)


class Outcome(NamedTuple):
    """What came of one measurement: the seconds of each round, or why there are none."""

    first: list[float]
    second: list[float]
    error: str = ""

    @property
    def ratio(self) -> Spread:
        """How many times as fast B was, round by round."""
        return Spread.of(a / b for a, b in zip(self.first, self.second, strict=True))


def take_out(revision: str, folder: Path) -> Side:
    """Put the package of a revision into a folder.

    Raises
    ------
    ComparisonError
        There is no such revision, or it has no package.
    """
    root, cache = folder / "checkout", folder / "cache"
    root.mkdir(parents=True)
    cache.mkdir(mode=0o700)
    if revision == _CHECKOUT:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(environment.ROOT / PACKAGE, root / PACKAGE, ignore=ignored)
        return Side(revision, environment.revision() or "no revision", root, cache)
    try:
        name = _git("rev-parse", "--short=10", "--verify", f"{revision}^{{commit}}").decode().strip()
    except ComparisonError as error:
        raise ComparisonError(f"{revision}: it is no revision of this repository ({error})") from error
    with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", name, PACKAGE))) as archive:
        archive.extractall(root, filter="data")
    return Side(revision, name, root, cache)


def _git(*arguments: str) -> bytes:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=environment.ROOT, capture_output=True, check=True
        ).stdout
    except OSError as error:
        raise ComparisonError(f"git cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        message = error.stderr.decode(errors="replace").strip().removeprefix("fatal: ")
        raise ComparisonError(f"git {arguments[0]}: {message}") from error


# ------------------------------------------------------------------------------
# Measuring


class Worker:
    """A process that measures one revision when it is told to.

    Parameters
    ----------
    side
        The revision.
    nbytes
        The length of the buffer.

    Raises
    ------
    ComparisonError
        It does not start, or uses another copy of the package.
    """

    def __init__(self, side: Side, nbytes: int) -> None:
        self._side = side
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.headline", str(nbytes)],
            env=side.variables(),
            cwd=side.root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        used = Path(self._read()["package"]).resolve()
        if side.root.resolve() not in used.parents:
            self.close()
            raise ComparisonError(f"{side.revision}: its process uses another copy of the package")

    def measure(self, name: str) -> dict[str, Any]:
        """Have something measured once."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what ended the process is told by reading
            self._process.stdin.write(f"{name}\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise ComparisonError(f"{self._side.revision}: its process ended with {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextmanager
def _workers(sides: Sequence[Side], nbytes: int) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        workers = []
        for side in sides:
            workers.append(Worker(side, nbytes))
            stack.callback(workers[-1].close)
        yield workers


def compare(
    sides: Sequence[Side], names: Sequence[str], *, nbytes: int, rounds: int, pairs: int
) -> dict[str, Outcome]:
    """Measure both sides in turn.

    Parameters
    ----------
    sides
        A and B.
    names
        What to measure, of `NAMES`.
    nbytes
        The length of the buffer.
    rounds
        How often each pair of processes measures it.
    pairs
        How many pairs of processes there are, one after the other.
    """
    outcomes = {name: Outcome([], []) for name in names}
    for _ in range(pairs):
        with _workers(sides, nbytes) as workers:
            for name in names:
                if name != FIRST_LOCK and not outcomes[name].error:
                    outcomes[name] = _more_rounds(outcomes[name], workers, sides, name, rounds)
    if FIRST_LOCK in names:
        outcomes[FIRST_LOCK] = _first_locks(sides, rounds)
    return outcomes


def _more_rounds(
    outcome: Outcome, workers: Sequence[Worker], sides: Sequence[Side], name: str, rounds: int
) -> Outcome:
    for number in range(rounds + 1):
        answers = [worker.measure(name) for worker in workers]
        for side, answer in zip(sides, answers, strict=True):
            if "error" in answer:
                return Outcome([], [], f"not measured with {side.revision}: {answer['error']}")
        if number:  # the round before the first one warms
            outcome.first.append(answers[0]["seconds"])
            outcome.second.append(answers[1]["seconds"])
    return outcome


def _first_locks(sides: Sequence[Side], rounds: int) -> Outcome:
    """Time processes from start to end, with the kernels in their caches."""
    taken: list[list[float]] = [[], []]
    try:
        for number in range(rounds + 1):
            for side, seconds in zip(sides, taken, strict=True):
                once = seconds_of(partial(processes.run, processes.FIRST_LOCK, side.variables(), side.root))
                if number:
                    seconds.append(once)
    except RuntimeError as error:
        return Outcome([], [], f"not measured: {error}")
    return Outcome(taken[0], taken[1])


# ------------------------------------------------------------------------------
# Command line


def _print(sides: Sequence[Side], outcomes: dict[str, Outcome], nbytes: int, facts: str) -> None:
    print(f"measured on: {facts}")
    for letter, side in zip("AB", sides, strict=True):
        print(f"{letter}: {side.revision} ({side.name})")
    print(f"buffers of {nbytes:,} bytes; median seconds, and how many times as fast B is [lowest to highest]")
    for name, outcome in outcomes.items():
        if outcome.error:
            print(f"  {name:30} {outcome.error}")
            continue
        first, second = (seconds_text(statistics.median(side)) for side in outcome[:2])
        ratio = outcome.ratio
        print(
            f"  {name:30} A {first:>9}  B {second:>9}  {ratio.middle:6.3f} "
            f"[{ratio.low:.3f} to {ratio.high:.3f}]  {len(outcome.first)} rounds"
        )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, accepted is a whole number of at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("revisions", nargs=2, metavar=("REV_A", "REV_B"), help="a git revision, or . ")
    parser.add_argument("--mib", type=_positive, default=256, help="the length of the buffer (default 256)")
    parser.add_argument("--rounds", type=_positive, default=15, help="of each pair of processes (default 15)")
    parser.add_argument("--processes", type=_positive, default=3, help="pairs of processes (default 3)")
    parser.add_argument(
        "--only", choices=NAMES, action="append", metavar="NAME", help=f"of: {'; '.join(NAMES)}"
    )
    parsed = parser.parse_args(arguments)
    nbytes = parsed.mib << 20
    facts = environment.line(environment.describe(quick=False))
    with tempfile.TemporaryDirectory() as folder:
        try:
            sides = [
                take_out(revision, Path(folder) / letter)
                for letter, revision in zip("AB", parsed.revisions, strict=True)
            ]
            outcomes = compare(
                sides,
                parsed.only or NAMES,
                nbytes=nbytes,
                rounds=parsed.rounds,
                pairs=parsed.processes,
            )
        except ComparisonError as error:
            print(f"compare: error: {error}", file=sys.stderr)
            return 1
        _print(sides, outcomes, nbytes, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
