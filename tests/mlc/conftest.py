"""Models in MLC's engine, on this machine's CPU and on simulated devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

import fairy_compile as fc
from fairy_compile.compiler import cuda_binary, pipeline
from tests.emulation.conftest import rig_of  # noqa: F401
from tests.emulation.gpu_targets import use_linux_host
from tests.mlc.installed import load_engine, missing_engine

SIZES = {"context": 128, "prefill_chunk": 32, "max_batch": 4}


@pytest.fixture(scope="session", autouse=True)
def _engine() -> None:
    if (missing := missing_engine()) is not None:
        pytest.skip(missing)
    load_engine()


@pytest.fixture(scope="module")
def build(rig_of, tmp_path_factory) -> Iterator[Callable[..., Path]]:  # noqa: F811
    """Return build(device, source, **options) -> artifact that computes in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "machine_code", lambda target: nullcontext())
        patch.setattr(cuda_binary, "find_tool", lambda name: name)

        def make(device: str, source: Path, **options: object) -> Path:
            folder = tmp_path_factory.mktemp(device)
            options = {"quant": "w2", "act": "float", **SIZES, **options}
            with pytest.MonkeyPatch.context() as host:
                if device == "cpu":
                    options = {"kv_dtype": "float32", **options}
                else:
                    rig_of(device)
                    use_linux_host(host, folder / "targets", device)
                fc.build(source, target=device, output=folder / "out", **options)
            return folder / "out"

        yield make
