"""Tables of keys: what is there once stays as it is, whichever threads need it."""

from __future__ import annotations

import ctypes
import hashlib
import threading

import pytest

from deeplock_kernels.pieces import KeyTable


def test_a_thread_that_comes_late_does_not_disturb_what_is_in_use():
    """It has asked whether the key is there before another thread put it there, and goes on when that one works with it."""
    late, first_is_done, seen = threading.Event(), threading.Event(), []

    def derive(name):
        if threading.current_thread() is slow:
            late.set()
            first_is_done.wait()
        return b"secret"

    def complete(target, source, count):
        if threading.current_thread() is slow:
            seen.append(ctypes.string_at(table.address("a"), 16))
        assert ctypes.string_at(source, 6) == b"secret"
        ctypes.memset(target, 0x5A, 16 * count)

    table = KeyTable(["before", "a", "behind"], 16, derive, complete)
    slow = threading.Thread(target=table.need, args=(["a"],))
    slow.start()
    late.wait()
    table.need(["a"])
    first_is_done.set()
    slow.join()
    assert seen == [b"\x5a" * 16]
    assert ctypes.string_at(table.address("before"), 48) == bytes(16) + b"\x5a" * 16 + bytes(16)


@pytest.mark.parametrize("completed", [False, True])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_each_name_has_its_own_whatever_is_needed_at_once(count, completed):
    names, asked = [f"tensor {i}" for i in range(count)], []

    def derive(name):
        asked.append(name)
        return hashlib.sha256(name.encode()).digest()[:16]

    def complete(target, source, count):
        for i in range(count):
            key = ctypes.string_at(source + 16 * i, 16)
            ctypes.memmove(target + 32 * i, key + key[::-1], 32)

    def expected(name):
        key = hashlib.sha256(name.encode()).digest()[:16]
        return key + key[::-1] if completed else key

    nbytes = 32 if completed else 16
    table = KeyTable(names, nbytes, derive, complete if completed else None)
    first = names[1::3]
    table.need(first)
    found = {name: ctypes.string_at(table.address(name), nbytes) for name in names}
    assert found == {name: expected(name) if name in first else bytes(nbytes) for name in names}
    table.need(names + names)
    table.need(names)
    assert sorted(asked) == sorted(names)
    assert [ctypes.string_at(table.address(name), nbytes) for name in names] == list(map(expected, names))
