"""Primitives of the avx512 tier: AVX-512 BW/VBMI, GFNI and VAES in 512-bit registers."""

from __future__ import annotations

from deeplock_kernels.kernels import boxes
from deeplock_kernels.simd import x86

aes_stages = x86.aes_stages(512)
aes_last_round = x86.aes_last_round(512)
hash_operations = x86.hash_operations(512)

FORMS = {
    "identity": boxes.IDENTITY,
    "aes": boxes.without_parameters(x86.galois_sub_bytes(512)),
    "aes_inverse": boxes.without_parameters(x86.aes_substitutions(512)[1]),
    "affine": boxes.galois(512),
    "table": boxes.TABLE_BY_PERMUTE,
}
