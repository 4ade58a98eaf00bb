"""How much the outputs of every linear layer matter for the loss.

For small errors e of a layer's outputs y the loss grows by about half the mean of (g e)^2, where
g is the gradient of the loss at y: the Fisher information in place of the Hessian. Taking the
features of y as independent leaves h = E[g^2], one number a feature, and with the Gram matrix G of
the inputs an error dA of the weight costs

    1/2 sum_r h_r (dA G dA^T)_rr   nats a token,

which makes the errors of different layers comparable.
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
from fairy_compile.calibrate.stream import HiddenStates, first_output, run_layer

TOKENS = 8192


class _Squares:
    """Sums the squares of the gradients at the outputs of linear layers."""

    def __init__(self, linears: dict[str, nn.Linear], sums: dict[str, torch.Tensor]) -> None:
        self._sums = sums
        self._handles = [
            module.register_forward_hook(self._hook(name)) for name, module in linears.items()
        ]

    def _hook(self, name: str) -> Any:
        def see(module: nn.Module, args: Any, out: torch.Tensor) -> None:
            out.register_hook(lambda gradient: self.add(name, gradient))

        return see

    def add(self, name: str, gradient: torch.Tensor) -> None:
        squares = gradient.reshape(-1, gradient.shape[-1]).square().sum(dim=0)
        self._sums[name] = self._sums[name] + squares if name in self._sums else squares

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def output_fisher(
    skeleton: Skeleton,
    windows: np.ndarray,
    work: Path,
    step: Callable[[str], None],
) -> dict[str, np.ndarray]:
    """Return layer -> h = E[g^2] of its outputs, float32 (out,), on `TOKENS` of the tokens.

    The windows run forwards through the layers and the gradients backwards, each layer being
    loaded twice; hidden states in between lie on disk.

    Args:
        skeleton: the model.
        windows: uint32 (windows, length).
        work: directory for files, which are removed again.
        step: called before every layer with words for the progress.
    """
    count = min(len(windows), max(1, TOKENS // windows.shape[1]))
    chosen = ((np.arange(count) + 0.5) * len(windows) / count).astype(np.int64)
    windows = windows[chosen]
    shape = (*windows.shape, skeleton.hidden)
    contexts = skeleton.contexts(windows.shape[1])
    paths = [work / f"fisher-{i}.f32" for i in range(len(skeleton.layers) + 1)]
    states = [HiddenStates.of(paths[0], shape, skeleton.embed(windows))]
    for i, layer in enumerate(skeleton.layers):
        step(f"sensitivity: decoder layer {i + 1} forwards")
        states.append(HiddenStates(paths[i + 1], shape, create=True))
        with skeleton.loaded(layer):
            run_layer(layer, contexts[i], states[i], states[-1], skeleton.device)
    step("sensitivity: output head")
    sums: dict[str, torch.Tensor] = {}
    gradients = np.empty(shape, np.float32)
    _head(skeleton, windows, states[-1], gradients, sums)
    for i in reversed(range(len(skeleton.layers))):
        step(f"sensitivity: decoder layer {i + 1} backwards")
        _backwards(skeleton, i, contexts[i], states[i], gradients, sums)
        states.pop()
        paths[i + 1].unlink()
    paths[0].unlink()
    return {name: (total / windows.size).cpu().numpy() for name, total in sums.items()}


def _head(
    skeleton: Skeleton,
    windows: np.ndarray,
    last: HiddenStates,
    gradients: np.ndarray,
    sums: dict[str, torch.Tensor],
) -> None:
    """Fill in the gradients of the loss at the last hidden states."""
    with skeleton.loaded(skeleton.norm, skeleton.head):
        squares = _Squares(skeleton.linears(skeleton.head), sums)
        for i, window in enumerate(windows):
            states = last.read(slice(i, i + 1), skeleton.device).requires_grad_()
            logits = skeleton.head(skeleton.norm(states))[0, :-1]
            labels = torch.from_numpy(window[1:].astype(np.int64)).to(skeleton.device)
            functional.cross_entropy(logits, labels, reduction="sum").backward()
            gradients[i] = states.grad[0].cpu().numpy()
        squares.close()


def _backwards(
    skeleton: Skeleton,
    index: int,
    context: dict[str, Any],
    before: HiddenStates,
    gradients: np.ndarray,
    sums: dict[str, torch.Tensor],
) -> None:
    """Turn the gradients behind a decoder layer into those before it, in place."""
    layer = skeleton.layers[index]
    with skeleton.loaded(layer):
        squares = _Squares(skeleton.linears(layer), sums)
        for i in range(len(gradients)):
            states = before.read(slice(i, i + 1), skeleton.device).requires_grad_()
            out = first_output(layer(states, **context))
            out.backward(torch.from_numpy(gradients[i : i + 1]).to(skeleton.device))
            gradients[i] = states.grad[0].cpu().numpy()
        squares.close()
