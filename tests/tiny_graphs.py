"""Small ONNX models and PyTorch modules for tests, and what they compute with phase weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx", reason="needs the package onnx (extra onnx)")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import fairy_compile as fc  # noqa: E402
from fairy_compile.compiler.graph import GraphWork  # noqa: E402
from fairy_compile.frontends.onnx_import import import_onnx  # noqa: E402
from fairy_compile.targets import load_target  # noqa: E402

FLOAT, FLOAT16, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
Shape = "list[int | str]"


def weight(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Return a random weight that keeps activations of about the same size."""
    rng = np.random.default_rng([seed, *shape])
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(dtype)


def make_onnx(
    path: Path,
    nodes: list,
    inputs: dict[str, tuple[int, list]],
    outputs: dict[str, tuple[int, list]],
    weights: dict[str, np.ndarray],
    opset: int = 18,
    **options,
) -> Path:
    """Write a model; inputs and outputs are name -> (element type, shape)."""

    def infos(values):
        return [helper.make_tensor_value_info(n, t, shape) for n, (t, shape) in values.items()]

    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "tiny", infos(inputs), infos(outputs), tensors)
    opsets = [helper.make_opsetid("", opset), *options.pop("opsets", [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, **options)
    path.write_bytes(model.SerializeToString())
    return path


def mlp_onnx(path: Path, dtype: type = np.float32, opset: int = 18, **options) -> Path:
    """Write x (batch, 32) -> 64 -> 48 -> 7, with biases; the last layer has an odd size."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["h1"], "/fc1/Gemm", transB=1),
        helper.make_node("Relu", ["h1"], ["a1"], "/Relu"),
        helper.make_node("MatMul", ["a1", "onnx::MatMul_9"], ["h2"], "/fc2/MatMul"),
        helper.make_node("Add", ["fc2.bias", "h2"], ["b2"], "/fc2/Add"),
        helper.make_node("Relu", ["b2"], ["a2"], "/Relu_1"),
        helper.make_node("Gemm", ["a2", "fc3.weight", "fc3.bias"], ["y"], "/fc3/Gemm", transB=1),
    ]
    weights = {
        "fc1.weight": weight(64, 32),
        "fc1.bias": weight(64),
        "onnx::MatMul_9": weight(48, 64).T.copy(),
        "fc2.bias": weight(48),
        "fc3.weight": weight(7, 48),
        "fc3.bias": weight(7),
    }
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    inputs, outputs = {"x": (element, ["batch", 32])}, {"y": (element, ["batch", 7])}
    return make_onnx(path, nodes, inputs, outputs, weights, opset, **options)


def with_phase_values(path: Path, **quant) -> onnx.ModelProto:
    """Return an ONNX model whose linear layers hold the values that a build gives them."""
    graph = import_onnx(path)
    work = GraphWork(graph, fc.QuantConfig(**quant), load_target("cpu"))
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for matrix in work.layers.matrices:
        if not work.source.plan(matrix.layer, work.quant).phase:
            continue
        tensor = tensors[matrix.weight]
        stored, dense = numpy_helper.to_array(tensor), matrix.dense()
        values = work.source.phase(matrix.layer, work.quant).dequantize()
        if not np.array_equal(stored, dense):
            assert np.array_equal(stored, dense.T)
            values = values.T
        values = np.ascontiguousarray(values.astype(stored.dtype))
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


class Encoder(nn.Module):
    """A BERT-like encoder: embeddings, self-attention with a mask, GELU, LayerNorm."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(50, width), nn.Embedding(64, width)
        self.layers = nn.ModuleList([EncoderLayer(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.tokens(ids) + self.positions(positions)[None])
        bias = (1.0 - mask[:, None, None, :].float()) * -1e4
        for layer in self.layers:
            x = layer(x, bias)
        return x


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        size = width // self.heads
        qkv = self.qkv(x).view(batch, length, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q @ k.transpose(-1, -2)) * size**-0.5 + bias
        mixed = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class ConvNet(nn.Module):
    """Two convolutions, a batch norm, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.fc = nn.Linear(16 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc(torch.flatten(x, 1))


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


def tokens(batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and a mask that hides the end of the first sequence."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 1 :] = 0
    return ids, mask


def dynamic(*names: str) -> dict:
    """Return dynamic shapes (batch, length) of inputs for the exporter."""
    return {name: {0: "batch", 1: "length"} for name in names}


def phase_valued(module: nn.Module, method: str = "alternating", stages: int = 2) -> nn.Module:
    """Put the phase values of every even linear layer in its place, in a copy."""
    import copy

    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and not any(size % 2 for size in layer.weight.shape):
            values = fc.quantize(layer.weight.detach(), stages, method=method).dequantize()
            layer.weight.data = torch.from_numpy(values)
    return module
