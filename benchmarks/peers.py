"""What users could call instead of this package, each used as its own documentation shows.

All of them work in one thread. Ciphers with authentication do more than locking does; they are here because
they are what a user would pick, and the tables say so.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

from benchmarks.rounds import Work
from benchmarks.workspace import Spot
from deeplock_kernels.sboxes import AES

_KEY, _LONG_KEY = bytes(range(16)), bytes(range(32))
_CHUNK = 1 << 30  # cryptography takes less than 2^31 bytes at once
_TAG = 16


class Peer(NamedTuple):
    """Another way to encrypt or mask a buffer.

    Attributes
    ----------
    name
        What tables and charts call it.
    distribution
        The name of its package in the index.
    does
        What it does to the data, in a few words.
    prepare
        Gives the work for a place; raises ImportError where the package is not installed.
    memory
        How many times the size of the data it takes at most, the data included.
    """

    name: str
    distribution: str
    does: str
    prepare: Callable[[Spot], Work]
    memory: int = 1

    @property
    def version(self) -> str | None:
        """The installed version, or None."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None


def _view(data: Any) -> memoryview:
    return memoryview(data)


def _numpy(spot: Spot) -> Work:
    data, keys = spot.data, spot.out  # any bytes will do for a key stream, and these cost nothing to make
    table = np.frombuffer(AES.table, np.uint8)
    return lambda: table[data ^ keys]


def _cryptography_counter(spot: Spot) -> Work:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    view = _view(spot.data)

    def encrypt() -> None:
        encryptor = Cipher(algorithms.AES(_KEY), modes.CTR(bytes(16))).encryptor()
        for start in range(0, len(view), _CHUNK):
            part = view[start : start + _CHUNK]
            encryptor.update_into(part, part)

    return encrypt


def _cryptography_galois_counter(spot: Spot) -> Work:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cipher, view, nbytes = AESGCM(_KEY), _view(spot.room), len(spot.data)

    def encrypt() -> None:
        # Each chunk is followed by its tag, and has a nonce of its own.
        for number, start in enumerate(range(0, nbytes, _CHUNK)):
            length, place = min(_CHUNK, nbytes - start), start + number * _TAG
            nonce = number.to_bytes(12, "big")
            cipher.encrypt_into(
                nonce, view[place : place + length], None, view[place : place + length + _TAG]
            )

    return encrypt


def _pyaegis(spot: Spot) -> Work:
    from pyaegis import Aegis128X4

    cipher, view = Aegis128X4(), _view(spot.data)
    return lambda: cipher.encrypt_inplace(_KEY, bytes(16), view)


def _pynacl(spot: Spot) -> Work:
    from nacl.secret import SecretBox

    box, data = SecretBox(_LONG_KEY), spot.data
    return lambda: box.encrypt(data.tobytes(), bytes(SecretBox.NONCE_SIZE))  # it takes bytes and nothing else


def _pycryptodome(spot: Spot) -> Work:
    from Crypto.Cipher import AES as cipher  # noqa: N811 - a module, whatever its name looks like

    view = _view(spot.data)

    def encrypt() -> None:
        cipher.new(_KEY, cipher.MODE_CTR, nonce=b"", initial_value=bytes(16)).encrypt(view, output=view)

    return encrypt


PEERS = (
    Peer("NumPy S[x ^ k]", "numpy", "table look-up, the key stream is there already", _numpy, memory=5),
    Peer("cryptography AES-CTR", "cryptography", "AES-128-CTR, in place", _cryptography_counter),
    Peer(
        "cryptography AES-GCM", "cryptography", "AES-128-GCM with tag, in place", _cryptography_galois_counter
    ),
    Peer("pyaegis AEGIS-128X4", "pyaegis", "AEGIS-128X4 with tag, in place", _pyaegis),
    Peer("PyNaCl SecretBox", "pynacl", "XSalsa20-Poly1305 with tag, into new bytes", _pynacl, memory=6),
    Peer("PyCryptodome AES-CTR", "pycryptodome", "AES-128-CTR, in place", _pycryptodome),
)
