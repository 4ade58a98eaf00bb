"""`TorchModel`: a Hugging Face directory or a packed checkpoint, run by PyTorch in float32."""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from fairy_compile.errors import FairyError
from fairy_compile.frontends.source import ModelSource

_NEEDED = ("torch", "transformers")


def check_extra() -> None:
    """Raise `FairyError` with the pip command unless PyTorch and transformers are there."""
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise FairyError(
            f"--against a Hugging Face directory runs it in PyTorch and needs "
            f"{', '.join(missing)}, which this Python lacks; run "
            'pip install "fairy-compile[train]"'
        )


class TorchModel:
    """A `LogitSource` over a transformers model.

    Weights of a packed checkpoint or a GGUF file are dequantised, so that a model compiled from it
    computes with the same numbers; other directories are run as they are.
    """

    def __init__(self, source: ModelSource, device: str = "cpu", threads: int | None = None):
        """Load the model.

        Raises:
            FairyError: the device is not there, or transformers cannot load the model.
        """
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        try:
            place = torch.device(device)
            torch.empty(1, device=place)
        except (RuntimeError, AssertionError) as error:
            raise FairyError(
                f"--against-device is {device!r}, which PyTorch cannot use: "
                f"{str(error).splitlines()[0]}; allowed: cpu, cuda:0 ..."
            ) from error
        from fairy_compile.train.models import load_model, quiet_transformers

        packed = source.kind != "huggingface"
        with quiet_transformers():
            model = source_model(source) if packed else load_model(source.directory, hint="")
        _round_embed_scale(model, source)
        self._model = model.to(place).eval()
        self._device = place
        # transformers 5.24 renamed the argument.
        takes = inspect.signature(model.forward).parameters
        self._cache = "cache" if "cache" in takes else "past_key_values"
        self.vocab_size = int(model.config.vocab_size)
        self.fed, self.seconds = 0, 0.0
        self.description = f"{source.origin}: in PyTorch, float32, on {place}" + (
            ", weights dequantised from its phase codes" if packed else ""
        )

    def logits(self, tokens: np.ndarray, first: int, rows: int) -> Iterator[np.ndarray]:
        """See `LogitSource`."""
        import transformers

        cache = transformers.DynamicCache(config=self._model.config)
        if first:
            self._run(tokens[:first], cache, keep=1)
        for start in range(first, len(tokens), rows):
            part = tokens[start : start + rows]
            yield self._run(part, cache, keep=len(part))

    def _run(self, tokens: np.ndarray, cache: Any, keep: int) -> np.ndarray:
        """Append tokens to a sequence; return the last ``keep`` rows of logits."""
        import torch

        started = time.perf_counter()
        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(self._device)
        with torch.inference_mode():
            out = self._model(ids, **{self._cache: cache}, use_cache=True, logits_to_keep=keep)
        logits = out.logits[0].float().cpu().numpy()
        self.fed += len(tokens)
        self.seconds += time.perf_counter() - started
        return logits

    def close(self) -> None:
        """Free its memory."""
        self._model = None


def _round_embed_scale(model: Any, source: ModelSource) -> None:
    """Give Gemma's factor on embedded tokens the precision it has in the checkpoint's dtype."""
    import torch

    for module in model.modules():
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, torch.Tensor):
            scale.copy_(scale.to(getattr(torch, source.dtype("model.embed_tokens.weight"))))


def source_model(source: ModelSource) -> Any:
    """Return a transformers model with the weights of a source, float32.

    Args:
        source: of any kind; phase codes are dequantised.

    Raises:
        FairyError: transformers has no such model, or weights and config.json do not fit.
    """
    import torch
    import transformers

    from fairy_compile.frontends.packed import METADATA_KEY
    from fairy_compile.train.models import quiet_transformers

    keep = {key: value for key, value in source.config.items() if key != METADATA_KEY}
    try:
        config = transformers.AutoConfig.for_model(**keep)
        # A tied head may be quantised while the embedding is not; the source has both.
        config.tie_word_embeddings = False
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise FairyError(
            f"transformers {transformers.__version__} has no model for "
            f"{source.directory}/config.json: {str(error).splitlines()[0]}"
        ) from error
    weights = {
        name: torch.from_numpy(np.asarray(source.dense(name), np.float32))
        for name in source.names()
    }
    if source.kind != "huggingface":
        _split_complex(model, weights, source)
    if any(parameter.ndim == 3 for parameter in model.parameters()):
        # Experts lie in one parameter, which transformers makes of a checkpoint's many.
        with quiet_transformers():
            model, found = type(model).from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=torch.float32,
                output_loading_info=True,
            )
        missing, unexpected = (sorted(found[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    else:
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which no layer takes"
        raise FairyError(
            f"{source.origin} {what}: its weights are not those of its config.json; convert "
            "the model again"
        )
    return model


def _split_complex(model: Any, weights: dict[str, Any], source: ModelSource) -> None:
    """Give natively complex layers their two parts; those with codes round their inputs."""
    from fairy_compile.qat.layers import ComplexLinear, real_to_complex

    for name, module in model.named_modules():
        if isinstance(module, ComplexLinear) and f"{name}.weight" in weights:
            parts = real_to_complex(weights.pop(f"{name}.weight"))
            weights[f"{name}.weight_real"], weights[f"{name}.weight_imag"] = parts
            coded = source.plan(name, source.quant).phase
            module.int8_inputs = coded and source.quant.act == "int8"
