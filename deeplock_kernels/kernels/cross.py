"""Compilation for processors that this machine does not have; it reaches further into Numba than all else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from numba.core import codegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target


class _CodeWithoutAddress(codegen.AOTCodeLibrary):
    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0


class _NoNativeCode(codegen.AOTCPUCodegen):
    _library_class = _CodeWithoutAddress

    def set_env(self, env_name, env):
        """Do nothing: what has no address is given no environment."""


@contextmanager
def without_native_code() -> Iterator[None]:
    """Have Numba make LLVM code alone, as LLVM ends the process over instructions that the host lacks."""
    context = cpu_target.target_context
    with global_compiler_lock:
        context.refresh()  # what Numba itself is made of has to run
        native = context._internal_codegen
        context._internal_codegen = _NoNativeCode("deeplock_kernels")
        try:
            yield
        finally:
            context._internal_codegen = native
