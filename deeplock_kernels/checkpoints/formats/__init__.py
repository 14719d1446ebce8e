"""The file formats that can be locked: one module and one line here each."""

from __future__ import annotations

from deeplock_kernels.checkpoints.formats.base import Format
from deeplock_kernels.checkpoints.formats.gguf import GGUF
from deeplock_kernels.checkpoints.formats.npy import NPY
from deeplock_kernels.checkpoints.formats.npz import NPZ
from deeplock_kernels.checkpoints.formats.onnx import ONNX
from deeplock_kernels.checkpoints.formats.safetensors import SAFETENSORS

FORMATS: tuple[Format, ...] = (SAFETENSORS, NPY, NPZ, GGUF, ONNX)  # the last one has the weakest mark


def recognise(start: bytes) -> Format:
    """Give the format of a file that starts like this; what no format knows is left to safetensors to refuse."""
    return next((known for known in FORMATS if known.matches(start)), SAFETENSORS)
