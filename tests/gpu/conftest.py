"""The cases of `tests.gpu.cases`, ready to run, and the reason where they cannot be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fairy_compile.errors import UnsupportedError
from fairy_compile.runtime.library import open_device
from tests.emulation.gpu_modules import is_simulated
from tests.gpu.cases import CASES, Case, build_case

PREBUILT = "FAIRY_COMPILE_GPU_CASES"


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if is_simulated("cuda"):
        pytest.skip("needs a real CUDA device, and tests before these simulate one: run tests/gpu")
    try:
        open_device("cuda")
    except UnsupportedError:
        pytest.skip("needs a CUDA device that TVM can use; this machine has none")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, _gpu: None) -> Callable[[Case], Path]:
    """Return built(case) -> its artifact directory, which is built unless it was before."""
    given = os.environ.get(PREBUILT)
    root = Path(given) if given else tmp_path_factory.mktemp("gpu")

    def get(case: Case) -> Path:
        out = root / case.name
        if not given:
            build_case(case, root)
        elif not (out / "want.npz").exists():
            pytest.skip(f"{PREBUILT}={given} does not hold {case.name}")
        return out

    return get


@pytest.fixture(scope="session")
def any_built(built: Callable[[Case], Path]) -> Path:
    """Return the artifact of some case, one that is there."""
    root = Path(os.environ.get(PREBUILT, ""))
    there = [case for case in CASES if (root / case.name / "want.npz").exists()]
    return built(there[0] if there else CASES[0])
