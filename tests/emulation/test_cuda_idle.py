"""What TVM's own CUDA runtime asks a driver for, step by step.

The driver (idle_driver.c) computes nothing, so this shows nothing of results, which
test_cuda_steps.py does: it shows that a step is recorded as CUDA allows, and replayed by one call.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fairy_compile.compiler.cuda_binary import find_tool
from tests.tiny_models import SIZES, save_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def missing_runtime() -> str | None:
    """Return what is missing to run these tests, or None."""
    import tvm

    if not find_tool("nvcc") or not shutil.which("gcc"):
        return "needs nvcc and gcc"
    runtime = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    return None if runtime.exists() else "needs a TVM that was built with its CUDA runtime"


pytestmark = [
    pytest.mark.skipif(missing_runtime() is not None, reason=str(missing_runtime())),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the driver's libraries."""
    folder = tmp_path_factory.mktemp("driver")
    compile_library = ["gcc", "-O1", "-shared", "-fPIC", str(HERE / "idle_driver.c")]
    driver, runtime = folder / "libcuda.so.1", folder / "libcudart.so.13"
    named = [f"-Wl,-soname,{driver.name}", "-DDRIVER", "-o", str(driver)]
    subprocess.run([*compile_library, *named], check=True)
    versions = folder / "versions"
    versions.write_text(f"{runtime.name} {{ global: *; }};\n")
    named = [f"-Wl,-soname,{runtime.name}", f"-Wl,--version-script={versions}"]
    linked = ["-L", str(folder), f"-l:{driver.name}", "-o", str(runtime)]
    subprocess.run([*compile_library, *named, *linked], check=True)
    return folder


@pytest.fixture(scope="module")
def found(driver: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return what idle_steps.py counts of a Llama of two layers."""
    folder = tmp_path_factory.mktemp("model")
    wide = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512}
    source = save_model(folder / "source", "llama", **wide)
    out = folder / "out"
    # In processes of their own: tests before these may simulate a device in this one.
    sizes = ["--context", "512", "--prefill-chunk", "64", "--max-batch", "4"]
    how = ["--target", "cuda-hopper", "--act", "int16", "--cuda-graphs", *sizes, "-o", str(out)]
    run_module("fairy_compile.cli", "build", str(source), *how)
    output = run_module("tests.emulation.idle_steps", str(out), driver=driver)
    return json.loads(output.splitlines()[-1])


def run_module(*command: str, driver: Path | None = None) -> str:
    """Run a module with its arguments, on the driver if given, and return its stdout."""
    environment = dict(os.environ)
    if driver is not None:
        paths = [str(driver), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = ":".join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(found: dict, what: str) -> list[dict]:
    return [row for row in found["rows"] if row["what"] == what]


def test_nothing_is_asked_for_that_recording_forbids(found) -> None:
    assert found["violations"] == 0, found["violation"]


@pytest.mark.parametrize("what", ["decode", "batch", "long"])
def test_a_step_is_recorded_once_and_is_one_graph(found, what: str) -> None:
    first, *others = rows(found, what)
    assert first["instantiated"] == 1
    assert first["graphs"] == 0
    # Of the whole step all but the head, which runs beside the graph each time.
    assert first["launches"] == first["nodes"] + 1
    for row in others:
        assert (row["graphs"], row["launches"], row["instantiated"]) == (1, 1, 0)
        # Tokens and tables go to the device, logits come back, which is waited for.
        assert (row["copies"], row["syncs"], row["allocations"]) == (2, 1, 0)


def test_launches_of_a_layer(found) -> None:
    """qkv, attention, o, gate and up, their product, down; and the embedding."""
    assert rows(found, "decode")[0]["nodes"] == 1 + 6 * SIZES["num_hidden_layers"]
    # Parts of contexts are merged.
    assert rows(found, "long")[0]["nodes"] == 1 + 7 * SIZES["num_hidden_layers"]


def test_a_fork_copies_one_page_of_each_layer(found) -> None:
    (row,) = rows(found, "fork")
    assert row["copies"] == SIZES["num_hidden_layers"]
    assert row["launches"] == row["syncs"] == 0


def test_kernels_are_seen_without_graphs(found) -> None:
    for what in ("trace", "time"):
        (row,) = rows(found, what)
        assert row["instantiated"] == row["graphs"] == 0
    for calls in (found["traced"], found["timed"]):
        counts = [n for name, n in calls.items() if name.startswith("attention_pages")]
        assert counts == [SIZES["num_hidden_layers"]]
