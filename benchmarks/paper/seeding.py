"""The same random numbers in every run, the salts of locks among them: never for a lock that is to protect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from deeplock_kernels import named_lock


@contextmanager
def seeded(seed: int) -> Iterator[np.random.Generator]:
    """Seed PyTorch and the salts that locks draw, and give a generator for the rest."""
    salts, random = (np.random.default_rng((seed, purpose)) for purpose in range(2))
    torch.manual_seed(seed)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with mock.patch.object(named_lock, "secrets", SimpleNamespace(token_bytes=salts.bytes)):
            yield random
    finally:
        torch.use_deterministic_algorithms(before)
