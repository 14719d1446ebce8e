"""Whatever is one block of memory is taken, and read or written byte by byte; whatever is not is refused unchanged."""

from __future__ import annotations

import array
import ctypes
import mmap

import ml_dtypes
import numpy as np
import pytest
import support

from deeplock_kernels import buffers, errors, reference
from deeplock_kernels.locking import lock, substitute, unlock
from deeplock_kernels.sboxes import AES
from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule

KEY, IV = bytes(range(16)), bytes(range(100, 116))
STREAM = reference.counter_keystream(KEY, IV, 4096)


def schedule():
    return CounterSchedule(KEY, IV)


def locked(data):
    return reference.lock(data, STREAM[: len(data)])


def painted(nbytes, start=0):
    return bytes((start + i) % 251 for i in range(nbytes))


def content(memory) -> bytes:
    """Give the bytes of anything, without the package."""
    if isinstance(memory, np.ndarray):
        return np.ndarray.tobytes(memory, order="A")
    return bytes(memoryview(memory).cast("B")) if memoryview(memory).nbytes else b""


# NumPy

DTYPES = [
    *(np.dtype(code) for code in np.typecodes["All"] if code not in "OSUVMm"),
    *map(np.dtype, ["S5", "U3", "V7", "M8[s]", "m8[us]", ">i4", ">f8", ">u2", "<c8", "?"]),
    np.dtype([("Out", "<i4"), ("b", "f8", (2,))]),
    np.dtype([("a", "i1"), ("b", "i8")], align=True),
    *(
        np.dtype(getattr(ml_dtypes, name))
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "int4", "uint2", "float4_e2m1fn")
    ),
]


def array_of(dtype, shape=(7,)):
    """Give an array of painted bytes, not only of values that its dtype gives by itself."""
    count = int(np.prod(shape, dtype=int))
    data = np.frombuffer(bytearray(painted(count * dtype.itemsize)), np.uint8)
    return np.ndarray(shape, dtype, data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 1, 4), (), (0,), (3, 0, 2)], ids=str)
def test_arrays_of_every_dtype_and_shape(dtype, shape):
    data = array_of(dtype, shape)
    plain = content(data)
    assert len(plain) == data.nbytes
    result = lock(data, schedule())
    assert type(result) is np.ndarray
    assert (result.dtype, result.shape) == (dtype, shape)
    assert content(result) == locked(plain)
    assert content(data) == plain
    assert not np.shares_memory(result, data)
    back = unlock(result, schedule())
    assert (back.dtype, back.shape) == (dtype, shape)
    assert content(back) == plain
    assert lock(data, schedule(), out=data) is data
    assert content(data) == locked(plain)
    assert unlock(data, schedule(), out=data) is data
    assert content(data) == plain
    replaced = substitute(data, "aes")
    assert (replaced.dtype, replaced.shape) == (dtype, shape)
    assert content(replaced) == plain.translate(AES.table)


class Subclass(np.ndarray):
    """Stands for arrays of other libraries."""


ARRAYS = {
    "a slice": lambda: array_of(np.dtype("f4"), (50,))[3:20],
    "rows": lambda: array_of(np.dtype("f4"), (5, 6))[1:4],
    "one column that is whole": lambda: array_of(np.dtype("f4"), (5, 1))[:, 0],
    "both orders at once": lambda: np.asfortranarray(array_of(np.dtype("u1"), (1, 9))),
    "a view": lambda: array_of(np.dtype("f8"), (4,)).view("u2"),
    "unaligned": lambda: np.frombuffer(bytearray(painted(81)), np.uint8)[1:].view("f8"),
    "a transpose of a transpose": lambda: array_of(np.dtype("i2"), (3, 4)).T.T,
    "odd strides where there is but one": lambda: array_of(np.dtype("i2"), (9, 4))[::20],
    "a subclass": lambda: array_of(np.dtype("f4"), (6,)).view(Subclass),
    "a record array": lambda: array_of(np.dtype([("a", "i4"), ("b", "f4")]), (6,)).view(np.recarray),
    "a masked array": lambda: np.ma.masked_array(array_of(np.dtype("f4"), (4,)), [0, 1, 0, 1]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_are_views(kind):
    data = ARRAYS[kind]()
    plain = content(np.asarray(data))
    result = lock(data, schedule())
    assert type(result) is np.ndarray
    assert (result.dtype, result.shape) == (data.dtype, data.shape)
    assert content(result) == locked(plain)
    assert content(np.asarray(data)) == plain
    assert lock(data, schedule(), out=data) is data
    assert content(np.asarray(data)) == locked(plain)


def test_only_the_view_s_own_bytes_are_written():
    whole = np.frombuffer(bytearray(painted(300)), np.uint8)
    lock(whole[100:200], schedule(), out=whole[100:200])
    assert whole.tobytes() == painted(100) + locked(painted(100, 100)) + painted(100, 200)


@pytest.mark.parametrize("mode", ["r+", "c", "r"])
def test_a_memory_map_of_numpy(tmp_path, mode):
    path = tmp_path / "file"
    path.write_bytes(painted(1000))
    data = np.memmap(path, np.float32, mode=mode, offset=40)
    result = lock(data, schedule())
    assert type(result) is np.ndarray
    assert content(result) == locked(painted(960, 40))
    if mode == "r":
        with pytest.raises(errors.ReadOnlyError, match=r"^out: got a read-only array"):
            lock(data, schedule(), out=data)
    else:
        assert lock(data, schedule(), out=data) is data
        data.flush()
        assert content(np.asarray(data)) == locked(painted(960, 40))
    on_disk = locked(painted(960, 40)) if mode == "r+" else painted(960, 40)
    assert path.read_bytes() == painted(40) + on_disk


# Python's buffers


class Pair(ctypes.Structure):
    _fields_ = [("Offset", ctypes.c_int32), ("b", ctypes.c_double)]


def filled(memory):
    """Paint the bytes of a ctypes object."""
    ctypes.memmove(ctypes.addressof(memory), painted(ctypes.sizeof(memory)), ctypes.sizeof(memory))
    return memory


def mapped():
    memory = mmap.mmap(-1, 3000)
    memory[:] = painted(3000)
    return memory


BUFFERS = {
    "bytearray": lambda: bytearray(painted(99)),
    "an empty bytearray": bytearray,
    "memoryview": lambda: memoryview(bytearray(painted(99))),
    "a slice of a memoryview": lambda: memoryview(bytearray(painted(99)))[7:80],
    "an empty slice": lambda: memoryview(bytearray(painted(99)))[7:7],
    "a memoryview of an array": lambda: memoryview(array_of(np.dtype("f4"), (3, 5))),
    "a memoryview of a 0-d array": lambda: memoryview(array_of(np.dtype("f4"), ())),
    "a memoryview of half floats": lambda: memoryview(array_of(np.dtype("f2"))),
    "a memoryview of complex numbers": lambda: memoryview(array_of(np.dtype("c16"))),
    "a memoryview of big-endian numbers": lambda: memoryview(array_of(np.dtype(">i4"))),
    "a memoryview of records": lambda: memoryview(array_of(np.dtype([("Out", "i4"), ("O", "f8")]))),
    "a memoryview of texts": lambda: memoryview(array_of(np.dtype("S5"))),
    "a memoryview in three dimensions": lambda: memoryview(bytearray(painted(24))).cast("B", (2, 3, 4)),
    **{
        f"a memoryview cast to {code}": lambda code=code: memoryview(bytearray(painted(64))).cast(code)
        for code in "bBcfdhHiIlLqQnNP?"
    },
    **{f"array.array of {code}": lambda code=code: array.array(code, range(1, 20)) for code in "bBhHiIlLqQfd"},
    "mmap": mapped,
    "a slice of an mmap": lambda: memoryview(mapped())[100:2000],
    "a ctypes array": lambda: filled((ctypes.c_float * 9)()),
    "a ctypes array in two dimensions": lambda: filled((ctypes.c_int16 * 3 * 5)()),
    "a ctypes buffer": lambda: ctypes.create_string_buffer(painted(50), 50),
    "a ctypes number": lambda: filled(ctypes.c_double()),
    "a ctypes structure": lambda: filled(Pair()),
    "an array of structures": lambda: filled((Pair * 4)()),
    "a ctypes array of wide characters": lambda: filled((ctypes.c_wchar * 3)()),
    "a ctypes array of no elements": lambda: (ctypes.c_int * 0)(),
}
READ_ONLY = {
    "bytes": lambda: painted(99),
    "no bytes": lambda: b"",
    "a memoryview of bytes": lambda: memoryview(painted(99)),
    "a read-only memoryview": lambda: memoryview(bytearray(painted(99))).toreadonly(),
    "a number of NumPy": lambda: np.float64(1.5),
    "a read-only mmap": lambda: mmap.mmap(-1, 3000, access=mmap.ACCESS_READ),
    "a subclass of bytes": lambda: type("Bytes", (bytes,), {})(painted(9)),
}


@pytest.mark.parametrize("kind", BUFFERS | READ_ONLY)
def test_buffers_as_source(kind):
    data = (BUFFERS | READ_ONLY)[kind]()
    plain = content(data)
    result = lock(data, schedule())
    assert type(result) is np.ndarray
    assert content(result) == locked(plain)
    assert content(data) == plain
    assert content(unlock(result, schedule())) == plain
    out = bytearray(len(plain))
    assert lock(data, schedule(), out=out) is out
    assert out == locked(plain)


@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_in_place(kind):
    data = BUFFERS[kind]()
    plain = content(data)
    assert lock(data, schedule(), out=data) is data
    assert content(data) == locked(plain)
    assert unlock(data, schedule(), out=data) is data
    assert content(data) == plain
    source = np.frombuffer(painted(len(plain), 5), np.uint8)
    assert lock(source, schedule(), out=data) is data
    assert content(data) == locked(source.tobytes())


def test_the_shape_of_a_buffer_is_that_of_the_new_array():
    result = lock(memoryview(bytearray(24)).cast("B", (2, 3, 4)), schedule())
    assert (result.shape, result.dtype) == ((2, 3, 4), np.uint8)
    result = lock(array.array("d", [1, 2]), schedule())
    assert (result.shape, result.dtype) == ((2,), np.float64)
    result = lock((ctypes.c_float * 3)(), schedule())
    assert (result.shape, result.dtype) == ((3,), np.float32)
    result = lock(bytes(5), schedule())
    assert (result.shape, result.dtype) == ((5,), np.uint8)


@pytest.mark.parametrize("access", [mmap.ACCESS_WRITE, mmap.ACCESS_COPY, mmap.ACCESS_READ])
def test_memory_maps_of_a_file(tmp_path, access):
    path = tmp_path / "file"
    path.write_bytes(painted(5000))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, access=access) as memory:
        assert content(lock(memory, schedule())) == lock(painted(5000), schedule()).tobytes()
        if access == mmap.ACCESS_READ:
            with pytest.raises(errors.ReadOnlyError, match=r"^out: got a read-only mmap"):
                lock(memory, schedule(), out=memory)
        else:
            lock(memory, schedule(), out=memory)
            assert memory[:] == lock(painted(5000), schedule()).tobytes()
    on_disk = lock(painted(5000), schedule()).tobytes() if access == mmap.ACCESS_WRITE else painted(5000)
    assert path.read_bytes() == on_disk


def test_no_memory_is_held_afterwards():
    data = bytearray(painted(100))
    lock(data, schedule())
    lock(data, schedule(), out=data)
    data.append(1)  # a bytearray whose memory is lent out cannot grow
    with mmap.mmap(-1, 100) as memory:
        lock(memory, schedule(), out=memory)
    for bad in ({"offset": -1}, {"sbox": "none"}, {"out": bytearray(3)}):
        with pytest.raises(errors.DeepLockError):
            lock(data, schedule(), **bad)
    data.append(2)


def test_a_large_array_keeps_its_memory_where_it_is():
    data = np.zeros(5_000_000, np.uint8)
    where = data.ctypes.data
    lock(data, schedule(), out=data)
    assert data.ctypes.data == where
    assert buffers.memory(data).address == where
    assert buffers.memory(data).stop == where + data.nbytes


# Overlap


@pytest.mark.parametrize("operation", [lock, unlock])
@pytest.mark.parametrize("make", [schedule, lambda: ExpansionSchedule(KEY)])
def test_only_the_same_range_or_separate_ranges(operation, make):
    nbytes = 64
    for distance in range(-65, 66):
        whole = np.frombuffer(bytearray(painted(200)), np.uint8)
        data, out = whole[66 : 66 + nbytes], whole[66 + distance : 66 + distance + nbytes]
        if distance == 0 or abs(distance) >= nbytes:
            expected = operation(data.copy(), make()).tobytes()
            assert operation(data, make(), out=out) is out
            assert out.tobytes() == expected
            continue
        with pytest.raises(errors.OverlapError, match=r"^out: got memory that overlaps data in part") as caught:
            operation(data, make(), out=out)
        assert isinstance(caught.value, ValueError)
        assert whole.tobytes() == painted(200), distance


def test_the_same_range_under_another_type_is_in_place():
    memory = bytearray(painted(64))
    lock(np.frombuffer(memory, np.float32), schedule(), out=np.frombuffer(memory, np.uint8).reshape(8, 8))
    assert memory == locked(painted(64))
    unlock(memoryview(memory).cast("d"), schedule(), out=memory)
    assert memory == painted(64)


def test_overlap_between_objects_of_other_kinds():
    memory = bytearray(painted(64))
    for data, out in [
        (memoryview(memory)[:40], np.frombuffer(memory, np.uint8)[1:41]),
        (np.frombuffer(memory, np.uint8)[:40], memoryview(memory)[24:]),
        ((ctypes.c_char * 40).from_buffer(memory, 1), memoryview(memory)[:40]),
    ]:
        for operation in (lock, unlock):
            with pytest.raises(errors.OverlapError, match=r"^out: got memory that overlaps data in part"):
                operation(data, schedule(), out=out)
        with pytest.raises(errors.OverlapError, match=r"^out: got memory that overlaps data in part"):
            substitute(data, "aes", out=out)
    assert memory == painted(64)


def test_no_bytes_overlap_nothing():
    memory = np.zeros(10, np.uint8)
    for start in (0, 5, 10):
        assert lock(memory[5:5], schedule(), out=memory[start:start]).size == 0


# Refusals


class OnlyInterface:
    """Memory behind a protocol that is not Python's own."""

    def __init__(self):
        self.data = np.zeros(9)
        self.__array_interface__ = self.data.__array_interface__

    def __array__(self, *arguments, **keywords):
        return self.data


def released():
    view = memoryview(bytearray(9))
    view.release()
    return view


def read_only(array):
    array.flags.writeable = False
    return array


def f4(*shape):
    return array_of(np.dtype("f4"), shape)


NO_MEMORY = {
    "str": lambda: "text",
    "list": lambda: [1, 2, 3],
    "tuple": lambda: (1, 2, 3),
    "int": lambda: 3,
    "float": lambda: 3.5,
    "None": lambda: None,
    "dict": dict,
    "object": object,
    "type": lambda: bytes,
    "a generator": lambda: (i for i in range(3)),
    "an array's protocol alone": OnlyInterface,
    "a range": lambda: range(9),
    "a schedule": lambda: ExpansionSchedule(KEY),
    "a released memoryview": released,
}
OBJECTS = {
    "an array of objects": lambda: np.array([b"a", 1, None], object),
    "an array of no objects": lambda: np.array([], object),
    "an array of records with objects": lambda: np.zeros(3, [("a", "i4"), ("b", "O")]),
    "a memoryview of objects": lambda: memoryview(np.array([b"a", 1], object)),
    "a ctypes array of objects": lambda: (ctypes.py_object * 2)(),
}
if hasattr(np.dtypes, "StringDType"):  # NumPy 2
    OBJECTS["an array of texts of any length"] = lambda: np.array(["a", "b" * 100], np.dtypes.StringDType())
GAPS = {
    "every second": lambda: f4(10)[::2],
    "backwards": lambda: f4(10)[::-1],
    "a column": lambda: f4(5, 6)[:, 2],
    "columns": lambda: f4(5, 6)[:, 1:3],
    "Fortran's order": lambda: np.asfortranarray(f4(5, 6)),
    "a transpose": lambda: f4(5, 6).T,
    "broadcast": lambda: np.broadcast_to(f4(1), (5,)),
    "a field": lambda: np.zeros(5, [("a", "i4"), ("b", "i4")])["a"],
    "every second byte of a memoryview": lambda: memoryview(bytearray(10))[::2],
    "a memoryview backwards": lambda: memoryview(bytearray(10))[::-1],
    "a memoryview in Fortran's order": lambda: memoryview(np.asfortranarray(f4(5, 6))),
}
LOCKED_UP = {
    "a read-only array": lambda: read_only(f4(9)),
    "an array over bytes": lambda: np.frombuffer(painted(36), np.float32),
    **READ_ONLY,
}
REFUSED = {
    **{name: (make, errors.BufferTypeError, TypeError, "data: got ") for name, make in NO_MEMORY.items()},
    **{name: (make, errors.BufferTypeError, TypeError, "data: got a") for name, make in OBJECTS.items()},
    **{name: (make, errors.BufferLayoutError, ValueError, "data: got a") for name, make in GAPS.items()},
}

OPERATIONS = {
    "lock": lambda data, **keywords: lock(data, schedule(), **keywords),
    "unlock": lambda data, **keywords: unlock(data, schedule(), **keywords),
    "lock by expansion": lambda data, **keywords: lock(data, ExpansionSchedule(KEY), **keywords),
    "substitute": lambda data, **keywords: substitute(data, "aes", **keywords),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


def refuse(*arguments, **keywords):
    assert ", accepted " in str(support.refuse(*arguments, **keywords))


@each_operation
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_memory_is_refused(operation, name):
    make, kind, builtin, start = REFUSED[name]
    data = make()
    refuse(kind, builtin, start, operation, data)
    refuse(kind, builtin, start, operation, data, threads=1)
    refuse(kind, builtin, start, operation, data, out=bytearray(9))
    if data is not None:
        refuse(kind, builtin, start, operation, data, out=data)
        source = bytes(painted(36))
        refuse(kind, builtin, start.replace("data", "out"), operation, source, out=data)
    if isinstance(data, np.ndarray):
        np.testing.assert_array_equal(data, make())


@each_operation
@pytest.mark.parametrize("kind", LOCKED_UP)
def test_what_is_read_only_is_not_written(operation, kind):
    data = LOCKED_UP[kind]()
    plain = content(data)
    start = "out: got a read-only "
    refuse(errors.ReadOnlyError, ValueError, start, operation, data, out=data)
    refuse(errors.ReadOnlyError, ValueError, start, operation, bytearray(len(plain)), out=data)
    assert content(data) == plain
    assert "out" in str(errors.ReadOnlyError.__doc__)


def test_texts_are_told_to_be_encoded():
    with pytest.raises(errors.BufferTypeError, match=r"^data: got str, accepted .* encode text to bytes first$"):
        lock("text", schedule())


def test_an_array_with_gaps_is_told_how_to_be_made_whole():
    with pytest.raises(errors.BufferLayoutError, match=r"with strides \(8,\), .* numpy.ascontiguousarray$"):
        lock(f4(10)[::2], schedule())


@each_operation
@pytest.mark.parametrize("nbytes", [0, 1, 35, 37, 72])
def test_output_of_another_size_is_refused(operation, nbytes):
    for data in (bytearray(painted(36)), f4(9)):
        for out in (bytearray(painted(nbytes)), np.frombuffer(bytearray(painted(nbytes)), np.uint8)):
            start = f"out: got {nbytes} bytes, accepted are the 36 bytes of data"
            refuse(errors.SizeMismatchError, ValueError, start, operation, data, out=out)
            assert content(out) == painted(nbytes)
            assert content(data) == painted(36)


NO_OFFSET = [-1, -(2**70), True, False, 1.0, 1.5, "1", b"1", (), [1], np.float64(1), np.array([1]), np.array(1.5)]
NO_OFFSET += [2**63, 2**63 + 1, 2**64, 2**100, 2**63 - 35, np.True_]


@pytest.mark.parametrize("offset", NO_OFFSET, ids=repr)
@pytest.mark.parametrize("make", [schedule, lambda: ExpansionSchedule(KEY)])
@pytest.mark.parametrize("operation", [lock, unlock])
def test_what_is_no_offset(operation, make, offset):
    for data in (f4(9), bytearray(painted(36))):
        for keywords in ({}, {"out": data}, {"threads": 2}):
            refuse(
                errors.ParameterError, ValueError, "offset: got ", operation, data, make(), offset=offset, **keywords
            )
        assert content(data) == painted(36)


def test_offsets_up_to_the_very_end():
    data = f4(9)
    for offset in (2**63 - 36, np.uint64(2**63 - 36), 2**62, 2**32 - 1):
        stream = reference.counter_keystream(KEY, IV, 36, int(offset))
        expected = reference.lock(painted(36), stream)
        assert content(lock(data, schedule(), offset=offset)) == expected
        result = data.copy()
        assert content(lock(result, schedule(), offset=offset, out=result)) == expected
    lock(bytearray(), schedule(), offset=2**63)
    with pytest.raises(errors.ParameterError, match=r"^offset: got 9223372036854775809 "):
        lock(bytearray(), schedule(), offset=2**63 + 1)


@each_operation
@pytest.mark.parametrize("threads", [0, -1, True, 1.0, "2", b"", [1]], ids=repr)
def test_what_is_no_number_of_threads(operation, threads):
    data = f4(9)
    refuse(errors.ParameterError, ValueError, "threads: got ", operation, data, out=data, threads=threads)
    assert content(data) == painted(36)


@pytest.mark.parametrize("sbox", ["AES", "none", "", None, 3, b"aes", AES.table, [], object], ids=repr)
def test_what_is_no_sbox(sbox):
    data = f4(9)
    shown = repr(sbox) if sbox is None or isinstance(sbox, (str, int)) else type(sbox).__name__  # it may be a key
    start = f"sbox: got {shown}, accepted are an SBox or one of aes, "
    for operation in (
        lambda **keywords: lock(data, schedule(), sbox=sbox, **keywords),
        lambda **keywords: unlock(data, ExpansionSchedule(KEY), sbox=sbox, **keywords),
        lambda **keywords: substitute(data, sbox, **keywords),
    ):
        for keywords in ({}, {"out": data}):
            refuse(errors.UnknownNameError, KeyError, start, operation, **keywords)
            refuse(errors.UnknownNameError, ValueError, start, operation, **keywords)
    assert content(data) == painted(36)


NO_SCHEDULE = [None, CounterSchedule, ExpansionSchedule, "counter", KEY, 3, AES, object()]


@pytest.mark.parametrize("value", NO_SCHEDULE, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("operation", [lock, unlock])
def test_what_is_no_schedule(operation, value):
    """Least of all None: without a key nothing may come back that looks locked."""
    data = f4(9)
    for keywords in ({}, {"out": data}, {"threads": 1}):
        refuse(errors.BufferTypeError, TypeError, "schedule: got ", operation, data, value, **keywords)
    assert content(data) == painted(36)


@pytest.mark.parametrize("make", [schedule, lambda: ExpansionSchedule(KEY)])
@pytest.mark.parametrize("operation", [lock, unlock])
def test_a_wiped_schedule_changes_nothing(operation, make):
    data = f4(9)
    wiped = make()
    wiped.wipe()
    for keywords in ({}, {"out": data}, {"out": bytearray(36)}):
        with pytest.raises(errors.KeyWipedError, match=r"Schedule: it was wiped"):
            operation(data, wiped, **keywords)
        assert content(keywords.get("out", b"")) in (b"", bytes(36), painted(36))
    assert content(data) == painted(36)


# PyTorch


@pytest.fixture
def torch():
    return support.framework("torch")


def tensor_bytes(torch, tensor):
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor_of(torch, dtype, shape):
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = torch.frombuffer(bytearray(painted(count)), dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


TENSOR_DTYPES = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool", "complex64", "complex128", "complex32"]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", TENSOR_DTYPES)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (), (0,), (2, 0)], ids=str)
def test_tensors_of_every_dtype_and_shape(torch, name, shape):
    dtype = getattr(torch, name, None)
    if dtype is None:
        return  # an older PyTorch has fewer
    data = tensor_of(torch, dtype, shape)
    plain = tensor_bytes(torch, data)
    result = lock(data, schedule())
    assert type(result) is torch.Tensor
    assert (result.dtype, result.shape) == (dtype, data.shape)
    assert tensor_bytes(torch, result) == locked(plain)
    assert tensor_bytes(torch, data) == plain
    assert lock(data, schedule(), out=data) is data
    assert tensor_bytes(torch, data) == locked(plain)
    assert unlock(data, schedule(), out=data) is data
    assert tensor_bytes(torch, data) == plain


def test_a_parameter_s_version_counter_follows_what_is_written(torch):
    parameter = torch.nn.Parameter(tensor_of(torch, torch.float32, (6,)))
    plain, version = tensor_bytes(torch, parameter), parameter._version
    result = lock(parameter, schedule())
    assert parameter._version == version
    assert type(result) is torch.Tensor
    assert not result.requires_grad
    assert tensor_bytes(torch, result) == locked(plain)
    assert lock(parameter, schedule(), out=parameter) is parameter
    assert parameter._version > version
    assert parameter.requires_grad
    assert tensor_bytes(torch, parameter) == locked(plain)
    version = parameter._version
    substitute(parameter, "aes", out=parameter)
    assert parameter._version > version


def test_autograd_refuses_weights_that_were_locked_under_it(torch):
    weight = torch.nn.Parameter(torch.ones(4))
    product = (weight * weight).sum()
    lock(weight, schedule(), out=weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_tensors_as_views(torch):
    whole = tensor_of(torch, torch.float32, (50,))
    part = whole[10:20]
    lock(part, schedule(), out=part)
    assert tensor_bytes(torch, whole) == painted(40) + locked(painted(40, 40)) + painted(120, 80)
    shared = whole.numpy()
    unlock(part, schedule(), out=shared[10:20])  # the same range, as an array
    assert tensor_bytes(torch, whole) == painted(200)
    for bad in (whole[1:11], shared[9:19]):
        with pytest.raises(errors.OverlapError, match=r"^out: got memory that overlaps data in part"):
            lock(whole[5:15], schedule(), out=bad)
    assert tensor_bytes(torch, whole) == painted(200)


def test_tensors_that_are_refused(torch):
    floats = tensor_of(torch, torch.float32, (4, 6))
    complexes = tensor_of(torch, torch.complex64, (4,))
    with torch.inference_mode():
        frozen = torch.ones(9)
    types = [
        torch.empty(9, device="meta"),
        torch.nn.Parameter(torch.empty(9, device="meta")),
        floats.to_sparse(),
        complexes.conj(),
        complexes.conj().imag,
    ]
    for tensor in types:
        refuse(errors.BufferTypeError, TypeError, "data: got a tensor ", lock, tensor, schedule())
        refuse(errors.BufferTypeError, TypeError, "out: got a tensor ", lock, bytes(36), schedule(), out=tensor)
    for tensor in (floats.t(), floats[:, 1], floats[:, ::2], floats[:1].expand(4, 6)):
        refuse(errors.BufferLayoutError, ValueError, "data: got a tensor with strides ", lock, tensor, schedule())
        refuse(
            errors.BufferLayoutError, ValueError, "out: got a tensor with strides ", lock, bytes(96), schedule(), out=tensor
        )
    refuse(errors.ReadOnlyError, ValueError, "out: got a read-only inference tensor", lock, frozen, schedule(), out=frozen)
    assert tensor_bytes(torch, floats) == painted(96)
    assert tensor_bytes(torch, complexes) == painted(32)
    assert tensor_bytes(torch, lock(frozen, schedule())) == locked(np.ones(9, np.float32).tobytes())
    with torch.inference_mode():
        lock(frozen, schedule(), out=frozen)
        assert tensor_bytes(torch, frozen) == locked(np.ones(9, np.float32).tobytes())


def test_the_version_counter_of_what_is_refused_stays(torch):
    tensor = tensor_of(torch, torch.float32, (6,))
    for bad in ({"offset": -1}, {"sbox": "none"}, {"threads": 0}):
        with pytest.raises(errors.DeepLockError):
            lock(tensor, schedule(), out=tensor, **bad)
    assert tensor._version == 0
