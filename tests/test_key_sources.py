"""Keys from variables, commands, files and the terminal, and what is said where none is to be had."""

from __future__ import annotations

import getpass
import io
import os
import re
import sys
import threading
import traceback
import warnings

import pytest
from leaks import Leaks
from support import KEYS

from deeplock_kernels import errors
from deeplock_kernels.key_sources import (
    key_from_command,
    key_from_environment,
    passphrase_from_file,
    passphrase_from_terminal,
)
from deeplock_kernels.keys import MasterKey, key_bytes
from deeplock_kernels.passphrases import Passphrase

KEY = KEYS[256]
DIGITS = KEY.hex()
LEAKS = Leaks({"key": KEY})
TEXT = "correct horse battery staple"
NO_KEYS = {
    "nothing": "",
    "a line end": "\n",
    "one digit short": DIGITS[1:],
    "one digit long": DIGITS + "0",
    "two line ends": DIGITS + "\n\n",
    "a carriage return": DIGITS + "\r\n",
    "a blank in front": " " + DIGITS,
    "uppercase": DIGITS.upper(),
    "a prefix": "0x" + DIGITS,
    "other digits": "٣" * 64,
    "more than a line": (DIGITS + "\n") * 2000,
}


def refuse(error, words, function, *arguments, **keywords):
    """Call what must fail: with this class and these words, and without a part of the key in any but the arguments."""
    with pytest.raises(error) as caught:
        function(*arguments, **keywords)
    assert re.search(words, str(caught.value)), caught.value
    shown = [str(caught.value), repr(caught.value)]
    if not LEAKS(repr(arguments)):
        lines = traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
        shown += [line for line in lines if "deeplock_kernels" in line]
    assert LEAKS(*shown) == []


# The environment


@pytest.mark.parametrize("bits", KEYS)
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_key_from_the_environment(monkeypatch, bits, end):
    monkeypatch.setenv("MODEL_KEY", KEYS[bits].hex() + end)
    for _ in range(2):
        key = key_from_environment("MODEL_KEY")
        assert type(key) is MasterKey
        assert key_bytes(key) == KEYS[bits]


@pytest.mark.parametrize("case", NO_KEYS)
def test_a_variable_that_holds_no_key(monkeypatch, case):
    monkeypatch.setenv("MODEL_KEY", NO_KEYS[case])
    refuse(errors.KeyFormatError, "^the environment variable 'MODEL_KEY': it holds no key", key_from_environment, "MODEL_KEY")


def test_a_variable_that_is_not_set(monkeypatch):
    monkeypatch.delenv("MODEL_KEY", raising=False)
    words = "^the environment variable 'MODEL_KEY': it is not set; export it first"
    refuse(errors.KeySourceError, words, key_from_environment, "MODEL_KEY")
    refuse(errors.KeySourceError, "^the environment variable str: it is not set", key_from_environment, DIGITS)
    for name in ("", "A=B", "A\0", None, b"MODEL_KEY", 3):
        refuse(errors.ParameterError, "^name: got ", key_from_environment, name)


# Commands


def python(program):
    return [sys.executable, "-c", program]


@pytest.mark.parametrize("bits", KEYS)
def test_a_key_from_a_command(bits, tmp_path):
    (tmp_path / "a key").write_text(KEYS[bits].hex() + "\n")
    assert key_bytes(key_from_command(f"cat '{tmp_path}/a key'")) == KEYS[bits]
    assert key_bytes(key_from_command(["cat", f"{tmp_path}/a key"])) == KEYS[bits]
    assert key_bytes(key_from_command(("printf", "%s", KEYS[bits].hex()))) == KEYS[bits]


def test_a_command_prints_its_key_in_parts():
    program = f"import sys, time\nfor part in {[DIGITS[:9], DIGITS[9:], chr(10)]}:\n  print(part, end='', flush=True); time.sleep(0.1)"
    assert key_bytes(key_from_command(python(program))) == KEY


def test_no_shell_runs_a_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_KEY", DIGITS)
    for line in ("echo $MODEL_KEY", f"echo {DIGITS}; touch {tmp_path}/made", f"echo {DIGITS} > {tmp_path}/made"):
        with pytest.raises(errors.KeyFormatError):
            key_from_command(line)
    assert os.listdir(tmp_path) == []
    assert key_bytes(key_from_command("sh -c 'echo $MODEL_KEY'")) == KEY


@pytest.mark.parametrize("case", NO_KEYS)
def test_a_command_that_prints_no_key(case, tmp_path):
    (tmp_path / "output").write_text(NO_KEYS[case])
    refuse(errors.KeyFormatError, "^command: 'cat' printed no key; accepted is one line", key_from_command, f"cat {tmp_path}/output")


def test_a_command_that_prints_without_end_is_ended():
    refuse(errors.KeyFormatError, "^command: 'yes' printed no key", key_from_command, "yes", timeout=100)


def test_a_command_that_fails(capfd, tmp_path):
    (tmp_path / "key").write_text(DIGITS + "\n")
    words = r"^command: 'sh' failed with exit status 7; run it by itself to see why$"
    refuse(errors.KeySourceError, words, key_from_command, f"sh -c 'cat {tmp_path}/key; echo locked >&2; exit 7'")
    assert capfd.readouterr() == ("", "locked\n")  # what it says is for the user, its output is not
    refuse(errors.KeySourceError, "^command: 'sh' failed with signal 15", key_from_command, ["sh", "-c", "kill $$"])
    for name, why in (("/no/such/command", "No such file"), (str(tmp_path), "Permission denied")):
        refuse(errors.KeySourceError, f"^command: '{name}' cannot be started: {why}", key_from_command, [name])
    refuse(errors.KeySourceError, "^command: str cannot be started: ", key_from_command, DIGITS)


@pytest.mark.parametrize("before", ["", "os.close(1)", "os.write(1, b'0123'); sys.stdin.close()"])
def test_a_command_that_takes_too_long_is_ended(before, tmp_path):
    file = tmp_path / "process"
    program = f"import os, sys, time; open({str(file)!r}, 'w').write(str(os.getpid())); {before or 'pass'}; time.sleep(100)"
    words = r"^command: '.*' took more than 1\.5 seconds, so it was ended"
    refuse(errors.KeySourceError, words, key_from_command, python(program), timeout=1.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


@pytest.mark.parametrize("command", ["", "  ", "echo 'open", [], [""], ["a", 3], ["a\0"], None, 3, b"echo"], ids=repr)
def test_what_is_no_command(command):
    refuse(errors.ParameterError, "^command: accepted are the words of a command", key_from_command, command)


@pytest.mark.parametrize("timeout", [0, -1, None, "1", True, float("nan"), float("inf")])
def test_what_is_no_time(timeout):
    refuse(errors.ParameterError, "^timeout: got ", key_from_command, "true", timeout=timeout)


# Key files that others can read


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700, 0o622, 0o640, 0o604, 0o444])
def test_a_file_that_others_can_read_is_warned_about(tmp_path, mode):
    key, passphrase = tmp_path / "key", tmp_path / "passphrase"
    MasterKey.from_bytes(KEY).to_file(key)
    passphrase.write_text(TEXT)
    for path, read in ((key, MasterKey.from_file), (passphrase, passphrase_from_file)):
        path.chmod(mode)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            read(path)
        if mode & 0o044:
            (warning,) = found
            assert warning.category is errors.ExposedKeyWarning
            assert warning.filename == __file__
            words = f"{path}: others than its owner can read it (mode {mode:04o}); take that permission away, as by chmod 600"
            assert str(warning.message) == words
        else:
            assert found == []


def test_a_pipe_is_no_file_of_others(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    pipe.chmod(0o644)
    writer = threading.Thread(target=pipe.write_text, args=(f"{DIGITS}\n",))
    writer.start()
    assert key_bytes(MasterKey.from_file(pipe)) == KEY
    writer.join()


# Passphrases


def text_of(passphrase):
    assert type(passphrase) is Passphrase
    return passphrase._bytes.decode()


def private(path, content):
    path.write_bytes(content)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("text", [TEXT, "ä", " ", "x" * 4096])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_passphrase_from_a_file(tmp_path, text, end):
    assert text_of(passphrase_from_file(private(tmp_path / "file", (text + end).encode()))) == text


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"two\nlines", b"an end\r\n", b"two ends\n\n", b"\xff", b"x" * 4097, b"x" * 4097 + b"\n", b"a\0b"]
)
def test_a_file_that_holds_no_passphrase(tmp_path, content):
    path = private(tmp_path / "file", content)
    refuse(errors.KeyFormatError, f"^{path}: it holds no passphrase; accepted is one line", passphrase_from_file, path)


def test_a_passphrase_file_that_cannot_be_read(tmp_path):
    refuse(errors.FileAccessError, "cannot be read: no such file", passphrase_from_file, tmp_path / "none")
    refuse(errors.ParameterError, "^path: got ", passphrase_from_file, None)


def test_a_passphrase_from_the_terminal(monkeypatch):
    asked, typed = [], []
    monkeypatch.setattr(getpass, "getpass", lambda prompt: asked.append(prompt) or typed.pop(0))
    typed[:] = ["ä horse"]
    assert text_of(passphrase_from_terminal()) == "ä horse"
    typed[:] = ["a horse", "a horse"]
    assert text_of(passphrase_from_terminal(what="new passphrase", twice=True)) == "a horse"
    assert asked == ["passphrase: ", "new passphrase: ", "new passphrase, again: "]
    typed[:] = ["a horse", "a hoarse"]
    refuse(errors.KeySourceError, "^passphrase: the two are not the same", passphrase_from_terminal, twice=True)
    typed[:] = [""]
    refuse(errors.KeyFormatError, "accepted is a passphrase of one character or more", passphrase_from_terminal)


def test_without_a_terminal_nothing_is_read_that_would_be_shown(monkeypatch):
    def no_terminal(*arguments, **keywords):
        raise OSError(6, "No such device or address")

    monkeypatch.setattr(os, "open", no_terminal)
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT + "\n"))
    refuse(errors.KeySourceError, "^passphrase: there is no terminal to ask on", passphrase_from_terminal)
    assert sys.stdin.read() == TEXT + "\n"
