"""Memory for the plain weights of what runs, used again and again and wiped at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deeplock_kernels import buffers
from deeplock_kernels.buffers import Memory
from deeplock_kernels.pieces import Range

_ALIGNMENT = 64  # bytes; where a tensor starts, as frameworks have it


class Locked(NamedTuple):
    """A locked tensor of a layer.

    Attributes
    ----------
    name
        In the header.
    source
        Its locked memory.
    like
        Gives dtype and shape.
    stand_in
        What the layer has in its place.
    nothing
        The data of the stand-in while the layer does not run: none.
    """

    name: str
    source: Memory
    like: Tensor
    stand_in: Tensor
    nothing: Tensor

    @property
    def room(self) -> int:
        """The bytes that it takes in a buffer."""
        return -(-self.source.nbytes // _ALIGNMENT) * _ALIGNMENT


class Layer:
    """The locked tensors of a module that runs.

    Attributes
    ----------
    tensors
        The tensors.
    nbytes
        What they take in a buffer.
    """

    def __init__(self, tensors: Sequence[Locked]) -> None:
        self.tensors = tensors
        self.nbytes = sum(tensor.room for tensor in tensors)


class Group:
    """Layers that are unlocked together.

    Attributes
    ----------
    layers
        The layers, each once.
    nbytes
        What they take in a buffer.
    uses
        How many times one of them runs in a call.
    """

    def __init__(self, layer: Layer) -> None:
        self.layers: dict[Layer, int] = {layer: 0}  # and where in a buffer each starts
        self.nbytes, self.uses = layer.nbytes, 1

    def add(self, layer: Layer) -> None:
        """Take one more layer, or one more run of a layer."""
        if layer not in self.layers:
            self.layers[layer] = self.nbytes
            self.nbytes += layer.nbytes
        self.uses += 1


class Scratch:
    """A buffer for one group after the other.

    Attributes
    ----------
    plain
        How many of its first bytes may be plain weights.
    storage
        The address by which tensors in it are known.
    """

    def __init__(self, nbytes: int) -> None:
        with torch.inference_mode(False):
            self._bytes = torch.empty(nbytes + _ALIGNMENT, dtype=torch.uint8)
        self.storage = self._bytes.untyped_storage().data_ptr()
        self._first = -self.storage % _ALIGNMENT
        self._ranges: dict[Group, list[Range]] = {}
        self._views: dict[tuple[Layer, int], list[Tensor]] = {}
        self.plain = 0

    def ranges(self, group: Group) -> list[Range]:
        """Make room for a group, and give the ranges to unlock."""
        if self.plain > group.nbytes:
            self._wipe(group.nbytes)
        self.plain = group.nbytes
        if group not in self._ranges:
            self._ranges[group] = ranges = []
            for layer, start in group.layers.items():
                place = self.storage + self._first + start
                for tensor in layer.tensors:
                    ranges.append(Range(tensor.name, place, tensor.source.address, tensor.source.nbytes))
                    place += tensor.room
        return self._ranges[group]

    def views(self, layer: Layer, start: int) -> list[Tensor]:
        """Give the tensors of a layer that starts somewhere."""
        if (layer, start) not in self._views:
            self._views[layer, start] = views = []
            place = self._first + start
            with torch.inference_mode(False):
                for tensor in layer.tensors:
                    flat = self._bytes[place : place + tensor.source.nbytes]
                    views.append(flat.view(tensor.like.dtype).view(tensor.like.shape))
                    place += tensor.room
        return self._views[layer, start]

    def forget(self) -> None:
        """Drop what is known of groups."""
        self._ranges.clear()
        self._views.clear()

    def wipe(self) -> None:
        """Fill with zeros what may be plain."""
        self._wipe(0)
        self.plain = 0

    def _wipe(self, start: int) -> None:
        buffers.wipe(Memory(self.storage + self._first + start, self.plain - start, self))
