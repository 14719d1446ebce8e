"""Study 3: whether somebody with some of the training data gets further from locked weights than from none."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from benchmarks.paper import attacker
from benchmarks.paper.attacker import (
    CLIPPED,
    CONTROLS,
    LAST_LOCKED,
    PLAIN,
    RANDOM_CLIPPED,
    RANKED,
    SANITISERS,
    SCRATCH,
    balanced_order,
)
from benchmarks.paper.chance import mean_interval
from benchmarks.paper.charts import Charts
from benchmarks.paper.data import Dataset
from benchmarks.paper.networks import ARCHITECTURES
from benchmarks.paper.seeding import seeded
from benchmarks.paper.tables import percent, table
from benchmarks.paper.training import accuracy, train, trained

TITLE = "Fine-tuning attack"
MARGIN = 0.05  # what so few seeds can tell; the plain weights are worth 11 points and more on average
_BATCH = 64
ALL, LAST = "all layers", "last layer"


@dataclass(frozen=True)
class Plan:
    """What is tried with one network.

    Attributes
    ----------
    shares
        Of the training data that the attacker has.
    rates
        Learning rates; which one is taken for a seed is what did best for the other seeds.
    steps
        Steps of the optimiser, whatever the share.
    seeds
        How many keys, initialisations and choices of data.
    starts
        What to start from.
    last
        What to start from when the last layer alone is trained.
    """

    shares: Sequence[float]
    rates: Sequence[float]
    steps: int
    seeds: int
    starts: Sequence[str] = (PLAIN, SCRATCH, RANDOM_CLIPPED, *SANITISERS, LAST_LOCKED)
    last: Sequence[str] = ()


_ALL_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_PLANS = {
    "MLP, digits": Plan(
        _ALL_SHARES, (1e-3, 3e-3, 1e-2), 200, 6, last=(PLAIN, SCRATCH, RANDOM_CLIPPED, CLIPPED, RANKED, LAST_LOCKED)
    ),
    "LeNet-5": Plan(
        (0.01, 0.05, 0.2, 0.5), (3e-3,), 100, 10, (PLAIN, SCRATCH, RANDOM_CLIPPED, CLIPPED, RANKED, LAST_LOCKED)
    ),
}
_QUICK_PLANS = {"MLP, digits": Plan((0.02, 0.2), (3e-3, 1e-2), 80, 5)}


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Train from every start with every share of the data, at every learning rate."""
    result = {}
    for name, plan in (_QUICK_PLANS if quick else _PLANS).items():
        scores: dict[str, dict[str, list[list[list[float]]]]] = {}  # by what is trained and start; [share][rate][seed]
        for number in range(plan.seeds):
            with seeded(1000 * seed + number) as random:
                _add_scores(scores, name, plan, quick, random)
        result[name] = {
            "shares": [*plan.shares],
            "samples": len(ARCHITECTURES[name].dataset().train_y),
            "steps": plan.steps,
            "rates": [*plan.rates],
            "chance": ARCHITECTURES[name].dataset().chance,
            "trained": _accuracy(trained(ARCHITECTURES[name], quick), ARCHITECTURES[name].dataset()),
            "scores": {
                layers: {start: _best_rate(np.array(found)).tolist() for start, found in starts.items()}
                for layers, starts in scores.items()
            },
        }
    return result


def _add_scores(scores: dict[str, Any], name: str, plan: Plan, quick: bool, random: np.random.Generator) -> None:
    """Add to `scores` what comes of one key, one initialisation and one choice of data."""
    data = ARCHITECTURES[name].dataset()
    starts = attacker.starts(ARCHITECTURES[name], quick, random)
    order = balanced_order(data.train_y, random)
    seed = int(random.integers(2**31))
    for layers, chosen in ((ALL, plan.starts), (LAST, plan.last)):
        for start in chosen:
            table = scores.setdefault(layers, {}).setdefault(
                start, [[[] for _ in plan.rates] for _ in plan.shares]
            )
            for row, share in zip(table, plan.shares, strict=True):
                mine = order[: round(share * len(order))]
                x, y = data.train_x[mine], data.train_y[mine]
                epochs = math.ceil(plan.steps / math.ceil(len(x) / _BATCH))
                for cell, rate in zip(row, plan.rates, strict=True):
                    module = copy.deepcopy(starts[start])
                    parameters = [*module.parameters()][-2:] if layers == LAST else None
                    train(module, x, y, epochs=epochs, learning_rate=rate, seed=seed, parameters=parameters)
                    cell.append(_accuracy(module, data))


def _accuracy(module: nn.Module, data: Dataset) -> float:
    return accuracy(module, data.test_x, data.test_y)


def _best_rate(scores: Any) -> Any:
    """Give [share][seed]: for each seed the score at the learning rate that was best on average for the others.

    A rate chosen by the scores that it is then judged by would flatter whatever scatters most.
    """
    others = scores.sum(2, keepdims=True) - scores
    return np.take_along_axis(scores, others.argmax(1)[:, None], 1)[:, 0]


# ------------------------------------------------------------------------------
# What comes of it


def advantages(found: Mapping[str, Any], layers: str, start: str) -> Any:
    """Give [share][seed]: how much better a start did than what everybody has, key and data being the same."""
    scores = found["scores"][layers]
    control = CONTROLS.get(start, SCRATCH)
    return np.array(scores[start]) - np.array(scores[control])


def check(result: Mapping[str, Any]) -> list[str]:
    """Name the locked starts that did better than what everybody has, and what should have done better and did not."""
    wrong = []
    for network, found in result.items():
        for layers, starts in found["scores"].items():
            for start in starts:
                where = f"fine-tuning: {network}, {layers}, {start}"
                each = advantages(found, layers, start)
                low, high = mean_interval(each.mean(0), 0.95)
                if start in SANITISERS and high > MARGIN:
                    wrong.append(f"{where}: up to {high:.3f} better than {CONTROLS[start]}, accepted is {MARGIN}")
                for share, scores in zip(found["shares"], each, strict=True):
                    if start in SANITISERS and scores.mean() > MARGIN and mean_interval(scores, 0.999)[0] > 0:
                        wrong.append(f"{where}: better than {CONTROLS[start]} with a share of {share}")
                if start == PLAIN and low <= 0:
                    wrong.append(f"{where}: no better than {SCRATCH}, so nothing could be seen here")
    return wrong


def present(result: Mapping[str, Any], charts: Charts) -> str:
    """Write what was found."""
    parts = [_ABOUT.format(margin=percent(MARGIN, 0))]
    for network, found in result.items():
        parts += [f"### {network}", _setting(found), _table(found), _chart(network, found, charts)]
    return "\n\n".join(parts)


_ABOUT = """\
**The paper**, by its abstract (its text is not at hand), claims that locked weights resist fine-tuning: somebody who
has some of the training data gets nothing from the locked network.

**Measured.** The attacker trains with a share of the training data, starting from the locked weights: as they are;
with 0 for NaN and infinity; clipped to the range that a fresh initialisation of that tensor has; shifted and rescaled
to its mean and deviation; or *ranked*: the values of a fresh initialisation in the order of the locked ones, which
leaves nothing of them but that order. Beside them stand training from scratch and, as what there would be to gain,
from the plain weights. All have the same data, batches, steps and learning rates to choose from, by Adam; the rate
for a seed is the one that was best for the others. A control is what everybody has: scratch, and for clipped weights
clipped random bytes, because those spread wider than a fresh initialisation, which may help or harm, whosever bytes
they are. What must hold: averaged over all shares, the 95 % interval of the difference to the control, paired by
seed, stays below {margin}, which is as much as so few seeds can tell and less than half of what the plain weights are
worth, and with no share is the difference larger than that and certain to 99.9 %.

**Where it fails:** with partial locking. Where only the last layer is locked, training that layer anew on a few
samples brings most of the accuracy back. And the resistance is no more than what training from scratch takes: whoever
has half of the data needs no locked weights. Locked weights *as they are*, and with zeroes for NaN, cannot be trained
at all: values of up to 10^38 are left."""


def _setting(found: Mapping[str, Any]) -> str:
    seeds = len(found["scores"][ALL][SCRATCH][0])
    return (
        f"{found['samples']} samples in all, on which the network had been trained to {percent(found['trained'])}; "
        f"{found['steps']} steps or a few more, {seeds} seeds, learning rates {', '.join(map(str, found['rates']))}."
    )


def _table(found: Mapping[str, Any]) -> str:
    rows = []
    for layers, starts in found["scores"].items():
        for start, scores in starts.items():
            each = advantages(found, layers, start)
            low, high = mean_interval(each.mean(0), 0.95)
            shown = f"{100 * each.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            means = [percent(mean) for mean in np.mean(scores, 1)]
            rows.append((start, layers, *means, "–" if (layers, start) == (ALL, SCRATCH) else shown))
    shares = [f"{share:.0%} of data" for share in found["shares"]]
    return table(("start", "trained", *shares, "points above its control, 95 % interval"), rows)


def _chart(network: str, found: Mapping[str, Any], charts: Charts) -> str:
    series = {}
    for layers, starts in found["scores"].items():
        for start, scores in starts.items():
            if layers == ALL or start == LAST_LOCKED:
                label = start if layers == ALL else f"{start}; {layers} trained"
                series[label] = [
                    (100 * share, 100 * min(each), 100 * float(np.mean(each)), 100 * max(each))
                    for share, each in zip(found["shares"], scores, strict=True)
                ]
    name = "fine_tuning_" + "".join(c if c.isalnum() else "_" for c in network.lower())
    return charts.lines(
        name,
        f"Fine-tuning of {network}: mean and range over seeds",
        "share of the training data, %",
        "test accuracy, %",
        series,
        limit=100 * found["chance"],
    )
