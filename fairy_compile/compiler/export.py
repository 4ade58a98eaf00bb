"""Writing a compiled executable as a model library for its target."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairy_compile.codegen import wasm
from fairy_compile.codegen.zig import zig_command
from fairy_compile.compiler.cuda_binary import check_nvcc
from fairy_compile.errors import FairyError
from fairy_compile.targets import Target

if TYPE_CHECKING:
    from fairy_compile.compiler.pipeline import Progress

STEM = "model"


def library_name(target: Target) -> str:
    """Return the file name of the library, e.g. ``model.so``."""
    return f"{STEM}.{target.library}"


def export_library(
    executable: Any, target: Target, directory: Path, progress: Progress | None = None
) -> Path:
    """Write the model library of ``executable`` into ``directory``.

    ``so``, ``dylib`` and ``dll`` libraries for a foreign machine are linked by the first of the
    target's linkers that is installed; ``tar`` holds the objects of a system library for an app's
    linker; ``wasm`` holds TVM's runtime besides the model, see `codegen.wasm`.

    Raises:
        FairyError: no linker for the target is installed, or linking failed.
    """
    path = directory / library_name(target)
    options: dict[str, Any] = {}
    if target.library == "tar":
        options["fcompile"] = _pack
    elif target.library == "wasm":
        if progress and not wasm.runtime_is_built():
            progress("compile TVM's runtime for browsers, once: minutes", 0, 1)
        options["fcompile"] = wasm.link
    elif target.linkers:
        options["fcompile"] = link_with(find_linker(target), target.library)
    with _objects_directory(directory) as objects:
        executable.export_library(str(path), workspace_dir=objects, **options)
    return path


@contextmanager
def _objects_directory(directory: Path) -> Iterator[str | None]:
    """Yield a directory in ``directory`` for objects to be linked, which is removed.

    Where TVM puts them by default, with other temporary files, there may be no room left: LLVM then
    ends the process. ``directory`` was found to have room. None, where its name is no Unicode, as
    TVM wants it, stands for that default.
    """
    objects = directory / ".objects"
    try:
        str(objects).encode()
    except UnicodeEncodeError:
        yield None
        return
    shutil.rmtree(objects, ignore_errors=True)  # of a build that was killed
    objects.mkdir()
    try:
        yield str(objects)
    finally:
        shutil.rmtree(objects, ignore_errors=True)


def check_linker(target: Target) -> None:
    """Raise `FairyError` if this machine lacks what makes a library for ``target``."""
    if target.device == "cuda":
        check_nvcc(target)
    if target.library == "wasm":
        wasm.find_zig()
    elif target.linkers and target.library != "tar":
        find_linker(target)


def find_linker(target: Target) -> list[str]:
    """Return the first of the target's link commands whose program is installed.

    Raises:
        FairyError: none is; the message names what to install.
    """
    for command in target.linkers:
        program, *rest = command.split()
        if program == "zig":
            zig = zig_command()
            if zig:
                return [*zig, *rest]
        elif shutil.which(program):
            return [program, *rest]
    programs = ", ".join(command.split()[0] for command in target.linkers)
    raise FairyError(
        f"target {target.name} needs a linker for its machine, and none of these is installed: "
        f'{programs}; the quickest is: pip install "fairy-compile[cross]"'
    )


def _pack(output: str, objects: list[str], **_: Any) -> None:
    """Write a tar file that depends on nothing but the objects, unlike that of the tar command."""
    with gzip.GzipFile(output, "wb", mtime=0) as stream, tarfile.open(None, "w", stream) as tar:
        for path in map(Path, objects):
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            with path.open("rb") as content:
                tar.addfile(member, content)


_pack.output_format = "tar"


def link_with(command: list[str], library: str = "so") -> Any:
    """Return an export callback that links objects with ``command``.

    Args:
        command: the linker and its options.
        library: what kind to make, see `Target`.
    """

    def link(output: str, objects: list[str], options: Any = None, **_: Any) -> None:
        _link([*command, "-o", output, *objects])

    def link_dll(output: str, objects: list[str], options: Any = None, **_: Any) -> None:
        # Linkers leave files for debuggers and other linkers next to the library.
        with tempfile.TemporaryDirectory(prefix="fairy-") as directory:
            imports = import_library(command, Path(directory))
            linked = Path(directory, Path(output).name)
            _link([*command, "-o", str(linked), *objects, str(imports)])
            shutil.move(linked, output)

    chosen = link_dll if library == "dll" else link
    chosen.output_format = "dll" if library == "dll" else "so"
    return chosen


def import_library(linker: list[str], directory: Path) -> Path:
    """Write what a library for Windows needs to call tvm-ffi, which is loaded before it.

    Libraries of other systems leave such functions open; one for Windows names their library.

    Raises:
        FairyError: the ``dlltool`` that belongs to ``linker`` is missing or fails.
    """
    from tvm_ffi.libinfo import find_include_path

    header = Path(find_include_path(), "tvm", "ffi", "c_api.h").read_text("utf-8")
    names = sorted(set(re.findall(r"TVM_FFI_DLL[^;]*?\b(TVMFFI\w+)\(", header)))
    definition, library = directory / "tvm_ffi.def", directory / "tvm_ffi.lib"
    definition.write_text("\n".join(["LIBRARY tvm_ffi.dll", "EXPORTS", *names, ""]), "utf-8")
    if "cc" in linker:  # zig cc ...
        tool = [*linker[: linker.index("cc")], "dlltool"]
    elif "gcc" in linker[0]:
        tool = [linker[0].replace("gcc", "dlltool")]
    else:
        tool = ["llvm-dlltool"]
    _link([*tool, "-m", "i386:x86-64", "-d", str(definition), "-l", str(library)])
    return library


def _link(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FairyError(
            f'{command[0]} is not installed; the quickest is: pip install "fairy-compile[cross]"'
        ) from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        told = next((line for line in lines if "error" in line), lines[-1])
        raise FairyError(f"linking the model library failed: {command[0]}: {told}")
