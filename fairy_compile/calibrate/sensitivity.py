"""What the candidates of every layer would cost: loss estimated from gradients and distortions.

For a small change dA of a weight the loss of a window grows by about half of <g, dA>^2 in the mean
over windows, where g is the gradient of the window's loss at the weight: the Fisher information in
place of the Hessian, here for the very changes that are to be compared. Nothing is assumed about
how errors of rows, columns and tokens go together, and that matters. On a small trained model with
T = 1, gptq and single layers changed, this came within a factor of 2 of the true gaps, while the
mean of (g_y dA x)^2 over tokens, g_y being the gradient at the layer's output, gave a third of
them for gate and up projections, and E[g_y^2] E[(dA x)^2] feature by feature a tenth.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fairy_compile.calibrate.skeleton import Skeleton
from fairy_compile.calibrate.solutions import Solutions
from fairy_compile.calibrate.stream import HiddenStates, first_output, run_layer

# A window is one sample of the mean: many short ones are worth more than few long ones.
_WINDOWS = 64
_LENGTH = 256

Losses = dict[str, dict[int, float]]  # layer -> T -> nats a token


def state_tokens(windows: np.ndarray) -> int:
    """Return of how many tokens `estimate_losses` keeps all hidden states on disk."""
    return min(len(windows), _WINDOWS) * min(windows.shape[1], _LENGTH)


def estimate_losses(
    skeleton: Skeleton,
    solutions: Solutions,
    windows: np.ndarray,
    work: Path,
    step: Callable[[str], None],
) -> Losses:
    """Return what every candidate adds to the loss, nats a token.

    The windows run forwards through the layers and the gradients backwards, each layer being
    loaded twice; hidden states in between lie on disk.

    Args:
        skeleton: the model.
        solutions: the candidates.
        windows: uint32 (windows, length); `_WINDOWS` of them are used, `_LENGTH` tokens each.
        work: directory for files, which are removed again.
        step: called before every layer with words for the progress.
    """
    count = min(len(windows), _WINDOWS)
    chosen = ((np.arange(count) + 0.5) * len(windows) / count).astype(np.int64)
    windows = windows[chosen, :_LENGTH]
    shape = (*windows.shape, skeleton.hidden)
    contexts = skeleton.contexts(windows.shape[1])
    paths = [work / f"states-{i}.f32" for i in range(len(skeleton.layers) + 1)]
    states = [HiddenStates.of(paths[0], shape, skeleton.embed(windows))]
    for i, layer in enumerate(skeleton.layers):
        step(f"sensitivity: decoder layer {i + 1} forwards")
        states.append(HiddenStates(paths[i + 1], shape, create=True))
        with skeleton.loaded(layer):
            run_layer(layer, contexts[i], states[i], states[-1], skeleton.device)
    step("sensitivity: output head")
    gradients = np.empty(shape, np.float32)
    losses = _head(skeleton, solutions, windows, states[-1], gradients)
    for i in reversed(range(len(skeleton.layers))):
        step(f"sensitivity: decoder layer {i + 1} backwards")
        losses |= _layer(skeleton, solutions, i, contexts[i], states[i], gradients)
        states.pop()
        paths[i + 1].unlink()
    paths[0].unlink()
    return {
        name: {t: total / 2 / windows.size for t, total in sums.items()}
        for name, sums in losses.items()
    }


def _head(
    skeleton: Skeleton,
    solutions: Solutions,
    windows: np.ndarray,
    last: HiddenStates,
    gradients: np.ndarray,
) -> Losses:
    """Fill in the gradients at the last hidden states; return the head's sums of squares."""
    head, norm = skeleton.head, skeleton.norm
    with skeleton.loaded(norm, head):
        changes = _Changes(skeleton.linears(head), solutions)
        for i, window in enumerate(windows):
            states = last.read(slice(i, i + 1), skeleton.device).requires_grad_()
            labels = torch.from_numpy(window[1:].astype(np.int64)).to(skeleton.device)
            logits = head(norm(states))[0, :-1]
            functional.cross_entropy(logits, labels, reduction="sum").backward()
            gradients[i] = states.grad[0].cpu().numpy()
            changes.take()
        return changes.close()


def _layer(
    skeleton: Skeleton,
    solutions: Solutions,
    index: int,
    context: dict[str, Any],
    before: HiddenStates,
    gradients: np.ndarray,
) -> Losses:
    """Turn the gradients behind a decoder layer into those before it; return sums of squares."""
    layer = skeleton.layers[index]
    with skeleton.loaded(layer):
        changes = _Changes(skeleton.linears(layer), solutions)
        for i in range(len(gradients)):
            states = before.read(slice(i, i + 1), skeleton.device).requires_grad_()
            out = first_output(layer(states, **context))
            out.backward(torch.from_numpy(gradients[i : i + 1]).to(skeleton.device))
            gradients[i] = states.grad[0].cpu().numpy()
            changes.take()
        return changes.close()


class _Changes:
    """Sums <gradient, change>^2 over windows for the candidates of linear layers.

    Args:
        linears: layer name -> module that has its weight.
        solutions: the candidates; layers without any are left out.
    """

    def __init__(self, linears: dict[str, nn.Linear], solutions: Solutions) -> None:
        self._linears = {n: m for n, m in linears.items() if n in solutions.layers()}
        self._changes: dict[tuple[str, int], torch.Tensor] = {}
        for name, module in self._linears.items():
            module.weight.requires_grad_()
            for stages in solutions.candidates(name):
                near = torch.from_numpy(solutions.tensor(name, stages).dequantize())
                change = near.to(module.weight.device) - module.weight.detach()
                # Half the memory, and four changes a weight are the most memory there is here.
                self._changes[name, stages] = change.to(torch.bfloat16)
        self._sums = dict.fromkeys(self._changes, 0.0)

    def take(self) -> None:
        """Take in the gradients of a window."""
        for (name, stages), change in self._changes.items():
            along = float((self._linears[name].weight.grad * change).sum())
            self._sums[name, stages] += along**2
        for module in self._linears.values():
            module.weight.grad = None

    def close(self) -> Losses:
        """Return layer -> T -> sum."""
        out: Losses = {}
        for module in self._linears.values():
            module.weight.requires_grad_(False)
        for (name, stages), total in self._sums.items():
            out.setdefault(name, {})[stages] = total
        return out
