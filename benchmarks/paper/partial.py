"""Study 2: what a network is worth of which only a part is locked, and so what `only=` is worth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.paper.chance import distribution, is_chance
from benchmarks.paper.charts import Charts
from benchmarks.paper.locked_network import answers, copies, put, sanitize
from benchmarks.paper.networks import ARCHITECTURES, Architecture
from benchmarks.paper.seeding import seeded
from benchmarks.paper.tables import percent, percents, table
from benchmarks.paper.training import accuracy, trained
from deeplock_kernels import CounterSchedule, lock
from deeplock_kernels.frameworks.torch import lock_module

TITLE = "Partial locking: what `only=` is worth"
EVERYTHING = "everything"
_QUICK = ("MLP, digits",)
_FULL = ("MLP, digits", "LeNet-5", "VGG", "ResNet-20", "ViT", "LeNet-5, int8", "LeNet-5, bfloat16")
_NORMS = (nn.BatchNorm2d, nn.LayerNorm)
_MOST_PREFIXES = 8
_STATES = ("locked", "sanitised", "replaced")
_BYTES = {  # of a weight, the lowest first, as they lie in memory
    "float32": {
        "byte 3: sign, exponent but its last bit": [3],
        "byte 2: the exponent's last bit, first 7 bits of the mantissa": [2],
        "bytes 0 and 1: the rest of the mantissa": [0, 1],
    },
    "bfloat16": {"byte 1: sign, exponent but its last bit": [1], "byte 0: the exponent's last bit, mantissa": [0]},
    "int8": {},
}


class _Part(NamedTuple):
    """A part of a network: tensors, or in floating-point ones bytes of each weight."""

    label: str
    only: str
    names: list[str]
    columns: list[int] | None = None


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Lock each part of each network with several keys."""
    networks = []
    for name in _QUICK if quick else _FULL:
        with seeded(seed) as random:
            networks.append(_network(ARCHITECTURES[name], quick, random))
    return {"networks": networks}


def _network(architecture: Architecture, quick: bool, random: np.random.Generator) -> dict[str, Any]:
    module, data = trained(architecture, quick), architecture.dataset()
    x, y = architecture.judges()
    plain = copies(module)
    total = sum(tensor.nbytes for tensor in plain.values())
    times = 3 if quick else 5 if architecture.costly else 20
    fresh = [copies(architecture.converted(architecture.untrained(1 + index))) for index in range(3)]
    found = {
        "name": architecture.name,
        "chance": data.chance,
        "samples": len(y),
        "before": accuracy(module, x, y),
        "keys": times,
        "parts": [],
    }
    for part in _parts(module, architecture.dtype):
        asked: dict[str, list[dict[str, Any]]] = {state: [] for state in _STATES}
        for _ in range(times):
            put(module, plain)
            _lock(module, part, random)
            asked["locked"].append(answers(module, x, y))
            sanitize(module)
            asked["sanitised"].append(answers(module, x, y))
        for other in fresh:
            put(module, plain)
            _change(module, part, other.__getitem__)
            asked["replaced"].append(answers(module, x, y))
        share = sum(plain[name].nbytes * _share(part, plain[name]) for name in part.names) / total
        found["parts"].append(
            {
                "label": part.label,
                "only": part.only,
                "share": share,
                "nan": statistics.fmean(each["nan"] for each in asked["locked"]),
                **{
                    state: distribution([each["accuracy"] for each in tries], data.chance, len(y))
                    for state, tries in asked.items()
                },
            }
        )
    put(module, plain)
    found["after"] = accuracy(module, x, y)
    return found


def _parts(module: nn.Module, dtype: str) -> Iterator[_Part]:
    tensors = module.state_dict()
    layers = [
        [f"{prefix}.{name}" if prefix else name for name in layer.state_dict()]
        for prefix, layer in module.named_modules()
        if not [*layer.children()] and layer.state_dict()
    ]
    yield _Part("first layer", _pattern(layers[0]), layers[0])
    yield _Part("last layer", _pattern(layers[-1]), layers[-1])
    owned = {name for names in layers for name in names}
    layers = [[name] for name in tensors if name not in owned] + layers  # first what a network itself owns
    biases = [name for name in tensors if name.endswith("bias")]
    yield _Part("biases", "*bias", biases)
    kinds = dict(module.named_modules())
    norms = [name for name in tensors if isinstance(kinds[name.rpartition(".")[0]], _NORMS)]
    if norms:
        yield _Part("normalizations", "a function", norms)
    if dtype == "int8":
        yield _Part("int8 weights", "*.weight", [name for name in tensors if name.endswith("weight")])
        yield _Part("scales", "*.scale", [name for name in tensors if name.endswith("scale")])
    floats = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    for label, columns in _BYTES[dtype].items():
        yield _Part(label, "none", floats, columns)
    step = max(-(-len(layers) // _MOST_PREFIXES), 1)
    for count in range(step, len(layers), step):
        names = [name for names in layers[:count] for name in names]
        yield _Part(f"the first {count} of {len(layers)} layers", "a function", names)
    yield _Part(EVERYTHING, "None", [*tensors])


def _pattern(names: list[str]) -> str:
    return f"{names[0].rpartition('.')[0]}.*"


def _share(part: _Part, tensor: Tensor) -> float:
    return 1.0 if part.columns is None else len(part.columns) / tensor.element_size()


def _lock(module: nn.Module, part: _Part, random: np.random.Generator) -> None:
    """Lock a part; bytes of weights are gathered for it, which tensors by name are not made for."""
    key = random.bytes(32)
    if part.columns is None:
        lock_module(module, key, only=set(part.names).__contains__, seal=False)
        return
    ivs = {name: random.bytes(16) for name in part.names}
    state = module.state_dict()

    def locked(name: str) -> Tensor:
        flat = lock(state[name].contiguous().clone().view(torch.uint8).numpy(), CounterSchedule(key, ivs[name]))
        return torch.from_numpy(flat).view(state[name].dtype).view(state[name].shape)

    _change(module, part, locked)


def _change(module: nn.Module, part: _Part, other: Callable[[str], Tensor]) -> None:
    """Put that part of other tensors in place of a network's."""
    state = module.state_dict()
    with torch.no_grad():
        for name in part.names:
            if part.columns is None:
                state[name].copy_(other(name))
            else:
                size = state[name].element_size()
                ours, theirs = (t.view(-1).view(torch.uint8).view(-1, size) for t in (state[name], other(name)))
                ours[:, part.columns] = theirs[:, part.columns]


def check(result: dict[str, Any]) -> list[str]:
    """Name what must hold and does not."""
    broken = []
    for network in result["networks"]:
        whole = next(part for part in network["parts"] if part["label"] == EVERYTHING)
        for state in ("locked", "sanitised"):
            if not is_chance(whole[state], network["chance"], network["samples"]):
                broken.append(f"{network['name']}, {state}: mean {whole[state]['mean']:.4f} with everything locked")
        if network["after"] != network["before"]:
            broken.append(f"{network['name']}: accuracy {network['after']} afterwards, {network['before']} before")
    return broken


def present(result: dict[str, Any], charts: Charts) -> str:
    """Write what was found."""
    networks = result["networks"]
    parts = [
        "The paper locks every parameter, and its abstract claims nothing about parts; `only=` of this package "
        "locks parts. *Locked*: the weights as they are, for several keys. *Sanitised*: made plausible as above. "
        "*Replaced*: the locked part exchanged for that of an untrained network, three of them; the lock header "
        "tells anybody which part that is. None of this needs a key, data or training, so **the best of the three "
        "is the least that a thief has**; fine-tuning goes on from there.",
    ]
    for network in networks:
        parts += [
            f"### {network['name']}: {percent(network['before'])} before, chance {percent(network['chance'])}",
            table(
                ["locked part", "`only=`", "share of bytes", "NaN outputs", *_STATES],
                [
                    (
                        part["label"],
                        part["only"] if part["only"] in ("none", "a function") else f"`{part['only']}`",
                        percent(part["share"]),
                        percent(part["nan"], 0),
                        *(_cell(part[state]) for state in _STATES),
                    )
                    for part in network["parts"]
                ],
            ),
        ]
    parts.append(
        "**Biases** alone protect little: with those of an untrained network in their place, networks have most "
        "of their accuracy back, the transformer more than half of it. So do **layer normalizations** and the "
        "**scales** of int8. **Batch normalizations** take the accuracy away, as they hold statistics of the data "
        "too, and so does **the last layer**, which is what a thief trains anew first. **The first layer** of a "
        "small network does not always: with untrained filters LeNet-5 is right up to 19 times in 20. Of "
        "**mantissas**, the lower two bytes are worth nothing, neither to the network nor to a lock; the byte "
        "that holds the exponent's last bit matters to deep networks only. **Sign and exponent**, a quarter of "
        "the bytes, take all accuracy away, as locking everything does; for single bytes of weights `only=` has "
        "no pattern, so that they were gathered and locked by `lock`. Where a whole network is near chance here, "
        "all that its other layers have learnt still lies open: only locking everything hides it.",
    )
    parts.append(
        charts.lines(
            "partial",
            "Accuracy when the first layers are replaced by an untrained network's",
            "share of the bytes locked, in percent",
            "accuracy",
            {network["name"]: _prefixes(network) for network in networks},
            limit=networks[0]["chance"],
        )
    )
    return "\n\n".join(parts)


def _prefixes(network: dict[str, Any]) -> list[tuple[float, float, float, float]]:
    """Give the accuracies against the share of bytes, for more and more of the first layers."""
    points = [(0.0, *3 * (network["before"],))]
    for part in network["parts"]:
        if part["label"].startswith(("the first", EVERYTHING)):
            found = part["replaced"]
            points.append((100 * part["share"], found["low"], found["mean"], found["high"]))
    return points


def _cell(found: dict[str, Any]) -> str:
    mean = percent(found["mean"])
    return mean if found["low"] == found["high"] else f"{mean} ({percents(found['low'], found['high'])})"
