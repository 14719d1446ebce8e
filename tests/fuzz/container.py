"""Files of any bytes, read by the container's parser and by the safetensors library; lock headers put in and taken out.

A case is a whole file.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from random import Random
from typing import Any

import safetensors

from deeplock_kernels.checkpoints.formats.safetensors_table import (
    DTYPE_BITS,
    ENTRY_KEY,
    Table,
    canonical_text,
    entry,
    insert_entry,
    parse_table,
    read_table,
    remove_entry,
)
from deeplock_kernels.errors import AlreadyLockedError, ContainerError, NotLockedError

from .mutation import mutate_json

KEYS = ("dtype", "shape", "data_offsets", "__metadata__", ENTRY_KEY)
TOKENS = [
    *(f'"{name}"' for name in DTYPE_BITS),
    *('"dtype":', '"shape":[', '"data_offsets":[', '"__metadata__":{', '"deeplock":"', '"deeplock"  :"'),
    *("18446744073709551615", "4294967296", "\\ud800", "\\udc00", "\\u0077", "null", "{}", "[]", "  "),
]
# What the parser says of files that the library accepts (see its docstring).
STRICTER = re.compile(
    r"got the key .* are accepted"
    r"|got a table that starts with|got more text after the table's end"
    r"|got '.'.* '\{' is accepted|dtype: got no string"
)
_PATH = f"/proc/self/fd/{os.memfd_create('case')}"


def run(data: bytes) -> None:
    """Read a file both ways, and lock and unlock its table."""
    try:
        table = _parse(data)
    except ContainerError as error:
        _check_refusal(data, str(error))
        return
    _check_view(table, data)
    with open(_PATH, "wb") as file:
        file.write(data)
    assert read_table(_PATH) == table
    if entry(table) is None:
        for value in ("", table.text[:50]):
            _check_insertion(table, data, value)
        try:
            remove_entry(table)
        except NotLockedError:
            return
        raise AssertionError("a lock header was taken out that was not there")
    _check_removal(table, data)
    try:
        insert_entry(table, "")
    except AlreadyLockedError:
        return
    raise AssertionError("a second lock header was put in")


def mutate(data: bytes, random: Random, mutate_bytes: Callable[[bytes], bytes]) -> bytes:
    """Change the table, and mostly let the length before it and the data behind it fit it."""
    stop = 8 + int.from_bytes(data[:8], "little")
    table, tail = data[8:stop], data[stop:]
    changed = mutate_json(table, random, [*DTYPE_BITS, *KEYS])
    if changed is None or random.random() < 0.5:
        changed = mutate_bytes(table)
    if random.random() < 0.9:
        ends = [int(digits) for digits in re.findall(rb"\d+", changed) if len(digits) < 4]
        tail = tail[: max(ends, default=0)].ljust(random.choice(ends), b"d") if ends else b""
    length = len(changed)
    if random.random() < 0.05:
        length = random.choice([length + 1, random.getrandbits(64)])
    return length.to_bytes(8, "little") + changed + tail


def _parse(data: bytes) -> Table:
    return parse_table(io.BytesIO(data), len(data))


def _check_refusal(data: bytes, message: str) -> None:
    assert message.isprintable(), message
    assert message.startswith("file: "), message
    assert len(message) < 600, message
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return
    if not STRICTER.search(message):
        table = data[8 : 8 + int.from_bytes(data[:8], "little")]
        # Of two values under one key the library looks at the last one only.
        assert _repeats(json.loads(table, object_pairs_hook=list)), message


def _repeats(value: Any) -> bool:
    """Whether an object, given as the list of its members, has a key twice."""
    if isinstance(value, tuple):
        return _repeats(value[1])
    members = [item[0] for item in value if isinstance(item, tuple)] if isinstance(value, list) else []
    return len(members) > len(set(members)) or (isinstance(value, list) and any(map(_repeats, value)))


def _check_view(table: Table, data: bytes) -> None:
    """Names, dtypes, shapes and bytes are those that the library sees."""
    assert data[: table.data_start] == len(table.text.encode()).to_bytes(8, "little") + table.text.encode()
    assert table.data_start + table.data_bytes == len(data)
    try:
        theirs = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        if "unknown variant" in str(error):  # a dtype that this version of the library has not
            return
        raise
    for name, tensor in table.tensors.items():
        found = theirs.pop(name)
        assert (tensor.name, tensor.dtype, list(tensor.shape)) == (name, found["dtype"], found["shape"])
        assert data[table.data_start + tensor.start : table.data_start + tensor.stop] == found["data"]
    assert not theirs


def _check_insertion(table: Table, data: bytes, value: str) -> Table:
    locked_start = insert_entry(table, value)
    locked = _parse(locked_start + data[table.data_start :])
    assert entry(locked) == value
    assert remove_entry(locked) == data[: table.data_start]
    _check_same(table, locked)
    return locked


def _check_removal(locked: Table, data: bytes) -> None:
    start = remove_entry(locked)
    value = entry(locked)
    assert value is not None
    unlocked_data = start + data[locked.data_start :]
    unlocked = _parse(unlocked_data)
    assert entry(unlocked) is None
    _check_same(unlocked, locked)
    again = _check_insertion(unlocked, unlocked_data, value)
    _check_same(again, locked)


def _check_same(one: Table, other: Table) -> None:
    """Two tables differ in their lock header only, and in a multiple of 8 bytes."""
    assert (one.data_start - other.data_start) % 8 == 0
    assert list(one.tensors.items()) == list(other.tensors.items())
    assert canonical_text(one) == canonical_text(other)
