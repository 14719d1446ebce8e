"""What may be put down to chance: intervals around accuracies, and distributions of them over keys."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

_LEVEL = 0.9999  # of the mean over keys, of which there are dozens to compare with chance
_SLACK_SAMPLES = 0.5  # an accuracy over n samples is not known better than to half a sample


def wilson(right: int, samples: int, level: float = 0.95) -> tuple[float, float]:
    """Give the Wilson interval of an accuracy (Wilson, 1927)."""
    interval = stats.binomtest(right, samples).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def binomial_band(chance: float, samples: int, level: float) -> tuple[float, float]:
    """Give the range in which the accuracy of independent guesses lies with at least that probability."""
    low, high = stats.binom.interval(level, samples, chance)
    return float(low) / samples, float(high) / samples


def mean_interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """Give Student's interval of the mean that values are drawn around; without spread it is a point."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean - reach, mean + reach


def distribution(accuracies: Sequence[float], chance: float, samples: int) -> dict[str, Any]:
    """Sum up the accuracies of several keys, and say how many lie in the bands of chance."""
    low, high = min(accuracies), max(accuracies)
    bands = {level: binomial_band(chance, samples, level / 100) for level in (95, 99.9)}
    return {
        "keys": len(accuracies),
        "mean": min(max(statistics.fmean(accuracies), low), high),  # it is rounded, which may put it beyond them
        "deviation": statistics.pstdev(accuracies),
        "low": low,
        "high": high,
        "interval": mean_interval(accuracies, _LEVEL),
        "bands": {
            str(level): statistics.fmean(least <= value <= most for value in accuracies)
            for level, (least, most) in bands.items()
        },
    }


def is_chance(found: dict[str, Any], chance: float, samples: int) -> bool:
    """Say whether the interval of a mean over keys, half a sample wider on both sides, holds chance."""
    slack = _SLACK_SAMPLES / samples
    low, high = found["interval"]
    return bool(low - slack <= chance <= high + slack)
