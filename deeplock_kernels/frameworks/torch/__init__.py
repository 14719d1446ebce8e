"""PyTorch: modules and state dictionaries, inference with a key, and operators for compiled graphs."""

from __future__ import annotations

from deeplock_kernels.errors import MissingLibraryError

try:
    import torch
except ImportError:
    raise MissingLibraryError(
        "torch: it cannot be imported, and deeplock_kernels.frameworks.torch needs it; "
        "pip install 'deeplock-kernels[torch]'"
    ) from None
if not hasattr(torch.library, "custom_op"):
    raise MissingLibraryError(
        f"torch: got {torch.__version__}, accepted is 2.4 or later; pip install --upgrade 'deeplock-kernels[torch]'"
    )

from deeplock_kernels.frameworks.torch import operators as operators
from deeplock_kernels.frameworks.torch.keyed import KeyedModule
from deeplock_kernels.frameworks.torch.loading import load_state_dict
from deeplock_kernels.frameworks.torch.modules import (
    lock_module,
    lock_state_dict,
    rekey_module,
    unlock_module,
    unlock_state_dict,
    verify_module,
)

__all__ = [
    "KeyedModule",
    "load_state_dict",
    "lock_module",
    "lock_state_dict",
    "rekey_module",
    "unlock_module",
    "unlock_state_dict",
    "verify_module",
]
