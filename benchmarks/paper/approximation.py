"""Study 4: whether a search that needs no gradient gets further from locked weights, or by way of the key."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.paper import attacker
from benchmarks.paper.attacker import (
    AS_THEY_ARE,
    CLIPPED,
    CONTROLS,
    RANDOM_CLIPPED,
    RANKED,
    SCRATCH,
    balanced_order,
    clipped,
)
from benchmarks.paper.chance import mean_interval
from benchmarks.paper.charts import Charts
from benchmarks.paper.networks import ARCHITECTURES, Architecture
from benchmarks.paper.seeding import seeded
from benchmarks.paper.tables import percent, table
from benchmarks.paper.training import accuracy, trained
from deeplock_kernels.frameworks.torch import lock_module, unlock_module

TITLE = "Approximation attack"
SHARE = 0.1  # of the training data, by which the attacker judges a guess
MARGIN = 0.05
_POPULATION, _ELITE, _CONTESTANTS = 30, 3, 3
_CHANGED, _STEP = 0.1, 0.5  # the share of weights that a mutation moves, and how far: in deviations of fresh ones
_KEY_BITS = 256
SCHEDULES = ("counter", "expansion")
RANDOM_KEYS, CLIMB, CLIMB_NEAR = "random keys", "climb from a random key", "climb from 8 bits off"
_NEAR = 8


@dataclass(frozen=True)
class Plan:
    """What is tried with one network.

    Attributes
    ----------
    evaluations
        How many guesses a genetic search may judge.
    seeds
        How many keys, initialisations and choices of data.
    starts
        What a genetic search starts from.
    keys
        How many guesses a search for the key may judge.
    """

    evaluations: int
    seeds: int
    starts: Sequence[str]
    keys: int


_STARTS = (SCRATCH, RANDOM_CLIPPED, CLIPPED, RANKED)
_PLANS = {
    "MLP, digits": Plan(2100, 8, (*_STARTS, AS_THEY_ARE), 256),
    "LeNet-5": Plan(900, 3, _STARTS, 0),
}
_QUICK_PLANS = {"MLP, digits": Plan(400, 5, _STARTS, 40)}


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Search from each start, and for the key."""
    result = {}
    for name, plan in (_QUICK_PLANS if quick else _PLANS).items():
        architecture = ARCHITECTURES[name]
        genetic: dict[str, list[dict[str, Any]]] = {start: [] for start in plan.starts}
        keys: dict[str, Any] = {schedule: {"distances": {}, "searches": {}} for schedule in SCHEDULES}
        for number in range(plan.seeds):
            with seeded(1000 * seed + number) as random:
                for start, found in _genetic_searches(architecture, plan, quick, random).items():
                    genetic[start].append(found)
                if plan.keys:
                    for schedule in SCHEDULES:
                        _search_keys(keys[schedule], architecture, schedule, plan.keys, quick, random)
        data = architecture.dataset()
        result[name] = {
            "evaluations": plan.evaluations,
            "samples": round(SHARE * len(data.train_y)),
            "chance": data.chance,
            "trained": accuracy(trained(architecture, quick), data.test_x, data.test_y),
            "genetic": genetic,
            "keys": keys if plan.keys else None,
            "key_evaluations": plan.keys,
        }
    return result


# ------------------------------------------------------------------------------
# Weights


def _genetic_searches(
    architecture: Architecture, plan: Plan, quick: bool, random: np.random.Generator
) -> dict[str, dict[str, Any]]:
    """Give for each start how the best fitness grew, and the test accuracy of the fittest."""
    data = architecture.dataset()
    starts = attacker.starts(architecture, quick, random)
    mine = balanced_order(data.train_y, random)[: round(SHARE * len(data.train_y))]
    x, y = data.train_x[mine], data.train_y[mine]
    scale = _vector(_deviations(starts[SCRATCH]))
    seed, found = int(random.integers(2**31)), {}
    for start in plan.starts:
        module = copy.deepcopy(starts[start])

        def fitness(weights: Tensor, module: nn.Module = module) -> float:
            _put(module, weights)
            return accuracy(module, x, y)

        begin = _vector([*module.parameters()])
        curve, best = evolve(begin, scale, fitness, plan.evaluations, torch.Generator().manual_seed(seed))
        _put(module, best)
        found[start] = {"curve": curve, "accuracy": accuracy(module, data.test_x, data.test_y)}
    return found


def evolve(
    start: Tensor,
    scale: Tensor,
    fitness: Callable[[Tensor], float],
    evaluations: int,
    random: torch.Generator,
) -> tuple[list[tuple[int, float]], Tensor]:
    """Search by a genetic algorithm.

    The first generation are mutations of the start. Of each one the fittest live on, and all others are children: each
    weight comes from one parent or the other, and some are mutated. A parent is the fittest of a few drawn at random.

    Parameters
    ----------
    start
        Weights, a vector.
    scale
        How far a mutation moves each weight, in the mean.
    fitness
        Judges weights; more is better.
    evaluations
        How often it may be asked, the first generation included.
    random
        Draws.

    Returns
    -------
    tuple
        (number of evaluations, best fitness until then) after each generation, and the best weights.
    """

    def mutated(weights: Tensor) -> Tensor:
        moved = torch.rand(weights.shape, generator=random) < _CHANGED
        return weights + moved * scale * _STEP * torch.randn(weights.shape, generator=random)

    def parent() -> Tensor:
        drawn = torch.randint(_POPULATION, (_CONTESTANTS,), generator=random)
        return population[int(drawn.min())]  # the fittest come first

    population = [start, *(mutated(start) for _ in range(_POPULATION - 1))]
    scores = [fitness(weights) for weights in population]
    asked, curve = _POPULATION, []
    while True:
        order = sorted(range(_POPULATION), key=lambda index: -scores[index])
        population, scores = [population[index] for index in order], [scores[index] for index in order]
        curve.append((asked, scores[0]))
        if asked + _POPULATION - _ELITE > evaluations:
            return curve, population[0]
        children = []
        for _ in range(_POPULATION - _ELITE):
            one, other = parent(), parent()
            children.append(mutated(torch.where(torch.rand(one.shape, generator=random) < 0.5, one, other)))
        population = population[:_ELITE] + children
        scores = scores[:_ELITE] + [fitness(weights) for weights in children]
        asked += len(children)


def _vector(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _put(module: nn.Module, weights: Tensor) -> None:
    nn.utils.vector_to_parameters(weights, module.parameters())


def _deviations(fresh: nn.Module) -> list[Tensor]:
    return [torch.full_like(tensor, float(tensor.detach().std())) for tensor in fresh.parameters()]


# ------------------------------------------------------------------------------
# Keys


def _search_keys(
    found: dict[str, Any],
    architecture: Architecture,
    schedule: str,
    evaluations: int,
    quick: bool,
    random: np.random.Generator,
) -> None:
    """Judge keys near the right one, and search for it bit by bit; add what was found."""
    data = architecture.dataset()
    mine = balanced_order(data.train_y, random)[: round(SHARE * len(data.train_y))]
    x, y = data.train_x[mine], data.train_y[mine]
    locked, module, fresh = trained(architecture, quick), architecture.make(), architecture.make()
    key = random.bytes(_KEY_BITS // 8)
    header = lock_module(locked, key, schedule=schedule)
    module.eval()

    def fitness(guess: bytes) -> float:
        with torch.no_grad():
            module.load_state_dict(locked.state_dict())
            unlock_module(module, guess, header, check=False, seal=False)
            for mine, new in zip(module.parameters(), fresh.parameters(), strict=True):
                mine.copy_(clipped(mine, new))
        return accuracy(module, x, y)

    for distance in (0, 1, 2, 4, 8, 16, 32, 64, 128):
        guesses = [_flipped(key, random.permutation(_KEY_BITS)[:distance]) for _ in range(4 if quick else 16)]
        found["distances"].setdefault(str(distance), []).extend(fitness(guess) for guess in guesses)
    begins = {
        CLIMB: random.bytes(_KEY_BITS // 8),
        CLIMB_NEAR: _flipped(key, random.permutation(_KEY_BITS)[:_NEAR]),
    }
    for search, begin in begins.items():
        guess, best = climb(begin, fitness, evaluations, random)
        found["searches"].setdefault(search, []).append((best, _distance(guess, key)))
    tried = [(fitness(guess), _distance(guess, key)) for guess in (random.bytes(len(key)) for _ in range(evaluations))]
    found["searches"].setdefault(RANDOM_KEYS, []).append(max(tried))


def climb(
    begin: bytes, fitness: Callable[[bytes], float], evaluations: int, random: np.random.Generator
) -> tuple[bytes, float]:
    """Turn one bit at a time, and keep it if the fitness is no less; give the last key and its fitness."""
    key, best = begin, fitness(begin)
    for bit in random.integers(0, 8 * len(begin), evaluations - 1):
        guess = _flipped(key, [bit])
        if (score := fitness(guess)) >= best:
            key, best = guess, score
    return key, best


def _flipped(key: bytes, bits: Sequence[int]) -> bytes:
    flipped = bytearray(key)
    for bit in bits:
        flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def _distance(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()


# ------------------------------------------------------------------------------
# What comes of it


def check(result: Mapping[str, Any]) -> list[str]:
    """Name the locked starts that led further than what everybody has, and the keys that were found."""
    wrong = []
    for network, found in result.items():
        halfway = (found["chance"] + found["trained"]) / 2
        for start, control in CONTROLS.items():
            if start in found["genetic"]:
                where = f"approximation: {network}, {start}"
                each = _advantage(found, start, control)
                if np.mean(each) > MARGIN and mean_interval(each, 0.999)[0] > 0:
                    wrong.append(f"{where}: {np.mean(each):.3f} better than {control}")
                if np.mean([run["accuracy"] for run in found["genetic"][start]]) > halfway:
                    wrong.append(f"{where}: it led more than half way to the trained network")
        for schedule, keys in (found["keys"] or {}).items():
            where = f"approximation: {network}, keys, {schedule}"
            if min(keys["distances"]["0"]) <= halfway:
                wrong.append(f"{where}: the right key does not stand out, so nothing could be seen here")
            if max(max(scores) for distance, scores in keys["distances"].items() if distance != "0") >= halfway:
                wrong.append(f"{where}: a key near the right one led half way to the trained network")
            for search, ends in keys["searches"].items():
                if any(best >= halfway or not distance for best, distance in ends):
                    wrong.append(f"{where}, {search}: it found the key, or one that is nearly as good")
    return wrong


def present(result: Mapping[str, Any], charts: Charts) -> str:
    """Write what was found."""
    parts = [_ABOUT.format(margin=percent(MARGIN, 0), share=percent(SHARE, 0))]
    for network, found in result.items():
        parts += [f"### {network}", _genetic_table(found), _genetic_chart(network, found, charts)]
        if found["keys"]:
            parts += [_ABOUT_KEYS, _search_table(found), _distance_chart(network, found, charts)]
    return "\n\n".join(parts)


_ABOUT = """\
**The paper's follow-up**, NN-Lock (ACM JETC 18(3), 2022), evaluates an approximation by a genetic algorithm; its text
is not at hand, so the algorithm and its budget are ours. The claim is that the attack does not succeed.

**Measured.** The attacker judges guesses by their accuracy on {share} of the training data. A population of 30 begins
with mutations of one start; the fittest three live on, all others are children of two parents, each weight from one
of them, with a tenth of the weights moved by half the deviation of a fresh initialisation. Starts are locked weights,
clipped to the range of a fresh initialisation or with the values of one in their order, and what everybody has: a
fresh initialisation and clipped random bytes. Data, draws and budget are the same for all. What must hold: no locked
start ends more than {margin} above its control on the test set where the difference is certain to 99.9 %, and none
ends half way to the trained network. With so few seeds a difference of some points either way is no more than
scatter; the intervals say how much."""
_ABOUT_KEYS = """\
**The same by way of the key.** Here a guess is a key of 256 bits; the attacker unlocks with it, clips, and judges. A
climb turns one bit at a time and keeps it where the fitness is no less. One climb begins at a random key, one at a
key of which only 8 bits are wrong; beside them as many random keys. With `counter` a key that is wrong in one bit is
as bad as any other, so that there is nothing to climb. With `expansion`, where one bit of the key leaves up to 44 %
of the key stream as it was, single keys that are one or two bits off stand out a little, and are as useless. The
right key must stand out, and no search may find it or anything half as good."""


def _advantage(found: Mapping[str, Any], start: str, control: str) -> list[float]:
    """Give for each seed how much better on the test set the one ended than the other."""
    pairs = zip(found["genetic"][start], found["genetic"][control], strict=True)
    return [one["accuracy"] - other["accuracy"] for one, other in pairs]


def _genetic_table(found: Mapping[str, Any]) -> str:
    rows = []
    for start, runs in found["genetic"].items():
        control, shown = CONTROLS.get(start), "–"
        if control is not None:
            each = _advantage(found, start, control)
            low, high = mean_interval(each, 0.95)
            shown = f"{100 * np.mean(each):+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) beside {control}"
        fitness, test = ([percent(value) for value in _spread(values)] for values in (_ends(runs), _tests(runs)))
        rows.append((start, *(f"{middle} ({low} to {high})" for low, middle, high in (fitness, test)), shown))
    columns = ("start", "fitness at the end", "test accuracy at the end", "points above its control, 95 % interval")
    title = f"{found['evaluations']} evaluations, {len(runs)} seeds; trained, it had {percent(found['trained'])}."
    return f"{title}\n\n{table(columns, rows)}"


def _ends(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [run["curve"][-1][1] for run in runs]


def _tests(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [run["accuracy"] for run in runs]


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), float(np.mean(values)), max(values)


def _genetic_chart(network: str, found: Mapping[str, Any], charts: Charts) -> str:
    series = {}
    for start, runs in found["genetic"].items():
        steps = max(len(runs[0]["curve"]) // 10, 1)
        at_once = [*zip(*(run["curve"] for run in runs), strict=True)][::steps]
        series[start] = [
            (points[0][0], *(100 * value for value in _spread([best for _, best in points]))) for points in at_once
        ]
    return charts.lines(
        "approximation_" + "".join(c if c.isalnum() else "_" for c in network.lower()),
        f"Genetic search from weights of {network}: mean and range over seeds",
        "evaluations",
        "best accuracy on the attacker's data, %",
        series,
        limit=100 * found["chance"],
    )


def _search_table(found: Mapping[str, Any]) -> str:
    rows = []
    for schedule, keys in found["keys"].items():
        for search, ends in keys["searches"].items():
            (low, mean, high), (nearest, average, _) = (_spread(values) for values in zip(*ends, strict=True))
            fitness = f"{percent(mean)} ({percent(low)} to {percent(high)})"
            rows.append((search, schedule, fitness, f"{average:.0f} (nearest {nearest})"))
    columns = ("search", "schedule", "best fitness", f"bits of {_KEY_BITS} that are wrong at the end")
    return f"{found['key_evaluations']} evaluations each.\n\n{table(columns, rows)}"


def _distance_chart(network: str, found: Mapping[str, Any], charts: Charts) -> str:
    series = {
        schedule: [
            (int(distance), *(100 * value for value in _spread(scores)))
            for distance, scores in keys["distances"].items()
        ]
        for schedule, keys in found["keys"].items()
    }
    return charts.lines(
        "approximation_keys",
        f"{network} with keys that differ in some bits, clipped: mean and range over keys",
        "bits that differ from the right key",
        "accuracy on the attacker's data, %",
        series,
        limit=100 * found["chance"],
    )
