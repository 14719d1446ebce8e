"""The master key and what is made of it: accepted, refused, derived, wiped, and never shown."""

from __future__ import annotations

import base64
import copy
import ctypes
import json
import logging
import os
import pickle
import stat
import traceback
from pathlib import Path

import numpy as np
import pytest
from support import refuse

import deeplock_kernels as deeplock
from deeplock_kernels import errors, reference
from deeplock_kernels.keys import Derivation, MasterKey, key_bytes
from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule, expand_key

SECRETS = {bits: np.random.default_rng(bits).bytes(bits // 8) for bits in (128, 192, 256)}
SALT, IV = bytes(range(200, 216)), bytes(range(50, 66))
VECTORS = json.loads((Path(__file__).parent / "vectors" / "scheme_v1.json").read_text())["tensors"]
each_length = pytest.mark.parametrize("bits", SECRETS)


def master(bits=256) -> MasterKey:
    return MasterKey.from_bytes(SECRETS[bits])


# Made


@each_length
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_from_bytes(bits, kind):
    key = MasterKey.from_bytes(kind(SECRETS[bits]))
    assert key.bits == bits
    assert key_bytes(key) == SECRETS[bits]
    assert isinstance(key_bytes(key), bytes)


def test_from_bytes_takes_a_copy():
    source = bytearray(SECRETS[128])
    key = MasterKey.from_bytes(source)
    source[0] ^= 1
    assert key_bytes(key) == SECRETS[128]
    source[:] = SECRETS[128]
    key.wipe()
    assert source == SECRETS[128]


def test_from_bytes_takes_memory_of_any_shape():
    spread = memoryview(bytearray(b"".join(bytes((byte, 0)) for byte in SECRETS[128])))
    assert key_bytes(MasterKey.from_bytes(spread[::2])) == SECRETS[128]
    assert key_bytes(MasterKey.from_bytes(memoryview(SECRETS[128]).cast("I"))) == SECRETS[128]


@each_length
def test_from_hex(bits):
    key = MasterKey.from_hex(SECRETS[bits].hex())
    assert key.bits == bits
    assert key_bytes(key) == SECRETS[bits]


@each_length
def test_generate(bits):
    keys = {key_bytes(MasterKey.generate(bits)) for _ in range(1000)}
    assert len(keys) == 1000
    assert {len(key) for key in keys} == {int(bits) // 8}
    assert {byte for key in keys for byte in key} == set(range(256))


def test_generate_asks_the_operating_system(monkeypatch):
    asked = []
    monkeypatch.setattr("secrets.token_bytes", lambda count: asked.append(count) or bytes(range(count)))
    assert key_bytes(MasterKey.generate()) == bytes(range(32))
    assert asked == [32]


@each_length
@pytest.mark.parametrize("end", ["", "\n"])
def test_from_file(tmp_path, bits, end):
    path = tmp_path / "key"
    path.write_text(SECRETS[bits].hex() + end)
    path.chmod(0o600)
    for name in (path, str(path)):
        assert key_bytes(MasterKey.from_file(name)) == SECRETS[bits]


@each_length
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_to_file(tmp_path, bits, umask):
    path = tmp_path / "key"
    before = os.umask(umask)
    try:
        master(bits).to_file(path)
    finally:
        os.umask(before)
    assert path.read_text() == SECRETS[bits].hex() + "\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert MasterKey.from_file(path) == master(bits)


# Refused


def test_it_is_not_made_by_a_call():
    refuse(errors.KeyTypeError, TypeError, "MasterKey: made by generate()", MasterKey)
    with pytest.raises(TypeError):
        MasterKey(SECRETS[128])


NO_BYTES = [None, 3, 16, "text", SECRETS[128].hex(), [1] * 16, (1,) * 16, range(16), np.zeros(16, np.uint8), 1.5]


@pytest.mark.parametrize("value", NO_BYTES, ids=lambda value: type(value).__name__)
def test_what_is_no_bytes(value):
    start = f"got {type(value).__name__}, accepted "
    refuse(errors.KeyTypeError, TypeError, "data: " + start, MasterKey.from_bytes, value)
    refuse(errors.KeyTypeError, TypeError, "key: " + start, CounterSchedule, value, IV)
    refuse(errors.KeyTypeError, TypeError, "key: " + start, ExpansionSchedule, value)
    refuse(errors.KeyTypeError, TypeError, "key: " + start, expand_key, value, 4)
    refuse(errors.KeyTypeError, TypeError, "key: " + start, Derivation, value, SALT)
    refuse(errors.KeyTypeError, TypeError, "iv: " + start, CounterSchedule, SECRETS[128], value)


def test_a_text_is_sent_to_from_hex():
    error = refuse(errors.KeyTypeError, TypeError, "key: got str", ExpansionSchedule, SECRETS[128].hex())
    assert str(error).endswith("a text of hexadecimal digits goes through MasterKey.from_hex")


@pytest.mark.parametrize("length", [0, 1, 8, 15, 17, 23, 25, 31, 33, 48, 64])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_another_length(length, kind):
    value = kind(bytes(length))
    start = f"got {length} bytes, accepted are 16, 24 or 32"
    refuse(errors.KeyFormatError, ValueError, "data: " + start, MasterKey.from_bytes, value)
    refuse(errors.KeyFormatError, ValueError, "key: " + start, CounterSchedule, value, IV)
    refuse(errors.KeyFormatError, ValueError, "key: " + start, ExpansionSchedule, value)
    refuse(errors.KeyFormatError, ValueError, "key: " + start, expand_key, value, 4)
    start = f"iv: got {length} bytes, accepted are 16"
    refuse(errors.KeyFormatError, ValueError, start, CounterSchedule, SECRETS[128], value)


HEX = SECRETS[128].hex()
NO_HEX = [
    "",
    HEX[:-1],
    HEX[:-2],
    HEX + "0",
    HEX + "00",
    HEX.upper(),
    HEX[:-1] + "A",
    HEX[:-1] + "g",
    HEX[:-1] + " ",
    " " + HEX[1:],
    HEX + "\n",
    " " + HEX + " ",
    HEX + "\0",
    " ".join(HEX[i : i + 2] for i in range(0, 32, 2)),
    ":".join(HEX[i : i + 2] for i in range(0, 32, 2)),
    "0x" + HEX,
    "0x" + HEX[2:],
    HEX[:-1] + "٣",  # a digit for str.isdigit and int, but not for hexadecimal
    HEX[:-1] + "０",
    HEX * 3,
]


@pytest.mark.parametrize("text", NO_HEX, ids=ascii)
def test_what_is_no_hex(text):
    error = refuse(errors.KeyFormatError, ValueError, f"text: got {len(text)} characters", MasterKey.from_hex, text)
    assert "32, 48 or 64 lowercase hexadecimal digits" in str(error)


@pytest.mark.parametrize("value", [None, 3, HEX.encode(), bytearray(HEX.encode()), [HEX]], ids=type)
def test_what_is_no_text(value):
    refuse(errors.KeyTypeError, TypeError, f"text: got {type(value).__name__}", MasterKey.from_hex, value)


@pytest.mark.parametrize("bits", [0, -128, 1, 16, 32, 127, 129, 512, True, None, "256", 256.0, 128.5, [], b""], ids=repr)
def test_what_is_no_number_of_bits(bits):
    refuse(errors.ParameterError, ValueError, f"bits: got {errors.shown(bits)}, accepted are", MasterKey.generate, bits)


NO_KEY_FILE = {
    "empty": b"",
    "one empty line": b"\n",
    "two lines": HEX.encode() + b"\n" + HEX.encode() + b"\n",
    "an empty line more": HEX.encode() + b"\n\n",
    "an empty line before": b"\n" + HEX.encode(),
    "CRLF": HEX.encode() + b"\r\n",
    "CR": HEX.encode() + b"\r",
    "a blank": HEX.encode() + b" \n",
    "a tab before": b"\t" + HEX.encode(),
    "uppercase": HEX.upper().encode(),
    "a byte order mark": b"\xef\xbb\xbf" + HEX.encode(),
    "UTF-16": HEX.encode("utf-16"),
    "raw bytes": bytes(reversed(range(200, 232))),
    "a comment": b"# key\n" + HEX.encode(),
    "a digit short": HEX[1:].encode(),
    "a digit more": HEX.encode() + b"0",
    "64 digits and more": SECRETS[256].hex().encode() + b"00",
    "64 digits and a second line": SECRETS[256].hex().encode() + b"\nx",
    "a large file": SECRETS[256].hex().encode() * 10_000,
}


@pytest.mark.parametrize("kind", NO_KEY_FILE)
def test_what_is_no_key_file(tmp_path, kind):
    path = tmp_path / "key"
    path.write_bytes(NO_KEY_FILE[kind])
    start = f"{path}: not a key file; accepted is one line of "
    error = refuse(errors.KeyFormatError, ValueError, start, MasterKey.from_file, path)
    assert_silent(trail(error), SECRETS[128], SECRETS[256], NO_KEY_FILE["raw bytes"])


def test_a_key_file_that_cannot_be_read(tmp_path):
    missing = tmp_path / "none"
    refuse(errors.FileAccessError, OSError, f"{missing}: cannot be read: ", MasterKey.from_file, missing)
    refuse(errors.FileAccessError, OSError, f"{tmp_path}: cannot be read: ", MasterKey.from_file, tmp_path)
    for path in (None, 3, b"key", ""):
        refuse(errors.ParameterError, ValueError, "path: got ", MasterKey.from_file, path)
        refuse(errors.ParameterError, ValueError, "path: got ", master().to_file, path)


def test_a_key_file_is_never_written_over(tmp_path):
    path, link = tmp_path / "key", tmp_path / "link"
    path.write_text("another key")
    link.symlink_to(tmp_path / "nowhere")
    for taken in (path, link, tmp_path):
        refuse(errors.FileAccessError, OSError, f"{taken}: cannot be written: ", master().to_file, taken)
    assert path.read_text() == "another key"
    assert sorted(os.listdir(tmp_path)) == ["key", "link"]
    missing = tmp_path / "none" / "key"
    refuse(errors.FileAccessError, OSError, f"{missing}: cannot be written: ", master().to_file, missing)


@pytest.mark.parametrize("failure", [OSError(28, "no space"), KeyboardInterrupt()], ids=repr)
def test_a_key_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, failure):
    def fails(*arguments):
        raise failure

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises((errors.FileAccessError, KeyboardInterrupt)):
        master().to_file(tmp_path / "key")
    assert os.listdir(tmp_path) == []


# Compared


def test_equality():
    assert master() == master()
    assert master() != master(128)
    assert master(128) != MasterKey.from_bytes(bytes(16))
    flipped = bytearray(SECRETS[256])
    flipped[-1] ^= 1
    assert master() != MasterKey.from_bytes(flipped)
    for other in (SECRETS[256], SECRETS[256].hex(), None, 3):
        assert master() != other
        assert (master() == other) is False


def test_it_cannot_be_hashed():
    with pytest.raises(TypeError, match="unhashable"):
        hash(master())
    with pytest.raises(TypeError, match="unhashable"):
        {master()}


def test_it_has_no_room_for_anything_else():
    with pytest.raises(AttributeError):
        master().note = "x"
    with pytest.raises(AttributeError):
        master().bits = 128


# Wiped


class Watched(bytearray):
    """Notes what it held when it was emptied."""

    seen: list

    def clear(self):
        self.seen.append(bytes(self))
        super().clear()


@each_length
def test_wipe_fills_the_key_with_zeros(bits):
    key = master(bits)
    key._bytes = Watched(key._bytes)
    key._bytes.seen = seen = []
    key.wipe()
    assert seen == [bytes(bits // 8)]
    assert repr(key) == "MasterKey(wiped)"
    key.wipe()
    assert key.bits == 0


WIPED_USES = {
    "CounterSchedule": lambda key: CounterSchedule(key, IV),
    "ExpansionSchedule": ExpansionSchedule,
    "expand_key": lambda key: expand_key(key, 44),
    "expand_key of nothing": lambda key: expand_key(key, 0),
    "Derivation": lambda key: Derivation(key, SALT),
    "from_bytes": MasterKey.from_bytes,
    "to_file": lambda key: key.to_file("key"),
    "lock_tensors": lambda key: deeplock.lock_tensors({"a": bytearray(9)}, key),
}


@pytest.mark.parametrize("use", WIPED_USES)
def test_a_wiped_key_is_refused(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key = master()
    key.wipe()
    with pytest.raises(errors.KeyWipedError, match=r"^\w+: got a MasterKey that was wiped; make it again") as caught:
        WIPED_USES[use](key)
    assert isinstance(caught.value, ValueError)
    assert os.listdir(tmp_path) == []


def test_the_end_of_a_with_block_wipes():
    with master() as key:
        assert key == master()
    assert repr(key) == "MasterKey(wiped)"


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, GeneratorExit, SystemExit])
@pytest.mark.parametrize("make", [master, lambda: CounterSchedule(master(), IV), lambda: ExpansionSchedule(master())])
def test_an_exception_in_a_with_block_wipes_and_goes_on(kind, make):
    with pytest.raises(kind, match="the block's own"), make() as secret:
        raise kind("the block's own")
    with pytest.raises(errors.KeyWipedError):
        secret.ready() if hasattr(secret, "ready") else key_bytes(secret)


def memory_of(schedule) -> bytes:
    """Give all ctypes memory that a schedule owns."""
    found = b""
    for value in vars(schedule).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ctypes.Array):
                found += bytes(item)
    return found


SCHEDULES = {
    "counter": lambda key: CounterSchedule(key, IV),
    "expansion": ExpansionSchedule,
}
each_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)


@each_length
@each_schedule
def test_wiping_a_schedule_fills_its_memory_with_zeros(bits, make):
    schedule = make(SECRETS[bits])
    schedule.keystream(100, 300_000)
    assert SECRETS[bits] in memory_of(schedule)
    size = len(memory_of(schedule))
    schedule.wipe()
    assert memory_of(schedule) == bytes(size)
    for use in (lambda: schedule.keystream(1), lambda: schedule.keystream(0), schedule.ready):
        refuse(errors.KeyWipedError, ValueError, f"{type(schedule).__name__}: it was wiped; make a new one", use)
    schedule.wipe()
    assert repr(schedule) == f"{type(schedule).__name__}({bits} bits)"


@each_schedule
def test_a_schedule_outlives_its_key(make):
    with master(128) as key:
        schedule = make(key)
    np.testing.assert_array_equal(schedule.keystream(99), make(SECRETS[128]).keystream(99))


@each_schedule
def test_the_end_of_a_with_block_wipes_a_schedule(make):
    with make(master()) as schedule:
        schedule.keystream(9)
    assert set(memory_of(schedule)) == {0}


# Shown


def forms(part: bytes):
    """Yield how a few bytes may look in a text."""
    yield part.hex()
    yield part.hex(" ")
    yield repr(part)[2:-1]
    yield ", ".join(map(str, part))
    yield " ".join(f"{byte:3}" for byte in part).strip()
    yield ", ".join(map(hex, part))
    yield part.decode("latin-1")


def assert_silent(text: str, *secrets: bytes) -> None:
    """Check that a text holds no four neighbouring bytes of a secret in any form, and not the whole as a number."""
    lower = text.lower()
    for secret in secrets:
        for start in range(len(secret) - 3):
            for form in forms(secret[start : start + 4]):
                assert form not in text
                assert form.lower() not in lower or len(form) == 4
        for order in ("big", "little"):
            number = int.from_bytes(secret, order)
            assert str(number) not in text
            assert f"{number:x}" not in lower
        assert base64.b64encode(secret[:12]).decode() not in text


def trail(error: BaseException) -> str:
    """Give all that a reporter of errors can see of one: its own text and traceback and those behind it, with locals."""
    texts, seen = [], []
    while error is not None and error not in seen:
        seen.append(error)
        texts += [str(error), repr(error), repr(error.args), repr(vars(error))]
        report = traceback.TracebackException.from_exception(error, capture_locals=True)
        for frame in report.stack:
            texts += [str(frame), *(f"{name} = {value}" for name, value in (frame.locals or {}).items())]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def test_what_is_searched_for_would_be_found():
    secret = SECRETS[128]
    for text in (
        secret.hex(),
        secret.hex().upper(),
        repr(secret),
        f"{bytearray(secret)}",
        str(list(secret)),
        str(np.frombuffer(secret, np.uint8)),
        str(int.from_bytes(secret, "big")),
        hex(int.from_bytes(secret, "little")),
        repr(secret[5:9]),
        base64.b64encode(secret).decode(),
    ):
        with pytest.raises(AssertionError):
            assert_silent(f"some {text} text", secret)


PSEUDORANDOM = {bits: reference.hkdf_extract(SALT, secret) for bits, secret in SECRETS.items()}
OBJECTS = {
    "MasterKey": master,
    "Derivation": lambda bits: Derivation(master(bits), SALT),
    "CounterSchedule": lambda bits: CounterSchedule(master(bits), IV),
    "ExpansionSchedule": lambda bits: ExpansionSchedule(master(bits)),
}
each_object = pytest.mark.parametrize("kind", OBJECTS)


@each_object
@each_length
def test_no_text_of_an_object_shows_its_key(kind, bits, caplog):
    secret = OBJECTS[kind](bits)
    if kind == "ExpansionSchedule":
        secret.keystream(10, 200_000)
    with caplog.at_level(logging.INFO):
        logging.getLogger("test").info("%s %r", secret, secret)
    texts = [repr(secret), str(secret), f"{secret}", f"{secret!r:>99}", format(secret), f"{[secret]} {({'a': secret})}"]
    texts += [ascii(secret), "%s %r" % (secret, secret), caplog.text, str(getattr(secret, "__dict__", {}))]  # noqa: UP031
    texts += [str(dir(secret)), str(secret.__doc__)]
    for text in texts:
        assert_silent(text, SECRETS[bits], PSEUDORANDOM[bits])
    assert repr(secret).startswith(f"{kind}(")


def test_a_master_key_says_how_long_it_is():
    assert [repr(master(bits)) for bits in SECRETS] == [f"MasterKey({bits} bits)" for bits in SECRETS]


@each_object
def test_it_is_neither_pickled_nor_copied(kind):
    secret = OBJECTS[kind](256)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        error = refuse(errors.KeyTypeError, TypeError, f"{kind}: it cannot be", pickle.dumps, secret, protocol)
        assert_silent(trail(error), SECRETS[256], PSEUDORANDOM[256])
    for duplicate in (copy.copy, copy.deepcopy, lambda value: copy.deepcopy({"a": [value]})):
        error = refuse(errors.KeyTypeError, TypeError, f"{kind}: it cannot be", duplicate, secret)
        assert_silent(trail(error), SECRETS[256], PSEUDORANDOM[256])


@each_object
def test_a_traceback_with_locals_shows_no_key(kind):
    def fails():
        secret = OBJECTS[kind](256)
        everything = {"secret": secret, "more": [secret]}
        raise ValueError("the test's own", everything)

    with pytest.raises(ValueError, match="the test's own") as caught:
        fails()
    text = trail(caught.value)
    assert kind in text
    assert_silent(text, SECRETS[256], PSEUDORANDOM[256])


OWN_BOX = deeplock.SBox(bytes(reversed(range(256))))


def lock_with(key, **keywords):
    tensors = {"a": bytearray(9)}
    return tensors, deeplock.lock_tensors(tensors, key, **keywords)


def unlock_with(key, locked_with, **keywords):
    tensors, header = lock_with(locked_with, **keywords)
    deeplock.unlock_tensors(tensors, key, header)


MISTAKES = {
    "an iv too short": (errors.KeyFormatError, lambda key: CounterSchedule(key, IV[:9])),
    "an iv of another type": (errors.KeyTypeError, lambda key: CounterSchedule(key, 3)),
    "no number of words": (errors.ParameterError, lambda key: expand_key(key, "44")),
    "fewer words than none": (errors.ParameterError, lambda key: expand_key(key, -1)),
    "too many words": (errors.ParameterError, lambda key: expand_key(key, 2**40)),
    "a salt that is none": (TypeError, lambda key: Derivation(key, None)),
    "a name that is no text": (
        UnicodeEncodeError,
        lambda key: Derivation(key, SALT).tensor_key_iv("counter", "aes", "\ud800"),
    ),
    "an offset below zero": (
        errors.ParameterError,
        lambda key: deeplock.lock(bytes(9), CounterSchedule(key, IV), offset=-1),
    ),
    "an offset of another type": (errors.ParameterError, lambda key: ExpansionSchedule(key).keystream(9, 1.5)),
    "output that is read-only": (
        errors.ReadOnlyError,
        lambda key: deeplock.lock(bytes(9), CounterSchedule(key, IV), out=bytes(9)),
    ),
    "tensors that are read-only": (errors.ReadOnlyError, lambda key: deeplock.lock_tensors({"a": bytes(9)}, key)),
    "tensors that are no memory": (errors.BufferTypeError, lambda key: deeplock.lock_tensors({"a": "text"}, key)),
    "an unknown schedule": (errors.UnknownNameError, lambda key: lock_with(key, schedule="none")),
    "an unknown S-Box": (errors.UnknownNameError, lambda key: lock_with(key, sbox="none")),
    "another key": (errors.WrongKeyError, lambda key: unlock_with(key, MasterKey.generate(key.bits))),
    "another length": (
        errors.WrongKeyError,
        lambda key: unlock_with(key, MasterKey.generate(128 if key.bits == 256 else 256)),
    ),
    "an S-Box that is not at hand": (errors.SBoxError, lambda key: unlock_with(key, key, sbox=OWN_BOX)),
    "a file that is there": (errors.FileAccessError, lambda key: key.to_file(__file__)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@each_length
def test_no_mistake_shows_the_key_in_an_error(mistake, bits):
    """Reporters of errors collect the local variables of all frames, the package's own too."""
    kind, make = MISTAKES[mistake]
    with pytest.raises(kind) as caught:
        make(master(bits))
    assert_silent(trail(caught.value), SECRETS[bits], PSEUDORANDOM[bits])


@pytest.mark.parametrize("length", [15, 20, 33])
def test_a_refused_key_is_not_in_the_message(length):
    key = (SECRETS[256] + SECRETS[128])[:length]
    for operation in (MasterKey.from_bytes, ExpansionSchedule, lambda key: Derivation(key, SALT)):
        error = refuse(errors.KeyFormatError, ValueError, "", operation, key)
        assert_silent(f"{error!s} {error!r} {error.args}", key)
    text = key.hex()[:-1]
    error = refuse(errors.KeyFormatError, ValueError, "", MasterKey.from_hex, text)
    assert_silent(f"{error!s} {error!r} {error.args}", key)
    error = refuse(errors.KeyTypeError, TypeError, "", ExpansionSchedule, text)
    assert_silent(f"{error!s} {error!r} {error.args}", key)


HALF_MADE = {
    "from_bytes": lambda: MasterKey.from_bytes(b"short"),
    "from_hex": lambda: MasterKey.from_hex("short"),
    "generate": lambda: MasterKey.generate(1),
    "CounterSchedule": lambda: CounterSchedule(b"short", IV),
    "CounterSchedule's iv": lambda: CounterSchedule(SECRETS[128], b"short"),
    "ExpansionSchedule": lambda: ExpansionSchedule(b"short"),
    "Derivation": lambda: Derivation(b"short", SALT),
}


@pytest.mark.parametrize("make", HALF_MADE)
def test_an_object_that_was_never_finished_has_a_text_for_error_reports(make):
    with pytest.raises(errors.DeepLockError) as caught:
        HALF_MADE[make]()
    assert "Error: " in "".join(traceback.format_exception(caught.value))
    trail(caught.value)


# Derived


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{len(vector['master']) * 4} {vector['name']}"[:30])
def test_derivation_gives_the_vectors(vector):
    secret, salt = bytes.fromhex(vector["master"]), bytes.fromhex(vector["salt"])
    for key in (secret, MasterKey.from_bytes(secret), bytearray(secret)):
        derivation = Derivation(key, salt)
        assert derivation.tensor_key_iv("counter", "aes", vector["name"]).hex() == vector["tensor_key"] + vector["iv"]
        assert derivation.check().hex() == vector["check"]


@each_length
@pytest.mark.parametrize("schedule", ["counter", "expansion"])
@pytest.mark.parametrize("name", ["", "a", "weight", "Gewicht.ä", "名前", "a\0b", "x" * 5000])
def test_derivation_is_the_oracle_s(bits, schedule, name):
    derivation = Derivation(master(bits), SALT)
    for sbox in ("aes", "sm4", "0" * 64):
        expected = reference.tensor_key_iv(SECRETS[bits], SALT, schedule, sbox, name)
        assert derivation.tensor_key_iv(schedule, sbox, name) == b"".join(expected)
    assert derivation.check() == reference.check_value(SECRETS[bits], SALT)


def test_everything_that_goes_in_changes_what_comes_out():
    found = set()
    for bits in SECRETS:
        for salt in (SALT, SALT[::-1], bytes(16)):
            derivation = Derivation(master(bits), salt)
            found.add(derivation.check())
            for schedule, sbox, name in [
                ("counter", "aes", "a"),
                ("expansion", "aes", "a"),
                ("counter", "sm4", "a"),
                ("counter", "aes", "b"),
                ("counter", "aes\0a", "b"),
            ]:
                both = derivation.tensor_key_iv(schedule, sbox, name)
                assert len(both) == bits // 8 + 16
                found |= {both[:-16], both[-16:]}
    assert len(found) == 3 * 3 * 11


def test_a_derivation_outlives_its_key():
    key = master()
    derivation = Derivation(key, SALT)
    key.wipe()
    assert derivation.check() == reference.check_value(SECRETS[256], SALT)
