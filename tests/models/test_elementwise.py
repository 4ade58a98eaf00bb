"""What lies between layers: the form for other devices computes what the one for CPUs does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm.relax.frontend import nn

from fairy_compile.models.elementwise import regroup_heads, relu2_product, round_tokens
from fairy_compile.targets import Target, load_target

ELSEWHERE = Target("test", "", {"kind": "cuda"}, frozenset(), ())
Function = Callable[[nn.Tensor, Target], nn.Tensor]


def compute(function: Function, target: Target, x: np.ndarray) -> np.ndarray:
    """Run a function of (1, n, size) on this CPU, as made for ``target``."""

    class Module(nn.Module):
        def forward(self, x: nn.Tensor) -> nn.Tensor:
            return function(x, target)

    spec = {"forward": {"x": nn.spec.Tensor([1, "n", x.shape[-1]], "float32")}}
    module, _ = Module().export_tvm(spec=spec)
    executable = tvm.relax.build(module, target=load_target("cpu").to_tvm())
    result = tvm.relax.VirtualMachine(executable, tvm.cpu())["forward"](tvm.runtime.tensor(x))
    return (result if isinstance(result, tvm.runtime.Tensor) else result[0]).numpy()


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (lambda x, t: round_tokens(x, t, guarded=False), 2 * 300),
        (lambda x, t: round_tokens(x, t, guarded=True), 2 * 300),
        (lambda x, t: round_tokens(x, t, guarded=True), 2 * 7),
        (lambda x, t: regroup_heads(x, [4, 2, 2], 6, t, to_heads=True), 96),
        (lambda x, t: regroup_heads(x, [5], 3, t, to_heads=False), 30),
        (relu2_product, 4 * 40),
    ],
)
def test_both_forms_agree(function: Function, size: int) -> None:
    rng = np.random.default_rng(size)
    x = rng.standard_normal((1, 5, size)) * 10.0 ** rng.integers(-3, 4, (1, 5, 1))
    x = x.astype(np.float32)
    seen = compute(function, ELSEWHERE, x)
    # LLVM may contract a product and a sum where there is one, which rounding has not.
    np.testing.assert_allclose(seen, compute(function, load_target("cpu"), x), rtol=1e-5)
