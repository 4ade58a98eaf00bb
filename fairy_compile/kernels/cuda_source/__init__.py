"""CUDA C++ of the phase GEMM, and the constants of one call that its templates take.

`decode.cuh`, `prefill.cuh` and `hopper.cuh` are templates over a struct of constants; `tables.cuh`
and `splits.cuh` are what the latter two share, `hopper_tables.cuh` is a part of the last, and
`quantize.cuh` is what the first shares with kernels that compute its x. `render` writes the struct
of one call and a device function that runs it. A PrimFunc launches the grid and calls the function,
see `kernels.cuda`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from fairy_compile.kernels.cuda_layout import TILE_ROWS, CudaLayout
from fairy_compile.op import PhaseSpec

Program = Literal["decode", "prefill", "hopper"]

_ALIGNED_ROWS = 8  # of parts whose outputs are stored 16 bytes at a time: 8 16-bit features

CUDA_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
OPERANDS = {"float32": "float16", "float16": "float16", "bfloat16": "bfloat16"}
"""dtype of x -> that of the operands of the tensor cores that multiply many rows of x. float16 has
three more bits of precision than bfloat16, but does not hold what bfloat16 activations may be."""
_CLASSES: dict[Program, str] = {
    "decode": "Decode",
    "prefill": "Prefill",
    "hopper": "Hopper",
}
_FILES: dict[Program, tuple[str, ...]] = {
    "decode": ("primitives.cuh", "quantize.cuh", "operand_x.cuh", "decode.cuh"),
    "prefill": ("primitives.cuh", "tables.cuh", "splits.cuh", "prefill.cuh"),
    "hopper": (
        "primitives.cuh",
        "hopper_primitives.cuh",
        "tables.cuh",
        "splits.cuh",
        "hopper_tables.cuh",
        "hopper.cuh",
    ),
}
ROTATING = "rotating_"
"""Prefix of attention that rotates and appends."""

WAIT_THEMSELVES = (
    ROTATING,
    *(f"{program}_" for program in _FILES),
    "arrange_",
    "add_prefill_",
    "add_hopper_",
    "rms_norm_",
    "add_rms_norm_",
    "gate_product_",
)
"""Prefixes of the functions that wait for the kernel before where they need its results, so that
they may be launched before it is over."""


@cache
def library_source(program: Program, *, image: bool = False, splits: bool = False) -> str:
    """Return the template of ``program`` and what it includes.

    Args:
        program: which template.
        image: it takes an image of x; what makes one is included.
        splits: blocks share columns; what adds their sums up is included.
    """
    files = list(_FILES[program])
    if image and program == "decode":
        files.append("quantize_x.cuh")
    if splits:
        files.append("add_splits.cuh")
    return read_files(*files)


@cache
def read_files(*names: str) -> str:
    """Return files of this folder, one after the other."""
    return "\n".join(Path(__file__).with_name(name).read_text("utf-8") for name in names)


def lanes_of(dtype: str) -> int:
    """Return the numbers of one access of 128 bits."""
    return 4 if dtype == "float32" else 8


def render(
    program: Program,
    name: str,
    spec: PhaseSpec,
    layout: CudaLayout,
    constants: Mapping[str, int],
    eps: float = 0.0,
) -> str:
    """Return CUDA C++ that defines a device function for one call.

    Args:
        program: which template.
        name: of the function ``void name(const X* x, const unsigned char* codes, const float*
            scales, Y* y, int batch)``. Program ``hopper``, and ``decode`` with ``kImage``, define
            two: ``arrange_name(const X* x, unsigned char* image, int batch)`` and ``name(const
            unsigned char* image, const unsigned char* codes, const float* scales, Y* y, int batch,
            unsigned char* shared)``. With ``kSplits`` above 1, y is scratch memory, and
            ``add_name(unsigned char* scratch, Y* y, int batch)`` writes y. With a bias, ``const
            float* bias`` stands before y. ``decode`` with ``kNorm`` normalises the row first:
            ``const X* other, const float* weight`` follow x, and ``X* sum`` stands before y; other
            and sum are used with ``kAdd``.
        spec: the call.
        layout: of ``codes`` and ``scales``.
        constants: of the template beyond those of the call, e.g. ``{"kWarps": 8}``.
        eps: of the norm.
    """
    scales = layout.arrays(spec)["scales"].shape
    values = {
        "kColumns": spec.m,
        "kRowTiles": layout.tiles(spec),
        "kFeatures": spec.out_features,
        "kStages": spec.stages,
        "kTerms": len(spec.terms),
        "kColumnTiles": scales[1],
        "kScaleRows": scales[4],
        "kBias": int(spec.bias),
        "kAligned": int(all(rows % _ALIGNED_ROWS == 0 for rows in spec.parts)),
        **constants,
    }
    dtypes = (spec.dtype, spec.out_dtype, OPERANDS[spec.dtype])
    x, y, operand = (CUDA_TYPES[dtype] for dtype in dtypes)
    lines = [f"  static constexpr int {key} = {value};" for key, value in values.items()]
    image = program == "hopper" or bool(values.get("kImage"))
    splits = values.get("kSplits", 1) > 1
    return f"""{library_source(program, image=image, splits=splits)}
#ifndef FAIRY_{name}
#define FAIRY_{name}
struct {name}_call {{
  typedef {x} X;
  typedef {y} Y;
  typedef {operand} Operand;
{_given(program, values, eps)}
{chr(10).join(lines)}
{_feature_function(spec, layout)}
}};
{_functions(program, name, x, y, values, bias=spec.bias)}
{_add_function(name, y, bias=spec.bias) if splits else ""}
#endif  // FAIRY_{name}
"""


def _given(program: Program, values: Mapping[str, int], eps: float) -> str:
    """Return what decode takes in place of x: see `operand_x.cuh`."""
    if program != "decode":
        return ""
    given = f"const fairy::Record<{values['kLevels']}>*" if values["kImage"] else "const X*"
    if values["kNorm"]:
        given = "fairy::NormedRow<X>"
    return f"""  typedef {given} Given;
  static __device__ __forceinline__ float eps() {{ return {eps!r}f; }}"""


def _bias(bias: bool) -> tuple[str, str]:
    """Return (parameter and comma, argument) of a function that may have a bias."""
    return ("const float* bias, ", "bias") if bias else ("", "nullptr")


def _functions(
    program: Program, name: str, x: str, y: str, values: Mapping[str, int], *, bias: bool
) -> str:
    out = f"{y}*" if program == "decode" else "void*"
    parameter, given_bias = _bias(bias)
    weights = f"const unsigned char* codes, const float* scales, {parameter}"
    arguments = f"{weights}{out} y, int batch"
    if values.get("kNorm"):
        return f"""
__device__ __forceinline__ void {name}(const {x}* x, const {x}* other, const float* weight,
                                       {weights}{x}* sum, {out} y, int batch) {{
  fairy::Decode<{name}_call>::run({{x, other, weight, sum}}, codes, scales, {given_bias}, y, batch);
}}
"""
    if program != "hopper" and not values.get("kImage"):
        return f"""
__device__ __forceinline__ void {name}(const {x}* x, {arguments}) {{
  fairy::{_CLASSES[program]}<{name}_call>::run(x, codes, scales, {given_bias}, y, batch);
}}
"""
    if program == "hopper":
        arranger, shared, image, given = "ArrangeX", "shared", "uint4*", "const uint4*"
    else:
        arranger, image = "QuantizeX", f"fairy::Record<{values['kLevels']}>*"
        given = f"{name}_call::Given"
        shared = f"*(fairy::Decode<{name}_call>::Shared*)shared"
    return f"""
__device__ __forceinline__ void arrange_{name}(const {x}* x, unsigned char* image, int batch) {{
  fairy::{arranger}<{name}_call>::run(x, ({image})image, batch);
}}

__device__ __forceinline__ void {name}(const unsigned char* image, {arguments},
                                       unsigned char* shared) {{
  fairy::{_CLASSES[program]}<{name}_call>::run(({given})image, codes, scales,
                                               {given_bias}, y, batch, {shared});
}}
"""


def _add_function(name: str, y: str, *, bias: bool) -> str:
    parameter, given_bias = _bias(bias)
    return f"""
__device__ __forceinline__ void add_{name}(unsigned char* scratch, {parameter}{y}* y, int batch) {{
  fairy::AddSplits<{name}_call>::run(scratch, {given_bias}, y, batch);
}}
"""


def _feature_function(spec: PhaseSpec, layout: CudaLayout) -> str:
    """Return the function from (row tile, row in it, half of y) to output feature, or -1."""
    cases = []
    runs = zip(layout.tile_starts(spec), spec.output_runs(), strict=True)
    for start, (_, rows, feature) in reversed(list(runs)):
        cases.append(
            f"    if (tile >= {start}) {{\n"
            f"      row += (tile - {start}) * {TILE_ROWS};\n"
            f"      return row < {rows} ? {feature} + half * {rows} + row : -1;\n"
            "    }"
        )
    body = "\n".join(cases)
    return (
        "  static __device__ __forceinline__ int feature(int tile, int row, int half) {\n"
        f"{body}\n    return -1;\n  }}"
    )
