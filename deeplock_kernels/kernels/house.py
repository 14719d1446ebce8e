"""How every piece of a kernel is compiled: the house decorator, and the two ways to an address.

A kernel is serial, holds no lock, uses no fast mathematics and cannot raise. Numba compiles it; its LLVM code is then
emitted once more for exactly the features of its tier, as an object that needs neither Numba nor Python.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import binding as llvm
from numba.core import config

from deeplock_kernels.kernels.memory import make_record_reader

ENTRY = "deeplock_kernel"  # the symbol of an object's only function

_OPTIONS = {"error_model": "numpy", "boundscheck": False}

_BARE = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **_OPTIONS}

inlined = numba.njit(forceinline=True, **_BARE)


def entry(function: Any, arity: int) -> Any:
    """Make the function that takes a kernel's arguments from a record."""
    kernel, read = inlined(function), make_record_reader(arity)

    def run(record):
        kernel(*read(record))

    return run


def compile_function(function: Any) -> Any:
    """Compile an entry for this process alone, by Numba's documented way, and return something to call.

    The result has an `address`, or is plain Python where Numba is told not to compile.
    """
    if config.DISABLE_JIT:
        return function
    return numba.cfunc(numba.void(numba.int64), nopython=True, **_OPTIONS)(function)


def compile_module(function: Any) -> Any:
    """Compile an entry to an LLVM module that exports `ENTRY` alone, a C function `void (const int64_t *record)`.

    It reaches into what Numba keeps of a compilation; `AttributeError` and the like mean that Numba has changed.
    """
    arguments = (numba.int64,)
    dispatcher = numba.njit(**_BARE)(function)
    dispatcher.compile(arguments)
    result = dispatcher.overloads[arguments]
    inner = result.fndesc.llvm_func_name
    module = llvm.parse_assembly(
        f"""{result.library._final_module}
        define void @{ENTRY}(i64 %record) {{
            %result = alloca i64
            %error = alloca i64
            %status = call i32 @"{inner}"(ptr %result, ptr %error, i64 %record)
            ret void
        }}"""
    )
    for value in (*module.functions, *module.global_variables):
        if value.name != ENTRY and not value.is_declaration:
            value.linkage = "internal"
    module.verify()
    return module


def emit(module: Any, features: frozenset[str]) -> tuple[bytes, str]:
    """Give the object code and the assembly of a module for a processor with these features and no others.

    Features of the other architecture give code of that one, for Linux.
    """
    triple = llvm.get_process_triple()
    on_x86 = triple.startswith("x86_64")
    if features and on_x86 == ("neon" in features):
        triple = "aarch64-unknown-linux-gnu" if on_x86 else "x86_64-unknown-linux-gnu"
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu="x86-64" if triple.startswith("x86_64") else "generic",
        features=",".join(f"+{name}" for name in sorted(features)),
        opt=3,
        reloc="static",
        codemodel="large",
        jit=True,
    )
    module.triple, module.data_layout = triple, str(machine.target_data)
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3)))
    return machine.emit_object(module), machine.emit_assembly(module)
