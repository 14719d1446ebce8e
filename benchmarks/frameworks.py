"""What the package costs in PyTorch, which has to be installed.

`python -m benchmarks.frameworks [--rounds N] [--quick] [overhead] [speed] [queries]`

Whatever is compared ran one right after the other, in each of many rounds; a table gives the median and the range.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from benchmarks import environment, networks
from benchmarks.models import NETWORKS
from benchmarks.rounds import Work, repeat, seconds_of
from deeplock_kernels import CounterSchedule, LockHeader, lock, lock_tensors, unlock_tensors
from deeplock_kernels.frameworks.torch import KeyedModule, lock_module, unlock_module

KEY = bytes(range(32))
_MANY = 500  # small tensors
_LONGEST = 10  # seconds for the rounds of one measurement, unless three take longer
_LARGE = ("ResNet-50", "BERT-base")
_QUERIES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "MLP 784-2048-2048-10": (networks.mlp, (784,)),
    "ResNet-18, 224 x 224": (networks.resnet18, (3, 224, 224)),
    "BERT-base encoder, 128 tokens": (networks.bert_encoder, (128, 768)),
}


def compared(reference: Work, work: Work, rounds: int, repeats: int = 1) -> tuple[list[float], list[float]]:
    """Give the seconds of the reference and of the work in each round."""
    for warm in (reference, work) * 2:
        repeat(warm, 1)
    pairs = [(seconds_of(reference, repeats), seconds_of(work, repeats)) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """Write median and range."""
    low, middle, high = (form.format(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def overhead(rounds: int, quick: bool) -> Iterator[str]:
    """Write what Python costs for each small tensor."""
    count = 20 if quick else _MANY
    arrays = {f"layer{i}.weight": np.zeros(16, np.float32) for i in range(count)}
    module = torch.nn.ParameterList([torch.zeros(16) for _ in range(count)])
    tensors = {name: torch.zeros(16) for name in arrays}

    def both(data: Any) -> Work:
        def work() -> None:
            unlock_tensors(data, KEY, lock_tensors(data, KEY, seal=False), seal=False)

        return work

    def module_both() -> None:
        unlock_module(module, KEY, lock_module(module, KEY, seal=False), seal=False)

    data, array = torch.zeros(16), np.zeros(16, np.float32)
    schedule = CounterSchedule(KEY, bytes(16))
    key, iv = torch.tensor(list(KEY), dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)
    calls = 10 if quick else 1000
    yield "| in microseconds | NumPy arrays | PyTorch | more |"
    yield "| :-- | --: | --: | --: |"
    entries: list[tuple[str, Work, Work, float, int]] = [
        ("`lock_tensors`, for each tensor", both(arrays), both(tensors), 2 * count, 1),
        ("`lock_module`, for each tensor", both(arrays), module_both, 2 * count, 1),
        ("`lock` in place", lambda: lock(array, schedule, out=array), lambda: lock(data, schedule, out=data), 1, calls),
        (
            "`torch.ops.deeplock.lock_`",
            lambda: lock(array, schedule, out=array),
            lambda: torch.ops.deeplock.lock_(data, key, iv),
            1,
            calls,
        ),
    ]
    for name, reference, work, parts, repeats in entries:
        plain, taken = compared(reference, work, rounds, repeats)
        more = [(b - a) / parts * 1e6 for a, b in zip(plain, taken, strict=True)]
        first, second = ([value / parts * 1e6 for value in values] for values in (plain, taken))
        yield f"| {name} | {spread(first, '{:.1f}')} | {spread(second, '{:.1f}')} | {spread(more, '{:.1f}')} |"


def speed(rounds: int, quick: bool) -> Iterator[str]:
    """Write the speed of locking a module beside that of one flat tensor of as many bytes."""
    yield "| model | tensors | MiB | `lock_module` / flat | `unlock_module` / flat |"
    yield "| :-- | --: | --: | --: | --: |"
    for model in NETWORKS[:1] if quick else [model for model in NETWORKS if model.name in _LARGE]:
        module = networks.storage(model)
        flat = {"flat": torch.zeros(model.nbytes, dtype=torch.uint8)}
        pairs = [_turn(flat, module) for _ in range(rounds + 1)][1:]
        cells = f"{len(model.tensors)} | {model.nbytes / 2**20:.0f}"
        for ratios in zip(*pairs, strict=True):
            cells += f" | {spread(list(ratios))}"
        yield f"| {model.name} | {cells} |"


def _turn(flat: dict[str, torch.Tensor], module: torch.nn.Module) -> tuple[float, float]:
    """Lock and unlock both, and give how fast the module was beside the flat tensor."""
    headers: list[LockHeader] = []
    flat_locking = seconds_of(lambda: headers.append(lock_tensors(flat, KEY)))
    locking = seconds_of(lambda: headers.append(lock_module(module, KEY)))
    flat_unlocking = seconds_of(lambda: unlock_tensors(flat, KEY, headers[0]))
    unlocking = seconds_of(lambda: unlock_module(module, KEY, headers[1]))
    return flat_locking / locking, flat_unlocking / unlocking


def queries(rounds: int, quick: bool) -> Iterator[str]:
    """Write what a key costs for each query, beside the least that another copy of the weights costs."""
    yield (
        "| network | batch | threads of PyTorch | plain, ms | a copy of the weights | keyed: more | in a session "
        "| without seals | peak, MiB | two layers |"
    )
    yield "| :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: |"
    for name, (make, shape) in [*_QUERIES.items()][: 1 if quick else None]:
        plain = make().eval()
        module = copy.deepcopy(plain)
        header = lock_module(module, KEY)
        keyed, careless = KeyedModule(module, header), KeyedModule(module, header, seal=False)
        weights = [*module.state_dict().values()]
        scratch = torch.empty(keyed._unlocking.largest, dtype=torch.uint8)

        def copy_all(weights: list[torch.Tensor] = weights, scratch: torch.Tensor = scratch) -> None:
            for weight in weights:
                scratch[: weight.nbytes].view(weight.dtype).view(weight.shape).copy_(weight)

        everything = torch.get_num_threads()
        for batch, used in product((1,) if quick else (1, 8, 32), sorted({everything, max(everything - 1, 1)})):
            if batch > 8 and used < everything:
                continue  # it takes minutes, and there is next to nothing to hide
            x = torch.randn(batch, *shape)
            torch.set_num_threads(used)
            with torch.no_grad(), keyed.session(KEY) as compute, careless.session(KEY) as compute_carelessly:
                seconds = seconds_of(partial(plain, x))
                count = min(rounds, max(3, int(_LONGEST / seconds)))
                base, cells = [], []
                for work in (copy_all, partial(keyed, x, key=KEY), partial(compute, x), partial(compute_carelessly, x)):
                    first, second = compared(partial(plain, x), work, count)
                    base += first
                    done = 0 if work is copy_all else 1
                    cells.append(
                        spread([100 * (b / a - done) for a, b in zip(first, second, strict=True)], "{:.0f} %")
                    )
            torch.set_num_threads(everything)
            sizes = f"{keyed.peak_bytes / 2**20:.1f} | {2 * keyed._unlocking.largest / 2**20:.1f}"
            milliseconds = spread([1e3 * value for value in base], "{:.1f}")
            yield f"| {name} | {batch} | {used} | {milliseconds} | {' | '.join(cells)} | {sizes} |"


TABLES = {"overhead": overhead, "speed": speed, "queries": queries}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frameworks", description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; by default all")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="only show that everything runs; the figures mean nothing")
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.tables) - TABLES.keys()
    if unknown:
        parser.error(f"there is no table {min(unknown)!r}")
    facts = environment.line(environment.describe(quick=chosen.quick))
    print(f"Measured on: {facts}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads.", flush=True)
    for name in chosen.tables or TABLES:
        print(flush=True)
        for line in TABLES[name](2 if chosen.quick else chosen.rounds, chosen.quick):
            print(line, flush=True)


if __name__ == "__main__":
    main()
