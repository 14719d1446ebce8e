"""One operation on one piece of memory, by every tier of this machine: all do the same, and it is what the oracle says.

A case is a JSON object with the fields of `Case`. An operation to be compared too is one more entry in `OPERATIONS`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from deeplock_kernels import locking, reference, rekeying, tensors, transform
from deeplock_kernels.errors import TamperedError
from deeplock_kernels.header import LockHeader, sbox_field
from deeplock_kernels.kernels.signatures import SEGMENTS_PER_GROUP, segment_bytes
from deeplock_kernels.runtime.tiers import tiers, use_tier
from deeplock_kernels.sboxes import AES, SBOXES, SBox
from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule

LARGEST = 1_200_000  # bytes, several groups of the expansion's segments
SHORT = 600  # bytes up to which the oracle computes everything; of more, a few ranges
REACH = 20_000  # bytes up to which the oracle follows the expansion, which it has to from the start
FAR = 1 << 28  # bytes of a key stream, up to which the expansion can be run
SEGMENTS_PER_BLOCK = 1024  # in which the expansion keeps its states
MARGIN = 192  # bytes around the memory, in which nothing may change


@dataclass(frozen=True)
class Case:
    """What is done; what is not named as a parameter of the package follows from the seed."""

    operation: str
    schedule: str
    bits: int
    sbox: str
    nbytes: int
    offset: int
    iv: str
    threads: int | None
    alignment: list[int]  # of source and target
    in_place: bool
    small_pieces: bool  # as if any work were worth threads
    seed: int

    @cached_property
    def key(self) -> bytes:
        """Give the key, or the master key."""
        return Random(self.seed).randbytes(self.bits // 8)

    @cached_property
    def new_kind(self) -> tuple[str, int]:
        """Give the schedule to rekey to and the length of its key in bits: half of the time those of the case."""
        random = Random(self.seed + 2)
        other = random.choice(["counter", "expansion"]), random.choice([128, 192, 256])
        if self.offset > FAR:
            other = "counter", other[1]
        return random.choice([(self.schedule, self.bits), other])

    @cached_property
    def new_key(self) -> bytes:
        """Give the key to rekey to."""
        return Random(self.seed + 3).randbytes(self.new_kind[1] // 8)

    @cached_property
    def box(self) -> SBox:
        """Give the S-Box."""
        if self.sbox == "random":
            return SBox(bytes(Random(self.seed).sample(range(256), 256)))
        return {"identity": transform.IDENTITY, "aes_inverse": AES.inverse, **SBOXES}[self.sbox]

    @cached_property
    def tensors(self) -> dict[str, slice]:
        """Give the parts of the memory that are tensors, for an operation on several."""
        random = Random(self.seed)
        cuts = sorted(random.randint(0, self.nbytes) for _ in range(random.choice([0, 1, 3, 40])))
        return {str(i): slice(*ends) for i, ends in enumerate(itertools.pairwise([0, *cuts, self.nbytes]))}


class Operation(NamedTuple):
    """An operation, and what the oracle says of it.

    Attributes
    ----------
    apply
        Does it, given the case, the source and the target; what it gives back is the same on all tiers.
    expected
        Computes what it makes of a part of the source, given the case, the part and its place; None if that would take
        the oracle too long.
    """

    apply: Callable[[Case, np.ndarray, np.ndarray], object]
    expected: Callable[[Case, bytes, int], bytes | None]


# Operations


def _keyed(direction: str) -> Operation:
    def apply(case: Case, source: np.ndarray, target: np.ndarray) -> None:
        counter = case.schedule == "counter"
        keys = CounterSchedule(case.key, bytes.fromhex(case.iv)) if counter else ExpansionSchedule(case.key)
        options: dict[str, Any] = {"sbox": case.box, "offset": case.offset, "threads": case.threads}
        getattr(locking, direction)(source, keys, out=target, **options)

    def expected(case: Case, part: bytes, start: int) -> bytes | None:
        stream = _stream(case.schedule, case.key, bytes.fromhex(case.iv), case.offset + start, len(part))
        return None if stream is None else getattr(reference, direction)(part, stream, case.box.table)

    return Operation(apply, expected)


def _rekeying() -> Operation:
    def apply(case: Case, source: np.ndarray, target: np.ndarray) -> None:
        kinds = {"counter": lambda key, iv: CounterSchedule(key, iv), "expansion": lambda key, _iv: ExpansionSchedule(key)}
        old = kinds[case.schedule](case.key, bytes.fromhex(case.iv))
        new = kinds[case.new_kind[0]](case.new_key, _salt(case))
        options: dict[str, Any] = {"sbox": case.box, "offset": case.offset, "threads": case.threads}
        rekeying.rekey(source, old, new, out=target, **options)

    def expected(case: Case, part: bytes, start: int) -> bytes | None:
        place = case.offset + start, len(part)
        old = _stream(case.schedule, case.key, bytes.fromhex(case.iv), *place)
        new = _stream(case.new_kind[0], case.new_key, _salt(case), *place)
        return None if old is None or new is None else reference.rekey(part, old, new, case.box.table)

    return Operation(apply, expected)


def _substitution(*, inverse: bool) -> Operation:
    def apply(case: Case, source: np.ndarray, target: np.ndarray) -> None:
        locking.substitute(source, case.box, inverse=inverse, out=target, threads=case.threads)

    def expected(case: Case, part: bytes, _start: int) -> bytes:
        return part.translate(reference.invert_table(case.box.table) if inverse else case.box.table)

    return Operation(apply, expected)


def _tensors(*, seal: bool) -> Operation:
    def apply(case: Case, source: np.ndarray, target: np.ndarray) -> str:
        before = source.copy()
        target[:] = source
        named = {name: target[place] for name, place in case.tensors.items()}
        options: dict[str, Any] = {"sbox": case.box, "threads": case.threads}
        with mock.patch("secrets.token_bytes", return_value=_salt(case)):
            header = tensors.lock_tensors(named, case.key, schedule=case.schedule, seal=seal, **options)
        locked = target.copy()
        tensors.unlock_tensors(named, case.key, header, **options)
        assert np.array_equal(target, before), "what was locked was not unlocked"
        target[:] = locked
        if seal:
            _check_seals(case, named, header)
        return header.to_json()

    return Operation(apply, _expected_of_tensors)


def _check_seals(case: Case, named: dict[str, np.ndarray], header: LockHeader) -> None:
    """Seals are those of the oracle where that does not take long, and see one wrong bit."""
    tensors.verify_tensors(named, case.key, header, threads=case.threads)
    for name, part in named.items():
        if part.nbytes <= SHORT:
            key = reference.seal_key(case.key, header.salt, name)
            assert header.tensors[name].seal == reference.seal(key, part.tobytes()), f"another seal of {name}"
    name = max(named, key=lambda name: named[name].nbytes)
    if named[name].nbytes:
        wrong = {**named, name: named[name].copy()}
        wrong[name][Random(case.seed).randrange(wrong[name].nbytes)] ^= 1 << case.seed % 8
        try:
            tensors.verify_tensors(wrong, case.key, header, threads=case.threads)
        except TamperedError:
            return
        raise AssertionError(f"a wrong bit in {name} is not seen")


def _expected_of_tensors(case: Case, part: bytes, start: int) -> bytes | None:
    stream = b""
    field = sbox_field(case.box)
    label = field if isinstance(field, str) else field["sha256"]
    for name, place in case.tensors.items():
        low, high = max(start, place.start), min(start + len(part), place.stop)
        if low >= high:
            continue
        if case.schedule == "counter":
            key, iv = reference.tensor_key_iv(case.key, _salt(case), case.schedule, label, name)
            stream += reference.counter_keystream(key, iv, high - low, low - place.start)
        else:
            following = _stream(case.schedule, case.key, b"", low, high - low)
            if following is None:
                return None
            stream += following
    return reference.lock(part, stream, case.box.table)


def _salt(case: Case) -> bytes:
    return Random(case.seed + 1).randbytes(16)


def _stream(schedule: str, key: bytes, iv: bytes, offset: int, nbytes: int) -> bytes | None:
    if schedule == "counter":
        return reference.counter_keystream(key, iv, nbytes, offset)
    return reference.expansion_keystream(key, nbytes, offset) if offset + nbytes <= REACH else None


OPERATIONS = {
    "lock": _keyed("lock"),
    "unlock": _keyed("unlock"),
    "rekey": _rekeying(),
    "substitute": _substitution(inverse=False),
    "substitute_inverse": _substitution(inverse=True),
    "lock_tensors": _tensors(seal=False),
    "seal_tensors": _tensors(seal=True),
}

# Comparing


def run(data: bytes) -> None:
    """Compare the tiers and the oracle for one case."""
    case = Case(**json.loads(data))
    operation = OPERATIONS[case.operation]
    content = np.frombuffer(Random(case.seed).randbytes(case.nbytes), np.uint8)
    first: tuple[str, object, bytes] | None = None
    with _pieces(small=case.small_pieces):
        for tier in tiers():
            if tier.supported:
                answer, result = _apply(operation, case, content, tier.name)
                if first is None:
                    first = tier.name, answer, result
                assert answer == first[1], f"{tier.name} and {first[0]} give different answers"
                _check_same(result, first[2], 0, tier.name, first[0])
    assert first is not None
    random, places = Random(case.seed), [(0, case.nbytes)]
    if case.nbytes > SHORT:
        starts = [0, case.nbytes - 50, *(random.randint(0, case.nbytes - 50) for _ in range(3))]
        places = [(start, start + 50) for start in starts]
    for start, stop in places:
        expected = operation.expected(case, content[start:stop].tobytes(), start)
        if expected is not None:
            _check_same(first[2][start:stop], expected, start, first[0], "the oracle")


def random_case(random: Random) -> bytes:
    """Draw a case; where the code has a border, it often lies beside that."""
    schedule, bits = random.choice(["counter", "expansion"]), random.choice([128, 192, 256])
    near = random.randint(-70, 70)
    group = SEGMENTS_PER_GROUP * segment_bytes(bits)
    nbytes = random.choice(
        [
            random.randint(0, 70),
            random.randint(0, SHORT),
            max(0, (1 << random.randint(6, 18)) + near),
            random.randint(0, 300_000),
            random.choice([group + near, random.randint(0, LARGEST)]),
        ]
    )
    if schedule == "expansion":
        offsets = [
            random.randint(0, 100),
            random.randint(0, REACH),
            max(0, random.randint(0, 5) * group + random.choice([0, near, -nbytes + near])),
            random.randint(0, 2_000_000),
        ]
        if random.random() < 0.02:
            offsets = [
                SEGMENTS_PER_BLOCK * segment_bytes(bits) + random.choice([0, near, -nbytes + near, -group])
            ]
    else:
        offsets = [
            random.randint(0, 100),
            (1 << random.choice([32, 36, 62])) + near,
            2**63 - nbytes - abs(near),
            random.randint(0, 2**63 - nbytes),
        ]
    blocks = random.choice(
        [0, random.randint(0, 40), nbytes // 16]
    )  # after so many a part of the counter wraps
    iv = random.choice(
        [
            random.getrandbits(128),
            *((random.getrandbits(128) << power) - blocks for power in (32, 64, 96, 128)),
        ]
    )
    case = Case(
        operation=random.choice(list(OPERATIONS)),
        schedule=schedule,
        bits=bits,
        sbox=random.choice(["random", "identity", *SBOXES]),  # those whose kernels `warmup` makes
        nbytes=nbytes,
        offset=random.choice(offsets),
        iv=(iv % 2**128).to_bytes(16, "big").hex(),
        threads=random.choice([None, 1, 2, 3, 4]),
        alignment=[random.choice([0, random.randint(0, 63)]) for _ in range(2)],
        in_place=random.random() < 0.5,
        small_pieces=random.random() < 0.5,
        seed=random.getrandbits(32),
    )
    return json.dumps(dataclasses.asdict(case)).encode()


def _apply(operation: Operation, case: Case, content: np.ndarray, tier: str) -> tuple[object, bytes]:
    """Let a tier do it between margins; give its answer and the target."""
    source_memory, source = _memory(case.nbytes, case.alignment[0])
    target_memory, target = _memory(case.nbytes, case.alignment[1])
    source[:] = content
    if case.in_place:
        target_memory, target = source_memory, source
    with use_tier(tier):
        answer = operation.apply(case, source, target)
    result = target.tobytes()
    if not case.in_place:
        assert np.array_equal(source, content), f"{tier} changed the source"
    target[:] = source[:] = 0
    assert not source_memory.any(), f"{tier} changed memory beside the source"
    assert not target_memory.any(), f"{tier} changed memory beside the target"
    return answer, result


def _memory(nbytes: int, alignment: int) -> tuple[np.ndarray, np.ndarray]:
    """Give zeroed memory, and the part of it that is used, whose address has this remainder by 64."""
    memory = np.zeros(nbytes + 2 * MARGIN + 64, np.uint8)
    start = MARGIN + (alignment - memory.ctypes.data - MARGIN) % 64
    return memory, memory[start : start + nbytes]


def _check_same(found: bytes, expected: bytes, start: int, one: str, other: str) -> None:
    if found != expected:
        i = next(i for i, (x, y) in enumerate(zip(found, expected, strict=True)) if x != y)
        raise AssertionError(f"byte {start + i}: {one} gives {found[i]}, {other} {expected[i]}")


@contextmanager
def _pieces(*, small: bool) -> Iterator[None]:
    """Make pieces of work as small as the tier's pace allows, or leave them as they are."""
    if not small:
        yield
        return
    with mock.patch.multiple(transform, _SMALLEST_JOB=2, _SMALLEST_PIECE=1, _LARGEST_PIECE=1):
        _forget_transforms()
        try:
            yield
        finally:
            _forget_transforms()


def _forget_transforms() -> None:
    transform.Transform.of.cache_clear()
    locking._latest.clear()
