"""Runs the steps of many shards, each of which is a batch of tasks: here, or on an executor that is kept supplied."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

from deeplock_kernels.checkpoints import tasks
from deeplock_kernels.checkpoints.streaming import Progress
from deeplock_kernels.checkpoints.tasks import Outcome, Task
from deeplock_kernels.errors import (
    ParameterError,
)
from deeplock_kernels.runtime.pool import resolve_threads

_AHEAD = 256  # tasks that an executor is given before the first of them is done
_OPEN = 64  # shards that are worked on at once


class Batch(NamedTuple):
    """Tasks that may run in any order, and whether what they do is progress."""

    tasks: list[Task]
    counted: bool


Steps = Generator[Batch, list[Outcome], None]


class Runner:
    """Runs the steps of many shards, here or on an executor."""

    def __init__(self, executor: Executor | None, threads: int | None, progress: Progress) -> None:
        if executor is not None and not callable(getattr(executor, "submit", None)):
            raise ParameterError(
                f"executor: got {type(executor).__name__}, accepted is one of concurrent.futures, or alike, or None"
            )
        self.threads = resolve_threads(1 if executor is not None and threads is None else threads)
        self._executor, self.progress = executor, progress

    def drive(self, shards: Iterable[Steps]) -> None:
        """Go through the steps of all shards; the first error ends all of them."""
        if self._executor is None:
            for steps in shards:
                self._drive_here(steps)
        else:
            _Drive(self._executor, self.progress).run(iter(shards))

    def _drive_here(self, steps: Steps) -> None:
        outcomes: list[Outcome] | None = None
        try:
            while True:
                batch = next(steps) if outcomes is None else steps.send(outcomes)
                outcomes = [tasks.run(task, self.progress if batch.counted else None) for task in batch.tasks]
        except StopIteration:
            pass
        finally:
            steps.close()


class _Open:
    """A shard that is being worked on: its steps, and the tasks of the present one."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.batch = Batch([], counted=False)
        self.futures: list[Future[Outcome] | None] = []
        self.outcomes: dict[int, Outcome] = {}
        self.left = 0


class _Drive:
    """Keeps an executor supplied with the tasks of many shards."""

    def __init__(self, executor: Executor, progress: Progress) -> None:
        self._executor, self._progress = executor, progress
        self._done: SimpleQueue[tuple[_Open, int]] = SimpleQueue()
        self._open: set[_Open] = set()

    def run(self, shards: Iterator[Steps]) -> None:
        try:
            more = True
            while more or self._open:
                while more and len(self._open) < _OPEN and sum(one.left for one in self._open) < _AHEAD:
                    steps = next(shards, None)
                    more = steps is not None
                    if steps is not None:
                        self._open.add(shard := _Open(steps))
                        self._advance(shard, None)
                if self._open:
                    self._finished(*self._done.get())
        finally:
            for shard in self._open:
                for future in filter(None, shard.futures):
                    future.cancel()
            for shard in self._open:
                shard.steps.close()

    def _finished(self, shard: _Open, number: int) -> None:
        future, shard.futures[number] = shard.futures[number], None  # or Dask would do it again if its worker dies now
        assert future is not None
        shard.outcomes[number] = future.result()
        shard.left -= 1
        if shard.batch.counted and self._progress is not None:
            self._progress(shard.batch.tasks[number].nbytes)
        if shard.left == 0:
            self._advance(shard, [outcome for _, outcome in sorted(shard.outcomes.items())])

    def _advance(self, shard: _Open, outcomes: list[Outcome] | None) -> None:
        """Go on to the next step that has tasks."""
        while True:
            try:
                shard.batch = next(shard.steps) if outcomes is None else shard.steps.send(outcomes)
            except StopIteration:
                self._open.remove(shard)
                return
            shard.left, shard.futures, shard.outcomes = len(shard.batch.tasks), [], {}
            for number, task in enumerate(shard.batch.tasks):
                future = self._executor.submit(tasks.run, task)
                shard.futures.append(future)
                future.add_done_callback(partial(self._note, shard, number))
            if shard.batch.tasks:
                return
            outcomes = []

    def _note(self, shard: _Open, number: int, _future: object) -> None:
        self._done.put((shard, number))
