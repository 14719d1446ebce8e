"""Measure a piece of work and its references in turn, round after round, and keep each round's times.

A machine changes its speed from minute to minute. What is compared therefore runs in the same round, and
ratios are taken round by round. Every round works at a new random place of the page.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.workspace import Spot, Workspace

Work = Callable[[], object]
Prepare = Callable[[Spot], Work]
LIMIT = "limit"  # the reference that most work is compared with: an in-place XOR by the same pool


class Settings(NamedTuple):
    """How long to measure.

    Attributes
    ----------
    quick
        Whether this run only shows that everything works; its figures mean nothing.
    budget
        Seconds that one piece of work and its references may take in all, as far as the fewest rounds allow.
    fewest, most
        Rounds.
    round_seconds
        Work shorter than that is repeated within a round.
    """

    quick: bool
    budget: float
    fewest: int
    most: int
    round_seconds: float


FULL = Settings(quick=False, budget=2.0, fewest=7, most=30, round_seconds=0.002)
QUICK = Settings(quick=True, budget=0.0, fewest=2, most=2, round_seconds=0.0)


def repeat(work: Work, repeats: int) -> None:
    """Do the work that many times."""
    for _ in range(repeats):
        work()


def seconds_of(work: Work, repeats: int = 1) -> float:
    """Time the work, and give the seconds of one time."""
    begin = time.perf_counter()
    repeat(work, repeats)
    return (time.perf_counter() - begin) / repeats


class Rounds:
    """Measures with pytest-benchmark and leaves the result in the benchmark's `extra_info`.

    Parameters
    ----------
    benchmark
        The fixture of pytest-benchmark, for one measurement.
    workspace
        Where to work.
    settings
        How long.
    """

    def __init__(self, benchmark: Any, workspace: Workspace, settings: Settings) -> None:
        self._benchmark, self._workspace, self._settings = benchmark, workspace, settings

    def measure(
        self, section: str, work: Prepare, references: Mapping[str, Prepare], nbytes: int, **details: Any
    ) -> None:
        """Run the references and the work once a round.

        Parameters
        ----------
        section
            The part of the report that this belongs to.
        work
            Gives, for the place of a round, what to measure.
        references
            The same for what it is compared with.
        nbytes
            The bytes that each of them goes through.
        details
            What the report tells measurements of a section apart by.
        """
        repeats, rounds = self._plan(work, references, nbytes)
        seconds: dict[str, list[float]] = {name: [] for name in references}

        def setup() -> tuple[tuple[Work, int], dict[str, Any]]:
            spot = self._workspace.spot(nbytes)
            ready = work(spot)
            for name, reference in references.items():
                seconds[name].append(seconds_of(reference(spot), repeats))
            return (ready, repeats), {}

        self._benchmark.group = section
        self._benchmark.pedantic(repeat, setup=setup, rounds=rounds)
        if self._benchmark.disabled:
            return
        taken = [second / repeats for second in self._benchmark.stats.stats.data]
        self._benchmark.extra_info.update(
            section=section,
            nbytes=nbytes,
            repeats=repeats,
            seconds=taken,
            references=seconds,
            ratios={
                name: [reference / second for reference, second in zip(those, taken, strict=True)]
                for name, those in seconds.items()
            },
            **details,
        )

    def _plan(self, work: Prepare, references: Mapping[str, Prepare], nbytes: int) -> tuple[int, int]:
        """Warm everything, then say how often to repeat the work in a round, and how many rounds to run."""
        spot = self._workspace.spot(nbytes)
        everything = [prepare(spot) for prepare in (work, *references.values())]
        for warm in everything:
            warm()
        if self._settings.quick:
            return 1, self._settings.fewest
        once = [max(seconds_of(each), 1e-9) for each in everything]
        repeats = min(max(math.ceil(self._settings.round_seconds / once[0]), 1), 10_000)
        rounds = int(self._settings.budget / (repeats * sum(once)))
        return repeats, min(max(rounds, self._settings.fewest), self._settings.most)
