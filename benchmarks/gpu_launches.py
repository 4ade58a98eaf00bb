"""The launches of one decode step of a 7B-shaped model on CUDA, and the bytes each moves.

Read from the module that is compiled, not measured: `python benchmarks/gpu_launches.py`. A launch's
bytes are those of its arrays, of the cache those it reads. Attention takes another launch for the
parts of contexts of more than 256 tokens.
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
from gpu_model_build import define_model, entry_points
from gpu_variants import CONTEXT, SHAPES, VARIANTS

from fairy_compile.artifact.contract import DECODE_PAGES
from fairy_compile.compiler import pipeline
from fairy_compile.targets import load_target

_ONE_PART = 256  # tokens


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
    phases = pipeline.phases(entry_points(VARIANTS[variant]), target)
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
    """Return what ``decode_pages`` launches.

    Args:
        module: after fusion.
        context: tokens in the cache.
        kv_width: numbers of one layer's keys and values of a token, float16.
    """
    found = Launches()
    for block in module[DECODE_PAGES].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if getattr(getattr(call, "op", None), "name", "") != "relax.call_tir":
                continue
            name, arguments = _plain(call.args[0].name_hint), call.args[1].fields
            if name == "attention_pages":
                found.add(name, 2 * kv_width * context, 1 if context <= _ONE_PART else 2)
                continue
            own = [_nbytes(binding.var.ty)]
            # Of the embedding one row is read; of pages, whose number is a symbol, none.
            own += own if name == "embed_tokens" else [_nbytes(x.ty) for x in arguments]
            found.add(name, sum(own) + (2 * kv_width if name == "rotate_append" else 0))
    return found


def _nbytes(ty: Any) -> int:
    if isinstance(ty, relax.TupleType):
        return sum(_nbytes(part) for part in ty.fields)
    shape = list(ty.shape)
    if not all(hasattr(d, "value") for d in shape):
        return 0
    return int(np.prod([int(d) for d in shape])) * np.dtype(str(ty.dtype)).itemsize


def _plain(name: str) -> str:
    """Return a kernel's name without its constants: what it is, and the size of the layer."""
    if not name.startswith("phase_gemm") and "peer" not in name:
        return name.rstrip("0123456789").removesuffix("_single")
    return name.split("_t")[0] if name.startswith("phase_gemm") else "_".join(name.split("_")[:7])


_WITH_PAGES = [name for name, variant in VARIANTS.items() if variant.pages]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=_WITH_PAGES, default="w2-int16")
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
