"""Reading ONNX files that may have been made to harm, and setting their weights apart.

A weight (a float initializer of two or more dimensions that MatMul, Gemm, Gather or a convolution
reads, also through Transpose, Cast, Reshape and the like) leaves the model and becomes a trailing
input. So the importer never copies it, it keeps its name, and what lies in external data files is
read only when it is needed. External data files must be regular files of the model's directory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fairy_compile.errors import FairyError, ModelFileError, UnsupportedError
from fairy_compile.frontends.graph import Weight
from fairy_compile.frontends.onnx_tensors import TensorReader

if TYPE_CHECKING:
    import onnx

MIN_OPSET, MAX_OPSET = 13, 23
"""Operator sets of ONNX that TVM's importer was tested with here."""

TRAINED_KEY = "fairy_compile.trained"
"""Key of ``metadata_props`` that holds, as JSON, `QuantConfig.to_json` of a trained model."""

MAX_BYTES = (1 << 31) - 1
"""Most bytes of a protobuf message, so of the model file without its external data."""

_MICROSOFT = ("BiasGelu", "FastGelu", "Gelu", "SkipLayerNormalization")
_DTYPES = ("float32", "float16", "bfloat16")
# Operator -> inputs that may be weights; through those of the second table weights pass on.
_READERS = {"MatMul": (0, 1), "Gemm": (0, 1), "Gather": (0,), "Conv": (1,), "ConvTranspose": (1,)}
_PASS_ON = dict.fromkeys(
    ("Transpose", "Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze"), (0,)
)
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class OnnxFile:
    """A checked model.

    Attributes:
        path: the model file.
        model: its message; weights are trailing inputs.
        inputs, outputs: names of the model's own inputs and outputs.
        weights: name -> weight, in the order of the trailing inputs.
        files: the model file and those of its external data.
        metadata: the model's ``metadata_props``.
    """

    path: Path
    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: dict[str, Weight]
    files: tuple[Path, ...]
    metadata: dict[str, str]


def read_onnx(path: Path) -> OnnxFile:
    """Read and check an ONNX model.

    Raises:
        FairyError: the package onnx is not installed.
        ModelFileError: the file is damaged or malformed, or its external data is missing, too
            short, or outside of the model's directory.
        UnsupportedError: an operator set, domain or dtype that is not supported.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise FairyError(
            f"{path} is an ONNX model, which takes the package onnx to read; install it with "
            "pip install 'fairy_compile[onnx]'"
        ) from error
    from google.protobuf.message import DecodeError

    if not path.stat().st_size:
        raise ModelFileError(f"{path} is empty; export or download it again")
    if path.stat().st_size > MAX_BYTES:
        raise ModelFileError(
            f"{path} has more than 2 GiB; save the model with its weights in an external data file"
        )
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, ValueError) as error:
        raise ModelFileError(f"{path} is no ONNX model: {error}") from error
    _check_text(model, path)
    _check_operators(model, path)
    reader = TensorReader(path)
    _settle_tensors(model, reader)
    inputs = [value.name for value in model.graph.input]
    weights = _set_weights_apart(model, reader)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelFileError(
            f"{path} is a malformed ONNX model: {lines[0] if lines else error!r}"
        ) from error
    return OnnxFile(
        path,
        model,
        tuple(inputs),
        tuple(value.name for value in model.graph.output),
        weights,
        (path, *reader.files),
        {entry.key: entry.value for entry in model.metadata_props},
    )


def _check_text(message: Any, path: Path) -> None:
    """Refuse text that is not UTF-8: protobuf hands it over as bytes, and only when it is read."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_MESSAGE, field.TYPE_STRING):
            continue
        repeated = not isinstance(value, str | bytes) and not hasattr(value, "ListFields")
        for item in value if repeated else (value,):
            if field.type == field.TYPE_MESSAGE:
                _check_text(item, path)
            elif isinstance(item, bytes):
                raise ModelFileError(
                    f"{path} is a malformed ONNX model: {field.name} is {item[:40]!r}, not UTF-8"
                )


def _check_operators(model: onnx.ModelProto, path: Path) -> None:
    """Refuse operator sets and domains that the importer would misread, then name the nodes."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx"))
    if opset is None or not MIN_OPSET <= opset <= MAX_OPSET:
        raise UnsupportedError(
            f"{path} uses operator set {opset}; allowed: {MIN_OPSET} to {MAX_OPSET}; export it "
            "again or convert it with onnx.version_converter.convert_version"
        )
    if model.functions:
        from onnx import inliner

        model.CopyFrom(inliner.inline_local_functions(model))
    if model.graph.sparse_initializer:
        raise UnsupportedError(f"{path} has sparse initializers; store them dense")
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        while not node.name or node.name in taken:  # errors go by names
            node.name = f"{node.name or node.op_type}_{index}"
        taken.add(node.name)
        known = node.domain in ("", "ai.onnx")
        if not known and not (node.domain == "com.microsoft" and node.op_type in _MICROSOFT):
            raise UnsupportedError(
                f"{path}: node {node.name!r} is the operator {node.op_type!r} of the domain "
                f"{node.domain!r}, which is not known; export the model with the operators of "
                "ONNX itself"
            )


def _settle_tensors(model: onnx.ModelProto, reader: TensorReader) -> None:
    """Check all tensors; make float constants initializers, and initializers no inputs."""
    graph = model.graph
    for node in [n for n in graph.node if n.op_type == "Constant" and n.output]:
        (value,) = node.attribute[:1] or [None]
        if value is not None and value.HasField("t") and len(value.t.dims) > 1:
            tensor = graph.initializer.add()
            tensor.CopyFrom(value.t)
            tensor.name = node.output[0]
            graph.node.remove(node)
    for tensor in _tensors(graph):
        reader.check(tensor)
    constants = {tensor.name for tensor in graph.initializer}
    own = [value for value in graph.input if value.name not in constants]
    del graph.input[:]
    graph.input.extend(own)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a graph and of those inside its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in _inner_graphs(attribute):
                yield from _tensors(inner)


def _inner_graphs(attribute: Any) -> list[onnx.GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _set_weights_apart(model: onnx.ModelProto, reader: TensorReader) -> dict[str, Weight]:
    """Move the weights from the initializers to the inputs and return them."""
    from onnx import helper

    graph = model.graph
    readers = _weight_readers(graph)
    weights: dict[str, Weight] = {}
    kept = []
    names: set[str] = set()
    for tensor in graph.initializer:
        dtype = reader.dtype(tensor)
        if len(tensor.dims) < 2 or dtype not in _DTYPES or tensor.name not in readers:
            if tensor.data_location == tensor.EXTERNAL:
                tensor.raw_data = reader.bytes(tensor)
                del tensor.external_data[:]
                tensor.data_location = tensor.DEFAULT
            kept.append(tensor)
            continue
        layer = _layer_name(tensor.name, readers[tensor.name])
        while layer in names:
            layer += "_"
        names.add(layer)
        shape = tuple(int(dim) for dim in tensor.dims)
        weights[tensor.name] = Weight(shape, dtype, layer, _Reading(reader, tensor))
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return weights


class _Reading:
    """A call that reads a tensor; it keeps a copy of the message it came from."""

    def __init__(self, reader: TensorReader, tensor: onnx.TensorProto) -> None:
        self._reader = reader
        self._tensor = type(tensor)()
        self._tensor.CopyFrom(tensor)

    def __call__(self) -> np.ndarray:
        return self._reader.array(self._tensor)


def _weight_readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Return name -> nodes that multiply with it or look it up, of values only they read."""
    users: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    barred = {value.name for value in graph.output}
    for node in graph.node:
        for index, name in enumerate(node.input):
            users[name].append((node, index))
        for attribute in node.attribute:
            for inner in _inner_graphs(attribute):
                barred |= _names_in(inner)

    def follow(name: str) -> list[onnx.NodeProto] | None:
        found: list[onnx.NodeProto] = []
        for node, index in users[name]:
            if index in _READERS.get(node.op_type, ()):
                found.append(node)
            elif index in _PASS_ON.get(node.op_type, ()):
                further = follow(node.output[0])
                if further is None:
                    return None
                found += further
            else:
                return None
        return None if name in barred else found

    found = {tensor.name: follow(tensor.name) for tensor in graph.initializer}
    return {name: nodes for name, nodes in found.items() if nodes}


def _names_in(graph: onnx.GraphProto) -> set[str]:
    """Return every value that the nodes of an inner graph read."""
    names = set()
    for node in graph.node:
        names |= set(node.input)
        for attribute in node.attribute:
            for inner in _inner_graphs(attribute):
                names |= _names_in(inner)
    return names


def _layer_name(weight: str, readers: list[onnx.NodeProto]) -> str:
    """Return what to call the layer of a weight: its module in the model it was exported from.

    Exporters rename weights that they transposed; then the node tells, by the scopes that
    PyTorch's exporter notes or by a path such as ``/encoder/fc1/MatMul``.
    """
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    for node in readers:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), "")
        modules = re.findall(r"'([^']*)'", scopes)[:-1]
        if modules and modules[-1]:
            return modules[-1]
        path = node.name.strip("/").split("/")
        if node.name.startswith("/") and len(path) > 1:
            return ".".join(path[:-1])
        if node.op_type == "Gemm" or not weight:
            return node.name
    return weight
