from types import SimpleNamespace

import numpy as np
import pytest
import tvm

from fairy_compile.runtime import pinned
from fairy_compile.runtime.pinned import Downloads, PinnedArray


def test_both_views_are_of_one_array():
    memory = PinnedArray(5, "float32", tvm.cpu())
    assert not memory.tensor.numpy().any()
    memory.array[:] = np.arange(5)
    np.testing.assert_array_equal(memory.tensor.numpy(), np.arange(5))


@pytest.mark.parametrize("most", [0, 1 << 20])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_downloads_are_copies_of_their_own(monkeypatch, kind: str, most: int) -> None:
    """Also by way of memory that is used again, and grows."""
    monkeypatch.setattr(pinned, "_MOST_BYTES", most)
    monkeypatch.setattr(pinned, "PinnedArray", lambda n, dtype, _: PinnedArray(n, dtype, tvm.cpu()))
    downloads = Downloads(SimpleNamespace(type=kind, sync=lambda: None))
    rng, results, wanted = np.random.default_rng(1), [], []
    for shape in ((2, 3), (4,), (3, 1, 5), (0, 7)):
        for dtype in ("float32", "int32"):
            values = (100 * rng.standard_normal(shape)).astype(dtype)
            results.append(downloads.get(tvm.runtime.tensor(values)))
            wanted.append(values)
    for got, want in zip(results, wanted, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
