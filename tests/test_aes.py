"""AES, on which the counter schedule rests: NIST's known answers, block by block, on every tier."""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from support import BITS, with_integers

from deeplock_kernels import CounterSchedule, reference
from deeplock_kernels.kernels.signatures import RCON_START, RCON_WORDS, KernelName

AESAVS = json.loads((Path(__file__).parent / "vectors" / "aesavs.json").read_text(encoding="utf-8"))
SP_800_38A_PLAIN = (
    "6bc1bee22e409f96e93d7e117393172a",
    "ae2d8a571e03ac9c9eb76fac45af8e51",
    "30c81c46a35ce411e5fbc1191a0a52ef",
    "f69f2445df4f9b17ad2b417be66c3710",
)
SP_800_38A = {  # appendices F.1.1, F.1.3 and F.1.5
    "2b7e151628aed2a6abf7158809cf4f3c": (
        "3ad77bb40d7a3660a89ecaf32466ef97",
        "f5d3d58503b9699de785895a96fdbaaf",
        "43b1cd7f598ece23881b00e3ed030688",
        "7b0c785e27e8ad3f8223207104725dd4",
    ),
    "8e73b0f7da0e6452c810f32b809079e562f8ead2522c6b7b": (
        "bd334f1d6e45f25ff712a214571fa5cc",
        "974104846d0ad3ad7734ecb3ecee4eef",
        "ef7afd2270e2e60adce0ba2face6444e",
        "9a4b41ba738d6c72fb16691603c18e0e",
    ),
    "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4": (
        "f3eed1bdb5d2a03c064b5a7e3db181f8",
        "591ccb10d410ed26dc5ba74a31362870",
        "b6ed21b99ca6f4f9f153e7b1beafed1d",
        "23304b7a39f9f3ff067d8d8f9e24ecc7",
    ),
}


def leading_ones(count, bits):
    return ((1 << bits) - (1 << (bits - count))).to_bytes(bits // 8, "big")


def var_key(bits):
    """List (key, plain): keys of 1, 2, ... leading ones."""
    return [(leading_ones(count, bits), bytes(16)) for count in range(1, bits + 1)]


def var_txt(bits):
    """List (key, plain): blocks of 1, 2, ... leading ones."""
    return [(bytes(bits // 8), leading_ones(count, 128)) for count in range(1, 129)]


def gfsbox(bits):
    """List (key, plain): blocks that together look up every value of the S-Box in the rounds of the cipher."""
    return [(bytes(bits // 8), bytes.fromhex(plain)) for plain, _ in AESAVS["gfsbox"][str(bits)]]


def keysbox(bits):
    """List (key, plain): keys that together look up its values (of 256 bits: all but two) in the key expansion."""
    return [(bytes.fromhex(key), bytes(16)) for key, _ in AESAVS["keysbox"][str(bits)]]


INPUTS = {"VarKey": var_key, "VarTxt": var_txt, "GFSbox": gfsbox, "KeySbox": keysbox}


def blocks(text):
    """Cut hexadecimal digits into blocks of 16 bytes."""
    return [text[i : i + 32] for i in range(0, len(text), 32)]


# What NIST publishes: all of GFSbox, KeySbox and MMT, the ends of the others, and the examples of the standards.
PUBLISHED = [
    *((bytes(16), bytes.fromhex(plain), cipher) for plain, cipher in AESAVS["gfsbox"]["128"]),
    *((bytes(24), bytes.fromhex(plain), cipher) for plain, cipher in AESAVS["gfsbox"]["192"]),
    *((bytes(32), bytes.fromhex(plain), cipher) for plain, cipher in AESAVS["gfsbox"]["256"]),
    *((bytes.fromhex(key), bytes(16), cipher) for bits in AESAVS["keysbox"].values() for key, cipher in bits),
    *(
        (bytes.fromhex(key), bytes.fromhex(plain), cipher)
        for bits in AESAVS["mmt"].values()
        for key, plains, ciphers in bits
        for plain, cipher in zip(blocks(plains), blocks(ciphers), strict=True)
    ),
    *(
        (bytes.fromhex(key), bytes.fromhex(plain), cipher)
        for key, ciphers in SP_800_38A.items()
        for plain, cipher in zip(SP_800_38A_PLAIN, ciphers, strict=True)
    ),
    *(
        (bytes(range(size)), bytes.fromhex("00112233445566778899aabbccddeeff"), cipher)
        for size, cipher in (  # FIPS 197, appendices C.1 to C.3
            (16, "69c4e0d86a7b0430d8cdb78070b4c55a"),
            (24, "dda97ca4864cdfe06eaf70a0ec0d7191"),
            (32, "8ea2b7ca516745bfeafc49904b496089"),
        )
    ),
    (leading_ones(1, 128), bytes(16), "0edd33d3c621e546455bd8ba1418bec8"),
    (leading_ones(128, 128), bytes(16), "a1f6258c877d5fcd8964484538bfc92c"),
    (bytes(16), leading_ones(1, 128), "3ad78e726c1ec02b7ebfe92b23d9ec34"),
    (bytes(16), leading_ones(128, 128), "3f5b8cc9ea855a0afa7347d23e8d664e"),
]


def openssl(key, plain):
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(plain)


def encrypted(key, plain):
    """Encrypt one block: the start of the key stream of the counter schedule, whose counter is `plain` there."""
    with CounterSchedule(key, plain) as schedule:
        return schedule.keystream(16).tobytes()


def test_the_known_answers_are_as_many_as_nist_gives():
    counts = {kind: [len(inputs(bits)) for bits in BITS] for kind, inputs in INPUTS.items()}
    assert counts == {
        "VarKey": [128, 192, 256],
        "VarTxt": [128, 128, 128],
        "GFSbox": [7, 6, 5],
        "KeySbox": [21, 24, 16],
    }
    assert [[len(blocks(plain)) for _, plain, _ in AESAVS["mmt"][str(bits)]] for bits in BITS] == 3 * [[*range(1, 11)]]
    pairs = [pair for inputs, bits in itertools.product(INPUTS.values(), BITS) for pair in inputs(bits)]
    assert len(set(pairs)) == len(pairs)
    assert leading_ones(9, 128).hex() == "ff80" + 28 * "0"


def test_published_answers(tier):
    for key, plain, cipher in PUBLISHED:
        assert encrypted(key, plain).hex() == cipher


def test_published_answers_of_the_oracle_and_openssl():
    for key, plain, cipher in PUBLISHED:
        assert reference.encrypt_block(key, plain).hex() == openssl(key, plain).hex() == cipher


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", INPUTS)
def test_known_answers_of_aesavs(tier, kind, bits):
    for key, plain in INPUTS[kind](bits):
        assert encrypted(key, plain) == openssl(key, plain)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", INPUTS)
def test_known_answers_in_every_place_of_a_wide_register(tier, kind, bits):
    """Many blocks are encrypted at once: those on both sides of the known answer run along with it."""
    places = itertools.cycle(range(37))
    for (key, plain), place in zip(INPUTS[kind](bits), places, strict=False):
        first = (int.from_bytes(plain, "big") - place) % 2**128
        counters = b"".join(((first + i) % 2**128).to_bytes(16, "big") for i in range(40))
        with CounterSchedule(key, counters[:16]) as schedule:
            assert schedule.keystream(640).tobytes() == openssl(key, counters)


# The Monte Carlo test: 100 times, 1000 blocks each of which is the cipher of the one before, and then another key.
# Of NIST's answers here are the start and the cipher block of one of the 100 rounds.
MONTE_CARLO = {
    128: (
        "139a35422f1d61de3c91787fe0507afd",
        "b9145a768b7dc489a096b546f43b231f",
        (0, "d7c3ffac9031238650901e157364c386"),
    ),
    192: (
        "b9a63e09e1dfc42e93a90d9bad739e5967aef672eedd5da9",
        "85a1f7a58167b389cddc8a9ff175ee26",
        (99, "5d1196da8f184975e240949a25104554"),
    ),
    256: (
        "f9e8389f5b80712e3886cc1fa2d28a3b8c9cd88a2d4a54c6aa86ce0fef944be0",
        "b379777f9050e2a818f2940cbbd9aba4",
        (0, "6893ebaf0a1fccc704326529fdfb60db"),
    ),
}


def monte_carlo(bits, thousand):
    """Give the cipher block of each round; `thousand(key, block)` gives the last two of its blocks."""
    key, block = (bytes.fromhex(text) for text in MONTE_CARLO[bits][:2])
    ciphers = []
    for _ in range(100):
        before, block = thousand(key, block)
        ciphers.append(block.hex())
        key = bytes(a ^ b for a, b in zip(key, (before + block)[-len(key) :], strict=True))
    return ciphers


@functools.cache
def monte_carlo_of_openssl(bits):
    def thousand(key, block):
        encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
        for _ in range(1000):
            before, block = block, encryptor.update(block)
        return before, block

    return monte_carlo(bits, thousand)


@pytest.mark.parametrize("bits", BITS)
def test_monte_carlo_of_openssl_gives_what_is_published(bits):
    number, cipher = MONTE_CARLO[bits][2]
    assert monte_carlo_of_openssl(bits)[number] == cipher


@pytest.mark.parametrize("bits", BITS)
def test_monte_carlo(tier, bits):
    """Each block is the key stream's first, made of zeros, from a counter that is the block before."""
    kernel = with_integers(tier, KernelName("counter", bits, "identity", "lock"))
    rcon, zeros = ctypes.create_string_buffer(RCON_WORDS), ctypes.create_string_buffer(16)
    memory, cipher = ctypes.create_string_buffer(bits // 8 + 16), ctypes.create_string_buffer(16)
    start = ctypes.addressof(memory) + bits // 8
    arguments = (16, 0, ctypes.addressof(memory), ctypes.addressof(rcon) + RCON_START, 0)

    def thousand(key, block):
        memory[:] = key + block
        for _ in range(1000):
            before = memory[bits // 8 :]
            kernel(ctypes.addressof(cipher), ctypes.addressof(zeros), *arguments)
            ctypes.memmove(start, cipher, 16)
        return before, cipher.raw

    assert monte_carlo(bits, thousand) == monte_carlo_of_openssl(bits)
