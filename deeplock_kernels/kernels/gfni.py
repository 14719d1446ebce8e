"""Primitives of the gfni tier: AVX2, GFNI and VAES in 256-bit registers."""

from __future__ import annotations

from deeplock_kernels.kernels import boxes
from deeplock_kernels.simd import x86

encrypt = x86.aes_cipher(256)
aes_last_round = x86.aes_last_round(256)

FORMS = {"identity": boxes.IDENTITY, "affine": boxes.galois(256), "table": boxes.TABLE_BY_SHUFFLE}
