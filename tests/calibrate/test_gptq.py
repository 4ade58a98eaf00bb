"""Error feedback in the widely-linear domain: exactness, and what it gains."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fairy_compile.calibrate import gptq  # noqa: E402
from fairy_compile.calibrate.gptq import errors, quantize_gptq  # noqa: E402
from fairy_compile.calibrate.refit import refit_scales  # noqa: E402
from fairy_compile.phase import PhaseTensor, quantize, to_widely_linear  # noqa: E402
from fairy_compile.phase.codebook import codebook  # noqa: E402


def layer(n: int = 24, m: int = 40, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """A weight, and the Gram matrix of strongly correlated, improper inputs."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((2 * m, 2 * m)) * np.exp(rng.standard_normal(2 * m))
    x = rng.standard_normal((600, 2 * m)) @ mix
    weight = rng.standard_normal((2 * n, 2 * m)).astype(np.float32)
    return weight, torch.tensor(x.T @ x / 600, dtype=torch.float32)


def complex_gptq(weight: np.ndarray, gram: np.ndarray, start: PhaseTensor) -> np.ndarray:
    """GPTQ on rows [U, W] with the complex Hessian of z = [x; conj x], one column at a time.

    Written from the definition, in complex128, with a fresh inverse for every column.
    """
    (u_re, u_im), (w_re, w_im) = to_widely_linear(weight)
    m = start.m
    rows = np.concatenate([u_re + 1j * u_im, w_re + 1j * w_im], axis=1).astype(complex)
    eye = np.eye(m)
    to_z = np.block([[eye, 1j * eye], [eye, -1j * eye]])  # z = to_z [Re x; Im x]
    hessian = to_z @ gram @ to_z.conj().T
    importance = np.diag(gram)[:m] + np.diag(gram)[m:]
    order = np.argsort(-importance, kind="stable")
    left = [k for j in order for k in (j, m + j)]
    out = np.empty_like(rows)
    for _ in range(2 * m):
        k = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        points = codebook(2).points(start.scales[:, k // m, :, 0].astype(float))[:2]
        re, im = points[0].ravel(), points[1].ravel()
        distance = np.abs(np.abs(rows[:, k].real)[:, None] - re) ** 2
        distance += np.abs(np.abs(rows[:, k].imag)[:, None] - im) ** 2
        best = distance.argmin(axis=1)
        out[:, k] = np.copysign(re[best], rows[:, k].real)
        out[:, k] += 1j * np.copysign(im[best], rows[:, k].imag)
        lost = rows[:, k] - out[:, k]
        rows[:, left] -= np.outer(lost / inverse[0, 0], inverse[0])
        left = left[1:]
    return out


def test_equals_gptq_on_the_complex_hessian():
    weight, gram = layer()
    start = quantize(weight, 2, method="alternating")
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    codes = gptq._feedback(torch.tensor(weight), damped, start)
    tensor = PhaseTensor.from_codes(codes, start.scales, start.terms, "tensor")
    terms = tensor.dequantize_terms()
    got = np.concatenate([terms[t][0] + 1j * terms[t][1] for t in "UW"], axis=1)
    want = complex_gptq(weight, damped.double().numpy(), start)
    # float32 against complex128: a value near a border may fall on its other side, and then all
    # that follows in its row differs.
    same = (np.abs(got - want) < 1e-4).all(axis=1)
    assert same.mean() > 0.8


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("stages", [2, 3])
def test_lowers_the_output_error(stages, scale):
    weight, gram = layer(n=70, m=72)
    plain = quantize(weight, stages, scale=scale, method="alternating")
    solved = quantize_gptq(weight, gram, stages, scale)
    _, without = errors(torch.tensor(weight), gram, plain)
    assert solved.tensor.scale == scale
    assert solved.output_error < 0.5 * without
    exact = weight - solved.tensor.dequantize()
    want = np.trace(exact @ gram.numpy() @ exact.T) / np.trace(weight @ gram.numpy() @ weight.T)
    assert solved.output_error == pytest.approx(want, rel=1e-3)
    assert solved.nmse == pytest.approx(np.square(exact).sum() / np.square(weight).sum(), rel=1e-4)


def test_results_do_not_depend_on_the_blocks(monkeypatch):
    weight, gram = layer()
    whole = quantize_gptq(weight, gram, 2)
    monkeypatch.setattr(gptq, "_BLOCK_PAIRS", 7)
    blocks = quantize_gptq(weight, gram, 2)
    assert np.mean(whole.tensor.unpack() != blocks.tensor.unpack()) < 0.05
    assert blocks.output_error == pytest.approx(whole.output_error, rel=0.05)


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_refit_finds_the_least_squares_scales(scale):
    weight, gram = layer(n=68, m=66)
    tensor = quantize(weight, 2, scale=scale)
    fitted = refit_scales(torch.tensor(weight), gram, tensor)
    np.testing.assert_array_equal(fitted.codes, tensor.codes)

    def rows_of(tensor, block):
        lost = weight - tensor.dequantize()
        return lost[np.concatenate([block, tensor.n + block])]

    # The first block of rows by normal equations: patterns are differences of dequantised forms.
    height = {"tensor": 68, "row": 1, "tile64": 64}[scale]
    block = np.arange(height)
    where = np.argwhere(np.ones_like(tensor.scales[:, :, :, :1]))
    factor = np.linalg.cholesky(gram.double().numpy())
    base = rows_of(tensor, block)
    columns = []
    for index in where:
        scales = tensor.scales.astype(np.float64)
        scales[tuple(index)] += 1
        moved = PhaseTensor(
            tensor.codes, scales.astype(np.float32), tensor.n, tensor.m, tensor.terms, scale
        )
        columns.append(((base - rows_of(moved, block)) @ factor).ravel())
    best = np.linalg.lstsq(np.array(columns).T, (base @ factor).ravel(), rcond=None)
    least = np.square((base @ factor).ravel() - np.array(columns).T @ best[0]).sum()
    got = np.square(rows_of(fitted, block) @ factor).sum()
    before = np.square(base @ factor).sum()
    assert got < before
    assert got <= least + 0.02 * (before - least)


def test_one_stage_keeps_the_codes_of_the_rule():
    weight, gram = layer()
    np.testing.assert_array_equal(
        quantize_gptq(weight, gram, 1).tensor.codes, quantize(weight, 1).codes
    )


def test_inputs_that_never_occur_do_no_harm():
    weight, gram = layer()
    gram[:10] = 0
    gram[:, :10] = 0
    solved = quantize_gptq(weight, gram, 2)
    assert np.isfinite(solved.tensor.scales).all()
    nothing = quantize_gptq(weight, torch.zeros_like(gram), 2)
    np.testing.assert_array_equal(
        nothing.tensor.codes, quantize(weight, 2, method="alternating").codes
    )
