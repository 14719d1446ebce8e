"""PyTorch: modules locked in place, computing with a key, operators in compiled graphs, workers and ranks."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import signal
import threading

import numpy as np
import pytest
import support
from processes import run
from support import refuse

torch = support.framework("torch")

import safetensors.torch  # noqa: E402
from torch import nn  # noqa: E402

import deeplock_kernels  # noqa: E402
from deeplock_kernels import LockHeader, errors, lock_file, lock_tensors, unlock_tensors  # noqa: E402
from deeplock_kernels.frameworks import torch as deeplock_torch  # noqa: E402
from deeplock_kernels.frameworks.torch import (  # noqa: E402
    KeyedModule,
    load_state_dict,
    lock_module,
    lock_state_dict,
    rekey_module,
    unlock_module,
    unlock_state_dict,
    verify_module,
)
from deeplock_kernels.frameworks.torch import keyed as keyed_module  # noqa: E402

torch.set_num_threads(1)  # its threads wait for each other at work, which takes long where others work too
KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
DTYPES = [
    name
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
        "float4_e2m1fn_x2", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
        "complex64", "complex128",
    )
    if hasattr(torch, name)
]  # fmt: skip


def bytes_of(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def everything(module):
    return {name: bytes_of(tensor) for name, tensor in module.state_dict().items()}


def places(module):
    return {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}


class EveryDtype(nn.Module):
    def __init__(self):
        super().__init__()
        for i, name in enumerate(DTYPES):
            dtype = getattr(torch, name)
            data = torch.from_numpy(support.painted(48, 7 * i)).view(dtype)
            if i % 2:
                self.register_buffer(f"of_{name}", data)
            else:
                self.register_parameter(f"of_{name}", nn.Parameter(data, requires_grad=False))
        self.register_buffer("scalar", torch.tensor(3))
        self.register_buffer("empty", torch.empty(0, 3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.words.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, words):
        return self.out(self.norm(self.words(words)))


# Modules in place


def test_a_module_of_every_dtype():
    module = EveryDtype()
    plain, addresses = everything(module), places(module)
    header = lock_module(module, KEY)
    assert [*header.tensors] == [*dict(module.named_parameters()), *dict(module.named_buffers())]
    locked = everything(module)
    assert all(locked[name] != plain[name] for name in plain if plain[name])
    # What NumPy sees in the same bytes is what `lock_tensors` would have made.
    arrays = {name: np.frombuffer(bytearray(data), np.uint8) for name, data in locked.items()}
    unlock_tensors(arrays, KEY, LockHeader.from_json(header.to_json()))
    assert {name: array.tobytes() for name, array in arrays.items()} == plain
    verify_module(module, KEY, header)
    newer = rekey_module(module, KEY, OTHER, header)
    refuse(errors.WrongKeyError, ValueError, "key: ", unlock_module, module, KEY, newer)
    unlock_module(module, OTHER, newer)
    assert everything(module) == plain
    assert places(module) == addresses


def test_tied_weights_are_locked_once_and_buffers_that_are_not_saved_never():
    module = Tied()
    plain = everything(module)
    header = lock_module(module, KEY)
    assert header.tensors["out.weight"].same_as == "words.weight"
    assert set(header.tensors) == set(module.state_dict())
    assert (module.mask == 1).all()
    assert module.out.weight is module.words.weight
    unlock_module(module, KEY, header)
    assert everything(module) == plain


def test_a_choice_of_tensors():
    module = Tied()
    plain = everything(module)
    header = lock_module(module, KEY, buffers=False)
    assert set(header.tensors) == dict(module.named_parameters(remove_duplicate=False)).keys()
    assert everything(module)["norm.running_var"] == plain["norm.running_var"]
    unlock_module(module, KEY, header)
    header = lock_module(module, KEY, only="norm.*", seal=False, schedule="expansion", sbox="sm4", threads=1)
    assert (header.schedule, header.sbox) == ("expansion", "sm4")
    assert all((everything(module)[name] == plain[name]) == (name not in header.tensors) for name in plain)
    assert {name.partition(".")[0] for name in header.tensors} == {"norm"}
    unlock_module(module, KEY, header)
    assert everything(module) == plain


def test_autograd_is_told():
    module = nn.Linear(4, 4)
    loss = (module.weight * module.weight).sum()
    header = lock_module(module, KEY)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    unlock_module(module, KEY, header)
    assert module.weight.requires_grad
    module(torch.ones(1, 4)).sum().backward()


def test_a_state_dictionary_goes_through_a_file_into_another_module(tmp_path):
    module, other = Tied(), Tied()
    plain = everything(module)
    header = lock_module(module, KEY)
    torch.save(module.state_dict(), tmp_path / "locked.pt")
    other.load_state_dict(torch.load(tmp_path / "locked.pt"))
    assert everything(other) == everything(module) != plain
    unlock_module(other, KEY, header)
    assert everything(other) == plain
    # The same with the dictionary; what is no tensor stays.
    state = {**{name: tensor.clone() for name, tensor in other.state_dict().items()}, "epoch": 3}
    header = lock_state_dict(state, KEY, only="*.weight")
    assert state["epoch"] == 3
    assert bytes_of(state["norm.weight"]) != plain["norm.weight"]
    assert everything(other) == plain
    unlock_state_dict(state, KEY, header)
    assert {name: bytes_of(tensor) for name, tensor in state.items() if name != "epoch"} == plain


class Wrapped(torch.Tensor):
    """What a DTensor is: a tensor that has others inside and no memory itself."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*(getattr(arg, "inner", arg) for arg in args), **(kwargs or {}))

    def __repr__(self):
        return "Wrapped"


def inference_tensor():
    with torch.inference_mode():
        return torch.ones(4)


BAD = {
    "meta": (lambda: torch.empty(4, device="meta"), errors.BufferTypeError, "device meta", r"\.cpu\(\)"),
    "sparse": (lambda: torch.eye(4).to_sparse(), errors.BufferTypeError, "layout", r"\.to_dense\(\)"),
    "conjugate": (lambda: torch.ones(4).to(torch.complex64).conj(), errors.BufferTypeError, "layout", "resolve_conj"),
    "strided": (lambda: torch.eye(4)[:, ::2], errors.BufferLayoutError, "strides", r"\.contiguous\(\)"),
    "channels last": (
        lambda: torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
        errors.BufferLayoutError, "strides", r"\.contiguous\(\)",
    ),
    "expanded": (lambda: torch.ones(1).expand(4), errors.BufferLayoutError, "strides", r"\.contiguous\(\)"),
    "wrapper": (lambda: Wrapped(torch.ones(4)), errors.BufferTypeError, "Wrapped", r"\.to_local\(\)"),
    "inference": (inference_tensor, errors.ReadOnlyError, "inference tensor", "writable"),
    "lazy": (lambda: nn.LazyLinear(3).weight, errors.BufferTypeError, "without a shape", "run its module once"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_module_with_a_tensor_that_cannot_be_locked_is_refused_whole(kind):
    make, error, got, hint = BAD[kind]
    module = nn.Module()
    module.good, module.bad = nn.Linear(3, 3), nn.Module()
    tensor = make()
    if isinstance(tensor, nn.Parameter):
        module.bad.register_parameter("tensor", tensor)
    else:
        module.bad.register_buffer("tensor", tensor)
    before = bytes_of(module.good.weight)
    refused = refuse(error, Exception, "tensors['bad.tensor']: got ", lock_module, module, KEY)
    assert got in str(refused)
    assert re.search(hint, str(refused))
    assert bytes_of(module.good.weight) == before
    lock_module(module, KEY, only="good.*")  # what is not locked need not be lockable
    assert bytes_of(module.good.weight) != before


def test_what_is_no_module_or_no_state_dictionary():
    refuse(errors.BufferTypeError, TypeError, "module: got dict", lock_module, {}, KEY)
    refuse(errors.BufferTypeError, TypeError, "state_dict: got Linear", lock_state_dict, nn.Linear(1, 1), KEY)


def test_tensors_inside_a_transformation_have_no_memory():
    seen = []

    def inside(x):
        with pytest.raises(errors.BufferTypeError, match=r"inside a transformation \(vmap, grad\)"):
            lock_tensors({"x": x}, KEY)
        seen.append(x)
        return x.sum()

    torch.vmap(inside)(torch.ones(2, 3))
    torch.func.grad(inside)(torch.ones(3))
    assert len(seen) == 2


# From a locked file


@pytest.fixture
def saved(tmp_path):
    """Give a module, its plain bytes, and a locked file of it."""
    module = Tied()
    tensors = module.state_dict()
    del tensors["out.weight"]  # as safetensors' save_model leaves out tied tensors
    safetensors.torch.save_file({**tensors, "norm.bias": torch.arange(8.0)}, tmp_path / "plain.safetensors")
    lock_file(tmp_path / "plain.safetensors", tmp_path / "locked.safetensors", KEY, only="*[!s]")
    plain = everything(module) | {"norm.bias": bytes_of(torch.arange(8.0))}
    return plain, tmp_path / "locked.safetensors"


def test_a_locked_file_is_unlocked_into_the_module_s_own_memory(saved):
    plain, path = saved
    module = Tied()
    addresses, version = places(module), module.norm.weight._version
    load_state_dict(module, path, KEY)
    assert everything(module) == plain
    assert places(module) == addresses
    assert module.norm.weight._version > version


def test_a_file_that_does_not_fit_changes_nothing(saved):
    _, path = saved
    data = path.read_bytes()
    altered = path.with_name("altered.safetensors")
    altered.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    module, half, larger, another = Tied(), Tied().bfloat16(), Tied(), nn.Linear(3, 3)
    larger.norm = nn.BatchNorm1d(9)
    before = [everything(each) for each in (module, half, larger, another)]
    refuse(errors.TamperedError, ValueError, "tensors[", load_state_dict, module, altered, KEY)
    refuse(errors.WrongKeyError, ValueError, "key: ", load_state_dict, module, path, OTHER)
    refuse(errors.BufferTypeError, TypeError, "tensors['", load_state_dict, half, path, KEY)
    refuse(errors.SizeMismatchError, ValueError, "tensors['norm.", load_state_dict, larger, path, KEY)
    refuse(errors.TensorNameError, KeyError, "tensors['weight']: 2 tensors of the module", load_state_dict, another, path, KEY)
    refuse(errors.NotLockedError, ValueError, "", load_state_dict, module, path.with_name("plain.safetensors"), KEY)
    assert [everything(each) for each in (module, half, larger, another)] == before
    load_state_dict(another, path, KEY, strict=False)
    load_state_dict(module, altered, KEY, check=False)
    assert everything(module) != before[0]


def test_a_cast_of_locked_tensors_loses_bits_and_the_seal_says_so():
    module = nn.Linear(40, 40)
    header = lock_module(module, KEY, only="weight")
    module.weight.data = module.weight.data.double().float()  # makes signalling NaNs quiet ones
    again = everything(module)
    module.weight.data = module.weight.data.to(torch.bfloat16).float()
    assert everything(module) != again
    refuse(errors.TamperedError, ValueError, "tensors['weight']: ", unlock_module, module, KEY, header)


# Computing with a key


class Vision(nn.Module):
    """Owns tensors itself, and in a list, while others run within it."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.scales = nn.ParameterList([torch.randn(16), torch.randn(16)])
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(16, 4))

    def forward(self, x):
        x = torch.cat([self.token, x], 1) * self.scales[0]
        x = self.attention(x, x, x, need_weights=False)[0] + x
        return self.head(self.layer(x) * self.scales[1])


class Twice(nn.Module):
    """Runs one layer several times, another one within it or not, and gives weights away."""

    def __init__(self):
        super().__init__()
        self.step, self.gift = nn.Linear(8, 8), nn.ParameterDict({"it": torch.randn(8)})
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x, often=2):
        for _ in range(often):
            x = torch.tanh(self.step(x))
        y = self.convolution(x.T[None])
        return {"y": y, "weights": [self.gift["it"], self.gift["it"][2:]]}


class Giving(nn.Module):
    def __init__(self):
        super().__init__()
        self.queries, self.out = Queries(), nn.Linear(64, 64)

    def forward(self, x):
        q = self.queries()
        return self.out(x) + q[0] + q[1]


class Queries(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 64))

    def forward(self):
        return self.weight


MODELS = {
    "layers": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)),
        torch.randn(2, 3, 8, 8),
    ),
    "large": lambda: (
        nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(300, 300), nn.ReLU(), nn.LayerNorm(300)))),
        torch.randn(2, 300),
    ),
    "tied": lambda: (Tied(), torch.arange(12)),
    "recurrent": lambda: (nn.LSTM(8, 16, 2), torch.randn(5, 2, 8)),
    "vision": lambda: (Vision(), torch.randn(1, 3, 16)),
    "twice": lambda: (Twice(), torch.randn(3, 8)),
    "giving": lambda: (Giving(), torch.randn(2, 64)),
    "half": lambda: (nn.Linear(8, 8, dtype=torch.bfloat16), torch.ones(1, 8, dtype=torch.bfloat16)),
}


def model(name):
    torch.manual_seed(1)
    made, x = MODELS[name]()
    return made.eval(), x


def results(value):
    return [tensor.clone() for tensor in deeplock_torch.unlocking.tensors_within(value)]


def same(a, b):
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_locked_module_computes_what_the_plain_one_does(name, prefetch):
    module, x = model(name)
    with torch.no_grad():
        expected = results(module(x))
    header = lock_module(module, KEY)
    locked, addresses = everything(module), places(module)
    keyed = KeyedModule(module, header, prefetch=prefetch)
    for _ in range(3):
        found = results(keyed(x, key=KEY))
        # The first call does without PyTorch's fast path for transformers.
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert name == "vision" or same(found, expected)
    assert everything(module) == locked
    assert places(module) == addresses
    if name == "large":
        layer = 300 * 301 * 4
        assert layer < keyed.peak_bytes <= (2 if prefetch else 1) * layer * 17 / 16 + 64
        assert (keyed.peak_bytes > 1.5 * layer) == prefetch
        assert len(locked["0.weight"]) * 3 > keyed.peak_bytes


@pytest.mark.parametrize(("used", "prefetch", "ahead"), [(1, None, True), (3, None, False), (3, True, True), (1, False, False)])
def test_layers_are_unlocked_ahead_on_the_processors_that_are_left(used, prefetch, ahead, monkeypatch):
    monkeypatch.setattr(keyed_module, "available_threads", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used)
    module, x = model("large")
    keyed = KeyedModule(module, lock_module(module, KEY), prefetch=prefetch, threads=4)
    counts, unlock = set(), keyed._unlocking._unlock

    def counted(held, threads):
        counts.add((threading.current_thread() is threading.main_thread(), threads))
        unlock(held, threads)

    monkeypatch.setattr(keyed._unlocking, "_unlock", counted)
    for _ in range(2):
        keyed(x, key=KEY)
    assert counts == {(True, 4)} | ({(False, max(3 - used, 1))} if ahead else set())


def plain_parts(keyed, module):
    """Say which weights of a module lie in scratch memory."""
    memory = b"".join(bytes_of(each._bytes) for each in keyed._unlocking._all)
    return [name for name, data in everything(module).items() if any(data[:16]) and data[:16] in memory]


def test_scratch_memory_holds_weights_while_their_layer_runs_and_nothing_afterwards():
    module, x = model("large")
    plain = copy.deepcopy(module)
    keyed = KeyedModule(module, lock_module(module, KEY))
    seen = []
    keyed._twin[4].register_forward_pre_hook(lambda *_: seen.append(plain_parts(keyed, plain)))
    keyed._twin[3].register_forward_hook(lambda *_: seen.append(plain_parts(keyed, plain)))
    for _ in range(2):
        keyed(x, key=KEY)
        assert plain_parts(keyed, plain) == []
    assert any("3.weight" in parts for parts in seen)
    assert all(len([name for name in parts if name in ("0.weight", "3.weight", "6.weight")]) <= 2 for parts in seen)


def test_a_wrong_key_is_refused_or_computes_nonsense():
    module, x = model("layers")
    with torch.no_grad():
        expected = module(x)
    header = lock_module(module, KEY)
    keyed = KeyedModule(module, header)
    refuse(errors.WrongKeyError, ValueError, "key: ", keyed, x, key=OTHER)
    refuse(errors.WrongKeyError, ValueError, "key: ", keyed, x, key=KEY[:16])
    nonsense = KeyedModule(module, header, wrong_key="compute")
    for key in (OTHER, KEY[:16]):
        assert not torch.equal(nonsense(x, key=key), expected)
    assert torch.equal(nonsense(x, key=KEY), expected)
    assert torch.equal(keyed(x, key=KEY), expected)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_layer_that_was_altered_is_not_run(calls):
    module, x = model("large")
    header = lock_module(module, KEY)
    keyed, careless = KeyedModule(module, header), KeyedModule(module, header, seal=False)
    for _ in range(calls):
        keyed(x, key=KEY)
    ran = []
    keyed._twin[7].register_forward_hook(lambda *_: ran.append(1))
    module[6].weight.detach().view(torch.uint8)[0, 0] ^= 1
    refuse(errors.TamperedError, ValueError, "tensors['6.weight']: ", keyed, x, key=KEY)
    assert ran == []
    assert plain_parts(keyed, nn.Module()) == []
    careless(x, key=KEY)
    module[6].weight.detach().view(torch.uint8)[0, 0] ^= 1
    keyed(x, key=KEY)
    assert ran == [1]


def test_whatever_a_layer_raises_comes_out_and_leaves_nothing_plain():
    module, x = model("large")
    plain = copy.deepcopy(module)
    keyed = KeyedModule(module, lock_module(module, KEY))
    expected = keyed(x, key=KEY)
    threads = threading.active_count()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            keyed(x[:, 1:], key=KEY)
        assert plain_parts(keyed, plain) == []
        assert torch.equal(keyed(x, key=KEY), expected)
    assert threading.active_count() <= threads
    with pytest.raises(errors.LayerError, match="outside of the call that has the key"):
        keyed._twin(x)


def test_another_way_through_the_layers():
    module, x = model("twice")
    with torch.no_grad():
        expected = {often: results(module(x, often)) for often in range(4)}
    keyed = KeyedModule(module, lock_module(module, KEY))
    for often in (2, 2, 0, 3, 3, 1, 2):
        assert same(results(keyed(x, often=often, key=KEY)), expected[often])


def test_a_session_derives_keys_once():
    module, x = model("large")
    with torch.no_grad():
        expected = module(x)
    keyed = KeyedModule(module, lock_module(module, KEY))
    with keyed.session(KEY) as compute:
        for _ in range(3):
            assert torch.equal(compute(x), expected)
    refuse(errors.KeyWipedError, ValueError, "key: the session is over", compute, x)


def test_a_tensor_used_past_its_module_is_named():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)

        def forward(self, x):
            return nn.functional.linear(self.norm(self.words(x)), self.words.weight)

    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            inner = self.inner
            self.function = lambda x: x @ inner.weight

        def forward(self, x):
            return self.inner(x) + self.function(x)

    for module, x, name in ((Functional(), torch.arange(5), "words.weight"), (Closure(), torch.ones(4), "inner.weight")):
        module.eval()
        with torch.no_grad():
            expected = module(x)
        header = lock_module(module, KEY)
        keyed = KeyedModule(module, header)
        for _ in range(2):
            refuse(errors.LayerError, RuntimeError, f"tensors['{name}']: it is used while", keyed, x, key=KEY)
    module = Functional().eval()
    with torch.no_grad():
        expected = module(torch.arange(5))
    keyed = KeyedModule(module, lock_module(module, KEY), layers=[Functional])
    assert torch.equal(keyed(torch.arange(5), key=KEY), expected)


def test_what_keyed_inference_refuses():
    module, x = model("layers")
    header = lock_module(module, KEY)
    keyed = KeyedModule(module, header)
    refuse(errors.ParameterError, ValueError, "inputs: got a tensor that requires grad", keyed, x.requires_grad_(), key=KEY)
    with torch.no_grad():
        assert not keyed(x, key=KEY).requires_grad
    x = x.detach()
    assert not keyed(x, key=KEY).requires_grad
    with torch.inference_mode():
        keyed(x, key=KEY)
    keyed(x, key=KEY)
    bad = [
        (errors.HeaderError, "header: ", (module, header.to_json()), {}),
        (errors.TensorNameError, "module: it has no tensor ", (nn.Linear(2, 2).eval(), header), {}),
        (errors.BufferTypeError, "module: got dict", ({}, header), {}),
        (errors.ParameterError, "wrong_key: ", (module, header), {"wrong_key": "ignore"}),
        (errors.ParameterError, "layers: ", (module, header), {"layers": ["Linear"]}),
        (errors.ParameterError, "threads: ", (module, header), {"threads": 0}),
        (errors.ParameterError, "module: it is in training mode", (copy.deepcopy(module).train(), header), {}),
        (errors.BufferTypeError, "module: got a compiled one", (torch.compile(module, backend="eager"), header), {}),
    ]
    for error, start, arguments, keywords in bad:
        refuse(error, Exception, start, KeyedModule, *arguments, **keywords)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 11)).eval()
    refuse(errors.SizeMismatchError, ValueError, "tensors['4.weight']: ", KeyedModule, other, header)
    other[0].guard = threading.Lock()
    other[4] = module[4]
    refuse(errors.BufferTypeError, TypeError, "module: it cannot be copied", KeyedModule, other, header)


def test_keyed_modules_among_threads_processes_and_pickles():
    module, x = model("large")
    with torch.no_grad():
        expected = module(x)
    keyed = KeyedModule(module, lock_module(module, KEY), threads=1)
    found = []
    threads = [
        threading.Thread(target=lambda: found.extend(torch.equal(keyed(x, key=KEY), expected) for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20
    again = pickle.loads(pickle.dumps(keyed))
    assert torch.equal(again(x, key=KEY), expected)
    assert again._settings == keyed._settings
    keyed._mutex.acquire()  # as by a thread that the child has not got
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # or it may wait for ever
        os._exit(0 if torch.equal(keyed(x, key=KEY), expected) else 1)
    keyed._mutex.release()
    assert os.waitpid(child, 0)[1] == 0


# Operators

OPERATORS = torch.ops.deeplock
KEY_TENSOR, IV = torch.arange(16, dtype=torch.uint8), torch.arange(100, 116, dtype=torch.uint8)
SCHEDULE = deeplock_kernels.CounterSchedule(bytes(range(16)), bytes(range(100, 116)))


@pytest.mark.parametrize("name", ["lock", "unlock", "lock_", "unlock_"])
def test_operators_do_what_they_declare(name):
    operator = getattr(OPERATORS, name).default
    turned = [] if name.endswith("_") else [torch.randn(3, 5).T]
    for data in (torch.randn(3, 5), torch.ones(4, dtype=torch.bfloat16), *turned):
        torch.library.opcheck(operator, (data, KEY_TENSOR, IV), {"sbox": "sm4", "offset": 5})


def test_operators_give_the_package_s_bytes():
    data = torch.randn(6, 4)
    locked = deeplock_kernels.lock(data, SCHEDULE, sbox="sm4", offset=9)
    assert torch.equal(OPERATORS.lock(data, KEY_TENSOR, IV, "sm4", 9).view(torch.int32), locked.view(torch.int32))
    assert torch.equal(OPERATORS.unlock(locked, KEY_TENSOR, IV, "sm4", 9), data)
    place, work = data.data_ptr(), data.clone()
    assert OPERATORS.lock_(data, KEY_TENSOR, IV, "sm4", 9) is None
    assert torch.equal(data.view(torch.int32), locked.view(torch.int32))
    OPERATORS.unlock_(data, KEY_TENSOR, IV, "sm4", 9)
    assert torch.equal(data, work)
    assert data.data_ptr() == place
    turned = OPERATORS.lock(data.T, KEY_TENSOR, IV)
    assert turned.is_contiguous()
    assert bytes_of(turned) == bytes_of(deeplock_kernels.lock(data.T.contiguous(), SCHEDULE))


def test_operators_refuse():
    data = torch.ones(4, 4)
    short = KEY_TENSOR[:5]
    refuse(errors.KeyTypeError, TypeError, "key: got a tensor of torch.int64", OPERATORS.lock, data, KEY_TENSOR.long(), IV)
    refuse(errors.KeyTypeError, TypeError, "iv: got a tensor ", OPERATORS.lock_, data, KEY_TENSOR, IV.view(4, 4))
    refuse(errors.KeyFormatError, ValueError, "key: got 5 bytes", OPERATORS.lock_, data, short, IV)
    refuse(errors.UnknownNameError, ValueError, "sbox: ", OPERATORS.lock_, data, KEY_TENSOR, IV, "none")
    refuse(errors.BufferLayoutError, ValueError, "data: got a tensor with strides", OPERATORS.lock_, data.T[1:], KEY_TENSOR, IV)
    assert (data == 1).all()
    weight = nn.Parameter(torch.ones(4))
    locked = OPERATORS.lock(weight, KEY_TENSOR, IV)
    with pytest.raises(NotImplementedError, match=r"^deeplock: locked bytes have no gradient"):
        locked.sum().backward()
    version = weight._version
    OPERATORS.lock_(weight.detach(), KEY_TENSOR, IV)
    assert weight._version > version


def unlocked_product(x, weight, key, iv):
    plain = torch.ops.deeplock.unlock(weight, key, iv)
    y = x @ plain
    torch.ops.deeplock.lock_(plain, key, iv)
    return y + 1, plain


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # by PyTorch's own modules
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_function_is_one_graph(backend, tmp_path, monkeypatch):
    if backend == "inductor" and not os.environ.get("DEEPLOCK_REQUIRE_FRAMEWORKS") and not shutil.which("g++"):
        pytest.skip("PyTorch compiles with g++, which is not installed")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, weight = torch.randn(2, 8), torch.randn(8, 8)
    locked = deeplock_kernels.lock(weight, SCHEDULE)
    compiled = torch.compile(unlocked_product, fullgraph=True, backend=backend)
    for _ in range(2):
        y, again = compiled(x, locked, KEY_TENSOR, IV)
        assert torch.allclose(y, x @ weight + 1)
        assert bytes_of(again) == bytes_of(locked)


def test_an_exported_program_holds_no_key():
    x, weight = torch.randn(2, 8), torch.randn(8, 8)
    locked = deeplock_kernels.lock(weight, SCHEDULE)

    class Product(nn.Module):
        def forward(self, x, weight, key, iv):
            return unlocked_product(x, weight, key, iv)[0]

    program = torch.export.export(Product(), (x, locked, KEY_TENSOR, IV))
    assert torch.equal(program.module()(x, locked, KEY_TENSOR, IV), x @ weight + 1)
    assert "deeplock.unlock.default" in str(program.graph)
    assert not program.constants


# Workers and ranks


class LockedRows(torch.utils.data.Dataset):
    """Unlocks the rows that a worker asks for."""

    def __init__(self, rows, header):
        self.rows, self.header = rows, header

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        return deeplock_kernels.unlock_tensor(row, KEY, self.header, "rows", offset=i * row.nbytes)


def test_workers_of_a_data_loader():
    rows = torch.randn(8, 300)
    plain = rows.clone()
    header = lock_tensors({"rows": rows}, KEY)
    loader = torch.utils.data.DataLoader(LockedRows(rows, header), batch_size=2, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), plain)


RANK = """
import sys, pickle, torch, torch.distributed as distributed
from torch.distributed.tensor import distribute_tensor, Shard
from torch.distributed.device_mesh import init_device_mesh
from deeplock_kernels import LockHeader, unlock_tensor, errors, lock_tensors
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
locked, text, plain = torch.load(f"{folder}/model.pt")
weight = distribute_tensor(locked, mesh, [Shard(0)])
try:
    lock_tensors({"weight": weight}, bytes(32))
except errors.BufferTypeError as error:
    assert "DTensor" in str(error) and ".to_local()" in str(error)
else:
    raise AssertionError
mine = weight.to_local()
place = mine.data_ptr()
unlock_tensor(mine, bytes(range(32)), LockHeader.from_json(text), "weight", offset=rank * mine.nbytes, out=mine)
assert mine.data_ptr() == place
assert torch.equal(weight.full_tensor(), plain)
distributed.destroy_process_group()
print("done")
"""


def test_each_rank_unlocks_its_own_rows_of_a_sharded_tensor(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch is built without torch.distributed")
    plain = torch.randn(6, 50)
    weight = plain.clone()
    header = lock_tensors({"weight": weight}, KEY)
    torch.save((weight, header.to_json(), plain), tmp_path / "model.pt")
    found = {}

    def rank(number):
        found[number] = run(RANK, str(number), tmp_path)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: "done\n", 1: "done\n"}


# The import, and what the documentation shows


@pytest.mark.parametrize("there", ["None", "types.SimpleNamespace(library=None, __version__='2.3.1')"])
def test_without_pytorch_the_import_names_the_extra(there):
    program = f"""
import sys, types
sys.modules["torch"] = {there}
import deeplock_kernels
from deeplock_kernels import errors
try:
    import deeplock_kernels.frameworks.torch
except errors.MissingLibraryError as error:
    print(isinstance(error, ImportError), error)
"""
    found = run(program)
    assert found.startswith("True torch: ")
    assert "deeplock-kernels[torch]" in found


def test_the_examples_of_the_documentation(tmp_path, monkeypatch):
    examples = support.examples_of_frameworks("PyTorch")
    assert len(examples) >= 4
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
