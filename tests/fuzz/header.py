"""Any text, read as a lock header: refused with HeaderError, or what it says and no more.

A case is the text; bytes that are no UTF-8 stand for lone surrogates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from deeplock_kernels import reference
from deeplock_kernels.errors import HeaderError
from deeplock_kernels.header import LockHeader
from deeplock_kernels.sboxes import SBOXES

from .mutation import mutate_json

FIELDS = (
    *(
        "format",
        "schedule",
        "sbox",
        "key_bits",
        "salt",
        "check",
        "tensors",
        "mac",
        "bytes",
        "start",
        "same_as",
    ),
    *("seal", "sha256", "passphrase", "scrypt", "n", "r", "p"),
)
VALUES = [
    *FIELDS, *SBOXES, "deeplock/1", "counter", "expansion", "0f" * 16, "1E" * 16, "3c" * 32, 128, 192, 256,
    {"sha256": "4b" * 32}, {"scrypt": {"n": 16384, "r": 8, "p": 1, "salt": "0f" * 16}}, 1, 8, 16384, 1 << 30,
]  # fmt: skip
TOKENS = [json.dumps(value) for value in VALUES] + ["-0", "1e0", "\\ud800", "\\/", "NaN"]


def run(data: bytes) -> None:
    """Read a header; what is accepted is written again as the same canonical text."""
    text = data.decode(errors="surrogateescape")
    try:
        header = LockHeader.from_json(text)
    except HeaderError as error:
        message = str(error)
        assert message.isascii(), message
        assert message.isprintable(), message
        assert len(message) < 300, message
        return
    value = json.loads(text, object_pairs_hook=_once)
    written = header.to_json()
    assert written.encode() == reference.canonical_json(value)
    assert LockHeader.from_json(written) == header
    _check_streams(value["tensors"], value["schedule"])
    if "passphrase" in value:
        cost = value["passphrase"]["scrypt"]
        assert 16 << 20 <= 128 * cost["n"] * cost["r"] <= 256 << 20
        assert 1 <= cost["p"] <= 4


def mutate(data: bytes, random: Random, mutate_bytes: Callable[[bytes], bytes]) -> bytes:
    """Change a header's text, half of the time so that it stays JSON."""
    changed = mutate_json(data, random, VALUES) if random.random() < 0.5 else None
    return mutate_bytes(data) if changed is None else changed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "a key stands twice"
    return dict(pairs)


def _check_streams(tensors: dict[str, Any], schedule: str) -> None:
    """No key byte of the expansion is for two tensors, and whatever shares a tensor's storage has its length."""
    own = {name: record for name, record in tensors.items() if "same_as" not in record}
    assert all(("start" in record) == (schedule == "expansion") for record in own.values())
    ranges = sorted((record.get("start", 0), record["bytes"]) for record in own.values())
    end = 0
    for start, nbytes in ranges if schedule == "expansion" else []:
        assert start == end
        end += nbytes
    assert all(0 <= nbytes < 2**63 for nbytes in (end, *(record["bytes"] for record in tensors.values())))
    shared = [record for record in tensors.values() if "same_as" in record]
    assert all(own[record["same_as"]]["bytes"] == record["bytes"] for record in shared)
