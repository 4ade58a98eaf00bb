"""The examples of ``examples/onnx`` run as their README says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from tests.tiny_graphs import mlp_onnx, weight

EXAMPLES = Path(__file__).parents[2] / "examples" / "onnx"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("example")
    fc.build(mlp_onnx(directory / "mlp.onnx"), output=directory / "out")
    return directory / "out"


def test_python_example(built: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "run_graph.py", built, "--size", "3"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "input  x: float32 [3, 32]" in done.stdout
    assert "output y: float32 [3, 7]" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="the Makefile is for Unix")
def test_cpp_example_gives_what_python_gives(built: Path, tmp_path: Path) -> None:
    if not shutil.which("make") or not shutil.which("c++"):
        pytest.skip("needs make and a C++ compiler")
    command = ["make", "-C", EXAMPLES, f"PYTHON={sys.executable}", f"BUILD={tmp_path}"]
    subprocess.run(command, capture_output=True, check=True)
    x = weight(5, 32, seed=2)
    done = subprocess.run(
        [tmp_path / "run_graph", built, "5"], input=x.tobytes(), capture_output=True, check=True
    )
    with fc.load(built) as model:
        want = model.run(x)["y"]
    got = np.frombuffer(done.stdout, np.float32).reshape(want.shape)
    np.testing.assert_array_equal(got, want)  # the same code on the same numbers
    short = subprocess.run(
        [tmp_path / "run_graph", built, "6"], input=x.tobytes(), capture_output=True, check=False
    )
    assert short.returncode == 1
    assert b"expected 192 floats" in short.stderr
