"""On what a run was measured: the line without which no figure is shown, and the facts behind it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import deeplock_kernels
from benchmarks.peers import PEERS
from deeplock_kernels.runtime.pool import available_threads, get_num_threads
from deeplock_kernels.runtime.tiers import TIERS, active_tier, host_features

ROOT = Path(__file__).resolve().parent.parent


def describe(*, quick: bool) -> dict[str, Any]:
    """Collect the facts of the machine and of the versions."""
    needed: frozenset[str] = frozenset().union(*(tier.requires for tier in TIERS))
    processor = _processor()
    return {
        "quick": quick,
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor.get("model name") or platform.processor() or platform.machine(),
        "clock_mhz": _number(processor.get("cpu MHz", "")),
        "features": sorted(needed & host_features()),
        "missing_features": sorted(needed - host_features()),
        "processors": available_threads(),
        "caches": _caches(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "tier": active_tier().name,
        "tiers": {tier.name: tier.supported for tier in TIERS},
        "threads": get_num_threads(),
        "python": platform.python_version(),
        "deeplock_kernels": deeplock_kernels.__version__,
        "revision": revision(),
        "packages": {name: metadata.version(name) for name in ("numpy", "numba", "llvmlite")},
        "peers": {peer.distribution: peer.version for peer in PEERS},
    }


def line(facts: Mapping[str, Any]) -> str:
    """Say it all on one line."""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    clock = f" at {facts['clock_mhz'] / 1000:.2f} GHz" if facts["clock_mhz"] else ""
    memory = f"{facts['memory_bytes'] / 2**30:.0f} GiB of memory, " if facts["memory_bytes"] else ""
    return (
        f"{facts['processor']}{clock} ({' '.join(facts['features']) or 'no special instructions'}), "
        f"{facts['processors']} processors, {memory}{facts['system']}; "
        f"deeplock_kernels {facts['deeplock_kernels']} ({facts['revision'] or 'no revision'}), "
        f"tier {facts['tier']}, {facts['threads']} threads; "
        f"Python {facts['python']}, {packages}; {facts['date']}"
    )


def revision() -> str | None:
    """Give the short name of the checkout's revision, with a mark if files were changed since."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip() or None


def _processor() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    facts: dict[str, str] = {}
    for entry in text.splitlines():
        name, _, value = entry.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def _caches() -> dict[str, str]:
    """Give the size of each cache that the first processor uses, as the system writes it."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        caches[f"L{level} {kind.lower()}"] = size
    return caches


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
