"""The oracle against the standards' own known answers, the checked-in vectors and OpenSSL."""

from __future__ import annotations

import ast
import hashlib
import json
import random
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from deeplock_kernels import reference

VECTORS = json.loads((Path(__file__).parent / "vectors" / "scheme_v1.json").read_text(encoding="utf-8"))

KEY_128 = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
KEY_192 = bytes.fromhex("8e73b0f7da0e6452c810f32b809079e562f8ead2522c6b7b")
KEY_256 = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
KEYS = [KEY_128, KEY_192, KEY_256]


def plain_bytes(case):
    return bytes((case["plain_start"] + i) % 251 for i in range(case["plain_length"]))


def openssl_counter(key, counter, nbytes):
    encryptor = Cipher(algorithms.AES(key), modes.CTR((counter % 2**128).to_bytes(16, "big"))).encryptor()
    return encryptor.update(bytes(nbytes))


def case_name(case):
    key = case.get("key", case.get("master"))
    shown = [case.get("schedule", ""), f"{4 * len(key)}-bit", case.get("name", "")[:12]]
    return "-".join([part for part in shown if part] + [str(case.get("offset", ""))])


# The file itself


def test_oracle_is_short_and_stands_alone():
    source = Path(reference.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import is an import of the package"
            imported.add(node.module)
    assert imported == {"__future__", "hashlib", "hmac", "json", "typing", "unicodedata"}


# The AES S-Box and the bytes


def test_aes_sbox_is_the_table_of_fips_197():
    # FIPS 197 figure 7: the example of section 5.1.1, first and last row
    assert reference.AES_SBOX[0x53] == 0xED
    assert reference.AES_SBOX[:16].hex() == "637c777bf26b6fc53001672bfed7ab76"
    assert reference.AES_SBOX[-16:].hex() == "8ca1890dbfe6426841992d0fb054bb16"
    digest = hashlib.sha256(reference.AES_SBOX).hexdigest()
    assert digest == "c2d8e5eed6cbebd8625fc18f81486a7733c04f9b0129ffbe974c68b90308b4f2"


def test_invert_table():
    inverse = reference.invert_table(reference.AES_SBOX)
    assert inverse[:4].hex() == "52096ad5"  # FIPS 197 figure 14
    assert bytes(inverse[y] for y in reference.AES_SBOX) == bytes(range(256))
    with pytest.raises(ValueError, match="not found"):
        reference.invert_table(bytes(256))


def test_lock_unlock_and_rekey_follow_their_equations():
    shuffled = random.Random(1)
    table = bytes(shuffled.sample(range(256), 256))
    plain, first, second = (shuffled.randbytes(1000) for _ in range(3))
    locked = reference.lock(plain, first, table)
    assert all(c == table[p ^ k] for c, p, k in zip(locked, plain, first, strict=True))
    assert reference.unlock(locked, first, table) == plain
    assert reference.rekey(locked, first, second, table) == reference.lock(plain, second, table)
    assert reference.lock(plain, first) == reference.lock(plain, first, reference.AES_SBOX) != locked


@pytest.mark.parametrize("operation", [reference.lock, reference.unlock])
def test_a_key_stream_of_another_length_is_refused(operation):
    with pytest.raises(ValueError, match="shorter"):
        operation(bytes(5), bytes(4))


# Schedule "expansion"


@pytest.mark.parametrize(
    ("key", "first", "words", "after_the_key", "last"),
    [
        (KEY_128, 4, 44, "a0fafe1788542cb123a339392a6c7605", "d014f9a8c9ee2589e13f0cc8b6630ca6"),
        (KEY_192, 6, 52, "fe0c91f72402f5a5ec12068e6c827f6b", "e98ba06f448c773c8ecc720401002202"),
        (KEY_256, 8, 60, "9ba354118e6925afa51a8b5f2067fcde", "fe4890d1e6188d0b046df344706c631e"),
    ],
    ids=["A.1", "A.2", "A.3"],
)
def test_key_expansion_of_fips_197_appendix_a(key, first, words, after_the_key, last):
    w = b"".join(word.to_bytes(4, "big") for word in reference.expand_key(key, words))
    assert len(w) == 4 * words
    assert w.startswith(key)
    assert w[4 * first :].startswith(bytes.fromhex(after_the_key))
    assert w.endswith(bytes.fromhex(last))


# The last round keys of AES for keys of zeros and of ones, as they stand in RustCrypto's tests of its key expansion.
LAST_ROUND_KEYS = {
    (16, 0x00): "b4ef5bcb3e92e21123e951cf6f8f188e",
    (16, 0xFF): "d60a3588e472f07b82d2d7858cd7c326",
    (24, 0x00): "432ac886d834c0b6d2c7df11984c5970",
    (24, 0xFF): "598e482fffaee3643a989acd1330b418",
    (32, 0x00): "10f80a1753bf729c45c979e7cb706385",
    (32, 0xFF): "546d424f27de1e8088402b5b4dae355e",
}


@pytest.mark.parametrize(("size", "byte"), LAST_ROUND_KEYS)
def test_key_expansion_of_zeros_and_of_ones(size, byte):
    words = 4 * (size // 4 + 7)
    last = b"".join(word.to_bytes(4, "big") for word in reference.expand_key(bytes([byte]) * size, words)[-4:])
    assert last.hex() == LAST_ROUND_KEYS[size, byte]


def test_key_expansion_of_fips_197_a3_words_12_to_15():
    w = reference.expand_key(KEY_256, 16)
    assert w[12:] == [0xA8B09C1A, 0x93D194CD, 0xBE49846E, 0xB75D5B9A]


@pytest.mark.parametrize("key", KEYS, ids=["128", "192", "256"])
def test_rcon_goes_on_doubling_and_repeats_every_51_rounds(key):
    nk = len(key) // 4
    w = reference.expand_key(key, nk * 120)
    rcon = [
        w[i] ^ w[i - nk] ^ reference.sub_word(reference.rot_word(w[i - 1])) for i in range(nk, len(w), nk)
    ]
    assert [r >> 24 for r in rcon[:14]] == [1, 2, 4, 8, 16, 32, 64, 128, 0x1B, 0x36, 0x6C, 0xD8, 0xAB, 0x4D]
    assert all(r & 0xFFFFFF == 0 for r in rcon)
    assert rcon[51:] == rcon[:-51]


@pytest.mark.parametrize("case", VECTORS["expansion"], ids=case_name)
def test_expansion_key_stream_vector(case):
    key = bytes.fromhex(case["key"])
    if "length" in case:
        stream = reference.expansion_keystream(key, case["length"], case["offset"])
        assert len(stream) == case["length"]
        assert hashlib.sha256(stream).hexdigest() == case["stream_sha256"]
    else:
        expected = bytes.fromhex(case["stream"])
        assert reference.expansion_keystream(key, len(expected), case["offset"]) == expected


def expand_backwards(key_block, index):
    """Undo the expansion: from w[index..index+Nk-1] to w[0..Nk-1]."""
    nk = len(key_block) // 4
    w = {index + i: int.from_bytes(key_block[4 * i : 4 * i + 4], "big") for i in range(nk)}
    rcon = [0, 1]
    while len(rcon) <= (index + nk) // nk:
        rcon.append(reference.double(rcon[-1]))
    for i in range(index + nk - 1, nk - 1, -1):
        temp = w[i - 1]
        if i % nk == 0:
            temp = reference.sub_word(reference.rot_word(temp)) ^ (rcon[i // nk] << 24)
        elif nk == 8 and i % nk == 4:
            temp = reference.sub_word(temp)
        w[i - nk] = w[i] ^ temp
    return b"".join(w[i].to_bytes(4, "big") for i in range(nk))


@pytest.mark.parametrize("key", KEYS, ids=["128", "192", "256"])
@pytest.mark.parametrize("word", [0, 1, 777, 16384])
def test_one_known_block_of_the_expansion_gives_back_the_master_key(key, word):
    """The weakness that the schedule's documentation states: zeros in a model are a known plain text."""
    zeros = bytes(len(key))
    locked = reference.lock(zeros, reference.expansion_keystream(key, len(key), 4 * word))
    known_stream = locked.translate(reference.invert_table(reference.AES_SBOX))
    assert expand_backwards(known_stream, len(key) // 4 + word) == key


# The AES cipher


@pytest.mark.parametrize(
    ("key", "plain", "cipher"),
    [
        (KEY_128, "3243f6a8885a308d313198a2e0370734", "3925841d02dc09fbdc118597196a0b32"),
        (bytes(range(16)), "00112233445566778899aabbccddeeff", "69c4e0d86a7b0430d8cdb78070b4c55a"),
        (bytes(range(24)), "00112233445566778899aabbccddeeff", "dda97ca4864cdfe06eaf70a0ec0d7191"),
        (bytes(range(32)), "00112233445566778899aabbccddeeff", "8ea2b7ca516745bfeafc49904b496089"),
    ],
    ids=["B", "C.1", "C.2", "C.3"],
)
def test_cipher_examples_of_fips_197(key, plain, cipher):
    assert reference.encrypt_block(key, bytes.fromhex(plain)).hex() == cipher


def test_first_round_of_fips_197_appendix_b_step_by_step():
    start = 0x193DE3BEA0F4E22B9AC68D2AE9F84808
    after_shift_rows = 0xD4BF5D30E0B452AEB84111F11E2798E5
    after_mix_columns = 0x046681E5E0CB199A48F8D37A2806264C
    assert reference.sub_bytes_shift_rows(start) == after_shift_rows
    assert reference.mix_columns(after_shift_rows) == after_mix_columns


@pytest.mark.parametrize("size", [16, 24, 32])
def test_cipher_equals_openssl_on_random_blocks(size):
    values = random.Random(size)
    for _ in range(50):
        key, block = values.randbytes(size), values.randbytes(16)
        encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
        assert reference.encrypt_block(key, block) == encryptor.update(block)


@pytest.mark.parametrize("size", [0, 1, 15, 17, 20, 31, 33])
def test_wrong_key_and_block_lengths_are_refused(size):
    with pytest.raises(ValueError, match=r"^key: got"):
        reference.expand_key(bytes(size), 44)
    with pytest.raises(ValueError, match=r"^block: got"):
        reference.encrypt_block(bytes(16), bytes(size))
    with pytest.raises(ValueError, match=r"^iv: got"):
        reference.counter_keystream(bytes(16), bytes(size), 16)


# Schedule "counter"

SP_800_38A_PLAIN = (
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)


@pytest.mark.parametrize(
    ("key", "cipher"),
    [
        (
            KEY_128,
            "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff"
            "5ae4df3edbd5d35e5b4f09020db03eab1e031dda2fbe03d1792170a0f3009cee",
        ),
        (
            KEY_192,
            "1abc932417521ca24f2b0459fe7e6e0b090339ec0aa6faefd5ccc2c6f4ce8e94"
            "1e36b26bd1ebc670d1bd1d665620abf74f78a7f6d29809585a97daec58c6b050",
        ),
        (
            KEY_256,
            "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
            "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6",
        ),
    ],
    ids=["F.5.1", "F.5.3", "F.5.5"],
)
def test_counter_mode_examples_of_sp_800_38a(key, cipher):
    iv = bytes(range(0xF0, 0x100))
    stream = reference.counter_keystream(key, iv, 64)
    plain = bytes.fromhex(SP_800_38A_PLAIN)
    assert bytes(p ^ k for p, k in zip(plain, stream, strict=True)).hex() == cipher


def test_counter_mode_example_of_rfc_3686():
    key = bytes.fromhex("ae6852f8121067cc4bf7a5765577f39e")
    counter_block = bytes.fromhex("00000030" + "0000000000000000" + "00000001")
    stream = reference.counter_keystream(key, counter_block, 16)
    cipher = bytes(p ^ k for p, k in zip(b"Single block msg", stream, strict=True))
    assert cipher.hex() == "e4095d4fb7a7b3792d6175a3261311b8"


@pytest.mark.parametrize("case", VECTORS["counter"], ids=case_name)
def test_counter_key_stream_vector(case):
    expected = bytes.fromhex(case["stream"])
    key, iv = bytes.fromhex(case["key"]), bytes.fromhex(case["iv"])
    assert reference.counter_keystream(key, iv, len(expected), case["offset"]) == expected


@pytest.mark.parametrize("key", KEYS, ids=["128", "192", "256"])
@pytest.mark.parametrize("wrap", [2**32, 2**64, 2**128], ids=["2^32", "2^64", "2^128"])
@pytest.mark.parametrize("offset", [0, 1, 16, 33, 2**32 - 5, 2**36 + 7, 2**63 - 3])
def test_counter_key_stream_equals_openssl_across_wraps(key, wrap, offset):
    block, skip = divmod(offset, 16)
    for blocks_before in (0, 1, 2, 3):
        start = (wrap - blocks_before - block) % 2**128  # the counter passes `wrap` soon after `offset`
        stream = reference.counter_keystream(key, start.to_bytes(16, "big"), 100, offset)
        assert stream == openssl_counter(key, start + block, skip + 100)[skip:]


def test_key_streams_can_be_cut_anywhere():
    iv = bytes(range(16))
    whole = reference.counter_keystream(KEY_192, iv, 200)
    expanded = reference.expansion_keystream(KEY_192, 200)
    for offset in range(40):
        for nbytes in (0, 1, 3, 16, 17, 33):
            part = slice(offset, offset + nbytes)
            assert reference.counter_keystream(KEY_192, iv, nbytes, offset) == whole[part]
            assert reference.expansion_keystream(KEY_192, nbytes, offset) == expanded[part]


# Locking


@pytest.mark.parametrize("case", VECTORS["lock"], ids=case_name)
def test_lock_vector(case):
    key, plain = bytes.fromhex(case["key"]), plain_bytes(case)
    if case["schedule"] == "counter":
        stream = reference.counter_keystream(key, bytes.fromhex(case["iv"]), len(plain), case["offset"])
    else:
        stream = reference.expansion_keystream(key, len(plain), case["offset"])
    assert case["sbox"] == "aes"
    locked = reference.lock(plain, stream, reference.AES_SBOX)
    assert locked.hex() == case["locked"]
    assert reference.unlock(locked, stream, reference.AES_SBOX) == plain


# Keys of a lock


@pytest.mark.parametrize(
    ("key_material", "salt", "info", "extracted", "expanded"),
    [
        (
            bytes([0x0B] * 22),
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(80)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            "06a6b88c5853361a06104c9ceb35b45cef760014904671014a193f40c15fc244",
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (
            bytes([0x0B] * 22),
            b"",
            b"",
            "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
    ids=["A.1", "A.2", "A.3"],
)
def test_hkdf_examples_of_rfc_5869(key_material, salt, info, extracted, expanded):
    pseudorandom_key = reference.hkdf_extract(salt, key_material)
    assert pseudorandom_key.hex() == extracted
    length = len(expanded) // 2
    assert reference.hkdf_expand(pseudorandom_key, info, length).hex() == expanded
    assert reference.hkdf(key_material, salt, info, length).hex() == expanded


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 255 * 32])
def test_hkdf_equals_openssl(length):
    expected = HKDF(hashes.SHA256(), length, b"some salt", b"some info").derive(KEY_256)
    assert reference.hkdf(KEY_256, b"some salt", b"some info", length) == expected


def test_hkdf_refuses_more_than_255_blocks():
    with pytest.raises(ValueError, match=r"^length: got 8161"):
        reference.hkdf_expand(bytes(32), b"", 255 * 32 + 1)


@pytest.mark.parametrize("case", VECTORS["tensors"], ids=case_name)
def test_tensor_vector(case):
    master, salt, name = bytes.fromhex(case["master"]), bytes.fromhex(case["salt"]), case["name"]
    key, iv = reference.tensor_key_iv(master, salt, "counter", "aes", name)
    assert key.hex() == case["tensor_key"]
    assert iv.hex() == case["iv"]
    assert reference.check_value(master, salt).hex() == case["check"]
    plain = plain_bytes(case)
    locked = reference.lock(plain, reference.counter_keystream(key, iv, len(plain)))
    assert hashlib.sha256(locked).hexdigest() == case["locked_sha256"]
    assert locked[:32].hex() == case["locked_head"]
    assert reference.seal(reference.seal_key(master, salt, name), locked).hex() == case["seal"]


@pytest.mark.parametrize("master", KEYS, ids=["128", "192", "256"])
def test_derived_keys_equal_openssl_with_the_infos_spelled_out(master):
    salt, name = bytes(range(16)), "слой.0/weight"

    def derive(info, length):
        return HKDF(hashes.SHA256(), length, salt, info).derive(master)

    tensor = derive(b"deeplock/v1/tensor/expansion/sm4\x00" + name.encode("utf-8"), len(master) + 16)
    expected = tensor[: len(master)], tensor[len(master) :]
    assert reference.tensor_key_iv(master, salt, "expansion", "sm4", name) == expected
    assert reference.check_value(master, salt) == derive(b"deeplock/v1/check", 16)
    seal_info = b"deeplock/v1/seal\x00" + name.encode("utf-8")
    assert reference.seal_key(master, salt, name) == derive(seal_info, 32)
    assert reference.header_key(master, salt) == derive(b"deeplock/v1/header", 32)


# The seal


def test_seal_of_nothing_is_gcm_test_case_13():
    # D. McGrew and J. Viega, "The Galois/Counter Mode of Operation", appendix B: AES-256, all zero, empty
    assert reference.seal(bytes(32), b"").hex() == "530f8afbc74536b9a963b4f1c4cb738b"


@pytest.mark.parametrize("nbytes", [0, 1, 15, 16, 17, 31, 32, 33, 255, 1000])
def test_seal_equals_openssl_gcm_over_no_plain_text(nbytes):
    values = random.Random(nbytes)
    key, locked = values.randbytes(32), values.randbytes(nbytes)
    assert reference.seal(key, locked) == AESGCM(key).encrypt(bytes(12), b"", locked)


# The header

HEADER = {
    "format": "deeplock/1",
    "schedule": "counter",
    "sbox": "aes",
    "key_bits": 256,
    "salt": "00" * 16,
    "check": "11" * 16,
    "tensors": {"b": {"seal": "22" * 16, "bytes": 4}, "Слой": {"bytes": 8, "seal": "33" * 16}},
}
HEADER_JSON = (
    '{"check":"' + "11" * 16 + '","format":"deeplock/1","key_bits":256,"salt":"' + "00" * 16 + '",'
    '"sbox":"aes","schedule":"counter","tensors":{"b":{"bytes":4,"seal":"' + "22" * 16 + '"},'
    '"Слой":{"bytes":8,"seal":"' + "33" * 16 + '"}}}'
).encode()
FILE = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
FILE_JSON = b'{"__metadata__":{"format":"pt"},"w":{"data_offsets":[0,8],"dtype":"F32","shape":[2]}}'


def openssl_hmac(key, message):
    digest = HMAC(key, hashes.SHA256())
    digest.update(message)
    return digest.finalize()


def test_canonical_json():
    assert reference.canonical_json(HEADER) == HEADER_JSON
    assert reference.canonical_json(FILE) == FILE_JSON
    # by code point: U+FF21 before U+1F600, which in UTF-16 would come first
    assert reference.canonical_json({"\U0001f600": 1, "Ａ": 2}) == '{"Ａ":2,"\U0001f600":1}'.encode()
    assert reference.canonical_json('"\\/\n\x7f\u2028') == '"\\"\\\\/\\n\x7f\u2028"'.encode()
    with pytest.raises(ValueError, match="JSON"):
        reference.canonical_json(float("nan"))


def test_header_mac_is_hmac_over_the_canonical_json():
    assert reference.header_mac(KEY_256, HEADER) == openssl_hmac(KEY_256, HEADER_JSON)
    both = b'{"file":' + FILE_JSON + b',"header":' + HEADER_JSON + b"}"
    assert reference.header_mac(KEY_256, HEADER, FILE) == openssl_hmac(KEY_256, both)


def test_header_mac_leaves_out_itself_and_its_own_place_in_the_file():
    assert reference.header_mac(KEY_256, HEADER | {"mac": "44" * 32}) == reference.header_mac(KEY_256, HEADER)
    stored = FILE | {"__metadata__": {"deeplock": "the header", "format": "pt"}}
    assert reference.header_mac(KEY_256, HEADER, stored) == reference.header_mac(KEY_256, HEADER, FILE)
    assert stored["__metadata__"]["deeplock"] == "the header"  # the caller's mapping is left alone
    empty = {"__metadata__": {"deeplock": "the header"}}
    expected = openssl_hmac(KEY_256, b'{"file":{"__metadata__":{}},"header":' + HEADER_JSON + b"}")
    assert reference.header_mac(KEY_256, HEADER, empty) == expected


def test_header_mac_depends_on_every_field():
    macs = {reference.header_mac(KEY_256, HEADER), reference.header_mac(KEY_128, HEADER)}
    macs |= {reference.header_mac(KEY_256, HEADER | {field: "changed"}) for field in HEADER}
    macs |= {reference.header_mac(KEY_256, HEADER, FILE), reference.header_mac(KEY_256, HEADER, {})}
    macs |= {reference.header_mac(KEY_256, HEADER, FILE | {field: {}}) for field in FILE}
    assert len(macs) == 2 + len(HEADER) + 2 + len(FILE)
