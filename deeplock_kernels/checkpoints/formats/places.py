"""Where the tensors of a file lie: in which order, within which bounds, and what is around them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import BinaryIO

from deeplock_kernels.checkpoints.formats.base import TensorEntry
from deeplock_kernels.checkpoints.formats.scanner import refusal, shown

_CHUNK = 1 << 20  # bytes


def in_order(tensors: Iterable[TensorEntry], size: int, source: str, hint: str) -> Mapping[str, TensorEntry]:
    """Give tensors by name in the order of the data, once it is sure that they lie beside each other.

    Parameters
    ----------
    size
        That of the main file in bytes. How large companions are is not known here.

    Raises
    ------
    ContainerError
        Two of them have one name or overlap, or one lies beyond the end of the main file.
    """
    named = list(tensors)
    repeated = next((name for name, count in Counter(tensor.name for tensor in named).items() if count > 1), None)
    if repeated is not None:
        raise refusal(source, f"tensor {shown(repeated)}: got it twice", "each name is accepted once", hint)
    found = sorted(named, key=lambda tensor: (tensor.companion, tensor.start, tensor.stop))
    companion, end = "", 0
    for tensor in found:
        if tensor.companion != companion:
            companion, end = tensor.companion, 0
        if tensor.start < end:
            got = f"tensor {shown(tensor.name)}: got its first byte at {tensor.start}, before {end}, where another ends"
            raise refusal(source, got, "tensors that do not overlap are accepted", hint)
        end = tensor.stop
        if not companion and end > size:
            got = f"tensor {shown(tensor.name)}: got {shown(end)} as its end"
            raise refusal(source, got, f"up to {size}, the size of the file, is accepted", hint)
    return MappingProxyType({tensor.name: tensor for tensor in found})


def proof(
    file: BinaryIO, size: int, tensors: Mapping[str, TensorEntry], own: Iterable[tuple[int, int]]
) -> str:
    """Give what the mac covers of a file: all bytes of the main file but those of tensors, and the tensors' table.

    Parameters
    ----------
    own
        Ranges that differ between the locked file and the unlocked one: not covered.

    Returns
    -------
    str
        Canonical JSON: equal before locking and after.
    """
    skipped = [(tensor.start, tensor.stop) for tensor in tensors.values() if not tensor.companion]
    digest, position = hashlib.sha256(), 0
    for start, stop in sorted([*skipped, *own, (size, size)]):
        file.seek(position)
        while position < start:
            chunk = file.read(min(_CHUNK, start - position))
            if not chunk:  # it became shorter just now, which the stream will say
                break
            digest.update(chunk)
            position += len(chunk)
        position = max(position, stop)
    table = {tensor.name: [tensor.dtype, list(tensor.shape), tensor.nbytes] for tensor in tensors.values()}
    covered = {"others": digest.hexdigest(), "tensors": table}
    return json.dumps(covered, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
