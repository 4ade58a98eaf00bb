"""ONNX models through TVM's importer, with the nodes it stumbles over put right."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from fairy_compile.artifact.files import hash_files
from fairy_compile.artifact.schema import show
from fairy_compile.config import QuantConfig
from fairy_compile.errors import UnsupportedError
from fairy_compile.frontends.files import parse_json_object
from fairy_compile.frontends.graph import Graph
from fairy_compile.frontends.onnx_file import TRAINED_KEY, OnnxFile, read_onnx
from fairy_compile.frontends.quant_json import read_quant

if TYPE_CHECKING:
    import onnx


_MAX_FILLED = 1 << 20  # elements of a constant that a shape alone describes


def import_onnx(path: Path) -> Graph:
    """Import an ONNX model.

    Raises:
        FairyError: see `read_onnx`.
        UnsupportedError: a node cannot be imported; the message names it.
    """
    file = read_onnx(path)
    module = _import(file)
    return Graph(
        name=path.name,
        kind="onnx",
        module=module,
        inputs=file.inputs,
        outputs=file.outputs,
        weights=file.weights,
        directory=path.parent,
        files=hash_files({str(p.relative_to(path.parent)): p for p in file.files}),
        trained=_trained(file),
    )


def _trained(file: OnnxFile) -> QuantConfig | None:
    text = file.metadata.get(TRAINED_KEY)
    if text is None:
        return None
    return read_quant(parse_json_object(text.encode(), f"{file.path}: {TRAINED_KEY}"), file.path)


def _import(file: OnnxFile) -> tvm.IRModule:
    known = onnx_frontend._get_convert_map().keys() | {"If", "Constant"}
    for node in file.model.graph.node:
        if node.op_type not in known:
            raise UnsupportedError(
                f"{file.path}: node {show(node.name)} is the operator {node.op_type!r}, which "
                "TVM's importer does not know; export the model without it, e.g. with fixed "
                "shapes or another version of the exporter"
            )
    opset = next(e.version for e in file.model.opset_import if e.domain in ("", "ai.onnx"))
    importer = _Importer(file)
    # The importer prints what it was converting when it failed; the error below says it better.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importer.from_onnx(file.model.graph, opset)
        except Exception as error:  # whatever the converters of TVM raise
            reason = str(error).strip().splitlines() or [repr(error)]
            raise UnsupportedError(
                f"{file.path}: TVM's importer cannot convert node {importer.at}: "
                f"{reason[-1][:300]}; export the model with fixed shapes or by another exporter "
                "(torch.onnx.export with dynamo=True or False), or give the PyTorch module to "
                "fc.build"
            ) from error


class _Importer(onnx_frontend.ONNXGraphImporter):
    """TVM's importer that knows which node it is at, and mends what it loses.

    Where TVM no longer knows the shape of a result, the graph gets a cast that checks it when it
    runs: to what the exporter or ONNX's inference wrote down in terms of the inputs' dimensions,
    else to dimensions of its own.

    Attributes:
        at: the node being converted, in words.
    """

    def __init__(self, file: OnnxFile) -> None:
        super().__init__({}, "float32")
        self.at = "(none)"
        self._known = _known_results(file.model)
        self._fresh = 0

    def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
        name = attrs["tvm_custom"]["name"]
        self.at = f"{show(name)} ({op_name})"
        value = _mended(op_name, inputs, attrs)
        if value is None:
            value = super()._convert_operator(op_name, inputs, attrs, opset)
        else:
            value = self.bb.normalize(value)
        if not isinstance(value, relax.Expr) or not isinstance(value.ty, relax.TensorType):
            return value
        dtype, shape = self._known.get(name, (None, None))
        if dtype is not None and dtype != str(value.ty.dtype):  # OneHot gives float64
            value = self.bb.emit(relax.op.astype(value, dtype))
        return self._with_shape(value, shape)

    def _with_shape(self, value: relax.Expr, known: list[int | str] | None) -> relax.Expr:
        """Return a tensor whose shape TVM knows in terms of the inputs', as far as it can be."""
        dims = self._dimensions()
        shape = getattr(value.ty.shape, "values", None)
        rank = int(value.ty.ndim)
        if rank < 1 or (shape is not None and all(_made_of(d, dims.values()) for d in shape)):
            return value
        named = known is not None and all(isinstance(d, int) or d in dims for d in known)
        if named and len(known) == rank:
            wanted = [dims[d] if isinstance(d, str) else d for d in known]
        elif shape is None:
            wanted = [tvm.tirx.Var(f"d{self._fresh + i}", "int64") for i in range(rank)]
            self._fresh += rank
        else:
            return value
        dtype = str(value.ty.dtype)
        return self.bb.match_cast(self.bb.emit(value), relax.TensorType(wanted, dtype))

    def _dimensions(self) -> dict[str, Any]:
        """Return name -> variable of the inputs' dimensions."""
        found = {}
        for var in self._inputs.values():
            for dim in getattr(getattr(var.ty, "shape", None), "values", None) or []:
                if isinstance(dim, tvm.tirx.Var):
                    found[dim.name] = dim
        return found


def _made_of(dim: Any, variables: Collection[Any]) -> bool:
    """Tell whether a dimension is a number or made of these variables."""
    found: list[bool] = []

    def visit(var: Any, visitor: Any) -> None:
        found.append(any(var.same_as(own) for own in variables))

    tvm_ffi.structural_visit(dim, [(tvm.tirx.Var, visit)])
    return all(found)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, relax.Expr) and isinstance(value.ty, relax.TensorType)


def _mended(op_name: str, inputs: Any, attrs: Any) -> relax.Expr | None:
    """Return the value of a node that TVM's converter fails on, None for any other."""
    data = inputs[0]
    if op_name == "Pow" and all(_is_tensor(value) for value in inputs):
        base, exponent = (str(value.ty.dtype) for value in inputs)
        if base != exponent and "float" in base:  # a square by an integer, say
            return relax.op.power(data, relax.op.astype(inputs[1], base))
    if op_name == "ConstantOfShape" and isinstance(data, tvm.ir.GenericConst):
        value = attrs.get("value")
        array = onnx_frontend.get_numpy(value) if value is not None else np.zeros(1, np.float32)
        shape = tuple(data.value.numpy().tolist())
        if math.prod(shape) <= _MAX_FILLED:
            return relax.const(np.full(shape, array.reshape(-1)[0], array.dtype))
    if op_name == "Shape" and data is not None and isinstance(data.ty, relax.ShapeType):
        return relax.const(np.array([int(data.ty.ndim)], np.int64))  # the shape of a shape
    if op_name == "Reshape" and tvm.ir.is_prim_expr(data):
        target = inputs[1]
        if isinstance(target, tvm.ir.GenericConst) and target.value.numpy().tolist() in ([1], [-1]):
            return relax.ShapeExpr([data])
    return None


def _known_results(
    model: onnx.ModelProto,
) -> dict[str, tuple[str | None, list[int | str] | None]]:
    """Return node name -> dtype and shape of its only output.

    They are None where nothing tells them; a shape, too, where a dimension has no name or size.
    """
    import onnx

    # Where inference fails, the exporter's own notes are still there.
    with contextlib.suppress(onnx.shape_inference.InferenceError, ValueError):
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    results: dict[str, tuple[str | None, list[int | str] | None]] = {}
    for value in (*model.graph.value_info, *model.graph.output):
        tensor = value.type.tensor_type
        dtype, shape = None, None
        if tensor.elem_type:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        if tensor.HasField("shape"):
            dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
            shape = dims if all(dims) else None
        results[value.name] = (dtype, shape)
    return {
        node.name: results[node.output[0]]
        for node in model.graph.node
        if len(node.output) == 1 and node.output[0] in results
    }
