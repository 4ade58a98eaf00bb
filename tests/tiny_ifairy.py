"""Tiny random iFairy models in the published layout, and the published formulas in NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.tiny_models import save_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}
# As the published config.json files have them besides.
PUBLISHED = {
    "architectures": ["ComplexNetLM"],
    "model_type": "complexnet",
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "loss_type": "ForCausalLM",
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Large enough that logits differ by much more than rounding.
DEVIATION = 0.12


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape of a published checkpoint."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    vocab = config["vocab_size"]
    norms = {"final_norm": hidden}
    matrices = {}
    for i in range(config["num_hidden_layers"]):
        norms |= {f"layer.{i}.{part}_layernorm": hidden for part in ("pre", "post")}
        norms |= {
            f"layer.{i}.self_attn.attn_layernorm": hidden,
            f"layer.{i}.mlp.ffn_layernorm": inner,
        }
        rows = {"self_attn.q": hidden, "self_attn.k": kv, "self_attn.v": kv, "self_attn.o": hidden}
        rows |= {"mlp.gate": inner, "mlp.up": inner, "mlp.down": hidden}
        for part, n in rows.items():
            m = inner if part == "mlp.down" else hidden
            matrices[f"layer.{i}.{part}_proj"] = (n, m)
    tables = {f"token_embeddings_{part}.weight": (vocab, hidden) for part in ("real", "imag")}
    both = {name: (n,) for name, n in norms.items()} | matrices
    pairs = {f"{name}.weight_{part}": both[name] for name in both for part in ("real", "imag")}
    return tables | pairs | {"lm_head.weight": (vocab, 2 * hidden)}


def save_ifairy(directory: Path, dtype: str = "float32", seed: int = 7, **changes: Any) -> Path:
    """Write a random model in the published layout and return its directory."""
    import ml_dtypes  # noqa: F401  bfloat16 for NumPy

    config = {**PUBLISHED, **SIZES, **changes}
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        spread = 0.2 if "norm" in name else DEVIATION
        values = ("norm" in name) + spread * rng.standard_normal(shape)
        tensors[name] = values.astype(dtype)
    directory.mkdir(parents=True)
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    save_tokenizer(directory)
    return directory


class Published:
    """The model by its formulas, in complex float64 arithmetic.

    Args:
        directory: a checkpoint of float32 tensors.
        int8: round the inputs of complex layers.

    Attributes:
        margin: least distance, in int8 steps, of any rounded value from a tie.
    """

    def __init__(self, directory: Path, *, int8: bool) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.int8 = int8
        self.margin = np.inf
        stored = load_file(str(directory / "model.safetensors"))
        self.real = {"lm_head": stored["lm_head.weight"].astype(np.float64)}
        self.complex = {}
        for name, re in stored.items():
            if not name.endswith(("weight_real", "real.weight")):
                continue
            im = stored[name.replace("real", "imag")]
            value = re.astype(np.float64) + 1j * im.astype(np.float64)
            key = name.replace(".weight_real", "").replace("_real.weight", "")
            coded = value.ndim == 2 and key != "token_embeddings"
            self.complex[key] = phase_values(value) if coded else value

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Return float64 logits [len, vocab]."""
        x = self.complex["token_embeddings"][tokens]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"layer.{i}"
            x = x + self._attention(f"{layer}.self_attn", self._norm(f"{layer}.pre_layernorm", x))
            x = x + self._mlp(f"{layer}.mlp", self._norm(f"{layer}.post_layernorm", x))
        x = self._norm("final_norm", x)
        return np.concatenate([x.real, x.imag], axis=-1) @ self.real["lm_head"].T

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], float]:
        """Return greedy tokens, and the least lead of one over the next, relative to the rms."""
        tokens, lead = list(prompt), np.inf
        for _ in range(count):
            last = self.logits(tokens)[-1]
            second, first = np.sort(last)[-2:]
            lead = min(lead, (first - second) / np.sqrt(np.mean(last**2)))
            tokens.append(int(np.argmax(last)))
        return tokens[len(prompt) :], float(lead)

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        if self.int8:
            x = self._round(x.real) + 1j * self._round(x.imag)
        return x.conj() @ self.complex[name].T

    def _round(self, x: np.ndarray) -> np.ndarray:
        scale = 127.0 / np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-5)
        levels = x * scale
        self.margin = min(self.margin, float(np.abs(np.abs(levels % 1) - 0.5).min()))
        return np.clip(np.round(levels), -128, 127) / scale

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        mean = np.mean(np.abs(x) ** 2, axis=-1, keepdims=True)
        x = x / np.sqrt(mean + self.config["rms_norm_eps"])
        weight = self.complex[name]
        return weight.real * x.real + 1j * weight.imag * x.imag

    def _attention(self, name: str, x: np.ndarray) -> np.ndarray:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size = self.config["hidden_size"] // heads
        position, feature = np.arange(len(x))[:, None, None], np.arange(size)
        turn = np.exp(1j * position * self.config["rope_theta"] ** (-feature / size))
        q = self._linear(f"{name}.q_proj", x).reshape(len(x), heads, size) * turn
        k = self._linear(f"{name}.k_proj", x).reshape(len(x), kv_heads, size) * turn
        v = self._linear(f"{name}.v_proj", x).reshape(len(x), kv_heads, size)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k.conj()).real
        scores *= self.config.get("attention_multiplier") or size**-0.5
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        y = np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v)
        y = self._norm(f"{name}.attn_layernorm", y.reshape(len(x), -1))
        return self._linear(f"{name}.o_proj", y)

    def _mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        gate = self._linear(f"{name}.gate_proj", x)
        gate = np.where((gate.real < 0) & (gate.imag < 0), 0, gate)
        active = gate.real**2 + 1j * gate.imag**2
        gated = active.conj() * self._linear(f"{name}.up_proj", x)
        return self._linear(f"{name}.down_proj", self._norm(f"{name}.ffn_layernorm", gated))


def phase_values(w: np.ndarray) -> np.ndarray:
    """Return the quantised value of a complex matrix: the nearest of 1, i, -1, -i, scaled."""
    quarter = np.floor((np.angle(w) + np.pi / 4) / (np.pi / 2)).astype(int) % 4
    real = quarter % 2 == 0
    scale_re = max(np.abs(w.real[real]).mean(), 1e-5)
    scale_im = max(np.abs(w.imag[~real]).mean(), 1e-5)
    phase = np.array([1, 1j, -1, -1j])[quarter]
    return scale_re * phase.real + 1j * scale_im * phase.imag


def tokens_away_from_ties(model: Published, count: int, margin: float) -> list[int]:
    """Return tokens whose every rounded activation is at least ``margin`` steps from a tie.

    Nearer ones may be rounded either way by an implementation in float32, by a whole step.
    """
    for seed in range(1000):
        tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], count).tolist()
        model.margin = np.inf
        model.logits(tokens)
        if model.margin >= margin:
            return tokens
    raise AssertionError(f"no {count} tokens keep {margin} away from ties")
