"""Tiny Fairy2i models as GGUF files, written element by element from the format's description."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

TILE = 64
F32, F16, BF16 = 0, 1, 30
TILE64_V2, BUNDLE_CODES = 44, 46
# The codes 0..3 of these files.
PHASES = np.array([-1, 1, -1j, 1j])

_TYPES: dict[type, tuple[int, str]] = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        if isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
        kind, code = (6, "f") if isinstance(value[0], float) else (5, "i")
        return struct.pack(f"<IIQ{len(value)}{code}", 9, kind, len(value), *value)
    kind, code = _TYPES[type(value)]
    return struct.pack(f"<I{code}", kind, value)


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]],
    version: int = 3,
) -> Path:
    """Write a file.

    Args:
        path: where.
        metadata: key -> text, int (as uint32), float (as float32), bool or list.
        tensors: name -> (type, shape in NumPy's order, data).
        version: of the format.
    """
    alignment = metadata.get("general.alignment", 32)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += _text(key) + _value(value)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += _text(name) + dims + struct.pack("<IQ", kind, len(data))
        data += raw
    head += b"\0" * (-len(head) % alignment)
    path.write_bytes(head + data)
    return path


class Fairy2i:
    """A random model: codes and scales of every layer, and the file in either layout.

    Args:
        base: ``llama``, ``qwen2`` or ``qwen3``.
        stages: T.
        bundle: layout.
        merged: Q, K and V lie in one layer.
        coded_head: the output head has codes, too.
        scale_dtype: of bundles' scales.
        pad: tokens that the vocabulary is padded with.
        kv: key/value heads.
    """

    def __init__(
        self,
        base: str = "llama",
        stages: int = 2,
        *,
        bundle: bool = False,
        merged: bool = False,
        coded_head: bool = False,
        scale_dtype: type = np.float16,
        pad: int = 0,
        kv: int = 2,
        seed: int = 0,
    ) -> None:
        self.base, self.stages, self.bundle, self.merged = base, stages, bundle, merged
        self.scale_dtype, self.pad = scale_dtype, pad
        self.rng = np.random.default_rng(seed)
        self.width, self.ffn, self.heads, self.kv, self.head_dim = 128, 192, 4, kv, 64
        self.vocab, self.blocks = 256, 2
        self.matrices: dict[str, np.ndarray] = {}  # the real weights, under Hugging Face names
        self.dense: dict[str, np.ndarray] = {}
        self.tensors: dict[str, tuple[int, tuple[int, ...], bytes]] = {}
        self._embedding()
        self._vector("output_norm", "model.norm.weight", 2 * self.width, 1.0)
        if coded_head:
            self._linear(["output"], ["lm_head"], [self.vocab // 2], self.width)
        else:
            head = (self.rng.standard_normal((self.vocab, 2 * self.width)) * 0.06).astype("float16")
            padded = np.concatenate([head, np.zeros((pad, head.shape[1]), "float16")])
            self._add("output", F16, padded)
            self.dense["lm_head.weight"] = head
        for i in range(self.blocks):
            self._block(f"blk.{i}", f"model.layers.{i}")

    def _add(self, name: str, kind: int, array: np.ndarray) -> None:
        self.tensors[name] = kind, array.shape, array.tobytes()

    def _embedding(self) -> None:
        shape = (self.vocab, 2 * self.width)
        table = self.rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        self.dense["model.embed_tokens.weight"] = table
        bits = table.view(np.uint16).astype(np.uint32)
        packed = bits[:, self.width :] << 16 | bits[:, : self.width]
        packed = np.concatenate([packed, np.zeros((self.pad, self.width), np.uint32)])
        self._add("token_embd", F32, packed.view(np.float32))

    def _vector(self, name: str, ours: str, size: int, mean: float) -> None:
        self.dense[ours] = (mean + 0.2 * self.rng.standard_normal(size)).astype(np.float32)
        self._add(name, F32, self.dense[ours])

    def _block(self, block: str, layer: str) -> None:
        self._vector(f"{block}.attn_norm", f"{layer}.input_layernorm.weight", 2 * self.width, 1.0)
        ffn_norm = f"{layer}.post_attention_layernorm.weight"
        self._vector(f"{block}.ffn_norm", ffn_norm, 2 * self.width, 1.0)
        attention = f"{layer}.self_attn"
        if self.base == "qwen3":
            for name in "qk":
                norm = f"{attention}.{name}_norm.weight"
                self._vector(f"{block}.attn_{name}_norm", norm, self.head_dim, 1.0)
        rows = [self.heads * self.head_dim // 2] + [self.kv * self.head_dim // 2] * 2
        names = [f"{block}.attn_{name}" for name in "qkv"]
        ours = [f"{attention}.{name}_proj" for name in "qkv"]
        if self.merged:
            self._linear([f"{block}.attn_qkv"], ours, rows, self.width)
        else:
            for name, our, count in zip(names, ours, rows, strict=True):
                self._linear([name], [our], [count], self.width)
        if self.base == "qwen2":
            self._biases(block, names, ours, rows)
        self._linear([f"{block}.attn_output"], [f"{attention}.o_proj"], [self.width], rows[0])
        for name in ("gate", "up"):
            our = f"{layer}.mlp.{name}_proj"
            self._linear([f"{block}.ffn_{name}"], [our], [self.ffn], self.width)
        self._linear([f"{block}.ffn_down"], [f"{layer}.mlp.down_proj"], [self.width], self.ffn)

    def _biases(self, block: str, names: list[str], ours: list[str], rows: list[int]) -> None:
        biases = [self.rng.standard_normal(2 * n).astype(np.float32) / 5 for n in rows]
        self.dense |= {f"{our}.bias": bias for our, bias in zip(ours, biases, strict=True)}
        if self.merged:
            halves = [b[:n] for b, n in zip(biases, rows, strict=True)]
            halves += [b[n:] for b, n in zip(biases, rows, strict=True)]
            self._add(f"{block}.attn_qkv.bias", F32, np.concatenate(halves))
        else:
            for name, bias in zip(names, biases, strict=True):
                self._add(f"{name}.bias", F32, bias)

    def _linear(self, names: list[str], ours: list[str], rows: list[int], m: int) -> None:
        """Make layers of n complex rows each, written as one that has all their rows."""
        n, t = sum(rows), self.stages
        codes = self.rng.integers(0, 4, (2, t, n, m), dtype=np.uint8)
        scales = self.rng.uniform(0.01, 0.05, (2, t, n // TILE, m // TILE, 2))
        if t == 1:  # learned ones may be negative or zero
            scales.reshape(-1)[::5] *= -1
            scales.reshape(-1)[3] = 0
        dtype = self.scale_dtype if self.bundle else np.float16
        scales = scales.astype(dtype)
        wide = np.kron(scales.astype(np.float64), np.ones((1, 1, TILE, TILE, 1)))
        value = PHASES[codes]
        value = (value.real * wide[..., 0] + 1j * value.imag * wide[..., 1]).sum(axis=1)
        first = 0
        for our, count in zip(ours, rows, strict=True):
            u, w = value[:, first : first + count]
            whole = [[(u + w).real, (w - u).imag], [(u + w).imag, (u - w).real]]
            self.matrices[our] = np.block(whole)
            first += count
        write = self._write_bundle if self.bundle else self._write_tiles
        write(names[0], codes, scales)

    def _write_tiles(self, name: str, codes: np.ndarray, scales: np.ndarray) -> None:
        n, m = codes.shape[2:]
        for term, stage in np.ndindex(2, self.stages):
            raw = np.zeros((n, m // TILE, 20), np.uint8)
            for block, lane, part in np.ndindex(m // TILE, 16, 4):
                column = codes[term, stage, :, block * TILE + part * 16 + lane]
                raw[:, block, lane] |= column << (2 * part)
            for row in range(n):
                raw[row, :, 16:] = scales[term, stage, row // TILE].view(np.uint8).reshape(-1, 4)
            self.tensors[f"{name}.{'UW'[term]}.s{stage}"] = TILE64_V2, (n, m), raw.tobytes()

    def _write_bundle(self, name: str, codes: np.ndarray, scales: np.ndarray) -> None:
        n, m = codes.shape[2:]
        down, across, branches = n // TILE, m // TILE, 2 * self.stages
        raw = np.zeros((down, across, 64, branches, 16), np.uint8)
        for strip, block, m16, q4 in np.ndindex(down, across, 4, 16):
            for branch, lane, j in np.ndindex(branches, 16, 4):
                row, column = strip * TILE + m16 * 16 + lane, block * TILE + 4 * q4 + j
                code = codes[branch // self.stages, branch % self.stages, row, column]
                raw[strip, block, m16 * 16 + q4, branch, lane] |= code << (2 * j)
        shape = (down * across, 64, branches, 16)
        self.tensors[f"{name}.bundle.codes"] = BUNDLE_CODES, shape, raw.tobytes()
        kind = BF16 if scales.dtype == ml_dtypes.bfloat16 else F16
        ordered = scales.reshape(branches, down, across, 2).transpose(1, 2, 0, 3)
        self._add(f"{name}.bundle.scales", kind, ordered.reshape(-1, branches, 2))

    def metadata(self) -> dict[str, Any]:
        """Return what converters write."""
        w1 = self.stages == 1
        found: dict[str, Any] = {
            "general.architecture": "fairy2i",
            "general.name": "tiny",
            "fairy2i.context_length": 256,
            "fairy2i.embedding_length": self.width,
            "fairy2i.block_count": self.blocks,
            "fairy2i.feed_forward_length": self.ffn,
            "fairy2i.attention.head_count": self.heads,
            "fairy2i.attention.head_count_kv": self.kv,
            "fairy2i.attention.layer_norm_rms_epsilon": 1e-5,
            "fairy2i.rope.freq_base": 10000.0,
            "fairy2i.vocab_size": self.vocab + self.pad,
            "fairy2i.schema_version": 1 + self.bundle,
            "fairy2i.base_arch": self.base,
            "fairy2i.quant.format": "fairy2i_tile64_v2",
            "fairy2i.quant.residual_steps": self.stages,
            "fairy2i.quant.codebook": "{+/-1,+/-i}",
            "fairy2i.quant.variant": "tile64_v2_w1_learned_scale" if w1 else "tile64_v2",
            "fairy2i.quant.tile_size": 64,
            "fairy2i.attn.layout": f"{self.base}_real",
            "fairy2i.tokenizer.profile": "llama_bpe" if self.base == "llama" else "qwen2",
            "tokenizer.ggml.model": "no_vocab",
        }
        if self.bundle:
            found |= {
                "general.alignment": 64,
                "fairy2i.weight.layout": "bundle_m64k64_v1",
                "fairy2i.weight.scale_scope": "m64_k64",
                "fairy2i.weight.code_order": "m16_q4_branch_lane",
                "fairy2i.weight.branch_order": "U0,W0" if w1 else "U0,U1,W0,W1",
                "fairy2i.weight.m_block": 64,
                "fairy2i.weight.k_block": 64,
                "fairy2i.weight.m_subtile": 16,
            }
        if self.head_dim * self.heads != 2 * self.width:
            found["fairy2i.rope.dimension_count"] = self.head_dim
        if self.pad:
            found["fairy2i.vocab.original_size"] = self.vocab
        return found

    def save(self, path: Path, **changes: Any) -> Path:
        """Write the file, with other metadata where ``changes`` say so."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_gguf(path, self.metadata() | changes, self.tensors)

    def torch_model(self) -> Any:
        """Return PyTorch's model of the same numbers, float32."""
        import torch
        import transformers

        name = self.base.capitalize()
        config = getattr(transformers, f"{name}Config")(
            hidden_size=2 * self.width,
            intermediate_size=2 * self.ffn,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        weights = self.dense | {f"{layer}.weight": a for layer, a in self.matrices.items()}
        arrays = {name: torch.from_numpy(a.astype(np.float32)) for name, a in weights.items()}
        model.load_state_dict(arrays)
        return model
