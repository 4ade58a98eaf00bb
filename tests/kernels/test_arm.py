"""The ARM kernels as far as any machine can tell: choice, layout, and the instructions emitted.

What they compute is tested under emulation, in tests/emulation.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.arm_static import (
    MULTIPLY,
    around_inner_loops,
    assembly,
    count,
    inner_loops,
    stack_accesses,
)
from fairy_compile.artifact.manifest import TargetInfo
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.kernels import FAMILIES
from fairy_compile.kernels.arm import CODEBOOK_KERNELS, DOTPROD, I8MM, NEON
from fairy_compile.kernels.arm_layout import ARM_LAYOUT, JOINT_LIMIT
from fairy_compile.kernels.x86_tables import joint_arrays, joint_offset, split_tables
from fairy_compile.op import PhaseSpec
from fairy_compile.runtime import machine
from fairy_compile.targets import Target, load_target
from tests.kernels.cases import BOTH, ONLY_W, make_parts, make_spec

each_isa = pytest.mark.parametrize("kernel", CODEBOOK_KERNELS, ids=lambda k: k.isa.name)


def make_target(features=("neon", "dotprod", "i8mm"), kind="llvm") -> Target:
    tvm_target = {"kind": kind, "mtriple": "aarch64-unknown-linux-gnu"}
    return Target("test", "", tvm_target, frozenset(features), ())


def picked(target: Target, spec: PhaseSpec):
    return next(k for k in CODEBOOK_KERNELS if k.unsupported(spec, target) is None)


@pytest.mark.parametrize(
    ("name", "isa"),
    [
        ("arm64-linux", DOTPROD),
        ("arm64-i8mm", I8MM),
        ("rpi5", DOTPROD),
        ("macos-cpu", DOTPROD),
        ("android-cpu", DOTPROD),
    ],
)
def test_arm_targets_get_their_best_kernel(name, isa):
    target = load_target(name)
    assert FAMILIES[target.kernels[0]] is CODEBOOK_KERNELS
    assert picked(target, make_spec()).isa is isa


def test_plain_neon_is_the_last_resort():
    assert picked(make_target({"neon"}), make_spec()).isa is NEON


@pytest.mark.parametrize(
    ("name", "host", "lacks"),
    [
        ("rpi5", {"neon", "crc"}, "dotprod, fullfp16"),  # Cortex-A72
        ("arm64-i8mm", {"neon", "crc", "dotprod", "fullfp16"}, "i8mm"),  # Cortex-A76
        ("arm64-linux", {"neon", "crc", "dotprod", "fullfp16"}, None),
    ],
)
def test_older_cores_are_refused_before_they_meet_an_unknown_instruction(
    monkeypatch, name, host, lacks
):
    target = load_target(name)
    features = tuple(sorted(target.features))
    manifest = SimpleNamespace(target=TargetInfo(name, "cpu", str(target.to_tvm()), features))
    monkeypatch.setattr("fairy_compile.targets.host_features", lambda: frozenset(host))
    if lacks is None:
        machine.check_features(manifest)
        return
    with pytest.raises(UnsupportedError, match=f"target {name}, whose .* lacks: {lacks};"):
        machine.check_features(manifest)


def test_unsupported_reasons():
    kernel, able = CODEBOOK_KERNELS[0], make_target()
    assert kernel.unsupported(make_spec(), able) is None
    assert kernel.unsupported(make_spec(), make_target({"neon"})).endswith("CPU features i8mm")
    assert "asks for float" in kernel.unsupported(make_spec(act="float"), able)
    assert "offsets" in kernel.unsupported(make_spec(parts=(1 << 20,), m=4096), able)
    assert "is for CPUs" in kernel.unsupported(make_spec(), make_target(kind="metal"))
    assert "lacks" in CODEBOOK_KERNELS[-1].unsupported(make_spec(), load_target("x86-64-v3"))


def test_unknown_knob_is_refused():
    with pytest.raises(FairyError, match=r"no knob tokens with the value 3; allowed: .*4, 2, 1"):
        CODEBOOK_KERNELS[0].build(make_spec(), make_target(), "many", {"tokens": 3})


@each_isa
def test_function_is_marked_as_scheduled(kernel):
    function = kernel.build(make_spec(), make_target(), "single", {})
    assert function.attrs["tirx.is_scheduled"]
    assert function.attrs["tirx.noalias"]
    name = f"phase_gemm_{kernel.isa.name}_n70_9_m200_t2_uw_tensor_combined_int8_single"
    assert function.attrs["global_symbol"] == name


@each_isa
def test_demands_name_the_fastest_accurate_tables(kernel):
    spec = make_spec()
    parts = make_parts(spec)
    for part in parts:
        part.scales[0], part.scales[1] = 2.0, 1.0
    assert kernel.demands(parts, spec) == {}
    parts[1].scales[:, :, 1] *= 0.9  # the axes stay proportional
    assert kernel.demands(parts, spec) == {}
    parts[1].scales[1, 0, 1] *= 1.1
    assert kernel.demands(parts, spec) == {"tables": "joint"}
    # The imaginary axis half-way between 1:0 and its neighbour 126:1.
    parts[1].scales[:, :, 1] = 2.0
    parts[1].scales[1, :, 1] *= np.tan(0.5 / 126)
    assert kernel.demands(parts, spec) == {"tables": "split"}
    assert kernel.demands(parts, make_spec(scale="row")) == {}


@each_isa
def test_int16_activations_want_exact_weights(kernel):
    spec = make_spec(act="int16")
    parts = make_parts(spec)
    for part in parts:
        part.scales[0], part.scales[1] = 2.0, 1.0
    assert kernel.demands(parts, spec) == {}  # small integers are exact
    parts[0].scales[1] *= 1.0007
    assert kernel.demands(parts, make_spec()) == {}
    assert kernel.demands(parts, spec) == {"tables": "split"}


def test_demands_of_one_stage():
    spec = make_spec(stages=1)
    parts = make_parts(spec)
    parts[0].scales[:], parts[1].scales[:] = 2.0, 1.0
    assert [k.demands(parts, spec) for k in CODEBOOK_KERNELS] == [{}, {}, {}]
    parts[1].scales[0, 1] = np.tan(0.5 / 126)
    demands = [k.demands(parts, spec) for k in CODEBOOK_KERNELS]
    assert demands == [{"tables": "split"}, {"tables": "split"}, {}]


def test_table_mode_falls_back_where_there_are_no_such_tables():
    i8mm, _, neon = CODEBOOK_KERNELS
    assert i8mm.table_mode(make_spec(), {}) == "combined"
    assert i8mm.table_mode(make_spec(stages=1), {}) == "combined"
    assert neon.table_mode(make_spec(stages=1), {}) == "split"
    assert i8mm.table_mode(make_spec(stages=3), {}) == "joint"
    assert i8mm.table_mode(make_spec(terms=ONLY_W), {}) == "joint"
    assert i8mm.table_mode(make_spec(scale="row"), {}) == "split"
    assert i8mm.table_mode(make_spec(stages=1), {"tables": "joint"}) == "split"


# Layout


@pytest.mark.parametrize("terms", [BOTH, ONLY_W], ids="".join)
@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_unpack_undoes_pack(terms, scale, stages):
    spec = make_spec(parts=(70, 9, 130), stages=stages, terms=terms, scale=scale)
    parts = make_parts(spec)
    arrays = ARM_LAYOUT.pack(parts, spec)
    for name, want in ARM_LAYOUT.arrays(spec).items():
        assert (arrays[name].shape, arrays[name].dtype) == (want.shape, want.dtype), name
    for part, back in zip(parts, ARM_LAYOUT.unpack(arrays, spec), strict=True):
        np.testing.assert_array_equal(back.codes, part.codes)
        np.testing.assert_array_equal(back.scales, part.scales)


def test_register_holds_two_rows_of_eight_columns():
    spec = make_spec(parts=(40,), scale="row")
    (part,) = make_parts(spec)
    packed, codes = ARM_LAYOUT.pack([part], spec)["codes"], part.unpack()
    registers = packed.reshape(*packed.shape[:3], 4, 2, 8)
    for row, column in [(0, 0), (17, 5), (39, 129)]:
        (u1, w1), (u2, w2) = codes[:, :, row, column]
        byte = registers[row // 8, column // 8, 0, row % 8 // 2, row % 2, column % 8]
        assert byte == u1 | u2 << 2 | w1 << 4 | w2 << 6


def test_bytes_of_signs():
    signs = {0: (0, 0), 1: (1, 0), 2: (1, 1), 3: (0, 1)}  # 1 is minus; code c is (s + t) / 2 ...
    spec = make_spec(parts=(40,))
    (part,) = make_parts(spec)
    packed, codes = ARM_LAYOUT.pack([part], spec)["codes"], part.unpack()
    registers = packed.reshape(*packed.shape[:3], 4, 2, 8)
    for row, column in [(0, 0), (17, 5), (39, 129)]:
        (u1, w1), (u2, w2) = ([signs[c] for c in of_term] for of_term in codes[:, :, row, column])
        byte = registers[row // 8, column // 8, 0, row % 8 // 2, row % 2, column % 8]
        low = [u1[0], u2[0], w1[0], w2[0]]
        high = [w1[1], w2[1], u1[1], u2[1]]
        assert byte == sum(bit << i for i, bit in enumerate(low + high))


def test_tables_are_signed():
    spec = make_spec(parts=(40,), stages=3)
    (part,) = make_parts(spec)
    arrays = ARM_LAYOUT.pack([part], spec)
    assert arrays["tables"].dtype == arrays["joint_tables"].dtype == np.int8
    np.testing.assert_array_equal(arrays["tables"], split_tables().astype(int) - 1)
    unsigned, scales = joint_arrays(part, JOINT_LIMIT)
    want = unsigned.astype(int) - joint_offset(JOINT_LIMIT)
    np.testing.assert_array_equal(arrays["joint_tables"], np.broadcast_to(want, (5, 4, 16)))
    np.testing.assert_array_equal(arrays["joint_scales"][0, 0], scales)


def test_tables_of_signs_hold_the_entries_of_the_codes():
    spec = make_spec(parts=(40,))
    (part,) = make_parts(spec)
    arrays = ARM_LAYOUT.pack([part], spec)
    s, t = np.array([1, -1, -1, 1]), np.array([1, 1, -1, -1])  # of codes 0..3
    for first, second in np.ndindex(4, 4):
        bits = [v[c] < 0 for v in (s, t) for c in (first, second)]
        index = sum(int(bit) << i for i, bit in enumerate(bits))
        code = first | second << 2
        np.testing.assert_array_equal(
            arrays["tables"][:, index], split_tables()[:, code].astype(int) - 1
        )
        want = joint_arrays(part, JOINT_LIMIT)[0][:, code].astype(int) - joint_offset(JOINT_LIMIT)
        np.testing.assert_array_equal(arrays["joint_tables"][0, :, index], want)


# Instructions


@each_isa
@pytest.mark.parametrize("batch", ["single", "many"])
def test_inner_loops_look_up_and_multiply_without_leaving_registers(kernel, batch):
    isa = kernel.isa.name
    spec = make_spec(parts=(256,), m=2048)
    loops = inner_loops(assembly(kernel, spec, batch), MULTIPLY[isa])
    assert loops
    for body in loops:
        assert count(body, "tbl")
        # A rare reload is what a scheduler makes of it; spilling the sums would be dozens.
        assert stack_accesses(body) <= 6
        others = [op for name, op in MULTIPLY.items() if name != isa]
        assert not any(count(body, op) for op in others)
    sums = 2 * 4 * kernel.isa.sums_per_quad // 2 * (2 if isa == "i8mm" else 1)
    if batch == "single":
        assert sum(count(body, MULTIPLY[isa]) for body in loops) == sums


@each_isa
@pytest.mark.parametrize("scale", ["tensor", "tile64"])
def test_short_loops_are_not_unrolled_into_spills(kernel, scale):
    spec = make_spec(parts=(256,), m=2048, stages=1, scale=scale)
    for body in inner_loops(assembly(kernel, spec), MULTIPLY[kernel.isa.name]):
        assert stack_accesses(body) <= 6


LOOPS = """
.LBB0_1:
\tmov\tx1, x2
.LBB0_2:
\t.loc\t1 2 3
\tsdot\tv0.4s, v1.16b, v2.16b
\tstr\tq0, [sp, #16]
\tb.ne\t.LBB0_2
\tsdot\tv0.4s, v1.16b, v2.16b
\tcbnz\tx1, .LBB0_1
\tret
"""


def test_inner_loops_are_backward_branches_to_their_own_block():
    (body,) = inner_loops(LOOPS, "sdot")
    assert (len(body), count(body, "sdot"), stack_accesses(body)) == (3, 1, 1)
    assert inner_loops(LOOPS, "smmla") == []


def test_around_inner_loops_is_the_rest_of_their_loop():
    around = around_inner_loops(LOOPS, "sdot")
    assert [line.split()[0] for line in around] == ["mov", "sdot", "cbnz"]
