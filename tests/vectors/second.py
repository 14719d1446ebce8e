"""The scheme written a second time, on OpenSSL: what the vectors are made and checked with.

It follows the description of the scheme and shares no code with the package or its oracle, and takes other ways where
there are any: the S-Box by powers in the field, the key expansion a round at a time on one large number, the counter
mode, HKDF and GMAC of OpenSSL.
"""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


def _times(a: int, b: int) -> int:
    product = 0
    while b:
        if b & 1:
            product ^= a
        a = a << 1 ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


def _aes_sbox() -> bytes:
    table = bytearray()
    for x in range(256):
        inverse = 1
        for _ in range(254):
            inverse = _times(inverse, x)
        bits = [inverse >> i & 1 for i in range(8)]
        mixed = [sum(bits[(i + k) % 8] for k in (0, 4, 5, 6, 7)) + (0x63 >> i & 1) for i in range(8)]
        table.append(sum((bit & 1) << i for i, bit in enumerate(mixed)))
    return bytes(table)


AES_SBOX = _aes_sbox()


def inverse_of(table: bytes) -> bytes:
    return bytes(sorted(range(256), key=table.__getitem__))


def exclusive_or(a: bytes, b: bytes) -> bytes:
    if len(a) != len(b):
        raise ValueError(f"b: got {len(b)} bytes, accepted are {len(a)}")
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).to_bytes(len(a), "little")


def lock(plain: bytes, stream: bytes, table: bytes) -> bytes:
    return exclusive_or(plain, stream).translate(table)


def unlock(locked: bytes, stream: bytes, table: bytes) -> bytes:
    return exclusive_or(locked.translate(inverse_of(table)), stream)


def rekey(locked: bytes, old: bytes, new: bytes, table: bytes) -> bytes:
    """Give what a lock with the new key stream gives of what the old one locked."""
    return lock(unlock(locked, old, table), new, table)


def expansion_stream(key: bytes, nbytes: int) -> bytes:
    """Give the key stream of the schedule "expansion" from its start: the key expansion behind the key itself."""
    length = len(key)
    half = 16 if length == 32 else length  # of 32 bytes each half has a substitution of its own
    ones = sum(1 << 32 * i for i in range(half // 4))

    def substituted(word: int) -> int:
        return int.from_bytes(word.to_bytes(4, "big").translate(AES_SBOX), "big")

    def round_of(part: int, addend: int) -> int:
        for shift in (32, 64, 128):  # each word becomes the sum of those up to it
            part ^= part >> shift
        return part ^ addend * ones

    parts = [int.from_bytes(key[i : i + half], "big") for i in range(0, length, half)]
    stream, doubling = bytearray(), 1
    while len(stream) < nbytes:
        last = parts[-1] & 0xFFFFFFFF
        turned = (last << 8 | last >> 24) & 0xFFFFFFFF
        parts[0] = round_of(parts[0], substituted(turned) ^ doubling << 24)
        if len(parts) == 2:
            parts[1] = round_of(parts[1], substituted(parts[0] & 0xFFFFFFFF))
        doubling = _times(doubling, 2)
        for part in parts:
            stream += part.to_bytes(half, "big")
    return bytes(stream[:nbytes])


def counter_stream(key: bytes, iv: bytes, nbytes: int, offset: int = 0) -> bytes:
    """Give `nbytes` of the key stream of the schedule "counter"."""
    block, skip = divmod(offset, 16)
    start = (int.from_bytes(iv, "big") + block) % 2**128
    encryptor = Cipher(algorithms.AES(key), modes.CTR(start.to_bytes(16, "big"))).encryptor()
    return encryptor.update(bytes(skip + nbytes))[skip:]


def derived(master: bytes, salt: bytes, info: str, length: int) -> bytes:
    return HKDF(hashes.SHA256(), length, salt, info.encode()).derive(master)


def seal(master: bytes, salt: bytes, name: str, locked: bytes) -> bytes:
    """Give the seal of a tensor's locked bytes."""
    return AESGCM(derived(master, salt, f"deeplock/v1/seal\0{name}", 32)).encrypt(bytes(12), b"", locked)
