"""TensorFlow, in one process of its own: it is large, and warns while it is imported."""

from __future__ import annotations

import support
from processes import Process

START = """
import warnings
warnings.simplefilter("ignore")
import numpy as np
import tensorflow as tf
warnings.simplefilter("error")
from deeplock_kernels import WrongKeyError, reference
from deeplock_kernels.errors import BufferTypeError, KeyFormatError, ParameterError, TamperedError, TensorNameError
from deeplock_kernels.frameworks.tensorflow import lock, lock_variables, unlock, unlock_variables

key, iv = np.arange(32, dtype=np.uint8), np.arange(16, dtype=np.uint8)
master = bytes(range(16))
def oracle(data, offset=0):
    return reference.lock(data, reference.counter_keystream(key.tobytes(), iv.tobytes(), len(data), offset))
def refused(error, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except error as caught:
        return caught
    raise AssertionError(error)
def bits(dtype, shape=(3, 5)):
    plain = np.random.default_rng(3).integers(0, 256, (*shape, dtype.size), np.uint8)
    return plain.view(dtype.as_numpy_dtype)[..., 0]
"""

EAGER = """
dtypes = [tf.float32, tf.float64, tf.float16, tf.bfloat16, tf.int8, tf.uint8, tf.int32, tf.int64, tf.uint16,
          tf.complex64, tf.complex128]
for dtype in dtypes:
    for shape in ((3, 5), (), (0, 4)):
        plain = bits(dtype, shape)
        locked = lock(tf.constant(plain, dtype), key, iv, offset=5)
        assert locked.dtype == dtype and locked.shape == shape
        assert locked.numpy().tobytes() == oracle(plain.tobytes(), 5), dtype
        assert unlock(locked, tf.constant(key), iv, offset=5).numpy().tobytes() == plain.tobytes()
"""

GRAPH = """
@tf.function
def computed(locked, x, key, iv):
    return tf.linalg.matvec(unlock(locked, key, iv, sbox="sm4"), x)
weights, x = tf.random.normal((4, 6)), tf.random.normal((6,))
locked = lock(weights, key, iv, sbox="sm4")
operands = tf.constant(key), tf.constant(iv)
assert np.array_equal(computed(locked, x, *operands), tf.linalg.matvec(weights, x))
assert not np.array_equal(computed(locked, x, tf.constant(key[::-1].copy()), operands[1]), tf.linalg.matvec(weights, x))
concrete = computed.get_concrete_function(locked, x, *operands)
assert key.tobytes() not in concrete.graph.as_graph_def().SerializeToString(), "the key is an operand"
assert len(computed._list_all_concrete_functions()) == 1, "another key is not another graph"
assert unlock(locked, key, iv).shape == (4, 6)
with tf.GradientTape() as tape:
    variable = tf.Variable(weights)
    loss = tf.reduce_sum(lock(variable, key, iv))
assert "gradient" in str(refused(TypeError, tape.gradient, loss, variable))
"""

VARIABLES = """
class Part(tf.Module):
    def __init__(self):
        self.kernel = tf.Variable(tf.random.normal((50, 3)), name="kernel")
        self.count = tf.Variable(tf.range(7), name="count", trainable=False)
        self.half = tf.Variable(tf.cast(tf.random.normal((9,)), tf.bfloat16), name="half")
part = Part()
raw = lambda: [variable.numpy().tobytes() for variable in part.variables]
plain = raw()
for schedule in ("counter", "expansion"):
    header = lock_variables(part.variables, master, schedule=schedule)
    locked = raw()
    assert all(a != b for a, b in zip(plain, locked))
    refused(WrongKeyError, unlock_variables, part.variables, bytes(16), header)
    assert raw() == locked
    unlock_variables(part.variables, master, header)
    assert raw() == plain
    refused(TamperedError, unlock_variables, part.variables, master, header)
named = {"one": part.kernel, "the same": part.kernel, "two": part.half}
header = lock_variables(named, master)
assert header.tensors["the same"].same_as == "one"
unlock_variables(named, master, header)
assert raw() == plain
header = lock_variables(named, master, only="two")
assert set(header.tensors) == {"two"} and raw()[0] == plain[0]
unlock_variables(named, master, header)
header = lock_variables(part.variables, master)
locked, kind, original = raw(), type(part.kernel), type(part.kernel).assign
for position in range(3):
    done = []
    def failing(self, value, *rest, **more):
        done.append(1)
        if len(done) == position + 1:
            raise KeyboardInterrupt
        return original(self, value, *rest, **more)
    kind.assign = failing
    refused(KeyboardInterrupt, unlock_variables, part.variables, master, header)
    kind.assign = original
    assert raw() == locked
"""

REFUSED = """
one = tf.constant([1.0])
refused(KeyFormatError, lock, one, key[:5], iv)
refused(KeyFormatError, lock, one, key, iv[:5])
refused(ParameterError, lock, one, key, iv, offset=-1)
refused(BufferTypeError, lock, tf.constant("text"), key, iv)
refused(BufferTypeError, lock, tf.constant([True]), key, iv)
refused(BufferTypeError, lock, tf.sparse.from_dense([[0.0, 1.0]]), key, iv)
refused(BufferTypeError, lock, tf.ragged.constant([[1.0], [2.0, 3.0]]), key, iv)
refused(BufferTypeError, lock_variables, [np.ones(3)], master)
refused(BufferTypeError, lock_variables, 1.0, master)
alone = tf.Variable(1.0, name="alone")
unlock_variables(alone, master, lock_variables(alone, master))
assert alone.numpy() == 1
switch = tf.Variable([True, False], name="switch")
refused(BufferTypeError, lock_variables, [switch, part.kernel], master)
assert switch.numpy().tolist() == [True, False] and raw() == locked
refused(TensorNameError, lock_variables, [tf.Variable(1.0, name="a"), tf.Variable(2.0, name="a")], master)
"""


def test_tensorflow():
    support.framework("tensorflow")
    environment = {"TF_CPP_MIN_LOG_LEVEL": 3, "TF_ENABLE_ONEDNN_OPTS": 0}
    examples = "\n".join(support.examples_of_frameworks("TensorFlow"))
    program = START + EAGER + GRAPH + VARIABLES + REFUSED + examples + "\nprint('all of it')"
    assert Process(program, **environment).finish(errors=None).endswith("all of it\n")
