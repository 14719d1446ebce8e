"""Where keys are kept besides key files: an environment variable, a command that prints the key, a passphrase.

A key is the same text everywhere: one line of 32, 48 or 64 lowercase hexadecimal digits, with or without its line end.
(`MasterKey.from_file` reads it from a file.) No message repeats any of what was found instead.
"""

from __future__ import annotations

import getpass
import os
import selectors
import shlex
import subprocess
import time
import warnings
from collections.abc import Sequence

from deeplock_kernels.errors import KeyFormatError, KeySourceError, ParameterError, shown
from deeplock_kernels.files import file_errors, path_text
from deeplock_kernels.keys import Hidden, MasterKey, key_in_line, warn_of_readers
from deeplock_kernels.passphrases import Passphrase

COMMAND_SECONDS = 120.0
_LINE_BYTES = 65  # of the longest key and its line end
_PASSPHRASE_BYTES = 4096
_ACCEPTED = "accepted is one line of 32, 48 or 64 lowercase hexadecimal digits"


def key_from_environment(name: str) -> MasterKey:
    """Take a key from an environment variable.

    The variable stays: other processes of the same user can read it, and those that this one starts inherit it.

    Raises
    ------
    ParameterError
        `name` is no name of a variable.
    KeySourceError
        There is no such variable.
    KeyFormatError
        It holds something else than a key.
    """
    if not isinstance(name, str) or not name or "=" in name or "\0" in name:
        raise ParameterError(f"name: got {shown(name)}, accepted is the name of an environment variable")
    if name not in os.environ:
        raise KeySourceError(f"the environment variable {shown(name)}: it is not set; export it first")
    secret = key_in_line(Hidden(os.fsencode(os.environ[name])))
    if secret is None:
        raise KeyFormatError(f"the environment variable {shown(name)}: it holds no key; {_ACCEPTED}")
    return MasterKey.from_bytes(secret)


def key_from_command(command: str | Sequence[str], *, timeout: float = COMMAND_SECONDS) -> MasterKey:
    """Run a command and take the key that it prints, as those of password managers and key services do.

    It has this process's terminal, standard input, standard error and environment, so it can ask for what it needs.

    Parameters
    ----------
    command
        The words of the command, or a line that is split into words as a shell does it. No shell runs it: for pipes and
        variables, name one, as in `sh -c '...'`.
    timeout
        The seconds after which it is ended.

    Raises
    ------
    ParameterError
        `command` is no command, or `timeout` no time.
    KeySourceError
        It cannot be started, fails, or takes too long.
    KeyFormatError
        It prints something else than a key.
    """
    words = _words(command)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < 1e9:
        raise ParameterError(f"timeout: got {shown(timeout)}, accepted is a number of seconds above 0")
    shown_name = shown(words[0])
    output, status = _run(words, timeout)
    if isinstance(status, OSError):
        raise KeySourceError(f"command: {shown_name} cannot be started: {status.strerror}")
    if status is None:
        raise KeySourceError(f"command: {shown_name} took more than {timeout:g} seconds, so it was ended")
    if status != 0:
        how = f"exit status {status}" if status > 0 else f"signal {-status}"
        raise KeySourceError(f"command: {shown_name} failed with {how}; run it by itself to see why")
    secret = key_in_line(output)
    if secret is None:
        raise KeyFormatError(f"command: {shown_name} printed no key; {_ACCEPTED}")
    return MasterKey.from_bytes(secret)


def passphrase_from_terminal(*, what: str = "passphrase", twice: bool = False) -> Passphrase:
    """Ask for a passphrase on the terminal, without showing it.

    Parameters
    ----------
    what
        What it is, for the prompt.
    twice
        Whether to ask again and compare: for a new lock, which a slip of the finger would make a lock for good.

    Raises
    ------
    KeySourceError
        There is no terminal, or the two differ.
    KeyFormatError
        It is empty.
    """
    first = _typed(f"{what}: ")
    if twice and _typed(f"{what}, again: ") != first:
        raise KeySourceError(f"{what}: the two are not the same; nothing was done")
    return Passphrase(first.decode(errors="surrogateescape"))


def passphrase_from_file(path: str | os.PathLike[str]) -> Passphrase:
    """Read a passphrase from the only line of a file; `/dev/stdin` is the standard input.

    Raises
    ------
    FileAccessError
        The file cannot be read.
    KeyFormatError
        It holds no line, more than one, or one of more than 4096 bytes.

    Warns
    -----
    ExposedKeyWarning
        Others than its owner can read the file.
    """
    text = path_text(path)
    with file_errors(text, "read"), open(text, "rb") as file:
        line = Hidden(file.read(_PASSPHRASE_BYTES + 2).removesuffix(b"\n"))
        status = os.fstat(file.fileno())
    found = _passphrase(line) if len(line) <= _PASSPHRASE_BYTES else None
    if found is None:
        raise KeyFormatError(
            f"{text}: it holds no passphrase; accepted is one line of UTF-8 text of at most {_PASSPHRASE_BYTES} bytes"
        )
    warn_of_readers(text, status)
    return found


def _passphrase(line: bytes) -> Passphrase | None:
    try:
        return Passphrase(line.decode())
    except (KeyFormatError, UnicodeDecodeError):
        return None


def _typed(prompt: str) -> Hidden:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", getpass.GetPassWarning)  # it would show what is typed
            return Hidden(getpass.getpass(prompt).encode(errors="surrogateescape"))
    except (getpass.GetPassWarning, EOFError, OSError):
        pass
    raise KeySourceError("passphrase: there is no terminal to ask on; give it in a file, such as /dev/stdin")


def _words(command: str | Sequence[str]) -> list[str]:
    try:
        words = shlex.split(command) if isinstance(command, str) else list(command)
    except (ValueError, TypeError):
        words = []
    if not words or not all(isinstance(word, str) and "\0" not in word for word in words) or not words[0]:
        raise ParameterError(
            "command: accepted are the words of a command, or one line of them with its quotes closed"
        )
    return words


def _run(words: list[str], timeout: float) -> tuple[Hidden, int | OSError | None]:
    """Give what a command prints and its status: an error if it did not start, None if it took too long.

    A command that prints more than a key is ended, and what it printed is not taken for one.
    """
    output, deadline = Hidden(b""), time.monotonic() + timeout
    try:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, bufsize=0)
    except OSError as error:
        return output, error
    assert process.stdout is not None
    with process, selectors.DefaultSelector() as selector:
        try:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(output) <= _LINE_BYTES:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return output, None
                before = len(output)
                output = Hidden(output + os.read(process.stdout.fileno(), _LINE_BYTES + 1 - before))
                if len(output) == before:
                    return output, process.wait(max(0.0, deadline - time.monotonic()))
            return output, 0
        except subprocess.TimeoutExpired:
            return output, None
        finally:
            process.kill()  # does nothing to one that has ended
