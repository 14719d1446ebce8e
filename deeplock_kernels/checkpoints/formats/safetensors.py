"""Safetensors files: the lock header is an entry of the table's `__metadata__`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import MappingProxyType
from typing import BinaryIO

from deeplock_kernels.checkpoints.formats.base import Edit, Layout
from deeplock_kernels.checkpoints.formats.safetensors_table import (
    canonical_text,
    entry,
    insert_entry,
    parse_table,
    remove_entry,
    replace_entry,
)


class Safetensors:
    """The format of https://github.com/huggingface/safetensors."""

    name = "safetensors"

    def matches(self, start: bytes) -> bool:
        """Say whether a file starts with the length of a table, below 4 GiB, and an object."""
        return start[4:9] == b"\0\0\0\0{"

    def read(self, file: BinaryIO, size: int, source: str) -> Layout:
        """Read the table; see `safetensors_table`."""
        table = parse_table(file, size, source=source)
        begin = table.data_start
        tensors = {
            name: dataclasses.replace(tensor, start=begin + tensor.start, stop=begin + tensor.stop)
            for name, tensor in table.tensors.items()
        }
        return Layout(source, size, MappingProxyType(tensors), entry(table), canonical_text(table), detail=table)

    def edits(self, layout: Layout, header: str | None, _checksums: Sequence[int]) -> list[Edit]:
        """Give the new table, with its length before it."""
        table = layout.detail
        if header is None:
            start = remove_entry(table)
        else:
            start = (insert_entry if layout.header is None else replace_entry)(table, header)
        return [Edit(0, table.data_start, start)]


SAFETENSORS = Safetensors()
