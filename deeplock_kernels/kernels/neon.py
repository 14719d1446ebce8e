"""Primitives of the neon tier: AArch64's AES and table instructions in 128-bit registers."""

from __future__ import annotations

from deeplock_kernels.kernels import boxes
from deeplock_kernels.simd import aarch64

aes_stages = aarch64.aes_stages
aes_last_round = aarch64.aes_last_round
hash_operations = aarch64.hash_operations

FORMS = {
    "identity": boxes.IDENTITY,
    "aes": boxes.without_parameters(aarch64.aes_substitute),
    "aes_inverse": boxes.without_parameters(aarch64.aes_substitute_inverse),
    "table": boxes.table_by_rows(aarch64.lookup_rows),
}
