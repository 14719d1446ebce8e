"""What an attacker without the key can start from, and the data that they have."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.paper.locked_network import randomize
from benchmarks.paper.networks import Architecture
from benchmarks.paper.training import trained
from deeplock_kernels.frameworks.torch import lock_module

# What can be made of locked weights: (locked, of a fresh initialisation) -> those to start from


def as_they_are(locked: Tensor, fresh: Tensor) -> Tensor:
    """Leave the locked weights alone."""
    return locked


def zeroed(locked: Tensor, fresh: Tensor) -> Tensor:
    """Put 0 in place of NaN and infinity."""
    return locked.nan_to_num(0, 0, 0)


def clipped(locked: Tensor, fresh: Tensor) -> Tensor:
    """Clip to the range of a fresh initialisation, with 0 in place of NaN."""
    return locked.nan_to_num(0).clamp(fresh.min(), fresh.max())


def rescaled(locked: Tensor, fresh: Tensor) -> Tensor:
    """Give what is finite the mean and the deviation of a fresh initialisation."""
    wide = zeroed(locked, fresh).double()
    deviation = wide.std(unbiased=False)
    shape = (wide - wide.mean()) / deviation if deviation > 0 else torch.zeros_like(wide)
    return (shape * fresh.double().std(unbiased=False) + fresh.double().mean()).to(fresh.dtype)


def ranked(locked: Tensor, fresh: Tensor) -> Tensor:
    """Give the values of a fresh initialisation the order of the locked ones."""
    start = torch.empty_like(fresh).flatten()
    start[zeroed(locked, fresh).flatten().argsort(stable=True)] = fresh.flatten().sort().values
    return start.view_as(fresh)


AS_THEY_ARE, ZEROED = "locked, as they are", "locked, NaN and infinity zeroed"
CLIPPED, RESCALED, RANKED = "locked, clipped", "locked, rescaled", "locked, ranked"
SANITISERS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    AS_THEY_ARE: as_they_are,
    ZEROED: zeroed,
    CLIPPED: clipped,
    RESCALED: rescaled,
    RANKED: ranked,
}
PLAIN, SCRATCH, LAST_LOCKED = "plain weights", "from scratch", "only the last layer locked, ranked"
RANDOM_CLIPPED = "random bytes, clipped"
# What everybody can start from just as well. Clipped bytes spread wider than a fresh initialisation, which may help;
# those of a locked network must not do more than any others.
CONTROLS: Mapping[str, str] = {start: RANDOM_CLIPPED if start == CLIPPED else SCRATCH for start in SANITISERS}


def starts(architecture: Architecture, quick: bool, random: np.random.Generator) -> dict[str, nn.Module]:
    """Give a network to start from of each kind, the locked ones under new keys."""
    plain, fresh = trained(architecture, quick), architecture.make()
    locked = copy.deepcopy(plain)
    lock_module(locked, random.bytes(32))
    noise = copy.deepcopy(plain)
    randomize(noise, random)
    last = {parameter for parameter, _ in [*plain.named_parameters()][-2:]}
    partly = copy.deepcopy(plain)
    lock_module(partly, random.bytes(32), only=lambda name: name in last)
    return {
        PLAIN: plain,
        SCRATCH: fresh,
        **{start: _sanitised(locked, fresh, sanitiser) for start, sanitiser in SANITISERS.items()},
        RANDOM_CLIPPED: _sanitised(noise, fresh, clipped),
        LAST_LOCKED: _sanitised(partly, fresh, ranked, only=last),
    }


def _sanitised(
    locked: nn.Module, fresh: nn.Module, sanitiser: Callable[[Tensor, Tensor], Tensor], only: set[str] | None = None
) -> nn.Module:
    """Give a network whose floating-point tensors went through a sanitiser; a count starts anew."""
    module, new = copy.deepcopy(locked), fresh.state_dict()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if only is None or name in only:
                tensor.copy_(sanitiser(tensor, new[name]) if tensor.is_floating_point() else new[name])
    return module


def balanced_order(y: Tensor, random: np.random.Generator) -> Tensor:
    """Give the samples in an order of which every beginning has about as many of each class."""
    labels, order = y.numpy(), random.permutation(len(y))
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    return torch.from_numpy(order[np.argsort(rank[order], kind="stable")])
