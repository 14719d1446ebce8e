"""The report on timing: its statistics are right, it sees what it is told to look at, and it says no more than it knows."""

from __future__ import annotations

import gc
import struct

import numpy as np
import pytest

from benchmarks import timing
from deeplock_kernels.kernels.signatures import RECORDS
from deeplock_kernels.runtime.tiers import TIERS


def test_welch():
    """Means 3 and 6, variances 2.5 and 10, five of each: (3 - 6) / sqrt(0.5 + 2)."""
    a, b = np.arange(1.0, 6.0), np.arange(2.0, 11.0, 2.0)
    assert timing.welch(a, b) == pytest.approx(-3 / 2.5**0.5)
    assert timing.welch(b, a) == pytest.approx(3 / 2.5**0.5)
    assert timing.welch(a, a) == timing.welch(a[:1], b) == timing.welch(np.ones(5), np.ones(5)) == 0


def test_a_difference_that_long_interruptions_hide_is_found():
    random = np.random.default_rng(1)
    a, b = random.normal(100, 1, 5000), random.normal(100.5, 1, 5000)
    for times in (a, b):
        times[random.integers(0, 5000, 200)] += random.exponential(1e6, 200)
    assert abs(timing.welch(a, b)) < 5
    assert timing.largest_t(a, b) < -timing.CERTAIN
    assert timing.verdict(timing.largest_t(a, b)) == timing.verdict(timing.largest_t(b, a)) == "yes"


def test_without_a_difference_it_says_maybe():
    random = np.random.default_rng(2)
    t = timing.largest_t(random.normal(100, 1, 5000), random.normal(100, 1, 5000))
    assert 0 < abs(t) < timing.CERTAIN
    assert timing.verdict(t) == timing.verdict(0) == timing.verdict(-timing.CERTAIN) == "maybe"


def test_each_measurement_has_an_input_of_its_class(monkeypatch):
    monkeypatch.setattr(timing, "BATCH", 100)
    subject, seen = timing.control(), []
    subject = subject._replace(call=lambda: seen.append(subject.memory.raw), fixed=b"\x01" * len(subject.memory))
    first, second = timing.times_of(subject, 350)
    assert len(first) + len(second) == len(seen) == 350
    assert seen.count(subject.fixed) == len(first) > 100
    assert len(set(seen)) == 1 + len(second) > 100
    assert gc.isenabled()


@pytest.mark.parametrize("question", timing.QUESTIONS)
def test_what_is_timed_is_the_kernel_on_the_input(tier, question, monkeypatch):
    (operation, *_), secret = name, secret = timing.QUESTIONS[question]
    records = []
    monkeypatch.setattr(
        timing, "kernel", lambda tier, asked: (asked == name and records.append((tier, asked))) or records.append
    )
    subject = timing._kernel(tier, name, secret)
    assert (tier, name) in records
    of_tables = len(records)
    subject.call()
    assert len(records) == of_tables + 1
    arguments = RECORDS[operation].unpack(records[-1])
    place = timing.ctypes.addressof(subject.memory)
    if operation in ("seal", "counter_sealed"):
        assert arguments[1] == 1
        arguments = struct.unpack("8q", timing.ctypes.string_at(arguments[0], 64))
    key = 1 if operation == "seal_keys" else 4
    assert place == arguments[key if secret == "key" else 0]
    if operation != "seal_keys":
        assert arguments[0] == arguments[1]
        assert arguments[2] == timing.NBYTES
    assert len(subject.fixed) == len(subject.memory) == (48 if secret == "key" else timing.NBYTES)


def test_the_report_has_a_row_for_each_tier(capsys):
    timing.main(["--measurements", "30"])
    output = capsys.readouterr().out
    rows = [line.split(" | ") for line in output.splitlines() if line.startswith("| ")]
    supported = [tier for tier in TIERS if tier.supported]
    assert [row[0] for row in rows] == ["| tier", "| :--", *(f"| {tier.name}" for tier in supported)]
    assert {len(row) for row in rows} == {2 + len(timing.QUESTIONS)}
    assert [row[1] for row in rows[2:]] == ["yes" if tier.constant_time else "no" for tier in supported]
    assert output.startswith("Measured on: ")
    assert "or maybe, as no test can say no" in output
    timing.main(["--measurements", "30", "--tier", "portable"])
    assert capsys.readouterr().out.count("| portable |") == 1
