"""Numbers of a config.json, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairy_compile.errors import ModelFileError

_LIMIT = 1 << 24


def positive_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return config[key] if it is a positive integer of sane size, else raise `ModelFileError`."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LIMIT:
        raise ModelFileError(
            f"config.json has {key} = {value!r}; expected an integer from 1 to {_LIMIT - 1}"
        )
    return value


def positive_float(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return config[key] if it is a positive finite number, else raise `ModelFileError`."""
    value = config.get(key)
    if value is None:
        value = default
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not 0 < float(value) < 1e12:
        raise ModelFileError(f"config.json has {key} = {value!r}; expected a positive number")
    return float(value)
