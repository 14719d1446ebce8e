"""Checkpoints in object stores: the same bytes as in directories, and never half an object."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile
from shards import GROUP, INDEX, KEY, OTHER_KEY, WINDOW, make_checkpoint, shard_name, snapshot

from deeplock_kernels.checkpoints import stores, streaming, tasks
from deeplock_kernels.checkpoints.directory import RUN_FILE
from deeplock_kernels.checkpoints.sharded import (
    lock_checkpoint,
    rekey_checkpoint,
    unlock_checkpoint,
    verify_checkpoint,
)
from deeplock_kernels.checkpoints.stores import Directory, ObjectStore, check_apart, store_at
from deeplock_kernels.errors import (
    ContainerError,
    FileAccessError,
    MissingLibraryError,
    ParameterError,
    ResumeWarning,
    SameFileError,
    TamperedError,
)

FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", WINDOW)
    monkeypatch.setattr(tasks, "GROUP", GROUP)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "plain"
    make_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def s3():
    """A local object store that speaks S3, with an empty bucket."""
    from moto.server import ThreadedMotoServer

    variables = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in variables.items():
            patched.setenv(name, value)
        patched.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket/models"
    server.stop()


@pytest.fixture
def memory():
    yield "memory://models"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["memory", "s3"])
def url(request):
    return f"{request.getfixturevalue(request.param)}/{os.urandom(4).hex()}"


def objects(url):
    store = ObjectStore(url)
    found = {}
    for name in store.names():
        with store.open(name) as reader:
            found[name] = reader.file.read()
    return found


def test_from_a_directory_to_a_store_and_back(plain, tmp_path, url):
    done = []
    with ThreadPoolExecutor(2) as executor:
        header = lock_checkpoint(plain, f"{url}/locked", KEY, executor=executor, progress=done.append)
    assert sum(done) == 31_808
    locked = objects(f"{url}/locked")
    assert locked.keys() == snapshot(plain).keys()
    assert verify_checkpoint(f"{url}/locked", KEY) == header
    rekey_checkpoint(f"{url}/locked", f"{url}/rekeyed", KEY, OTHER_KEY)
    unlock_checkpoint(f"{url}/rekeyed", f"{url}/back", OTHER_KEY)
    assert objects(f"{url}/back") == snapshot(plain)
    unlock_checkpoint(f"{url}/locked", tmp_path / "back", KEY)
    assert snapshot(tmp_path / "back") == snapshot(plain)
    for name, data in locked.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(data)
    verify_checkpoint(tmp_path / "local", KEY)
    with fsspec.open(f"{url}/locked/{SECOND}", "wb") as file:
        file.write(locked[SECOND][:-1] + bytes([locked[SECOND][-1] ^ 1]))
    with pytest.raises(TamperedError, match=f"{SECOND}: "):
        unlock_checkpoint(f"{url}/locked", f"{url}/never", KEY)
    assert SECOND not in objects(f"{url}/never")


def test_a_run_that_fails_leaves_no_half_object_and_is_continued(plain, url, monkeypatch):
    original, calls = tasks.copy_others, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 7:  # in the middle of the second shard
            raise OSError(5, "broken")
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(tasks, "copy_others", fail)
        with pytest.raises(OSError, match="broken"):
            lock_checkpoint(plain, url, KEY)
    left = objects(url)
    assert {FIRST, RUN_FILE} <= left.keys()
    assert not {SECOND, INDEX} & left.keys()
    lock_checkpoint(plain, url, KEY)
    assert objects(url)[FIRST] == left[FIRST]
    verify_checkpoint(url, KEY)
    assert RUN_FILE not in objects(url)


def test_a_source_in_a_store_that_changes(plain, tmp_path, url, monkeypatch):
    for name, data in snapshot(plain).items():
        with fsspec.open(f"{url}/{name}", "wb") as file:
            file.write(data)
    original, calls = tasks.ranges_of, []

    def change(*arguments):
        if not calls:
            with fsspec.open(f"{url}/{FIRST}", "wb") as file:
                file.write((plain / FIRST).read_bytes()[:-1] + b"\1")
        calls.append(arguments)
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(tasks, "ranges_of", change)
        with pytest.raises(ContainerError, match="it changed while it was read"):
            lock_checkpoint(url, tmp_path / "locked", KEY)
    assert FIRST not in snapshot(tmp_path / "locked")
    with pytest.warns(ResumeWarning):
        lock_checkpoint(url, tmp_path / "locked", KEY)
    verify_checkpoint(tmp_path / "locked", KEY)


def test_places(tmp_path, monkeypatch):
    assert store_at(tmp_path, "src_dir") == Directory(str(tmp_path)) == store_at(f"file://{tmp_path}", "src_dir")
    assert store_at("s3://bucket/x/", "src_dir") == ObjectStore("s3://bucket/x")
    assert ObjectStore("memory://nothing").names() == []
    for one, other in (("s3://a/b", "s3://a/b/"), ("s3://a", "s3://a/b"), (tmp_path, tmp_path / "x" / ".." / "y")):
        for places in ((one, other), (other, one)):
            with pytest.raises(SameFileError):
                check_apart(*(store_at(place, "x") for place in places))
    check_apart(store_at("s3://a/b", "x"), store_at("s3://a/bc", "x"))
    check_apart(store_at("s3://a/b", "x"), store_at(tmp_path, "x"))
    with pytest.raises(ParameterError, match="fsspec knows no such URL"):
        store_at("nothing://x", "src_dir").names()
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingLibraryError, match=r"deeplock-kernels\[distributed\]"):
        store_at("s3://bucket/x", "src_dir").names()


def test_names_that_lead_out_of_a_directory(memory):
    system = fsspec.filesystem("memory")
    system.store["/models/x/../../escaped"] = MemoryFile(system, "/models/x/../../escaped", b"")
    with pytest.raises(ContainerError, match="accepted are those within its directory"):
        ObjectStore("memory://models").names()


def test_errors_of_a_store_are_those_of_files(s3):
    with pytest.raises(FileAccessError, match=r"s3://nobucket/x"), ObjectStore("s3://nobucket/x").open("y"):
        pass
    ObjectStore(s3).remove("nothing")
    assert ObjectStore(f"{s3}/nothing").names() == []


def fail_in_the_middle(store, data):
    def put():
        with store.put("b") as output:
            output.write(data)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        put()


def test_an_object_of_many_parts(s3, monkeypatch):
    """It is sent in parts of 5 MiB, the least that S3 takes."""
    monkeypatch.setitem(fsspec.config.conf, "s3", fsspec.config.conf["s3"] | {"default_block_size": 5 << 20})
    store, system = ObjectStore(f"{s3}/parts"), fsspec.filesystem("s3")
    fail_in_the_middle(store, bytes(6 << 20))
    assert store.names() == []
    assert system.list_multipart_uploads("bucket") == []
    with store.put("a") as output:
        for _ in range(3):
            output.write(bytes(4 << 20))
    with store.open("a") as reader:
        assert reader.size == 12 << 20


def test_a_program_without_urls_imports_no_fsspec():
    program = "import sys, deeplock_kernels.checkpoints.sharded; assert 'fsspec' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_copy_of_a_file_is_whole_or_not_there(tmp_path, memory, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * 100)
    monkeypatch.setattr(stores, "_COPIED", 10)
    stores.copy_file(Directory(str(tmp_path)), ObjectStore(memory), "a")
    assert objects(memory) == {"a": b"x" * 100}
    fail_in_the_middle(ObjectStore(memory), b"half")
    assert objects(memory).keys() == {"a"}
