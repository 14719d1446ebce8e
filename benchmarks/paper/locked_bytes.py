"""Study 7: whether locked bytes can be told from random ones, and what values locked weights have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.paper.charts import Charts
from benchmarks.paper.locked_network import copies, put
from benchmarks.paper.networks import ARCHITECTURES, Architecture
from benchmarks.paper.seeding import seeded
from benchmarks.paper.tables import percent, table
from benchmarks.paper.training import trained
from deeplock_kernels.frameworks.torch import lock_module
from deeplock_kernels.header import SCHEDULE_NAMES

TITLE = "Statistics of locked bytes"
PLAIN, RANDOM = "plain", "random bytes"
_QUICK = ("MLP, digits",)
_LEAST = 1e-4  # p-values are uniform for random bytes; below that is no chance
_SHOWN = ("ResNet-20", "LeNet-5, bfloat16")
_BINS = range(-128, 129, 8)


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Count the bytes of each network as it is, locked with several keys, and random ones."""
    networks = []
    for name in _QUICK if quick else ARCHITECTURES:
        with seeded(seed) as random:
            networks.append(_network(ARCHITECTURES[name], quick, random))
    return {"networks": networks}


def _network(architecture: Architecture, quick: bool, random: np.random.Generator) -> dict[str, Any]:
    module = trained(architecture, quick)
    plain = copies(module)
    times = 5 if quick else 30
    before = _bytes(module)
    found: dict[str, Any] = {
        "name": architecture.name,
        "bytes": len(before),
        "keys": times,
        "of": {PLAIN: _sums([before])},
        "exponents": {PLAIN: _exponents(module)},
    }
    for schedule in SCHEDULE_NAMES:
        locked = []
        for _ in range(times):
            put(module, plain)
            lock_module(module, random.bytes(32), schedule=schedule, seal=False)
            locked.append(_bytes(module))
        found["of"][schedule] = _sums(locked)
        found["exponents"][schedule] = _exponents(module)
    drawn = [np.frombuffer(random.bytes(len(before)), np.uint8) for _ in range(times)]
    found["of"][RANDOM] = _sums(drawn)
    return found


def _bytes(module: torch.nn.Module) -> Any:
    return np.concatenate([tensor.reshape(-1).view(torch.uint8).numpy() for tensor in module.state_dict().values()])


def _sums(several: list[Any]) -> dict[str, Any]:
    each = [statistics_of(data) for data in several]
    p_values = {name: [one[name] for one in each] for name in ("chi_square_p", "correlation_p")}
    return {
        **{name: float(np.mean([one[name] for one in each])) for name in ("entropy", "chi_square", "correlation")},
        **{f"{name}s": [float(f"{value:.3g}") for value in values] for name, values in p_values.items()},
        **{f"{name}_uniform": float(stats.kstest(values, "uniform").pvalue) for name, values in p_values.items()},
    }


def statistics_of(data: Any) -> dict[str, float]:
    """Give what random bytes are expected to show.

    Parameters
    ----------
    data
        An array of uint8.

    Returns
    -------
    dict
        "entropy" in bits a byte; "chi_square" of the 256 values with 255 degrees of freedom, and its p-value; the
        serial "correlation" of each byte with the next, and its two-sided p-value.
    """
    counts = np.bincount(data, minlength=256)
    shares = counts[counts > 0] / len(data)
    chi_square = stats.chisquare(counts)
    correlation = float(np.corrcoef(data[:-1], data[1:])[0, 1])
    return {
        "entropy": float(-(shares * np.log2(shares)).sum()),
        "chi_square": float(chi_square.statistic),
        "chi_square_p": float(chi_square.pvalue),
        "correlation": correlation,
        "correlation_p": math.erfc(abs(correlation) * math.sqrt((len(data) - 1) / 2)),
    }


def _exponents(module: torch.nn.Module) -> list[float]:
    """Give how many weights lie between powers of two, from 2^-128 to 2^128, as shares of those that are numbers."""
    values = torch.cat([t.reshape(-1).double() for t in module.state_dict().values() if t.is_floating_point()])
    values = values[values.isfinite() & (values != 0)].abs().log2().numpy()
    return [float(share) for share in np.histogram(values, [*_BINS])[0] / max(len(values), 1)]


def check(result: dict[str, Any]) -> list[str]:
    """Name what must hold and does not."""
    return [
        f"{network['name']}, {schedule}: p = {network['of'][schedule][name]:.2g} that {name} comes from random bytes"
        for network in result["networks"]
        for schedule in SCHEDULE_NAMES
        for name in ("chi_square_p_uniform", "correlation_p_uniform")
        if network["of"][schedule][name] < _LEAST
    ]


def present(result: dict[str, Any], charts: Charts) -> str:
    """Write what was found."""
    rows = []
    for network in result["networks"]:
        for what, found in network["of"].items():
            rows.append(
                (
                    network["name"] if what == PLAIN else "",
                    what,
                    f"{found['entropy']:.4f}",
                    f"{found['chi_square']:,.0f}",
                    _p_values(found, "chi_square_p"),
                    f"{found['correlation']:+.4f}",
                    _p_values(found, "correlation_p"),
                )
            )
    middles = [edge + 4 for edge in [*_BINS][:-1]]
    shown = [network for network in result["networks"] if network["name"] in _SHOWN] or result["networks"][:1]
    pictures = [
        charts.lines(
            f"weights_{index}",
            f"{network['name']}: the sizes of weights, before and after",
            "binary logarithm of the absolute value",
            "share of the weights that are numbers",
            {
                what: [(middle, share, share, share) for middle, share in zip(middles, shares, strict=True)]
                for what, shares in network["exponents"].items()
            },
        )
        for index, network in enumerate(shown)
    ]
    return "\n\n".join(
        [
            "Entropy in bits a byte, chi-square of the 256 values (255 is expected of random bytes), and the "
            "correlation of each byte with the next; means over "
            f"{result['networks'][0]['keys']} keys. For p-values: the smallest, and in brackets a p-value for all of "
            "them being uniform, as those of random bytes are (Kolmogorov and Smirnov), and how many are below 0.05.",
            table(
                ["network", "bytes", "entropy", "chi-square", "least p", "serial correlation", "least p"],
                rows,
            ),
            "By these statistics locked bytes are random ones, with both schedules. **That is no proof of "
            "secrecy**: the expansion schedule passes all of them, and 32 known bytes give away its key. The "
            "values of locked weights spread evenly over all exponents, which tells a locked network from a plain "
            "one at a look.",
            *pictures,
        ]
    )


def _p_values(found: dict[str, Any], name: str) -> str:
    values = found[f"{name}s"]
    if len(values) == 1:
        return f"{values[0]:.2g}"
    below = percent(sum(value < 0.05 for value in values) / len(values), 0)
    return f"{min(values):.2g} ({found[f'{name}_uniform']:.2g}; {below})"
