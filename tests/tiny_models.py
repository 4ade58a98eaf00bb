"""Tiny random models in the Hugging Face layout, and PyTorch as the oracle of what they compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from fairy_compile import QuantConfig
from fairy_compile.op import dequantize_activations, quantize_activations
from fairy_compile.phase import quantize

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    # Large enough that logits differ by much more than rounding.
    "initializer_range": 0.12,
}
# Changes to `SIZES` for tests that need some model, whichever.
SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What the defaults of a family name lies outside the tiny vocabulary.
NO_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Heads of 16 elements have eight pairs, or six where three quarters turn.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.02, 1.05, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
}
LONG = {"max_position_embeddings": 256, "original_max_position_embeddings": 128}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 12}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_dynamic": ("Llama", {"rope_parameters": DYNAMIC}),
    "llama_biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": 12}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {**NO_TOKENS, "sliding_window": 20}),
    "phi3_longrope": ("Phi3", {**NO_TOKENS, "rope_parameters": LONGROPE, **LONG}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm_12b": (
        "StableLm",
        {"qk_layernorm": True, "use_parallel_residual": True},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "sliding_window": 20}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
        },
    ),
    "gemma2": (
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3",
        {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def save_model(directory: Path, family: str, dtype: str = "float32", **changes: Any) -> Path:
    """Write a random model of one of `FAMILIES` and return its directory."""
    name, extra = FAMILIES[family]
    config_name = {"Gemma3": "Gemma3Text"}.get(name, name)
    config = getattr(transformers, f"{config_name}Config")(**{**SIZES, **extra, **changes})
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    name_it(directory, "tests/Fairy2i-tiny")
    save_tokenizer(directory)
    return directory


def scale_hidden_states(directory: Path, factor: float) -> None:
    """Multiply the hidden states of a Gemma 3 model, and no logits, whose head is not tied.

    That is what comes in by the embedding and, through norms after each block, by the layers; norms
    before blocks take it out again.
    """
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("embed_tokens.weight"):
            tensors[name] = tensor * factor
        elif "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
            tensors[name] = (tensor + 1) * factor - 1  # these norms add one to their weights
    save_file(tensors, path, {"format": "pt"})


def name_it(directory: Path, name: str) -> None:
    """Name a model in its config.json; one with Fairy2i in it holds weights for the phase rule."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": name}))


def save_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE tokenizer that fits the vocabulary of `SIZES`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def function(argument):\n    return argument\n"] * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


class Int8Linear(nn.Module):
    """A linear layer whose input goes through the int8 activation contract."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).numpy()
        rounded = dequantize_activations(*quantize_activations(flat))
        return self.linear(torch.from_numpy(rounded).reshape(x.shape))


class Oracle:
    """PyTorch running a model with its linear layers dequantised from phase codes."""

    def __init__(self, directory: Path, quant: QuantConfig) -> None:
        auto = transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(directory, dtype=torch.float32).eval()
        tied = bool(self.model.config.tie_word_embeddings)
        for name, module in list(self.model.named_modules()):
            if not isinstance(module, nn.Linear) or quant.is_exempt(name):
                continue
            weight = module.weight.detach().clone()
            codes = quantize(weight, quant.stages(name), scale=quant.scale)
            dequantized = nn.Parameter(torch.from_numpy(codes.dequantize()))
            # Assigning a new parameter unties a head: the embedding itself stays as it is.
            module.weight = dequantized
            if quant.act == "int8":
                parent = self.model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], Int8Linear(module))
        for module_name, module in self.model.named_modules():
            if quant.is_exempt(f"{module_name}.0"):  # where checkpoints have the first expert
                continue
            for name in ("gate_up_proj", "down_proj"):
                if isinstance(weight := getattr(module, name, None), nn.Parameter):
                    _dequantize_experts(weight, quant, parts=2 if name == "gate_up_proj" else 1)
        assert not tied or self.model.lm_head is not None

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> np.ndarray:
        """Return float32 logits [len, vocab]."""
        return self.model(torch.tensor([tokens])).logits[0].numpy()

    @torch.no_grad()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Return the ``count`` greedy tokens that follow ``prompt``."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(np.argmax(self.logits(tokens)[-1])))
        return tokens[len(prompt) :]


def _dequantize_experts(weight: nn.Parameter, quant: QuantConfig, parts: int) -> None:
    """Replace weights (experts, parts * n, m), of which every n rows are a matrix, in place."""
    with torch.no_grad():
        for matrix in (part for expert in weight for part in expert.chunk(parts)):
            codes = quantize(matrix.clone(), quant.stages(), scale=quant.scale)
            matrix.copy_(torch.from_numpy(codes.dequantize()))


def relative_error(seen: np.ndarray, want: np.ndarray) -> float:
    """Return ||seen - want|| / ||want||."""
    return float(np.linalg.norm(seen - want) / np.linalg.norm(want))
