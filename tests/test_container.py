"""The safetensors table: read strictly, never beyond need; a lock header goes in and out without a trace.

The oracle is the `safetensors` library. What it refuses must be refused here; `STRICTER` lists what only we
refuse.
"""

from __future__ import annotations

import io
import json
import os
import re
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import SAFETENSORS_DTYPES

from deeplock_kernels.checkpoints.formats import safetensors_table as container
from deeplock_kernels.checkpoints.formats.safetensors_table import (
    DTYPE_BITS,
    ENTRY_KEY,
    canonical_table,
    entry,
    insert_entry,
    parse_table,
    read_table,
    remove_entry,
)
from deeplock_kernels.errors import (
    AlreadyLockedError,
    ContainerError,
    FileAccessError,
    NotLockedError,
    ParameterError,
)

LOCK_HEADER = '{"format":"deeplock/1","tensors":{"größe \\" \\\\ 重み":{"bytes":4}}}'
W = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'  # "@" in the tables below


def raw_file(table: str | bytes, data: bytes = b"") -> bytes:
    encoded = table.encode() if isinstance(table, str) else table
    return len(encoded).to_bytes(8, "little") + encoded + data


def short_file(table: str, size: int = 4) -> bytes:
    return raw_file(table.replace("@", W), bytes(range(1, size + 1)))


def bytes_tensor(start: int, stop: int) -> str:
    return f'{{"dtype":"U8","shape":[{stop - start}],"data_offsets":[{start},{stop}]}}'


def parse(raw: bytes, source: str = "model.safetensors"):
    return parse_table(io.BytesIO(raw), len(raw), source=source)


def refusal(raw: bytes) -> str:
    with pytest.raises(ContainerError) as caught:
        parse(raw)
    message = str(caught.value)
    assert message.startswith("model.safetensors: got ") or re.match(r"model.safetensors: .*: got ", message)
    assert len(message) < 600
    assert message.isprintable()
    return message


def library_accepts(raw: bytes) -> bool:
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return False
    return True


def library_dtypes() -> list[str]:
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(raw_file('{"a":{"dtype":"none","shape":[],"data_offsets":[0,0]}}'))
    return re.findall(r"`(\w+)`", str(caught.value).split("expected")[1])


LIBRARY_DTYPES = library_dtypes()


def assert_same_view(table, raw: bytes) -> None:
    """Names, dtypes, shapes and bytes are those that the library sees."""
    theirs = dict(safetensors.deserialize(raw))
    assert table.tensors.keys() == theirs.keys()
    for name, tensor in table.tensors.items():
        assert tensor.name == name
        assert (tensor.dtype, list(tensor.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        assert raw[table.data_start + tensor.start : table.data_start + tensor.stop] == theirs[name]["data"]
        assert tensor.nbytes == len(theirs[name]["data"])
    assert table.data_start + table.data_bytes == len(raw)
    assert raw[8 : table.data_start] == table.text.encode()


# Reading


def test_every_dtype_of_the_library_is_known():
    assert set(LIBRARY_DTYPES) <= set(DTYPE_BITS)


@pytest.mark.parametrize("dtype", LIBRARY_DTYPES)
def test_the_size_of_a_dtype_is_the_library_s(dtype):
    size = DTYPE_BITS[dtype]  # 8 elements take as many bytes as one takes bits
    for claimed in (size - 1, size, size + 1):
        table = f'{{"a":{{"dtype":"{dtype}","shape":[2,4],"data_offsets":[0,{claimed}]}}}}'
        raw = raw_file(table, bytes(claimed))
        assert library_accepts(raw) == (claimed == size)
        if claimed == size:
            assert_same_view(parse(raw), raw)
        else:
            assert f"got {claimed} bytes for {dtype}" in refusal(raw)


def test_files_that_the_library_writes(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {
        f"layer.{i}.重み": rng.integers(0, 2, (2, i)).astype(dtype) for i, dtype in enumerate(SAFETENSORS_DTYPES, start=1)
    }
    tensors |= {
        "scalar": np.array(7.0),
        "empty": np.zeros((3, 0, 2), np.float32),
        "": np.ones(3),
        'a\n"b\\': np.ones(1),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "np", "ключ": "värde"})
    table = read_table(path)
    assert_same_view(table, path.read_bytes())
    assert table.metadata == {"format": "np", "ключ": "värde"}
    assert table.source == str(path)
    assert table.tensors["scalar"].shape == ()
    assert table.tensors["empty"].nbytes == 0


def test_tensors_come_in_the_order_of_the_data():
    for at, order in ((4, ["w", "e", "v"]), (0, ["e", "w", "v"]), (8, ["w", "v", "e"])):
        table = f'{{"v":{bytes_tensor(4, 8)},"w":@,"e":{bytes_tensor(at, at)}}}'
        assert list(parse(short_file(table, 8)).tensors) == order


def test_a_table_cannot_be_changed():
    table = parse(short_file('{"__metadata__":{"a":"b"},"w":@}'))
    with pytest.raises(AttributeError):
        table.data_start = 0
    with pytest.raises(AttributeError):
        table.tensors["w"].start = 0
    with pytest.raises(TypeError):
        table.tensors["x"] = table.tensors["w"]
    with pytest.raises(TypeError):
        table.metadata["a"] = "c"


class CountingFile(io.BytesIO):
    """Tells how far it was read."""

    furthest = 0

    def read(self, size=-1, /):
        found = super().read(size)
        self.furthest = max(self.furthest, self.tell())
        return found


def test_the_data_is_not_read():
    raw = raw_file('{"w":{"dtype":"U8","shape":[1000],"data_offsets":[0,1000]}}', bytes(1000))
    file = CountingFile(raw)
    file.seek(17)  # wherever it stands, the table is at its start
    table = parse_table(file, len(raw))
    assert file.furthest == file.tell() == table.data_start


def test_a_claimed_length_is_not_allocated(tmp_path):
    for claim in (51, 99_999_999, 100_000_000, 100_000_001, 2**63, 2**64 - 1):
        raw = claim.to_bytes(8, "little") + b"{" + bytes(49)
        file = CountingFile(raw)
        tracemalloc.start()
        try:
            with pytest.raises(ContainerError, match=r"model: got a table that is too long, .*; at most 50 "):
                parse_table(file, len(raw), source="model")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert file.furthest == 8
        assert peak < 100_000
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(2**40)
    with pytest.raises(ContainerError, match="at most 100000000 are accepted"):
        read_table(path)


@pytest.mark.parametrize("bomb", ["[", '{"a":', '[{"a":', "[[],"])
@pytest.mark.parametrize("place", ["", '{"a":', '{"a":{"shape":', '{"a":{"x":', '{"__metadata__":{"a":'])
def test_nesting_costs_neither_stack_nor_memory(place, bomb):
    raw = raw_file(place + bomb * 200_000)
    tracemalloc.start()
    try:
        refusal(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(raw) + 100_000


def test_a_table_may_be_as_large_as_the_limit(monkeypatch):
    monkeypatch.setattr(container, "MAX_TABLE_BYTES", 200)
    table = f'{{"w":{W}}}'
    fits = raw_file(table.ljust(200), bytes(4))
    assert_same_view(parse(fits), fits)
    assert "at most 200 are accepted" in refusal(raw_file(table.ljust(201), bytes(4)))


# Refusing

HOSTILE = {
    "array": "[]",
    "number": "1",
    "nothing": "",
    "byte order mark": "\ufeff{}",
    "only a brace": "{",
    "text after the end": "{}x",
    "two objects": "{}{}",
    "NUL padding": "{}\0\0",
    "comma first": '{,"w":@}',
    "comma last": '{"w":@,}',
    "no comma": '{"w":@"v":@}',
    "no colon": '{"w"@}',
    "single quotes": "{'w':@}",
    "name not quoted": "{w:@}",
    "vertical tab": '{\v"w":@}',
    "form feed": '{"w"\f:@}',
    "no-break space": '{"w":\u00a0@}',
    "line separator": '{"w":@\u2028}',
    "comment": '{/**/"w":@}',
    "control character in a name": '{"w\n":@}',
    "broken escape in a name": '{"\\x":@}',
    "short escape in a name": '{"\\u12":@}',
    "name without end": '{"w',
    "lone high surrogate": '{"\\ud800":@}',
    "lone low surrogate": '{"\\udc00":@}',
    "surrogates reversed": '{"\\udc00\\ud800":@}',
    "tensor is null": '{"w":null}',
    "tensor is a number": '{"w":1}',
    "tensor is a string": '{"w":"F32"}',
    "tensor is empty": '{"w":{}}',
    "no dtype": '{"w":{"shape":[1],"data_offsets":[0,4]}}',
    "no shape": '{"w":{"dtype":"F32","data_offsets":[0,4]}}',
    "no offsets": '{"w":{"dtype":"F32","shape":[1]}}',
    "dtype twice": '{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "dtype unknown": '{"w":{"dtype":"F128","shape":[1],"data_offsets":[0,4]}}',
    "dtype in lower case": '{"w":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}}',
    "dtype is null": '{"w":{"dtype":null,"shape":[1],"data_offsets":[0,4]}}',
    "dtype is a number": '{"w":{"dtype":32,"shape":[1],"data_offsets":[0,4]}}',
    "shape is null": '{"w":{"dtype":"F32","shape":null,"data_offsets":[0,4]}}',
    "shape is a number": '{"w":{"dtype":"F32","shape":1,"data_offsets":[0,4]}}',
    "shape is an object": '{"w":{"dtype":"F32","shape":{"0":1},"data_offsets":[0,4]}}',
    "shape without end": '{"w":{"dtype":"F32","shape":[1',
    "shape ends in a brace": '{"w":{"dtype":"F32","shape":[1},"data_offsets":[0,4]}}',
    "shape too large for its bytes": '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
    "shape too small for its bytes": '{"w":{"dtype":"U8","shape":[3],"data_offsets":[0,4]}}',
    "product of 2**64": '{"w":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,4]}}',
    "product of 2**64 + 4": '{"w":{"dtype":"U8","shape":[4,4611686018427387905],"data_offsets":[0,4]}}',
    "bits of no whole byte": '{"w":{"dtype":"F4","shape":[7],"data_offsets":[0,4]}}',
    "bits of no whole byte, rounded down": '{"w":{"dtype":"F4","shape":[9],"data_offsets":[0,4]}}',
    "offset alone": '{"w":{"dtype":"F32","shape":[1],"data_offsets":[4]}}',
    "offsets empty": '{"w":{"dtype":"F32","shape":[1],"data_offsets":[]}}',
    "offsets of three": '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}',
    "offsets reversed": '{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
    "offsets are strings": '{"w":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}',
    "hole at the start": '{"w":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}',
    "hole at the end": '{"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
    "no tensor for the data": "{}",
    "past the end": '{"w":{"dtype":"U8","shape":[5],"data_offsets":[0,5]}}',
    "metadata is a string": '{"__metadata__":"a","w":@}',
    "metadata is an array": '{"__metadata__":[],"w":@}',
    "metadata holds a number": '{"__metadata__":{"a":1},"w":@}',
    "metadata holds null": '{"__metadata__":{"a":null},"w":@}',
    "metadata holds an object": '{"__metadata__":{"a":{"b":"c"}},"w":@}',
    "metadata is a tensor": '{"__metadata__":@}',
    "metadata twice": '{"__metadata__":{},"__metadata__":{},"w":@}',
    "metadata with a lone surrogate": '{"__metadata__":{"a":"\\ud800"},"w":@}',
}
NO_INTEGERS = [
    "-1",
    "-0",
    "+4",
    "1.0",
    "1e0",
    "4.0",
    "04",
    "0x4",
    "4_",
    "٤",
    "4 4",
    ",",
    "4,",
    "true",
    "false",
    "null",
]
NO_INTEGERS += ["NaN", "Infinity", "-Infinity", '"4"', "[4]", "{}", "18446744073709551616", "9" * 5000]
for number in NO_INTEGERS:
    HOSTILE[f"{number} in shape"] = f'{{"w":{{"dtype":"U8","shape":[{number}],"data_offsets":[0,4]}}}}'
    HOSTILE[f"{number} as offset"] = f'{{"w":{{"dtype":"U8","shape":[4],"data_offsets":[0,{number}]}}}}'
OVERLAPS_AND_HOLES = [
    ((0, 2), (1, 4)),
    ((0, 4), (0, 4)),
    ((0, 4), (1, 3)),
    ((0, 4), (2, 2)),
    ((0, 1), (2, 4)),
    ((1, 2), (2, 4)),
    ((0, 2), (2, 3)),
    ((0, 4), (5, 5)),
    ((0, 4), (4, 5)),
]
for first, second in OVERLAPS_AND_HOLES:
    HOSTILE[f"{second} after {first}"] = f'{{"v":{bytes_tensor(*first)},"w":{bytes_tensor(*second)}}}'

STRICTER = {
    "name twice": '{"w":@,"w":@}',
    "name twice by an escape": '{"w":@,"\\u0077":@}',
    "metadata key twice": '{"__metadata__":{"a":"1","a":"1"},"w":@}',
    "metadata is null": '{"__metadata__":null,"w":@}',
    "unknown key": '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"strides":[1]}}',
    "tensor as an array": '{"w":["F32",[1],[0,4]]}',
    "dtype as an object": '{"w":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}',
    "white space first": ' {"w":@}',
    "line end last": '{"w":@}\n',
    "tab last": '{"w":@}  \t',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_the_library_refuses_is_refused(case):
    raw = short_file(HOSTILE[case])
    assert not library_accepts(raw)
    refusal(raw)


@pytest.mark.parametrize("case", STRICTER)
def test_what_only_we_refuse(case):
    refusal(short_file(STRICTER[case]))


@pytest.mark.parametrize("case", HOSTILE | STRICTER)
def test_a_tensor_of_the_usual_spelling_is_refused_as_of_any_other(case, monkeypatch):
    raw = short_file((HOSTILE | STRICTER)[case])
    message = refusal(raw)
    monkeypatch.setattr(container._Scanner, "plain_fields", lambda _scanner: None)
    assert refusal(raw) == message


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**19 - 1) | st.just(10**19), max_size=4), st.integers(0, 2**64), st.integers(0, 2**64))
def test_a_tensor_of_the_usual_spelling_is_read_as_of_any_other(shape, start, stop):
    scanner = container._Scanner(
        f'{{"dtype":"F32","shape":{json.dumps(shape, separators=(",", ":"))},"data_offsets":[{start},{stop}]}} ', "file"
    )
    found = scanner.plain_fields()
    if max(*shape, start, stop) < 10**19:
        assert scanner.at == len(scanner.text) - 1
        assert found == ("F32", tuple(shape), (start, stop))
    else:
        assert found is None  # and the other way of reading says whether that is too large


@pytest.mark.parametrize(
    ("shape", "accepted", "words"),
    [
        ("4294967296,4294967296,0", False, "fewer than 2**64 elements"),
        ("0,4294967296,4294967296", True, ""),
        ("0,18446744073709551615", True, ""),
        ("0,18446744073709551616", False, "below 2**64"),
    ],
)
def test_huge_shapes_of_nothing(shape, accepted, words):
    """Products are taken in the library's order, so that what it refuses is refused here."""
    raw = raw_file(f'{{"w":{{"dtype":"U8","shape":[{shape}],"data_offsets":[0,0]}}}}')
    assert library_accepts(raw) == accepted
    if accepted:
        assert_same_view(parse(raw), raw)
    else:
        assert words in refusal(raw)


def test_a_message_names_the_cause_that_comes_first():
    assert "got data_offsets [4, 0]" in refusal(short_file(HOSTILE["offsets reversed"]))
    assert "got 7 bytes; at least 8 are accepted" in refusal(bytes(7))
    assert "got dtype 'F128'" in refusal(short_file(HOSTILE["dtype unknown"]))
    assert "got no shape" in refusal(short_file(HOSTILE["no shape"]))
    assert "got the key 'w' twice" in refusal(short_file(STRICTER["name twice"]))


@pytest.mark.parametrize(
    "table", [b'{"\xff":1}', b"{\xc3", '{"\ud800":1}'.encode("utf-8", "surrogatepass"), b"\xc0\xbb"]
)
def test_bytes_that_are_not_utf_8_are_refused(table):
    assert "UTF-8" in refusal(raw_file(table))


def test_messages_name_file_and_tensor_and_stay_short():
    name = json.dumps("x" * 100_000 + "\x1b[2J")
    table = f'{{{name}:{{"dtype":{name},"shape":[1],"data_offsets":[0,4]}}}}'
    assert refusal(raw_file(table)).startswith("model.safetensors: tensor 'xxx")
    table = f'{{"w":{{"dtype":"F32","shape":[1{",1" * 9999}],"data_offsets":[0,5]}}}}'
    assert "[1, 1, 1, 1, 1, 1, 1, 1, ...]" in refusal(raw_file(table))


SMALL = short_file(f'{{"__metadata__":{{"a":"b"}},"w":@,"v":{bytes_tensor(4, 8)}}}   ', 8)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    data_start = parse(SMALL).data_start
    for length in range(len(SMALL)):
        refusal(SMALL[:length])
        path.write_bytes(SMALL[:length])
        with pytest.raises(ContainerError, match=re.escape(str(path))):
            read_table(path)
    for length in range(data_start):  # the file became shorter after its size was asked
        with pytest.raises(ContainerError, match="got an end of file after"):
            parse_table(io.BytesIO(SMALL[:length]), len(SMALL))
    refusal(SMALL + b"\0")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_accepted_the_library_accepts_alike(data):
    table = bytearray(SMALL[8:-8])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(table) - 1))
        byte = data.draw(st.sampled_from(b' \t\n\r{}[]:,"\\0123489-+.eEu_wv\x00\x1f\x7f\x80\xff'))
        change = data.draw(st.sampled_from(["set", "insert", "delete", "flip"]))
        if change == "set":
            table[position] = byte
        elif change == "insert":
            table.insert(position, byte)
        elif change == "flip":
            table[position] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del table[position]
    raw = raw_file(bytes(table), bytes(range(8)))
    try:
        parsed = parse(raw)
    except ContainerError:
        return
    assert_same_view(parsed, raw)


@pytest.mark.parametrize("value", [None, 3, b"model", ["model"], "", "a\0b"])
def test_what_is_no_path_is_refused(value):
    with pytest.raises(ParameterError, match=r"^path: got "):
        read_table(value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileAccessError, match=re.escape(f"{tmp_path}: cannot be read: it is a directory")):
        read_table(tmp_path)
    with pytest.raises(FileAccessError, match="none: cannot be read: no such file") as caught:
        read_table(tmp_path / "none")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileAccessError, match="pipe: cannot be read: it is a device, a pipe"):
        read_table(tmp_path / "pipe")


# The lock header in the table

BEFORE_AND_AFTER = [
    ("{}", '{"__metadata__":{"deeplock":"v" }}'),
    ("{   }", '{"__metadata__":{"deeplock":"v" }   }'),
    ("{}     ", '{"__metadata__":{"deeplock":"v" }}     '),
    ('{"w":@}', '{"__metadata__":{"deeplock":"v"        },"w":@}'),
    ('{ "w":@ } ', '{"__metadata__":{"deeplock":"v"        }, "w":@ } '),
    ('{\n"w" : @\n}', '{"__metadata__":{"deeplock":"v"        },\n"w" : @\n}'),
    ('{"deeplock":@}', '{"__metadata__":{"deeplock":"v"        },"deeplock":@}'),
    ('{"{}重":@}', '{"__metadata__":{"deeplock":"v"        },"{}重":@}'),
    ('{"__metadata__":{}}', '{"__metadata__":{"deeplock"  :"v"}}'),
    ('{"__metadata__":{},"w":@}', '{"__metadata__":{"deeplock"  :"v"},"w":@}'),
    ('{"__metadata__":{   },"w":@}', '{"__metadata__":{"deeplock"  :"v"   },"w":@}'),
    ('{"w":@,"__metadata__":{}}', '{"w":@,"__metadata__":{"deeplock"  :"v"}}'),
    ('{"w":@ , "__metadata__" : { } } ', '{"w":@ , "__metadata__" : {"deeplock"  :"v" } } '),
    ('{"__metadata__":{"a":"b"},"w":@}', '{"__metadata__":{"deeplock" :"v","a":"b"},"w":@}'),
    ('{"w":@,"__metadata__":{ "a":"b" }}', '{"w":@,"__metadata__":{"deeplock" :"v", "a":"b" }}'),
    ('{"\\u005f_metadata__":{"a":"b"}}', '{"\\u005f_metadata__":{"deeplock" :"v","a":"b"}}'),
]


@pytest.mark.parametrize(("before", "after"), BEFORE_AND_AFTER)
def test_where_the_entry_stands(before, after):
    size = 4 * before.count("@")
    table, locked = parse(short_file(before, size)), parse(short_file(after, size))
    assert insert_entry(table, "v") == short_file(after, 0)
    assert entry(locked) == "v"
    assert remove_entry(locked) == short_file(before, 0)
    assert canonical_table(locked) == canonical_table(table)


@pytest.mark.parametrize(
    "before", ["{}", '{"w":@}', '{"__metadata__":{}}', '{"__metadata__":{"a":"b"},"w":@}']
)
def test_a_lock_header_of_any_length(before):
    size = 4 * before.count("@")
    table = parse(short_file(before, size))
    for value in [*("v" * length for length in range(17)), LOCK_HEADER, LOCK_HEADER * 1000]:
        start = insert_entry(table, value)
        locked = parse(start + bytes(size))
        assert entry(locked) == value
        assert len(start) % 8 == table.data_start % 8
        assert remove_entry(locked) == short_file(before, 0)
    assert "größe".encode() in insert_entry(table, LOCK_HEADER)


def test_metadata_that_was_empty_is_told_from_none_at_all():
    without, empty = parse(raw_file("{}")), parse(raw_file('{"__metadata__":{}}'))
    assert without.metadata is None
    assert empty.metadata == {}
    assert canonical_table(without) == canonical_table(empty) == {"__metadata__": {}}
    assert insert_entry(without, "v") != insert_entry(empty, "v")


def test_the_canonical_table():
    table = parse(short_file('{"w":@,"__metadata__":{"deeplock":"x","a":"b"}}'))
    assert canonical_table(table) == {
        "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "__metadata__": {"a": "b"},
    }


white = st.text(" \t\n\r", max_size=3)
name = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@st.composite
def json_strings(draw, text):
    """One of the ways to write a string in JSON."""
    written = json.dumps(text, ensure_ascii=draw(st.booleans()))
    if text.isalnum() and text.isascii() and draw(st.booleans()):
        written = '"' + "".join(f"\\u{ord(character):04X}" for character in text) + '"'
    return written


def write_object(draw, members):
    """An object with white space wherever JSON allows it."""
    written = [
        f"{draw(white)}{draw(json_strings(key))}{draw(white)}:{draw(white)}{value}{draw(white)}"
        for key, value in members
    ]
    return "{" + (",".join(written) or draw(white)) + "}"


@st.composite
def raw_files(draw):
    """A file by a writer with every liberty that the format leaves; also its metadata."""
    members, start = [], 0
    for tensor in draw(st.lists(name.filter(lambda text: text != "__metadata__"), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(LIBRARY_DTYPES))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        if DTYPE_BITS[dtype] % 8:
            shape.insert(draw(st.integers(0, len(shape))), 4)
        stop = start + int(np.prod(shape, dtype=int)) * DTYPE_BITS[dtype] // 8
        lists = [
            f"[{draw(white)}" + f"{draw(white)},{draw(white)}".join(map(str, x)) + "]"
            for x in (shape, [start, stop])
        ]
        fields = [("dtype", json.dumps(dtype)), ("shape", lists[0]), ("data_offsets", lists[1])]
        members.append((tensor, write_object(draw, draw(st.permutations(fields)))))
        start = stop
    metadata = draw(st.none() | st.dictionaries(name.filter(lambda key: key != ENTRY_KEY), name, max_size=3))
    if metadata is not None:
        strings = [(key, draw(json_strings(value))) for key, value in metadata.items()]
        members.append(("__metadata__", write_object(draw, strings)))
    table = write_object(draw, draw(st.permutations(members))) + " " * draw(st.integers(0, 9))
    return raw_file(table, draw(st.binary(min_size=start, max_size=start))), metadata


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw_files(), st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_table_is_locked_and_unlocked_without_a_trace(tmp_path, file, value):
    raw, metadata = file
    table = parse(raw)
    assert_same_view(table, raw)
    assert table.metadata == metadata
    locked_raw = insert_entry(table, value) + raw[table.data_start :]
    locked = parse(locked_raw)
    assert entry(locked) == value
    assert locked.metadata == {**(metadata or {}), ENTRY_KEY: value}
    assert (locked.data_start - table.data_start) % 8 == 0
    assert list(locked.tensors.items()) == list(table.tensors.items())
    assert canonical_table(locked) == canonical_table(table)
    assert remove_entry(locked) == raw[: table.data_start]
    assert_same_view(locked, locked_raw)
    path = tmp_path / "locked.safetensors"
    path.write_bytes(locked_raw)
    with safetensors.safe_open(path, framework="np") as library:
        assert library.metadata() == locked.metadata


@pytest.mark.parametrize("metadata", [None, {}, {"format": "np", "z": "ä"}])
def test_a_file_that_the_library_saved_anew(metadata):
    """Its own writer sorts the tensors by dtype and name, keeps the strings, and leaves no mark of ours."""
    tensors = {"b": np.ones(3, np.float32), "a": np.ones((2, 2), np.uint8)}
    raw = safetensors.numpy.save(tensors, metadata=metadata)
    table = parse(raw)
    again = safetensors.numpy.save(tensors, metadata={**(metadata or {}), ENTRY_KEY: LOCK_HEADER})
    locked = parse(again)
    assert entry(locked) == LOCK_HEADER
    assert canonical_table(locked) == canonical_table(table)
    unlocked = parse(remove_entry(locked) + again[locked.data_start :])
    assert unlocked.metadata == (metadata or None)
    assert unlocked.tensors == table.tensors
    assert unlocked.data_start % 8 == 0


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" , ", " : "), (",\n", ":\t")])
@pytest.mark.parametrize("strings", ["deeplock", "deeplock a", "a deeplock", "a deeplock b"])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("padding", range(8))
def test_a_file_that_another_writer_wrote(separators, strings, order, padding):
    members = [("__metadata__", dict.fromkeys(strings.split(), LOCK_HEADER)), ("w", json.loads(W))]
    text = json.dumps(dict(members[::order]), separators=separators) + " " * padding
    locked = parse(raw_file(text, bytes(4)))
    unlocked = parse(remove_entry(locked) + bytes(4))
    others = dict.fromkeys([key for key in strings.split() if key != ENTRY_KEY], LOCK_HEADER)
    assert unlocked.metadata == (others or None)
    assert unlocked.tensors == locked.tensors
    assert canonical_table(unlocked) == canonical_table(locked)
    assert (unlocked.data_start - locked.data_start) % 8 == 0


def test_locking_twice_and_unlocking_twice_are_refused():
    table = parse(raw_file("{}"), source="m")
    locked = parse(insert_entry(table, ""), source="m")
    assert entry(table) is None
    assert entry(locked) == ""
    with pytest.raises(AlreadyLockedError, match=r"^m: got a file with a lock header"):
        insert_entry(locked, "v")
    with pytest.raises(NotLockedError, match=r"^m: got a file without a lock header"):
        remove_entry(table)
    with pytest.raises(NotLockedError):
        remove_entry(parse(raw_file('{"__metadata__":{}}')))


@pytest.mark.parametrize("value", [None, b"v", 1, "\ud800"])
def test_a_lock_header_is_unicode_text(value):
    with pytest.raises(ParameterError, match=r"^value: got "):
        insert_entry(parse(raw_file("{}")), value)


def test_a_lock_header_that_makes_the_table_too_large(monkeypatch):
    table = parse(raw_file("{}"), source="m")
    size = len(insert_entry(table, "v" * 99)) - 8
    monkeypatch.setattr(container, "MAX_TABLE_BYTES", size)
    insert_entry(table, "v" * 99)
    monkeypatch.setattr(container, "MAX_TABLE_BYTES", size - 1)
    with pytest.raises(
        ContainerError, match=f"^m: got {size} bytes for the table .*; at most {size - 1} are"
    ):
        insert_entry(table, "v" * 99)
