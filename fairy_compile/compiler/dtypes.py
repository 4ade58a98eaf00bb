"""What a build keeps activations and the KV cache in, and what it says about that."""

from __future__ import annotations

from fairy_compile.config import check_choice
from fairy_compile.errors import UnsupportedError
from fairy_compile.models import DecoderConfig
from fairy_compile.models.config import KV_DTYPES
from fairy_compile.targets import Target, activation_dtypes


def kv_dtype(asked: str | None, act: str, target: Target) -> str:
    """Return the dtype of cached keys and values.

    Raises:
        FairyError: ``asked`` is no dtype of a cache.
        UnsupportedError: the target cannot have it.
    """
    lacks_float16 = target.is_gpu and not target.has("float16")
    if asked is None:
        return "float32" if act == "float" or lacks_float16 else "float16"
    check_choice("--kv-dtype", asked, KV_DTYPES)
    if asked == "float16" and lacks_float16:
        raise UnsupportedError(
            f"--kv-dtype float16: target {target.name} has no 16-bit floats; allowed: float32"
        )
    return asked


def range_notes(decoder: DecoderConfig, target: Target) -> list[str]:
    """Return the warning that activations may be more than their dtype holds, if they may."""
    if not decoder.wide_activations or decoder.act_dtype != "float16":
        return []
    ways = ["--act float keeps them in float32"]
    if "bfloat16" in activation_dtypes(target):
        ways.insert(0, "--act-dtype bfloat16 holds them")
    return [
        f"hidden states of {decoder.model_type} models can exceed what float16 holds; "
        + ", ".join(ways)
    ]
