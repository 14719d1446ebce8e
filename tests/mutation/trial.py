"""One mutant on trial: in a copy of the project its tests are run, and one of them has to fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

PACKAGE = "deeplock_kernels"
ROOT = Path(__file__).resolve().parents[2]
RED, GREEN, BROKEN = "red", "green", "broken"
_LONGEST_TEST = 120  # seconds; pytest has a test fail that takes longer
_LONGEST_RUN = 400


class Mutant(NamedTuple):
    """One way to break the product.

    Attributes
    ----------
    name
        What `--only` calls it.
    breaks
        What no longer holds.
    file
        The file of the package.
    old, new
        What is replaced, which occurs there exactly once, and by what.
    tests
        What is run to notice it: files, tests or cases of `tests/`. A `{tier}` in it stands for the tier.
    tiers
        The tiers that it concerns; the first that this machine supports is forced. By default any.
    """

    name: str
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    tiers: tuple[str, ...] = ()

    def apply(self, source: str) -> str:
        """Give the broken source."""
        count = source.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: its old text occurs {count} times in {self.file}, it has to once")
        return source.replace(self.old, self.new)

    def tests_on(self, tier: str) -> list[str]:
        """Name the tests for pytest."""
        return [f"tests/{test}".replace("{tier}", tier) for test in self.tests]


class Outcome(NamedTuple):
    """How a run of tests ended.

    Attributes
    ----------
    verdict
        RED: a test failed. GREEN: none did. BROKEN: anything else, such as tests that cannot be imported or found,
        or a process that ended in their midst. That a mutant ends so does not say that a test notices it.
    failed, passed
        The tests of which it is known.
    output
        What pytest wrote.
    """

    verdict: str
    failed: list[str]
    passed: list[str]
    output: str


class Copy:
    """A copy of the project, to be broken.

    Parameters
    ----------
    place
        An empty directory.
    root
        The project.
    """

    def __init__(self, place: Path, root: Path = ROOT) -> None:
        self._place = place
        self._root = place / "project"
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        for name in (PACKAGE, "tests"):
            shutil.copytree(root / name, self._root / name, ignore=ignored)
        shutil.copy(root / "setup.cfg", self._root)
        program = f"import {PACKAGE}; print({PACKAGE}.__file__)"
        command = [sys.executable, "-c", program]
        found = subprocess.run(
            command, cwd=self._root, env=self._environment(), capture_output=True, text=True, check=True
        )
        if Path(found.stdout.strip()).resolve().parent != (self._root / PACKAGE).resolve():
            raise RuntimeError(f"the tests would import {found.stdout.strip()} instead of the copy")

    def _environment(self, cache: str = "unbroken", tier: str = "") -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("NUMBA_", "DEEPLOCK_", "PYTEST_", "PYTHON"))
        }
        # Of two sources of one length and one second, compiled files on disk could be those of the other.
        kept |= {"PYTHONPATH": str(self._root), "PYTHONDONTWRITEBYTECODE": "1"}
        kept |= {"CI": "1"}  # has hypothesis try the same examples each time
        kept |= {"DEEPLOCK_CACHE_DIR": str(self._place / "caches" / cache)}
        return kept | ({"DEEPLOCK_TIER": tier} if tier else {})

    def run(self, tests: Iterable[str], *options: str, cache: str = "unbroken", tier: str = "") -> Outcome:
        """Run tests in the copy."""
        report = self._place / "report.xml"
        report.unlink(missing_ok=True)
        (self._place / "caches").mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        command += ["--assert=plain"]  # nobody reads in what a result differs, and of a MiB that takes minutes
        command += [f"--timeout={_LONGEST_TEST}", f"--junit-xml={report}", f"--basetemp={self._place / 'files'}"]
        process = subprocess.Popen(
            [*command, *tests],
            cwd=self._root,
            env=self._environment(cache, tier),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=_LONGEST_RUN)
        except subprocess.TimeoutExpired:
            output = f"no end after {_LONGEST_RUN} seconds"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        failed, passed = _read(report) if report.exists() else ([], [])
        verdict = {0: GREEN, 1: RED if failed else BROKEN}.get(process.returncode, BROKEN)
        return Outcome(verdict, failed, passed, output)

    @contextmanager
    def broken(self, mutant: Mutant) -> Iterator[None]:
        """Have the copy broken within a `with` block."""
        file = self._root / PACKAGE / mutant.file
        source = file.read_text(encoding="utf-8")
        file.write_text(mutant.apply(source), encoding="utf-8")
        try:
            yield
        finally:
            file.write_text(source, encoding="utf-8")

    def try_out(self, mutant: Mutant, tier: str = "") -> Outcome:
        """Break the copy, run the mutant's tests until one fails, and repair it."""
        with self.broken(mutant):
            return self.run(mutant.tests_on(tier), "-x", cache=mutant.name, tier=tier)


def _read(report: Path) -> tuple[list[str], list[str]]:
    """Give the tests that failed and those that passed; what failed outside of a test counts as neither."""
    failed, passed = [], []
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        outcomes = {child.tag for child in case}
        if "failure" in outcomes:
            failed.append(name)
        elif not outcomes & {"error", "skipped"}:
            passed.append(name)
    return failed, passed
