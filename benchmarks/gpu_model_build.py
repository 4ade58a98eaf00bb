"""Libraries of whole models that differ in their linear layers; see `gpu_model`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu_peers import DENSE, FOUR_BIT
from gpu_variants import CHUNK, CONTEXT, MAX_BATCH, Variant

from fairy_compile.artifact.contract import PAGE_FUNCTIONS
from fairy_compile.compiler.library import Sizes, define
from fairy_compile.compiler.pipeline import compile_module
from fairy_compile.kernels import FAMILIES
from fairy_compile.models import parse_config
from fairy_compile.models.linear import LinearCall
from fairy_compile.op import PhaseSpec


def entry_points(variant: Variant) -> list[str]:
    """Return the functions `gpu_model` calls."""
    if variant.pages:
        return ["_metadata", *PAGE_FUNCTIONS]
    names = ["_metadata", "embed", "prefill", "batch_prefill", "decode", "batch_decode"]
    return [*names, "create_tir_paged_kv_cache"]


class ShapePlanner:
    """Plans every linear layer of a model alike; see `LinearPlanner`."""

    def __init__(self, variant: Variant, target: Any) -> None:
        self.variant, self.target = variant, target
        self.calls: list[Any] = []

    def dtype(self, name: str) -> str:
        return "float16"

    source_dtype = dtype

    def linear(
        self, name: str, sources: Any, in_features: int, out_features: Any, bias: bool = False,
        token_int8: bool = False, out_dtype: str = "float16",
    ) -> list[Any]:  # fmt: skip
        phase = FAMILIES[self.target.kernels[0]][0]
        kernels = {"phase": phase, "dense": DENSE, "four_bit": FOUR_BIT}
        spec = PhaseSpec(
            tuple(n // 2 for n in out_features), in_features // 2, max(1, self.variant.stages),
            ("U", "W"), "tensor", self.variant.act, "float16", out_dtype,
        )  # fmt: skip
        call = LinearCall(
            name, tuple(sources), in_features, tuple(out_features), bias, "", spec,
            kernels[self.variant.weights], act_dtype="float16", out_dtype=out_dtype,
        )  # fmt: skip
        self.calls.append(call)
        return [call]

    def head(self, name: str, in_features: int, vocab: int) -> list[Any]:
        return self.linear(name, [name], in_features, [vocab], out_dtype="float32")


def define_model(variant: Variant, shape: dict[str, int], target: Any) -> tuple[Any, list[Any]]:
    """Return the Relax module of a model and its parameters."""
    config = parse_config({"model_type": "llama", "rms_norm_eps": 1e-5, **shape})
    config = replace(config, kv_dtype="float16", act_dtype="float16", context=CONTEXT)
    planner = ShapePlanner(variant, target)
    sizes = Sizes(CONTEXT, CHUNK, MAX_BATCH, pages=variant.pages)
    module, params, _ = define(config, planner, target, sizes, variant.weights)
    return module, params


def build_one(folder: Path, variant: Variant, shape: dict[str, int], target: Any) -> None:
    """Compile one library."""
    module, params = define_model(variant, shape, target)
    graphs = MAX_BATCH if variant.graphs else None
    executable = compile_module(module, target, entry_points(variant), cuda_graphs=graphs)
    folder.mkdir(parents=True, exist_ok=True)
    executable.export_library(str(folder / "model.so"))
    fills = {p.name: _fill(p, variant) for p in params}
    text = {"variant": asdict(variant), "vocab": shape["vocab_size"], "fills": fills}
    (folder / "model.json").write_text(json.dumps(text, indent=1), "utf-8")


def _fill(param: Any, variant: Variant) -> tuple[str, float]:
    """Return what a parameter is filled with so that outputs of a layer vary by about 1."""
    if param.call is None:
        return ("normal", 1.0) if "embed" in param.name else ("constant", 1.0)
    size = param.call.in_features
    if param.array == "scales":  # of two terms, each a sum over half as many complex columns
        return "constant", (size * variant.stages) ** -0.5
    if param.array == "scale":  # codes 0 .. 15 less 7 have a mean square of 21.5
        return "constant", (21.5 * size) ** -0.5
    if variant.weights == "dense":
        return "normal", size**-0.5
    return "bits", 0.0
