"""auto-round, a peer that tunes rounding and ranges of real codes on text, applied to a model.

The library (`pip install auto-round`) is no dependency of the project: without it these runs are
left out, and say so. It is called as its own documentation asks for at 2 bits, but for float32,
which the other runs compute in as well, where it would take bfloat16.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from corpus import WINDOW
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

_BATCH = 8  # windows the library looks at in a step: its default
_FLOAT_BITS = 16  # of a scale, and of a weight that stays in floating point


@dataclass(frozen=True)
class Setting:
    """What auto-round is asked for.

    Attributes:
        sym: codes around 0, a scale a group; otherwise a zero point as well, as wide as a code.
        group: weights of a row that share a scale.
        head: quantise the output head like the other layers; the library's default leaves it.
        extended: ``enable_alg_ext``, which its documentation recommends for 2 bits.
        iters: optimiser steps a decoder layer: its default.
        bits: of a code.
    """

    sym: bool
    group: int = 32
    head: bool = True
    extended: bool = False
    iters: int = 200
    bits: int = 2


SETTINGS = {
    "auto-round-g32": Setting(sym=False),
    "auto-round-g32-sym": Setting(sym=True),
    "auto-round-g32-sym-ext": Setting(sym=True, extended=True),
    "auto-round-g32-float-head": Setting(sym=False, head=False),
    "auto-round-g128": Setting(sym=False, group=128),
}


def missing() -> str | None:
    """Return why auto-round cannot run here, or None."""
    if importlib.util.find_spec("auto_round") is None:
        return "auto-round is not installed; pip install auto-round"
    return None


def auto_round(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    windows: torch.Tensor,
    setting: Setting,
) -> tuple[dict[str, torch.Tensor], float]:
    """Quantise a model, on the CPU.

    Args:
        model: float32; the library changes it.
        tokenizer: of the model, which the library asks for though it gets tokens.
        windows: calibration tokens, int64 (windows, WINDOW).
        setting: what to ask for.

    Returns:
        The dequantised weights, float32 by name, and the bits stored a weight of the linear layers:
        codes, float16 scales and zero points.

    Raises:
        ValueError: the layers that the library returns are not what it was asked for.
    """
    from auto_round import AutoRound, SignRoundConfig

    config = SignRoundConfig(
        bits=setting.bits,
        group_size=setting.group,
        sym=setting.sym,
        data_type="int",
        iters=setting.iters,
        enable_alg_ext=setting.extended,
    )
    rounding = AutoRound(
        model,
        tokenizer,
        alg_configs=config,
        dataset=list(windows.split(_BATCH)),
        nsamples=len(windows),
        seqlen=WINDOW,
        batch_size=_BATCH,
        quant_lm_head=setting.head,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    rounded, _ = rounding.quantize()
    state = {name: tensor.float() for name, tensor in rounded.state_dict().items()}
    return state, stored_bits(rounded, setting)


@torch.no_grad()
def stored_bits(model: nn.Module, setting: Setting) -> float:
    """Return the bits a weight of the linear layers, counted from the groups' scales.

    Raises:
        ValueError: a group has more values than codes, or a layer is not what was asked for.
    """
    stored = weights = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        weights += layer.weight.numel()
        scale = getattr(layer, "scale", None)
        if (scale is None) != (name == "lm_head" and not setting.head):
            raise ValueError(f"auto-round treated {name} otherwise than {setting} says")
        if scale is None:
            stored += _FLOAT_BITS * layer.weight.numel()
            continue
        groups = layer.weight.reshape(-1, setting.group).float().sort(dim=1).values
        values = 1 + (groups.diff(dim=1) > 1e-6 * groups.abs().amax()).sum(dim=1)
        if scale.numel() != len(groups) or values.max() > 2**setting.bits:
            raise ValueError(f"{name} of auto-round has up to {values.max()} values a group")
        zero = 0 if setting.sym else setting.bits
        stored += setting.bits * layer.weight.numel() + (_FLOAT_BITS + zero) * len(groups)
    return stored / weights
