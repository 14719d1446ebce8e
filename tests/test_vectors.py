"""The vectors are what their generator makes, and every tier answers ten thousand drawn cases as they say."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json

import numpy as np
import pytest
import support
from support import OPERATIONS
from vectors import accumulated, generate, second

from deeplock_kernels import reference
from deeplock_kernels.rekeying import rekey
from deeplock_kernels.sboxes import AES, SBox
from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule

STORED = json.loads((generate.FOLDER / "accumulated.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", generate.FILES)
def test_what_is_checked_in_is_what_the_generator_makes(name):
    stored = (generate.FOLDER / name).read_text(encoding="utf-8")
    same = stored == generate.FILES[name]()
    assert same, f"find out which is wrong; `python tests/vectors/generate.py` makes tests/vectors/{name} anew"


def test_the_second_implementation_has_the_s_box_of_fips_197():
    assert AES.table == second.AES_SBOX
    assert second.inverse_of(second.AES_SBOX) == AES.inverse.table


# The drawn cases

boxes = functools.cache(SBox)
expansions = functools.cache(ExpansionSchedule)


def answer(case):
    """Lock or unlock at the place that was drawn."""
    length = len(case.data)
    memory = support.aligned(2 * length + 128)
    start = case.alignment
    data, out = memory[start : start + length], memory[length + 64 : 2 * length + 64]
    data[:] = np.frombuffer(case.data, np.uint8)
    keys = expansions(case.key) if case.schedule == "expansion" else CounterSchedule(case.key, case.iv)
    target = data if case.in_place else out
    return OPERATIONS[case.direction](data, keys, sbox=boxes(case.table), offset=case.offset, out=target)


def test_the_cases_are_as_many_and_as_different_as_they_should_be():
    assert STORED["seed"] == accumulated.SEED
    cases = [accumulated.case(number) for number in range(STORED["cases"])]
    assert len(set(cases)) == 10_000
    assert {(case.direction, case.schedule, len(case.key), case.table) for case in cases} == {
        (direction, schedule, bits // 8, table)
        for direction in OPERATIONS
        for schedule in support.SCHEDULES
        for bits in support.BITS
        for table in accumulated.tables()
    }
    lengths = [len(case.data) for case in cases]
    assert set(range(130)) <= set(lengths)
    assert max(lengths) > 16_000
    assert sum(lengths) > 10_000_000
    assert {case.alignment for case in cases} == set(range(64))
    assert max(case.offset for case in cases) > 2**62
    blocks = [
        (int.from_bytes(case.iv, "big") + case.offset // 16, -(-(case.offset + len(case.data)) // 16) - case.offset // 16)
        for case in cases
        if case.iv
    ]
    for power in (32, 64, 128):
        assert sum(start % 2**power + count > 2**power for start, count in blocks) > 20, "it wraps within the data"


def test_accumulated_vectors(tier):
    digest = hashlib.sha256()
    for number in range(STORED["cases"]):
        digest.update(answer(accumulated.case(number)))
    if digest.hexdigest() != STORED["sha256"]:
        for number, wanted in enumerate(accumulated.answers()):
            case = accumulated.case(number)
            assert answer(case).tobytes() == wanted, f"{number}: {case._replace(data=b'', table=b'')}"
        raise AssertionError("the digest differs, and no case does: run it again")


def test_the_oracle_answers_some_of_the_drawn_cases_alike():
    numbers = range(0, STORED["cases"], 20)
    cases = [case for case in map(accumulated.case, numbers) if case.offset < 20_000 or case.iv]
    assert len(cases) > 300
    for case in cases:
        if case.schedule == "expansion":
            stream = reference.expansion_keystream(case.key, len(case.data), case.offset)
        else:
            stream = reference.counter_keystream(case.key, case.iv, len(case.data), case.offset)
        wanted = {"lock": reference.lock, "unlock": reference.unlock}[case.direction](case.data, stream, case.table)
        assert accumulated.answer(case) == wanted, case._replace(data=b"", table=b"")


def test_rekeying_is_that_of_the_second_implementation(tier):
    drawn = map(accumulated.case, range(0, STORED["cases"], 4))
    cases = [case for case in drawn if case.iv and case.table == second.AES_SBOX]
    assert len(cases) > 20
    for case, other in itertools.pairwise(cases):
        old = second.counter_stream(case.key, case.iv, len(case.data), case.offset)
        new = second.counter_stream(other.key, other.iv, len(case.data), case.offset)
        wanted = second.rekey(case.data, old, new, case.table)
        assert reference.rekey(case.data, old, new, case.table) == wanted
        schedules = CounterSchedule(case.key, case.iv), CounterSchedule(other.key, other.iv)
        data = np.frombuffer(case.data, np.uint8)
        assert rekey(data, *schedules, sbox=boxes(case.table), offset=case.offset).tobytes() == wanted
