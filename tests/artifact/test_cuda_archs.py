"""Which GPUs machine code runs on, by NVIDIA's rules of compatibility."""

from __future__ import annotations

import pytest

from fairy_compile.artifact.cuda_archs import runs_on

FAT = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (FAT, "8.0", True),
        (FAT, "8.7", True),  # code of 8.6
        (FAT, "12.0", True),  # PTX of 10.0
        (FAT, "7.5", False),
        (("sm_86",), "8.0", False),
        (("sm_86",), "9.0", True),  # PTX
        (("sm_90a",), "9.0", True),
        (("sm_90a",), "10.0", False),
        (("sm_90a",), "8.9", False),
        (("sm_80", "sm_90a"), "10.0", True),  # PTX of 8.0
        (("hopper",), "9.0", False),
        ((), "9.0", False),
    ],
)
def test_runs_on(archs, capability, runs):
    assert runs_on(archs, capability) is runs
