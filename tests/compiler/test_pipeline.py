"""What comes out of the compilation pipeline besides libraries."""

from __future__ import annotations

import pytest
import tvm

from fairy_compile.compiler.pipeline import compile_module
from fairy_compile.targets import load_target


def test_ctrl_c_in_a_pass_stays_ctrl_c(monkeypatch) -> None:
    """TVM calls passes from C++, through which only errors that it knows keep their types."""

    @tvm.transform.module_pass(opt_level=0, name="Interrupted")
    def interrupted(module, context):
        raise KeyboardInterrupt

    monkeypatch.setattr("fairy_compile.compiler.pipeline.keep_only", lambda _: interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_module(tvm.IRModule(), load_target("cpu"), ["main"])
