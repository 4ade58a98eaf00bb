"""Shapes and variants of `gpu_model`, which need no TVM."""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 512,
    },
}
CONTEXT, CHUNK, MAX_BATCH = 4096, 2048, 8


@dataclass(frozen=True)
class Variant:
    """One library.

    Attributes:
        weights: ``phase``, or the name of a peer's layout.
        stages: T of phase weights.
        act: their activation contract.
        graphs: decode steps are CUDA graphs.
        pages: each is one graph, over pages that are arguments; else the runtime's cache cuts it.
        error: most relative difference of logits by prefill and by decode.
    """

    weights: str
    stages: int = 0
    act: str = "float"
    graphs: bool = True
    pages: bool = True
    error: float = 3e-2


# Rounding to float16 (2^-11 / sqrt(3) on average) some ten times a layer gives 0.5 % after 32; six
# times as much is allowed. int8 activations add up to 2.6 % a call, see README.md under Accuracy.
_INT8_ERROR = 0.026 * 129**0.5
# In the order in which they are run.
VARIANTS = {
    "w2-int16": Variant("phase", 2, "int16"),
    "four-bit": Variant("four_bit"),
    "w2-int16-cache": Variant("phase", 2, "int16", pages=False),
    "four-bit-cache": Variant("four_bit", pages=False),
    "w2-int16-nographs": Variant("phase", 2, "int16", graphs=False),
    "four-bit-nographs": Variant("four_bit", graphs=False),
    "w1-int16": Variant("phase", 1, "int16"),
    "w2-int8": Variant("phase", 2, "int8", error=_INT8_ERROR),
    "dense": Variant("dense"),
    "w1-int8": Variant("phase", 1, "int8", error=_INT8_ERROR),
}
