"""AES, on which the counter schedule rests: NIST's known answers, block by block, on every tier."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from support import BITS

from deeplock_kernels import CounterSchedule, reference

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

# What NIST publishes: all of GFSbox and KeySbox, the ends of the others, and the examples of the standards.
PUBLISHED = [
    *((bytes(16), bytes.fromhex(plain), cipher) for plain, cipher in AESAVS["gfsbox"]["128"]),
    *((bytes(24), bytes.fromhex(plain), cipher) for plain, cipher in AESAVS["gfsbox"]["192"]),
    *((bytes(32), bytes.fromhex(plain), cipher) for plain, cipher in AESAVS["gfsbox"]["256"]),
    *((bytes.fromhex(key), bytes(16), cipher) for bits in AESAVS["keysbox"].values() for key, cipher in bits),
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
