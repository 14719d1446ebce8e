"""Passphrases: the key that scrypt makes of one, what the header says of it, and locks made with it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import pickle

import numpy as np
import pytest
import safetensors.numpy

import deeplock_kernels as deeplock
from deeplock_kernels import errors, named_lock, passphrases, reference
from deeplock_kernels.keys import MasterKey, key_bytes
from deeplock_kernels.named_lock import NamedLock
from deeplock_kernels.passphrases import Passphrase, Scrypt

TEXT = "correct horse battery staple"
CHEAP = 1 << 14  # the least n: 16 MiB and a tenth of a second
SALT = bytes(range(16))

RFC_7914 = [  # section 12: passphrase, salt, n, r, p, output
    (
        "", b"", 16, 1, 1,
        "77d6576238657b203b19ca42c18a0497f16b4844e3074ae8dfdffa3fede21442"
        "fcd0069ded0948f8326a753a0fc81f17e8d3e0fb2e0d3628cf35e20c38d18906",
    ),
    (
        "password", b"NaCl", 1024, 8, 16,
        "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162"
        "2eaf30d92e22a3886ff109279d9830dac727afb94a83ee6d8360cbdfa2cc0640",
    ),
    (
        "pleaseletmein", b"SodiumChloride", 16384, 8, 1,
        "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
        "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887",
    ),
]  # fmt: skip


def passphrase(text=TEXT):
    return Passphrase(text, n=CHEAP)


def model():
    return {"a.weight": np.arange(3000, dtype=np.float32), "a.bias": np.zeros(7, np.float32)}


def same(tensors, others):
    return all(tensors[name].tobytes() == others[name].tobytes() for name in others)


# The key


@pytest.mark.parametrize(("text", "salt", "n", "r", "p", "output"), RFC_7914)
def test_the_oracle_gives_the_vectors(text, salt, n, r, p, output):
    key = reference.passphrase_key(text, n, r, p, salt)
    assert key == bytes.fromhex(output)[:32]  # PBKDF2 makes the output 32 bytes at a time
    assert key == hashlib.scrypt(text.encode(), salt=salt, n=n, r=r, p=p, dklen=64)[:32]


def test_the_key_is_the_vector_s_and_the_oracle_s():
    text, salt, n, r, p, output = RFC_7914[2]
    assert key_bytes(Passphrase(text).derive(Scrypt(n, r, p, salt))) == bytes.fromhex(output)[:32]
    scrypt = Scrypt(CHEAP, 8, 2, SALT)
    assert key_bytes(passphrase().derive(scrypt)) == reference.passphrase_key(TEXT, *scrypt)


def test_spellings_that_look_the_same_are_one():
    scrypt = Scrypt(CHEAP, 8, 1, SALT)
    composed, decomposed, other = "Schl\u00fcssel \u00e9", "Schlu\u0308ssel e\u0301", "Schlussel e"
    keys = [key_bytes(passphrase(text).derive(scrypt)) for text in (composed, decomposed, other)]
    assert keys[0] == keys[1] == reference.passphrase_key(decomposed, *scrypt)
    assert keys[0] != keys[2]


def test_the_default_cost_and_a_new_salt_each_time():
    drawn = [Passphrase(TEXT).new_scrypt() for _ in range(100)]
    assert {scrypt[:3] for scrypt in drawn} == {(1 << 17, 8, 1)}
    assert len({scrypt.salt for scrypt in drawn}) == 100
    assert {len(scrypt.salt) for scrypt in drawn} == {16}


@pytest.mark.parametrize("text", ["", "two\nlines", "an end\n", "\0", "a\x7f", "\ud800"])
def test_what_is_no_passphrase(text):
    with pytest.raises(errors.KeyFormatError, match=r"^text: accepted is a passphrase of one character or more") as caught:
        Passphrase(text)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("text", [None, b"bytes", 5, ["a"], MasterKey.from_bytes(bytes(16))])
def test_what_is_no_text(text):
    with pytest.raises(errors.KeyTypeError, match=r"^text: got \w+, accepted is a passphrase as a str"):
        Passphrase(text)


@pytest.mark.parametrize(
    "cost",
    [
        {"n": 1 << 13}, {"n": 1 << 19}, {"n": (1 << 14) + 1}, {"n": 0}, {"n": -(1 << 14)}, {"n": float(1 << 14)},
        {"n": None}, {"r": 1}, {"r": 16}, {"r": "8"}, {"p": 0}, {"p": 5}, {"p": True},
    ],
    ids=repr,
)  # fmt: skip
def test_another_cost(cost):
    with pytest.raises(errors.ParameterError, match=rf"^{next(iter(cost))}: got .*, accepted are "):
        Passphrase(TEXT, **cost)


@pytest.mark.parametrize("scrypt", [Scrypt(1 << 19, 8, 1, SALT), Scrypt(3, 8, 1, SALT), Scrypt(1 << 70, 8, 1, SALT)])
def test_a_cost_that_no_reader_of_headers_lets_through_takes_no_memory(scrypt):
    with pytest.raises(errors.ParameterError, match=r"^scrypt: it cannot be computed with n="):
        passphrase().derive(scrypt)


@pytest.mark.parametrize("scrypt", [(CHEAP, 8, 1, SALT), SALT, "scrypt", 3])
def test_what_is_no_header_s_field(scrypt):
    with pytest.raises(errors.KeyTypeError, match=r"^scrypt: got \w+, accepted is the `passphrase` of a lock's header"):
        passphrase().derive(scrypt)


def test_it_is_wiped():
    value = passphrase()
    secret = value._bytes
    with value:
        assert secret == TEXT.encode()
        assert repr(value) == "Passphrase(set)"
    assert value._bytes == b""
    assert repr(value) == "Passphrase(wiped)"
    with pytest.raises(errors.KeyWipedError, match=r"^key: got a Passphrase that was wiped"):
        value.derive(Scrypt(CHEAP, 8, 1, SALT))
    with pytest.raises(errors.KeyWipedError):
        deeplock.lock_tensors(model(), value)


def test_wiping_fills_it_with_zeros():
    class Memory(bytearray):
        def clear(self):
            self.seen = bytes(self)
            super().clear()

    value = passphrase()
    value._bytes = memory = Memory(value._bytes)
    value.wipe()
    assert memory.seen == bytes(len(TEXT))


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_is_neither_pickled_nor_copied(way):
    with pytest.raises(errors.KeyTypeError, match=r"^Passphrase: it cannot be "):
        way(passphrase())


# Locks


@pytest.mark.parametrize("schedule", ["counter", "expansion"])
def test_a_lock_is_that_of_the_oracle_s_key(schedule):
    tensors, plain = model(), model()
    header = deeplock.lock_tensors(tensors, passphrase(), schedule=schedule)
    assert header.passphrase[:3] == (CHEAP, 8, 1)
    assert header.key_bits == 256
    assert not same(tensors, plain)
    key = reference.passphrase_key(TEXT, *header.passphrase)
    assert header.check == reference.check_value(key, header.salt)
    again = deeplock.LockHeader.from_json(header.to_json())
    deeplock.verify_tensors(tensors, passphrase(), again)
    copied = {name: tensor.copy() for name, tensor in tensors.items()}
    deeplock.unlock_tensors(copied, key, again)
    assert same(copied, plain)
    with passphrase().derive(again.passphrase) as made:
        row = deeplock.unlock_tensor(tensors["a.bias"], made, again, "a.bias")
        assert np.array_equal(row, plain["a.bias"])
    deeplock.unlock_tensors(tensors, passphrase(), again)
    assert same(tensors, plain)


def test_the_cost_of_a_lock_is_the_header_s():
    tensors = model()
    header = deeplock.lock_tensors(tensors, Passphrase(TEXT, n=CHEAP, p=2))
    deeplock.unlock_tensors(tensors, Passphrase(TEXT), header)
    assert same(tensors, model())


def refused(error, tensors, *arguments, **keywords):
    before = {name: tensor.copy() for name, tensor in tensors.items()}
    with pytest.raises(error) as caught:
        deeplock.unlock_tensors(tensors, *arguments, **keywords)
    assert same(tensors, before)
    return str(caught.value)


def test_a_wrong_passphrase_changes_nothing():
    tensors = model()
    header = deeplock.lock_tensors(tensors, passphrase())
    for other in (passphrase(TEXT + " "), passphrase("x"), bytes(32)):
        assert refused(errors.WrongKeyError, tensors, other, header).startswith("key: it is not the one")


def test_a_passphrase_for_the_lock_of_a_key_changes_nothing():
    tensors = model()
    header = deeplock.lock_tensors(tensors, bytes(32))
    for check in (True, False):
        words = refused(errors.WrongKeyError, tensors, passphrase(), header, check=check)
        assert words.startswith("key: got a passphrase, but a key made this")


@pytest.mark.parametrize("change", [{"salt": SALT}, {"p": 2}, {"n": 1 << 15}])
def test_an_altered_field_is_noticed(change):
    tensors = model()
    header = deeplock.lock_tensors(tensors, passphrase())
    altered = dataclasses.replace(header, passphrase=header.passphrase._replace(**change))
    refused(errors.WrongKeyError, tensors, passphrase(), altered)
    key = reference.passphrase_key(TEXT, *header.passphrase)
    refused(errors.TamperedHeaderError, tensors, key, altered)
    refused(errors.TamperedHeaderError, tensors, key, dataclasses.replace(header, passphrase=None))


def test_the_key_is_wiped_with_its_lock_and_the_caller_s_is_not(monkeypatch):
    made = []
    derive = Passphrase.derive
    monkeypatch.setattr(Passphrase, "derive", lambda *arguments: made.append(derive(*arguments)) or made[-1])
    tensors, value = model(), passphrase()
    header = deeplock.lock_tensors(tensors, value)
    deeplock.verify_tensors(tensors, value, header)
    deeplock.unlock_tensors(tensors, value, header)
    assert [repr(key) for key in made] == 3 * ["MasterKey(wiped)"]
    with NamedLock.new(value, "counter", deeplock.AES) as lock:
        assert repr(made[-1]) == "MasterKey(256 bits)"
        assert lock._key is made[-1]
    assert repr(made[-1]) == "MasterKey(wiped)"
    deeplock.lock_tensors(tensors, value)
    with derive(value, header.passphrase) as key:
        with NamedLock.from_header(key, header):
            pass
        assert repr(key) == "MasterKey(256 bits)"
    assert repr(value) == "Passphrase(set)"


def test_an_interrupted_lock_is_taken_back(monkeypatch):
    """What takes it back makes the key anew: the lock's own is wiped by then."""
    tensors = model()
    leave = NamedLock.__exit__
    interrupted = []

    def interrupt(lock, *arguments):
        leave(lock, *arguments)
        if not interrupted:
            interrupted.append(lock)
            raise KeyboardInterrupt

    monkeypatch.setattr(named_lock.NamedLock, "__exit__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        deeplock.lock_tensors(tensors, passphrase())
    assert interrupted
    assert same(tensors, model())


def test_rekeying_to_a_passphrase_and_from_it():
    tensors, key = model(), bytes(range(32))
    header = deeplock.lock_tensors(tensors, key)
    header = deeplock.rekey_tensors(tensors, key, passphrase(), header)
    assert header.passphrase is not None
    first = header.passphrase
    header = deeplock.rekey_tensors(tensors, passphrase(), passphrase("another one"), header)
    assert header.passphrase.salt != first.salt
    refused(errors.WrongKeyError, tensors, passphrase(), header)
    header = deeplock.rekey_tensors(tensors, passphrase("another one"), key, header)
    assert header.passphrase is None
    deeplock.unlock_tensors(tensors, key, header)
    assert same(tensors, model())


def test_files(tmp_path):
    plain, locked, other, restored = (tmp_path / name for name in ("plain", "locked", "other", "restored"))
    safetensors.numpy.save_file(model(), plain)
    written = deeplock.lock_file(plain, locked, passphrase())
    assert deeplock.read_header(locked) == written
    deeplock.verify_file(locked, passphrase())
    with pytest.raises(errors.WrongKeyError):
        deeplock.unlock_file(locked, restored, passphrase("x"))
    assert not restored.exists()
    deeplock.rekey_file(locked, other, passphrase(), passphrase("x"))
    deeplock.unlock_file(other, restored, passphrase("x"))
    assert restored.read_bytes() == plain.read_bytes()


def test_a_schedule_takes_no_passphrase():
    for make in (lambda: deeplock.CounterSchedule(passphrase(), bytes(16)), lambda: deeplock.ExpansionSchedule(passphrase())):
        with pytest.raises(errors.KeyTypeError, match=r"^key: got Passphrase, accepted are bytes or a MasterKey"):
            make()


def test_what_a_header_may_ask_for_is_bounded():
    assert max(passphrases.SCRYPT_COSTS["n"]) * 8 * 128 == 256 << 20
    assert max(passphrases.SCRYPT_COSTS["p"]) == 4
