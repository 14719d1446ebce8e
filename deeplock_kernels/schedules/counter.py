"""The counter schedule, the default: AES in counter mode (SP 800-38A section 6.5)."""

from __future__ import annotations

import ctypes

from deeplock_kernels.errors import KeyFormatError, KeyTypeError
from deeplock_kernels.kernels.signatures import RECORDS
from deeplock_kernels.keys import Hidden, MasterKey, key_bytes
from deeplock_kernels.runtime.pool import Call
from deeplock_kernels.runtime.tiers import Kernel
from deeplock_kernels.schedules.base import RCON_ADDRESS, Schedule
from deeplock_kernels.transform import Transform

_PACK = RECORDS["counter"].pack
_PAST_CACHE = 16 << 20  # bytes from which on separate output is better written past the caches


class CounterSchedule(Schedule):
    """Key byte i is byte i mod 16 of AES_key(iv + floor(i / 16)), the counter wrapping mod 2^128.

    Any range costs the same wherever it lies, and known plaintext gives nothing away but its own key bytes. Never use
    one (key, iv) for two different contents: S^-1[c1] XOR S^-1[c2] is then p1 XOR p2. The functions for named tensors
    see to that by a fresh salt for each lock.

    Parameters
    ----------
    key
        16, 24 or 32 bytes, or a MasterKey.
    iv
        16 bytes, the counter's start, big-endian.

    Raises
    ------
    KeyTypeError, KeyFormatError, KeyWipedError
        The key or iv is not bytes, of another length, or wiped.
    """

    name = "counter"

    def __init__(
        self, key: bytes | bytearray | memoryview | MasterKey, iv: bytes | bytearray | memoryview
    ) -> None:
        if not isinstance(iv, (bytes, bytearray, memoryview)):
            raise KeyTypeError(f"iv: got {type(iv).__name__}, accepted are 16 bytes")
        start = Hidden(iv)
        if len(start) != 16:
            raise KeyFormatError(f"iv: got {len(start)} bytes, accepted are 16")
        secret = key_bytes(key)
        super().__init__(len(secret) * 8)
        self._key = ctypes.create_string_buffer(secret + start, len(secret) + 16)
        self.address = ctypes.addressof(self._key)

    def _secrets(self) -> list[ctypes.Array[ctypes.c_char]]:
        return [self._key]

    def in_place(self, transform: Transform, address: int, nbytes: int, offset: int) -> tuple[Kernel, bytes]:
        """Give the one kernel that transforms a few bytes in place, and the record of its arguments."""
        if self._wiped:
            self.ready()
        record = _PACK(address, address, nbytes, offset, self.address, RCON_ADDRESS, transform.box)
        return transform.kernel("counter", self.bits), record

    def calls(
        self, transform: Transform, target: int, source: int, nbytes: int, offset: int, piece: int
    ) -> list[Call]:
        """Plan the kernel calls; see `Schedule.calls`."""
        self.ready()
        if nbytes <= piece and nbytes < _PAST_CACHE:
            arguments = (target, source, nbytes, offset, self.address, RCON_ADDRESS)
            return [transform.call("counter", self.bits, *arguments)]
        operation, head = "counter", 0
        if target != source and nbytes >= _PAST_CACHE and (target - offset) % 16 == 0:
            operation, head = "counter_past_cache", -target % 64
        starts = [0, *range(head, nbytes, piece)] if head else list(range(0, nbytes, piece))
        calls = []
        for start, stop in zip(starts, [*starts[1:], nbytes], strict=True):
            where = (target + start, source + start, stop - start, offset + start)
            which = "counter" if start < head else operation
            calls.append(transform.call(which, self.bits, *where, self.address, RCON_ADDRESS))
        return calls
