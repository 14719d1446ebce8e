"""Primitives of the avx2 tier: AVX2 in 256-bit registers and AES-NI in 128-bit ones."""

from __future__ import annotations

from deeplock_kernels.kernels import boxes
from deeplock_kernels.simd import x86

aes_stages = x86.aes_stages(128)
aes_last_round = x86.aes_last_round(128)
hash_operations = x86.hash_operations(128)
aes_substitute, aes_substitute_inverse = x86.aes_substitutions(128)

FORMS = {
    "identity": boxes.IDENTITY,
    "aes": boxes.without_parameters(aes_substitute),
    "aes_inverse": boxes.without_parameters(aes_substitute_inverse),
    "table": boxes.TABLE_BY_ROWS,
}
