"""The package's own threads: they run lists of kernel calls to the end, or take back what they have done.

An exception can come into Python's main thread between any two steps (Ctrl-C is one). So a list that is called from
there is led by a thread of the pool, where none can, and the main thread only waits: nobody frees a buffer under a
running kernel, and nobody sees half a result. Other threads lead their own lists. The pool is safe for many callers at
once, for pieces that run pieces, in a fork's child, and at interpreter exit; where no thread is to be had the caller
works alone.
"""

from __future__ import annotations

import logging  # noqa: F401 - so that its fork hook, registered before ours, takes its lock after ours
import operator
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import starmap
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np

from deeplock_kernels.errors import ParameterError, shown

_Result = TypeVar("_Result")


class Call(NamedTuple):
    """A kernel and its arguments, and what has to run before it (or None)."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    before: Callable[[], None] | None = None


Undo = Callable[[Call], Call]


class _Job:
    """A list of calls that several threads take from, one of which leads.

    Where two threads may race for a decision, each appends to a list and the first entry counts: that is one step, and
    saying it again does no harm.
    """

    def __init__(self, calls: Sequence[Call], helpers: int, undo: Undo | None) -> None:
        self.error: BaseException | None = None
        self.complete = self.reverted = False
        self.leads: list[object] = []
        self.verdicts: list[bool] = []  # whether all was done; after a False everything is taken back
        self.events: SimpleQueue[None] = SimpleQueue()
        self._reverts: list[object] = []
        self._waiting = deque(calls)
        self._done: list[tuple[Call, None]] = []
        self._helpers, self._undo = helpers, undo
        self._inside = 0
        self._closed = False
        self._state = threading.Condition()

    def lead(self) -> None:
        """Run the list with the pool's help, and undo it if it fails."""
        if not _is_first(self.leads):
            return
        try:
            _summon(self, self._helpers)
            self._work()
            holding(self._state, self._close)
        except BaseException as error:
            self.error = self.error or error
        self.verdicts.append(self.error is None)
        if not self.verdicts[0]:
            self.revert()
        self.complete = True
        self.events.put(None)

    def _close(self) -> None:
        self._closed = True
        while self._inside:
            self._state.wait()

    def revert(self) -> None:
        """Undo what was done."""
        if not _is_first(self._reverts):
            return
        try:
            self._take_back()
        except BaseException as error:  # the caller has to know of this one
            self.error = error
        self.reverted = True
        self.events.put(None)

    def _take_back(self) -> None:
        while self._undo is not None and self._done:
            back = self._undo(self._done[-1][0])
            self._done[-1:] = filter(None, starmap(back.function, (back.arguments,)))  # one step again: drops the last

    def settle(self, error: BaseException, *, led_here: bool) -> None:
        """Stop the list for an exception that came into the main thread, and see to it that it is undone."""
        self.error = self.error or error
        if led_here:
            self._closed = True
            while self._inside:
                self.pause()
            self._take_back()
            return
        self.verdicts.append(False)
        self.leads.append(None)
        if self.leads[0] is None:
            return  # it was never begun, and now never will be
        while not self.complete:
            self.pause()
        while self.verdicts[0] and not self.reverted:  # it was over before anybody noticed
            if not _send(self.revert):
                self.revert()
            self.pause()

    def pause(self) -> None:
        """Wait for the next event, or a moment."""
        with suppress(Empty):
            self.events.get(timeout=0.1)

    def help(self) -> None:
        """Work beside the leader, unless it has closed the list already."""
        with self._state:
            if self._closed:
                return
            self._inside += 1
        try:
            self._work()
        finally:
            with self._state:
                self._inside -= 1
                self._state.notify_all()

    def _work(self) -> None:
        while self.error is None:
            try:
                call = self._waiting.popleft()
            except IndexError:
                return
            try:
                if call.before is not None:
                    call.before()
                # One step for the interpreter: a kernel that ran is always noted.
                self._done.extend(zip((call,), starmap(call.function, (call.arguments,)), strict=False))
            except BaseException as error:
                self.error = self.error or error
                return


def holding(lock: Any, work: Callable[[], _Result]) -> _Result:
    """Work while holding a lock, which is let go of whatever exception comes, and whenever it comes.

    A `with` statement does not promise that: from Python 3.14 on, Ctrl-C can come when the lock is taken and the
    block is not entered yet.
    """
    held: list[bool] = []
    try:
        held.extend(starmap(lock.acquire, ((),)))  # one step for the interpreter
        return work()
    finally:
        if held:
            lock.release()


def _is_first(entries: list[object]) -> bool:
    entry = object()
    entries.append(entry)
    return entries[0] is entry


class _Threads:
    """Threads that take from one queue. A None ends them all, also one that nobody knows of."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.known: list[threading.Thread] = []
        self._refused = -1.0  # when the system last refused one

    def grow(self, count: int) -> None:
        """Have at least `count` threads, as far as they are to be had."""
        while len(self.known) < count and time.monotonic() > self._refused + 1:
            thread = threading.Thread(target=_serve, args=(self.queue,), name="deeplock", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # at interpreter exit, or where no more threads are allowed
                self._refused = time.monotonic()
                return
            self.known.append(thread)

    def end(self) -> None:
        """End all threads and wait until the system has forgotten them."""
        self.queue.put(None)
        for thread in self.known:
            thread.join()
        for thread in self.known:
            task = f"/proc/self/task/{thread.native_id}"
            limit = time.monotonic() + 0.1
            while os.path.exists(task) and time.monotonic() < limit:
                time.sleep(0)


def _serve(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (work := queue.get()) is not None:
        work()
        del work
    queue.put(None)


_ATTEMPTS = 1000
_lock = threading.Lock()
_helpers, _leader = _Threads(), _Threads()
_forking = False
_chosen: int | None = None


def _summon(job: _Job, count: int) -> None:
    """Ask `count` threads of the pool to help with a job."""

    def ask() -> None:
        if not _forking and not sys.is_finalizing():
            _helpers.grow(count)
            for _ in _helpers.known[:count]:
                _helpers.queue.put(job.help)

    if count:
        holding(_lock, ask)


def _send(work: Callable[[], None]) -> bool:
    """Give work to the thread that does it for the main thread, if there is one."""

    def give() -> bool:
        if _forking or sys.is_finalizing():
            return False
        _leader.grow(1)
        if _leader.known:
            _leader.queue.put(work)
        return bool(_leader.known)

    return holding(_lock, give)


def run(calls: Sequence[Call], threads: int, undo: Undo | None = None) -> None:
    """Run all calls on up to `threads` threads.

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
        The first exception of a `before`, or one that came into the waiting main thread, when all calls have stopped
        and been undone.
    """
    if len(calls) == 1 and calls[0].before is None:
        run_one(calls[0].function, calls[0].arguments, undo)
        return
    job = _Job(calls, min(threads, len(calls)) - 1, undo)
    if threading.current_thread() is threading.main_thread():
        _lead_elsewhere(job)
    else:
        job.lead()
    if job.error is not None:
        raise job.error


def run_one(function: Callable[..., None], arguments: tuple[Any, ...], undo: Undo | None) -> None:
    """Run one call here; an exception that comes before this returns takes it back."""
    done: list[None] = []
    try:
        # One step for the interpreter, so that nothing comes between the kernel and the note that it ran.
        done.extend(starmap(function, (arguments,)))
    except BaseException:
        back: list[None] = []
        attempts = 0  # more exceptions may come meanwhile
        while done and not back and undo is not None and attempts < _ATTEMPTS:
            attempts += 1
            try:
                reverse = undo(Call(function, arguments))
                back.extend(starmap(reverse.function, (reverse.arguments,)))
            except BaseException:  # the first one is raised below
                pass
        raise


def take_back(calls: Sequence[Call], undo: Undo) -> None:
    """Undo calls that are all done, here and to the end: exceptions that come meanwhile change nothing."""
    done, attempts = list(calls), 0
    while done and attempts < _ATTEMPTS:
        try:
            try:
                attempts += 1
                while done:
                    back = undo(done[-1])
                    done[-1:] = filter(None, starmap(back.function, (back.arguments,)))  # one step: drops the last
            except BaseException:  # its caller has one to raise already
                pass
        except BaseException:
            pass


def _lead_elsewhere(job: _Job) -> None:
    led_here = False
    try:
        led_here = not _send(job.lead)
        if led_here:
            job.lead()
            if job.error is not None:
                raise job.error  # its undoing may have been cut off as well
        while not job.complete:
            job.events.get()
    except BaseException as error:
        # More exceptions may come meanwhile, between any two calls and at the end of each round, and change nothing.
        while True:
            try:
                while True:
                    try:
                        job.settle(error, led_here=led_here)
                        return
                    except BaseException:
                        pass
            except BaseException:
                pass


def available_threads() -> int:
    """Count the processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _count(name: str, value: object) -> int:
    try:
        number = 0 if isinstance(value, (bool, np.bool_)) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1:
        raise ParameterError(f"{name}: got {shown(value)}, accepted is a whole number of at least 1 (or None for all)")
    return number


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
        whole = variable.isascii() and variable.isdecimal() and len(variable) < 10
        return _count("DEEPLOCK_NUM_THREADS", int(variable) if whole else variable)
    return available_threads()


def resolve_threads(threads: int | None) -> int:
    """Check a `threads` argument; None means the default."""
    return get_num_threads() if threads is None else _count("threads", threads)


# What a child must not inherit held by a thread that it has not got, in the order in which threads take them.
_held_through_fork: list[tuple[int, Any]] = []


def hold_through_fork(lock: Any, rank: int) -> None:
    """Take a lock around every fork of the process.

    Parameters
    ----------
    lock
        Has `acquire` and `release`, and lives as long as the process.
    rank
        Whoever holds several takes those of lower rank first.
    """
    _held_through_fork.append((rank, lock))
    _held_through_fork.sort(key=lambda entry: entry[0])


def _before_fork() -> None:
    # Python warns of a fork beside live threads: end the pool's; the next call starts new ones. A list that is being
    # worked on goes on without helpers, and one that the main thread waits for is over, since that one is here.
    global _forking
    with _lock:
        _forking = True
    _helpers.end()
    _leader.end()
    for _, lock in _held_through_fork:
        lock.acquire()
    _lock.acquire()


def _after_fork() -> None:
    global _helpers, _leader, _forking
    _helpers, _leader, _forking = _Threads(), _Threads(), False
    _lock.release()
    for _, lock in reversed(_held_through_fork):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
