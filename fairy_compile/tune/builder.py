"""Building candidates, in worker processes: knobs in, a library file out, equal ones only once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairy_compile.targets import Target
from fairy_compile.tune.tasks import Task

SYMBOL = "candidate"
"""Name of the function in every library: equal functions make equal binaries."""


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        task: the function.
        knobs: all of them.
        directory: where the library goes.
        known: digests of the task's functions and objects that were built before.
    """

    task: Task
    knobs: Mapping[str, Any]
    directory: Path
    known: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Built:
    """What came of it.

    Attributes:
        path: the library; None for a duplicate.
        digests: of the function and of its object code.
        duplicate_of: the known digest that it shares.
    """

    path: Path | None
    digests: tuple[str, ...]
    duplicate_of: str | None = None


class _Duplicate(Exception):
    """Object code like that of another candidate came out; carries the digest."""


class Builder:
    """Serves `BuildRequest` for one target.

    Args:
        target: to compile for.
        linker: command that links libraries, in place of the target's own.
    """

    def __init__(self, target: Target, linker: tuple[str, ...] = ()) -> None:
        from fairy_compile.compiler.export import find_linker
        from fairy_compile.tvm_pair import check_tvm_pair

        check_tvm_pair()
        self.target = target
        self.link = list(linker) or (find_linker(target) if target.linkers else None)

    def __call__(self, request: BuildRequest) -> Built:
        """Build a candidate, unless its function or its object code is known."""
        import tvm
        import tvm_ffi

        from fairy_compile.compiler.cuda_binary import machine_code
        from fairy_compile.compiler.device_pipeline import pass_context, tir_pipeline

        task, target = request.task, self.target
        function = task.kernel.build(task.spec, target, task.batch, request.knobs)
        function = function.with_attr("global_symbol", SYMBOL)
        digest = f"function {tvm_ffi.structural_hash(function):016x}"
        if digest in request.known:
            return Built(None, (digest,), digest)
        binaries = machine_code(target) if target.device == "cuda" else nullcontext()
        with binaries, pass_context(target):
            library = tvm.compile(
                function, target=target.to_tvm(), tir_pipeline=tir_pipeline(target)
            )
        objects: list[str] = []
        # Of its own even where two builders make one function of different knobs at once.
        knobs = sorted(request.knobs.items())
        name = hashlib.sha256(f"{task.id} {knobs}".encode()).hexdigest()[:16]
        path = request.directory / f"{name}.{self.suffix}"
        try:
            library.export_library(str(path), fcompile=self._link(objects, request.known))
        except _Duplicate as found:
            return Built(None, (digest, str(found)), str(found))
        return Built(path, (digest, *objects))

    @property
    def suffix(self) -> str:
        """Ending of libraries: objects of a target without a linker are linked on the device."""
        library = self.target.library
        return "so" if library == "tar" and self.link else library

    def _link(self, digests: list[str], known: frozenset[str]) -> Any:
        """Return an export callback that hashes the objects, and links them if they are new."""
        from tvm.support import cc, tar

        from fairy_compile.compiler.export import link_with

        if self.link:
            inner = link_with(self.link, self.suffix)
        else:
            inner = tar.tar if self.suffix == "tar" else cc.create_shared

        def link(output: str, objects: list[str], *arguments: Any, **options: Any) -> None:
            files = sorted(Path(name) for name in objects)
            content = hashlib.sha256()
            for file in files:
                content.update(hashlib.sha256(file.read_bytes()).digest())
            digest = f"object {content.hexdigest()[:32]}"
            if digest in known:
                raise _Duplicate(digest)
            digests.append(digest)
            inner(output, objects, *arguments, **options)

        link.output_format = self.suffix
        return link
