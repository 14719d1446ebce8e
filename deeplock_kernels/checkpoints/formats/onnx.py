"""ONNX models, with their data inside or beside: the lock header is one of the `metadata_props`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from deeplock_kernels.checkpoints.formats.base import Edit, Layout, TensorEntry
from deeplock_kernels.checkpoints.formats.onnx_skeleton import (
    HINT,
    Place,
    library,
    metadata_field,
    place_of,
    read_skeleton,
)
from deeplock_kernels.checkpoints.formats.places import in_order, proof
from deeplock_kernels.checkpoints.formats.scanner import refusal, shown

KEY = "deeplock"
LARGEST_MODEL = 2**31 - 1  # bytes; what protobuf reads

_BITS_OF_FLOATS = {
    "FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "DOUBLE": 64, "COMPLEX64": 64, "COMPLEX128": 128,
    "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8, "FLOAT4E2M1": 4,
    "FLOAT6E2M3": 6, "FLOAT6E3M2": 6,
}  # fmt: skip
_BITS_OF_QUANTISED = {"INT16": 16, "UINT16": 16, "INT8": 8, "UINT8": 8, "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}
_SECOND_TAGS = b"\x12\x1a\x22\x28\x32\x3a\x42\x72"
_BITS = _BITS_OF_FLOATS | _BITS_OF_QUANTISED
_STRUCTURE = ("UNDEFINED", "STRING", "BOOL", "INT32", "INT64", "UINT32", "UINT64")
_FIELDS = {  # which dtypes lie in a field as they are in memory
    "float_data": {"FLOAT", "COMPLEX64"},
    "double_data": {"DOUBLE", "COMPLEX128"},
    "raw_data": set(_BITS),
}
_SHAPING_INPUTS = {  # floats that decide on shapes, or that a runtime checks, by operator
    "Dropout": (1,), "MelWeightMatrix": (3, 4), "NonMaxSuppression": (3, 4), "OneHot": (1,), "Range": (0, 1, 2),
    "Resize": (1, 2), "Upsample": (1,),
}  # fmt: skip


class _Found(NamedTuple):
    """A tensor of the skeleton: by which name users know it, and where in the model it stands."""

    name: str
    path: str
    tensor: Any
    weights: bool  # an initializer or a constant, not another attribute


class Onnx:
    """The format of https://onnx.ai, up to 2 GiB in the main file.

    Offered for locking are floating-point tensors (initializers, the values of sparse ones, tensors in attributes, all
    of them in subgraphs and functions too), and the integers of up to 16 bits of initializers and constants with two
    axes or more, which are quantised weights. All others stay as they are, for their values are structure: shapes,
    indices, axes, zero points. So do floats that are the scales of a Resize and the like.

    A tensor has the name of the initializer or of the constant's output; where that is empty or not the only one, the
    path to it in the model.
    """

    name = "onnx"

    def matches(self, start: bytes) -> bool:
        """Say whether a file starts with a small `ir_version` and then one of the other fields of a model."""
        return len(start) > 2 and start[0] == 0x08 and start[1] < 0x80 and start[2] in _SECOND_TAGS

    def read(self, file: BinaryIO, size: int, source: str) -> Layout:
        """Read the model without the data of its tensors."""
        skeleton = read_skeleton(file, size, source)
        tensors, companions = _tensors(skeleton.model, source)
        keys = [entry.key for entry in skeleton.model.metadata_props]
        if keys.count(KEY) > 1:
            raise refusal(source, f"got {KEY} twice in its metadata_props", "once is accepted", HINT)
        header, own = None, (size, size)
        if KEY in keys:
            place = keys.index(KEY)
            header, own = skeleton.model.metadata_props[place].value, skeleton.metadata[place]
        found = in_order(tensors, size, source, HINT)
        proved = proof(file, size, found, [own])
        return Layout(source, size, found, header, proved, companions=companions, detail=own)

    def edits(self, layout: Layout, header: str | None, _checksums: Sequence[int]) -> list[Edit]:
        """Give the lock header in the place of the one that is there, or at the end."""
        start, stop = layout.detail
        field = b"" if header is None else metadata_field(KEY, header)
        if layout.size - (stop - start) + len(field) > LARGEST_MODEL:
            got = "got a model without room for the lock header"
            accepted = f"up to {LARGEST_MODEL} bytes are accepted with it"
            raise refusal(layout.source, got, accepted, "save it with external data")
        return [Edit(start, stop, field)]


def _tensors(model: Any, source: str) -> tuple[list[TensorEntry], list[str]]:
    """Give the tensors that can be locked, and all files beside the model."""
    onnx, _ = library()
    numbers = {number: name for name, number in onnx.TensorProto.DataType.items()}
    shaping = set(_shaping(model))
    taken: set[str] = set()
    ranges: set[tuple[str, int, int]] = set()
    companions: dict[str, None] = {}
    entries = []
    for found in _walk(model):
        tensor = found.tensor
        name = found.path if not found.name or found.name in taken else found.name
        what = f"tensor {shown(name)}"
        dtype = numbers.get(tensor.data_type, "")
        if dtype not in _BITS and dtype not in _STRUCTURE:
            got = f"{what}: got the data_type {dtype or tensor.data_type}"
            raise refusal(source, got, f"{', '.join([*_BITS, *_STRUCTURE])} are accepted", "leave it out of the model")
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if external:
            companions[_location(tensor, what, source)] = None
        if found.name in shaping or not _is_weights(dtype, found):
            continue
        taken.add(name)
        bits = _BITS[dtype]
        shape = tuple(tensor.dims)
        nbytes = -(-math.prod(shape) * bits // 8)
        if any(length < 0 for length in shape):
            raise refusal(source, f"{what}: got a negative length", "lengths from 0 on are accepted", HINT)
        if external:
            companion, place = _location(tensor, what, source), _external_place(tensor, nbytes, what, source)
        else:
            companion, place = "", _place(tensor, dtype, nbytes, what, source)
        if place.stop - place.start != nbytes:
            got = f"{what}: got {shown(place.stop - place.start)} bytes for its dtype and dims"
            raise refusal(source, got, f"{shown(nbytes)} are accepted", HINT)
        if (companion, place.start, place.stop) in ranges and nbytes:
            continue  # a tensor under a second name
        ranges.add((companion, place.start, place.stop))
        entries.append(TensorEntry(name, dtype, shape, place.start, place.stop, companion))
    return entries, list(companions)


def _is_weights(dtype: str, found: _Found) -> bool:
    if dtype in _STRUCTURE:
        return False
    return dtype in _BITS_OF_FLOATS or (found.weights and len(found.tensor.dims) > 1)


def _place(tensor: Any, dtype: str, nbytes: int, what: str, source: str) -> Place:
    place = place_of(tensor)
    if place is None and not nbytes and not (tensor.float_data or tensor.double_data or tensor.int32_data):
        return Place("raw_data", 0, 0)
    # Numbers of variable length cannot be locked in their place.
    if place is None or dtype not in _FIELDS[place.field]:
        got = f"{what}: got {dtype} that does not lie in the file as in memory"
        raise refusal(source, got, "raw_data are accepted", "store it by onnx.numpy_helper.from_array")
    return place


def _location(tensor: Any, what: str, source: str) -> str:
    """Give the file that a tensor lies in; whether that may be read is checked where it is opened."""
    keys = [entry.key for entry in tensor.external_data]
    values = [entry.value for entry in tensor.external_data if entry.key == "location"]
    if len(set(keys)) != len(keys) or not any(values) or place_of(tensor) is not None:
        got = f"{what}: got external data without one location, or data inside as well"
        raise refusal(source, got, "one place is accepted", HINT)
    location = str(PurePosixPath(values[0]))
    if location == PurePosixPath(source).name:
        got = f"{what}: got the model itself as its location"
        raise refusal(source, got, "another file is accepted", HINT)
    return location


def _external_place(tensor: Any, nbytes: int, what: str, source: str) -> Place:
    numbers = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = numbers.get("offset", "0"), numbers.get("length", str(nbytes))
    if not all(text.isascii() and text.isdecimal() and len(text) < 20 for text in (offset, length)):
        got = f"{what}: got another offset or length"
        raise refusal(source, got, "whole numbers are accepted", HINT)
    return Place("raw_data", int(offset), int(offset) + int(length))


def _walk(model: Any) -> Iterator[_Found]:
    """Give every tensor of a model, those of a graph before those of its nodes."""
    yield from _of_graph(model.graph, "graph")
    for i, function in enumerate(model.functions):
        yield from _of_nodes(function.node, f"functions[{i}]")
    for i, training in enumerate(model.training_info):
        yield from _of_graph(training.initialization, f"training_info[{i}].initialization")
        yield from _of_graph(training.algorithm, f"training_info[{i}].algorithm")


def _of_graph(graph: Any, path: str) -> Iterator[_Found]:
    for i, tensor in enumerate(graph.initializer):
        yield _Found(tensor.name, f"{path}.initializer[{i}]", tensor, True)
    for i, sparse in enumerate(graph.sparse_initializer):
        yield from _of_sparse(sparse.values.name, f"{path}.sparse_initializer[{i}]", sparse)
    yield from _of_nodes(graph.node, path)


def _of_sparse(name: str, path: str, sparse: Any) -> Iterator[_Found]:
    yield _Found(name, f"{path}.values", sparse.values, True)
    yield _Found("", f"{path}.indices", sparse.indices, False)


def _of_nodes(nodes: Any, path: str) -> Iterator[_Found]:
    for i, node in enumerate(nodes):
        constant = node.op_type == "Constant"
        name = node.output[0] if constant and node.output else ""
        for attribute in node.attribute:
            place = f"{path}.node[{i}].{attribute.name}"
            if attribute.HasField("t"):
                yield _Found(name, place, attribute.t, constant)
            if attribute.HasField("sparse_tensor"):
                yield from _of_sparse(name, place, attribute.sparse_tensor)
            if attribute.HasField("g"):
                yield from _of_graph(attribute.g, place)
            for j, tensor in enumerate(attribute.tensors):
                yield _Found("", f"{place}[{j}]", tensor, False)
            for j, sparse in enumerate(attribute.sparse_tensors):
                yield from _of_sparse("", f"{place}[{j}]", sparse)
            for j, graph in enumerate(attribute.graphs):
                yield from _of_graph(graph, f"{place}[{j}]")


def _shaping(model: Any) -> Iterator[str]:
    """Give the names of all inputs that are structure though they are floats."""
    for nodes in _node_lists(model):
        for node in nodes:
            for place in _SHAPING_INPUTS.get(node.op_type, ()):
                if place < len(node.input) and node.input[place]:
                    yield node.input[place]


def _node_lists(model: Any) -> Iterator[Any]:
    lists = [model.graph.node, *(function.node for function in model.functions)]
    for training in model.training_info:
        lists += [training.initialization.node, training.algorithm.node]
    while lists:
        nodes = lists.pop()
        yield nodes
        for node in nodes:
            for attribute in node.attribute:
                lists += [graph.node for graph in (attribute.g, *attribute.graphs)]


ONNX = Onnx()
