"""Sizes of attention over the paged cache, and what all kernels of it agree on.

Scores are in units of log2. Soft-capped ones are s' = cap tanh(s / cap) (Gemma 2, arXiv 2408.00118,
section 2). A layer with a sliding window sees the ``window`` last keys, that of the query itself
included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PAGE = 16
"""Keys of a page of the cache."""

EMPTY = -1e30
"""Log-sum-exp of a row that saw no key. Finite, so that merging two of them is no NaN."""

MASKED = -3e38
"""Score of a key that is not seen: below `EMPTY` by more than any exponent, so that it weighs 0."""

FLOAT16_MAX = 65504.0
"""What larger keys become in float16: an infinity would make NaNs of a whole row of scores."""

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention layer and the dtype of its cache.

    Attributes:
        heads: query heads, a multiple of kv_heads.
        kv_heads: key/value heads; ``heads // kv_heads`` query heads share one.
        head_dim: elements of a head.
        dtype: ``float16`` or ``float32``: of pages, queries, keys, values and outputs alike, as
            the runtime demands. All arithmetic is float32.
        window: tokens of the sliding window of the layers that have one, or None if none has. The
            runtime calls the same functions for all layers and tells them nothing of the layer but
            its ``sm_scale``, so the sign of that says it: a negative one, whose magnitude is the
            scale, asks for the window.
        softcap: cap of the scores, or None.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    window: int | None = None
    softcap: float | None = None

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    @property
    def score_unit(self) -> float:
        """What kernels multiply scores by beside sm_scale: an exponential becomes a power of two.

        That is exp(s), or exp(2 s / cap) of the hyperbolic tangent.
        """
        return 2 * LOG2_E / self.softcap if self.softcap else LOG2_E
