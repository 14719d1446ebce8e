"""Tables of keys for the pieces of tensors."""

from __future__ import annotations

import ctypes

from deeplock_kernels.pieces import KeyTable


def test_a_key_that_two_threads_derive_never_changes_under_the_first():
    """Both may find it missing; whoever is later must not touch what the other works with already."""
    seen = []

    def derive(_name):
        seen.append(ctypes.string_at(table.address("a"), 8))
        return b"raw"

    def complete(place):
        seen.append(ctypes.string_at(table.address("a"), 8))
        ctypes.memmove(place, b"finished", 8)

    table = KeyTable("ab", 8, derive, complete)
    table.need("a")
    seen.clear()
    table._derived.clear()  # what the second thread saw when it looked
    table.need("a")
    assert seen == [b"finished", b"finished"]
    assert ctypes.string_at(table.address("a"), 16) == b"finished" + bytes(8)
