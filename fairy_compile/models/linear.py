"""Linear layers of a Relax model: phase-coded, dense, or a row of both, as planned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Protocol

from tvm import tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from fairy_compile.kernels import dense, dense_gpu
from fairy_compile.kernels.base import SCRATCH, ArraySpec, Batch, ModelKernel, PhaseKernel
from fairy_compile.models.elementwise import add_bias
from fairy_compile.models.shapes import product
from fairy_compile.op.spec import PhaseSpec


@dataclass(frozen=True)
class LinearCall:
    """One kernel call: which layers it computes, and how.

    Attributes:
        name: name of the (possibly fused) layer; parameter names start with it.
        sources: names of the layers it computes, in output order.
        in_features: real input features.
        out_features: real output features of each source.
        bias: whether the sources have biases.
        reason: why this kernel was chosen, for the report.
        spec, kernel: of a phase call; None for a dense one.
        knobs: batch class -> knobs that differ from the kernel's defaults.
        demands: those of them that its weights need, see `PhaseKernel.demands`.
        tuned: batch class -> where its knobs are from: ``tuned``, ``near`` or ``default``, see
            `compiler.schedules.Choice`.
        dtype: storage dtype of a dense weight.
        act_dtype, out_dtype: of its input and its output.
        shared: parameter that already holds the dense weight (tied embeddings), or None.
        token_int8: inputs are rounded to int8 a token before the call, see `op.token_int8`; of a
            kernel with int8 activations, its columns are guarded.
        experts: how many matrices of this form lie in its arrays, as a first dimension; 0 for one
            without that dimension. ``sources`` then holds those of one expert after the other.
    """

    name: str
    sources: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    bias: bool
    reason: str
    spec: PhaseSpec | None = None
    kernel: PhaseKernel | None = None
    knobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    demands: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    shared: str | None = None
    token_int8: bool = False
    act_dtype: str = "float32"
    out_dtype: str = "float32"
    experts: int = 0

    @property
    def guarded(self) -> bool:
        """Tell whether guard columns stand among those of the layer."""
        return self.token_int8 and self.spec is not None and self.spec.act == "int8"

    @property
    def kernel_name(self) -> str:
        """Name of the kernel for reports."""
        return self.kernel.name if self.kernel else dense.NAME

    @property
    def layout_name(self) -> str:
        """Name of the weight layout for reports."""
        return self.kernel.layout.name if self.kernel else dense.LAYOUT

    def arrays(self) -> dict[str, ArraySpec]:
        """Return the packed weight arrays, without biases: suffix -> shape and dtype."""
        if self.shared:
            return {}
        own = {"weight": ArraySpec((sum(self.out_features), self.in_features), self.dtype)}
        if self.kernel and self.spec:
            own = dict(self.kernel.layout.arrays(self.spec))
        if not self.experts:
            return own
        return {
            suffix: ArraySpec((self.experts, *array.shape), array.dtype)
            for suffix, array in own.items()
        }

    def by_expert(self) -> list[tuple[str, ...]]:
        """Return the sources of each matrix: one list, or one an expert."""
        count = len(self.sources) // max(1, self.experts)
        return [self.sources[i : i + count] for i in range(0, len(self.sources), count)]


class LinearPlanner(Protocol):
    """What a model asks for its linear layers; the compiler answers."""

    def linear(
        self,
        name: str,
        sources: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        bias: bool = False,
        token_int8: bool = False,
        out_dtype: str | None = None,
    ) -> list[LinearCall]:
        """Plan the layers ``sources`` over one input: one fused call, or several in order.

        ``token_int8`` says what int8 activations mean to the model: iFairy's contract of
        `op.token_int8` instead of that of the kernels. ``out_dtype`` is that of outputs, by default
        that of activations.
        """

    def experts(
        self,
        name: str,
        sources: Sequence[Sequence[str]],
        in_features: int,
        out_features: Sequence[int],
    ) -> LinearCall:
        """Plan the layers ``sources[expert]`` over one input, for all experts in one call."""

    def head(self, name: str, in_features: int, vocab: int) -> list[LinearCall]:
        """Plan the output head, which may share the embedding's weight."""

    def dtype(self, name: str) -> str:
        """Return the storage dtype of the tensor ``name``."""

    def source_dtype(self, name: str) -> str:
        """Return the dtype in which the checkpoint holds the tensor ``name``."""


def kernel_symbol(call: LinearCall, batch: str) -> str:
    """Return the name of a call's function in the library, e.g. ``x86_codebook_single_8192x4096``.

    Calls of equal shape and contract share one function.
    """
    own = "" if call.out_dtype == call.act_dtype else f"_{call.out_dtype}"
    if call.spec is None:
        shape = f"{sum(call.out_features)}x{call.in_features}{own}"
        act = "" if call.act_dtype == "float32" else f"_{call.act_dtype}"
        return f"dense_{call.dtype}_{batch}_{shape}{act}"
    spec = call.spec
    shape = f"{spec.out_features}x{spec.in_features}{own}"
    return (
        f"{call.kernel_name.replace('.', '_')}_{batch}_{shape}_t{spec.stages}"
        f"{''.join(spec.terms).lower()}_{spec.scale}_{spec.contract}"
    )


def kernel_function(call: LinearCall, target: Any, batch: Batch) -> tirx.PrimFunc:
    """Return the scheduled function of a call for a batch class, opaque to operator fusion."""
    if call.kernel and call.spec:
        func = call.kernel.build(call.spec, target, batch, call.knobs.get(batch, {}))
    elif target.is_gpu:
        func = dense_gpu.build_dense(call, target.limits, batch)
    else:
        func = dense.build_dense(sum(call.out_features), call.in_features, call.dtype, batch)
    return func.with_attr("op_pattern", 8)


def model_function(call: LinearCall, target: Any, batch: Batch) -> tirx.PrimFunc:
    """Return what `kernel_function` does, or a function that takes more arguments.

    That of a `ModelKernel` takes the bias, if there is one, and memory, see `scratch_bytes`.
    """
    kernel = call.kernel
    if call.spec is None or not isinstance(kernel, ModelKernel):
        return kernel_function(call, target, batch)
    spec = replace(call.spec, bias=call.bias)
    func = kernel.build_for_model(spec, target, batch, call.knobs.get(batch, {}))
    return func.with_attr("op_pattern", 8)


def module_function(
    func: tirx.PrimFunc, call: LinearCall, batch: Batch
) -> tuple[tirx.PrimFunc, str]:
    """Return a function of a call as a module takes it, and the name to ask for.

    That is the one its kernel gives it, if any. Functions that differ only in knobs the name does
    not tell have the same, so the function does not keep it: the module numbers such names.
    """
    name = func.attrs.get("global_symbol") if func.attrs is not None else None
    return func.without_attr("global_symbol"), str(name or kernel_symbol(call, batch))


def scratch_bytes(func: tirx.PrimFunc, rows: Any) -> Any:
    """Return an upper bound of the scratch memory a function takes for ``rows`` rows, in bytes.

    None is that of a function without an argument for it.
    """
    if func.attrs is None or SCRATCH not in func.attrs:
        return None
    fixed, growing = 0, []
    for most, step, size in json.loads(str(func.attrs[SCRATCH])):
        known = rows if isinstance(rows, int) else most
        if most >= 0 or isinstance(rows, int):
            known = known if most < 0 else min(known, most)
            fixed = max(fixed, -(-known // step) * size)
        else:
            growing.append((rows + (step - 1)) // step * size)
    return reduce(tirx.max, growing, fixed) if growing else fixed


_EACH_ALONE: ContextVar[bool] = ContextVar("each_alone", default=False)


@contextmanager
def each_row_alone() -> Iterator[None]:
    """Let `PlannedLinear` compute every row bit for bit as if it were the only one."""
    token = _EACH_ALONE.set(True)
    try:
        yield
    finally:
        _EACH_ALONE.reset(token)


class PlannedLinear(nn.Module):
    """y = x A^T + bias for one `LinearCall`, x (..., in) -> y (..., out), in the call's dtypes."""

    def __init__(self, call: LinearCall, target: Any, shared: nn.Parameter | None = None) -> None:
        self.call = call
        self.target = target
        self.array_names = list(call.arrays())
        for suffix, array in call.arrays().items():
            setattr(self, suffix, nn.Parameter(array.shape, array.dtype))
        self.bias = nn.Parameter((sum(call.out_features),), "float32") if call.bias else None
        self._shared = [shared] if call.shared else []  # a list hides it from parameter discovery

    def forward(self, x: Tensor) -> Tensor:
        """Call the kernel over all leading dimensions at once."""
        *lead, in_features = x.shape
        rows = product(lead)
        batch = self._batch(rows)
        flat = op.reshape(x, (rows, in_features))
        out = sum(self.call.out_features)
        weights = [getattr(self, name) for name in self.array_names] or self._shared
        func = model_function(self.call, self.target, batch)
        bias = self.bias
        if bias is not None and isinstance(self.call.kernel, ModelKernel):
            weights, bias = [*weights, bias], None
        outputs = [Tensor.placeholder((rows, out), self.call.out_dtype)]
        scratch = scratch_bytes(func, rows)
        if scratch is not None:
            outputs.append(Tensor.placeholder((scratch,), "uint8"))
        func, symbol = module_function(func, self.call, batch)
        y = op.tensor_ir_op(func, symbol, [flat, *weights], outputs)
        y = y if isinstance(y, Tensor) else y[0]
        y = op.reshape(y, (*lead, out))
        return add_bias(y, bias) if bias is not None else y

    def _batch(self, rows: Any) -> Batch:
        if isinstance(rows, int) and rows == 1:
            return "single"
        kernel = self.call.kernel
        apart = _EACH_ALONE.get() and kernel is not None and kernel.decode_from is not None
        return "decode" if apart else "many"


class LinearRow(nn.Module):
    """Several calls over one input, their outputs concatenated.

    Layers that cannot share a call (different stages, or one of them dense) run one after the
    other; the model around them never notices.
    """

    def __init__(self, layers: Sequence[PlannedLinear]) -> None:
        self.calls = nn.ModuleList(list(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all calls, concatenated along the last dimension."""
        return op.concat([call(x) for call in self.calls], dim=-1)


def make_linear(
    calls: Sequence[LinearCall],
    target: Any,
    shared: nn.Parameter | None = None,
    layer: type[PlannedLinear] = PlannedLinear,
) -> nn.Module:
    """Return the module for a plan: one ``layer``, or a `LinearRow` of several."""
    if len(calls) == 1:
        return layer(calls[0], target, shared)
    return LinearRow([layer(call, target) for call in calls])
