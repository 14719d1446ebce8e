"""The lock of many named tensors: their key streams, their seals and what a header says and proves of them."""

from __future__ import annotations

import dataclasses
import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TypeVar

from deeplock_kernels.errors import (
    HeaderError,
    NotSealedError,
    SBoxError,
    TamperedError,
    TamperedHeaderError,
    UnknownNameError,
    WrongKeyError,
    shown,
)
from deeplock_kernels.header import SALT_BYTES, SEAL_BYTES, LockHeader, TensorRecord, sbox_field
from deeplock_kernels.kernels.signatures import RECORDS, KernelName
from deeplock_kernels.keys import Derivation, MasterKey, PlainKey
from deeplock_kernels.passphrases import Key as Key
from deeplock_kernels.passphrases import Passphrase, Scrypt
from deeplock_kernels.pieces import KeyTable, Range, Tags, deal, list_calls, seal_key_table, tags_of
from deeplock_kernels.runtime import pool
from deeplock_kernels.runtime.pool import Call
from deeplock_kernels.runtime.tiers import active_tier, kernel
from deeplock_kernels.sboxes import SBOXES, SBox
from deeplock_kernels.schedules import SCHEDULES, CounterSchedule, ExpansionSchedule, Schedule
from deeplock_kernels.schedules.base import RCON_ADDRESS
from deeplock_kernels.transform import Transform, piece_bytes

Seals = dict[str, int]  # of tensors, or of parts of them: parts are XORed
_Result = TypeVar("_Result")


class NamedLock:
    """One lock: its salt, and all that is derived from it and the master key. Its end wipes that.

    Use `new` to lock and `from_header` for what is locked.

    Attributes
    ----------
    header
        The lock's header. For a new lock it is there after `cover`, and has seals and mac when `prove` has put them in.
    """

    header: LockHeader

    def __init__(self, key: PlainKey, derivation: Derivation, salt: bytes, schedule: str, sbox: SBox | None) -> None:
        self.schedule, self.sbox, self.key_bits = schedule, sbox, derivation.key_bits
        self._key, self._derivation, self._salt = key, derivation, salt
        self._scrypt: Scrypt | None = None
        self._own_key: MasterKey | None = None  # made from a passphrase, so nobody else will wipe it
        self.tier = active_tier()
        self._names: Iterable[str] = ()
        self._streams: dict[str, Schedule] = {}
        self._tables: dict[str, KeyTable] = {}

    @classmethod
    def new(cls, key: Key, schedule: str, sbox: SBox) -> NamedLock:
        """Draw a new salt.

        Raises
        ------
        UnknownNameError
            There is no such schedule.
        """
        if not isinstance(schedule, str) or schedule not in SCHEDULES:
            raise UnknownNameError(f"schedule: got {shown(schedule)}, accepted are {', '.join(SCHEDULES)}")
        salt = secrets.token_bytes(SALT_BYTES)
        scrypt, own = None, None
        if isinstance(key, Passphrase):
            scrypt = key.new_scrypt()
            key = own = key.derive(scrypt)
        lock = cls(key, Derivation(key, salt), salt, schedule, sbox)
        lock._scrypt, lock._own_key = scrypt, own
        return lock

    @classmethod
    def from_header(
        cls,
        key: Key,
        header: LockHeader,
        *,
        check: bool = True,
        sbox: SBox | None = None,
        needs_sbox: bool = True,
        names: Iterable[str] | None = None,
    ) -> NamedLock:
        """Take up the lock of a header.

        Parameters
        ----------
        key, header
            The master key and the header.
        check
            Whether to refuse another key, and a header that was altered.
        sbox
            The S-Box, where it has no name.
        needs_sbox
            Whether anything will be unlocked.
        names
            The tensors that it is for; by default all.

        Raises
        ------
        WrongKeyError
            The key is not the one of the lock.
        TamperedHeaderError
            The header was altered.
        HeaderError, SBoxError
            It is no header, or its S-Box is not at hand.
        """
        if not isinstance(header, LockHeader):
            raise HeaderError(
                f"header: got {type(header).__name__}, accepted is a LockHeader; see LockHeader.from_json"
            )
        own = None
        if isinstance(key, Passphrase):
            key = own = key.derive(header.passphrase)
        derivation = Derivation(key, header.salt)
        if check:
            _authenticate(derivation, header)
        box = _header_sbox(header, sbox) if needs_sbox else None
        lock = cls(key, derivation, header.salt, header.schedule, box)
        lock._own_key = own
        lock.header = header
        lock._names = header.tensors if names is None else [*map(lock.root, header.tensors.keys() & names)]
        return lock

    def cover(self, sizes: Mapping[str, tuple[int, str | None]]) -> None:
        """Say what is to be locked: (number of bytes, name of the tensor whose storage it shares, or None) by name."""
        records, start, placed = {}, 0, self.schedule == ExpansionSchedule.name
        for name, (nbytes, same_as) in sizes.items():
            if same_as is None and placed:
                records[name] = TensorRecord(nbytes, start)
                start += nbytes
            else:
                records[name] = TensorRecord(nbytes, None, same_as)
        self.header = LockHeader(
            schedule=self.schedule,
            sbox=sbox_field(self.box),
            key_bits=self.key_bits,
            salt=self._salt,
            check=self._derivation.check(),
            tensors=MappingProxyType(records),
            passphrase=self._scrypt,
        )
        self._names = records

    def prove(self, seals: Seals | None, file: str | None = None) -> LockHeader:
        """Put the seals of all tensors, or none, and the mac into the header.

        Parameters
        ----------
        seals
            Of each tensor, or None to seal none.
        file
            The canonical JSON of the file's table, for the header of a file.
        """
        tensors = self.header.tensors
        if seals is not None:
            tensors = MappingProxyType(
                {
                    name: record
                    if record.same_as
                    else TensorRecord(record.nbytes, record.start, None, seals[name].to_bytes(SEAL_BYTES, "big"))
                    for name, record in tensors.items()
                }
            )
        header = dataclasses.replace(self.header, tensors=tensors, file=file)
        self.header = dataclasses.replace(header, mac=self._derivation.mac(header.authenticated()))
        return self.header

    def expect(self, seals: Seals) -> None:
        """Compare the seals of whole tensors with the header's; what has none there is not compared.

        Raises
        ------
        TamperedError
            One is another; the message names the tensor.
        """
        wrong = [
            name
            for name, found in seals.items()
            if (seal := self._record(name).seal) and not hmac.compare_digest(seal, found.to_bytes(SEAL_BYTES, "big"))
        ]
        if wrong:
            raise TamperedError(
                f"tensors[{wrong[0]!r}]: its bytes are not those that were sealed; {len(wrong)} such in all; "
                "was it unlocked already, or altered?"
            )

    @property
    def box(self) -> SBox:
        """The S-Box of a lock that changes bytes."""
        assert self.sbox is not None
        return self.sbox

    def must_be_sealed(self) -> None:
        """Refuse a lock without seals.

        Raises
        ------
        NotSealedError
            A tensor has none.
        """
        bare = [name for name in self.header.tensors if not self.sealed(name)]
        if bare:
            raise NotSealedError(
                f"header: {len(bare)} of {len(self.header.tensors)} tensors have no seal, as {bare[0]!r}; "
                "they were locked with seal=False, so nothing can be said of them"
            )

    def sealed(self, name: str) -> bool:
        """Say whether a tensor has a seal."""
        return self._record(name).seal is not None

    def stream(self, name: str) -> tuple[Schedule, int]:
        """Give the key stream of a tensor: a schedule, and the position where the tensor starts."""
        root = self.root(name)
        if self.schedule == ExpansionSchedule.name:
            if "" not in self._streams:
                self._streams[""] = ExpansionSchedule(self._key)
            return self._streams[""], self.header.tensors[root].start or 0
        if root not in self._streams:
            key_iv = self._tensor_key_iv(root)
            self._streams[root] = CounterSchedule(key_iv[:-16], key_iv[-16:])
        return self._streams[root], 0

    def lock(
        self, ranges: Sequence[Range], threads: int, *, seal: bool, then: Callable[[Seals], _Result]
    ) -> _Result:
        """Lock ranges and seal what becomes of them.

        If anything goes wrong, `then` included, ranges that are locked in place are as they were.

        Parameters
        ----------
        ranges
            What to lock.
        threads
            How many threads at most.
        seal
            Whether to seal.
        then
            Is given the seals, or nothing, and gives the result.
        """
        transform = Transform.of(self.box, "lock", self.tier)
        fused = seal and self.schedule == CounterSchedule.name
        calls, tags, _records = self._plan(ranges, transform, threads, sealed=fused)
        in_place = all(one.target == one.source for one in ranges)
        transform.run(calls, threads, in_place=in_place)
        try:
            if fused:
                return then(tags.seals())
            written = [one._replace(source=one.target) for one in ranges]
            return then(self.seals(written, threads) if seal else {})
        except BaseException:
            if in_place:
                transform.take_back(calls)
            raise

    def unlock(self, ranges: Sequence[Range], threads: int) -> None:
        """Unlock ranges; if that fails half way, those that are unlocked in place are as they were."""
        self._unlock(ranges, threads, sealed=False)

    def unlock_and_seal(self, ranges: Sequence[Range], threads: int) -> Seals:
        """Unlock ranges into separate memory, and give the seals of what they were."""
        if self.schedule != CounterSchedule.name:
            seals = self.seals(ranges, threads)
            self._unlock(ranges, threads, sealed=False)
            return seals
        return self._unlock(ranges, threads, sealed=True).seals()

    def seals(self, ranges: Sequence[Range], threads: int) -> Seals:
        """Give the seals of ranges as they are."""
        if not ranges:
            return {}
        piece = piece_bytes(self.tier, sum(one.nbytes for one in ranges), threads)
        function, pack = kernel(self.tier, KernelName("seal")), RECORDS["seal"].pack

        def plan(address: int, count: int, before: Callable[[], None] | None) -> Call:
            return Call(function, (pack(address, count),), before)

        groups, seal_keys = deal(ranges, piece), self.seal_keys()
        tags = tags_of(groups)
        listing = list_calls(
            groups, plan, lambda name: (0, *self.seal_fields(name, seal_keys, tags)), self.deriving(seal_keys)
        )
        pool.run(listing.calls, threads)
        return tags.seals()

    def _unlock(self, ranges: Sequence[Range], threads: int, *, sealed: bool) -> Tags:
        transform = Transform.of(self.box, "unlock", self.tier)
        calls, tags, _records = self._plan(ranges, transform, threads, sealed=sealed)
        transform.run(calls, threads, in_place=all(one.target == one.source for one in ranges))
        return tags

    def _plan(
        self, ranges: Sequence[Range], transform: Transform, threads: int, *, sealed: bool
    ) -> tuple[list[Call], Tags, object]:
        """Give the calls, where they leave tags, and what has to be held until they are over."""
        if not ranges:
            return [], Tags(()), None
        piece = transform.piece(sum(one.nbytes for one in ranges), threads)
        if self.schedule != CounterSchedule.name:
            calls: list[Call] = []
            for name, target, source, nbytes, offset in ranges:
                if nbytes:
                    schedule, start = self.stream(name)
                    calls += schedule.calls(transform, target, source, nbytes, start + offset, piece)
            return calls, Tags(()), None
        operation, keys = "counter_sealed" if sealed else "counter_list", self.keys()
        groups = deal(ranges, piece)

        def plan(address: int, count: int, before: Callable[[], None] | None) -> Call:
            return transform.call(operation, self.key_bits, address, count, RCON_ADDRESS, before=before)

        if not sealed:
            listing = list_calls(groups, plan, lambda name: (keys.address(self.root(name)),), self.deriving(keys))
            return listing.calls, Tags(()), listing
        seal_keys, tags = self.seal_keys(), tags_of(groups)

        def fields(name: str) -> tuple[int, ...]:
            return keys.address(self.root(name)), *self.seal_fields(name, seal_keys, tags)

        listing = list_calls(groups, plan, fields, self.deriving(keys, seal_keys))
        return listing.calls, tags, listing

    def keys(self) -> KeyTable:
        """Give the table of tensor keys, each with its iv behind it."""
        return self._table("tensor", partial(KeyTable, self._names, self.key_bits // 8 + 16, self._tensor_key_iv))

    def seal_keys(self) -> KeyTable:
        """Give the table of what tensors are sealed with."""
        return self._table("seal", partial(seal_key_table, self._names, self._derivation.seal_key, self.tier))

    def seal_fields(self, name: str, seal_keys: KeyTable, tags: Tags) -> tuple[int, int, int]:
        """Give what a sealed record has behind the key, for the next piece of a tensor."""
        root = self.root(name)
        return seal_keys.address(root), self.header.tensors[root].nbytes, next(tags.places)

    def deriving(self, *tables: KeyTable) -> Callable[[list[str]], None]:
        """Give what makes the keys of named tensors in some tables."""

        def derive(names: list[str]) -> None:
            roots = [self.root(name) for name in names]
            for table in tables:
                table.need(roots)

        return derive

    def _table(self, what: str, make: Callable[[], KeyTable]) -> KeyTable:
        if what not in self._tables:
            self._tables[what] = make()
        return self._tables[what]

    def _tensor_key_iv(self, root: str) -> bytes:
        sbox = self.header.sbox
        return self._derivation.tensor_key_iv(
            self.schedule, sbox if isinstance(sbox, str) else sbox["sha256"], root
        )

    def root(self, name: str) -> str:
        """Give the name as which a tensor was locked."""
        return self.header.tensors[name].same_as or name

    def _record(self, name: str) -> TensorRecord:
        return self.header.tensors[self.root(name)]

    def __enter__(self) -> NamedLock:
        return self

    def __exit__(self, *_: object) -> None:
        for schedule in self._streams.values():
            schedule.wipe()
        self._streams.clear()
        for table in self._tables.values():
            table.wipe()
        self._tables.clear()
        if self._own_key is not None:
            self._own_key.wipe()

    def __repr__(self) -> str:
        if not hasattr(self, "_derivation"):  # as where somebody tries to copy it
            return "NamedLock(unfinished)"
        return f"NamedLock({self.schedule}, {self.key_bits} bits)"


def _authenticate(derivation: Derivation, header: LockHeader) -> None:
    if derivation.key_bits != header.key_bits:
        raise WrongKeyError(
            f"key: got {derivation.key_bits} bits, the tensors were locked with {header.key_bits}"
        )
    if not hmac.compare_digest(derivation.check(), header.check):
        raise WrongKeyError("key: it is not the one that locked these tensors; nothing was changed")
    if header.mac is None:
        raise TamperedHeaderError("header: it has no mac, accepted is one as it was made by the lock")
    if not hmac.compare_digest(derivation.mac(header.authenticated()), header.mac):
        hint = "" if header.file else "; take the header of a file with read_header"
        raise TamperedHeaderError(f"header: it is not as the lock made it, something was altered{hint}")


def _header_sbox(header: LockHeader, sbox: SBox | None) -> SBox:
    if sbox is not None and not isinstance(sbox, SBox):
        raise SBoxError(
            f"sbox: got {type(sbox).__name__}, accepted is the SBox that the tensors were locked with, or None"
        )
    if isinstance(header.sbox, str):
        expected = SBOXES[header.sbox]
        if sbox is not None and sbox != expected:
            raise SBoxError(f"sbox: got another S-Box than the header's, {header.sbox!r}; leave it away")
        return expected
    if sbox is None or sbox.sha256 != header.sbox["sha256"]:
        raise SBoxError(
            f"sbox: the tensors were locked with one whose SHA-256 is {header.sbox['sha256']}; give that one"
        )
    return sbox
