"""Study 6: what locking, unlocking and a key for each query take, beside a query of the plain network."""

from __future__ import annotations

import copy
import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.paper.charts import Charts
from benchmarks.paper.networks import ARCHITECTURES, Architecture
from benchmarks.paper.tables import table
from benchmarks.paper.training import compute_dtype, trained
from benchmarks.results import Spread, seconds_text, size_text
from benchmarks.rounds import repeat, seconds_of
from deeplock_kernels.frameworks.torch import KeyedModule, lock_module, unlock_module

TITLE = "Cost: locking, unlocking, and a key for each query"
ALONE = True  # nothing else may run beside what is timed
_KEY = bytes(range(32))
_QUICK = ("MLP, digits", "LeNet-5")
_BATCHES = (1, 32)
_ROUND_SECONDS = 0.01


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Time each network; these figures are not the same in another run."""
    torch.manual_seed(seed)
    rounds = 2 if quick else 15
    names = _QUICK if quick else [*ARCHITECTURES]
    return {"rounds": rounds, "networks": [_network(ARCHITECTURES[name], quick, rounds) for name in names]}


def _network(architecture: Architecture, quick: bool, rounds: int) -> dict[str, Any]:
    plain = trained(architecture, quick)
    locked = copy.deepcopy(plain)
    header = lock_module(locked, _KEY)
    keyed = KeyedModule(locked, header)
    x = architecture.dataset().test_x.to(compute_dtype(plain))
    found: dict[str, Any] = {
        "name": architecture.name,
        "bytes": sum(tensor.nbytes for tensor in plain.state_dict().values()),
        "batches": [],
    }
    with torch.no_grad(), keyed.session(_KEY) as compute:
        for batch in _BATCHES:
            some = x[:batch]
            works = {
                "plain": partial(plain, some),
                "keyed": partial(keyed, some, key=_KEY),
                "session": partial(compute, some),
            }
            same = all(torch.equal(plain(some), work()) for work in works.values())
            found["batches"].append({"batch": batch, "same": same, **_in_turn(works, rounds)})
        found["locking"] = _locking(copy.deepcopy(plain), partial(plain, x[:1]), rounds)
    return found


def _in_turn(works: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Give the seconds of each work in each round, in which all run one after the other."""
    for work in works.values():
        repeat(work, 2)
    repeats = max(int(_ROUND_SECONDS / max(seconds_of(works["plain"]), 1e-6)), 1)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(seconds_of(work, repeats))
    return taken


def _locking(module: torch.nn.Module, query: Any, rounds: int) -> dict[str, list[float]]:
    """Give the seconds of a lock, of the unlock and of a plain query in each round."""
    turns = [_turn(module, query) for _ in range(rounds + 1)][1:]
    return {name: [seconds[name] for seconds in turns] for name in turns[0]}


def _turn(module: torch.nn.Module, query: Any) -> dict[str, float]:
    headers: list[Any] = []
    return {
        "lock": seconds_of(lambda: headers.append(lock_module(module, _KEY))),
        "unlock": seconds_of(lambda: unlock_module(module, _KEY, headers[0])),
        "plain": seconds_of(query, 3),
    }


def check(result: dict[str, Any]) -> list[str]:
    """Name what must hold and does not: that keyed inference gives the same answers, bit for bit."""
    return [
        f"{network['name']}, batch {each['batch']}: with a key its outputs are others"
        for network in result["networks"]
        for each in network["batches"]
        if not each["same"]
    ]


def present(result: dict[str, Any], charts: Charts) -> str:
    """Write what was found."""
    networks = result["networks"]
    locking, queries, bars = [], [], {}
    for network in networks:
        times = network["locking"]
        locking.append(
            (
                network["name"],
                size_text(network["bytes"]),
                *(seconds_text(statistics.median(times[name])) for name in ("plain", "lock", "unlock")),
                *(_ratio(times["plain"], times[name]) for name in ("lock", "unlock")),
            )
        )
        for each in network["batches"]:
            more = {name: _more(each["plain"], each[name]) for name in ("keyed", "session")}
            queries.append(
                (
                    network["name"],
                    each["batch"],
                    seconds_text(statistics.median(each["plain"])),
                    *(_added(each["plain"], each[name]) for name in more),
                    *(f"{spread.middle:.0f} % ({spread.low:.0f} to {spread.high:.0f})" for spread in more.values()),
                )
            )
            if each["batch"] == _BATCHES[-1]:
                bars[network["name"]] = {
                    "a key for each query": tuple(more["keyed"]),
                    "a session": tuple(more["session"]),
                }
    return "\n\n".join(
        [
            "The paper calls its scheme lightweight, in its abstract. These networks are small, so that times for "
            "each tensor count for more than those for each byte; `python -m benchmarks.frameworks` has large "
            "ones. What is compared ran one after the other in each of "
            f"{result['rounds']} rounds; a cell has the median, and in brackets the range. These figures differ "
            "from run to run.",
            table(
                [
                    *("network", "size", "plain query", "lock and seal", "verify and unlock"),
                    *("lock / query", "unlock / query"),
                ],
                locking,
            ),
            table(
                [
                    *("network", "batch", "plain query", "added by a key for each query", "added by a session"),
                    *("key for each, more", "session, more"),
                ],
                queries,
            ),
            "Keyed inference (`KeyedModule`) unlocks each layer when it runs, compares seals, and wipes it; its "
            "outputs are those of the plain network, bit for bit. A session derives the keys of the tensors once. "
            "Where a query takes some microseconds, Python's part of unlocking takes many times that: light it is "
            "beside larger batches and larger networks.",
            charts.bars("cost", f"Keyed inference: more time for {_BATCHES[-1]} samples", "percent more", bars),
        ]
    )


def _ratio(reference: list[float], seconds: list[float]) -> str:
    spread = Spread.of(b / a for a, b in zip(reference, seconds, strict=True))
    return f"{spread.middle:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _more(reference: list[float], seconds: list[float]) -> Spread:
    return Spread.of(100 * (b / a - 1) for a, b in zip(reference, seconds, strict=True))


def _added(reference: list[float], seconds: list[float]) -> str:
    return seconds_text(max(statistics.median(b - a for a, b in zip(reference, seconds, strict=True)), 0))
