"""Command lines of `deeplock`, in a directory with keys and with plain, locked, altered and broken files.

A case is the arguments, one a line, then an empty line, then what the file `given` holds. A path leads nowhere but into
the directory: an argument that could do otherwise makes a case void. The commands `bench`, `demo` and `warmup`, which
take long, do nothing here; their arguments are read all the same. Nor is any command run for a key, or a terminal asked.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import safetensors.numpy

from deeplock_kernels import cli, key_sources
from deeplock_kernels.checkpoints.formats.safetensors_table import entry, read_table
from deeplock_kernels.checkpoints.streaming import lock_file
from deeplock_kernels.errors import KeySourceError
from deeplock_kernels.key_wrapping import wrap_key
from deeplock_kernels.keys import MasterKey

COMMANDS = [
    "keygen", "lock", "unlock", "rekey", "recover", "verify", "wrap-key", "rewrap-key",
    "inspect", "tiers", "sboxes", "bench", "warmup", "demo",
]  # fmt: skip
OPTIONS = [
    "--key", "--threads", "--schedule", "--sbox", "--only", "--bits", "--size", "--rounds",
    "--tier", "--into", "--in-place", "--undo", "--no-seal", "--quick", "--help", "--version", "--",
    "--key-env", "--passphrase-file", "--wrapped-key", "--new-key",
]  # fmt: skip
NAMES = [
    "plain", "locked", "expansion", "unsealed", "altered", "cut", "key", "other.key", "short.key", "empty", "folder",
    "folder/plain", "link", "dangling", "circle", "given", "new", "folder/new", "missing/new", ".",
    "wrapped", "passphrase",
]  # fmt: skip
VALUES = [
    "1", "2", "0", "-1", "64KiB", "2GiB", "٣", "128", "192", "256", "counter", "expansion", "aes",
    "sm4", "avx2", "portable", "*", "a*", "[!a]", "?", "nothing",
]  # fmt: skip
TOKENS = ["\n", "\n\n", *(f"{word}\n" for word in COMMANDS + OPTIONS + NAMES + VALUES), *OPTIONS]
SEALED = ("locked", "expansion")
_new_parser = cli._parser
_no_key = mock.Mock(side_effect=KeySourceError("no commands and no terminal here"))
_NO_SOURCES = {"key_from_command": _no_key, "passphrase_from_terminal": _no_key}
_ELSEWHERE = re.compile(r"(^|[^\w.])/|\.\.|\0/")


def run(data: bytes) -> None:
    """Run a command line and hold everything that it did against its exit code."""
    line, _, given = data.partition(b"\n\n")
    arguments = os.fsdecode(line).split("\n")
    if any(map(_ELSEWHERE.search, arguments)):
        return
    folder = _folder()
    folder.give(given)
    before = folder.content()
    try:
        code, out, err = folder.run(arguments)
        after = folder.content()
        assert code in (cli.DONE, cli.FAILED, cli.USAGE, cli.WRONG_KEY, cli.TAMPERED), code
        if code == cli.DONE:
            _check_done(folder, arguments, before, after)
        else:
            assert out == "", out
            assert after == before, after.keys() ^ before.keys()
            if code != cli.USAGE:
                assert re.fullmatch(r"deeplock: error: .+\n", err), err
                assert err[:-1].isprintable(), err
    finally:
        if folder.content() != before:
            folder.refill()


def mutate(data: bytes, random: Random, mutate_bytes: Callable[[bytes], bytes]) -> bytes:
    """Put words where words were; else change any byte."""
    if random.random() < 0.3:
        return mutate_bytes(data)
    line, separator, given = data.partition(b"\n\n")
    words = line.split(b"\n")
    for _ in range(random.randint(1, 3)):
        i = random.randint(0, len(words))
        kind = random.choices([COMMANDS, OPTIONS, NAMES, VALUES], [1, 2, 4, 2])[0]
        words[i : i + random.choice([0, 1, 1, 2])] = [random.choice(kind).encode()] * (random.random() < 0.8)
    return b"\n".join(words) + separator + given


def _check_done(
    folder: _Folder, arguments: list[str], before: dict[str, bytes], after: dict[str, bytes]
) -> None:
    """Nothing has changed but the file to be written, and that one is right."""
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    try:
        with redirect_stdout(io.StringIO()):
            parsed = _parser(in_place=cli._in_place(arguments)).parse_args(arguments)
    except SystemExit:  # help, or the version
        assert not changed
        return
    command = parsed.run.__name__
    outputs = dict.fromkeys(("_lock", "_unlock", "_rekey", "_wrap_key", "_rewrap_key"), "output")
    written = (outputs | {"_keygen": "keyfile"}).get(command)
    if written is None:
        assert not changed
        assert command != "_verify" or folder.real(parsed.file) in SEALED
        return
    path = parsed.input if getattr(parsed, "in_place", False) else getattr(parsed, written)
    target = folder.real(path)
    assert changed <= {target}
    sources, new_sources = _keys(parsed, ""), _keys(parsed, "new_")
    for name, value in [*sources.items(), *new_sources.items()]:
        assert name == "key_env" or target != folder.real(value), "the key is gone"
    if command == "_keygen":
        assert target not in before
        assert re.fullmatch(rb"[0-9a-f]+\n", after[target])
        assert len(after[target]) == parsed.bits // 4 + 1
    elif command in ("_lock", "_rekey"):
        keys, plain = (sources, folder.real(parsed.input)) if command == "_lock" else (new_sources, "plain")
        key = [f"--{name.replace('_', '-')}={value}" for name, value in keys.items()]
        code, _, err = folder.run(["unlock", *key, "--", path, "unlocked again"])
        assert code == cli.DONE, err
        assert folder.content()["unlocked again"] == before[plain]
    elif command in ("_wrap_key", "_rewrap_key"):
        assert target not in before
        assert after[target].startswith(b"deeplock-wrapped-key/1 ")
    else:
        assert entry(read_table(folder.path / target)) is None
        assert folder.real(parsed.input) in (*SEALED, "unsealed")
        assert after[target] == before["plain"]


def _keys(parsed: argparse.Namespace, prefix: str) -> dict[str, str]:
    """Give where a command line says that a key comes from, by the name of the option."""
    names = ("key", "key_env", "passphrase_file", "wrapped_key")
    found = {name: getattr(parsed, prefix + name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


class _Folder:
    """The directory that command lines are run in."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp()).resolve()
        atexit.register(shutil.rmtree, self.path)
        keys = {"key": bytes(range(32)), "other.key": bytes(32), "short.key": bytes(range(16))}
        for name, key in keys.items():
            MasterKey.from_bytes(key).to_file(self.path / name)
        tensors = {
            "a.weight": np.arange(300, dtype=np.float32).reshape(30, 10),
            "a.bias": np.zeros(40, np.float16),
            "none": np.zeros((0, 3), np.int8),
        }
        safetensors.numpy.save_file(tensors, self.path / "plain", metadata={"x": "y"})
        for name, schedule in (("locked", "counter"), ("expansion", "expansion"), ("unsealed", "counter")):
            seal = name in SEALED
            lock_file(self.path / "plain", self.path / name, keys["key"], schedule=schedule, seal=seal)
        self._files = {path.name: path.read_bytes() for path in self.path.iterdir()}
        locked = self._files["locked"]
        altered = locked[:-1] + bytes([locked[-1] ^ 1])
        wrap_key(self.path / "wrapped", keys["key"])
        self._files |= {"wrapped": (self.path / "wrapped").read_bytes(), "passphrase": b"correct horse"}
        self._files |= {"altered": altered, "cut": locked[:-1], "empty": b"", "given": b""}
        self.refill()

    def give(self, content: bytes) -> None:
        """Say what the file `given` holds."""
        if self._files["given"] != content:
            self._files["given"] = content
            (self.path / "given").write_bytes(content)

    def refill(self) -> None:
        """Make everything as it was."""
        shutil.rmtree(self.path)
        (self.path / "folder").mkdir(parents=True)
        for name, content in self._files.items():
            (self.path / name).write_bytes(content)
            (self.path / name).chmod(0o600)  # any of them may be taken for a key's
        (self.path / "folder" / "plain").write_bytes(self._files["plain"])
        for name, behind in (("link", "plain"), ("dangling", "made"), ("circle", "circle")):
            (self.path / name).symlink_to(behind)

    def content(self) -> dict[str, bytes]:
        """Give what every file holds, where every link leads, and the directories."""
        return {str(path.relative_to(self.path)): _content(path) for path in self.path.rglob("*")}

    def real(self, name: str) -> str:
        """Give the name of the file behind a path."""
        return os.path.relpath(os.path.realpath(self.path / name), self.path)

    def run(self, arguments: list[str]) -> tuple[object, str, str]:
        """Run a command line here; give its exit code, standard output and standard error."""
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
        before = os.getcwd()
        os.chdir(self.path)
        try:
            with (
                redirect_stdout(out),
                redirect_stderr(err),
                mock.patch.object(cli, "_parser", _parser),
                mock.patch.multiple(key_sources, **_NO_SOURCES),
            ):
                code: object = cli.main(arguments)
        except SystemExit as end:
            code = end.code
        finally:
            os.chdir(before)
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())
        return code, texts[0], texts[1]


def _content(path: Path) -> bytes:
    if path.is_symlink():
        return b"to " + os.fsencode(os.readlink(path))
    return path.read_bytes() if path.is_file() else b""


@functools.cache
def _parser(*, in_place: bool) -> argparse.ArgumentParser:
    """Give a parser of command lines, made once since that takes longer than its use."""
    with mock.patch.multiple(cli, **dict.fromkeys(("_bench", "_demo", "_warmup"), _nothing)):
        return _new_parser(in_place=in_place)


def _nothing(_arguments: object) -> Iterator[str]:
    yield from ()


@functools.cache
def _folder() -> _Folder:
    return _Folder()
