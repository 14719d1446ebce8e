"""Kernels without objects: where Numba's internals differ, its ordinary compiler takes over, with the same bytes."""

from __future__ import annotations

import itertools

import pytest
from processes import Process, run

from deeplock_kernels.kernels.signatures import every_name

# Ways in which a later Numba or llvmlite may differ from what objects are made with.
DIFFERENCES = {
    "an attribute is gone": "change_dispatchers(lambda dispatcher, result: delattr(result.library, '_final_module'))",
    "nothing is kept": "change_dispatchers(lambda dispatcher, result: dispatcher.overloads.clear())",
    "it is kept in a list": "change_dispatchers(lambda dispatcher, result: setattr(dispatcher, 'overloads', []))",
    "a result has one part more": "house.emit = lambda module, features: (b'', '', '')",
    "the text has another grammar": "house.llvm.parse_assembly = refuse",
    "the emitter refuses": "house.llvm.create_pass_builder = refuse",
    "the symbol has another name": "house.ENTRY = 'another'",
    "the linker is gone": "del llvmlite.binding.JITLibraryBuilder",
    "the lock is gone": "sys.modules['numba.core.compiler_lock'] = None; del house.compile_module",
}
DIFFER = """
import sys, types
import llvmlite.binding
import numba
import numba.core.ccallback  # which imports on first use what is gone then
from deeplock_kernels.kernels import house

house.numba = types.SimpleNamespace(**vars(numba))
house.llvm = types.SimpleNamespace(**vars(llvmlite.binding))

def change_dispatchers(change):
    def decorator(**options):
        def decorate(function):
            dispatcher = numba.njit(**options)(function)
            def compile(arguments):
                type(dispatcher).compile(dispatcher, arguments)
                change(dispatcher, dispatcher.overloads[arguments])
            dispatcher.compile = compile
            return dispatcher
        return decorate
    house.numba.njit = decorator

def refuse(*arguments, **keywords):
    raise RuntimeError("not so any more")

{}
"""
PROGRAM = """
import sys
import deeplock_kernels as deeplock
from deeplock_kernels import reference
from deeplock_kernels.runtime import tiers

plain, key, iv = bytes(range(200)), bytes(range(32)), b"\\xff" * 16
schedules = {
    "counter": (deeplock.CounterSchedule(key, iv), reference.counter_keystream(key, iv, 200, 7)),
    "expansion": (deeplock.ExpansionSchedule(key), reference.expansion_keystream(key, 200, 7)),
}
for name in sys.argv[1:]:
    schedule, stream = schedules[name]
    locked = deeplock.lock(plain, schedule, offset=7)
    assert locked.tobytes() == reference.lock(plain, stream)
    assert deeplock.unlock(locked, schedule, offset=7).tobytes() == plain
print(*sorted({type(kept).__name__ for kept in tiers._kept}))
"""


def run_where_numba_differs(difference, cache, *schedules, **environment):
    """Lock and unlock, and check that it was the ordinary compiler's doing and that nothing was saved."""
    program = DIFFER.format(DIFFERENCES[difference]) + PROGRAM
    environment |= {"DEEPLOCK_CACHE": 1, "DEEPLOCK_CACHE_DIR": cache}
    assert run(program, *schedules, **environment) == "CFunc\n"
    assert [path for path in cache.rglob("*") if not path.is_dir()] == []


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_whatever_differs_the_ordinary_compiler_takes_over(tmp_path, difference):
    run_where_numba_differs(difference, tmp_path, "counter")


def test_the_ordinary_compiler_gives_the_bytes_of_the_oracle(tier, tmp_path):
    run_where_numba_differs("an attribute is gone", tmp_path, "counter", "expansion", DEEPLOCK_TIER=tier.name)


def test_where_nothing_differs_objects_are_used(tier, tmp_path):
    assert "CFunc" not in run(PROGRAM, "counter", DEEPLOCK_TIER=tier.name, DEEPLOCK_CACHE_DIR=tmp_path)
    assert len(list(tmp_path.rglob("*.o"))) == 2


def pairs(name):
    """Give every two of a kernel's operation, key size, form and direction."""
    return set(itertools.combinations(enumerate(name), 2))


def names_to_compare(forms):
    """Name a few kernels in which all pairs occur that occur in any."""
    names, chosen = every_name(forms), []
    missing = set().union(*map(pairs, names))
    while missing:
        chosen.append(max(names, key=lambda name: len(pairs(name) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


COMPARISON = """
import ctypes, os, sys
import numpy as np
import support
from deeplock_kernels.kernels import house
from deeplock_kernels.kernels.signatures import RCON_START, RCON_WORDS, SEGMENTS_PER_GROUP, KernelName, segment_bytes
from deeplock_kernels.runtime import tiers

tier = tiers.active_tier()
rcon = ctypes.create_string_buffer(RCON_WORDS, len(RCON_WORDS))

def results(name):
    "Give what a kernel makes of some data, the bytes around it too."
    memory = support.aligned(2 * SEGMENTS_PER_GROUP * segment_bytes(256))
    address = memory.ctypes.data
    if name.operation == "expansion_chain":
        memory[: name.bits // 8] = list(support.KEYS[name.bits])
        support.with_integers(tier, name)(address, 3, ctypes.addressof(rcon) + RCON_START)
        return [memory[:200].tobytes()]
    if name.operation == "xor":
        memory[:300] = support.painted(300)
        support.with_integers(tier, name)(address, 256, 0xA5)
        return [memory[:300].tobytes()]
    if name.operation in ("xor_sum", "seal_keys"):
        memory[512:1024] = support.painted(512)
        counts = [300] if name.operation == "xor_sum" else [2, ctypes.addressof(rcon) + RCON_START]
        support.with_integers(tier, name)(address + 1024, address + 512, *counts)
        return [memory[1024:1700].tobytes()]
    if name.operation == "copy_past_cache":
        memory[512:1024] = support.painted(512)
        support.with_integers(tier, name)(address, address + 512, 300)
        return [memory[:400].tobytes()]
    kernel = support.RawKernel(tier, name)
    group = SEGMENTS_PER_GROUP * segment_bytes(name.bits)
    found = []
    for nbytes in (2 * group,) if name.operation == "expansion_indexed" else (1, 63, 64, 300, 1999):
        for offset in (0,) if name.operation in ("expansion_indexed", "substitute") else (0, 16, 101):
            if name.operation in ("counter_past_cache", "counter_sealed", "rekey", "seal") and offset % 16:
                continue
            memory[: nbytes + 64] = 0xA5
            plain = support.painted(nbytes, start=3)
            kernel(address, plain.ctypes.data, nbytes, offset)
            if name.operation != "seal":
                assert np.array_equal(memory[:nbytes], kernel.expected(plain, offset)), (name, nbytes, offset)
            found.append(memory[: nbytes + 64].tobytes())
            if name.operation in ("counter_sealed", "rekey", "seal"):
                found.append(kernel.tag)
    return found

def refuse(*arguments):
    raise AttributeError("_final_module")

names = [KernelName(*eval(text)) for text in sys.argv[1:]]
by_object = [results(name) for name in names]
assert not any(type(kept).__name__ == "CFunc" for kept in tiers._kept)
tiers._kernels.clear()
tiers._kept.clear()
os.environ["DEEPLOCK_CACHE"] = "0"
house.compile_module = refuse
assert [results(name) for name in names] == by_object
print(*(type(kept).__name__ for kept in tiers._kept))
"""


def test_objects_and_the_ordinary_compiler_give_the_same_bytes(tier):
    names = names_to_compare(tier.forms)
    parts = [names[start::2] for start in range(2)]  # one for each of two processors
    processes = [Process(COMPARISON, *map(tuple, part), DEEPLOCK_TIER=tier.name) for part in parts]
    for process, part in zip(processes, parts, strict=True):
        made = process.finish().split()
        assert set(made) == {"CFunc"}
        assert len(made) >= len(part)  # one that seals needs the one that makes its keys
