"""The machine and the versions a measurement belongs to, in public terms."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("apache-tvm", "apache-tvm-ffi", "numpy")
PEER_PACKAGES = ("llama-cpp-python", "gguf")


@dataclass(frozen=True)
class Machine:
    """Where a measurement was taken.

    Attributes:
        cpu: the processor's own name.
        cores: physical cores this process may use.
        logical_cpus: with hyper-threads.
        memory_bytes: installed memory; 0 where the system does not tell.
        system: operating system and architecture, e.g. ``Linux x86_64``.
        load_average: runnable processes of the last minute before the measurement; a number well
            above 0 means that others used the machine. None where the system does not tell.
    """

    cpu: str
    cores: int
    logical_cpus: int
    memory_bytes: int
    system: str
    load_average: float | None

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return asdict(self)

    @classmethod
    def here(cls) -> Machine:
        """Describe this machine."""
        from fairy_compile.runtime.threads import default_threads

        return cls(
            cpu=_cpu_name(),
            cores=default_threads(),
            logical_cpus=os.cpu_count() or 1,
            memory_bytes=memory_bytes(),
            system=f"{platform.system()} {platform.machine()}",
            load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return package -> version, of this program, Python and those ``packages`` installed."""
    from fairy_compile import __version__

    found = {"fairy-compile": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_resident_bytes() -> int | None:
    """Return the most memory this process has had resident, None where it is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Return the machine's memory, 0 where it is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, or a name the system lacks
        return 0
