"""Tensors by name: the oracle's bytes, shared storage, refusals that change nothing, all of them or none."""

from __future__ import annotations

import array
import fnmatch
import functools
import hashlib
import itertools
import json
import mmap
import re
import secrets
import signal
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import BITS, BOXES, KEYS, SCHEDULES, oracle_mac, oracle_seal, painted

from deeplock_kernels import errors, reference
from deeplock_kernels.errors import (
    BufferLayoutError,
    BufferTypeError,
    DeepLockError,
    HeaderError,
    KeyFormatError,
    KeyTypeError,
    KeyWipedError,
    OverlapError,
    ParameterError,
    ReadOnlyError,
    SBoxError,
    SizeMismatchError,
    TamperedError,
    TensorNameError,
    UnknownNameError,
    WrongKeyError,
)
from deeplock_kernels.header import LockHeader, TensorRecord
from deeplock_kernels.keys import Derivation, MasterKey
from deeplock_kernels.named_lock import NamedLock
from deeplock_kernels.pieces import Range
from deeplock_kernels.runtime.pool import Call
from deeplock_kernels.runtime.tiers import use_tier
from deeplock_kernels.sboxes import AES, SBOXES, SBox
from deeplock_kernels.tensors import lock_tensors, unlock_tensor, unlock_tensors
from deeplock_kernels.transform import Transform

VECTORS = json.loads((Path(__file__).parent / "vectors" / "scheme_v1.json").read_text(encoding="utf-8"))
SALT = bytes(range(100, 116))
KEY = KEYS[256]
OWN_BOX = BOXES["random"]
SIZES = {"z.last in the alphabet": 300, "a": 0, "слой/重み": 1, "": 15, "b": 16, "c\0": 17, "a.weight": 777}


@pytest.fixture
def fixed_salt(monkeypatch):
    monkeypatch.setattr(secrets, "token_bytes", lambda count: SALT[:count])


def some_tensors(sizes=SIZES):
    starts = itertools.accumulate(sizes.values(), initial=3)
    return {name: painted(size, start) for (name, size), start in zip(sizes.items(), starts, strict=False)}


def bytes_of(tensors) -> dict[str, bytes]:
    return {name: bytes(memoryview(np.asarray(tensor)).cast("B")) for name, tensor in tensors.items()}


def copies_of(tensors):
    return {name: tensor.copy() for name, tensor in tensors.items()}


def oracle(plain: dict[str, bytes], header: LockHeader, key: bytes, box: SBox = AES) -> dict[str, bytes]:
    """Lock as the scheme says: in the mapping's order, copies as the ones that they share storage with."""
    label = header.sbox if isinstance(header.sbox, str) else header.sbox["sha256"]
    locked, position = {}, 0
    for name, data in plain.items():
        root = header.tensors[name].same_as
        if root is not None:
            locked[name] = locked[root]
            continue
        if header.schedule == "counter":
            tensor_key, iv = reference.tensor_key_iv(key, header.salt, "counter", label, name)
            stream = reference.counter_keystream(tensor_key, iv, len(data))
        else:
            stream = reference.expansion_keystream(key, len(data), position)
            position += len(data)
        locked[name] = reference.lock(data, stream, box.table)
    return locked


def refused(error, words, tensors, function, *arguments, **keywords) -> str:
    """Call a function that must refuse without changing a byte of any tensor."""
    before = bytes_of(tensors)
    with pytest.raises(error, match=words) as caught:
        function(*arguments, **keywords)
    assert bytes_of(tensors) == before
    return str(caught.value)


# What is computed


@pytest.mark.parametrize("box", ["aes", "kuznyechik", OWN_BOX], ids=["aes", "kuznyechik", "own"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tensors_are_locked_as_the_oracle_does(schedule, bits, box):
    tensors = some_tensors()
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEYS[bits], schedule=schedule, sbox=box)
    table = box if isinstance(box, SBox) else SBOXES[box]
    assert bytes_of(tensors) == oracle(plain, header, KEYS[bits], table)
    assert header.check == reference.check_value(KEYS[bits], header.salt)
    assert (header.format, header.schedule, header.key_bits) == ("deeplock/1", schedule, bits)
    assert header.sbox == (box if isinstance(box, str) else {"sha256": hashlib.sha256(box.table).hexdigest()})
    assert list(header.tensors) == list(plain)
    starts = itertools.accumulate(SIZES.values(), initial=0)
    for (name, size), start in zip(SIZES.items(), starts, strict=False):
        seal = oracle_seal(KEYS[bits], header, name, tensors[name].tobytes())
        assert header.tensors[name] == TensorRecord(size, start if schedule == "expansion" else None, seal=seal)
    assert header.mac == oracle_mac(KEYS[bits], header)
    own = box if isinstance(box, SBox) else None
    unlock_tensors(tensors, KEYS[bits], LockHeader.from_json(header.to_json()), sbox=own)
    assert bytes_of(tensors) == plain


@pytest.mark.parametrize(
    "case", VECTORS["tensors"], ids=lambda case: f"{case['master'][:4]}-{case['name'][:12]}"
)
def test_the_vectors(case, monkeypatch):
    salt, master, name = bytes.fromhex(case["salt"]), bytes.fromhex(case["master"]), case["name"]
    monkeypatch.setattr(secrets, "token_bytes", lambda count: salt[:count])
    tensors = {"before": painted(99), name: painted(case["plain_length"], case["plain_start"])}
    header = lock_tensors(tensors, master)
    assert header.check.hex() == case["check"]
    assert tensors[name][:32].tobytes().hex() == case["locked_head"]
    assert hashlib.sha256(tensors[name]).hexdigest() == case["locked_sha256"]
    unlock_tensors(tensors, master, header)
    assert np.array_equal(tensors[name], painted(case["plain_length"], case["plain_start"]))


def test_the_name_belongs_to_the_key_of_the_counter_schedule():
    """Equal contents under other names differ, and tensors that changed names do not unlock."""
    tensors = {"a": painted(64), "b": painted(64)}
    header = lock_tensors(tensors, KEY)
    assert not np.array_equal(tensors["a"], tensors["b"])
    swapped = {"a": tensors["b"], "b": tensors["a"]}
    refused(TamperedError, r"^tensors\['a'\]: .*; 2 such in all", swapped, unlock_tensors, swapped, KEY, header)
    unlock_tensors(swapped, KEY, header, seal=False)
    assert not np.array_equal(swapped["a"], painted(64))


@pytest.mark.parametrize("threads", [1, 2, 5, None])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_number_of_threads_changes_nothing(schedule, threads, monkeypatch, fixed_salt):
    tensors = some_tensors({"a": 100_001, "b": 3, "c": 1_200_000, "d": 65_280})
    plain, wanted = bytes_of(tensors), copies_of(tensors)
    header = lock_tensors(wanted, KEY, schedule=schedule, threads=1)
    monkeypatch.setattr(Transform, "piece", lambda self, nbytes, threads: 4096)
    planned, run = [], Transform.run

    def noting(self, calls, *arguments, **keywords):
        planned.append(calls)
        run(self, calls, *arguments, **keywords)

    monkeypatch.setattr(Transform, "run", noting)
    assert lock_tensors(tensors, KEY, schedule=schedule, threads=threads) == header
    assert len(planned[0]) > 4
    assert bytes_of(tensors) == bytes_of(wanted)
    unlock_tensors(tensors, KEY, header, threads=threads)
    assert bytes_of(tensors) == plain


def every_dtype():
    random = np.random.default_rng(1)
    dtypes = [
        np.float64, np.float32, np.float16, np.int64, np.int8, np.uint16, np.bool_, np.complex128,
        ">f4", "<M8[s]", "S5", "U3", "V7", [("x", "i1"), ("y", "<f8")], ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn, ml_dtypes.int4,
    ]  # fmt: skip
    tensors = {}
    for i, dtype in enumerate(dtypes, start=1):
        dtype = np.dtype(dtype)
        tensors[f"{i} {dtype}"] = (
            np.frombuffer(random.bytes(6 * i * dtype.itemsize), dtype).reshape(2, i, 3).copy()
        )
    tensors["nan"] = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000], np.uint32).view(np.float32)
    tensors["0-d"] = np.array(3.25)
    tensors["0-d bfloat16"] = np.array(1.5, ml_dtypes.bfloat16)
    tensors["one"] = np.ones(1, np.int8)
    tensors["empty"] = np.zeros((3, 0, 2), np.float32)
    tensors["empty 0-d"] = np.zeros((), "V0")
    return tensors


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_dtype_and_shape(schedule):
    tensors = every_dtype()
    plain = {name: tensor.tobytes() for name, tensor in tensors.items()}
    described = {name: (tensor.dtype, tensor.shape, tensor.ctypes.data) for name, tensor in tensors.items()}
    header = lock_tensors(tensors, KEY, schedule=schedule)
    assert {name: tensor.tobytes() for name, tensor in tensors.items()} == oracle(plain, header, KEY)
    assert described == {
        name: (tensor.dtype, tensor.shape, tensor.ctypes.data) for name, tensor in tensors.items()
    }
    assert header.tensors["0-d"].nbytes == 8
    assert header.tensors["empty"].nbytes == 0
    unlock_tensors(tensors, KEY, header)
    assert {name: tensor.tobytes() for name, tensor in tensors.items()} == plain


def test_buffers_that_are_no_arrays():
    mapped = mmap.mmap(-1, 100)
    mapped[:] = painted(100).tobytes()
    base = bytearray(painted(100))
    tensors = {
        "bytearray": bytearray(painted(100)),
        "memoryview": memoryview(base)[7:93],
        "array": array.array("f", range(10)),
        "mmap": mapped,
        "numpy": painted(10),
        "nothing": bytearray(),
    }
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY)
    assert bytes_of(tensors) == oracle(plain, header, KEY)
    assert (base[:7], base[93:]) == (painted(7), painted(7, 93))
    unlock_tensors(tensors, KEY, header)
    assert bytes_of(tensors) == plain


def test_any_mapping_and_none_at_all():
    class Lazy(dict):
        def __getitem__(self, name):
            return dict.__getitem__(self, name)[0]

    data = painted(50)
    header = lock_tensors(Lazy({"a": (data,)}), KEY)
    assert not np.array_equal(data, painted(50))
    unlock_tensors(Lazy({"a": (data,)}), KEY, header)
    assert np.array_equal(data, painted(50))
    header = lock_tensors({}, KEY)
    assert header.tensors == {}
    unlock_tensors({}, KEY, header)
    unlock_tensors({"other": data}, KEY, LockHeader.from_json(header.to_json()))
    assert np.array_equal(data, painted(50))


def test_a_new_salt_for_each_lock():
    data = painted(16)
    headers, contents = [], []
    for _ in range(1000):
        tensors = {"a": data.copy()}
        headers.append(lock_tensors(tensors, KEY))
        contents.append(tensors["a"].tobytes())
    for values in ([header.salt for header in headers], [header.check for header in headers], contents):
        assert len(set(values)) == 1000
    assert {len(header.salt) for header in headers} == {16}


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, MasterKey.from_bytes])
def test_every_kind_of_key(kind):
    tensors = some_tensors()
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, kind(KEY))
    assert bytes_of(tensors) == oracle(plain, header, KEY)
    unlock_tensors(tensors, kind(KEY), header)
    assert bytes_of(tensors) == plain


# The S-Box


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_own_s_box_has_to_be_given_again(schedule):
    tensors = some_tensors()
    plain = bytes_of(tensors)
    header = LockHeader.from_json(lock_tensors(tensors, KEY, schedule=schedule, sbox=OWN_BOX).to_json())
    for wrong in (None, AES, OWN_BOX.inverse, "aes", OWN_BOX.table, OWN_BOX.sha256):
        refused(SBoxError, "^sbox: ", tensors, unlock_tensors, tensors, KEY, header, sbox=wrong)
        refused(SBoxError, "^sbox: ", tensors, unlock_tensor, tensors["b"], KEY, header, "b", sbox=wrong)
    assert unlock_tensor(tensors["b"], KEY, header, "b", sbox=SBox(OWN_BOX.table)).tobytes() == plain["b"]
    unlock_tensors(tensors, KEY, header, sbox=SBox(OWN_BOX.table))
    assert bytes_of(tensors) == plain


@pytest.mark.parametrize("name", SBOXES)
def test_a_named_s_box_need_not_be_given_again(name):
    tensors = some_tensors()
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY, sbox=SBOXES[name])
    assert header.sbox == name
    wrong = SBOXES["sm4"] if name == "aes" else AES
    refused(SBoxError, "^sbox: ", tensors, unlock_tensors, tensors, KEY, header, sbox=wrong)
    refused(SBoxError, "^sbox: ", tensors, unlock_tensors, tensors, KEY, header, sbox=name)
    locked = copies_of(tensors)
    unlock_tensors(tensors, KEY, header)
    assert bytes_of(tensors) == plain
    unlock_tensors(locked, KEY, header, sbox=SBOXES[name])
    assert bytes_of(locked) == plain


# Which tensors


CHOICES = {
    "all": (None, "a.bias a.weight b.Weight b[0] c"),
    "a name": ("c", "c"),
    "a pattern": ("a.*", "a.bias a.weight"),
    "a pattern of all": ("*", "a.bias a.weight b.Weight b[0] c"),
    "a pattern with case": ("*.weight", "a.weight"),
    "a pattern with a set": ("[ab].[W]*", "b.Weight"),
    "an escaped bracket": ("b[[]0]", "b[0]"),
    "a list": (["c", "a.b*", "none"], "a.bias c"),
    "a tuple": (("c", "?"), "c"),
    "a generator": ((pattern for pattern in ("a.*", "a.bias")), "a.bias a.weight"),
    "a set": ({"b*"}, "b.Weight b[0]"),
    "a function": (lambda name: len(name) == 8, "a.weight b.Weight"),
    "a function of many results": (re.compile("[^.]*").fullmatch, "b[0] c"),
}


@pytest.mark.parametrize("case", CHOICES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_only_some(schedule, case):
    only, chosen = CHOICES[case]
    if case == "a generator":
        only = (pattern for pattern in ("a.*", "a.bias"))
    tensors = some_tensors({"c": 40, "b[0]": 33, "a.weight": 50, "b.Weight": 8, "a.bias": 9})
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY, schedule=schedule, only=only)
    assert sorted(header.tensors) == chosen.split()
    assert list(header.tensors) == [name for name in tensors if name in header.tensors]
    locked = oracle({name: plain[name] for name in header.tensors}, header, KEY)
    assert bytes_of(tensors) == plain | locked
    unlock_tensors(tensors, KEY, header)
    assert bytes_of(tensors) == plain


@pytest.mark.parametrize("only", ["none", "", [], (), "A.*", ["x", "y"], lambda name: False], ids=str)
def test_only_that_chooses_none(only):
    tensors = some_tensors({"a": 5, "b": 6})
    refused(
        TensorNameError,
        "^only: it chooses none of the 2 tensors",
        tensors,
        lock_tensors,
        tensors,
        KEY,
        only=only,
    )
    refused(TensorNameError, "^only: ", {}, lock_tensors, {}, KEY, only=only)


@pytest.mark.parametrize("only", [3, 1.5, True, b"a", [b"a"], ["a", None], [1], object(), [["a"]]], ids=type)
def test_only_of_a_wrong_type(only):
    tensors = some_tensors({"a": 5, "b": 6})
    refused(ParameterError, "^only: ", tensors, lock_tensors, tensors, KEY, only=only)


def test_a_function_that_fails():
    tensors = some_tensors({"a": 5, "b": 6})
    refused(ZeroDivisionError, None, tensors, lock_tensors, tensors, KEY, only=lambda name: 1 // 0)


def test_patterns_mean_what_fnmatch_says_everywhere(monkeypatch):
    """Not what the system's file names would make of them."""
    monkeypatch.setattr(fnmatch.os.path, "normcase", str.lower)
    tensors = {"a": painted(5), "A": painted(5)}
    assert list(lock_tensors(tensors, KEY, only="A").tensors) == ["A"]


# Shared storage


def shared_tensors():
    """Tensors of which some lie in the same place, and the names of those that are the first there."""
    one, other = painted(400, 1), painted(40, 2)
    tensors = {
        "z": one,
        "alone": painted(30, 3),
        "a": one.view(np.float32).reshape(10, 10),
        "other": other,
        "m": memoryview(one),
        "b": other[:],
        "empty": one[:0],
        "empty too": one[:0],
    }
    return tensors, {"a": "z", "m": "z", "b": "other"}


@pytest.mark.parametrize("from_text", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shared_storage_is_locked_once(schedule, from_text):
    tensors, roots = shared_tensors()
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY, schedule=schedule)
    assert {name: record.same_as for name, record in header.tensors.items() if record.same_as} == roots
    if schedule == "expansion":
        assert [record.start for record in header.tensors.values()] == [
            0,
            400,
            None,
            430,
            None,
            None,
            470,
            470,
        ]
    assert bytes_of(tensors) == oracle(plain, header, KEY)
    if from_text:
        header = LockHeader.from_json(header.to_json())
    separate, mixed = ({name: np.array(tensor) for name, tensor in tensors.items()} for _ in range(2))
    mixed["m"] = mixed["a"]  # shared again, but without the one that was locked
    for now in (separate, mixed, tensors):
        unlock_tensors(now, KEY, header)
        assert bytes_of(now) == plain


def test_a_copy_of_shared_storage_alone():
    tensors, roots = shared_tensors()
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY, schedule="expansion")
    for name in roots:
        assert bytes_of({name: unlock_tensor(tensors[name], KEY, header, name)}) == {name: plain[name]}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_was_locked_apart_cannot_be_unlocked_in_one_place(schedule):
    tensors = {"a": painted(40), "b": painted(40), "c": painted(40, 1)}
    tensors["d"] = tensors["c"]
    header = lock_tensors(tensors, KEY, schedule=schedule)
    for names in ("ab", "bc", "cb", "ad", "da"):
        now = copies_of(tensors)
        now[names[1]] = now[names[0]]
        message = refused(OverlapError, "^tensors", now, unlock_tensors, now, KEY, header)
        assert f"tensors['{max(names)}']: got the memory of '{min(names)}'" in message


def test_one_chosen_and_one_not_in_the_same_place():
    tensors, _ = shared_tensors()
    words = r"shares it with .*|got memory that it shares with .*\(not chosen"
    for only in ("z", "a", "m", ["z", "a"], ["a", "m"], ["alone", "b"], lambda name: name != "other"):
        refused(OverlapError, words, tensors, lock_tensors, tensors, KEY, only=only)
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY, only=["[zam]", "alone", "empty"])
    assert bytes_of(tensors) == plain | oracle({name: plain[name] for name in header.tensors}, header, KEY)
    # so with those that the header does not list
    extra = tensors | {"extra": tensors["alone"]}
    refused(OverlapError, words, extra, unlock_tensors, extra, KEY, header)


def test_one_chosen_and_a_read_only_view_of_it_not_chosen():
    data = painted(100)
    view = data.view()
    view.flags.writeable = False
    for other in (view, memoryview(data).toreadonly(), view[:50], view[99:]):
        tensors = {"a": data, "b": other}
        refused(OverlapError, "'a'.*'b'|'b'.*'a'", tensors, lock_tensors, tensors, KEY, only="a")


VIEWS_WITH_GAPS = {
    "transposed": lambda data: data.T,
    "every second row": lambda data: data[::2],
    "backwards": lambda data: data[::-1],
    "a column": lambda data: data[:, 3],
    "a buffer": lambda data: memoryview(data)[::2],
}


@pytest.mark.parametrize("case", VIEWS_WITH_GAPS)
def test_one_chosen_and_a_view_with_gaps_of_it_not_chosen(case):
    data = painted(120).reshape(10, 12)
    tensors = {"a": data, "b": VIEWS_WITH_GAPS[case](data)}
    with pytest.raises(OverlapError):
        lock_tensors(tensors, KEY, only="a")
    assert np.array_equal(data.ravel(), painted(120))


def test_a_view_with_gaps_of_other_memory_is_no_obstacle():
    data = painted(120).reshape(10, 12)
    other = painted(120).reshape(10, 12)
    others = {"b": other.T, "c": other[::2], "d": np.array([object()]), "e": "text", "f": None, "g": [1]}
    header = lock_tensors({"a": data} | others, KEY, only="a")
    assert list(header.tensors) == ["a"]
    unlock_tensors({"a": data} | others, KEY, header)
    assert np.array_equal(data.ravel(), painted(120))


OVERLAPS = [
    (0, 10, 9, 20), (0, 10, 0, 9), (0, 10, 1, 10), (0, 10, 3, 7), (3, 7, 0, 10), (5, 15, 0, 6), (0, 1, 0, 30)
]  # fmt: skip


@pytest.mark.parametrize("ranges", OVERLAPS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_memory_shared_in_part_is_refused_by_name(schedule, ranges):
    a, b, c, d = ranges
    base, first = painted(100), painted(10)
    tensors = {"before": first, "one": base[a:b], "two": base[c:d], "after": base[50:]}
    message = refused(
        OverlapError, "in part", tensors, lock_tensors, tensors, KEY, schedule=schedule, only="[!x]*"
    )
    assert "'one'" in message
    assert "'two'" in message
    message = refused(OverlapError, "in part", tensors, lock_tensors, tensors, KEY, only=["before", "one"])
    assert "'one'" in message
    assert "'two'" in message
    lock_tensors(tensors, KEY, only=["before", "after"])  # those may do among each other what they like


def test_memory_shared_in_part_with_one_far_away_in_the_order():
    base = painted(1000)
    for inner in range(0, 1000, 50):
        tensors = {f"{i}": base[i : i + 1] for i in range(0, 1000, 50)}
        tensors["whole"] = base
        message = refused(OverlapError, "'whole'", tensors, lock_tensors, tensors, KEY, only=f"{inner}")
        assert f"'{inner}'" in message
        refused(OverlapError, "'whole'", tensors, lock_tensors, tensors, KEY, only="whole")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_memory_shared_in_part_at_unlocking(schedule):
    tensors = {"a": painted(40), "b": painted(40)}
    header = lock_tensors(tensors, KEY, schedule=schedule)
    for step in (1, 39):
        base = np.concatenate([tensors["a"], tensors["b"]])
        now = {"a": base[:40], "b": base[step : 40 + step]}
        refused(OverlapError, "in part", {"base": base}, unlock_tensors, now, KEY, header)


def test_neighbours_do_not_overlap():
    base = painted(300)
    tensors = {"c": base[200:], "a": base[:100], "b": base[100:200], "e": base[100:100], "f": base[150:150]}
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY)
    assert all(record.same_as is None for record in header.tensors.values())
    assert bytes_of(tensors) == oracle(plain, header, KEY)


# Refusing before anything changes


def read_only(data):
    data.flags.writeable = False
    return data


BAD_TENSORS = {
    "read-only": (lambda: read_only(painted(8)), ReadOnlyError),
    "bytes": (lambda: b"12345678", ReadOnlyError),
    "read-only memoryview": (lambda: memoryview(bytearray(8)).toreadonly(), ReadOnlyError),
    "with gaps": (lambda: painted(16)[::2], BufferLayoutError),
    "backwards": (lambda: painted(8)[::-1], BufferLayoutError),
    "transposed": (lambda: painted(8).reshape(2, 4).T, BufferLayoutError),
    "in Fortran order": (lambda: np.asfortranarray(np.ones((2, 4), np.uint8)), BufferLayoutError),
    "broadcast": (lambda: np.broadcast_to(np.uint8(1), 8), BufferLayoutError),
    "memoryview with gaps": (lambda: memoryview(bytearray(16))[::2], BufferLayoutError),
    "objects": (lambda: np.array([1], object), BufferTypeError),
    "a field of objects": (lambda: np.zeros(1, [("x", "O")]), BufferTypeError),
    "text": (lambda: "12345678", BufferTypeError),
    "None": (lambda: None, BufferTypeError),
    "a number": (lambda: 3.5, BufferTypeError),
    "a list": (lambda: [1, 2], BufferTypeError),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_tensor_that_cannot_be_changed(schedule, case):
    make, error = BAD_TENSORS[case]
    good = some_tensors()
    words = r"^tensors\['bad \\n one'\]: got "
    refused(error, words, good, lock_tensors, good | {"bad \n one": make()}, KEY, schedule=schedule)
    good["bad \n one"] = painted(8)
    header = lock_tensors(good, KEY, schedule=schedule)
    refused(error, words, good, unlock_tensors, good | {"bad \n one": make()}, KEY, header)
    unlock_tensors(good, KEY, header)
    lock_tensors(good | {"bad \n one": make()}, KEY, schedule=schedule, only=lambda name: "bad" not in name)


@pytest.mark.parametrize("name", [3, b"a", None, ("a",), 1.5])
def test_a_name_that_is_no_text(name):
    tensors = some_tensors()
    header = lock_tensors(tensors, KEY)
    words = f"^tensors: got a name of type {type(name).__name__}"
    refused(TensorNameError, words, tensors, lock_tensors, tensors | {name: painted(3)}, KEY)
    refused(TensorNameError, words, tensors, unlock_tensors, tensors | {name: painted(3)}, KEY, header)


def test_a_name_with_a_lone_surrogate():
    tensors = some_tensors()
    header = lock_tensors(tensors, KEY)
    words = r"^tensors: got the name '\\ud800', which is no Unicode text"
    refused(TensorNameError, words, tensors, lock_tensors, tensors | {"\ud800": painted(3)}, KEY)
    refused(TensorNameError, words, tensors, unlock_tensors, tensors | {"\ud800": painted(3)}, KEY, header)
    refused(TensorNameError, "^name: got ", tensors, unlock_tensor, tensors["b"], KEY, header, "\ud800")


@pytest.mark.parametrize("tensors", [None, [painted(3)], painted(3), "a", [("a", painted(3))]], ids=type)
def test_what_is_no_mapping(tensors):
    header = lock_tensors({}, KEY)
    with pytest.raises(BufferTypeError, match=r"^tensors: got "):
        lock_tensors(tensors, KEY)
    with pytest.raises(BufferTypeError, match=r"^tensors: got "):
        unlock_tensors(tensors, KEY, header)


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"schedule": "ctr"}, UnknownNameError, "^schedule: got 'ctr', accepted are counter, expansion"),
        ({"schedule": None}, UnknownNameError, "^schedule: "),
        ({"schedule": ["counter"]}, UnknownNameError, "^schedule: "),
        ({"sbox": "rijndael"}, UnknownNameError, "^sbox: got 'rijndael', accepted are .*aes, sm4"),
        ({"sbox": None}, UnknownNameError, "^sbox: "),
        ({"sbox": bytes(range(256))}, UnknownNameError, "^sbox: "),
        ({"threads": 0}, ParameterError, "^threads: got 0"),
        ({"threads": -1}, ParameterError, "^threads: "),
        ({"threads": 1.0}, ParameterError, "^threads: "),
        ({"threads": True}, ParameterError, "^threads: "),
        ({"key": "00" * 16}, KeyTypeError, "^key: got str"),
        ({"key": None}, KeyTypeError, "^key: "),
        ({"key": np.zeros(16, np.uint8)}, KeyTypeError, "^key: "),
        ({"key": bytes(17)}, KeyFormatError, "^key: got 17 bytes, accepted are 16, 24 or 32"),
        ({"key": b""}, KeyFormatError, "^key: got 0 bytes"),
    ],
)
def test_other_arguments(keywords, error, words):
    tensors = some_tensors()
    header = lock_tensors(tensors, KEY)
    refused(error, words, tensors, lock_tensors, tensors, **{"key": KEY} | keywords)
    if keywords.keys() <= {"key", "threads"}:
        refused(error, words, tensors, unlock_tensors, tensors, **{"key": KEY, "header": header} | keywords)
        arguments = {"key": KEY, "header": header, "name": "b"} | keywords
        refused(error, words, tensors, unlock_tensor, tensors["b"], **arguments)


def test_a_wiped_key():
    tensors = some_tensors()
    header = lock_tensors(tensors, KEY)
    with MasterKey.from_bytes(KEY) as key:
        pass
    for function, arguments in [(lock_tensors, (tensors, key)), (unlock_tensors, (tensors, key, header))]:
        refused(KeyWipedError, "^key: ", tensors, function, *arguments)


@pytest.mark.parametrize("header", [None, {}, "{}", b"", LockHeader], ids=repr)
def test_what_is_no_header(header):
    tensors = some_tensors()
    refused(HeaderError, "^header: got ", tensors, unlock_tensors, tensors, KEY, header)
    refused(HeaderError, "^header: got ", tensors, unlock_tensor, tensors["b"], KEY, header, "b")


def wrong_keys(key: bytes):
    for bit in (0, 7, 8 * len(key) - 1):
        yield (int.from_bytes(key, "little") ^ 1 << bit).to_bytes(len(key), "little")
    yield bytes(len(key))
    yield from (other for other in KEYS.values() if other != key)
    yield from ((key * 2)[:length] for length in (16, 24, 32) if length != len(key))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bits", BITS)
def test_a_wrong_key_changes_nothing(bits, schedule):
    tensors = some_tensors()
    header = lock_tensors(tensors, KEYS[bits], schedule=schedule)
    for wrong in wrong_keys(KEYS[bits]):
        message = refused(WrongKeyError, "^key: ", tensors, unlock_tensors, tensors, wrong, header)
        assert wrong.hex() not in message
        out = painted(16, 9)
        both = tensors | {"out": out}
        refused(WrongKeyError, "^key: ", both, unlock_tensor, tensors["b"], wrong, header, "b", out=out)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bits", BITS)
def test_without_the_check_a_wrong_key_gives_nonsense(bits, schedule):
    plain = bytes_of(some_tensors())
    tensors = some_tensors()
    header = lock_tensors(tensors, KEYS[bits], schedule=schedule)
    locked = bytes_of(tensors)
    results = []
    for key in (*wrong_keys(KEYS[bits]), KEYS[bits]):
        now = copies_of(tensors)
        unlock_tensors(now, key, header, check=False)
        results.append(bytes_of(now)["a.weight"])
        part = unlock_tensor(tensors["a.weight"], key, header, "a.weight", check=False)
        assert part.tobytes() == results[-1]
    assert results.pop() == plain["a.weight"]
    assert len(set(results)) == len(results)
    for result in results:
        for known in (plain["a.weight"], locked["a.weight"]):
            alike = np.count_nonzero(np.frombuffer(result, np.uint8) == np.frombuffer(known, np.uint8))
            # 3 of 777 by chance. But the expansion is four chains that never meet (Leurent and Pernot, ePrint
            # 2020/1253): a change in one of them leaves 7 of 16 key bytes as they are, for ever.
            assert alike < (40 if schedule == "counter" else 777 / 2)


def test_a_header_of_another_lock():
    one, other = some_tensors(), some_tensors()
    lock_tensors(one, KEY)
    header = lock_tensors(other, KEY)
    refused(TamperedError, "; 6 such in all", one, unlock_tensors, one, KEY, header)
    unlock_tensors(one, KEY, header, seal=False)  # key and header are right: nothing can tell
    assert bytes_of(one) != bytes_of(some_tensors())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_tensor_that_is_missing(schedule):
    tensors = some_tensors()
    header = lock_tensors(tensors, KEY, schedule=schedule)
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        words = rf"^tensors: {re.escape(repr(name))} is in the header and not here; 1 such"
        refused(TensorNameError, words, rest, unlock_tensors, rest, KEY, header)
    refused(TensorNameError, "; 7 such in all", {}, unlock_tensors, {}, KEY, header)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_tensor_of_another_size(schedule):
    tensors = some_tensors()
    header = lock_tensors(tensors, KEY, schedule=schedule)
    for name, tensor in tensors.items():
        for size in {0, tensor.nbytes - 1, tensor.nbytes + 1, 10_000} - {-1, tensor.nbytes}:
            now = tensors | {name: painted(size)}
            words = (
                rf"^tensors\[{re.escape(repr(name))}\]: got {size} bytes, accepted are .* {tensor.nbytes}$"
            )
            refused(SizeMismatchError, words, now, unlock_tensors, now, KEY, header)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_other_tensors_are_left_alone(schedule):
    tensors = some_tensors()
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY, schedule=schedule)
    extra = {"0": painted(50), "zz": painted(60), "objects": np.array([None]), "text": "text"}
    unlock_tensors({"0": extra["0"]} | tensors | extra, KEY, header)
    assert bytes_of(tensors) == plain
    assert np.array_equal(extra["0"], painted(50))
    assert np.array_equal(extra["zz"], painted(60))


def test_the_order_at_unlocking_does_not_matter():
    tensors = some_tensors()
    plain = bytes_of(tensors)
    header = lock_tensors(tensors, KEY, schedule="expansion")
    unlock_tensors(dict(sorted(tensors.items())), KEY, header)
    assert bytes_of(tensors) == plain


# Parts of one tensor

LENGTH = 200_003  # three segments of the expansion's saved states and a bit


@functools.cache
def locked_tensor(schedule):
    tensors = {"before": painted(1234), "a": painted(LENGTH, 5), "copy": None, "empty": painted(0)}
    tensors["copy"] = tensors["a"]
    header = lock_tensors(tensors, KEYS[192], schedule=schedule)
    assert header.tensors["copy"].same_as == "a"
    return read_only(tensors["a"]), header


edges = [0, 1, 15, 16, 17, 4096, 65_280 - 1234, 65_280, 97_919, 97_920, LENGTH - 1, LENGTH]
offsets = st.sampled_from(edges) | st.integers(0, LENGTH)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(offsets, offsets, st.sampled_from(["new", "in place", "out"]), st.sampled_from(["a", "copy"]))
def test_any_part_of_a_tensor(schedule, one, other, way, name):
    locked, header = locked_tensor(schedule)
    start, stop = sorted((one, other))
    data = locked[start:stop].copy()
    guarded = np.full(stop - start + 2, 77, np.uint8)
    out = {"new": None, "in place": data, "out": guarded[1:-1]}[way]
    result = unlock_tensor(data, KEYS[192], header, name, offset=start, out=out)
    assert np.array_equal(result, painted(stop - start, 5 + start))
    assert result.dtype == np.uint8
    if way == "new":
        assert result is not data
    else:
        assert result is out
    if way != "in place":
        assert np.array_equal(data, locked[start:stop])
    assert guarded[0] == guarded[-1] == 77


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_part_keeps_dtype_and_shape(schedule):
    weights = np.arange(600, dtype=np.float32).reshape(20, 30)
    plain = weights.copy()
    header = lock_tensors({"w": weights}, KEY, schedule=schedule)
    row = unlock_tensor(weights[7:9], KEY, header, "w", offset=7 * 120, threads=2)
    assert row.dtype == np.float32
    assert row.shape == (2, 30)
    assert np.array_equal(row, plain[7:9])
    part = unlock_tensor(weights.tobytes()[4:8], KEY, header, "w", offset=4)
    assert part.tobytes() == plain.tobytes()[4:8]


def test_an_offset_of_any_integer_type():
    locked, header = locked_tensor("counter")
    part = unlock_tensor(locked[5:9], KEYS[192], header, "a", offset=np.int64(5))
    assert np.array_equal(part, painted(4, 10))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_past_the_end_of_a_tensor(schedule):
    _, header = locked_tensor(schedule)
    for name, size in [("a", LENGTH), ("copy", LENGTH), ("before", 1234), ("empty", 0)]:
        for offset, nbytes in [
            (size, 1),
            (size - 1, 2),
            (0, size + 1),
            (size + 1, 0),
            (2**62, 1),
            (2**63 - 1, 1),
        ]:
            if offset < 0:
                continue
            data, out = painted(nbytes), painted(nbytes, 1)
            words = f"^data: got bytes {offset} to {offset + nbytes} of tensor '{name}', which has {size}"
            arguments = (unlock_tensor, data, KEYS[192], header, name)
            refused(SizeMismatchError, words, {"": data}, *arguments, offset=offset, out=data)
            refused(SizeMismatchError, words, {"": out}, *arguments, offset=offset, out=out)
        unlock_tensor(b"", KEYS[192], header, name, offset=size)


@pytest.mark.parametrize("offset", [-1, -(2**63), 2**63, 2**64, 1.0, "1", None, True, [1]])
def test_what_is_no_offset(offset):
    _, header = locked_tensor("counter")
    data = painted(1)
    arguments = (unlock_tensor, data, KEYS[192], header, "a")
    refused(ParameterError, "^offset: got ", {"": data}, *arguments, offset=offset, out=data)


@pytest.mark.parametrize("name", ["A", "", "a ", None, 3, b"a", ["a"], "before\0"])
def test_what_is_no_tensor_of_the_header(name):
    _, header = locked_tensor("counter")
    data = painted(1)
    arguments = (unlock_tensor, data, KEYS[192], header, name)
    words = f"^name: got {re.escape(errors.shown(name))}, which is not one of the header's 4 tensors"
    refused(TensorNameError, words, {"": data}, *arguments, out=data)


def test_a_part_and_an_out_that_do_not_fit():
    _, header = locked_tensor("counter")
    base = painted(100)
    arguments = (unlock_tensor, base[:50], KEYS[192], header, "a")
    for error, out in [
        (OverlapError, base[1:51]),
        (OverlapError, base[49:99]),
        (SizeMismatchError, base[:49]),
        (SizeMismatchError, base[50:]  [:49]),
        (ReadOnlyError, bytes(50)),
        (BufferLayoutError, base[::2]),
        (BufferTypeError, "out"),
    ]:  # fmt: skip
        refused(error, "^out: got ", {"": base}, *arguments, out=out)
    for error, data in [(BufferLayoutError, base[::2]), (BufferTypeError, "data"), (BufferTypeError, None)]:
        refused(error, "^data: got ", {"": base}, unlock_tensor, data, KEYS[192], header, "a")


# All of them or none


def small_pieces(monkeypatch):
    monkeypatch.setattr(Transform, "piece", lambda self, nbytes, threads: 8192)


def failing_run(monkeypatch, count, error, where, seen):
    """Let the call that stands at place `count` of the next run fail, and call `seen` just before that."""
    run = Transform.run

    def fail(*arguments):
        seen()
        raise error

    def run_and_fail(self, calls, threads, *, in_place):
        monkeypatch.setattr(Transform, "run", run)
        calls = list(calls)
        place = count if count >= 0 else len(calls) + count
        bad = calls[place]
        if where == "before":
            calls[place] = bad._replace(before=fail)
        else:
            calls[place] = Call(fail, bad.arguments, bad.before)
        return run(self, calls, threads, in_place=in_place)

    monkeypatch.setattr(Transform, "run", run_and_fail)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), RuntimeError("from a kernel")], ids=repr
)
@pytest.mark.parametrize("where", ["before", "kernel"])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_failure_after_some_calls_leaves_all_as_it_was(monkeypatch, schedule, threads, where, error):
    small_pieces(monkeypatch)
    tensors = some_tensors({"a": 9000, "b": 1, "empty": 0, "c": 1_100_000, "d": 70_000, "e": 5})
    tensors["shared"] = tensors["c"]
    plain = bytes_of(tensors)
    changed = []

    def seen():
        changed.append(bytes_of(tensors))

    for count in (0, 1, 2, 5, -2, -1):
        failing_run(monkeypatch, count, error, where, seen)
        refused(type(error), None, tensors, lock_tensors, tensors, KEY, schedule=schedule, threads=threads)
    if threads == 1:  # in the order of the calls: at the first nothing was done, at the last nearly all
        assert [state == plain for state in changed] == [True] + 5 * [False]
        assert changed[-1]["c"] != plain["c"]
        # The counter schedule comes last to the second piece of the largest tensor, which it derives keys beside.
        name, part = ("c", slice(8192, 2 * 8192)) if schedule == "counter" else ("e", slice(None))
        assert changed[-1][name][part] == plain[name][part]
    header = lock_tensors(tensors, KEY, schedule=schedule, threads=threads)
    assert bytes_of(tensors) == {name: oracle_of_long(plain, header)[name] for name in plain}
    for count in (0, 1, 5, -1):
        failing_run(monkeypatch, count, error, where, seen)
        refused(type(error), None, tensors, unlock_tensors, tensors, KEY, header, threads=threads)
    unlock_tensors(tensors, KEY, header, threads=threads)
    assert bytes_of(tensors) == plain


def oracle_of_long(plain, header):
    """Check what is short by the oracle, and take the rest from one whole call of `lock`."""
    from deeplock_kernels.locking import lock
    from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule

    locked, position = {}, 0
    for name, data in plain.items():
        if header.tensors[name].same_as:
            locked[name] = locked[header.tensors[name].same_as]
            continue
        if header.schedule == "counter":
            schedule = CounterSchedule(*reference.tensor_key_iv(KEY, header.salt, "counter", "aes", name))
            locked[name] = lock(data, schedule, threads=1).tobytes()
        else:
            locked[name] = lock(data, ExpansionSchedule(KEY), offset=position, threads=1).tobytes()
            position += len(data)
    return locked


def test_a_failure_of_the_only_call(monkeypatch):
    tensors = {"a": painted(100)}
    for where in ("before", "kernel"):
        failing_run(monkeypatch, 0, KeyboardInterrupt(), where, lambda: None)
        refused(KeyboardInterrupt, None, tensors, lock_tensors, tensors, KEY)


@pytest.mark.parametrize("pieces", ["one call", "many calls"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_real_ctrl_c_while_a_kernel_runs(monkeypatch, schedule, pieces):
    """KeyboardInterrupt comes up when the kernel has returned: what that call did must be taken back then.

    Otherwise the tensors are locked with a salt that nobody got to know. The slowest tier works on this for 40 ms.
    """
    if pieces == "one call":
        monkeypatch.setattr(Transform, "piece", lambda self, nbytes, threads: nbytes)
    run, begun, over = Transform.run, threading.Event(), []

    def tell_and_run(self, calls, *arguments, **keywords):
        assert (len(calls) == 1) == (pieces == "one call" and schedule == "counter")
        begun.set()  # the other thread gets to run when this one lets go of the interpreter
        try:
            return run(self, calls, *arguments, **keywords)
        finally:
            over.append(True)

    def interrupt():
        begun.wait()
        if not over:  # later it is no business of the kernels
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    tensors = {"a": np.zeros(8_000_000, np.uint8)}
    with use_tier("portable"):
        # All kernels are loaded first: an exception amid that leaves an open file, of which Python complains.
        unlock_tensors(tensors, KEY, lock_tensors(tensors, KEY, schedule=schedule))
        monkeypatch.setattr(Transform, "run", tell_and_run)
        for _ in range(20):
            begun.clear()
            over.clear()
            thread = threading.Thread(target=interrupt)
            thread.start()
            header = None
            try:
                try:
                    header = lock_tensors(tensors, KEY, schedule=schedule, threads=1)
                finally:
                    thread.join()
                time.sleep(0.001)
            except KeyboardInterrupt:
                if header is None:
                    assert not tensors["a"].any(), "locked, and the header is lost"
                    return
            tensors["a"][:] = 0  # the signal came late
    pytest.fail("no signal came in time")


@pytest.mark.parametrize("name", ["aes", "sm4", "kuznyechik", "random"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_failure_is_taken_back_with_every_kind_of_kernel(monkeypatch, schedule, bits, name):
    box = BOXES[name]
    small_pieces(monkeypatch)
    tensors = some_tensors({"a": 20_000, "b": 900_000, "c": 50})
    failing_run(monkeypatch, -1, KeyboardInterrupt(), "kernel", lambda: None)
    refused(
        KeyboardInterrupt,
        None,
        tensors,
        lock_tensors,
        tensors,
        KEYS[bits],
        schedule=schedule,
        sbox=box,
        threads=2,
    )
    header = lock_tensors(tensors, KEYS[bits], schedule=schedule, sbox=box)
    failing_run(monkeypatch, -1, KeyboardInterrupt(), "kernel", lambda: None)
    own = box if name == "random" else None
    refused(
        KeyboardInterrupt, None, tensors, unlock_tensors, tensors, KEYS[bits], header, sbox=own, threads=2
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_failure_while_the_calls_are_planned(monkeypatch, schedule):
    tensors = some_tensors()
    header = lock_tensors(tensors, KEY, schedule=schedule)
    names = []
    owner, planned = {"counter": (Derivation, "tensor_key_iv"), "expansion": (NamedLock, "stream")}[schedule]
    plan = getattr(owner, planned)

    def failing(self, *arguments):
        names.append(arguments[-1])
        if len(names) == 3:
            raise MemoryError
        return plan(self, *arguments)

    monkeypatch.setattr(owner, planned, failing)
    refused(MemoryError, None, tensors, lock_tensors, tensors, KEY, schedule=schedule)
    names.clear()
    refused(MemoryError, None, tensors, unlock_tensors, tensors, KEY, header)


# Secrets


def spellings(secret: bytes):
    for part in (secret, secret[:8], secret[-8:]):
        yield part.hex()
        yield part.hex().upper()
        yield repr(part)[2:-1]
        yield ", ".join(map(str, part))
        yield str(int.from_bytes(part, "big"))
        yield str(int.from_bytes(part, "little"))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bits", BITS)
def test_no_key_shows_itself(schedule, bits):
    key = KEYS[bits]
    tensors = some_tensors()
    header = lock_tensors(tensors, key, schedule=schedule)
    lock = NamedLock.from_header(key, header, check=True, sbox=None)
    streams = [lock.stream(name)[0] for name in header.tensors]
    derivation = Derivation(key, header.salt)
    assert repr(lock) == f"NamedLock({schedule}, {bits} bits)"
    shown = [
        f"{function(thing)} {thing}"
        for thing in (lock, header, streams, derivation, MasterKey.from_bytes(key))
        for function in (repr, str, ascii)
    ]
    shown.append(header.to_json())
    for wrong in ({"header": None}, {"key": bytes(32)}, {"sbox": OWN_BOX}, {"tensors": {}}, {"threads": 0}):
        arguments = {"tensors": tensors, "key": key, "header": header} | wrong
        with pytest.raises(DeepLockError) as caught:
            unlock_tensors(**arguments)
        shown.append(f"{caught.value!r} {caught.value}")
    text = "\n".join(shown)
    secrets_of_lock = [key, hashlib.sha256(key).digest()]
    for name in tensors:
        secrets_of_lock += reference.tensor_key_iv(key, header.salt, schedule, "aes", name)
    for secret in secrets_of_lock:
        for spelling in spellings(secret):
            assert spelling not in text
    assert header.salt.hex() in text  # so that the search is known to find something


def test_the_key_streams_are_wiped_at_the_end():
    tensors = some_tensors()
    header = lock_tensors(tensors, KEY)
    lock = NamedLock.from_header(KEY, header, check=True, sbox=None)
    data, out = tensors["b"], np.zeros(16, np.uint8)
    with lock:
        schedule, _ = lock.stream("b")
        assert schedule.keystream(16).any()
        lock.unlock_and_seal([Range("b", out.ctypes.data, data.ctypes.data, 16)], 1)
        secrets_kept = [table._memory for table in lock._tables.values()]
        assert [any(memory) for memory in secrets_kept] == [True, True]
    with pytest.raises(KeyWipedError):
        schedule.keystream(16)
    assert [any(memory) for memory in secrets_kept] == [False, False]
