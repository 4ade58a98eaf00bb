"""A transformers model without weights, whose parts get theirs one at a time.

The modules are transformers' own, built on PyTorch's meta device, where parameters take no memory.
A decoder layer is given its weights when it is run and loses them afterwards, so a model needs the
memory of its largest part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import numpy as np
import torch
from torch import nn

from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.frontends.source import ModelSource
from fairy_compile.qat.layers import refuse_experts
from fairy_compile.train.models import load_model, quiet_transformers


class Skeleton:
    """A causal language model of decoder layers, in float32.

    Args:
        source: its weights.
        device: where parts compute.

    Attributes:
        layers: the decoder layers, in order.
        norm: the norm behind them.
        head: the output layer.
        hidden: features of a hidden state.

    Raises:
        UnsupportedError: transformers has no such model, or it is built differently.
    """

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        self.source, self.device = source, device
        with quiet_transformers(), accelerate.init_empty_weights(include_buffers=False):
            self.model = load_model(source.directory, scratch=True).eval()
        self.model.requires_grad_(False)
        refuse_experts(
            self.model, "calibration does not reach yet; convert the model without --calibrate"
        )
        base = getattr(self.model, self.model.base_model_prefix, None)
        self.head = self.model.get_output_embeddings()
        parts = [getattr(base, name, None) for name in ("layers", "norm")]
        if not isinstance(parts[0], nn.ModuleList) or None in (parts[1], self.head):
            raise UnsupportedError(
                f"{type(self.model).__name__} has no decoder layers and final norm where Llama, "
                "Qwen2, Qwen3 and Mistral have them, so it cannot be calibrated; "
                "convert it without --calibrate"
            )
        self.base = base
        for module in base.modules():  # rotary frequencies are no weights, and small
            for key, buffer in module.named_buffers(recurse=False):
                module.register_buffer(key, buffer.to(device), persistent=False)
        self.layers, self.norm = list(parts[0]), parts[1]
        self.hidden = int(self.model.config.hidden_size)
        self._names = {module: name for name, module in self.model.named_modules()}

    def name(self, module: nn.Module) -> str:
        """Return the name of a module in the model, which its tensors' names begin with."""
        return self._names[module]

    def linears(self, part: nn.Module) -> dict[str, nn.Linear]:
        """Return layer name -> module of the linear layers of a part, itself included."""
        return {self.name(m): m for m in part.modules() if isinstance(m, nn.Linear)}

    @contextmanager
    def loaded(self, *parts: nn.Module) -> Iterator[None]:
        """Give parts their weights, float32 on the device, until the block ends.

        Raises:
            ModelFileError: a weight is missing or of another shape than config.json implies.
        """
        try:
            for part in parts:
                prefix = self.name(part)
                part.load_state_dict(
                    {
                        key: self._tensor(f"{prefix}.{key}", value)
                        for key, value in part.state_dict().items()
                    },
                    assign=True,
                )
            yield
        finally:
            for part in parts:
                part.to("meta")

    def _tensor(self, name: str, like: torch.Tensor) -> torch.Tensor:
        if name not in self.source.names():
            raise ModelFileError(f"the checkpoint has no tensor {name}, which config.json implies")
        if tuple(self.source.shape(name)) != tuple(like.shape):
            raise ModelFileError(
                f"tensor {name} has shape {self.source.shape(name)}; config.json implies "
                f"{tuple(like.shape)}"
            )
        return torch.from_numpy(self.source.dense(name).astype(np.float32)).to(self.device)

    def embed(self, windows: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the hidden states before the first layer, float32 (length, hidden) a window.

        Args:
            windows: uint32 (windows, length).
        """
        embedding = self.model.get_input_embeddings()
        name = f"{self.name(embedding)}.weight"
        table = self.source.dense(name)  # in its stored dtype: large vocabularies stay small
        factor = np.ones((), np.float32)
        if hasattr(embedding, "embed_scale"):  # Gemma; rounded as its embedding is
            factor = np.asarray(float(embedding.embed_scale)).astype(table.dtype).astype(np.float32)
        for window in windows:
            yield table[window].astype(np.float32) * factor

    @torch.no_grad()
    def contexts(self, length: int) -> list[dict[str, Any]]:
        """Return for each decoder layer what the model passes it besides hidden states.

        These are masks and rotary embeddings; they are the same for all windows of a length.
        """
        seen: list[dict[str, Any]] = []

        def record(hidden_states: torch.Tensor, **context: Any) -> torch.Tensor:
            seen.append(context)
            return hidden_states

        silent = [*self.layers, self.norm]
        for module in self.layers:
            module.forward = record
        self.norm.forward = lambda x: x
        try:
            nothing = torch.zeros(1, length, self.hidden, device=self.device)
            self.base(inputs_embeds=nothing, use_cache=False)
        finally:
            for module in silent:
                del module.forward  # the class's own again
        return seen
