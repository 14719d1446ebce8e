"""Wrapped keys: RFC 3394, the one line of a file that is accepted, and a model that outlives its master key."""

from __future__ import annotations

import os
import stat
import sys
import traceback

import numpy as np
import pytest
from leaks import Leaks
from support import KEYS

import deeplock_kernels as deeplock
from deeplock_kernels import errors, reference
from deeplock_kernels.key_wrapping import rewrap_key, unwrap_key, wrap_key
from deeplock_kernels.keys import MasterKey, key_bytes
from deeplock_kernels.passphrases import Passphrase

START = "deeplock-wrapped-key/1 "
SCRYPT = f"scrypt 16384 8 1 {'0f' * 16} "
KEK = bytes(range(32))
DATA = bytes.fromhex("00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f")

RFC_3394 = [  # section 4: bytes of the key-encryption key and of the key data, output
    (16, 16, "1fa68b0a8112b447aef34bd8fb5a7b829d3e862371d2cfe5"),
    (24, 16, "96778b25ae6ca435f92b5b97c050aed2468ab8a17ad84e5d"),
    (32, 16, "64e8c3f9ce0f5ba263e9777905818a2a93c8191e7d6e8ae7"),
    (24, 24, "031d33264e15d33268f24ec260743edce1c6c7ddee725a936ba814915c6762d2"),
    (32, 24, "a8f9bc1612c68b3ff6e6f4fbe30e71e4769c8b80a32cb8958cd5d17d6b254da1"),
    (32, 32, "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21"),
]
each_vector = pytest.mark.parametrize(("kek_bytes", "data_bytes", "output"), RFC_3394)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wrapped_by_the_oracle(kek, key):
    """Wrap a key by RFC 3394 section 2.2.1, with the oracle's AES."""
    check, blocks = b"\xa6" * 8, [key[i : i + 8] for i in range(0, len(key), 8)]
    for step in range(6 * len(blocks)):
        place = step % len(blocks)
        block = reference.encrypt_block(kek, check + blocks[place])
        check = (int.from_bytes(block[:8], "big") ^ (step + 1)).to_bytes(8, "big")
        blocks[place] = block[8:]
    return check + b"".join(blocks)


def passphrase(text="correct horse"):
    return Passphrase(text, n=1 << 14)


def line(path="wrapped"):
    with open(path, encoding="latin-1", newline="") as file:
        return file.read()


def write(text, path="wrapped"):
    with open(path, "w", encoding="latin-1", newline="") as file:
        file.write(text)


def refuse(error, words, function, *arguments):
    before = {name: line(name) for name in os.listdir()}
    with pytest.raises(error, match=words) as caught:
        function(*arguments)
    assert {name: line(name) for name in os.listdir()} == before
    return caught.value


# The file


@each_vector
def test_the_vectors(kek_bytes, data_bytes, output):
    kek, data = KEK[:kek_bytes], DATA[:data_bytes]
    assert wrapped_by_the_oracle(kek, data).hex() == output
    write(f"{START}{output}\n")
    assert key_bytes(unwrap_key("wrapped", kek)) == data
    assert key_bytes(unwrap_key("wrapped", MasterKey.from_bytes(kek))) == data


@each_vector
def test_wrapping_gives_the_vectors(kek_bytes, data_bytes, output, monkeypatch):
    monkeypatch.setattr("secrets.token_bytes", lambda count: DATA[:count])
    wrap_key("wrapped", KEK[:kek_bytes], bits=8 * data_bytes)
    assert line() == f"{START}{output}\n"


@pytest.mark.parametrize("bits", KEYS)
@pytest.mark.parametrize("data_bits", KEYS)
def test_what_is_wrapped_is_a_new_random_key(bits, data_bits):
    found = set()
    for name in ("a", "b"):
        wrap_key(name, KEYS[bits], bits=data_bits)
        with unwrap_key(name, KEYS[bits]) as key:
            assert key.bits == data_bits
            found.add(key_bytes(key))
            assert line(name) == f"{START}{wrapped_by_the_oracle(KEYS[bits], key_bytes(key)).hex()}\n"
    assert len(found) == 2


def test_under_a_passphrase():
    wrap_key("wrapped", passphrase())
    start, kind, n, r, p, salt, wrapped = line().split()
    assert (start, kind, n, r, p, len(salt)) == ("deeplock-wrapped-key/1", "scrypt", "16384", "8", "1", 32)
    kek = reference.passphrase_key("correct horse", 1 << 14, 8, 1, bytes.fromhex(salt))
    with unwrap_key("wrapped", Passphrase("correct horse")) as key:
        assert wrapped == wrapped_by_the_oracle(kek, key_bytes(key)).hex()
    assert unwrap_key("wrapped", kek) == unwrap_key("wrapped", passphrase())
    for other in (passphrase("x"), KEK):
        refuse(errors.WrongKeyError, "^master: it is not the key that wrapped", unwrap_key, "wrapped", other)


NO_LINES = {
    "nothing": "",
    "a line end": "\n",
    "no line end": f"{START}{RFC_3394[0][2]}",
    "two line ends": f"{START}{RFC_3394[0][2]}\n\n",
    "a carriage return": f"{START}{RFC_3394[0][2]}\r\n",
    "a blank in front": f" {START}{RFC_3394[0][2]}\n",
    "two blanks": f"{START} {RFC_3394[0][2]}\n",
    "a blank behind": f"{START}{RFC_3394[0][2]} \n",
    "a tab": f"{START[:-1]}\t{RFC_3394[0][2]}\n",
    "another version": f"{START.replace('1', '2')}{RFC_3394[0][2]}\n",
    "another name": f"{START.replace('deep', 'Deep')}{RFC_3394[0][2]}\n",
    "no version": f"{RFC_3394[0][2]}\n",
    "uppercase": f"{START}{RFC_3394[0][2].upper()}\n",
    "a digit short": f"{START}{RFC_3394[0][2][1:]}\n",
    "a byte long": f"{START}{RFC_3394[0][2]}00\n",
    "another length": f"{START}{RFC_3394[0][2][:32]}\n",
    "two keys": f"{START}{RFC_3394[0][2]} {RFC_3394[0][2]}\n",
    "a key file": f"{KEYS[256].hex()}\n",
    "bytes": "\xff" * 100,
    "a long line": f"{START}{RFC_3394[0][2] * 9}\n",
} | {
    f"scrypt with {name}": f"{START}{SCRYPT.replace(*change)}{RFC_3394[5][2]}\n"
    for name, change in {
        "n too small": ("16384", "8192"),
        "n too large": ("16384", "524288"),
        "n of gigabytes": ("16384", "1073741824"),
        "n of many digits": ("16384", "1" + "0" * 40),
        "n no power of two": ("16384", "16385"),
        "a leading zero": ("16384", "016384"),
        "a sign": ("16384", "+16384"),
        "other digits": ("16384", "\u0661\u0666".encode().decode("latin-1")),
        "another r": (" 8 ", " 16 "),
        "p of nothing": (" 1 ", " 0 "),
        "p too large": (" 1 ", " 5 "),
        "no p": (" 1 ", " "),
        "a short salt": ("0f0f ", "0f "),
        "a salt in uppercase": ("0f", "0F"),
        "another name": ("scrypt", "argon2"),
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("case", NO_LINES)
def test_what_is_no_wrapped_key(case):
    assert NO_LINES[case] not in (f"{START}{RFC_3394[0][2]}\n", f"{START}{SCRYPT}{RFC_3394[5][2]}\n")
    write(NO_LINES[case])
    words = r"^wrapped: not a wrapped key; accepted is the one line of deeplock-wrapped-key/1 that "
    for master in (KEK, Passphrase("x")):
        refuse(errors.KeyFormatError, words, unwrap_key, "wrapped", master)
    refuse(errors.KeyFormatError, words, rewrap_key, "wrapped", "new", KEK, KEK)


def test_every_altered_digit_is_noticed():
    good = f"{START}{RFC_3394[0][2]}\n"
    for place in range(len(START), len(good) - 1):
        write(f"{good[:place]}{int(good[place], 16) ^ 1:x}{good[place + 1 :]}")
        refuse(errors.WrongKeyError, "^master: it is not the key", unwrap_key, "wrapped", KEK[:16])


# Masters


def test_another_master_key():
    wrap_key("wrapped", KEYS[256])
    for bits in (128, 192):
        refuse(errors.WrongKeyError, "^master: it is not the key that wrapped the one in wrapped, or", unwrap_key, "wrapped", KEYS[bits])
    words = "^old_master: it is not the key that wrapped the one in wrapped, or that file was altered"
    refuse(errors.WrongKeyError, words, rewrap_key, "wrapped", "new", KEYS[128], KEYS[256])
    refuse(errors.WrongKeyError, "^key: got a passphrase, but a key made this", unwrap_key, "wrapped", passphrase())


def test_what_is_no_master_key():
    wrap_key("wrapped", KEK)
    wiped = MasterKey.generate()
    wiped.wipe()
    for error, value in ((errors.KeyTypeError, "text"), (errors.KeyFormatError, bytes(17)), (errors.KeyWipedError, wiped)):
        refuse(error, "^master: got ", wrap_key, "new", value)
        refuse(error, "^master: got ", unwrap_key, "wrapped", value)
        refuse(error, "^old_master: got ", rewrap_key, "wrapped", "new", value, KEK)
        refuse(error, "^new_master: got ", rewrap_key, "wrapped", "new", KEK, value)
    for bits in (100, None, "256", True):
        refuse(errors.ParameterError, "^bits: got ", lambda bits=bits: wrap_key("new", KEK, bits=bits))


def test_a_model_outlives_its_master_key():
    tensors = {"a": np.arange(1000, dtype=np.float32)}
    wrap_key("wrapped", KEYS[256])
    with unwrap_key("wrapped", KEYS[256]) as key:
        header = deeplock.lock_tensors(tensors, key)
    locked = tensors["a"].tobytes()
    rewrap_key("wrapped", "second", KEYS[256], passphrase())
    rewrap_key("second", "third", passphrase(), KEYS[128])
    assert tensors["a"].tobytes() == locked
    refuse(errors.WrongKeyError, "^master: it is not", unwrap_key, "third", KEYS[256])
    with unwrap_key("third", KEYS[128]) as key:
        deeplock.unlock_tensors(tensors, key, header)
    assert np.array_equal(tensors["a"], np.arange(1000, dtype=np.float32))


# Files


def test_nothing_is_written_over():
    wrap_key("wrapped", KEK)
    write("another", "taken")
    for target in ("taken", "wrapped"):
        refuse(errors.FileAccessError, f"^{target}: cannot be written: it exists already", wrap_key, target, KEK)
    refuse(errors.FileAccessError, "^taken: cannot be written: it exists already", rewrap_key, "wrapped", "taken", KEK, KEK)
    refuse(errors.SameFileError, "which is the source wrapped", rewrap_key, "wrapped", "./wrapped", KEK, KEK)
    refuse(errors.FileAccessError, "^none/new: cannot be written: no such file", wrap_key, "none/new", KEK)
    refuse(errors.FileAccessError, "^none: cannot be read: no such file", unwrap_key, "none", KEK)
    refuse(errors.ParameterError, "^path: got ''", wrap_key, "", KEK)


@pytest.mark.parametrize("failure", [OSError(28, "no space"), KeyboardInterrupt()], ids=repr)
def test_it_is_written_whole_or_not_at_all(folder, monkeypatch, failure):
    def fails(*arguments):
        raise failure

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises((errors.FileAccessError, KeyboardInterrupt)):
        wrap_key("new", KEK)
    assert os.listdir(folder) == []


def test_anybody_may_read_it():
    before = os.umask(0o022)
    try:
        wrap_key("wrapped", KEK)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("wrapped").st_mode) == 0o644


# Without the library, and in error reports


def test_without_the_library_the_extra_is_named(monkeypatch):
    wrap_key("wrapped", KEK)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    for function, arguments in ((wrap_key, ("new", KEK)), (unwrap_key, ("wrapped", KEK)), (rewrap_key, ("wrapped", "new", KEK, KEK))):
        error = refuse(errors.MissingLibraryError, r"^cryptography: .*pip install 'deeplock-kernels\[wrap\]'$", function, *arguments)
        assert isinstance(error, ImportError)


def test_no_report_of_an_error_shows_a_key():
    master, other = MasterKey.from_bytes(KEYS[256]), MasterKey.from_bytes(KEYS[192])
    master.to_file("key")
    wrap_key("wrapped", master)
    key = unwrap_key("wrapped", master)
    leaks = Leaks({"master": KEYS[256], "other": KEYS[192], "key": bytes(bytearray(key_bytes(key)))})
    key.wipe()
    for call in (
        lambda: unwrap_key("wrapped", other),
        lambda: wrap_key("wrapped", master),
        lambda: rewrap_key("wrapped", "none/new", master, other),
        lambda: rewrap_key("wrapped", "new", other, master),
        lambda: rewrap_key("wrapped", "new", master, 3),
        lambda: unwrap_key("key", master),
    ):
        with pytest.raises(errors.DeepLockError) as caught:
            call()
        lines = traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
        assert leaks(*lines, str(caught.value), repr(caught.value)) == []
