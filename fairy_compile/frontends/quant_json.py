"""Quantisation settings that a checkpoint carries in its config.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, ModelFileError


def read_quant(value: Any, directory: Path) -> QuantConfig:
    """Rebuild the `QuantConfig` a checkpoint was made with from `QuantConfig.to_json`.

    Raises:
        ModelFileError: it is something else.
    """
    fields = QuantConfig().to_json()
    if not isinstance(value, dict) or set(value) != set(fields):
        raise ModelFileError(
            f"{directory}: the quantization_config's config is {value!r:.200}; expected the keys "
            f"{sorted(fields)}"
        )
    for key, default in fields.items():
        if not isinstance(value[key], type(default)):
            raise ModelFileError(
                f"{directory}: the quantization_config's {key} is {value[key]!r:.80}; expected "
                f"a {type(default).__name__}"
            )
    if not all(isinstance(text, str) for text in (*value["terms"], *value["exempt"])):
        raise ModelFileError(f"{directory}: the quantization_config's terms or exempt is not text")
    tuples = {key: tuple(value[key]) for key in ("terms", "exempt")}
    try:
        return QuantConfig(**(value | tuples))
    except FairyError as error:
        raise ModelFileError(f"{directory}: bad quantization_config: {error}") from error


def settle_own(own: QuantConfig, asked: QuantConfig) -> QuantConfig:
    """Return a checkpoint's own settings with the activations and exempt layers asked for.

    Stages and scales were fixed when it was made; dense layers can still be left out.
    """
    return dataclasses.replace(own, act=asked.act, exempt=asked.exempt or own.exempt)
