"""Tiers: which is in use, what takes one away, what its code is made of, and that wrong code is not used."""

from __future__ import annotations

import ctypes
import functools
import json
import platform
import re
from typing import NamedTuple

import numpy as np
import pytest
import support
from processes import run
from support import BOXES, painted

from deeplock_kernels import transform
from deeplock_kernels.errors import SelfTestError, UnknownNameError, UnsupportedTierError
from deeplock_kernels.kernels import portable
from deeplock_kernels.kernels.signatures import (
    ARITY,
    RECORDS,
    SEAL_KEYS_BYTES,
    TAG_BYTES,
    KernelName,
    every_name,
    segment_bytes,
)
from deeplock_kernels.locking import lock, substitute
from deeplock_kernels.runtime import codecache, selftest, tiers
from deeplock_kernels.runtime.tiers import TIERS, active_tier, use_tier

NAMES = ["avx512", "gfni", "avx2", "neon", "portable"]
ARM = platform.machine() in ("aarch64", "arm64")
OF_THIS_ARCHITECTURE = ["neon", "portable"] if ARM else ["avx512", "gfni", "avx2", "portable"]
BY_NAME = {tier.name: tier for tier in TIERS}
SUPPORTED = [tier.name for tier in TIERS if tier.supported]


# The table


def test_table_of_tiers():
    assert tiers.tiers() is TIERS
    assert [tier.name for tier in TIERS] == NAMES
    assert [tier.name for tier in TIERS if not tier.constant_time] == ["portable"]
    assert TIERS[-1].requires == frozenset()
    assert TIERS[-1].supported
    assert all(tier.description and tier.pace > 0 for tier in TIERS)
    for tier in TIERS:
        assert tier.forms[0] == "identity", "a bare key stream goes through no table"
        assert tier.forms[-1] == "table", "the form that takes any box"
        assert all(form in support.FORM_BOXES for form in tier.forms)
        assert tier.supported == (tier.requires <= tiers.host_features())
    assert BY_NAME["avx512"].requires >= {"avx512bw", "avx512vbmi", "gfni", "vaes"}
    assert BY_NAME["gfni"].requires - BY_NAME["avx2"].requires == {"gfni", "vaes", "vpclmulqdq"}
    assert len(SUPPORTED) > 1 or SUPPORTED == ["portable"]
    assert set(SUPPORTED) <= set(OF_THIS_ARCHITECTURE)


def test_a_tier_requires_what_its_instructions_need():
    from deeplock_kernels.simd.x86 import INSTRUCTIONS

    for name, width in (("avx512", 512), ("gfni", 256), ("avx2", 256)):
        needed = {need for row in INSTRUCTIONS.values() if row.nbytes * 8 == width for need in row.requires}
        if name == "avx2":
            needed -= {"gfni", "vaes", "vpclmulqdq"}  # its AES and its products are those of 128 bits
        assert needed <= BY_NAME[name].requires
        for narrow in ("aesenc_128", "pclmulqdq_128"):
            assert INSTRUCTIONS[narrow].requires <= BY_NAME[name].requires


@pytest.mark.parametrize("tier", TIERS, ids=support.kernel_id)
def test_every_kernel_has_a_name_of_its_own(tier):
    names = every_name(tier.forms)
    assert len(names) == len({str(name) for name in names})
    assert {name.operation for name in names} == set(ARITY)
    assert {name.form for name in names} - {""} == set(tier.forms)
    assert {name.bits for name in names} - {0} == set(support.BITS)


# Which one is in use


def test_forced_tier_is_the_active_one(tier):
    assert active_tier() is tier
    assert [other.name for other in TIERS if other.active] == [tier.name]


def test_use_tier_as_a_call_and_as_a_context_nests():
    default = active_tier()
    try:
        use_tier("portable")
        assert active_tier().name == "portable"
        with use_tier(SUPPORTED[0]) as inner:
            assert inner is active_tier() is BY_NAME[SUPPORTED[0]]
            with use_tier(None) as innermost:
                assert innermost is active_tier() is default
                with use_tier("portable"):
                    assert active_tier().name == "portable"
                assert active_tier() is default
            assert active_tier().name == SUPPORTED[0]
            use_tier("portable")  # holds until the block ends
            assert active_tier().name == "portable"
        assert active_tier().name == "portable"
        use_tier(None)
        assert active_tier() is default
    finally:
        use_tier(None)


def test_use_tier_ends_with_its_block_on_an_exception():
    default = active_tier()

    def fail():
        with use_tier("portable"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert active_tier() is default


@pytest.mark.parametrize("name", ["doesnotexist", "", "AVX2", "auto", 5, True])
def test_use_tier_refuses_unknown_names_and_changes_nothing(tier, name):
    with pytest.raises(
        UnknownNameError, match=r"^name: got .*, accepted are avx512, gfni, avx2, neon, portable$"
    ):
        use_tier(name)
    assert active_tier() is tier


def test_small_arrays_too_follow_a_change_of_tier(monkeypatch):
    """What is kept from the last small array must not outlive its tier."""
    used, of = [], transform.Transform.of
    support.forget_transforms()
    monkeypatch.setattr(transform.Transform, "of", lambda box, direction, tier: used.append(tier) or of(box, direction, tier))
    keys, data = support.make_schedule("counter", 128), painted(10)
    supported = [tier for tier in tiers.TIERS if tier.supported]
    for tier in [*supported, *reversed(supported)]:
        with use_tier(tier.name):
            lock(data, keys, out=data)
            assert used[-1] is tier


def test_what_undoes_a_small_lock_is_there_before_it(tier, monkeypatch):
    asked, original = [], transform.kernel

    def kernel(chosen, name):
        asked.append(name.direction)
        return original(chosen, name)

    monkeypatch.setattr(transform, "kernel", kernel)
    support.forget_transforms()
    data = painted(10)
    lock(data, support.make_schedule("counter", 128), sbox="kuznyechik", out=data)
    assert asked == ["lock", "unlock"]
    support.forget_transforms()


def test_the_tier_in_use_does_the_work(tier, monkeypatch):
    asked = set()
    original = tiers.kernel

    def kernel(chosen, name):
        asked.add(chosen.name)
        return original(chosen, name)

    monkeypatch.setattr(tiers, "kernel", kernel)
    monkeypatch.setattr(transform, "kernel", kernel)
    support.forget_transforms()
    for schedule in support.SCHEDULES:
        keys = support.make_schedule(schedule, 128)
        for action in (
            lambda keys=keys: keys.keystream(10, 70_000),
            lambda keys=keys: lock(painted(10), keys),
            lambda keys=keys: lock(own := painted(10), keys, out=own),
            lambda: substitute(painted(10), "sm4"),
        ):
            asked.clear()
            support.forget_transforms()
            action()
            assert asked == {tier.name}
    support.forget_transforms()


PROGRAM = """
import sys
from deeplock_kernels import (
    CounterSchedule, DeepLockError, ExpansionSchedule, lock, reference, substitute, tiers, unlock, use_tier
)
from deeplock_kernels.runtime.tiers import active_tier

for name in sys.argv[1:]:
    try:
        use_tier(name)
    except DeepLockError as error:
        print(type(error).__name__, error)
        raise SystemExit

plain, key, iv = bytes(range(200)), bytes(range(32)), b"\\xff" * 16
counter, expansion = CounterSchedule(key, iv), ExpansionSchedule(key)
streams = reference.counter_keystream(key, iv, 200, 7), reference.expansion_keystream(key, 200, 7)
for keys, stream in zip((counter, expansion), streams, strict=True):
    try:
        locked = lock(plain, keys, offset=7)
    except DeepLockError as error:
        print(type(error).__name__, error)
        raise SystemExit
    assert locked.tobytes() == reference.lock(plain, stream)
    assert unlock(locked, keys, offset=7).tobytes() == plain
assert substitute(plain, "skinny8").tobytes() != plain
assert substitute(substitute(plain, "skinny8"), "skinny8", inverse=True).tobytes() == plain
print(active_tier().name, *(tier.name for tier in tiers() if tier.supported))
"""


@pytest.mark.parametrize("name", NAMES)
def test_variable_forces_a_tier(name):
    if name not in SUPPORTED:
        pytest.skip(f"tier {name}: this machine cannot run it")
    assert run(PROGRAM, DEEPLOCK_TIER=name).split() == [name, *SUPPORTED]


def test_the_best_tier_is_the_default():
    assert run(PROGRAM, DEEPLOCK_TIER="").split() == [SUPPORTED[0], *SUPPORTED]


def test_variable_with_an_unknown_name_fails_at_the_first_use():
    words = "UnknownNameError DEEPLOCK_TIER: got 'doesnotexist', accepted are avx512, gfni, avx2, neon, portable\n"
    assert run(PROGRAM, DEEPLOCK_TIER="doesnotexist") == words


AVX2_ALONE = "+sse2,+ssse3,+sse4.1,+avx,+avx2,+aes,+bmi2,+pclmul"
GFNI = AVX2_ALONE + ",+gfni,+vaes,+vpclmulqdq"


@pytest.mark.skipif(ARM, reason="the features that are taken away are those of x86")
@pytest.mark.parametrize(
    ("environment", "left"),
    [
        ({"NUMBA_CPU_NAME": "generic", "DEEPLOCK_CACHE": "0"}, ["portable"]),
        ({"NUMBA_ENABLE_AVX": "0"}, ["portable"]),
        ({"NUMBA_CPU_FEATURES": AVX2_ALONE, "DEEPLOCK_CACHE": "0"}, ["avx2", "portable"]),
        ({"NUMBA_CPU_FEATURES": AVX2_ALONE.replace("+pclmul", "-pclmul")}, ["portable"]),
        ({"NUMBA_CPU_FEATURES": GFNI.replace("+vaes", "-vaes")}, ["avx2", "portable"]),
        ({"NUMBA_CPU_FEATURES": GFNI.replace("+vpclmulqdq", "-vpclmulqdq")}, ["avx2", "portable"]),
        ({"NUMBA_CPU_FEATURES": GFNI, "DEEPLOCK_CACHE": "0"}, ["gfni", "avx2", "portable"]),
        ({"NUMBA_CPU_FEATURES": GFNI, "NUMBA_ENABLE_AVX": "0"}, ["portable"]),
        ({"NUMBA_CPU_FEATURES": ""}, ["portable"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_is_taken_from_numba_is_taken_from_the_tiers(environment, left):
    """Without the cache, the kernels are compiled where the compiler knows of no other features."""
    left = [name for name in left if name in SUPPORTED]
    assert run(PROGRAM, **environment).split() == [left[0], *left]


@pytest.mark.parametrize(
    ("environment", "name", "missing"),
    [
        ({"NUMBA_CPU_FEATURES": AVX2_ALONE + ",+vaes,+vpclmulqdq"}, "gfni", "gfni"),
        ({"NUMBA_CPU_NAME": "generic"}, "avx2", "aes, avx2, bmi2, pclmul"),
        ({"NUMBA_DISABLE_JIT": "1"}, "gfni", "aes, avx2, bmi2, gfni, pclmul, vaes, vpclmulqdq"),
    ],
    ids=["features", "generic", "no_compiler"],
)
@pytest.mark.skipif("gfni" not in SUPPORTED, reason="the names of what is missing depend on the machine")
def test_a_tier_that_cannot_run_is_refused_with_what_it_misses(environment, name, missing):
    words = f"got '{name}', which needs {missing}, and this machine has not; supported here: "
    refused = run(PROGRAM, DEEPLOCK_TIER=name, **environment)
    assert refused.startswith("UnsupportedTierError DEEPLOCK_TIER: " + words)
    refused = run(PROGRAM, name, **environment)
    assert refused.startswith("UnsupportedTierError name: " + words)


def test_refusing_in_this_process_changes_nothing(monkeypatch):
    before = active_tier()
    monkeypatch.setattr(tiers, "host_features", frozenset)
    with pytest.raises(
        UnsupportedTierError, match=r"^name: got 'avx512', which needs aes, avx512bw, .*: portable$"
    ):
        use_tier("avx512")
    assert active_tier() is before


@pytest.mark.parametrize("cache", ["0", "1"], ids=["no_cache", "cache"])
def test_without_a_compiler_the_portable_tier_runs_as_plain_python(cache):
    output = run(PROGRAM, NUMBA_DISABLE_JIT="1", DEEPLOCK_CACHE=cache)
    assert output.split() == ["portable", "portable"]


# What the code is made of

# That of AArch64 is looked at in test_aarch64.py.
FORM_OF_ITS_OWN = {"avx512": "affine", "gfni": "affine", "avx2": "aes", "portable": "table"}


def representatives(tier_name):
    """Name kernels of each operation, with the form that makes the tier and with a table."""
    form = FORM_OF_ITS_OWN[tier_name]
    own = [KernelName("counter", 128, "aes", "lock"), KernelName("expansion_indexed", 192, "aes_inverse", "unlock")]
    return [
        *(name for name in own if name.form in BY_NAME[tier_name].forms),
        KernelName("counter", 256, form, "lock"),
        KernelName("counter_list", 128, "table", "unlock"),
        KernelName("counter_past_cache", 192, "identity", "lock"),
        KernelName("expansion", 192, form, "lock"),
        KernelName("expansion_indexed", 128, "table", "lock"),
        KernelName("expansion_chain", 256),
        KernelName("counter_sealed", 128, form, "lock"),
        KernelName("counter_sealed", 256, "table", "unlock"),
        KernelName("rekey", 192, form),
        KernelName("rekey_masked", form="table"),
        KernelName("seal"),
        KernelName("seal_keys"),
        KernelName("xor_sum"),
        KernelName("substitute", form="table"),
        KernelName("substitute", form=form),
    ]


CODE = [(tier, name) for tier in FORM_OF_ITS_OWN for name in dict.fromkeys(representatives(tier))]
each_code = pytest.mark.parametrize(("tier_name", "name"), CODE, ids=str)
each_code_of_x86 = pytest.mark.parametrize(
    ("tier_name", "name"), [pair for pair in CODE if not (ARM and pair[0] == "portable")], ids=str
)


class Instruction(NamedTuple):
    """A line of assembly in AT&T's order: the destination comes last."""

    mnemonic: str
    operands: tuple[str, ...]


LABEL, FUNCTION = "label:", "function:"


def instructions(assembly):
    """List the instructions and labels of an assembly, but no directives."""
    code = []
    for line in (line.split("#")[0].strip() for line in assembly.splitlines()):
        if line.endswith(":"):
            code.append(Instruction(LABEL if line.startswith(".L") else FUNCTION, (line[:-1],)))
        elif line and line[0] != ".":
            mnemonic, *rest = line.split(None, 1)
            code.append(Instruction(mnemonic, tuple(re.split(r",\s*(?![^(]*\))", rest[0])) if rest else ()))
    return code


@functools.cache
def code_of(tier_name, name):
    return instructions(tiers.assembly(BY_NAME[tier_name], name))


def check_instructions(tier_name, name, code):
    """Check that code has the instructions and the registers that name its tier, and none above it."""
    code = [line for line in code if line.mnemonic not in (LABEL, FUNCTION)]
    whole = "\n".join(f"{mnemonic} {', '.join(operands)}" for mnemonic, operands in code)
    used = {mnemonic for mnemonic, _ in code}
    if tier_name == "portable":
        assert not re.search(r"[yz]mm|\.16b|aes|gf2p8|^v", whole, re.MULTILINE)
        return
    counter = name.operation.startswith("counter") or name.operation in ("rekey", "seal_keys")
    seals = name.operation in ("counter_sealed", "rekey", "seal", "seal_keys")
    assert ("vpclmulqdq" in used) == seals
    if counter:
        assert {"vaesenc", "vaesenclast"} <= used
    elif name.operation.startswith("expansion"):
        assert "vaesenclast" in used
    assert ("vmovntdq" in used) == (name.operation == "counter_past_cache")
    widest = {"avx512": "zmm", "gfni": "ymm", "avx2": "ymm"}[tier_name]
    assert widest in whole or name.operation in ("expansion_chain", "seal_keys"), "these fill 128 bits"
    assert tier_name == "avx512" or "zmm" not in whole

    def operands_of(*mnemonics):
        return ["".join(operands) for mnemonic, operands in code if mnemonic in mnemonics]

    galois = operands_of("vgf2p8affineqb"), operands_of("vgf2p8affineinvqb")
    by_galois = {"affine": (True, True), "aes": (False, tier_name != "avx2")}
    assert tuple(map(bool, galois)) == by_galois.get(name.form, (False, False))
    both_ways = name.operation.startswith("rekey") and name.form == "aes" and tier_name == "avx2"
    assert ("vaesdeclast" in used) == (name.form == "aes_inverse" or both_ways)
    assert all(widest in operands for operands in (*galois[0], *galois[1]))
    if counter and name.operation != "seal_keys":
        register = "xmm" if tier_name == "avx2" else widest
        assert all(register in operands for operands in operands_of("vaesenc"))
    if name.form == "table":
        lookups = operands_of("vpermi2b", "vpermt2b") if tier_name == "avx512" else operands_of("vpshufb")
        assert sum(widest in operands for operands in lookups) >= (2 if tier_name == "avx512" else 16)
    if seals and name.operation != "seal_keys":
        register = "xmm" if tier_name == "avx2" else widest
        assert any(register in operands for operands in operands_of("vpclmulqdq"))
    if tier_name == "avx2":
        assert not any("ymm" in operands for operands in operands_of("vpclmulqdq"))
        aes = operands_of("vaesenc", "vaesenclast", "vaesdec", "vaesdeclast")
        assert not any("ymm" in operands for operands in aes)
        assert aes or name.form == "table" or name.operation in ("seal", "xor_sum")


@each_code
def test_code_has_the_instructions_that_name_its_tier(tier_name, name):
    check_instructions(tier_name, name, code_of(tier_name, name))


@pytest.mark.parametrize("tier_name", FORM_OF_ITS_OWN)
def test_code_of_any_tier_can_be_made_where_it_cannot_run(tier_name):
    names = KernelName("counter", 128, "table", "lock"), KernelName("substitute", form="table")
    program = """
import json, sys
from deeplock_kernels.kernels.signatures import KernelName
from deeplock_kernels.runtime.tiers import TIERS, assembly
tier = next(tier for tier in TIERS if tier.name == sys.argv[1])
assert tier.supported == (tier.name == "portable")
print(json.dumps([assembly(tier, KernelName(*name)) for name in json.loads(sys.argv[2])]))
"""
    output = run(program, tier_name, json.dumps(names), NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    for name, assembly in zip(names, json.loads(output), strict=True):
        check_instructions(tier_name, name, instructions(assembly))


CHECKED = """
import numpy as np
from deeplock_kernels.kernels import house
from deeplock_kernels.kernels.memory import read_byte, write_byte
from deeplock_kernels.kernels.signatures import KernelName
from deeplock_kernels.runtime.tiers import TIERS, assembly

TABLE = np.arange(256)

def unproven(record):
    write_byte(record, TABLE[read_byte(record) + read_byte(record + 1)])

print(house.emit(house.compile_module(unproven), frozenset())[1])
for name in (KernelName("counter", 192, "table", "unlock"), KernelName("expansion_chain", 256)):
    print("kernel")
    print(assembly(TIERS[-1], name))
"""


def test_every_look_up_of_the_portable_tier_is_proven_to_be_within_its_table():
    """Numba checks indices if told to; where the compiler sees that they fit, nothing is left of that."""
    found = [run(CHECKED, NUMBA_BOUNDSCHECK=value).split("\nkernel\n") for value in "01"]
    (unproven, *kernels), (checked, *checked_kernels) = (
        [[line.mnemonic for line in instructions(text)] for text in texts] for texts in found
    )
    assert len(unproven) < len(checked)
    assert kernels == checked_kernels
    assert len(kernels) == 2


# Constant time. In a tier that claims it, data, key stream and tables live in vector registers, and
# instructions on those take the same time whatever they hold. Time could tell of them only through an
# address, a branch or a length, and those come from general registers and flags. So it is followed, along
# every way through the code, which general registers, flags and bytes of the stack hold data: what came
# from a vector register, or from memory other than the stack. No secret are the arguments in their record, the
# records of a list and the start of the counter, which tells where it carries. All this looks at code, it does
# not measure time.

MEMORY = re.compile(r"[-\w.]*\((?P<registers>[^)]*)\)$")
SETS_FLAGS_FROM_VECTORS = re.compile(r"v?(ptest|u?comis|pcmp[ei]str)|vtest|k(or)?test")
READS_FLAGS = re.compile(r"j(?!mp)|cmov|set|adc|sbb|rc[lr]")
KEPT_BY_CALLS = {"rbx", "rbp", "rsp", "r12", "r13", "r14", "r15"}
LOST_BY_CALLS = {"rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11"}
# What may hold something else than the address of the record of arguments: in the end ("other", where).
NO_RECORD = {("other", register) for register in KEPT_BY_CALLS | LOST_BY_CALLS}
KEEPS_FLAGS = re.compile(r"mov|lea|push|pop|j|cmov|set|call|ret|prefetch|nop|bswap|not|vzero")


RECORDS_OF_LISTS = {  # how many integers a record has, and which one is the place of its tag
    "counter_list": (5, None),
    "counter_sealed": (8, 7),
    "rekey": (9, 7),
    "rekey_masked": (4, None),
    "seal": (8, 7),
}


def general_register(operand):
    """Give the 64-bit name of a general register, whatever part of it an operand names; None for all else."""
    name = operand.removeprefix("%") if operand.startswith("%") else ""
    if re.fullmatch(r"r\d+[dwb]?", name):
        return name.rstrip("dwb")
    letters = re.fullmatch(r"[re]?([abcd])[xhl]|[re]?(si|di|bp|sp)l?", name)
    return letters and "r" + (letters[1] + "x" if letters[1] else letters[2])


def stack_bytes(operand, nbytes):
    """Give the bytes of the stack at an operand, as (register, displacement), or none if it is elsewhere."""
    place = re.fullmatch(r"(-?\d*)\(%(rsp|rbp)\)", operand)
    return {(place[2], int(place[1] or 0) + i) for i in range(nbytes)} if place else set()


def instructions_that_tell_of_data(name, code):
    """List those whose address, branch or length depends on data."""
    public = "nothing"
    if name.operation.startswith("counter") or name.operation == "rekey":
        public = (
            rf"({name.bits // 8}|{name.bits // 8 + 8})\(%\w+\)"  # the start of the counter, behind the key
        )
    if name.operation in RECORDS_OF_LISTS:
        places = "|".join(str(8 * i) for i in range(1, RECORDS_OF_LISTS[name.operation][0]))
        public += rf"|({places})?\(%\w+,%\w+(,8)?\)"
    at_labels, before = {}, None  # what may hold data where a label is reached, by whatever way
    while at_labels != before:
        before = {label: set(held) for label, held in at_labels.items()}
        found = []
        # General registers, "flags" and bytes of the stack that hold data, or None behind a jump.
        held = set(NO_RECORD)
        for line in code:
            if line.mnemonic == FUNCTION:  # Numba's own functions have two arguments before the first
                record = "rdi" if line.operands[0] == "deeplock_kernel" else "rdx"
                held = NO_RECORD - {("other", record)}
            elif line.mnemonic == LABEL:
                held = at_labels.setdefault(line.operands[0], set()) | (held or set())
                at_labels[line.operands[0]] = set(held)
            elif held is not None:
                found += follow(line, held, public)
                if line.mnemonic[0] == "j":
                    at_labels.setdefault(line.operands[0], set()).update(held)
                if line.mnemonic.startswith(("jmp", "ret", "ud2")):
                    held = None
    return found


def follow(line, held, public):
    """Note what holds data after an instruction; give a list of it if it tells of data."""
    mnemonic, operands = line
    last = operands[-1] if operands else ""
    wide = {"%x": 16, "%y": 32, "%z": 64}.get(operands[0][:2], 0) if operands else 0
    addresses = [MEMORY.match(operand) for operand in operands]
    used = {part.strip() for address in addresses if address for part in address["registers"].split(",")}
    tells = any(general_register(part) in held or part[:2] in ("%x", "%y", "%z") for part in used)
    if mnemonic[0] in "vk":
        if general_register(last):
            held.add(general_register(last))
        held |= stack_bytes(last, wide or 8)
        if SETS_FLAGS_FROM_VECTORS.match(mnemonic):
            held.add("flags")
        return [line] if tells else []
    if mnemonic.startswith("lea"):
        tells = False
    if mnemonic.startswith("call"):
        tells = tells or not held.isdisjoint(
            general_register(operand) for operand in ("%rdi", "%rsi", "%rdx")
        )
    if READS_FLAGS.match(mnemonic) and "flags" in held:
        tells = True

    def has_data(operand, address):
        if not address:
            return general_register(operand) in held
        if stack_bytes(operand, 8):
            return not held.isdisjoint(stack_bytes(operand, 8))
        argument = re.fullmatch(r"\d*\(%(\w+)\)", operand)
        if argument and ("other", argument[1]) not in held:
            return False
        return mnemonic != "movq" or not re.fullmatch(public, operand)

    replaces = mnemonic.startswith(("mov", "set")) or (
        mnemonic[:3] in ("xor", "sub") and len(set(operands)) == 1
    )
    if mnemonic.startswith("lea"):
        data = any(general_register(part) in held for part in used)
    elif mnemonic.startswith(("prefetch", "pop", "nop")) or (
        replaces and len(operands) > 1 and operands[0] == last
    ):
        data = False
    else:
        sources = list(zip(operands, addresses, strict=True))
        data = any(has_data(*source) for source in (sources[:-1] if replaces else sources))
    written = {general_register(last)} - {None} or stack_bytes(last, 8)
    if not mnemonic.startswith(("cmp", "test", "push")):
        held.difference_update(written)
        held.update(written if data else ())
        sources = {general_register(operands[0])} - {None} or stack_bytes(operands[0], 8) if operands else set()
        if mnemonic == "movq" and sources and not any(("other", source) in held for source in sources):
            held.difference_update(("other", place) for place in written)
        else:
            held.update(("other", place) for place in written)
    if mnemonic.startswith("call"):
        held.update(("other", register) for register in LOST_BY_CALLS)
    if not KEEPS_FLAGS.match(mnemonic):
        held.discard("flags")
        held.update({"flags"} if data else ())
    return [line] if tells else []


@each_code_of_x86
def test_time_cannot_tell_of_data_in_a_constant_time_tier(tier_name, name):
    code = code_of(tier_name, name)
    lines = instructions_that_tell_of_data(name, code)
    if BY_NAME[tier_name].constant_time:
        assert lines == []
    elif name.operation != "xor_sum":
        assert lines, "bytes are looked up in memory here: what does not see that sees nothing"


@pytest.mark.parametrize(
    "lines",
    [
        "movzbl (%rdi), %eax; movzbl (%rcx,%rax), %eax",
        "movzbl (%rdi), %eax; xorl %esi, %eax; movl (%rcx,%rax,4), %edx",
        "movl (%rdi), %eax; shrl $8, %eax; movzbl %al, %edx; vmovdqu (%rcx,%rdx), %xmm0",
        "movl (%rdi), %eax; leaq (%rcx,%rax), %rdx; movb (%rdx), %al",
        "vpextrb $3, %xmm1, %eax; movb (%rcx,%rax), %al",
        "vmovd %xmm1, %eax; prefetcht0 (%rcx,%rax)",
        "vmovq %xmm0, %r8; movb $1, (%r8)",
        "vpgatherdd %ymm1, (%rax,%ymm2,4), %ymm3",
        "vpmovmskb %ymm1, %eax; testl %eax, %eax; jne .LBB0_1",
        "kmovq %k1, %rax; orq %rcx, %rax; cmovneq %rdx, %rcx",
        "vptest %ymm1, %ymm1; je .LBB0_1",
        "cmpb $0, (%rdi); jne .LBB0_1",
        "movq 16(%rdi), %rax; movb (%rax), %al",
        "vmovdqa %ymm0, 64(%rsp); movl 80(%rsp), %eax; movb (%rcx,%rax), %al",
        "movl (%rdi), %eax; movq %rax, 8(%rsp); movq 8(%rsp), %rcx; movb (%rcx), %al",
        "movzbl (%rdi), %edx; callq *%rax",
        "deeplock_kernel:; movq 8(%rdi), %rax; movq (%rax), %rcx; movb (%rcx), %cl",
        "deeplock_kernel:; movq 8(%rdi), %rdi; movq (%rdi), %rcx; movb (%rcx), %cl",
        "_ZN1a:; movq 8(%rdi), %rcx; movb (%rcx), %cl",
        "_ZN1a:; callq *%rax; movq 8(%rdx), %rcx; movb (%rcx), %cl",
        "_ZN1a:; cmpl $1, %eax; je .L1; movq %rax, %rdx; .L1:; movq 8(%rdx), %rcx; movb (%rcx), %cl",
        ".LBB0_1:; movb (%rcx,%rax), %dl; movl (%rdi), %eax; jmp .LBB0_1",
        "vmovd %xmm0, %eax; jmp .LBB0_2; .LBB0_1:; movb (%rax), %cl; .LBB0_2:; cmpl $1, %edi; je .LBB0_1",
    ],
)
def test_what_tells_of_data_is_seen(lines):
    assert instructions_that_tell_of_data(KernelName("substitute"), instructions(lines.replace(";", "\n")))


@pytest.mark.parametrize(
    "lines",
    [
        "movl (%rdi), %eax; xorl 4(%rdi), %eax; vmovd %eax, %xmm0; xorl %eax, %eax; movb (%rax), %cl",
        ".LBB0_1:; movb (%rcx,%rax), %dl; movl (%rdi), %eax; movl %edx, %eax; xorl %eax, %eax; jmp .LBB0_1",
        "vmovd %xmm0, %eax; jmp .LBB0_2; .LBB0_1:; movb (%rax), %cl; .LBB0_2:; ret",
        "cmpq $64, %rcx; jne .LBB0_1; vmovdqu (%rdi,%rcx), %ymm0",
        "vmovdqa %ymm0, 64(%rsp); movq %rax, 64(%rsp); movq 64(%rsp), %rcx; movb $0, (%rcx)",
        "deeplock_kernel:; movq 8(%rdi), %rax; movb (%rax), %cl",
        "_ZN1a:; movq %rdx, 8(%rsp); callq *%rax; movq 8(%rsp), %rsi; movq 16(%rsi), %rax; movb (%rax), %cl",
    ],
)
def test_what_does_not_tell_of_data_is_let_through(lines):
    assert not instructions_that_tell_of_data(
        KernelName("substitute"), instructions(lines.replace(";", "\n"))
    )


@each_code
def test_code_calls_nothing_but_a_copy_of_memory(tier_name, name):
    """An object that is kept must not depend on Numba or Python."""
    named = re.findall(r"\$([a-zA-Z_][\w.]*)", str(code_of(tier_name, name)))
    assert {symbol for symbol in named if not symbol.startswith("_ZN16deeplock_kernels")} <= {"memcpy"}


# The self-test


def bytes_compared(tier, name, record):
    """Give addresses in what a kernel writes in its self-test: the first byte, the last one, the one behind it."""
    target, second, *rest = RECORDS[name.operation].unpack(record)
    if name.operation in RECORDS_OF_LISTS:
        length, tag = RECORDS_OF_LISTS[name.operation]
        rows = np.ctypeslib.as_array((ctypes.c_int64 * (length * second)).from_address(target)).reshape(second, -1)
        ends = [] if name.operation == "seal" else [rows[0, 0], rows[-1, 0] + rows[-1, 2] - 1, rows[-1, 0] + rows[-1, 2]]
        return [*map(int, ends), *([] if tag is None else [int(rows[0, tag]), int(rows[-1, tag]) + TAG_BYTES - 1])]
    if name.operation == "expansion_chain":  # nothing behind it is compared
        return [target + name.bits // 8, target + 2 * name.bits // 8 - 1]
    if name.operation == "expansion_indexed":  # of each segment 200 bytes are
        segment = segment_bytes(name.bits)
        return [target, target + 3 * segment + 199, target + 4 * segment]
    if name.operation == "seal_keys":  # of each key the mask is
        mask, last = (16 if tier.name == "portable" else 256), target + SEAL_KEYS_BYTES
        return [target + mask, last + mask + TAG_BYTES - 1, last + SEAL_KEYS_BYTES]
    nbytes = {"xor": second, "xor_sum": 64}.get(name.operation, rest[0])
    return [target, target + nbytes - 1, target + nbytes]


@pytest.mark.parametrize(("tier", "name"), support.EVERY_KERNEL, indirect=["tier"], ids=support.kernel_id)
def test_self_test_sees_one_wrong_bit(tier, name):
    right, sibling = tiers.kernel(tier, name), functools.partial(tiers.kernel, tier)
    selftest.check(tier.name, name, right, sibling)
    place, places = 0, [0]

    def wrong(record):
        right(record)
        places[:] = bytes_compared(tier, name, record)
        ctypes.c_uint8.from_address(places[place]).value ^= 0x10

    while place < len(places):
        with pytest.raises(SelfTestError, match=rf"^kernel {tier.name}-{name}: got a wrong answer"):
            selftest.check(tier.name, name, wrong, sibling)
        place += 1
    assert place > 1


@pytest.fixture
def unloaded(monkeypatch):
    """Forget the kernels that this process has loaded and tested."""
    monkeypatch.setattr(tiers, "_kernels", {})
    support.forget_transforms()
    yield
    support.forget_transforms()


def lock_and_compare(schedule="counter"):
    """Lock in place, which either raises and changes nothing, or is right."""
    data, keys = painted(300), support.make_schedule(schedule, 256)
    try:
        lock(data, keys, sbox=BOXES["random"], out=data)
    except BaseException:
        assert np.array_equal(data, painted(300))
        raise
    stream = support.key_stream(schedule, 256, 300)
    assert np.array_equal(data, support.expected("lock", painted(300), stream, BOXES["random"]))


@pytest.mark.parametrize("schedule", support.SCHEDULES)
def test_a_kernel_that_fails_its_self_test_is_never_used(tier, schedule, unloaded, monkeypatch):
    original = tiers._load

    def load(chosen, name):
        right = original(chosen, name)

        def wrong(record):
            right(record)
            target, _, nbytes, *_ = RECORDS[name.operation].unpack(record)
            ctypes.c_uint8.from_address(target + nbytes // 2).value ^= 1

        return wrong if name.operation == schedule else right

    with monkeypatch.context() as patched:
        patched.setattr(tiers, "_load", load)
        for _ in range(2):
            with pytest.raises(SelfTestError, match=rf"^kernel {tier.name}-{schedule}_256_table_lock: got"):
                lock_and_compare(schedule)
    lock_and_compare(schedule)


CORRUPTED = """
import sys
from deeplock_kernels import reference
from deeplock_kernels.kernels import signatures

def flipped(table, place):
    return table[:place] + bytes([table[place] ^ 1]) + table[place + 1 :]

if sys.argv[1] == "Rcon":
    signatures.RCON_WORDS = flipped(signatures.RCON_WORDS, signatures.RCON_START)
elif sys.argv[1] == "the oracle's S-Box":
    reference.AES_SBOX = reference.AES_SBOX[::-1]

from deeplock_kernels import CounterSchedule, ExpansionSchedule, lock
from deeplock_kernels.errors import SelfTestError
from deeplock_kernels.runtime import selftest

if sys.argv[1] == "the digests":
    selftest.CHAIN_DIGESTS = {bits: digest[::-1] for bits, digest in selftest.CHAIN_DIGESTS.items()}

for keys in (CounterSchedule(bytes(16), bytes(16)), ExpansionSchedule(bytes(16))):
    for offset in (0, signatures.segment_bytes(128)):
        data = bytearray(100)
        try:
            lock(data, keys, offset=offset, out=data)
            print("locked")
        except SelfTestError:
            assert not any(data)
            print("refused")
"""


@pytest.mark.parametrize(
    ("what", "refused"),
    [
        ("nothing", "locked locked locked locked"),
        ("Rcon", "refused refused refused refused"),
        ("the oracle's S-Box", "refused refused refused refused"),
        ("the digests", "locked locked locked refused"),
    ],
)
def test_with_a_corrupted_table_nothing_is_locked(tier, what, refused):
    assert run(CORRUPTED, what, DEEPLOCK_TIER=tier.name).split() == refused.split()


# Objects in the cache


def object_code(tier, name):
    """Give the object code of a kernel."""
    tiers.kernel(tier, name)
    code = codecache.load(f"{tier.name}-{name}")
    if code is None:  # the cache is turned off
        from deeplock_kernels.kernels import house

        code, _ = house.emit(house.compile_module(tiers.build(tier, name)), tier.requires)
    return code


NAME = KernelName("counter", 256, "table", "lock")
REVERSED = bytes(range(15, -1, -1))  # the order in which tiers of x86 shuffle a counter's bytes
ROTATED = bytes((13, 14, 15, 12)) * 4  # RotWord, by which neon expands a key


@pytest.fixture
def own_cache(tier, tmp_path, monkeypatch, request):
    """Give the right object code and a cache of this test's own, in which there is nothing yet."""
    code = object_code(tier, NAME)
    monkeypatch.setenv("DEEPLOCK_CACHE", "1")
    monkeypatch.setenv("DEEPLOCK_CACHE_DIR", str(tmp_path))
    request.getfixturevalue("unloaded")
    return code


def test_right_code_from_the_cache_is_used_as_it_is(tier, own_cache, monkeypatch):
    codecache.save(f"{tier.name}-{NAME}", own_cache)
    original = tiers.build

    def build(chosen, name):
        assert name != NAME, "it was compiled"
        return original(chosen, name)

    with monkeypatch.context() as patched:
        patched.setattr(tiers, "build", build)
        lock_and_compare()


def test_altered_code_with_a_right_digest_is_not_used(tier, own_cache):
    """A constant is changed: an entry of AES's table, or the order in which a counter's or a key's bytes are read."""
    if tier.name == "portable":
        right = portable.SUBSTITUTED.tobytes()
        wrong = right[:8] + right[8:16][::-1] + right[16:]
    else:
        right = ROTATED if tier.name == "neon" else REVERSED
        wrong = right[:-2] + right[:-3:-1]
    assert right in own_cache
    codecache.save(f"{tier.name}-{NAME}", own_cache.replace(right, wrong))
    for _ in range(2):
        with pytest.raises(SelfTestError, match=rf"^kernel {tier.name}-{NAME}: got a wrong answer"):
            lock_and_compare()


def test_code_of_another_kernel_is_not_used(tier, own_cache, monkeypatch):
    with monkeypatch.context() as patched:
        patched.delenv("DEEPLOCK_CACHE_DIR")
        other = object_code(tier, NAME._replace(direction="unlock"))
    codecache.save(f"{tier.name}-{NAME}", other)
    with pytest.raises(SelfTestError, match=rf"^kernel {tier.name}-{NAME}: got a wrong answer"):
        lock_and_compare()
