"""Each row of the tables of instructions, compiled alone: a wrong one ends the process that compiles it."""

from __future__ import annotations

import re

import pytest
from processes import Process, run

from deeplock_kernels.simd import aarch64, x86

REGISTER = {16: "xmm", 32: "ymm", 64: "zmm"}

# Which arguments an intrinsic takes LLVM itself knows: it refuses all signatures but one.
PROGRAM = """
import sys
from llvmlite import binding as llvm

def module(name, result, kinds):
    loads = [f"%v{i} = load {kind}, ptr %p{i}" for i, kind in enumerate(kinds) if kind != "i8"]
    values = [f"i8 {0x11}" if kind == "i8" else f"{kind} %v{i}" for i, kind in enumerate(kinds)]
    return f'''
        declare {result} @{name}({", ".join(kinds)})
        define void @f(ptr %target{"".join(f", ptr %p{i}" for i in range(len(kinds)))}) {{
            {chr(10).join(loads)}
            %result = call {result} @{name}({", ".join(values)})
            store {result} %result, ptr %target
            ret void
        }}'''

triple, features, name, result, *signatures = sys.argv[1:]
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
target = llvm.Target.from_triple(triple).create_target_machine(features=features, opt=3)
fitting = []
for signature in signatures:
    try:
        parsed = llvm.parse_assembly(module(name, result, signature.split(";")))
        parsed.verify()
    except RuntimeError:
        continue
    fitting.append(parsed)
print(len(fitting))
print(target.emit_assembly(fitting[0]))
"""


def arguments_of_x86(row):
    lanes = f"<{row.nbytes * 8 // row.lane_bits} x i{row.lane_bits}>"
    counted = [[lanes] * count for count in (1, 2, 3)]
    signatures = [";".join(kinds + rest) for kinds in counted for rest in ([], ["i8"])]
    features = ",".join(f"+{feature}" for feature in sorted(row.requires))
    return "x86_64-unknown-linux-gnu", features, row.llvm_name, lanes, *signatures


def arguments_of_aarch64(row):
    name, arity, feature, *_ = row
    kinds = "<16 x i8>", "i64"
    signatures = [";".join([kind] * arity) for kind in kinds]
    return "aarch64-unknown-linux-gnu", f"+{feature}", name, kinds[0], *signatures


def compiled(arguments):
    count, assembly = run(PROGRAM, *arguments).split("\n", 1)
    assert count == "1", "LLVM knows the intrinsic, and so how it is called"
    return assembly


@pytest.mark.parametrize("name", x86.INSTRUCTIONS)
def test_each_row_of_x86_is_its_instruction_in_its_registers(name):
    row = x86.INSTRUCTIONS[name]
    mnemonic, width = name.rsplit("_", 1)
    assert int(width) == 8 * row.nbytes
    mnemonic = mnemonic.replace("vpermi2b", "vperm[it]2b")  # which of its operands it overwrites
    wanted = rf"^\s*v?{mnemonic}\s.*%{REGISTER[row.nbytes]}\d+$"
    assert re.search(wanted, compiled(arguments_of_x86(row)), re.MULTILINE)


@pytest.mark.parametrize("name", aarch64.INSTRUCTIONS)
def test_each_row_of_aarch64_is_its_instruction(name):
    mnemonic = name.rstrip("0123456789")
    assembly = compiled(arguments_of_aarch64(aarch64.INSTRUCTIONS[name]))
    assert re.search(rf"^\s*{mnemonic}\s+v\d", assembly, re.MULTILINE)


def test_a_name_that_llvm_does_not_know_is_noticed():
    row = x86.INSTRUCTIONS["aesenc_128"]
    with pytest.raises(AssertionError, match="LLVM knows the intrinsic"):
        compiled(arguments_of_x86(row._replace(llvm_name=row.llvm_name + "x")))


@pytest.mark.parametrize("name", x86.INSTRUCTIONS)
def test_without_its_features_a_row_ends_the_process(name):
    """Which is why tiers are gated on features."""
    arguments = arguments_of_x86(x86.INSTRUCTIONS[name]._replace(requires=frozenset({"sse2"})))
    Process(PROGRAM, *arguments).finish(returncode=-6, errors=None)
