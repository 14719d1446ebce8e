"""The networks of the studies, small enough to be trained in seconds to minutes on two processors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.paper import data
from benchmarks.paper.data import Dataset


@dataclass(frozen=True)
class Architecture:
    """A kind of network and what it learns.

    Attributes
    ----------
    name
        What tables call it.
    make
        Gives an untrained one, of float32.
    dataset
        Gives its data.
    epochs, learning_rate
        Of its training.
    dtype
        What its weights become once it is trained: "float32", "bfloat16", or "int8" with float32 scales.
    costly
        Whether a query takes so long that studies ask fewer of them.
    """

    name: str
    make: Callable[[], nn.Module]
    dataset: Callable[[], Dataset]
    epochs: int
    learning_rate: float
    dtype: str = "float32"
    costly: bool = False

    def untrained(self, seed: int) -> nn.Module:
        """Make one, with what is random at its start from a seed."""
        torch.manual_seed(seed)
        return self.make()

    def converted(self, module: nn.Module) -> nn.Module:
        """Give a network of float32 as one of this dtype, in evaluation mode."""
        if self.dtype == "int8":
            return quantized(module).eval()
        return module.to(getattr(torch, self.dtype)).eval()

    def judges(self) -> tuple[Tensor, Tensor]:
        """Give samples of the test set, with their classes, as many of each: 100 in all if it is costly, else 360."""
        return self.dataset().judges(100 if self.costly else 360)


def mlp(inputs: int, hidden: int, classes: int) -> nn.Module:
    """Make a perceptron with two hidden layers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def lenet5() -> nn.Module:
    """Make LeNet-5 for 1 x 32 x 32 (LeCun et al., 1998), with ReLU and maximum pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def vgg() -> nn.Module:
    """Make a VGG (Simonyan and Zisserman, 2015) of six convolutions for 3 x 32 x 32, with batch normalization."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in (16, 32, 64):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))


def resnet20() -> nn.Module:
    """Make the ResNet-20 for 3 x 32 x 32 (He et al., 2016, section 4.2)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for width in (16, 32, 64):
        for _ in range(3):
            layers.append(_Residual(inputs, width))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vit() -> nn.Module:
    """Make a vision transformer (Dosovitskiy et al., 2021) of three blocks and patches of 4 x 4 for 3 x 32 x 32."""
    return _VisionTransformer(side=32, patch=4, width=48, heads=4, depth=3, classes=10)


class _Residual(nn.Module):
    """Two convolutions and a way around them, which skips pixels and adds channels of zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.padding = outputs // inputs, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Compute."""
        around = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + around)


class _Attention(nn.Module):
    """Self-attention of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(-1)
        return self.projection((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class _TransformerBlock(nn.Module):
    """Attention and a perceptron, each behind a normalization."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Compute."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _VisionTransformer(nn.Module):
    def __init__(self, *, side: int, patch: int, width: int, heads: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


# Weights of int8


class QuantizedLinear(nn.Module):
    """A linear layer with weights of int8 and a scale for each output."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        _quantize(self, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Compute with the weights that int8 and scale stand for."""
        return functional.linear(x, _weights(self), self.bias)


class QuantizedConv2d(nn.Module):
    """A convolution with weights of int8 and a scale for each output."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        _quantize(self, layer)
        self.stride, self.padding = layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        """Compute with the weights that int8 and scale stand for."""
        return functional.conv2d(x, _weights(self), self.bias, self.stride, self.padding)


def quantized(module: nn.Module) -> nn.Module:
    """Give the network with its linear layers and convolutions quantized; it must be a plain sequence."""
    return nn.Sequential(
        *(
            QuantizedLinear(layer)
            if isinstance(layer, nn.Linear)
            else QuantizedConv2d(layer)
            if isinstance(layer, nn.Conv2d)
            else layer
            for layer in module.children()
        )
    )


def _quantize(module: nn.Module, layer: nn.Linear | nn.Conv2d) -> None:
    weight = layer.weight.detach()
    scale = weight.flatten(1).abs().amax(1) / 127
    shape = (-1,) + (1,) * (weight.dim() - 1)
    module.register_buffer("weight", (weight / scale.view(shape)).round().to(torch.int8))
    module.register_buffer("scale", scale)
    module.register_buffer("bias", layer.bias.detach().clone())


def _weights(module: nn.Module) -> Tensor:
    return module.weight * module.scale.view((-1,) + (1,) * (module.weight.dim() - 1))


ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("MLP, wine", lambda: mlp(13, 32, 3), data.wine, 60, 5e-3),
        Architecture("MLP, breast cancer", lambda: mlp(30, 32, 2), data.breast_cancer, 30, 5e-3),
        Architecture("MLP, digits", lambda: mlp(64, 128, 10), data.digits, 20, 3e-3),
        Architecture("LeNet-5", lenet5, data.digits_enlarged, 12, 3e-3, costly=True),
        Architecture("VGG", vgg, data.scenes, 6, 2e-3, costly=True),
        Architecture("ResNet-20", resnet20, data.scenes, 5, 3e-3, costly=True),
        Architecture("ViT", vit, data.scenes, 16, 2e-3, costly=True),
        Architecture("LeNet-5, int8", lenet5, data.digits_enlarged, 12, 3e-3, "int8", costly=True),
        Architecture("LeNet-5, bfloat16", lenet5, data.digits_enlarged, 12, 3e-3, "bfloat16", costly=True),
    )
}
