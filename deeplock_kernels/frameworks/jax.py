"""JAX: lock and unlock arrays and pytrees, also inside compiled functions (extra `jax`).

Outside of a transformation arrays are read where they lie, by all threads, and the result becomes a JAX array without
another copy. Inside `jax.jit` XLA calls the kernels themselves, without Python; where its interface is not the one that
is known here, it calls back into Python instead. Keys are operands of the program then, and never a part of it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from deeplock_kernels import buffers, locking
from deeplock_kernels.errors import (
    BufferTypeError,
    KeyFormatError,
    KeyTypeError,
    ParameterError,
    SizeMismatchError,
    TensorNameError,
)
from deeplock_kernels.header import LockHeader
from deeplock_kernels.keys import KEY_BITS
from deeplock_kernels.locking import find_sbox
from deeplock_kernels.named_lock import Key, NamedLock
from deeplock_kernels.native import address_of
from deeplock_kernels.pieces import Range
from deeplock_kernels.runtime.pool import resolve_threads
from deeplock_kernels.runtime.tiers import active_tier
from deeplock_kernels.sboxes import AES, SBox
from deeplock_kernels.schedules import CounterSchedule, Schedule
from deeplock_kernels.schedules.base import check_range
from deeplock_kernels.tensors import Selection, select
from deeplock_kernels.transform import Transform

try:
    import jax
except ImportError as error:
    raise ImportError(
        "deeplock_kernels.frameworks.jax: JAX is not installed; pip install 'deeplock-kernels[jax]'"
    ) from error
if jax.__version_info__ < (0, 5):
    raise ImportError(
        f"deeplock_kernels.frameworks.jax: got JAX {jax.__version__}, accepted is 0.5 or later; "
        "pip install --upgrade 'deeplock-kernels[jax]'"
    )

__all__ = ["derive_keys", "lock", "lock_pytree", "prepare", "unlock", "unlock_leaves", "unlock_pytree"]

TARGET = "deeplock_transform"  # what XLA knows the handler by
_ALIGNMENT = 64  # from which on JAX takes memory over as it is
_IV_BYTES = 16
_rows: dict[int, tuple[int, Transform]] = {}
_lock = threading.RLock()
_kept: list[Any] = []  # what XLA has the address of


def lock(
    array: Any,
    schedule: Any,
    *,
    sbox: SBox | str = AES,
    offset: int = 0,
    in_place: bool = False,
    threads: int | None = None,
) -> Any:
    """Lock an array: c[i] = S[p[i] XOR k[offset + i]] over its bytes in C order.

    Parameters
    ----------
    array
        A JAX array on one CPU device, a NumPy array of a dtype that JAX has, or a tracer; of any shape and any dtype of
        whole bytes (bfloat16 and float8 too).
    schedule
        A schedule, or `(key, iv)`: 16, 24 or 32 bytes and 16 bytes, each as bytes or as an array of uint8. Inside a
        transformation (`jax.jit`, `jax.vmap`, ...) it is `(key, iv)`, and the key an argument of the transformed
        function: a constant would be written into the compiled program, and is refused (but one that is made inside
        that function by JAX itself, as by `jnp.asarray`, looks like an argument).
    sbox
        The S-Box, or the name of one.
    offset
        The position of the first byte in the key stream. Inside `jax.jit` a Python number.
    in_place
        Inside `jax.jit`: use the array's own memory for the result. If it is an argument that was not donated
        (`donate_argnums`), XLA copies it first.
    threads
        How many threads at most; None for `get_num_threads()`. Inside `jax.jit` that is asked when it is traced.

    Returns
    -------
    jax.Array
        Of the same shape and dtype.

    Raises
    ------
    BufferTypeError
        The array is none, or of a dtype that is not of whole bytes, lies on another device, or is differentiated.
    KeyTypeError, KeyFormatError, KeyWipedError
        The key or iv is of another kind or length, or the key is a constant where the array is traced.
    ParameterError, UnknownNameError
        Another argument is wrong, or `jax.vmap` would use one key stream for several contents.
    """
    return _apply("lock", array, schedule, sbox, offset, in_place, threads)


def unlock(
    array: Any,
    schedule: Any,
    *,
    sbox: SBox | str = AES,
    offset: int = 0,
    in_place: bool = False,
    threads: int | None = None,
) -> Any:
    """Undo `lock`; parameters, result and errors are the same. A wrong key is not noticed here: it gives nonsense."""
    return _apply("unlock", array, schedule, sbox, offset, in_place, threads)


def lock_pytree(
    tree: Any,
    key: Key,
    *,
    schedule: str = "counter",
    sbox: SBox | str = "aes",
    only: Selection = None,
    seal: bool = True,
    threads: int | None = None,
) -> tuple[Any, LockHeader]:
    """Lock the arrays of a pytree, each with its own key stream, as `lock_tensors` does.

    A leaf is named by its path, joined by dots: `{"dense": {"kernel": ...}}` has "dense.kernel".

    Parameters
    ----------
    tree
        A pytree of JAX or NumPy arrays.
    key, schedule, sbox, only, seal, threads
        As for `lock_tensors`.

    Returns
    -------
    tuple of (pytree, LockHeader)
        The tree with locked arrays, and what has to be kept beside it.

    Raises
    ------
    BufferTypeError, TensorNameError
        A chosen leaf is no array of whole bytes on one CPU device, or two have the same name; the message names it.
    KeyTypeError, KeyFormatError, UnknownNameError, ParameterError
        Another argument is wrong.
    """
    leaves, structure = _named_leaves(tree)
    chosen = select(leaves, only)
    named = NamedLock.new(key, schedule, find_sbox(sbox))
    count = resolve_threads(threads)
    sources = {name: _host_array(leaves[name], f"tree[{name!r}]") for name in chosen}
    ranges, results = _ranges(sources, empty=seal)
    named.cover({name: (source.nbytes, None) for name, source in sources.items()})
    with named:
        header = named.lock(ranges, count, seal=seal, then=lambda seals: named.prove(seals if seal else None))
    return _with(leaves, structure, results), header


def unlock_pytree(
    tree: Any,
    key: Key,
    header: LockHeader,
    *,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
) -> Any:
    """Unlock the arrays of a pytree that the header lists; others are left as they are.

    Parameters
    ----------
    tree
        What `lock_pytree` gave, or a tree of the same names from anywhere, such as a locked file.
    key, header, check, seal, sbox, threads
        As for `unlock_tensors`. Seals are compared in the pass that unlocks.

    Returns
    -------
    pytree
        The tree with unlocked arrays.

    Raises
    ------
    WrongKeyError
        The key is another one.
    TamperedHeaderError, TamperedError
        The header, or the array that the message names, is not as it was locked; nothing unlocked is left.
    TensorNameError, SizeMismatchError, BufferTypeError
        A leaf of the header is missing, of another size or no array.
    KeyTypeError, KeyFormatError, HeaderError, SBoxError, ParameterError
        Another argument is wrong.
    """
    leaves, structure = _named_leaves(tree)
    named = NamedLock.from_header(key, header, check=check, sbox=sbox)
    count = resolve_threads(threads)
    sources = _listed(leaves, header)
    compares = check and seal and any(map(named.sealed, sources))
    ranges, results = _ranges(sources, empty=compares)
    with named:
        try:
            if compares:
                named.expect(named.unlock_and_seal(ranges, count))
            else:
                named.unlock(ranges, count)
        except BaseException:
            for result in results.values():
                buffers.wipe(buffers.memory(result))
            raise
    return _with(leaves, structure, results)


def derive_keys(tree: Any, key: Key, header: LockHeader, *, check: bool = True) -> dict[str, Any]:
    """Derive the keys with which `unlock_leaves` unlocks a tree inside a compiled function.

    They are secrets, and JAX does not wipe them.

    Parameters
    ----------
    tree, key, header, check
        As for `unlock_pytree`. Seals are not compared.

    Returns
    -------
    dict of (str, numpy.ndarray of uint8)
        By the name of each locked leaf its key and, behind it, its iv: an argument for a compiled function.

    Raises
    ------
    ParameterError
        The tree was locked with the expansion schedule, which has one key stream for all leaves.
    WrongKeyError, TamperedHeaderError, TensorNameError, SizeMismatchError, BufferTypeError, HeaderError
        As for `unlock_pytree`.
    """
    leaves, _structure = _named_leaves(tree)
    keys: dict[str, Any] = {}
    with NamedLock.from_header(key, header, check=check, needs_sbox=False) as named:
        for name in _listed(leaves, header):
            schedule, _start = named.stream(name)
            if not isinstance(schedule, CounterSchedule):
                raise ParameterError(
                    f"header: got schedule {header.schedule!r}, accepted is 'counter', which has a key for each leaf; "
                    "unlock the tree with unlock_pytree"
                )
            keys[name] = np.frombuffer(ctypes.string_at(schedule.address, schedule.bits // 8 + _IV_BYTES), np.uint8)
    return keys


def unlock_leaves(tree: Any, keys: Mapping[str, Any], *, sbox: SBox | str = AES, threads: int | None = None) -> Any:
    """Unlock the arrays of a pytree inside a compiled function, so that they are plain only while it runs.

    Parameters
    ----------
    tree
        A pytree of locked arrays.
    keys
        What `derive_keys` gave, as an argument of the compiled function.
    sbox
        The S-Box that the tree was locked with.
    threads
        As for `unlock`.

    Returns
    -------
    pytree
        The tree with unlocked arrays.

    Raises
    ------
    TensorNameError
        A leaf of the keys is missing.
    KeyTypeError, BufferTypeError, UnknownNameError, ParameterError
        As for `unlock`.
    """
    leaves, structure = _named_leaves(tree)
    _all_there(leaves, keys, "keys")
    results = {
        name: unlock(leaves[name], (both[:-_IV_BYTES], both[-_IV_BYTES:]), sbox=sbox, threads=threads)
        for name, both in keys.items()
    }
    return _with(leaves, structure, results)


def prepare(sbox: SBox | str = AES) -> bool:
    """Make this process ready to run compiled programs that it has not traced itself (`jax.export`).

    Parameters
    ----------
    sbox
        The S-Box that they use, or its name.

    Returns
    -------
    bool
        Whether XLA calls the kernels itself. If not, programs call back into Python, and cannot be exported.
    """
    if not _calls_kernels():
        return False
    box = find_sbox(sbox)
    for direction in ("lock", "unlock"):
        for bits in KEY_BITS:
            _number(Transform.of(box, direction, active_tier()), box, direction, bits)
    return True


# One array


def _apply(
    direction: str, array: Any, schedule: Any, sbox: SBox | str, offset: int, in_place: bool, threads: int | None
) -> Any:
    box = find_sbox(sbox)
    key, iv = _key_and_iv(schedule)
    if not any(isinstance(value, jax.core.Tracer) for value in (array, key, iv)):
        source = _host_array(array, "array")
        given = isinstance(schedule, Schedule)
        with nullcontext(schedule) if given else CounterSchedule(_bytes(key), _bytes(iv)) as stream:
            function, result = getattr(locking, direction), _aligned_like(source)
            function(source, stream, sbox=box, offset=offset, out=result, threads=threads)
        return _as_jax(result, array)
    if not isinstance(key, jax.core.Tracer):
        raise KeyTypeError(
            "key: got a constant where the array is traced, accepted is an argument of the function that jax.jit or "
            "another transformation traces, as an array of uint8; a constant would be a part of the compiled program"
        )
    iv = np.frombuffer(iv, np.uint8) if isinstance(iv, (bytes, bytearray, memoryview)) else iv
    for name, value, lengths in (("key", key, [bits // 8 for bits in KEY_BITS]), ("iv", iv, [_IV_BYTES])):
        if value.dtype != np.uint8 or value.ndim != 1 or value.shape[0] not in lengths:
            raise KeyFormatError(
                f"{name}: got {value.dtype} of shape {value.shape}, accepted is uint8 of "
                f"{', '.join(map(str, lengths))} elements"
            )
    dtype = _dtype(array, "array")
    nbytes = math.prod(array.shape) * dtype.itemsize
    offset = check_range(offset, nbytes)
    count = resolve_threads(threads)
    if nbytes == 0:
        return array
    call = _call_kernel if _calls_kernels() else _call_back
    return _transformable(direction, call(direction, box, offset, nbytes, in_place, count))(array, key, iv)


def _key_and_iv(schedule: Any) -> tuple[Any, Any]:
    if isinstance(schedule, Schedule):
        return None, None
    if isinstance(schedule, (tuple, list)) and len(schedule) == 2:
        return schedule[0], schedule[1]
    raise KeyTypeError(f"schedule: got {type(schedule).__name__}, accepted are a schedule and a pair (key, iv)")


def _bytes(value: Any) -> Any:
    """Give the bytes of an array of uint8, and anything else as it is."""
    if not hasattr(value, "dtype"):
        return value
    flat = np.asarray(value)
    if flat.dtype != np.uint8 or flat.ndim != 1:
        raise KeyTypeError(f"key or iv: got {flat.dtype} of shape {flat.shape}, accepted are bytes and flat uint8")
    return flat.tobytes()


def _transformable(direction: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Say what `jax.vmap` and `jax.grad` mean for a lock."""
    batching = jax.custom_batching.custom_vmap(function)

    @batching.def_vmap
    def batch(size: int, batched: list[bool], *operands: Any) -> tuple[Any, bool]:
        if not any(batched[1:]):
            raise ParameterError(
                f"{direction}: got several arrays for one key and iv under jax.vmap, accepted is a key or iv for each "
                "(in_axes), since one key stream for several contents gives them away; or lock the whole array"
            )
        each = tuple(
            value if has else jax.numpy.broadcast_to(value, (size, *value.shape))
            for value, has in zip(operands, batched, strict=True)
        )
        return jax.lax.map(lambda one: batching(*one), each), True

    differentiable = jax.custom_jvp(batching)

    @differentiable.defjvp
    def differentiate(primals: Any, tangents: Any) -> Any:
        raise BufferTypeError(
            f"array: got one that is differentiated, and {direction} has no derivative; accepted is one that jax.grad "
            f"does not follow, such as jax.lax.stop_gradient(array), or {direction} outside of what is differentiated"
        )

    return differentiable  # type: ignore[no-any-return]


def _call_kernel(
    direction: str, box: SBox, offset: int, nbytes: int, in_place: bool, threads: int
) -> Callable[..., Any]:
    """Give the function that has XLA call the kernel."""

    def call(array: Any, key: Any, iv: Any) -> Any:
        transform = Transform.of(box, direction, active_tier())
        number = _number(transform, box, direction, 8 * key.shape[0])
        plan = number, nbytes, offset, transform.piece(nbytes, threads), threads
        target = jax.ffi.ffi_call(
            TARGET,
            jax.ShapeDtypeStruct(array.shape, array.dtype),
            input_output_aliases={0: 0} if in_place else None,
        )
        return target(array, key, iv, plan=np.array(plan, np.int64))

    return call


def _call_back(
    direction: str, box: SBox, offset: int, nbytes: int, in_place: bool, threads: int
) -> Callable[..., Any]:
    """Give the function that has XLA call Python."""
    function = getattr(locking, direction)

    def work(array: Any, key: Any, iv: Any) -> Any:
        with CounterSchedule(_bytes(key), _bytes(iv)) as schedule:
            return function(np.asarray(array), schedule, sbox=box, offset=offset, threads=threads)

    def call(array: Any, key: Any, iv: Any) -> Any:
        return jax.pure_callback(work, jax.ShapeDtypeStruct(array.shape, array.dtype), array, key, iv)

    return call


# XLA's side


def _number(transform: Transform, box: SBox, direction: str, bits: int) -> int:
    """Give the number of a kernel, the same in every process, and see to it that the handler finds it."""
    from deeplock_kernels.frameworks import xla

    digest = hashlib.sha256(f"{direction}/{bits}/{box.sha256}".encode()).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    with _lock:
        row, known = _rows.get(number, (len(_rows), None))
        if known is not transform:
            if row == xla.ROWS:
                raise ParameterError(f"sbox: got one more than the {row // 6} that a process can use inside jax.jit")
            kernel, past_cache = (
                address_of(transform.kernel(operation, bits), direction)
                for operation in ("counter", "counter_past_cache")
            )
            xla.enter(row, number, kernel, past_cache, transform.box)
            _rows[number] = row, transform
    return number


def _calls_kernels() -> bool:
    """Say whether XLA can call the kernels here."""
    with _lock:
        return _register()


@functools.cache
def _register() -> bool:
    """Have XLA take the handler, and see whether a known answer is right."""
    try:
        from deeplock_kernels.frameworks import xla

        handler = xla.make_handler()
        _kept.append(handler)
        entry = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(handler.address)
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(entry), platform="cpu")
        key, iv, data = (np.arange(count, dtype=np.uint8) for count in (16, _IV_BYTES, 100))
        with jax.ensure_compile_time_eval(), jax.default_device(jax.devices("cpu")[0]):
            found = np.asarray(_call_kernel("lock", AES, 3, 100, False, 1)(data, key, iv))
    except Exception:  # whatever it is that another JAX, jaxlib or Numba does otherwise
        return False
    with CounterSchedule(key.tobytes(), iv.tobytes()) as schedule:
        return bool(np.array_equal(found, locking.lock(data, schedule, offset=3)))


# Arrays and trees


def _dtype(array: Any, argument: str) -> np.dtype[Any]:
    """Give the dtype of an array or tracer of whole bytes that JAX does not convert."""
    if not isinstance(array, (np.ndarray, jax.Array)):
        raise BufferTypeError(f"{argument}: got {type(array).__name__}, accepted are JAX arrays and NumPy arrays")
    numbers = jax.numpy.issubdtype(array.dtype, jax.numpy.number) or array.dtype == bool
    if not numbers or re.fullmatch(r"[a-z]+[1-7](_\w+)?", array.dtype.name):
        raise BufferTypeError(
            f"{argument}: got dtype {array.dtype.name}, accepted are numbers of whole bytes; for random keys lock "
            "jax.random.key_data(array), for packed numbers an array of uint8"
        )
    dtype = np.dtype(array.dtype)
    kept = dtype.isnative and jax.dtypes.canonicalize_dtype(dtype) == dtype
    if not kept:
        raise BufferTypeError(
            f"{argument}: got dtype {dtype}, which JAX would convert; accepted are dtypes that it keeps: "
            "enable jax_enable_x64, or convert the array first"
        )
    return dtype


def _host_array(array: Any, argument: str) -> np.ndarray[Any, Any]:
    """Give the memory of an array that is no tracer, as a NumPy array."""
    if isinstance(array, jax.core.Tracer):
        raise BufferTypeError(
            f"{argument}: got a tracer, accepted are arrays; inside jax.jit use derive_keys before and unlock_leaves"
        )
    _dtype(array, argument)
    if isinstance(array, jax.Array):
        devices = array.sharding.device_set
        if len(devices) != 1 or next(iter(devices)).platform != "cpu":
            raise BufferTypeError(
                f"{argument}: got an array on {', '.join(sorted(map(str, devices)))}, accepted is one CPU device; "
                "move it with jax.device_put(array, jax.devices('cpu')[0])"
            )
    return np.asarray(array)


def _aligned_like(source: np.ndarray[Any, Any]) -> Any:
    memory = np.empty(source.nbytes + _ALIGNMENT, np.uint8)
    return np.ndarray(source.shape, source.dtype, memory.data, offset=-memory.ctypes.data % _ALIGNMENT)


def _as_jax(result: np.ndarray[Any, Any], like: Any) -> Any:
    """Hand memory over to JAX, where `like` is; nobody writes it after that."""
    place = like.sharding if isinstance(like, jax.Array) else jax.devices("cpu")[0]
    return jax.device_put(result, place, may_alias=True)


def _named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves: dict[str, Any] = {}
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in leaves:
            raise TensorNameError(f"tree: got two leaves named {name!r}, accepted are trees whose names are unique")
        leaves[name] = leaf
    return leaves, structure


def _all_there(leaves: Mapping[str, Any], names: Mapping[str, Any], argument: str) -> None:
    missing = [name for name in names if name not in leaves]
    if missing:
        raise TensorNameError(
            f"tree: it has no {missing[0]!r}, which is in the {argument}; {len(missing)} such in all"
        )


def _listed(leaves: Mapping[str, Any], header: LockHeader) -> dict[str, np.ndarray[Any, Any]]:
    """Give the memory of the leaves that a header lists."""
    _all_there(leaves, header.tensors, "header")
    sources = {name: _host_array(leaves[name], f"tree[{name!r}]") for name in leaves if name in header.tensors}
    for name, source in sources.items():
        expected = header.tensors[name].nbytes
        if source.nbytes != expected:
            raise SizeMismatchError(
                f"tree[{name!r}]: got {source.nbytes} bytes, accepted are the header's {expected}"
            )
    return sources


def _ranges(
    sources: Mapping[str, np.ndarray[Any, Any]], *, empty: bool
) -> tuple[list[Range], dict[str, np.ndarray[Any, Any]]]:
    """Give a new array for each, and the ranges from old to new."""
    results = {name: _aligned_like(source) for name, source in sources.items()}
    ranges = []
    for name, source in sources.items():
        target, block = buffers.memory(results[name]), buffers.memory(source, f"tree[{name!r}]")
        if block.nbytes or empty:
            ranges.append(Range(name, target.address, block.address, block.nbytes))
    return ranges, results


def _with(leaves: Mapping[str, Any], structure: Any, results: Mapping[str, Any]) -> Any:
    """Build the tree again, with some leaves replaced."""
    new = dict(leaves)
    for name, value in results.items():
        new[name] = _as_jax(value, leaves[name]) if isinstance(value, np.ndarray) else value
    return jax.tree_util.tree_unflatten(structure, new.values())
