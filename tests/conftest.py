"""Fixtures for all tests: each tier of this machine, and how hypothesis works."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from deeplock_kernels.runtime.tiers import TIERS, host_features, use_tier

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where `benchmarks` is, however pytest was started

# Whoever started the tests may have had Ctrl-C ignored, as shells do for what runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)


settings.register_profile(
    "deeplock",
    deadline=None,
    database=None,
    derandomize=bool(os.environ.get("CI")),
    # The fixture `tier` is the same for all examples of a test.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("deeplock")


@pytest.fixture(params=TIERS, ids=lambda tier: tier.name)
def tier(request):
    """Force each tier in turn; one that this machine cannot run is skipped."""
    chosen = request.param
    if not chosen.supported:
        missing = ", ".join(sorted(chosen.requires - host_features()))
        pytest.skip(f"tier {chosen.name}: this machine has not {missing}")
    with use_tier(chosen.name):
        yield chosen
