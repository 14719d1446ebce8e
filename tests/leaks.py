"""The search for secrets in texts and bytes, in every form in which they may have been written down."""

from __future__ import annotations

import base64
import functools
import json
import re

import numpy as np

WINDOW = 8  # neighbouring bytes of a secret that nothing else holds by chance
STEP = 4  # from one window to the next: every part of 11 bytes holds one


class Leaks:
    """Finds parts of secrets.

    Parameters
    ----------
    secrets
        By name.
    """

    def __init__(self, secrets):
        self._patterns = {}
        for name, secret in secrets.items():
            for start in range(0, len(secret) - WINDOW + 1, STEP):
                part = secret[start : start + WINDOW]
                self._patterns[part] = f"{name} as bytes"
                self._patterns |= {text.encode(): f"{name} as {form}" for form, text in written(part)}
            for order in ("big", "little"):
                number = int.from_bytes(secret, order)
                self._patterns[str(number).encode()] = f"{name} as one number"
                self._patterns[f"{number:x}".encode()] = f"{name} as one hexadecimal number"
        # All patterns are sought at once, by how they begin.
        self._starts = np.unique(np.frombuffer(b"".join(pattern[:8] for pattern in self._patterns), np.uint64))
        self._by_start = {}
        for pattern in self._patterns:
            self._by_start.setdefault(pattern[:8], []).append(pattern)
        self._found_in = functools.lru_cache(None)(self._search)

    def __call__(self, *shown):
        """Say what of the secrets some texts and bytes hold, as a sorted list."""
        return sorted({found for item in shown for found in self._found_in(item)})

    def _search(self, item):
        data = item.encode(errors="replace") if isinstance(item, str) else bytes(item)
        # Hexadecimal digits may be of either case, and all kinds of lists may have other spaces and signs between.
        plain = re.sub(rb"[\s,;:_()\[\]-]+", b" ", data.lower())
        return self._exact(data) | self._exact(plain)

    def _exact(self, data):
        found = set()
        for offset in range(min(8, max(len(data) - 7, 0))):
            words = np.frombuffer(data, np.uint64, (len(data) - offset) // 8, offset)
            nearest = self._starts[np.searchsorted(self._starts, words) % len(self._starts)]
            for i in np.flatnonzero(nearest == words):
                place = offset + 8 * int(i)
                for pattern in self._by_start[data[place : place + 8]]:
                    if data.startswith(pattern, place):
                        found.add(self._patterns[pattern])
        return found


def written(part):
    """Yield the forms in which a few bytes may stand in a text, with their names."""
    yield "characters", part.decode("latin-1")
    yield "escapes", repr(part)[2:-1]
    yield "escapes in JSON", json.dumps(part.decode("latin-1"))[1:-1]
    yield "digits", part.hex()
    yield "pairs of digits", part.hex(" ")
    yield "hexadecimal numbers", " ".join(map(hex, part))
    yield "hexadecimal numbers of two digits", " ".join(f"0x{byte:02x}" for byte in part)
    yield "escaped digits", "".join(f"\\x{byte:02x}" for byte in part)
    for case in "Xx":
        escaped = (chr(byte) if 31 < byte < 127 and byte not in b'"\\' else f"\\{byte:02{case}}" for byte in part)
        yield f"LLVM's escapes ({case})", "".join(escaped)
    yield "LLVM's numbers", " ".join(f"i8 {byte}" for byte in part)
    yield "numbers", " ".join(map(str, part))
    yield "numbers of three digits", " ".join(f"{byte:03}" for byte in part)
    yield "signed numbers", " ".join(str(byte - 256 if byte > 127 else byte).replace("-", "") for byte in part)
    for order in ("big", "little"):
        halves = [int.from_bytes(half, order) for half in (part[:4], part[4:])]
        yield f"words of 32 bits, {order} end first", " ".join(map(str, halves))
        yield f"words of 32 bits in hexadecimal, {order} end first", " ".join(f"0x{half:x}" for half in halves)
        yield f"words of 64 bits, {order} end first", str(int.from_bytes(part, order))
        yield f"hexadecimal words of 64 bits, {order} end first", f"0x{int.from_bytes(part, order):x}"
    for name, encode in (("base64", base64.b64encode), ("base64 for addresses", base64.urlsafe_b64encode)):
        yield name, encode(part[:6]).decode()  # one of three windows begins where a group of characters does
