"""Keras models on every backend: each in a process of its own, for a process has one backend."""

from __future__ import annotations

import json

import pytest
import support
from processes import Process

BACKENDS = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}

MODEL = """
import json, os, warnings
import numpy as np
import keras
warnings.filterwarnings("error", module="deeplock_kernels")
from deeplock_kernels import LockHeader, TamperedError, TamperedHeaderError, WrongKeyError, lock_tensors
from deeplock_kernels.errors import BufferTypeError, TensorNameError
from deeplock_kernels.frameworks.keras import lock_model, unlock_model, verify_model

key = bytes(range(32))
def made():
    keras.backend.clear_session()  # the same names
    keras.utils.set_random_seed(7)
    layers = keras.layers
    return keras.Sequential([
        keras.Input((8, 8, 1)), layers.Conv2D(3, 3, activation="relu"), layers.BatchNormalization(), layers.Flatten(),
        layers.Dropout(0.1), layers.Dense(6, dtype="bfloat16"), layers.Dense(4, dtype="float32"),
    ])
def array_of(weight):
    if keras.backend.backend() != "torch":
        return np.array(keras.ops.convert_to_numpy(weight))
    import ml_dtypes, torch
    value = weight.value.detach()
    dtype = np.dtype(getattr(ml_dtypes, "bfloat16") if value.dtype == torch.bfloat16 else np.float32)
    return value.reshape(-1).view(torch.uint8).numpy().copy().view(dtype).reshape(value.shape)
def arrays(model):
    return {weight.path: array_of(weight) for weight in model.weights}
def raw(model):
    return {name: array.tobytes() for name, array in arrays(model).items()}
def refused(error, function, *arguments, **options):
    before = raw(model)
    try:
        function(*arguments, **options)
    except error as caught:
        assert type(caught) is error, caught
    else:
        raise AssertionError(error)
    assert raw(model) == before
model = made()
plain, inputs = raw(model), np.random.default_rng(1).random((5, 8, 8, 1), np.float32)
answer = keras.ops.convert_to_numpy(model(inputs))
"""

LAWS = """
for schedule in ("counter", "expansion"):
    header = lock_model(model, key, schedule=schedule)
    assert set(header.tensors) == set(plain)
    expected = {name: np.frombuffer(data, np.uint8).copy() for name, data in plain.items()}
    locked = raw(model)
    assert all(locked[name] != plain[name] for name in plain)
    assert {name: array.dtype for name, array in arrays(model).items()} == {n: a.dtype for n, a in arrays(made()).items()}
    assert not np.array_equal(keras.ops.convert_to_numpy(model(inputs)), answer)
    verify_model(model, key, header)
    refused(WrongKeyError, unlock_model, model, bytes(32), header)
    refused(WrongKeyError, verify_model, model, bytes(32), header)
    restored = LockHeader.from_json(header.to_json())
    unlock_model(model, key, restored)
    assert raw(model) == plain
    refused(TamperedError, unlock_model, model, key, header)
    refused(TamperedError, verify_model, model, key, header)
assert np.array_equal(keras.ops.convert_to_numpy(model(inputs)), answer)

header = lock_model(model, key, only="*/kernel", seal=False)
changed = {name for name, data in raw(model).items() if data != plain[name]}
assert changed == set(header.tensors) == {name for name in plain if name.endswith("/kernel")}
unlock_model(model, bytes(32), header, check=False)
assert raw(model) != plain
model = made()
"""

PAYLOADS = """
# Every bit pattern of two bytes, signalling NaNs too, goes to the model and back.
dense = model.layers[-2]
patterns = np.arange(dense.kernel.shape[0] * 6, dtype=np.uint16) * np.uint16(65536 // (dense.kernel.shape[0] * 6) | 1)
bits = arrays(model)[dense.kernel.path].dtype
if keras.backend.backend() == "torch":
    import torch
    dense.kernel.value.data.copy_(torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16).reshape(dense.kernel.shape))
else:
    dense.kernel.assign(patterns.view(bits).reshape(dense.kernel.shape))
before = raw(model)
assert before[dense.kernel.path] == patterns.tobytes()
header = lock_model(model, key)
unlock_model(model, key, header)
assert raw(model) == before
"""

REFUSED = """
header = lock_model(model, key)
locked, kind = raw(model), type(model.weights[0])
for position in range(len(model.weights) if keras.backend.backend() != "torch" else 0):
    done, original = [], kind.assign
    def failing(self, value):
        done.append(1)
        if len(done) == position + 1:
            raise KeyboardInterrupt
        return original(self, value)
    kind.assign = failing
    try:
        refused(KeyboardInterrupt, unlock_model, model, key, header)
    finally:
        kind.assign = original
unlock_model(model, key, header)
assert raw(model) == plain
refused(BufferTypeError, lock_model, keras.layers.Dense(3), key)
refused(BufferTypeError, lock_model, "model", key)
refused(TensorNameError, lock_model, model, key, only="nothing")
class Twice:
    weights = [model.weights[0], model.weights[0]]
refused(TensorNameError, lock_model, Twice(), key)
"""

PARTS = {"laws": LAWS, "payloads": PAYLOADS, "refused": REFUSED}


@pytest.mark.parametrize("backend", BACKENDS)
def test_keras(backend):
    """All at once, since the frameworks take long to import."""
    support.framework("keras")
    support.framework(BACKENDS[backend])
    example = support.examples_of_frameworks("Keras 3")[0]
    program = MODEL + "\nown = key, model\n" + example + "\nkey, model = own\n"
    program += "".join(f"\n{part}\nmodel = made()\n" for part in PARTS.values())
    program += "\nprint(json.dumps(keras.backend.backend()))"
    # Frameworks have warnings of their own.
    quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": 3, "PYTHONWARNINGS": "", "TF_ENABLE_ONEDNN_OPTS": 0}
    output = Process("import sys, warnings; warnings.simplefilter('ignore')\n" + program, **quiet).finish(errors=None)
    assert json.loads(output.splitlines()[-1]) == backend
