"""The last look at a compiled library before it is published: does an engine find what it calls?

`artifact.check_library` holds signatures, dtypes and metadata of the module against the contract
before anything is written. What passes made of it is looked at here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairy_compile.artifact.signature import Signature
from fairy_compile.artifact.system_lib import check_system_lib, read_system_lib
from fairy_compile.targets import Target


def check_executable(executable: Any, signatures: Mapping[str, Signature]) -> None:
    """Check that the VM executable has every function with a result, with as many arguments.

    Functions that work in place are symbols of the host code, see `check_objects`; those of a
    shared library are looked up when it is loaded.

    Raises:
        RuntimeError: it has not; passes dropped or changed a function.
    """
    arity = executable.mod["vm_load_executable"]()["get_function_arity"]
    for name, signature in signatures.items():
        if signature.result.kind == "none":
            continue
        try:
            found = int(arity(name))
        except Exception as error:
            raise RuntimeError(f"the executable has no function {name!r}") from error
        if found != len(signature.args):
            raise RuntimeError(
                f"function {name!r} of the executable takes {found} arguments, not "
                f"{len(signature.args)}"
            )


def check_objects(
    path: Path, system_lib: str, target: Target, signatures: Mapping[str, Signature]
) -> None:
    """Check that an app can link the objects of the tar file ``path``.

    Raises:
        RuntimeError: it cannot, see `artifact.system_lib`.
    """
    problems = check_system_lib(
        read_system_lib(path),
        system_lib,
        device=target.device,
        triple=target.triple,
        functions=signatures,
    )
    if problems:
        raise RuntimeError("no app can link the model library: " + "; ".join(problems))
