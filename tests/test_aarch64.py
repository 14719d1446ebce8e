"""The code of the neon tier, emitted on any machine: its instructions, what it loads, stores and calls.

That it also computes the right bytes is what all other tests say on AArch64; `.ci/aarch64` runs them anywhere.
"""

from __future__ import annotations

import functools
import platform
import re
from typing import NamedTuple

import pytest
from processes import run

from deeplock_kernels.kernels.signatures import KernelName, every_name
from deeplock_kernels.runtime import tiers
from deeplock_kernels.runtime.tiers import TIERS

NEON = next(tier for tier in TIERS if tier.name == "neon")
NAMES = [
    name
    for name in every_name(NEON.forms)
    # These have an order of the same instructions, and rekeying takes the rounds that locking does.
    if not (name.direction == "unlock" and name.form != "aes_inverse")
    and not (name.operation == "rekey" and (name.bits > 128 or name.form == "aes_inverse"))
]
each_kernel = pytest.mark.parametrize("name", NAMES, ids=str)

ROUNDS = {128: 10, 192: 12, 256: 14}  # FIPS 197
KEY_SUBSTITUTIONS = {128: 10, 192: 8, 256: 13}  # SubWord in the expansion of an AES key
# SubWord in one step of the chain, alone and where it makes a key stream, and the bytes of that step.
CHAIN_SUBSTITUTIONS = {128: 4, 192: 4, 256: 8}
STREAM_SUBSTITUTIONS = {128: 4, 192: 8, 256: 4}
STREAM_BYTES = {128: 64, 192: 192, 256: 64}


class Instruction(NamedTuple):
    """A line of assembly: the destination of a computation comes first, the place in memory last."""

    mnemonic: str
    operands: tuple[str, ...] = ()

    @property
    def place(self):
        return self.operands[-1] if self.operands else ""


LABEL = "label:"


@functools.cache
def code_of(name):
    return instructions(tiers.assembly(NEON, name))


def instructions(assembly):
    """List the instructions and labels of an assembly, but no directives."""
    code = []
    for line in (line.split("//")[0].strip() for line in assembly.splitlines()):
        mnemonic, *rest = line.split(None, 1)[:2] or [""]
        if mnemonic.endswith(":"):
            code.append(Instruction(LABEL, (mnemonic[:-1],)))
        elif mnemonic and mnemonic[0] != ".":
            # An address in brackets is one operand, with what is added to it afterwards, and so is a list of registers.
            operands = re.findall(r"\[[^]]*\](?:!|, #-?\d+)?|\{[^}]*\}|[^\s,{[][^,]*", "".join(rest))
            code.append(Instruction(mnemonic, tuple(operands)))
    return code


def registers(operands, kinds):
    return [operand for operand in operands if re.fullmatch(rf"[{kinds}](\d+|zr)(\.\w+)?(\[\d+\])?", operand)]


def takes_counters(name):
    return name.operation.startswith("counter") or name.operation == "rekey"


def blocks_of_a_step(name):
    """Give the number of AES blocks that the main loop changes in one step: a register each."""
    counter, expansion = takes_counters(name), name.operation.startswith("expansion")
    step = 256 if counter or name.operation == "seal" else STREAM_BYTES[name.bits] if expansion else 64
    return step // 16 * (4 if name.operation == "expansion_indexed" else 1)


def counted(name):
    """Count the instructions of AES and the look-ups in 64 bytes of a table."""
    counts = dict.fromkeys(("aese", "aesmc", "aesd", "aesimc", "tbl", "tbx"), 0)
    for mnemonic, operands in code_of(name):
        if mnemonic in counts and (mnemonic != "tbl" or operands[1].count(",") == 3):
            counts[mnemonic] += 1
    return counts


@pytest.mark.parametrize("name", [name for name in NAMES if name.form in ("identity", "")], ids=str)
def test_key_stream_takes_as_many_aes_instructions_as_needed(name):
    """No more, no less: nothing is computed twice, and nothing in another way."""
    counts = counted(name)
    if takes_counters(name):
        blocks, rest = divmod(counts["aesmc"], ROUNDS[name.bits] - 1)
        assert rest == 0
        assert blocks % blocks_of_a_step(name) == 0
        assert blocks > 0
        # Ends of a buffer may have code of their own, and make the key again.
        keys, rest = divmod(counts["aese"] - blocks * ROUNDS[name.bits], KEY_SUBSTITUTIONS[name.bits])
        assert rest == 0
        assert keys in ((2, 4) if name.operation == "rekey" else (1, 2))
    elif name.operation == "seal_keys":  # what of the two blocks nobody needs may be left out
        blocks, rest = divmod(counts.pop("aese") - KEY_SUBSTITUTIONS[256], ROUNDS[256])
        assert (blocks in (2, 3, 4), rest) == (True, 0)
        assert counts.pop("aesmc") > 0
        assert not any(counts.values())
    elif name.operation.startswith("expansion"):
        chains = 4 if name.operation == "expansion_indexed" else 1
        alone = name.operation == "expansion_chain"
        substitutions = (CHAIN_SUBSTITUTIONS if alone else STREAM_SUBSTITUTIONS)[name.bits]
        assert counts == dict.fromkeys(counts, 0) | {"aese": chains * substitutions}
    else:
        assert not any(counts.values())


IN_A_BLOCK = {"aes": {"aese": 1}, "aes_inverse": {"aesd": 1}, "table": {"tbl": 1, "tbx": 3}}
TO_AND_FRO = {"aes": {"aese": 1, "aesd": 1}, "aes_inverse": {"aese": 1, "aesd": 1}, "table": {"tbl": 2, "tbx": 6}}


@pytest.mark.parametrize("name", [name for name in NAMES if name.form in IN_A_BLOCK], ids=str)
def test_box_takes_as_many_instructions_as_needed(name):
    plain = counted(name._replace(form="identity"))
    added = {mnemonic: count - plain[mnemonic] for mnemonic, count in counted(name).items()}
    in_a_block = (TO_AND_FRO if name.operation.startswith("rekey") else IN_A_BLOCK)[name.form]
    blocks = max(added[mnemonic] // in_a_block.get(mnemonic, 1) for mnemonic in ("aese", "aesd", "tbl"))
    assert blocks > 0
    assert blocks % blocks_of_a_step(name) == 0
    wanted = {mnemonic: count * blocks for mnemonic, count in in_a_block.items()}
    assert added == dict.fromkeys(added, 0) | wanted


SEALING = ("counter_sealed", "rekey", "seal")


@each_kernel
def test_each_block_is_stored_once_and_asked_for_ahead(name):
    code = code_of(name)
    past_cache = name.operation.endswith("_past_cache")
    stored = {
        past: sum(
            len(registers(line.operands, "q"))
            for line in code
            if re.match("stnp" if past else "st(?!np)", line.mnemonic) and "[sp" not in line.place
        )
        for past in (False, True)
    }
    if name.operation in ("expansion_chain", "seal_keys", "xor_sum"):
        only = {"expansion_chain": name.bits // 128 or 1, "seal_keys": 3, "xor_sum": 8}
        assert stored == {False: only[name.operation], True: 0}
        return
    blocks = blocks_of_a_step(name)
    changed = 0 if name.operation == "seal" else blocks
    tags = (1, 2) if name.operation in SEALING else (0,)  # where the first piece goes another way, there are two
    assert stored[past_cache] - changed in tags, "what goes through the scratch copy lies on the stack"
    assert stored[not past_cache] == 0
    assert sum(line.mnemonic == "prfm" for line in code) >= blocks // 4
    assert any(line.mnemonic == "dmb" for line in code) == past_cache


@each_kernel
def test_code_calls_nothing_but_a_copy_of_memory(name):
    """An object that is kept must not depend on Numba or Python."""
    code = code_of(name)
    called = {line.operands[0] for line in code if line.mnemonic in ("b", "bl")}
    placed = {symbol for line in code for symbol in re.findall(r":abs_g\d\w*:([\w.]+)", line.place)}
    outside = {symbol for symbol in called | placed if not symbol.startswith(("_ZN16deeplock_kernels", ".L"))}
    assert outside <= {"memcpy", "memmove"}
    assert not {line.mnemonic for line in code} & {"br", "blr", "svc"}


@each_kernel
def test_nothing_goes_from_vector_registers_to_general_ones(name):
    assert [line for line in code_of(name) if general(line.operands[:1]) and registers(line.operands[1:], "vqdshb")] == []


# Constant time. In vector registers data, key stream and tables are of no harm: instructions on those take the same
# time whatever they hold. Time could tell of them through an address or a branch, and those come from general registers
# and flags. So it is followed, along every way through the code, which of these and which bytes of the stack hold data:
# what came from a vector register, or from memory other than the stack. No secret are the arguments, at which x2 points
# at first, the records of a list, which the first argument gives, and the start of a counter, which tells where it carries.

SIZES = {"q": 16, "d": 8, "x": 8, "s": 4, "w": 4}
LISTS = ("counter_list", "counter_sealed", "rekey", "rekey_masked", "seal")
SETS_FLAGS = ("cmp", "cmn", "tst", "ccmp", "ccmn", "subs", "adds", "ands", "bics", "adcs", "sbcs", "negs", "ngcs")
READS_FLAGS = ("b.", "csel", "csinc", "csinv", "csneg", "cset", "cinc", "cinv", "cneg", "ccmp", "ccmn")


class Known(NamedTuple):
    """What is known at a place of the code: what may hold data, and what is sure to point to arguments or to a list."""

    data: frozenset
    arguments: frozenset
    records: frozenset

    def joined(self, other):
        if other is None:
            return self
        return Known(self.data | other.data, self.arguments & other.arguments, self.records & other.records)

    def written(self, places, *, data=False, arguments=False, records=False):
        """Say what places hold now."""
        sets = zip(self, (data, arguments, records), strict=True)
        return Known(*(held | set(places) if flag else held - set(places) for held, flag in sets))


AT_THE_START = Known(frozenset(), frozenset(("x2",)), frozenset())


def general(operands):
    return ["x" + register[1:] for register in registers(operands, "xw") if not register.endswith("zr")]


def stack_bytes(line):
    """Give the bytes of the stack that a load or a store is about, as (register, displacement), for each register."""
    place = re.fullmatch(r"\[(sp|x29)(?:, #(-?\d+))?\](!?).*", line.place)
    if not place:
        return None
    start, found = 0 if place[3] else int(place[2] or 0), {}
    for register in registers(line.operands[:-1], "qdxsw"):
        size = SIZES[register[0]]
        found[register] = {(place[1], start + i) for i in range(size)}
        start += size
    return found


def instructions_that_tell_of_data(name, code):
    """List those whose address or branch depends on data."""
    at_labels, before = {}, None
    while at_labels != before:
        before = dict(at_labels)
        found, known = [], None
        for line in code:
            if line.mnemonic == LABEL:
                label = line.operands[0]
                known = at_labels.get(label) if known is None else known.joined(at_labels.get(label))
                known = known if label.startswith(".L") else AT_THE_START
                if known is not None:  # it was reached
                    at_labels[label] = known
                continue
            if known is None:
                continue
            tells, known = follow(name, line, known)
            found += [line] if tells else []
            if line.mnemonic in ("b", "cbz", "cbnz", "tbz", "tbnz") or line.mnemonic.startswith("b."):
                at_labels[line.place] = known.joined(at_labels.get(line.place))
            if line.mnemonic in ("b", "ret", "br", "brk"):
                known = None
    return found


def follow(name, line, known):
    """Say whether an instruction tells of data, and what is known after it."""
    mnemonic, operands = line
    memory = [operand for operand in operands if operand.startswith("[")]
    addressed = general(re.findall(r"\w+", " ".join(memory)))
    used = general(operands if mnemonic in ("movk", *SETS_FLAGS[:5]) else operands[1:])
    data = not known.data.isdisjoint(used)
    tells = not known.data.isdisjoint(addressed)
    if mnemonic.startswith(READS_FLAGS):
        tells = tells or "flags" in known.data
    if mnemonic in ("cbz", "cbnz", "tbz", "tbnz", "br", "blr"):
        return tells or not known.data.isdisjoint(general(operands)), known
    if mnemonic == "bl":
        tells = tells or not known.data.isdisjoint(("x0", "x1", "x2"))
        return tells, known.written([f"x{i}" for i in range(19)] + ["flags"])
    if mnemonic.startswith("fc") and not mnemonic.startswith("fcvt"):
        return True, known
    if not operands or mnemonic.startswith(("prfm", "b.", "dmb")):
        return tells, known
    if mnemonic.startswith("st"):
        for register, places in (stack_bytes(line) or {}).items():
            (place,) = general([register]) or [None]
            known = known.written(
                places, data=(place is None and register[1:] != "zr") or place in known.data,
                arguments=place in known.arguments, records=place in known.records,
            )  # fmt: skip
        return tells, known
    if mnemonic.startswith("ld"):
        return tells, loaded(name, line, addressed, known)
    if mnemonic in SETS_FLAGS:
        known = known.written(["flags"], data=data)
    target = general(operands[:1])
    if not target or mnemonic in SETS_FLAGS[:5]:
        return tells or (data and mnemonic in ("udiv", "sdiv")), known
    data = data or bool(registers(operands[1:], "vqdshb"))
    if mnemonic in ("adc", "sbc", "ngc", "adcs", "sbcs", "ngcs"):
        data = data or "flags" in known.data
    return tells, known.written(
        target, data=data, arguments=mnemonic == "mov" and not known.arguments.isdisjoint(used),
        records=mnemonic in ("mov", "add", "madd") and not known.records.isdisjoint(used),
    )  # fmt: skip


def loaded(name, line, addressed, known):
    """Say what is known after a load."""
    stack = stack_bytes(line)
    if stack is not None:
        for register, places in stack.items():
            known = known.written(
                general([register]), data=bool(known.data & places),
                arguments=places <= known.arguments, records=places <= known.records,
            )  # fmt: skip
        return known
    start = takes_counters(name) and re.fullmatch(rf"\[x\d+, #{name.bits // 8}\]", line.place)
    no_secret = start or set(addressed) & (known.arguments | known.records)
    of_records = set(addressed) & known.arguments and name.operation in LISTS and re.match(r"\[x\d+\]", line.place)
    for i, register in enumerate(line.operands[: 2 if line.mnemonic.startswith("ldp") else 1]):
        known = known.written(general([register]), data=not no_secret, records=bool(of_records) and i == 0)
    return known


@each_kernel
def test_time_cannot_tell_of_data(name):
    assert instructions_that_tell_of_data(name, code_of(name)) == []


@pytest.mark.parametrize(
    "lines",
    [
        "umov w8, v0.b[3]; ldrb w9, [x1, x8]",
        "fmov x8, d0; cbz x8, .LBB0_1",
        "mov x8, v1.d[1]; eor x9, x9, x8; cmp x9, #1; b.eq .LBB0_1",
        "fcmp d0, #0.0",
        "ldrb w8, [x0]; tbnz w8, #3, .LBB0_1",
        "ldr x8, [x20, #16]; prfm pldl1keep, [x8]",
        "ldp x8, x9, [x1], #16; add x9, x9, x3; ldr q0, [x9]",
        "ldp x8, x9, [x1], #16; tst x8, #1; csel x0, x1, x3, eq",
        "ldr x8, [x20, #16]; st1 { v0.16b }, [x8], #16",
        "str q0, [sp, #16]; ldr x8, [sp, #24]; ldr x9, [x8]",
        "stp q0, q1, [x29, #-64]; ldur w8, [x29, #-36]; cbnz w8, .LBB0_1",
        "ldr x9, [x1]; stp x9, x8, [sp]; ldr x10, [sp]; str x0, [x10]",
        ".LBB0_1:; ldr x8, [sp]; ldr x9, [x8]; str d0, [sp]; b .LBB0_1",
        "str q0, [sp]; cbz x0, .LBB0_1; str x1, [sp]; .LBB0_1:; ldr x8, [sp]; ldr x9, [x8]",
        "ldr x2, [x2]; ldr x8, [x2, #8]; ldr x8, [x8]",
        "bl memcpy; ldr x8, [x2]; ldr x8, [x8]",
        "ldr x0, [x1]; bl memcpy",
        "ldr x8, [x1]; movk x8, #1, lsl #16; ldr x8, [x8]",
        ".LBB0_1:; ldr x8, [x2]; ldr x8, [x8]; add x2, x2, #8; b .LBB0_1",
        "ldr x8, [x2]; ldr x9, [x8, #8]; ldr x9, [x9]",
    ],
)
def test_what_tells_of_data_is_seen(lines):
    code = instructions("f:;".replace(";", "\n") + lines.replace(";", "\n"))
    assert instructions_that_tell_of_data(KernelName("substitute"), code)


@pytest.mark.parametrize(
    "lines",
    [
        "dup v0.16b, w8; fmov d0, x8; ldr q0, [x0]; ld1r { v0.4s }, [x1]",
        "ldp x8, x3, [x2]; ldr x2, [x2, #16]; f:; ldr x8, [x2]; ldr q0, [x8]",
        "str x0, [sp, #16]; ldr x8, [sp, #16]; ldr x9, [x29, #96]; ldr q0, [x8]",
        "str q0, [sp]; str x0, [sp]; ldr x8, [sp]; ldr q0, [x8]",
        "str q0, [sp, #16]; mov sp, x29; ldp x20, x19, [x29, #16]; ldp x29, x30, [sp], #96; ldr q0, [x20]",
        "ldp x8, x9, [x1]; eor x8, x8, x9; fmov d0, x8; mov x8, x3; ldr q0, [x8]",
        "mov x8, x2; ldr x9, [x8, #16]; ldr q0, [x9]",
    ],
)
def test_what_does_not_tell_of_data_is_let_through(lines):
    code = instructions("f:;".replace(";", "\n") + lines.replace(";", "\n"))
    assert not instructions_that_tell_of_data(KernelName("substitute"), code)


@pytest.mark.parametrize("operation", LISTS)
def test_records_of_a_list_are_no_secret_and_what_they_point_to_is(operation):
    lines = "f:; ldr x8, [x2]; add x9, x8, x10, lsl #6; str x9, [sp, #8]; ldr x9, [sp, #8]"
    lines += "; ldp x10, x11, [x9, #40]; ldr x12, [x10]"
    known = KernelName(operation, 256)
    assert not instructions_that_tell_of_data(known, instructions(lines.replace(";", "\n")))
    assert instructions_that_tell_of_data(known, instructions(f"{lines}; ldr x13, [x12]".replace(";", "\n")))


# That code for another architecture can be emitted changes nothing for this one

PROGRAM = """
import platform
import numba
from deeplock_kernels.kernels.signatures import KernelName
from deeplock_kernels.runtime.tiers import TIERS, active_tier, emit, kernel

name = KernelName("counter", 192, "table", "lock")
for tier in TIERS:
    code, assembly = emit(tier, name)
    print(tier.name, int.from_bytes(code[18:20], "little"))
kernel(active_tier(), name)
kernel(TIERS[-1], name)

@numba.njit
def f(a, b):
    return min(a, b) ^ 1

assert f(8, 9) == 9
"""
ELF_MACHINE = {"x86_64": 62, "aarch64": 183}


@pytest.mark.skipif(platform.machine() not in ELF_MACHINE, reason="has a third architecture")
def test_code_of_every_tier_can_be_emitted_on_either_architecture():
    """And afterwards the same process makes and runs code of its own."""
    wanted = {tier.name: ELF_MACHINE["x86_64"] for tier in TIERS}
    wanted |= {"neon": ELF_MACHINE["aarch64"], "portable": ELF_MACHINE[platform.machine()]}
    output = run(PROGRAM, DEEPLOCK_CACHE="0", timeout=300)
    assert output.split() == [word for name, machine in wanted.items() for word in (name, str(machine))]
