"""Small files of every format, and what each format's own library finds in them."""

from __future__ import annotations

import io
import zipfile

import gguf
import numpy as np
import onnx
import pytest
import safetensors
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper
from support import painted

# Files: each function writes one into a directory, with what belongs to it, and gives its path


def array_file(array, version=None):
    def write(directory):
        path = directory / "array.npy"
        with open(path, "wb") as file:
            np.lib.format.write_array(file, array, version)
        return path

    return write


def arrays_file(directory):
    """An npz file, with a member that is no array."""
    path = directory / "arrays.npz"
    weights = {"layer/weight": floats(5, 7), "äöü": floats(3)[::-1], "Fortran": np.asfortranarray(floats(4, 3))}
    np.savez(path, **weights, scalar=np.array(7), empty=np.zeros((0, 3)), half=floats(9).astype(np.float16))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("note.txt", "no array")
    return path


def large_arrays_file(directory):
    """The same in the manner of files of more than 2 GiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", 300)
        path = arrays_file(directory)
    assert path.read_bytes()[-42:-38] == b"PK\6\7"
    return path


def quantised_file(order, alignment=32):
    def write(directory):
        path = directory / "model.gguf"
        endian = gguf.GGUFEndian.BIG if order == "big" else gguf.GGUFEndian.LITTLE
        writer = gguf.GGUFWriter(path, "llama", endianess=endian)
        writer.add_custom_alignment(alignment)
        writer.add_name("a small one")
        writer.add_block_count(2)
        writer.add_token_list(["<s>", "", "wörd"])
        writer.add_token_scores([0.5, -1.0, 2.0])
        writer.add_add_bos_token(True)
        writer.add_tensor("token_embd.weight", floats(3, 8))
        writer.add_tensor("norm", floats(5).astype(np.float16))
        blocks = painted(4 * 34).reshape(2, 68)
        writer.add_tensor("blk.0.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.1.weight", painted(144).reshape(1, 144), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def table_file(directory):
    path = directory / "model.safetensors"
    safetensors.numpy.save_file({"a": floats(3, 7), "b": floats(5), "none": floats(0)}, path, metadata={"x": "y"})
    return path


def network_file(directory):
    path = directory / "model.onnx"
    onnx.save(perceptron(), path)
    return path


def external_file(directory):
    """A model whose data lie in one file, of which not every byte is a tensor's, but the smallest tensors'."""
    path = directory / "model.onnx"
    onnx.save(
        perceptron(),
        path,
        save_as_external_data=True,
        location="model.data",
        size_threshold=50,
        convert_attribute=True,
    )
    return path


FILES = {
    "safetensors": table_file,
    "npy": array_file(np.arange(60, dtype=np.float32).reshape(4, 15)),
    "npy, Fortran order": array_file(np.asfortranarray(np.arange(60, dtype=">f8").reshape(4, 15))),
    "npy, version 2": array_file(np.arange(9, dtype=np.int8), (2, 0)),
    "npy, version 3": array_file(np.zeros(7, np.dtype([("ключ", "<f4"), ("b", "u1", (2, 2))])), (3, 0)),
    "npy, a scalar": array_file(np.array(1.5)),
    "npy, empty": array_file(np.zeros((3, 0, 2))),
    "npz": arrays_file,
    "npz, large": large_arrays_file,
    "gguf": quantised_file("little"),
    "gguf, big-endian": quantised_file("big", alignment=64),
    "onnx": network_file,
    "onnx, external data": external_file,
}


# Networks


def floats(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def initializer(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def network(nodes, initializers, inputs, outputs):
    """Give a model that the checker accepts; inputs and outputs are floats of such shapes."""
    infos = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]
        for values in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "graph", *infos, initializers)
    # A runtime may be older than the library.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def perceptron():
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "v"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["shaped"]),
        helper.make_node("Constant", [], ["c"], value=initializer("", floats(2))),
        helper.make_node("Add", ["shaped", "c"], ["y"]),
    ]
    initializers = [
        initializer("w", floats(3, 6)),
        initializer("b", floats(6)),
        helper.make_tensor("v", TensorProto.FLOAT, (6, 4), floats(24)),
        initializer("shape", np.array([2, 2])),
    ]
    return network(nodes, initializers, {"x": [1, 3]}, {"y": [2, 2]})


def convolution():
    """Resized by a scale and reshaped by a shape that are initializers."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1] * 4),
        helper.make_node("Resize", ["h", "", "scales"], ["large"]),
        helper.make_node("Reshape", ["large", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "m"], ["y"]),
    ]
    initializers = [
        initializer("w", floats(4, 3, 3, 3)),
        initializer("b", floats(4)),
        initializer("scales", np.float32([1, 1, 2, 2])),
        initializer("shape", np.array([1, -1])),
        initializer("m", floats(4 * 16 * 16, 2)),
    ]
    return network(nodes, initializers, {"x": [1, 3, 8, 8]}, {"y": [1, 2]})


def quantised():
    """A convolution between QuantizeLinear and DequantizeLinear, as quantising tools make it."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["bq", "bs"], ["bd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "bd"], ["z"]),
        helper.make_node("QuantizeLinear", ["z", "zs", "zz"], ["zq"]),
        helper.make_node("DequantizeLinear", ["zq", "zs", "zz"], ["y"]),
    ]
    initializers = [
        initializer("wq", (painted(4 * 27) - 100).astype(np.int8).reshape(4, 3, 3, 3)),
        initializer("wz", np.zeros(4, np.int8)),
        initializer("bq", np.arange(4, dtype=np.int32)),
        initializer("xz", np.uint8(128)),
        initializer("zz", np.uint8(128)),
    ]
    scales = {"xs": 0.02, "ws": [0.01] * 4, "bs": [0.0002] * 4, "zs": 0.02}
    initializers += [initializer(name, np.float32(value)) for name, value in scales.items()]
    return network(nodes, initializers, {"x": [1, 3, 8, 8]}, {"y": [1, 4, 6, 6]})


def branches():
    """Weights in both branches of an If."""
    value = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])]
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    constant = helper.make_node("Constant", [], ["y"], value=initializer("", floats(1, 4)))
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["condition"], to=TensorProto.BOOL),
        helper.make_node(
            "If",
            ["condition"],
            ["z"],
            then_branch=helper.make_graph([product], "then", [], value, [initializer("w", floats(8, 4))]),
            else_branch=helper.make_graph([constant], "else", [], value),
        ),
    ]
    return network(nodes, [], {"x": [1, 8]}, {"z": [1, 4]})


def sparse():
    model = network([helper.make_node("MatMul", ["x", "w"], ["y"])], [], {"x": [1, 8]}, {"y": [1, 4]})
    values = helper.make_sparse_tensor(initializer("w", floats(3)), initializer("", np.array([1, 5, 9])), [8, 4])
    model.graph.sparse_initializer.append(values)
    return model


NETWORKS = {
    "perceptron": perceptron,
    "convolution": convolution,
    "quantised": quantised,
    "branches": branches,
    "sparse": sparse,
}

# What the libraries find: by name the dtype, the shape and the bytes


def tensors_of(path):
    return {"npy": of_npy, "npz": of_npz, "gguf": of_gguf, "onnx": of_onnx, "safetensors": of_table}[path.suffix[1:]](path)


def described(array):
    return str(array.dtype), array.shape, array.tobytes("A")


def of_npy(path):
    mapped, loaded = np.load(path, mmap_mode="r"), np.load(path)
    assert described(mapped) == described(loaded)
    return {"array": described(loaded)}


def of_npz(path):
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
    with np.load(path) as file:
        return {name: described(file[name]) for name in file.files if not isinstance(file[name], bytes)}


def of_gguf(path):
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: (tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist())), tensor.data.tobytes())
        for tensor in reader.tensors
    }


def of_onnx(path):
    """Floats only, and those at one level."""
    model = onnx.load(path)
    constants = {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    found = {tensor.name: tensor for tensor in model.graph.initializer} | constants
    arrays = {name: numpy_helper.to_array(tensor) for name, tensor in found.items()}
    return {name: described(array) for name, array in arrays.items() if array.dtype == np.float32}


def of_table(path):
    found = dict(safetensors.deserialize(path.read_bytes()))
    return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found.items()}


def as_bytes(model):
    file = io.BytesIO()
    onnx.save(model, file)
    return file.getvalue()
