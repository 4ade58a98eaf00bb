"""Scales of one-stage layers (T = 1): fitted ones, or the published rule's?

Fitting the scales of a layer brings its outputs nearer to the exact ones. With one stage outputs
stay so far off that nearer need not be better. In the output head most of the squared error is the
part of the logits that all tokens have in common, which the loss does not see: on a small model the
fit lowered the head's error from .29 to .25 by scales 1.3 times as large, left the error of what
the loss sees at .47, and raised the loss gap from .64 to .80 nats, since the noise in the logits
grew with the scales. In decoder layers the fit lowered the gap there, from .59 to .41.

So both are measured where it counts, as the loss of the quantised model on text kept aside, and the
better one is taken: for all decoder layers together, and for the output head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fairy_compile.calibrate.skeleton import Skeleton
from fairy_compile.calibrate.solutions import Solutions
from fairy_compile.calibrate.stream import HiddenStates, run_layer

_HELD = 8  # one window of so many is kept aside
# Gaps of one stage are tenths of nats and more, which so many windows tell apart.
_WINDOWS = 32
_LENGTH = 512

_KINDS = (True, False)  # whether scales are fitted


@dataclass(frozen=True)
class Choice:
    """Which one-stage layers keep the scales of the rule.

    Attributes:
        plain: their names.
        loss: of the quantised model as chosen, on text kept aside, nats a token.
        fitted_loss: with fitted scales everywhere.
        plain_loss: with the rule's scales in every one-stage layer.
    """

    plain: frozenset[str]
    loss: float
    fitted_loss: float
    plain_loss: float


def set_aside(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the windows to calibrate on and those kept aside, evenly spread.

    A single window is both.
    """
    if len(windows) == 1:
        return windows, windows
    step = min(_HELD, len(windows))
    held = np.arange(len(windows)) % step == step - 1
    return windows[~held], windows[held]


def choose_scales(
    skeleton: Skeleton,
    solutions: Solutions,
    stages: Mapping[str, int],
    windows: np.ndarray,
    work: Path,
    step: Callable[[str], None],
) -> Choice:
    """Run the quantised model with either kind of scales in its one-stage layers.

    Args:
        skeleton: the model.
        solutions: its layers.
        stages: layer -> T, of the layers to quantise.
        windows: uint32 (windows, length), kept aside; up to 32 of them are used, 512 tokens each.
        work: directory for files, which are removed again.
        step: called before every layer with words for the progress.
    """
    chosen = ((np.arange(n := min(len(windows), _WINDOWS)) + 0.5) * len(windows) / n).astype(int)
    windows = windows[chosen, :_LENGTH]
    shape = (*windows.shape, skeleton.hidden)
    contexts = skeleton.contexts(windows.shape[1])
    ones = {name for name, t in stages.items() if solutions.has_plain(name, t)}
    head = skeleton.name(skeleton.head)
    # Kinds that would compute the same are run once.
    bodies = _KINDS if ones - {head} else _KINDS[:1]
    heads = _KINDS if head in ones else _KINDS[:1]

    def path(fitted: bool, index: int) -> Path:
        return work / f"choice-{fitted:d}-{index}.f32"

    states = {
        body: HiddenStates.of(path(body, 0), shape, skeleton.embed(windows)) for body in bodies
    }
    for i, layer in enumerate(skeleton.layers):
        step(f"scales of one stage: decoder layer {i + 1}")
        with skeleton.loaded(layer):
            linears = skeleton.linears(layer)
            for body in bodies:
                _quantise(linears, solutions, stages, body)
                after = HiddenStates(path(body, i + 1), shape, create=True)
                run_layer(layer, contexts[i], states[body], after, skeleton.device)
                states[body] = after
                path(body, i).unlink()
    step("scales of one stage: output head")
    losses: dict[tuple[bool, bool], float] = {}
    with skeleton.loaded(skeleton.norm, skeleton.head):
        for kind in heads:
            _quantise(skeleton.linears(skeleton.head), solutions, stages, kind)
            for body in bodies:
                losses[body, kind] = _loss(skeleton, windows, states[body])
    for body in bodies:
        path(body, len(skeleton.layers)).unlink()
    body, kind = min(losses, key=losses.__getitem__)
    plain = (ones - {head} if not body else set()) | ({head} & ones if not kind else set())
    best = losses[body, kind]
    return Choice(frozenset(plain), best, losses[True, True], losses[bodies[-1], heads[-1]])


def _quantise(
    linears: Mapping[str, nn.Linear],
    solutions: Solutions,
    stages: Mapping[str, int],
    fitted: bool,
) -> None:
    """Put the values of codes and scales into layers that have their exact weights."""
    for name, module in linears.items():
        if name in stages:
            tensor = solutions.tensor(name, stages[name], plain=not fitted)
            module.weight.data.copy_(torch.from_numpy(tensor.dequantize()))


@torch.no_grad()
def _loss(skeleton: Skeleton, windows: np.ndarray, last: HiddenStates) -> float:
    """Return the mean cross-entropy, nats a token."""
    total = 0.0
    for i, window in enumerate(windows):
        logits = skeleton.head(skeleton.norm(last.read(slice(i, i + 1), skeleton.device)))
        labels = torch.from_numpy(window[1:].astype(np.int64)).to(skeleton.device)
        total += float(functional.cross_entropy(logits[0, :-1], labels, reduction="sum"))
    return total / (windows.shape[0] * (windows.shape[1] - 1))
