"""The function that XLA calls for a lock inside a compiled program (typed FFI; layouts as in `xla/ffi/api/c_api.h`).

It runs on a thread of XLA's, without Python and without the GIL. Whole kernels are handed to threads of its own where
that pays; it waits for them, so nothing outlives the call. Key and iv are operands: they are copied together, used and
wiped. Which kernel a call means is looked up in a table of this process by a number that is the same in every process,
because compiled programs are cached and shipped, and an address in one would be another process's.
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
_table = (ctypes.c_int64 * (ROWS * _ROW // 8))()


def enter(row: int, number: int, kernel: int, past_cache: int, box: int) -> None:
    """Put a kernel into the table, or in place of an older one of the same number."""
    place = row * _ROW // 8
    _table[place + 1 : place + 4] = [kernel, past_cache, box]
    _table[place] = number  # last, since programs may be running


def _caller(result: Any, count: int) -> Any:
    """Make a function that calls an address with integers."""

    @intrinsic
    def call(typingctx, address, arguments):  # type: ignore[no-untyped-def]
        def generate(context, builder, _signature, values):  # type: ignore[no-untyped-def]
            quad = ir.IntType(64)
            kind = ir.FunctionType(quad if result == types.int64 else ir.VoidType(), [quad] * count)
            place = builder.inttoptr(values[0], kind.as_pointer())
            returned = builder.call(place, [builder.extract_value(values[1], i) for i in range(count)])
            return returned if result == types.int64 else context.get_dummy_value()

        return result(types.int64, types.UniTuple(types.int64, count)), generate

    return call


def make_handler() -> Any:
    """Compile the handler; the result has an `address` and has to be kept."""
    run, ask = _caller(types.void, 1), _caller(types.int64, 1)
    create = types.ExternalFunction("pthread_create", types.int32(*[types.int64] * 4))
    join = types.ExternalFunction("pthread_join", types.int32(types.int64, types.int64))
    wipe = types.ExternalFunction("explicit_bzero", types.void(types.int64, types.int64))
    advise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))
    table, rcon = ctypes.addressof(_table), RCON_ADDRESS
    unfit, unknown = (ctypes.addressof(_texts[name]) for name in ("operands", "unknown"))
    error_scratch, key_scratch = make_scratch(32), make_scratch(48)
    records_scratch, threads_scratch = make_scratch(MAX_THREADS * _RECORD), make_scratch(8 * MAX_THREADS)
    major, minor = API_VERSION

    @inlined
    def refuse(frame, message, code):  # type: ignore[no-untyped-def]
        arguments = error_scratch()
        write_quad(arguments, 28)
        write_quad(arguments + 8, 0)
        write_quad(arguments + 16, message)
        write_quad(arguments + 24, code)
        return ask(read_quad(read_quad(frame + 16) + 48), (arguments,))

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
    def work(kernel, target, source, nbytes, offset, key, box, threads):  # type: ignore[no-untyped-def]
        records, handles = records_scratch(), threads_scratch()
        threads = min(threads, MAX_THREADS)
        piece = max((nbytes // threads + _PAGE - 1) // _PAGE * _PAGE, _PAGE)
        count = (nbytes + piece - 1) // piece
        for i in range(count):
            record, start = records + _RECORD * i, piece * i
            write_quad(record, target + start)
            write_quad(record + 8, source + start)
            write_quad(record + 16, min(piece, nbytes - start))
            write_quad(record + 24, offset + start)
            write_quad(record + 32, key)
            write_quad(record + 40, rcon)
            write_quad(record + 48, box)
        started = 0
        # A kernel takes an address and what it returns is not looked at: it is a thread's function as it stands.
        while started < count - 1 and create(handles + 8 * started, 0, kernel, records + _RECORD * started) == 0:
            started += 1
        for i in range(started, count):
            run(kernel, (records + _RECORD * i,))
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
        if read_quad(plan + 8) != 4 or key_bytes > 32:
            return refuse(frame, unfit, _INVALID_ARGUMENT)
        numbers = read_quad(plan + 16)
        row = find(read_quad(numbers))
        nbytes, offset, threads = read_quad(numbers + 8), read_quad(numbers + 16), read_quad(numbers + 24)
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
        work(kernel, target, source, nbytes, offset, both, read_quad(row + 24), threads)
        wipe(both, 48)
        return 0

    compiled: Any = numba.cfunc(types.int64(types.int64), error_model="numpy", boundscheck=False)(handler)
    return compiled
