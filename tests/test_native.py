"""The kernels for callers that are not Python: C, ctypes, cffi, and functions that others compile with Numba."""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
from pathlib import Path

import cffi
import numba
import numpy as np
import pytest
import support
from processes import run

from deeplock_kernels import errors, jit, native, native_functions, reference, use_tier
from deeplock_kernels.kernels import signatures
from deeplock_kernels.native import include_directory
from deeplock_kernels.runtime import tiers
from deeplock_kernels.sboxes import AES, SBOXES

HEADER = Path(include_directory()) / "deeplock.h"
C_PROGRAM = r"""
#include <pthread.h>
#include <string.h>
#include "deeplock.h"

#define ADDRESS(place) ((int64_t)(intptr_t)(place))

/* The first `cut` bytes, and the others from their own position on. */
void run_in_two(const deeplock_function *function, unsigned char *target, const unsigned char *source, uint64_t nbytes,
                uint64_t cut, const unsigned char *key_iv)
{
    deeplock_run(function, target, source, cut, 0, key_iv);
    deeplock_run(function, target + cut, source + cut, nbytes - cut, cut, key_iv);
}

void run_list(const deeplock_function *function, unsigned char *data, uint64_t nbytes, const unsigned char *key_iv)
{
    deeplock_record records[2] = {
        {ADDRESS(data), ADDRESS(data), (int64_t)(nbytes / 2), 3, ADDRESS(key_iv)},
        {ADDRESS(data + nbytes / 2), ADDRESS(data + nbytes / 2), (int64_t)(nbytes - nbytes / 2), 5, ADDRESS(key_iv)},
    };
    deeplock_counter_list arguments = {ADDRESS(records), 2, function->rcon, function->box};
    function->kernel(&arguments);
}

/* In two pieces, of which the first has 32 bytes; the seal comes into `seal`. With a new key it moves to that one. */
void run_sealed(const deeplock_function *function, const deeplock_function *make_keys, unsigned char *data,
                uint64_t nbytes, const unsigned char *key_iv, const unsigned char *new_key_iv,
                const unsigned char *seal_key, unsigned char *seal)
{
    unsigned char keys[DEEPLOCK_SEAL_KEYS_BYTES], tags[2][DEEPLOCK_TAG_BYTES];
    deeplock_seal_keys making = {ADDRESS(keys), ADDRESS(seal_key), 1, make_keys->rcon};
    int i;
    make_keys->kernel(&making);
    if (new_key_iv) {
        deeplock_rekey_record records[2] = {
            {ADDRESS(data), ADDRESS(data), 32, 0, ADDRESS(key_iv), ADDRESS(keys), (int64_t)nbytes, ADDRESS(tags[0]),
             ADDRESS(new_key_iv)},
            {ADDRESS(data + 32), ADDRESS(data + 32), (int64_t)nbytes - 32, 32, ADDRESS(key_iv), ADDRESS(keys),
             (int64_t)nbytes, ADDRESS(tags[1]), ADDRESS(new_key_iv)},
        };
        deeplock_rekey arguments = {ADDRESS(records), 2, function->rcon, function->box, function->inverse_box};
        function->kernel(&arguments);
    } else {
        deeplock_sealed_record records[2] = {
            {ADDRESS(data), ADDRESS(data), 32, 0, ADDRESS(key_iv), ADDRESS(keys), (int64_t)nbytes, ADDRESS(tags[0])},
            {ADDRESS(data + 32), ADDRESS(data + 32), (int64_t)nbytes - 32, 32, ADDRESS(key_iv), ADDRESS(keys),
             (int64_t)nbytes, ADDRESS(tags[1])},
        };
        if (key_iv) {
            deeplock_counter_sealed arguments = {ADDRESS(records), 2, function->rcon, function->box};
            function->kernel(&arguments);
        } else {
            deeplock_seal arguments = {ADDRESS(records), 2};
            function->kernel(&arguments);
        }
    }
    for (i = 0; i < DEEPLOCK_TAG_BYTES; i++)
        seal[i] = tags[0][i] ^ tags[1][i];
}

void run_substitute(const deeplock_function *function, unsigned char *data, uint64_t nbytes)
{
    deeplock_run_substitute(function, data, data, nbytes);
}

typedef struct {
    const deeplock_function *function;
    unsigned char *data;
    uint64_t nbytes, offset;
    const unsigned char *key_iv;
} part;

static void *run_part(void *argument)
{
    const part *mine = argument;
    deeplock_run(mine->function, mine->data, mine->data, mine->nbytes, mine->offset, mine->key_iv);
    return 0;
}

/* On four threads that know nothing of Python. */
int run_on_threads(const deeplock_function *function, unsigned char *data, uint64_t nbytes, const unsigned char *key_iv)
{
    pthread_t threads[4];
    part parts[4];
    int i, failed = 0;
    for (i = 0; i < 4; i++) {
        parts[i] = (part){function, data + i * (nbytes / 4), nbytes / 4, i * (nbytes / 4), key_iv};
        failed |= pthread_create(&threads[i], 0, run_part, &parts[i]);
    }
    for (i = 0; i < 4; i++)
        failed |= pthread_join(threads[i], 0);
    return failed;
}
"""


def compiled(folder, text, name):
    source, library = folder / f"{name}.c", folder / f"{name}.so"
    source.write_text(text)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["cc", *flags, f"-I{include_directory()}", "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("c"), C_PROGRAM, "program")


def pointer(function):
    return ctypes.c_void_p(function.pointer)


def place(data):
    return ctypes.create_string_buffer(bytes(data), len(data))


def oracle(direction, bits, data, offset=0, box=AES):
    stream = reference.counter_keystream(support.KEYS[bits], support.IV, len(data), offset)
    return (reference.lock if direction == "lock" else reference.unlock)(data, stream, box.table)


PLAIN = bytes(support.painted(1000))


# The header


def structures():
    """Give the fields of each structure of the header that a kernel or a list takes."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    found = re.findall(r"typedef struct deeplock_(\w+) \{\s*(.*?)\} deeplock_\1;", text, re.DOTALL)
    return {
        name: re.split(r",\s*", re.fullmatch(r"int64_t (.*);\s*", body, re.DOTALL)[1])
        for name, body in found
        if name != "function"
    }


def test_the_header_has_the_arguments_that_kernels_take():
    documented = dict(re.findall(r"^\| (\w+) +\| (.*?) +\|$", signatures.__doc__, re.MULTILINE))
    places = {"key": "key", "sealed records": "records", "rekey records": "records", "inverse box": "inverse_box"}
    records = {"record", "sealed_record", "rekey_record"}
    for name, fields in structures().items():
        if name in records:
            continue
        assert fields == [places.get(field, field) for field in documented[name].split(", ")], name
        assert 8 * len(fields) == signatures.RECORDS[name].size
    assert records < set(structures())


def test_the_header_has_the_layouts_that_kernels_read(tmp_path):
    sizes = {
        "deeplock_record": signatures.RECORD_BYTES,
        "deeplock_sealed_record": signatures.SEALED_RECORD_BYTES,
        "deeplock_rekey_record": signatures.REKEY_RECORD_BYTES,
        "deeplock_function": 32,
        **{f"deeplock_{name}": signatures.RECORDS[name].size for name in structures() if "record" not in name},
    }
    functions = "\n".join(f"int size_of_{name}(void) {{ return sizeof({name}); }}" for name in sizes)
    constants = {name: getattr(signatures, name) for name in ("SEAL_KEY_BYTES", "SEAL_KEYS_BYTES", "TAG_BYTES")}
    functions += "\n".join(f"\nint {name}(void) {{ return DEEPLOCK_{name}; }}" for name in constants)
    library = compiled(tmp_path, f'#include "deeplock.h"\n{functions}\n', "layouts")
    assert {name: getattr(library, f"size_of_{name}")() for name in sizes} == sizes
    assert {name: getattr(library, name)() for name in constants} == constants


def test_signatures_are_those_of_the_header(monkeypatch):
    monkeypatch.setattr(native, "_made", {})
    monkeypatch.setattr(tiers, "kernel", lambda tier, name: ctypes.CFUNCTYPE(None)())  # none has to be compiled
    names = {f"deeplock_{name}" for name in structures()}
    for name, function in native_functions().items():
        found = re.fullmatch(r"void (\w+)\(const (\w+) \*arguments\)", function.signature)
        assert found[1] == name == function.name
        assert found[2] in names


# C


@pytest.mark.parametrize("bits", support.BITS)
@pytest.mark.parametrize("direction", support.DIRECTIONS)
def test_c_gets_the_bytes_of_the_oracle(program, direction, bits):
    function = native_functions()[f"{direction}_{bits}"]
    key_iv, target = place(support.KEYS[bits] + support.IV), place(bytes(1001))
    program.run_in_two(pointer(function), target, PLAIN, ctypes.c_uint64(1000), ctypes.c_uint64(77), key_iv)
    assert target.raw == oracle(direction, bits, PLAIN) + b"\0"


def test_c_on_every_tier(program, tier):
    function = native_functions("kuznyechik")["lock_256"]
    assert function.tier == tier.name
    key_iv, data = place(support.KEYS[256] + support.IV), place(PLAIN)
    program.run_in_two(pointer(function), data, data, ctypes.c_uint64(1000), ctypes.c_uint64(500), key_iv)
    assert data.raw == oracle("lock", 256, PLAIN, box=SBOXES["kuznyechik"])


def test_c_locks_a_list(program):
    key_iv, data = place(support.KEYS[128] + support.IV), place(PLAIN)
    program.run_list(pointer(native_functions()["lock_list_128"]), data, ctypes.c_uint64(1000), key_iv)
    assert data.raw == oracle("lock", 128, PLAIN[:500], 3) + oracle("lock", 128, PLAIN[500:], 5)


def test_c_seals_rekeys_and_unlocks(program):
    functions = native_functions()
    make_keys, nbytes = pointer(functions["seal_keys"]), ctypes.c_uint64(1000)
    old, new = place(support.KEYS[256] + support.IV), place(support.KEYS[256][::-1] + support.IV)
    seal_key, seal, data = place(support.SEAL_KEY), place(bytes(16)), place(PLAIN)
    common = nbytes, old
    program.run_sealed(pointer(functions["lock_sealed_256"]), make_keys, data, *common, None, seal_key, seal)
    locked = oracle("lock", 256, PLAIN)
    assert (data.raw, seal.raw) == (locked, reference.seal(support.SEAL_KEY, locked))
    program.run_sealed(pointer(functions["rekey_256"]), make_keys, data, *common, new, seal_key, seal)
    stream = reference.counter_keystream(support.KEYS[256][::-1], support.IV, 1000)
    rekeyed = reference.lock(PLAIN, stream)
    assert (data.raw, seal.raw) == (rekeyed, reference.seal(support.SEAL_KEY, rekeyed))
    seal.raw = bytes(16)
    program.run_sealed(pointer(functions["seal"]), make_keys, data, nbytes, None, None, seal_key, seal)
    assert (data.raw, seal.raw) == (rekeyed, reference.seal(support.SEAL_KEY, rekeyed))
    unlock = pointer(functions["unlock_sealed_256"])
    program.run_sealed(unlock, make_keys, data, nbytes, new, None, seal_key, seal)
    assert (data.raw, seal.raw) == (PLAIN, reference.seal(support.SEAL_KEY, rekeyed))


@pytest.mark.parametrize("box", ["aes", "sm4"])
def test_c_substitutes(program, box):
    functions, data = native_functions(box), place(PLAIN)
    program.run_substitute(pointer(functions["substitute"]), data, ctypes.c_uint64(1000))
    assert data.raw == bytes(SBOXES[box].table[byte] for byte in PLAIN)
    program.run_substitute(pointer(functions["substitute_inverse"]), data, ctypes.c_uint64(1000))
    assert data.raw == PLAIN


def test_threads_of_c_need_no_python(program):
    key_iv, plain = place(support.KEYS[128] + support.IV), bytes(support.painted(40_000))
    data = place(plain)
    assert program.run_on_threads(pointer(native_functions()["lock_128"]), data, ctypes.c_uint64(40_000), key_iv) == 0
    assert data.raw == oracle("lock", 128, plain)


# ctypes and cffi


def test_ctypes_calls_an_address():
    function = native_functions()["lock_128"]
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)
    key_iv, data = place(support.KEYS[128] + support.IV), place(PLAIN)
    address = ctypes.addressof(data)
    _, rcon, box, _ = (ctypes.c_int64 * 4).from_address(function.pointer)
    kernel((ctypes.c_int64 * 7)(address, address, 1000, 9, ctypes.addressof(key_iv), rcon, box))
    assert data.raw == oracle("lock", 128, PLAIN, 9)


def test_cffi_reads_the_header_and_calls():
    text = re.sub(r"^static inline.*?^}$", "", HEADER.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^#.*$|^extern \"C\" \{$|^}$", "", text, flags=re.MULTILINE)
    ffi = cffi.FFI()
    ffi.cdef(text)
    function = ffi.cast("deeplock_function *", native_functions()["lock_256"].pointer)
    assert int(ffi.cast("intptr_t", function.kernel)) == native_functions()["lock_256"].address
    key_iv, data = ffi.new("unsigned char[]", support.KEYS[256] + support.IV), ffi.new("unsigned char[]", PLAIN)

    def address(memory):
        return int(ffi.cast("intptr_t", memory))

    arguments = {"target": address(data), "source": address(data), "nbytes": 1000, "offset": 0}
    arguments |= {"key": address(key_iv), "rcon": function.rcon, "box": function.box}
    function.kernel(ffi.new("deeplock_counter *", arguments))
    assert ffi.buffer(data)[:1000] == oracle("lock", 256, PLAIN)


def test_the_examples_for_c(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = support.examples_of_frameworks("C", "c")
    compiled(tmp_path, example, "loader")
    namespace = {"__name__": "__main__"}
    for example in support.examples_of_frameworks("C"):
        exec(compile(example, "README.md", "exec"), namespace)
    assert "void lock_256(const deeplock_counter *arguments)" in capsys.readouterr().out
    stream = reference.counter_keystream(bytes(32), bytes(16), 1000)
    assert namespace["weights"].raw == reference.unlock(bytes(1000), stream)


# Names and lifetimes


def test_nothing_is_compiled_before_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(tiers, "kernel", None)
    functions = native_functions("camellia")
    assert {"lock_128", "unlock_256", "rekey_192", "substitute", "seal"} < set(functions)
    assert len(functions) == len(list(functions))
    assert "lock_128" in repr(functions)


def test_a_function_stays_what_it_is_in_another_tier(program):
    before = native_functions()["lock_128"]
    with use_tier("portable"):
        other = native_functions()["lock_128"]
        key_iv, data = place(support.KEYS[128] + support.IV), place(PLAIN)
        program.run_in_two(pointer(before), data, data, ctypes.c_uint64(1000), ctypes.c_uint64(16), key_iv)
        assert data.raw == oracle("lock", 128, PLAIN)
    assert native_functions()["lock_128"] is before
    assert (other.tier, other.address == before.address) == ("portable", before.tier == "portable")


def test_an_unknown_name():
    support.refuse(errors.UnknownNameError, KeyError, "name: got 'lock_512', accepted are", lambda: native_functions()["lock_512"])
    support.refuse(errors.UnknownNameError, KeyError, "sbox: got 'des', accepted are", native_functions, "des")
    assert "lock_512" not in native_functions()


def test_plain_python_has_no_address():
    program = """
from deeplock_kernels import errors, native_functions
try:
    native_functions()["lock_128"]
except errors.KernelError as error:
    print(error)
"""
    output = run(program, NUMBA_DISABLE_JIT=1, DEEPLOCK_CACHE=0)
    assert output.startswith("lock_128: it is not compiled, as NUMBA_DISABLE_JIT asks for")


def test_a_fork_has_the_same_addresses():
    program = """
import ctypes, os
from deeplock_kernels import native_functions, reference
function = native_functions()["lock_128"]
fields = (ctypes.c_int64 * 4).from_address(function.pointer)
process = os.fork()
if process == 0:
    data, key_iv = ctypes.create_string_buffer(100), ctypes.create_string_buffer(bytes(32), 32)
    address = ctypes.addressof(data)
    record = (ctypes.c_int64 * 7)(address, address, 100, 0, ctypes.addressof(key_iv), fields[1], fields[2])
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)(record)
    right = data.raw[:100] == reference.lock(bytes(100), reference.counter_keystream(bytes(16), bytes(16), 100))
    os._exit(0 if right else 1)
assert os.waitpid(process, 0)[1] == 0
"""
    assert run(program) == ""


# Numba


@numba.njit
def lock_in_numba(array, key, iv, offset):
    jit.lock(array, key, iv, offset)
    return array.size


@numba.njit(nogil=True)
def unlock_without_the_gil(array, key, iv):
    jit.unlock(array, key, iv)


def bytes_of(data):
    return np.frombuffer(data, np.uint8)


@pytest.mark.parametrize("bits", support.BITS)
def test_numba_gets_the_bytes_of_the_oracle(bits):
    array = support.painted(1000).view(np.float32).reshape(5, 50)
    assert lock_in_numba(array, bytes_of(support.KEYS[bits]), bytes_of(support.IV), 7) == 250
    assert array.tobytes() == oracle("lock", bits, PLAIN, 7)


def test_numba_on_every_tier(tier):
    substituting = jit.functions("kuznyechik").unlock

    @numba.njit
    def work(arrays, key, iv):
        for i in range(len(arrays)):
            substituting(arrays[i], key, iv)

    arrays = support.painted(1000).reshape(2, 500)
    work(arrays, bytes_of(support.KEYS[192]), bytes_of(support.IV))
    box = SBOXES["kuznyechik"]
    expected = oracle("unlock", 192, PLAIN[:500], box=box), oracle("unlock", 192, PLAIN[500:], box=box)
    assert (arrays[0].tobytes(), arrays[1].tobytes()) == expected


def test_numba_in_threads_without_the_gil():
    locked = np.frombuffer(oracle("lock", 128, bytes(support.painted(100_000))), np.uint8)
    arrays = [locked.copy() for _ in range(4)]
    key, iv = bytes_of(support.KEYS[128]), bytes_of(support.IV)
    workers = [threading.Thread(target=unlock_without_the_gil, args=(array, key, iv)) for array in arrays]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(array, support.painted(100_000)) for array in arrays)


def test_the_same_functions_in_python():
    array, key = support.painted(1000), bytes_of(support.KEYS[128])
    jit.lock(array, key, bytes_of(support.IV), 7)
    assert array.tobytes() == oracle("lock", 128, PLAIN, 7)
    jit.unlock(array, key, bytes_of(support.IV), 7)
    assert array.tobytes() == PLAIN


@pytest.mark.parametrize(
    ("key", "iv", "offset", "kind", "message"),
    [
        (15, 16, 0, errors.KeyFormatError, "key: accepted are 16, 24 or 32 bytes"),
        (0, 16, 0, errors.KeyFormatError, "key: accepted are 16, 24 or 32 bytes"),
        (16, 17, 0, errors.KeyFormatError, "iv: accepted are 16 bytes"),
        (16, 16, -1, errors.ParameterError, "offset: accepted are"),
        (16, 16, 2**63 - 1000, errors.ParameterError, "offset: accepted are"),
        (16, 16, np.uint64(2**64 - 1), errors.ParameterError, "offset: accepted are"),
    ],
)
def test_numba_refuses_values_unchanged(key, iv, offset, kind, message):
    array = support.painted(1000)
    support.refuse(
        kind, ValueError, message, lock_in_numba, array, np.zeros(key, np.uint8), np.zeros(iv, np.uint8), offset
    )
    assert array.tobytes() == PLAIN


@pytest.mark.parametrize(
    ("array", "key", "message"),
    [
        (np.zeros((3, 3), order="F"), np.zeros(16, np.uint8), "lock: array: got array(float64, 2d, F)"),
        (np.frombuffer(bytes(9), np.uint8), np.zeros(16, np.uint8), "lock: array: got readonly array"),
        (np.zeros(9), np.zeros(16, np.int8), "lock: key: got array(int8, 1d, C)"),
        (np.zeros(9), np.zeros(32, np.uint8)[::2], "lock: key: got array(uint8, 1d, A)"),
    ],
)
def test_numba_refuses_types(array, key, message):
    with pytest.raises(numba.TypingError, match=re.escape(message)):
        lock_in_numba(array, key, np.zeros(16, np.uint8), 0)


def test_numba_never_writes_addresses_to_its_cache(tmp_path):
    (tmp_path / "worker.py").write_text(
        "import numba\n"
        "from deeplock_kernels import jit\n"
        "@numba.njit(cache=True)\n"
        "def work(array, key, iv):\n"
        "    jit.lock(array, key, iv)\n"
        "@numba.njit(cache=True)\n"
        "def other(array):\n"
        "    return array.size\n"
    )
    program = """
import sys, warnings
import numpy as np
import numba
sys.path.insert(0, sys.argv[1])
import worker
array = np.zeros(100, np.uint8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    worker.work(array, np.zeros(16, np.uint8), np.zeros(16, np.uint8))
worker.other(array)
from deeplock_kernels import reference
assert array.tobytes() == reference.lock(bytes(100), reference.counter_keystream(bytes(16), bytes(16), 100))
print([issubclass(one.category, numba.NumbaWarning) and "dynamic globals" in str(one.message) for one in caught])
"""
    for _ in range(2):
        assert run(program, tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache") == "[True]\n"
    written = {path.name.split("-")[0] for path in (tmp_path / "cache").rglob("*.nb*")}
    assert written == {"worker.other"}


def test_the_examples_for_numba():
    for example in support.examples_of_frameworks("Numba"):
        exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
