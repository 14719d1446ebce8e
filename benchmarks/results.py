"""The measurements of a run, read back from the JSON that pytest-benchmark wrote."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.rounds import LIMIT

UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


class Spread(NamedTuple):
    """The lowest, the median and the highest of several rounds."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Sum up some values, at least one."""
        found = list(values)
        return cls(min(found), statistics.median(found), max(found))

    def scaled(self, factor: float) -> Spread:
        """Multiply all three."""
        return Spread(*(factor * value for value in self))


class Measurement:
    """One piece of work, measured over some rounds beside its references.

    Parameters
    ----------
    details
        What the benchmark left in its `extra_info`.
    """

    def __init__(self, details: Mapping[str, Any]) -> None:
        self._details = details
        self.section: str = details["section"]
        self.nbytes: int = details.get("nbytes", 0)
        self.seconds: list[float] = details["seconds"]

    def __getitem__(self, name: str) -> Any:
        return self._details[name]

    def has(self, name: str) -> bool:
        """Say whether it has a detail of that name."""
        return name in self._details

    def matches(self, **wanted: Any) -> bool:
        """Say whether all of these details are so."""
        known = {**self._details, "nbytes": self.nbytes}
        return all(known.get(name) == value for name, value in wanted.items())

    @property
    def time(self) -> Spread:
        """Seconds."""
        return Spread.of(self.seconds)

    @property
    def speed(self) -> Spread:
        """GB/s, with 10^9 bytes to the GB."""
        return Spread.of(self.nbytes / second / 1e9 for second in self.seconds)

    @property
    def references(self) -> Sequence[str]:
        """The names of what it was compared with."""
        return list(self._details.get("references", {}))

    def reference_speed(self, name: str = LIMIT) -> Spread:
        """GB/s of a reference in the same rounds."""
        return Spread.of(self.nbytes / second / 1e9 for second in self._details["references"][name])

    def reference_time(self, name: str = LIMIT) -> Spread:
        """Seconds of a reference in the same rounds."""
        return Spread.of(self._details["references"][name])

    def ratio(self, name: str = LIMIT) -> Spread:
        """Its speed divided by a reference's, round by round."""
        return Spread.of(self._details["ratios"][name])


class Results:
    """A whole run.

    Parameters
    ----------
    document
        The JSON document.

    Raises
    ------
    ValueError
        The document does not say on what machine it was measured.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        ours = document.get("deeplock")
        if not isinstance(ours, Mapping) or "environment" not in ours:
            raise ValueError(
                "results: got a document without the environment it was measured in; "
                "make one by `pytest benchmarks --benchmark-json=FILE`"
            )
        self.environment: Mapping[str, Any] = ours["environment"]
        self.peers: Mapping[str, str] = ours["peers"]
        self.not_measured: Sequence[Mapping[str, str]] = ours["not_measured"]
        self.measurements = [
            Measurement(benchmark["extra_info"])
            for benchmark in document["benchmarks"]
            if "section" in benchmark["extra_info"]
        ]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read a file.

        Raises
        ------
        ValueError
            It is not the JSON of a run.
        """
        return cls(json.loads(Path(path).read_text()))

    def select(self, section: str, **wanted: Any) -> list[Measurement]:
        """Give the measurements of a section with these details, in the order of the run."""
        return [found for found in self.measurements if found.section == section and found.matches(**wanted)]

    def speeds(self, section: str, by: str = "model", **wanted: Any) -> dict[Any, Spread]:
        """Give the speeds of a section by the values of a detail."""
        return {entry[by]: entry.speed for entry in self.select(section, **wanted)}

    def limits(self, section: str, by: str = "model", **wanted: Any) -> dict[Any, Spread]:
        """Give the speeds of the limit, from the same rounds as `speeds`."""
        return {entry[by]: entry.reference_speed() for entry in self.select(section, **wanted)}

    def models(self, section: str) -> dict[str, int]:
        """Give the models of a section by size: their names, and their bytes."""
        found = {entry["model"]: entry.nbytes for entry in self.select(section)}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def distinct(self, section: str, detail: str) -> list[Any]:
        """Give the different values of a detail in a section, in the order of the run."""
        return list(dict.fromkeys(entry[detail] for entry in self.select(section)))


def size_text(nbytes: float) -> str:
    """Write a number of bytes for people."""
    for unit, name in UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes:.0f} B"


def model_text(name: str, nbytes: int, between: str = ", ") -> str:
    """Write a model's name with its size, unless the name says it."""
    size = size_text(nbytes)
    return name if size in name else f"{name}{between}{size}"


def number_text(value: float) -> str:
    """Write a number with three digits."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def seconds_text(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 0.9995:
            return f"{number_text(seconds * factor)} {unit}"
    return f"{number_text(seconds * 1e9)} ns"
