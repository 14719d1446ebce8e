"""Writes what the studies found: results as JSON, a page of Markdown, and charts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import sklearn
import torch

from benchmarks import environment
from benchmarks.paper.charts import Charts

FOLDER = Path(__file__).resolve().parent.parent / "results" / "paper"
_RESULTS = "results.json"
_OPENING = """\
# The paper's claims, measured

Deep-Lock (Alam, Saha, Mukhopadhyay, Kundu, [arXiv 2008.05966](https://arxiv.org/abs/2008.05966)) locks the weights of a
trained network with a key. The paper's text was not at hand: what it claims is taken from its abstract, where nothing
else is said. `python -m benchmarks.paper` makes this page anew. Keys, salts, data and training are seeded, so a second
run on one machine gives the same tables but for times; another processor rounds differently in training, which moves
accuracies by a few points and no conclusion."""


def write(
    folder: Path, facts: Mapping[str, Any], results: Mapping[str, Any], studies: Mapping[str, ModuleType]
) -> Path:
    """Write results.json, report.md and charts into a folder, and give the path of the page.

    Parameters
    ----------
    folder
        Where to; it is made.
    facts
        What `describe` gave.
    results
        What each study's `measure` gave, by its name.
    studies
        The studies by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = {name: _rounded(result) for name, result in results.items()}
    document = {"environment": dict(facts), "studies": results}
    (folder / _RESULTS).write_text(compact(document) + "\n", encoding="utf-8")
    mark = "QUICK RUN, ITS FIGURES MEAN NOTHING; " if facts["quick"] else ""
    line = f"{mark}{environment.line(facts)}; PyTorch with {facts['torch_threads']} of them"
    charts = Charts(folder, line)
    parts = [_OPENING, f"Measured on: {line}."]
    for name, result in results.items():
        parts += [f"## {studies[name].TITLE}", studies[name].present(result, charts)]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _rounded(value: Any) -> Any:
    """Give results with floats of seven digits, as many as the page shows at most."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    return [*map(_rounded, value)] if isinstance(value, (list, tuple)) else value


def describe(*, quick: bool) -> dict[str, Any]:
    """Collect the facts of the machine and of the versions, those of PyTorch among them."""
    facts = environment.describe(quick=quick)
    versions = {"torch": torch.__version__, "scikit-learn": sklearn.__version__}
    return {**facts, "packages": facts["packages"] | versions, "torch_threads": torch.get_num_threads()}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the environment and the results of a run from its folder."""
    document = json.loads((folder / _RESULTS).read_text(encoding="utf-8"))
    return document["environment"], document["studies"]


def compact(value: Any, indent: str = "") -> str:
    """Write JSON with each list that holds no mapping on one line."""
    inner = indent + " "
    if isinstance(value, Mapping):
        entries = [f"{inner}{json.dumps(str(name))}: {compact(each, inner)}" for name, each in value.items()]
        return "{\n" + ",\n".join(entries) + f"\n{indent}}}" if entries else "{}"
    if isinstance(value, (list, tuple)) and any(isinstance(each, Mapping) for each in value):
        return "[\n" + ",\n".join(inner + compact(each, inner) for each in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
