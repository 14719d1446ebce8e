"""The lock header: one canonical text, and a reader that accepts nothing that the format does not say."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeplock_kernels import reference
from deeplock_kernels.errors import HeaderError
from deeplock_kernels.header import LockHeader, TensorRecord, sbox_field
from deeplock_kernels.passphrases import SCRYPT_COSTS, Scrypt
from deeplock_kernels.sboxes import AES, SBOXES, SBox

SALT, CHECK, SEAL, MAC = "0f" * 16, "1e" * 16, "2d" * 16, "3c" * 32
COUNTER = {
    "format": "deeplock/1",
    "schedule": "counter",
    "sbox": "aes",
    "key_bits": 256,
    "salt": SALT,
    "check": CHECK,
    "tensors": {"ä": {"bytes": 40, "seal": SEAL}, "b": {"bytes": 40, "same_as": "ä"}, "c": {"bytes": 0}},
    "mac": MAC,
}
EXPANSION = {
    "format": "deeplock/1",
    "schedule": "expansion",
    "sbox": {"sha256": "4b" * 32},
    "key_bits": 192,
    "salt": SALT,
    "check": CHECK,
    "tensors": {
        "a": {"bytes": 7, "start": 0},
        "b": {"bytes": 7, "same_as": "a"},
        "c": {"bytes": 10, "start": 7, "seal": SEAL},
    },
}
PASSPHRASE = COUNTER | {"passphrase": {"scrypt": {"n": 131072, "p": 1, "r": 8, "salt": "5a" * 16}}}
BASES = {"counter": COUNTER, "expansion": EXPANSION, "passphrase": PASSPHRASE}
LEAVE_OUT = object()


def text_of(value) -> str:
    return reference.canonical_json(value).decode()


COUNTER_TEXT, EXPANSION_TEXT = text_of(COUNTER), text_of(EXPANSION)


def changed(base: dict, path: tuple[str, ...], value) -> dict:
    result = copy.deepcopy(base)
    place = result
    for key in path[:-1]:
        place = place[key]
    if value is LEAVE_OUT:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return result


def spelled(base: dict, path: tuple[str, ...], spelling: str) -> str:
    """The text with a value that is spelled by hand."""
    return text_of(changed(base, path, "@")).replace('"@"', spelling)


def refusal(text: object) -> str:
    with pytest.raises(HeaderError) as caught:
        LockHeader.from_json(text)
    message = str(caught.value)
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 300
    return message


# Writing and reading


def test_every_field_is_read():
    header = LockHeader.from_json(COUNTER_TEXT)
    assert header == LockHeader(
        schedule="counter",
        sbox="aes",
        key_bits=256,
        salt=bytes.fromhex(SALT),
        check=bytes.fromhex(CHECK),
        tensors={
            "ä": TensorRecord(40, seal=bytes.fromhex(SEAL)),
            "b": TensorRecord(40, same_as="ä"),
            "c": TensorRecord(0),
        },
        mac=bytes.fromhex(MAC),
        format="deeplock/1",
    )
    header = LockHeader.from_json(EXPANSION_TEXT)
    assert (header.schedule, header.sbox, header.key_bits) == ("expansion", {"sha256": "4b" * 32}, 192)
    assert header.mac is None
    assert header.tensors == {
        "a": TensorRecord(7, start=0),
        "b": TensorRecord(7, same_as="a"),
        "c": TensorRecord(10, start=7, seal=bytes.fromhex(SEAL)),
    }
    assert header.passphrase is None
    header = LockHeader.from_json(text_of(PASSPHRASE))
    assert header.passphrase == Scrypt(n=1 << 17, r=8, p=1, salt=b"Z" * 16)


def test_the_text_is_canonical():
    assert LockHeader.from_json(COUNTER_TEXT).to_json() == (
        '{"check":"1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e","format":"deeplock/1","key_bits":256,'
        f'"mac":"{"3c" * 32}","salt":"0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f","sbox":"aes","schedule":"counter",'
        '"tensors":{"b":{"bytes":40,"same_as":"ä"},"c":{"bytes":0},'
        '"ä":{"bytes":40,"seal":"2d2d2d2d2d2d2d2d2d2d2d2d2d2d2d2d"}}}'
    )
    assert LockHeader.from_json(EXPANSION_TEXT).to_json() == EXPANSION_TEXT
    field = f'"passphrase":{{"scrypt":{{"n":131072,"p":1,"r":8,"salt":"{"5a" * 16}"}}}},'
    expected = COUNTER_TEXT.replace('"salt"', f'{field}"salt"', 1)
    assert LockHeader.from_json(text_of(PASSPHRASE)).to_json() == expected


def test_a_header_cannot_be_changed():
    for text in (COUNTER_TEXT, EXPANSION_TEXT):
        header = LockHeader.from_json(text)
        with pytest.raises(dataclasses.FrozenInstanceError):
            header.salt = bytes(16)
        with pytest.raises(AttributeError):
            header.tensors["b"].nbytes = 1
        with pytest.raises(TypeError):
            header.tensors["b"] = TensorRecord(1)
        assert header.to_json() == text
    with pytest.raises(TypeError):
        header.sbox["sha256"] = "00" * 32


def test_a_header_does_not_change_with_what_it_was_made_of():
    sbox, tensors = {"sha256": "4b" * 32}, {"a": TensorRecord(1)}
    header = LockHeader("counter", sbox, 128, bytes(16), bytes(16), tensors)
    text = header.to_json()
    sbox["sha256"] = ""
    tensors["b"] = TensorRecord(1)
    assert header.to_json() == text


@pytest.mark.parametrize("text", [text_of(base) for base in BASES.values()], ids=[*BASES])
def test_pickled_and_copied_it_is_equal_and_cannot_be_changed(text):
    header = LockHeader.from_json(text)
    again = [pickle.loads(pickle.dumps(header, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*again, copy.copy(header), copy.deepcopy(header), dataclasses.replace(header)):
        assert type(other) is LockHeader
        assert other == header
        assert list(other.tensors) == list(header.tensors)
        assert other.to_json() == text
        with pytest.raises(TypeError):
            other.tensors["b"] = TensorRecord(1)


def test_hash():
    header = LockHeader.from_json(EXPANSION_TEXT)
    tensors = dict(reversed(header.tensors.items()))
    same = [LockHeader.from_json(EXPANSION_TEXT), dataclasses.replace(header, tensors=tensors)]
    changes = {"salt": bytes(16), "check": bytes(16), "mac": bytes(32), "key_bits": 256, "tensors": {}}
    others = [dataclasses.replace(header, **{name: value}) for name, value in changes.items()]
    assert {header, *same} == {header}
    assert len({header, *others}) == 1 + len(others)
    assert len({hash(other) for other in (header, *others)}) >= len(others)


def test_tensors_are_in_the_order_of_the_lock_and_sorted_by_name_in_the_text():
    tensors = {name: TensorRecord(1) for name in ("b", "ä", "a", "Z")}
    header = LockHeader("counter", "aes", 128, bytes(16), bytes(16), tensors)
    assert list(header.tensors) == ["b", "ä", "a", "Z"]
    again = LockHeader.from_json(header.to_json())
    assert list(again.tensors) == ["Z", "a", "b", "ä"]
    assert again == header


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
sizes = st.integers(0, 2**40) | st.just(0)
seals = st.none() | st.binary(min_size=16, max_size=16)


@st.composite
def headers(draw):
    schedule = draw(st.sampled_from(["counter", "expansion"]))
    tensors, start = {}, 0
    for name in draw(st.lists(names, unique=True, max_size=6)):
        roots = [other for other, record in tensors.items() if record.same_as is None]
        root = draw(st.none() | st.sampled_from(roots)) if roots else None
        if root is None:
            position = start if schedule == "expansion" else None
            tensors[name] = TensorRecord(draw(sizes), position, seal=draw(seals))
            start += tensors[name].nbytes
        else:
            tensors[name] = TensorRecord(tensors[root].nbytes, same_as=root)
    digests = st.fixed_dictionaries({"sha256": st.binary(min_size=32, max_size=32).map(bytes.hex)})
    costs = (st.sampled_from(accepted) for accepted in SCRYPT_COSTS.values())
    passphrase = draw(st.none() | st.builds(Scrypt, *costs, st.binary(min_size=16, max_size=16)))
    return LockHeader(
        schedule=schedule,
        sbox=draw(st.sampled_from(list(SBOXES)) | digests),
        key_bits=draw(st.sampled_from([128, 192, 256] if passphrase is None else [256])),
        passphrase=passphrase,
        salt=draw(st.binary(min_size=16, max_size=16)),
        check=draw(st.binary(min_size=16, max_size=16)),
        tensors=tensors,
        mac=draw(st.none() | st.binary(min_size=32, max_size=32)),
    )


@given(headers())
def test_writing_and_reading_gives_the_same(header):
    text = header.to_json()
    assert text.encode() == reference.canonical_json(json.loads(text))
    again = LockHeader.from_json(text)
    assert again == header
    assert again.to_json() == text


def test_what_a_header_says_of_an_s_box():
    for name, box in SBOXES.items():
        assert sbox_field(box) == name
        assert LockHeader.from_json(text_of(COUNTER | {"sbox": name})).sbox == name
    own = SBox(bytes(range(255, -1, -1)))
    assert sbox_field(own) == {"sha256": own.sha256}
    assert sbox_field(AES.inverse) == {"sha256": AES.inverse.sha256}


# Refusing


@pytest.mark.parametrize("base", BASES)
def test_a_field_that_is_missing(base):
    for field in COUNTER.keys() - {"mac"}:  # a passphrase need not be there either
        assert f"header: {field} missing" in refusal(text_of(changed(BASES[base], (field,), LEAVE_OUT)))
    for name in BASES[base]["tensors"]:
        where = f"tensors[{name!a}]: bytes missing"
        assert where in refusal(text_of(changed(BASES[base], ("tensors", name, "bytes"), LEAVE_OUT)))
    assert "sbox: sha256 missing" in refusal(text_of(BASES[base] | {"sbox": {}}))
    assert "missing" in refusal("{}")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("field", ["Format", "version", "", "name", "iv", "Ω\n"])
def test_a_field_that_is_unknown(base, field):
    value = BASES[base]
    words = f"got the unknown field {field!a}"
    assert f"header: {words}" in refusal(text_of(changed(value, (field,), 1)))
    assert f"tensors['c']: {words}" in refusal(text_of(changed(value, ("tensors", "c", field), 1)))
    digest = {"sha256": "4b" * 32, field: 1}
    assert f"sbox: {words}" in refusal(text_of(value | {"sbox": digest}))


def twice(text: str, key: str, value: str) -> str:
    quoted = json.dumps(key, ensure_ascii=False)
    assert f"{quoted}:" in text
    return text.replace(f"{quoted}:", f"{quoted}:{value},{quoted}:", 1)


@pytest.mark.parametrize("base", BASES)
def test_a_field_that_stands_there_twice(base):
    value = BASES[base]
    text = text_of(value)
    for field, content in value.items():
        for first in (text_of(content), "0", "{}"):
            assert f"{field!a} twice" in refusal(twice(text, field, first))
    for name, record in value["tensors"].items():
        assert f"{name!a} twice" in refusal(twice(text, name, text_of(record)))
        for field, content in record.items():
            assert f"{field!a} twice" in refusal(twice(text, field, text_of(content)))
    assert "'sha256' twice" in refusal(twice(EXPANSION_TEXT, "sha256", '"' + "4b" * 32 + '"'))
    # also where the second one is spelled otherwise, and in a place that is unknown anyway
    assert "'salt' twice" in refusal(text.replace('"salt":', f'"s\\u0061lt":"{SALT}","salt":'))
    assert "'x' twice" in refusal(text.replace("{", '{"y":[{"x":1,"x":1}],', 1))


WRONG_NUMBERS = [
    "true", "false", "null", '"8"', "[8]", "{}", "8.0", "8e0", "1E400", "-1", "NaN", "Infinity", "-Infinity",
    str(2**63), str(2**64), f"-{10**30}", "1" + "0" * 4000, "1" + "0" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("spelling", WRONG_NUMBERS, ids=lambda spelling: spelling[:12])
def test_what_is_no_length_and_no_start(spelling):
    refusal(spelled(COUNTER, ("tensors", "c", "bytes"), spelling))
    refusal(spelled(EXPANSION, ("tensors", "c", "bytes"), spelling))
    refusal(spelled(EXPANSION, ("tensors", "c", "start"), spelling))
    refusal(spelled(COUNTER, ("key_bits",), spelling))


def test_minus_zero_is_another_spelling_of_a_number():
    refusal(spelled(COUNTER, ("tensors", "c", "bytes"), "-0"))
    refusal(spelled(EXPANSION, ("tensors", "a", "start"), "-0"))


@pytest.mark.skipif(not hasattr(sys, "set_int_max_str_digits"), reason="this Python has no such limit")
def test_huge_numbers_where_python_has_no_limit():
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        for path in (("key_bits",), ("tensors", "c", "bytes"), ("tensors", "c", "start")):
            refusal(spelled(EXPANSION, path, "1" + "0" * 5000))
    finally:
        sys.set_int_max_str_digits(limit)


def test_lengths_up_to_the_largest():
    largest = 2**63 - 1
    text = text_of(changed(COUNTER, ("tensors", "c", "bytes"), largest))
    assert LockHeader.from_json(text).tensors["c"].nbytes == largest
    assert "tensors['c']" in refusal(text_of(changed(EXPANSION, ("tensors", "c", "bytes"), largest)))


@pytest.mark.parametrize("bits", [100, 0, 1, 127, 129, 160, 255, 257, 512])
def test_other_key_lengths(bits):
    assert "key_bits: got " in refusal(text_of(COUNTER | {"key_bits": bits}))


@pytest.mark.parametrize(
    "value", ["deeplock/2", "deeplock/1 ", "Deeplock/1", "deeplock", "", 1, True, None, [], {}]
)
def test_other_formats(value):
    assert refusal(text_of(COUNTER | {"format": value})).startswith("format: got ")


@pytest.mark.parametrize("value", ["Counter", "ctr", "", "counter\0", 1, None, [], {}, ["counter"]])
def test_other_schedules(value):
    assert refusal(text_of(COUNTER | {"schedule": value})).startswith("schedule: got ")


@pytest.mark.parametrize(
    "value",
    [
        "AES", "aes ", "", "none", "aes_inverse", None, 1, True, [], ["aes"], {"sha256": 1}, {"sha256": None},
        {"sha256": "4B" * 32}, {"sha256": "4b" * 31}, {"sha256": "4b" * 33}, {"SHA256": "4b" * 32},
    ],
    ids=text_of,
)  # fmt: skip
def test_other_s_boxes(value):
    assert refusal(text_of(COUNTER | {"sbox": value})).startswith("sbox")


SCRYPT = ("passphrase", "scrypt")


@pytest.mark.parametrize("n", [1 << bits for bits in range(14, 19)])
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_the_costs_of_scrypt_that_are_accepted(n, p):
    value = changed(changed(PASSPHRASE, (*SCRYPT, "n"), n), (*SCRYPT, "p"), p)
    assert LockHeader.from_json(text_of(value)).passphrase[:3] == (n, 8, p)


WRONG_COSTS = {
    "n": [0, 1, 2, 8192, 16383, 16385, 524288, 1 << 20, 1 << 62, -16384, "16384", True, None, [], {}],
    "r": [0, 1, 7, 9, 16, 1 << 30, -8, "8", True, None],
    "p": [0, 5, 16, 1 << 30, -1, "1", True, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_COSTS.items() for value in values])
def test_other_costs_of_scrypt(name, value):
    """Neither ones that would be for nothing, nor ones that would take gigabytes or minutes."""
    assert f"passphrase.scrypt.{name}: got " in refusal(text_of(changed(PASSPHRASE, (*SCRYPT, name), value)))


@pytest.mark.parametrize("spelling", ["131072.0", "1.31072e5", "0131072", "+131072", "-0", "NaN", "1" + "0" * 100])
def test_costs_have_one_spelling(spelling):
    refusal(spelled(PASSPHRASE, (*SCRYPT, "n"), spelling))


@pytest.mark.parametrize("value", [None, 1, True, "", "scrypt", [], {}, {"Scrypt": {}}, {"argon2": {}}])
def test_other_ways_from_a_passphrase(value):
    assert refusal(text_of(COUNTER | {"passphrase": value})).startswith("passphrase: ")
    if value != {}:
        assert refusal(text_of(COUNTER | {"passphrase": {"scrypt": value}})).startswith("passphrase.scrypt: ")


def test_the_fields_of_scrypt():
    for field in ("n", "r", "p", "salt"):
        place = (*SCRYPT, field)
        assert f"passphrase.scrypt: {field} missing" in refusal(text_of(changed(PASSPHRASE, place, LEAVE_OUT)))
        text = text_of(PASSPHRASE)
        start = text.index('"passphrase"')
        assert f"{field!a} twice" in refusal(text[:start] + twice(text[start:], field, "8"))
    assert "got the unknown field 'dklen'" in refusal(text_of(changed(PASSPHRASE, (*SCRYPT, "dklen"), 32)))
    assert "got the unknown field 'argon2'" in refusal(text_of(changed(PASSPHRASE, ("passphrase", "argon2"), {})))


@pytest.mark.parametrize("bits", [128, 192])
def test_a_passphrase_makes_keys_of_one_length(bits):
    assert refusal(text_of(PASSPHRASE | {"key_bits": bits})) == f"key_bits: got {bits}, accepted is 256 beside a passphrase"


HEX_FIELDS = [
    (COUNTER, ("salt",)),
    (EXPANSION, ("check",)),
    (COUNTER, ("mac",)),
    (COUNTER, ("tensors", "ä", "seal")),
    (EXPANSION, ("tensors", "c", "seal")),
    (EXPANSION, ("sbox", "sha256")),
    (PASSPHRASE, (*SCRYPT, "salt")),
]


@pytest.mark.parametrize(
    ("base", "path"), HEX_FIELDS, ids=lambda value: ".".join(value) * isinstance(value, tuple)
)
def test_hexadecimal_digits_have_one_spelling(base, path):
    place = base
    for key in path:
        place = place[key]
    right = "ab" * (len(place) // 2)
    LockHeader.from_json(text_of(changed(base, path, right)))
    for wrong in [
        right.upper(), right[:-1] + "B", right[:-1], right[:-2], right + "a", right + "ab", "",
        "0x" + right[2:],
        right[:-1] + "g", right[:-1] + " ", " " + right[1:], right[:-1] + "\n", right[:-1] + "٣",
        right[:-1] + "\0",
        right[:-2] + "١٢", None, True, 0, int(right[:8], 16), [right], {"hex": right},
    ]:  # fmt: skip
        message = refusal(text_of(changed(base, path, wrong)))
        assert path[-1] in message
        assert " lowercase hexadecimal digits" in message


@pytest.mark.parametrize("value", [None, True, 1, "ä", [], [{"bytes": 40}], ["ä"]], ids=text_of)
def test_what_is_no_tensors(value):
    assert refusal(text_of(COUNTER | {"tensors": value})).startswith("tensors: got ")
    assert refusal(text_of(changed(COUNTER, ("tensors", "c"), value))).startswith("tensors['c']: got ")


SAME_AS = {
    "a name that is missing": ("b", {"bytes": 40, "same_as": "x"}),
    "another spelling of the name": ("b", {"bytes": 40, "same_as": "a\u0308"}),
    "itself": ("b", {"bytes": 40, "same_as": "b"}),
    "itself, of no bytes": ("c", {"bytes": 0, "same_as": "c"}),
    "a chain": ("c", {"bytes": 40, "same_as": "b"}),
    "a circle": ("ä", {"bytes": 40, "same_as": "b"}),
    "a shorter one": ("b", {"bytes": 41, "same_as": "ä"}),
    "a longer one": ("b", {"bytes": 0, "same_as": "ä"}),
    "beside a start": ("b", {"bytes": 40, "same_as": "ä", "start": 0}),
    "beside a seal": ("b", {"bytes": 40, "same_as": "ä", "seal": SEAL}),
    "a number": ("b", {"bytes": 40, "same_as": 1}),
    "true": ("b", {"bytes": 40, "same_as": True}),
    "null": ("c", {"bytes": 0, "same_as": None}),
    "a list": ("b", {"bytes": 40, "same_as": ["ä"]}),
    "an object": ("b", {"bytes": 40, "same_as": {}}),
}


@pytest.mark.parametrize("case", SAME_AS)
def test_same_as_names_a_tensor_of_its_own_bytes(case):
    name, record = SAME_AS[case]
    message = refusal(text_of(changed(COUNTER, ("tensors", name), record)))
    assert message.startswith(
        ("tensors['b']", "tensors['\\xe4']") if case == "a circle" else f"tensors[{name!a}]"
    )
    assert "same_as" in message


def test_same_as_with_the_expansion_schedule():
    for record in [
        {"bytes": 7, "same_as": "a", "start": 0},
        {"bytes": 7, "same_as": "a", "start": 17},
        {"bytes": 7, "same_as": "c"},
        {"bytes": 7, "same_as": None, "start": 17},
    ]:
        assert "tensors['b']" in refusal(text_of(changed(EXPANSION, ("tensors", "b"), record)))


def test_start_belongs_to_the_expansion_schedule():
    for name in ("ä", "c"):
        assert "start belongs to" in refusal(text_of(changed(COUNTER, ("tensors", name, "start"), 0)))
    for name in ("a", "c"):
        assert "start belongs to" in refusal(
            text_of(changed(EXPANSION, ("tensors", name, "start"), LEAVE_OUT))
        )
    refusal(text_of(COUNTER | {"schedule": "expansion"}))
    refusal(text_of(EXPANSION | {"schedule": "counter"}))


@pytest.mark.parametrize(
    "starts",
    [(1, 8), (0, 6), (0, 8), (0, 0), (7, 7), (0, 2**40), (2**62, 2**62 + 7), (2**63 - 17, 2**63 - 10)],
)
def test_tensors_follow_each_other_in_the_one_key_stream(starts):
    """Only then is no key byte used twice, and no start costs more than the tensors before it."""
    value = copy.deepcopy(EXPANSION)
    for name, start in zip("ac", starts, strict=True):
        value["tensors"][name]["start"] = start
    refusal(text_of(value))


def test_tensors_follow_each_other_in_any_order_of_names():
    value = copy.deepcopy(EXPANSION)
    value["tensors"]["c"]["start"], value["tensors"]["a"]["start"] = 0, 10
    value["tensors"]["d"] = {"bytes": 0, "start": 10}
    value["tensors"]["0"] = {"bytes": 0, "start": 17}
    value["tensors"]["A"] = {"bytes": 0, "start": 0}
    assert LockHeader.from_json(text_of(value)).tensors["a"] == TensorRecord(7, start=10)


@pytest.mark.parametrize("value", [None, b"{}", bytearray(b"{}"), 3, COUNTER, [], LockHeader], ids=type)
def test_what_is_no_text(value):
    assert "accepted is JSON text" in refusal(value)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "null", "true", "3", "-1", '"x"', "[]", "[{}]", "nan", "NaN", "{", "}", '{"format"}',
        "\ufeff" + COUNTER_TEXT, COUNTER_TEXT[:-1], COUNTER_TEXT + "}", COUNTER_TEXT + ",",
        COUNTER_TEXT + "\0",
        COUNTER_TEXT * 2, COUNTER_TEXT.replace('"', "'"), COUNTER_TEXT[:-1] + ",}", f"[{COUNTER_TEXT}]",
        json.dumps(COUNTER_TEXT), "{//\n" + COUNTER_TEXT[1:], COUNTER_TEXT.replace("256", "0256"),
        COUNTER_TEXT.replace("256", "+256"), COUNTER_TEXT.replace("256", "0x100"),
        COUNTER_TEXT.replace("256", "2_5_6"), COUNTER_TEXT.replace("256", "２５６"),
        COUNTER_TEXT.replace("ä", "\x01"), COUNTER_TEXT.replace("ä", "\n"),
        COUNTER_TEXT.replace("ä", "\\x41"),
    ],
    ids=lambda text: ascii(text)[:25],
)  # fmt: skip
def test_what_is_no_json_object(text):
    refusal(text)


@pytest.mark.parametrize("bomb", ["[", '{"a":', '[{"a":', "[[],"])
@pytest.mark.parametrize("place", ["", '{"format":', '{"tensors":{"a":{"bytes":', '{"sbox":{"sha256":'])
def test_deep_nesting(place, bomb):
    refusal(place + bomb * 200_000)


@pytest.mark.parametrize("code", ["d800", "dfff"])
@pytest.mark.parametrize("escaped", [True, False])
def test_lone_surrogates_are_no_text(code, escaped):
    surrogate = f"\\u{code}" if escaped else chr(int(code, 16))
    for base in (COUNTER, EXPANSION):
        refusal(text_of(changed(base, ("tensors", "@"), {"bytes": 0})).replace("@", surrogate))
        refusal(text_of(changed(base, ("@",), 1)).replace("@", surrogate))
        refusal(text_of(changed(base, ("tensors", "b", "same_as"), "@")).replace("@", surrogate))
        refusal(text_of(changed(base, ("salt",), "@")).replace("@", surrogate))
    refusal(COUNTER_TEXT.replace("ä", surrogate))  # the name of a tensor and its copy's same_as alike


def test_a_pair_of_surrogates_is_a_character():
    text = COUNTER_TEXT.replace("ä", "\\ud83d\\ude00")
    assert LockHeader.from_json(text) == LockHeader.from_json(COUNTER_TEXT.replace("ä", "😀"))


# Changing anything


REPLACEMENTS = '"\\{}[]:, 0123489-+.eEabfgAnrstuy_/\t\n\0\x7f\ud800äΩ'


@pytest.mark.parametrize("base", BASES)
def test_every_change_of_one_character_is_noticed(base):
    """It is refused, or gives another header; only the freedoms of JSON remain: white space, and `\\/` for `/`."""
    text = text_of(BASES[base])
    header = LockHeader.from_json(text)
    accepted = 0
    for i in range(len(text) + 1):
        variants = [(text[:i] + character + text[i:], character) for character in REPLACEMENTS]
        if i < len(text):
            variants.append((text[:i] + text[i + 1 :], None))
            variants += [
                (text[:i] + character + text[i + 1 :], None)
                for character in REPLACEMENTS
                if character != text[i]
            ]
        for variant, inserted in variants:
            try:
                found = LockHeader.from_json(variant)
            except HeaderError:
                continue
            accepted += 1
            if found == header:
                assert inserted is not None, variant
                assert inserted in " \t\n" or f"{inserted}{text[i]}" == "\\/", variant
            else:
                assert LockHeader.from_json(found.to_json()) == found, variant
    assert accepted > 1000  # other digits of the salt, for one


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
places = st.sampled_from(
    [(base, (field,)) for base, value in BASES.items() for field in value]
    + [(base, ("tensors", name)) for base, value in BASES.items() for name in value["tensors"]]
    + [
        (base, ("tensors", name, field))
        for base, value in BASES.items()
        for name, record in value["tensors"].items()
        for field in record
    ]
)


@given(places, anything, st.booleans())
def test_any_value_in_any_place(place, value, escaped):
    base, path = place
    text = json.dumps(changed(BASES[base], path, value), ensure_ascii=escaped)
    try:
        found = LockHeader.from_json(text)
    except HeaderError:
        return
    assert found.to_json().encode() == reference.canonical_json(json.loads(text))


@given(st.text(max_size=50) | anything.map(json.dumps))
def test_any_text(text):
    refusal(text)
