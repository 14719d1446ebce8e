"""A network under lock, and what becomes of it with one key or another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper.training import outputs
from deeplock_kernels.frameworks.torch import lock_module, unlock_module
from deeplock_kernels.tensors import Selection

_PLAUSIBLE = 100.0  # weights of trained networks are smaller


class LockedNetwork:
    """Locks a network with a key, and unlocks it with any.

    Parameters
    ----------
    module
        The plain network; it is locked in place.
    key, schedule, sbox, only
        As for `lock_module`.
    """

    def __init__(
        self, module: nn.Module, key: bytes, *, schedule: str = "counter", sbox: str = "aes", only: Selection = None
    ) -> None:
        self.module = module
        self._settings: dict[str, Any] = {"schedule": schedule, "sbox": sbox, "only": only}
        self._plain = copies(module)
        self.relock(key)

    def relock(self, key: bytes) -> None:
        """Lock the plain weights anew, with another key and salt."""
        put(self.module, self._plain)
        self._key = key
        self.header = lock_module(self.module, key, **self._settings)
        self._locked = copies(self.module)

    def lock(self) -> None:
        """Put the locked weights in place, to be used as they are."""
        put(self.module, self._locked)

    def unlock(self, key: bytes) -> None:
        """Unlock the locked weights with a key that nothing compares."""
        self.lock()
        unlock_module(self.module, key, self.header, check=False, seal=False)

    def comes_back(self) -> bool:
        """Say whether the right key, with all that a lock compares, gives every bit back."""
        self.lock()
        unlock_module(self.module, self._key, self.header)
        now = self.module.state_dict()
        return all(same_bytes(now[name], tensor) for name, tensor in self._plain.items())


def copies(module: nn.Module) -> dict[str, Tensor]:
    """Copy all tensors of a network."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into those of a network."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(tensors[name])


def sanitize(module: nn.Module, most: float = 1.0) -> None:
    """Make weights plausible, as whoever looks at them would.

    In each tensor that has NaN, infinity or something beyond +-100, NaN becomes zero and the rest is clipped to a
    range. Such variances of batch normalizations all become one.
    """
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point() or bool((tensor.abs() <= _PLAUSIBLE).all()):
                continue
            if name.endswith("running_var"):
                tensor.fill_(1.0)
            else:
                tensor.nan_to_num_(0.0).clamp_(-most, most)


def randomize(module: nn.Module, random: Any) -> None:
    """Put random bytes in place of all of a network's tensors."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            data = torch.frombuffer(bytearray(random.bytes(tensor.nbytes)), dtype=torch.uint8)
            tensor.copy_(data.view(tensor.dtype).view(tensor.shape))


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors have the same bytes; NaN equals itself here."""
    first, second = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def answers(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Ask a network, and give what its answers and its weights are like.

    Returns
    -------
    dict
        "accuracy"; "constant", whether all answers are the same class; "nan" and "infinite", the shares of samples for
        which an output is; "weights", the share of weights that are NaN or infinity.
    """
    found = outputs(module, x)
    answer = found.argmax(1)
    floats = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    finite = sum(int(tensor.isfinite().sum()) for tensor in floats)
    return {
        "accuracy": (answer == y).double().mean().item(),
        "constant": bool((answer == answer[0]).all()),
        "nan": found.isnan().any(1).double().mean().item(),
        "infinite": found.isinf().any(1).double().mean().item(),
        "weights": 1 - finite / sum(tensor.numel() for tensor in floats),
    }
