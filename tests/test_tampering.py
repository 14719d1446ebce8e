"""Locked files and headers altered in every place: each change is noticed for what it is, and nothing is changed.

Which error says so depends on what the changed bytes belong to:

| in a file                                              | error                                                |
|--------------------------------------------------------|------------------------------------------------------|
| the table's length; what is no table any more          | ContainerError                                       |
| data of a tensor                                       | TamperedError                                        |
| the key "deeplock"                                     | NotLockedError                                       |
| names of tensors, in the table or the lock header      | HeaderError: the two do not fit each other           |
| other metadata; a shape of as many elements            | TamperedHeaderError                                  |
| the lock header: salt, check                           | WrongKeyError, where they stay lowercase hexadecimal |
| the lock header: seals, mac                            | TamperedHeaderError, where they stay that            |
| the lock header: all else                              | HeaderError                                          |

A header by itself is held against no file: other names and lengths in it are a TamperedHeaderError.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import re

import numpy as np
import pytest
import safetensors.numpy
from support import KEYS, painted

from deeplock_kernels.checkpoints.streaming import lock_file, read_header, unlock_file, verify_file
from deeplock_kernels.errors import (
    ContainerError,
    DeepLockError,
    HeaderError,
    NotLockedError,
    TamperedError,
    TamperedHeaderError,
    WrongKeyError,
)
from deeplock_kernels.header import LockHeader
from deeplock_kernels.tensors import lock_tensors, unlock_tensors, verify_tensors

KEY = KEYS[192]
OLD = b"what the target held before"
HEX_DIGITS = frozenset(b"0123456789abcdef")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A locked file of tensors and metadata, an old target, and files that need not outlive the machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    plain = {
        "w": painted(24).reshape(4, 6),
        "bias": np.zeros(3, np.float32),
        "nothing": np.zeros((0, 7), np.int8),
        "слой": painted(12, 50),
    }
    safetensors.numpy.save_file(plain, tmp_path / "plain", {"x": "y"})
    lock_file(tmp_path / "plain", tmp_path / "locked", KEY)
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "altered").touch()
    return tmp_path


def error_of(function, *arguments):
    try:
        function(*arguments)
    except DeepLockError as error:
        return type(error)
    return None


def errors_of_file(folder, raw):
    """Unlock and verify a file of these bytes; check that the target is as it was, and that nothing lies about."""
    with open(folder / "altered", "r+b") as file:  # anew takes some systems a hundred times as long
        file.write(raw)
        file.truncate()
    found = [
        error_of(unlock_file, folder / "altered", folder / "old", KEY),
        error_of(verify_file, folder / "altered", KEY),
    ]
    with open(folder / "old", "rb") as file:
        assert file.read() == OLD
    assert sorted(os.listdir(folder)) == ["altered", "locked", "old", "plain"]
    return found


def places(text, pattern):
    """Yield the places of the first group of a pattern in bytes."""
    for match in re.finditer(pattern, text, re.DOTALL):
        yield from range(*match.span(1))


def stays_a_string(text, place, new):
    """Say whether a JSON string goes on to its end, and is text, with another byte in it."""
    try:
        (text[:place] + bytes([new]) + text[place + 1 :]).decode()
    except UnicodeDecodeError:
        return False
    return new >= 32 and new not in b'"\\'


class Regions:
    """What the places of a locked file belong to; the first region that claims a place has it."""

    def __init__(self, raw):
        start = 8 + int.from_bytes(raw[:8], "little")
        self.raw, self.table = raw, raw[8:start]
        table = raw[:start]
        ((begin, end),) = (match.span(1) for match in re.finditer(rb'"deeplock" *:"((?:[^"\\]|\\.)*)"', table))
        header = table[begin:end]
        self.of = dict.fromkeys(range(8), "length") | dict.fromkeys(range(start, len(raw)), "data")
        for region, pattern in [
            ("hex of the key", rb'\\"(?:salt|check)\\":\\"(\w+)'),
            ("hex of the lock", rb'\\"(?:seal|mac)\\":\\"(\w+)'),
            ("escape", rb"\\(.)"),
            ("backslash", rb"(\\)"),
            ("header", rb"(.)"),
        ]:
            for place in places(header, pattern):
                self.of.setdefault(begin + place, region)
        for region, pattern in [
            ("key of the header", rb'"(deeplock)" *:'),
            ("metadata", rb'"(x|y)"'),
            ("name", '"(w|bias|nothing|слой)"'.encode()),
            ("free dimension", rb"\[0,(7)\]"),
            ("table", rb"(.)"),
        ]:
            for place in places(table, pattern):
                self.of.setdefault(place, region)
        assert len(self.of) == len(raw)

    def expected(self, place, bit):
        """Say which error a flipped bit has to raise."""
        region, new = self.of[place], self.raw[place] ^ 1 << bit
        if region in ("length", "table", "backslash"):
            return ContainerError
        if region == "data":
            return TamperedError
        if region == "free dimension":
            return TamperedHeaderError if new in b"0123456789" else ContainerError
        if region == "escape":  # what stands there is a quotation mark
            return HeaderError if new == ord("b") else ContainerError
        if not stays_a_string(self.table, place - 8, new):
            return ContainerError
        if region.startswith("hex") and new in HEX_DIGITS:
            return WrongKeyError if region == "hex of the key" else TamperedHeaderError
        return {"key of the header": NotLockedError, "metadata": TamperedHeaderError}.get(region, HeaderError)


def test_every_bit_of_a_locked_file(folder):
    raw = (folder / "locked").read_bytes()
    regions = Regions(raw)
    assert set(regions.of.values()) == {
        "length", "data", "hex of the key", "hex of the lock", "escape", "backslash", "header", "key of the header",
        "metadata", "name", "free dimension", "table",
    }  # fmt: skip
    assert errors_of_file(folder, raw[:-1] + b"\0") == [TamperedError] * 2, "so what follows is no wonder"
    seen = collections.Counter()
    for place, bit in itertools.product(range(len(raw)), range(8)):
        altered = raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]
        wanted = regions.expected(place, bit)
        assert errors_of_file(folder, altered) == [wanted] * 2, (
            place,
            bit,
            regions.of[place],
            altered[place - 20 : place + 20],
        )
        seen[wanted] += 1
    assert set(seen) == {
        ContainerError, HeaderError, NotLockedError, TamperedError, TamperedHeaderError, WrongKeyError
    }  # fmt: skip
    unlock_file(folder / "locked", folder / "old", KEY)
    assert (folder / "old").read_bytes() == (folder / "plain").read_bytes()


def test_every_truncation_and_what_is_added(folder):
    raw = (folder / "locked").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for length in range(len(raw)):
        assert errors_of_file(folder, raw[:length]) == [ContainerError] * 2, length
    for place in (0, 8, start, start + 24, start + 36, len(raw)):
        for more in (b"\0", b" ", b"{}", raw):
            assert errors_of_file(folder, raw[:place] + more + raw[place:]) == [ContainerError] * 2, (place, more)


# A header in memory


def expected_of_header(raw, place, new, lengths, names):
    """Say which error another byte in a header's text has to raise, given the places of what nothing else depends on."""
    for error, fields in ((WrongKeyError, rb"salt|check"), (TamperedHeaderError, rb"seal|mac")):
        if new in HEX_DIGITS and place in places(raw, rb'"(?:%s)":"(\w+)' % fields):
            return error
    if place in lengths and new in (b"0123456789" if place - 1 in lengths else b"123456789"):
        return TamperedHeaderError
    return TamperedHeaderError if place in names and stays_a_string(raw, place, new) else HeaderError


@pytest.mark.parametrize(("schedule", "independent"), [("counter", "bias|слой"), ("expansion", "слой")])
def test_every_bit_of_a_header(schedule, independent):
    """Without a file. Lengths have to fit: of tensors that shared their storage, and of one that lies before another."""
    tensors = {"w": painted(24), "bias": painted(3), "слой": painted(12, 50)}
    tensors["copy"] = tensors["w"]
    header = lock_tensors(tensors, KEY, schedule=schedule)
    locked = {name: tensor.tobytes() for name, tensor in tensors.items()}
    raw = header.to_json().encode()
    lengths = set(places(raw, f'"(?:{independent})":{{"bytes":(\\d+)'.encode()))
    names = set(places(raw, '"(bias|слой|copy)":{'.encode()))
    seen = collections.Counter()
    for place, bit in itertools.product(range(len(raw)), range(8)):
        new = raw[place] ^ 1 << bit
        text = (raw[:place] + bytes([new]) + raw[place + 1 :]).decode("utf-8", "surrogateescape")
        wanted = expected_of_header(raw, place, new, lengths, names)
        for function in (unlock_tensors, verify_tensors):
            found = error_of(lambda text=text, function=function: function(tensors, KEY, LockHeader.from_json(text)))
            assert found is wanted, (place, bit, text[max(0, place - 30) : place + 30])
        seen[wanted] += 1
    assert {name: tensor.tobytes() for name, tensor in tensors.items()} == locked
    assert set(seen) == {HeaderError, TamperedHeaderError, WrongKeyError}
    unlock_tensors(tensors, KEY, LockHeader.from_json(raw.decode()))
    assert tensors["w"].tobytes() == painted(24).tobytes()


# What somebody would change on purpose


def parts_of(raw):
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def put_together(table, data):
    text = json.dumps(table, ensure_ascii=False).encode()
    return len(text).to_bytes(8, "little") + text + data


def header_in(table):
    return json.loads(table["__metadata__"]["deeplock"])


def with_header(change):
    """Make a change of the lock header."""

    def altered(table, data, other):
        header = header_in(table)
        change(header, header_in(other))
        table["__metadata__"]["deeplock"] = json.dumps(header, ensure_ascii=False)
        return table, data

    return altered


def with_table(change):
    """Make a change of the table."""

    def altered(table, data, other):
        change(table)
        return table, data

    return altered


def swap(fields, one, other):
    fields[one], fields[other] = fields[other], fields[one]


def swap_names(table):
    swap(table, "bias", "слой")


def swap_names_in_both(table, data, other):
    """The seals go with the names: the bytes are where they were."""
    swap_names(table)
    return with_header(lambda header, _: swap(header["tensors"], "bias", "слой"))(table, data, other)


def swap_data(table, data, other):
    first, second = table["bias"]["data_offsets"], table["слой"]["data_offsets"]
    pieces = {tuple(place): data[slice(*place)] for place in (first, second)}
    swapped = bytearray(data)
    swapped[slice(*first)], swapped[slice(*second)] = pieces[tuple(second)], pieces[tuple(first)]
    return table, bytes(swapped)


def swap_offsets(table):
    one, other = table["bias"], table["слой"]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


def seal_of_another_tensor(header, _):
    one, other = header["tensors"]["bias"], header["tensors"]["слой"]
    one["seal"], other["seal"] = other["seal"], one["seal"]


CHANGES = {
    "data of two tensors": (swap_data, TamperedError),
    "names of two tensors": (with_table(swap_names), TamperedHeaderError),
    "names of two tensors, in the header too": (swap_names_in_both, TamperedHeaderError),
    "offsets of two tensors": (with_table(swap_offsets), TamperedHeaderError),
    "a dtype": (with_table(lambda table: table["bias"].update(dtype="I32")), TamperedHeaderError),
    "a dtype of another width": (
        with_table(lambda table: table["bias"].update(dtype="F16", shape=[6])), TamperedHeaderError
    ),
    "a shape": (with_table(lambda table: table["w"].update(shape=[6, 4])), TamperedHeaderError),
    "one more dimension": (with_table(lambda table: table["w"].update(shape=[1, 4, 6])), TamperedHeaderError),
    "more metadata": (with_table(lambda table: table["__metadata__"].update(z="")), TamperedHeaderError),
    "less metadata": (with_table(lambda table: table["__metadata__"].pop("x")), TamperedHeaderError),
    "one more tensor": (
        with_table(lambda table: table.update(z={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})), TamperedHeaderError
    ),
    "a tensor less": (with_table(lambda table: table.pop("nothing")), HeaderError),
    "a seal of another tensor": (with_header(seal_of_another_tensor), TamperedHeaderError),
    "a seal of another lock": (
        with_header(lambda header, other: header["tensors"].update(w=other["tensors"]["w"])), TamperedHeaderError
    ),
    "no seal": (with_header(lambda header, _: header["tensors"]["w"].pop("seal")), TamperedHeaderError),
    "no seals": (
        with_header(lambda header, _: [record.pop("seal") for record in header["tensors"].values()]), TamperedHeaderError
    ),
    "no mac": (with_header(lambda header, _: header.pop("mac")), TamperedHeaderError),
    "the mac of another lock": (with_header(lambda header, other: header.update(mac=other["mac"])), TamperedHeaderError),
    "the salt of another lock": (with_header(lambda header, other: header.update(salt=other["salt"])), WrongKeyError),
    "the check of another lock": (with_header(lambda header, other: header.update(check=other["check"])), WrongKeyError),
    "salt and check of another lock": (
        with_header(lambda header, other: header.update(salt=other["salt"], check=other["check"])), TamperedHeaderError
    ),
    "the header of another lock": (with_header(lambda header, other: header.update(other)), TamperedError),
    "another S-Box": (with_header(lambda header, _: header.update(sbox="sm4")), TamperedHeaderError),
    "another key length": (with_header(lambda header, _: header.update(key_bits=256)), WrongKeyError),
    "an older version": (with_header(lambda header, _: header.update(format="deeplock/0")), HeaderError),
    "a newer version": (with_header(lambda header, _: header.update(format="deeplock/2")), HeaderError),
    "another spelling of the version": (with_header(lambda header, _: header.update(format="deeplock/1.0")), HeaderError),
    "a tensor locked as another": (
        with_header(lambda header, _: header["tensors"].update(bias={"bytes": 12, "same_as": "слой"})),
        TamperedHeaderError,
    ),
    "a tensor out of the header": (with_header(lambda header, _: header["tensors"].pop("w")), TamperedHeaderError),
    "a number with a point": (with_header(lambda header, _: header["tensors"]["w"].update(bytes=24.0)), HeaderError),
    "uppercase": (with_header(lambda header, _: header.update(mac=header["mac"].upper())), HeaderError),
    "one more field": (with_header(lambda header, _: header.update(note="")), HeaderError),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_on_purpose(folder, case):
    change, wanted = CHANGES[case]
    raw = (folder / "locked").read_bytes()
    lock_file(folder / "plain", folder / "locked", KEY)
    other, _ = parts_of((folder / "locked").read_bytes())
    table, data = parts_of(raw)
    (folder / "respelled").write_bytes(put_together(table, data))
    verify_file(folder / "respelled", KEY)  # writing it anew is none
    os.unlink(folder / "respelled")
    assert errors_of_file(folder, put_together(*change(table, data, other))) == [wanted] * 2


def test_an_older_file_of_the_same_lock_key_is_no_alteration(folder):
    """Nothing says which of two files is the newer one: SECURITY.md says so."""
    older = (folder / "locked").read_bytes()
    lock_file(folder / "plain", folder / "locked", KEY)
    (folder / "locked").write_bytes(older)
    assert verify_file(folder / "locked", KEY) == read_header(folder / "locked")
