"""The ARM kernels against the NumPy reference, on CPUs that QEMU emulates."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

import fairy_compile as fc
from fairy_compile.kernels.arm import CODEBOOK_KERNELS
from fairy_compile.op import phase_gemm_reference, quantize_activations
from tests.emulation import arm_rig
from tests.emulation.arm_cases import computed, tolerance
from tests.kernels.cases import BOTH, ONLY_W, make_parts, make_spec, make_x
from tests.tiny_models import save_model

missing = arm_rig.missing_tools()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing is not None, reason=str(missing))]
each_machine = pytest.mark.parametrize("machine", arm_rig.MACHINES, ids=lambda m: m.isa)


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Return compile(machine, spec, batch, knobs) -> program; every kernel is compiled once."""
    directory, known = tmp_path_factory.mktemp("kernels"), {}

    def compile_once(machine, spec, batch, knobs):
        key = (machine, spec, batch, tuple(knobs.items()))
        if key not in known:
            function = kernel_of(machine).build(spec, machine.target(), batch, knobs)
            folder = directory / str(len(known))
            folder.mkdir()
            known[key] = arm_rig.compile_kernel(function, machine.target(), folder)
        return known[key]

    return compile_once


def kernel_of(machine):
    """Return what a compiler would pick for the machine."""
    spec, target = make_spec(), machine.target()
    kernel = next(k for k in CODEBOOK_KERNELS if k.unsupported(spec, target) is None)
    assert kernel.isa.name == machine.isa
    return kernel


def run(programs, machine, spec, parts, x, batch="many", **knobs) -> np.ndarray:
    program = programs(machine, spec, batch, knobs)
    arrays = kernel_of(machine).layout.pack(parts, spec)
    y = np.full((len(x), spec.out_features), np.nan, np.float32)
    return arm_rig.run(program, machine.cpu, [x, *arrays.values(), y])


def check(programs, machine, spec, parts, x, batch="many", **knobs) -> None:
    got = run(programs, machine, spec, parts, x, batch, **knobs)
    kernel = kernel_of(machine)
    mode = kernel.table_mode(spec, knobs)
    parts = computed(parts, mode, kernel.isa.terms)
    want = phase_gemm_reference(x, parts, spec.act)
    allowed = tolerance(spec, parts, x, mode)
    worst = np.max(np.abs(got - want) - allowed)
    assert worst <= 0, f"off by {np.abs(got - want).max():.3g}, {worst:.3g} more than allowed"


@each_machine
@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("terms", [BOTH, ONLY_W], ids="".join)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_single_matches_reference(programs, machine, stages, terms, scale):
    spec = make_spec(stages=stages, terms=terms, scale=scale)
    check(programs, machine, spec, make_parts(spec), make_x(spec), "single", tables="split")


@each_machine
@pytest.mark.parametrize("terms", [BOTH, ONLY_W], ids="".join)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_joint_tables_stay_within_the_ratio_bound(programs, machine, stages, terms):
    spec = make_spec(stages=stages, terms=terms)
    knobs = {"tables": "joint"}
    assert kernel_of(machine).table_mode(spec, knobs) == "joint"
    check(programs, machine, spec, make_parts(spec), make_x(spec), "single", **knobs)
    for batch in (1, 17):
        check(programs, machine, spec, make_parts(spec), make_x(spec, batch), **knobs)


@each_machine
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 17])
def test_combined_tables(programs, machine, stages, batch):
    spec = make_spec(stages=stages)
    combined = stages == 2 or machine.isa != "neon"
    assert kernel_of(machine).table_mode(spec, {}) == ("combined" if combined else "split")
    check(programs, machine, spec, make_parts(spec), make_x(spec, batch))
    check(programs, machine, spec, make_parts(spec), make_x(spec), "single")


@each_machine
@pytest.mark.parametrize("terms", [BOTH, ONLY_W], ids="".join)
@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_batches(programs, machine, stages, scale, terms):
    spec = make_spec(stages=stages, scale=scale, terms=terms)
    parts = make_parts(spec)
    for batch in (1, 2, 9, 17, 33, 64):
        check(programs, machine, spec, parts, make_x(spec, batch))


@each_machine
@pytest.mark.parametrize("tables", ["combined", "joint", "split"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_int16_activations(programs, machine, stages, tables):
    spec = make_spec(stages=stages, act="int16")
    parts = make_parts(spec)
    for batch in (1, 2, 9):
        check(programs, machine, spec, parts, make_x(spec, batch), tables=tables)
    check(programs, machine, spec, parts, make_x(spec), "single", tables=tables)


@each_machine
def test_tokens_knob(programs, machine):
    spec = make_spec()
    for tokens in kernel_of(machine).knobs["tokens"]:
        check(programs, machine, spec, make_parts(spec), make_x(spec, 7), tokens=tokens)


@each_machine
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 3), (12, 130), (72, 128)])
def test_odd_sizes(programs, machine, n, m):
    spec = make_spec(parts=(n,), m=m)
    check(programs, machine, spec, make_parts(spec), make_x(spec), "single")


@each_machine
def test_three_fused_parts_of_a_size_that_streams(programs, machine):
    spec = make_spec(parts=(256, 64, 65), m=640)
    check(programs, machine, spec, make_parts(spec), make_x(spec), "single")


@each_machine
@pytest.mark.parametrize("code", [0, 1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2])
def test_equal_codes_and_equal_activations(programs, machine, stages, code):
    """Every product of a group has one sign and full size: what would overflow int16 sums."""
    for act in ("int8", "int16"):
        spec = make_spec(parts=(12,), stages=stages, act=act)
        parts = make_parts(spec, code=code)
        parts[0].scales[:] = 0.02  # so that the tables of both terms are as large as can be
        x = np.full((1, 2 * spec.m), 32639, np.float32)
        x[:, 1:] -= 255 if act == "int16" else 0  # low digits of -128
        for value in (x, -x):
            for tables in ("combined", "joint", "split"):
                check(programs, machine, spec, parts, value, "single", tables=tables)


@each_machine
def test_zero_outlier_and_zero_groups(programs, machine):
    spec = make_spec()
    x = make_x(spec, 3)
    x[0, 7] = 1e4
    x[1, :128] = 0
    x[2] = 0
    got = run(programs, machine, spec, make_parts(spec), x)
    assert np.array_equal(got[2], np.zeros(spec.out_features))
    check(programs, machine, spec, make_parts(spec), x)


@each_machine
def test_ties_round_to_even(programs, machine):
    """With a peak of 127 the scale is 1, so halves are ties; rounding them away shows in y."""
    spec = make_spec()
    half = np.arange(spec.m) % 127 + 0.5
    half[::100] = 127
    x = np.concatenate([half, -half])[None].astype(np.float32)
    assert (quantize_activations(x)[0][0, 0, 1:4] == [2, 2, 4]).all()
    check(programs, machine, spec, make_parts(spec, code=0), x, "single", tables="split")


@pytest.mark.parametrize(("isa", "cpu"), [("dotprod", "cortex-a72"), ("i8mm", "cortex-a76")])
def test_older_cpus_really_lack_the_instructions(programs, isa, cpu):
    """What the feature check at load time prevents; it also shows that the kernels use them."""
    machine = next(m for m in arm_rig.MACHINES if m.isa == isa)
    spec = make_spec(parts=(8,))
    program = programs(machine, spec, "single", {})
    arrays = kernel_of(machine).layout.pack(make_parts(spec), spec)
    y = np.zeros((1, spec.out_features), np.float32)
    with pytest.raises(arm_rig.IllegalInstruction):
        arm_rig.run(program, cpu, [make_x(spec), *arrays.values(), y])


@pytest.mark.parametrize(
    ("target", "isa", "instruction"),
    [("arm64-linux", "dotprod", "sdot"), ("arm64-i8mm", "i8mm", "smmla")],
)
def test_whole_model_is_built_from_these_kernels(tmp_path, target, isa, instruction):
    """Compiled and disassembled only: a whole model needs TVM's runtime for ARM."""
    model = save_model(tmp_path / "model", "llama", num_hidden_layers=1)
    report = fc.build(model, target=target, output=tmp_path / "out", context=64)
    assert set(report.kernels()) == {f"arm.codebook.{isa}"}
    command = ["aarch64-linux-gnu-objdump", "-d", str(tmp_path / "out" / "model.so")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"\t{instruction}\t" in text
