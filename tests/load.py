"""Load: threads and processes that lock and unlock different models for a while, every result compared, memory steady.

`python -m tests.load --seconds 300` runs eight threads and eight forked processes, and beside them short-lived processes
one after the other: forked while the threads are at work, as a DataLoader's are; spawned; and ended in the middle of
their work. Memory is measured while all threads rest. Exit code 1: a result was wrong, or memory grew. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import itertools
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import safetensors.numpy

import deeplock_kernels as deeplock
from deeplock_kernels import transform

LIMIT = 0.01  # of growth
BOXES = ("aes", "whirlpool")  # one that instructions compute, and a table
BITS = (128, 192, 256)
DTYPES = (np.float32, np.float16, np.int8, np.float64)
NEWCOMERS = ("fork", "fork", "spawn", "fork", "fork", "end")
SAMPLES = 60
MIB = 1 << 20


class Worker:
    """Locks and unlocks a model of its own in every way, and compares all that comes out with what was saved.

    Parameters
    ----------
    number
        Chooses the model's shapes and bytes, the length of its key and its S-Box.
    directory
        Where its files go.
    """

    def __init__(self, number, directory):
        chance = np.random.default_rng(number)
        self._place = Path(tempfile.mkdtemp(dir=directory))
        shapes = [(3, 5, 3, 3), (17 + 8 * number, 129), (257 + number,), (), (0, 4), (40_000 + 1_009 * number,)]
        self._model = {f"layer {i}": _random(shape, DTYPES[(number + i) % 4], chance) for i, shape in enumerate(shapes)}
        self._original = {name: tensor.tobytes() for name, tensor in self._model.items()}
        bits = BITS[number % 3]
        self._secret, self._sbox = chance.bytes(bits // 8), BOXES[number // 3 % 2]
        self._make = {
            "counter": lambda: deeplock.CounterSchedule(self._secret, self._secret[:16]),
            "expansion": lambda: deeplock.ExpansionSchedule(self._secret),
        }
        # Past several saved states of the expansion.
        self._flat = _random((600_000 + 7_001 * number,), np.uint8, chance)
        self._locked = {}
        for name, make in self._make.items():
            with make() as schedule:
                self._locked[name] = deeplock.lock(self._flat, schedule, sbox=self._sbox, threads=1)
        self._buffer = np.empty_like(self._flat)
        safetensors.numpy.save_file(self._model, self._place / "plain", metadata={"number": str(number)})
        self._file = (self._place / "plain").read_bytes()
        self._random = random.Random(number)
        self.operations = 0
        self.mismatches = []

    def turn(self):
        """Do everything once with both schedules; an exception is a mismatch."""
        for schedule in ("counter", "expansion"):
            for work in (self._lock_tensors, self._lock_flat, self._lock_file):
                try:
                    work(schedule, 1 + self._random.randrange(3))
                except Exception:
                    self.mismatches.append(f"{schedule}: {traceback.format_exc()}")

    def _expect(self, what, right):
        self.operations += 1
        if not right:
            self.mismatches.append(what)

    def _expect_original(self, what):
        right = {name: tensor.tobytes() for name, tensor in self._model.items()} == self._original
        self._expect(what, right)
        if not right:  # so that the next turn says something of its own
            for name, tensor in self._model.items():
                tensor[...] = np.frombuffer(self._original[name], tensor.dtype).reshape(tensor.shape)

    def _lock_tensors(self, schedule, threads):
        with deeplock.MasterKey.from_bytes(self._secret) as key, deeplock.MasterKey.generate() as other:
            header = deeplock.lock_tensors(self._model, key, schedule=schedule, sbox=self._sbox, threads=threads)
            header = deeplock.LockHeader.from_json(header.to_json())
            for name, tensor in self._model.items():
                back = deeplock.unlock_tensor(tensor, key, header, name, threads=threads)
                self._expect(f"unlock_tensor, {schedule}, {name}", back.tobytes() == self._original[name])
            deeplock.verify_tensors(self._model, key, header, threads=threads)
            try:
                deeplock.unlock_tensors(self._model, other, header, threads=threads)
                self._expect("a wrong key was taken", False)
            except deeplock.WrongKeyError:
                pass
            deeplock.unlock_tensors(self._model, key, header, threads=threads)
            self._expect_original(f"unlock_tensors, {schedule}")

    def _lock_flat(self, name, threads):
        flat, locked, buffer, box = self._flat, self._locked[name], self._buffer, self._sbox
        with self._make[name]() as schedule:
            buffer[:] = flat
            deeplock.lock(buffer, schedule, sbox=box, out=buffer, threads=threads)
            self._expect(f"lock in place, {name}", np.array_equal(buffer, locked))
            deeplock.unlock(buffer, schedule, sbox=box, out=buffer, threads=threads)
            self._expect(f"unlock in place, {name}", np.array_equal(buffer, flat))
            start = self._random.randrange(flat.size)
            tail = deeplock.unlock(locked[start:], schedule, sbox=box, offset=start, threads=threads)
            self._expect(f"unlock from {start} on, {name}", np.array_equal(tail, flat[start:]))
            with contextlib.suppress(deeplock.DeepLockError):
                deeplock.lock(flat, schedule, out=buffer[:9], threads=threads)
                self._expect("too little memory was taken", False)
        deeplock.substitute(flat, box, out=buffer, threads=threads)
        back = deeplock.substitute(buffer, box, inverse=True, threads=threads)
        self._expect("substitute", np.array_equal(back, flat))

    def _lock_file(self, schedule, threads):
        plain, locked, back = (self._place / name for name in ("plain", "locked", "back"))
        with deeplock.MasterKey.from_bytes(self._secret) as key:
            deeplock.lock_file(plain, locked, key, schedule=schedule, sbox=self._sbox, threads=threads)
            deeplock.verify_file(locked, key, threads=threads)
            deeplock.unlock_file(locked, back, key, threads=threads)
        self._expect(f"lock_file, {schedule}", locked.read_bytes() not in (self._file, b""))
        self._expect(f"unlock_file, {schedule}", back.read_bytes() == self._file)


def _random(shape, dtype, chance):
    count = int(np.prod(shape))
    return np.frombuffer(chance.bytes(count * np.dtype(dtype).itemsize), dtype).reshape(shape).copy()


# Memory

_libc = ctypes.CDLL(None)


class _Mallinfo(ctypes.Structure):
    _NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _NAMES)


def measure():
    """Give what this process holds; all its threads should rest."""
    time.sleep(0.02)  # the pool's threads let go of what they did last after they have said that it is done
    gc.collect()
    found = {}
    if hasattr(_libc, "malloc_trim"):  # glibc: what is free goes back to the system, and what is in use is known exactly
        _libc.malloc_trim(0)
    if hasattr(_libc, "mallinfo2"):
        _libc.mallinfo2.restype = _Mallinfo
        info = _libc.mallinfo2()
        found["heap"] = info.uordblks + info.hblkhd
    rollup = Path("/proc/self/smaps_rollup").read_text()
    found["resident"] = 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Rss:"))
    found["blocks"] = sys.getallocatedblocks()  # of Python's own memory
    found["objects"] = len(gc.get_objects())
    found["files"] = len(os.listdir("/proc/self/fd"))
    return found


def is_due(samples, start, seconds):
    """Say whether to measure again: few times enough for the samples themselves to count for nothing."""
    return time.monotonic() >= start + len(samples) * seconds / SAMPLES


def growth(samples):
    """Give by how much each quantity grows, from the least of each of three parts that follow a sixth for warming up.

    A leak raises the least as well, and what is held for the moment does not. It is twice the smaller one of the growths
    from part to part. So a leak counts in full, and what is allocated once at some time not at all: Python's own
    bookkeeping takes half a MiB when it has new addresses to keep account of.
    """
    warm = samples[len(samples) // 6 :]
    third = max(len(warm) // 3, 1)
    parts = warm[:third], warm[third : len(warm) - third], warm[-third:]
    found = {}
    for name in warm[0]:
        first, second, last = (min(sample[name] for sample in part or warm) for part in parts)
        found[name] = 2 * min(second / first - 1, last / second - 1)
    return found


# Threads and processes


class Team:
    """Threads that work until they are told to stop, and rest when they are asked to."""

    def __init__(self, workers):
        self.workers = workers
        self._end, self._pause = threading.Event(), threading.Event()
        self._barrier = threading.Barrier(len(workers) + 1)
        self._threads = [threading.Thread(target=self._serve, args=(worker,)) for worker in workers]
        for thread in self._threads:
            thread.start()

    def _serve(self, worker):
        while not self._end.is_set():
            worker.turn()
            if self._pause.is_set():
                self._barrier.wait()
                self._barrier.wait()

    def at_rest(self, work):
        """Do some work while all threads rest."""
        self._pause.set()
        self._barrier.wait()
        try:
            return work()
        finally:
            self._pause.clear()
            self._barrier.wait()

    def stop(self):
        self._end.set()
        for thread in self._threads:
            thread.join()


def cut_small():
    """Cut even a small model into pieces for several threads."""
    transform._SMALLEST_JOB, transform._SMALLEST_PIECE, transform._LARGEST_PIECE = 2, 1, 3


def work_long(number, directory, seconds, sender):
    """Work in a process of its own, and say what was found."""
    worker, samples = Worker(number, directory), []
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        worker.turn()
        if is_due(samples, start, seconds):
            samples.append(measure())
    sender.send((worker.operations, worker.mismatches, samples))


def work_once(number, directory, sender):
    """Come, work and go."""
    cut_small()
    worker = Worker(number, directory)
    worker.turn()
    sender.send((worker.operations, worker.mismatches, []))


def end_in_the_middle(number, directory, sender):
    """Let the interpreter end while threads are at work."""
    cut_small()
    workers = [Worker(number + i, directory) for i in range(2)]

    def forever(worker):
        while True:
            worker.turn()

    for worker in workers:
        threading.Thread(target=forever, args=(worker,), daemon=True).start()
    while not all(worker.operations for worker in workers):
        time.sleep(0.001)
    operations = sum(worker.operations for worker in workers)
    sender.send((operations, [text for worker in workers for text in worker.mismatches], []))


class Child:
    """A process, and what it has to say."""

    def __init__(self, method, target, *arguments):
        context = multiprocessing.get_context(method)
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=target, args=(*arguments, sender))
        self._process.start()
        sender.close()

    def result(self):
        """Wait for its end and give its number of operations, its mismatches and its samples."""
        operations, mismatches, samples = 0, [], []
        with self._receiver, contextlib.suppress(EOFError):
            operations, mismatches, samples = self._receiver.recv()
        self._process.join()
        if self._process.exitcode != 0 or not operations:
            mismatches.append(f"a process ended with {self._process.exitcode}")
        self._process.close()
        return operations, mismatches, samples


def newcomer(kind, number, directory):
    """Run one of the short-lived processes to its end."""
    with tempfile.TemporaryDirectory(dir=directory) as own:
        if kind == "end":
            return Child("spawn", end_in_the_middle, number, own).result()
        return Child(kind, work_once, number, own).result()


# The run


class Report:
    """What was found so far."""

    def __init__(self):
        self.operations = 0
        self.mismatches = []
        self.grown = []
        self._start = time.monotonic()

    def add(self, operations, mismatches):
        self.operations += operations
        self.mismatches += mismatches

    def show(self, sample, operations):
        """Print a line of what is held now."""
        seconds = time.monotonic() - self._start
        held = "  ".join(
            f"{name} {held / MIB:.2f} MiB" if name in ("heap", "resident") else f"{name} {held}"
            for name, held in sample.items()
        )
        print(f"{seconds:6.1f} s  {operations} operations  {held}", flush=True)

    def judge(self, who, samples):
        """Print how much a process grew, and note what is too much."""
        found = growth(samples)
        print(f"{who}: {len(samples)} samples, growth", ", ".join(f"{n} {100 * g:+.2f} %" for n, g in found.items()))
        self.grown += [f"{who}: {name}" for name, grown in found.items() if grown > LIMIT]


def run(seconds, threads, processes, directory):
    """Put load on the package and report it."""
    report = Report()
    for number in range(len(BITS) * len(BOXES)):  # first use, and all kernels loaded
        worker = Worker(number, directory)
        worker.turn()
        report.add(worker.operations, worker.mismatches)
    lasting = [Child("fork", work_long, number, directory, seconds) for number in range(processes)]
    team = Team([Worker(processes + number, directory) for number in range(threads)])
    samples = []
    start = time.monotonic()
    try:
        for number, kind in enumerate(itertools.cycle(NEWCOMERS)):
            report.add(*newcomer(kind, threads + processes + number % 7, directory)[:2])
            if is_due(samples, start, seconds):
                samples.append(team.at_rest(measure))
                report.show(samples[-1], report.operations + sum(worker.operations for worker in team.workers))
            if time.monotonic() > start + seconds:
                break
    finally:
        team.stop()
    for worker in team.workers:
        report.add(worker.operations, worker.mismatches)
    report.judge(f"{threads} threads", samples)
    for number, child in enumerate(lasting):
        operations, mismatches, samples = child.result()
        report.add(operations, mismatches)
        if samples:
            report.judge(f"process {number}", samples)
    return report


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--processes", type=int, default=8)
    parsed = parser.parse_args(arguments)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # that is what is tried
    with tempfile.TemporaryDirectory() as directory:
        report = run(parsed.seconds, parsed.threads, parsed.processes, directory)
    for text in report.mismatches[:20]:
        print("mismatch:", text)
    for text in report.grown:
        print(f"grew by more than {LIMIT:.0%}: {text}")
    print(f"{report.operations} operations, {len(report.mismatches)} mismatches, {len(report.grown)} grew")
    return 1 if report.mismatches or report.grown else 0


if __name__ == "__main__":
    sys.exit(main())
