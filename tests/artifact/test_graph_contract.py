"""The contract of graph libraries: what is refused, in words."""

from __future__ import annotations

import copy

import pytest

from fairy_compile.artifact.graph_contract import check_graph

FUNCTIONS = {
    "main": "(batch, 4) float32, params -> [(batch, 2) float32, (batch) int64]",
    "_metadata": "-> string",
}
METADATA = {
    "kind": "graph",
    "quantization": "fairy-w2",
    "inputs": [{"name": "x", "shape": ["batch", 4], "dtype": "float32"}],
    "outputs": [
        {"name": "y", "shape": ["batch", 2], "dtype": "float32"},
        {"name": "best", "shape": ["batch"], "dtype": "int64"},
    ],
    "params": [{"name": "fc.codes", "shape": [2, 4], "dtype": "uint8"}],
}


def test_a_good_library_has_no_problems() -> None:
    assert check_graph(FUNCTIONS, METADATA) == []


def change(path: list, value) -> tuple[dict, dict]:
    functions, metadata = copy.deepcopy(FUNCTIONS), copy.deepcopy(METADATA)
    if path[0] == "functions":
        functions[path[1]] = value
        return functions, metadata
    *way, last = path
    place = metadata
    for step in way:
        place = place[step]
    place[last] = value
    return functions, metadata


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["functions", "main"], "(batch, 4) float32 -> (batch, 2) float32", "last argument"),
        (["functions", "main"], "(batch, 5) float32, params -> (a) int64", "inputs"),
        (["functions", "main"], "nonsense", "malformed"),
        (["kind"], "chat", "kind"),
        (["inputs"], [], "1 inputs, but the metadata names 0"),
        (["inputs", 0, "shape"], ["batch", 5], "calls 'x'"),
        (["inputs", 0, "shape"], ["batch"], "calls 'x'"),
        (["inputs", 0, "shape"], "wide", "array"),
        (["outputs", 1, "dtype"], "float32", "calls 'best'"),
        (["outputs", 1, "name"], "y", "twice"),
        (["params", 0, "shape"], ["n"], "integer"),
    ],
)
def test_broken_libraries_are_described(path, value, words: str) -> None:
    problems = check_graph(*change(path, value))
    assert problems
    assert words in problems[0], problems[0]


def test_missing_functions_are_named() -> None:
    assert "'main'" in check_graph({"_metadata": "-> string"}, METADATA)[0]
