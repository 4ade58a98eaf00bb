"""What the codebook kernels of all CPUs share: which calls they serve, and how exact tables are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fairy_compile.config import ActContract
from fairy_compile.kernels.base import Layout
from fairy_compile.op import ACT_LEVELS, PhaseSpec

if TYPE_CHECKING:
    from fairy_compile.targets import Target

_MAX_CODES = 2**31 - 1  # code offsets are int32

# Relative errors of weights that are accepted for speed. Rounding activations to int8 costs 6e-3
# and more, to int16 2.4e-5 (`quantize_activations`): joint tables stay well below that of int8, and
# combined ones just below, so that they add a fifth to it where the errors add in squares.
MAX_JOINT_ERROR = 1e-3
MAX_INT16_ERROR = 3e-5
MAX_COMBINED_ERROR = 5e-3


def error_limits(act: ActContract) -> tuple[float, float]:
    """Return the largest errors of the weights in joint and in combined tables."""
    if act == "int16":
        return MAX_INT16_ERROR, MAX_INT16_ERROR
    return MAX_JOINT_ERROR, MAX_COMBINED_ERROR


def unsupported(
    features: Sequence[str], layout: Layout, spec: PhaseSpec, target: Target
) -> str | None:
    """Return None if a CPU with ``features`` serves ``spec`` on ``target``, else the reason."""
    missing = [f for f in features if not target.has(f)]
    if missing:
        return f"target {target.name} lacks the CPU features {', '.join(missing)}"
    if spec.act not in ACT_LEVELS:
        known = " or ".join(ACT_LEVELS)
        return f"it computes with {known} activations; this call asks for {spec.act}"
    size = layout.arrays(spec)["codes"].nbytes
    if size > _MAX_CODES:
        return f"the packed codes take {size} bytes; its offsets reach {_MAX_CODES}"
    return None
