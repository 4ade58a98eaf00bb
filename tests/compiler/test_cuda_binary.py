"""Machine code of CUDA libraries, compiled without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import fairy_compile as fc
from fairy_compile.compiler import cuda_binary
from fairy_compile.errors import FairyError
from fairy_compile.kernels.cuda import CudaPlanes
from fairy_compile.targets import load_target
from tests.kernels.cases import make_spec

needs_nvcc = pytest.mark.skipif(
    cuda_binary.find_tool("nvcc") is None, reason="needs nvcc: pip install nvidia-cuda-nvcc"
)


def test_a_build_without_nvcc_says_what_to_install(model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cuda_binary, "find_tool", lambda name: None)
    with pytest.raises(FairyError, match="compiled by nvcc, which is not installed; install"):
        fc.build(model, target="cuda", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_architectures_are_checked_and_sorted():
    target = load_target("cuda")
    assert cuda_binary.archs(replace(target, extra={"archs": ["sm_100", "sm_90a", "sm_80"]})) == (
        "sm_80",
        "sm_90a",
        "sm_100",
    )
    with pytest.raises(FairyError, match="architecture 'hopper'; allowed: sm_80"):
        cuda_binary.archs(replace(target, extra={"archs": ["hopper"]}))


@needs_nvcc
def test_what_nvcc_says_is_passed_on():
    nvcc = cuda_binary.find_tool("nvcc")
    with pytest.raises(FairyError, match=r"nvcc could not compile the kernels: .*undefined"):
        cuda_binary.compile_fatbin("int f() { return missing; }", ["sm_80"], nvcc)


@needs_nvcc
@pytest.mark.parametrize("batch", ["single", "many"])
def test_kernels_compile_for_an_architecture(batch):
    spec = replace(make_spec(act="int16"), dtype="float16", out_dtype="float16")
    launch = CudaPlanes().launches(spec, batch, {})[-1]
    kernel = (
        '\nextern "C" __global__ void kernel(const half* x, const unsigned char* codes, '
        f"const float* scales, half* y, int batch) {{ {launch.function}(x, codes, scales, y, "
        "batch); }\n"
    )
    binary = cuda_binary.compile_fatbin(
        launch.source + kernel, ["sm_80"], cuda_binary.find_tool("nvcc")
    )
    assert b"\x7fELF" in binary


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "magic"), [("cuda", b"\x7fELF"), ("arm64-cuda", b"\x7fELF"), ("windows-cuda", b"MZ")]
)
def test_a_library_holds_machine_code_and_no_source(
    model: Path, tmp_path: Path, monkeypatch, name: str, magic: bytes
) -> None:
    if name != "cuda":
        pytest.importorskip("ziglang", reason='needs: pip install "fairy-compile[cross]"')
    monkeypatch.setattr(cuda_binary, "archs", lambda target: ("sm_80", "sm_90"))
    report = fc.build(model, target=name, act="int16", output=tmp_path / "out", context=64)
    assert set(report.kernels()) == {"cuda.planes"}
    (file,) = (tmp_path / "out").glob("model.*")
    library = file.read_bytes()
    assert library.startswith(magic)
    assert library[1:].count(b"\x7fELF") >= 2  # one for each architecture
    assert b"__global__" not in library
