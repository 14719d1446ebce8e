"""The named S-Boxes against their definitions and digests, any other box, and the properties of both."""

from __future__ import annotations

import array
import copy
import functools
import hashlib
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplock_kernels import reference
from deeplock_kernels.errors import SBoxError, SelfTestError, UnknownNameError
from deeplock_kernels.properties import SBoxProperties, compute_properties
from deeplock_kernels.sboxes import _DEFINITIONS as DEFINITIONS
from deeplock_kernels.sboxes import AES, SBOXES, AffineForm, SBox
from deeplock_kernels.sboxes import _build as build_named_box

VECTORS = Path(__file__).parent / "vectors" / "sbox_properties.json"
PROPERTIES = json.loads(VECTORS.read_text(encoding="utf-8"))

SHA256 = {
    "aes": "c2d8e5eed6cbebd8625fc18f81486a7733c04f9b0129ffbe974c68b90308b4f2",
    "sm4": "1674d0631a2e37b60ec748bc3899fee1550c108af30b85ce96a70c5ca4682d03",
    "camellia": "4867a63842b7afbf7a120c1310940f29048d0b73ef1747e15ad67a3aa0d9af9d",
    "aria": "360e7dadb4427717af4cb4e82f530229193e21b1bfb8dbedbc46f77ff251ca15",
    "kuznyechik": "46957e9c7524f6f34909ad7dc4aaf2060ce536ec24413efe0f4a02ecf943f757",
    "whirlpool": "967bb3029010a81ba3948b598654cb8d58825e06b3bb153df9dbbe7abbbcff7c",
    "skinny8": "4fd3a7fe3cf6f8075789fd5f9ecb933ff78ea3aa8ced250dc2f56ff583cf07ae",
}
WITH_AFFINE_FORM = ["aes", "sm4", "camellia", "aria"]
WITHOUT_AFFINE_FORM = ["kuznyechik", "whirlpool", "skinny8"]
IDENTITY_MATRIX = 0x0102040810204080
IDENTITY = bytes(range(256))


def rotated(x, count):
    return (x << count | x >> (8 - count)) & 0xFF


def multiply(a, b, modulus=0x11B):
    product = 0
    for i in range(8):
        product ^= (a << i) * (b >> i & 1)
    for i in range(14, 7, -1):
        product ^= (modulus << (i - 8)) * (product >> i & 1)
    return product


def power(x, exponent, modulus=0x11B):
    result = 1
    for _ in range(exponent):
        result = multiply(result, x, modulus)
    return result


@functools.cache
def inverses(modulus):
    """Inversion by search among all products, 0 for 0; shares nothing with the package."""
    inverse = [0] * 256
    for a in range(1, 256):
        inverse[a] = next(b for b in range(1, 256) if multiply(a, b, modulus) == 1)
    return inverse


def random_permutation(seed):
    return bytes(np.random.default_rng(seed).permutation(256).astype(np.uint8))


# The named boxes, rebuilt here by other code than the package's


def aes_by_definition():
    return bytes(
        functools.reduce(lambda y, i: y ^ rotated(inverse, i), range(1, 5), inverse) ^ 0x63
        for inverse in inverses(0x11B)
    )


def sm4_by_definition():
    def affine(x):  # row i of the circulant matrix is 11010011 shifted cyclically, read from bit 7 down
        return sum((bin(rotated(0xA7, i) & x).count("1") & 1) << i for i in range(8)) ^ 0xD3

    return bytes(affine(inverses(0x1F5)[affine(x)]) for x in range(256))


def camellia_by_definition():
    """Aoki et al., "Specification of Camellia": its inversion g by a table of all 256 field elements."""

    def bits(x):
        return [None, *((x >> (8 - i)) & 1 for i in range(1, 9))]

    def byte(*values):
        return int("".join(map(str, values)), 2)

    def f(x):
        a = bits(x)
        return byte(
            a[6] ^ a[2],
            a[7] ^ a[1],
            a[8] ^ a[5] ^ a[3],
            a[8] ^ a[3],
            a[7] ^ a[4],
            a[5] ^ a[2],
            a[8] ^ a[1],
            a[6] ^ a[4],
        )

    def h(x):
        a = bits(x)
        return byte(
            a[5] ^ a[6] ^ a[2],
            a[6] ^ a[2],
            a[7] ^ a[4],
            a[8] ^ a[2],
            a[7] ^ a[3],
            a[8] ^ a[1],
            a[5] ^ a[1],
            a[6] ^ a[3],
        )

    b = 2
    a = power(b, 238, 0x169)
    assert power(a, 4, 0x169) == a ^ 1  # a is a root of x^4 + x + 1, as the specification says

    def element(x):
        low, high = bits(x)[8:4:-1], bits(x)[4:0:-1]
        value = 0
        for i in range(4):
            value ^= low[i] * power(a, i, 0x169)
            value ^= high[i] * multiply(power(a, i, 0x169), b, 0x169)
        return value

    elements = [element(x) for x in range(256)]

    def g(x):
        return elements.index(inverses(0x169)[elements[x]])

    return bytes(h(g(f(0xC5 ^ x))) ^ 0x6E for x in range(256))


def aria_by_definition():
    matrix = [  # as printed: row 0 first, and the coefficient of bit 0 first in each row
        "01011110",
        "00111101",
        "11010111",
        "10011101",
        "00101100",
        "10000001",
        "01011101",
        "11010011",
    ]

    def affine(y):
        sums = (sum(int(row[j]) * (y >> j & 1) for j in range(8)) & 1 for row in matrix)
        return sum(value << i for i, value in enumerate(sums)) ^ 0xE2

    return bytes(affine(power(x, 247)) for x in range(256))


def kuznyechik_by_definition():
    """Perrin, "Partitions in the S-Box of Streebog and Kuznyechik", ToSC 2019(1): the decomposition TKlog."""
    images = {0: 0, 1: 0x12, 2: 0x26, 4: 0x24, 8: 0x30}

    def kappa(x):
        return 0xFC ^ functools.reduce(lambda y, bit: y ^ images[x & bit], (1, 2, 4, 8), 0)

    powers = [1]
    for _ in range(254):
        powers.append(multiply(powers[-1], 2, 0x11D))
    subfield = [0, 12, 9, 8, 7, 4, 14, 6, 5, 10, 2, 11, 1, 3, 13]
    table = [kappa(0)] + [0] * 255
    for j in range(15):
        table[powers[17 * (j + 1) % 255]] = kappa(15 - j)
        for i in range(1, 17):
            table[powers[(i + 17 * j) % 255]] = kappa(16 - i) ^ powers[17 * subfield[j]]
    return bytes(table)


def whirlpool_by_definition():
    e = [int(digit, 16) for digit in "1B9CD6F3E874A250"]
    r = [int(digit, 16) for digit in "7CBDE49F638A2510"]
    e_inverse = [e.index(y) for y in range(16)]
    table = []
    for x in range(256):
        left, right = e[x // 16], e_inverse[x % 16]
        mixed = r[left ^ right]
        table.append(16 * e[left ^ mixed] + e_inverse[right ^ mixed])
    return bytes(table)


def skinny8_by_definition():
    table = []
    for x in range(256):
        x7, x6, x5, x4, x3, x2, x1, x0 = (x >> i & 1 for i in range(7, -1, -1))
        for step in range(4):
            x4 ^= (x7 | x6) ^ 1
            x0 ^= (x3 | x2) ^ 1
            if step < 3:
                x7, x6, x5, x4, x3, x2, x1, x0 = x2, x1, x7, x6, x4, x0, x3, x5
        x2, x1 = x1, x2
        table.append(int("".join(map(str, (x7, x6, x5, x4, x3, x2, x1, x0))), 2))
    return bytes(table)


DEFINED_TWICE = {
    "aes": aes_by_definition,
    "sm4": sm4_by_definition,
    "camellia": camellia_by_definition,
    "aria": aria_by_definition,
    "kuznyechik": kuznyechik_by_definition,
    "whirlpool": whirlpool_by_definition,
    "skinny8": skinny8_by_definition,
}


def test_the_named_boxes_are_these():
    assert list(SBOXES) == list(SHA256)
    assert len(SBOXES) == 7
    assert SBOXES["aes"] is AES
    assert "sm4" in SBOXES
    assert "SM4" not in SBOXES
    assert 5 not in SBOXES
    assert SBOXES.get("none") is None
    assert repr(SBOXES) == "<named S-Boxes: aes, sm4, camellia, aria, kuznyechik, whirlpool, skinny8>"


@pytest.mark.parametrize("name", SHA256)
def test_digest_of_each_named_box(name):
    box = SBOXES[name]
    assert box.name == name
    assert hashlib.sha256(box.table).hexdigest() == SHA256[name]
    assert box.sha256 == SHA256[name]
    assert SBOXES[name] is box


@pytest.mark.parametrize("name", SHA256)
def test_each_named_box_equals_its_definition_written_again(name):
    assert SBOXES[name].table == DEFINED_TWICE[name]()


def test_inverse_of_aes():
    assert AES.inverse.sha256 == "93631b0726f6fe6629daa743ee51b49f4477ed07391b68eeea0672a4a90018aa"
    assert AES.table == reference.AES_SBOX


def test_sm4_and_kuznyechik_reproduce_examples_of_their_standards():
    # RFC 7801 section 5.1: the transformation S
    substituted = bytes.fromhex("ffeeddccbbaa99881122334455667700").translate(SBOXES["kuznyechik"].table)
    assert substituted.hex() == "b66cd8887d38e8d77765aeea0c9a7efc"
    assert SBOXES["sm4"].table[0xEF] == 0x84  # GB/T 32907-2016: the example given with the table


@pytest.mark.parametrize("name", ["AES", "", "aes ", "des", None, 5, ["aes"]])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(UnknownNameError, match=r"^sbox: got .*accepted are aes, sm4, .*skinny8; any other"):
        SBOXES[name]


def test_the_mapping_is_read_only():
    with pytest.raises(TypeError):
        SBOXES["mine"] = AES
    with pytest.raises(TypeError):
        del SBOXES["aes"]
    with pytest.raises(AttributeError):
        SBOXES.more = AES


def test_a_named_box_that_is_built_wrong_is_not_used(monkeypatch):
    build_named_box.cache_clear()
    wrong = DEFINITIONS["aes"]._replace(build=lambda: bytes(reversed(range(256))))
    monkeypatch.setitem(DEFINITIONS, "aes", wrong)
    try:
        with pytest.raises(SelfTestError, match=r"^sbox: the table built for 'aes'"):
            build_named_box("aes")
    finally:
        build_named_box.cache_clear()


def test_importing_the_boxes_imports_neither_numba_nor_the_properties():
    code = (
        "import sys, deeplock_kernels.sboxes as s; s.SBOXES['sm4'].inverse.affine; "
        "print([m for m in ('numba', 'llvmlite', 'deeplock_kernels.properties') if m in sys.modules])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Affine forms


def evaluate_by_definition(form, x):
    """Evaluate an affine form bit by bit, as x86's GF2P8AFFINEQB and GF2P8AFFINEINVQB are specified."""

    def product(matrix, vector):
        result = 0
        for i in range(8):
            row = (matrix >> (8 * (7 - i))) & 0xFF
            result |= (bin(row & vector).count("1") & 1) << i
        return result

    inner = product(form.inner_matrix, x ^ form.inner_constant)
    return product(form.outer_matrix, inverses(0x11B)[inner]) ^ form.outer_constant


@pytest.mark.parametrize("name", WITH_AFFINE_FORM)
def test_affine_form_gives_the_box_and_its_inverse(name):
    box = SBOXES[name]
    for each in (box, box.inverse):
        form = each.affine
        assert isinstance(form, AffineForm)
        assert bytes(evaluate_by_definition(form, x) for x in range(256)) == each.table
        assert form.table() == each.table
        assert all(0 <= matrix < 2**64 for matrix in (form.outer_matrix, form.inner_matrix))
        assert all(0 <= constant < 256 for constant in (form.outer_constant, form.inner_constant))
    assert box.affine.inverse == box.inverse.affine
    assert box.inverse.affine.inverse == box.affine


def test_affine_form_of_aes_is_the_one_in_the_manuals():
    assert AES.affine == (0xF1E3C78F1F3E7CF8, 0x63, IDENTITY_MATRIX, 0x00)
    assert AES.inverse.affine == (IDENTITY_MATRIX, 0x00, 0xA44992254A942952, 0x63)


@pytest.mark.parametrize("name", WITHOUT_AFFINE_FORM)
def test_boxes_that_are_not_field_inversion_have_no_affine_form(name):
    assert SBOXES[name].affine is None
    assert SBOXES[name].inverse.affine is None


def test_a_table_that_equals_a_named_one_gets_its_name_and_affine_form():
    box = SBox(list(SBOXES["camellia"].table))
    assert box.name == "camellia"
    assert box.affine == SBOXES["camellia"].affine
    mine = SBox(SBOXES["aria"].inverse.table, name="mine")
    assert mine.name == "mine"
    assert mine.affine == SBOXES["aria"].inverse.affine
    assert SBox(random_permutation(5)).affine is None


@given(st.integers(0, 2**64 - 1), st.integers(0, 255), st.integers(0, 2**64 - 1), st.integers(0, 255))
@settings(max_examples=25, deadline=None)
def test_any_affine_form_evaluates_as_defined(outer, outer_constant, inner, inner_constant):
    form = AffineForm(outer, outer_constant, inner, inner_constant)
    assert form.table() == bytes(evaluate_by_definition(form, x) for x in range(256))


# Any box


@pytest.mark.parametrize(
    "make",
    [
        bytes,
        bytearray,
        memoryview,
        list,
        tuple,
        lambda table: array.array("B", table),
        lambda table: array.array("i", list(table)),
        lambda table: np.frombuffer(table, np.uint8),
        lambda table: np.frombuffer(table, np.uint8).reshape(16, 16),
        lambda table: np.array(list(table), np.int64),
        lambda table: np.array(list(table), np.int16)[::1],
        lambda table: np.repeat(np.frombuffer(table, np.uint8), 2)[::2],
        lambda table: [np.uint8(value) for value in table],
    ],
)
def test_tables_of_these_kinds_are_accepted(make):
    table = random_permutation(1)
    box = SBox(make(table))
    assert type(box.table) is bytes
    assert box.table == table
    assert box.name is None


def test_identity_as_a_range_is_accepted():
    assert SBox(range(256)).table == IDENTITY


REFUSED = {
    "too short": (IDENTITY[:255], "got 255 bytes"),
    "empty": (b"", "got 0 bytes"),
    "too long": (IDENTITY + b"\0", "got 257 bytes"),
    "short list": (list(range(255)), "got 255 values"),
    "long list": (list(range(257)), "got 257 values"),
    "long range": (range(10**12), "got 1000000000000 values"),
    "duplicate": (IDENTITY[:255] + b"\x07", "got 0x07 at positions 7 and 255"),
    "all zero": (bytes(256), "got 0x00 at positions 0 and 1"),
    "negative": ([-1, *range(1, 256)], "got an integer outside 0..255 at position 0"),
    "large": ([*range(255), 256], "got an integer outside 0..255 at position 255"),
    "huge": ([*range(255), 10**5000], "got an integer outside 0..255 at position 255"),
    "signed bytes": (np.arange(256).astype(np.int8), "got an integer outside 0..255 at position 128"),
    "float": ([*range(255), 255.0], "got float at position 255"),
    "float array": (np.arange(256.0), "got float64 at position 0"),
    "text in a list": (["0", *range(1, 256)], "got str at position 0"),
    "wide matrix": (np.arange(256).reshape(16, 16), "got 16 values"),
    "none in a list": ([None] * 256, "got NoneType at position 0"),
    "str": ("aes", "got str"),
    "long str": (bytes(range(256)).decode("latin-1"), "got str"),
    "none": (None, "got NoneType"),
    "int": (256, "got int"),
    "set": (set(range(256)), "got set"),
    "dict": ({x: x for x in range(256)}, "got dict"),
    "iterator": (iter(range(256)), "got range_iterator"),
    "scalar array": (np.array(5), "got ndarray"),
    "class": (list, "got type"),
}


@pytest.mark.parametrize(("table", "got"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_permutation_is_refused(table, got):
    with pytest.raises(SBoxError) as caught:
        SBox(table)
    message = str(caught.value)
    assert message.startswith(f"table: {got}, accepted are 256 bytes or integers in which each of 0..255")
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", [5, b"aes", "", ["aes"]])
def test_a_name_that_is_no_text_is_refused(name):
    with pytest.raises(SBoxError, match=r"^name: got .*, accepted are None or a text"):
        SBox(IDENTITY, name)


@pytest.mark.parametrize("name", SHA256)
def test_the_name_of_a_named_box_is_refused_for_another_table(name):
    with pytest.raises(SBoxError, match=f"^name: got '{name}', a named box with another table"):
        SBox(IDENTITY, name)
    assert SBox(SBOXES[name].table, name) == SBOXES[name]


def test_a_box_is_immutable_and_its_table_a_copy():
    source = bytearray(random_permutation(2))
    box = SBox(source)
    before = bytes(source)
    source[:] = IDENTITY
    assert box.table == before
    for attribute in ("table", "name", "inverse", "sha256", "affine", "_table", "other"):
        with pytest.raises(AttributeError):
            setattr(box, attribute, None)
        with pytest.raises(AttributeError):
            delattr(box, attribute)
    assert box.table == before


def test_equality_and_hash_are_by_table():
    table = random_permutation(3)
    assert SBox(table) == SBox(list(table), name="mine")
    assert len({SBox(table), SBox(table, name="mine"), SBox(IDENTITY)}) == 2
    assert SBox(table) != SBox(IDENTITY)
    assert SBox(table) != table
    assert AES.inverse != AES


def test_repr_is_short():
    assert repr(AES) == "SBox('aes')"
    assert repr(AES.inverse) == "SBox(sha256='93631b07…')"
    assert repr(SBox(IDENTITY, name="mine")) == "SBox('mine')"


@pytest.mark.parametrize("box", [AES, AES.inverse, SBox(random_permutation(4)), SBox(IDENTITY, name="mine")])
def test_a_box_can_be_pickled_and_copied(box):
    box.inverse, box.affine  # noqa: B018 -- what is computed on demand must not get in the way
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(box, protocol))
        assert again == box
        assert again.name == box.name
        assert again.inverse == box.inverse
    assert copy.copy(box) is box
    assert copy.deepcopy([box])[0] is box


@pytest.mark.parametrize("name", SHA256)
def test_inverse_of_each_named_box(name):
    box = SBOXES[name]
    assert box.table.translate(box.inverse.table) == IDENTITY
    assert box.inverse.table.translate(box.table) == IDENTITY
    assert box.inverse.table == reference.invert_table(box.table)
    assert box.inverse.inverse is box
    assert box.inverse is box.inverse


@given(st.permutations(range(256)))
@settings(max_examples=50, deadline=None)
def test_any_permutation_is_a_box_with_an_inverse(values):
    box = SBox(values)
    assert list(box.table) == values
    assert all(box.inverse.table[box.table[x]] == x == box.table[box.inverse.table[x]] for x in range(256))
    assert box.inverse.inverse is box
    assert SBox(box.inverse.table).inverse == box
    data, stream = bytes(values), bytes(reversed(range(256)))
    assert reference.unlock(reference.lock(data, stream, box.table), stream, box.table) == data


# Properties

CAMELLIA_1 = SBOXES["camellia"].table
TABLES = {
    "AES": AES.table,
    "AES_inv": AES.inverse.table,
    "SM4": SBOXES["sm4"].table,
    "Camellia_s1": CAMELLIA_1,
    # RFC 3713 section 2.4.1: the other three are rotations of the first one
    "Camellia_s2": bytes(rotated(y, 1) for y in CAMELLIA_1),
    "Camellia_s3": bytes(rotated(y, 7) for y in CAMELLIA_1),
    "Camellia_s4": bytes(CAMELLIA_1[rotated(x, 1)] for x in range(256)),
    "ARIA_S2": SBOXES["aria"].table,
    "Kuznyechik": SBOXES["kuznyechik"].table,
    "SKINNY_8": SBOXES["skinny8"].table,
    "Whirlpool": SBOXES["whirlpool"].table,
}


def as_in_the_vectors(table):
    found = SBox(table).properties()
    coordinates = found.coordinate_nonlinearity
    pairs = found.bit_independence_nonlinearity
    return {
        "bij": found.bijective,
        "NL": found.nonlinearity,
        "coordNL": [coordinates.minimum, coordinates.maximum, coordinates.mean],
        "lin": found.linearity,
        "nlin": found.linearity_count,
        "LAPmaxbias": found.max_linear_bias,
        "maxcorr": found.max_correlation,
        "DU": found.differential_uniformity,
        "nDU": found.differential_uniformity_count,
        "DP": found.max_difference_probability,
        "boomerang": found.boomerang_uniformity,
        "maxdeg": found.max_degree,
        "mindeg": found.min_degree,
        "fixed": list(found.fixed_points),
        "antifixed": list(found.antifixed_points),
        "AC": found.autocorrelation,
        "sac": list(found.strict_avalanche),
        "bicnl": [pairs.minimum, pairs.mean],
        "bicsac": found.bit_independence_avalanche.mean,
        "cycles": list(found.cycles),
        "dbn": found.differential_branch_number,
        "involution": found.involution,
        "sha256": hashlib.sha256(table).hexdigest(),
    }


def test_vectors_and_tables_are_the_same_eleven():
    assert sorted(TABLES) == sorted(PROPERTIES)
    assert len(TABLES) == 11


@pytest.mark.parametrize("name", TABLES)
def test_properties_equal_every_vector(name):
    assert as_in_the_vectors(TABLES[name]) == PROPERTIES[name]


@pytest.mark.parametrize("name", TABLES)
def test_linear_branch_number_is_2(name):
    assert compute_properties(TABLES[name]).linear_branch_number == 2


def test_properties_are_computed_once_and_frozen():
    properties = AES.properties()
    assert AES.properties() is properties
    assert isinstance(properties, SBoxProperties)
    with pytest.raises(AttributeError):
        properties.nonlinearity = 0


@pytest.mark.parametrize("table", [random_permutation(6), SBOXES["skinny8"].table], ids=["random", "skinny8"])
def test_properties_that_no_vector_has_follow_their_words(table):
    found = compute_properties(table)
    parity = [bin(value).count("1") & 1 for value in range(256)]

    def walsh(a, b):
        return sum(1 - 2 * (parity[a & x] ^ parity[b & y]) for x, y in enumerate(table))

    nonlinearities = [128 - max(abs(walsh(a, 1 << j)) for a in range(256)) / 2 for j in range(8)]
    assert found.coordinate_nonlinearity == (
        min(nonlinearities),
        sum(nonlinearities) / 8,
        max(nonlinearities),
    )

    units = [1 << i for i in range(8)]
    assert found.linear_branch_number == 2
    assert any(walsh(a, b) for a in units for b in units)

    def flips(a, b):
        return sum(parity[b & (y ^ table[x ^ a])] for x, y in enumerate(table)) / 256

    avalanche = [flips(a, b ^ c) for a in units for b in units for c in units if b < c]
    assert found.bit_independence_avalanche == (
        min(avalanche),
        sum(avalanche) / len(avalanche),
        max(avalanche),
    )

    def is_linear_structure(a, b):
        first = parity[b & (table[0] ^ table[a])]
        return all(parity[b & (y ^ table[x ^ a])] == first for x, y in enumerate(table))

    count = sum(is_linear_structure(a, b) for a in range(1, 256) for b in range(1, 256))
    assert found.linear_structures == count


@pytest.mark.parametrize(("seed", "place"), [(24, (45, 216)), (23, (180, 26))])
def test_the_boomerang_uniformity_is_found_wherever_it_stands(seed, place):
    """The named tables have their largest entry in many places; of these each has it in one, in another quarter."""
    table = random.Random(seed).sample(range(256), 256)
    s, values = np.array(table), np.arange(256)
    inverse = np.argsort(s)
    entries = np.zeros((256, 256), int)  # [a, b]: for how many x the boomerang comes back
    for a in range(1, 256):
        back = inverse[s ^ values[:, np.newaxis]] ^ inverse[s[values ^ a] ^ values[:, np.newaxis]]  # [b, x]
        entries[a, 1:] = np.count_nonzero(back == a, axis=1)[1:]
    assert np.argwhere(entries == entries.max()).tolist() == [list(place)]
    assert compute_properties(bytes(table)).boomerang_uniformity == entries.max()


@pytest.mark.parametrize("table", [b"", bytes(256), IDENTITY[1:], IDENTITY + IDENTITY, "x" * 256])
def test_properties_of_no_permutation_are_refused(table):
    with pytest.raises(SBoxError, match=r"^table: got no permutation"):
        compute_properties(table)


def test_properties_of_an_integer_array_are_those_of_its_values():
    assert compute_properties(np.frombuffer(AES.table, np.uint8).astype(np.int64)) == AES.properties()


AFFINE = {
    "identity": IDENTITY,
    "XOR with a constant": bytes(x ^ 0x5A for x in range(256)),
    "rotation of bits": bytes(rotated(x, 3) for x in range(256)),
    "linear and constant": bytes(multiply(x, 0x1D) ^ 0x63 for x in range(256)),
}


@pytest.mark.parametrize("table", AFFINE.values(), ids=AFFINE)
def test_affine_boxes_are_accepted_and_named_as_such(table):
    box = SBox(table)
    found = box.properties()
    assert found.nonlinearity == 0
    assert found.linearity == 256
    assert found.linearity_count == 255
    assert found.max_linear_bias == 0.5
    assert found.max_correlation == 1.0
    assert found.differential_uniformity == 256
    assert found.differential_uniformity_count == 255
    assert found.max_difference_probability == 1.0
    assert found.boomerang_uniformity == 256
    assert (found.max_degree, found.min_degree) == (1, 1)
    assert found.autocorrelation == 256
    assert found.linear_structures == 255 * 255
    assert set(found.strict_avalanche[::2]) <= {0.0, 1.0}
    assert found.weaknesses[0].startswith("S is affine")
    assert box.affine is None  # that would be the form with field inversion, which these boxes do not have


def test_points_and_cycles_of_affine_boxes():
    identity = SBox(IDENTITY).properties()
    assert identity.fixed_points == tuple(range(256))
    assert identity.cycles == (1,) * 256
    assert identity.involution
    assert "256 values are mapped to themselves; AES has none." in identity.weaknesses
    constant = SBox(AFFINE["XOR with a constant"]).properties()
    assert constant.fixed_points == constant.antifixed_points == ()
    assert constant.cycles == (2,) * 128
    complement = SBox(bytes(255 - x for x in range(256))).properties()
    assert complement.antifixed_points == tuple(range(256))
    assert "256 values are mapped to their complement; AES has none." in complement.weaknesses
    rotation = SBox(AFFINE["rotation of bits"]).properties()
    assert rotation.fixed_points == (0x00, 0xFF)
    assert rotation.antifixed_points == (0x55, 0xAA)
    assert not rotation.involution
    assert rotation.differential_branch_number == rotation.linear_branch_number == 2


def test_a_box_that_is_affine_in_part():
    """x + 1 mod 256: its lowest output bit is linear, its highest has degree 7."""
    found = SBox(bytes((x + 1) % 256 for x in range(256))).properties()
    assert found.nonlinearity == 0
    assert (found.max_degree, found.min_degree) == (7, 1)
    assert found.coordinate_nonlinearity.minimum == 0 < found.coordinate_nonlinearity.maximum
    assert found.cycles == (256,)
    assert found.weaknesses[0] == "Some XOR of output bits is an affine function of the input."


def test_weaknesses_of_the_named_boxes():
    found = {name: SBOXES[name].properties().weaknesses for name in SBOXES}
    assert found["aes"] == found["camellia"] == found["kuznyechik"] == ()
    assert found["sm4"] == ("Fixed points, mapped to themselves: 0xab.",)
    assert found["aria"] == ("Antifixed points, mapped to their complement: 0x03.",)
    assert found["whirlpool"] == ("Antifixed points, mapped to their complement: 0x34, 0xbc.",)
    assert [sentence.split()[:3] for sentence in found["skinny8"]] == [
        ["The", "nonlinearity", "is"],
        ["The", "differential", "uniformity"],
        ["There", "are", "601"],
        ["Some", "XOR", "of"],
        ["Fixed", "points,", "mapped"],
    ]


def test_random_permutations_show_no_weakness_but_fixed_points():
    for seed in range(5):
        for sentence in compute_properties(random_permutation(seed)).weaknesses:
            assert sentence.startswith(("Fixed points", "Antifixed points"))
