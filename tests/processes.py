"""Programs in fresh Python processes: what only a start, an end, a fork or another environment can show."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import deeplock_kernels

ROOT = Path(deeplock_kernels.__file__).resolve().parent.parent
_HANGS = 200  # seconds; far more than anything takes on a machine with much else to do
_NOT_INHERITED = ("DEEPLOCK_TIER", "DEEPLOCK_REQUIRE_CONSTANT_TIME", "DEEPLOCK_NUM_THREADS", "DEEPLOCK_CACHE")


class Process:
    """A fresh process, in which warnings are errors.

    Parameters
    ----------
    program
        Python code; `sys.argv[1:]` are the arguments. `tests/` and `root` can be imported from.
    root
        The directory that holds the package.
    without
        Names of environment variables that it must not have.
    environment
        More environment variables.
    """

    def __init__(self, program, *arguments, root=ROOT, cwd=None, without=(), **environment):
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("NUMBA_") and name not in _NOT_INHERITED
        }
        kept |= {"PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).resolve().parent)])}
        kept |= {"OPENBLAS_NUM_THREADS": "1"}  # or NumPy's own threads are there at a fork
        kept |= {name: str(value) for name, value in environment.items()}
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-W", "error", "-c", program, *map(str, arguments)],
            env={name: value for name, value in kept.items() if name not in without},
            cwd=cwd or root,  # the first place that Python imports from
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, *, returncode=0, errors="", timeout=_HANGS):
        """Wait for its end, check how it ended and what it wrote to stderr (None: anything), give its stdout."""
        try:
            output, error = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGABRT)  # faulthandler then prints where each thread is
            output, error = self._process.communicate()
            raise AssertionError(f"it hangs; stdout:\n{output}\nstderr:\n{error}") from None
        assert self._process.returncode == returncode, f"{self._process.returncode}\n{output}\n{error}"
        assert errors is None or error == errors, error
        return output


def run(program, *arguments, timeout=_HANGS, **keywords):
    """Run a program to its end in a fresh process; it must succeed and write nothing to stderr. Give its stdout."""
    return Process(program, *arguments, **keywords).finish(timeout=timeout)
