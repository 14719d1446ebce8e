"""Every file format: the same laws for all, and what each format's own library makes of locked files."""

from __future__ import annotations

import itertools
import json
import secrets
import shutil
import sys
import zipfile

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from samples import (
    FILES,
    NETWORKS,
    array_file,
    floats,
    initializer,
    network,
    perceptron,
    tensors_of,
)
from support import KEYS, painted

from deeplock_kernels import cli
from deeplock_kernels.checkpoints import streaming
from deeplock_kernels.checkpoints.formats import FORMATS, onnx_skeleton, zip_directory
from deeplock_kernels.checkpoints.formats import gguf as gguf_format
from deeplock_kernels.checkpoints.inplace import lock_file_in_place, unlock_file_in_place
from deeplock_kernels.checkpoints.streaming import (
    data_bytes,
    lock_file,
    read_header,
    read_layout,
    rekey_file,
    unlock_file,
    verify_file,
)
from deeplock_kernels.errors import (
    AlreadyLockedError,
    ContainerError,
    DeepLockError,
    MissingLibraryError,
    NotLockedError,
    SameFileError,
    TamperedHeaderError,
    WrongKeyError,
)
from deeplock_kernels.tensors import lock_tensors

KEY, OTHER_KEY = KEYS[256], KEYS[256][::-1]
every_file = pytest.mark.parametrize("file", FILES)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def folders(tmp_path):
    """Directories for the plain file, the locked one and the unlocked one."""
    found = [tmp_path / name for name in ("plain", "locked", "back")]
    for folder in found:
        folder.mkdir()
    return found


def locked_one(folders, file, **keywords):
    """Write a plain file and lock it; give both paths."""
    plain = FILES[file](folders[0])
    locked = folders[1] / plain.name
    lock_file(plain, locked, KEY, **keywords)
    return plain, locked


def one_salt(monkeypatch):
    """Let every lock draw the same salt."""
    monkeypatch.setattr(secrets, "token_bytes", lambda count: bytes(range(50, 50 + count)))
    names = itertools.count()
    monkeypatch.setattr(secrets, "token_hex", lambda _: f"{next(names)}")  # of files that are being written


# Laws


@pytest.mark.parametrize("window", [17, 1000, streaming.WINDOW])
@every_file
def test_a_file_is_locked_and_comes_back(folders, monkeypatch, file, window):
    one_salt(monkeypatch)
    monkeypatch.setattr(streaming, "WINDOW", window)
    steps: list[int] = []
    plain, locked = locked_one(folders, file, progress=steps.append)
    assert sum(steps) == data_bytes(plain) == data_bytes(locked)
    before, after = tensors_of(plain), tensors_of(locked)
    expected = {name: bytearray(data) for name, (_, _, data) in before.items()}
    header = lock_tensors(expected, KEY)
    assert {name: (*before[name][:2], bytes(data)) for name, data in expected.items()} == after
    layout = read_layout(plain)
    assert {name: (tensor.shape, tensor.nbytes) for name, tensor in layout.tensors.items()} == {
        name: (shape, len(data)) for name, (_, shape, data) in before.items()
    }
    assert read_header(locked).tensors == header.tensors
    assert verify_file(locked, KEY) == read_header(locked)
    assert layout.proved == read_layout(locked).proved
    unlock_file(locked, folders[2] / plain.name, KEY)
    assert contents(folders[2]) == contents(folders[0])


@every_file
def test_under_another_key(folders, file):
    plain, locked = locked_one(folders, file)
    other = folders[0] / "rekeyed"
    other.mkdir()
    rekey_file(locked, other / plain.name, KEY, OTHER_KEY, schedule="expansion")
    assert read_layout(other / plain.name).proved == read_layout(plain).proved
    with pytest.raises(WrongKeyError):
        verify_file(other / plain.name, KEY)
    unlock_file(other / plain.name, folders[2] / plain.name, OTHER_KEY)
    shutil.rmtree(other)
    assert contents(folders[2]) == contents(folders[0])


@every_file
def test_in_place(folders, monkeypatch, file):
    one_salt(monkeypatch)
    plain, _locked = locked_one(folders, file)
    before = contents(folders[0])
    if len(before) > 1:
        with pytest.raises(ContainerError, match="accepted"):
            lock_file_in_place(plain, KEY)
        assert contents(folders[0]) == before
        return
    lock_file_in_place(plain, KEY)
    assert contents(folders[0]) == contents(folders[1])
    unlock_file_in_place(plain, KEY)
    assert contents(folders[0]) == before


@pytest.mark.parametrize("file", ["npz", "gguf", "onnx", "onnx, external data"])
def test_only_some(folders, file):
    plain, locked = locked_one(folders, file, only=["*w*"], seal=False)
    before, after = tensors_of(plain), tensors_of(locked)
    assert {name for name in before if before[name] != after[name]} == {name for name in before if "w" in name}
    unlock_file(locked, folders[2] / plain.name, KEY)
    assert contents(folders[2]) == contents(folders[0])


@every_file
def test_locked_twice_and_unlocked_twice(folders, file):
    plain, locked = locked_one(folders, file)
    before = contents(folders[1])
    with pytest.raises(AlreadyLockedError):
        lock_file(locked, folders[2] / plain.name, KEY)
    with pytest.raises(NotLockedError):
        unlock_file(plain, folders[2] / plain.name, KEY)
    with pytest.raises(WrongKeyError):
        unlock_file(locked, folders[2] / plain.name, OTHER_KEY)
    assert contents(folders[1]) == before
    assert not contents(folders[2])


@every_file
def test_every_changed_byte_is_noticed(folders, file):
    _, locked = locked_one(folders, file)
    for path in folders[1].iterdir():
        raw = path.read_bytes()
        others: set[int] = set()
        if path != locked:  # of a file beside it what is no tensor's is not sealed
            sealed = [tensor for tensor in read_layout(locked).tensors.values() if tensor.companion == path.name]
            assert sealed
            others = set(range(len(raw))).difference(*(range(one.start, one.stop) for one in sealed))
        assert unnoticed(path, locked, raw) == others


def unnoticed(path, locked, raw):
    """Give the places at which a flipped bit goes unnoticed."""
    found = set()
    with open(path, "r+b", buffering=0) as file:
        for i, byte in enumerate(raw):
            file.seek(i)
            file.write(bytes([byte ^ 1 << i % 8]))
            try:
                verify_file(locked, KEY)
            except DeepLockError:
                pass
            else:
                found.add(i)
            file.seek(i)
            file.write(bytes([byte]))
    return found


@every_file
def test_every_truncation_is_refused(folders, file):
    plain, locked = locked_one(folders, file)
    for path in sorted(folders[1].iterdir()):
        raw = path.read_bytes()
        for size in range(len(raw) - 1, -1, -1):
            with open(path, "r+b") as cut:
                cut.truncate(size)
            try:
                unlock_file(locked, folders[2] / plain.name, KEY)
            except (ContainerError, NotLockedError):
                continue
            except TamperedHeaderError:  # all that is gone is padding behind the last tensor
                assert file.startswith("gguf")
                assert size >= max(tensor.stop for tensor in read_layout(locked).tensors.values())
                continue
            raise AssertionError(f"{path.name} of {size} bytes")
        path.write_bytes(raw)
    assert not contents(folders[2])


@every_file
def test_a_byte_more_is_noticed(folders, file):
    _, locked = locked_one(folders, file)
    with open(locked, "ab") as longer:
        longer.write(b"x")
    with pytest.raises((ContainerError, TamperedHeaderError)):
        verify_file(locked, KEY)


@every_file
def test_inspect_says_which_format(folders, capsys, file):
    plain, locked = locked_one(folders, file)
    assert cli.main(["inspect", str(locked)]) == 0
    assert capsys.readouterr().out.startswith(f"{locked}: {plain.suffix[1:]}, ")


def test_every_format_has_files():
    assert {file.split(",")[0] for file in FILES} == {known.name for known in FORMATS}


def refused(path, words):
    """Check that a file can neither be locked nor be looked at."""
    with pytest.raises(ContainerError, match=words) as caught:
        lock_file(path, path.with_name("new"), KEY)
    assert str(caught.value).startswith(str(path.parent))
    assert not path.with_name("new").exists()


@pytest.mark.parametrize(("module", "file"), [("gguf", "gguf"), ("onnx", "onnx")])
def test_a_library_that_is_not_there(tmp_path, monkeypatch, capsys, module, file):
    path = FILES[file](tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibraryError, match=rf"deeplock-kernels\[{module}\]"):
        read_layout(path)
    assert cli.main(["inspect", str(path)]) == 1
    assert f"[{module}]" in capsys.readouterr().err


# npy


def npy_header(text, version=(1, 0)):
    def write(directory):
        path = directory / "array.npy"
        encoded = text.encode()
        length = len(encoded).to_bytes(2 if version == (1, 0) else 4, "little")
        path.write_bytes(b"\x93NUMPY" + bytes(version) + length + encoded + bytes(64))
        return path

    return write


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (16,)}"
BAD_ARRAYS = {
    "objects": (array_file(np.array([{}, []], dtype=object)), "Python objects"),
    "objects in a field": (array_file(np.zeros(2, [("a", "f4"), ("b", "O")])), "Python objects"),
    "two arrays": (npy_header(GOOD.replace("16", "8")), "more bytes after the data"),
    "too few bytes": (npy_header(GOOD.replace("16", "17")), "the need of 68 bytes where 64 are left"),
    "version 4": (npy_header(GOOD, (4, 0)), "got version 4.0"),
    "no dict": (npy_header("[]"), "another text"),
    "no Python": (npy_header("{"), "another text"),
    "deep": (npy_header("(" * 5000), "another text"),
    "a key more": (npy_header(GOOD.replace("{", "{'x': 1, ")), "another text"),
    "another shape": (npy_header(GOOD.replace("(16,)", "16")), "another shape"),
    "a negative shape": (npy_header(GOOD.replace("16", "-16")), "another shape"),
    "a true shape": (npy_header(GOOD.replace("16", "True")), "another shape"),
    "a huge shape": (npy_header(GOOD.replace("16", f"{2**62}, 2")), "2\\*\\*63 bytes"),
    "another order": (npy_header(GOOD.replace("False", "0")), "another fortran_order"),
    "no dtype": (npy_header(GOOD.replace("<f4", "<f5")), "another descr"),
    "an array as dtype": (npy_header(GOOD.replace("<f4", "2f4")), "an array as its dtype"),
    "a long text": (npy_header(GOOD + " " * 10_000), "too long"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_cannot_be_locked(tmp_path, case):
    write, words = BAD_ARRAYS[case]
    if "objects" in case:
        path = tmp_path / "array.npy"
        array = np.array([{}], dtype=object) if case == "objects" else np.zeros(2, [("a", "f4"), ("b", "O")])
        np.save(path, array, allow_pickle=True)
    else:
        path = write(tmp_path)
    refused(path, words)


# npz


def zipped(members, compression=zipfile.ZIP_STORED):
    def write(directory):
        path = directory / "arrays.npz"
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, data in members:
                file.writestr(name, data)
        return path

    return write


def array_bytes(array):
    start = np.lib.format.header_data_from_array_1_0(array)
    text = str(start).encode()
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + array.tobytes()


def changed(write, change):
    def write_changed(directory):
        path = write(directory)
        path.write_bytes(change(bytearray(path.read_bytes())))
        return path

    return write_changed


def streamed(directory):
    path = directory / "arrays.npz"

    class Pipe:
        def __init__(self, file):
            self.write, self.flush = file.write, file.flush

    with open(path, "wb") as file, zipfile.ZipFile(Pipe(file), "w") as archive:
        archive.writestr("a.npy", ONE)
    return path


def put(place, data):
    """Replace bytes; a negative place counts from the end."""

    def change(raw):
        start = place % len(raw)
        raw[start : start + len(data)] = data
        return raw

    return change


def both_flags(flag):
    def change(raw):
        raw[6] |= flag
        raw[raw.rindex(b"PK\1\2") + 8] |= flag
        return raw

    return change


ONE = array_bytes(np.arange(4.0))
SIMPLE = zipped([("a.npy", ONE)])
BAD_ARCHIVES = {
    "compressed": (zipped([("a.npy", ONE)], zipfile.ZIP_DEFLATED), "compressed member.*numpy.savez"),
    "encrypted": (changed(SIMPLE, both_flags(1)), "encrypted"),
    "other flags": (changed(SIMPLE, both_flags(4)), "unknown flags"),
    "written to a pipe": (streamed, "behind the data"),
    "no arrays": (zipped([("a.txt", b"")]), "without arrays"),
    "a comment": (changed(SIMPLE, lambda raw: raw[:-2] + b"\3\0abc"), "without comment"),
    "bytes before it": (changed(SIMPLE, lambda raw: raw[:30] + b"xx" + raw[30:]), "another size or place"),
    "a hole": (changed(SIMPLE, put(-6, b"\0")), "another size or place"),
    "another name before the data": (changed(SIMPLE, put(30, b"b")), "another record before it"),
    "another checksum before the data": (changed(SIMPLE, put(14, b"abcd")), "another record before it"),
    "another count": (changed(SIMPLE, put(-14, b"\2\0\2\0")), "got 1 members"),
    "a bad array": (zipped([("a.npy", ONE[:-1])]), "the need of|bytes of data"),
    "another array's end": (zipped([("a.npy", ONE + b"x")]), "33 bytes of data"),
    "objects": (zipped([("a.npy", ONE.replace(b"'<f8'", b"'|O' "))]), "Python objects"),
    "the lock header in front": (zipped([("deeplock.json", b"{}"), ("a.npy", ONE)]), "another program"),
    "a lock header with a date": (zipped([("a.npy", ONE), ("deeplock.json", b"{}")]), "another program"),
    "no UTF-8": (changed(zipped([("ä.npy", ONE)]), lambda raw: raw.replace(b"\xc3\xa4", b"\xc3\xc3")), "no UTF-8"),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_archives_that_cannot_be_locked(tmp_path, case):
    write, words = BAD_ARCHIVES[case]
    refused(write(tmp_path), words)


def test_a_member_twice(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped([("a.npy", ONE), ("note", b""), ("note", b"")])(tmp_path)
    refused(path, "got it twice")


def test_the_lock_header_is_a_member(folders):
    _, locked = locked_one(folders, "npz")
    with np.load(locked) as file:
        assert file.files[-1] == "deeplock.json"
        assert file["deeplock.json"].decode() == read_header(locked).to_json()


def test_a_member_so_far_behind_that_its_place_needs_more_bits(folders, monkeypatch):
    monkeypatch.setattr(zip_directory, "_FAR", 300)
    plain, locked = locked_one(folders, "npz")
    with zipfile.ZipFile(locked) as file:
        member = file.getinfo("deeplock.json")
        assert (member.extract_version, len(member.extra)) == (45, 12)
        assert file.read(member).decode() == read_header(locked).to_json()
    unlock_file(locked, folders[2] / plain.name, KEY)
    assert contents(folders[2]) == contents(folders[0])


def test_a_directory_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_directory, "_FULL16", 2)
    refused(SIMPLE(tmp_path), "as many members")


# GGUF


def test_all_types_of_tensors(folders):
    plain, locked = (folder / "model.gguf" for folder in folders[:2])
    writer = gguf.GGUFWriter(plain, "llama")
    for kind, (_, nbytes) in gguf.GGML_QUANT_SIZES.items():
        writer.add_tensor_info(kind.name, (2, nbytes), np.dtype(np.uint8), 2 * nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(plain, "ab") as file:
        file.write(painted(20_000).tobytes())
    lock_file(plain, locked, KEY)
    before, after = tensors_of(plain), tensors_of(locked)
    assert before.keys() == {kind.name for kind in gguf.GGML_QUANT_SIZES}
    for name, tensor in before.items():
        assert tensor[:2] == after[name][:2]
        assert tensor[2] != after[name][2]


def test_metadata_that_the_library_reads(folders):
    plain, locked = locked_one(folders, "gguf")
    before, after = (gguf.GGUFReader(path) for path in (plain, locked))
    assert [*after.fields] == [*before.fields, "deeplock.header"]
    assert json.loads(after.fields["deeplock.header"].contents()) == json.loads(read_header(locked).to_json())
    for name in set(before.fields) - {"GGUF.kv_count"}:
        assert after.fields[name].contents() == before.fields[name].contents()
    assert (after.data_offset - before.data_offset) % after.alignment == 0


def gguf_file(metadata=b"", count=0, tensors=b"", tensor_count=0, version=3):
    def write(directory):
        path = directory / "model.gguf"
        numbers = b"".join(number.to_bytes(8, "little") for number in (tensor_count, count))
        path.write_bytes(b"GGUF" + version.to_bytes(4, "little") + numbers + metadata + tensors + bytes(99))
        return path

    return write


def text(value):
    return len(value).to_bytes(8, "little") + value


def numbers(*values):
    """Give numbers as (value, bytes)."""
    return b"".join(value.to_bytes(nbytes, "little") for value, nbytes in values)


def info(name=b"w", shape=(4,), kind=0, offset=0):
    lengths = [(length, 8) for length in shape]
    return text(name) + numbers((len(shape), 4), *lengths, (kind, 4), (offset, 8))


HUGE = 2**64 - 1
DEEP = text(b"k") + numbers((9, 4)) + numbers((9, 4), (1, 8)) * 50
BAD_TABLES = {
    "version 1": (gguf_file(version=1), "another version"),
    "a long key": (gguf_file(numbers((HUGE, 8)), 1), "the need of"),
    "no end of metadata": (gguf_file(count=HUGE), "twice"),
    "no end of tensors": (gguf_file(tensor_count=HUGE), "the need of"),
    "no end of an array": (gguf_file(text(b"k") + numbers((9, 4), (8, 4), (HUGE, 8)), 1), "the need of"),
    "no end of an array of bytes": (gguf_file(text(b"k") + numbers((9, 4), (0, 4), (HUGE, 8)), 1), "the need of"),
    "arrays in each other": (gguf_file(DEEP, 1), "another type"),
    "another type": (gguf_file(text(b"k") + numbers((13, 4)), 1), "another type"),
    "alignment 3": (gguf_file(text(b"general.alignment") + numbers((4, 4), (3, 4)), 1), "powers of two"),
    "alignment 0": (gguf_file(text(b"general.alignment") + numbers((4, 4), (0, 4)), 1), "powers of two"),
    "huge alignment": (gguf_file(text(b"general.alignment") + numbers((4, 4), (1 << 30, 4)), 1), "powers of two"),
    "alignment as a string": (gguf_file(text(b"general.alignment") + numbers((8, 4), (0, 8)), 1), "another type"),
    "a short lock header": (gguf_file(text(gguf_format.KEY.encode()) + numbers((8, 4), (0, 8)), 1), "multiples of 32"),
    "a tensor twice": (gguf_file(tensors=info() + info(offset=32), tensor_count=2), "'w': got it twice"),
    "tensors that overlap": (gguf_file(tensors=info() + info(b"v"), tensor_count=2), "do not overlap"),
    "a tensor past the end": (gguf_file(tensors=info(shape=(64,)), tensor_count=1), "the size of the file"),
    "an offset that is not aligned": (gguf_file(tensors=info(offset=1), tensor_count=1), "got the offset 1"),
    "an unknown type": (gguf_file(tensors=info(kind=9999), tensor_count=1), "got the type 9999"),
    "half a block": (gguf_file(tensors=info(kind=8), tensor_count=1), "multiples of 32"),
    "a block of no axes": (gguf_file(tensors=info(shape=(), kind=8), tensor_count=1), "multiples of 32"),
    "many axes": (gguf_file(tensors=info(shape=(1,) * 9), tensor_count=1), "got 9 axes"),
    "a name that is no UTF-8": (gguf_file(tensors=info(b"\xff"), tensor_count=1), "no UTF-8"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_tables_that_lie(tmp_path, case):
    write, words = BAD_TABLES[case]
    refused(write(tmp_path), words)


# ONNX


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def inputs_of(model):
    shapes = {value.name: [one.dim_value for one in value.type.tensor_type.shape.dim] for value in model.graph.input}
    return {name: floats(*shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_locked_networks_load_and_compute_nonsense(folders, name):
    model = NETWORKS[name]()
    plain, locked, back = (folder / "model.onnx" for folder in folders)
    onnx.save(model, plain)
    onnx.checker.check_model(onnx.load(plain))
    expected = session(plain).run(None, inputs_of(model))
    for _ in range(5):  # each lock gives other nonsense
        lock_file(plain, locked, KEY)
        onnx.checker.check_model(onnx.load(locked), full_check=name != "sparse")
        found = session(locked).run(None, inputs_of(model))
        assert [one.shape for one in found] == [one.shape for one in expected]
        assert not np.array_equal(found, expected)
    unlock_file(locked, back, KEY)
    assert back.read_bytes() == plain.read_bytes()
    np.testing.assert_array_equal(session(back).run(None, inputs_of(model)), expected)


LOCKED = {
    "perceptron": ["c", "w", "b", "v"],
    "convolution": ["w", "b", "m"],
    "quantised": ["wq", "xs", "ws", "bs", "zs"],
    "branches": ["w", "y"],
    "sparse": ["w"],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_structure_stays(tmp_path, name):
    onnx.save(NETWORKS[name](), tmp_path / "model.onnx")
    assert sorted(read_layout(tmp_path / "model.onnx").tensors) == sorted(LOCKED[name])


def test_a_model_that_another_program_wrote_anew(folders):
    plain, locked = locked_one(folders, "onnx")
    model = onnx.load(locked)
    assert [entry.key for entry in model.metadata_props] == ["deeplock"]
    onnx.save(model, locked)
    raw, size = locked.read_bytes(), plain.stat().st_size
    for written in (raw, raw[:2] + raw[size:] + raw[2:size]):  # the lock header at the end, and after `ir_version`
        locked.write_bytes(written)
        unlock_file(locked, folders[2] / plain.name, KEY)
        assert contents(folders[2]) == contents(folders[0])
    model.metadata_props.add(key="author", value="somebody")
    onnx.save(model, locked)
    with pytest.raises(TamperedHeaderError):
        verify_file(locked, KEY)


def saved(change, base=perceptron):
    def write(directory):
        model = base()
        change(model)
        path = directory / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


def with_tensor(**fields):
    """Put another tensor in the place of the first initializer."""
    return saved(lambda model: model.graph.initializer[0].CopyFrom(TensorProto(name="w", **fields)))


def at(location, **entries):
    entries = {"location": location, **entries}
    external = [onnx.StringStringEntryProto(key=key.rstrip("_"), value=value) for key, value in entries.items()]
    return with_tensor(data_type=1, dims=[3, 6], data_location=TensorProto.EXTERNAL, external_data=external)


def appended(tail):
    return changed(saved(lambda model: None), lambda raw: raw + tail)


def protobuf(number, content):
    return onnx_skeleton._header(number, 2) + onnx_skeleton._varint(len(content)) + content


def nested(depth):
    """Give training information with graphs in attributes of nodes of graphs in ..."""
    graph = b""
    for _ in range(depth):
        graph = protobuf(1, protobuf(5, protobuf(6, graph)))
    return protobuf(20, protobuf(2, graph))


BAD_MODELS = {
    "halves as numbers": (with_tensor(data_type=10, dims=[2], int32_data=[1, 2]), "FLOAT16.*numpy_helper.from_array"),
    "bytes as numbers": (with_tensor(data_type=3, dims=[1, 2], int32_data=[1, 2]), "INT8.*numpy_helper.from_array"),
    "doubles as floats": (with_tensor(data_type=11, dims=[2], float_data=[1, 2]), "DOUBLE that does not lie"),
    "no data": (with_tensor(data_type=1, dims=[2]), "FLOAT that does not lie"),
    "too few bytes": (with_tensor(data_type=1, dims=[2], raw_data=b"1234"), "got 4 bytes for its dtype"),
    "a negative length": (with_tensor(data_type=1, dims=[-1, -1], raw_data=b"1234"), "negative length"),
    "data twice": (with_tensor(data_type=1, dims=[1], raw_data=b"1234", float_data=[1]), "twice in one message"),
    "an unknown type": (with_tensor(data_type=99, dims=[1], raw_data=b"1234"), "got the data_type 99"),
    "another graph": (appended(b"\x3a\0"), "graph twice"),
    "graphs in each other": (appended(nested(40)), "too deep"),
    "a lock header twice": (appended(onnx_skeleton.metadata_field("deeplock", "a") * 2), "deeplock twice"),
    "no graph": (saved(lambda model: model.ClearField("graph")), "without a graph"),
    "a field of number 0": (appended(b"\2\0"), "another number of a field"),
    "a group": (appended(b"\x7b"), "another wire type"),
    "a long number": (appended(b"\x78" + b"\xff" * 10), "too long"),
    "a field past the end": (appended(b"\x72\x7f"), "longer than its message"),
    "a name that is no UTF-8": (changed(saved(lambda _: None), lambda raw: raw.replace(b"Relu", b"Rel\xff")), "UTF-8"),
    "outside of its directory": (at("../data"), "in its directory or below"),
    "an absolute path": (at("/data"), "in its directory or below"),
    "the model itself": (at("./model.onnx"), "the model itself"),
    "no location": (at(""), "without one location"),
    "a location twice": (at("data", location_="x"), "without one location"),
    "a strange offset": (at("data", offset="-1"), "another offset"),
    "another length": (at("data", offset="0", length="71"), "got 71 bytes"),
    "a short data file": (at("data", offset="1"), "accepted are at least 73"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_that_cannot_be_locked(tmp_path, case):
    write, words = BAD_MODELS[case]
    path = write(tmp_path)
    (tmp_path / "data").write_bytes(bytes(72))
    refused(path, words)


def test_data_files_beside_the_model(folders):
    plain, locked = locked_one(folders, "onnx, external data")
    assert sorted(contents(folders[1])) == ["model.data", "model.onnx"]
    assert (folders[1] / "model.data").read_bytes() != (folders[0] / "model.data").read_bytes()
    onnx.checker.check_model(str(locked))
    assert session(locked).run(None, {"x": floats(1, 3)})[0].shape == (2, 2)
    before = contents(folders[0])
    for name in ("other.onnx", "model.data"):
        with pytest.raises(SameFileError, match="in another directory"):
            lock_file(plain, folders[0] / name, KEY)
    with pytest.raises(SameFileError, match="in another directory"):
        lock_file(plain, folders[2] / "model.data", KEY)
    assert contents(folders[0]) == before
    assert not contents(folders[2])


def test_tensors_that_share_their_bytes_in_a_data_file(folders):
    plain, locked = (folder / "model.onnx" for folder in folders[:2])
    model = perceptron()
    external = {"location": "data", "offset": "4"}
    for name in ("w", "w2"):
        tensor = TensorProto(name=name, data_type=1, dims=[3, 6], data_location=TensorProto.EXTERNAL)
        for key, value in external.items():
            tensor.external_data.add(key=key, value=value)
        model.graph.initializer.append(tensor)
    del model.graph.initializer[0]
    plain.write_bytes(model.SerializeToString())
    (folders[0] / "data").write_bytes(painted(90).tobytes())
    lock_file(plain, locked, KEY)
    assert "w" in read_header(locked).tensors
    assert "w2" not in read_header(locked).tensors
    unlock_file(locked, folders[2] / "model.onnx", KEY)
    assert contents(folders[2]) == contents(folders[0])


def test_a_model_in_little_memory(tmp_path):
    """What is copied of a model is all but the data of its tensors."""
    model = network([], [initializer("w", np.zeros(1 << 20, np.float32))], {}, {})
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with open(path, "rb") as file:
        skeleton = onnx_skeleton.read_skeleton(file, path.stat().st_size, "model")
    assert skeleton.model.ByteSize() < 200
    (tensor,) = skeleton.model.graph.initializer
    place = onnx_skeleton.place_of(tensor)
    assert place.stop - place.start == 4 << 20
