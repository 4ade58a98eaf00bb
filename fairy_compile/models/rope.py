"""Rope settings of a config.json, in all their spellings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.models.values import positive_float, positive_int
from fairy_compile.op.rope import RopeTable, rope_table

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# "su" is what the first LongRoPE checkpoints say.
_OLD_NAMES = {"su": "longrope"}
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a model, see `op.rope`.

    Attributes:
        theta: base of the frequencies.
        kind: one of `ROPE_TYPES`.
        settings: what the rule needs.
        fraction: share of a head's elements that turn.
    """

    theta: float
    kind: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)
    fraction: float = 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """Return how many elements of a head turn.

        Raises:
            UnsupportedError: it is an odd number, so that they form no pairs.
        """
        size = int(head_dim * self.fraction)
        if size < 2 or size % 2:
            raise UnsupportedError(
                f"rotary position embedding of {size} of {head_dim} elements of a head "
                f"(partial_rotary_factor {self.fraction:g}) is not possible; it needs an even "
                "number"
            )
        return size

    def table(self, head_dim: int, context: int) -> RopeTable:
        """Return the angles of a model built for sequences of up to ``context`` tokens."""
        size = self.rotary_dim(head_dim)
        for key in ("short_factor", "long_factor"):
            if key in self.settings and len(self.settings[key]) != size // 2:
                raise ModelFileError(
                    f"config.json has {len(self.settings[key])} values in {key}; its heads have "
                    f"{size // 2} pairs"
                )
        return rope_table(self.kind, self.theta, size, self.settings, context)

    @property
    def native_context(self) -> int | None:
        """The length up to which the rule is that of shorter sequences, or None if it is always."""
        if self.kind in ("dynamic", "longrope"):
            return int(self.settings["original_max_position_embeddings"])
        return None


def parse_rope(
    config: Mapping[str, Any], settings: Mapping[str, Any] | None = None, theta: float = 10000.0
) -> Rope:
    """Read rope settings in either spelling: ``rope_scaling`` or ``rope_parameters``.

    Args:
        config: config.json.
        settings: the object that holds them, where a family has several.
        theta: base if none is given.

    Raises:
        UnsupportedError: a rope type this version does not lower; the message lists those it does.
        ModelFileError: a value is missing or out of range.
    """
    if settings is None:
        settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise ModelFileError(f"config.json has rope settings {settings!r}; expected an object")
    kind = settings.get("rope_type", settings.get("type", "default"))
    kind = _OLD_NAMES.get(kind, kind)
    if kind not in ROPE_TYPES:
        raise UnsupportedError(
            f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    theta = positive_float(settings if "rope_theta" in settings else config, "rope_theta", theta)
    partial = settings if "partial_rotary_factor" in settings else config
    fraction = positive_float(partial, "partial_rotary_factor", 1.0)
    if fraction > 1:
        raise ModelFileError(
            f"config.json has partial_rotary_factor = {fraction!r}; expected a number up to 1"
        )
    return Rope(theta, kind, _settings(kind, config, settings), fraction)


def _settings(kind: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the rule needs, checked."""
    values: dict[str, Any] = {key: positive_float(given, key) for key in _NEEDED.get(kind, ())}
    if kind in ("default", "linear"):
        return values
    longest = positive_int(config, "max_position_embeddings", 2048)
    own = "original_max_position_embeddings"
    # Phi-3 has it beside the rope settings, and dynamic stretches what the model was trained for.
    where = config if config.get(own) is not None else given
    original = longest if kind == "dynamic" else positive_int(where, own, longest)
    values[own] = original
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ModelFileError(
            "config.json has high_freq_factor <= low_freq_factor in its llama3 rope settings"
        )
    if kind in ("yarn", "longrope"):
        values["factor"] = positive_float(given, "factor", longest / original)
        values["attention_factor"] = _optional(given, "attention_factor")
    if kind == "yarn":
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            values[key] = positive_float(given, key, default)
        for key in ("mscale", "mscale_all_dim"):
            # 0 stands for "not given" in checkpoints.
            values[key] = _optional(given, key) if given.get(key) else None
        values["truncate"] = given.get("truncate", True) is not False
    if kind == "longrope":
        if original < 2:
            raise ModelFileError(
                f"config.json has {own} = {original}; expected 2 or more for longrope, whose rule "
                "divides by its logarithm"
            )
        for key in ("short_factor", "long_factor"):
            values[key] = _factors(given, key)
    return values


def _optional(given: Mapping[str, Any], key: str) -> float | None:
    return None if given.get(key) is None else positive_float(given, key)


def _factors(given: Mapping[str, Any], key: str) -> tuple[float, ...]:
    factors = given.get(key)
    if not isinstance(factors, list) or not 0 < len(factors) <= 1024:
        raise ModelFileError(
            f"config.json has {key} = {str(factors)[:60]}; expected a list of numbers, one a pair"
        )
    return tuple(positive_float({key: factor}, key) for factor in factors)
