"""Running a model layer by layer is running the model: Gram matrices, gradients, memory."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fairy_compile.calibrate import run as run_module  # noqa: E402
from fairy_compile.calibrate.config import Calibration  # noqa: E402
from fairy_compile.calibrate.gptq import Solved  # noqa: E402
from fairy_compile.calibrate.run import solve_model  # noqa: E402
from fairy_compile.calibrate.sensitivity import estimate_losses  # noqa: E402
from fairy_compile.calibrate.skeleton import Skeleton  # noqa: E402
from fairy_compile.calibrate.solutions import Solutions  # noqa: E402
from fairy_compile.calibrate.stream import Grams  # noqa: E402
from fairy_compile.calibrate.windows import read_windows  # noqa: E402
from fairy_compile.errors import UnsupportedError  # noqa: E402
from fairy_compile.frontends import open_source  # noqa: E402
from fairy_compile.phase import quantize  # noqa: E402
from tests.calibrate.conftest import WINDOW  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "family",
    ["llama", "llama3", "llama_biased", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"],
)
def test_gram_matrices_are_those_of_the_whole_model(
    make_checkpoint, reference, text, tmp_path, monkeypatch, family
):
    directory = make_checkpoint(family)
    source = open_source(directory)
    windows = read_windows(directory, Calibration(str(text), tokens=10 * WINDOW, window=WINDOW))
    seen: dict[str, torch.Tensor] = {}

    def note(self, layer, gram):
        seen[layer] = gram.clone()
        return {}

    monkeypatch.setattr(run_module._Run, "_solve", note)
    solve_model(source, source.settle(_quant())[0], windows, tmp_path / "work")
    model = reference(directory)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    grams = Grams(linears)
    with torch.no_grad():
        model(torch.from_numpy(windows.astype(np.int64)))
    grams.count(windows.size)
    assert set(seen) == set(linears)
    for leader, layers in grams.groups().items():
        want = grams.take(leader)
        for layer in layers:
            # float32 sums in another order
            torch.testing.assert_close(seen[layer], want, rtol=1e-4, atol=1e-5 * float(want.max()))
    assert ["q_proj", "k_proj", "v_proj"] in [
        [layer.rpartition(".")[2] for layer in layers] for layers in grams.groups().values()
    ]


def _quant():
    from fairy_compile import QuantConfig

    return QuantConfig("w2")


def test_estimated_losses_are_those_of_the_whole_model(checkpoint, reference, text, tmp_path):
    windows = read_windows(checkpoint, Calibration(str(text), tokens=4 * WINDOW, window=WINDOW))
    solutions = Solutions(tmp_path)
    model = reference(checkpoint)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for i, (name, module) in enumerate(linears.items()):
        weight = module.weight.detach().numpy()
        gram = torch.eye(weight.shape[1])
        solved = {t: (Solved.measure(weight, gram, quantize(weight, t)), "") for t in (1, 2)}
        solutions.save(i, {name: solved})
    work = tmp_path / "work"
    work.mkdir()
    skeleton = Skeleton(open_source(checkpoint), CPU)
    found = estimate_losses(skeleton, solutions, windows, work, lambda words: None)
    assert list(work.iterdir()) == []
    sums = dict.fromkeys(((name, t) for name in linears for t in (1, 2)), 0.0)
    for window in windows.astype(np.int64):
        tokens = torch.from_numpy(window)
        logits = model(tokens[None]).logits[0, :-1]
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").backward()
        for name, t in sums:
            weight = linears[name].weight
            change = torch.from_numpy(solutions.tensor(name, t).dequantize()) - weight.detach()
            sums[name, t] += float((weight.grad * change).sum()) ** 2
    assert set(found) == set(linears)
    largest = max(sums.values()) / 2 / windows.size
    for (name, t), total in sums.items():
        # Changes are held in bfloat16: 2^-9 of each, which signs of a sum mostly cancel.
        want = total / 2 / windows.size
        assert found[name][t] == pytest.approx(want, rel=0.05, abs=1e-3 * largest)


def test_only_one_decoder_layer_has_weights(checkpoint, text, tmp_path, monkeypatch):
    windows = read_windows(checkpoint, Calibration(str(text), tokens=4 * WINDOW, window=WINDOW))
    monkeypatch.setattr(run_module, "MAX_STAGES", 2)  # more would only take longer
    source = open_source(checkpoint)
    made: list[Skeleton] = []
    most: list[int] = []
    create, read = Skeleton.__init__, Skeleton._tensor

    def remember(self, *args):
        create(self, *args)
        made.append(self)

    def resident(skeleton):
        return sum(p.numel() for p in skeleton.model.parameters() if p.device.type != "meta")

    def watch(self, name, like):
        most.append(resident(self) + like.numel())
        return read(self, name, like)

    monkeypatch.setattr(Skeleton, "__init__", remember)
    monkeypatch.setattr(Skeleton, "_tensor", watch)
    solve_model(source, source.settle(_quant())[0], windows, tmp_path / "work", by_budget=True)
    layer = sum(p.numel() for p in made[0].layers[0].parameters())
    head = made[0].head.weight.numel() + made[0].hidden
    assert len(made[0].layers) >= 2
    assert 0 < max(most) <= max(layer, head)
    assert resident(made[0]) == 0


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_are_refused(make_checkpoint, family):
    source = open_source(make_checkpoint(family))
    with pytest.raises(UnsupportedError, match="without --calibrate"):
        Skeleton(source, CPU)
