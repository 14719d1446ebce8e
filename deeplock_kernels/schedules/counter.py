"""The counter schedule, the default: AES in counter mode (SP 800-38A section 6.5)."""

from __future__ import annotations

import ctypes

from deeplock_kernels.errors import KeyFormatError, KeyTypeError
from deeplock_kernels.keys import MasterKey, key_bytes
from deeplock_kernels.runtime.pool import Call
from deeplock_kernels.schedules.base import Schedule
from deeplock_kernels.schedules.expansion import round_key_bytes
from deeplock_kernels.transform import Transform


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
        secret = key_bytes(key)
        if not isinstance(iv, (bytes, bytearray, memoryview)):
            raise KeyTypeError(f"iv: got {type(iv).__name__}, accepted are 16 bytes")
        start = bytes(iv)
        if len(start) != 16:
            raise KeyFormatError(f"iv: got {len(start)} bytes, accepted are 16")
        super().__init__(len(secret) * 8)
        cipher = round_key_bytes(secret) + start
        self._cipher = ctypes.create_string_buffer(cipher, len(cipher))
        self._address = ctypes.addressof(self._cipher)

    def _secrets(self) -> list[ctypes.Array[ctypes.c_char]]:
        return [self._cipher]

    def calls(
        self, transform: Transform, target: int, source: int, nbytes: int, offset: int, piece: int
    ) -> list[Call]:
        """Plan the kernel calls; see `Schedule.calls`."""
        self.ready()
        function = transform.kernel("counter", self.bits)
        return [
            Call(
                function,
                (target + i, source + i, min(piece, nbytes - i), offset + i, self._address, transform.box),
            )
            for i in range(0, nbytes, piece)
        ]
