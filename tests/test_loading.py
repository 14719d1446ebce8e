"""Tensors and slices straight from locked files, held against what safetensors loads from the plain ones."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import threading
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import run
from support import BOXES, KEYS, SAFETENSORS_DTYPES, SCHEDULES, framework, painted, refuse

from deeplock_kernels import errors, load_file, lock_file, open_locked
from deeplock_kernels.checkpoints import arrays, loading, slicing
from deeplock_kernels.checkpoints.streaming import read_layout
from deeplock_kernels.named_lock import NamedLock

KEY = KEYS[256]
OTHER_KEY = KEYS[256][::-1]
SHAPES = [(), (0,), (1,), (7,), (0, 3), (5, 0, 2), (3, 4, 5), (40, 13), (2, 1, 3, 2, 2)]
PAGE = 4096


def array(dtype, shape, seed=0):
    """Give an array of random bytes, but where only some are values."""
    count = math.prod(shape)
    data = np.random.default_rng([seed, *shape]).integers(0, 256, count * np.dtype(dtype).itemsize, np.uint8)
    return (data & 1 if np.dtype(dtype) == bool else data).view(dtype).reshape(shape)


def same(found, wanted):
    """Say whether two arrays are equal in dtype, shape and every bit."""
    return (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


def model():
    tensors = {f"{np.dtype(kind)}": array(kind, (6, 5), i) for i, kind in enumerate(SAFETENSORS_DTYPES)}
    tensors |= {f"shape {shape}": array(np.float32, shape) for shape in SHAPES}
    return tensors | {"long": array(np.float32, (300, 1001))}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    safetensors.numpy.save_file(model(), folder / "plain", {"format": "pt", "é": "\n"})
    lock_file(folder / "plain", folder / "locked", KEY)
    return folder


@pytest.fixture(scope="module")
def plain(files):
    """What safetensors loads, but for dtypes of eight bits, which it writes and does not read."""
    with safetensors.safe_open(files / "plain", "np") as file:
        return {name: data if "float8" in name else file.get_tensor(name) for name, data in model().items()}


@pytest.fixture
def altered(files, tmp_path):
    """A file with one bit changed in the middle of the longest tensor."""
    data = bytearray((files / "locked").read_bytes())
    with open_locked(files / "locked") as file:
        data[file._entry("long").start + 600_000] ^= 4
    (tmp_path / "altered").write_bytes(data)
    return tmp_path / "altered"


def small_windows(monkeypatch, nbytes=1000):
    monkeypatch.setattr(loading, "_WINDOW", nbytes)
    monkeypatch.setattr(loading, "_SCRATCH", nbytes)


# Whole files


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("window", [1000, 64 << 20])
def test_a_file_is_loaded_as_safetensors_loads_the_plain_one(files, plain, tmp_path, monkeypatch, schedule, window):
    lock_file(files / "plain", tmp_path / "locked", KEY, schedule=schedule)
    small_windows(monkeypatch, window)
    found = load_file(tmp_path / "locked", KEY)
    assert list(found) == list(read_layout(tmp_path / "locked").tensors)
    assert found.keys() == plain.keys()
    assert all(same(found[name], plain[name]) for name in plain)
    assert all(data.flags.writeable and data.flags.c_contiguous for data in found.values())


@pytest.mark.parametrize("seal", [True, False])
def test_tensors_that_are_not_locked_are_copied(files, plain, tmp_path, seal):
    lock_file(files / "plain", tmp_path / "some", KEY, only="shape*", seal=seal)
    found = load_file(tmp_path / "some", KEY)
    assert all(same(found[name], plain[name]) for name in plain)
    with open_locked(tmp_path / "some") as file:
        assert same(file.get_tensor("long"), plain["long"])
        assert same(file.get_slice("long")[3:5], plain["long"][3:5])
        refuse(errors.NotSealedError, ValueError, "name: 'long'", file.verify, "long")
        refuse(errors.KeyTypeError, TypeError, "key: got None", file.get_tensor, "shape (7,)")


def test_some_tensors_in_the_order_asked_for(files, plain):
    names = ["long", "shape (0,)", "float32", "shape ()"]
    found = load_file(files / "locked", KEY, tensors=iter(names))
    assert list(found) == names
    assert all(same(found[name], plain[name]) for name in names)
    assert load_file(files / "locked", KEY, tensors=[]) == {}


def test_only_what_is_asked_for_is_unlocked(files, monkeypatch):
    seen = []
    original = NamedLock.unlock_and_seal
    monkeypatch.setattr(
        NamedLock, "unlock_and_seal", lambda self, ranges, threads: seen.extend(ranges) or original(self, ranges, threads)
    )
    load_file(files / "locked", KEY, tensors=["float64", "int8"])
    assert {one.name: one.nbytes for one in seen} == {"float64": 240, "int8": 30}


def test_an_s_box_of_ones_own(files, plain, tmp_path):
    lock_file(files / "plain", tmp_path / "own", KEY, sbox=BOXES["random"])
    refuse(errors.SBoxError, ValueError, "sbox: ", load_file, tmp_path / "own", KEY)
    assert same(load_file(tmp_path / "own", KEY, sbox=BOXES["random"], threads=1)["long"], plain["long"])


def test_a_wrong_key(files, plain):
    refuse(errors.WrongKeyError, ValueError, "key: ", load_file, files / "locked", OTHER_KEY)
    refuse(errors.WrongKeyError, ValueError, "key: ", open_locked, files / "locked", OTHER_KEY)
    found = load_file(files / "locked", OTHER_KEY, check=False)
    assert found["long"].shape == plain["long"].shape
    assert np.mean(found["long"].view(np.uint8) == plain["long"].view(np.uint8)) < 0.01


def test_what_cannot_be_loaded(files, tmp_path):
    refuse(errors.NotLockedError, ValueError, f"{files / 'plain'}", load_file, files / "plain", KEY)
    refuse(errors.FileAccessError, OSError, f"{tmp_path / 'none'}", load_file, tmp_path / "none", KEY)
    (tmp_path / "bad").write_bytes(b"no safetensors file")
    refuse(errors.ContainerError, ValueError, f"{tmp_path / 'bad'}", load_file, tmp_path / "bad", KEY)
    locked = files / "locked"
    refuse(errors.KeyTypeError, TypeError, "key: got None", load_file, locked, None)
    refuse(errors.KeyFormatError, ValueError, "key: got 3 bytes", load_file, locked, b"abc")
    refuse(errors.TensorNameError, KeyError, "name: got 'none'", load_file, locked, KEY, tensors=["long", "none"])
    refuse(errors.TensorNameError, KeyError, "name: got 1", load_file, locked, KEY, tensors=[1])
    refuse(errors.ParameterError, ValueError, "tensors: got 'long'", load_file, locked, KEY, tensors="long")
    refuse(errors.UnknownNameError, ValueError, "framework: got 'tf'", load_file, locked, KEY, framework="tf")
    refuse(errors.ParameterError, ValueError, "device: got 'cuda'", load_file, locked, KEY, device="cuda")
    refuse(errors.ParameterError, ValueError, "threads: got 0", load_file, locked, KEY, threads=0)


def test_a_file_of_another_format_is_refused(files, monkeypatch):
    class Other:
        name = "other"
        read = loading.SAFETENSORS.read

    monkeypatch.setattr("deeplock_kernels.checkpoints.streaming.recognise", lambda _start: Other())
    refuse(errors.ContainerError, ValueError, f"{files / 'locked'}: got a file of other", load_file, files / "locked", KEY)


# Altered files


def recorded(monkeypatch):
    """Keep all memory that numpy gives to the module."""
    made = []

    class Recorder:
        def __getattr__(self, name):
            return getattr(np, name)

        def empty(self, *arguments):
            made.append(np.empty(*arguments))
            return made[-1]

    monkeypatch.setattr(loading, "np", Recorder())
    return made


def test_a_changed_bit_is_noticed_and_everything_wiped(altered, monkeypatch):
    made = recorded(monkeypatch)
    error = refuse(errors.TamperedError, ValueError, "tensors['long']", load_file, altered, KEY)
    assert "float32" not in str(error)
    assert len(made) == len(model())
    assert not any(data.any() for data in made)
    with open_locked(altered, KEY) as file:
        refuse(errors.TamperedError, ValueError, "tensors['long']", file.get_tensor, "long")
        refuse(errors.TamperedError, ValueError, "tensors['long']", file.verify, "long")
        assert same(file.get_tensor("float32"), model()["float32"])


@pytest.mark.parametrize("options", [{"seal": False}, {"check": False}])
def test_a_changed_bit_that_nobody_asks_about(altered, plain, options):
    found = load_file(altered, KEY, **options)["long"]
    wrong = np.flatnonzero(found.view(np.uint8).ravel() != plain["long"].view(np.uint8).ravel())
    assert wrong.tolist() == [600_000]


def test_a_slice_is_verified_on_demand_only(altered, plain):
    with open_locked(altered, KEY) as file:
        row = 600_000 // 4004
        found = file.get_slice("long")[row]
        assert np.sum(found.view(np.uint8) != plain["long"][row].view(np.uint8)) == 1
        for index in (0, row):
            refuse(errors.TamperedError, ValueError, "tensors['long']", file.get_slice("long", verify=True).__getitem__, index)
        assert same(file.get_slice("float32", verify=True)[2], plain["float32"][2])


def test_a_tensor_is_verified_once(files, tmp_path, monkeypatch):
    path = tmp_path / "locked"
    path.write_bytes((files / "locked").read_bytes())
    calls = []
    original = NamedLock.seals
    monkeypatch.setattr(
        NamedLock, "seals", lambda self, ranges, threads: calls.append(len(ranges)) or original(self, ranges, threads)
    )
    with open_locked(path, KEY) as file:
        part = file.get_slice("long", verify=True)
        part[1], part[2], file.verify("long")
        assert calls == [1]
        file.get_tensor("float32")
        file.verify("float32")
        assert calls == [1]
        os.utime(path, (1, 1))
        refuse(errors.ContainerError, ValueError, f"{path}: it was changed", part.__getitem__, 1)


def test_an_altered_table_needs_the_key_to_be_noticed(files, tmp_path):
    data = (files / "locked").read_bytes().replace(b'"shape":[40,13]', b'"shape":[13,40]')
    (tmp_path / "table").write_bytes(data)
    assert data != (files / "locked").read_bytes()
    refuse(errors.TamperedHeaderError, ValueError, "header: ", load_file, tmp_path / "table", KEY)
    with open_locked(tmp_path / "table") as file:
        assert file.get_slice("shape (40, 13)").get_shape() == [13, 40]


# Opened files


def test_names_shapes_dtypes_and_metadata_need_no_key(files, plain):
    with safetensors.safe_open(files / "plain", "np") as theirs, open_locked(files / "locked") as file:
        assert sorted(file.keys()) == sorted(theirs.keys())
        assert file.metadata() == theirs.metadata() == {"format": "pt", "é": "\n"}
        for name in plain:
            mine, other = file.get_slice(name), theirs.get_slice(name)
            assert (mine.get_shape(), mine.get_dtype()) == (other.get_shape(), other.get_dtype())
        for read in (file.get_tensor, lambda name: file.get_slice(name)[:], file.verify):
            error = refuse(errors.KeyTypeError, TypeError, "key: got None", read, "long")
            assert "open_locked" in str(error)


def test_a_file_without_other_metadata(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "plain")
    lock_file(tmp_path / "plain", tmp_path / "locked", KEY)
    with open_locked(tmp_path / "locked") as file:
        assert file.metadata() is None


def test_names_that_are_not_there(files):
    with open_locked(files / "locked", KEY) as file:
        for read in (file.get_tensor, file.get_slice, file.verify):
            refuse(errors.TensorNameError, KeyError, "name: got 'none'", read, "none")
            refuse(errors.TensorNameError, KeyError, "name: got 3", read, 3)


def test_after_its_end(files, plain):
    file = open_locked(files / "locked", KEY)
    part, lock = file.get_slice("long"), file._lock
    assert same(part[0], plain["long"][0])
    file.get_tensor("float32")
    memory = [table._memory for table in lock._tables.values()] + [block for s in lock._streams.values() for block in s._secrets()]
    assert len(memory) == 3
    assert all(any(bytes(block)) for block in memory)
    file.close()
    file.close()
    assert not any(any(bytes(block)) for block in memory)
    for read in (part.__getitem__, lambda _: file.get_tensor("long"), lambda _: file.verify("float32")):
        refuse(errors.ClosedFileError, ValueError, f"{files / 'locked'}: it is closed", read, 0)
    assert (file.keys(), part.get_shape()) == (list(read_layout(files / "locked").tensors), [300, 1001])


def test_the_keys_of_a_file_that_cannot_be_opened_are_wiped(files, monkeypatch):
    ended = []
    monkeypatch.setattr(NamedLock, "__exit__", lambda *_: ended.append(1))
    monkeypatch.setattr(loading.OpenedFile, "state", lambda _file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_locked(files / "locked", KEY)
    assert ended == [1]


def test_nothing_of_it_tells_secrets_and_it_cannot_be_copied(files):
    with open_locked(files / "locked", KEY) as file:
        assert repr(file) == f"LockedFile({str(files / 'locked')!r}, {len(model())} tensors, with its key)"
        assert repr(file.get_slice("long")) == "TensorSlice('long', F32, [300, 1001])"
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            refuse(errors.KeyTypeError, TypeError, "LockedFile: ", copied, file)
    assert repr(file).endswith("closed)")
    assert repr(object.__new__(loading.LockedFile)) == "LockedFile(unfinished)"


def test_a_change_beneath_it(files, tmp_path):
    path = tmp_path / "locked"
    for change in (lambda data: data[:-1], lambda data: data + b"x", lambda data: data):
        path.write_bytes((files / "locked").read_bytes())
        os.utime(path, (1, 1))
        with open_locked(path, KEY) as file:
            file.get_tensor("long")
            path.write_bytes(change(path.read_bytes()))
            for read in (file.get_tensor, lambda name: file.get_slice(name)[0], file.verify):
                refuse(errors.ContainerError, ValueError, f"{path}: it was changed", read, "float32")


@pytest.mark.parametrize("read", ["get_tensor", "get_slice"])
def test_a_change_during_a_read_wipes_what_was_read(files, monkeypatch, read):
    with open_locked(files / "locked", KEY) as file:
        states = iter([file._state, (0, 0)])
        monkeypatch.setattr(loading.OpenedFile, "state", lambda _file: next(states))
        made = recorded(monkeypatch)
        work = file.get_tensor if read == "get_tensor" else lambda name: file.get_slice(name)[3:]
        refuse(errors.ContainerError, ValueError, f"{files / 'locked'}: it was changed", work, "long")
        assert len(made) == 1
        assert not made[0].any()


def test_a_file_that_ends_during_a_read_of_a_part(files, monkeypatch):
    with open_locked(files / "locked", KEY) as file:
        monkeypatch.setattr(loading.os, "preadv", lambda *_: 0)
        refuse(errors.ContainerError, ValueError, f"{files / 'locked'}: it became shorter", file.get_slice("long").__getitem__, 0)


def test_parts_that_come_in_short_reads(files, plain, monkeypatch):
    original = os.preadv
    monkeypatch.setattr(loading.os, "preadv", lambda fd, into, at: original(fd, [into[0][:100]], at))
    with open_locked(files / "locked", KEY) as file:
        assert same(file.get_slice("long")[7:9], plain["long"][7:9])


def test_many_threads_share_it(files, plain):
    wrong, gate = [], threading.Barrier(4)

    def work(seed):
        rng = np.random.default_rng(seed)
        gate.wait()
        for row in rng.integers(0, 300, 50):
            if not same(file.get_slice("long")[row], plain["long"][row]) or not same(file.get_tensor("int8"), plain["int8"]):
                wrong.append(row)

    with open_locked(files / "locked", KEY) as file:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert not gate.broken


def test_a_fork_while_a_thread_reads(files):
    """The child uses and closes the file although a thread that it has not got is in the middle of a read."""
    program = """
import os, sys, threading, warnings
import deeplock_kernels
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
file = deeplock_kernels.open_locked(sys.argv[1], bytes.fromhex(sys.argv[2]))
row = file.get_slice("long")[5].tobytes()
inside, go = threading.Event(), threading.Event()
thread = threading.Thread(target=lambda: file._while_open(lambda: (inside.set(), go.wait())))
thread.start()
inside.wait()
child = os.fork()
if not child:
    good = file.get_slice("long")[5].tobytes() == row
    file.close()
    os._exit(0 if good else 1)
status = os.waitpid(child, 0)[1]
go.set()
thread.join()
assert file.get_slice("long")[5].tobytes() == row
file.close()
print(status)
"""
    assert run(program, files / "locked", KEY.hex(), timeout=60) == "0\n"


# Slices


def indices(shape):
    """Give basic indices for a shape: what NumPy takes, and a little beyond it for slices."""

    def along(length):
        bound = st.none() | st.integers(-length - 2, length + 2)
        steps = st.none() | st.integers(-4, 4).filter(bool)
        parts = st.builds(slice, bound, bound, steps)
        return parts | st.integers(-length, length - 1) if length else parts

    @st.composite
    def made(draw):
        items = [draw(along(length)) for length in shape]
        kept = draw(st.integers(0, len(items)))
        if draw(st.booleans()) and len(items) > kept:  # what is between is taken whole
            items[kept : draw(st.integers(kept, len(items)))] = [Ellipsis]
        else:
            items = items[:kept]
        for place in draw(st.lists(st.integers(0, len(items)), max_size=2)):
            items.insert(place, None)
        return items[0] if len(items) == 1 and draw(st.booleans()) else tuple(items)

    return made()


@pytest.fixture(scope="module")
def opened(files):
    with open_locked(files / "locked", KEY) as file:
        yield file


@given(st.data())
@settings(max_examples=200)
def test_a_slice_is_that_of_numpy(opened, plain, data):
    name = data.draw(st.sampled_from([*(f"shape {shape}" for shape in SHAPES), "bfloat16", "bool", "complex64", "long"]))
    index = data.draw(indices(plain[name].shape))
    with pytest.MonkeyPatch.context() as patch:
        small_windows(patch, data.draw(st.sampled_from([100_000, 4 << 20] if name == "long" else [7, 64, 1000])))
        patch.setattr(slicing, "_GAP", data.draw(st.sampled_from([2000, 4096] if name == "long" else [0, 5, 100])))
        found, wanted = opened.get_slice(name)[index], plain[name][index]
    assert same(found, np.asarray(wanted)), index
    assert found.flags.c_contiguous
    assert found.flags.writeable


@given(st.sampled_from([np.s_[3:9, 100:700], np.s_[::50], np.s_[5], np.s_[:, 4], np.s_[10:200:3, -1], np.s_[:]]))
@example(np.s_[0:0])
@settings(max_examples=6)
def test_a_slice_of_a_file_locked_by_the_expansion(files, plain, tmp_path_factory, index):
    path = tmp_path_factory.mktemp("expansion") / "locked"
    lock_file(files / "plain", path, KEY, schedule="expansion", only=["long", "int*"])
    with open_locked(path, KEY) as file:
        assert same(file.get_slice("long")[index], plain["long"][index])


@pytest.mark.parametrize(
    ("index", "most"),
    [
        (np.s_[5], 4004),
        (np.s_[5:9], 4 * 4004),
        (np.s_[7, 3], 4),
        (np.s_[2, 1:3], 8),
        (np.s_[-1, ::2], 4004),
        (np.s_[::-3], 100 * 4004),  # two rows lie between: more than a page
        (np.s_[::2, 10:20], 150 * 40),
        (np.s_[:, 0], 300 * 4004),  # nearly a page apart: all of it is read
        (np.s_[3:3], 0),
        (np.s_[..., 5:5], 0),
    ],
)
def test_only_the_bytes_of_a_slice_are_read(files, plain, monkeypatch, index, most):
    """And those between its parts where they lie less than a page apart."""
    original, counts = os.preadv, []

    def preadv(descriptor, into, start):
        counts.append(original(descriptor, into, start))
        return counts[-1]

    monkeypatch.setattr(loading.os, "preadv", preadv)
    monkeypatch.setattr(loading, "mapped", None)
    with open_locked(files / "locked", KEY) as file:
        assert same(file.get_slice("long")[index], np.asarray(plain["long"][index]))
    assert sum(counts) <= most


def test_a_column_takes_little_memory(files, plain, monkeypatch):
    monkeypatch.setattr(loading, "_SCRATCH", 50_000)
    with open_locked(files / "locked", KEY, threads=1) as file:
        part = file.get_slice("long")
        part[0]
        tracemalloc.start()
        try:
            found = part[:, 17]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert same(found, plain["long"][:, 17].copy())
    assert peak < 100_000  # of 1,201,200


@pytest.mark.parametrize(
    "index",
    [
        300, -301, (0, 1001), (0, 0, 0), (..., ...), (0, ..., 0, 0), True, np.True_, 1.0, "a", [0, 1], np.arange(3),
        slice(None, None, 0), slice("a", None), slice(1.5), b"x", (slice(None), [1]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_index(opened, index):
    refuse(errors.TensorIndexError, IndexError, "index: got ", opened.get_slice("long").__getitem__, index)


def test_whole_numbers_of_other_types_are_indices(opened, plain):
    assert same(opened.get_slice("long")[np.int64(7), np.uint8(3) :], plain["long"][7, 3:])


def test_a_tensor_without_axes(opened, plain):
    for index in ((), ..., None, (None, ...)):
        assert same(opened.get_slice("shape ()")[index], np.asarray(plain["shape ()"][index]))
    refuse(errors.TensorIndexError, IndexError, "index: got one for 1 axes", opened.get_slice("shape ()").__getitem__, 0)


# Dtypes and frameworks


def raw_file(path, dtype, shape, data):
    """Write a safetensors file of one tensor, of a dtype that safetensors for NumPy may not know."""
    table = f'{{"t":{{"dtype":"{dtype}","shape":{list(shape)},"data_offsets":[0,{len(data)}]}}}}'.encode()
    path.write_bytes(len(table).to_bytes(8, "little") + table + data)


FLOATS_OF_EIGHT_BITS = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


@pytest.mark.parametrize("name", FLOATS_OF_EIGHT_BITS)
def test_floats_of_eight_bits(tmp_path, name):
    raw_file(tmp_path / "plain", name, (20, 12), painted(240).tobytes())
    lock_file(tmp_path / "plain", tmp_path / "locked", KEY)
    wanted = painted(240).view(getattr(ml_dtypes, FLOATS_OF_EIGHT_BITS[name])).reshape(20, 12)
    assert same(load_file(tmp_path / "locked", KEY)["t"], wanted)
    with open_locked(tmp_path / "locked", KEY) as file:
        assert same(file.get_slice("t")[::3, 5], wanted[::3, 5].copy())


@pytest.mark.parametrize(("name", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_elements_of_less_than_a_byte_come_as_bytes(tmp_path, name, bits):
    data = painted(8 * bits)
    raw_file(tmp_path / "plain", name, (8, 8), data.tobytes())
    lock_file(tmp_path / "plain", tmp_path / "locked", KEY)
    assert same(load_file(tmp_path / "locked", KEY)["t"], data)
    with open_locked(tmp_path / "locked", KEY) as file:
        assert (file.get_slice("t").get_shape(), file.get_slice("t").get_dtype()) == ([8, 8], name)
        refuse(errors.TensorIndexError, IndexError, f"index: 't' is of {name}", file.get_slice("t").__getitem__, 0)


def test_a_library_that_is_not_installed(files, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(arrays.importlib, "import_module", missing)
    for name, extra in (("pt", "torch"), ("jax", "jax")):
        error = refuse(errors.MissingLibraryError, ImportError, "framework", load_file, files / "locked", KEY, framework=name)
        assert f"deeplock-kernels[{extra}]" in str(error)
    with open_locked(files / "locked", KEY) as file:
        assert file.get_slice("bfloat16").get_dtype() == "BF16"
        for read in (file.get_tensor, lambda name: file.get_slice(name)[0]):
            error = refuse(errors.MissingLibraryError, ImportError, "dtype bfloat16", read, "bfloat16")
            assert "deeplock-kernels[ml-dtypes]" in str(error)
        assert file.get_tensor("float32").dtype == np.float32


def test_pytorch_tensors(files):
    torch = framework("torch")
    from safetensors.torch import load_file as load_plain

    found, wanted = load_file(files / "locked", KEY, framework="pt", device="cpu"), load_plain(files / "plain")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
    found["long"].add_(1)
    with open_locked(files / "locked", KEY, framework="pt") as file:
        for name, index in (("long", np.s_[5:290:7, 3:]), ("bfloat16", 2)):
            assert file.get_slice(name)[index].view(torch.int16).equal(wanted[name][index].view(torch.int16))
        assert file.get_slice("int16")[::-2].equal(wanted["int16"].flip(0)[::2])
    for device in ("nowhere", "cuda:99", 1.5):
        refuse(errors.ParameterError, ValueError, "device: got", load_file, files / "locked", KEY, framework="pt", device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch, "uint16")
        error = refuse(errors.BufferTypeError, TypeError, "dtype uint16", load_file, files / "locked", KEY, framework="pt")
        assert "PyTorch" in str(error)


def test_jax_arrays(files, plain):
    jax = framework("jax")
    exact = [name for name, data in plain.items() if data.dtype.itemsize < 8 or data.dtype == np.complex64]
    found = load_file(files / "locked", KEY, tensors=exact, framework="jax", device="cpu")
    for name, data in found.items():
        assert isinstance(data, jax.Array)
        assert same(np.asarray(data), plain[name])
    for name in plain.keys() - exact:
        with open_locked(files / "locked", KEY, framework="jax") as file:
            refuse(errors.BufferTypeError, TypeError, f"dtype {name}: JAX would round", file.get_tensor, name)
    with jax.enable_x64(True):
        found = load_file(files / "locked", KEY, framework="jax")
        assert all(same(np.asarray(data), plain[name]) for name, data in found.items())
    refuse(errors.ParameterError, ValueError, "device: got", load_file, files / "locked", KEY, framework="jax", device="none")


# Memory


def test_a_load_holds_its_tensors_once(tmp_path):
    """Peak memory of a process that loads 192 MiB: the tensors, some windows of the file, and the interpreter."""
    nbytes = 192 << 20
    safetensors.numpy.save_file({"a": np.zeros(nbytes // 4, np.float32)}, tmp_path / "plain")
    lock_file(tmp_path / "plain", tmp_path / "locked", KEY)
    program = """
import sys
import deeplock_kernels
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) << 10
deeplock_kernels.load_file(sys.argv[2], bytes.fromhex(sys.argv[3]))  # a small file
before = peak()
found = deeplock_kernels.load_file(sys.argv[1], bytes.fromhex(sys.argv[3]))
assert not found["a"].any()
print(peak() - before)
"""
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "small plain")
    lock_file(tmp_path / "small plain", tmp_path / "small", KEY)
    grown = int(run(program, tmp_path / "locked", tmp_path / "small", KEY.hex()))
    assert nbytes <= grown < nbytes + (80 << 20)


def test_memory_is_given_back(files):
    with open_locked(files / "locked", KEY) as file:
        file.get_tensor("long")
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(20):
                file.get_tensor("long")
                file.get_slice("long")[::2]
            kept = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    assert kept < 200_000
