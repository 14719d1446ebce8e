"""The list of mutants fits the sources, its results are all red, and nothing but a failed test counts as red."""

from __future__ import annotations

import ast
import functools

import pytest
from mutation import results
from mutation.__main__ import sample, tier_of, unbroken
from mutation.mutants import MUTANTS
from mutation.trial import BROKEN, GREEN, PACKAGE, RED, ROOT, Copy, Mutant, Outcome

from deeplock_kernels.runtime.tiers import TIERS

each_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


@each_mutant
def test_each_mutant_still_fits_the_sources(mutant):
    source = (ROOT / PACKAGE / mutant.file).read_text(encoding="utf-8")
    broken = mutant.apply(source)
    assert broken != source
    compile(broken, mutant.file, "exec")  # an import that fails is noticed by nobody's merit


@functools.cache
def functions_of(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@each_mutant
def test_each_mutant_names_tests_that_exist(mutant):
    assert set(mutant.tiers) <= {tier.name for tier in TIERS}
    assert mutant.tests
    for test in mutant.tests_on("tier"):
        file, _, name = test.partition("::")
        assert not name or name.partition("[")[0] in functions_of(file)


def test_there_are_many_and_each_is_another_one():
    assert len(MUTANTS) >= 40
    for parts in ([m.name for m in MUTANTS], [m.breaks for m in MUTANTS], [(m.file, m.old, m.new) for m in MUTANTS]):
        assert len(set(parts)) == len(parts)
    assert not any("|" in mutant.name + mutant.breaks for mutant in MUTANTS), "it would end a cell of the table"


def test_the_table_says_that_each_mutant_is_noticed():
    text = results.FILE.read_text(encoding="utf-8")
    assert text == results.updated(text, MUTANTS, {}), "run: python -m tests.mutation --write"
    lines = text.splitlines()[-len(MUTANTS) :]
    for mutant, line in zip(MUTANTS, lines, strict=True):
        assert line.startswith(results.start_of_line(mutant))
        assert line.endswith(f"` | {RED} |"), f"run: python -m tests.mutation --only {mutant.name} --write"


def test_the_table_keeps_what_was_not_run_again():
    one, other = (Mutant(name, "breaks", "a.py", "old", "new", ("test.py",)) for name in ("one", "other"))
    red, green = Outcome(RED, ["tests/test.py::test_it[a|b]"], [], ""), Outcome(GREEN, [], [], "")
    text = results.updated("", [one, other], {"one": red, "other": green})
    assert text.splitlines()[-2:] == [
        "| one | breaks | `a.py` | `test.py::test_it[a\\|b]` | red |",
        "| other | breaks | `a.py` |  | green |",
    ]
    assert "\n1 of 2 mutants are noticed.\n" in text
    assert results.updated(text, [one, other], {}) == text
    assert "\n2 of 2 mutants are noticed.\n" in results.updated(text, [one, other], {"other": red})
    changed = results.updated(text, [one._replace(breaks="breaks more"), other], {})
    assert changed.splitlines()[-2] == "| one | breaks more | `a.py` |  | not run |"


@pytest.mark.parametrize("count", [1, 2, 6, 7, len(MUTANTS), 1000])
def test_samples_come_to_every_mutant_in_turn(count):
    stride = -(-len(MUTANTS) // min(count, len(MUTANTS)))
    samples = [sample(MUTANTS, count, seed) for seed in range(1000, 1000 + stride)]
    assert sorted(mutant for chosen in samples for mutant in chosen) == sorted(MUTANTS)
    assert all(1 <= len(chosen) <= count for chosen in samples)


def test_the_tier_is_the_first_that_the_machine_has():
    mutant = Mutant("name", "breaks", "a.py", "old", "new", ("test.py::test[{tier}]",), ("avx512", "avx2"))
    assert tier_of(mutant, ["avx2", "avx512"]) == "avx512"
    assert tier_of(mutant, ["avx2"]) == "avx2"
    assert tier_of(mutant, ["neon"]) is None
    assert tier_of(mutant._replace(tiers=()), []) == ""
    assert mutant.tests_on("avx2") == ["tests/test.py::test[avx2]"]


# Trials, of a project that is much smaller

PROJECT = {
    "setup.cfg": "[tool:pytest]\nfilterwarnings =\n    error\n",
    "deeplock_kernels/__init__.py": "ONE = 1\n",
    "tests/test_one.py": """
import os
import pytest
import deeplock_kernels

@pytest.fixture
def one():
    assert deeplock_kernels.ONE in (1, 2)
    if deeplock_kernels.ONE == 2:
        os._exit(1)

def test_value():
    assert deeplock_kernels.ONE == 1

def test_type():
    assert isinstance(deeplock_kernels.ONE, int)

def test_fixture(one):
    pass

@pytest.mark.skip(reason="for the test's sake")
def test_skipped():
    pass
""",
}


@pytest.fixture
def copy(tmp_path):
    for name, text in PROJECT.items():
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return Copy(tmp_path / "place", tmp_path / "root")


def changed_to(value, *tests):
    return Mutant("name", "breaks", "__init__.py", "= 1", f"= {value}", tests or ("test_one.py",))


TRIALS = {
    "a test fails": (changed_to(3), RED, ["tests/test_one.py::test_value"]),
    "no test fails": (changed_to(3, "test_one.py::test_type", "test_one.py::test_skipped"), GREEN, []),
    "it cannot be imported": (changed_to("None.no"), BROKEN, []),
    "what comes before the test fails": (changed_to(3, "test_one.py::test_fixture"), BROKEN, []),
    "the process ends": (changed_to(2, "test_one.py::test_fixture"), BROKEN, []),
    "there is no such test": (changed_to(3, "test_one.py::test_none"), BROKEN, []),
}


@pytest.mark.parametrize("case", TRIALS)
def test_only_a_failed_test_is_red(copy, tmp_path, case):
    mutant, verdict, failed = TRIALS[case]
    outcome = copy.try_out(mutant)
    assert (outcome.verdict, outcome.failed) == (verdict, failed), outcome.output
    source = tmp_path / "place" / "project" / PACKAGE / mutant.file
    assert source.read_text(encoding="utf-8") == PROJECT[f"{PACKAGE}/{mutant.file}"]


@pytest.mark.parametrize(("source", "count"), [("ONE = 2\n", 0), ("ONE = 1; TWO = 1\n", 2)])
def test_a_text_that_does_not_occur_once_is_refused(source, count):
    with pytest.raises(ValueError, match=f"^name: its old text occurs {count} times in __init__.py"):
        changed_to(3).apply(source)


def test_tests_that_fail_or_do_not_run_with_nothing_broken_are_told(copy):
    good, skipped = changed_to(3, "test_one.py::test_value"), changed_to(3, "test_one.py::test_skipped")
    assert unbroken(copy, [(good, "")]) == []
    assert unbroken(copy, [(good, ""), (skipped, "")]) == [
        "with nothing broken: no case passed of tests/test_one.py::test_skipped"
    ]
    (missing,) = unbroken(copy, [(good, ""), (changed_to(3, "test_one.py::test_none"), "")])
    assert missing.startswith("with nothing broken: broken\n")
