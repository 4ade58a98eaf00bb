"""Running libraries for Windows on Linux: TVM's runtime for Windows under Wine.

The runtime is that of TVM's wheel for Windows, which `make windows-tools` unpacks into the user's
cache. There is no Python for Windows here: `windows_host.cc` does what `fairy_compile.load` does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

from fairy_compile.codegen.zig import zig_command
from fairy_compile.compiler.export import import_library
from fairy_compile.user_cache import cache_directory

TOOLS = "FAIRY_COMPILE_WINDOWS_TOOLS"
"""Environment variable: where `make windows-tools` unpacked the wheels, if not in the cache."""
_LIBRARIES = ("tvm_ffi.dll", "tvm_runtime.dll", "tvm_runtime_extra.dll")
_FLAGS = ("-target", "x86_64-windows-gnu", "-std=c++17", "-O1")


def _tools() -> Path:
    return Path(os.environ.get(TOOLS) or cache_directory() / "windows")


def missing_tools() -> str | None:
    """Return what to install to run these tests, or None."""
    if zig_command() is None:
        return 'needs: pip install "fairy-compile[cross]"'
    if shutil.which("wine") is None:
        return "needs the Debian packages wine and wine64"
    found = {path.name for path in _tools().rglob("*.dll")}
    if not found >= set(_LIBRARIES):
        return f"needs TVM's wheels for Windows in {_tools()}: make windows-tools"
    return None


class WineRig:
    """A Windows of its own, with TVM's runtime and the program that runs models.

    Args:
        directory: an empty one.
    """

    def __init__(self, directory: Path) -> None:
        from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

        self.directory = directory
        for library in _tools().rglob("*.dll"):
            shutil.copy(library, directory)
        zig = zig_command()
        imports = import_library([*zig, "cc"], directory)
        includes = [f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}"]
        source = Path(__file__).with_name("windows_host.cc")
        command = [*zig, "c++", *_FLAGS, *includes, str(source), str(imports)]
        subprocess.run([*command, "-o", str(directory / "windows_host.exe")], check=True)
        self.environment = os.environ | {
            "WINEPREFIX": str(directory / "wine"),
            "WINEDEBUG": "-all",
        }

    def logits(self, artifact: Path, tokens: list[int], prompt: int, context: int) -> np.ndarray:
        """Run a model: ``prompt`` tokens at once, the others one by one.

        Returns:
            float32 (len(tokens) - prompt + 1, vocabulary): logits after the prompt, and after every
            other token.
        """
        manifest = json.loads((artifact / "fairy.json").read_text("utf-8"))
        names = self.directory / "names.txt"
        names.write_text("".join(f"{p['name']}\n" for p in manifest["metadata"]["params"]))
        places = [f"Z:{path}" for path in (artifact / "model.dll", artifact, names)]
        done = subprocess.run(
            ["wine", "windows_host.exe", *places, *map(str, [context, prompt, *tokens])],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return np.frombuffer(done.stdout, np.float32).reshape(len(tokens) - prompt + 1, -1)
