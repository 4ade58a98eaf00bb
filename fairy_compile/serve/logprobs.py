"""Log-probabilities of drawn tokens."""

from __future__ import annotations

import numpy as np

from fairy_compile.serve.request import TokenLogprob


def token_logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """Return the log-probability of ``token`` under softmax(logits) and the ``top`` likeliest.

    Args:
        logits: float32 [vocab].
        token: the drawn token.
        top: how many alternatives to report; equal ones are ordered by id.
    """
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    best: tuple[tuple[int, float], ...] = ()
    if top:
        threshold = np.partition(values, -top)[-top]
        ids = np.flatnonzero(values >= threshold)
        ids = ids[np.argsort(-values[ids], kind="stable")][:top]
        best = tuple((int(i), float(values[i])) for i in ids)
    return TokenLogprob(token, float(values[token]), best)
