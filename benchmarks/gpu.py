"""Phase kernels on a CUDA GPU: numbers first, then times beside float16 and the copy bandwidth.

Two steps, so that the GPU machine needs no compiler:

    python benchmarks/gpu.py build --target cuda-hopper -o gpu-kernels   # any machine with nvcc
    python benchmarks/gpu.py run gpu-kernels -o results/gpu              # the GPU machine

`run` needs torch for CUDA, the apache-tvm-ffi wheel, and of the apache-tvm wheel no more than
libtvm_runtime.so and libtvm_runtime_cuda.so (TVM_LIBRARY_PATH names their folder). It stops if a
kernel is wrong: it compares rows of every call with the float64 reference on fresh random data.
Then it times the phase kernel, the float16 kernel of the same compiler and cuBLAS in float16, all
in CUDA graphs whose launches take other weights in turn, so that none is found in the L2 cache.
One row of x is timed twice: in float16, and as the integers that norms and gates of a model leave
to its layers. It writes results as it goes: JSON, a table and a plot. Whole models, beside 4 bits
of the same compiler: `gpu_model.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairy_compile.op import PhaseSpec

SHAPES = {  # (output, input) features
    "7b-o": (4096, 4096),
    "7b-gate-up": (22016, 4096),
    "7b-down": (4096, 11008),
    "13b-o": (5120, 5120),
    "13b-gate-up": (27648, 5120),
    "13b-down": (5120, 13824),
    "70b-o": (8192, 8192),
    "70b-gate-up": (57344, 8192),
    "70b-down": (8192, 28672),
}
BATCHES = (1, 2, 8, 64, 512, 2048)


def make_spec(shape: tuple[int, int], stages: int, act: str) -> PhaseSpec:
    """Return the call of a layer with tensor scales."""
    from fairy_compile.op import PhaseSpec

    features, size = shape
    both = ("U", "W")
    return PhaseSpec((features // 2,), size // 2, stages, both, "tensor", act, "float16", "float16")


def build(arguments: argparse.Namespace) -> None:
    """Compile the library and write what is in it."""
    import tvm

    from fairy_compile.compiler.cuda_binary import machine_code
    from fairy_compile.compiler.device_pipeline import tir_pipeline
    from fairy_compile.kernels import FAMILIES
    from fairy_compile.kernels.dense_gpu import build_dense
    from fairy_compile.models.linear import LinearCall
    from fairy_compile.targets import load_target

    target = load_target(arguments.target)
    if arguments.arch:
        target = replace(target, extra={**target.extra, "archs": arguments.arch})
    (kernel,) = FAMILIES[target.kernels[0]]
    knobs = dict(_knob(text) for text in arguments.knob or ())
    functions, calls = {}, []
    for name in arguments.shape or SHAPES:
        features, size = SHAPES[name]
        dense = LinearCall(
            name, (name,), size, (features,), False, "", dtype="float16", act_dtype="float16",
            out_dtype="float16",
        )  # fmt: skip
        for batch in ("single", "many"):
            functions[symbol("dense", name, batch)] = build_dense(dense, target.limits, batch)
        for stages in arguments.stages:
            spec = make_spec((features, size), stages, arguments.act)
            calls.append({"shape": name, "spec": asdict(spec)})
            for batch in ("single", "many"):
                function = kernel.build(spec, target, batch, knobs)
                functions[symbol(f"phase{stages}", name, batch)] = function
            function = kernel.build_from_image(spec, knobs)
            functions[symbol(f"phase{stages}", name, "image")] = function
    module = tvm.IRModule({s: f.with_attr("global_symbol", s) for s, f in functions.items()})
    with machine_code(target):
        library = tvm.compile(module, target=target.to_tvm(), tir_pipeline=tir_pipeline(target))
    arguments.output.mkdir(parents=True, exist_ok=True)
    library.export_library(str(arguments.output / "kernels.so"))
    contents = {
        "target": target.name,
        "kernel": kernel.name,
        "knobs": knobs,
        "decode_rows": kernel.knobs["switch"][0] - 1,
        "calls": calls,
    }
    (arguments.output / "calls.json").write_text(json.dumps(contents, indent=1), "utf-8")


def _knob(text: str) -> tuple[str, int | str]:
    name, _, value = text.partition("=")
    return name, int(value) if value.isdigit() else value


def symbol(kind: str, shape: str, batch: str) -> str:
    """Return the name of a function of the library."""
    return f"{kind}_{shape.replace('-', '_')}_{batch}"


def run(arguments: argparse.Namespace) -> None:
    """Check and time every call of a library."""
    import gpu_report
    import gpu_run
    import torch

    from fairy_compile.op import PhaseSpec

    library = gpu_run.load_library(arguments.library / "kernels.so")
    contents = json.loads((arguments.library / "calls.json").read_text("utf-8"))
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "target": contents["target"],
        "kernel": contents["kernel"],
        "knobs": contents.get("knobs", {}),
        "copy_gb_per_s": gpu_run.copy_bandwidth() / 1e9,
        "rows": [],
    }
    gpu_report.print_head(results)
    weights, over = gpu_run.Weights(), gpu_run.until(arguments.seconds)
    peers: dict[tuple[str, int], dict[str, Any]] = {}
    for call in contents["calls"]:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in call["spec"].items()}
        spec, shape = PhaseSpec(**fields), call["shape"]
        integers = [(1, True)] if 1 in arguments.batch else []
        for batch, image in gpu_run.within(
            sorted([*((n, False) for n in arguments.batch), *integers]), over
        ):
            kind = "single" if batch == 1 else "many"
            if (shape, batch) not in peers:
                dense = library[symbol("dense", shape, kind)]
                peers[shape, batch] = {
                    "dense": gpu_run.measure_dense(dense, SHAPES[shape], batch, weights),
                    "cublas": gpu_run.measure_dense(
                        gpu_run.torch_matmul, SHAPES[shape], batch, weights
                    ),
                }
            phase = library[symbol(f"phase{spec.stages}", shape, "image" if image else kind)]
            decodes = batch <= contents["decode_rows"]
            row = {"call": shape, "stages": spec.stages, "act": spec.act, "batch": batch}
            row |= {"image": image} | peers[shape, batch]
            row["phase"] = gpu_run.measure_phase(phase, spec, batch, decodes, weights, image=image)
            results["rows"].append(row)
            gpu_report.print_row(results, row)
            if arguments.output:
                gpu_report.write_json(results, arguments.output)
    if over():
        print(f"stopped after {arguments.seconds} s; the rest was not measured", file=sys.stderr)
    if arguments.output:
        gpu_report.write(results, arguments.output)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    builder = verbs.add_parser("build")
    builder.add_argument("-o", "--output", type=Path, required=True)
    builder.add_argument("--target", default="cuda", help="cuda, cuda-hopper")
    builder.add_argument("--shape", action="append", choices=list(SHAPES))
    builder.add_argument("--stages", type=int, nargs="+", default=[2, 1])
    builder.add_argument("--act", choices=["int8", "int16"], default="int16")
    builder.add_argument("--knob", action="append", help="of phase kernels, e.g. warps=16")
    builder.add_argument("--arch", action="append", help="default: those of the target file")
    builder.set_defaults(verb=build)
    runner = verbs.add_parser("run")
    runner.add_argument("library", type=Path)
    runner.add_argument("-o", "--output", type=Path, help="PATH.json, PATH.md, PATH.png")
    runner.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    runner.add_argument("--seconds", type=float, help="stop then, after the call under way")
    runner.set_defaults(verb=run)
    arguments = parser.parse_args()
    arguments.verb(arguments)


if __name__ == "__main__":
    main()
