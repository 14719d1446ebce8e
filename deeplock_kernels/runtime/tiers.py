"""The ordered table of processor tiers: which this machine can run, which one is in use, and its kernels.

A new tier is a module of primitives in `kernels/` and one record in `TIERS`, best first. A tier runs only where the
processor has all its features. `DEEPLOCK_TIER=name` or `use_tier(name)` force one; `DEEPLOCK_REQUIRE_CONSTANT_TIME=1`
or `use_tier(require_constant_time=True)` refuse those that are not constant-time.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import os
import platform
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from deeplock_kernels.errors import KernelError, ParameterError, UnknownNameError, UnsupportedTierError, shown
from deeplock_kernels.kernels.signatures import KernelName, every_name
from deeplock_kernels.runtime import codecache, pool, selftest


@dataclass(frozen=True, eq=False)
class Tier:
    """One way to run the kernels.

    Attributes
    ----------
    name
        What `use_tier` and DEEPLOCK_TIER call it.
    description
        The instructions it is made of.
    requires
        The processor features it needs, in LLVM's names.
    constant_time
        Whether its time is independent of keys and data: no memory is indexed by either.
    forms
        The forms of S-Box it has, in order of preference.
    pace
        Roughly how many bytes a core locks in a microsecond; pieces of work are sized by it.
    """

    name: str
    description: str
    requires: frozenset[str]
    constant_time: bool
    forms: tuple[str, ...]
    pace: int

    @property
    def supported(self) -> bool:
        """Whether this machine can run it."""
        return self.requires <= host_features()

    @property
    def active(self) -> bool:
        """Whether it is the tier in use."""
        return active_tier() is self


def _tier(
    name: str, description: str, requires: str, forms: str, pace: int, *, constant_time: bool = True
) -> Tier:
    return Tier(name, description, frozenset(requires.split()), constant_time, tuple(forms.split()), pace)


TIERS = (
    _tier(
        "avx512",
        "AVX-512 BW and VBMI, GFNI, VAES, VPCLMULQDQ",
        "avx512f avx512bw avx512dq avx512vl avx512vbmi gfni vaes vpclmulqdq aes pclmul bmi2",
        "identity aes aes_inverse affine table",
        16_000,
    ),
    _tier(
        "gfni",
        "AVX2, GFNI, VAES, VPCLMULQDQ",
        "avx2 gfni vaes vpclmulqdq aes pclmul bmi2",
        "identity aes aes_inverse affine table",
        12_000,
    ),
    _tier("avx2", "AVX2, AES-NI, PCLMULQDQ", "avx2 aes pclmul bmi2", "identity aes aes_inverse table", 6_000),
    _tier("neon", "AArch64 AES, PMULL and TBL", "neon aes", "identity aes aes_inverse table", 3_000),
    _tier("portable", "plain code, tables in memory", "", "identity table", 200, constant_time=False),
)

Kernel = Callable[[bytes], None]  # takes a record of its arguments, see `kernels/signatures.py`

_lock = threading.RLock()
_kernels: dict[tuple[str, KernelName], Kernel] = {}
_kept: list[Any] = []  # what compiled code lives in
_links = itertools.count()
_forced: Tier | None = None
_required = False  # whether only a constant-time tier may be used; the environment may ask for that too


@functools.cache
def host_features() -> frozenset[str]:
    """Give the processor features that kernels may use here, in LLVM's names.

    Numba's own switches (NUMBA_CPU_FEATURES, NUMBA_CPU_NAME=generic, NUMBA_ENABLE_AVX=0, NUMBA_DISABLE_JIT=1) take away
    from them, because Numba has to compile the kernels.
    """
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return frozenset()
    if platform.machine() in ("aarch64", "arm64"):
        return _aarch64_features()
    from llvmlite import binding as llvm

    try:
        features = {name for name, present in llvm.get_host_cpu_features().items() if present}
    except RuntimeError:
        return frozenset()
    listed = os.environ.get("NUMBA_CPU_FEATURES")
    if listed is not None:
        flags = listed.split(",")
        features &= {flag[1:] for flag in flags if flag.startswith("+")}
    elif os.environ.get("NUMBA_CPU_NAME") == "generic":
        features = set()
    if os.environ.get("NUMBA_ENABLE_AVX", "1") == "0":
        features = {name for name in features if not name.startswith("avx")}
    return frozenset(features)


def _aarch64_features() -> frozenset[str]:
    """Ask the system (getauxval, AT_HWCAP) instead of LLVM, which finds nothing under an emulator."""
    if sys.platform == "darwin":
        return frozenset(("neon", "aes"))
    try:
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.restype = ctypes.c_ulong
        capabilities = getauxval(16)
    except (AttributeError, OSError):
        return frozenset()
    # What LLVM calls aes is both AES (bit 3) and PMULL (bit 4).
    return frozenset(name for name, bits in (("neon", 0b10), ("aes", 0b11000)) if capabilities & bits == bits)


def tiers() -> tuple[Tier, ...]:
    """List all tiers, best first, with `name`, `supported`, `active` and `constant_time`."""
    return TIERS


def _find(name: object, argument: str) -> Tier:
    for tier in TIERS:
        if tier.name == name:
            if tier.supported:
                return tier
            missing = ", ".join(sorted(tier.requires - host_features()))
            raise UnsupportedTierError(
                f"{argument}: got {name!r}, which needs {missing}, and this machine has not; "
                f"supported here: {', '.join(t.name for t in TIERS if t.supported)}"
            )
    raise UnknownNameError(f"{argument}: got {shown(name)}, accepted are {', '.join(t.name for t in TIERS)}")


def _permitted(tier: Tier, argument: str, required: bool) -> Tier:
    """Give the tier back, unless a constant-time one is required and it is not."""
    if tier.constant_time or not (required or _required_by_environment()):
        return tier
    accepted = ", ".join(t.name for t in TIERS if t.supported and t.constant_time)
    raise UnsupportedTierError(
        f"{argument}: got {tier.name!r}, which is not constant-time, and that is required; "
        f"constant-time here: {accepted or 'none'}"
    )


@functools.cache
def _required_by_environment() -> bool:
    variable = os.environ.get("DEEPLOCK_REQUIRE_CONSTANT_TIME", "")
    if variable not in ("", "0", "1"):
        raise ParameterError(f"DEEPLOCK_REQUIRE_CONSTANT_TIME: got {variable!r}, accepted are 0 and 1")
    return variable == "1"


@functools.cache
def _default(required: bool) -> Tier:
    variable = os.environ.get("DEEPLOCK_TIER")
    if variable:
        return _permitted(_find(variable, "DEEPLOCK_TIER"), "DEEPLOCK_TIER", required)
    required = required or _required_by_environment()
    supported = [tier for tier in TIERS if tier.supported]
    fitting = [tier for tier in supported if tier.constant_time or not required]
    return _permitted((fitting or supported)[0], "tier", required)


def active_tier() -> Tier:
    """Give the tier in use: the forced one, or the best that this machine supports.

    Raises
    ------
    UnknownNameError, UnsupportedTierError
        DEEPLOCK_TIER names no tier, or one that this machine cannot run, or a constant-time one is required and there
        is none.
    ParameterError
        DEEPLOCK_REQUIRE_CONSTANT_TIME is neither 0 nor 1.
    """
    return _forced or _default(_required)


class use_tier:  # noqa: N801 - called like a function
    """Force a tier from now on for the whole process, or for a `with` block; None takes the force away.

    Parameters
    ----------
    name
        One of the names that `tiers()` lists.
    require_constant_time
        True refuses every tier that is not constant-time, here and in later calls; False takes that back, None
        leaves it. What DEEPLOCK_REQUIRE_CONSTANT_TIME=1 requires no call takes back.

    Raises
    ------
    UnknownNameError
        There is no such tier.
    UnsupportedTierError
        This machine cannot run it, or it is not constant-time and that is required.
    """

    def __init__(self, name: str | None = None, *, require_constant_time: bool | None = None) -> None:
        global _forced, _required
        required = _required if require_constant_time is None else require_constant_time
        tier = None if name is None else _permitted(_find(name, "name"), "name", required)
        if tier is None and required:
            _default(required)  # which raises rather now than in the middle of something
        self._before = _forced, _required
        _forced, _required = tier, required

    def __enter__(self) -> Tier:
        return active_tier()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced, _required
        _forced, _required = self._before


def kernel(tier: Tier, name: KernelName) -> Kernel:
    """Give a kernel of a tier as a function of a record of integers, compiled or loaded on first use and tested then.

    Raises
    ------
    KernelError
        It could not be compiled.
    SelfTestError
        It gave a wrong answer; it will not be used.
    """
    found = _kernels.get((tier.name, name))
    if found is not None:
        return found

    def load() -> Kernel:
        found = _kernels.get((tier.name, name))
        if found is None:
            found = _load(tier, name)
            selftest.check(tier.name, name, found, functools.partial(kernel, tier))
            _kernels[tier.name, name] = found
        return found

    return pool.holding(_lock, load)


def warmup(tier: str | None = None, progress: Callable[[int], object] | None = None) -> int:
    """Compile or load, and test, every kernel of a tier, so that no later call has to.

    Servers do this before they fork, image builders to fill a cache that can be shipped read-only.

    Parameters
    ----------
    tier
        Its name; None for the one in use.
    progress
        Called with 1 after each kernel.

    Returns
    -------
    int
        How many kernels there are.

    Raises
    ------
    UnknownNameError, UnsupportedTierError
        There is no such tier, or this machine cannot run it.
    """
    chosen = active_tier() if tier is None else _find(tier, "tier")
    names = every_name(chosen.forms)
    for name in names:
        kernel(chosen, name)
        if progress is not None:
            progress(1)
    return len(names)


def _load(tier: Tier, name: KernelName) -> Kernel:
    entry = f"{tier.name}-{name}"
    code = codecache.load(entry)
    if code is not None:
        try:
            return _from_object(code)
        except Exception:  # an object that does not link is no better than none
            pass
    try:
        function = build(tier, name)
        from deeplock_kernels.kernels import house

        _guard_numba_against_fork()
        try:
            code, _assembly = house.emit(house.compile_module(function), tier.requires)
            linked = _from_object(code)
        except Exception:  # whatever it is that another Numba does otherwise
            compiled = house.compile_function(function)  # Numba's own way, without an object to keep
            if not hasattr(compiled, "address"):
                return compiled  # type: ignore[no-any-return]
            _kept.append(compiled)
            return _as_function(compiled.address)
    except Exception as error:
        raise KernelError(
            f"kernel {entry}: it could not be compiled ({type(error).__name__}: {error})"
        ) from error
    codecache.save(entry, code)
    return linked


def build(tier: Tier, name: KernelName) -> Any:
    """Give the Python function of a kernel that takes its arguments from a record; this imports Numba."""
    from deeplock_kernels.kernels import house

    primitives = importlib.import_module(f"deeplock_kernels.kernels.{tier.name}")
    builder = (
        getattr(primitives, "build", None)
        or importlib.import_module("deeplock_kernels.kernels.vectorized").build
    )
    return house.entry(builder(primitives, name), name.arity)


def emit(tier: Tier, name: KernelName) -> tuple[bytes, str]:
    """Compile a kernel of any tier, whether this machine can run it or not; give its object code and its assembly.

    Both are made of the tier's features alone.
    """
    from deeplock_kernels.kernels import house

    with _lock:
        if tier.supported:
            return house.emit(house.compile_module(build(tier, name)), tier.requires)
        from deeplock_kernels.kernels import cross

        with cross.without_native_code():
            return house.emit(house.compile_module(build(tier, name)), tier.requires)


def assembly(tier: Tier, name: KernelName) -> str:
    """Give the assembly of a kernel of any tier."""
    return emit(tier, name)[1]


@functools.cache
def _linker() -> Any:
    from llvmlite import binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return llvm.create_lljit_compiler(target.create_target_machine(codemodel="large", jit=True))


def _from_object(code: bytes) -> Kernel:
    from llvmlite import binding as llvm

    symbol = "deeplock_kernel"
    library = llvm.JITLibraryBuilder().add_object_img(code).export_symbol(symbol).add_current_process()
    tracker = library.link(_linker(), f"deeplock{next(_links)}")
    _kept.append(tracker)
    return _as_function(tracker[symbol])


def _as_function(address: int) -> Kernel:
    return ctypes.CFUNCTYPE(None, ctypes.c_char_p)(address)


pool.hold_through_fork(_lock, rank=1)


@functools.cache
def _guard_numba_against_fork() -> None:
    try:
        from numba.core.compiler_lock import global_compiler_lock
    except ImportError:  # another Numba keeps it elsewhere
        return
    pool.hold_through_fork(global_compiler_lock, rank=2)
