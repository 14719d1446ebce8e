"""Make the vectors with the second implementation: `python tests/vectors/generate.py`.

It writes only what differs from the files as they are, and names it. The inputs of `scheme_v1.json` are taken from the
file itself; everything else comes from rules.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parent.parent)]

from vectors import accumulated, second  # noqa: E402


def _scheme() -> str:
    vectors = json.loads((FOLDER / "scheme_v1.json").read_text(encoding="utf-8"))
    for section in ("expansion", "counter", "lock", "tensors"):
        vectors[section] = [_FILLED[section](case) for case in vectors[section]]
    return json.dumps(vectors, indent=1, ensure_ascii=False)


def _accumulated() -> str:
    digest = hashlib.sha256()
    for answer in accumulated.answers():
        digest.update(answer)
    stored = {"seed": accumulated.SEED, "cases": accumulated.COUNT, "sha256": digest.hexdigest()}
    return json.dumps(stored, indent=1) + "\n"


def _stream(case: dict[str, Any], nbytes: int) -> bytes:
    key, offset = bytes.fromhex(case["key"]), case["offset"]
    if case.get("iv"):
        return second.counter_stream(key, bytes.fromhex(case["iv"]), nbytes, offset)
    return second.expansion_stream(key, offset + nbytes)[offset:]


def _plain(case: dict[str, Any]) -> bytes:
    return bytes((case["plain_start"] + i) % 251 for i in range(case["plain_length"]))


def _filled_stream(case: dict[str, Any]) -> dict[str, Any]:
    if "length" in case:
        return case | {"stream_sha256": hashlib.sha256(_stream(case, case["length"])).hexdigest()}
    return case | {"stream": _stream(case, len(case["stream"]) // 2).hex()}


def _filled_lock(case: dict[str, Any]) -> dict[str, Any]:
    plain = _plain(case)
    return case | {"locked": second.lock(plain, _stream(case, len(plain)), second.AES_SBOX).hex()}


def _filled_tensor(case: dict[str, Any]) -> dict[str, Any]:
    master, salt, plain = bytes.fromhex(case["master"]), bytes.fromhex(case["salt"]), _plain(case)
    info = f"deeplock/v1/tensor/counter/aes\0{case['name']}"
    both = second.derived(master, salt, info, len(master) + 16)
    key, iv = both[:-16], both[-16:]
    locked = second.lock(plain, second.counter_stream(key, iv, len(plain)), second.AES_SBOX)
    return case | {
        "tensor_key": key.hex(),
        "iv": iv.hex(),
        "check": second.derived(master, salt, "deeplock/v1/check", 16).hex(),
        "locked_sha256": hashlib.sha256(locked).hexdigest(),
        "locked_head": locked[:32].hex(),
        "seal": second.seal(master, salt, case["name"], locked).hex(),
    }


_FILLED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "expansion": _filled_stream,
    "counter": _filled_stream,
    "lock": _filled_lock,
    "tensors": _filled_tensor,
}
FILES: dict[str, Callable[[], str]] = {"scheme_v1.json": _scheme, "accumulated.json": _accumulated}


def main() -> None:
    """Write every file that differs from what is made."""
    for name, make in FILES.items():
        path, text = FOLDER / name, make()
        same = path.exists() and path.read_text(encoding="utf-8") == text
        if not same:
            path.write_text(text, encoding="utf-8")
        print(f"{name}: {'as it was' if same else 'written'}")


if __name__ == "__main__":
    main()
