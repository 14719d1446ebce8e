"""Unlocking inside a function that JAX compiled, beside the direct call of the same size, in place and not."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from benchmarks.rounds import Prepare, Rounds, Settings, Work
from benchmarks.workspace import Spot
from deeplock_kernels import CounterSchedule, unlock

jax = pytest.importorskip("jax", reason="without JAX there is nothing to measure")

from deeplock_kernels.frameworks import jax as deeplock  # noqa: E402 - which needs it

_KEY, _IV = bytes(range(16)), bytes(16)


def _direct(in_place: bool, threads: int) -> Prepare:
    def prepare(spot: Spot) -> Work:
        schedule, data = CounterSchedule(_KEY, _IV), spot.data
        return lambda: unlock(data, schedule, out=data if in_place else None, threads=threads)

    return prepare


def _direct_in_memory_of_xla(threads: int) -> Prepare:
    """Measure the direct call in memory that XLA allocated: its pages are small ones, NumPy's are large."""

    def prepare(spot: Spot) -> Work:
        schedule, held = CounterSchedule(_KEY, _IV), jax.numpy.zeros(spot.data.nbytes, np.uint8).block_until_ready()
        data = np.frombuffer((ctypes.c_uint8 * held.nbytes).from_address(held.unsafe_buffer_pointer()), np.uint8)

        def work(held: Any = held) -> None:
            unlock(data, schedule, out=data, threads=threads)

        work()
        return work

    return prepare


def _compiled(in_place: bool, threads: int) -> Prepare:
    def function(array: Any, key: Any, iv: Any) -> Any:
        return deeplock.unlock(array, (key, iv), in_place=in_place, threads=threads)

    compiled = jax.jit(function, donate_argnums=0 if in_place else ())
    key, iv = (jax.numpy.asarray(np.frombuffer(data, np.uint8)) for data in (_KEY, _IV))

    def prepare(spot: Spot) -> Work:
        arrays = [deeplock.lock(spot.data, (_KEY, _IV))]  # in large pages, as what it is compared with
        if in_place:  # what XLA has not allocated itself it copies, once, instead of taking it over
            arrays[0] = compiled(arrays[0], key, iv).block_until_ready()

        def work() -> None:
            result = compiled(arrays[0], key, iv).block_until_ready()
            if in_place:
                arrays[0] = result

        return work

    return prepare


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "new_array"])
def test_compiled_unlock(rounds: Rounds, settings: Settings, threads: int, in_place: bool) -> None:
    rounds.measure(
        "jax",
        _compiled(in_place, threads),
        {"direct": _direct(in_place, threads)}
        | ({"direct, in memory of XLA's": _direct_in_memory_of_xla(threads)} if in_place else {}),
        (1 << 16) if settings.quick else (64 << 20),
        operation=f"unlock under jit, {'donated' if in_place else 'new array'}",
        threads=threads,
    )
