"""Lock the weights of trained networks with a key, at the speed of memory (Deep-Lock, arXiv 2008.05966).

Importing the package imports neither Numba nor any framework and compiles nothing; public names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "deeplock_kernels.checkpoints.inplace": ("lock_file_in_place", "recover_file", "unlock_file_in_place"),
    "deeplock_kernels.checkpoints.loading": ("load_file", "open_locked"),
    "deeplock_kernels.checkpoints.sharded": (
        "lock_checkpoint",
        "rekey_checkpoint",
        "unlock_checkpoint",
        "verify_checkpoint",
    ),
    "deeplock_kernels.checkpoints.streaming": (
        "lock_file",
        "read_header",
        "rekey_file",
        "unlock_file",
        "unlock_to_memory",
        "verify_file",
    ),
    "deeplock_kernels.errors": ("DeepLockError", "TamperedError", "TamperedHeaderError", "WrongKeyError"),
    "deeplock_kernels.header": ("LockHeader",),
    "deeplock_kernels.key_sources": ("key_from_command", "key_from_environment"),
    "deeplock_kernels.key_wrapping": ("rewrap_key", "unwrap_key", "wrap_key"),
    "deeplock_kernels.keys": ("MasterKey",),
    "deeplock_kernels.locking": ("lock", "substitute", "unlock"),
    "deeplock_kernels.passphrases": ("Passphrase",),
    "deeplock_kernels.rekeying": ("rekey", "rekey_tensors"),
    "deeplock_kernels.runtime.pool": ("get_num_threads", "set_num_threads"),
    "deeplock_kernels.runtime.tiers": ("tiers", "use_tier", "warmup"),
    "deeplock_kernels.sboxes": ("AES", "SBOXES", "SBox"),
    "deeplock_kernels.schedules": ("CounterSchedule", "ExpansionSchedule", "expand_key"),
    "deeplock_kernels.tensors": ("lock_tensors", "unlock_tensor", "unlock_tensors", "verify_tensors"),
}
_HOME_BY_NAME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_BY_NAME)]

if TYPE_CHECKING:
    from deeplock_kernels.checkpoints.inplace import lock_file_in_place as lock_file_in_place
    from deeplock_kernels.checkpoints.inplace import recover_file as recover_file
    from deeplock_kernels.checkpoints.inplace import unlock_file_in_place as unlock_file_in_place
    from deeplock_kernels.checkpoints.loading import load_file as load_file
    from deeplock_kernels.checkpoints.loading import open_locked as open_locked
    from deeplock_kernels.checkpoints.sharded import lock_checkpoint as lock_checkpoint
    from deeplock_kernels.checkpoints.sharded import rekey_checkpoint as rekey_checkpoint
    from deeplock_kernels.checkpoints.sharded import unlock_checkpoint as unlock_checkpoint
    from deeplock_kernels.checkpoints.sharded import verify_checkpoint as verify_checkpoint
    from deeplock_kernels.checkpoints.streaming import lock_file as lock_file
    from deeplock_kernels.checkpoints.streaming import read_header as read_header
    from deeplock_kernels.checkpoints.streaming import rekey_file as rekey_file
    from deeplock_kernels.checkpoints.streaming import unlock_file as unlock_file
    from deeplock_kernels.checkpoints.streaming import unlock_to_memory as unlock_to_memory
    from deeplock_kernels.checkpoints.streaming import verify_file as verify_file
    from deeplock_kernels.errors import DeepLockError as DeepLockError
    from deeplock_kernels.errors import TamperedError as TamperedError
    from deeplock_kernels.errors import TamperedHeaderError as TamperedHeaderError
    from deeplock_kernels.errors import WrongKeyError as WrongKeyError
    from deeplock_kernels.header import LockHeader as LockHeader
    from deeplock_kernels.key_sources import key_from_command as key_from_command
    from deeplock_kernels.key_sources import key_from_environment as key_from_environment
    from deeplock_kernels.key_wrapping import rewrap_key as rewrap_key
    from deeplock_kernels.key_wrapping import unwrap_key as unwrap_key
    from deeplock_kernels.key_wrapping import wrap_key as wrap_key
    from deeplock_kernels.keys import MasterKey as MasterKey
    from deeplock_kernels.locking import lock as lock
    from deeplock_kernels.locking import substitute as substitute
    from deeplock_kernels.locking import unlock as unlock
    from deeplock_kernels.passphrases import Passphrase as Passphrase
    from deeplock_kernels.rekeying import rekey as rekey
    from deeplock_kernels.rekeying import rekey_tensors as rekey_tensors
    from deeplock_kernels.runtime.pool import get_num_threads as get_num_threads
    from deeplock_kernels.runtime.pool import set_num_threads as set_num_threads
    from deeplock_kernels.runtime.tiers import tiers as tiers
    from deeplock_kernels.runtime.tiers import use_tier as use_tier
    from deeplock_kernels.runtime.tiers import warmup as warmup
    from deeplock_kernels.sboxes import AES as AES
    from deeplock_kernels.sboxes import SBOXES as SBOXES
    from deeplock_kernels.sboxes import SBox as SBox
    from deeplock_kernels.schedules import CounterSchedule as CounterSchedule
    from deeplock_kernels.schedules import ExpansionSchedule as ExpansionSchedule
    from deeplock_kernels.schedules import expand_key as expand_key
    from deeplock_kernels.tensors import lock_tensors as lock_tensors
    from deeplock_kernels.tensors import unlock_tensor as unlock_tensor
    from deeplock_kernels.tensors import unlock_tensors as unlock_tensors
    from deeplock_kernels.tensors import verify_tensors as verify_tensors


def __getattr__(name: str) -> Any:
    home = _HOME_BY_NAME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
