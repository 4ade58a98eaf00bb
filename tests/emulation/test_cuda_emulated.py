"""The CUDA kernels on emulated tensor cores: numbers against the NumPy reference."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fairy_compile.kernels.cuda import CudaPlanes
from fairy_compile.kernels.cuda_grid import Launch
from fairy_compile.kernels.cuda_image import make_image
from fairy_compile.op import PhaseSpec, dequantize_activations, phase_gemm_reference
from fairy_compile.op import quantize_activations as quantize
from fairy_compile.phase import PhaseTensor, tile_shape
from tests.emulation.cuda_rig import Emulator, missing_tools
from tests.kernels.cases import BOTH, ONLY_W, make_parts, make_spec, make_x

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

KERNEL = CudaPlanes()
ODD, EVEN = {"parts": (37, 9), "m": 203}, {"parts": (35,), "m": 264}
QUICK = [
    make_spec(**ODD, stages=2, act="int16"),
    make_spec(**EVEN, stages=1, scale="row", act="int16"),
    make_spec(**EVEN, stages=2, scale="tile64", act="int8"),
    make_spec(**ODD, stages=3, terms=ONLY_W, act="int8"),
]
ALL = [
    make_spec(**size, stages=stages, terms=terms, scale=scale, act=act)
    for size, act in ((ODD, "int16"), (EVEN, "int8"))
    for stages in (1, 2, 3, 4)
    for terms in (BOTH, ONLY_W)
    for scale in ("tensor", "row", "tile64")
]


def launches(
    spec: PhaseSpec, dtype: str, batch: str = "many", image: bool | None = None, **knobs
) -> list[Launch]:
    own = replace(spec, dtype=dtype, out_dtype=dtype)
    return KERNEL.launches(own, batch, knobs, image=image)


def emulator(specs: list[PhaseSpec], dtype: str, folder, batch="many", **knobs) -> Emulator:
    grids = [launch for spec in specs for launch in launches(spec, dtype, batch, **knobs)]
    return Emulator(grids, folder, dtype, dtype)


def pick(grids: list[Launch], rows: int) -> Launch:
    return next(launch for launch in grids if launch.most is None or rows <= launch.most)


def tolerance(
    spec: PhaseSpec, parts: list[PhaseTensor], x: np.ndarray, prefill: bool, unit: float = 2.0**-11
):
    """Bound on |y - reference|, (b, 2n).

    S, the sum of |x| times the largest scale of a weight, bounds every partial sum.

    Decode: integer sums are exact. Their conversion to float32, and the product with a scale, round
    once for every stage, term and flush; then come N = 2 flushes sums of two roundings each, and
    those of warps and halves: at most (2 T + 2 flushes + 10) eps S with eps = 2^-24. The
    reference's weights and scales are rounded T times too. Of one row, u and v are summed apart
    and reach 3.25 S together, so that the worst case is as many times that; roundings of random
    sums stay within the bound for S, which is asked for.

    Prefill: entries of the real matrix are rounded to float16 once for every stage, and once for
    every addition of stages, x once where it is not float16, each by ``unit`` = 2^-11 of S.
    Products are exact; tensor cores may truncate sums, so an addition is off by 2^-23 S.
    """
    if not prefill:
        x = dequantize_activations(*quantize(x, act=spec.act))
    magnitude = np.abs(x).astype(np.float64)
    a, b = np.split(magnitude, 2, axis=1)
    flushes = -(-spec.m // 128) * (2 if spec.scale == "tile64" else 1)
    if prefill:
        roundings = 2 * spec.stages
        relative = roundings * unit + 2 * spec.m * 2.0**-23
    else:
        relative = (3 * spec.stages + 2 * flushes + 12) * 2.0**-24
    bounds = []
    for part in parts:
        rows, columns = tile_shape(spec.scale, part.n, part.m)
        largest = part.scales.max(axis=2).sum(axis=(0, 1))
        largest = np.kron(largest, np.ones((rows, columns)))[: part.n, : part.m]
        bound = relative * ((a + b) @ largest.T)
        bounds += [bound, bound]
    return np.concatenate(bounds, axis=1)


def check(emulated, spec, x, order=0, code=None, batch="many", bias=None, **knobs) -> None:
    parts = make_parts(spec, code=code)
    grid = pick(launches(spec, x.dtype.name, batch, **knobs), len(x))
    arrays = KERNEL.layout.pack(parts, spec)
    got = emulated.run(grid, x, *arrays.values(), spec.out_features, order, bias)
    got = got.astype(np.float64)
    prefill = grid.function.startswith("prefill")
    full = x.astype(np.float32)
    want = phase_gemm_reference(full, parts, "float" if prefill else spec.act)
    allowed = tolerance(spec, parts, full, prefill)
    if bias is not None:
        want = want + bias
        allowed = allowed + 2.0**-23 * (np.abs(want) + np.abs(bias))  # one more sum
    if x.dtype == np.float16:
        allowed = allowed + 2.0**-11 * np.abs(want)
    worst = np.max(np.abs(got - want) - allowed)
    assert worst <= 0, f"{grid.function}: off by {np.abs(got - want).max():.3g}, {worst:.3g} more"


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Emulator:
    return emulator(QUICK, "float16", tmp_path_factory.mktemp("quick"))


@pytest.mark.parametrize("spec", QUICK, ids=PhaseSpec.describe)
def test_batches(quick, spec):
    for batch in (1, 2, 3, 8, 17, 64, 66):
        check(quick, spec, make_x(spec, batch).astype(np.float16))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Emulator:
    """Launches that quantise x in a grid of their own."""
    return emulator(QUICK, "float16", tmp_path_factory.mktemp("images"), image=True)


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("spec", QUICK, ids=PhaseSpec.describe)
def test_quantised_once(images, spec, order):
    for batch in (1, 2, 3, 7, 8):
        x = make_x(spec, batch).astype(np.float16)
        grids = launches(spec, "float16", image=True)
        assert pick(grids, batch).arrange is not None
        check(images, spec, x, order, image=True)


def test_an_image_from_elsewhere(tmp_path):
    grids = {}
    for spec in QUICK:
        (launch,) = launches(spec, "float16", "single", image=True)
        grids[spec] = replace(launch, arrange=None)
    emulated = Emulator(list(grids.values()), tmp_path, "float16", "float16")
    for spec, grid in grids.items():
        parts, x = make_parts(spec), make_x(spec, 1).astype(np.float16).astype(np.float32)
        arrays, image = KERNEL.layout.pack(parts, spec), make_image(x, spec.act)
        assert image.nbytes == grid.image_bytes
        got = emulated.run(grid, image, *arrays.values(), spec.out_features).astype(np.float64)
        want = phase_gemm_reference(x, parts, spec.act)
        allowed = tolerance(spec, parts, x, prefill=False) + 2.0**-11 * np.abs(want)
        assert np.all(np.abs(got - want) <= allowed)


def test_long_rows_are_taken_in_several_turns(tmp_path):
    """More groups of columns than shared memory holds, of one row and of four; both ways."""
    spec = make_spec(parts=(16,), m=128 * 90 + 40, stages=1, act="int16")
    for image in (False, True):
        folder = tmp_path / str(image)
        folder.mkdir()
        emulated = emulator([spec], "float16", folder, image=image)
        check(emulated, spec, make_x(spec, 4).astype(np.float16), image=image)
        (folder / "single").mkdir()
        emulated = emulator([spec], "float16", folder / "single", "single", image=image)
        check(emulated, spec, make_x(spec, 1).astype(np.float16), batch="single", image=image)


LONG = [
    make_spec((37, 9), 1003, stages=2, act="int16"),
    make_spec((35,), 1160, stages=1, scale="row", act="int16"),
    make_spec((70,), 1160, stages=2, scale="tile64", act="int8"),
]


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory) -> Emulator:
    return emulator(LONG, "float16", tmp_path_factory.mktemp("long"))


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("spec", LONG, ids=PhaseSpec.describe)
def test_columns_are_shared_by_blocks(long_rows, spec, order):
    """Of few rows; shares end within a block of 32 columns, and are not of one size."""
    for batch in (9, 33, 65, 130):
        x = make_x(spec, batch).astype(np.float16)
        assert pick(launches(spec, "float16"), batch).splits == 2
        check(long_rows, spec, x, order)


def test_biases(tmp_path):
    """Added once, whether every block writes outputs, blocks share columns or x is an image."""
    for i, (spec, image) in enumerate(((QUICK[0], False), (QUICK[2], True), (LONG[0], True))):
        spec, folder = replace(spec, bias=True), tmp_path / str(i)
        folder.mkdir()
        emulated = emulator([spec], "float16", folder, image=image)
        bias = np.random.default_rng(5).standard_normal(spec.out_features).astype(np.float32)
        bias *= 30
        for batch in (1, 2, 17, 66):
            x = make_x(spec, batch).astype(np.float16)
            check(emulated, spec, x, bias=bias, image=image)


@pytest.mark.parametrize("order", [1, 2])
def test_threads_in_another_order(quick, order):
    for spec in QUICK[:3]:
        for batch in (2, 17):
            check(quick, spec, make_x(spec, batch).astype(np.float16), order)


def test_sums_do_not_overflow(tmp_path):
    """All products of a group have one sign and full size; both digits are 127, or 127 and -128."""
    emulated = emulator(QUICK, "float32", tmp_path, "single")
    for spec, code in itertools.product(QUICK, range(4)):
        for second in (32639, 32512 - 128):
            x = np.full((1, 2 * spec.m), second, np.float32)
            x[0, ::128] = 32639
            for sign in (1, -1):
                check(emulated, spec, sign * x, code=code, batch="single")


def test_zeros_give_zeros(quick):
    spec = QUICK[0]
    x = np.zeros((1, 2 * spec.m), np.float16)
    arrays = KERNEL.layout.pack(make_parts(spec), spec)
    grid = pick(launches(spec, "float16"), 1)
    assert not quick.run(grid, x, *arrays.values(), spec.out_features).any()


def test_float32_activations(tmp_path):
    specs = QUICK[:2]
    emulated = emulator(specs, "float32", tmp_path)
    for spec in specs:
        for batch in (1, 2, 17):
            check(emulated, spec, make_x(spec, batch))


def test_float16_activations_and_float32_outputs(tmp_path):
    """What a model's head asks for."""
    spec = replace(QUICK[0], dtype="float16", out_dtype="float32")
    emulated = Emulator(KERNEL.launches(spec, "many", {}), tmp_path, "float16", "float32")
    parts, arrays = make_parts(spec), KERNEL.layout.pack(make_parts(spec), spec)
    for batch in (1, 17):
        x = make_x(spec, batch).astype(np.float16)
        grid = pick(KERNEL.launches(spec, "many", {}), batch)
        got = emulated.run(grid, x, *arrays.values(), spec.out_features)
        prefill, full = batch > 1, x.astype(np.float32)
        want = phase_gemm_reference(full, parts, "float" if prefill else spec.act)
        assert np.all(np.abs(got - want) <= tolerance(spec, parts, full, prefill))


def test_int16_is_exact_to_5e_5(tmp_path):
    """Against activations that were not rounded, on the shape of a real layer's columns."""
    spec = make_spec(parts=(32,), m=1024, act="int16")
    emulated = emulator([spec], "float32", tmp_path)
    parts, x = make_parts(spec), make_x(spec, 2)
    arrays = KERNEL.layout.pack(parts, spec)
    got = emulated.run(launches(spec, "float32")[0], x, *arrays.values(), spec.out_features)
    want = phase_gemm_reference(x, parts)
    assert np.linalg.norm(got - want) <= 5e-5 * np.linalg.norm(want)


@pytest.mark.parametrize(
    "knobs",
    [
        {"warps": 4, "row_tiles": 4},
        {"warps": 8, "row_tiles": 2},
        {"warps": 4, "row_tiles": 4, "asked": 2},
        {"switch": 33, "prefill_warps": 2, "tokens": 32, "buffers": 4},
    ],
    ids=str,
)
def test_knobs(tmp_path, knobs):
    spec = QUICK[1]
    emulated = emulator([spec], "float16", tmp_path, **knobs)
    for batch in (1, 17, 40):
        check(emulated, spec, make_x(spec, batch).astype(np.float16), **knobs)


@pytest.mark.parametrize("spec", QUICK, ids=PhaseSpec.describe)
@pytest.mark.parametrize("groups", [3, 11, 12])
def test_codes_of_two_groups_on_their_way(tmp_path, spec, groups):
    """Warps have a group less than others, an odd number or an even one."""
    spec = replace(spec, m=128 * groups - 5)
    knobs = {"warps": 4, "row_tiles": 2, "asked": 2}
    emulated = emulator([spec], "float16", tmp_path, "single", **knobs)
    assert "kAsked = 2;" in launches(spec, "float16", "single", **knobs)[0].source
    for order in (0, 2):
        x = make_x(spec, 1).astype(np.float16)
        check(emulated, spec, x, order, batch="single", **knobs)


@pytest.mark.parametrize(
    ("program", "removed", "spec"),
    [
        ("decode", "warp, lane);\n      __syncthreads();", QUICK[1]),
        ("decode", "wait_copies<0>();", QUICK[1]),
        ("decode", "lane);\n    __syncthreads();", QUICK[1]),
        ("prefill", "__syncthreads();", QUICK[1]),
        ("prefill", "__syncwarp();", QUICK[2]),
        ("prefill", "wait_copies<kBuffers - 2>();", QUICK[1]),
    ],
    ids=["chunk", "records", "partial sums", "x", "tables", "copies"],
)
def test_missing_synchronisation_is_noticed(tmp_path, program, removed, spec):
    knobs = {"image": True} if "copies" in removed and program == "decode" else {}
    grid = next(g for g in launches(spec, "float16", **knobs) if g.function.startswith(program))
    kept = removed.partition("__syncthreads")[0] if "\n" in removed else ""
    assert removed in grid.source
    broken = replace(grid, source=grid.source.replace(removed, kept))
    emulated = Emulator([broken], tmp_path, "float16", "float16")
    parts, x = make_parts(spec), make_x(spec, 2).astype(np.float16)
    arrays = KERNEL.layout.pack(parts, spec)
    want = phase_gemm_reference(x.astype(np.float32), parts)
    results = [
        emulated.run(broken, x, *arrays.values(), spec.out_features, order) for order in (0, 1, 2)
    ]
    assert not all(np.allclose(y, want, atol=0.02 * np.abs(want).max()) for y in results)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ALL, ids=PhaseSpec.describe)
def test_every_form(tmp_path, spec):
    emulated = emulator([spec], "float16", tmp_path)
    for batch in (1, 2, 17, 64):
        check(emulated, spec, make_x(spec, batch).astype(np.float16))
