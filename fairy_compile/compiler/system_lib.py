"""A pass that gives a model's functions symbols of their own, see `artifact.system_lib`."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx


def prefix_symbols(prefix: str) -> Any:
    """Return a pass that puts ``prefix`` before the symbol of every PrimFunc, and in its callers.

    Relax functions keep their names: they are entries of the executable's table, not symbols. The
    pass takes what the VM's code generator takes, as `relax.transform.AttachGlobalSymbol` left it;
    that one would do the same for a module with a prefix, but fails in TVM 0.27 ("Cannot treat type
    `ir.Call` as type `ir.Expr`").
    """

    @tvm.transform.module_pass(opt_level=0, name="PrefixSymbols")
    def run(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        renamed = {
            var: tvm.ir.GlobalVar(prefix + var.name_hint)
            for var, func in module.functions_items()
            if isinstance(func, tirx.PrimFunc)
        }

        def rename(var: tvm.ir.GlobalVar, _mutator: Any) -> tvm.ir.GlobalVar:
            return renamed.get(var, var)

        functions = {}
        for var, func in module.functions_items():
            changed = tvm_ffi.structural_mutate(func, [(tvm.ir.GlobalVar, rename)])
            if var in renamed:
                changed = changed.with_attr("global_symbol", renamed[var].name_hint)
            functions[renamed.get(var, var)] = changed
        return tvm.IRModule(functions, attrs=module.attrs).with_attr("system_lib_prefix", prefix)

    return run
