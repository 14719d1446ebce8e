"""Changes that leave a text JSON: something gone, twice, in another place, or replaced."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

VALUES = (
    None, True, False, "", "a", "deeplock", "\ud800", "\0", "é重😀", 1.0, 1e400, -1, [], [[]], {},
    *(2**power + d for power in (0, 2, 8, 31, 32, 53, 63, 64) for d in (-1, 0, 1)),
)  # fmt: skip


class Object(list[Any]):
    """The members of a JSON object in order, where a key may stand twice."""


class Member(list[Any]):
    """A key and its value."""


def mutate_json(text: bytes, random: Random, values: Sequence[Any] = ()) -> bytes | None:
    """Change JSON in up to three places; None if it is none.

    Parameters
    ----------
    values
        What may take a value's place, or a key's, besides `VALUES` and what stands elsewhere in the text.
    """
    try:
        root = [json.loads(text, object_pairs_hook=lambda pairs: Object(map(Member, pairs)))]
        for _ in range(random.randint(1, 3)):
            _change(root, random, [*VALUES, *values])
        return _write(root[0], random, loosely=random.random() < 0.2).encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        return None


def _change(root: list[Any], random: Random, values: list[Any]) -> None:
    places = list(_places(root))
    parent, i = random.choice(places)
    other_parent, j = random.choice(places)
    fixed = isinstance(parent, Member) or parent is root
    action = random.choice(["replace", "take", "step", "delete", "repeat", "swap"])
    if action == "step" and type(parent[i]) is int:
        parent[i] = random.choice([parent[i] - 1, parent[i] + 1, 2 * parent[i], parent[i] // 2])
    elif action == "delete" and not fixed:
        del parent[i]
    elif action == "repeat" and not fixed:
        parent.insert(random.randint(0, len(parent)), copy.deepcopy(parent[i]))
    elif action == "swap" and not fixed and parent is other_parent:
        parent[i], parent[j] = parent[j], parent[i]
    elif isinstance(parent, Object) or (isinstance(parent, Member) and i == 0):
        member = parent[i] if isinstance(parent, Object) else parent
        keys = [place[0] for place, k in places if isinstance(place, Member) and k == 0]
        member[0] = random.choice([*keys, *(value for value in values if isinstance(value, str))])
    else:
        taken = other_parent[j] if action == "take" else random.choice(values)
        parent[i] = copy.deepcopy(taken[1] if isinstance(taken, Member) else taken)


def _places(parent: list[Any]) -> Iterator[tuple[list[Any], int]]:
    for i, value in enumerate(parent):
        yield parent, i
        if isinstance(value, list):
            yield from _places(value)


def _write(value: Any, random: Random, *, loosely: bool) -> str:
    """Write JSON; loosely, with white space and escapes."""

    def space() -> str:
        return random.choice(["", "", "", " ", "\n", "\t\r "]) if loosely else ""

    def write(item: Any) -> str:
        return space() + _write(item, random, loosely=loosely) + space()

    if isinstance(value, Member):
        return f"{write(value[0])}:{write(value[1])}"
    if isinstance(value, list):
        inner = ",".join(map(write, value)) or space()
        return f"{{{inner}}}" if isinstance(value, Object) else f"[{inner}]"
    if isinstance(value, str) and loosely and random.random() < 0.3:
        digits = value.encode("utf-16-be", "surrogatepass").hex()
        return '"' + "".join(f"\\u{digits[i : i + 4]}" for i in range(0, len(digits), 4)) + '"'
    return json.dumps(value, ensure_ascii=loosely and random.random() < 0.5)
