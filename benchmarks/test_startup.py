"""What a first use costs in a process of its own: time, peak memory, and the compilation of each kernel."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import processes
from benchmarks.rounds import Settings
from deeplock_kernels.kernels.signatures import KernelName
from deeplock_kernels.runtime.tiers import Tier

# name: (program, what the kernel cache is)
STARTS = {
    "Python alone": (processes.NOTHING, "none"),
    "import numpy": (processes.IMPORT_NUMPY, "none"),
    "import deeplock_kernels": (processes.IMPORT_PACKAGE, "none"),
    "first lock, kernels in the cache": (processes.FIRST_LOCK, "warm"),
    "first lock, empty cache": (processes.FIRST_LOCK, "cold"),
    "first lock, no cache": (processes.FIRST_LOCK, "none"),
    "first encryption by cryptography": (processes.FIRST_ENCRYPTION, "none"),
}


@pytest.mark.parametrize("name", STARTS)
def test_start(benchmark: Any, settings: Settings, tmp_path: Path, name: str) -> None:
    program, cache = STARTS[name]
    if program is processes.FIRST_ENCRYPTION:
        pytest.importorskip("cryptography", reason="cryptography is not installed")
    directory = None if cache == "none" else tmp_path / "cache"
    variables = processes.variables(directory)
    reports: list[dict[str, Any]] = []

    def clear() -> None:
        if cache == "cold":
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    def start() -> None:
        reports.append(processes.run(program, variables, tmp_path))

    if cache == "warm" or not settings.quick:
        start()  # so that byte code, and for the warm cache the kernels, are on the disk
        reports.clear()
    benchmark.group = "start"
    benchmark.pedantic(start, setup=clear, rounds=1 if settings.quick else 9)
    if benchmark.disabled:
        return
    benchmark.extra_info.update(
        section="start",
        operation=name,
        seconds=list(benchmark.stats.stats.data),
        call_seconds=[report["seconds"] for report in reports],
        peak_bytes=[report["peak_bytes"] for report in reports],
    )


def test_compilation(benchmark: Any, tmp_path: Path, tier_kernel: tuple[Tier, KernelName]) -> None:
    tier, name = tier_kernel
    if not tier.supported:
        pytest.skip(f"this processor cannot run tier {tier.name}")
    variables = processes.variables(None)
    reports: list[dict[str, Any]] = []
    program = processes.compilation(tier.name, name)
    benchmark.group = "compilation"
    benchmark.pedantic(lambda: reports.append(processes.run(program, variables, tmp_path)), rounds=1)
    if benchmark.disabled:
        return
    benchmark.extra_info.update(
        section="compilation",
        tier=tier.name,
        kernel=str(name),
        operation=name.operation,
        seconds=[report["seconds"] for report in reports],
        peak_bytes=[report["peak_bytes"] for report in reports],
    )
