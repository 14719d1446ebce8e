"""Tables of keys: what is there once stays as it is, whichever threads need it."""

from __future__ import annotations

import ctypes
import threading

from deeplock_kernels.pieces import KeyTable


def test_a_thread_that_comes_late_does_not_disturb_what_is_in_use():
    """It has asked whether the key is there before another thread put it there, and goes on when that one works with it."""
    late, first_is_done, seen = threading.Event(), threading.Event(), []

    def derive(name):
        if threading.current_thread() is slow:
            late.set()
            first_is_done.wait()
        return b"secret"

    def complete(place):
        if threading.current_thread() is slow:
            seen.append(ctypes.string_at(table.address("a"), 16))
        assert ctypes.string_at(place, 6) == b"secret"
        ctypes.memset(place, 0x5A, 16)

    table = KeyTable(["before", "a", "behind"], 16, derive, complete)
    slow = threading.Thread(target=table.need, args=(["a"],))
    slow.start()
    late.wait()
    table.need(["a"])
    first_is_done.set()
    slow.join()
    assert seen == [b"\x5a" * 16]
    assert ctypes.string_at(table.address("before"), 48) == bytes(16) + b"\x5a" * 16 + bytes(16)
