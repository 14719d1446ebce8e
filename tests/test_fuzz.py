"""The stored cases of every fuzzing target, and that each target finds what is broken on purpose."""

from __future__ import annotations

import secrets
import shutil
from random import Random

import numpy as np
import pytest
import safetensors
from fuzz import CASES, TARGETS, container, differential, stored, target

from deeplock_kernels import cli, header, locking, reference, tensors
from deeplock_kernels.checkpoints import streaming as checkpoints
from deeplock_kernels.checkpoints.formats import gguf, npy, npz, onnx, onnx_skeleton
from deeplock_kernels.checkpoints.formats import safetensors as format_of_safetensors
from deeplock_kernels.errors import ContainerError, HeaderError, WrongKeyError
from deeplock_kernels.header import LockHeader
from deeplock_kernels.keys import MasterKey
from deeplock_kernels.named_lock import NamedLock
from deeplock_kernels.runtime.tiers import active_tier, tiers

ALL = [(name, path) for name in TARGETS for path in stored(name)]


@pytest.mark.parametrize(("name", "path"), ALL, ids=[f"{name}-{path.stem}" for name, path in ALL])
def test_a_stored_case(name, path):
    target(name).run(path.read_bytes())


def test_every_target_has_cases():
    assert {path.name for path in CASES.iterdir()} == {name for name, _ in ALL} == set(TARGETS)


@pytest.mark.parametrize(("name", "count"), [("container", 40), ("format", 20), ("header", 40), ("command", 3)])
def test_mutations_of_the_stored_cases(name, count):
    random, mutants = Random(21), set()
    for path in stored(name):
        for _ in range(count):
            mutants.add(
                target(name).mutate(
                    path.read_bytes(), random, lambda part: part[: random.randint(0, len(part))]
                )
            )
    assert len(mutants) > count * len(stored(name)) / 2
    for mutant in sorted(mutants):
        try:
            target(name).run(mutant)
        except Exception as error:
            raise AssertionError(f"store this case: {mutant}") from error


def test_random_cases_of_the_differential_target():
    random = Random(20)
    for _ in range(40):
        case = differential.random_case(random)
        try:
            differential.run(case)
        except Exception as error:
            raise AssertionError(f"store this case: {case.decode()}") from error


# What takes the place of a function, given that function


def giving(change):
    """Do as before, but change the result."""
    return lambda original: lambda *arguments, **keywords: change(original(*arguments, **keywords))


def raising(error):
    def broken(*_arguments, **_keywords):
        raise error

    return lambda _original: broken


def complaining_twice(original):
    return lambda error, code: original(error, original(error, code))


def leaving_a_file(_original):
    def unlock_file(_source, output, _key, **_keywords):
        with open(output, "wb"):
            raise WrongKeyError("key: it is another one")

    return unlock_file


def writing_a_copy(original):
    def to_file(key, path):
        original(key, path)
        shutil.copy(path, "copy")

    return to_file


def doing_nothing(_original):
    return lambda *_arguments, **_keywords: None


def flipping(place, *names):
    """Do as before, but flip a bit at a place counted from the output's first byte, where such a tier is in use."""

    def broken(original):
        def operation(data, *arguments, out, **keywords):
            original(data, *arguments, out=out, **keywords)
            if active_tier().name in names:
                out.base[out.ctypes.data - out.base.ctypes.data + place] ^= 1

        return operation

    return broken


def changing_its_source(original):
    def operation(data, *arguments, **keywords):
        original(data, *arguments, **keywords)
        data[0] ^= 1

    return operation


EVERY_TIER = [tier.name for tier in tiers() if tier.supported]
BROKEN = [
    ("container", "plain.safetensors", container, "parse_table", raising(KeyError("w"))),
    ("container", "plain.safetensors", container, "parse_table", raising(ContainerError("file: no"))),
    ("container", "key-twice.safetensors", container, "parse_table", raising(ContainerError(f"file: {'no' * 300}"))),
    ("container", "plain.safetensors", safetensors, "deserialize", raising(safetensors.SafetensorError("no"))),
    ("container", "plain.safetensors", safetensors, "deserialize", giving(lambda found: [("v", found[0][1])])),
    ("container", "plain.safetensors", container, "remove_entry", giving(lambda start: start + b" ")),
    ("container", "plain.safetensors", container, "insert_entry", giving(lambda start: start[:-1])),
    ("container", "locked.safetensors", container, "entry", giving(lambda _: None)),
    ("container", "locked.safetensors", container, "read_table", giving(lambda _: None)),
    ("format", "plain.npy", npy, "_literal", raising(RecursionError())),
    ("format", "plain.npy", npy, "read_array", raising(ContainerError("file: a\nb"))),
    ("format", "plain.npy", np.lib.format, "read_array", giving(lambda array: array + 1)),
    ("format", "plain.npz", npz, "new_end", giving(lambda end: end[:-1] + b"x")),
    ("format", "plain.npz", npz, "new_member", giving(lambda parts: parts[::-1])),
    ("format", "plain.gguf", gguf, "_own", giving(lambda own: own + b" ")),
    ("format", "plain.gguf", gguf, "proof", giving(lambda text: text + secrets.token_hex(4))),
    ("format", "plain.gguf", gguf, "in_order", giving(lambda found: dict([*found.items()][1:]))),
    ("format", "locked.onnx", onnx, "metadata_field", giving(lambda field: field[:-1])),
    ("format", "half-a-number.onnx", onnx_skeleton, "_DATA_NBYTES", lambda _: dict.fromkeys((4, 9, 10), 1)),
    ("header", "nested.json", LockHeader, "from_json", raising(RecursionError())),
    ("header", "nested.json", LockHeader, "from_json", raising(HeaderError("a\nb"))),
    ("header", "counter.json", LockHeader, "to_json", giving(lambda text: f" {text}")),
    ("header", "field-twice.json", header._Reader, "_unique", lambda _: lambda _self, pairs: dict(pairs)),
    ("header", "starts-overlap.json", header._Reader, "_check_starts", doing_nothing),
    ("command", "inspect", format_of_safetensors, "entry", raising(KeyError())),
    ("command", "unlock-plain", cli, "_complain", giving(lambda code: code + 6)),
    ("command", "unlock-plain", cli, "_complain", complaining_twice),
    ("command", "unlock-wrong-key", checkpoints, "unlock_file", leaving_a_file),
    ("command", "verify-altered", NamedLock, "expect", doing_nothing),
    ("command", "unlock-altered", NamedLock, "expect", doing_nothing),
    ("command", "keygen", MasterKey, "to_file", writing_a_copy),
    ("command", "lock", format_of_safetensors, "remove_entry", giving(lambda start: start + b" ")),
    ("command", "lock-onto-the-key-file", cli, "_spare_key_files", doing_nothing),
    ("command", "unlock-onto-the-key-file", cli, "_spare_key_files", doing_nothing),
    ("differential", "lock-one-byte.json", locking, "lock", flipping(0, EVERY_TIER[0])),
    ("differential", "lock-one-byte.json", locking, "lock", flipping(0, EVERY_TIER[-1])),
    ("differential", "lock-one-byte.json", locking, "lock", flipping(0, *EVERY_TIER)),
    ("differential", "lock-one-byte.json", locking, "lock", flipping(1, EVERY_TIER[-1])),
    ("differential", "lock-one-byte.json", locking, "lock", flipping(-1, EVERY_TIER[-1])),
    ("differential", "lock-one-byte.json", locking, "lock", changing_its_source),
    ("differential", "counter-at-the-last-offset.json", locking, "unlock", flipping(69_999, *EVERY_TIER)),
    ("differential", "substitute-in-pieces.json", locking, "substitute", flipping(200_002, *EVERY_TIER)),
    ("differential", "many-tensors.json", tensors, "unlock_tensors", doing_nothing),
    ("differential", "short-sealed-tensors.json", tensors, "verify_tensors", doing_nothing),
    ("differential", "short-sealed-tensors.json", reference, "seal", giving(lambda _: bytes(16))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "case", "place", "attribute", "broken"), BROKEN)
def test_a_target_finds_what_is_broken(monkeypatch, name, case, place, attribute, broken):
    data = (CASES / name / case).read_bytes()
    monkeypatch.setattr(place, attribute, broken(getattr(place, attribute)))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever a target raises is a finding
        target(name).run(data)
    assert not isinstance(caught.value, (TypeError, AttributeError)), caught.value
