"""Small models for a GPU, and what PyTorch makes of them; built anywhere, run where there is one.

    python -m tests.gpu.cases DIR --arch sm_90        # needs nvcc, PyTorch and transformers, no GPU
    FAIRY_COMPILE_GPU_CASES=DIR python -m pytest tests/gpu    # needs the GPU, no compiler

Without the variable the tests build the cases themselves.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import fairy_compile as fc

# Two tiles of rows and more in every layer, columns that are no multiple of 128, and heads as real
# models have them.
SIZES = {
    "llama": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "initializer_range": 0.06,
    },
    "qwen2": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 640,
        "initializer_range": 0.04,
    },
    # Windows that prompts and answers outgrow; capped scores, by kernels of CUDA for both uses.
    "gemma2": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": 40,
        "vocab_size": 1000,
        "initializer_range": 0.06,
    },
    # Heads whose prefill the kernels of all GPUs compute.
    "gemma3": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 40,
        "vocab_size": 1000,
        "initializer_range": 0.06,
    },
    "mixtral": {
        "hidden_size": 256,
        "intermediate_size": 352,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 40,
        "vocab_size": 1000,
        "initializer_range": 0.06,
    },
}
LAYERS = 2
CONTEXT, MAX_BATCH = 512, 64
CHUNK = {"cuda": 128, "cuda-hopper": 256}
LENGTHS = (1, 17, 64, 100, 150, 330)
"""Of prompts: the last ones take two prefill calls or more, or the kernels for many rows of Hopper.
Attention cuts contexts as long as the longest into parts."""
BATCHES = (1, 2, 17, 64)
STEPS = 32


@dataclass(frozen=True)
class Case:
    """One artifact."""

    family: str
    quant: str
    act: str
    scale: str = "tensor"
    graphs: bool = True
    target: str = "cuda"
    act_dtype: str | None = None

    @property
    def name(self) -> str:
        """Folder of the artifact, and id of its tests."""
        graphs = "" if self.graphs else "-nographs"
        target = self.target.removeprefix("cuda")
        dtype = f"-{self.act_dtype}" if self.act_dtype else ""
        return f"{self.family}-{self.quant}-{self.act}-{self.scale}{dtype}{graphs}{target}"


HOPPER = "cuda-hopper"
CASES = [
    Case("llama", "w2", "int16", target=HOPPER),
    Case("qwen2", "w2", "float", target=HOPPER),
    Case("llama", "w1", "int8", target=HOPPER),
    Case("qwen2", "w1", "int16", scale="row", target=HOPPER),
    Case("qwen2", "w2", "int16", graphs=False, target=HOPPER),
    Case("llama", "w2", "float"),
    Case("llama", "w2", "int16"),
    Case("llama", "w2", "int8"),
    Case("llama", "w1", "float"),
    Case("llama", "w1", "int16"),
    Case("llama", "w1", "int8"),
    Case("qwen2", "w2", "float"),
    Case("qwen2", "w2", "int16"),
    Case("qwen2", "w2", "int8"),
    Case("qwen2", "w1", "float"),
    Case("qwen2", "w1", "int16"),
    Case("llama", "w2", "int16", graphs=False),
    Case("llama", "w2", "int16", scale="row"),
    Case("qwen2", "w2", "int16", scale="tile64"),
    Case("llama", "w2", "int16", act_dtype="bfloat16"),
    Case("llama", "w2", "float", act_dtype="bfloat16"),
    Case("qwen2", "w2", "int16", target=HOPPER, act_dtype="bfloat16"),
    Case("gemma2", "w2", "float"),
    Case("gemma3", "w2", "float"),
    Case("mixtral", "w2", "float"),
    Case("mixtral", "w2", "int16", target=HOPPER),
]


def tokens(family: str) -> np.ndarray:
    """Return a text of a family's vocabulary."""
    rng = np.random.default_rng(3)
    return rng.integers(0, SIZES[family]["vocab_size"], CONTEXT)


def prompts(family: str) -> list[list[int]]:
    """Return a prompt for each sequence of the largest batch, and one token more."""
    text = tokens(family).tolist()
    return [text[i : i + 4 + i % 5] for i in range(MAX_BATCH)]


def build_case(case: Case, directory: Path, archs: list[str] | None = None) -> None:
    """Write a case's artifact and ``want.npz``, PyTorch's logits, unless they are there.

    The arrays are float32 ``logits`` (max(LENGTHS), vocab), ``batch`` (MAX_BATCH, vocab): logits
    after the last token of each of `prompts`, and int64 ``greedy`` (STEPS,) after five tokens.
    """
    from tests.tiny_models import Oracle, save_model

    out, source = directory / case.name, directory / "models" / case.family
    if (out / "want.npz").exists():
        return
    if not source.exists():
        sizes = {"max_position_embeddings": CONTEXT, **SIZES[case.family]}
        save_model(source, case.family, num_hidden_layers=LAYERS, **sizes)
    with _archs(archs if case.target == "cuda" else None):
        fc.build(
            source,
            target=case.target,
            quant=case.quant,
            scale=case.scale,
            act=case.act,
            act_dtype=case.act_dtype,
            output=out,
            force=True,
            context=CONTEXT,
            prefill_chunk=CHUNK[case.target],
            max_batch=MAX_BATCH,
            cuda_graphs=case.graphs,
        )
    oracle = Oracle(source, fc.QuantConfig(case.quant, act="float", scale=case.scale))
    text = tokens(case.family).tolist()
    np.savez_compressed(
        out / "want.npz",
        logits=oracle.logits(text[: max(LENGTHS)]),
        batch=np.stack([oracle.logits(prompt)[-1] for prompt in prompts(case.family)]),
        greedy=np.array(oracle.greedy(text[:5], STEPS)),
    )


class _archs:
    """Within it, libraries hold code for the named architectures alone; None changes nothing."""

    def __init__(self, names: list[str] | None) -> None:
        self.names = names

    def __enter__(self) -> None:
        from fairy_compile.compiler import cuda_binary

        self.before = cuda_binary.archs
        if self.names:
            names = tuple(self.names)
            cuda_binary.archs = lambda target: names

    def __exit__(self, *_: object) -> None:
        from fairy_compile.compiler import cuda_binary

        cuda_binary.archs = self.before


def main() -> None:
    """Build cases from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--arch", action="append", help="default: those of the target file")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    arguments = parser.parse_args()
    for case in CASES:
        if arguments.case is None or case.name in arguments.case:
            build_case(case, arguments.directory, arguments.arch)
            print(case.name, flush=True)


if __name__ == "__main__":
    main()
