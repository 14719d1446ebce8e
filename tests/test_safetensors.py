"""Safetensors files: locked through any window as tensors are, unlocked to the byte, never half written."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import mmap
import os
import secrets
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import processes
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from support import BITS, BOXES, KEYS, SAFETENSORS_DTYPES, SCHEDULES, oracle_mac, painted

from deeplock_kernels.checkpoints import streaming as checkpoints
from deeplock_kernels.checkpoints.streaming import lock_file, read_header, unlock_file
from deeplock_kernels.errors import (
    AlreadyLockedError,
    ContainerError,
    FileAccessError,
    HeaderError,
    KeyFormatError,
    KeyTypeError,
    NotLockedError,
    ParameterError,
    SameFileError,
    SBoxError,
    TamperedHeaderError,
    TensorNameError,
    UnknownNameError,
    WrongKeyError,
)
from deeplock_kernels.header import LockHeader
from deeplock_kernels.keys import MasterKey
from deeplock_kernels.pieces import BLOCK
from deeplock_kernels.sboxes import SBOXES, SBox
from deeplock_kernels.tensors import lock_tensors, unlock_tensor, unlock_tensors
from deeplock_kernels.transform import Transform

KEY, OTHER_KEY = KEYS[256], KEYS[256][::-1]
OWN_BOX = BOXES["random"]
OLD = b"what the target held before"


def raw_file(table: str, data: bytes = b"") -> bytes:
    return len(table.encode()).to_bytes(8, "little") + table.encode() + data


def of_all_dtypes():
    rng = np.random.default_rng(1)
    tensors = {
        f"layer.{i}": rng.integers(0, 2, (2, 9 * i)).astype(dtype) for i, dtype in enumerate(SAFETENSORS_DTYPES, start=1)
    }
    return safetensors.numpy.save(tensors | {"scalar": np.array(7.0)}, metadata={"format": "np"})


def by_other_writers():
    """White space, escapes, four-bit numbers, fields and tensors in another order than usual."""
    table = (
        ' \t "z" : {"data_offsets":[100,612], "shape":[2 ,256],"dtype":"U8"},\n'
        '"half\\u0020bytes":{"dtype":"F4","shape":[200],"data_offsets":[0,100]}, '
        '"__metadata__" : { "b" : "\\u00e4" , "a" : "" } ,'
        '"none":{"dtype":"F32","shape":[0],"data_offsets":[100,100]}'
    )
    return raw_file("{" + table + "}   ", painted(612).tobytes())


FILES = {
    "all dtypes": of_all_dtypes,
    "metadata": lambda: safetensors.numpy.save(
        {"w": np.ones(3)}, metadata={"ключ": 'v"\\\n', "a": "", "": "b"}
    ),
    "metadata of nothing": lambda: raw_file(
        '{"w":{"dtype":"U8","shape":[99],"data_offsets":[0,99]},"__metadata__":{}}', painted(99).tobytes()
    ),
    "unicode names": lambda: safetensors.numpy.save(
        {
            name: np.full(40, i, np.uint8)
            for i, name in enumerate(["", "重み/слой", 'a\n"b\\', "a\0", "😀", " a", "ä"])
        }
    ),
    "empty tensors too": lambda: safetensors.numpy.save(
        {
            "a": np.ones(5),
            "b": np.zeros((3, 0, 2), np.float32),
            "c": np.zeros(0, np.int8),
            "d": np.ones((2, 2)),
        }
    ),
    "empty tensors only": lambda: safetensors.numpy.save({"a": np.zeros(0), "b": np.zeros((0, 7), np.int8)}),
    "no tensors": lambda: safetensors.numpy.save({}),
    "no tensors but metadata": lambda: safetensors.numpy.save({}, metadata={"a": "b"}),
    "other writers": by_other_writers,
    "one large tensor": lambda: safetensors.numpy.save({"w": painted(1_000_003)}),
}


def tensors_of(raw: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Let the library read a file: dtype, shape and bytes of each tensor."""
    found = dict(safetensors.deserialize(raw))
    return {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in found.items()}


def data_of(raw: bytes) -> dict[str, np.ndarray]:
    """Give a file's tensors as bytes in memory of their own, in the order of the data."""
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    table.pop("__metadata__", None)
    places = {name: entry["data_offsets"] for name, entry in table.items()}
    return {
        name: np.frombuffer(raw[8 + length + start : 8 + length + stop], np.uint8).copy()
        for name, (start, stop) in sorted(places.items(), key=lambda item: item[1])
    }


def metadata_of(path) -> dict[str, str] | None:
    with safetensors.safe_open(path, framework="np") as file:
        return file.metadata()


def table_of(path) -> dict[str, object]:
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def check_same_lock(path, header, in_memory):
    """Check that a locked file's header is that of tensors in memory, and that its mac is over the file's table too."""
    assert header.mac == oracle_mac(KEY, header, table_of(path)) != in_memory.mac == oracle_mac(KEY, in_memory)
    assert dataclasses.replace(in_memory, mac=header.mac, file=header.file) == header == read_header(path)


@pytest.fixture
def fixed_salt(monkeypatch):
    monkeypatch.setattr(secrets, "token_bytes", lambda count: bytes(range(50, 50 + count)))


@pytest.fixture
def folder(tmp_path):
    """A directory with a plain file, a locked one, an old target and nothing else."""
    plain = tmp_path / "plain"
    plain.write_bytes(
        safetensors.numpy.save({"a": painted(3000), "b": painted(2000), "c": painted(5)}, {"x": "y"})
    )
    lock_file(plain, tmp_path / "locked", KEY)
    (tmp_path / "old").write_bytes(OLD)
    return tmp_path


def snapshot(folder: Path):
    return {
        path: (
            path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes(),
            path.lstat().st_mode,
        )
        for path in folder.rglob("*")
    }


def refused(folder, error, words, function, *arguments, **keywords) -> str:
    """Call a function that must refuse and leave the folder, and the open files, as they were."""
    before, descriptors = snapshot(folder), os.listdir("/proc/self/fd")
    with pytest.raises(error, match=words) as caught:
        function(*arguments, **keywords)
    assert snapshot(folder) == before
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    return str(caught.value)


targets = pytest.mark.parametrize("target", ["old", "new"])

# What is written


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("file", FILES)
def test_a_file_is_locked_and_comes_back(tmp_path, fixed_salt, schedule, file):
    raw = FILES[file]()
    plain, locked, restored = (tmp_path / name for name in ("plain", "locked", "restored"))
    plain.write_bytes(raw)
    header = lock_file(plain, locked, KEY, schedule=schedule)
    expected = data_of(raw)
    check_same_lock(locked, header, lock_tensors(expected, KEY, schedule=schedule))
    theirs, before = tensors_of(locked.read_bytes()), tensors_of(raw)
    assert theirs == {name: (*before[name][:2], data.tobytes()) for name, data in expected.items()}
    for name, (_, _, data) in theirs.items():
        assert data != before[name][2] or len(data) < 4
    assert metadata_of(locked) == {**(metadata_of(plain) or {}), "deeplock": header.to_json()}
    assert [*data_of(locked.read_bytes())] == [*data_of(raw)]
    unlock_file(locked, restored, KEY)
    assert restored.read_bytes() == plain.read_bytes() == raw
    assert sorted(os.listdir(tmp_path)) == ["locked", "plain", "restored"]


@pytest.mark.parametrize("bits", BITS)
def test_every_kind_of_key_and_path(tmp_path, bits):
    raw = FILES["unicode names"]()
    plain, locked, restored = (tmp_path / name for name in ("plain", "größe 重", "restored"))
    plain.write_bytes(raw)
    for kind, path in itertools.product((bytes, bytearray, memoryview, MasterKey.from_bytes), (str, Path)):
        header = lock_file(path(plain), path(locked), kind(KEYS[bits]))
        assert header.key_bits == bits
        unlock_file(path(locked), path(restored), kind(KEYS[bits]))
        assert restored.read_bytes() == raw
        restored.unlink()


def test_a_new_salt_for_each_file(folder):
    salts = {lock_file(folder / "plain", folder / "new", KEY).salt for _ in range(50)}
    assert len(salts) == 50
    assert len({read_header(folder / "locked").salt} | salts) == 51


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_library_s_arrays_unlock_in_memory(tmp_path, schedule):
    plain, locked = tmp_path / "plain", tmp_path / "locked"
    dtypes = ("f8", "f4", "f2", "i8", "i1", "u2", "?", "c8", ml_dtypes.bfloat16)
    saved = {f"{i}": (painted(5 * i) % 3).astype(dtype) for i, dtype in enumerate(dtypes, start=1)}
    safetensors.numpy.save_file(saved, plain)
    lock_file(plain, locked, KEY, schedule=schedule)
    tensors = {name: array.copy() for name, array in safetensors.numpy.load_file(locked).items()}
    header = read_header(locked)
    for name, array in saved.items():
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype, array.shape)
        assert tensors[name].tobytes() != array.tobytes()
        part = unlock_tensor(tensors[name].tobytes()[1:], KEY, header, name, offset=1)
        assert part.tobytes() == array.tobytes()[1:]
    bare = LockHeader.from_json(metadata_of(locked)["deeplock"])  # it does not know the file that its mac is over
    with pytest.raises(TamperedHeaderError, match=r"; take the header of a file with read_header$"):
        unlock_tensors(tensors, KEY, bare)
    unlock_tensors(tensors, KEY, header)
    assert {name: array.tobytes() for name, array in tensors.items()} == {
        name: array.tobytes() for name, array in saved.items()
    }


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_file_that_the_library_saved_anew(folder, schedule):
    lock_file(folder / "plain", folder / "locked", KEY, schedule=schedule)
    tensors = safetensors.numpy.load_file(folder / "locked")
    again = dict(reversed(tensors.items()))
    safetensors.numpy.save_file(again, folder / "again", metadata=metadata_of(folder / "locked"))
    unlock_file(folder / "again", folder / "restored", KEY)
    assert tensors_of((folder / "restored").read_bytes()) == tensors_of((folder / "plain").read_bytes())
    assert metadata_of(folder / "restored") == {"x": "y"}


@pytest.mark.parametrize("metadata", [{}, {"format": "np", "z": "ä"}])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tensors_locked_in_memory_and_saved_by_the_library(tmp_path, schedule, metadata):
    """The file's order is the library's; copies of shared storage have become tensors of their own."""
    shared = np.arange(900, dtype=np.float32)
    tensors = {"z": shared, "b": painted(77), "a": shared, "head": shared.reshape(30, 30), "i": np.arange(9)}
    plain = {name: array.copy() for name, array in tensors.items()}
    header = lock_tensors(tensors, KEY, schedule=schedule)
    assert {name for name, record in header.tensors.items() if record.same_as == "z"} == {"a", "head"}
    path = tmp_path / "locked"
    safetensors.numpy.save_file(tensors, path, metadata=metadata | {"deeplock": header.to_json()})
    assert dataclasses.replace(read_header(path), file=None) == header
    with pytest.raises(TamperedHeaderError):  # nothing was proved of this file
        unlock_file(path, tmp_path / "restored", KEY)
    unlock_file(path, tmp_path / "restored", KEY, check=False)
    restored = safetensors.numpy.load_file(tmp_path / "restored")
    loaded = {name: array.copy() for name, array in safetensors.numpy.load_file(path).items()}
    unlock_tensors(loaded, KEY, LockHeader.from_json(metadata_of(path)["deeplock"]))
    assert restored.keys() == loaded.keys() == plain.keys()
    for name, array in plain.items():
        assert restored[name].dtype == array.dtype
        assert np.array_equal(restored[name], array)
        assert np.array_equal(loaded[name], array)
    assert metadata_of(tmp_path / "restored") == (metadata or None)


@pytest.mark.parametrize("only", ["b", ["a", "c"], lambda name: name > "a", "*", None])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_only_some(folder, fixed_salt, schedule, only):
    raw = (folder / "plain").read_bytes()
    header = lock_file(folder / "plain", folder / "new", KEY, schedule=schedule, only=only)
    expected = data_of(raw)
    check_same_lock(folder / "new", header, lock_tensors(expected, KEY, schedule=schedule, only=only))
    found = data_of((folder / "new").read_bytes())
    assert {name: data.tobytes() for name, data in found.items()} == {
        name: data.tobytes() for name, data in expected.items()
    }
    unlock_file(folder / "new", folder / "restored", KEY)
    assert (folder / "restored").read_bytes() == raw


@pytest.mark.parametrize("name", SBOXES)
def test_a_named_s_box(folder, fixed_salt, name):
    expected = data_of((folder / "plain").read_bytes())
    header = lock_file(folder / "plain", folder / "new", KEY, sbox=name)
    check_same_lock(folder / "new", header, lock_tensors(expected, KEY, sbox=name))
    assert data_of((folder / "new").read_bytes())["a"].tobytes() == expected["a"].tobytes()
    unlock_file(folder / "new", folder / "restored", KEY)
    assert (folder / "restored").read_bytes() == (folder / "plain").read_bytes()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_own_s_box_has_to_be_given_again(folder, schedule):
    lock_file(folder / "plain", folder / "new", KEY, sbox=OWN_BOX, schedule=schedule)
    for wrong in (None, OWN_BOX.inverse, "aes"):
        refused(folder, SBoxError, "^sbox: ", unlock_file, folder / "new", folder / "old", KEY, sbox=wrong)
    unlock_file(folder / "new", folder / "restored", KEY, sbox=SBox(OWN_BOX.table))
    assert (folder / "restored").read_bytes() == (folder / "plain").read_bytes()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_number_of_threads_changes_nothing(tmp_path, fixed_salt, monkeypatch, schedule, threads):
    raw = FILES["one large tensor"]()
    (tmp_path / "plain").write_bytes(raw)
    expected = data_of(raw)
    lock_tensors(expected, KEY, schedule=schedule, threads=1)
    monkeypatch.setattr(Transform, "piece", lambda self, nbytes, threads: 4096)
    lock_file(tmp_path / "plain", tmp_path / "locked", KEY, schedule=schedule, threads=threads)
    assert data_of((tmp_path / "locked").read_bytes())["w"].tobytes() == expected["w"].tobytes()
    unlock_file(tmp_path / "locked", tmp_path / "restored", KEY, threads=threads)
    assert (tmp_path / "restored").read_bytes() == raw


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_the_check_a_wrong_key_gives_nonsense(folder, schedule):
    lock_file(folder / "plain", folder / "locked", KEY, schedule=schedule)
    plain, locked = (data_of((folder / name).read_bytes()) for name in ("plain", "locked"))
    for wrong in (OTHER_KEY, KEYS[128], KEYS[192]):
        unlock_file(folder / "locked", folder / "new", wrong, check=False)
        found = data_of((folder / "new").read_bytes())
        for known in (plain, locked):
            assert np.count_nonzero(found["a"] == known["a"]) < 60  # 12 of 3000 by chance
        assert metadata_of(folder / "new") == {"x": "y"}
    unlock_file(folder / "locked", folder / "new", KEY, check=False)
    assert (folder / "new").read_bytes() == (folder / "plain").read_bytes()


# Windows


def straddling_file():
    """Tensors that begin and end at, before and behind the borders of pages and of small windows."""
    sizes = [PAGE - 1, 1, PAGE, PAGE + 1, 17, 0, 3 * PAGE - 5, 1, 1, 2 * PAGE, 100]
    starts = itertools.accumulate(sizes, initial=7)
    return safetensors.numpy.save(
        {f"{i:02}": painted(size, start) for i, (size, start) in enumerate(zip(sizes, starts, strict=False))}
    )


PAGE = mmap.ALLOCATIONGRANULARITY
WINDOWS = [PAGE + delta for delta in (-17, -1, 0, 1, 18)]
WINDOWS += [8 * PAGE + 118 + delta for delta in (-17, -1, 0, 1, 18)]  # about all of the data
WINDOWS += [1000, 2 * PAGE, 1 << 40]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("only", [None, lambda name: int(name) % 3 != 1], ids=["all", "some"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_window_changes_nothing(tmp_path, monkeypatch, fixed_salt, schedule, only, window):
    raw = straddling_file()
    plain, locked, restored = (tmp_path / name for name in ("plain", "locked", "restored"))
    plain.write_bytes(raw)
    expected = data_of(raw)
    in_memory = lock_tensors(expected, KEY, schedule=schedule, only=only)
    monkeypatch.setattr(checkpoints, "WINDOW", window)
    steps = []
    header = lock_file(plain, locked, KEY, schedule=schedule, only=only, progress=steps.append)
    check_same_lock(locked, header, in_memory)
    data_bytes = sum(data.nbytes for data in expected.values())
    assert sum(steps) == data_bytes
    assert all(window - BLOCK < step <= window for step in steps[:-1])
    found = data_of(locked.read_bytes())
    for name, data in expected.items():
        assert np.array_equal(found[name], data), name
    unlock_file(locked, restored, KEY)
    assert restored.read_bytes() == raw


@given(
    st.lists(st.integers(0, 90), max_size=7),
    st.integers(BLOCK, 100),
    st.sampled_from(SCHEDULES),
    st.integers(0, 127),
)
def test_any_window_and_any_tensors(tmp_path_factory, sizes, window, schedule, chosen):
    folder = tmp_path_factory.getbasetemp()
    plain, locked, restored = (folder / name for name in ("any plain", "any locked", "any restored"))
    raw = safetensors.numpy.save({f"{i}": painted(size, i) for i, size in enumerate(sizes)})
    plain.write_bytes(raw)

    def only(name):
        return chosen >> int(name) & 1

    only = only if any(only(str(i)) for i in range(len(sizes))) else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "WINDOW", window)
        patch.setattr(os, "fsync", lambda descriptor: None)
        header = lock_file(plain, locked, KEY, schedule=schedule, only=only)
        unlock_file(locked, restored, KEY)
    assert restored.read_bytes() == raw
    tensors = data_of(locked.read_bytes())
    unlock_tensors(tensors, KEY, header)
    assert {name: data.tobytes() for name, data in tensors.items()} == {
        name: data.tobytes() for name, data in data_of(raw).items()
    }


def test_progress_adds_up_to_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "WINDOW", 999)
    for file in ("no tensors", "empty tensors only", "unicode names", "all dtypes", "other writers"):
        raw = FILES[file]()
        (tmp_path / "plain").write_bytes(raw)
        for function, names in [(lock_file, ("plain", "locked")), (unlock_file, ("locked", "restored"))]:
            steps = []
            function(*(tmp_path / name for name in names), KEY, progress=steps.append)
            assert sum(steps) == sum(data.nbytes for data in data_of(raw).values())
            assert all(0 <= step <= 999 for step in steps)


def test_the_target_appears_only_at_the_end(folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "WINDOW", 100)
    states = set()
    for function, source in [(lock_file, "plain"), (unlock_file, "locked")]:
        for target in ("old", "new"):
            path = folder / target

            def look(_, path=path):
                states.add(path.exists() and path.read_bytes())

            function(folder / source, path, KEY, progress=look)
        (folder / "old").write_bytes(OLD)
        (folder / "new").unlink()
    assert states == {OLD, False}


# Refusing


@targets
def test_locked_twice_and_unlocked_twice(folder, target):
    words = "locked: it is locked already; unlock it first$"
    refused(folder, AlreadyLockedError, words, lock_file, folder / "locked", folder / target, OTHER_KEY)
    words = "plain: it carries no lock header"
    refused(folder, NotLockedError, words, unlock_file, folder / "plain", folder / target, KEY)
    refused(folder, NotLockedError, words, read_header, folder / "plain")


@targets
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bits", BITS)
def test_a_wrong_key(folder, target, bits, schedule):
    lock_file(folder / "plain", folder / "locked", KEYS[bits], schedule=schedule)
    others = [
        KEYS[bits][:-1] + bytes([KEYS[bits][-1] ^ 1]),
        bytes(bits // 8),
        *(KEYS[b] for b in BITS if b != bits),
    ]
    for wrong in others:
        message = refused(
            folder, WrongKeyError, "^key: ", unlock_file, folder / "locked", folder / target, wrong
        )
        assert wrong.hex() not in message


@targets
@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"key": "00" * 16}, KeyTypeError, "^key: got str"),
        ({"key": bytes(15)}, KeyFormatError, "^key: got 15 bytes"),
        ({"threads": 0}, ParameterError, "^threads: got 0"),
        ({"schedule": "ctr"}, UnknownNameError, "^schedule: got 'ctr'"),
        ({"sbox": "none"}, (UnknownNameError, SBoxError), "^sbox: "),
        ({"only": "none*"}, TensorNameError, "^only: it chooses none of the 3 tensors"),
        ({"only": [1]}, ParameterError, "^only: "),
    ],
)
def test_other_arguments(folder, target, keywords, error, words):
    arguments = {"key": KEY} | keywords
    refused(folder, error, words, lock_file, folder / "plain", folder / target, **arguments)
    if not keywords.keys() & {"schedule", "only"}:
        refused(folder, error, words, unlock_file, folder / "locked", folder / target, **arguments)


@pytest.mark.parametrize("path", [None, 3, b"plain", "", "a\0b"])
def test_what_is_no_path(folder, path):
    for function, source in [(lock_file, "plain"), (unlock_file, "locked")]:
        refused(folder, ParameterError, "^src: got ", function, path, folder / "new", KEY)
        refused(folder, ParameterError, "^dst: got ", function, folder / source, path, KEY)


def same_files(folder, name):
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(name)
    (folder / "chain").symlink_to(folder / "link")
    os.link(folder / name, folder / "hard")
    yield name, name
    for other in (f"./{name}", f"sub/../{name}", str(folder / name), "link", "chain", "hard"):
        yield name, other
        yield other, name


@pytest.mark.parametrize("function", [lock_file, unlock_file])
def test_the_source_as_target(folder, monkeypatch, function):
    monkeypatch.chdir(folder)
    for src, dst in same_files(folder, "plain" if function is lock_file else "locked"):
        refused(folder, SameFileError, "which is the source", function, src, dst, KEY)


@targets
def test_every_truncated_source(folder, target):
    for function, name in [(lock_file, "plain"), (unlock_file, "locked")]:
        raw = (folder / name).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        cut = folder / "cut"
        for length in {*range(0, start, 5), *range(start - 9, start + 9), start + 3000, len(raw) - 1}:
            cut.write_bytes(raw[:length])
            refused(folder, ContainerError, f"^{cut}: got ", function, cut, folder / target, KEY)
        cut.write_bytes(raw + b"\0")
        refused(folder, ContainerError, f"^{cut}: got ", function, cut, folder / target, KEY)


HOSTILE = {
    "a huge table": (2**63).to_bytes(8, "little") + b"{}",
    "a table of 100 MB": (100_000_000).to_bytes(8, "little") + b"{" + bytes(1000),
    "noise": painted(5000).tobytes(),
    "overlapping tensors": raw_file(
        '{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]},'
        '"b":{"dtype":"U8","shape":[9],"data_offsets":[1,10]}}',
        bytes(10),
    ),
    "a hole": raw_file('{"a":{"dtype":"U8","shape":[9],"data_offsets":[1,10]}}', bytes(10)),
    "a tensor past the end": raw_file('{"a":{"dtype":"U8","shape":[99],"data_offsets":[0,99]}}', bytes(98)),
    "a name twice": raw_file(
        '{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]},'
        '"a":{"dtype":"U8","shape":[1],"data_offsets":[9,10]}}',
        bytes(10),
    ),
}


@targets
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_sources(folder, target, case):
    bad = folder / "bad"
    bad.write_bytes(HOSTILE[case])
    for function in (lock_file, unlock_file):
        refused(folder, ContainerError, f"^{bad}: .*got ", function, bad, folder / target, KEY)


def with_header(change):
    def make(folder):
        header = json.loads(read_header(folder / "locked").to_json())
        change(header)
        return json.dumps(header)

    return make


BAD_HEADERS = {
    "empty": lambda folder: "",
    "no JSON": lambda folder: "locked",
    "no object": lambda folder: "[]",
    "another version": with_header(lambda header: header.update(format="deeplock/2")),
    "an unknown field": with_header(lambda header: header.update(x=1)),
    "a tensor that the file has not": with_header(lambda header: header["tensors"].update(d={"bytes": 0})),
    "another spelling of a name": with_header(
        lambda header: header["tensors"].update(A=header["tensors"].pop("a"))
    ),
    "a longer tensor": with_header(lambda header: header["tensors"]["a"].update(bytes=3001)),
    "a shorter tensor": with_header(lambda header: header["tensors"]["c"].update(bytes=0)),
    "a copy of a longer one": with_header(
        lambda header: header["tensors"].update(c={"bytes": 3000, "same_as": "a"})
    ),
}


@targets
@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_lock_header_that_is_wrong_or_does_not_fit(folder, target, case):
    bad = folder / "bad"
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(folder / "locked"), bad, metadata={"deeplock": BAD_HEADERS[case](folder)}
    )
    for key in (KEY, OTHER_KEY):
        refused(folder, HeaderError, None, unlock_file, bad, folder / target, key)
        refused(folder, HeaderError, None, unlock_file, bad, folder / target, key, check=False)
    refused(folder, HeaderError, None, read_header, bad)
    refused(folder, AlreadyLockedError, None, lock_file, bad, folder / target, KEY)


def test_a_lock_header_of_some_tensors_only(folder):
    header = read_header(folder / "locked")
    text = json.loads(header.to_json())
    del text["tensors"]["b"]
    tensors = safetensors.numpy.load_file(folder / "locked")
    safetensors.numpy.save_file(tensors, folder / "some", metadata={"deeplock": json.dumps(text)})
    refused(folder, TamperedHeaderError, "^header: ", unlock_file, folder / "some", folder / "new", KEY)
    unlock_file(folder / "some", folder / "new", KEY, check=False)
    found = data_of((folder / "new").read_bytes())
    assert np.array_equal(found["a"], painted(3000))
    assert np.array_equal(found["b"], tensors["b"])


def test_paths_that_lead_nowhere(folder):
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    for function, name in [(lock_file, "plain"), (unlock_file, "locked")]:
        for src, number in [("none", errno.ENOENT), ("sub", errno.EISDIR), ("pipe", errno.EINVAL)]:
            with pytest.raises(FileAccessError) as caught:
                function(folder / src, folder / "new", KEY)
            assert caught.value.errno == number
            words = f"^{folder / src}: cannot be read: "
            refused(folder, FileAccessError, words, function, folder / src, folder / "old", KEY)
        for dst, number in [
            ("none/new", errno.ENOENT), ("sub", errno.EISDIR), ("sub/", errno.EISDIR), ("pipe", errno.EINVAL),
            ("plain/new", errno.ENOTDIR), ("n" * 300, errno.ENAMETOOLONG), ("new/", errno.EISDIR),
        ]:  # fmt: skip
            with pytest.raises(FileAccessError) as caught:
                function(folder / name, f"{folder}/{dst}", KEY)
            assert caught.value.errno == number, dst
            words = f"^{folder}/{dst}: cannot be written: "
            refused(folder, FileAccessError, words, function, folder / name, f"{folder}/{dst}", KEY)
    with pytest.raises(FileAccessError) as caught:
        read_header(folder / "none")
    assert caught.value.errno == errno.ENOENT


# Going wrong on the way


class Interruption(BaseException):
    """Stands for anything that no `except Exception` sees."""


@targets
@pytest.mark.parametrize("error", [KeyboardInterrupt, Interruption, ValueError])
@pytest.mark.parametrize("window", range(4))
def test_interrupted_from_progress(folder, monkeypatch, target, error, window):
    monkeypatch.setattr(checkpoints, "WINDOW", 1500)  # of 5005 bytes
    for function, name in [(lock_file, "plain"), (unlock_file, "locked")]:
        seen = []

        def progress(step, seen=seen):
            seen.append(step)
            if len(seen) == window + 1:
                assert len(list(folder.glob(".deeplock-*.tmp"))) == 1
                raise error("the caller's own")

        refused(
            folder,
            error,
            "the caller's own",
            function,
            folder / name,
            folder / target,
            KEY,
            progress=progress,
        )
        assert len(seen) == window + 1


@targets
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("window", range(4))
def test_a_failure_while_the_bytes_are_computed(folder, monkeypatch, target, error, window):
    monkeypatch.setattr(checkpoints, "WINDOW", 1500)
    for function, name in [(lock_file, "plain"), (unlock_file, "locked")]:
        with monkeypatch.context() as patch:
            run, calls = Transform.run, []

            def failing(*arguments, run=run, calls=calls, **keywords):
                calls.append(1)
                if len(calls) == window + 1:
                    raise error
                return run(*arguments, **keywords)

            patch.setattr(Transform, "run", failing)
            refused(folder, error, None, function, folder / name, folder / target, KEY)
            assert len(calls) == window + 1


@targets
def test_a_source_that_becomes_shorter(folder, monkeypatch, target):
    monkeypatch.setattr(checkpoints, "WINDOW", 1500)
    for function, name in [(lock_file, "plain"), (unlock_file, "locked")]:
        source, raw = folder / name, (folder / name).read_bytes()

        def shorten(_, source=source, raw=raw):
            os.truncate(source, len(raw) - 1)

        before = snapshot(folder)
        with pytest.raises(ContainerError, match="it became shorter while it was read; nothing was written"):
            function(source, folder / target, KEY, progress=shorten)
        source.write_bytes(raw)
        assert snapshot(folder) == before


@targets
def test_a_source_that_becomes_shorter_just_before_it_is_mapped(folder, monkeypatch, target):
    original = mmap.mmap
    for function, name in [(lock_file, "plain"), (unlock_file, "locked")]:
        source, raw = folder / name, (folder / name).read_bytes()

        def shorten_and_map(*arguments, source=source, raw=raw, **keywords):
            os.truncate(source, len(raw) - 1)
            return original(*arguments, **keywords)

        before = snapshot(folder)
        with monkeypatch.context() as patch:
            patch.setattr(mmap, "mmap", shorten_and_map)
            words = "it became shorter while it was read; nothing was written"
            with pytest.raises(ContainerError, match=words):
                function(source, folder / target, KEY)
        source.write_bytes(raw)
        assert snapshot(folder) == before


FULL_DISK = """
import resource, sys
from deeplock_kernels import files
from deeplock_kernels.checkpoints.streaming import lock_file, unlock_file
function, source, target, key, limit, reserve = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
if reserve == "no":
    files.reserve = lambda descriptor, size: None
try:
    globals()[function](source, target, bytes.fromhex(key))
except OSError as error:
    print(type(error).__name__, error.errno, error)
"""


@targets
@pytest.mark.parametrize("reserve", ["yes", "no"])
def test_a_full_disk(tmp_path, target, reserve):
    """Refused by the system itself, when space is set aside or, where that cannot be done, at a write."""
    plain = tmp_path / "plain"
    plain.write_bytes(FILES["one large tensor"]())
    lock_file(plain, tmp_path / "locked", KEY)
    (tmp_path / "old").write_bytes(OLD)
    before = snapshot(tmp_path)
    for function, name in [("lock_file", "plain"), ("unlock_file", "locked")]:
        arguments = (function, tmp_path / name, tmp_path / target, KEY.hex(), 600_000, reserve)
        output = processes.run(FULL_DISK, *arguments)
        words = f"FileAccessError {errno.EFBIG} {tmp_path / target}: cannot be written: it is larger than"
        assert output.startswith(words)
        assert snapshot(tmp_path) == before


MEMORY = """
import os, resource, sys
from pathlib import Path
from deeplock_kernels.checkpoints.streaming import lock_file, unlock_file

folder, mib = Path(sys.argv[1]), 1 << 20
plain, locked, restored = (folder / name for name in ("plain", "locked", "restored"))

def make(sizes):
    tensors, start = [], 0
    for i, size in enumerate(sizes):
        tensors.append(f'"{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{start + size}]}}')
        start += size
    table = "{" + ",".join(tensors) + "}"
    plain.write_bytes(len(table).to_bytes(8, "little") + table.encode())
    os.truncate(plain, 8 + len(table) + start)  # zeros that take no space

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def go():
    lock_file(plain, locked, bytes(32))
    unlock_file(locked, restored, bytes(32))

make([100])
go()
before = peak()
make([1, 200 * mib + 1, 100 * mib, 20 * mib - 2])
go()
print(peak() - before)
with open(locked, "rb") as file:
    file.seek(-320 * mib, os.SEEK_END)
    while block := file.read(mib):
        assert block.count(0) < 10_000
assert restored.stat().st_size == plain.stat().st_size
with open(restored, "rb") as file:
    table = file.read(restored.stat().st_size - 320 * mib)
    with open(plain, "rb") as original:
        assert original.read(len(table)) == table
    while block := file.read(mib):
        assert block.count(0) == len(block)
"""


def test_a_large_file_takes_little_memory(tmp_path):
    try:
        growth = int(processes.run(MEMORY, tmp_path, DEEPLOCK_NUM_THREADS=2))
    finally:
        for path in tmp_path.iterdir():
            path.unlink()
    assert growth < 100 << 20


def test_two_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "WINDOW", 50_000)
    raw = FILES["one large tensor"]()
    (tmp_path / "plain").write_bytes(raw)
    failures = []

    def go(number):
        try:
            for _ in range(3):
                lock_file(tmp_path / "plain", tmp_path / f"locked{number}", KEY)
                unlock_file(tmp_path / f"locked{number}", tmp_path / f"restored{number}", KEY)
                assert (tmp_path / f"restored{number}").read_bytes() == raw
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(os.listdir(tmp_path)) == 9
