"""The function that XLA calls for a lock inside a compiled program (typed FFI; layouts as in `xla/ffi/api/c_api.h`).

It runs on a thread of XLA's, without Python and without the GIL. Where that pays it starts threads that take pieces of
the work as this one does; it waits for them, so nothing outlives the call. Key and iv are operands: they are copied
together, used and wiped. Which kernel a call means is looked up in a table of this process by a number that is the same
in every process, because compiled programs are cached and shipped, and an address in one would be another process's.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numba
from llvmlite import ir
from numba.core import types as numba_types
from numba.extending import intrinsic

from deeplock_kernels.kernels.house import inlined
from deeplock_kernels.kernels.memory import make_scratch, read_byte, read_quad, write_byte, write_quad
from deeplock_kernels.kernels.signatures import RECORDS
from deeplock_kernels.schedules.base import RCON_ADDRESS

types: Any = numba_types

API_VERSION = 0, 3  # of the layouts below
MAX_THREADS = 64
PAST_CACHE = 16 << 20  # bytes from which on separate output is written past the caches
ROWS = 1024
_ROW = 32  # bytes: the number of a kernel, its address, that of the one past the caches, and of the S-Box's parameters
_RECORD = RECORDS["counter"].size
_JOB = 32 + _RECORD  # bytes: the next piece, the number of pieces, their length, the kernel, and a record of it all
_PAGE = 4096
_HUGE_PAGES = 14  # madvise's number for them

_METADATA = 1
_INVALID_ARGUMENT, _FAILED_PRECONDITION = 3, 9
_MESSAGES = {
    "operands": b"deeplock: this program does not fit this version of the package; trace it again",
    "unknown": b"deeplock: this process does not know the kernel of this program; "
    b"call deeplock_kernels.frameworks.jax.prepare before",
}
_texts = {name: ctypes.create_string_buffer(text) for name, text in _MESSAGES.items()}
_kept: list[Any] = []  # what the handler has the address of
_table = (ctypes.c_int64 * (ROWS * _ROW // 8))()


def enter(row: int, number: int, kernel: int, past_cache: int, box: int) -> None:
    """Put a kernel into the table, or in place of an older one of the same number."""
    place = row * _ROW // 8
    _table[place + 1 : place + 4] = [kernel, past_cache, box]
    _table[place] = number  # last, since programs may be running


@intrinsic
def _call(typingctx, address, argument):  # type: ignore[no-untyped-def]
    """Call a C function of one integer; what one that returns nothing seems to return is not to be looked at."""

    def generate(_context, builder, _signature, values):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), [values[1]])

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _take(typingctx, address):  # type: ignore[no-untyped-def]
    """Add 1 to a number that several threads add to, and give what it was."""

    def generate(_context, builder, _signature, values):  # type: ignore[no-untyped-def]
        place = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate


def _make_worker() -> Any:
    """Compile the function of a thread: it takes pieces of a job until there are no more."""
    scratch = make_scratch(_RECORD)

    def worker(job):  # type: ignore[no-untyped-def]
        count, piece, kernel, whole = read_quad(job + 8), read_quad(job + 16), read_quad(job + 24), job + 32
        record = scratch()
        for i in range(4, _RECORD // 8):
            write_quad(record + 8 * i, read_quad(whole + 8 * i))
        while True:
            start = _take(job) * piece
            if start >= count * piece:
                return 0
            write_quad(record, read_quad(whole) + start)
            write_quad(record + 8, read_quad(whole + 8) + start)
            write_quad(record + 16, min(piece, read_quad(whole + 16) - start))
            write_quad(record + 24, read_quad(whole + 24) + start)
            _call(kernel, record)

    return numba.cfunc(types.int64(types.int64), error_model="numpy", boundscheck=False)(worker)


def make_handler() -> Any:
    """Compile the handler; the result has an `address` and has to be kept."""
    worker = _make_worker()
    _kept.append(worker)
    create = types.ExternalFunction("pthread_create", types.int32(*[types.int64] * 4))
    join = types.ExternalFunction("pthread_join", types.int32(types.int64, types.int64))
    wipe = types.ExternalFunction("explicit_bzero", types.void(types.int64, types.int64))
    advise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))
    table, rcon, work_on = ctypes.addressof(_table), RCON_ADDRESS, worker.address
    unfit, unknown = (ctypes.addressof(_texts[name]) for name in ("operands", "unknown"))
    error_scratch, key_scratch = make_scratch(32), make_scratch(48)
    job_scratch, threads_scratch = make_scratch(_JOB), make_scratch(8 * MAX_THREADS)
    major, minor = API_VERSION

    @inlined
    def refuse(frame, message, code):  # type: ignore[no-untyped-def]
        arguments = error_scratch()
        write_quad(arguments, 28)
        write_quad(arguments + 8, 0)
        write_quad(arguments + 16, message)
        write_quad(arguments + 24, code)
        return _call(read_quad(read_quad(frame + 16) + 48), arguments)

    @inlined
    def describe(extension):  # type: ignore[no-untyped-def]
        metadata = read_quad(extension + 24)
        write_quad(metadata + 24, major | minor << 32)
        return 0

    @inlined
    def buffer(buffers, index):  # type: ignore[no-untyped-def]
        return read_quad(buffers + 8 * index)

    @inlined
    def find(number):  # type: ignore[no-untyped-def]
        for i in range(ROWS):
            row = table + _ROW * i
            if read_quad(row) == number:
                return row
        return 0

    @inlined
    def work(kernel, target, source, nbytes, offset, key, box, piece, threads):  # type: ignore[no-untyped-def]
        job, handles = job_scratch(), threads_scratch()
        count = (nbytes + piece - 1) // piece
        write_quad(job, 0)
        write_quad(job + 8, count)
        write_quad(job + 16, piece)
        write_quad(job + 24, kernel)
        write_quad(job + 32, target)
        write_quad(job + 40, source)
        write_quad(job + 48, nbytes)
        write_quad(job + 56, offset)
        write_quad(job + 64, key)
        write_quad(job + 72, rcon)
        write_quad(job + 80, box)
        helpers, started = min(threads, count, MAX_THREADS) - 1, 0
        while started < helpers and create(handles + 8 * started, 0, work_on, job) == 0:
            started += 1
        _call(work_on, job)
        for i in range(started):
            join(read_quad(handles + 8 * i), 0)

    def handler(frame):  # type: ignore[no-untyped-def]
        extension = read_quad(frame + 8)
        if extension != 0 and read_quad(extension + 8) & 0xFFFFFFFF == _METADATA:
            return describe(extension)
        if read_quad(frame + 56) != 3 or read_quad(frame + 96) != 1 or read_quad(frame + 136) != 1:
            return refuse(frame, unfit, _INVALID_ARGUMENT)
        operands, plan = read_quad(frame + 72), read_quad(read_quad(frame + 160))
        target = read_quad(buffer(read_quad(frame + 112), 0) + 24)
        source = read_quad(buffer(operands, 0) + 24)
        key, start = buffer(operands, 1), buffer(operands, 2)
        key_bytes = read_quad(read_quad(key + 40))
        if read_quad(plan + 8) != 5 or key_bytes > 32:
            return refuse(frame, unfit, _INVALID_ARGUMENT)
        numbers = read_quad(plan + 16)
        row = find(read_quad(numbers))
        nbytes, offset = read_quad(numbers + 8), read_quad(numbers + 16)
        piece, threads = read_quad(numbers + 24), read_quad(numbers + 32)
        if row == 0:
            return refuse(frame, unknown, _FAILED_PRECONDITION)
        both = key_scratch()
        for i in range(key_bytes):
            write_byte(both + i, read_byte(read_quad(key + 24) + i))
        for i in range(16):
            write_byte(both + key_bytes + i, read_byte(read_quad(start + 24) + i))
        past_cache = nbytes >= PAST_CACHE and target != source and target & 63 == 0 and offset & 15 == 0
        kernel = read_quad(row + 16) if past_cache else read_quad(row + 8)
        if past_cache:
            first = (target + _PAGE - 1) // _PAGE * _PAGE
            advise(first, (target + nbytes - first) // _PAGE * _PAGE, _HUGE_PAGES)
        work(kernel, target, source, nbytes, offset, both, read_quad(row + 24), piece, threads)
        wipe(both, 48)
        return 0

    compiled: Any = numba.cfunc(types.int64(types.int64), error_model="numpy", boundscheck=False)(handler)
    return compiled
