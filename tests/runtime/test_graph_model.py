"""`fc.load(...).run` of graphs: what is taken, what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from tests.tiny_graphs import FLOAT, INT64, helper, make_onnx, weight


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """y = x w + bias[ids], also returning the ids."""
    directory = tmp_path_factory.mktemp("graph")
    nodes = [
        helper.make_node("MatMul", ["x.in", "w"], ["h"], "fc"),
        helper.make_node("Gather", ["table", "ids"], ["b"], "lookup"),
        helper.make_node("Add", ["h", "b"], ["y"], "add"),
        helper.make_node("Identity", ["ids"], ["same"], "same"),
    ]
    path = make_onnx(
        directory / "m.onnx",
        nodes,
        {"x.in": (FLOAT, ["n", 16]), "ids": (INT64, ["n"])},
        {"y": (FLOAT, ["n", 8]), "same": (INT64, ["n"])},
        {"w": weight(16, 8), "table": weight(5, 8)},
    )
    fc.build(path, act="float", output=directory / "out")
    return directory / "out"


def inputs(rows: int = 3) -> dict[str, np.ndarray]:
    return {"x.in": weight(rows, 16, seed=1), "ids": np.arange(rows) % 5}


def test_inputs_by_name_and_in_order_give_the_same(artifact: Path) -> None:
    with fc.load(artifact, threads=1) as model:
        assert [info.name for info in model.inputs] == ["x.in", "ids"]
        assert [info.shape for info in model.outputs] == [("n", 8), ("n",)]
        by_name = model.run(inputs())
        in_order = model.run(list(inputs().values()))
        strided = model.run({**inputs(), "x.in": np.asfortranarray(inputs()["x.in"])})
    assert list(by_name) == ["y", "same"]
    for other in (in_order, strided):
        for name, array in by_name.items():
            np.testing.assert_array_equal(other[name], array)
    values = fc.quantize(weight(16, 8).T, "w2", method="alternating").dequantize()
    want = inputs()["x.in"] @ values.T + weight(5, 8)[inputs()["ids"]]
    np.testing.assert_allclose(by_name["y"], want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(by_name["same"], inputs()["ids"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids": None}, "lacks the input 'ids'"),
        ({"idz": np.zeros(3, np.int64)}, "no input 'idz'.*Did you mean ids"),
        ({"ids": np.zeros(3, np.int32)}, r"int32; expected int64.*astype\('int64'\)"),
        ({"ids": np.zeros(4, np.int64)}, "dimension n is 4 in input 'ids' and 3 in 'x.in'"),
        ({"ids": np.zeros((3, 1), np.int64)}, r"shape \(3, 1\); expected \(n\)"),
        ({"x.in": np.zeros((3, 17), np.float32)}, r"expected \(n, 16\)"),
        ({"x.in": np.zeros((0, 16), np.float32)}, "is empty"),
    ],
)
def test_wrong_inputs_are_told(artifact: Path, changes, words: str) -> None:
    given = {name: array for name, array in (inputs() | changes).items() if array is not None}
    with fc.load(artifact) as model, pytest.raises(fc.FairyError, match=words):
        model.run(given)


def test_wrong_count_and_closed_models(artifact: Path) -> None:
    model = fc.load(artifact)
    with pytest.raises(fc.FairyError, match="got 1 arrays; this graph takes 2"):
        model.run([inputs()["x.in"]])
    model.close()
    with pytest.raises(fc.FairyError, match="closed"):
        model.run(inputs())


def test_options_of_language_models_are_refused(artifact: Path) -> None:
    with pytest.raises(fc.FairyError, match="context is for language models"):
        fc.load(artifact, context=64)


def test_text_verbs_point_to_run(artifact: Path) -> None:
    from fairy_compile.runtime import load_language_model

    with pytest.raises(fc.UnsupportedError, match=r"onnx graph.*fairy_compile\.load\(.*\.run"):
        load_language_model(artifact)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["metadata"]["params"].pop(), "takes 2 parameters, but fairy.json lists 3"),
        (lambda m: m["metadata"]["inputs"].pop(), "2 inputs, but the metadata names 1"),
        (lambda m: m.update(kind="spell"), "kind is 'spell'"),
        (lambda m: m.update(kind="chat"), "mlc-chat-config.json"),
        (lambda m: m["functions"].pop("main"), "lacks the function 'main'"),
    ],
)
def test_changed_manifests_do_not_load(artifact: Path, tmp_path: Path, change, words) -> None:
    import shutil

    copy = tmp_path / "out"
    shutil.copytree(artifact, copy)
    manifest = json.loads((copy / "fairy.json").read_text())
    change(manifest)
    (copy / "fairy.json").write_text(json.dumps(manifest))
    with pytest.raises(fc.ModelFileError, match=words):
        fc.load(copy)


def test_threads_may_share_it_and_copies_are_refused(artifact: Path) -> None:
    with fc.load(artifact, threads=1) as model:
        calls = [inputs(rows) for rows in range(1, 9)]
        want = [model.run(call)["y"] for call in calls]
        with ThreadPoolExecutor(4) as pool:
            for found, y in zip(pool.map(model.run, calls * 20), want * 20, strict=True):
                np.testing.assert_array_equal(found["y"], y)
        for take in (pickle.dumps, copy.deepcopy):
            with pytest.raises(fc.FairyError, match="cannot be pickled or copied"):
                take(model)


def test_any_order_of_bytes_is_taken_and_what_is_no_array_is_told(artifact: Path) -> None:
    import torch

    given = inputs(3)
    with fc.load(artifact) as model:
        want = model.run(given)["y"]
        swapped = {
            name: array.astype(array.dtype.newbyteorder(">")) for name, array in given.items()
        }
        np.testing.assert_array_equal(model.run(swapped)["y"], want)
        for value in (torch.zeros(3, 16, requires_grad=True), [[1.0], [2.0, 3.0]]):
            with pytest.raises(fc.FairyError, match=r"input 'x\.in' is no array"):
                model.run(given | {"x.in": value})
