"""Cases of the x86 kernels and their comparison with the NumPy reference."""

from __future__ import annotations

from functools import cache

import numpy as np
import tvm

from fairy_compile.kernels.x86 import CODEBOOK_KERNELS, Isa, X86Codebook
from fairy_compile.kernels.x86_panel_layout import MIN_TOKENS, WORD_LIMIT, combine_scales
from fairy_compile.kernels.x86_tables import joint_ratio
from fairy_compile.op import (
    PhaseSpec,
    phase_gemm_reference,
)
from fairy_compile.phase import PhaseTensor
from fairy_compile.targets import Target, host_features
from tests.kernels.cases import BOTH, ONLY_W, codebook_tolerance, make_parts, make_spec

CPUS = {
    "avx512amx": "sapphirerapids",
    "avx512vbmi": "icelake-server",
    "avx512vnni": "cascadelake",
    "avxvnni": "alderlake",
    "avx2": "haswell",
}
# The AMX kernel is that of AVX512-VBMI but for many tokens, see test_x86_amx.py.
HERE = [k for k in CODEBOOK_KERNELS if host_features().issuperset(k.isa.features) and not k.isa.amx]
# Of panels: mode, stages, terms, scale, activations.
CASES = [
    ("combined", 1, BOTH, "tensor", "int8"),
    ("combined", 2, BOTH, "tensor", "int8"),
    ("combined", 3, BOTH, "row", "int8"),
    ("combined", 2, BOTH, "tile64", "int8"),
    ("combined", 4, ONLY_W, "tensor", "int8"),
    ("joint", 2, BOTH, "tensor", "int8"),
    ("joint", 3, BOTH, "tensor", "int8"),
    ("split", 2, ONLY_W, "row", "int8"),
    ("split", 1, BOTH, "tile64", "int16"),
    ("combined", 2, BOTH, "row", "int16"),
    ("joint", 2, ONLY_W, "tensor", "int16"),
]

# Of tables: tables, stages, terms, scale, activations.
DECODE_CASES = [
    ("joint", 1, BOTH, "tensor", "int8"),
    ("joint", 2, BOTH, "tensor", "int8"),
    ("joint", 3, BOTH, "tensor", "int16"),
    ("joint", 4, ONLY_W, "tensor", "int8"),
    ("split", 1, ONLY_W, "tensor", "int8"),
    ("split", 2, BOTH, "tensor", "int8"),
    ("split", 2, BOTH, "row", "int8"),
    ("split", 3, BOTH, "tile64", "int8"),
    ("split", 4, BOTH, "row", "int16"),
]


def make_target(kernel: X86Codebook, features=None) -> Target:
    features = frozenset(kernel.isa.features if features is None else features)
    cpu = CPUS.get(kernel.isa.name, "haswell")  # others are emulated with AVX2
    return Target("test", "", {"kind": "llvm", "mcpu": cpu}, features, ())


@cache
def compiled(kernel: X86Codebook, spec: PhaseSpec, batch: str, knobs: tuple = ()):
    target = make_target(kernel)
    function = kernel.build(spec, target, batch, dict(knobs))
    library = tvm.compile(function, target=target.to_tvm())
    return library[function.attrs["global_symbol"]]


def run(kernel, spec, parts, x, batch="many", **knobs) -> np.ndarray:
    function = compiled(kernel, spec, batch, tuple(knobs.items()))
    arrays = kernel.layout.pack(parts, spec)
    y = tvm.runtime.tensor(np.full((len(x), spec.out_features), np.nan, np.float32))
    function(tvm.runtime.tensor(x), *map(tvm.runtime.tensor, arrays.values()), y)
    return y.numpy()


def check(kernel, spec, parts, x, batch="many", **knobs) -> None:
    """Compare with the reference, where panels or combined tables do, of the weights they hold."""
    got = run(kernel, spec, parts, x, batch, **knobs)
    panels = batch == "many" and len(x) >= MIN_TOKENS
    mode = kernel.table_mode(spec, "many" if panels else "single", knobs)
    stored = parts
    if panels or mode == "combined":
        stored = as_stored(kernel.isa, parts, mode)
    want = phase_gemm_reference(x, stored, spec.act)
    joint_limit = kernel.isa.joint_limit if mode == "joint" and not panels else None
    worst = np.max(np.abs(got - want) - codebook_tolerance(spec, stored, x, joint_limit))
    assert worst <= 0, f"off by {np.abs(got - want).max():.3g}, {worst:.3g} more than allowed"


def check_alone(kernel, spec, parts, x, **knobs) -> None:
    """Every row of batch ``decode`` is what batch ``single`` makes of it, bit for bit."""
    together = run(kernel, spec, parts, x, "decode", **knobs)
    for row, got in zip(x, together, strict=True):
        np.testing.assert_array_equal(
            got, run(kernel, spec, parts, row[None], "single", **knobs)[0]
        )


def check_extremes(kernel, code: int) -> None:
    """All products of a flush have one sign and full size, int16 activations of both digits."""
    for act in ("int8", "int16"):
        spec = make_spec(parts=(16,), m=128, act=act)
        parts, x = make_parts(spec, code=code), np.full((16, 256), 32639, np.float32)
        x[1::2, 1:] = 32512 - 128
        for value in (x, -x):
            for panels in kernel.knobs["panels"]:
                check(kernel, spec, parts, value, panels=panels, tokens=1)
            for tables in kernel.knobs["tables"]:
                check_alone(kernel, spec, parts, value, tables=tables)


def as_stored(isa: Isa, parts: list[PhaseTensor], mode: str) -> list[PhaseTensor]:
    """Return the layers with the scales that a table mode rounds theirs to."""
    return [
        PhaseTensor.from_codes(p.unpack(), _rounded(isa, p.scales, mode), p.terms, p.scale)
        for p in parts
    ]


def _rounded(isa: Isa, scales: np.ndarray, mode: str) -> np.ndarray:
    if mode in ("combined", "words"):
        vectors = np.moveaxis(scales.reshape(-1, *scales.shape[2:]), 0, -1)
        flat = vectors.reshape(-1, vectors.shape[-1])
        weights, units, _ = combine_scales(flat, WORD_LIMIT if mode == "words" else isa.joint_limit)
        near = (weights * units[:, None]).reshape(vectors.shape)
        return np.moveaxis(near, -1, 0).reshape(scales.shape)
    near = scales.copy()
    if mode == "joint":
        for stage in range(0, len(scales) - 1, 2):
            for at in np.ndindex(scales.shape[1:]):
                s1, s2 = (float(scales[(stage + i, *at)]) for i in (0, 1))
                p, q, _ = joint_ratio(s1, s2, isa.joint_limit)
                unit = (p * s1 + q * s2) / (p * p + q * q)
                near[(stage, *at)], near[(stage + 1, *at)] = p * unit, q * unit
    return near
