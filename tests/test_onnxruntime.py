"""ONNX Runtime: sessions of locked models, by way of memory alone."""

from __future__ import annotations

import builtins
import io
import os

import numpy as np
import onnxruntime
import pytest
import samples

from deeplock_kernels import lock_file, unlock_file, unlock_to_memory
from deeplock_kernels.checkpoints import streaming
from deeplock_kernels.checkpoints.streaming import read_layout
from deeplock_kernels.errors import NotLockedError, TamperedError, UnknownNameError, WrongKeyError
from deeplock_kernels.frameworks.onnxruntime import inference_session

KEY = bytes(range(32))


@pytest.fixture(params=["inside", "external"])
def locked(request, tmp_path):
    """A plain model and a locked one, with their data inside or beside."""
    for name in ("plain", "locked"):
        (tmp_path / name).mkdir()
    write = {"inside": samples.network_file, "external": samples.external_file}[request.param]
    plain = write(tmp_path / "plain")
    target = tmp_path / "locked" / plain.name
    lock_file(plain, target, KEY)
    return plain, target


def answer(session):
    inputs = {}
    for one in session.get_inputs():
        shape = [size if isinstance(size, int) else 2 for size in one.shape]
        inputs[one.name] = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    return session.run(None, inputs)


def quiet(**options):
    return inference_session(*options.pop("of"), log_severity_level=4, intra_op_num_threads=1, **options)


def test_a_session_answers_as_that_of_the_plain_model(locked):
    plain, target = locked
    expected = answer(onnxruntime.InferenceSession(plain))
    found = answer(quiet(of=(target, KEY), providers=["CPUExecutionProvider"]))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    nonsense = answer(onnxruntime.InferenceSession(target))
    assert not all(np.array_equal(a, b) for a, b in zip(nonsense, expected, strict=True))


def test_no_file_is_written(locked, monkeypatch):
    _, target = locked
    before = {path: path.read_bytes() for path in target.parent.rglob("*") if path.is_file()}
    opened, original = [], builtins.open

    def watched(path, mode="r", *arguments, **keywords):
        opened.append(mode)
        return original(path, mode, *arguments, **keywords)

    monkeypatch.setattr(builtins, "open", watched)
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it opens a file"))
    quiet(of=(target, KEY))
    monkeypatch.undo()
    assert set(opened) == {"rb"}
    assert {path: path.read_bytes() for path in target.parent.rglob("*") if path.is_file()} == before


def test_what_is_refused(locked):
    plain, target = locked
    for error, arguments, options in (
        (WrongKeyError, (target, bytes(32)), {}),
        (NotLockedError, (plain, KEY), {}),
        (UnknownNameError, (target, KEY), {"no_such_option": 1}),
        (UnknownNameError, (target, KEY), {"add_session_config_entry": 1}),
    ):
        with pytest.raises(error) as caught:
            inference_session(*arguments, **options)
        assert type(caught.value) is error


def test_memory_has_what_the_files_would_have(locked, tmp_path):
    plain, target = locked
    restored = tmp_path / "restored"
    restored.mkdir()
    unlock_file(target, restored / plain.name, KEY)
    expected = {path.name: path.read_bytes() for path in restored.iterdir()}
    done = []
    found = unlock_to_memory(target, KEY, progress=done.append)
    assert {name or plain.name: data for name, data in found.items()} == expected
    assert sum(done) > 0


def test_what_was_unlocked_is_wiped_where_a_seal_is_wrong(locked, monkeypatch):
    _, target = locked
    tensor = max(read_layout(target).tensors.values(), key=lambda tensor: (tensor.companion, tensor.nbytes))
    path = target.parent / (tensor.companion or target.name)
    raw = bytearray(path.read_bytes())
    raw[tensor.start] ^= 1
    path.write_bytes(raw)
    made = []

    class Watched(io.BytesIO):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(streaming.io, "BytesIO", Watched)
    with pytest.raises(TamperedError):
        unlock_to_memory(target, KEY)
    assert made
    assert all(output.getvalue() and not any(output.getvalue()) for output in made)
