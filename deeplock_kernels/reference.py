"""The whole scheme in plain Python: read this file first.

Everything that the package computes is here once more, byte by byte and in the order of the scheme: locking
bytes (Alam, Saha, Mukhopadhyay and Kundu, "Deep-Lock", arXiv 2008.05966), the two key schedules (FIPS 197,
SP 800-38A), the keys of each tensor (RFC 5869, 7914), their seals (SP 800-38D) and the header's MAC (RFC 2104).

It imports nothing of the package and is written to be compared with the standards, so every test trusts it.
It is slow and indexes tables with secrets (it is not constant time): to lock a model, use the package.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import unicodedata
from typing import Any

# ------------------------------------------------------------------------------
# The byte permutation S


def double(x: int) -> int:
    """Multiply by x in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1 = 0x11B (FIPS 197 section 4.2)."""
    return (x << 1) ^ (0x11B if x & 0x80 else 0)


def aes_sbox() -> bytes:
    """Build the AES S-Box from its definition: inversion in GF(2^8), then affine (FIPS 197 section 5.1.1)."""
    powers = [1]  # of 0x03, which generates the multiplicative group: 3^i and 3^(255-i) are inverses
    for _ in range(254):
        powers.append(powers[-1] ^ double(powers[-1]))
    inverse = {0: 0} | {powers[i]: powers[-i % 255] for i in range(255)}

    def affine(b: int) -> int:
        twice = (b << 8) | b  # written twice, so that a shift to the right is a rotation
        return ((b ^ (twice >> 7) ^ (twice >> 6) ^ (twice >> 5) ^ (twice >> 4)) & 0xFF) ^ 0x63

    return bytes(affine(inverse[x]) for x in range(256))


def invert_table(table: bytes) -> bytes:
    """Return the table of S^-1, given the 256 bytes of a permutation S."""
    return bytes(table.index(y) for y in range(256))


AES_SBOX = aes_sbox()

# ------------------------------------------------------------------------------
# Locking bytes (arXiv 2008.05966)


def lock(data: bytes, keystream: bytes, table: bytes = AES_SBOX) -> bytes:
    """Lock plain bytes: c[i] = S[p[i] XOR k[i]]; `keystream` must be as long as `data`."""
    return bytes(table[p ^ k] for p, k in zip(data, keystream, strict=True))


def unlock(locked: bytes, keystream: bytes, table: bytes = AES_SBOX) -> bytes:
    """Unlock locked bytes: p[i] = S^-1[c[i]] XOR k[i]; `table` is S, as it was for `lock`."""
    inverse = invert_table(table)
    return bytes(inverse[c] ^ k for c, k in zip(locked, keystream, strict=True))


def rekey(locked: bytes, old_keystream: bytes, new_keystream: bytes, table: bytes = AES_SBOX) -> bytes:
    """Move locked bytes to another key stream: c2[i] = S[S^-1[c1[i]] XOR k1[i] XOR k2[i]]."""
    inverse = invert_table(table)
    streams = zip(locked, old_keystream, new_keystream, strict=True)
    return bytes(table[inverse[c] ^ old ^ new] for c, old, new in streams)


# ------------------------------------------------------------------------------
# Key schedule "expansion": the AES key expansion (FIPS 197 section 5.2), carried on without end


def sub_word(word: int) -> int:
    """Apply the AES S-Box to each of the four bytes of a word."""
    return int.from_bytes(word.to_bytes(4, "big").translate(AES_SBOX), "big")


def rot_word(word: int) -> int:
    """Turn [a0, a1, a2, a3] into [a1, a2, a3, a0]."""
    return ((word << 8) | (word >> 24)) & 0xFFFFFFFF


def expand_key(key: bytes, words: int) -> list[int]:
    """Return w[0], ..., w[words - 1] of the key expansion, each a big-endian 32-bit integer.

    The standard stops after 44, 52 or 60 words. Here any number may be asked for: Rcon goes on doubling in
    GF(2^8), which repeats every 51 steps.
    """
    if len(key) not in (16, 24, 32):
        raise ValueError(f"key: got {len(key)} bytes, accepted are 16, 24 or 32")
    nk = len(key) // 4
    w = [int.from_bytes(key[4 * i : 4 * i + 4], "big") for i in range(nk)]
    rcon = 0x01
    for i in range(nk, words):
        temp = w[i - 1]
        if i % nk == 0:
            temp = sub_word(rot_word(temp)) ^ (rcon << 24)
            rcon = double(rcon)
        elif nk == 8 and i % nk == 4:
            temp = sub_word(temp)
        w.append(w[i - nk] ^ temp)
    return w[:words]


def expansion_keystream(key: bytes, nbytes: int, offset: int = 0) -> bytes:
    """Return key stream bytes [offset, offset + nbytes) of the schedule "expansion".

    They are the bytes of w[Nk], w[Nk + 1], ...; the master key itself, w[0..Nk-1], never masks anything.

    Do not protect a model with it. The expansion is a public bijection of its own state, so one known block
    at a known place (16, 24 or 32 bytes, such as a bias of zeros) gives back the master key.
    """
    nk = len(key) // 4
    first, skip = divmod(offset, 4)
    words = expand_key(key, nk + (offset + nbytes + 3) // 4)[nk + first :]
    return b"".join(word.to_bytes(4, "big") for word in words)[skip : skip + nbytes]


# ------------------------------------------------------------------------------
# The AES cipher (FIPS 197 section 5.1); a state is a big-endian 128-bit integer, a column a 32-bit word

_EACH_BYTE = 0x01010101_01010101_01010101_01010101
_EACH_WORD = 0x00000001_00000001_00000001_00000001
_SHIFT_ROWS = [(i + 4 * (i % 4)) % 16 for i in range(16)]  # row r comes from r columns further on


def sub_bytes_shift_rows(state: int) -> int:
    """Apply SubBytes (section 5.1.1) and ShiftRows (section 5.1.2)."""
    substituted = state.to_bytes(16, "big").translate(AES_SBOX)
    return int.from_bytes(bytes([substituted[i] for i in _SHIFT_ROWS]), "big")


def mix_columns(state: int) -> int:
    """Apply MixColumns (section 5.1.3): 2 s0 + 3 s1 + s2 + s3, computed as 2 (s0 + s1) + s1 + (s2 + s3)."""
    s1 = ((state & _EACH_WORD * 0xFFFFFF) << 8) | ((state >> 24) & _EACH_WORD * 0xFF)
    s0_s1 = state ^ s1
    s2_s3 = ((s0_s1 & _EACH_WORD * 0xFFFF) << 16) | ((s0_s1 >> 16) & _EACH_WORD * 0xFFFF)
    doubled = ((s0_s1 & _EACH_BYTE * 0x7F) << 1) ^ ((s0_s1 >> 7) & _EACH_BYTE) * 0x1B
    return doubled ^ s1 ^ s2_s3


def round_keys(key: bytes) -> list[int]:
    """Return the 11, 13 or 15 round keys of AES, each a 128-bit integer."""
    rounds = len(key) // 4 + 6
    w = expand_key(key, 4 * (rounds + 1))
    return [(w[i] << 96) | (w[i + 1] << 64) | (w[i + 2] << 32) | w[i + 3] for i in range(0, len(w), 4)]


def encrypt_state(keys: list[int], state: int) -> int:
    """Encrypt one block, given as a 128-bit integer, with the round keys of `round_keys`."""
    state ^= keys[0]
    for round_key in keys[1:-1]:
        state = mix_columns(sub_bytes_shift_rows(state)) ^ round_key
    return sub_bytes_shift_rows(state) ^ keys[-1]


def encrypt_block(key: bytes, block: bytes) -> bytes:
    """Encrypt one block of 16 bytes with AES-128, AES-192 or AES-256 (FIPS 197 section 5.1)."""
    if len(block) != 16:
        raise ValueError(f"block: got {len(block)} bytes, accepted are 16")
    return encrypt_state(round_keys(key), int.from_bytes(block, "big")).to_bytes(16, "big")


# ------------------------------------------------------------------------------
# Key schedule "counter": AES in counter mode (SP 800-38A section 6.5)


def counter_keystream(key: bytes, iv: bytes, nbytes: int, offset: int = 0) -> bytes:
    """Return key stream bytes [offset, offset + nbytes) of the schedule "counter".

    k[i] = AES_key(iv + floor(i / 16))[i mod 16], where the 16 bytes of `iv` are a big-endian integer and the
    sum wraps modulo 2^128. The cost depends on `nbytes` alone.
    """
    if len(iv) != 16:
        raise ValueError(f"iv: got {len(iv)} bytes, accepted are 16")
    keys = round_keys(key)
    block, skip = divmod(offset, 16)
    counter = int.from_bytes(iv, "big") + block
    blocks = (skip + nbytes + 15) // 16
    stream = (encrypt_state(keys, (counter + i) % 2**128).to_bytes(16, "big") for i in range(blocks))
    return b"".join(stream)[skip : skip + nbytes]


# ------------------------------------------------------------------------------
# Locking tensors by name: the keys of one lock, from the master key and the lock's salt


def hkdf_extract(salt: bytes, key_material: bytes) -> bytes:
    """Return the pseudorandom key of HKDF-SHA256 (RFC 5869 section 2.2); no salt means 32 zero bytes."""
    return hmac.digest(salt or bytes(32), key_material, "sha256")


def hkdf_expand(pseudorandom_key: bytes, info: bytes, length: int) -> bytes:
    """Return `length` bytes of output key material of HKDF-SHA256 (RFC 5869 section 2.3)."""
    if length > 255 * 32:
        raise ValueError(f"length: got {length}, accepted is at most {255 * 32}")
    block, output = b"", b""
    for i in range(1, (length + 31) // 32 + 1):
        block = hmac.digest(pseudorandom_key, block + info + bytes([i]), "sha256")
        output += block
    return output[:length]


def hkdf(master: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """Derive `length` bytes from the master key with HKDF-SHA256 (RFC 5869 section 2)."""
    return hkdf_expand(hkdf_extract(salt, master), info, length)


def tensor_key_iv(master: bytes, salt: bytes, schedule: str, sbox: str, name: str) -> tuple[bytes, bytes]:
    """Return (key, iv) of one tensor; the key is as long as the master key, the iv has 16 bytes."""
    info = f"deeplock/v1/tensor/{schedule}/{sbox}\0{name}".encode()
    derived = hkdf(master, salt, info, len(master) + 16)
    return derived[:-16], derived[-16:]


def check_value(master: bytes, salt: bytes) -> bytes:
    """Return the 16 bytes that tell a right key from a wrong one before a byte changes."""
    return hkdf(master, salt, b"deeplock/v1/check", 16)


def seal_key(master: bytes, salt: bytes, name: str) -> bytes:
    """Return the 32-byte key of a tensor's seal."""
    return hkdf(master, salt, f"deeplock/v1/seal\0{name}".encode(), 32)


def header_key(master: bytes, salt: bytes) -> bytes:
    """Return the 32-byte key of the header's MAC."""
    return hkdf(master, salt, b"deeplock/v1/header", 32)


def passphrase_key(passphrase: str, n: int, r: int, p: int, salt: bytes) -> bytes:
    """Return the master key that a passphrase stands for: scrypt (RFC 7914) of its UTF-8 text in NFC."""
    text = unicodedata.normalize("NFC", passphrase).encode()
    return hashlib.scrypt(text, salt=salt, n=n, r=r, p=p, maxmem=2**30, dklen=32)


# ------------------------------------------------------------------------------
# The seal: GMAC (SP 800-38D)


def multiply_blocks(x: int, y: int) -> int:
    """Multiply in GF(2^128) (SP 800-38D section 6.3), where the leftmost bit is the coefficient of x^0."""
    product = 0
    for i in range(127, -1, -1):
        if (x >> i) & 1:
            product ^= y
        y = (y >> 1) ^ (0xE1 << 120 if y & 1 else 0)
    return product


def ghash(hash_key: int, data: bytes) -> int:
    """Return GHASH of whole blocks (SP 800-38D section 6.4)."""
    digest = 0
    for i in range(0, len(data), 16):
        digest = multiply_blocks(digest ^ int.from_bytes(data[i : i + 16], "big"), hash_key)
    return digest


def seal(key: bytes, locked: bytes) -> bytes:
    """Return a tensor's seal: the 16-byte tag of GCM over no plaintext (SP 800-38D section 7.1).

    The locked bytes are the associated data, `key` is the tensor's seal key and the nonce is 12 zero bytes:
    a salt, and so a seal key, never serves two contents.
    """
    keys = round_keys(key)
    lengths = (8 * len(locked)).to_bytes(8, "big") + bytes(8)
    digest = ghash(encrypt_state(keys, 0), locked + bytes(-len(locked) % 16) + lengths)
    first_counter_block = 1  # nonce || 00000001
    return (digest ^ encrypt_state(keys, first_counter_block)).to_bytes(16, "big")


# ------------------------------------------------------------------------------
# The header


def canonical_json(value: Any) -> bytes:
    """Return the one spelling of a JSON value: keys in code point order, no spaces, non-ASCII unescaped."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def header_mac(key: bytes, header: dict[str, Any], file: dict[str, Any] | None = None) -> bytes:
    """Return the 32 bytes of HMAC-SHA256 over the header, or over the header and the file's own JSON header.

    The header's "mac" and the file's ["__metadata__"]["deeplock"] (where the lock header itself is kept) are
    left out if they are there; nothing else is, so a "__metadata__" that held nothing else counts as {}.
    """
    body: dict[str, Any] = {field: value for field, value in header.items() if field != "mac"}
    if file is not None:
        file = dict(file)
        if "__metadata__" in file:
            file["__metadata__"] = {k: v for k, v in file["__metadata__"].items() if k != "deeplock"}
        body = {"header": body, "file": file}
    return hmac.new(key, canonical_json(body), hashlib.sha256).digest()
