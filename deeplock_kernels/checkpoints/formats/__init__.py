"""The file formats that can be locked: one module and one line here each."""

from __future__ import annotations

from deeplock_kernels.checkpoints.formats.base import Format
from deeplock_kernels.checkpoints.formats.safetensors import SAFETENSORS

FORMATS: tuple[Format, ...] = (SAFETENSORS,)


def recognise(start: bytes) -> Format:
    """Give the format of a file that starts like this; what no format knows is left to safetensors to refuse."""
    return next((known for known in FORMATS if known.matches(start)), SAFETENSORS)
