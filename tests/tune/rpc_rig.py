"""A TVM RPC tracker and servers on this machine, some of them on emulated ARM CPUs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from fairy_compile.errors import FairyError
from fairy_compile.targets import Target, load_target
from fairy_compile.tune.rpc import count_devices

ARM_PYTHON = "FAIRY_COMPILE_ARM_PYTHON"
"""Variable with the directory that `tests/emulation/make_arm_python.sh` made."""

_EMULATOR = "qemu-aarch64-static"
_SERVER = Path(__file__).with_name("rpc_server.py")


def target_of(machine: str) -> Target:
    return load_target("arm64-linux" if machine == "arm" else "cpu")


def missing(machine: str) -> str | None:
    """Return what this machine lacks to run servers, in words."""
    if machine != "arm":
        return None
    programs = [p for p in (_EMULATOR, "aarch64-linux-gnu-gcc") if shutil.which(p) is None]
    if programs:
        return f"needs {' and '.join(programs)}"
    if not Path(os.environ.get(ARM_PYTHON, "/none"), "site").is_dir():
        return f"needs an ARM Python: tests/emulation/make_arm_python.sh DIR, {ARM_PYTHON}=DIR"
    return None


def _python(machine: str) -> tuple[list[str], dict[str, str]]:
    environment = dict(os.environ, TVM_NUM_THREADS="1")
    if machine != "arm":
        return [sys.executable], environment
    place = Path(os.environ[ARM_PYTHON])
    environment |= {"PYTHONPATH": str(place / "site"), "QEMU_CPU": "cortex-a76",
                    "TVM_USE_RUNTIME_LIB": "1"}  # fmt: skip
    root = place / "root"
    return [_EMULATOR, "-L", str(root), str(root / "usr/bin/python3.11")], environment


@contextmanager
def rig(directory: Path, machine: str, key: str, servers: list[list[str]]):
    """Run a tracker and a server for each list of `rpc_server` faults; yields the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (directory / "rpc.log").open("ab")
    quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
    tracker = [sys.executable, "-m", "tvm.exec.rpc_tracker", "--host", "127.0.0.1"]
    tracker += ["--port", str(port), "--port-end", str(port + 1)]
    started = [subprocess.Popen(tracker, start_new_session=True, **quiet)]
    python, environment = _python(machine)
    try:
        for fault in servers:
            command = [*python, str(_SERVER), str(port), key, *fault]
            started.append(
                subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
            )
        _wait(port, key, len(servers), directory / "rpc.log")
        yield "127.0.0.1", port
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        log.close()


def _wait(port: int, key: str, count: int, log: Path) -> None:
    end = time.monotonic() + 240
    while True:
        try:
            if count_devices(("127.0.0.1", port), key) == count:
                return
        except FairyError:
            pass
        if time.monotonic() > end:
            raise TimeoutError(f"{count} servers did not start: {log.read_text()[-2000:]}")
        time.sleep(0.5)
