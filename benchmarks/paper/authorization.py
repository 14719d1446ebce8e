"""Study 1: what a network is worth with the right key, with a wrong one, and without one."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.paper.chance import binomial_band, distribution, is_chance, wilson
from benchmarks.paper.charts import Charts
from benchmarks.paper.locked_network import LockedNetwork, answers, randomize, sanitize
from benchmarks.paper.networks import ARCHITECTURES, Architecture
from benchmarks.paper.seeding import seeded
from benchmarks.paper.tables import percent, percents, table
from benchmarks.paper.training import trained
from deeplock_kernels import SBOXES
from deeplock_kernels.header import SCHEDULE_NAMES

TITLE = "Authorization: the right key, wrong keys, no key"
SCHEDULES = SCHEDULE_NAMES
NO_KEY, RANDOM, ONE_BIT = "no key", "random keys", "one bit off"
WRONG = (RANDOM, ONE_BIT)
SANITIZED = (f"{RANDOM}, sanitised", f"{ONE_BIT}, sanitised")
RANDOM_BYTES = "random bytes"
_DEFAULT_BOX = "aes"
_QUICK = ("MLP, digits", "LeNet-5")
_KEY_BYTES = 32

Group = dict[str, Any]


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Ask every network with every key."""
    names = _QUICK if quick else [*ARCHITECTURES]
    return {"networks": [_network(ARCHITECTURES[name], quick, seed) for name in names]}


def _network(architecture: Architecture, quick: bool, seed: int) -> dict[str, Any]:
    module, data = trained(architecture, quick), architecture.dataset()
    x, y = architecture.judges()
    samples, chance = len(y), data.chance
    before = answers(module, x, y)
    found: dict[str, Any] = {
        "name": architecture.name,
        "data": data.name,
        "dtype": architecture.dtype,
        "classes": data.classes,
        "chance": chance,
        "samples": samples,
        "parameters": sum(tensor.numel() for tensor in module.state_dict().values()),
        "before": before["accuracy"],
        "before_interval": wilson(round(before["accuracy"] * samples), samples),
        "comes_back": {},
        "groups": [],
    }

    def add(kind: str, schedule: str, sbox: str, tries: Iterable[Group]) -> None:
        found["groups"].append(_group(kind, schedule, sbox, [*tries], chance, samples))

    with seeded(seed) as random:
        for schedule in SCHEDULES:
            for sbox in SBOXES:
                asked = _numbers(quick, architecture, sbox)
                key = random.bytes(_KEY_BYTES)
                network = LockedNetwork(module, key, schedule=schedule, sbox=sbox)
                others = [random.bytes(_KEY_BYTES) for _ in range(asked[RANDOM])]
                near = [one_bit_off(key, bit) for bit in np.linspace(0, 255, asked[ONE_BIT], dtype=int)]
                add(RANDOM, schedule, sbox, _with_keys(network, others, x, y))
                add(ONE_BIT, schedule, sbox, _with_keys(network, near, x, y))
                if sbox == _DEFAULT_BOX:
                    for kind, keys in zip(SANITIZED, (others, near), strict=True):
                        few = keys[:: -(-len(keys) // asked["sanitised"])]
                        add(kind, schedule, sbox, _with_keys(network, few, x, y, sanitized=True))
                add(NO_KEY, schedule, sbox, _without_key(network, random, asked[NO_KEY], x, y))
                found["comes_back"][f"{schedule}, {sbox}"] = network.comes_back()
        found["after"] = answers(module, x, y)["accuracy"]
        draws = 10 if quick else 32 if architecture.costly else 100
        add(RANDOM_BYTES, "", "", _random_bytes(module, random, draws, x, y))
    return found


def _numbers(quick: bool, architecture: Architecture, sbox: str) -> dict[str, int]:
    """Say how many keys to try: all with the default S-Box, and on costly networks few with others."""
    if quick:
        few = 10 if sbox == _DEFAULT_BOX else 2
        return {NO_KEY: 2, RANDOM: few, ONE_BIT: few, "sanitised": few}
    if sbox == _DEFAULT_BOX:
        return {NO_KEY: 20, RANDOM: 100, ONE_BIT: 256, "sanitised": 16 if architecture.costly else 256}
    return {NO_KEY: 2, RANDOM: 4, ONE_BIT: 8} if architecture.costly else {NO_KEY: 5, RANDOM: 100, ONE_BIT: 256}


def one_bit_off(key: bytes, bit: int) -> bytes:
    """Give the key with one of its bits changed."""
    changed = bytearray(key)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _with_keys(
    network: LockedNetwork, keys: Iterable[bytes], x: Tensor, y: Tensor, *, sanitized: bool = False
) -> Iterator[Group]:
    for key in keys:
        network.unlock(key)
        if sanitized:
            sanitize(network.module)
        yield answers(network.module, x, y)


def _without_key(
    network: LockedNetwork, random: np.random.Generator, times: int, x: Tensor, y: Tensor
) -> Iterator[Group]:
    """Lock again and again with new keys, and use the locked weights as they are."""
    for _ in range(times):
        network.relock(random.bytes(_KEY_BYTES))
        yield answers(network.module, x, y)


def _random_bytes(module: Any, random: np.random.Generator, times: int, x: Tensor, y: Tensor) -> Iterator[Group]:
    for _ in range(times):
        randomize(module, random)
        yield answers(module, x, y)


def _group(kind: str, schedule: str, sbox: str, tries: list[Group], chance: float, samples: int) -> Group:
    accuracies = [each["accuracy"] for each in tries]
    return {
        "kind": kind,
        "schedule": schedule,
        "sbox": sbox,
        **distribution(accuracies, chance, samples),
        **{name: statistics.fmean(each[name] for each in tries) for name in ("constant", "nan", "infinite", "weights")},
        "accuracies": {str(value): count for value, count in sorted(Counter(accuracies).items())},
    }


def _groups(network: dict[str, Any], **wanted: str) -> list[Group]:
    return [group for group in network["groups"] if all(group[name] == value for name, value in wanted.items())]


def check(result: dict[str, Any]) -> list[str]:
    """Name what must hold and does not."""
    broken = []
    for network in result["networks"]:
        name, chance, samples = network["name"], network["chance"], network["samples"]
        halfway = (chance + network["before"]) / 2
        lost = [which for which, whole in network["comes_back"].items() if not whole]
        broken += [f"{name}: the right key did not give every bit back ({which})" for which in lost]
        if network["after"] != network["before"]:
            broken.append(f"{name}: accuracy {network['after']} after unlocking, {network['before']} before")
        for group in network["groups"]:
            where = f"{name}, {group['kind']}, {group['schedule']}, {group['sbox']}"
            if group["kind"] != f"{ONE_BIT}, sanitised" and not is_chance(group, chance, samples):
                broken.append(f"{where}: mean {group['mean']:.4f}, chance is {chance:.4f}")
            if group["kind"] in (*WRONG, NO_KEY) and group["high"] >= halfway:
                broken.append(f"{where}: one key reached {group['high']:.3f} of {network['before']:.3f}")
    return broken


def present(result: dict[str, Any], charts: Charts) -> str:
    """Write what was found."""
    networks = result["networks"]
    parts = [
        "The paper claims, in its abstract, that a locked model works correctly only with the correct key. That "
        "accuracy falls to that of a guess with any other key is what a public summary of the paper says; its "
        "text is not at hand. A wrong key is refused by this package before a byte changes; here that comparison "
        "is turned off (`check=False`), so that the weights are what the paper's would be.",
        _main_table(networks),
        "Accuracies: the mean over keys, and in brackets from the worst to the best key. *In the band*: the share "
        "of wrong keys (random, and one bit off) whose accuracy lies within the 95 % band of independent guesses. "
        "*Random bytes* are put in place of all weights: as much as any lock can do. *Right key*: whether every "
        "bit is back, with each S-Box. Locked is everything, with the S-Box `aes`. Behind *before* stands "
        "Wilson's interval of 95 %.",
        "### Why: NaN",
        _nan_table(networks),
        "A float of random bits is NaN or infinity once in 256 times, of float32 as of bfloat16, and one NaN "
        "among the weights of an output makes that output NaN. PyTorch's `argmax` gives the first NaN. So with a "
        "wrong key a network gives **the same answer to everything**: on a balanced test set that is right as "
        "often as a guess, but it is no random classifier, and anybody sees at one look, without data, that the "
        "key is wrong. *Sanitised*: in every tensor with NaN, infinity or a weight beyond ±100, NaN becomes 0, "
        "the rest is clipped to ±1, and variances become 1. Most such networks answer this and that, and in the "
        "mean they are right as often as a guess. Single keys scatter more than guesses do, because all answers "
        "of a key depend on each other: with two or three classes, some key comes near the trained accuracy by "
        "luck.",
        charts.histograms(
            "authorization",
            "Accuracy with sanitised weights of wrong keys, against chance (dashed)",
            {network["name"]: _histogram(network) for network in networks},
        ),
        "### Every S-Box",
        _box_table(networks),
        "Accuracy with wrong keys (random, and one bit off): the mean over keys, the best key, and in brackets "
        "how many keys, of both schedules together. No S-Box makes a difference, and none can: unlocking with "
        "another key gives p XOR k XOR k', in which there is no S-Box. It shows only in weights that are used as "
        "they are locked.",
    ]
    return "\n\n".join(parts)


def _main_table(networks: list[dict[str, Any]]) -> str:
    rows = []
    for network in networks:
        for schedule in SCHEDULES:
            groups = _groups(network, schedule=schedule, sbox=_DEFAULT_BOX)
            by_kind = {group["kind"]: group for group in groups}
            wrong = [by_kind[kind] for kind in WRONG]
            inside = sum(each["bands"]["95"] * each["keys"] for each in wrong) / sum(each["keys"] for each in wrong)
            back = all(whole for which, whole in network["comes_back"].items() if which.startswith(schedule))
            rows.append(
                (
                    f"{network['name']} ({network['parameters']:,} weights)",
                    schedule,
                    f"{percent(network['before'])} ({percents(*network['before_interval'])})",
                    *(_cell([by_kind[kind]]) for kind in (NO_KEY, *WRONG)),
                    percent(inside, 0),
                    percents(*binomial_band(network["chance"], network["samples"], 0.95)),
                    _cell(_groups(network, kind=RANDOM_BYTES)),
                    "every bit" if back else "**differs**",
                )
            )
    keys = {group["kind"]: group["keys"] for group in _groups(networks[0], sbox=_DEFAULT_BOX)}
    columns = ["network", "schedule", "before", f"no key ({keys[NO_KEY]})", f"random keys ({keys[RANDOM]})"]
    columns += [f"one bit off ({keys[ONE_BIT]})", "in the band", "band of chance", "random bytes", "right key"]
    return table(columns, rows)


def _histogram(network: dict[str, Any]) -> tuple[dict[str, list[float]], float]:
    """Give the accuracies of sanitised weights by what they are, and chance."""
    named = {}
    for kind in SANITIZED:
        for schedule in SCHEDULES:
            (group,) = _groups(network, kind=kind, schedule=schedule)
            counts = group["accuracies"].items()
            named[f"{kind.partition(',')[0]}, {schedule}"] = [float(value) for value, n in counts for _ in range(n)]
    return named, network["chance"]


def _nan_table(networks: list[dict[str, Any]]) -> str:
    rows = []
    for network in networks:
        wrong = [group for kind in WRONG for group in _groups(network, kind=kind, sbox=_DEFAULT_BOX)]
        cleaned = [_groups(network, kind=kind) for kind in SANITIZED]
        cells = [percent(_mean(wrong, name), 2) for name in ("weights", "nan", "infinite", "constant")]
        constant = percent(_mean([group for groups in cleaned for group in groups], "constant"), 0)
        rows.append((network["name"], *cells, *map(_cell, cleaned), constant))
    columns = ["network", "weights NaN or infinite", "samples with a NaN output", "with an infinite one"]
    columns += ["keys with one answer to all", *SANITIZED, "keys with one answer then"]
    return table(columns, rows)


def _box_table(networks: list[dict[str, Any]]) -> str:
    rows = []
    for network in networks:
        cells = []
        for sbox in SBOXES:
            wrong = [group for kind in WRONG for group in _groups(network, kind=kind, sbox=sbox)]
            count = sum(group["keys"] for group in wrong)
            cells.append(f"{percent(_mean(wrong, 'mean'))}, {percent(max(each['high'] for each in wrong))} ({count})")
        rows.append((network["name"], *cells))
    return table(["network", *SBOXES], rows)


def _cell(groups: list[Group]) -> str:
    low, high = min(group["low"] for group in groups), max(group["high"] for group in groups)
    mean = percent(_mean(groups, "mean"))
    return mean if low == high else f"{mean} ({percents(low, high)})"


def _mean(groups: list[Group], name: str) -> float:
    return float(sum(group[name] * group["keys"] for group in groups) / sum(group["keys"] for group in groups))
