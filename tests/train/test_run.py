from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import fairy_compile as fc
from fairy_compile.frontends import open_source
from fairy_compile.train import plan, train
from fairy_compile.train.metrics import plot_losses, read_metrics
from tests.tiny_ifairy import save_ifairy
from tests.tiny_models import save_model


def test_training_lowers_the_loss_and_leaves_a_checkpoint(config, tmp_path):
    seen = []
    report = train(config(steps=20), progress=seen.append)
    assert report.eval_loss < seen[0].loss
    assert report.steps == 20
    assert report.tokens == 20 * 4 * 32
    assert seen[-1].step == 20
    assert all(progress.tokens_per_second > 0 for progress in seen)
    out = tmp_path / "out"
    packed, latents = open_source(out), open_source(out / "latents")
    assert len(packed.layers) == 15
    assert latents.latents is not None
    for name in packed.layers:
        stored = packed.phase(name, packed.quant)
        again = latents.phase(name, packed.quant)
        assert np.array_equal(stored.codes, again.codes)
        assert np.array_equal(stored.scales, again.scales)
    rows = read_metrics(out / "metrics.csv")
    assert [row["step"] for row in rows if row["loss"] is not None] == list(range(2, 21, 2))
    assert [row["step"] for row in rows if row["eval_loss"] is not None] == list(range(2, 21, 2))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "train.json").read_text())
    assert summary["settings"]["lr"] == 3e-3
    assert (out / "tokenizer.json").is_file()
    assert not (tmp_path / "out.run").exists()


def test_the_last_step_is_evaluated_once(config, tmp_path):
    train(config(steps=5, eval_every=2))
    rows = read_metrics(tmp_path / "out" / "metrics.csv")
    assert [row["step"] for row in rows if row["eval_loss"] is not None] == [2, 4, 5]


def test_an_export_is_trained_further(config, tmp_path):
    train(config(steps=4))
    before = open_source(tmp_path / "out" / "latents").dense("model.layers.0.mlp.up_proj.weight")
    again = config(model=str(tmp_path / "out"), output=str(tmp_path / "more"), steps=2)
    report = train(again)
    assert report.prepared.notes == []
    after = open_source(tmp_path / "more" / "latents").dense("model.layers.0.mlp.up_proj.weight")
    # Two AdamW steps move a weight by at most some two learning rates.
    assert 0 < np.abs(after - before).max() < 4 * again.lr


def test_every_option_at_once(config, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"body": f"return {i}\n" * 9}) + "\n" for i in range(40)))
    report = train(
        config(
            data=str(data),
            text_field="body",
            eval_data=str(data),
            quant=fc.QuantConfig("w1", scale="row", exempt=("lm_head",)),
            scratch=True,
            teacher=config().model,
            distill=0.5,
            temperature=2.0,
            precision="bf16",
            checkpointing=True,
            accumulate=2,
            schedule="two-stage",
            weight_decay=0.1,
            steps=None,
            epochs=1.0,
        )
    )
    assert report.steps >= 2
    assert [layer.name for layer in report.prepared.dense] == ["lm_head"]
    assert np.isfinite(report.loss)


def test_accumulated_steps_equal_large_ones(config, tmp_path):
    """Two passes of 2 sequences make the step of one pass of 4."""
    losses = []
    for batch, accumulate in ((4, 1), (2, 2)):
        settings = config(
            batch=batch, accumulate=accumulate, output=str(tmp_path / str(batch)), steps=6
        )
        train(settings)
        rows = read_metrics(tmp_path / str(batch) / "metrics.csv")
        losses.append([row["loss"] for row in rows if row["loss"] is not None])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_tied_model_trains_and_says_what_became_of_its_head(config, tmp_path):
    tied = save_model(tmp_path / "qwen2", "qwen2")
    report = train(config(model=str(tied), steps=2))
    assert "lm_head was tied" in report.notes[0]
    assert open_source(tmp_path / "out").config["tie_word_embeddings"] is False


def test_divergence_stops_and_keeps_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    from fairy_compile.train import trainer

    loss = trainer._cross_entropy

    def spoiled(logits, tokens):
        spoiled.calls += logits.requires_grad
        return loss(logits, tokens) * (float("nan") if spoiled.calls >= 8 else 1.0)

    spoiled.calls = 0
    monkeypatch.setattr(trainer, "_cross_entropy", spoiled)
    with pytest.raises(fc.FairyError, match=r"diverged at step 8: the loss is nan") as caught:
        train(config(steps=20, save_every=4))
    checkpoint = tmp_path / "out.run" / "checkpoint-4"
    assert str(checkpoint) in str(caught.value)
    assert "--lr" in str(caught.value)
    assert not (tmp_path / "out").exists()
    source = open_source(checkpoint)
    assert source.latents is not None
    assert np.isfinite(source.dense("lm_head.weight")).all()
    assert (tmp_path / "out.run" / "loss.png").is_file()


def test_a_rate_that_is_far_too_high_diverges_in_words(config):
    with pytest.raises(fc.FairyError, match="diverged"):
        train(config(lr=1e30, warmup=0.0))


def test_plan_reads_no_weights(config, model, tmp_path):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "bare" / name).write_bytes((model / name).read_bytes())
    report = plan(config(model=str(tmp_path / "bare")))
    assert len(report.phase) == 15
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "/nowhere/at/all"}, "no model"),
        ({"data": "/nowhere/at/all"}, "there is no data"),
        ({"block": 4096}, "context of 256"),
        ({"quant": fc.QuantConfig("w2", exempt=("*",))}, "no linear layer to convert"),
        ({"scratch": True, "distill": 0.5}, "name a --teacher"),
    ],
)
def test_bad_input_is_refused_in_words(config, changes, words):
    with pytest.raises(fc.FairyError, match=words):
        train(config(**changes))


def test_output_and_run_directory_in_the_way(config, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(fc.FairyError, match="exists and is not empty"):
        train(config())
    (out / "notes.txt").unlink()
    run = tmp_path / "out.run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(fc.FairyError, match="in the way"):
        train(config())
    assert (run / "notes.txt").read_text() == "mine"


def test_ifairy_trains_from_scratch_by_its_own_terms(config, tmp_path):
    model = save_ifairy(tmp_path / "model")
    report = train(config(model=str(model), scratch=True, steps=20))
    assert report.loss < 5.5  # from log 320 = 5.8
    assert any("T = 1" in note for note in report.notes)
    packed = open_source(tmp_path / "out")
    assert (packed.quant.quant, packed.quant.terms) == ("w1", ("W",))
    assert len(packed.layers) == 14
    assert len(plan(config(model=str(model))).phase) == 14
    again = train(config(model=str(tmp_path / "out"), output=str(tmp_path / "more"), steps=2))
    assert len(again.prepared.phase) == 14


def test_packed_and_incomplete_models(config, model, tmp_path):
    table = json.loads((model / "config.json").read_text())

    def changed(name, **changes):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(table | changes))
        (directory / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
        return str(directory)

    with pytest.raises(fc.UnsupportedError, match="does not read"):
        train(config(model=changed("other", model_type="nonsense"), scratch=True))
    with pytest.raises(fc.FairyError, match="--from-scratch"):
        train(config(model=changed("no_weights")))
    fc.convert(model, tmp_path / "packed", quant=fc.QuantConfig("w2", method="phase"))
    with pytest.raises(fc.FairyError, match="no master weights"):
        train(config(model=str(tmp_path / "packed")))


def test_plot_without_rows_writes_nothing(tmp_path):
    assert not plot_losses([], tmp_path / "p.png", "title")
    assert not (tmp_path / "p.png").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_cuda(config):
    assert np.isfinite(train(config(cpu=False)).loss)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixtures_train_and_go_on_where_they_were(config, tmp_path, family):
    model = save_model(tmp_path / family, family)

    def run(name, stop=None):
        def progress(state):
            if stop is not None and state.step >= stop:
                raise KeyboardInterrupt

        settings = {"model": str(model), "output": str(tmp_path / name), "save_every": 2}
        return train(config(**settings, steps=6), progress=progress)

    whole = run("whole")
    assert whole.eval_loss is not None
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop=4)
    assert run("parts").resumed_from >= 2
    one, other = (open_source(tmp_path / name / "latents") for name in ("whole", "parts"))
    moved = open_source(model)
    assert set(one.names()) == set(moved.names())
    for name in one.names():
        np.testing.assert_allclose(one.dense(name), other.dense(name), rtol=1e-5, atol=1e-7)
    expert = next(name for name in one.names() if "experts" in name)
    assert (one.dense(expert) != moved.dense(expert)).any()
