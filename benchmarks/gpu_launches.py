"""The launches of one decode step of a 7B-shaped model on CUDA, and the bytes each moves.

Read from the module that is compiled, not measured: `python benchmarks/gpu_launches.py`. A launch's
bytes are those of its arrays. Attention is three launches of the KV cache: rotary embedding, the
append to the cache, and attention over it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

sys.path.insert(0, str(Path(__file__).parent))
from gpu_model_build import ENTRY_POINTS, define_model
from gpu_variants import CONTEXT, SHAPES, VARIANTS

from fairy_compile.compiler import pipeline
from fairy_compile.targets import load_target

ATTENTION = "attention_kv_cache_attention_with_fused_qkv"


@dataclass
class Launches:
    """What a step launches.

    Attributes:
        names: launches by the name of their function, in order of first use.
        nbytes: bytes they move, likewise.
    """

    names: Counter[str] = field(default_factory=Counter)
    nbytes: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, nbytes: int, count: int = 1) -> None:
        """Add launches that together move ``nbytes``."""
        self.names[name] += count
        self.nbytes[name] += nbytes


def fused_module(variant: str, shape: str, fuse_norms: bool) -> tvm.IRModule:
    """Return the module of a variant after operators have been fused."""
    target = load_target("cuda")
    module = define_model(VARIANTS[variant], SHAPES[shape], target)[0]
    phases = pipeline.phases(ENTRY_POINTS, target)
    if not fuse_norms:
        first = phases[0]
        phases[0] = replace(
            first, passes=tuple(p for p in first.passes if _name(p) != "FuseAddNorm")
        )
    with target.to_tvm(), tvm.transform.PassContext(opt_level=3):
        for phase in phases[:2]:
            module = tvm.transform.Sequential(list(phase.passes))(module)
    return module


def _name(one_pass: Any) -> str:
    return str(one_pass.info.name)


def launches(module: tvm.IRModule, context: int, kv_width: int) -> Launches:
    """Return what ``decode`` launches.

    Args:
        module: after fusion.
        context: tokens in the cache.
        kv_width: numbers of one layer's keys and values of a token, float16.
    """
    found = Launches()
    for block in module["decode"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            name = getattr(getattr(call, "op", None), "name", "")
            if name == "relax.call_tir":
                own = [_nbytes(x.ty) for x in call.args[1].fields] + [_nbytes(binding.var.ty)]
                found.add(_plain(call.args[0].name_hint), sum(own))
            elif name == "relax.call_dps_packed":
                qkv = _nbytes(call.args[1].fields[-1].ty)
                found.add("kv_cache: rotary embedding, append", 2 * qkv + 4 * kv_width, 2)
                found.add("kv_cache: attention", 2 * kv_width * context)
    return found


def _nbytes(ty: Any) -> int:
    if isinstance(ty, relax.TupleType):
        return sum(_nbytes(part) for part in ty.fields)
    shape = [int(d) for d in ty.shape]
    return int(np.prod(shape)) * np.dtype(str(ty.dtype)).itemsize


def _plain(name: str) -> str:
    """Return a kernel's name without its constants: what it is, and the size of the layer."""
    if not name.startswith("phase_gemm") and "peer" not in name:
        return name.rstrip("0123456789").removesuffix("_single")
    return name.split("_t")[0] if name.startswith("phase_gemm") else "_".join(name.split("_")[:7])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=list(VARIANTS), default="w2-int16")
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--keep-sums", action="store_true", help="sums and norms apart")
    arguments = parser.parse_args()
    if not 0 < arguments.context <= CONTEXT:
        sys.exit(f"--context is {arguments.context}; allowed: 1 to {CONTEXT}")
    shape = SHAPES[arguments.shape]
    module = fused_module(arguments.variant, arguments.shape, not arguments.keep_sums)
    found = launches(module, arguments.context, 2 * shape["hidden_size"])
    print("| function | launches | MB in all |\n|---|---|---|")
    for name, count in found.names.items():
        print(f"| {name} | {count} | {found.nbytes[name] / 1e6:.3f} |")
    total, nbytes = sum(found.names.values()), sum(found.nbytes.values())
    print(f"| all | {total} | {nbytes / 1e6:.1f} |")


if __name__ == "__main__":
    main()
