"""Networks that compute, in plain PyTorch, for what is measured with a key at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.models import Model


class _Block(nn.Module):
    """Two convolutions and a way around them (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Compute."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


def mlp() -> nn.Module:
    """Make a perceptron of three layers, 784 - 2048 - 2048 - 10."""
    return nn.Sequential(nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))


def resnet18() -> nn.Module:
    """Make ResNet-18."""
    parts = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for outputs in (64, 128, 256, 512):
        parts += [_Block(width, outputs, 1 if outputs == 64 else 2), _Block(outputs, outputs, 1)]
        width = outputs
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def bert_encoder() -> nn.Module:
    """Make the twelve layers of BERT-base, without its embeddings."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)


def storage(model: Model) -> nn.Module:
    """Make a module that has the tensors of a model and computes nothing."""
    module = nn.Module()
    for spec in model.tensors:
        tensor = torch.zeros(spec.shape, dtype=getattr(torch, str(spec.dtype)))
        module.register_buffer(spec.name.replace(".", "/"), tensor)
    return module
