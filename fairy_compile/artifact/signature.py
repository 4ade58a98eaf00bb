"""Signatures of library functions: parsed from one-line text, compared, read off a Relax module.

The text form is what `artifact.contract` and ``fairy.json`` use:

    (b, 1, h) act, object, params -> [(1, b, v) float32, object]

A tensor is its dimensions and its dtype. ``params`` is the one tuple that holds all parameters,
``object`` any runtime object, ``shape`` a one-element Shape, ``[…]`` a tuple.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fairy_compile.artifact.schema import show
from fairy_compile.errors import ModelFileError

if TYPE_CHECKING:
    from tvm.ir import IRModule

_TOKEN = re.compile(r"\s*(->|[(),\[\]]|[A-Za-z_]\w*|\d+|\?)")
_WORDS = ("object", "params", "shape", "string", "none")
_MAX_TEXT = 1 << 16  # a graph may have hundreds of inputs


@dataclass(frozen=True)
class Value:
    """One argument or result.

    Attributes:
        kind: ``tensor``, ``tuple``, or a word of the text form.
        dims: of a tensor: integers and symbols (``?`` for an expression).
        dtype: of a tensor.
        items: of a tuple.
    """

    kind: str
    dims: tuple[int | str, ...] = ()
    dtype: str = ""
    items: tuple[Value, ...] = ()

    def __str__(self) -> str:
        if self.kind == "tensor":
            return f"({', '.join(map(str, self.dims))}) {self.dtype}"
        if self.kind == "tuple":
            return f"[{', '.join(map(str, self.items))}]"
        return self.kind


@dataclass(frozen=True)
class Signature:
    """Arguments and result of a function; ``str()`` gives the text form."""

    args: tuple[Value, ...]
    result: Value

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.args))} -> {self.result}".lstrip()

    @classmethod
    def parse(cls, text: str) -> Signature:
        """Read the text form.

        Raises:
            ModelFileError: the text is malformed.
        """
        return _Parser(text).signature()


class _Parser:
    def __init__(self, text: str):
        self._text = text
        self._tokens: list[str] = []
        position = 0
        stripped = text.rstrip()
        if len(text) > _MAX_TEXT:
            raise self._error()
        while position < len(stripped):
            match = _TOKEN.match(stripped, position)
            if not match:
                raise self._error()
            self._tokens.append(match[1])
            position = match.end()

    def _error(self) -> ModelFileError:
        return ModelFileError(
            f"malformed function signature {show(self._text)}; expected e.g. "
            "'(n) int32, params -> (n, h) float32'"
        )

    def _peek(self) -> str:
        return self._tokens[0] if self._tokens else ""

    def _take(self, expected: str = "") -> str:
        if not self._tokens or (expected and self._tokens[0] != expected):
            raise self._error()
        return self._tokens.pop(0)

    def _list(self, end: str, item: Any) -> tuple[Any, ...]:
        items = []
        while self._peek() != end:
            if items:
                self._take(",")
            items.append(item())
        self._take(end)
        return tuple(items)

    def signature(self) -> Signature:
        args = self._list("->", self._value)
        result = self._value()
        if self._tokens:
            raise self._error()
        return Signature(args, result)

    def _value(self, nested: bool = False) -> Value:
        token = self._take()
        if token == "(":
            dims = self._list(")", self._dim)
            dtype = self._take()
            if not dtype[0].isalpha():
                raise self._error()
            return Value("tensor", dims, dtype)
        if token == "[" and not nested:
            return Value("tuple", items=self._list("]", lambda: self._value(nested=True)))
        if token in _WORDS:
            return Value(token)
        raise self._error()

    def _dim(self) -> int | str:
        token = self._take()
        if token.isdigit():
            return int(token[:20])
        if token[0].isalpha() or token[0] in "_?":
            return token
        raise self._error()


def signatures_of(module: IRModule) -> dict[str, Signature]:
    """Return the signatures of a Relax module's public functions, by name.

    Call it on the module as the frontend built it, before any lowering: Relax functions and
    PrimFuncs with a ``global_symbol`` are read from their types.
    """
    from tvm import relax

    signatures = {}
    for function in module.functions.values():
        attrs = function.attrs or {}
        if "global_symbol" not in attrs:
            continue
        name = str(attrs["global_symbol"])
        if isinstance(function, relax.Function):
            args = tuple(_relax_value(p.ty, is_argument=True) for p in function.params)
            signatures[name] = Signature(args, _relax_value(function.ret_ty))
        else:
            buffers = [p.ty for p in function.params]
            if all(hasattr(buffer, "shape") for buffer in buffers):
                args = tuple(_tensor(b.shape, str(b.dtype)) for b in buffers)
                signatures[name] = Signature(args, Value("none"))
    return signatures


def _relax_value(ty: Any, is_argument: bool = False) -> Value:
    kind = type(ty).__name__
    if kind == "TensorType":
        dims = getattr(ty.shape, "values", None)
        return _tensor(dims if dims is not None else ["?"] * max(int(ty.ndim), 0), str(ty.dtype))
    if kind == "TupleType":
        if is_argument:
            return Value("params")
        return Value("tuple", items=tuple(_relax_value(field) for field in ty.fields))
    return Value({"ShapeType": "shape", "StringType": "string"}.get(kind, "object"))


def _tensor(dims: Any, dtype: str) -> Value:
    return Value("tensor", tuple(_dim_of(d) for d in dims), dtype)


def _dim_of(dim: Any) -> int | str:
    if isinstance(dim, int):
        return dim
    if hasattr(dim, "value"):
        return int(dim.value)
    name = str(getattr(dim, "name", "?"))
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) else "?"
