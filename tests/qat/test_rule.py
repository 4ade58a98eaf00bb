"""The rule in PyTorch against the rule in NumPy, and its gradients against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fairy_compile.phase import phase_codes as numpy_phase_codes
from fairy_compile.phase import quantize, quantize_complex, to_widely_linear
from fairy_compile.phase.quantize import FAIRY2I_MIN_SCALE, IFAIRY_MIN_SCALE
from fairy_compile.qat import rule

SHAPES = [(2, 2), (2, 6), (64, 48), (130, 258), (256, 128), (320, 64), (514, 130)]


def latent(shape, dtype=torch.float32, seed=0):
    generator = torch.manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(0.05).to(dtype)


def test_sectors_at_their_edges():
    # Every sign and tie of (re, im), zeros of both signs, and steps of one bit off the diagonal.
    values = np.array([-2, -1, -0.0, 0.0, 1, 2, np.nextafter(np.float32(1), 2)], np.float32)
    re, im = (part.ravel() for part in np.meshgrid(values, values))
    seen = rule.phase_codes(torch.from_numpy(re), torch.from_numpy(im)).numpy()
    np.testing.assert_array_equal(seen, numpy_phase_codes(re, im))


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_scales_and_values_equal_numpy_bit_for_bit(stages, scale, dtype):
    for seed, shape in enumerate(SHAPES):
        weight = latent(shape, dtype, seed)
        want = quantize(weight, stages, scale=scale)
        for k, pair in enumerate(rule.to_widely_linear(weight.float())):
            codes, scales = rule.codes_and_scales(*pair, stages, scale, FAIRY2I_MIN_SCALE)
            np.testing.assert_array_equal(codes.numpy(), want.unpack()[:, k])
            np.testing.assert_array_equal(scales.numpy(), want.scales[:, k])
        seen = rule.quantized_weight(weight, stages, scale)
        exact = torch.from_numpy(want.dequantize()).to(dtype)
        assert seen.dtype == dtype
        assert torch.equal(seen, exact)


def test_a_zero_weight_is_clamped_like_numpy():
    weight = torch.zeros(8, 8)
    want = torch.from_numpy(quantize(weight, 1).dequantize())
    assert torch.equal(rule.quantized_weight(weight, 1, "tensor"), want)
    assert want.abs().max() > 0


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_gradient_is_straight_through_on_u_and_w(stages, scale):
    """A is a function of U and W; each is replaced by itself + (quantised - itself) detached."""
    weight = latent((24, 40)).double().requires_grad_()
    n, m = 12, 20
    a11, a12, a21, a22 = weight[:n, :m], weight[:n, m:], weight[n:, :m], weight[n:, m:]
    parts = [(a11 + a22) / 2, (a21 - a12) / 2, (a11 - a22) / 2, (a12 + a21) / 2]
    fixed = quantize(weight.detach().float(), stages, scale=scale).dequantize_terms()
    u_re, u_im, w_re, w_im = (
        part + (torch.from_numpy(value).double() - part).detach()
        for part, value in zip(parts, (*fixed["U"], *fixed["W"]), strict=True)
    )
    x = torch.randn(5, 2 * m, dtype=torch.double, generator=torch.manual_seed(3))
    x_re, x_im = x[:, :m], x[:, m:]
    # y = U x + W conj(x)
    y_re = x_re @ (u_re + w_re).T + x_im @ (w_im - u_im).T
    y_im = x_re @ (u_im + w_im).T + x_im @ (u_re - w_re).T
    y = torch.cat([y_re, y_im], dim=1)
    (y**2).sum().backward()

    ours = weight.detach().float().requires_grad_()
    seen = x.float() @ rule.quantized_weight(ours, stages, scale).T
    (seen**2).sum().backward()
    # float32 products of K = 40 terms, twice: some 40 * 2^-23.
    torch.testing.assert_close(seen.double(), y.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stages", [1, 2])
def test_complex_weights_equal_numpy_and_pass_gradients(stages):
    re, im = latent((10, 14)).requires_grad_(), latent((10, 14), seed=1).requires_grad_()
    pair = rule.quantized_complex_weight(re, im, stages, "row")
    codes, scales = quantize_complex(
        re.detach().numpy(), im.detach().numpy(), stages, "row", IFAIRY_MIN_SCALE
    )
    seen = rule.codes_and_scales(re.detach(), im.detach(), stages, "row", IFAIRY_MIN_SCALE)
    np.testing.assert_array_equal(seen[0].numpy(), codes)
    np.testing.assert_array_equal(seen[1].numpy(), scales)
    (2 * pair[0].sum() + 3 * pair[1].sum()).backward()
    assert torch.equal(re.grad, torch.full_like(re, 2))
    assert torch.equal(im.grad, torch.full_like(im, 3))


def test_int8_activations_round_each_token_and_pass_gradients():
    x = torch.tensor([[0.5, -1.0, 0.1], [254.0, 3.0, 1.0]], requires_grad=True)
    seen = rule.int8_activations(x)
    want = torch.tensor([[64 / 127, -1.0, 13 / 127], [254.0, 4.0, 0.0]])
    torch.testing.assert_close(seen, want)
    seen.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_cuda_equals_cpu_bit_for_bit(scale):
    weight = latent((514, 130))
    on_gpu = rule.quantized_weight(weight.cuda(), 3, scale).cpu()
    assert torch.equal(on_gpu, rule.quantized_weight(weight, 3, scale))


def test_widely_linear_split_equals_numpy():
    weight = latent((6, 10), torch.bfloat16).float()
    ours, numpy = rule.to_widely_linear(weight), to_widely_linear(weight)
    for pair, want in zip(ours, numpy, strict=True):
        for part, exact in zip(pair, want, strict=True):
            np.testing.assert_array_equal(part.numpy(), exact)


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_a_stack_is_quantised_matrix_by_matrix(scale):
    stack = torch.stack([latent((130, 258), seed=k) * (k + 1) for k in range(3)]).requires_grad_()
    seen = rule.quantized_weight(stack[:, None], 2, scale)[:, 0]
    for one, matrix in zip(seen, stack, strict=True):
        assert torch.equal(one, rule.quantized_weight(matrix, 2, scale))
    gradient = torch.randn(stack.shape, generator=torch.manual_seed(9))
    seen.backward(gradient)
    assert torch.equal(stack.grad, gradient)
