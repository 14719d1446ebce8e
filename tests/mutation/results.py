"""The table of results, `RESULTS.md`: one line a mutant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .trial import RED, Mutant, Outcome

FILE = Path(__file__).with_name("RESULTS.md")
NOT_RUN = "not run"

_HEAD = """\
# What the tests notice

Each mutant breaks the product in one place; the tests that [mutants.py](mutants.py) lists for it have to turn red.
Written by `python -m tests.mutation --write`, and never by hand.

{red} of {all} mutants are noticed.

| mutant | what is broken | where | noticed first by | verdict |
|---|---|---|---|---|
"""


def start_of_line(mutant: Mutant) -> str:
    """Give what a mutant's line says of the mutant itself."""
    return f"| {mutant.name} | {mutant.breaks} | `{mutant.file}` |"


def line(mutant: Mutant, verdict: str, noticed_by: str) -> str:
    """Give a mutant's line."""
    shown = noticed_by.removeprefix("tests/").replace("|", "\\|")
    return f"{start_of_line(mutant)} {f'`{shown}`' if shown else ''} | {verdict} |"


def updated(text: str, mutants: Iterable[Mutant], outcomes: Mapping[str, Outcome]) -> str:
    """Give the table with new outcomes; the others stay as they are in `text`."""
    old = text.splitlines()
    lines = []
    for mutant in mutants:
        if mutant.name in outcomes:
            outcome = outcomes[mutant.name]
            lines.append(line(mutant, outcome.verdict, next(iter(outcome.failed), "")))
        else:
            kept = (found for found in old if found.startswith(start_of_line(mutant)))
            lines.append(next(kept, line(mutant, NOT_RUN, "")))
    red = sum(found.endswith(f"| {RED} |") for found in lines)
    return _HEAD.format(red=red, all=len(lines)) + "\n".join(lines) + "\n"
