"""Simulated devices for tests that run on several."""

from __future__ import annotations

from typing import Any

import pytest

from tests.emulation.rigs import RIGS


@pytest.fixture(scope="module")
def rig_of(tmp_path_factory: pytest.TempPathFactory):
    """Return rig_of(kind), which makes each device once; tests skip where its tools are missing."""
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        missing_tools, make = RIGS[kind]
        if (missing := missing_tools()) is not None:
            pytest.skip(missing)
        if kind not in made:
            made[kind] = make(tmp_path_factory.mktemp(kind))
        return made[kind]

    return get
