"""The command `deeplock`: exit codes, where its words go, and that a failed command leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import os
import pty
import re
import select
import shlex
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import time

import numpy as np
import processes
import pytest
import safetensors
import safetensors.numpy
from processes import ROOT
from support import KEYS, painted

import deeplock_kernels
from deeplock_kernels import measure, reference
from deeplock_kernels.checkpoints import streaming as checkpoints
from deeplock_kernels.checkpoints.streaming import lock_file, read_header
from deeplock_kernels.cli import main
from deeplock_kernels.demo import show
from deeplock_kernels.key_wrapping import unwrap_key, wrap_key
from deeplock_kernels.keys import MasterKey
from deeplock_kernels.passphrases import Passphrase
from deeplock_kernels.runtime.tiers import TIERS, active_tier, use_tier
from deeplock_kernels.sboxes import SBOXES, SBox
from deeplock_kernels.schedules import SCHEDULES

COMMANDS = (
    *("keygen", "lock", "unlock", "recover", "rekey", "verify", "wrap-key", "rewrap-key"),
    *("inspect", "tiers", "sboxes", "warmup", "bench", "demo"),
)
KEY, OTHER_KEY = KEYS[256], KEYS[256][::-1]
PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with keys, a plain file and a locked one."""
    monkeypatch.chdir(tmp_path)
    for name, key in [("key", KEY), ("other.key", OTHER_KEY), ("short.key", KEYS[128])]:
        MasterKey.from_bytes(key).to_file(name)
    wrap_key("wrapped", KEY)
    (tmp_path / "passphrase").write_text(PASSPHRASE + "\n")
    (tmp_path / "passphrase").chmod(0o600)
    monkeypatch.setenv("DEEPLOCK_TEST_KEY", KEY.hex())
    monkeypatch.delenv("DEEPLOCK_TEST_NO_KEY", raising=False)
    tensors = {
        "a.weight": painted(3000).reshape(30, 100),
        "a.bias": np.zeros(40, np.float32),
        "b": np.array(1.5, np.float16),
    }
    safetensors.numpy.save_file(tensors, "plain", metadata={"x": "y"})
    lock_file("plain", "locked", KEY)
    return tmp_path


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command line in this process; give its exit code, stdout and stderr."""
    monkeypatch.setenv("PYTHON_COLORS", "0")

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def environment(**changes):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "DEEPLOCK_"))}
    for name in ("DEEPLOCK_CACHE", "DEEPLOCK_CACHE_DIR"):
        if name in os.environ:
            kept[name] = os.environ[name]
    return kept | {"PYTHONPATH": str(ROOT), "PYTHON_COLORS": "0"} | changes


COMMAND = [sys.executable, "-W", "error", "-m", "deeplock_kernels"]


def process(*arguments, text=True, **keywords):
    """Run a command line in a process of its own."""
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()} | keywords
    return subprocess.run([*COMMAND, *arguments], text=text, timeout=200, check=False, **keywords)


def snapshot(folder):
    return {
        path: (path.is_file() and path.read_bytes(), os.readlink(path) if path.is_symlink() else None)
        for path in folder.rglob("*")
    }


# Keys from elsewhere

SOURCES_OF_THE_KEY = {
    "file": "--key key",
    "variable": "--key-env DEEPLOCK_TEST_KEY",
    "command": "--key-command 'cat key'",
    "shell": "--key-command \"sh -c 'echo $DEEPLOCK_TEST_KEY'\"",
}


@pytest.mark.parametrize("source", SOURCES_OF_THE_KEY)
def test_the_key_comes_from_anywhere(folder, run, source):
    words = shlex.split(SOURCES_OF_THE_KEY[source])
    assert run("lock", "plain", "new", *words) == (0, "new: 3 tensors locked and sealed, 3,162 bytes\n", "")
    deeplock_kernels.verify_file("new", KEY)
    assert run("verify", "locked", *words)[0] == 0
    new_words = [word.replace("--key", "--new-key") for word in words]
    assert run("rekey", "new", "other", *words, *new_words)[0] == 0
    assert run("rekey", "other", "third", "--key", "key", "--new-key", "other.key")[0] == 0
    assert run("rekey", "third", "other", "--key", "other.key", *new_words)[0] == 0
    assert run("unlock", "other", "restored", *words) == (0, "restored: unlocked\n", "")
    assert (folder / "restored").read_bytes() == (folder / "plain").read_bytes()


def test_a_passphrase_from_a_file(folder, run):
    words = ("--passphrase-file", "passphrase")
    assert run("lock", "plain", "new", *words) == (0, "new: 3 tensors locked and sealed, 3,162 bytes\n", "")
    header = read_header("new")
    assert header.check == reference.check_value(reference.passphrase_key(PASSPHRASE, *header.passphrase), header.salt)
    code, out, err = run("inspect", "new")
    assert (code, err) == (0, "")
    assert "the key is made from a passphrase, by scrypt with n 131072, r 8, p 1\n" in out
    assert run("rekey", "new", "other", *words, "--new-key", "key")[0] == 0
    assert read_header("other").passphrase is None
    assert "passphrase" not in run("inspect", "other")[1]
    assert run("unlock", "new", "restored", *words) == (0, "restored: unlocked\n", "")
    assert (folder / "restored").read_bytes() == (folder / "plain").read_bytes()


def test_a_passphrase_is_asked_for_twice_where_something_is_locked_with_it(folder, run, monkeypatch):
    asked, typed = [], []
    monkeypatch.setattr(getpass, "getpass", lambda prompt: asked.append(prompt) or typed.pop(0))

    def ask(line, *answers):
        asked.clear()
        typed[:] = answers
        code, _, err = run(*line.split())
        assert typed == []
        return code, err, asked

    once, twice = ["passphrase: "], ["passphrase: ", "passphrase, again: "]
    new = [f"new {prompt}" for prompt in twice]
    assert ask("lock plain new --passphrase", "a", "b") == (
        1, "deeplock: error: passphrase: the two are not the same; nothing was done\n", twice
    )  # fmt: skip
    assert not (folder / "new").exists()
    assert ask("lock plain new --passphrase", "a", "a") == (0, "", twice)
    assert ask("verify new --passphrase", "b")[0] == 3
    assert ask("verify new --passphrase", "a") == (0, "", once)
    assert ask("rekey new other --passphrase --new-passphrase", "a", "c", "c") == (0, "", once + new)
    assert ask("unlock other restored --passphrase", "c") == (0, "", once)
    assert (folder / "restored").read_bytes() == (folder / "plain").read_bytes()
    assert ask("wrap-key data --passphrase", "d", "d") == (0, "", twice)
    assert ask("lock plain third --passphrase --wrapped-key data", "d") == (0, "", once)
    assert ask("rewrap-key data data2 --passphrase --new-passphrase", "d", "e", "e") == (0, "", once + new)
    assert ask("verify third --passphrase --wrapped-key data2", "e") == (0, "", once)


def test_a_wrapped_key_outlives_its_master(folder, run):
    said = "data: a new data key of 256 bits, wrapped; without its master key nobody has it\n"
    assert run("wrap-key", "data", "--key", "key") == (0, said, "")
    assert run("lock", "plain", "new", "--key", "key", "--wrapped-key", "data")[0] == 0
    with unwrap_key("data", KEY) as data_key:
        deeplock_kernels.verify_file("new", data_key)
    assert run("verify", "new", "--key", "key")[0] == 3
    said = "data2: the same data key, wrapped by the new master key\n"
    assert run("rewrap-key", "data", "data2", "--key", "key", "--new-key", "short.key") == (0, said, "")
    assert run("verify", "new", "--key", "short.key", "--wrapped-key", "data2")[0] == 0
    assert run("verify", "new", "--key", "short.key", "--wrapped-key", "data")[0] == 3
    assert run("wrap-key", "data3", "--key", "other.key", "--bits", "128")[0] == 0
    old, new = ("--key", "short.key", "--wrapped-key", "data2"), ("--new-key", "other.key", "--new-wrapped-key", "data3")
    assert run("rekey", "new", "other", *old, *new)[0] == 0
    assert read_header("other").key_bits == 128
    assert run("unlock", "other", "restored", "--key", "other.key", "--wrapped-key", "data3")[0] == 0
    assert (folder / "restored").read_bytes() == (folder / "plain").read_bytes()


def test_a_key_file_that_others_can_read_is_warned_about(folder):
    (folder / "key").chmod(0o640)
    (folder / "passphrase").chmod(0o604)
    words = "others than its owner can read it (mode {}); take that permission away, as by chmod 600\n"
    for arguments, out, *warned in (
        (LOCK, "new: 3 tensors locked and sealed, 3,162 bytes\n", ("key", "0640")),
        (
            "rekey new other --key key --new-passphrase-file passphrase",
            "other: 3 tensors locked under the new key and sealed\n", ("key", "0640"), ("passphrase", "0604"),
        ),
    ):  # fmt: skip
        done = process(*arguments.split())
        err = "".join(f"deeplock: warning: {name}: {words.format(mode)}" for name, mode in warned)
        assert (done.returncode, done.stdout, done.stderr) == (0, out, err)
    (folder / "key").chmod(0o600)
    assert process(*VERIFY.split()).stderr == ""


def test_a_passphrase_is_typed_on_a_terminal_that_does_not_show_it(folder):
    ours, theirs = pty.openpty()
    # The leader of a new session takes the first terminal that it opens for its own.
    shell = ["sh", "-c", f'exec 9<>{shlex.quote(os.ttyname(theirs))}; exec "$@"', "sh", *COMMAND]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        for arguments, prompts in (
            ("lock plain new --passphrase", ["passphrase: ", "passphrase, again: "]),
            ("unlock new restored --passphrase", ["passphrase: "]),
        ):
            with subprocess.Popen([*shell, *arguments.split()], env=environment(), start_new_session=True, **quiet) as running:
                for prompt in prompts:
                    shown = b""
                    while not shown.endswith(prompt.encode()):
                        assert select.select([ours], [], [], 200)[0], shown
                        shown += os.read(ours, 1)
                    assert PASSPHRASE.encode() not in shown
                    os.write(ours, f"{PASSPHRASE}\n".encode())
                _, err = running.communicate(timeout=200)
            assert (running.returncode, err) == (0, b""), err
        os.set_blocking(ours, False)
        assert PASSPHRASE.encode() not in os.read(ours, 1000)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (folder / "restored").read_bytes() == (folder / "plain").read_bytes()


def test_without_a_terminal_no_passphrase_is_asked_for(folder):
    done = process("lock", "plain", "new", "--passphrase", input=f"{PASSPHRASE}\n" * 2, start_new_session=True)
    words = "deeplock: error: passphrase: there is no terminal to ask on; give it in a file, such as /dev/stdin\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", words)
    assert not (folder / "new").exists()
    done = process("lock", "plain", "new", "--passphrase-file", "/dev/stdin", input=f"{PASSPHRASE}\n")
    assert (done.returncode, done.stderr) == (0, "")
    deeplock_kernels.verify_file("new", Passphrase(PASSPHRASE))


# Help


def test_the_version(run):
    assert run("--version") == (0, f"deeplock {deeplock_kernels.__version__}\n", "")


def test_help(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\s+\w", out, re.MULTILINE), command
    assert "exit codes: 0 done, 1 failed, 2 wrong command line, 3 wrong key, 4 altered, 130 interrupted" in " ".join(
        out.split()
    )


SOURCES = "--key --key-env --key-command --passphrase --passphrase-file"
NEW_SOURCES = SOURCES.replace("--", "--new-")
OPTIONS = {
    "keygen": "KEYFILE --bits",
    "lock": f"IN OUT --in-place {SOURCES} --wrapped-key --threads --schedule --sbox --only --no-seal",
    "unlock": f"IN OUT --in-place {SOURCES} --wrapped-key --threads",
    "recover": f"FILE --undo {SOURCES} --wrapped-key --threads",
    "rekey": f"IN OUT {SOURCES} --wrapped-key {NEW_SOURCES} --new-wrapped-key --threads",
    "verify": f"FILE {SOURCES} --wrapped-key --threads",
    "wrap-key": f"WRAPPED {SOURCES} --bits",
    "rewrap-key": f"WRAPPED OUT {SOURCES} {NEW_SOURCES}",
    "inspect": "FILE",
    "tiers": "",
    "sboxes": "",
    "warmup": "--tier --into",
    "bench": "--size --rounds --threads --tier",
    "demo": "--quick",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: deeplock {command} ")
    for option in OPTIONS[command].split():
        assert option in out


WRONG_LINES = {
    "nothing": [],
    "no such command": ["encrypt"],
    "no such option": ["tiers", "--fast"],
    "one argument too many": ["inspect", "plain", "locked"],
    "keygen without a file": ["keygen"],
    "keygen with other bits": ["keygen", "new", "--bits", "100"],
    "keygen with no bits": ["keygen", "new", "--bits"],
    "lock without a key": ["lock", "plain", "new"],
    "lock without a target": ["lock", "plain", "--key", "key"],
    "unlock without a key": ["unlock", "locked", "new"],
    "unlock without seals": ["unlock", "locked", "new", "--key", "key", "--no-seal"],
    "rekey without a new key": ["rekey", "locked", "new", "--key", "key"],
    "rekey without an old key": ["rekey", "locked", "new", "--new-key", "key"],
    "verify without a key": ["verify", "locked"],
    "verify with a target": ["verify", "locked", "new", "--key", "key"],
    "no threads": ["lock", "plain", "new", "--key", "key", "--threads", "0"],
    "negative threads": ["unlock", "locked", "new", "--key", "key", "--threads", "-1"],
    "threads of a half": ["lock", "plain", "new", "--key", "key", "--threads", "1.5"],
    "threads of no digit": ["lock", "plain", "new", "--key", "key", "--threads", "²"],
    "bench of no size": ["bench", "--size", "0"],
    "bench of another unit": ["bench", "--size", "1MB"],
    "bench of a unit": ["bench", "--size", "MiB"],
    "bench of a negative size": ["bench", "--size", "-1"],
    "bench of no rounds": ["bench", "--rounds", "0"],
    "bench on no threads": ["bench", "--threads", "x"],
    "threads of many digits": ["bench", "--threads", "9" * 5000],
    "inspect without a file": ["inspect"],
    "two keys": ["lock", "plain", "new", "--key", "key", "--key-env", "DEEPLOCK_TEST_KEY"],
    "a key and a passphrase": ["unlock", "locked", "new", "--key", "key", "--passphrase"],
    "two passphrases": ["verify", "locked", "--passphrase", "--passphrase-file", "passphrase"],
    "two new keys": ["rekey", "locked", "new", "--key", "key", "--new-key", "key", "--new-key-command", "cat key"],
    "a wrapped key alone": ["lock", "plain", "new", "--wrapped-key", "wrapped"],
    "a new wrapped key alone": ["rekey", "locked", "new", "--key", "key", "--new-wrapped-key", "wrapped"],
    "wrap-key without a key": ["wrap-key", "new"],
    "wrap-key of a wrapped key": ["wrap-key", "new", "--key", "key", "--wrapped-key", "wrapped"],
    "rewrap-key without a new key": ["rewrap-key", "wrapped", "new", "--key", "key"],
    "rewrap-key with other bits": ["rewrap-key", "wrapped", "new", "--key", "key", "--new-key", "key", "--bits", "128"],
}


@pytest.mark.parametrize("case", WRONG_LINES)
def test_a_wrong_command_line(folder, run, case):
    before = snapshot(folder)
    code, out, err = run(*WRONG_LINES[case])
    assert (code, out) == (2, "")
    assert re.search(r"^deeplock.*: error: ", err, re.MULTILINE)
    assert "Traceback" not in err
    assert snapshot(folder) == before


# Keys


@pytest.mark.parametrize("bits", [128, 192, 256, None])
@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_keygen(folder, run, bits, mask):
    before = os.umask(mask)
    try:
        code, out, err = run("keygen", "new", *([] if bits is None else ["--bits", bits]))
    finally:
        os.umask(before)
    assert (code, err) == (0, "")
    assert stat.S_IMODE(os.stat("new").st_mode) == 0o600
    text = (folder / "new").read_text()
    assert re.fullmatch(rf"[0-9a-f]{{{(bits or 256) // 4}}}\n", text)
    assert out.startswith(f"new: a new key of {bits or 256} bits")
    assert out.count("\n") == 1
    for i in range(len(text) - 8):
        assert text[i : i + 8] not in out
    assert run("lock", "plain", "out", "--key", "new")[0] == 0
    assert run("unlock", "out", "restored", "--key", "new")[0] == 0
    assert (folder / "restored").read_bytes() == (folder / "plain").read_bytes()


def test_every_key_is_another_one(folder, run):
    for i in range(20):
        assert run("keygen", f"new{i}")[0] == 0
    assert len({(folder / f"new{i}").read_text() for i in range(20)}) == 20


def test_keygen_overwrites_nothing(folder, run):
    (folder / "empty").touch()
    (folder / "link").symlink_to("plain")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "sub").mkdir()
    before = snapshot(folder)
    for target in ("key", "plain", "empty", "link", "dangling", "sub", ".", "./key", "sub/../key"):
        code, out, err = run("keygen", target)
        assert (code, out) == (1, "")
        assert err.startswith(f"deeplock: error: {target}: cannot be written: it exists already")
        assert err.count("\n") == 1
        assert snapshot(folder) == before
    assert os.readlink("dangling") == "nowhere"


# Locking and unlocking


@pytest.mark.parametrize(
    "options", [[], ["--schedule", "expansion"], ["--sbox", "kuznyechik"], ["--threads", "2"], ["--no-seal"]]
)
def test_lock_and_unlock(folder, run, options):
    code, out, err = run("lock", "plain", "new", "--key", "key", *options)
    sealed = "--no-seal" not in options
    state = "locked and sealed" if sealed else "locked, not sealed"
    assert (code, out, err) == (0, f"new: 3 tensors {state}, 3,162 bytes\n", "")
    header = read_header("new")
    assert [record.seal is not None for record in header.tensors.values()] == 3 * [sealed]
    assert header.schedule == ("expansion" if "expansion" in options else "counter")
    assert header.sbox == ("kuznyechik" if "kuznyechik" in options else "aes")
    assert (folder / "new").read_bytes() != (folder / "plain").read_bytes()
    assert run("unlock", "new", "restored", "--key", "key") == (0, "restored: unlocked\n", "")
    assert (folder / "restored").read_bytes() == (folder / "plain").read_bytes()


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [(["*.bias"], ["a.bias"]), (["b", "*.weight"], ["a.weight", "b"]), (["*"], ["a.bias", "a.weight", "b"])],
)
def test_lock_only_some(folder, run, patterns, chosen):
    options = [option for pattern in patterns for option in ("--only", pattern)]
    code, out, err = run("lock", "plain", "new", "--key", "key", *options)
    assert (code, err) == (0, "")
    assert out.startswith(f"new: {len(chosen)} tensors locked and sealed, ")
    assert sorted(read_header("new").tensors) == chosen


@pytest.mark.parametrize("key", ["other.key", "short.key", "key"])
@pytest.mark.parametrize("options", [[], ["--schedule", "expansion", "--no-seal"]])
def test_rekey(folder, run, options, key):
    assert run("lock", "plain", "first", "--key", "key", *options)[0] == 0
    code, out, err = run("rekey", "first", "second", "--key", "key", "--new-key", key, "--threads", 2)
    assert (code, out, err) == (0, "second: 3 tensors locked under the new key and sealed\n", "")
    first, second = read_header("first"), read_header("second")
    assert (first.schedule, first.salt != second.salt) == (second.schedule, True)
    assert run("verify", "second", "--key", key)[0] == 0
    if key != "key":
        assert run("unlock", "second", "none", "--key", "key")[0] == 3
    assert run("unlock", "second", "restored", "--key", key)[0] == 0
    assert (folder / "restored").read_bytes() == (folder / "plain").read_bytes()


@pytest.mark.parametrize("options", [[], ["--schedule", "expansion", "--only", "a.*", "--threads", "2"]])
def test_verify(folder, run, options):
    assert run("lock", "plain", "new", "--key", "key", *options)[0] == 0
    tensors, nbytes = (2, "3,160") if options else (3, "3,162")
    before = snapshot(folder)
    code, out, err = run("verify", "new", "--key", "key", *options[-2:] if options else [])
    assert (code, out, err) == (0, f"new: as it was locked, {tensors} tensors, {nbytes} bytes\n", "")
    assert snapshot(folder) == before


def test_an_old_target_is_replaced(folder, run):
    (folder / "old").write_text("old")
    assert run("lock", "plain", "old", "--key", "key")[0] == 0
    assert read_header("old").tensors.keys() == {"a.bias", "a.weight", "b"}
    assert run("unlock", "locked", "old", "--key", "key")[0] == 0
    assert (folder / "old").read_bytes() == (folder / "plain").read_bytes()


def bad_key_file(content):
    def make(folder):
        (folder / "bad.key").write_bytes(content)

    return make


def truncated(name):
    def make(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])

    return make


def own_box(folder):
    lock_file("plain", "locked", KEY, sbox=SBox(bytes(range(255, -1, -1))))


def bad_header(folder):
    tensors = safetensors.numpy.load_file("locked")
    safetensors.numpy.save_file(tensors, "locked", metadata={"deeplock": '{"format":"deeplock/9"}'})


def altered(old, new):
    """Change the locked file in one place, in a way that keeps it well formed."""

    def make(folder):
        raw = (folder / "locked").read_bytes()
        assert raw.count(old) == 1
        (folder / "locked").write_bytes(raw.replace(old, new))

    return make


def altered_weights(folder):
    with open("locked", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def not_sealed(folder):
    lock_file("plain", "locked", KEY, seal=False)


def locked_with_passphrase(folder):
    lock_file("plain", "locked", Passphrase(PASSPHRASE, n=1 << 14))


def other_passphrase(folder):
    locked_with_passphrase(folder)
    (folder / "passphrase").write_text("another one")



LOCK, UNLOCK = "lock plain new --key key", "unlock locked new --key key"
VERIFY = "verify locked --key key"
WRAPPED = "--key key --wrapped-key wrapped"
REKEY = "rekey locked new --key key --new-key other.key"
BAD_KEYS = {
    "empty": b"",
    "not hexadecimal": b"g" * 64 + b"\n",
    "one digit short": KEY.hex().encode()[:-1] + b"\n",
    "one digit long": KEY.hex().encode() + b"0\n",
    "in uppercase": KEY.hex().upper().encode() + b"\n",
    "raw": KEY,
    "two lines": KEY.hex().encode() + b"\n\n",
    "with a carriage return": KEY.hex().encode() + b"\r\n",
    "long": b"0" * 100_000,
}
FAILURES = {  # name: (command line, what to do before, exit code, words)
    "lock of no file": ("lock none new --key key", None, 1, "none: cannot be read: no such file"),
    "unlock of no file": ("unlock none new --key key", None, 1, "none: cannot be read: no such file"),
    "inspect of no file": ("inspect none", None, 1, "none: cannot be read: no such file"),
    "inspect of a directory": ("inspect .", None, 1, ".: got 0 safetensors files and no index"),
    "inspect of a key": ("inspect key", None, 1, "key: got "),
    "inspect of a cut file": ("inspect plain", truncated("plain"), 1, "plain: got "),
    "inspect of a bad header": ("inspect locked", bad_header, 1, "header: "),
    "lock of a cut file": (LOCK, truncated("plain"), 1, "plain: got "),
    "unlock of a cut file": (UNLOCK, truncated("locked"), 1, "locked: got "),
    "unlock with a bad header": (UNLOCK, bad_header, 1, "header: "),
    "lock of a locked file": ("lock locked new --key key", None, 1, "locked: it is locked already"),
    "unlock of a plain file": ("unlock plain new --key key", None, 1, "plain: it carries no lock header"),
    "unlock of an own S-Box": (UNLOCK, own_box, 1, "sbox: the tensors were locked with one whose SHA-256 is"),
    "lock onto itself": ("lock plain ./plain --key key", None, 1, "which is the source plain"),
    "unlock onto itself": ("unlock locked locked --key key", None, 1, "which is the source locked"),
    "lock onto the key file": ("lock plain ./key --key key", None, 1, "./key: it is the key file"),
    "unlock onto the key file": ("unlock locked key --key ./key", None, 1, "key: it is the key file"),
    "lock into no directory": ("lock plain none/new --key key", None, 1, "none/new: cannot be written"),
    "lock onto a directory": ("lock plain . --key key", None, 1, ".: cannot be written: it is a directory"),
    "lock onto a device": ("lock plain /dev/null --key key", None, 1, "/dev/null: cannot be written: it is"),
    "lock without key file": ("lock plain new --key none", None, 1, "none: cannot be read: no such file"),
    "lock with a directory as key": ("lock plain new --key .", None, 1, ".: cannot be read: it is a dir"),
    "lock of nothing": (f"{LOCK} --only none", None, 1, "only: it chooses none of the 3 tensors"),
    "keygen into no directory": ("keygen none/new", None, 1, "none/new: cannot be written: no such file"),
    "keygen with an empty path": ("keygen ''", None, 1, "path: got ''"),
    "another key": ("unlock locked new --key other.key", None, 3, "key: it is not the one"),
    "a shorter key": ("unlock locked new --key short.key", None, 3, "key: got 128 bits"),
    "unlock of altered weights": (UNLOCK, altered_weights, 4, "tensors['a.weight']: its bytes are not those"),
    "unlock of other metadata": (UNLOCK, altered(b'"x":"y"', b'"x":"z"'), 4, "header: it is not as the lock made it"),
    "rekey of no file": ("rekey none new --key key --new-key other.key", None, 1, "none: cannot be read: no such file"),
    "rekey of a plain file": ("rekey plain new --key key --new-key key", None, 1, "plain: it carries no lock header"),
    "rekey onto itself": ("rekey locked ./locked --key key --new-key key", None, 1, "which is the source locked"),
    "rekey onto the key file": ("rekey locked ./key --key key --new-key other.key", None, 1, "./key: it is the key file"),
    "rekey onto the new key": ("rekey locked other.key --key key --new-key other.key", None, 1, "other.key: it is the key"),
    "rekey with another key": ("rekey locked new --key other.key --new-key key", None, 3, "key: it is not the one"),
    "rekey with a shorter key": ("rekey locked new --key short.key --new-key key", None, 3, "key: got 128 bits"),
    "rekey without key file": ("rekey locked new --key none --new-key key", None, 1, "none: cannot be read: no such file"),
    "rekey without new file": ("rekey locked new --key key --new-key none", None, 1, "none: cannot be read: no such file"),
    "rekey of altered weights": (REKEY, altered_weights, 4, "tensors['a.weight']: its bytes are not those"),
    "rekey of other metadata": (REKEY, altered(b'"x":"y"', b'"x":"z"'), 4, "header: it is not as the lock made it"),
    "rekey of a cut file": (REKEY, truncated("locked"), 1, "locked: got "),
    "rekey of an own S-Box": (REKEY, own_box, 1, "sbox: the tensors were locked with one whose SHA-256 is"),
    "verify of altered weights": (VERIFY, altered_weights, 4, "tensors['a.weight']: its bytes are not those"),
    "verify of another shape": (VERIFY, altered(b"[30,100]", b"[100,30]"), 4, "header: it is not as the lock made it"),
    "verify of no seals": (VERIFY, not_sealed, 1, "header: 3 of 3 tensors have no seal, as "),
    "verify of a plain file": ("verify plain --key key", None, 1, "plain: it carries no lock header"),
    "verify of no file": ("verify none --key key", None, 1, "none: cannot be read: no such file"),
    "verify of a cut file": (VERIFY, truncated("locked"), 1, "locked: got "),
    "verify with another key": ("verify locked --key other.key", None, 3, "key: it is not the one"),
    "lock onto the wrapped key": (f"lock plain wrapped {WRAPPED}", None, 1, "wrapped: it is the wrapped key; another"),
    "unlock onto the passphrase": (
        "unlock locked ./passphrase --passphrase-file passphrase", None, 1, "./passphrase: it is the passphrase's file"
    ),
    "rekey onto the new wrapped key": (
        "rekey locked wrapped --key key --new-key key --new-wrapped-key wrapped", None, 1, "wrapped: it is the wrapped key"
    ),
    "no variable": ("lock plain new --key-env DEEPLOCK_TEST_NO_KEY", None, 1, "'DEEPLOCK_TEST_NO_KEY': it is not set"),
    "no key in a variable": ("lock plain new --key-env PATH", None, 1, "the environment variable 'PATH': it holds no key"),
    "a command that fails": ("unlock locked new --key-command 'cat none'", None, 1, "command: 'cat' failed with exit status 1"),
    "a command without key": ("lock plain new --key-command 'cat plain'", None, 1, "command: 'cat' printed no key"),
    "no command": ("lock plain new --key-command none-such", None, 1, "command: 'none-such' cannot be started: No such"),
    "half a command": ("lock plain new --key-command 'cat \"key'", None, 1, "command: accepted are the words of a command"),
    "no passphrase file": ("lock plain new --passphrase-file none", None, 1, "none: cannot be read: no such file"),
    "no passphrase": ("lock plain new --passphrase-file plain", None, 1, "plain: it holds no passphrase"),
    "another passphrase": (
        "unlock locked new --passphrase-file passphrase", other_passphrase, 3, "key: it is not the one"
    ),
    "a passphrase for a key": ("unlock locked new --passphrase-file passphrase", None, 3, "key: got a passphrase"),
    "a key for a passphrase": (UNLOCK, locked_with_passphrase, 3, "key: it is not the one"),
    "a wrapped key of another": ("lock plain new --key other.key --wrapped-key wrapped", None, 3, "master: it is not the key"),
    "no wrapped key": ("lock plain new --key key --wrapped-key key", None, 1, "key: not a wrapped key"),
    "a cut wrapped key": (f"lock plain new {WRAPPED}", truncated("wrapped"), 1, "wrapped: not a wrapped key"),
    "a wrapped key for a key": (f"unlock locked new {WRAPPED}", None, 3, "key: it is not the one"),
    "wrap-key over a file": ("wrap-key plain --key key", None, 1, "plain: cannot be written: it exists already"),
    "rewrap-key over a file": ("rewrap-key wrapped key --key key --new-key key", None, 1, "key: cannot be written: it exists"),
    "rewrap-key onto itself": ("rewrap-key wrapped ./wrapped --key key --new-key key", None, 1, "which is the source wrapped"),
    "rewrap-key with another key": ("rewrap-key wrapped made --key other.key --new-key key", None, 3, "old_master: it is not"),
    "rewrap-key of a key file": ("rewrap-key key made --key key --new-key key", None, 1, "key: not a wrapped key"),
    "verify without key file": ("verify locked --key none", None, 1, "none: cannot be read: no such file"),
} | {
    f"{command} with a key file {case}": (
        f"{command} {source} new --key bad.key", bad_key_file(content), 1, "bad.key: not a key file"
    )
    for command, source in [("lock", "plain"), ("unlock", "locked")]
    for case, content in BAD_KEYS.items()
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "target"),
    [(case, "new") for case in FAILURES]
    + [(case, "old") for case, (line, *_) in FAILURES.items() if " new " in line],
)
def test_a_command_that_fails(folder, run, case, target):
    line, prepare, expected, words = FAILURES[case]
    arguments = shlex.split(line)
    (folder / "old").write_bytes(b"old")
    if prepare is not None:
        prepare(folder)
    before = snapshot(folder)
    code, out, err = run(*(target if argument == "new" else argument for argument in arguments))
    assert snapshot(folder) == before
    assert (code, out) == (expected, "")
    assert err.startswith("deeplock: error: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert words in err
    for key in (KEY, OTHER_KEY, KEYS[128]):
        for part in (key[:4], key[-4:]):
            assert part.hex() not in err.lower()
            assert ascii(part)[2:-1] not in err


@pytest.mark.parametrize(
    ("line", "names"),
    [
        (f"{LOCK} --schedule", SCHEDULES),
        (f"{LOCK} --sbox", SBOXES),
        ("bench --tier", [tier.name for tier in TIERS]),
        ("warmup --tier", [tier.name for tier in TIERS]),
    ],
)
@pytest.mark.parametrize("name", ["rijndael", "", "AES", "a\nb"])
def test_a_name_that_is_unknown_is_a_wrong_command_line(folder, run, line, names, name):
    before = snapshot(folder)
    *arguments, option = shlex.split(line)
    code, out, err = run(*arguments, option, name)
    assert (code, out) == (2, "")
    words = f"argument {option}: got {name!r}, accepted are {', '.join(names)}"
    assert err.splitlines()[-1] == f"deeplock {arguments[0]}: error: {words}"
    assert snapshot(folder) == before


@pytest.mark.parametrize("place", ["the first step", "the last step"])
def test_an_error_of_the_system_is_not_the_output_s(run, monkeypatch, place):
    """Only what writes a file names it, and only what writes the output blames that."""

    def fails(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    if place == "the first step":
        monkeypatch.setattr(tempfile, "TemporaryDirectory", fails)
    else:
        monkeypatch.setattr(measure, "environment", fails)
        monkeypatch.setattr(show, "_scores", lambda: iter(["scores"]))
    code, out, err = run("demo", "--quick")
    assert code == 1
    assert (out == "") == (place == "the first step")
    assert err == "deeplock: error: [Errno 28] No space left on device: 'somewhere'\n"


def test_a_message_is_one_line_whatever_the_path(folder, run):
    for path in ("a\nb", "a\x1b[31mb", "a\rb", "a\u2028b"):
        code, out, err = run("inspect", path)
        assert (code, out) == (1, "")
        assert err[:-1].isprintable(), path


@pytest.mark.parametrize("error", [KeyboardInterrupt, None])
def test_interrupted_while_it_works(folder, run, monkeypatch, error):
    """The bytes of the file are written in windows of 1,000; the interruption comes at the third."""
    monkeypatch.setattr(checkpoints, "WINDOW", 1000)
    before = snapshot(folder)
    windows = []
    original = checkpoints.mapped

    def mapped(*arguments):
        windows.append(len(list(folder.glob(".deeplock-*.tmp"))))
        if len(windows) == 3 and error:
            raise error
        return original(*arguments)

    monkeypatch.setattr(checkpoints, "mapped", mapped)
    for arguments in (LOCK, UNLOCK, REKEY):
        windows.clear()
        code, out, err = run(*arguments.split())
        if error is None:
            assert code == 0
            assert windows == [1] * 4
        else:
            assert (code, out, err) == (130, "", "deeplock: interrupted; every file is as it was, or complete\n")
            assert windows == [1] * 3
            assert snapshot(folder) == before


@pytest.mark.parametrize("command", ["lock", "unlock"])
def test_a_real_ctrl_c(folder, command):
    """In a process of its own, as soon as it has begun to write 200 MiB."""
    size = 200 << 20
    table = f'{{"w":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}'
    if command == "unlock":
        header = json.loads(read_header("locked").to_json()) | {"tensors": {"w": {"bytes": size}}}
        mac_key = reference.header_key(KEY, bytes.fromhex(header["salt"]))
        file = json.loads(table + "}") | {"__metadata__": {}}
        header["mac"] = reference.header_mac(mac_key, header, file).hex()
        table += f',"__metadata__":{{"deeplock":{json.dumps(json.dumps(header))}}}'
    table += "}"
    (folder / "large").write_bytes(len(table).to_bytes(8, "little") + table.encode())
    os.truncate("large", 8 + len(table) + size)
    (folder / "new").write_text("old")
    for _ in range(10):
        running = subprocess.Popen(
            [*COMMAND, command, "large", "new", "--key", "key"],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            while not list(folder.glob(".deeplock-*.tmp")) and running.poll() is None:
                time.sleep(0.001)
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(timeout=100)
        finally:
            running.kill()
        if running.returncode != 0:  # or it came to its end first
            break
        (folder / "new").write_text("old")
    os.unlink("large")
    assert (running.returncode, out) == (130, "")
    # Before that line Python may say of a generator of its own that it was cut off.
    assert err.splitlines()[-1] == "deeplock: interrupted; every file is as it was, or complete"
    assert (folder / "new").read_text() == "old"
    assert not list(folder.glob(".*"))


# Looking


def test_inspect_of_a_plain_file(folder, run):
    code, out, err = run("inspect", "plain")
    assert (code, err) == (0, "")
    first, *rows = out.splitlines()
    assert first == "plain: safetensors, 3 tensors, 3,162 bytes, not locked"
    assert [row.split() for row in rows] == [
        ["'a.bias'", "F32", "[40]", "160", "bytes", "plain"],
        ["'b'", "F16", "[]", "2", "bytes", "plain"],
        ["'a.weight'", "U8", "[30,", "100]", "3,000", "bytes", "plain"],
    ]


@pytest.mark.parametrize("schedule", ["counter", "expansion"])
def test_inspect_of_a_locked_file(folder, run, schedule):
    for sbox, shown in [("sm4", "sm4"), (SBox(bytes(range(255, -1, -1))), "with SHA-256 ")]:
        header = lock_file("plain", "locked", KEY, schedule=schedule, sbox=sbox, only=["a.weight", "b"])
        code, out, err = run("inspect", "locked")
        assert (code, err) == (0, "")
        assert out.startswith("locked: safetensors, 3 tensors, 3,162 bytes, locked\nformat deeplock/1, schedule ")
        assert f"schedule {schedule}, S-Box {shown}" in out
        assert "key of 256 bits" in out
        assert ("warning: this schedule can give away the key" in out) == (schedule == "expansion")
        states = {row.split()[0]: row.split()[-1] for row in out.splitlines() if row.startswith("  ")}
        assert states == {"'a.weight'": "sealed", "'a.bias'": "plain", "'b'": "sealed"}
        assert out.count("  locked, sealed\n") == 2
        for secret in (KEY, header.salt, header.check, header.mac, header.tensors["b"].seal):
            assert secret.hex() not in out
    not_sealed(folder)
    rows = run("inspect", "locked")[1].splitlines()[2:]
    assert [row.split("bytes")[1] for row in rows] == 3 * ["  locked"]


def test_inspect_shows_names_that_would_move_the_cursor_escaped(folder, run):
    names = ["a\nb", "\x1b[31m", "\r", "重み", "", "\u202e"]
    safetensors.numpy.save_file({name: np.ones(1) for name in names}, "odd")
    code, out, err = run("inspect", "odd")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 7
    assert out.isascii()
    assert all(line.isprintable() for line in out.split("\n"))
    for name in names:
        assert ascii(name) in out


def test_inspect_of_no_tensors(folder, run):
    safetensors.numpy.save_file({}, "none")
    assert run("inspect", "none") == (0, "none: safetensors, 0 tensors, 0 bytes, not locked\n", "")


def test_tiers(run):
    code, out, err = run("tiers")
    assert (code, err) == (0, "")
    title, *rows = out.splitlines()
    assert title.split() == ["tier", "supported", "active", "constant", "time", "made", "of"]
    assert [row.split()[0] for row in rows] == [tier.name for tier in TIERS]
    for row, tier in zip(rows, TIERS, strict=True):
        flags = ["yes" if flag else "no" for flag in (tier.supported, tier.active, tier.constant_time)]
        assert row.split()[1:4] == flags
        assert row.endswith(tier.description)


def test_sboxes(run):
    code, out, err = run("sboxes")
    assert (code, err) == (0, "")
    assert "adds no secrecy" in out.splitlines()[0]
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if not line.startswith(" ")}
    for name, box in SBOXES.items():
        found = box.properties()
        numbers = [
            found.nonlinearity,
            found.differential_uniformity,
            found.boomerang_uniformity,
            found.min_degree,
        ]
        assert rows[name][:5] == [*map(str, numbers), str(len(found.fixed_points))]
        assert box.sha256.startswith(rows[name][5])
        for weakness in found.weaknesses:
            assert weakness in out


FIRST_TWO_KERNELS = """
import sys
from deeplock_kernels.cli import main
from deeplock_kernels.runtime import tiers
every_name = tiers.every_name
tiers.every_name = lambda forms: every_name(forms)[:2]
sys.exit(main(sys.argv[1:]))
"""


def test_warmup(tmp_path):
    into = tmp_path / "sub" / "cache"
    out = processes.run(FIRST_TWO_KERNELS, "warmup", "--tier", "portable", "--into", into)
    (stamp,) = into.iterdir()
    assert out == f"{stamp}: 2 kernels are ready\n"
    made = {path: path.read_bytes() for path in stamp.iterdir()}
    assert len(made) == 2
    assert all(path.name.startswith("portable-") for path in made)
    out = processes.run(FIRST_TWO_KERNELS, "warmup", "--tier", "portable", DEEPLOCK_CACHE_DIR=into)
    assert out == f"{stamp}: 2 kernels are ready\n"
    assert {path: path.read_bytes() for path in stamp.iterdir()} == made


def test_warmup_into_what_cannot_be_a_cache(tmp_path):
    """It was asked for, so it must not be left out in silence."""
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for into in (tmp_path / "file", tmp_path / "file" / "sub", tmp_path / "open"):
        arguments = ("warmup", "--tier", "portable", "--into", into)
        process = processes.Process(FIRST_TWO_KERNELS, *arguments)
        assert process.finish(returncode=1, errors=None) == ""


# Measuring


def test_bench(run):
    before = active_tier()
    code, out, err = run("bench", "--size", "1MiB", "--rounds", "2", "--threads", "1")
    assert (code, err) == (0, "")
    machine, title, *rows = out.splitlines()
    assert f"tier {before.name}, 1 threads, Python " in machine
    assert title == "1,048,576 bytes in place, median of 2 rounds [lowest to highest]"
    speed = re.compile(
        r" {2}(\S.*?) +(\d+\.\d\d) GB/s {2}\[ *(\d+\.\d\d) to +(\d+\.\d\d)\] +(\d+\.\d\d) of the limit"
    )
    found = {}
    for row in rows[:-1]:
        name, median, lowest, highest, ratio = speed.fullmatch(row).groups()
        assert 0 <= float(lowest) <= float(median) <= float(highest) > 0  # a round may be held up for long
        found[name] = float(ratio)
    assert found["XOR in place (the limit)"] == 1
    assert found.keys() >= {
        "copy (memcpy)", "lock, counter 128, aes", "unlock, counter 128, aes", "lock, counter 256, aes",
        "lock, counter 128, kuznyechik", "lock, expansion 128, first pass", "lock, expansion 128, indexed",
        "copy past the caches", "lock into other memory, counter 128, aes",
        "cryptography AES-128-CTR, update_into", "substitute, aes", "NumPy S[x]", "NumPy S[x ^ k], k given",
    }  # fmt: skip
    last = re.fullmatch(
        r" {2}process start to first locked MiB +(\d+\.\d\d) s +\[ *(\d+\.\d\d) to +(\d+\.\d\d)\] .*",
        rows[-1],
    )
    median, lowest, highest = map(float, last.groups())
    assert 0 < lowest <= median <= highest < 200


def test_bench_of_a_tier(run, monkeypatch):
    monkeypatch.setattr(measure, "first_lock_seconds", lambda: [0.1, 0.3, 0.2])
    slowest = [tier for tier in TIERS if tier.supported][-1]
    with use_tier(active_tier().name):
        code, out, err = run("bench", "--size", "5000", "--rounds", "1", "--tier", slowest.name)
    assert (code, err) == (0, "")
    assert f"tier {slowest.name}, " in out.splitlines()[0]
    assert re.search(r"first locked MiB +0.20 s +\[ *0.10 to +0.30\]", out)


@pytest.mark.parametrize("size", ["4000000000000000B", "4000000GiB", "99999999999GiB"])
def test_bench_of_more_than_there_is_memory(run, size):
    """Refused by the first allocation, so none of it is ever touched."""
    code, out, err = run("bench", "--size", size)
    assert code in (1, 2)
    assert out == ""
    assert re.match(r"deeplock( bench)?: error: ", err.splitlines()[-1])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1), ("65536", 65536), ("7B", 7), ("64K", 65536), ("64KiB", 65536), ("3mib", 3 << 20),
        ("2G", 2 << 30),        ("1GiB", 1 << 30), ("5M", 5 << 20),
    ],
)  # fmt: skip
def test_sizes(run, monkeypatch, text, nbytes):
    def aligned(size):
        assert size == nbytes
        raise KeyboardInterrupt  # that is enough

    monkeypatch.setattr(measure, "aligned", aligned)
    assert run("bench", "--size", text)[0] == 130


def test_demo():
    done = process("demo", "--quick")
    assert (done.returncode, done.stderr) == (0, "")
    scores = re.findall(r"^ {2}(\S.*?) +(\d+\.\d)%$", done.stdout, re.MULTILINE)
    names = [name for name, _ in scores]
    trained, locked, other, flipped, restored = (float(score) for _, score in scores)
    assert names[0] == "as trained"
    assert names[1].startswith("locked (8 tensors")
    assert names[2:4] == ["unlocked with another key", "unlocked with the right key but for one bit"]
    assert names[4] == "unlocked with the right key (every byte of the file is back)"
    assert trained > 90
    assert max(locked, other, flipped) < 25
    assert restored == trained
    speeds = re.findall(r"^ +(\d+ MiB)((?: +\d+\.\d){4}) +(\d+\.\d\d)$", done.stdout, re.MULTILINE)
    assert [size for size, _, _ in speeds] == ["1 MiB", "16 MiB"]
    for _, numbers, ratio in speeds:
        assert any(float(number) > 0 for number in numbers.split())  # the machine may be busy with something else
        assert 0 <= float(ratio) < 30


def test_demo_says_so_if_a_byte_is_not_back(run, monkeypatch):
    from deeplock_kernels.demo import show

    def unlock_file(src, dst, key, **keywords):
        checkpoints.unlock_file(src, dst, key, **keywords)
        with open(dst, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read()[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))

    monkeypatch.setattr(show, "unlock_file", unlock_file)
    monkeypatch.setattr(show, "_speeds", lambda quick: iter(()))
    _, out, _ = run("demo", "--quick")
    assert "every byte of the file is back" not in out
    assert "THE FILE DIFFERS FROM THE ORIGINAL" in out


# In a process of its own


def test_a_whole_session(folder):
    session = [
        (["keygen", "my.key"], 0, "my.key: a new key of 256 bits", ""),
        (["lock", "plain", "new", "--key", "my.key"], 0, "new: 3 tensors locked and sealed, ", ""),
        (["unlock", "new", "restored", "--key", "key"], 3, "", "deeplock: error: key: it is not the one"),
        (["unlock", "new", "restored", "--key", "none"], 1, "", "deeplock: error: none: cannot be read: "),
        (["unlock", "new"], 2, "", "usage: deeplock unlock "),
        (["verify", "new", "--key", "my.key"], 0, "new: as it was locked, 3 tensors, 3,162 bytes", ""),
        (["unlock", "new", "restored", "--key", "my.key"], 0, "restored: unlocked", ""),
    ]
    for arguments, code, out, err in session:
        done = process(*arguments)
        assert done.returncode == code, done
        assert done.stdout.startswith(out)
        assert done.stderr.startswith(err)
        assert (done.stdout == "", done.stderr == "") == (out == "", err == "")
        assert "Traceback" not in done.stderr
        assert (folder / "restored").exists() == (arguments == session[-1][0])
    assert (folder / "restored").read_bytes() == (folder / "plain").read_bytes()


def on_a_terminal(*arguments):
    """Run a command whose stderr is a terminal; give exit code, stdout and what the terminal got."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    try:
        done = process(*arguments, stderr=theirs)
        os.set_blocking(ours, False)
        try:
            shown = os.read(ours, 1 << 20).decode()
        except BlockingIOError:
            shown = ""
    finally:
        os.close(ours)
        os.close(theirs)
    return done.returncode, done.stdout, shown


@pytest.mark.parametrize(
    ("arguments", "verb", "out"),
    [
        (LOCK, "locking", "new: 3 tensors locked and sealed, 3,162 bytes\n"),
        (UNLOCK, "unlocking", "new: unlocked\n"),
        (REKEY, "rekeying", "new: 3 tensors locked under the new key and sealed\n"),
        ("verify locked --key key", "verifying", "locked: as it was locked, 3 tensors, 3,162 bytes\n"),
    ],
)
def test_progress_is_shown_on_a_terminal_only(folder, arguments, verb, out):
    code, output, shown = on_a_terminal(*arguments.split())
    assert (code, output) == (0, out)
    assert f"{verb}:" in shown
    assert re.search(r"\d%.*\[\d\d:\d\d<[\d:?]+, .*B/s\]", shown), "share, time left and rate"
    assert re.search(r"\r +\r$", shown), "the line is not empty again at the end"
    (folder / "new").unlink(missing_ok=True)
    done = process(*arguments.split())
    assert (done.returncode, done.stdout, done.stderr) == (0, out, "")


def test_a_message_on_a_terminal_has_a_line_of_its_own(folder):
    code, output, shown = on_a_terminal("unlock", "locked", "new", "--key", "other.key")
    assert (code, output) == (3, "")
    assert re.search(r"(^|[\r\n])deeplock: error: key: .*\r\n$", shown)


def test_a_reader_that_has_enough(folder):
    with subprocess.Popen(
        [*COMMAND, "sboxes"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        head = subprocess.run(["head", "-1"], stdin=running.stdout, capture_output=True, check=True)
        running.stdout.close()
        errors = running.stderr.read()
    assert (running.returncode, errors) == (0, b"")
    assert head.stdout == b"An S-Box is public and adds no secrecy here: these numbers describe the tables.\n"


@pytest.mark.parametrize("arguments", [["sboxes"], ["tiers"], ["inspect", "locked"]])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_is_gone(folder, arguments, buffered):
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        done = process(*arguments, stdout=theirs, env=environment(PYTHONUNBUFFERED="" if buffered else "1"))
    finally:
        os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_under_the_output():
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "wb") as full:
        done = process("tiers", stdout=full)
    assert (done.returncode, done.stderr) == (1, "deeplock: error: standard output: No space left on device\n")


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_a_path_that_the_output_cannot_spell(folder, encoding):
    """The work is done by then, so the command must not fail over its last line."""
    name = b"gr\xf6\xdfe" if encoding.startswith("utf") else "größe".encode()
    for source, command, code in [("plain", "lock", 0), ("locked", "unlock", 0), ("none", "lock", 1)]:
        done = process(
            command, source, name, "--key", "key", env=environment(PYTHONIOENCODING=encoding), text=False
        )
        assert b"Traceback" not in done.stderr
        assert done.returncode == code
        assert os.path.exists(name) == (code == 0)
        if code == 0:
            assert done.stderr == b""
            os.unlink(name)
    done = process("inspect", name, env=environment(PYTHONIOENCODING=encoding), text=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert done.stderr.startswith(b"deeplock: error: gr")


def test_the_script_is_this_function():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8") if (ROOT / "pyproject.toml").exists() else ""
    if not text:
        pytest.skip("these are not the sources")
    assert re.search(r'^deeplock = "deeplock_kernels\.cli:main"$', text, re.MULTILINE)
