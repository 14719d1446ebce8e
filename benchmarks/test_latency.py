"""What one short call costs with the schedule at hand, and from which size on a second thread pays."""

from __future__ import annotations

import pytest

from benchmarks import operations
from benchmarks.operations import LOCK, UNLOCK, Operation
from benchmarks.peers import PEERS
from benchmarks.rounds import LIMIT, Rounds

_CRYPTOGRAPHY = next(peer for peer in PEERS if peer.name == "cryptography AES-CTR")


@pytest.mark.parametrize("short", [LOCK, UNLOCK], ids=lambda operation: operation.name)
def test_latency(rounds: Rounds, threads: int, latency_size: int, short: Operation) -> None:
    rounds.measure(
        "latency",
        short.at(threads),
        {LIMIT: operations.limit(threads)},
        latency_size,
        operation=short.name,
        threads=threads,
    )


def test_latency_of_peer(rounds: Rounds, threads: int, latency_size: int) -> None:
    if _CRYPTOGRAPHY.version is None:
        pytest.skip(f"{_CRYPTOGRAPHY.distribution} is not installed")
    rounds.measure(
        "latency",
        _CRYPTOGRAPHY.prepare,
        {LIMIT: operations.limit(threads), LOCK.name: LOCK.at(threads)},
        latency_size,
        operation=_CRYPTOGRAPHY.name,
        threads=1,
    )


def test_threshold(rounds: Rounds, threads: int, threshold_size: int) -> None:
    if threads == 1:
        pytest.skip("there is one thread only")
    rounds.measure(
        "threshold",
        LOCK.at(threads),
        {"one thread": LOCK.at(1), "split at any size": operations.locking_in_pieces(threads)},
        threshold_size,
        threads=threads,
        pieces=operations.pieces(threshold_size, threads),
    )
