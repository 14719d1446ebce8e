"""The load test finds what it looks for: wrong results, and memory that grows."""

from __future__ import annotations

import json
import re

import load
import pytest
from processes import Process, run

linux_only = pytest.mark.skipif(not load.Path("/proc/self/smaps_rollup").exists(), reason="this system is not Linux")


@pytest.mark.parametrize("count", [3, 5, 10, 100])
def test_growth(count):
    steady = [{"heap": 1000 + i % 2} for i in range(count)]
    assert abs(load.growth(steady)["heap"]) <= 0.002
    growing = [{"heap": 1000 + 50 * i / count, "files": 9} for i in range(count)]
    assert 0.01 < load.growth(growing)["heap"] < 0.05
    assert load.growth(growing)["files"] == 0


@pytest.mark.parametrize("when", range(30))
def test_what_grows_once_or_for_once_is_no_growth(when):
    once = [{"heap": 1000 if i < when else 1100} for i in range(30)]
    assert load.growth(once) == {"heap": 0}
    for_once = [{"heap": 1100 if i == when else 1000} for i in range(30)]
    assert load.growth(for_once) == {"heap": 0}


PLANT = """
import sys
import load

calls, kept = [], []
original = load.deeplock.unlock
def unlock(data, *arguments, **keywords):
    calls.append(1)
    result = original(data, *arguments, **keywords)
    {plant}
    return result
load.deeplock.unlock = unlock
sys.exit(load.main(["--seconds", "3", "--threads", "2", "--processes", "1"]))
"""
PLANTS = {
    "one wrong bit": ("if len(calls) == 50: result[-1] ^= 1", "\nmismatch: unlock from ", r", [1-9]\d* mismatches,"),
    "an exception": ("if len(calls) == 50: 1 / 0", "\nZeroDivisionError: ", r", [1-9]\d* mismatches,"),
    "a leak": ("kept.append(bytes(300_000))", "\ngrew by more than 1%: 2 threads: heap", r", 0 mismatches,"),
}


@linux_only
@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_found(plant):
    code, message, total = PLANTS[plant]
    output = Process(PLANT.replace("{plant}", code)).finish(returncode=1)
    assert message in output
    assert re.search(total, output)


KEEPING = """
import json, os, sys
import load

load.cut_small()
os.fsync = lambda descriptor: None  # it is most of the time
worker = load.Worker(4, sys.argv[1])
worker.turn()
found = {}
for work, warm, count in ((worker._lock_tensors, 300, 80), (worker._lock_flat, 20, 20), (worker._lock_file, 250, 80)):
    for _ in range(warm):  # Python's lists of free objects fill slowly
        work("counter", 2)
    for schedule in ("counter", "expansion"):
        samples = [load.measure()]
        for _ in range(4):
            for _ in range(count):
                work(schedule, 2)
            samples.append(load.measure())
        found[work.__name__ + " " + schedule] = {
            name: min(b[name] - a[name] for a, b in zip(samples, samples[1:])) / count
            for name in samples[0]
        }
print(json.dumps([worker.mismatches, found]))
"""


@linux_only
def test_no_operation_keeps_anything(tmp_path):
    """Not one piece of memory a call; beside threads that work, less than one per cent could not be told.

    The least of four counts: lists of free objects fill ever more slowly, but what a call keeps is in each of them.
    """
    mismatches, found = json.loads(run(KEEPING, tmp_path))
    assert mismatches == []
    for operation, kept in found.items():
        assert kept["blocks"] < 0.75, operation
        assert kept["objects"] < 0.75, operation
        assert kept["files"] <= 0, operation
        assert kept.get("heap", 0) < 1000, operation
