"""Training, and what a network is worth: how many of the test samples it gets right."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.paper.networks import Architecture

_BATCH = 64
_QUERIES = 200  # samples computed at a time; more would leave the caches
_trained: dict[tuple[str, bool], nn.Module] = {}


def train(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    parameters: Iterable[nn.Parameter] | None = None,
) -> None:
    """Train a network in place, by Adam with a learning rate that falls to zero along a cosine.

    Parameters
    ----------
    module
        The network; it is left in evaluation mode.
    x, y
        Samples of float32 and their classes of int64.
    epochs
        How many times to go through them.
    learning_rate
        The greatest one.
    seed
        Of the samples' order.
    parameters
        Which of its parameters to train; by default all.
    """
    chosen = [*module.parameters()] if parameters is None else [*parameters]
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(chosen, learning_rate)
    batches = math.ceil(len(x) / _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs * batches, 1))
    x = x.to(compute_dtype(module))
    module.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=random).split(_BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
    module.eval()


def accuracy(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """Give the share of samples that a network in evaluation mode gets right.

    Its answer is the argmax of its outputs as PyTorch gives it: the first NaN if there is one, else the first of the
    greatest, be it infinity.
    """
    return (outputs(module, x).argmax(1) == y).double().mean().item()


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    """Compute a network's outputs, a sample a row."""
    with torch.inference_mode():
        return torch.cat([module(batch) for batch in x.to(compute_dtype(module)).split(_QUERIES)])


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Give the dtype that a network takes: that of its first floating-point tensor."""
    return next(tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point())


def trained(architecture: Architecture, quick: bool) -> nn.Module:
    """Give a trained network in evaluation mode, always the same; each call gives a copy.

    Parameters
    ----------
    architecture
        What to train, with which data.
    quick
        Whether a third of the epochs will do.
    """
    name = architecture.name, quick
    if name not in _trained:
        data = architecture.dataset()
        epochs = max(architecture.epochs // 3, 1) if quick else architecture.epochs
        with torch.random.fork_rng(devices=[]):  # what is drawn afterwards is the same whether it was trained or not
            module = architecture.untrained(0)
            train(module, data.train_x, data.train_y, epochs=epochs, learning_rate=architecture.learning_rate, seed=0)
        _trained[name] = architecture.converted(module)
    return copy.deepcopy(_trained[name])
