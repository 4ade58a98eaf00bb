"""What the library of a compiled graph must have: ``main`` and ``_metadata``.

A chat model keeps the contract of MLC engines (`artifact.contract`). A graph (ONNX, PyTorch module)
has the inputs and outputs of its own: ``main`` takes them in order, then the tuple of all
parameters where there are any, and returns its only output or a tuple of outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairy_compile.artifact.schema import OneOf, check, show
from fairy_compile.artifact.signature import Signature, Value
from fairy_compile.errors import ModelFileError

GRAPH = "graph"
CHAT = "chat"
KINDS = (CHAT, GRAPH)

_TENSOR = {"name": str, "shape": [OneOf(int, str)], "dtype": str}
METADATA = {
    "kind": GRAPH,
    "quantization": str,
    "inputs": [_TENSOR],
    "outputs": [_TENSOR],
    "params": [{"name": str, "shape": [int], "dtype": str}],
}
"""Schema of the JSON text that ``_metadata`` returns."""


def check_graph(functions: Mapping[str, str], metadata: Mapping[str, Any]) -> list[str]:
    """Return how a graph's library breaks the contract, in words; an empty list if it keeps it.

    Args:
        functions: name -> signature of the library's public functions.
        metadata: what ``_metadata`` returns, parsed.
    """
    missing = [f"the library lacks the function {n!r}" for n in _NEEDED if n not in functions]
    problems = missing + check(metadata, METADATA, "the library's metadata")
    if problems:
        return problems
    try:
        main = Signature.parse(functions["main"])
    except ModelFileError as error:
        return [f"function 'main': {error}"]
    args = list(main.args)
    if metadata["params"] and (not args or args.pop().kind != "params"):
        return ["function 'main' does not take the parameters as its last argument"]
    results = list(main.result.items) if main.result.kind == "tuple" else [main.result]
    for what, values in (("inputs", args), ("outputs", results)):
        named = metadata[what]
        names = [tensor["name"] for tensor in named]
        if len(set(names)) != len(names):
            return [f"the library's metadata names one of its {what} twice"]
        if len(values) != len(named):
            return [
                f"function 'main' has {len(values)} {what}, but the metadata names {len(named)}"
            ]
        for value, tensor in zip(values, named, strict=True):
            if not _fits(value, tensor):
                return [
                    f"function 'main' has among its {what} {show(str(value))}, but the metadata "
                    f"calls {show(tensor['name'])} {show(tensor['shape'])} {show(tensor['dtype'])}"
                ]
    return []


_NEEDED = ("main", "_metadata")


def _fits(value: Value, tensor: Mapping[str, Any]) -> bool:
    """Compare dtype, rank and constant dimensions."""
    if value.kind != "tensor" or value.dtype != tensor["dtype"]:
        return False
    shape = tensor["shape"]
    return len(shape) == len(value.dims) and all(
        not isinstance(dim, int) or dim == own for dim, own in zip(shape, value.dims, strict=True)
    )
