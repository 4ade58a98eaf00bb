"""Hidden states on disk, and what every linear layer sees of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

_BATCH_TOKENS = 4096


class HiddenStates:
    """The hidden states of all windows between two decoder layers, in a file.

    Args:
        path: the file.
        shape: (windows, length, hidden).
        create: begin a new file.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], *, create: bool = False) -> None:
        self.path = path
        self.values = np.memmap(path, np.float32, "w+" if create else "r", shape=shape)

    @classmethod
    def of(cls, path: Path, shape: tuple[int, int, int], windows: Iterable[np.ndarray]) -> Any:
        """Write windows, float32 (length, hidden) each, into a new file."""
        states = cls(path, shape, create=True)
        for i, window in enumerate(windows):
            states.values[i] = window
        return states

    def batches(self) -> list[slice]:
        """Return slices of windows that together are about `_BATCH_TOKENS` tokens."""
        count, length, _ = self.values.shape
        step = max(1, _BATCH_TOKENS // length)
        return [slice(i, min(i + step, count)) for i in range(0, count, step)]

    def read(self, which: slice, device: torch.device) -> torch.Tensor:
        """Return a copy of some windows, float32 (windows, length, hidden)."""
        return torch.from_numpy(np.array(self.values[which])).to(device)

    def write(self, which: slice, states: torch.Tensor) -> None:
        """Store some windows."""
        self.values[which] = states.cpu().numpy()


class Grams:
    """Gathers E[x x^T] of the inputs x of linear layers while they run.

    Layers that are given the same tensor, as q, k and v or gate and up are, share one sum.

    Args:
        linears: layer name -> module.
    """

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        self._leader: dict[str, str] = {}  # layer -> the one that gathers for it
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        self._last: tuple[str, torch.Tensor] | None = None
        self._handles = [
            module.register_forward_pre_hook(self._hook(name)) for name, module in linears.items()
        ]

    def _hook(self, name: str) -> Any:
        def see(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            x = args[0]
            if name not in self._leader:
                shares = self._last is not None and self._last[1] is x
                self._leader[name] = self._last[0] if shares else name
            if self._leader[name] == name:
                self._last = name, x
                self._add(name, x.reshape(-1, x.shape[-1]))

        return see

    def _add(self, name: str, x: torch.Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self._sums[name].addmm_(x.T, x)

    def count(self, tokens: int) -> None:
        """Note that so many tokens have gone through."""
        self._count += tokens
        self._last = None

    def close(self) -> None:
        """Stop gathering."""
        for handle in self._handles:
            handle.remove()

    def groups(self) -> dict[str, list[str]]:
        """Return for each sum the layers that share it, in the order they ran."""
        out: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            out.setdefault(leader, []).append(name)
        return out

    def take(self, leader: str) -> torch.Tensor:
        """Return the mean of x x^T of a group, float32 (in, in), and forget it."""
        return self._sums.pop(leader).div_(max(self._count, 1))


@torch.no_grad()
def run_layer(
    layer: nn.Module,
    context: dict[str, Any],
    before: HiddenStates,
    after: HiddenStates | None,
    device: torch.device,
    grams: Grams | None = None,
) -> None:
    """Run all windows through a decoder layer that has its weights.

    Args:
        layer: the layer, or any module that takes hidden states.
        context: further arguments of the layer.
        before: hidden states to read.
        after: where to write the layer's; None to let go of them.
        device: where the layer is.
        grams: told how many tokens went through.
    """
    for which in before.batches():
        states = before.read(which, device)
        out = layer(states, **context)
        if after is not None:
            after.write(which, first_output(out))
        if grams is not None:
            grams.count(states.shape[0] * states.shape[1])


def first_output(out: Any) -> torch.Tensor:
    """Return the hidden states of what a decoder layer returned; some versions add to them."""
    return out[0] if isinstance(out, tuple) else out
