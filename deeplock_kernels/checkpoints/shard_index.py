"""The index of a checkpoint in shards: a JSON file that says which shard holds which tensor.

It is the `model.safetensors.index.json` of the Hugging Face hub: {"metadata": {...}, "weight_map": {tensor: file}}. The
lock header of the whole checkpoint is one entry of its `metadata`, put in and taken out as text, so that taking it out
gives back the very bytes that the file had before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from deeplock_kernels.checkpoints.formats.safetensors_table import ENTRY_KEY
from deeplock_kernels.checkpoints.stores import checked_name
from deeplock_kernels.errors import ContainerError

INDEX_SUFFIX = ".safetensors.index.json"
MAX_INDEX_BYTES = 400_000_000
_METADATA, _WEIGHT_MAP, _TOTAL = "metadata", "weight_map", "total_size"
_WHITE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class ShardIndex:
    """An index.

    Attributes
    ----------
    source
        What messages call the file.
    text
        The JSON text exactly as in the file.
    weight_map
        The shard of each tensor.
    total_size
        The size of all tensors in bytes, or None if the index does not say it.
    header
        The text of the lock header, or None.
    proved
        All of it but the lock header, as canonical JSON.
    """

    source: str
    text: str = field(repr=False)
    weight_map: Mapping[str, str]
    total_size: int | float | None
    header: str | None = field(repr=False)
    proved: str = field(repr=False)

    def with_header(self, header: str) -> bytes:
        """Give the file with a lock header in it, which it has not yet."""
        string = json.dumps(header, ensure_ascii=False)
        top = _members(self.text, _white(self.text, 0))
        # A space before the colon tells `without_header` that the object was there, even if empty.
        if _METADATA in top:
            position = top[_METADATA].value_start + 1
            comma = "," if _members(self.text, top[_METADATA].value_start) else ""
            entry = f'"{ENTRY_KEY}" :{string}{comma}'
        else:
            position = self.text.index("{") + 1
            entry = f'"{_METADATA}":{{"{ENTRY_KEY}":{string}}},'
        return (self.text[:position] + entry + self.text[position:]).encode()

    def without_header(self) -> bytes:
        """Give the file without its lock header: the bytes from before, if `with_header` made it."""
        top = _members(self.text, _white(self.text, 0))
        metadata = _members(self.text, top[_METADATA].value_start)
        own = metadata[ENTRY_KEY]
        kept = self.text[own.key_stop : own.value_start].startswith(" ")
        found, key = (metadata, ENTRY_KEY) if len(metadata) > 1 or kept else (top, _METADATA)
        names = list(found)
        place, (start, _key_stop, _value_start, stop) = names.index(key), found[key]
        if place + 1 < len(names):
            stop = self.text.index(",", stop) + 1
        elif place:
            start = found[names[place - 1]].stop
        return (self.text[:start] + self.text[stop:]).encode()


def parse_index(file: BinaryIO, size: int, source: str) -> ShardIndex:
    """Read an index.

    Parameters
    ----------
    file
        Open for reading in binary mode, at its start.
    size
        Its size in bytes.
    source
        Its path, which messages begin with.

    Raises
    ------
    ContainerError
        It is malformed, or names a shard that would lie outside its directory.
    """
    if size > MAX_INDEX_BYTES:
        raise _refusal(source, f"got {size} bytes, accepted are {MAX_INDEX_BYTES}")
    try:
        text = file.read(MAX_INDEX_BYTES).decode()
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _refusal(source, f"it is not JSON text, or has a key twice ({type(error).__name__})") from None
    metadata = value.get(_METADATA, {}) if isinstance(value, dict) else None
    weight_map = value.get(_WEIGHT_MAP) if isinstance(value, dict) else None
    if not isinstance(metadata, dict) or not isinstance(weight_map, dict):
        raise _refusal(source, f"accepted is an object with a {_WEIGHT_MAP} of tensors and their files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise _refusal(source, f"{_WEIGHT_MAP}: got no file name for {name!a}")
        checked_name(shard, source)
    total, header = metadata.get(_TOTAL), metadata.pop(ENTRY_KEY, None)
    if total is not None and (not isinstance(total, (int, float)) or isinstance(total, bool)):
        raise _refusal(source, f"{_TOTAL}: got {type(total).__name__}, accepted is a number of bytes")
    if header is not None and not isinstance(header, str):
        raise _refusal(source, f"{ENTRY_KEY}: got {type(header).__name__}, accepted is the text of a lock header")
    value[_METADATA] = metadata
    try:
        proved = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        proved.encode()
    except ValueError:
        raise _refusal(source, "it holds what is no Unicode text") from None
    return ShardIndex(source, text, MappingProxyType(weight_map), total, header, proved)


class _Member(NamedTuple):
    """Where in a text a member of an object stands."""

    start: int
    key_stop: int
    value_start: int
    stop: int


def _members(text: str, at: int) -> dict[str, _Member]:
    """Give the members of the object that begins at a place of a well-formed JSON text."""
    decoder = json.JSONDecoder()
    found: dict[str, _Member] = {}
    at += 1
    while True:
        start = _white(text, at)
        if text[start] == "}":
            return found
        key, key_stop = decoder.raw_decode(text, start)
        value_start = _white(text, _white(text, key_stop) + 1)
        _value, stop = decoder.raw_decode(text, value_start)
        found[key] = _Member(start, key_stop, value_start, stop)
        at = _white(text, stop)
        at += text[at] == ","


def _white(text: str, at: int) -> int:
    matched = _WHITE.match(text, at)
    return matched.end() if matched else at


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _refusal(source: str, got: str) -> ContainerError:
    return ContainerError(f"{source}: {got}; it is damaged, or no index of shards: get it again")
