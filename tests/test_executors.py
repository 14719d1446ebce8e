"""The work on a checkpoint, done by threads, processes and a Dask cluster, of which one dies."""

from __future__ import annotations

import json
import pickle
import threading
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import safetensors.numpy
from leaks import Leaks
from shards import GROUP, INDEX, KEY, OTHER_KEY, WINDOW, Dying, make_checkpoint, shard_name, snapshot

from deeplock_kernels import cli
from deeplock_kernels.checkpoints import driving, streaming, tasks
from deeplock_kernels.checkpoints.directory import RUN_FILE
from deeplock_kernels.checkpoints.sharded import (
    lock_checkpoint,
    rekey_checkpoint,
    unlock_checkpoint,
    verify_checkpoint,
)
from deeplock_kernels.errors import FileAccessError
from deeplock_kernels.keys import Derivation, MasterKey

SHARDS = 3


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", WINDOW)
    monkeypatch.setattr(tasks, "GROUP", GROUP)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "plain"
    make_checkpoint(path, SHARDS)
    return path


class Recording:
    """An executor that does all at once, and keeps the tasks as they would travel."""

    def __init__(self):
        self.sent = []

    def submit(self, function, *arguments):
        self.sent.append(pickle.dumps((function, arguments)))
        done = Future()
        done.set_result(function(*pickle.loads(self.sent[-1])[1]))
        return done


def all_of_it(plain, path, executor):
    """Lock, verify, rekey and unlock, by an executor."""
    total = json.loads((plain / INDEX).read_text())["metadata"]["total_size"]
    done = []
    options = {"executor": executor, "progress": done.append}
    header = lock_checkpoint(plain, path / "locked", KEY, **options)
    assert sum(done) == total
    assert verify_checkpoint(path / "locked", KEY, **options) == header
    rekey_checkpoint(path / "locked", path / "rekeyed", KEY, OTHER_KEY, **options)
    unlock_checkpoint(path / "rekeyed", path / "back", OTHER_KEY, **options)
    assert sum(done) == 4 * total
    assert snapshot(path / "back") == snapshot(plain)
    return header


def test_tasks_carry_the_keys_of_their_tensors_and_no_other(plain, tmp_path):
    executor = Recording()
    header = all_of_it(plain, tmp_path, executor)
    new = verify_checkpoint(tmp_path / "rekeyed", OTHER_KEY)
    assert len(executor.sent) > 4 * SHARDS
    whole = {"master key": KEY, "new master key": OTHER_KEY}
    derived = {}
    for key, found in ((KEY, header), (OTHER_KEY, new)):
        derivation = Derivation(key, found.salt)
        whole |= {
            f"pseudorandom key {len(key)}": derivation._pseudorandom_key,
            f"header key {len(key)}": bytes(derivation._expand(b"deeplock/v1/header", 32)),
        }
        for name in found.tensors:
            derived[f"{name}, key, {len(key)}"] = bytes(derivation.tensor_key_iv("counter", "aes", name))
            derived[f"{name}, seal, {len(key)}"] = bytes(derivation.seal_key(name))
    never, sometimes, met = Leaks(whole), Leaks(derived), set()
    for sent in executor.sent:
        assert never(sent) == []
        _, (task,) = pickle.loads(sent)
        names = {tensor.name for tensor in task.tensors}
        held = {found.rsplit(", ", 2)[0] for found in sometimes(sent)}
        assert held == names
        if task.kind == "seal":
            assert {found.split(", ")[1] for found in sometimes(sent)} <= {"seal"}
        met |= held
        for text in (repr(task), str(task), repr(task.keys), repr(vars(task.keys) if hasattr(task.keys, "__dict__") else "")):
            assert sometimes(text) == never(text) == []
    assert met == set(header.tensors)


def test_a_task_done_twice_leaves_the_same_bytes(plain, tmp_path):
    """The second time beside others, as when a worker was only thought to be dead."""

    class Twice:
        def __init__(self):
            self.executor = ThreadPoolExecutor(3)

        def submit(self, function, task):
            self.executor.submit(function, task)
            return self.executor.submit(function, task)

    executor = Twice()
    with executor.executor:
        lock_checkpoint(plain, tmp_path / "locked", KEY, executor=executor)
    verify_checkpoint(tmp_path / "locked", KEY)


def test_threads(plain, tmp_path):
    with ThreadPoolExecutor(3) as executor:
        all_of_it(plain, tmp_path, executor)


def test_a_task_that_fails_ends_the_run_and_the_next_one_continues_it(plain, tmp_path, monkeypatch):
    original, threads, ended, later = tasks.run, set(), threading.Event(), []

    def run(task):
        threads.add(threading.get_ident())
        if ended.is_set() or later:
            later.append(task)
        if task.name == shard_name(1, SHARDS):
            later.append(task)
            raise OSError(5, "broken")
        assert not later or ended.wait(20)
        return original(task)

    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as executor:
        patched.setattr(tasks, "run", run)
        with pytest.raises(OSError, match="broken"):
            lock_checkpoint(plain, tmp_path / "locked", KEY, executor=executor)
        ended.set()
    assert threading.get_ident() not in threads
    assert {task.name for task in later[:-1]} <= {shard_name(1, SHARDS)}  # the others were not begun any more
    left = snapshot(tmp_path / "locked")
    assert {shard_name(0, SHARDS), RUN_FILE} <= left.keys()
    assert not {shard_name(1, SHARDS), INDEX} & left.keys()
    assert not any(name.endswith(".tmp") for name in left)
    with ThreadPoolExecutor(2) as executor:
        lock_checkpoint(plain, tmp_path / "locked", KEY, executor=executor)
    assert snapshot(tmp_path / "locked")[shard_name(0, SHARDS)] == left[shard_name(0, SHARDS)]
    verify_checkpoint(tmp_path / "locked", KEY)


def test_a_worker_does_not_make_the_file_that_nobody_waits_for(plain, tmp_path):
    executor = Recording()
    lock_checkpoint(plain, tmp_path / "locked", KEY, executor=executor)
    before = snapshot(tmp_path)
    for sent in executor.sent:
        function, arguments = pickle.loads(sent)
        with pytest.raises(FileAccessError, match="no such file"):
            function(*arguments)
    assert snapshot(tmp_path) == before


def test_processes_of_which_one_dies(plain, tmp_path):
    context = get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=context) as executor,
        pytest.raises(BrokenExecutor),
    ):
        lock_checkpoint(plain, tmp_path / "locked", KEY, executor=Dying(executor, tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert INDEX not in snapshot(tmp_path / "locked")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        lock_checkpoint(plain, tmp_path / "locked", KEY, executor=executor)
        all_of_it(plain, tmp_path / "all", executor)
    unlock_checkpoint(tmp_path / "locked", tmp_path / "back", KEY)
    assert snapshot(tmp_path / "back") == snapshot(plain)


def test_a_dask_cluster_of_which_a_worker_dies(plain, tmp_path):
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        client.get_executor() as executor,
    ):
        header = lock_checkpoint(plain, tmp_path / "locked", KEY, executor=Dying(executor, tmp_path / "died"))
        assert (tmp_path / "died").exists()
        assert verify_checkpoint(tmp_path / "locked", KEY, executor=executor) == header
        unlock_checkpoint(tmp_path / "locked", tmp_path / "back", KEY, executor=executor)
    assert snapshot(tmp_path / "back") == snapshot(plain)
    verify_checkpoint(tmp_path / "locked", KEY)


def test_more_shards_than_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(driving, "_OPEN", 2)
    monkeypatch.setattr(driving, "_AHEAD", 3)
    places = {}
    (tmp_path / "plain").mkdir()
    for number in range(7):
        tensors = {f"t{number}": np.full(number * 3000, number, np.uint8)} if number != 3 else {}
        safetensors.numpy.save_file(tensors, tmp_path / "plain" / shard_name(number, 7))
        places |= dict.fromkeys(tensors, shard_name(number, 7))
    (tmp_path / "plain" / shard_name(3, 7)).unlink()
    (tmp_path / "plain" / INDEX).write_text(json.dumps({"weight_map": places}))
    with ThreadPoolExecutor(2) as executor:
        lock_checkpoint(tmp_path / "plain", tmp_path / "locked", KEY, executor=executor)
    unlock_checkpoint(tmp_path / "locked", tmp_path / "back", KEY)
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "plain")


def test_the_command_with_processes(plain, tmp_path, monkeypatch, capsys):
    MasterKey.from_bytes(KEY).to_file(tmp_path / "my.key")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["lock", str(plain), "locked", "--key", "my.key", "--workers", "2"]) == 0
    assert capsys.readouterr().err == ""
    verify_checkpoint(tmp_path / "locked", KEY)
