"""A task's inputs and bounds: right kernels pass with every knob, wrong numbers do not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fairy_compile.kernels import FAMILIES
from fairy_compile.op import PhaseSpec, phase_gemm_reference
from fairy_compile.targets import load_target
from fairy_compile.tune.builder import SYMBOL, Builder, BuildRequest
from fairy_compile.tune.local import LocalCpu
from fairy_compile.tune.measure import SEARCH, Measured, Measurer, MeasureRequest, Unfit, Wrong
from fairy_compile.tune.problem import make_parts, make_problem
from fairy_compile.tune.space import Space
from fairy_compile.tune.tasks import Task

HERE = load_target("cpu")
KERNELS = [k for family in FAMILIES.values() for k in family]


def make_spec(stages=2, scale="tensor", act="int8", parts=(70, 9), m=200) -> PhaseSpec:
    return PhaseSpec(parts, m, stages, ("U", "W"), scale, act)


def test_weights_demand_nothing_of_any_kernel():
    for stages, scale, act in itertools.product((1, 2, 3, 4), ("tensor", "row"), ("int8", "int16")):
        spec = make_spec(stages, scale, act)
        parts = make_parts(spec)
        for kernel in KERNELS:
            assert kernel.demands(parts, spec) == {}, (kernel.name, spec)


def test_expected_is_the_reference():
    spec = make_spec(scale="tile64", parts=(600, 9))
    task = Task("generic", spec, "many", (3,))
    x = make_problem(task).x[3]
    want = phase_gemm_reference(x, make_parts(spec), "int8")
    np.testing.assert_allclose(make_problem(task).expected[3], want, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_are_right_and_others_wrong(dtype):
    spec = replace(make_spec(act="float"), dtype=dtype, out_dtype=dtype)
    problem = make_problem(Task("generic", spec, "many", (3,)))
    rounded = [part.dequantize().astype(dtype).astype(np.float64) for part in make_parts(spec)]
    y = problem.x[3].astype(np.float64) @ np.concatenate(rounded).T
    assert problem.error(3, y.astype(dtype)) is None
    y[1, 2] += 2 * problem.bound[3][1, 0] + 0.1 * abs(y[1, 2])
    assert "1 of" in problem.error(3, y.astype(dtype))


@pytest.mark.parametrize(
    ("act", "rows"),
    [
        ("int8", (1,)),
        ("float", (3, 13)),
        pytest.param("int8", (3, 13), marks=pytest.mark.slow),
        pytest.param("int16", (3, 13), marks=pytest.mark.slow),
    ],
)
def test_every_setting_of_a_kernel_is_right(tmp_path, act, rows):
    spec = make_spec(act=act)
    kernel = next(
        k for name in HERE.kernels for k in FAMILIES[name] if not k.unsupported(spec, HERE)
    )
    task = Task(kernel.name, spec, "single" if rows == (1,) else "many", rows)
    space, builder, device = Space.of(task), Builder(HERE), LocalCpu(HERE, 1)
    problem = make_problem(task)
    device.prepare(task, problem, 1)
    points = [p for p in space.points() if sum(i > 0 for i in p) <= 1]
    for point in points:
        built = builder(BuildRequest(task, space.knobs(point), tmp_path))
        function = device.load(built.path)
        for b in rows:
            y = device.output(function, b)
            assert problem.error(b, y) is None, space.knobs(point)
            for wrong in (np.nan, np.float32(y[0, 5] + np.abs(y).max() / 100)):
                changed = y.copy()
                changed[0, 5] = wrong
                assert "[0, 5]" in problem.error(b, changed)
    assert "has shape" in problem.error(rows[0], y[:, 1:])


class Faulty(LocalCpu):
    """Gives wrong numbers of some libraries: every candidate's, or all."""

    wrong = "candidate"

    def output(self, function, rows):
        y = super().output(function, rows)
        return -y if self.wrong in ("all", getattr(function, "role", "")) else y

    def load(self, library):
        function = super().load(library)

        def call(*arguments):
            function(*arguments)

        call.role = "candidate" if "copy" in library.name else "default"
        return call


def test_wrong_numbers_are_told_from_a_lying_device(tmp_path):
    task = Task("generic", make_spec(act="float"), "single", (1,))
    built = Builder(HERE)(BuildRequest(task, Space.of(task).knobs((0,)), tmp_path))
    assert SYMBOL
    copy = tmp_path / "copy.so"
    copy.write_bytes(built.path.read_bytes())
    request = MeasureRequest(task, copy, built.path, SEARCH, 1 << 20)
    measured = Measurer(LocalCpu, HERE, 1)(request)
    assert isinstance(measured, Measured)
    assert 0.2 < measured.score < 5
    faulty = Measurer(Faulty, HERE, 1)
    outcome = faulty(request)
    assert isinstance(outcome, Wrong)
    assert "outputs are wrong" in outcome.reason
    faulty.device.wrong = "all"
    assert isinstance(faulty(request), Unfit)
    assert isinstance(Measurer(Faulty, HERE, 1)(request), Wrong)


def test_impossible_times_make_a_device_unfit(tmp_path):
    task = Task("generic", make_spec(act="float"), "single", (1,))
    built = Builder(HERE)(BuildRequest(task, Space.of(task).knobs((0,)), tmp_path))
    measurer = Measurer(LocalCpu, HERE, 1)
    measurer.device.seconds = lambda function, rows, calls: 1e-15
    outcome = measurer(MeasureRequest(task, built.path, built.path, SEARCH, 1 << 20))
    assert isinstance(outcome, Unfit)
    assert "claims" in outcome.reason


def test_equal_functions_are_built_once(tmp_path):
    task = Task(KERNELS[1].name, make_spec(), "single", (1,))
    kernel = next(k for k in FAMILIES["x86.codebook"] if not k.unsupported(task.spec, HERE))
    task = Task(kernel.name, task.spec, "single", (1,))
    builder, space = Builder(HERE), Space.of(task)
    defaults = space.knobs(space.points()[0])
    first = builder(BuildRequest(task, defaults, tmp_path))
    assert first.path.exists()
    twin = defaults | {"tokens": 1, "columns": 1024}  # of batches, which this function is not for
    again = builder(BuildRequest(task, twin, tmp_path, frozenset(first.digests)))
    assert again.path is None
    assert again.duplicate_of == first.digests[0]
    # The object code is compared, too.
    by_object = builder(BuildRequest(task, twin, tmp_path, frozenset(first.digests[1:])))
    assert by_object.path is None
    assert by_object.duplicate_of == first.digests[1]
