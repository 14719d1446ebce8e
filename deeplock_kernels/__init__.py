"""Lock the weights of trained networks with a key, at the speed of memory (Deep-Lock, arXiv 2008.05966).

Importing the package imports neither Numba nor any framework and compiles nothing; public names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "deeplock_kernels.checkpoints.safetensors": ("lock_file", "read_header", "unlock_file"),
    "deeplock_kernels.errors": ("DeepLockError", "WrongKeyError"),
    "deeplock_kernels.header": ("LockHeader",),
    "deeplock_kernels.keys": ("MasterKey",),
    "deeplock_kernels.locking": ("lock", "substitute", "unlock"),
    "deeplock_kernels.runtime.pool": ("get_num_threads", "set_num_threads"),
    "deeplock_kernels.runtime.tiers": ("tiers", "use_tier"),
    "deeplock_kernels.sboxes": ("AES", "SBOXES", "SBox"),
    "deeplock_kernels.schedules": ("CounterSchedule", "ExpansionSchedule", "expand_key"),
    "deeplock_kernels.tensors": ("lock_tensors", "unlock_tensor", "unlock_tensors"),
}
_HOME_BY_NAME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_BY_NAME)]  # noqa: PLE0604

if TYPE_CHECKING:
    from deeplock_kernels.checkpoints.safetensors import lock_file, read_header, unlock_file
    from deeplock_kernels.errors import DeepLockError, WrongKeyError
    from deeplock_kernels.header import LockHeader
    from deeplock_kernels.keys import MasterKey
    from deeplock_kernels.locking import lock, substitute, unlock
    from deeplock_kernels.runtime.pool import get_num_threads, set_num_threads
    from deeplock_kernels.runtime.tiers import tiers, use_tier
    from deeplock_kernels.sboxes import AES, SBOXES, SBox
    from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule, expand_key
    from deeplock_kernels.tensors import lock_tensors, unlock_tensor, unlock_tensors


def __getattr__(name: str) -> Any:
    home = _HOME_BY_NAME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
