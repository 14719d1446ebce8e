"""The studies, and running them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import ModuleType
from typing import Any

import torch

from benchmarks.paper import (
    approximation,
    authorization,
    cost,
    fine_tuning,
    known_plaintext,
    locked_bytes,
    partial,
)

STUDIES: Mapping[str, ModuleType] = {
    "authorization": authorization,
    "partial": partial,
    "fine_tuning": fine_tuning,
    "approximation": approximation,
    "known_plaintext": known_plaintext,
    "cost": cost,
    "locked_bytes": locked_bytes,
}


def measured(
    names: Sequence[str], quick: bool, seed: int, *, processes: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Run studies side by side, and after them, one by one, those that time something.

    Parameters
    ----------
    names
        Which.
    quick, seed
        For each of them.
    processes
        How many run side by side.
    threads
        Of PyTorch in each process; this process has set its own.

    Returns
    -------
    dict
        What each found, by its name.
    """
    alone = [name for name in names if getattr(STUDIES[name], "ALONE", False)]
    together = [name for name in names if name not in alone]
    found = {}
    if min(processes, len(together)) > 1:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (threads,)) as pool:
            running = {pool.submit(study, name, quick, seed): name for name in together}
            for done in as_completed(running):
                found[running[done]] = done.result()
    else:
        alone = [*together, *alone]
    for name in alone:
        found[name] = study(name, quick, seed)
    return {name: found[name] for name in names}


def study(name: str, quick: bool, seed: int) -> dict[str, Any]:
    """Run one study, and print how long it took."""
    begin = time.perf_counter()
    result: dict[str, Any] = STUDIES[name].measure(quick, seed)
    print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    return result
