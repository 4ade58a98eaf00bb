"""Combined tables of the ARM kernels: they stand for weights, to within the error they name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fairy_compile.kernels.arm_tables import (
    APART,
    TABLE_LIMIT,
    TOGETHER,
    combined_arrays,
    combined_codebook,
    combined_error,
    combined_weights,
    has_combined,
    has_signs,
    sign_bytes,
)
from tests.emulation.arm_cases import computed
from tests.kernels.cases import ONLY_W, make_parts, make_spec

each_set = pytest.mark.parametrize("terms", [TOGETHER, APART], ids=["together", "apart"])
each_stages = pytest.mark.parametrize("stages", [1, 2])


def blocks(weights: np.ndarray, n: int) -> np.ndarray:
    """Return the real 2 x 2 block of the only column of every row: (n, 2, 2)."""
    return weights.reshape(2, n, 2).transpose(1, 0, 2)


def test_where_there_are_combined_tables():
    assert has_combined(make_spec(stages=1))
    assert has_combined(make_spec())
    assert has_signs(make_spec())
    assert not has_signs(make_spec(stages=1))
    for spec in (make_spec(stages=3), make_spec(scale="row"), make_spec(terms=ONLY_W)):
        assert not has_combined(spec)
        assert not has_signs(spec)


@each_set
@each_stages
def test_codebook_of_every_byte_gives_the_weights(stages, terms):
    """Look every byte of a step up as the kernel does, and multiply with (1, 0) and (0, 1)."""
    spec = make_spec(parts=(256,), m=1, stages=stages)
    (part,) = make_parts(spec)
    places = [(stage, term) for term in (0, 1) for stage in range(stages)]
    bytes_ = np.arange(4 ** len(places))
    codes = np.zeros((stages, 2, len(bytes_), 1), np.uint8)
    for i, (stage, term) in enumerate(places):
        codes[stage, term, :, 0] = bytes_ >> 2 * i & 3
    part = type(part).from_codes(codes, part.scales, part.terms, part.scale)
    (want,) = computed([part], "combined", terms)

    tables, scales = combined_arrays(part)
    packed = sign_bytes()[bytes_] if stages == 2 else bytes_
    book = combined_codebook(spec, terms)
    got = np.zeros((len(bytes_), 2, 2))  # (byte, output, half of x)
    for half, x in enumerate(((1, 0), (0, 1))):
        sums = {}
        for look in book.lookups:
            if look.block:  # of the next column
                continue
            entries = tables[terms, look.table].astype(int)[packed >> 4 * look.nibble & 15]
            for number, product in enumerate(book.units[look.unit].products):
                sign = -1 if look.conjugate and product.half else 1
                key = look.unit, number
                sums[key] = sums.get(key, 0) + entries * sign * x[product.half]
        for key, total in sums.items():
            for share in book.shares[key]:
                sign = -1 if share.negative else 1
                got[:, share.output, half] += sign * float(scales[terms, share.scale]) * total
    np.testing.assert_allclose(got, blocks(want.dequantize(), len(bytes_)), rtol=0, atol=1e-8)


@each_set
@each_stages
def test_error_is_that_of_the_scales(stages, terms):
    spec = make_spec(parts=(8,), stages=stages)
    (part,) = make_parts(spec)
    (stand_in,) = computed([part], "combined", terms)
    error = np.linalg.norm(stand_in.scales - part.scales) / np.linalg.norm(part.scales)
    assert combined_error([part], terms) == pytest.approx(error, abs=1e-6)


@each_set
def test_error_of_proportional_axes_is_bounded(terms):
    """Rounding at 127 - k / 2 moves each of the k codes of a table by half a unit at most."""
    rng, spec = np.random.default_rng(0), make_spec(parts=(8,))
    errors = []
    for seed in range(200):
        (part,) = make_parts(spec, seed)
        part.scales[:, :, 0] = rng.uniform(0.001, 1, part.scales[:, :, 0].shape)
        part.scales[:, :, 1] = part.scales[:, :, 0] * rng.uniform(0.5, 2)
        vector = part.scales[:, :, 0, 0, 0].astype(float)
        codes = 4 if terms == TOGETHER else 2
        size = vector.sum() if terms == TOGETHER else vector.sum(axis=0).max()
        unit = size / (TABLE_LIMIT - codes / 2)
        error = combined_error([part], terms)
        assert error <= unit / 2 * np.sqrt(vector.size) / np.linalg.norm(vector) + 1e-6
        errors.append(error)
    assert np.median(errors) < (4e-3 if terms == TOGETHER else 2.5e-3)


@each_set
def test_entries_fit_signed_bytes(terms):
    for seed, stages in itertools.product(range(50), (1, 2)):
        (part,) = make_parts(make_spec(parts=(8,), stages=stages), seed)
        weights, _, _ = combined_weights(part, terms)
        sums = weights.sum(axis=(0, 1)) if terms == TOGETHER else weights.sum(axis=0)
        assert sums.max() <= TABLE_LIMIT
        assert np.abs(combined_arrays(part)[0][terms].astype(int)).max() == sums.max()


@each_set
@each_stages
def test_zero_scales(stages, terms):
    (part,) = make_parts(make_spec(parts=(8,), stages=stages))
    part.scales[:] = 0
    assert combined_error([part], terms) == 0
    assert not combined_arrays(part)[1].any()
