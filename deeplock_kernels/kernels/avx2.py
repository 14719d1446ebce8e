"""Primitives of the avx2 tier: AVX2 in 256-bit registers and AES-NI in 128-bit ones."""

from __future__ import annotations

from deeplock_kernels.kernels import boxes
from deeplock_kernels.simd import x86

encrypt = x86.aes_cipher(128)
aes_last_round = x86.aes_last_round(128)

FORMS = {
    "identity": boxes.IDENTITY,
    "aes": boxes.AES,
    "aes_inverse": boxes.AES_INVERSE,
    "table": boxes.TABLE_BY_SHUFFLE,
}
