"""Optimiser steps on CUDA, each one replay of a CUDA graph.

Small models spend their time starting kernels. Here the whole step, from picking its windows to
AdamW, is captured once and replayed, so that starting it costs one call; several models can then be
trained side by side from one thread, each on a stream of its own. What changes from step to step
(the windows, the learning rate) lies in tables on the GPU that the graph itself indexes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from corpus import WINDOW, Epochs
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from fairy_compile.qat import stacked

if TYPE_CHECKING:
    from training import Recipe

ATTENTION = "causal-without-mask"
_EAGER = 3  # steps before the capture: they set up the optimiser and the libraries
_AHEAD = 2  # chunks that may be queued on the GPU


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally. transformers' own would build a mask, since it cannot look at positions
    while a graph is captured."""
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[2] > 1, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)


@lru_cache(maxsize=1)
def _tokens(work: Path, device: torch.device) -> torch.Tensor:
    """Return the training text, int32 (tokens,), shared by all runs of a process."""
    tokens = torch.from_numpy(np.load(work / "train.npy").astype(np.int32)).to(device)
    torch.cuda.synchronize(device)
    return tokens


class GraphSteps:
    """Optimiser steps of a model on CUDA; see `training.Steps`, whose results it has.

    The caller has made a stream other than the default one current, the same for all calls.

    Args:
        model: on CUDA.
        work: has the training text.
        recipe: gives learning rates and weight decay.
        seed: order of the text.
        loss: of a batch, int64 (batch, WINDOW + 1).
        groups: AdamW's, see `training.parameter_groups`.
        captured: replay a graph; False starts every kernel anew.
    """

    chunk = 25

    def __init__(
        self,
        model: nn.Module,
        work: Path,
        recipe: Recipe,
        seed: int,
        loss: Callable[[torch.Tensor], torch.Tensor],
        groups: list[dict],
        *,
        captured: bool = True,
    ) -> None:
        self.model, self.loss, self.captured = model, loss, captured
        device = next(model.parameters()).device
        if torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
            raise ValueError("a graph cannot be captured on the default stream; make another")
        epochs = Epochs(work, recipe.batch, seed)
        starts = np.stack([epochs.starts() for _ in range(recipe.steps)])
        self._starts = torch.from_numpy(starts).to(device)
        rates = [recipe.rate(step) for step in range(recipe.steps)]
        self._rates = torch.tensor(rates, device=device)
        self._losses = torch.zeros(recipe.steps, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._offsets = torch.arange(WINDOW + 1, device=device)
        self._text = _tokens(work, device)
        for group in groups:
            group["lr"] = torch.tensor(recipe.peak, device=device)
        self.optimiser = torch.optim.AdamW(
            groups, betas=(0.9, 0.95), weight_decay=recipe.decay, fused=True, capturable=True
        )
        self.done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self._marks: deque[torch.cuda.Event] = deque()

    def _step(self) -> None:
        """Do a step; nothing here waits for the GPU or copies from the CPU."""
        starts = self._starts.index_select(0, self._at).T
        places = starts + self._offsets
        batch = self._text.index_select(0, places.flatten()).view(places.shape).long()
        rate = self._rates.index_select(0, self._at)[0]
        for group in self.optimiser.param_groups:
            group["lr"].copy_(rate * group["factor"])
        with stacked(self.model):
            loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self._losses.index_copy_(0, self._at, loss.detach().reshape(1))
        self._at.add_(1)

    def step(self) -> None:
        """Queue one."""
        if self.done < _EAGER or not self.captured:
            self.optimiser.zero_grad(set_to_none=True)
            self._step()
        else:
            if self.graph is None:
                self.capture()
            self.graph.replay()
        self.done += 1
        if self.done % self.chunk == 0:
            mark = torch.cuda.Event()
            mark.record()
            self._marks.append(mark)
            if len(self._marks) > _AHEAD:
                self._marks.popleft().synchronize()

    def capture(self) -> None:
        """Capture a step; it is not run."""
        self.optimiser.zero_grad(set_to_none=True)  # gradients move into the graph's memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self._step()

    def last_loss(self) -> float:
        """Return the training loss of the last step; waits for it."""
        return self._losses[self.done - 1].item()

    def close(self) -> None:
        """Let go of the graph's memory."""
        torch.cuda.current_stream().synchronize()
        self.graph = None
        self.optimiser.zero_grad(set_to_none=True)
