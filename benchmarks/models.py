"""The tensors of well-known networks: names, shapes and dtypes, generated from their architectures.

The names and their order are those of the state dictionaries: of torchvision for MobileNetV2, ResNet and VGG,
of Hugging Face's `BertModel` and `GPT2LMHeadModel`, and of the usual PyTorch exercise for LeNet-5. Buffers
that such a dictionary holds (running means, integer counters) are here as well and do not count as
parameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64  # bytes; where frameworks start a tensor

Bytes = npt.NDArray[np.uint8]


class TensorSpec(NamedTuple):
    """One entry of a state dictionary.

    Attributes
    ----------
    name, shape, dtype
        As the framework gives them; the dtype by NumPy's name.
    parameter
        Whether it is trained. Buffers are not.
    same_as
        The name of an earlier tensor whose memory this one shares, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    parameter: bool = True
    same_as: str | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Model:
    """A network as the list of its tensors.

    Attributes
    ----------
    name
        What tables and charts call it.
    tensors
        In the order of the state dictionary.
    published_parameters
        The count that its publisher states, or None for what is no network.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    published_parameters: int | None = None

    @functools.cached_property
    def parameters(self) -> int:
        """The number of trained numbers, shared ones counted once."""
        return sum(spec.size for spec in self._stored() if spec.parameter)

    @functools.cached_property
    def nbytes(self) -> int:
        """The bytes of all tensors and buffers, shared memory counted once."""
        return sum(spec.nbytes for spec in self._stored())

    @functools.cached_property
    def arena_bytes(self) -> int:
        """The bytes that `place` needs: all tensors, each starting at a multiple of `ALIGNMENT`."""
        return sum(_padded(spec.nbytes) for spec in self._stored())

    def place(self, memory: Bytes) -> dict[str, npt.NDArray[Any]]:
        """Lay the tensors out in a block of at least `arena_bytes` bytes and give them by name."""
        placed: dict[str, npt.NDArray[Any]] = {}
        start = 0
        for spec in self.tensors:
            if spec.same_as is not None:
                placed[spec.name] = placed[spec.same_as]
                continue
            flat = memory[start : start + spec.nbytes]
            placed[spec.name] = flat.view(spec.dtype).reshape(spec.shape)
            start += _padded(spec.nbytes)
        return placed

    def _stored(self) -> Iterator[TensorSpec]:
        return (spec for spec in self.tensors if spec.same_as is None)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


# ------------------------------------------------------------------------------
# Layers, as PyTorch names their tensors


def _linear(name: str, inputs: int, outputs: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (outputs, inputs))
    yield TensorSpec(f"{name}.bias", (outputs,))


def _convolution(
    name: str, inputs: int, outputs: int, kernel: int, *, groups: int = 1, bias: bool = False
) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (outputs, inputs // groups, kernel, kernel))
    if bias:
        yield TensorSpec(f"{name}.bias", (outputs,))


def _batch_norm(name: str, channels: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (channels,))
    yield TensorSpec(f"{name}.bias", (channels,))
    yield TensorSpec(f"{name}.running_mean", (channels,), parameter=False)
    yield TensorSpec(f"{name}.running_var", (channels,), parameter=False)
    yield TensorSpec(f"{name}.num_batches_tracked", (), "int64", parameter=False)


def _layer_norm(name: str, width: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (width,))
    yield TensorSpec(f"{name}.bias", (width,))


def _transposed_linear(name: str, inputs: int, outputs: int) -> Iterator[TensorSpec]:
    """GPT-2's `Conv1D`: a linear layer that stores its matrix the other way round."""
    yield TensorSpec(f"{name}.weight", (inputs, outputs))
    yield TensorSpec(f"{name}.bias", (outputs,))


# ------------------------------------------------------------------------------
# Networks


def _lenet5() -> Iterator[TensorSpec]:
    """LeCun et al., 1998, with plain connections throughout, for 32 x 32 grey images."""
    yield from _convolution("conv1", 1, 6, 5, bias=True)
    yield from _convolution("conv2", 6, 16, 5, bias=True)
    yield from _linear("fc1", 16 * 5 * 5, 120)
    yield from _linear("fc2", 120, 84)
    yield from _linear("fc3", 84, 10)


def _mobilenet_v2() -> Iterator[TensorSpec]:
    """Sandler et al., 2018, table 2, at width 1."""
    yield from _convolution("features.0.0", 3, 32, 3)
    yield from _batch_norm("features.0.1", 32)
    channels, index = 32, 1
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expansion, width, repeats in stages:
        for _ in range(repeats):
            block, layer, hidden = f"features.{index}.conv", 0, channels * expansion
            if expansion != 1:
                yield from _convolution(f"{block}.0.0", channels, hidden, 1)
                yield from _batch_norm(f"{block}.0.1", hidden)
                layer = 1
            yield from _convolution(f"{block}.{layer}.0", hidden, hidden, 3, groups=hidden)
            yield from _batch_norm(f"{block}.{layer}.1", hidden)
            yield from _convolution(f"{block}.{layer + 1}", hidden, width, 1)
            yield from _batch_norm(f"{block}.{layer + 2}", width)
            channels, index = width, index + 1
    yield from _convolution(f"features.{index}.0", channels, 1280, 1)
    yield from _batch_norm(f"features.{index}.1", 1280)
    yield from _linear("classifier.1", 1280, 1000)


def _resnet(depths: tuple[int, ...], *, bottleneck: bool) -> Iterator[TensorSpec]:
    """He et al., 2015, table 1."""
    yield from _convolution("conv1", 3, 64, 7)
    yield from _batch_norm("bn1", 64)
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        outputs = width * (4 if bottleneck else 1)
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        for index in range(depth):
            block, inputs = f"layer{stage + 1}.{index}", channels
            for number, kernel in enumerate(kernels, 1):
                wide = outputs if number == len(kernels) else width
                yield from _convolution(f"{block}.conv{number}", inputs, wide, kernel)
                yield from _batch_norm(f"{block}.bn{number}", wide)
                inputs = wide
            if index == 0 and (stage > 0 or channels != outputs):
                yield from _convolution(f"{block}.downsample.0", channels, outputs, 1)
                yield from _batch_norm(f"{block}.downsample.1", outputs)
            channels = outputs
    yield from _linear("fc", channels, 1000)


def _vgg16() -> Iterator[TensorSpec]:
    """Simonyan and Zisserman, 2014, configuration D."""
    index, channels = 0, 3
    for width, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            yield from _convolution(f"features.{index}", channels, width, 3, bias=True)
            channels, index = width, index + 2  # an activation takes the number between
        index += 1  # and a pooling layer ends each stage
    yield from _linear("classifier.0", 512 * 7 * 7, 4096)
    yield from _linear("classifier.3", 4096, 4096)
    yield from _linear("classifier.6", 4096, 1000)


def _bert_base(vocabulary: int = 30522, width: int = 768) -> Iterator[TensorSpec]:
    """Devlin et al., 2018, the uncased base model with its pooler."""
    yield TensorSpec("embeddings.word_embeddings.weight", (vocabulary, width))
    yield TensorSpec("embeddings.position_embeddings.weight", (512, width))
    yield TensorSpec("embeddings.token_type_embeddings.weight", (2, width))
    yield from _layer_norm("embeddings.LayerNorm", width)
    for index in range(12):
        layer = f"encoder.layer.{index}"
        for role in ("query", "key", "value"):
            yield from _linear(f"{layer}.attention.self.{role}", width, width)
        yield from _linear(f"{layer}.attention.output.dense", width, width)
        yield from _layer_norm(f"{layer}.attention.output.LayerNorm", width)
        yield from _linear(f"{layer}.intermediate.dense", width, 4 * width)
        yield from _linear(f"{layer}.output.dense", 4 * width, width)
        yield from _layer_norm(f"{layer}.output.LayerNorm", width)
    yield from _linear("pooler.dense", width, width)


def _gpt2(vocabulary: int = 50257, width: int = 768) -> Iterator[TensorSpec]:
    """Radford et al., 2019, the smallest of the four; its output layer is the embedding itself."""
    yield TensorSpec("transformer.wte.weight", (vocabulary, width))
    yield TensorSpec("transformer.wpe.weight", (1024, width))
    for index in range(12):
        layer = f"transformer.h.{index}"
        yield from _layer_norm(f"{layer}.ln_1", width)
        yield from _transposed_linear(f"{layer}.attn.c_attn", width, 3 * width)
        yield from _transposed_linear(f"{layer}.attn.c_proj", width, width)
        yield from _layer_norm(f"{layer}.ln_2", width)
        yield from _transposed_linear(f"{layer}.mlp.c_fc", width, 4 * width)
        yield from _transposed_linear(f"{layer}.mlp.c_proj", 4 * width, width)
    yield from _layer_norm("transformer.ln_f", width)
    yield TensorSpec("lm_head.weight", (vocabulary, width), same_as="transformer.wte.weight")


def _model(name: str, build: Callable[[], Iterator[TensorSpec]], published_parameters: int) -> Model:
    return Model(name, tuple(build()), published_parameters)


NETWORKS = (
    _model("LeNet-5", _lenet5, 61_706),
    _model("MobileNetV2", _mobilenet_v2, 3_504_872),
    _model("ResNet-18", lambda: _resnet((2, 2, 2, 2), bottleneck=False), 11_689_512),
    _model("ResNet-50", lambda: _resnet((3, 4, 6, 3), bottleneck=True), 25_557_032),
    _model("BERT-base", _bert_base, 109_482_240),
    _model("GPT-2", _gpt2, 124_439_808),
    _model("VGG-16", _vgg16, 138_357_544),
)
"""Real networks, by size."""

ONE_TENSOR = Model("1 KiB tensor", (TensorSpec("weight", (16, 16)),))


def flat(name: str, nbytes: int) -> Model:
    """Give one long tensor of bytes, which stands for a model of that size."""
    return Model(name, (TensorSpec("weight", (nbytes,), "uint8"),))
