import math

import numpy as np

from fairy_compile.evaluation.estimate import Estimate


def test_equal_windows_have_the_error_of_their_means():
    means = np.array([2.0, 2.5, 3.5, 2.2])
    found = Estimate.of(means * 7, np.full(4, 7.0))
    assert math.isclose(found.mean, means.mean())
    assert math.isclose(found.stderr, means.std(ddof=1) / 2)


def test_a_longer_window_counts_more():
    found = Estimate.of(np.array([30.0, 2.0]), np.array([10.0, 1.0]))
    assert math.isclose(found.mean, 32 / 11)


def test_one_window_has_no_error():
    found = Estimate.of(np.array([6.0]), np.array([3.0]))
    assert found == Estimate(2.0, None)
    assert found.show(1) == "2.0"
    assert Estimate(0.5, 0.25).show(1, scale=100) == "50.0 ± 25.0"
    assert Estimate(1.2e-7, 3e-9).show_small("+") == "+1.2e-07 ± 3e-09"


def test_the_error_is_that_of_repeated_texts():
    """Windows of unequal length: the formula against many drawings."""
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 30, (2000, 40)).astype(float)
    sums = counts * 2 + rng.normal(size=counts.shape) * np.sqrt(counts)
    found = [Estimate.of(s, c) for s, c in zip(sums, counts, strict=True)]
    spread = np.std([f.mean for f in found])
    assert abs(np.mean([f.stderr for f in found]) / spread - 1) < 0.05
