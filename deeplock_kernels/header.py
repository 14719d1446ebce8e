"""The lock header: what has to be kept beside locked tensors to unlock them again. It holds no secret."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from deeplock_kernels.errors import HeaderError
from deeplock_kernels.keys import KEY_BITS
from deeplock_kernels.passphrases import PASSPHRASE_KEY_BITS, SCRYPT_COSTS, SCRYPT_SALT_BYTES, Scrypt
from deeplock_kernels.sboxes import SBOXES, SBox

FORMAT = "deeplock/1"
SALT_BYTES = CHECK_BYTES = SEAL_BYTES = 16
MAC_BYTES = 32
SCHEDULE_NAMES = ("counter", "expansion")
_LARGEST = 2**63 - 1
_HEX_DIGITS = frozenset("0123456789abcdef")


class TensorRecord(NamedTuple):
    """What the header says of one tensor.

    Attributes
    ----------
    nbytes
        Its length in bytes ("bytes" in JSON).
    start
        Where its key stream starts in the one of all tensors (expansion schedule only).
    same_as
        The tensor whose storage it shared when it was locked, and as which it is unlocked.
    seal
        16 bytes that prove the locked bytes whole, or None.
    """

    nbytes: int
    start: int | None = None
    same_as: str | None = None
    seal: bytes | None = None


@dataclass(frozen=True)
class LockHeader:
    """The header of one lock, with the fields of format "deeplock/1".

    Attributes
    ----------
    schedule
        "counter" or "expansion".
    sbox
        The name of the S-Box, or for one of your own `{"sha256": hex of its table}`.
    key_bits
        128, 192 or 256.
    salt
        16 bytes, new at every lock.
    check
        16 bytes by which the right key is known.
    tensors
        The locked tensors by name. Their order says nothing: it is that of the lock, or of the JSON text, where they
        are sorted by name.
    mac
        32 bytes that prove the header whole, or None.
    format
        "deeplock/1".
    file
        For the header of a file, what the mac covers of the file: its own table as canonical JSON, else None. It is
        no part of the JSON text; `read_header` puts it here.
    passphrase
        How the passphrase of the lock becomes its key, or None where it is one of a key.
    """

    schedule: str
    sbox: str | Mapping[str, str]
    key_bits: int
    salt: bytes
    check: bytes
    tensors: Mapping[str, TensorRecord]
    mac: bytes | None = None
    format: str = FORMAT
    file: str | None = dataclasses.field(default=None, repr=False)
    passphrase: Scrypt | None = None

    def __post_init__(self) -> None:
        for name in ("sbox", "tensors"):
            value = getattr(self, name)
            if not isinstance(value, (str, MappingProxyType)):
                object.__setattr__(self, name, MappingProxyType(dict(value)))

    def __hash__(self) -> int:
        return hash((self.schedule, self.key_bits, self.salt, self.check, self.mac))

    def __reduce__(self) -> tuple[Any, ...]:
        # Views of a dict can be neither pickled nor copied.
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self), tuple(dict(value) if isinstance(value, Mapping) else value for value in values)

    def to_json(self) -> str:
        """Give the header as JSON text: sorted keys, no white space, no escapes for what is not ASCII."""
        tensors: dict[str, dict[str, int | str]] = {}
        for name, record in self.tensors.items():
            fields: dict[str, int | str] = {"bytes": record.nbytes}
            if record.start is not None:
                fields["start"] = record.start
            if record.same_as is not None:
                fields["same_as"] = record.same_as
            if record.seal is not None:
                fields["seal"] = record.seal.hex()
            tensors[name] = fields
        header = {
            "format": self.format,
            "schedule": self.schedule,
            "sbox": self.sbox if isinstance(self.sbox, str) else dict(self.sbox),
            "key_bits": self.key_bits,
            "salt": self.salt.hex(),
            "check": self.check.hex(),
            "tensors": tensors,
        }
        if self.passphrase is not None:
            cost = self.passphrase._asdict()
            header["passphrase"] = {"scrypt": cost | {"salt": self.passphrase.salt.hex()}}
        if self.mac is not None:
            header["mac"] = self.mac.hex()
        return json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def authenticated(self) -> bytes:
        """Give what the mac covers: the header without it, and the table of the file if it is that of a file."""
        header = dataclasses.replace(self, mac=None).to_json()
        return (header if self.file is None else f'{{"file":{self.file},"header":{header}}}').encode()

    @classmethod
    def from_json(cls, text: str) -> LockHeader:
        """Read a header, and accept one spelling only: all fields and no others, each once, hexadecimal in lowercase.

        Raises
        ------
        HeaderError
            The text is something else.
        """
        return _Reader().header(text)


def sbox_field(box: SBox) -> str | dict[str, str]:
    """Give what a header says of an S-Box: the name of a named one, else the digest of its table."""
    named = box.name is not None and box.name in SBOXES and SBOXES[box.name] == box
    return str(box.name) if named else {"sha256": box.sha256}


class _Reader:
    """Reads a header strictly; every refusal names the field."""

    def header(self, text: object) -> LockHeader:
        if not isinstance(text, str):
            raise HeaderError(f"header: got {type(text).__name__}, accepted is JSON text")
        try:
            text.encode()  # a lone surrogate is no text
            value = json.loads(
                text,
                object_pairs_hook=self._unique,
                parse_int=self._whole_number,
                parse_float=self._no_number,
                parse_constant=self._no_number,
            )
        except HeaderError:
            raise
        except (ValueError, RecursionError) as error:
            raise HeaderError(f"header: it is not JSON text ({type(error).__name__})") from None
        fields = self._fields(
            value,
            "header",
            {"format", "schedule", "sbox", "key_bits", "salt", "check", "tensors"},
            {"mac", "passphrase"},
        )
        self._one_of(fields["format"], "format", (FORMAT,))
        self._one_of(fields["schedule"], "schedule", SCHEDULE_NAMES)
        if type(fields["key_bits"]) is not int:
            raise self._refusal("key_bits", fields["key_bits"], "128, 192 or 256")
        self._one_of(fields["key_bits"], "key_bits", KEY_BITS)
        tensors = self._tensors(fields["tensors"], fields["schedule"])
        if "passphrase" in fields and fields["key_bits"] != PASSPHRASE_KEY_BITS:
            raise self._refusal("key_bits", fields["key_bits"], f"{PASSPHRASE_KEY_BITS} beside a passphrase")
        return LockHeader(
            schedule=fields["schedule"],
            sbox=self._sbox(fields["sbox"]),
            key_bits=fields["key_bits"],
            salt=self._hex(fields["salt"], "salt", SALT_BYTES),
            check=self._hex(fields["check"], "check", CHECK_BYTES),
            tensors=tensors,
            mac=self._hex(fields["mac"], "mac", MAC_BYTES) if "mac" in fields else None,
            passphrase=self._scrypt(fields["passphrase"]) if "passphrase" in fields else None,
        )

    def _tensors(self, value: Any, schedule: str) -> Mapping[str, TensorRecord]:
        if not isinstance(value, dict):
            raise self._refusal("tensors", value, "an object of tensors by name")
        records = {}
        for name, entry in value.items():
            where = f"tensors[{_shown(name)}]"
            fields = self._fields(entry, where, {"bytes"}, {"start", "same_as", "seal"})
            if "same_as" in fields and fields.keys() & {"start", "seal"}:
                raise HeaderError(
                    f"{where}: got same_as beside start or seal; those belong to the tensor it names"
                )
            if "same_as" not in fields and ("start" in fields) != (schedule == "expansion"):
                raise HeaderError(f"{where}: start belongs to the expansion schedule, and only to it")
            if "same_as" in fields and not isinstance(fields["same_as"], str):
                raise self._refusal(f"{where}.same_as", fields["same_as"], "the name of a tensor")
            records[name] = TensorRecord(
                nbytes=self._integer(fields["bytes"], f"{where}.bytes"),
                start=self._integer(fields["start"], f"{where}.start") if "start" in fields else None,
                same_as=fields.get("same_as"),
                seal=self._hex(fields["seal"], f"{where}.seal", SEAL_BYTES) if "seal" in fields else None,
            )
        for name, record in records.items():
            if record.same_as is not None:
                other = records.get(record.same_as)
                if other is None or other.same_as is not None or other.nbytes != record.nbytes:
                    raise HeaderError(
                        f"tensors[{_shown(name)}].same_as: got {_shown(record.same_as)}, accepted is the name of "
                        "a tensor of the same length that has no same_as itself"
                    )
        self._check_starts(records)
        return records

    def _check_starts(self, records: Mapping[str, TensorRecord]) -> None:
        # One after the other from 0 on: so no key byte is used twice, and none is paid for in vain.
        starts = sorted(
            (record.start, record.nbytes, name)
            for name, record in records.items()
            if record.start is not None
        )
        expected = 0
        for start, nbytes, name in starts:
            if start != expected:
                raise self._refusal(
                    f"tensors[{_shown(name)}].start", start, f"{expected}, the end of the one before"
                )
            expected += nbytes
            if expected > _LARGEST:
                raise HeaderError(f"tensors[{_shown(name)}].bytes: got {nbytes}, its end is past 2^63 - 1")

    def _sbox(self, value: Any) -> str | Mapping[str, str]:
        if isinstance(value, str):
            self._one_of(value, "sbox", tuple(SBOXES))
            return value
        fields = self._fields(value, "sbox", {"sha256"}, set())
        self._hex(fields["sha256"], "sbox.sha256", 32)
        return fields

    def _scrypt(self, value: Any) -> Scrypt:
        where = "passphrase.scrypt"
        inside = self._fields(value, "passphrase", {"scrypt"}, set())["scrypt"]
        fields = self._fields(inside, where, {*Scrypt._fields}, set())
        for name, accepted in SCRYPT_COSTS.items():
            if type(fields[name]) is not int:
                raise self._refusal(f"{where}.{name}", fields[name], ", ".join(map(str, accepted)))
            self._one_of(fields[name], f"{where}.{name}", accepted)
        salt = self._hex(fields["salt"], f"{where}.salt", SCRYPT_SALT_BYTES)
        return Scrypt(fields["n"], fields["r"], fields["p"], salt)

    def _fields(self, value: Any, where: str, required: set[str], optional: set[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._refusal(where, value, f"an object with {', '.join(sorted(required))}")
        missing, unknown = required - value.keys(), value.keys() - required - optional
        if missing:
            raise HeaderError(
                f"{where}: {', '.join(sorted(missing))} missing; accepted are headers of {FORMAT}"
            )
        if unknown:
            raise HeaderError(
                f"{where}: got the unknown field {_shown(min(unknown))}, accepted are "
                f"{', '.join(sorted(required | optional))}"
            )
        return value

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                raise HeaderError(f"header: got {_shown(key)} twice, accepted is each field once")
            key.encode()
            fields[key] = value
        return fields

    def _whole_number(self, text: str) -> int:
        if text == "-0" or len(text) > 20:
            self._no_number(text)
        return int(text)

    def _no_number(self, text: str) -> Any:
        raise HeaderError(f"header: got the number {_shown(text)}, accepted are whole numbers")

    def _one_of(self, value: Any, where: str, accepted: tuple[Any, ...]) -> None:
        if value not in accepted:
            raise self._refusal(where, value, ", ".join(map(str, accepted)))

    def _integer(self, value: Any, where: str) -> int:
        if type(value) is not int or not 0 <= value <= _LARGEST:
            raise self._refusal(where, value, "a whole number from 0 to 2^63 - 1")
        return value

    def _hex(self, value: Any, where: str, nbytes: int) -> bytes:
        if not isinstance(value, str) or len(value) != 2 * nbytes or not _HEX_DIGITS.issuperset(value):
            raise self._refusal(where, value, f"{2 * nbytes} lowercase hexadecimal digits")
        return bytes.fromhex(value)

    def _refusal(self, where: str, value: Any, accepted: str) -> HeaderError:
        return HeaderError(f"{where}: got {_shown(value)}, accepted is {accepted}")


def _shown(value: Any) -> str:
    """Give a foreign value for a message: on one line, escaped and short."""
    text = ascii(value) if isinstance(value, (str, int)) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
