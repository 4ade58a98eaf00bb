"""Quantisation-aware training: linear layers that compute with phase codes and train through them.

    import fairy_compile as fc
    fc.qat.prepare(model, fc.QuantConfig("w2"))     # in place; any transformers causal LM
    ...                                             # train as usual
    fc.qat.export(model, "ckpt", tokenizer=tokenizer)
    fc.build("ckpt", output="dist/model")

Any other network: ``fc.qat.export_onnx(model, "model.onnx", inputs)`` writes what
``fc.build("model.onnx")`` reads; or ``fc.build(model, inputs)`` takes the module itself.

`fairy_compile.qat.ifairy` has a natively complex model, which takes
``fc.QuantConfig("w1", terms=("W",))``.

The only part of fairy_compile that needs PyTorch, with `fairy_compile.train`.
"""

from fairy_compile.errors import FairyError

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise FairyError(
        "quantisation-aware training needs PyTorch; install it with "
        "pip install 'fairy_compile[train]'"
    ) from error

from fairy_compile.qat.export import LATENTS, ExportReport, export
from fairy_compile.qat.layers import (
    ComplexLinear,
    PhaseComplexLinear,
    PhaseLinear,
    frozen,
    phase_layers,
    stacked,
)
from fairy_compile.qat.onnx import export_onnx
from fairy_compile.qat.prepare import PreparedLayer, PrepareReport, prepare

__all__ = [
    "LATENTS",
    "ComplexLinear",
    "ExportReport",
    "PhaseComplexLinear",
    "PhaseLinear",
    "PrepareReport",
    "PreparedLayer",
    "export",
    "export_onnx",
    "frozen",
    "phase_layers",
    "prepare",
    "stacked",
]
