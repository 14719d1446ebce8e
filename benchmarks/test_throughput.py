"""Bytes a second against the size of the model, beside the limit, peers, other tiers and thread counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import operations
from benchmarks.models import Model
from benchmarks.operations import LOCK, Operation
from benchmarks.peers import Peer
from benchmarks.rounds import LIMIT, Prepare, Rounds, Settings
from deeplock_kernels.runtime.tiers import Tier

NeedMemory = Callable[[int], None]


def _in_memory(settings: Settings) -> int:
    """Bytes that no cache near a core holds."""
    return (1 << 16) if settings.quick else (100 << 20)


def _in_cache(settings: Settings) -> int:
    """Bytes that stay near the core."""
    return (1 << 13) if settings.quick else (256 << 10)


def test_operation(
    rounds: Rounds, need_memory: NeedMemory, threads: int, model: Model, operation: Operation
) -> None:
    need_memory(operation.memory * model.nbytes)
    references = {LIMIT: operations.limit(threads)}
    if not operation.in_place:
        references["copy"] = operations.copy(threads)
    rounds.measure(
        "operations",
        operation.at(threads),
        references,
        model.nbytes,
        model=model.name,
        operation=operation.name,
        threads=threads,
    )


@pytest.mark.parametrize("kind", ["counter", "expansion"])
@pytest.mark.parametrize("direction", ["lock", "unlock"])
def test_tensors(
    rounds: Rounds, need_memory: NeedMemory, threads: int, network: Model, direction: str, kind: str
) -> None:
    need_memory(network.arena_bytes)
    works = {"lock": operations.locking_tensors, "unlock": operations.unlocking_tensors}
    rounds.measure(
        "tensors",
        works[direction](network, kind, threads),
        {LIMIT: operations.limit(threads)},
        network.arena_bytes,
        model=network.name,
        operation=f"{direction}_tensors, {kind}",
        tensors=len(network.tensors),
        threads=threads,
    )


@pytest.mark.parametrize(
    ("copy", "name"),
    [
        pytest.param(operations.copy, "memcpy by the same pool", id="memcpy"),
        pytest.param(operations.best_copy, "copy past the caches by the same pool", id="past_caches"),
    ],
)
def test_copy(
    rounds: Rounds,
    need_memory: NeedMemory,
    threads: int,
    model: Model,
    copy: Callable[[int], Prepare],
    name: str,
) -> None:
    need_memory(2 * model.nbytes)
    rounds.measure(
        "peers",
        copy(threads),
        {LIMIT: operations.limit(threads)},
        model.nbytes,
        model=model.name,
        operation=name,
        threads=threads,
    )


def test_peer(rounds: Rounds, need_memory: NeedMemory, threads: int, model: Model, peer: Peer) -> None:
    if peer.version is None:
        pytest.skip(f"{peer.distribution} is not installed")
    need_memory(peer.memory * model.nbytes)
    rounds.measure(
        "peers",
        peer.prepare,
        {LIMIT: operations.limit(threads), "lock": LOCK.at(threads)},
        model.nbytes,
        model=model.name,
        operation=peer.name,
        threads=1,
    )


def test_tier(
    rounds: Rounds, need_memory: NeedMemory, forced_tier: Any, threads: int, model: Model, tier: Tier
) -> None:
    forced_tier(tier)
    need_memory(model.nbytes)
    if model.nbytes >= 1 << 30 and not tier.constant_time:
        pytest.skip(f"tier {tier.name} takes too long for a model of {model.name}")
    rounds.measure(
        "tiers",
        LOCK.at(threads),
        {LIMIT: operations.limit(threads)},
        model.nbytes,
        model=model.name,
        tier=tier.name,
        threads=threads,
    )


@pytest.mark.parametrize("direction", ["lock", "unlock"])
@pytest.mark.parametrize("where", ["cache", "memory"])
def test_box(
    rounds: Rounds,
    settings: Settings,
    forced_tier: Any,
    threads: int,
    tier_form: tuple[Tier, str],
    where: str,
    direction: str,
) -> None:
    tier, form = tier_form
    forced_tier(tier)
    count = 1 if where == "cache" else threads
    name, box = operations.box_of_form(tier, form)
    rounds.measure(
        "boxes",
        operations.locking_with_box(box, direction, count),
        {LIMIT: operations.limit(count)},
        _in_cache(settings) if where == "cache" else _in_memory(settings),
        tier=tier.name,
        form=form,
        box=name,
        direction=direction,
        where=where,
        threads=count,
    )


def test_key_length(rounds: Rounds, settings: Settings, threads: int, key_length: Operation) -> None:
    rounds.measure(
        "key lengths",
        key_length.at(threads),
        {LIMIT: operations.limit(threads)},
        _in_memory(settings),
        operation=key_length.name,
        threads=threads,
    )


def test_threads(rounds: Rounds, need_memory: NeedMemory, long_model: Model, thread_count: int) -> None:
    need_memory(long_model.nbytes)
    rounds.measure(
        "threads",
        LOCK.at(thread_count),
        {LIMIT: operations.limit(thread_count), "one thread": LOCK.at(1)},
        long_model.nbytes,
        model=long_model.name,
        threads=thread_count,
    )
