"""No key shows: not in any text of an object, error, log or command, nor in any file but a key file's own."""

from __future__ import annotations

import base64
import copy
import dataclasses
import inspect
import json
import os
import pickle
import pprint
import random
import reprlib
import shutil
import string
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from leaks import STEP, WINDOW, Leaks, written
from llvmlite import ir
from processes import run

import deeplock_kernels as deeplock
from deeplock_kernels import named_lock, reference
from deeplock_kernels.cli import main
from deeplock_kernels.key_sources import passphrase_from_file
from deeplock_kernels.keys import Derivation
from deeplock_kernels.passphrases import Scrypt
from deeplock_kernels.pieces import Range

KEYS = {bits: random.Random(1000 + bits).randbytes(bits // 8) for bits in (128, 192, 256)}
SALT, IV = bytes(range(200, 216)), bytes(range(100, 116))
SHAPES = {"layer.weight": (30, 7), "layer.bias": (40,), "größe": (5000,)}
PACKAGE = Path(deeplock.__file__).parent


def derived(master, salt):
    """Give all that has to stay secret, by name; what comes to be derived besides is a line here."""
    found = {
        "master key": master,
        "pseudorandom key": reference.hkdf_extract(salt, master),
        "header key": reference.header_key(master, salt),
    }
    for name in SHAPES:
        tensor_key, iv = reference.tensor_key_iv(master, salt, "counter", "aes", name)
        found[f"key of {name}"] = tensor_key
        found[f"iv of {name}"] = iv
        seal_key = reference.seal_key(master, salt, name)
        found[f"seal key of {name}"] = seal_key
        found[f"hash key of {name}'s seal"] = reference.encrypt_block(seal_key, bytes(16))
        found[f"mask of {name}'s seal"] = reference.encrypt_block(seal_key, bytes(15) + b"\1")
        found[f"key stream of {name}"] = reference.counter_keystream(tensor_key, iv, 64)
    found["key stream of the master key"] = reference.expansion_keystream(master, 64)
    return found


OTHER = deeplock.MasterKey.from_bytes(random.Random(7).randbytes(32))
SECRETS = {bits: derived(key, SALT) for bits, key in KEYS.items()}
OTHERS = {f"{name} of the other key": secret for name, secret in derived(bytes(OTHER._bytes), SALT).items()}
TEXT = "".join(random.Random(8).choices(string.ascii_letters, k=40))
SCRYPT = Scrypt(1 << 14, 8, 1, SALT)
OTHERS |= {f"{name} of the passphrase": secret for name, secret in derived(reference.passphrase_key(TEXT, *SCRYPT), SALT).items()}
OTHERS["passphrase"] = TEXT.encode()
LEAKS = {bits: Leaks(secrets | OTHERS) for bits, secrets in SECRETS.items()}
each_length = pytest.mark.parametrize("bits", KEYS)


@pytest.fixture(autouse=True)
def known_salt(monkeypatch):
    monkeypatch.setattr(named_lock.secrets, "token_bytes", lambda count: (SALT * 9)[:count])


def master(bits=256):
    return deeplock.MasterKey.from_bytes(KEYS[bits])


def passphrase():
    return deeplock.Passphrase(TEXT, n=SCRYPT.n)


def model():
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


# The search itself

PLANTED = {
    "bytes": bytes,
    "repr": repr,
    "repr of a bytearray": lambda secret: repr(bytearray(secret)),
    "hexadecimal": bytes.hex,
    "uppercase": lambda secret: secret.hex().upper(),
    "with colons": lambda secret: secret.hex(":"),
    "with blanks": lambda secret: secret.hex(" ").upper(),
    "decimal": lambda secret: str(list(secret)),
    "decimal without blanks": lambda secret: ",".join(map(str, secret)),
    "decimal on lines": lambda secret: "\n".join(map(str, secret)),
    "a NumPy array": lambda secret: str(np.frombuffer(secret, np.uint8)),
    "a NumPy array's repr": lambda secret: repr(np.frombuffer(secret, np.uint8)),
    "signed": lambda secret: str(np.frombuffer(secret, np.int8).tolist()),
    "words": lambda secret: repr(np.frombuffer(secret, np.uint32)),
    "words of FIPS 197": lambda secret: str(np.frombuffer(secret, ">u4").tolist()),
    "long words": lambda secret: repr(np.frombuffer(secret, np.uint64)),
    "one number": lambda secret: str(int.from_bytes(secret, "big")),
    "one number from the other end": lambda secret: str(int.from_bytes(secret, "little")),
    "one hexadecimal number": lambda secret: hex(int.from_bytes(secret, "big")),
    "C": lambda secret: "{" + ", ".join(f"0x{byte:02X}" for byte in secret) + "}",
    "C's text": lambda secret: "".join(f"\\x{byte:02x}" for byte in secret),
    "LLVM's text": lambda secret: str(ir.Constant(ir.ArrayType(ir.IntType(8), len(secret)), bytearray(secret))),
    "LLVM's numbers": lambda secret: str(ir.Constant(ir.ArrayType(ir.IntType(8), len(secret)), list(secret))),
    "base64": lambda secret: base64.b64encode(secret).decode(),
    "base64 behind a byte": lambda secret: base64.b64encode(b"x" + secret).decode(),
    "base64 behind two": lambda secret: base64.urlsafe_b64encode(b"xx" + secret).decode(),
    "JSON": lambda secret: json.dumps(secret.decode("latin-1")),
    "latin-1": lambda secret: secret.decode("latin-1"),
    "a pickle": lambda secret: pickle.dumps([1, bytearray(secret)], 5),
    "an old pickle": lambda secret: pickle.dumps({"a": secret}, 0),
    "an array's pickle": lambda secret: pickle.dumps(np.frombuffer(secret, np.uint8)),
}


@each_length
@pytest.mark.parametrize("form", PLANTED)
def test_a_planted_secret_is_found(form, bits):
    leaks = Leaks({"planted": KEYS[bits]})
    shown = PLANTED[form](KEYS[bits])
    if isinstance(shown, str):
        assert leaks("", f"some text {shown} and more")
        assert leaks(f"some text {shown} and more".encode())
    assert leaks(b"\0" + shown if isinstance(shown, bytes) else shown)
    assert not leaks(PLANTED[form](random.Random(9).randbytes(bits // 8)))


@pytest.mark.parametrize("start", range(0, 32 - WINDOW + 1, STEP))
def test_each_part_of_a_secret_is_found_in_each_form(start):
    leaks, part = Leaks({"planted": KEYS[256]}), KEYS[256][start : start + WINDOW]
    assert leaks(b"\xff" + part + b"\xff") != []
    for form, text in written(part):
        assert leaks(f"<{text}>") != [], form


def test_nothing_is_found_where_nothing_is():
    assert LEAKS[256](random.Random(5).randbytes(100_000), "a text " * 1000, repr(list(range(5000)))) == []


# Objects


def used_lock(key):
    """Give a lock in the middle of its work, with all its keys at hand."""
    lock = named_lock.NamedLock.new(key, "counter", deeplock.AES)
    lock.kept = model()
    lock.cover({name: (tensor.nbytes, None) for name, tensor in lock.kept.items()})
    ranges = [Range(name, *2 * [tensor.ctypes.data], tensor.nbytes) for name, tensor in lock.kept.items()]
    lock.lock(ranges, 1, seal=True, then=lambda seals: seals)
    for name in SHAPES:
        lock.stream(name)
    return lock


def used(schedule):
    schedule.keystream(100, 200_000)
    return schedule


SECRET_OBJECTS = {
    "MasterKey": master,
    "Derivation": lambda bits: Derivation(master(bits), SALT),
    "CounterSchedule": lambda bits: used(deeplock.CounterSchedule(master(bits), IV)),
    "ExpansionSchedule": lambda bits: used(deeplock.ExpansionSchedule(master(bits))),
    "Passphrase": lambda bits: passphrase(),
    "NamedLock": lambda bits: used_lock(master(bits)),
    "NamedLock of a passphrase": lambda bits: used_lock(passphrase()),
    "KeyTable of tensor keys": lambda bits: used_lock(master(bits))._tables["tensor"],
    "KeyTable of seal keys": lambda bits: used_lock(master(bits))._tables["seal"],
}
OPEN_OBJECTS = {
    "LockHeader": lambda bits: deeplock.lock_tensors(model(), master(bits)),
    "LockHeader of a passphrase": lambda bits: deeplock.lock_tensors(model(), passphrase()),
    "SBox": lambda bits: deeplock.AES,
}
OBJECTS = SECRET_OBJECTS | OPEN_OBJECTS


def memory(value, depth=4):
    """Yield the bytes that an object refers to, over a few steps."""
    if isinstance(value, (bytes, bytearray)) or hasattr(value, "_length_"):
        yield bytes(value)
    elif depth and not isinstance(value, type):
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if name[:2] != "__"]
        parts = [getattr(value, name, None) for name in slots] + [*getattr(value, "__dict__", {}).values()]
        parts += [*value.values()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
        for part in parts:
            yield from memory(part, depth - 1)


@pytest.mark.parametrize("kind", OBJECTS)
@each_length
def test_no_text_of_an_object_shows_a_key(kind, bits):
    value, leaks = OBJECTS[kind](bits), LEAKS[bits]
    assert bool(leaks(*memory(value))) == (kind in SECRET_OBJECTS)  # there is something to show
    assert leaks(repr(value), str(value), ascii(value), f"{value}", f"{value!r:>300}", format(value)) == []
    assert leaks("%s %r" % (value, value), "{0} {0!r} {0!s} {0!a}".format(value), f"{[value]} { {1: (value,)} }") == []  # noqa: UP031, UP032
    assert leaks(pprint.pformat([value]), reprlib.repr(value), json.dumps({"a": value}, default=repr)) == []
    assert leaks(str(inspect.getdoc(value)), repr(dir(value)), repr(BaseException(value)), str(KeyError(value))) == []


COPIES = {f"pickle {protocol}": lambda value, protocol=protocol: pickle.dumps(value, protocol) for protocol in range(6)}
COPIES |= {
    "pickle in a list": lambda value: pickle.dumps([value]),
    "deepcopy": lambda value: memory(copy.deepcopy(value)),
    "deepcopy in a dict": lambda value: memory(copy.deepcopy({"a": [value]})),
}


# A lock refuses to be copied before its tables come to it; nobody else has them.
WITHIN = {kind for kind in OBJECTS if kind.startswith("KeyTable")}


@pytest.mark.parametrize(
    ("kind", "way"), [(kind, way) for kind in OBJECTS for way in COPIES if kind not in WITHIN or way.startswith("pickle")]
)
def test_no_copy_has_a_key(kind, way):
    value = OBJECTS[kind](256)
    if kind in OPEN_OBJECTS:
        COPIES[way](value)
        return
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)) as caught:
        COPIES[way](value)
    assert LEAKS[256](*report(caught.value)) == []


# Errors, and what reporters of errors collect


def report(error):
    """Give all that a reporter of errors can see of one: its texts and those behind it, with all local variables."""
    lines = traceback.TracebackException.from_exception(error, capture_locals=True).format()
    return [*lines, str(error), repr(error), repr(error.args), repr(vars(error))]


def attempt(*operations):
    """Run what must fail with a `DeepLockError`; give what each says of itself, and nothing of this function's own."""
    for operation in operations:
        with pytest.raises(deeplock.DeepLockError) as caught:
            operation()
        yield from report(caught.value)


def locked(key, **keywords):
    tensors = model()
    return tensors, deeplock.lock_tensors(tensors, key, **keywords)


OWN_BOX = deeplock.SBox(bytes(random.Random(3).sample(range(256), 256)))


def mistakes_in_files(key, operation, source):
    yield lambda: operation(source, "new", "text")
    yield lambda: operation("none", "new", key)
    yield lambda: operation("key", "new", key)
    yield lambda: operation(source, source, key)
    yield lambda: operation(source, "no/directory", key)
    yield lambda: operation(source, "new", key, threads=0)


def mistakes_in_directories(key, operation):
    yield lambda: operation("locked directory", "new", OTHER)
    yield lambda: operation("plain directory", "new", key)
    yield lambda: operation("altered directory", "new", key)
    yield lambda: operation("locked", "new", key)
    yield lambda: operation("plain directory", "plain directory", key)
    yield lambda: operation("locked directory", "no/directory", "text")
    yield lambda: operation("locked directory", "new", key, threads=0)
    yield lambda: operation("locked directory", "new", key, executor=key)
    yield lambda: operation(key, "new", "locked directory")


def mistakes_in_bytes(key, operation):
    schedule = deeplock.CounterSchedule(key, IV)
    wiped = deeplock.CounterSchedule(key, IV)
    wiped.wipe()
    yield lambda: operation("text", schedule)
    yield lambda: operation(bytearray(9), key)
    yield lambda: operation(bytearray(9), wiped)
    yield lambda: operation(bytearray(9), schedule, offset=2**63)
    yield lambda: operation(bytearray(9), schedule, sbox="none")
    yield lambda: operation(bytearray(9), schedule, out=bytearray(8))
    yield lambda: operation(bytearray(9), schedule, out=bytes(9))
    yield lambda: operation(bytearray(9), schedule, threads=0)
    data = bytearray(99)
    yield lambda: operation(memoryview(data)[1:], deeplock.ExpansionSchedule(key), out=memoryview(data)[:-1])


def mistakes_in_unlocking(key):
    tensors, header = locked(key)
    _, with_own = locked(key, sbox=OWN_BOX)
    yield lambda: deeplock.unlock_tensors(tensors, OTHER, header)
    yield lambda: deeplock.unlock_tensors(tensors, deeplock.MasterKey.generate(128), header)
    yield lambda: deeplock.unlock_tensors({}, key, header)
    yield lambda: deeplock.unlock_tensors({name: bytearray(1) for name in tensors}, key, header)
    yield lambda: deeplock.unlock_tensors({name: memoryview(bytes(1)) for name in tensors}, key, header)
    yield lambda: deeplock.unlock_tensors(tensors, key, with_own)
    yield lambda: deeplock.unlock_tensors(tensors, key, header, sbox=OWN_BOX)
    yield lambda: deeplock.unlock_tensors(tensors, key, header.to_json())


def mistakes_in_unlocking_one(key):
    tensors, header = locked(key)
    data = tensors["layer.bias"]
    yield lambda: deeplock.unlock_tensor(data, OTHER, header, "layer.bias")
    yield lambda: deeplock.unlock_tensor(data, key, header, "none")
    yield lambda: deeplock.unlock_tensor(data, key, header, "layer.bias", offset=1)
    yield lambda: deeplock.unlock_tensor(data, key, header, "layer.bias", out=bytes(160))
    yield lambda: deeplock.unlock_tensor("text", key, header, "layer.bias")


def mistakes_in_rekeying_bytes(key):
    schedule = deeplock.CounterSchedule(key, IV)
    for place in range(2):

        def operation(data, other, place=place, **keywords):
            schedules = [schedule, schedule]
            schedules[place] = other
            return deeplock.rekey(data, *schedules, **keywords)

        yield from mistakes_in_bytes(key, operation)


def mistakes_in_rekeying(key):
    tensors, header = locked(key)
    _, with_own = locked(key, sbox=OWN_BOX)
    yield lambda: deeplock.rekey_tensors(tensors, OTHER, key, header)
    yield lambda: deeplock.rekey_tensors(tensors, deeplock.MasterKey.generate(128), key, header)
    yield lambda: deeplock.rekey_tensors(tensors, key, "text", header)
    yield lambda: deeplock.rekey_tensors(tensors, key, header, key)
    yield lambda: deeplock.rekey_tensors({}, key, OTHER, header)
    yield lambda: deeplock.rekey_tensors(tensors, key, OTHER, header, schedule=key)
    yield lambda: deeplock.rekey_tensors(tensors, key, OTHER, header, threads=0)
    yield lambda: deeplock.rekey_tensors(tensors, key, OTHER, with_own)
    tensors["layer.bias"][0] += 1
    for schedule in ("counter", "expansion"):
        yield lambda schedule=schedule: deeplock.rekey_tensors(tensors, key, OTHER, header, schedule=schedule)


def mistakes_in_verifying(key):
    tensors, header = locked(key)
    yield lambda: deeplock.verify_tensors(tensors, OTHER, header)
    yield lambda: deeplock.verify_tensors(tensors, key, dataclasses.replace(header, mac=bytes(32)))
    yield lambda: deeplock.verify_tensors(tensors, key, dataclasses.replace(header, mac=None))
    yield lambda: deeplock.verify_tensors(*bare_and_key(key))
    tensors["layer.bias"][0] += 1
    yield lambda: deeplock.verify_tensors(tensors, key, header)
    yield lambda: deeplock.unlock_tensors(tensors, key, header)
    yield lambda: deeplock.unlock_tensor(tensors["layer.bias"], key, header, "layer.bias")


def bare_and_key(key):
    tensors, header = locked(key, seal=False)
    return tensors, key, header


MISTAKES = {
    "CounterSchedule": lambda key: [
        lambda: deeplock.CounterSchedule(key, IV[:9]),
        lambda: deeplock.CounterSchedule(IV, key),
        lambda: deeplock.CounterSchedule(key, IV).keystream(-1),
    ],
    "ExpansionSchedule": lambda key: [
        lambda: deeplock.ExpansionSchedule([key]),
        lambda: deeplock.ExpansionSchedule(key).keystream(9, 2**63),
    ],
    "LockHeader": lambda key: [
        lambda: deeplock.LockHeader.from_json(key),
        lambda: deeplock.LockHeader.from_json(locked(key)[1].to_json()[:-1]),
        lambda: deeplock.LockHeader.from_json(locked(key)[1].to_json().replace("aes", "none")),
    ],
    "MasterKey": lambda key: [
        deeplock.MasterKey,
        lambda: deeplock.MasterKey.from_bytes([key]),
        lambda: deeplock.MasterKey.from_hex(key),
        lambda: deeplock.MasterKey.generate(key),
        lambda: deeplock.MasterKey.from_file(key),
        lambda: deeplock.MasterKey.from_file("broken key"),
        lambda: deeplock.MasterKey.from_file("plain"),
        lambda: key.to_file("key"),
        lambda: key.to_file("no/directory"),
    ],
    "Passphrase": lambda key: [
        lambda: deeplock.Passphrase(TEXT + "\n"),
        lambda: deeplock.Passphrase(key),
        lambda: deeplock.Passphrase(TEXT, n=3),
        lambda: passphrase().derive(None),
        lambda: passphrase().derive(key),
        lambda: passphrase().derive(SCRYPT._replace(n=5)),
        lambda: deeplock.lock_tensors(model(), passphrase(), threads=0),
        lambda: deeplock.unlock_tensors(*locked(key)[:1], passphrase(), locked(key)[1]),
        lambda: deeplock.unlock_tensors(model(), key, locked(passphrase())[1]),
        lambda: deeplock.unlock_tensors(model(), passphrase(), locked(passphrase())[1]),
        lambda: deeplock.rekey_tensors(model(), passphrase(), key, locked(passphrase())[1]),
    ],
    "key_from_command": lambda key: [
        lambda: deeplock.key_from_command("cat 'broken key'"),
        lambda: deeplock.key_from_command("sh -c 'cat key; exit 1'"),
        lambda: deeplock.key_from_command("sh -c 'cat key key'"),
        lambda: deeplock.key_from_command("sh -c 'cat key; sleep 9'", timeout=0.5),
        lambda: deeplock.key_from_command(key),
        lambda: deeplock.key_from_command("none-such"),
    ],
    "key_from_environment": lambda key: [
        lambda: deeplock.key_from_environment("BROKEN_KEY"),
        lambda: deeplock.key_from_environment("NO_KEY"),
        lambda: deeplock.key_from_environment(key),
    ],
    "wrap_key": lambda key: [
        lambda: deeplock.wrap_key("key", key),
        lambda: deeplock.wrap_key("key", passphrase()),
        lambda: deeplock.wrap_key("new", key, bits=3),
        lambda: deeplock.wrap_key("new", "text"),
    ],
    "unwrap_key": lambda key: [
        lambda: deeplock.unwrap_key("wrapped", OTHER),
        lambda: deeplock.unwrap_key("wrapped", passphrase()),
        lambda: deeplock.unwrap_key("key", key),
        lambda: deeplock.unwrap_key("broken key", passphrase()),
        lambda: deeplock.unwrap_key(key, "wrapped"),
    ],
    "rewrap_key": lambda key: [
        lambda: deeplock.rewrap_key("wrapped", "key", key, OTHER),
        lambda: deeplock.rewrap_key("wrapped", "key", key, passphrase()),
        lambda: deeplock.rewrap_key("wrapped", "new", OTHER, key),
        lambda: deeplock.rewrap_key("key", "new", key, OTHER),
        lambda: deeplock.rewrap_key("wrapped", "new", key, 3),
    ],
    "SBox": lambda key: [lambda: deeplock.SBox(key), lambda: deeplock.SBox(bytes(256))],
    "expand_key": lambda key: [lambda: deeplock.expand_key(key, -1), lambda: deeplock.expand_key(4, key)],
    "get_num_threads": lambda key: [],
    "load_file": lambda key: [
        lambda: deeplock.load_file("locked", OTHER),
        lambda: deeplock.load_file("altered", key),
        lambda: deeplock.load_file("plain", key),
        lambda: deeplock.load_file("key", key),
        lambda: deeplock.load_file("locked", key, tensors=key),
        lambda: deeplock.load_file("locked", key, tensors=[key]),
        lambda: deeplock.load_file("locked", key, framework=key),
        lambda: deeplock.load_file("locked", key, device=key),
        lambda: deeplock.load_file(key, "locked"),
    ],
    "lock": lambda key: mistakes_in_bytes(key, deeplock.lock),
    "lock_checkpoint": lambda key: [
        lambda: deeplock.lock_checkpoint("locked directory", "new", key),
        lambda: deeplock.lock_checkpoint("plain", "new", key),
        lambda: deeplock.lock_checkpoint("plain directory", "plain directory", key),
        lambda: deeplock.lock_checkpoint("plain directory", "new", "text"),
        lambda: deeplock.lock_checkpoint("plain directory", "new", key, executor=key),
        lambda: deeplock.lock_checkpoint(key, "new", "plain directory"),
        lambda: deeplock.lock_checkpoint("plain directory", "new", key, schedule=key),
        lambda: deeplock.lock_checkpoint("plain directory", "new", key, exclude=key),
        lambda: deeplock.lock_checkpoint("secret directory", "new", key),
    ],
    "lock_file_in_place": lambda key: [
        lambda: deeplock.lock_file_in_place("locked", key),
        lambda: deeplock.lock_file_in_place("key", key),
        lambda: deeplock.lock_file_in_place("plain", "text"),
        lambda: deeplock.lock_file_in_place("plain", key, only=key),
        lambda: deeplock.lock_file_in_place(key, "plain"),
    ],
    "lock_file": lambda key: [
        *mistakes_in_files(key, deeplock.lock_file, "plain"),
        lambda: deeplock.lock_file("locked", "new", key),
        lambda: deeplock.lock_file("plain", "new", key, schedule="none"),
        lambda: deeplock.lock_file("plain", "new", key, only="none"),
    ],
    "lock_tensors": lambda key: [
        lambda: deeplock.lock_tensors(key, model()),
        lambda: deeplock.lock_tensors({"a": "text"}, key),
        lambda: deeplock.lock_tensors({"a": bytes(9)}, key),
        lambda: deeplock.lock_tensors({key.bits: bytearray(9)}, key),
        lambda: deeplock.lock_tensors(model(), key, only="none"),
        lambda: deeplock.lock_tensors(model(), key, schedule="none"),
        lambda: deeplock.lock_tensors(model(), key, sbox="none"),
        lambda: deeplock.lock_tensors(model(), key, threads=-1),
    ],
    "open_locked": lambda key: [
        lambda: deeplock.open_locked("locked", OTHER),
        lambda: deeplock.open_locked("locked", key).get_tensor("none"),
        lambda: deeplock.open_locked("locked", key).get_slice(sorted(model())[0])["none"],
        lambda: deeplock.open_locked("altered", key).get_tensors(model()),
        lambda: deeplock.open_locked("locked").get_tensor(key),
        lambda: deeplock.open_locked(key, "locked"),
    ],
    "read_header": lambda key: [lambda: deeplock.read_header("key"), lambda: deeplock.read_header("plain")],
    "recover_file": lambda key: [
        lambda: deeplock.recover_file("key", key, undo=True),
        lambda: deeplock.recover_file("broken journal", key),
        lambda: deeplock.recover_file(key, "locked"),
    ],
    "rekey": mistakes_in_rekeying_bytes,
    "rekey_checkpoint": lambda key: mistakes_in_directories(
        key, lambda *arguments, **keywords: deeplock.rekey_checkpoint(*arguments, OTHER, **keywords)
    ),
    "rekey_file": lambda key: [
        *mistakes_in_files(key, lambda *arguments, **keywords: deeplock.rekey_file(*arguments, OTHER, **keywords), "locked"),
        lambda: deeplock.rekey_file("locked", "new", OTHER, key),
        lambda: deeplock.rekey_file("locked", "new", key, "text"),
        lambda: deeplock.rekey_file("locked", "new", key, OTHER, schedule=key),
        lambda: deeplock.rekey_file("plain", "new", key, OTHER),
        lambda: deeplock.rekey_file("altered", "new", key, OTHER),
    ],
    "rekey_tensors": mistakes_in_rekeying,
    "set_num_threads": lambda key: [lambda: deeplock.set_num_threads(key)],
    "native_functions": lambda key: [
        lambda: deeplock.native_functions(key),
        lambda: deeplock.native_functions()[key],
    ],
    "substitute": lambda key: [lambda: deeplock.substitute(bytearray(9), key)],
    "tiers": lambda key: [],
    "unlock": lambda key: mistakes_in_bytes(key, deeplock.unlock),
    "unlock_checkpoint": lambda key: mistakes_in_directories(key, deeplock.unlock_checkpoint),
    "unlock_file_in_place": lambda key: [
        lambda: deeplock.unlock_file_in_place("locked", OTHER),
        lambda: deeplock.unlock_file_in_place("altered", key),
        lambda: deeplock.unlock_file_in_place("plain", key),
        lambda: deeplock.unlock_file_in_place("key", key),
        lambda: deeplock.unlock_file_in_place("broken journal", key),
    ],
    "unlock_to_memory": lambda key: [
        lambda: deeplock.unlock_to_memory("locked", OTHER),
        lambda: deeplock.unlock_to_memory("altered", key),
        lambda: deeplock.unlock_to_memory("plain", key),
        lambda: deeplock.unlock_to_memory("key", key),
        lambda: deeplock.unlock_to_memory(key, "locked"),
    ],
    "unlock_file": lambda key: [
        *mistakes_in_files(key, deeplock.unlock_file, "locked"),
        lambda: deeplock.unlock_file("locked", "new", OTHER),
        lambda: deeplock.unlock_file("plain", "new", key),
        lambda: deeplock.unlock_file("altered", "new", key),
    ],
    "unlock_tensor": mistakes_in_unlocking_one,
    "unlock_tensors": mistakes_in_unlocking,
    "use_tier": lambda key: [lambda: deeplock.use_tier(key)],
    "verify_checkpoint": lambda key: [
        lambda: deeplock.verify_checkpoint("locked directory", OTHER),
        lambda: deeplock.verify_checkpoint("altered directory", key),
        lambda: deeplock.verify_checkpoint("plain directory", key),
        lambda: deeplock.verify_checkpoint("locked", key),
        lambda: deeplock.verify_checkpoint(key, "locked directory"),
    ],
    "verify_file": lambda key: [
        lambda: deeplock.verify_file("locked", OTHER),
        lambda: deeplock.verify_file("plain", key),
        lambda: deeplock.verify_file("key", key),
        lambda: deeplock.verify_file("altered", key),
        lambda: deeplock.verify_file("bare", key),
        lambda: deeplock.verify_file(key, "locked"),
    ],
    "verify_tensors": mistakes_in_verifying,
    "warmup": lambda key: [lambda: deeplock.warmup(key)],
}


MISPLACED_KEYS = {".broken journal.deeplock-journal", "secret directory/key"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a key file, a plain file and a locked one."""
    monkeypatch.chdir(tmp_path)
    master().to_file("key")
    Path("broken key").write_text(KEYS[256].hex() + "0")
    Path("passphrase").write_text(TEXT)
    Path("passphrase").chmod(0o600)
    monkeypatch.setenv("BROKEN_KEY", KEYS[256].hex() + "0")
    monkeypatch.setenv("A_KEY", KEYS[256].hex())
    monkeypatch.delenv("NO_KEY", raising=False)
    deeplock.wrap_key("wrapped", master())
    safetensors.numpy.save_file(model(), "plain")
    deeplock.lock_file("plain", "locked", master())
    deeplock.lock_file("plain", "bare", master(), seal=False)
    altered = bytearray(Path("locked").read_bytes())
    altered[-1] ^= 1
    Path("altered").write_bytes(altered)
    Path("broken journal").write_bytes(altered)
    Path(".broken journal.deeplock-journal").write_text(KEYS[256].hex())
    for name, files in {"plain": ["plain"], "locked": ["locked"], "altered": ["altered"], "secret": ["plain", "key"]}.items():
        directory = Path(f"{name} directory")
        directory.mkdir()
        shutil.copy(files[0], directory / "model.safetensors")
        for other in files[1:]:
            shutil.copy(other, directory)
    return tmp_path


def test_there_are_mistakes_for_every_public_function():
    public = {name for name in deeplock.__all__ if callable(getattr(deeplock, name))}
    assert MISTAKES.keys() == {name for name in public if not name.endswith("Error")}


@pytest.mark.parametrize("name", MISTAKES)
def test_no_error_of_a_public_function_shows_a_key(name, folder):
    assert LEAKS[256](*attempt(*MISTAKES[name](master()))) == []


def test_a_report_with_a_key_in_it_is_noticed():
    def fails():
        shown = KEYS[256]
        deeplock.CounterSchedule(shown, "iv")

    assert LEAKS[256](*attempt(fails)) != []


# What a moment can show


KEPT = Leaks({name: secret for name, secret in SECRETS[256].items() if not name.startswith("key stream")})


class Watch:
    """Notes which local variables of the package show a secret at any line: what an exception that came there would show."""

    def __init__(self):
        self.found = set()

    def __call__(self, frame, event, argument):
        path = frame.f_code.co_filename
        if not path.startswith(str(PACKAGE)):
            return None
        for name, value in list(frame.f_locals.items()):
            try:
                text = repr(value)
            except Exception:  # an object that is not finished
                continue
            if KEPT(text):
                self.found.add((os.path.relpath(path, PACKAGE), frame.f_code.co_name, name))
        return self

    def over(self, work):
        before = sys.gettrace()
        sys.settrace(self)
        threading.settrace(self)
        try:
            work()
        finally:
            sys.settrace(before)
            threading.settrace(None)
        return self.found


def everything(schedule, key):
    for name in ("lock", "unlock"):
        with deeplock.CounterSchedule(key, IV) as counter, deeplock.ExpansionSchedule(key) as expansion:
            for stream in (counter, expansion):
                getattr(deeplock, name)(bytearray(99), stream)
                stream.keystream(20)
                deeplock.rekey(bytearray(99), counter, stream)
    deeplock.expand_key(key, 60)
    tensors, header = locked(key, schedule=schedule, threads=1)
    for name, tensor in tensors.items():
        deeplock.unlock_tensor(tensor, key, header, name)
        deeplock.unlock_tensor(tensor.reshape(-1)[1:], key, header, name, offset=4)
    deeplock.verify_tensors(tensors, key, header, threads=1)
    for new_schedule in (schedule, "counter", schedule):
        header = deeplock.rekey_tensors(tensors, key, key, header, schedule=new_schedule, threads=1)
    deeplock.unlock_tensors(tensors, key, header, threads=2)
    deeplock.lock_file("plain", "locked first", key, schedule=schedule)
    deeplock.rekey_file("locked first", "other", key, key)
    deeplock.verify_file("other", key)
    deeplock.unlock_file("other", "back", key)
    assert Path("back").read_bytes() == Path("plain").read_bytes()
    key.to_file("other key")
    with deeplock.MasterKey.from_file("other key") as again, deeplock.MasterKey.from_hex("00" * 16) as other:
        assert again == key != other
    os.unlink("other key")
    deeplock.MasterKey.generate()
    assert key == deeplock.key_from_environment("A_KEY") == deeplock.key_from_command("cat key")
    with passphrase_from_file("passphrase") as secret:
        header = deeplock.lock_tensors(tensors, secret, schedule=schedule)
        deeplock.unlock_tensors(tensors, secret, header)
        for name, first, second in (("again", key, secret), ("and again", secret, key)):
            deeplock.rewrap_key("wrapped", name, first, second)
            os.replace(name, "wrapped")
        deeplock.unwrap_key("wrapped", key)


def test_no_moment_can_show_a_key(folder):
    found, key = set(), master()
    for schedule in ("counter", "expansion"):
        everything(schedule, key)  # compiling under watch would take minutes
        found |= Watch().over(lambda schedule=schedule: everything(schedule, key))
    assert found == set()


# Keys where they do not belong, and what is nearly a key where one does

BYTES = {
    "bytes": KEYS[256],
    "a bytearray": bytearray(KEYS[256]),
    "an array": np.frombuffer(KEYS[256], np.uint8),
    "a list": list(KEYS[256]),
    "digits": KEYS[256].hex(),
    "digits as bytes": KEYS[256].hex().encode(),
}


def no_key(value):
    """Give what comes close to a key and is none."""
    return value + value[:1] if isinstance(value, (str, bytes, bytearray)) else value


WRONG_PLACES = {
    "MasterKey.generate(bits)": deeplock.MasterKey.generate,
    "lock_tensors(key)": lambda value: deeplock.lock_tensors(model(), no_key(value)),
    "MasterKey.from_bytes(data)": lambda value: deeplock.MasterKey.from_bytes(no_key(value)),
    "MasterKey.from_hex(text)": lambda value: deeplock.MasterKey.from_hex(no_key(value)),
    "MasterKey.from_file(path)": lambda value: deeplock.MasterKey.from_file([value]),
    "LockHeader.from_json(text)": lambda value: deeplock.LockHeader.from_json([value]),
    "lock(schedule)": lambda value: deeplock.lock(bytearray(9), value),
    "lock(sbox)": lambda value: deeplock.lock(bytearray(9), deeplock.CounterSchedule(IV, IV), sbox=value),
    "lock(offset)": lambda value: deeplock.lock(bytearray(9), deeplock.CounterSchedule(IV, IV), offset=value),
    "lock(threads)": lambda value: deeplock.lock(bytearray(9), deeplock.CounterSchedule(IV, IV), threads=value),
    "lock_tensors(tensors)": lambda value: deeplock.lock_tensors(value, OTHER),
    "lock_tensors(schedule)": lambda value: deeplock.lock_tensors(model(), OTHER, schedule=value),
    "lock_tensors(sbox)": lambda value: deeplock.lock_tensors(model(), OTHER, sbox=value),
    "lock_tensors(only)": lambda value: deeplock.lock_tensors(model(), OTHER, only=[value]),
    "unlock_tensor(name)": lambda value: deeplock.unlock_tensor(bytearray(9), OTHER, locked(OTHER)[1], value),
    "unlock_tensors(header)": lambda value: deeplock.unlock_tensors(model(), OTHER, value),
    "expand_key(words)": lambda value: deeplock.expand_key(OTHER, value),
    "set_num_threads(threads)": deeplock.set_num_threads,
    "use_tier(name)": deeplock.use_tier,
    "warmup(tier)": deeplock.warmup,
}


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("place", WRONG_PLACES)
def test_no_message_repeats_a_key_that_was_given_for_something_else(place, kind):
    with pytest.raises((deeplock.DeepLockError, ValueError)) as caught:  # NumPy's own, where an array is compared
        WRONG_PLACES[place](BYTES[kind])
    assert LEAKS[256](str(caught.value), repr(caught.value), *map(str, caught.value.args)) == []


# The command


COMMAND_LINES = {
    "lock": (0, "lock plain new --key key"),
    "lock by the paper": (0, "lock plain new --key key --schedule expansion --sbox sm4 --only *.bias"),
    "unlock": (0, "unlock locked new --key key"),
    "verify": (0, "verify locked --key key"),
    "verify an altered file": (4, "verify altered --key key"),
    "verify without seals": (1, "verify bare --key key"),
    "unlock an altered file": (4, "unlock altered new --key key"),
    "inspect": (0, "inspect locked"),
    "inspect a plain file": (0, "inspect plain"),
    "keygen": (0, "keygen new"),
    "keygen over a key": (1, "keygen key"),
    "tiers": (0, "tiers"),
    "a key file as the model": (1, "lock key new --key key"),
    "a key file as the locked model": (1, "unlock key new --key key"),
    "a key file to inspect": (1, "inspect key"),
    "a key file as both": (1, "lock plain key --key key --threads 1 --only none"),
    "a model as the key": (1, "lock plain new --key plain"),
    "a broken key": (1, "lock plain new --key broken\0key"),
    "no key": (1, "lock plain new --key none"),
    "another key": (3, "unlock locked new --key other"),
    "a locked file": (1, "lock locked new --key key"),
    "a plain file": (1, "unlock plain new --key key"),
    "no file": (1, "unlock none new --key key"),
    "no directory": (1, "lock plain none/new --key key"),
    "a variable": (0, "lock plain new --key-env A_KEY"),
    "a broken variable": (1, "lock plain new --key-env BROKEN_KEY"),
    "no variable": (1, "lock plain new --key-env NO_KEY"),
    "a command": (0, "unlock locked new --key-command cat\0key"),
    "a command for a broken key": (1, "unlock locked new --key-command cat\0broken\\\0key"),
    "a passphrase": (0, "lock plain new --passphrase-file passphrase"),
    "a key file as the passphrase": (3, "unlock locked new --passphrase-file key"),
    "a model as the passphrase": (1, "unlock locked new --passphrase-file plain"),
    "a passphrase as the key": (1, "unlock locked new --key passphrase"),
    "wrap-key": (0, "wrap-key new --key key"),
    "wrap-key over a key": (1, "wrap-key key --key key"),
    "rewrap-key": (0, "rewrap-key wrapped new --key key --new-passphrase-file passphrase"),
    "rewrap-key of a key": (1, "rewrap-key key new --key key --new-key other"),
    "a wrapped key": (0, "lock plain new --key key --wrapped-key wrapped"),
    "a wrapped key of another": (3, "lock plain new --key other --wrapped-key wrapped"),
    "a key file as the wrapped key": (1, "lock plain new --key key --wrapped-key key"),
    "no such S-Box": (2, "lock plain new --key key --sbox none"),
    "no such option": (2, "lock plain new --key key --none"),
    "nothing": (2, ""),
    "--help": (0, "--help"),
    "lock --help": (0, "lock --help"),
    "unlock --help": (0, "unlock --help"),
    "keygen --help": (0, "keygen --help"),
    "inspect --help": (0, "inspect --help"),
}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_no_word_and_no_file_of_the_command_shows_a_key(line, folder, capsys):
    code, text = COMMAND_LINES[line]
    OTHER.to_file("other")
    keys = {name: content for name, content in contents(folder).items() if LEAKS[256](content)}
    assert keys.keys() == {"key", "other", "broken key", "passphrase", *MISPLACED_KEYS}
    try:
        found = main([part.replace("\0", " ") for part in text.split()])
    except SystemExit as end:
        found = end.code
    assert found == code
    assert LEAKS[256](*capsys.readouterr()) == []
    for name, content in contents(folder).items():
        assert LEAKS[256](name) == []
        assert LEAKS[256](content) == [] or content == keys.get(name), name


@pytest.mark.parametrize("read", [deeplock.read_header, lambda path: deeplock.lock_file(path, "new", OTHER)])
def test_a_key_file_taken_for_a_model_shows_nothing_of_itself(read, folder):
    said = set()
    for digits in ("0" * 64, "1234567890abcdef" * 4, KEYS[256].hex()):
        Path("key").write_text(digits + "\n")
        with pytest.raises(deeplock.DeepLockError) as caught:
            read("key")
        said.add(str(caught.value))
    assert len(said) == 1


# A process from its start to its end

PROGRAM = """
import gc, logging, os, sys, warnings
logging.basicConfig(level=logging.DEBUG, filename="log", format="%(name)s %(message)s %(args)s")
logging.captureWarnings(True)
warnings.simplefilter("always")
import numpy as np
import deeplock_kernels as deeplock

def work():
    with deeplock.MasterKey.from_file(sys.argv[1]) as key:
        weights = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        header = deeplock.lock_tensors(weights, key)
        logging.debug("%s %r %s", key, header, {"key": key})
        warnings.warn(f"{key}")
        with deeplock.ExpansionSchedule(key) as schedule:
            deeplock.lock(bytearray(9), schedule)
        for name, wrong in (("lock", 1), ("unlock", 2)):
            try:
                getattr(deeplock, name + "_file")("plain", "new", key, threads=wrong - 1)
            except deeplock.DeepLockError:
                logging.exception("%s", name)
        deeplock.lock_file("plain", "locked", key)
        deeplock.unlock_tensors(weights, key, header)
        with open("header", "w") as file:
            file.write(header.to_json())

work()
gc.collect()
seen, left = set(), [gc.get_objects(), [vars(module) for module in list(sys.modules.values())]]
with open("alive", "wb") as file:
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind = type(value)  # isinstance would follow weak references
        if issubclass(kind, (bytes, bytearray)):
            file.write(value)
        elif issubclass(kind, str):
            file.write(value.encode(errors="replace"))
        elif issubclass(kind, np.ndarray) and value.dtype != object:
            file.write(np.asarray(value).tobytes())
        elif hasattr(kind, "_length_"):  # memory of ctypes
            file.write(bytes(value))
        left += gc.get_referents(value)
        file.write(b"\\n")
print("done")
"""


def test_a_process_leaves_no_key_behind(tmp_path):
    """Its log with all of Numba's, its warnings, every file that it makes, and what is alive after its last lock."""
    (tmp_path / "secret").mkdir()
    key, home = tmp_path / "secret" / "key", tmp_path / "home"
    master().to_file(key)
    home.mkdir()
    safetensors.numpy.save_file(model(), home / "plain")
    places = {"HOME": home, "TMPDIR": home, "XDG_CACHE_HOME": home, "DEEPLOCK_CACHE_DIR": home / "cache"}
    program = PROGRAM.replace("SHAPES", repr(SHAPES))
    assert run(program, key, cwd=home, NUMBA_CACHE_DIR=home / "numba", **places) == "done\n"
    log = (home / "log").read_text()
    assert "numba." in log
    assert log.count("MasterKey(256 bits)") > 2
    salt = deeplock.LockHeader.from_json((home / "header").read_text()).salt
    file_salt = deeplock.read_header(home / "locked").salt
    kept = {f"{name}, {n}": secret for n, s in enumerate((salt, file_salt)) for name, secret in derived(KEYS[256], s).items()}
    leaks = Leaks(kept)
    files = [path for path in home.rglob("*") if path.is_file()]
    assert {"alive", "log", "header", "locked", "plain"} < {path.name for path in files}
    assert any(path.suffix == ".o" for path in files)
    for path in files:
        assert leaks(str(path.relative_to(home)), path.read_bytes()) == [], path
