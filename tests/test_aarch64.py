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
    if name.direction != "unlock" or name.form == "aes_inverse"  # that is an order of the same instructions
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


def blocks_of_a_step(name):
    """Give the number of AES blocks that the main loop changes in one step: a register each."""
    counter, expansion = name.operation.startswith("counter"), name.operation.startswith("expansion")
    step = 256 if counter else STREAM_BYTES[name.bits] if expansion else 64
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
    if name.operation.startswith("counter"):
        blocks, rest = divmod(counts["aesmc"], ROUNDS[name.bits] - 1)
        assert rest == 0
        assert blocks % blocks_of_a_step(name) == 0
        assert blocks > 0
        # Ends of a buffer may have code of their own, and make the key again.
        keys, rest = divmod(counts["aese"] - blocks * ROUNDS[name.bits], KEY_SUBSTITUTIONS[name.bits])
        assert rest == 0
        assert keys in (1, 2)
    elif name.operation.startswith("expansion"):
        chains = 4 if name.operation == "expansion_indexed" else 1
        alone = name.operation == "expansion_chain"
        substitutions = (CHAIN_SUBSTITUTIONS if alone else STREAM_SUBSTITUTIONS)[name.bits]
        assert counts == dict.fromkeys(counts, 0) | {"aese": chains * substitutions}
    else:
        assert not any(counts.values())


IN_A_BLOCK = {"aes": {"aese": 1}, "aes_inverse": {"aesd": 1}, "table": {"tbl": 1, "tbx": 3}}


@pytest.mark.parametrize("name", [name for name in NAMES if name.form in IN_A_BLOCK], ids=str)
def test_box_takes_as_many_instructions_as_needed(name):
    plain = counted(name._replace(form="identity"))
    added = {mnemonic: count - plain[mnemonic] for mnemonic, count in counted(name).items()}
    blocks = max(added["aese"], added["aesd"], added["tbl"])
    assert blocks > 0
    assert blocks % blocks_of_a_step(name) == 0
    wanted = {mnemonic: count * blocks for mnemonic, count in IN_A_BLOCK[name.form].items()}
    assert added == dict.fromkeys(added, 0) | wanted


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
    if name.operation == "expansion_chain":
        assert stored == {False: name.bits // 128 or 1, True: 0}
        return
    blocks = blocks_of_a_step(name)
    assert stored[past_cache] == blocks, "what goes through the scratch copy lies on the stack"
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


# Constant time. Data, key stream and tables live in vector registers, and no instruction takes anything from those
# to a general register or to the flags. So no address, branch or length can depend on them, as long as general
# registers load nothing else than the arguments, the start of the counter, which tells where it carries, the records
# of a list, and from the stack what they or the caller put there. What lies on the stack, and how long x2 points to
# the arguments, is followed along every way through the code.

SIZES = {"q": 16, "d": 8, "x": 8, "s": 4, "w": 4}


def stack_bytes(line):
    """Give the bytes of the stack that a load or a store is about, as (register, displacement)."""
    place = re.fullmatch(r"\[(sp|x29)(?:, #(-?\d+))?\](!?).*", line.place)
    if not place:
        return set()
    start = 0 if place[3] else int(place[2] or 0)
    moved = registers(line.operands, "qdxsw")
    return {(place[1], start + i) for i in range(sum(SIZES[register[0]] for register in moved))}


def what_takes_data_to_general_registers(name, code):
    """List such instructions."""
    public = r"x29"
    if name.operation.startswith("counter"):
        public += rf"|x\d+, #{name.bits // 8}"
    if name.operation == "counter_list":
        public += r"|x\d+(, #(16|32))?"
    if name.operation in ("counter_sealed", "seal", "rekey", "rekey_masked"):
        # The register that the first record is read by reads the rest of it, and the other records.
        places = (re.match(r"\[(x\d+)", line.place) for line in code if line.mnemonic in ("ldp", "ldr"))
        record = next(place[1] for place in places if place and place[1] not in ("x2", "x29"))
        public += rf"|{record}(, #\d+)?"
    if name.operation == "rekey":
        public += rf"|x\d+, #{name.bits // 8}"
    at_labels, before = {}, None  # what `held` may be where a label is reached
    while at_labels != before:
        before = {label: set(held) for label, held in at_labels.items()}
        found, held = [], set()  # the bytes of the stack that hold data, and "x2" if it points to no arguments
        for line in code:
            general, stack = bool(registers(line.operands[:1], "wx")), stack_bytes(line)
            if line.mnemonic == LABEL:
                local = line.operands[0].startswith(".L")
                held = at_labels.setdefault(line.operands[0], set()) | held if local else set()
                at_labels[line.operands[0]] = set(held)
            elif line.mnemonic.startswith("st"):
                held = held - stack if general else held | stack
            elif line.mnemonic in ("b", "cbz", "cbnz", "tbz", "tbnz") or line.mnemonic.startswith("b."):
                at_labels.setdefault(line.place, set()).update(held)
            elif line.mnemonic.startswith("ld") and general:
                arguments = "x2" not in held and re.fullmatch(r"\[x2(, #\d+)?\]", line.place)
                known = stack or arguments or re.fullmatch(rf"\[({public})\]", line.place)
                found += [line] if not known or held & stack else []
            elif (general and registers(line.operands, "vqdshb")) or line.mnemonic.startswith("fc"):
                found.append(line)
            elif line.place and line.operands[0] == "sp":  # what vectors left there is of no use then
                held = held & {"x2"}
            written = line.operands[: 2 if line.mnemonic == "ldp" else 1]
            if line.mnemonic == "bl" or (line.mnemonic[:2] != "st" and {"x2", "w2"} & set(written)):
                held = held | {"x2"}
    return found


@each_kernel
def test_time_cannot_tell_of_data(name):
    assert what_takes_data_to_general_registers(name, code_of(name)) == []


@pytest.mark.parametrize(
    "lines",
    [
        "umov w8, v0.b[3]",
        "fmov x8, d0",
        "mov x8, v1.d[1]",
        "fcmp d0, #0.0",
        "ldrb w8, [x0]",
        "ldr x8, [x20, #16]",
        "ldp x8, x9, [x1], #16",
        "str q0, [sp, #16]; ldr x8, [sp, #24]",
        "stp q0, q1, [x29, #-64]; ldur w8, [x29, #-36]",
        ".LBB0_1:; ldr x8, [sp]; str d0, [sp]; b .LBB0_1",
        "str q0, [sp]; cbz x0, .LBB0_1; str x1, [sp]; .LBB0_1:; ldr x8, [sp]",
        "ldr x2, [x2]; ldr x8, [x2, #8]",
        "bl memcpy; ldr x8, [x2]",
        ".LBB0_1:; ldr x8, [x2]; add x2, x2, #8; b .LBB0_1",
    ],
)
def test_what_takes_data_to_general_registers_is_seen(lines):
    code = instructions(lines.replace(";", "\n"))
    assert what_takes_data_to_general_registers(KernelName("substitute"), code)


@pytest.mark.parametrize(
    "lines",
    [
        "dup v0.16b, w8; fmov d0, x8; ldr q0, [x0]; ld1r { v0.4s }, [x1]",
        "ldp x8, x3, [x2]; ldr x2, [x2, #16]; f:; ldr x8, [x2]",
        "str x0, [sp, #16]; ldr x8, [sp, #16]; ldr x9, [x29, #96]",
        "str q0, [sp]; str x0, [sp]; ldr x8, [sp]",
        "str q0, [sp, #16]; mov sp, x29; ldp x20, x19, [sp, #16]; ldp x29, x30, [sp], #96",
    ],
)
def test_what_moves_no_data_is_let_through(lines):
    code = instructions(lines.replace(";", "\n"))
    assert not what_takes_data_to_general_registers(KernelName("substitute"), code)


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
