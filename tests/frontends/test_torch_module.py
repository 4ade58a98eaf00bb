"""PyTorch modules as graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fairy_compile as fc
from fairy_compile.frontends.torch_module import import_torch, is_torch_module


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(ids)
        return self.head(x), x


def test_module_is_known_without_importing_torch() -> None:
    assert is_torch_module(nn.Linear(2, 2))
    assert not is_torch_module("model.onnx")


def test_parameters_are_weights_with_their_names() -> None:
    module = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).to(torch.bfloat16)
    graph = import_torch(module, torch.zeros(2, 8, dtype=torch.bfloat16))
    assert graph.kind == "torch"
    assert graph.name == "Sequential"
    weights = {n: (w.shape, w.dtype, w.layer) for n, w in graph.weights.items()}
    assert weights["0.weight"] == ((6, 8), "bfloat16", "0")
    assert weights["2.bias"] == ((4,), "bfloat16", "2.bias")
    read = graph.weights["0.weight"].read().astype(np.float32)
    np.testing.assert_array_equal(read, module[0].weight.detach().float().numpy())


def test_names_of_inputs_and_outputs() -> None:
    graph = import_torch(Tied().eval(), torch.zeros(3, dtype=torch.long))
    assert graph.inputs == ("ids",)
    assert len(graph.outputs) == 2
    assert graph.same == {"head.weight": "table.weight"}


def test_dynamic_dimensions_are_kept() -> None:
    auto = torch.export.Dim.AUTO
    graph = import_torch(nn.Linear(8, 6), torch.zeros(2, 8), ({0: auto},))
    first = graph.module["main"].params[0]
    assert not hasattr(first.ty.shape[0], "value")
    assert int(first.ty.shape[1]) == 8


def test_example_inputs_must_be_tensors(tmp_path) -> None:
    for given in (None, "x", [1.0], {"x": 1}):
        with pytest.raises(fc.FairyError, match="tuple of tensors"):
            fc.build(nn.Linear(8, 6), given, output=tmp_path / "out")


class Branchy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_modules_that_cannot_be_traced_are_told() -> None:
    with pytest.raises(fc.UnsupportedError, match=r"torch\.export cannot trace Branchy") as error:
        import_torch(Branchy(), torch.ones(2))
    assert "\n" not in str(error.value)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return self.linear(x) + self.calls


def test_modules_that_keep_state_are_refused() -> None:
    with pytest.raises(fc.FairyError, match="changes its buffer calls when it runs"):
        import_torch(Stateful(), (torch.ones(2, 8),))


class Odd(nn.Module):
    def __init__(self, second) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.second = second

    def forward(self, x, factor):
        y = self.linear(x) * factor
        return y, self.second(y)


def test_an_output_given_twice_has_two_names_and_scalars_are_inputs(tmp_path) -> None:
    given = (torch.ones(2, 8), torch.tensor(3.0))
    module = Odd(lambda y: y)
    fc.build(module, given, output=tmp_path / "out", act="float", exempt=("*",))
    with fc.load(tmp_path / "out") as model:
        found = list(model.run([array.numpy() for array in given]).values())
    assert len(found) == 2
    for array in found:
        np.testing.assert_allclose(array, module(*given)[0].detach().numpy(), rtol=1e-4)


def test_an_output_that_is_none_is_told(tmp_path) -> None:
    given = (torch.ones(2, 8), torch.tensor(3.0))
    with pytest.raises(fc.FairyError, match="output_1 is no tensor"):
        fc.build(Odd(lambda y: None), given, output=tmp_path / "out")


def test_natively_complex_layers_are_refused() -> None:
    module = nn.Sequential(fc.qat.PhaseComplexLinear(4, 4))
    with pytest.raises(fc.UnsupportedError, match="natively complex"):
        import_torch(module, torch.ones(2, 8))
