"""Every test in this folder that needs the Vulkan rig says so by its fixture."""

from __future__ import annotations

import pytest

from tests.emulation.spirv_val import missing_validator
from tests.emulation.vulkan_device import missing_driver


@pytest.fixture(scope="session")
def vulkan() -> None:
    """Skip unless kernels can be validated and run."""
    reason = missing_driver() or missing_validator()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def validator() -> None:
    """Skip unless kernels can be validated."""
    reason = missing_validator()
    if reason:
        pytest.skip(reason)
