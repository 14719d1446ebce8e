"""Checkpoints in shards: every bit comes back, what is wrong is named, and a run that died is continued."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import processes
import pytest
import safetensors.numpy
from shards import GROUP, INDEX, KEY, OTHER_KEY, WINDOW, make_checkpoint, shard_name, snapshot
from support import BOXES, oracle_mac

import deeplock_kernels as deeplock
from deeplock_kernels import cli, files
from deeplock_kernels.checkpoints import shard_index, sharded, streaming, tasks
from deeplock_kernels.checkpoints.directory import RUN_FILE
from deeplock_kernels.checkpoints.sharded import (
    lock_checkpoint,
    rekey_checkpoint,
    unlock_checkpoint,
    verify_checkpoint,
)
from deeplock_kernels.checkpoints.streaming import read_header, unlock_file, verify_file
from deeplock_kernels.errors import (
    AlreadyLockedError,
    ContainerError,
    FileAccessError,
    HeaderError,
    NotLockedError,
    NotSealedError,
    ParameterError,
    ResumeWarning,
    SameFileError,
    TamperedError,
    TamperedHeaderError,
    TensorNameError,
    UnknownNameError,
    WrongKeyError,
)
from deeplock_kernels.keys import MasterKey
from deeplock_kernels.passphrases import Passphrase
from deeplock_kernels.transform import Transform

FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", WINDOW)
    monkeypatch.setattr(tasks, "GROUP", GROUP)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power fails here


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint and the same one locked, neither of which a test changes."""
    root = tmp_path_factory.mktemp("made")
    make_checkpoint(root / "plain")
    lock_checkpoint(root / "plain", root / "locked", KEY)
    return root


@pytest.fixture
def plain(made, tmp_path):
    shutil.copytree(made / "plain", tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def locked(made, tmp_path):
    shutil.copytree(made / "locked", tmp_path / "locked")
    return tmp_path / "locked"


def salt_of(path):
    return json.loads(json.loads((path / INDEX).read_text())["metadata"]["deeplock"])["salt"]


# What comes out


@pytest.mark.parametrize(
    ("options", "box"),
    [({}, None), ({"only": "*.weight", "seal": False, "threads": 1}, None), ({"sbox": BOXES["random"]}, BOXES["random"])],
    ids=["plain", "only", "own box"],
)
def test_every_bit_comes_back(plain, tmp_path, options, box):
    before, done = snapshot(plain), []
    header = lock_checkpoint(plain, tmp_path / "locked", KEY, progress=done.append, **options)
    assert sum(done) == json.loads((plain / INDEX).read_text())["metadata"]["total_size"]
    assert len(done) > 4
    assert snapshot(plain) == before
    assert snapshot(tmp_path / "locked").keys() == before.keys()
    new = rekey_checkpoint(tmp_path / "locked", tmp_path / "rekeyed", KEY, OTHER_KEY, sbox=box)
    assert new.salt != header.salt
    assert new.tensors.keys() == header.tensors.keys()
    for source, key in (("locked", KEY), ("rekeyed", OTHER_KEY)):
        unlock_checkpoint(tmp_path / source, tmp_path / f"{source} back", key, sbox=box)
        assert snapshot(tmp_path / f"{source} back") == before
        if source == "rekeyed" or options.get("seal", True):
            assert verify_checkpoint(tmp_path / source, key).tensors == (new if source == "rekeyed" else header).tensors
        else:
            with pytest.raises(NotSealedError):
                verify_checkpoint(tmp_path / source, key)


def test_each_shard_is_a_locked_file_of_the_same_lock(made, tmp_path):
    header = verify_checkpoint(made / "locked", KEY)
    locked = {}
    for name in (FIRST, SECOND):
        assert verify_file(made / "locked" / name, KEY).salt == header.salt
        assert read_header(made / "locked" / name).check == header.check
        unlock_file(made / "locked" / name, tmp_path / name, KEY)
        assert (tmp_path / name).read_bytes() == (made / "plain" / name).read_bytes()
        found = safetensors.numpy.load_file(made / "locked" / name)
        assert {tensor: header.tensors[tensor] for tensor in found} == read_header(made / "locked" / name).tensors
        locked |= found
    assert locked.keys() == header.tensors.keys()
    # Equal tensors in different shards: each has a key of its own.
    share = np.mean(locked["tied.0"].view(np.uint8) == locked["tied.1"].view(np.uint8))
    assert share < 0.05
    plain = safetensors.numpy.load_file(made / "plain" / FIRST) | safetensors.numpy.load_file(made / "plain" / SECOND)
    for name, tensor in locked.items():
        assert tensor.size == 0 or np.mean(tensor.view(np.uint8) == plain[name].view(np.uint8)) < 0.1


def test_it_locks_as_the_functions_for_tensors_do(made):
    header = verify_checkpoint(made / "locked", KEY)
    tensors = {}
    for name in (FIRST, SECOND):
        tensors |= safetensors.numpy.load_file(made / "locked" / name)
    tensors = {name: tensor.copy() for name, tensor in tensors.items()}
    without = deeplock.LockHeader.from_json(header.to_json())
    deeplock.unlock_tensors(tensors, KEY, without, check=False)
    plain = safetensors.numpy.load_file(made / "plain" / FIRST)
    assert all(tensors[name].tobytes() == tensor.tobytes() for name, tensor in plain.items())


def test_the_mac_of_the_index_is_over_the_index_and_the_macs_of_the_shards(made):
    header = verify_checkpoint(made / "locked", KEY)
    index = json.loads((made / "locked" / INDEX).read_text())
    del index["metadata"]["deeplock"]
    shards = {name: read_header(made / "locked" / name).mac.hex() for name in (FIRST, SECOND)}
    assert header.mac == oracle_mac(KEY, header, {"index": index, "shards": shards})


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_one_file_without_an_index(made, tmp_path, name):
    (tmp_path / "one").mkdir()
    shutil.copy(made / "plain" / FIRST, tmp_path / "one" / name)
    (tmp_path / "one" / "config.json").write_text("{}")
    header = lock_checkpoint(tmp_path / "one", tmp_path / "locked", KEY)
    assert verify_file(tmp_path / "locked" / name, KEY) == header == verify_checkpoint(tmp_path / "locked", KEY)
    unlock_checkpoint(tmp_path / "locked", tmp_path / "back", KEY)
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "one")


def test_a_directory_like_those_of_a_hub_with_links_into_its_blobs(made, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, name in enumerate((FIRST, SECOND, INDEX, "config.json")):
        shutil.copy(made / "plain" / name, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / name).symlink_to(Path("..", "blobs", str(number)))
    (tmp_path / "snapshot" / "sub").symlink_to(made / "plain" / "sub")
    lock_checkpoint(tmp_path / "snapshot", tmp_path / "locked", KEY)
    unlock_checkpoint(tmp_path / "locked", tmp_path / "back", KEY)
    back = snapshot(tmp_path / "back")
    assert back | {"empty.txt": b""} == snapshot(made / "plain")
    assert not any(path.is_symlink() for path in (tmp_path / "back").rglob("*"))


# The index


INDEXES = [
    '{"metadata": {"total_size": 0}, "weight_map": {}}',
    '{\n  "metadata": {},\n  "weight_map": {}\n}\n',
    '{"weight_map":{},"metadata":{ }}',
    ' { "weight_map" : { } } ',
    '{"weight_map": {}, "metadata": {"a": {"deep": [1, "}"]}, "total_size": 1e3, "ä\\"": null}, "other": [{}]}',
]


def parsed(text):
    import io

    data = text.encode() if isinstance(text, str) else text
    return shard_index.parse_index(io.BytesIO(data), len(data), "index")


@pytest.mark.parametrize("text", INDEXES)
def test_the_index_gets_a_header_and_loses_it_again(text):
    index, header = parsed(text), '{"a": "\\"}{", "b": "ä"}'
    with_header = parsed(index.with_header(header))
    assert with_header.header == header
    assert with_header.proved == index.proved
    assert with_header.without_header().decode() == text
    # Written anew by another program, which keeps what it says and no spaces.
    value = json.loads(with_header.text)
    assert parsed(json.dumps(value)).header == header
    for indent in (None, 3):
        rest = json.loads(parsed(json.dumps(value, indent=indent)).without_header())
        assert rest.setdefault("metadata", {}) == json.loads(text).get("metadata", {})
        assert rest == {"metadata": {}} | json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        b"\xff",
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        '{"metadata": null, "weight_map": {}}',
        '{"metadata": {"total_size": "1"}, "weight_map": {}}',
        '{"metadata": {"deeplock": {}}, "weight_map": {}}',
        '{"weight_map": {"a\\ud800": "x"}}',
        '{"weight_map": ' + "[" * 100_000,
        *(f'{{"weight_map": {{"a": "{name}"}}}}' for name in ("../x", "/x", "a/../x", "", "a//x", ".", "x\\\\y", "a\\u0000")),
    ],
)
def test_an_index_that_is_none(text):
    with pytest.raises(ContainerError, match=r"^index: "):
        parsed(text)


# What is refused, by name


def edit_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index)
    (path / INDEX).write_text(json.dumps(index))


def exchange(path, one, other):
    (path / one).rename(path / "held")
    (path / other).rename(path / one)
    (path / "held").rename(path / other)


WRONG_INDEXES = {
    "a shard is missing": (lambda path: (path / SECOND).unlink(), f"{SECOND} is missing"),
    "a shard is extra": (lambda path: shutil.copy(path / FIRST, path / "x.safetensors"), "x.safetensors is extra"),
    "a shard is renamed": (lambda path: (path / FIRST).rename(path / "y.safetensors"), f"{FIRST} is missing.*y.safet"),
    "shards are exchanged": (lambda path: exchange(path, FIRST, SECOND), f"{FIRST}: it holds '[a-z.]*1[a-z.]*', .*{SECOND}"),
    "a tensor that no shard has": (
        lambda path: edit_index(path, lambda index: index["weight_map"].update(ghost=FIRST)),
        f"it places 'ghost' in {FIRST}",
    ),
    "a tensor that is not listed": (
        lambda path: edit_index(path, lambda index: index["weight_map"].pop("tied.0")),
        f"{FIRST}: it holds 'tied.0', which the index does not list",
    ),
    "total_size": (
        lambda path: edit_index(path, lambda index: index["metadata"].update(total_size=1)),
        "total_size of 1, the shards hold",
    ),
    "out of the directory": (
        lambda path: edit_index(path, lambda index: index["weight_map"].update(a="../plain/x.safetensors")),
        "'../plain/x.safetensors'",
    ),
    "a tensor twice": (lambda path: twice(path), "'tied.0', which .* holds too"),
    "two indexes": (lambda path: shutil.copy(path / INDEX, path / f"a{INDEX}"), f"indexes a{INDEX}, {INDEX}"),
    "no index": (lambda path: (path / INDEX).unlink(), "2 safetensors files and no index"),
    "one of many": (lambda path: [(path / INDEX).unlink(), (path / FIRST).unlink()], "1 safetensors files and no index"),
    "no checkpoint": (lambda path: shutil.rmtree(path), "it is not there, or empty"),
    "a broken shard": (lambda path: (path / FIRST).write_bytes(b"x" * 100), f"{FIRST}: "),
}


def twice(path):
    tensors = safetensors.numpy.load_file(path / SECOND)
    safetensors.numpy.save_file(tensors | {"tied.0": tensors["tied.1"]}, path / SECOND)
    edit_index(path, lambda index: index["weight_map"].update({"tied.0": SECOND}))


@pytest.mark.parametrize("what", WRONG_INDEXES)
def test_an_index_that_lies_is_refused_and_the_lie_is_named(plain, tmp_path, what):
    change, message = WRONG_INDEXES[what]
    change(plain)
    if what == "a tensor twice":
        message = "'tied.0', which"
    with pytest.raises(ContainerError, match=message):
        lock_checkpoint(plain, tmp_path / "new", KEY)
    assert not (tmp_path / "new").exists()


def flip(path, name, place):
    data = bytearray((path / name).read_bytes())
    data[place] ^= 1
    (path / name).write_bytes(data)


def other_lock(path, made):
    """Lock the same checkpoint once more."""
    lock_checkpoint(made / "plain", path.parent / "again", KEY)
    return path.parent / "again"


def altered_header(path, change):
    index = json.loads((path / INDEX).read_text())
    header = json.loads(index["metadata"]["deeplock"])
    change(header)
    index["metadata"]["deeplock"] = json.dumps(header)
    (path / INDEX).write_text(json.dumps(index))


ALTERED = {
    "a bit of a shard": (lambda path, made: flip(path, SECOND, -1), TamperedError, f"{SECOND}: tensors\\['layer.1.bias'"),
    "a bit of a shard's table": (
        lambda path, made: (path / SECOND).write_bytes((path / SECOND).read_bytes().replace(b'"pt"', b'"tf"')),
        TamperedHeaderError,
        f"{SECOND}: header",
    ),
    "a shard of another lock": (
        lambda path, made: shutil.copy(other_lock(path, made) / FIRST, path),
        TamperedHeaderError,
        f"{FIRST}: it is from another",
    ),
    "a shard that is not locked": (
        lambda path, made: shutil.copy(made / "plain" / FIRST, path),
        TamperedHeaderError,
        f"{FIRST}: it is not locked",
    ),
    "the index of another lock": (
        lambda path, made: shutil.copy(other_lock(path, made) / INDEX, path),
        TamperedHeaderError,
        "it is from another",
    ),
    "a seal in the index": (
        lambda path, made: altered_header(path, lambda header: header["tensors"]["tied.0"].update(seal="0" * 32)),
        TamperedHeaderError,
        f"{FIRST}: its lock header is not that of the index",
    ),
    "a tensor less in the index": (
        lambda path, made: altered_header(path, lambda header: header["tensors"].pop("tied.0")),
        TamperedHeaderError,
        f"{FIRST}: its lock header is not that of the index",
    ),
    "a tensor more in the index": (
        lambda path, made: altered_header(path, lambda header: header["tensors"].update(ghost={"bytes": 1})),
        HeaderError,
        "'ghost', which no shard",
    ),
    "the rest of the index": (
        lambda path, made: edit_index(path, lambda index: index["metadata"].update(note="x")),
        TamperedHeaderError,
        "header: it is not as the lock made it",
    ),
    "the index is gone": (lambda path, made: (path / INDEX).unlink(), ContainerError, "no index"),
    "the index has no header": (
        lambda path, made: shutil.copy(made / "plain" / INDEX, path),
        NotLockedError,
        "not finished",
    ),
} | {
    what: (lambda path, made, change=change: change(path), ContainerError, message)
    for what, (change, message) in WRONG_INDEXES.items()
    if what.startswith(("a shard", "shards", "a tensor that"))
}


@pytest.mark.parametrize("what", ALTERED)
def test_what_is_altered_is_noticed_and_named(locked, made, tmp_path, what):
    change, kind, message = ALTERED[what]
    change(locked, made)
    for function, arguments in (
        (verify_checkpoint, (KEY,)),
        (unlock_checkpoint, (tmp_path / "new", KEY)),
        (rekey_checkpoint, (tmp_path / "newer", KEY, OTHER_KEY)),
    ):
        with pytest.raises(kind, match=message):
            function(locked, *arguments)
    for name in ("new", "newer"):
        assert not (tmp_path / name / INDEX).exists()
        assert not (tmp_path / name / (SECOND if what == "a bit of a shard" else FIRST)).exists()


def test_a_wrong_key_writes_nothing(made, tmp_path):
    for function, keys in ((unlock_checkpoint, [OTHER_KEY]), (rekey_checkpoint, [OTHER_KEY[::-1] * 2, KEY])):
        with pytest.raises(WrongKeyError):
            function(made / "locked", tmp_path / "new", *keys)
    with pytest.raises(WrongKeyError):
        verify_checkpoint(made / "locked", KEY[::-1])
    assert not (tmp_path / "new").exists()


def test_wrong_arguments(plain, made, tmp_path):
    def refused(kind, message, source=plain, target=tmp_path / "new", key=KEY, **options):
        before = snapshot(tmp_path)
        with pytest.raises(kind, match=message):
            lock_checkpoint(source, target, key, **options)
        assert snapshot(tmp_path) == before

    refused(UnknownNameError, "^schedule: got 'expansion'", schedule="expansion")
    refused(UnknownNameError, "^sbox", sbox="none")
    refused(TensorNameError, "^only", only="nothing")
    refused(ParameterError, "^executor: got int", executor=1)
    refused(ParameterError, "^threads", threads=0)
    refused(ParameterError, "^exclude", exclude="config.json")
    refused(ParameterError, "^exclude: got 'nothing'", exclude=["nothing"])
    refused(ParameterError, "^dst_dir", target=1)
    refused(AlreadyLockedError, "unlock it first", source=made / "locked")
    refused(FileAccessError, "no directory", source=plain / "config.json")
    for target in (plain, plain / "inside", tmp_path, plain / ".." / "plain"):
        refused(SameFileError, "^dst_dir", target=target)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    refused(FileAccessError, "it holds 'notes'", target=tmp_path / "other")
    with pytest.raises(NotLockedError):
        unlock_checkpoint(plain, tmp_path / "new", KEY)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "sub/consolidated.PTH", "blob", "my.key"])
def test_other_weights_and_keys_are_not_copied(plain, made, tmp_path, name):
    secret = MasterKey.from_bytes(KEY)
    (plain / name).write_bytes(b"x" if "." in name else (made / "plain" / FIRST).read_bytes())
    if name == "my.key":
        (plain / name).unlink()
        secret.to_file(plain / name)
    with pytest.raises(ContainerError, match=f"{name}: it may hold {'a key' if name == 'my.key' else 'weights'}"):
        lock_checkpoint(plain, tmp_path / "new", KEY)
    assert not (tmp_path / "new").exists()
    lock_checkpoint(plain, tmp_path / "new", KEY, exclude=[f"*{name[-4:]}"])
    assert not (tmp_path / "new" / name).exists()
    assert (tmp_path / "new" / "config.json").exists()


def test_links_that_lead_in_circles_or_nowhere_and_what_is_no_file(plain, tmp_path):
    def refused(message):
        with pytest.raises((FileAccessError, ContainerError), match=message):
            lock_checkpoint(plain, tmp_path / "new", KEY)
        assert not (tmp_path / "new").exists()
        (plain / "sub" / "x").unlink()

    (plain / "sub" / "x").symlink_to(plain)
    refused("sub/x: it leads back")
    (plain / "sub" / "x").symlink_to("x")
    refused("sub/x: cannot be read: its symbolic links lead in a circle")
    (plain / "sub" / "x").symlink_to("nowhere")
    refused("sub/x: cannot be read: no such file")
    os.mkfifo(plain / "sub" / "x")
    refused("sub/x: cannot be read: it is a device")


# Runs that die, and the next one


class Interruption(BaseException):
    """Stands for anything that no `except Exception` sees."""


def failing(monkeypatch, owner, name, number, error):
    """Have the call of this number raise, and count them."""
    original, calls = getattr(owner, name), []

    def replaced(*arguments, **keywords):
        calls.append(name)
        if len(calls) == number:
            raise error
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, replaced)
    return calls


STEPS = {
    "replace": (files.os, "replace", OSError(errno.ENOSPC, "full")),
    "fsync": (files.os, "fsync", Interruption()),
    "write": (tasks.os, "pwrite", OSError(errno.EIO, "broken")),
    "change": (Transform, "run", Interruption()),
    "output": (sharded.Work, "start", KeyboardInterrupt()),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("operation", ["lock", "unlock"])
def test_whatever_fails_the_source_is_untouched_and_the_next_run_finishes(made, tmp_path, monkeypatch, step, operation):
    source, function = (made / "plain", lock_checkpoint) if operation == "lock" else (made / "locked", unlock_checkpoint)
    before, number, failed, kept = snapshot(source), 0, 0, 0
    while True:
        number += 1 if number < 4 else 3
        target = tmp_path / str(number)
        with monkeypatch.context() as patched:
            calls = failing(patched, *STEPS[step][:2], number, STEPS[step][2])
            try:
                function(source, target, KEY)
            except (FileAccessError, Interruption, KeyboardInterrupt):
                failed += 1
        assert snapshot(source) == before
        left = snapshot(target)
        if operation == "lock":
            assert RUN_FILE in left or left == {} or len(calls) < number or INDEX in left
        for name in left:
            if name in (FIRST, SECOND) and operation == "lock":
                verify_file(target / name, KEY)  # what is there is whole
                kept += 1
        if len(calls) < number:
            break
        if INDEX not in left:
            function(source, target, KEY)
        assert not any(name.startswith(".deeplock") for name in snapshot(target)) or INDEX in left
        if operation == "lock":
            verify_checkpoint(target, KEY)
            assert {name: snapshot(target)[name] for name in left if name in (FIRST, SECOND)}.items() <= left.items()
        else:
            assert {name: data for name, data in snapshot(target).items() if name != RUN_FILE} == snapshot(made / "plain")
    assert failed >= 3


KILLED = """
import os, signal, sys
from shards import GROUP, KEY, OTHER_KEY, WINDOW
from deeplock_kernels import files
from deeplock_kernels.checkpoints import sharded, streaming, tasks
tasks.GROUP, streaming.WINDOW = GROUP, WINDOW
owner, name, left = {"replace": (os, "replace"), "write": (os, "pwrite")}[sys.argv[1]] + (int(sys.argv[2]),)
original = getattr(owner, name)
def counted(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(owner, name, counted)
getattr(sharded, sys.argv[3])(*sys.argv[4:6], KEY, *[OTHER_KEY] * (sys.argv[3] == "rekey_checkpoint"))
"""


@pytest.mark.parametrize(
    ("function", "step", "number"),
    [("lock", "replace", 1), ("lock", "write", 6), ("lock", "replace", 6), ("unlock", "replace", 6), ("rekey", "write", 6)],
)
def test_a_killed_run_is_continued(made, tmp_path, function, step, number):
    source = made / ("plain" if function == "lock" else "locked")
    before = snapshot(source)
    process = processes.Process(KILLED, step, number, f"{function}_checkpoint", source, tmp_path / "new")
    process.finish(returncode=-9)
    left = snapshot(tmp_path / "new")
    assert INDEX not in left
    inodes = {name: os.stat(tmp_path / "new" / name).st_ino for name in (FIRST, SECOND) if name in left}
    assert len(inodes) == (0 if step == "replace" and number == 1 else 1)
    done = []
    keys = [KEY, OTHER_KEY] if function == "rekey" else [KEY]
    getattr(sharded, f"{function}_checkpoint")(source, tmp_path / "new", *keys, progress=done.append)
    assert sum(done) == json.loads((made / "plain" / INDEX).read_text())["metadata"]["total_size"]
    assert inodes.items() <= {name: os.stat(tmp_path / "new" / name).st_ino for name in (FIRST, SECOND)}.items()
    assert snapshot(source) == before
    assert snapshot(tmp_path / "new").keys() == before.keys()  # nothing is left over
    if function == "unlock":
        assert snapshot(tmp_path / "new") == snapshot(made / "plain")
    else:
        verify_checkpoint(tmp_path / "new", keys[-1])


@pytest.fixture
def half(plain, tmp_path, monkeypatch):
    """A run that died when its first shard was there."""
    with monkeypatch.context() as patched:
        failing(patched, files.os, "replace", 6, Interruption())
        with pytest.raises(Interruption):
            lock_checkpoint(plain, tmp_path / "half", KEY)
    assert {FIRST, RUN_FILE} < snapshot(tmp_path / "half").keys()
    assert SECOND not in snapshot(tmp_path / "half")
    return tmp_path / "half"


def run_salt(path):
    return json.loads(json.loads((path / RUN_FILE).read_text())["header"])["salt"]


def test_a_finished_shard_that_was_altered_is_made_again(plain, half):
    salt, first = run_salt(half), (half / FIRST).read_bytes()
    flip(half, FIRST, -5)
    lock_checkpoint(plain, half, KEY)
    assert (half / FIRST).read_bytes() == first  # of the same salt: its content is the same one
    assert salt_of(half) == salt
    verify_checkpoint(half, KEY)


def changed_data(plain):
    flip(plain, SECOND, -1)


def changed_by_name(plain):
    (plain / FIRST).rename(plain / "x")
    shutil.copy(plain / "x", plain / FIRST)
    (plain / "x").unlink()


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (changed_data, {}),
        (changed_by_name, {}),
        (lambda plain: (plain / "config.json").unlink(), {}),
        (lambda plain: edit_index(plain, lambda index: index.update(note=1)), {}),
        (lambda plain: None, {"only": "tied*"}),
        (lambda plain: None, {"seal": False}),
        (lambda plain: None, {"sbox": "sm4"}),
        (lambda plain: None, {"sbox": BOXES["random"]}),
    ],
)
def test_another_source_or_other_arguments_begin_anew_with_a_fresh_salt(plain, half, tmp_path, change, options):
    salt = run_salt(half)
    change(plain)
    with pytest.warns(ResumeWarning, match="begins anew"):
        lock_checkpoint(plain, half, KEY, **options)
    assert salt_of(half) != salt
    box = options.get("sbox") if not isinstance(options.get("sbox"), str) else None
    unlock_checkpoint(half, tmp_path / "back", KEY, sbox=box)
    assert snapshot(tmp_path / "back") == snapshot(plain)


def test_an_interrupted_run_of_another_key_or_with_a_record_that_was_altered(plain, half):
    before = snapshot(half)
    with pytest.raises(WrongKeyError, match="interrupted run with another key"):
        lock_checkpoint(plain, half, KEY[::-1])
    run = json.loads((half / RUN_FILE).read_text())
    run["plan"]["files"].append("notes")
    (half / RUN_FILE).write_text(json.dumps(run))
    with pytest.raises(TamperedHeaderError):
        lock_checkpoint(plain, half, KEY)
    (half / RUN_FILE).write_text("{")
    with pytest.raises(ContainerError, match="no record of an interrupted run"):
        lock_checkpoint(plain, half, KEY)
    (half / RUN_FILE).write_bytes(before[RUN_FILE])
    (half / "notes").write_text("mine")
    with pytest.raises(FileAccessError, match="it holds 'notes'"):
        lock_checkpoint(plain, half, KEY)
    (half / "notes").unlink()
    assert snapshot(half) == before
    with pytest.raises(ContainerError, match="not finished"):
        verify_checkpoint(half, KEY)


def test_a_run_with_a_passphrase_is_continued(plain, tmp_path, monkeypatch):
    with Passphrase("correct horse", n=1 << 14) as key:
        with monkeypatch.context() as patched:
            failing(patched, files.os, "replace", 6, Interruption())
            with pytest.raises(Interruption):
                lock_checkpoint(plain, tmp_path / "new", key)
        header = lock_checkpoint(plain, tmp_path / "new", key)
        assert header.passphrase is not None
        unlock_checkpoint(tmp_path / "new", tmp_path / "back", key)
    assert snapshot(tmp_path / "back") == snapshot(plain)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_source_that_changes_meanwhile(plain, tmp_path, monkeypatch, when):
    """No byte of the new content appears, locked with the salt of the old one."""
    monkeypatch.setattr(tasks, "GROUP", 1 << 20)  # no later task could notice it
    original, calls = Transform.run, []

    def run(*arguments, **keywords):
        if len(calls) == 2:
            flip(plain, FIRST, -1)
        calls.append(when)
        return original(*arguments, **keywords)

    original_task = tasks.run

    def before(task, *arguments):
        if not calls:
            flip(plain, FIRST, -1)
        calls.append(when)
        return original_task(task, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(*((tasks, "run", before) if when == "before" else (Transform, "run", run)))
        with pytest.raises(ContainerError, match=f"{FIRST}: it changed while it was read"):
            lock_checkpoint(plain, tmp_path / "new", KEY)
    assert FIRST not in snapshot(tmp_path / "new")
    salt = run_salt(tmp_path / "new")
    with pytest.warns(ResumeWarning):
        lock_checkpoint(plain, tmp_path / "new", KEY)
    assert salt_of(tmp_path / "new") != salt


def test_one_run_at_a_time_writes_into_a_target(plain, tmp_path):
    refused = pytest.raises(FileAccessError, match="new: cannot be written: another run is at it")

    def meanwhile(_nbytes):
        with refused:
            lock_checkpoint(plain, tmp_path / "new", KEY)
        with refused:
            lock_checkpoint(plain, tmp_path / "new", KEY, only="*.bias")

    lock_checkpoint(plain, tmp_path / "new", KEY, progress=meanwhile)
    unlock_checkpoint(tmp_path / "new", tmp_path / "back", KEY)
    assert snapshot(tmp_path / "back") == snapshot(plain)


def test_a_target_is_free_after_a_run_though_workers_that_it_forked_live_on(plain, tmp_path):
    """They hold its descriptor of the directory, as a duplicate does here."""
    held = []

    def meanwhile(_nbytes):
        links = {int(name): os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
        held.extend(os.dup(one) for one, place in links.items() if place == os.path.realpath(tmp_path / "new"))

    lock_checkpoint(plain, tmp_path / "new", KEY, progress=meanwhile)
    assert held
    try:
        for name in snapshot(tmp_path / "new"):
            (tmp_path / "new" / name).unlink()
        lock_checkpoint(plain, tmp_path / "new", KEY)
    finally:
        for one in held:
            os.close(one)


def test_file_systems_without_locks_keep_nobody_out(plain, tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    lock_checkpoint(plain, tmp_path / "new", KEY)
    unlock_checkpoint(tmp_path / "new", tmp_path / "back", KEY)
    assert snapshot(tmp_path / "back") == snapshot(plain)


# The command


@pytest.fixture
def command(made, tmp_path, monkeypatch, capsys):
    shutil.copytree(made / "plain", tmp_path / "plain")
    MasterKey.from_bytes(KEY).to_file(tmp_path / "my.key")
    monkeypatch.chdir(tmp_path)

    def run(text):
        code = cli.main(text.split())
        return code, *capsys.readouterr()

    return run


def test_the_command_takes_directories(command, tmp_path):
    assert command("lock plain locked --key my.key --exclude empty.txt") == (
        0,
        "locked: 8 tensors locked and sealed, 31,808 bytes\n",
        "",
    )
    assert command("verify locked --key my.key")[:2] == (0, "locked: as it was locked, 8 tensors, 31,808 bytes\n")
    code, out, _ = command("inspect locked")
    assert (code, out.splitlines()[0]) == (0, "locked: safetensors, 8 tensors in 2 shards, 31,808 bytes, locked")
    assert command(f"inspect plain/{INDEX}")[1].startswith(f"plain/{INDEX}: safetensors, 8 tensors in 2 shards, 31,808 bytes, not")
    assert command(f"unlock locked/{INDEX} back --key my.key")[0] == 0
    assert snapshot(tmp_path / "back") | {"empty.txt": b""} == snapshot(tmp_path / "plain")
    flip(tmp_path / "locked", SECOND, -1)
    code, out, err = command("verify locked --key my.key")
    assert (code, out) == (4, "")
    assert err.startswith(f"deeplock: error: locked/{SECOND}: tensors['layer.1.bias']")


def test_the_command_keeps_keys_out_and_warns_of_a_new_beginning(command, tmp_path, monkeypatch):
    code, _, err = command(f"lock plain/{FIRST} x --key my.key --workers 2")
    assert (code, err) == (1, f"deeplock: error: --workers: plain/{FIRST} is no directory; accepted for a directory of shards\n")
    code, _, err = command(f"lock plain/{FIRST} x --key my.key --exclude a")
    assert (code, err[:27]) == (1, "deeplock: error: --exclude:")
    with monkeypatch.context() as patched:
        failing(patched, files.os, "replace", 6, KeyboardInterrupt())
        assert command("lock plain locked --key my.key")[0] == 130
    flip(tmp_path / "plain", FIRST, -1)
    code, _, err = command("lock plain locked --key my.key")
    assert code == 0
    assert err.startswith("deeplock: warning: locked: the run that was interrupted")
