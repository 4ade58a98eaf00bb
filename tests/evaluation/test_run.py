"""Scores of compiled models, against NumPy and against PyTorch."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest

import fairy_compile as fc
from fairy_compile.evaluation import cut_windows, scores
from fairy_compile.evaluation.scores import log_softmax
from tests.tiny_models import Oracle, relative_error, save_model

CONTEXT = 32


def nats_by_hand(artifact, text, windows_of):
    """Return -log p of the scored tokens of each window, from `Model.logits` of whole windows."""
    with fc.load(artifact) as model:
        tokens = model.tokenizer.encode(text.read_text())
        found = []
        for window in windows_of(len(tokens)):
            logits = model.logits(tokens[window.start : window.end]).astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            places = np.arange(window.first, window.end)
            found.append(-log_p[places - 1 - window.start, np.array(tokens)[places]])
    return found


@pytest.mark.parametrize("stride", [CONTEXT, 11])
@pytest.mark.parametrize("piece", [scores._PIECE_LOGITS, 7 * 320])
def test_perplexity_is_that_of_the_logits(artifact, text, stride, piece, monkeypatch):
    monkeypatch.setattr(scores, "_PIECE_LOGITS", piece)
    monkeypatch.setattr(scores, "_BLOCK_LOGITS", 5 * 320)
    result = fc.evaluate(artifact, text, context=CONTEXT, stride=stride)
    want = nats_by_hand(artifact, text, lambda count: cut_windows(count, CONTEXT, stride))
    everything = np.concatenate(want)
    assert result.windows == len(want) > 3
    assert result.scored == len(everything)
    # Float32 logits of some units, in other chunks: rounding of a few 1e-6.
    assert math.isclose(result.nats, everything.mean(), rel_tol=1e-5)
    assert math.isclose(result.perplexity, math.exp(everything.mean()), rel_tol=1e-4)
    if stride == CONTEXT:
        means = np.array([w.mean() for w in want])
        error = means.std(ddof=1) / math.sqrt(len(means))
        assert math.isclose(result.score.nats.stderr, error, rel_tol=1e-3)
    else:
        assert result.scored == result.text.tokens - 1


def test_a_short_text_is_one_window_without_an_error(artifact, tmp_path):
    (tmp_path / "a.txt").write_text("def function(x)")
    result = fc.evaluate(artifact, tmp_path / "a.txt")
    assert (result.windows, result.context) == (1, 128)
    assert result.scored == result.text.tokens - 1
    assert result.score.nats.stderr is None
    assert json.loads(json.dumps(result.to_json()))["score"]["perplexity"]["stderr"] is None


def test_a_model_is_at_no_distance_from_itself(artifact, text):
    result = fc.evaluate(artifact, text, context=CONTEXT, against=artifact)
    found = result.against
    assert found.kl.mean == 0
    assert found.agreement.mean == 1
    assert found.max_logit_difference == 0
    assert (found.delta.mean, found.delta.stderr) == (0, 0)
    assert found.score == result.score


@pytest.mark.parametrize("stride", [None, 11])
def test_compiled_codes_equal_pytorch_running_the_same_codes(artifact, packed, text, stride):
    result = fc.evaluate(artifact, text, context=CONTEXT, stride=stride, against=packed)
    found = result.against
    assert 0 <= found.kl.mean < 1e-6
    assert found.agreement.mean == 1
    assert math.isclose(result.perplexity, found.score.perplexity, rel_tol=1e-5)
    assert abs(found.delta.mean) < 1e-5
    assert "dequantised" in found.reference


def test_against_the_floating_point_model(artifact, source, text):
    """KL, difference and agreement against PyTorch, by hand."""
    import torch
    import transformers

    found = fc.evaluate(artifact, text, context=CONTEXT, against=source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    kl, delta, same, worst, count = 0.0, 0.0, 0, 0.0, 0
    with fc.load(artifact) as compiled, torch.inference_mode():
        tokens = compiled.tokenizer.encode(text.read_text())
        for window in cut_windows(len(tokens), CONTEXT, CONTEXT):
            ids = tokens[window.start : window.end]
            p = model(torch.tensor([ids])).logits[0].numpy()[:-1]
            q = compiled.logits(ids)[:-1]
            log_p, log_q = log_softmax(p), log_softmax(q)
            at = np.arange(len(ids) - 1), np.array(ids[1:])
            kl += (np.exp(log_p) * (log_p - log_q)).sum()
            delta += (log_p[at] - log_q[at]).sum()
            same += (p.argmax(1) == q.argmax(1)).sum()
            worst = max(worst, np.abs(p - q).max())
            count += len(ids) - 1
    assert found.scored == count
    assert math.isclose(found.against.kl.mean, kl / count, rel_tol=1e-4)
    assert math.isclose(found.against.delta.mean, delta / count, rel_tol=1e-3, abs_tol=1e-5)
    assert abs(found.against.agreement.mean - same / count) < 2 / count  # a tie may fall otherwise
    assert math.isclose(found.against.max_logit_difference, worst, rel_tol=1e-3)
    assert found.against.kl.mean > 0.01


def test_a_tied_head_that_is_quantised_is_not_the_embedding(tmp_path):
    from fairy_compile.evaluation.torch_model import TorchModel
    from fairy_compile.frontends.source import open_source
    from tests.tiny_models import SMALL, save_model

    model = save_model(tmp_path / "model", "qwen2", **SMALL, eos_token_id=0)
    fc.convert(model, tmp_path / "packed", quant="w2")
    source = open_source(tmp_path / "packed")
    weights = TorchModel(source)._model.state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        np.testing.assert_array_equal(weights[name], source.dense(name).astype(np.float32))
    assert (weights["lm_head.weight"] != weights["model.embed_tokens.weight"]).any()


def test_bad_input_is_a_sentence(artifact, source, text, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    other = shutil.copytree(source, tmp_path / "other")
    table = json.loads((other / "tokenizer.json").read_text())
    table["added_tokens"].append({**table["added_tokens"][0], "id": 320, "content": "<new>"})
    (other / "tokenizer.json").write_text(json.dumps(table))
    for data, options, words in (
        (tmp_path / "none", {}, "there is no data"),
        (empty, {}, "is empty"),
        (text, {"context": 129}, "--context is 129 tokens; allowed for this model: 2 to 128"),
        (text, {"context": 16, "stride": 17}, "--stride is 17 tokens; allowed: 1 to 16"),
        (text, {"max_tokens": 1}, "--max-tokens is 1"),
        (text, {"against": other}, "the tokenizers of .* differ .285 and 286 tokens"),
        (text, {"against": tmp_path}, "neither fairy.json nor config.json"),
        (text, {"against": source, "against_device": "gpu"}, "--against-device is 'gpu'"),
    ):
        with pytest.raises(fc.FairyError, match=words):
            fc.evaluate(artifact, data, **options)
    with pytest.raises(fc.FairyError, match=r"has no fairy.json"):
        fc.evaluate(source, text)


# Runs with torch, transformers and the data libraries impossible to import.
CORE_ONLY = """
import sys
for name in ("torch", "transformers", "datasets", "pyarrow", "lm_eval"):
    sys.modules[name] = None
import fairy_compile as fc
print(fc.evaluate(sys.argv[1], sys.argv[2], context=32).perplexity)
"""


def test_the_core_alone_evaluates_plain_text(artifact, text):
    command = [sys.executable, "-c", CORE_ONLY, str(artifact), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    want = fc.evaluate(artifact, text, context=32).perplexity
    assert math.isclose(float(done.stdout), want, rel_tol=1e-6)


def test_a_missing_extra_names_the_pip_command(artifact, source, text, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(fc.FairyError, match=r'pip install "fairy-compile\[train\]"'):
        fc.evaluate(artifact, text, against=source)


def test_logits_that_are_not_finite_are_refused():
    class Broken:
        vocab_size = 4

        def logits(self, tokens, first, rows):
            yield np.full((len(tokens), 4), np.nan, np.float32)

    (window,) = cut_windows(5, 8, 8)
    with pytest.raises(fc.FairyError, match="not finite"):
        scores.score_window(np.zeros(5, np.int32), window, Broken())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_packed_mixtures_run_in_pytorch(tmp_path, family):
    """transformers keeps experts in one parameter; a packed checkpoint has them one by one."""
    from fairy_compile.evaluation.torch_model import TorchModel
    from fairy_compile.frontends import open_source

    source = save_model(tmp_path / "model", family)
    fc.convert(source, tmp_path / "packed", quant=fc.QuantConfig("w2", method="phase"))
    tokens = np.arange(20)
    (seen,) = TorchModel(open_source(tmp_path / "packed")).logits(tokens, 0, 20)
    want = Oracle(source, fc.QuantConfig("w2", act="float")).logits(tokens.tolist())
    assert relative_error(seen, want) <= 1e-5


def test_gemma_multiplies_embedded_tokens_by_a_factor_of_its_dtype(tmp_path):
    from fairy_compile.evaluation.torch_model import TorchModel
    from fairy_compile.frontends import open_source

    sizes = {"hidden_size": 120, "num_hidden_layers": 1}  # sqrt(120) is 10.954, in bfloat16 10.9375
    for dtype, factor in (("float32", math.sqrt(120)), ("bfloat16", 10.9375)):
        source = open_source(save_model(tmp_path / dtype, "gemma2", dtype, **sizes))
        embedding = TorchModel(source)._model.get_input_embeddings()
        assert float(embedding.embed_scale) == pytest.approx(factor, rel=1e-7)
