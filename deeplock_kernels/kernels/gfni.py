"""Primitives of the gfni tier: AVX2, GFNI and VAES in 256-bit registers."""

from __future__ import annotations

from deeplock_kernels.kernels import boxes
from deeplock_kernels.simd import x86

aes_stages = x86.aes_stages(256)
aes_last_round = x86.aes_last_round(256)
hash_operations = x86.hash_operations(256)

FORMS = {
    "identity": boxes.IDENTITY,
    "aes": boxes.without_parameters(x86.galois_sub_bytes(256)),
    "aes_inverse": boxes.without_parameters(x86.aes_substitutions(256)[1]),
    "affine": boxes.galois(256),
    "table": boxes.TABLE_BY_ROWS,
}
