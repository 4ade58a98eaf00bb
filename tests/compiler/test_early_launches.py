"""Early launches: every kernel waits for the one before, phase kernels where they say."""

from __future__ import annotations

import re

import tvm
from tvm import te

from fairy_compile.compiler.device_pipeline import EARLY_PIPELINE, tir_pipeline
from fairy_compile.compiler.early_launches import TAG
from fairy_compile.kernels.cuda_hopper import CudaHopper
from fairy_compile.targets import load_target
from tests.kernels.test_cuda_hopper import SPEC


def compile_functions(**functions) -> str:
    target = load_target("cuda-hopper")
    module = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()})
    library = tvm.compile(module, target=target.to_tvm(), tir_pipeline=tir_pipeline(target))
    return library.mod.imports[0].inspect_source("cuda")


def bodies(source: str) -> dict[str, str]:
    found = re.findall(r'extern "C" __global__[^{;]*?(\w+)\([^{;]*\{\n(.*?)\n\}', source, re.DOTALL)
    return dict(found)


def add_one():
    x = te.placeholder((64,), "float32", name="x")
    y = te.compute((64,), lambda i: x[i] + 1.0, name="y")
    schedule = tvm.s_tir.Schedule(te.create_prim_func([x, y]))
    block, thread = schedule.split(schedule.get_loops("y")[0], [None, 32])
    schedule.bind(block, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    return schedule.mod["main"]


def test_only_hopper_asks_for_them():
    assert tir_pipeline(load_target("cuda-hopper")) == EARLY_PIPELINE
    assert tir_pipeline(load_target("cuda")) == "default"


def test_kernels_wait_before_anything_else():
    (body,) = bodies(compile_functions(add_one=add_one())).values()
    assert body.lstrip().startswith("fairy_wait_for_inputs();")


def test_phase_kernels_wait_themselves():
    phase = CudaHopper().build(SPEC, load_target("cuda-hopper"), "many", {})
    kernels = bodies(compile_functions(phase=phase, add_one=add_one()))
    own = [body for body in kernels.values() if "fairy_wait_for_inputs" not in body]
    assert len(kernels) - len(own) == 1
    for body in own:
        assert re.search(r"^\s*(decode|prefill|hopper|arrange_hopper)_\w+\(", body, re.MULTILINE)


def test_programs_wait_once():
    """What `WAIT_THEMSELVES` promises: each program waits, after what it may read before."""
    for launch in CudaHopper().launches(SPEC, "many", {}):
        waits = launch.source.count("wait_for_inputs();")
        # Of the program, of what runs before it and of what runs after it.
        assert waits == 1 + (launch.arrange is not None) + (launch.add is not None)


def test_launches_are_tagged(tmp_path):
    target = load_target("cuda-hopper")
    module = tvm.IRModule({"f": add_one().with_attr("global_symbol", "f")})
    library = tvm.compile(module, target=target.to_tvm(), tir_pipeline=tir_pipeline(target))
    path = tmp_path / "library.so"
    library.export_library(str(path))
    assert TAG.encode() in path.read_bytes()
