"""JAX's arrays and trees, outside of its compiled functions and inside: the oracle's bytes, and no key in a program."""

from __future__ import annotations

import re
import threading

import ml_dtypes
import numpy as np
import pytest
import support
from processes import run

from deeplock_kernels import errors, lock_tensors, locking, reference, unlock_tensors
from deeplock_kernels.keys import MasterKey
from deeplock_kernels.sboxes import AES, SBOXES
from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule

jax = support.framework("jax")
jnp = jax.numpy

from deeplock_kernels.frameworks import jax as deeplock  # noqa: E402 - which needs it

IV = support.IV
OPERATIONS = {"lock": deeplock.lock, "unlock": deeplock.unlock}
DTYPES = [
    "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "complex64", "int32", "int8",
    "uint16", "bool",
]  # fmt: skip


def oracle(direction, bits, data, offset=0, box=AES):
    stream = reference.counter_keystream(support.KEYS[bits], IV, len(data), offset)
    return (reference.lock if direction == "lock" else reference.unlock)(bytes(data), stream, box.table)


def array_of(name, shape):
    """Give any bits that the dtype can have; the NaNs of floats, quiet or signalling, too."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    data = support.painted(int(np.prod(shape)) * dtype.itemsize)
    return (data % 2 if name == "bool" else data).view(dtype).reshape(shape)


def content(array):
    return np.asarray(array).tobytes()


def traced(direction, **options):
    """Give the function that JAX compiles, of an array, a key and an iv."""

    def function(array, key, iv):
        return OPERATIONS[direction](array, (key, iv), **options)

    return function


def operands(bits):
    return [jnp.asarray(np.frombuffer(data, np.uint8)) for data in (support.KEYS[bits], IV)]


@pytest.fixture(params=["kernels", "python"])
def way(request, monkeypatch):
    """In which way XLA calls: the kernels, or where it cannot, Python."""
    if request.param == "python":
        monkeypatch.setattr(deeplock, "_calls_kernels", lambda: False)
    else:
        assert deeplock._calls_kernels(), "XLA's interface is not the one that the handler is written for"
    return request.param


# Outside of compiled functions


@pytest.mark.parametrize("name", DTYPES)
def test_arrays_of_any_dtype(name):
    plain = array_of(name, (3, 5, 2))
    locked = deeplock.lock(jnp.asarray(plain), (support.KEYS[128], IV), offset=3)
    assert isinstance(locked, jax.Array)
    assert (locked.shape, locked.dtype, content(locked)) == (
        plain.shape, plain.dtype, oracle("lock", 128, plain.tobytes(), 3)
    )  # fmt: skip
    assert content(deeplock.unlock(locked, (support.KEYS[128], IV), offset=3)) == plain.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_arrays_of_few_elements(shape):
    plain = np.ones(shape, np.float32)
    locked = deeplock.lock(plain, (support.KEYS[192], IV))
    assert (locked.shape, content(locked)) == (shape, oracle("lock", 192, plain.tobytes()))


def test_every_kind_of_schedule():
    plain, key = np.arange(100, dtype=np.int32), support.KEYS[256]
    expected = oracle("lock", 256, plain.tobytes())
    pairs = [(key, IV), (bytearray(key), memoryview(IV)), (MasterKey.from_bytes(key), IV), operands(256)]
    for schedule in [CounterSchedule(key, IV), *pairs]:
        assert content(deeplock.lock(plain, schedule)) == expected
    chain = reference.expansion_keystream(key, 400, 8)
    locked = deeplock.lock(jnp.asarray(plain), ExpansionSchedule(key), sbox="sm4", offset=8)
    assert content(locked) == reference.lock(plain.tobytes(), chain, SBOXES["sm4"].table)


def test_nothing_is_copied(monkeypatch):
    seen = []

    def note(data, *arguments, **keywords):
        seen.append((data.ctypes.data, keywords["out"].ctypes.data))
        return lock(data, *arguments, **keywords)

    lock = locking.lock
    monkeypatch.setattr(locking, "lock", note)
    plain = jnp.arange(1000)
    locked = deeplock.lock(plain, (support.KEYS[128], IV))
    assert seen == [(plain.unsafe_buffer_pointer(), locked.unsafe_buffer_pointer())]


# Inside of compiled functions


@pytest.mark.parametrize("bits", support.BITS)
@pytest.mark.parametrize("direction", support.DIRECTIONS)
def test_compiled_functions_give_the_bytes_of_the_oracle(way, direction, bits):
    data = support.painted(1000).view(np.float32).reshape(10, 25)
    result = jax.jit(traced(direction, offset=5))(data, *operands(bits))
    assert (result.shape, result.dtype) == ((10, 25), np.float32)
    assert content(result) == oracle(direction, bits, data.tobytes(), 5)


@pytest.mark.parametrize("name", DTYPES)
def test_compiled_functions_take_any_dtype(name):
    plain = array_of(name, (3, 5))
    locked = jax.jit(traced("lock"))(plain, *operands(128))
    assert (locked.dtype, content(locked)) == (plain.dtype, oracle("lock", 128, plain.tobytes()))
    assert content(jax.jit(traced("unlock"))(locked, *operands(128))) == plain.tobytes()


def test_compiled_functions_on_every_tier(tier):
    box = support.BOXES["random"]
    result = jax.jit(traced("unlock", sbox=box))(support.painted(500), *operands(256))
    assert content(result) == oracle("unlock", 256, support.painted(500), box=box)


def test_programs_keep_their_kernels():
    data, programs = support.painted(100), {}
    for direction, bits, name in [("lock", 128, "aes"), ("unlock", 128, "aes"), ("lock", 256, "aes"), ("lock", 128, "sm4")]:
        function = jax.jit(traced(direction, sbox=name))
        programs[direction, bits, name] = function.lower(data, *operands(bits)).compile()
    for (direction, bits, name), program in programs.items():
        assert content(program(data, *operands(bits))) == oracle(direction, bits, data, box=SBOXES[name])


def test_nothing_at_all():
    assert jax.jit(traced("lock"))(jnp.zeros((0, 3)), *operands(128)).shape == (0, 3)


@pytest.mark.parametrize("offset", [0, 16, 5])
@pytest.mark.parametrize("in_place", [False, True])
def test_large_arrays_by_several_threads(offset, in_place):
    plain = np.resize(support.painted(251), (17 << 20) + 100)
    expected = locking.lock(plain, CounterSchedule(support.KEYS[128], IV), offset=offset)
    donated = {"donate_argnums": 0} if in_place else {}
    function = jax.jit(traced("lock", offset=offset, in_place=in_place, threads=3), **donated)
    assert np.array_equal(np.asarray(function(jnp.array(plain), *operands(128))), expected)


def test_a_donated_array_is_changed_where_it_is():
    array = jnp.array(support.painted(4000))
    place, function = array.unsafe_buffer_pointer(), jax.jit(traced("lock", in_place=True), donate_argnums=0)
    program = function.lower(array, *operands(128)).compile().as_text()
    assert "output_to_operand_aliasing" in program
    assert " copy(" not in program
    result = function(array, *operands(128))
    assert result.unsafe_buffer_pointer() == place
    assert array.is_deleted()
    assert content(result) == oracle("lock", 128, support.painted(4000))


def test_an_array_that_is_not_donated_stays_as_it_is():
    array, function = jnp.array(support.painted(4000)), jax.jit(traced("lock", in_place=True))
    assert " copy(" in function.lower(array, *operands(128)).compile().as_text()
    result = function(array, *operands(128))
    assert content(array) == support.painted(4000).tobytes()
    assert content(result) == oracle("lock", 128, support.painted(4000))


def test_several_threads_at_once():
    function, results = jax.jit(traced("unlock")), [None] * 4
    data = [support.painted(9000, start) for start in range(4)]

    def work(i):
        results[i] = content(function(data[i], *operands(128)))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [oracle("unlock", 128, each) for each in data]


# Keys


def spellings(key):
    """Give the ways in which a program's text may spell some bytes."""
    numbers = list(key)
    return [key.hex(), key.hex().upper(), ", ".join(map(str, numbers)), ",".join(map(str, numbers))]


def test_no_key_is_in_a_program(way):
    lowered = jax.jit(traced("unlock")).lower(np.zeros(100, np.float32), *operands(256))
    texts = [lowered.as_text(), lowered.as_text(dialect="hlo"), lowered.compile().as_text()]
    for text in texts:
        assert not any(spelling in text for spelling in spellings(support.KEYS[256]))
    # A constant would be there: this one is.
    constant = jax.jit(lambda x: x ^ jnp.asarray(np.frombuffer(support.KEYS[256], np.uint8))).lower(np.zeros(32, np.uint8))
    assert any(spelling in constant.as_text() for spelling in spellings(support.KEYS[256]))


def test_another_key_is_the_same_program():
    function = jax.jit(traced("unlock"))
    for bits in (128, 128):
        function(np.zeros(100, np.float32), operands(bits)[0] + 1, operands(bits)[1])
    assert function._cache_size() == 1


CONSTANTS = {
    "bytes": lambda: (support.KEYS[128], IV),
    "an array": lambda: operands(128),
    "a master key": lambda: (MasterKey.from_bytes(support.KEYS[128]), IV),
    "a schedule": lambda: CounterSchedule(support.KEYS[128], IV),
}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_key_that_is_a_constant_is_refused(constant):
    schedule = CONSTANTS[constant]()
    function = jax.jit(lambda array: deeplock.unlock(array, schedule))
    refused = "key: got a constant where the array is traced"
    support.refuse(errors.KeyTypeError, TypeError, refused, function, np.zeros(4, np.float32))


def test_an_iv_may_be_a_constant():
    function = jax.jit(lambda array, key: deeplock.lock(array, (key, IV)))
    assert content(function(support.painted(50), operands(128)[0])) == oracle("lock", 128, support.painted(50))


# Transformations


def test_vmap_with_an_iv_for_each(way):
    data, (key, iv) = support.painted(200).reshape(2, 100), operands(128)
    ivs = jnp.stack([iv, iv[::-1]])
    result = jax.jit(jax.vmap(traced("lock"), in_axes=(0, None, 0)))(data, key, ivs)
    assert content(result[0]) == oracle("lock", 128, data[0])
    assert content(result[1]) == reference.lock(
        data[1].tobytes(), reference.counter_keystream(support.KEYS[128], IV[::-1], 100)
    )


def test_vmap_with_one_key_stream_is_refused():
    function = jax.jit(jax.vmap(traced("lock"), in_axes=(0, None, None)))
    refused = "lock: got several arrays for one key and iv under jax.vmap"
    support.refuse(errors.ParameterError, ValueError, refused, function, np.zeros((2, 4)), *operands(128))


def loss(inputs, array, key, iv):
    return jnp.sum(inputs * deeplock.unlock(array, (key, iv)))


def test_grad_of_what_is_not_locked(way):
    weights = np.linspace(0, 1, 50, dtype=np.float32)
    locked = deeplock.lock(weights, (support.KEYS[128], IV))
    arguments = jnp.ones(50), locked, *operands(128)
    for function in (jax.grad(loss), jax.jit(jax.grad(loss))):
        assert content(function(*arguments)) == weights.tobytes()


def test_grad_of_what_is_locked_is_refused():
    function = jax.jit(jax.grad(loss, argnums=1))
    refused = "array: got one that is differentiated, and unlock has no derivative"
    arguments = jnp.ones(50), jnp.ones(50), *operands(128)
    support.refuse(errors.BufferTypeError, TypeError, refused, function, *arguments)


# What is refused


BAD_ARRAYS = {
    "a list": (lambda: [1.0], "array: got list"),
    "packed numbers": (lambda: jnp.zeros(4, jnp.int4), "array: got dtype int4"),
    "packed floats": (lambda: jnp.zeros(4, jnp.float4_e2m1fn), "array: got dtype float4_e2m1fn"),
    "random keys": (lambda: jax.random.key(1), "array: got dtype key"),
    "what JAX halves": (lambda: np.zeros(4), "array: got dtype float64, which JAX would convert"),
    "another byte order": (lambda: np.zeros(4, ">f4"), "array: got dtype >f4"),
    "text": (lambda: np.array(["a"]), "array: got dtype str"),
}


@pytest.mark.parametrize("which", BAD_ARRAYS)
def test_arrays_that_are_refused(which):
    make, message = BAD_ARRAYS[which]
    support.refuse(errors.BufferTypeError, TypeError, message, deeplock.lock, make(), (support.KEYS[128], IV))


@pytest.mark.parametrize("which", ["packed numbers", "random keys"])
def test_arrays_that_are_refused_in_compiled_functions(which):
    make, message = BAD_ARRAYS[which]
    support.refuse(errors.BufferTypeError, TypeError, message, jax.jit(traced("lock")), make(), *operands(128))


@pytest.mark.parametrize(
    ("schedule", "kind", "builtin", "message"),
    [
        (None, errors.KeyTypeError, TypeError, "schedule: got NoneType"),
        (bytes(16), errors.KeyTypeError, TypeError, "schedule: got bytes"),
        ((bytes(16),), errors.KeyTypeError, TypeError, "schedule: got tuple"),
        ((bytes(15), IV), errors.KeyFormatError, ValueError, "key"),
        ((bytes(16), bytes(3)), errors.KeyFormatError, ValueError, "iv: got 3 bytes"),
        ((np.zeros(4, np.int32), IV), errors.KeyTypeError, TypeError, "key or iv: got int32 of shape (4,)"),
    ],
)
def test_schedules_that_are_refused(schedule, kind, builtin, message):
    support.refuse(kind, builtin, message, deeplock.lock, np.zeros(4, np.float32), schedule)


@pytest.mark.parametrize(
    ("key", "iv", "message"),
    [
        (np.zeros(15, np.uint8), np.zeros(16, np.uint8), "key: got uint8 of shape (15,)"),
        (np.zeros(16, np.int8), np.zeros(16, np.uint8), "key: got int8 of shape (16,)"),
        (np.zeros((16, 1), np.uint8), np.zeros(16, np.uint8), "key: got uint8 of shape (16, 1)"),
        (np.zeros(16, np.uint8), np.zeros(32, np.uint8), "iv: got uint8 of shape (32,)"),
    ],
)
def test_keys_that_are_refused_in_compiled_functions(key, iv, message):
    function = jax.jit(traced("lock"))
    support.refuse(errors.KeyFormatError, ValueError, message, function, np.zeros(4, np.float32), key, iv)


@pytest.mark.parametrize("offset", [-1, 2**63 - 15, 1.5])
def test_offsets_that_are_refused(offset):
    data = np.zeros(4, np.float32)
    for function in (jax.jit(traced("lock", offset=offset)), traced("lock", offset=offset)):
        support.refuse(errors.ParameterError, ValueError, "offset: got", function, data, *operands(128))


def test_an_unknown_box_is_refused():
    function = traced("lock", sbox="des")
    support.refuse(errors.UnknownNameError, KeyError, "sbox: got 'des'", function, np.zeros(4), *operands(128))


# Trees


def tree():
    return {
        "dense": {"kernel": jnp.asarray(array_of("float32", (20, 30))), "bias": np.zeros(30, np.float32)},
        "norm": [jnp.ones(7, jnp.bfloat16), jnp.zeros((0, 2))],
    }


NAMES = ["dense.bias", "dense.kernel", "norm.0", "norm.1"]


def arrays_of(tree):
    """Give copies of a tree's arrays by their names, to be written."""
    parts = tree["dense"]["bias"], tree["dense"]["kernel"], *tree["norm"]
    return {name: np.array(part) for name, part in zip(NAMES, parts, strict=True)}


def same(one, other):
    first, second = arrays_of(one), arrays_of(other)
    return all(first[name].tobytes() == second[name].tobytes() for name in NAMES)


@pytest.mark.parametrize("schedule", support.SCHEDULES)
def test_a_tree_is_locked_as_named_tensors(schedule):
    key = support.KEYS[256]
    locked, header = deeplock.lock_pytree(tree(), key, schedule=schedule)
    assert list(header.tensors) == NAMES
    assert isinstance(locked["dense"]["bias"], jax.Array)
    arrays = arrays_of(locked)
    unlock_tensors(arrays, key, header)
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: array.tobytes() for name, array in arrays_of(tree()).items()
    }
    assert same(deeplock.unlock_pytree(locked, key, header), tree())


def test_tensors_are_unlocked_as_a_tree():
    arrays = arrays_of(tree())
    header = lock_tensors(arrays, support.KEYS[128], sbox="camellia", seal=False)
    as_tree = {
        "dense": {"kernel": arrays["dense.kernel"], "bias": arrays["dense.bias"]},
        "norm": [arrays["norm.0"], arrays["norm.1"]],
    }
    assert same(deeplock.unlock_pytree(as_tree, support.KEYS[128], header), tree())


def test_only_some_leaves():
    plain = tree() | {"step": 3}
    locked, header = deeplock.lock_pytree(plain, support.KEYS[128], only="dense.*")
    assert list(header.tensors) == ["dense.bias", "dense.kernel"]
    assert locked["norm"][0] is plain["norm"][0]
    assert locked["step"] == 3
    assert same(deeplock.unlock_pytree(locked, support.KEYS[128], header), plain)


def test_what_was_altered_is_refused_and_nothing_plain_is_left(monkeypatch):
    locked, header = deeplock.lock_pytree(tree(), support.KEYS[128])
    locked["dense"]["bias"] = locked["dense"]["bias"].at[3].set(0)
    made, make = [], deeplock._aligned_like

    def note(source):
        made.append(make(source))
        return made[-1]

    monkeypatch.setattr(deeplock, "_aligned_like", note)
    refused = "tensors['dense.bias']: its bytes are not those that were sealed"
    support.refuse(errors.TamperedError, ValueError, refused, deeplock.unlock_pytree, locked, support.KEYS[128], header)
    assert len(made) == 4
    assert not any(map(np.any, (array.view(np.uint8) for array in made)))
    assert not same(deeplock.unlock_pytree(locked, support.KEYS[128], header, seal=False), tree())


def test_trees_that_are_refused():
    key = support.KEYS[128]
    locked, header = deeplock.lock_pytree(tree(), key)
    refuse = support.refuse
    refuse(errors.WrongKeyError, ValueError, "key: it is not", deeplock.unlock_pytree, locked, bytes(16), header)
    refuse(errors.BufferTypeError, TypeError, "tree['a']: got float", deeplock.lock_pytree, {"a": 1.0}, key)
    twice = {"a": {"b": np.zeros(2, np.int8)}, "a.b": np.zeros(2, np.int8)}
    refuse(errors.TensorNameError, KeyError, "tree: got two leaves named 'a.b'", deeplock.lock_pytree, twice, key)
    short = locked | {"norm": locked["norm"][:1]}
    refuse(errors.TensorNameError, KeyError, "tree: it has no 'norm.1'", deeplock.unlock_pytree, short, key, header)
    other = locked | {"norm": [jnp.zeros(3), locked["norm"][1]]}
    refused = "tree['norm.0']: got 12 bytes, accepted are the header's 14"
    refuse(errors.SizeMismatchError, ValueError, refused, deeplock.unlock_pytree, other, key, header)
    inside = jax.jit(lambda tree: deeplock.lock_pytree(tree, key)[0])
    refuse(errors.BufferTypeError, TypeError, "tree['a']: got a tracer", inside, {"a": jnp.zeros(3)})


def test_a_tree_is_unlocked_inside_of_a_compiled_function(way):
    locked, header = deeplock.lock_pytree(tree(), support.KEYS[192], sbox="sm4", only=["dense.*", "norm.0"])
    keys = deeplock.derive_keys(locked, support.KEYS[192], header)
    assert {name: (key.shape, key.dtype) for name, key in keys.items()} == dict.fromkeys(NAMES[:3], ((40,), np.uint8))
    unlock = jax.jit(lambda tree, keys: deeplock.unlock_leaves(tree, keys, sbox="sm4"))
    assert same(unlock(locked, keys), tree())
    support.refuse(
        errors.TensorNameError, KeyError, "tree: it has no 'norm.0', which is in the keys",
        deeplock.unlock_leaves, {"dense": locked["dense"]}, keys,
    )  # fmt: skip


def test_one_key_stream_for_all_has_no_keys_for_each():
    locked, header = deeplock.lock_pytree(tree(), support.KEYS[128], schedule="expansion")
    refused = "header: got schedule 'expansion'"
    support.refuse(errors.ParameterError, ValueError, refused, deeplock.derive_keys, locked, support.KEYS[128], header)
    support.refuse(errors.WrongKeyError, ValueError, "key", deeplock.derive_keys, locked, bytes(16), header)


# Other processes

PROCESS = """
import sys
import numpy as np
import jax
from deeplock_kernels import errors, reference
from deeplock_kernels.frameworks import jax as deeplock

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
key, iv, data = (np.arange(count, dtype=np.uint8) for count in (16, 16, 1000))
expected = reference.lock(data.tobytes(), reference.counter_keystream(key.tobytes(), iv.tobytes(), 1000))
lock = jax.jit(lambda data, key, iv: deeplock.lock(data, (key, iv)))
assert np.asarray(lock(data, key, iv)).tobytes() == expected

# As in a process that has not traced the program.
from deeplock_kernels.frameworks import xla
deeplock._rows.clear()
xla._table[0] = 0
try:
    lock(data, key, iv).block_until_ready()
except (ValueError, jax.errors.JaxRuntimeError) as error:
    print("deeplock: this process does not know the kernel" in str(error))
assert deeplock.prepare()
assert np.asarray(lock(data, key, iv)).tobytes() == expected

halves = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.sharding.PartitionSpec("x"))
try:
    deeplock.lock(jax.device_put(data, halves), (key.tobytes(), iv.tobytes()))
except errors.BufferTypeError as error:
    print(error)
"""


def test_programs_of_other_processes_and_arrays_of_several_devices(tmp_path):
    written = []
    for _ in range(2):
        found = run(PROCESS, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2")
        assert re.match(r"True\narray: got an array on .*0, .*1, accepted is one CPU device", found)
        written.append({path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")})
    assert written[0] == written[1] != set()  # so the second process took the program of the first


def test_the_examples_of_the_documentation():
    namespace = {"__name__": "__main__"}
    for example in support.examples_of_frameworks("JAX"):
        exec(compile(example, "README.md", "exec"), namespace)
