from dataclasses import replace

import numpy as np
import pytest

from fairy_compile.bench import gguf_model
from fairy_compile.bench.gguf_types import BLOCK_TYPES, PEER_TYPES, TensorPlan, tensor_plan
from fairy_compile.errors import FairyError
from fairy_compile.models import parse_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def types(mix, **changes):
    plan = tensor_plan(parse_config({**LLAMA, **changes}), mix)
    return {t.name.removesuffix(".weight"): t.type.name for t in plan}


def test_q4_k_m_spends_more_bits_on_ends_and_every_third_layer():
    found = types("Q4_K_M", num_hidden_layers=16)
    more = [i for i in range(16) if found[f"blk.{i}.ffn_down"] == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert [i for i in range(16) if found[f"blk.{i}.attn_v"] == "Q6_K"] == more
    assert found["token_embd"] == found["blk.0.attn_q"] == "Q4_K"
    assert found["output"] == "Q6_K"


def test_q2_k_and_tq2_0():
    found = types("Q2_K")
    assert [found[f"blk.3.{n}"] for n in ("attn_q", "attn_v", "attn_output", "ffn_down")] == [
        "Q2_K", "Q3_K", "Q3_K", "Q3_K",
    ]  # fmt: skip
    assert types("Q2_K", num_key_value_heads=1)["blk.3.attn_v"] == "Q4_K"
    ternary = types("TQ2_0")
    assert (ternary["token_embd"], ternary["output"]) == ("Q4_K", "Q6_K")
    assert ternary["blk.0.attn_v"] == ternary["blk.0.ffn_down"] == "TQ2_0"


def test_tied_heads_narrow_rows_biases_and_norms():
    tied = types("Q4_K_M", tie_word_embeddings=True)
    assert "output" not in tied
    assert tied["token_embd"] == "Q6_K"
    narrow = types("Q2_K", hidden_size=64, intermediate_size=40)
    assert narrow["blk.0.attn_q"] == "Q4_0"  # 64 columns: blocks of 32
    assert narrow["blk.0.ffn_down"] == "F16"  # 40 columns: no blocks
    assert types("Q4_K_M", model_type="qwen2")["blk.0.attn_k.bias"] == "F32"
    assert types("Q4_K_M", model_type="qwen3")["blk.0.attn_k_norm"] == "F32"


def test_unknown_type_names_the_nearest():
    with pytest.raises(FairyError, match=r"unknown --peer-types 'Q4_KM'.*Did you mean Q4_K_M"):
        types("Q4_KM")


@pytest.mark.parametrize("name", [n for n, t in BLOCK_TYPES.items() if t.scales])
def test_blocks_are_finite_and_small(name):
    kind = BLOCK_TYPES[name]
    tensor = TensorPlan("blk.0.x.weight", (4, 2 * kind.weights), kind)
    data = gguf_model.random_blocks(tensor, np.random.default_rng(1))
    assert data.dtype == np.uint8
    assert data.nbytes == tensor.nbytes
    gguf = pytest.importorskip("gguf")
    values = gguf.dequantize(data, gguf.GGMLQuantizationType[name])
    assert values.shape == tensor.shape
    assert 0 < np.abs(values).max() < 0.5
    if name == "TQ2_0":
        assert len(np.unique(values)) == 3


@pytest.mark.parametrize("mix", PEER_TYPES)
def test_files_parse_with_the_shapes_and_types_of_the_plan(tmp_path, mix):
    gguf = pytest.importorskip("gguf")
    config = parse_config({**LLAMA, "num_hidden_layers": 2})
    model = gguf_model.peer_model(config, mix, tmp_path / "cache")
    reader = gguf.GGUFReader(model.path)
    found = {
        t.name: (tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name, int(t.n_bytes))
        for t in reader.tensors
    }
    plan = list(tensor_plan(config, mix))
    assert found == {t.name: (t.shape, t.type.name, t.nbytes) for t in plan}
    assert sum(model.tensor_types.values()) == sum(t.nbytes for t in plan)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.vocab_size"] == 96
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [model.path.name]


def test_files_are_reused_and_shapes_have_files_of_their_own(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    config = parse_config({**LLAMA, "num_hidden_layers": 1})
    first = gguf_model.peer_model(config, "TQ2_0", tmp_path)
    other = gguf_model.peer_model(replace(config, vocab_size=128), "TQ2_0", tmp_path)
    assert other.path != first.path
    monkeypatch.setattr(gguf_model, "_write", None)
    assert gguf_model.peer_model(config, "TQ2_0", tmp_path) == first


def test_a_full_disk_is_told_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_model.shutil, "disk_usage", lambda _: type("U", (), {"free": 1000}))
    with pytest.raises(FairyError, match=r"has 1.0 kB free, .* --peer-cache"):
        gguf_model.peer_model(parse_config(LLAMA), "Q2_K", tmp_path)


def test_an_interrupted_file_leaves_nothing(tmp_path):
    pytest.importorskip("gguf")

    def interrupt(_what, _done, _total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf_model.peer_model(parse_config(LLAMA), "Q2_K", tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == []
