"""Memory by address, for kernels that are plain Python: compiled by Numba, or run as they stand without it."""

from __future__ import annotations

import ctypes
import threading
from struct import Struct
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core import types as numba_types
from numba.extending import intrinsic, overload

from deeplock_kernels.kernels.signatures import (
    MASKED_RECORD_BYTES,
    RECORD_BYTES,
    REKEY_RECORD_BYTES,
    SEALED_RECORD_BYTES,
)

types: Any = numba_types


def read_byte(address: int) -> int:
    """Read the byte at an address."""
    return ctypes.c_uint8.from_address(int(address)).value


def read_quad(address: int) -> int:
    """Read the 64-bit integer at an address."""
    return ctypes.c_int64.from_address(int(address)).value


def write_byte(address: int, value: int) -> None:
    """Write the low 8 bits of a value."""
    ctypes.c_uint8.from_address(int(address)).value = value


def write_quad(address: int, value: int) -> None:
    """Write the low 64 bits of a value."""
    ctypes.c_int64.from_address(int(address)).value = value


def make_scratch(nbytes: int) -> Any:
    """Make a function that gives the address of `nbytes` of memory of the calling thread's own."""
    memory = threading.local()

    def scratch() -> int:
        if not hasattr(memory, "block"):
            memory.block = ctypes.create_string_buffer(nbytes)
        return ctypes.addressof(memory.block)

    @intrinsic
    def stack(typingctx):
        def generate(_context, builder, _signature, _values):
            place = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), nbytes))
            return builder.ptrtoint(place, ir.IntType(64))

        return types.int64(), generate

    @overload(scratch)
    def scratch_overload():
        return lambda: stack()

    return scratch


def _reader(bits: int) -> Any:
    @intrinsic
    def read(typingctx, address):
        def generate(_context, builder, _signature, values):
            place = builder.inttoptr(values[0], ir.IntType(bits).as_pointer())
            return builder.zext(builder.load(place, align=1), ir.IntType(64))

        return types.int64(address), generate

    return read


def _writer(bits: int) -> Any:
    @intrinsic
    def write(typingctx, address, value):
        def generate(_context, builder, _signature, values):
            place = builder.inttoptr(values[0], ir.IntType(bits).as_pointer())
            builder.store(builder.trunc(values[1], ir.IntType(bits)), place, align=1)

        return types.void(address, value), generate

    return write


_read_byte, _read_quad, _write_byte, _write_quad = _reader(8), _reader(64), _writer(8), _writer(64)


@overload(read_byte)
def _read_byte_overload(address):
    return lambda address: _read_byte(address)


@overload(read_quad)
def _read_quad_overload(address):
    return lambda address: _read_quad(address)


@overload(write_byte)
def _write_byte_overload(address, value):
    return lambda address, value: _write_byte(address, value)


@overload(write_quad)
def _write_quad_overload(address, value):
    return lambda address, value: _write_quad(address, value)


def make_record_reader(count: int) -> Any:
    """Make a function that gives the integers of a record: of its bytes, or compiled of its address."""
    unpack = Struct(f"{count}q").unpack

    def read(record: bytes) -> tuple[int, ...]:
        return unpack(record)

    @intrinsic
    def read_all(typingctx, address):
        quads = types.UniTuple(types.int64, count)

        def generate(context, builder, _signature, values):
            place = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
            each = [builder.load(cgutils.gep_inbounds(builder, place, i), align=1) for i in range(count)]
            return context.make_tuple(builder, quads, each)

        return quads(types.int64), generate

    @overload(read)
    def read_overload(record):
        return lambda record: read_all(record)

    return read


def make_counter_list(counter: Any) -> Any:
    """Make the kernel that runs a counter kernel on each of a list of records."""

    def counter_list(records, count, rcon, box):
        for i in range(count):
            record = records + RECORD_BYTES * i
            target, source = read_quad(record), read_quad(record + 8)
            nbytes, offset = read_quad(record + 16), read_quad(record + 24)
            counter(target, source, nbytes, offset, read_quad(record + 32), rcon, box)

    return counter_list


def make_sealed_list(sealed: Any) -> Any:
    """Make the kernel that runs a sealing kernel on each of a list of records, with whatever follows the list."""

    def sealed_list(records, count, *common):
        for i in range(count):
            record = records + SEALED_RECORD_BYTES * i
            target, source = read_quad(record), read_quad(record + 8)
            nbytes, offset = read_quad(record + 16), read_quad(record + 24)
            key, seal_keys = read_quad(record + 32), read_quad(record + 40)
            total, tag = read_quad(record + 48), read_quad(record + 56)
            sealed(target, source, nbytes, offset, key, seal_keys, total, tag, *common)

    return sealed_list


def make_rekey_list(rekey: Any) -> Any:
    """Make the kernel that runs a rekeying kernel on each of a list of records."""

    def rekey_list(records, count, rcon, box, inverse_box):
        for i in range(count):
            record = records + REKEY_RECORD_BYTES * i
            target, source = read_quad(record), read_quad(record + 8)
            nbytes, offset = read_quad(record + 16), read_quad(record + 24)
            key, seal_keys = read_quad(record + 32), read_quad(record + 40)
            total, tag, new_key = read_quad(record + 48), read_quad(record + 56), read_quad(record + 64)
            rekey(target, source, nbytes, offset, key, seal_keys, total, tag, new_key, rcon, box, inverse_box)

    return rekey_list


def make_masked_list(rekey: Any) -> Any:
    """Make the kernel that rekeys each of a list of masked records."""

    def masked_list(records, count, box, inverse_box):
        for i in range(count):
            record = records + MASKED_RECORD_BYTES * i
            target, source = read_quad(record), read_quad(record + 8)
            rekey(target, source, read_quad(record + 16), read_quad(record + 24), box, inverse_box)

    return masked_list
