"""The quality study's parts that decide what runs, on what, and whether it is noticed to fail."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


def load(name):
    spec = importlib.util.spec_from_file_location(f"quality_{name}", QUALITY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def schedule():
    return load("schedule")


@pytest.fixture(scope="module")
def corpus():
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    return load("corpus")


def make(schedule, place, name, seen, parts=3, wait=0.0, error=None, ready=lambda: True):
    def go(log):
        for k in range(parts):
            time.sleep(wait)
            seen.append(name)
            if error:
                raise error
            yield (k + 1) / parts
        return {"loss": 1.0}

    return schedule.Run(place, name, {"run": name}, go, ready)


def test_runs_are_done_in_order_and_once(schedule, tmp_path):
    seen = []
    runs = [make(schedule, tmp_path / "seed-0", name, seen) for name in "abc"]
    assert schedule.work_through(runs)
    assert seen == list("aaabbbccc")
    figures = json.loads((tmp_path / "seed-0" / "b.json").read_text())
    assert (figures["run"], figures["loss"]) == ("b", 1.0)
    assert schedule.work_through(runs)
    assert len(seen) == 9


def test_runs_side_by_side_take_turns(schedule, tmp_path):
    seen = []
    runs = [make(schedule, tmp_path, name, seen) for name in "abcd"]
    assert schedule.work_through(runs, lanes=3)
    assert seen[:3] == list("abc")
    assert sorted(seen) == list("aaabbbcccddd")


def test_a_run_waits_for_what_it_needs(schedule, tmp_path):
    seen = []
    after = make(schedule, tmp_path, "b", seen, ready=lambda: (tmp_path / "a.json").exists())
    assert schedule.work_through([after, make(schedule, tmp_path, "a", seen)], lanes=2)
    assert seen == list("aaabbb")


def test_a_failure_is_noted_and_the_others_go_on(schedule, tmp_path):
    seen = []
    runs = [
        make(schedule, tmp_path, "a", seen, error=ValueError("no such thing")),
        make(schedule, tmp_path, "b", seen),
    ]
    assert not schedule.work_through(runs)
    assert "no such thing" in (tmp_path / "a.failed").read_text()
    assert (tmp_path / "b.json").exists()


def test_what_will_not_be_done_in_time_is_given_up(schedule, tmp_path):
    seen = []
    runs = [
        make(schedule, tmp_path, "long", seen, parts=10, wait=0.2),
        make(schedule, tmp_path, "short", seen, parts=1),
    ]
    begun = time.monotonic()
    assert schedule.work_through(runs, deadline=begun + 0.8)
    assert time.monotonic() - begun < 0.8
    assert "% done" in (tmp_path / "long.late").read_text()
    assert seen.count("long") < 10
    assert (tmp_path / "short.json").exists()


def test_at_the_deadline_everything_stops(schedule, tmp_path):
    seen = []
    run = make(schedule, tmp_path, "a", seen, parts=1000, wait=0.05)
    more = make(schedule, tmp_path, "b", seen)
    schedule.work_through([run, more], deadline=time.monotonic() + 1.5)
    assert (tmp_path / "a.late").exists()
    assert "b" not in seen


def test_a_run_that_another_process_holds_is_left_to_it(schedule, tmp_path):
    seen = []
    held = schedule.claim(tmp_path / "a.lock")
    run = make(schedule, tmp_path, "a", seen)
    schedule.work_through([run], deadline=time.monotonic() + 0.3)
    assert seen == []
    held.close()
    assert schedule.work_through([run])
    assert seen == list("aaa")


def test_an_epoch_covers_all_text_once_and_packed_streams_are_the_same(corpus, tmp_path):
    windows = 7
    stream = np.arange(windows * corpus.WINDOW + corpus.WINDOW + 1) % 60000
    np.save(tmp_path / "train.npy", stream.astype(np.uint16))
    np.save(tmp_path / "held_out.npy", stream[:2000].astype(np.uint16))
    epochs = corpus.Epochs(tmp_path, batch=windows, seed=3)
    first = [epochs.starts() for _ in range(2)]
    for starts in first:
        offset = starts.min()
        assert offset < corpus.WINDOW
        np.testing.assert_array_equal(np.sort(starts) - offset, np.arange(windows) * corpus.WINDOW)
    batch = next(corpus.Epochs(tmp_path, batch=windows, seed=3))
    assert batch.shape == (windows, corpus.WINDOW + 1)
    np.testing.assert_array_equal(batch[:, 0].numpy(), stream[first[0]])
    assert corpus.held_out(tmp_path, 1000).shape == (1000 // corpus.WINDOW, corpus.WINDOW)
    corpus.pack(tmp_path)
    for side in ("train", "held_out"):
        (tmp_path / f"{side}.npy").unlink()
    corpus.unpack(tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "train.npy"), stream)


def test_steps_of_a_graph_are_those_of_the_cpu(monkeypatch, tmp_path):
    """The step that CUDA captures, run without a graph on the CPU, trains the same model."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(QUALITY))
    import graph
    import training

    np.save(tmp_path / "train.npy", (np.arange(4000) % 8).astype(np.uint16))
    recipe = training.Recipe(8 * 2 * training.WINDOW, 2e-2, 3, 0.01, batch=2, others=0.5)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "a lane")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: "the default")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    adam = torch.optim.AdamW
    on_cpu = {"capturable": False, "fused": True}
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: adam(*a, **{**k, **on_cpu}))
    losses = []
    for captured in (False, True):
        model = training.new_model(16, 64, 0)
        if captured:
            model.set_attn_implementation(graph.ATTENTION)
        training.prepare_phase(model, "w2", {"lm_head": 3})
        loss = training.BatchLoss(model, 0.0, None)
        if captured:
            groups = training.parameter_groups(model, recipe)
            steps = graph.GraphSteps(model, tmp_path, recipe, 5, loss, groups, captured=False)
        else:
            steps = training.Steps(model, tmp_path, recipe, 5, loss)
        losses.append([steps.step() or steps.last_loss() for _ in range(recipe.steps)])
    # bf16 autocast rounds otherwise where attention is called otherwise; a wrong rate, batch or
    # gradient would change how the loss falls by as much as it falls.
    fall = losses[0][0] - losses[0][-1]
    assert fall > 0.1
    np.testing.assert_allclose(losses[1], losses[0], atol=fall / 20)


@pytest.fixture
def peer(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(QUALITY))
    import auto_round_peer

    return auto_round_peer


@pytest.mark.parametrize(
    ("sym", "group", "bits"), [(False, 32, 2 + 18 / 32), (True, 32, 2.5), (True, 64, 2.25)]
)
def test_bits_of_a_peer_are_counted_from_its_groups(peer, sym, group, bits):
    setting = peer.Setting(sym, group)
    layer = torch.nn.Linear(64, 8, bias=False)
    layer.weight.data = 0.3 * torch.randint(4, (8, 64)).float() - 0.3
    layer.scale = torch.full((8, 64 // setting.group), 0.3)
    model = torch.nn.ModuleDict({"layer": layer})
    assert peer.stored_bits(model, setting) == pytest.approx(bits)
    layer.weight.data[3, 5] = 0.4  # one value more than there are codes
    with pytest.raises(ValueError, match="layer of auto-round has up to 5 values"):
        peer.stored_bits(model, setting)
    del layer.scale
    with pytest.raises(ValueError, match="treated layer otherwise"):
        peer.stored_bits(model, setting)


def test_bits_of_a_head_that_stays_in_floating_point(peer):
    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(64, 8, bias=False)})
    assert peer.stored_bits(model, peer.Setting(sym=False, head=False)) == 16


def test_runs_of_a_peer_that_is_not_installed_are_left_out(peer, monkeypatch, tmp_path, capsys):
    import runs

    study = runs.Study(tmp_path, tmp_path)
    monkeypatch.setattr(runs, "missing", lambda: None)
    names = [run.name for run in runs.runs(study, [0], ("auto-round",))]
    assert names == list(runs.AUTO_ROUND)
    first = names[0]
    assert [run.name for run in runs.runs(study, [0], ("fp", "auto-round"), [first])] == [first]
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(runs, "missing", peer.missing)
    assert list(runs.runs(study, [0], ("auto-round",))) == []
    assert "pip install auto-round" in capsys.readouterr().out
