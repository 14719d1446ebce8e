"""The names of all kernels and the arguments that each takes; no Numba here, so that callers stay light.

All arguments are 64-bit signed integers: addresses, byte counts and positions. A compiled kernel takes them as one
record, `RECORDS[operation].pack(...)`, because ctypes charges for each argument what a kernel needs for a KiB.

| operation          | arguments                                                                          |
|--------------------|------------------------------------------------------------------------------------|
| counter            | target, source, nbytes, offset, key, rcon, box                                     |
| counter_past_cache | the same; for large separate buffers, target a multiple of 64 and offset of 16     |
| counter_list       | records, count, rcon, box                                                          |
| counter_sealed     | sealed records, count, rcon, box                                                   |
| rekey              | rekey records, count, rcon, box, inverse box                                       |
| rekey_masked       | masked records, count, box, inverse box                                            |
| seal               | sealed records, count                                                              |
| seal_keys          | target, source, count, rcon                                                        |
| expansion          | target, source, nbytes, offset, states, rcon, box                                  |
| expansion_chain    | states, segments, rcon                                                             |
| expansion_indexed  | target, source, groups, states, rcon, box                                          |
| substitute         | target, source, nbytes, box                                                        |
| copy_past_cache    | target, source, nbytes                                                             |
| xor                | target, nbytes, value                                                              |
| xor_sum            | target, source, nbytes                                                             |

`target` is `source` or does not overlap it. `offset` is the position of the first byte in the key stream. `key`
points to the AES key and, right behind it, the 16 bytes of the counter's start. A record is five integers: target,
source, nbytes, offset and key, each as for `counter`.

A sealed record has three more: the tensor's seal keys, its number of bytes in all, and the place of a tag of 16 bytes.
Its `offset` is a multiple of 16. Tags of all pieces of a tensor, XORed, are its seal (SP 800-38D, GMAC) over the locked
bytes: `counter_sealed` locks them, or unlocks them, and `seal` only reads them, at `source`. `seal_keys` makes
`SEAL_KEYS_BYTES` at `target` of each key of 32 bytes at `source`; what they hold is the tier's own affair.

A rekey record is a sealed one of the new lock, with the old key, and behind it the new key. A masked record is four
integers: target, source, nbytes, and the address of the old key stream XORed with the new one.

`states` points to saved states of the chain: `expansion` starts from the first one, at the segment start that its
`offset` counts from; `expansion_chain` starts there too and writes the next `segments` states after it;
`expansion_indexed` reads four a group and works on whole segments.

`rcon` points to `RCON_WORDS` + `RCON_START`. `box` points to the parameters of the S-Box in the kernel's form.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

ARITY = {
    "counter": 7,
    "counter_past_cache": 7,
    "counter_list": 4,
    "counter_sealed": 4,
    "rekey": 5,
    "rekey_masked": 4,
    "seal": 2,
    "seal_keys": 4,
    "expansion": 7,
    "expansion_chain": 3,
    "expansion_indexed": 6,
    "substitute": 4,
    "copy_past_cache": 3,
    "xor": 3,
    "xor_sum": 3,
}

RECORDS = {operation: Struct(f"{count}q") for operation, count in ARITY.items()}

SEGMENT_ROUNDS = 4080  # a multiple of 51, Rcon's period, so that every segment starts with the same Rcon
SEGMENTS_PER_GROUP = 4
RCON_PERIOD = 51
RECORD_BYTES = 40
SEALED_RECORD_BYTES = 64
REKEY_RECORD_BYTES = 72
MASKED_RECORD_BYTES = 32
SEAL_KEYS_BYTES = 272
SEAL_KEY_BYTES = 32
TAG_BYTES = 16
RCON_START = 4


def segment_bytes(bits: int) -> int:
    """Bytes of key stream between two saved states of the chain of a key of `bits` bits (65,280 for 128 bits)."""
    return SEGMENT_ROUNDS * bits // 8


def _rcon_words() -> bytes:
    # A step of a kernel reads up to 8 rounds at once from any place of the period.
    # Reading it 1 to 3 bytes early gives a rotated word, the first one too.
    value, words = 1, bytearray(RCON_START)
    for _ in range(RCON_PERIOD + 8):
        words += bytes((value, 0, 0, 0))
        value = (value << 1) ^ (0x11B if value & 0x80 else 0)
    return bytes(words)


RCON_WORDS = _rcon_words()


class KernelName(NamedTuple):
    """Which kernel: an operation, the key's bits, the form of the S-Box, and the direction, where each applies."""

    operation: str
    bits: int = 0
    form: str = ""
    direction: str = ""

    @property
    def arity(self) -> int:
        """The number of arguments."""
        return ARITY[self.operation]

    def __str__(self) -> str:
        return "_".join(str(part) for part in self if part)


INVERSE_FORMS = {"aes": "aes_inverse", "aes_inverse": "aes"}  # of others the inverse has the same form

# A form that is one S-Box alone is of use in one direction.
_DIRECTIONS = {"aes": ("lock",), "aes_inverse": ("unlock",)}


def every_name(forms: tuple[str, ...]) -> list[KernelName]:
    """List the kernels that a tier with these S-Box forms uses for the named S-Boxes."""
    names = [KernelName(operation) for operation in ("xor", "xor_sum", "copy_past_cache", "seal", "seal_keys")]
    names += [KernelName("expansion_chain", bits) for bits in (128, 192, 256)]
    for form in forms:
        operations = ["counter", "counter_past_cache", "counter_list", "expansion", "expansion_indexed"]
        names.append(KernelName("substitute", form=form))
        if form != "identity":  # which bare key streams take
            operations.append("counter_sealed")
        if form not in ("identity", "aes_inverse"):  # the form of no named S-Box itself
            names.append(KernelName("rekey_masked", form=form))
            names += [KernelName("rekey", bits, form) for bits in (128, 192, 256)]
        names += [
            KernelName(operation, bits, form, direction)
            for operation in operations
            for bits in (128, 192, 256)
            for direction in _DIRECTIONS.get(form, ("lock", "unlock"))
        ]
    return names
