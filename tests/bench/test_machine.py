import os
import sys

import pytest

from fairy_compile import __version__
from fairy_compile.bench.machine import Machine, peak_resident_bytes, versions


def test_this_machine_is_described():
    machine = Machine.here()
    assert machine.cpu.strip()
    assert 1 <= machine.cores <= machine.logical_cpus == os.cpu_count()
    assert set(machine.to_json()) >= {"cpu", "cores", "memory_bytes", "system", "load_average"}


def test_versions_of_what_is_installed():
    found = versions(("numpy", "no-such-package"))
    assert found["fairy-compile"] == __version__
    assert "numpy" in found
    assert "no-such-package" not in found


@pytest.mark.skipif(sys.platform == "win32", reason="needs getrusage")
def test_peak_memory_is_in_bytes_and_includes_what_was_touched():
    block = bytearray(os.urandom(1)) * (64 << 20)
    peak = peak_resident_bytes()
    assert len(block) < peak < 1 << 40
