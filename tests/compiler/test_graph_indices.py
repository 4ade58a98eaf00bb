"""Indices that callers pass to graphs: right inside of arrays, harmless outside of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fairy_compile as fc
from tests.compiler.test_graph import run_onnx
from tests.frontends.test_torch_ops import Each
from tests.tiny_graphs import FLOAT, INT64, helper, make_onnx, onnx, weight

X = weight(4, 16)
HUGE = [4, 16, 100, -17, 2**31, 2**40, 2**62, -(2**62)]  # 4 and 16 are the sizes of the data


def build(tmp_path: Path, node, inputs: dict[str, list], shape: list, dtype: int = FLOAT) -> Path:
    """Build a linear layer, whose result h goes to a node with more inputs."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "layer"), node]
    kinds = {"u": FLOAT, "i": INT64}
    path = make_onnx(
        tmp_path / "model.onnx",
        nodes,
        {"x": (FLOAT, [4, 16])} | {name: (kinds[name], dims) for name, dims in inputs.items()},
        {"y": (dtype, shape)},
        {"w": weight(16, 16)},
    )
    fc.build(path, act="float", exempt="*", output=tmp_path / "out")
    return path


def check(tmp_path: Path, path: Path, inside: dict[str, np.ndarray], outside) -> None:
    """Compare with onnxruntime inside of arrays, then call with indices outside of them.

    Sums of 16 float32 products and one operation on them: 1e-5 is a few hundred roundings.
    """
    want = run_onnx(onnx.load(path), {"x": X, **inside})[0]
    with fc.load(tmp_path / "out") as model:
        y = model.run({"x": X, **inside})["y"]
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        for index in HUGE:
            outside(model, index)


@pytest.mark.parametrize(
    ("operator", "options", "indices", "shape"),
    [
        ("GatherElements", {"axis": 0}, [[0, 3], [-4, -1]], ["a", 2]),
        ("GatherElements", {"axis": 1}, [[0, 15], [-16, -1]], ["a", 2]),
        ("GatherND", {}, [[0, 15], [-4, -16], [3, -1]], ["a"]),
        ("GatherND", {}, [[0], [-4], [3]], ["a", 16]),
        ("GatherND", {"batch_dims": 1}, [[0], [-16], [15], [-1]], [4]),
    ],
)
def test_look_ups_outside_give_nan(tmp_path: Path, operator, options, indices, shape) -> None:
    indices = np.array(indices)
    node = helper.make_node(operator, ["h", "i"], ["y"], "node", **options)
    rows = 4 if "batch_dims" in options else "a"
    path = build(tmp_path, node, {"i": [rows, indices.shape[1]]}, shape)

    def outside(model, index) -> None:
        mixed = indices.copy()
        mixed[0] = index
        y = model.run({"x": X, "i": mixed})["y"]
        alone = model.run({"x": X, "i": indices})["y"]
        size = 4 if options.get("axis") == 0 or ("ND" in operator and len(shape) == 2) else 16
        if not -size <= index < size:
            assert np.isnan(y[0]).all()
        np.testing.assert_array_equal(y[1:], alone[1:])

    check(tmp_path, path, {"i": indices}, outside)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "min", "max"])
@pytest.mark.parametrize(
    ("operator", "options", "indices"),
    [
        ("ScatterND", {}, [[0, 15], [-4, 2], [3, -1]]),
        ("ScatterElements", {"axis": 1}, [[0, 1], [-16, 5], [15, -2]]),
        ("ScatterElements", {"axis": 0}, [[0, 1], [-4, 3], [3, -2]]),
    ],
)
def test_nothing_is_written_outside(tmp_path: Path, operator, options, indices, reduction) -> None:
    """Indices are smaller than the data along both axes, too."""
    indices = np.array(indices)
    updates = weight(*(indices.shape if options else indices.shape[:1]), seed=1)
    options = options | {"reduction": reduction}
    node = helper.make_node(operator, ["h", "i", "u"], ["y"], "node", **options)
    shapes = {"i": list(indices.shape), "u": list(updates.shape)}
    path = build(tmp_path, node, shapes, [4, 16])

    def outside(model, index) -> None:
        if index == 4 and options.get("axis") == 1:
            return
        y = model.run({"x": X, "i": np.full_like(indices, index), "u": updates})["y"]
        np.testing.assert_allclose(y, X @ weight(16, 16), rtol=1e-5, atol=1e-5)

    check(tmp_path, path, {"i": indices, "u": updates}, outside)


def test_integers_outside_are_the_nearest(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "layer"),
        helper.make_node("Cast", ["x"], ["n"], "cast", to=INT64),
        helper.make_node("GatherElements", ["n", "i"], ["y"], "node", axis=1),
    ]
    path = make_onnx(
        tmp_path / "model.onnx",
        nodes,
        {"x": (FLOAT, [4, 16]), "i": (INT64, [4, 2])},
        {"h": (FLOAT, [4, 16]), "y": (INT64, [4, 2])},
        {"w": weight(16, 16)},
    )
    fc.build(path, act="float", output=tmp_path / "out")
    x = np.arange(64, dtype=np.float32).reshape(4, 16)
    with fc.load(tmp_path / "out") as model:
        y = model.run({"x": x, "i": np.array([[-1, 2**62]] * 4)})["y"]
    np.testing.assert_array_equal(y, x[:, [15, 15]])


def put(h: torch.Tensor, indices, values, accumulate: bool = False) -> torch.Tensor:
    return torch.ops.aten.index_put(h, indices, values, accumulate)


def deep(h: torch.Tensor) -> torch.Tensor:
    return h[:, None, :].repeat(1, 3, 1)


READS = [
    lambda h, i: h[torch.arange(4), i],
    lambda h, i: h[:, None, :][i, :, i],
    lambda h, i: deep(h)[:, i % 3, i],
]
WRITES = [
    lambda h, i: put(h, (torch.arange(4), i), h[:, 0]),
    lambda h, i: put(h, (torch.arange(4), i), torch.tensor(3.0)),
    lambda h, i: put(h, (torch.arange(4)[:, None], i[None]), h[:, :1]),
    lambda h, i: put(h, (i,), h[:1, :1]),
    lambda h, i: put(h, (None, i), h[:, :4]),
    lambda h, i: put(deep(h), (i, None, i), h[:, :3]),
    lambda h, i: put(deep(h), (None, None, i), h[:, None, :4]),
    lambda h, i: put(h, (i[0], i[1]), torch.tensor(4.0)),
    lambda h, i: put(h, (i * 1, i * 1), h[:, 0], True),
    lambda h, i: h.index_fill(1, i, 3.0),
]
OTHERS = [
    lambda h, i: put(h, (i * 0, i * 0), h[:, 0], True),  # all to one place
    lambda h, i: put(h, (i > 0,), torch.tensor(0.5)),
    lambda h, i: put(h, (h > 0,), torch.tensor(0.5), True),
    lambda h, i: h.scatter(1, (i % 8)[:3, None], h[:3, 1:2] * 2),
    lambda h, i: torch.gather(h, 1, (i % 8)[:, None]),
]


def test_modules_of_pytorch_keep_inside(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Each([*READS, *WRITES, *OTHERS]).eval()
    example = (torch.randn(4, 16), torch.tensor([-1, 0, 2, -4]))
    fc.build(module, example, act="float", exempt="*", output=tmp_path / "out")
    with torch.no_grad():
        want = module(*example)
        h = module.layer(example[0])
        untouched = [write(h, torch.tensor([0, 0, 0, 0])).shape for write in WRITES]
    with fc.load(tmp_path / "out") as model:
        found = model.run([value.numpy() for value in example]).values()
        for number, (ours, theirs) in enumerate(zip(found, want, strict=True)):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.numpy().dtype), number
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=str(number))
        for index in (8, -9, 2**31, 2**40, 2**62, -(2**62)):
            got = list(model.run([example[0].numpy(), np.full(4, index)]).values())
            for number in range(len(READS)):
                assert np.isnan(got[number]).all(), number
            for number, shape in enumerate(untouched):
                whole = h if len(shape) == 2 else deep(h)
                ours = got[len(READS) + number]
                np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5, err_msg=str(number))


def test_branches_keep_inside(tmp_path: Path) -> None:
    def branch(h: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return torch.cond(
            i[0] < 2**40,
            lambda h, i: torch.gather(h, 1, i[:, None].expand(4, 8)),
            lambda h, i: torch.index_select(h, 1, i).repeat(1, 2),
            (h, i),
        )

    module = Each([branch]).eval()
    example = (torch.randn(4, 16), torch.tensor([1, 0, 2, 7]))
    fc.build(module, example, act="float", exempt="*", output=tmp_path / "out")
    with fc.load(tmp_path / "out") as model:
        for index in (8, 2**31, 2**40, 2**62, -(2**62)):
            (got,) = model.run([example[0].numpy(), np.full(4, index)]).values()
            assert np.isnan(got).all()


def test_branches_of_onnx_keep_inside(tmp_path: Path) -> None:
    def graph(name: str, operator: str) -> onnx.GraphProto:
        node = helper.make_node(operator, ["h", "i"], [name], operator, axis=0)
        return helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(name, FLOAT, [4, 16])]
        )

    nodes = [
        helper.make_node("ReduceMin", ["i"], ["least"], "least", keepdims=0),
        helper.make_node("Less", ["least", "zero"], ["negative"], "negative"),
    ]
    branch = helper.make_node(
        "If",
        ["negative"],
        ["y"],
        "if",
        then_branch=graph("a", "GatherElements"),
        else_branch=graph("b", "GatherElements"),
    )
    path = make_onnx(
        tmp_path / "model.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["h"], "layer"), *nodes, branch],
        {"x": (FLOAT, [4, 16]), "i": (INT64, [4, 16])},
        {"y": (FLOAT, [4, 16])},
        {"w": weight(16, 16), "zero": np.array(0)},
    )
    fc.build(path, act="float", exempt="*", output=tmp_path / "out")
    with fc.load(tmp_path / "out") as model:
        for index in HUGE:
            got = model.run({"x": X, "i": np.full((4, 16), index)})["y"]
            assert np.isnan(got).all()
