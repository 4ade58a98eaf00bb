"""Joining a model's objects with TVM's runtime to one WebAssembly module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairy_compile.codegen.wasm.module import REQUIRED_EXPORTS, check_module
from fairy_compile.codegen.wasm.runtime import TARGET, build_runtime, find_zig, run_zig

_STACK_BYTES = 1 << 20
_FLAGS = (
    *TARGET,
    # No main function: the module is initialised, and then waits for calls.
    "-mexec-model=reactor",
    "-s",
    f"-Wl,-z,stack-size={_STACK_BYTES}",
    *(f"-Wl,--export={name}" for name in REQUIRED_EXPORTS if name not in ("_initialize", "memory")),
)


def link(output: str, objects: list[str], options: Any = None, **_: Any) -> None:
    """Link ``objects`` with the runtime; a callback of TVM's ``export_library``.

    Raises:
        FairyError: there is no zig, or compiling or linking failed.
    """
    runtime = [str(path) for path in build_runtime()]
    run_zig([*find_zig(), "c++", *_FLAGS, "-o", output, *runtime, *objects])
    problems = check_module(Path(output))
    if problems:
        raise RuntimeError(
            "TVM's JavaScript runtime cannot load the library: " + "; ".join(problems)
        )


link.object_format = "o"  # objects and not bitcode, which only one version of LLVM reads
