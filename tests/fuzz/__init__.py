"""Fuzzing. A target is a module here with a function `run(data)`, which raises when it finds something.

`python -m tests.fuzz TARGET` looks for findings, `tests/test_fuzz.py` replays the stored cases in `cases/TARGET/`. What
is found becomes a case there, under a name that says what it is about.

- `container`: the parser of the safetensors table, beside that of the safetensors library; the lock header in it and out
- `format`: the readers of the other formats, beside each format's library; the lock header in them and out
- `header`: the reader of the lock header
- `command`: command lines, and the files that they are about
- `differential`: every tier beside the others and the oracle
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

TARGETS = ("container", "format", "header", "command", "differential")
CASES = Path(__file__).parent / "cases"


def target(name: str) -> ModuleType:
    """Import a target."""
    return importlib.import_module(f"{__name__}.{name}")


def stored(name: str) -> list[Path]:
    """List the stored cases of a target."""
    return sorted((CASES / name).iterdir())
