"""A tiny Hugging Face checkpoint, and the artifact the command line makes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fairy_compile.cli import app

HIDDEN, FFN, HEADS, VOCAB, CONTEXT = 32, 64, 2, 258, 128


@pytest.fixture(scope="session")
def cli():
    """Return a function that runs the program in this process."""
    runner = CliRunner()

    def invoke(*arguments, stdin=None):
        return runner.invoke(app, [str(a) for a in arguments], input=stdin)

    return invoke


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    directory.mkdir()
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN)}
    layer = "model.layers.0."
    for name in "qkvo":
        shapes[f"{layer}self_attn.{name}_proj"] = (HIDDEN, HIDDEN)
    for name in ("gate", "up"):
        shapes[f"{layer}mlp.{name}_proj"] = (FFN, HIDDEN)
    shapes[f"{layer}mlp.down_proj"] = (HIDDEN, FFN)
    tensors = {
        f"{name}.weight": rng.normal(size=shape).astype("float32") for name, shape in shapes.items()
    }
    for name in (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm"):
        tensors[f"{name}.weight"] = np.ones(HIDDEN, "float32")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def artifact(cli, checkpoint, tmp_path_factory):
    """Return (directory, output of the build that made it)."""
    directory = tmp_path_factory.mktemp("artifact") / "tiny"
    result = cli("build", checkpoint, "-o", directory)
    assert result.exit_code == 0, result.output
    return directory, result
