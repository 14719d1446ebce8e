"""The package's own threads: they run lists of kernel calls, and the caller always helps.

A list of calls is finished, or on any exception (Ctrl-C too) undone: nobody can free a buffer under a running kernel,
and nobody sees half a result. The pool is safe for many callers at once, for calls from a fork's child, and at
interpreter exit; where no thread can be started, the caller does the work alone.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from itertools import starmap
from queue import SimpleQueue
from typing import Any, NamedTuple

from deeplock_kernels.errors import ParameterError


class Call(NamedTuple):
    """A kernel and its arguments, and what has to run before it (or None)."""

    function: Callable[..., None]
    arguments: tuple[int, ...]
    before: Callable[[], None] | None = None


class _Job:
    """A list of calls that several threads take from."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.waiting = deque(calls)
        self.finished: list[tuple[Call, None]] = []
        self.error: BaseException | None = None
        self._helpers = 0
        self._closed = False
        self._state = threading.Condition()

    def work(self) -> None:
        """Run calls until none is left or one fails."""
        while self.error is None:
            try:
                call = self.waiting.popleft()
            except IndexError:
                return
            try:
                if call.before is not None:
                    call.before()
                # One step for the interpreter, so that no Ctrl-C comes between the kernel and the note that it ran.
                self.finished.extend(zip((call,), starmap(call.function, (call.arguments,)), strict=False))
            except BaseException as error:
                self.error = self.error or error
                return

    def help(self) -> None:
        """Work as a thread of the pool, unless the job is closed already."""
        with self._state:
            if self._closed:
                return
            self._helpers += 1
        try:
            self.work()
        finally:
            with self._state:
                self._helpers -= 1
                self._state.notify_all()

    def close(self) -> None:
        """Let no helper in any more and wait for those inside."""
        with self._state:
            self._closed = True
            while self._helpers:
                self._state.wait()


_queue: SimpleQueue[_Job | None] = SimpleQueue()
_workers: list[threading.Thread] = []
_lock = threading.Lock()
_chosen: int | None = None


def _worker(queue: SimpleQueue[_Job | None]) -> None:
    while (job := queue.get()) is not None:
        job.help()
        del job


def _summon(count: int, job: _Job) -> None:
    """Ask `count` threads of the pool to help with a job."""
    with _lock:
        while len(_workers) < count:
            thread = threading.Thread(target=_worker, args=(_queue,), name="deeplock", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # at interpreter exit, or where no thread is left to be had
                break
            _workers.append(thread)
        for _ in range(min(count, len(_workers))):
            _queue.put(job)


def run(calls: Sequence[Call], threads: int, undo: Callable[[Call], Call] | None = None) -> None:
    """Run all calls on up to `threads` threads, the caller's included.

    Parameters
    ----------
    calls
        What to run, in any order and side by side.
    threads
        How many threads at most, at least 1.
    undo
        Gives the call that takes back a finished one; without it a failure leaves finished calls as they are.

    Raises
    ------
    BaseException
        The first exception of a `before`, or a KeyboardInterrupt, after all calls have stopped and been undone.
    """
    job = _Job(calls)
    try:
        if threads > 1 and len(calls) > 1:
            _summon(min(threads, len(calls)) - 1, job)
        job.work()
    except BaseException as error:
        job.error = job.error or error
    while True:
        try:
            job.close()
            break
        except BaseException as error:
            job.error = job.error or error
    if job.error is None:
        return
    while undo is not None and job.finished:
        try:
            call = undo(job.finished[-1][0])
            job.finished[-1:] = filter(
                None, starmap(call.function, (call.arguments,))
            )  # one step again: drops the last
        except KeyboardInterrupt:
            continue
    raise job.error


def available_threads() -> int:
    """Count the processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ParameterError(
            f"{name}: got {value!r}, accepted is a whole number of at least 1 (or None for all)"
        )
    return value


def set_num_threads(threads: int | None) -> None:
    """Set how many threads a call uses that does not say; None goes back to DEEPLOCK_NUM_THREADS or all processors.

    Raises
    ------
    ParameterError
        `threads` is not a whole number of at least 1.
    """
    global _chosen
    _chosen = None if threads is None else _count("threads", threads)


def get_num_threads() -> int:
    """Give the number of threads that a call uses that does not say.

    Raises
    ------
    ParameterError
        The environment variable DEEPLOCK_NUM_THREADS is set to something else than a whole number of at least 1.
    """
    if _chosen is not None:
        return _chosen
    variable = os.environ.get("DEEPLOCK_NUM_THREADS")
    if variable:
        return _count("DEEPLOCK_NUM_THREADS", int(variable) if variable.isdecimal() else variable)
    return available_threads()


def resolve_threads(threads: int | None) -> int:
    """Check a `threads` argument; None means the default."""
    return get_num_threads() if threads is None else _count("threads", threads)


# What a child must not inherit held by a thread that it has not got: each of these is taken, in order, for a fork.
_order: list[Any] = []
_others: weakref.WeakSet[Any] = weakref.WeakSet()


def hold_through_fork(lock: Any, *, forever: bool = False) -> None:
    """Take a lock around every fork of the process, as long as the lock lives.

    Parameters
    ----------
    lock
        Has `acquire` and `release`.
    forever
        For a lock of a module: those are taken first, in the order of registration.
    """
    if forever:
        _order.append(lock)
    else:
        _others.add(lock)


_held: list[Any] = []


def _before_fork() -> None:
    # Python warns of a fork beside live threads: end the pool's, the next call starts new ones.
    _lock.acquire()
    for _ in _workers:
        _queue.put(None)
    for thread in _workers:
        thread.join()
    _workers.clear()
    for lock in (*_order, *_others):
        lock.acquire()
        _held.append(lock)


def _after_fork() -> None:
    while _held:
        _held.pop().release()
    _lock.release()


def _after_fork_in_child() -> None:
    global _queue
    _queue = SimpleQueue()
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
