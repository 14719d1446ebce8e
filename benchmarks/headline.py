"""The headline measurements, in a process that uses one copy of the package and is told what to measure when.

It uses public names of the package only, so that it runs with other revisions too. It reads the name of a
measurement from each line of its standard input, and answers with a line of JSON: seconds of one call, or why
there are none.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from typing import Any, NamedTuple

import deeplock_kernels as package
from benchmarks.models import NETWORKS
from benchmarks.rounds import Prepare, Work, seconds_of
from benchmarks.workspace import Spot, Workspace

_KEY = bytes(range(16))
_MODEL = next(model for model in NETWORKS if model.name == "MobileNetV2")
_ROUND_SECONDS = 0.002  # shorter calls are repeated
_MOST_REPEATS = 1000


class Headline(NamedTuple):
    """A measurement: the work for a place, and its bytes if they do not depend on the command line."""

    prepare: Prepare
    nbytes: int | None = None


@functools.cache
def _schedule(kind: str) -> Any:
    return package.CounterSchedule(_KEY, bytes(16)) if kind == "counter" else package.ExpansionSchedule(_KEY)


def _in_place(verb: str, kind: str = "counter", **options: Any) -> Prepare:
    def prepare(spot: Spot) -> Work:
        function, schedule, data = getattr(package, verb), _schedule(kind), spot.data
        return lambda: function(data, schedule, out=data, **options)

    return prepare


def _elsewhere(spot: Spot) -> Work:
    schedule, data, out = _schedule("counter"), spot.data, spot.out
    return lambda: package.lock(data, schedule, out=out)


def _first_pass(spot: Spot) -> Work:
    data = spot.data
    return lambda: package.lock(data, package.ExpansionSchedule(_KEY), out=data)


def _tensors(spot: Spot) -> Work:
    tensors = _MODEL.place(spot.data)
    return lambda: package.lock_tensors(tensors, _KEY)


MEASUREMENTS = {
    "lock": Headline(_in_place("lock")),
    "unlock": Headline(_in_place("unlock")),
    "lock into other memory": Headline(_elsewhere),
    "lock, kuznyechik": Headline(_in_place("lock", sbox="kuznyechik")),
    "lock, expansion": Headline(_in_place("lock", "expansion")),
    "lock, expansion, first pass": Headline(_first_pass),
    "lock, 1 KiB": Headline(_in_place("lock"), 1024),
    f"lock_tensors, {_MODEL.name}": Headline(_tensors, _MODEL.arena_bytes),
}


class Worker:
    """Measures on demand.

    Parameters
    ----------
    nbytes
        The length of the buffer where a measurement has none of its own.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._workspace = Workspace(max(nbytes, _MODEL.arena_bytes))
        self._repeats: dict[str, int] = {}

    def answer(self, name: str) -> dict[str, Any]:
        """Measure once, at a new place; the first time, warm the work before."""
        headline = MEASUREMENTS[name]
        try:
            work = headline.prepare(self._workspace.spot(headline.nbytes or self._nbytes))
            if name not in self._repeats:
                work()
                repeats = math.ceil(_ROUND_SECONDS / max(seconds_of(work), 1e-9))
                self._repeats[name] = min(repeats, _MOST_REPEATS)
            return {"seconds": seconds_of(work, self._repeats[name])}
        except Exception as error:  # another revision may lack it, and says so in its own way
            return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Say which copy of the package this is, then answer until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("nbytes", type=int)
    worker = Worker(parser.parse_args().nbytes)
    print(json.dumps({"package": package.__file__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(line.strip())), flush=True)


if __name__ == "__main__":
    main()
