"""The linear layers that `benchmarks/gpu_model.py` puts beside phase kernels."""

from __future__ import annotations

import pytest

from benchmarks.gpu_peers import PeerKernel
from fairy_compile.op import PhaseSpec
from fairy_compile.targets import load_target


@pytest.mark.parametrize("layout", ["dense", "four_bit"])
@pytest.mark.parametrize("batch", ["single", "many"])
def test_peers_are_functions_that_models_can_call(layout: str, batch: str) -> None:
    kernel = PeerKernel(layout)
    spec = PhaseSpec((128,), 128, 1, ("U", "W"), "tensor", "float", "float16", "float16")
    function = kernel.build(spec, load_target("cuda"), batch, {})
    assert len(function.params) == 2 + len(kernel.layout.arrays(spec))
