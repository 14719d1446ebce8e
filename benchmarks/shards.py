"""What a checkpoint of many shards costs whoever hands out its tasks: how many, how large, and how long each takes.

Run as `python -m benchmarks.shards`; `--dask N` adds the same with N worker processes of a local Dask cluster. The
shards are small and the tasks do nothing, so all that is measured is what stays at one place however many machines do
the rest: reading tables, cutting, deriving keys, pickling, adding up seals, writing headers.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from deeplock_kernels.checkpoints import tasks
from deeplock_kernels.checkpoints.directory import read_checkpoint
from deeplock_kernels.checkpoints.sharded import lock_checkpoint
from deeplock_kernels.checkpoints.tasks import Outcome, Task
from deeplock_kernels.keys import MasterKey

TENSOR_BYTES = 4096
PER_SHARD = 80  # tensors, as of a shard of 5 GB of a large language model
GROUPS = (20, 4)  # tensors that a task takes


class Nothing(Executor):
    """Pickles tasks and does nothing, so that what is left is the work of who hands them out."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def submit(self, function: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        """Take a task for done."""
        self.sizes.append(len(pickle.dumps((function, arguments))))
        done: Future[Any] = Future()
        done.set_result(nothing(*arguments))
        return done


class Cluster(Executor):
    """Sends tasks that do nothing to a cluster."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.sizes = executor, [0]

    def submit(self, _function: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        """Send one."""
        return self.executor.submit(nothing, *arguments)


def nothing(task: Task) -> Outcome:
    """Give what a task gives, without doing it."""
    seals = dict.fromkeys((tensor.name for tensor in task.tensors), 0)
    return Outcome(seals, {})


def make(path: Path, shards: int) -> None:
    """Write a checkpoint of small shards."""
    path.mkdir()
    places = {}
    data = np.zeros(TENSOR_BYTES, np.uint8)
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {f"model.layers.{shard}.experts.{i}.up_proj.weight": data for i in range(PER_SHARD)}
        safetensors.numpy.save_file(tensors, path / name)
        places |= dict.fromkeys(tensors, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@contextmanager
def cluster(workers: int) -> Iterator[Executor]:
    """Start a local cluster."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=":0") as local,
        Client(local) as client,
        client.get_executor() as executor,
    ):
        yield Cluster(executor)


def measure(source: Path, target: Path, executor: Any, per_task: int) -> str:
    """Lock once, and say what it cost."""
    start = time.perf_counter()
    checkpoint = read_checkpoint(source)
    reading = time.perf_counter() - start
    tasks.GROUP = per_task * TENSOR_BYTES
    start = time.perf_counter()
    lock_checkpoint(source, target, MasterKey.generate(), executor=executor)
    seconds = time.perf_counter() - start
    shards = len(checkpoint.shards)
    count = shards * PER_SHARD // per_task
    header = (target / "model.safetensors.index.json").stat().st_size
    return (
        f"{shards:7}{count:8}{per_task:10}{max(executor.sizes):14,}{reading / shards * 1e3:14.2f}"
        f"{(seconds - reading) / count * 1e3:16.2f}{seconds:10.2f}{header / shards / PER_SHARD:14.0f}"
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--dask", type=int, default=0, metavar="N", help="send the tasks to N workers of Dask as well")
    arguments = parser.parse_args()
    titles = ("shards", "tasks", "tensors", "bytes a task", "ms to read", "ms to hand out", "seconds", "index bytes")
    per = ("", "", "a task", "", "a shard", "a task", "", "a tensor")
    for line in (titles, per):
        print("{:>7}{:>8}{:>10}{:>14}{:>14}{:>16}{:>10}{:>14}".format(*line))
    with tempfile.TemporaryDirectory() as place:
        for shards in arguments.shards:
            make(Path(place, str(shards)), shards)
            for per_task in GROUPS:
                target = Path(place, f"{shards} {per_task}")
                print(measure(Path(place, str(shards)), target, Nothing(), per_task), flush=True)
                if arguments.dask:
                    with cluster(arguments.dask) as executor:
                        print(measure(Path(place, str(shards)), Path(f"{target} dask"), executor, per_task), "dask")


if __name__ == "__main__":
    main()
