"""Write a model directory with the shapes of a real model and random bfloat16 weights.

    python benchmarks/make_synthetic.py llama2-7b -o /tmp/llama2-7b

The result is an ordinary sharded Hugging Face checkpoint, made layer by layer, so that building,
memory and speed can be measured without downloading anything. Its text means nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

IFAIRY = {
    "model_type": "complexnet",
    "architectures": ["ComplexNetLM"],
    "num_hidden_layers": 24,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "hidden_act": "relu2",
    "tie_word_embeddings": False,
}
SHAPES = {
    "llama2-7b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
    "ifairy-700m": IFAIRY
    | {
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    # Not published with the code: the sizes of BitNet b1.58's 1.3B, as those of 700M are.
    "ifairy-1.3b": IFAIRY
    | {
        "hidden_size": 2048,
        "intermediate_size": 5460,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}


def ifairy_shards(config: dict) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of an iFairy model: name -> shape."""
    hidden, inner, vocab = (
        config["hidden_size"], config["intermediate_size"], config["vocab_size"],
    )  # fmt: skip
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]

    def pairs(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {f"{n}.weight_{part}": s for n, s in shapes.items() for part in ("real", "imag")}

    yield {f"token_embeddings_{part}.weight": (vocab, hidden) for part in ("real", "imag")}
    for i in range(config["num_hidden_layers"]):
        layer = f"layer.{i}"
        yield pairs(
            {
                f"{layer}.self_attn.q_proj": (hidden, hidden),
                f"{layer}.self_attn.k_proj": (kv, hidden),
                f"{layer}.self_attn.v_proj": (kv, hidden),
                f"{layer}.self_attn.o_proj": (hidden, hidden),
                f"{layer}.mlp.gate_proj": (inner, hidden),
                f"{layer}.mlp.up_proj": (inner, hidden),
                f"{layer}.mlp.down_proj": (hidden, inner),
                f"{layer}.pre_layernorm": (hidden,),
                f"{layer}.post_layernorm": (hidden,),
                f"{layer}.self_attn.attn_layernorm": (hidden,),
                f"{layer}.mlp.ffn_layernorm": (inner,),
            }
        )
    yield pairs({"final_norm": (hidden,)}) | {"lm_head.weight": (vocab, 2 * hidden)}


def shards(config: dict) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of one shard after the other: name -> shape."""
    if config["model_type"] == "complexnet":
        yield from ifairy_shards(config)
        return
    hidden, inner, vocab = (
        config["hidden_size"], config["intermediate_size"], config["vocab_size"],
    )  # fmt: skip
    head_dim = hidden // config["num_attention_heads"]
    kv = head_dim * config["num_key_value_heads"]
    yield {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes = {
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
        if config["model_type"] == "qwen2":
            rows = {"q": hidden, "k": kv, "v": kv}
            shapes |= {f"{layer}.self_attn.{p}_proj.bias": (n,) for p, n in rows.items()}
        yield shapes
    last = {"model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        last["lm_head.weight"] = (vocab, hidden)
    yield last


def random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return norms near 1 and everything else as a small Gaussian, bfloat16."""
    values = rng.standard_normal(shape, np.float32)
    values *= 0.02
    if "norm" in name:
        values += 1
    return values.astype(ml_dtypes.bfloat16)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer whose other tokens are numbered placeholders."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    parser.add_argument("--vocab", type=int, help="a smaller vocabulary than the real model's")
    args = parser.parse_args()
    if args.vocab is not None and args.vocab < 256:
        parser.error(f"--vocab is {args.vocab}; allowed: 256 and more, one token a byte")
    if args.output.exists() and any(args.output.iterdir()):
        sys.exit(f"error: {args.output} is not empty; choose another --output")
    config = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    config |= {"vocab_size": args.vocab} if args.vocab else {}
    args.output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    start, weight_map, total = time.perf_counter(), {}, 0
    parts = list(shards(config))
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: random_tensor(rng, name, shape) for name, shape in part.items()}
        save_file(tensors, str(args.output / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
        total += sum(t.nbytes for t in tensors.values())
        print(f"\r{file}  {total / 1e9:.1f} GB", end="", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.output / "model.safetensors.index.json").write_text(json.dumps(index))
    (args.output / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    write_tokenizer(args.output, config["vocab_size"])
    print(f"\nwrote {args.output} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
