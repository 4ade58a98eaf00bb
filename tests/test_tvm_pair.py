"""The exact pair of TVM packages."""

from __future__ import annotations

from importlib import metadata

import pytest

from fairy_compile import FairyError
from fairy_compile.tvm_pair import TVM_PAIR, check_tvm_pair


def test_the_pinned_pair_is_accepted() -> None:
    check_tvm_pair()


@pytest.mark.parametrize("package", sorted(TVM_PAIR))
@pytest.mark.parametrize("version", ["0.1.15", None])
def test_another_pair_is_refused_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str | None
) -> None:
    def fake(name: str) -> str:
        if name != package:
            return TVM_PAIR[name]
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", fake)
    with pytest.raises(FairyError) as error:
        check_tvm_pair()
    command = "pip install " + " ".join(f"{k}=={v}" for k, v in TVM_PAIR.items())
    assert command in str(error.value)
    assert (version or "not installed") in str(error.value)


def test_the_package_metadata_pins_the_same_pair() -> None:
    requirements = metadata.requires("fairy-compile") or []
    for name, version in TVM_PAIR.items():
        assert f"{name}=={version}" in requirements
