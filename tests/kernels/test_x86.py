"""The x86 kernels against the NumPy reference, on every instruction set this machine has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fairy_compile.errors import FairyError
from fairy_compile.kernels.x86 import AVX2, AVX512_VBMI, X86Codebook
from fairy_compile.kernels.x86_tables import joint_ratio_error
from fairy_compile.op import quantize_activations
from fairy_compile.targets import Target
from tests.kernels.cases import ONLY_W, make_parts, make_spec, make_x
from tests.kernels.x86_cases import HERE, check, check_alone, make_target, run

KERNEL_AVX2 = X86Codebook(AVX2)
each_isa = pytest.mark.parametrize("kernel", HERE, ids=lambda k: k.isa.name)


@each_isa
@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_single_matches_reference(kernel, stages, scale):
    spec = make_spec(stages=stages, scale=scale)
    check(kernel, spec, make_parts(spec), make_x(spec), "single", tables="split")


@each_isa
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_joint_tables_stay_within_the_ratio_bound(kernel, stages):
    spec = make_spec(stages=stages)
    assert kernel.table_mode(spec, "single", {"tables": "joint"}) == "joint"
    check(kernel, spec, make_parts(spec), make_x(spec), "single", tables="joint")


@each_isa
@pytest.mark.parametrize("act", ["int8", "int16"])
def test_decode_computes_every_row_as_if_alone(kernel, act):
    spec = make_spec(act=act)
    check_alone(kernel, spec, make_parts(spec), make_x(spec, kernel.decode_from + 12))


def test_combined_tables():
    """AVX2 alone has them; with int16 activations, too, where weights are near enough."""
    for act in ("int8", "int16"):
        spec = make_spec(act=act)
        assert KERNEL_AVX2.table_mode(spec, "single", {}) == "combined"
        for batch in (1, 2, 5, 8):
            x = make_x(spec, batch)
            check(KERNEL_AVX2, spec, make_parts(spec), x, "single" if batch == 1 else "many")


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_combined_sums_do_not_overflow(code):
    spec = make_spec()
    parts = make_parts(spec, code=code)
    for signs in ((1, 1), (1, -1), (-1, 1)):
        x = np.repeat(np.array([signs], np.float32), spec.m, axis=1)
        check(KERNEL_AVX2, spec, parts, x, "single", tables="combined")


def test_combined_tables_need_two_stages_of_both_terms():
    for spec in (make_spec(stages=3), make_spec(terms=ONLY_W), make_spec(scale="row")):
        assert KERNEL_AVX2.table_mode(spec, "single", {}) != "combined"
    assert X86Codebook(AVX512_VBMI).table_mode(make_spec(), "single", {}) == "joint"


@each_isa
def test_joint_tables_of_u_and_w_serve_every_batch(kernel):
    spec = make_spec(stages=1)
    for batch in (2, 5, 17):
        check(kernel, spec, make_parts(spec), make_x(spec, batch), "many", tables="joint")


@each_isa
def test_one_term_has_no_pair_of_terms(kernel):
    spec = make_spec(stages=1, terms=("W",))
    assert kernel.table_mode(spec, "single", {}) == "split"


@each_isa
@pytest.mark.parametrize(
    ("stages", "scale"), [(1, "tensor"), (2, "row"), (3, "tensor"), (4, "tile64")]
)
def test_w_only_is_w_times_conjugate_x(kernel, stages, scale):
    spec = make_spec(stages=stages, scale=scale, terms=ONLY_W)
    check(kernel, spec, make_parts(spec), make_x(spec), "single", tables="split")
    if scale == "tensor" and stages > 1:
        check(kernel, spec, make_parts(spec), make_x(spec), "single", tables="joint")


@each_isa
@pytest.mark.parametrize(("stages", "scale"), [(1, "tile64"), (2, "tensor"), (2, "row")])
def test_batches(kernel, stages, scale):
    spec = make_spec(stages=stages, scale=scale)
    parts = make_parts(spec)
    for batch in (1, 2, 17, 64):
        check(kernel, spec, parts, make_x(spec, batch))


@each_isa
@pytest.mark.parametrize(
    ("stages", "scale", "tables"),
    [(2, "tensor", "joint"), (2, "tensor", "split"), (1, "row", "split")],
)
def test_int16_activations(kernel, stages, scale, tables):
    spec = make_spec(stages=stages, scale=scale, act="int16")
    check(kernel, spec, make_parts(spec), make_x(spec), "single", tables=tables)


def test_int16_batch():
    spec = make_spec(act="int16")
    check(HERE[0], spec, make_parts(spec), make_x(spec, 7), tables="split")


@each_isa
@pytest.mark.parametrize("code", [0, 1])
def test_int16_sums_do_not_overflow(kernel, code):
    """All products have one sign; both digits are 127, or 127 and -128."""
    spec = make_spec(act="int16")
    parts = make_parts(spec, code=code)
    for second in (32639, 32512 - 128):
        x = np.full((1, 2 * spec.m), second, np.float32)
        x[0, ::128] = 32639
        for value in (x, -x):
            for tables in ("split", "joint"):
                check(kernel, spec, parts, value, "single", tables=tables)


@each_isa
def test_batch_rows_equal_single_rows(kernel):
    spec = make_spec()
    parts, x = make_parts(spec), make_x(spec, 6)
    together = run(kernel, spec, parts, x)
    alone = [run(kernel, spec, parts, row[None], "single") for row in x]
    # The same sums in the same order; only contraction to fused multiply-add may differ.
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", [AVX512_VBMI, AVX2], ids=lambda i: i.name)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 3), (17, 130), (100, 128)])
def test_odd_sizes(isa, n, m):
    kernel = next((k for k in HERE if k.isa is isa), None)
    if kernel is None:
        pytest.skip(f"this machine has no {isa.name}")
    spec = make_spec(parts=(n,), m=m)
    check(kernel, spec, make_parts(spec), make_x(spec), "single")


@each_isa
@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_equal_codes_and_equal_activations(kernel, code):
    """Every product of a group has one sign and full size: what would overflow int16 sums."""
    spec = make_spec()
    parts = make_parts(spec, code=code)
    for value in (1.0, -3.0):
        x = np.full((1, 2 * spec.m), value, np.float32)
        for tables in ("split", "joint"):
            check(kernel, spec, parts, x, "single", tables=tables)


@each_isa
def test_zero_activations_give_zero(kernel):
    spec = make_spec()
    x = np.zeros((3, 2 * spec.m), np.float32)
    assert np.array_equal(run(kernel, spec, make_parts(spec), x), np.zeros((3, spec.out_features)))


@each_isa
def test_outlier_and_zero_groups(kernel):
    spec = make_spec()
    x = make_x(spec, 2)
    x[0, 7] = 1e4
    x[1, :128] = 0
    check(kernel, spec, make_parts(spec), x)


@each_isa
def test_ties_round_to_even(kernel):
    """With a peak of 127 the scale is 1, so halves are ties; rounding them away shows in y."""
    spec = make_spec()
    half = np.arange(spec.m) % 127 + 0.5
    half[::100] = 127
    x = np.concatenate([half, -half])[None].astype(np.float32)
    assert (quantize_activations(x)[0][0, 0, 1:4] == [2, 2, 4]).all()
    check(kernel, spec, make_parts(spec, code=0), x, "single", tables="split")


@pytest.mark.parametrize("knobs", [{"tokens": 1}, {"tokens": 2}, {"prefetch": 0}], ids=str)
def test_knobs_do_not_change_results(knobs):
    kernel = HERE[0]
    spec = make_spec()
    parts, x = make_parts(spec), make_x(spec, 7)
    np.testing.assert_allclose(
        run(kernel, spec, parts, x, **knobs), run(kernel, spec, parts, x), rtol=1e-5, atol=1e-6
    )


def test_unknown_knob_is_refused():
    spec = make_spec()
    with pytest.raises(FairyError, match=r"no knob tokens with the value 3; allowed: .*4, 2, 1"):
        HERE[0].build(spec, make_target(HERE[0]), "many", {"tokens": 3})


def test_function_is_marked_as_scheduled():
    knobs = {"tables": "joint"}
    function = HERE[0].build(make_spec(), make_target(HERE[0]), "single", knobs)
    assert function.attrs["tirx.is_scheduled"]
    assert function.attrs["tirx.noalias"]
    name = f"phase_gemm_{HERE[0].isa.name}_n70_9_m200_t2_uw_tensor_joint_int8_single"
    assert function.attrs["global_symbol"] == name


def test_unsupported_reasons():
    kernel = X86Codebook(AVX512_VBMI)
    able = make_target(kernel)
    assert kernel.unsupported(make_spec(), able) is None
    old = make_target(kernel, {"avx2", "avx512bw"})
    assert kernel.unsupported(make_spec(), old).endswith("avx512vnni, avx512vbmi")
    assert kernel.unsupported(make_spec(act="int16"), able) is None
    assert "asks for float" in kernel.unsupported(make_spec(act="float"), able)
    assert "offsets" in kernel.unsupported(make_spec(parts=(1 << 20,), m=4096), able)
    gpu = Target("gpu", "", {"kind": "cuda"}, able.features, ())
    assert "is for CPUs" in kernel.unsupported(make_spec(), gpu)


def test_int16_takes_joint_tables_only_where_they_are_nearly_exact():
    kernel, spec = X86Codebook(AVX512_VBMI), make_spec(parts=(70,))
    (part,) = make_parts(spec)
    part.scales[1] = part.scales[0] / 2  # a ratio of small integers
    accurate = replace(spec, act="int16")
    assert kernel.demands([part], accurate) == {"panels": "joint"}  # combined ones are not
    part.scales[1] *= 1.01
    assert 3e-5 < joint_ratio_error([part], 127) < 1e-3
    assert kernel.demands([part], spec) == {}
    assert kernel.demands([part], accurate) == {"tables": "split", "panels": "split"}
