"""`QuantConfig`: the one description of a quantisation that training and compiling share."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

from fairy_compile.errors import FairyError, nearest

Granularity = Literal["tensor", "row", "tile64"]
ActContract = Literal["int8", "int16", "float"]
Term = Literal["U", "W"]

QUANTS = {"w1": 1, "w2": 2, "w3": 3, "w4": 4}
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "row", "tile64")
ACT_CONTRACTS: tuple[ActContract, ...] = ("int8", "int16", "float")
METHODS = ("auto", "phase", "alternating", "gptq")
MAX_STAGES = 4


def is_whole(value: object) -> bool:
    """Tell whether ``value`` is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_choice(what: str, value: str, allowed: tuple[str, ...] | list[str]) -> None:
    """Raise `FairyError` naming the allowed values unless ``value`` is one of them."""
    if value not in allowed:
        raise FairyError(
            f"unknown {what} {value!r}; allowed: {', '.join(allowed)}."
            f"{nearest(str(value), list(allowed))}"
        )


def _tuple(value: object, otherwise: tuple = ()) -> tuple:
    """Return what ``value`` holds in order, ``otherwise`` for what holds nothing."""
    return tuple(value) if isinstance(value, Collection) else otherwise


@dataclass(frozen=True)
class QuantConfig:
    """How linear layers become phase codes.

    Attributes:
        quant: ``"w1"`` .. ``"w4"``: T = 1 .. 4 residual stages, i.e. T bits per real weight
            (Fairy2i, section on recursive residual quantisation).
        scale: granularity of the scales: one pair per ``tensor``, per complex ``row``, or per
            64x64 complex ``tile64``.
        terms: ``("U", "W")`` for widely-linear layers (Fairy2i), ``("W",)`` for iFairy.
        act: activation contract of the compiled kernels: ``int8`` or ``int16`` (groups of 128
            columns, see `op.reference.quantize_activations`) or ``float``.
        method: how codes are chosen. ``"phase"`` is the papers' rule, which weights trained for it
            need; ``"alternating"`` fits codes and scales to each other, which serves ordinary
            weights better; ``"gptq"`` also looks at what calibration text makes of them and is
            better still. ``"auto"`` picks by what the checkpoint says of itself and whether there
            is text, see `frontends.method`.
        exempt: glob patterns of layer names that stay dense, e.g. ``("lm_head",)``.
        stages_for: glob pattern -> T, overriding ``quant`` for single layers; first match wins.

    Raises:
        FairyError: a value is outside what is allowed above.
    """

    quant: str = "w2"
    scale: Granularity = "tensor"
    terms: tuple[Term, ...] = ("U", "W")
    act: ActContract = "int8"
    method: str = "auto"
    exempt: tuple[str, ...] = ()
    stages_for: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("--quant", self.quant, list(QUANTS))
        check_choice("--scale", self.scale, GRANULARITIES)
        check_choice("--act", self.act, ACT_CONTRACTS)
        check_choice("--method", self.method, METHODS)
        if _tuple(self.terms) not in (("U", "W"), ("W",)):
            raise FairyError(f"unknown terms {self.terms!r}; allowed: ('U', 'W') or ('W',)")
        if isinstance(self.exempt, str):  # its letters would be taken for patterns
            raise FairyError(
                f"exempt is {self.exempt!r}; allowed: a tuple of patterns, such as "
                f"({self.exempt!r},)"
            )
        if not all(isinstance(pattern, str) for pattern in _tuple(self.exempt, (None,))):
            raise FairyError(
                f"exempt is {self.exempt!r:.80}; allowed: a tuple of patterns, such as ('lm_head',)"
            )
        object.__setattr__(self, "exempt", tuple(self.exempt))
        if not isinstance(self.stages_for, Mapping):
            raise FairyError(
                f"stages_for is {self.stages_for!r:.80}; allowed: a dictionary of patterns and T, "
                "such as {'lm_head': 3}"
            )
        for pattern, stages in self.stages_for.items():
            if not isinstance(pattern, str):
                raise FairyError(f"stages_for has the pattern {pattern!r:.80}; allowed: text")
            if type(stages) is not int or not 1 <= stages <= MAX_STAGES:
                raise FairyError(
                    f"stages_for[{pattern!r}] is {stages!r}; allowed: an integer from 1 to "
                    f"{MAX_STAGES}"
                )

    def stages(self, layer: str = "") -> int:
        """Return T, the number of residual stages, of the layer named ``layer``."""
        for pattern, stages in self.stages_for.items():
            if fnmatch.fnmatchcase(layer, pattern):
                return stages
        return QUANTS[self.quant]

    def names_stages(self, layer: str) -> bool:
        """Tell whether ``stages_for`` has a pattern for the layer named ``layer``."""
        return any(fnmatch.fnmatchcase(layer, pattern) for pattern in self.stages_for)

    def is_exempt(self, layer: str) -> bool:
        """Tell whether the layer named ``layer`` was asked to stay dense."""
        return any(fnmatch.fnmatchcase(layer, pattern) for pattern in self.exempt)

    def to_json(self) -> dict[str, Any]:
        """Return the plain dictionary that checkpoints and artifacts store."""
        return {
            "quant": self.quant,
            "scale": self.scale,
            "terms": list(self.terms),
            "act": self.act,
            "method": self.method,
            "exempt": list(self.exempt),
            "stages_for": dict(self.stages_for),
        }
