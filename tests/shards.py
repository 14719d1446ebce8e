"""Small checkpoints in shards, for several test files."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import safetensors.numpy

KEY, OTHER_KEY = random.Random(1).randbytes(32), random.Random(2).randbytes(16)
INDEX = "model.safetensors.index.json"
GROUP, WINDOW = 9000, 4000  # bytes: tasks and windows that cut tensors


def shard_name(number, count):
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def make_checkpoint(path, shards=2, seed=0):
    """Write a checkpoint of some shards, of 8 to 20 KB each, with equal tensors in different shards, and other files."""
    rng = np.random.default_rng(seed)
    os.makedirs(path / "sub" / "deeper")
    tied = rng.standard_normal((40, 25)).astype(np.float32)
    places, total = {}, 0
    for number in range(shards):
        name = shard_name(number, shards)
        tensors = {
            f"layer.{number}.weight": rng.standard_normal((31 + number, 93)).astype(np.float32),
            f"layer.{number}.bias": np.zeros(93, np.float16),
            f"layer.{number}.none": np.zeros((0, 4), np.float32),
            f"tied.{number}": tied,
        }
        safetensors.numpy.save_file(tensors, path / name, metadata={"format": "pt"} if number else None)
        places |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (path / "config.json").write_text('{"model_type": "none"}')
    (path / "sub" / "deeper" / "tokenizer.model").write_bytes(bytes(range(256)) * 9)
    (path / "empty.txt").write_bytes(b"")
    return total


def snapshot(path):
    """Give the content of all files below, by relative name."""
    return {
        os.path.relpath(os.path.join(at, name), path): Path(at, name).read_bytes()
        for at, _, names in os.walk(path)
        for name in names
    }


class Dying:
    """An executor whose process that runs the third task kills itself, once."""

    def __init__(self, executor, marker):
        self._executor, self._marker, self._count = executor, str(marker), 0

    def submit(self, function, *arguments):
        self._count += 1
        if self._count == 3:
            return self._executor.submit(run_or_die, self._marker, function, *arguments)
        return self._executor.submit(function, *arguments)


def run_or_die(marker, function, *arguments):
    if os.path.exists(marker):
        return function(*arguments)
    with open(marker, "w"):
        pass
    function(*arguments)  # all is written, and nobody hears of it
    return os.kill(os.getpid(), signal.SIGKILL)
