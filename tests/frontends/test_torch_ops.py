"""Operators of PyTorch mean here what they mean there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import fairy_compile as fc


class Each(nn.Module):
    """A linear layer, and functions of its result and of the indices that come with x."""

    def __init__(self, functions) -> None:
        super().__init__()
        self.layer, self.functions = nn.Linear(16, 8), functions

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> list[torch.Tensor]:
        h = self.layer(x)
        return [function(h, i) for function in self.functions]


def check(tmp_path: Path, functions, rows=(4,), dynamic_shapes=None) -> None:
    """Build and compare: float32 rounding of sums of 16 products, with up to two operations on it.

    1e-5 is a few hundred times that.
    """
    torch.manual_seed(0)
    module = Each(functions).eval()
    example = (torch.randn(4, 16), torch.tensor([-1, 0, 2, -4]))
    fc.build(
        module,
        example,
        dynamic_shapes=dynamic_shapes,
        act="float",
        exempt="*",
        output=tmp_path / "out",
    )
    with fc.load(tmp_path / "out") as model:
        for count in rows:
            x, i = torch.randn(count, 16), example[1] if count >= 4 else example[1] * 0 - 1
            with torch.no_grad():
                want = module(x, i)
            found = model.run([x.numpy(), i.numpy()]).values()
            for number, (ours, theirs) in enumerate(zip(found, want, strict=True)):
                where = f"function {number}, {count} rows"
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.numpy().dtype), where
                np.testing.assert_allclose(
                    ours, theirs.numpy(), rtol=1e-5, atol=1e-5, err_msg=where
                )


def test_negative_and_joint_indices(tmp_path: Path) -> None:
    check(
        tmp_path,
        [
            lambda h, i: h[-1],
            lambda h, i: h.select(1, -3),
            lambda h, i: h[:, [-1, 0]],
            lambda h, i: h[i],
            lambda h, i: h[torch.arange(4), i],
            lambda h, i: h[i, i],
            lambda h, i: h[None, :, :, None][:, i, i * 0],  # together, not an outer product
            lambda h, i: h[:, None, :][i, :, i],
            lambda h, i: h[:, :, None][i[:2, None], i[None]],
        ],
    )


def test_negative_indices_of_dimensions_that_change(tmp_path: Path) -> None:
    functions = [lambda h, i: h[-1], lambda h, i: h[i], lambda h, i: h[:, -1]]
    check(tmp_path, functions, (2, 4, 9), ({0: torch.export.Dim("n")}, None))


def test_factors_that_are_easily_lost(tmp_path: Path) -> None:
    check(
        tmp_path,
        [
            lambda h, i: torch.add(h, h, alpha=0.5),
            lambda h, i: torch.sub(h, h * h, alpha=3),
            lambda h, i: torch.rsub(h, h * h, alpha=3.0),
            lambda h, i: torch.rsub(h, 2.0, alpha=3.0),
            lambda h, i: functional.selu(h),
            lambda h, i: functional.elu(h, 2.0),
            lambda h, i: functional.celu(h, 2.0),
        ],
    )


def test_integers_beside_other_numbers(tmp_path: Path) -> None:
    check(
        tmp_path,
        [
            lambda h, i: i / 3,
            lambda h, i: (i > 0) / 2,
            lambda h, i: i * 2.5,
            lambda h, i: i - 0.5,
            lambda h, i: 0.5 - i,
            lambda h, i: i % 1.5,
            lambda h, i: torch.fmod(i, 1.5),
            lambda h, i: i > 1.5,
            lambda h, i: i == 0.5,
            lambda h, i: i.abs() ** 0.5,
            lambda h, i: (i.abs() + 1).reciprocal(),
            lambda h, i: i * 3 + h[:, 0].long(),
            lambda h, i: (h.half() * torch.tensor(2.5)).float() * 0 + 1,
        ],
    )


def test_quotients_that_are_rounded(tmp_path: Path) -> None:
    def div(a, b, mode):
        return torch.div(a, b, rounding_mode=mode)

    check(
        tmp_path,
        [
            lambda h, i: i // 3,
            lambda h, i: (i + 2**40) // -3,
            lambda h, i: i // 2.5,
            lambda h, i: div(i, -3, "trunc"),
            lambda h, i: div(i, 3, None),
            lambda h, i: div(i, i * 2 + 1, "floor"),
            lambda h, i: div(h, 0.25, "trunc") * 0.25,
            lambda h, i: (h.half() // 2.5).float() * 0 + 1,
            lambda h, i: h // 0.0,
            lambda h, i: torch.remainder(h, 0.0),
        ],
    )


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_samples_at_a_grid(tmp_path: Path, mode) -> None:
    def sample(h, i):
        grid = torch.stack([h[:, :3], h[:, 3:6]], -1)[None]  # 4 x 3 places
        return functional.grid_sample(h[None, None], grid, mode=mode, align_corners=False)

    check(tmp_path, [sample])


@pytest.mark.parametrize("size", [(5, 3), (8, 16), (3, 20)])
def test_nearest_neighbours(tmp_path: Path, size) -> None:
    check(tmp_path, [lambda h, i: functional.interpolate(h[None, None], size=size)])


def test_branches_mean_the_same_operators(tmp_path: Path) -> None:
    """TVM's importer calls no converter of others in them, or calls it wrongly."""
    extra = nn.Linear(8, 3)

    def branch(h: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return torch.cond(
            i[0] < 0,
            lambda h, i, w, b: functional.linear(h, w, b) * 2.5,
            lambda h, i, w, b: torch.cond(
                i[1] > 0, lambda h, i: h[i][:, :3] - 1, lambda h, i: h[:, -3:] + i[:, None] // 3,
                (h, i),
            ),
            (h, i, extra.weight, extra.bias),
        )  # fmt: skip

    class Module(Each):
        def __init__(self) -> None:
            super().__init__([branch])
            self.extra = extra

    torch.manual_seed(0)
    module = Module().eval()
    x, i = torch.randn(4, 16), torch.tensor([-1, 0, 2, -4])
    report = fc.build(module, (x, i), act="float", exempt="*", output=tmp_path / "out")
    assert any("1 matmul in a branch" in note for note in report.notes)
    with fc.load(tmp_path / "out") as model:
        for indices in (i, i + 1, i.abs()):
            (ours,) = model.run([x.numpy(), indices.numpy()]).values()
            with torch.no_grad():
                (theirs,) = module(x, indices)
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_numbers_without_a_class_of_one_hot_are_refused_when_it_runs(tmp_path: Path) -> None:
    """PyTorch checks them too; TVM raises AssertionError."""
    functions = [lambda h, i: functional.one_hot(i * i, 17) + h.sum()]
    check(tmp_path, functions)
    x = np.zeros((4, 16), np.float32)
    with fc.load(tmp_path / "out") as model:
        with pytest.raises(fc.FairyError, match=r"Class values must be smaller than num_classes; "):
            model.run([x, np.array([0, 1, 5, 2])])
        (found,) = model.run([x, np.array([0, 1, 4, 2])]).values()
    assert (found.argmax(1) == [0, 1, 16, 4]).all()


def test_checks_of_a_module_tell_their_message_when_it_runs(tmp_path: Path) -> None:
    def checked(h: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        torch._assert_async((i < 3).all(), "no {3} or more")
        return h

    check(tmp_path, [checked])
    with (
        fc.load(tmp_path / "out") as model,
        pytest.raises(fc.FairyError, match=r"these inputs fail: no \{3\} or more; give others"),
    ):
        model.run([np.zeros((4, 16), np.float32), np.array([0, 1, 3, 2])])
