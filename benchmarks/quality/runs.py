"""The runs of the quality study: what is trained, converted and compared, and how."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from auto_round_peer import SETTINGS, auto_round, missing
from corpus import EVAL_TOKENS, WINDOW, held_out, tokenizer
from graph import ATTENTION
from schedule import Going, Run
from torch import nn
from training import (
    Recipe,
    apply_peer,
    evaluate,
    group_rule,
    new_model,
    prepare_phase,
    round_to_bfloat16,
    save,
    sign_rule,
    ternary_rule,
    train,
)
from transformers import LlamaForCausalLM

import fairy_compile as fc
from fairy_compile.calibrate import Calibration
from fairy_compile.calibrate.windows import read_windows
from fairy_compile.frontends import open_source
from fairy_compile.train.models import load_model, quiet_transformers

KINDS = ("fp", "search", "trained", "free", "auto-round")
HEAD2 = {"lm_head": 2}  # training-free methods raise the head to T = 3 unless told otherwise
CONTROL_BITS = 32.0
# What all runs of a study have in common.
SIZES = ("hidden", "vocab", "fp_tokens", "more_tokens", "search_tokens", "eval_tokens",
         "fp_batch", "batch", "half")  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A way to train the floating-point model on.

    Attributes:
        apply: makes its layers those of a rule.
        bits: stored bits a weight; None counts those of phase layers.
        recipe: changes of `Recipe` against the study's.
        alternating: begin from codes and scales fitted to the weights, not from the weights.
        times: tokens against those of the other runs of its kind.
    """

    apply: Callable[[LlamaForCausalLM], None]
    bits: float | None = None
    recipe: dict = field(default_factory=dict)
    alternating: bool = False
    times: float = 1.0


def _phase(quant: str, stages_for: dict[str, int] | None = None, **others: object) -> Callable:
    return lambda model: prepare_phase(model, quant, stages_for or {}, **others)


def _nothing(model: LlamaForCausalLM) -> None:
    """Train in floating point."""


_W2 = _phase("w2")
# Settings of the W2 training, tried on the first seed. The best one at the same bits is taken for
# all methods and seeds.
SEARCH = {
    "search-base": Method(_W2),
    "search-lr-2e-3": Method(_W2, recipe={"peak": 2e-3}),
    "search-lr-4e-3": Method(_W2, recipe={"peak": 4e-3}),
    "search-lr-5e-4": Method(_W2, recipe={"peak": 5e-4}),
    "search-distil": Method(_W2, recipe={"distil": 1.0}),
    "search-distil-half": Method(_W2, recipe={"distil": 0.5}),
    "search-distil-lr-2e-3": Method(_W2, recipe={"distil": 1.0, "peak": 2e-3}),
    "search-distil-lr-4e-3": Method(_W2, recipe={"distil": 1.0, "peak": 4e-3}),
    "search-warmup-200": Method(_W2, recipe={"warmup": 200}),
    "search-others-third": Method(_W2, recipe={"others": 1 / 3}),
    "search-batch-16": Method(_W2, recipe={"batch": 16}),
    "search-decay": Method(_W2, recipe={"decay": 0.05}),
    "search-alternating": Method(_W2, alternating=True),
    "search-row": Method(_phase("w2", scale="row")),
    # The control has the same choice.
    "search-control": Method(_nothing, CONTROL_BITS),
    "search-control-lr-2e-3": Method(_nothing, CONTROL_BITS, {"peak": 2e-3}),
    "search-control-lr-5e-4": Method(_nothing, CONTROL_BITS, {"peak": 5e-4}),
    "search-control-distil": Method(_nothing, CONTROL_BITS, {"distil": 0.5}),
}
_UNLIKE = {"search-row"}  # other bits: not to be chosen
TRAINED = {
    "control": Method(_nothing, CONTROL_BITS),
    "qat-w2": Method(_W2),
    "qat-ternary": Method(lambda model: apply_peer(model, ternary_rule), 1.58),
    "qat-w1": Method(_phase("w1")),
    "qat-sign": Method(lambda model: apply_peer(model, sign_rule), 1.0),
    "qat-w2-head3": Method(_phase("w2", {"lm_head": 3})),
    "qat-w2-row": Method(_phase("w2", scale="row")),
    "control-long": Method(_nothing, CONTROL_BITS, times=3),
    "qat-w2-long": Method(_W2, times=3),
}
FIRST_SEED_ONLY = ("control-long", "qat-w2-long")
FREE: dict[str, dict] = {  # options of `fc.convert`; "tune" counts steps and asks for calibration
    "free-w1-plain": {"quant": fc.QuantConfig("w1", method="phase")},
    "free-w1-gptq": {"quant": fc.QuantConfig("w1", stages_for={"lm_head": 1}), "tune": 0},
    "free-w2-plain": {"quant": fc.QuantConfig("w2", method="phase")},
    "free-w2-alternating": {"quant": fc.QuantConfig("w2", method="alternating", stages_for=HEAD2)},
    "free-w2-gptq": {"quant": fc.QuantConfig("w2", stages_for=HEAD2), "tune": 0},
    "free-w2-gptq-head3": {"quant": fc.QuantConfig("w2"), "tune": 0},
    "free-w2-gptq-head3-tuned": {"quant": fc.QuantConfig("w2", scale="row"), "tune": 60},
    "free-w2-gptq-head3-rotated": {"quant": fc.QuantConfig("w2"), "tune": 0, "rotate": True},
    "free-w3-gptq": {"quant": fc.QuantConfig("w3"), "tune": 0},
}
PEERS = {  # name -> (bits a weight, rule); real weights rounded to nearest, minimum and step in f16
    "free-ternary": (1.58, ternary_rule),
    "free-rtn2-g32": (3.0, group_rule(2, 32)),
    "free-rtn3-g32": (4.0, group_rule(3, 32)),
    "free-rtn4-g32": (5.0, group_rule(4, 32)),
}
AUTO_ROUND = {f"free-{name}": setting for name, setting in SETTINGS.items()}
NAMES = ("fp", *SEARCH, *TRAINED, *PEERS, *FREE, *AUTO_ROUND)


@dataclass(frozen=True)
class Study:
    """Where the study is and how big.

    Attributes:
        work: directory of its seeds' directories.
        corpus: directory of the text; see `corpus`.
        hidden: width.
        vocab: of the tokenizer and the model.
        fp_tokens: of the floating-point runs.
        more_tokens: of the runs that go on from there.
        search_tokens: of those that look for settings; 0 takes the settings as they are.
        eval_tokens: held-out text.
        fp_batch: windows a step of the floating-point runs.
        batch: windows a step of the others.
        compiled: torch.compile the floating-point runs, on a CPU.
        device: where training runs.
        half: round the floating-point model to bfloat16 when it is done, as checkpoints are.
        eager: on CUDA, start every kernel anew instead of replaying graphs.
    """

    work: Path
    corpus: Path
    hidden: int = 128
    vocab: int = 2048
    fp_tokens: int = 15_000_000
    more_tokens: int = 3_000_000
    search_tokens: int = 0
    eval_tokens: int = EVAL_TOKENS
    fp_batch: int = 16
    batch: int = 16
    compiled: bool = False
    device: str = "cpu"
    half: bool = False
    eager: bool = False

    def directory(self, seed: int) -> Path:
        """Return the directory of a seed's runs."""
        return self.work / f"seed-{seed}"

    def fp(self, seed: int) -> LlamaForCausalLM:
        """Return the floating-point model of a seed, float32, on the device."""
        with quiet_transformers():
            return self.placed(load_model(self.directory(seed) / "fp"))

    def placed(self, model: LlamaForCausalLM) -> LlamaForCausalLM:
        """Return a model on the device, ready to be trained there."""
        if self.device != "cpu":
            model.set_attn_implementation(ATTENTION)
        return model.to(self.device)

    def windows(self) -> torch.Tensor:
        """Return the held-out text, on the device."""
        return held_out(self.corpus, self.eval_tokens).to(self.device)

    def training(self) -> dict:
        """Return what `train` should know of the device."""
        checks = 200 if self.device == "cpu" else 2000
        return {"device": self.device, "checks": checks, "captured": not self.eager}

    def calibration(self, tune: int = 0) -> Calibration:
        """Return what training-free runs look at: the text, and steps of tuning."""
        return Calibration(str(self.corpus / "train.jsonl"), 65536, WINDOW, tune=tune)

    def note(self) -> None:
        """Write study.json, which says what the runs have in common, or check it.

        Raises:
            SystemExit: the runs that are there have other sizes.
        """
        path = self.work / "study.json"
        facts = {key: getattr(self, key) for key in SIZES} | {"window": WINDOW}
        if path.exists():
            there = json.loads(path.read_text())
            for key in SIZES:
                if there.get(key, facts[key]) != facts[key]:
                    raise SystemExit(
                        f"the runs in {self.work} have {key} {there[key]} and this command has "
                        f"{facts[key]}; give --{key.replace('_', '-')} {there[key]}, or another -o"
                    )
        else:
            self.work.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(facts, indent=2) + "\n")


def run_fp(study: Study, seed: int, log: Path) -> Going:
    """Train the floating-point model."""
    model = study.placed(new_model(study.hidden, study.vocab, seed))
    windows = study.windows()
    recipe = Recipe(study.fp_tokens, 3e-3, 100, 0.05, study.fp_batch)
    options = {"windows": windows, "compiled": study.compiled, **study.training()}
    yield from train(model, study.corpus, recipe, seed, log, **options)
    if study.half:
        round_to_bfloat16(model)
    loss = evaluate(model, windows)
    save(model, study.corpus, study.directory(seed) / "fp", half=study.half)
    return {"loss": loss, "bits": 32.0, "tokens": recipe.tokens}


def run_more(study: Study, seed: int, log: Path, name: str) -> Going:
    """Train the floating-point model on under a method's rule; all methods see the same batches."""
    search = name in SEARCH
    method = SEARCH[name] if search else TRAINED[name]
    tokens = round(method.times * (study.search_tokens if search else study.more_tokens))
    settings, alternating = ({}, False) if search else chosen(study, "control" in name)
    settings, alternating = {**settings, **method.recipe}, alternating or method.alternating
    recipe = dataclasses.replace(Recipe(tokens, 1e-3, 20, 0.0, study.batch), **settings)
    model = study.fp(seed)
    windows = study.windows()
    if alternating and method.bits is None:
        start_alternating(model)
    method.apply(model)
    teacher = study.fp(seed).requires_grad_(False).eval() if recipe.distil else None
    options = {"windows": windows, "teacher": teacher, **study.training()}
    yield from train(model, study.corpus, recipe, 1000 + seed, log, **options)
    loss = evaluate(model, windows)
    bits = phase_bits(model) if method.bits is None else method.bits
    if method.bits is None and not search:
        with quiet_transformers():
            words = tokenizer(study.corpus)
            fc.qat.export(model, study.directory(seed) / name, tokenizer=words, force=True)
    return {"loss": loss, "bits": bits, "tokens": tokens, "recipe": dataclasses.asdict(recipe)}


@torch.no_grad()
def start_alternating(model: nn.Module, stages: int = 2) -> None:
    """Move the linear layers to codes and scales fitted to their weights alone."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            near = fc.quantize(layer.weight, stages, method="alternating").dequantize()
            layer.weight.copy_(torch.from_numpy(near))


def chosen(study: Study, control: bool) -> tuple[dict, bool]:
    """Return the best settings of the search: changes of the recipe, and ``alternating``."""
    if not study.search_tokens:
        return {}, False
    losses = {}
    for name in SEARCH:
        path = study.directory(0) / f"{name}.json"
        if ("control" in name) == control and name not in _UNLIKE and path.exists():
            losses[name] = json.loads(path.read_text())["loss"]
    if not losses:
        return {}, False
    best = SEARCH[min(losses, key=losses.__getitem__)]
    return best.recipe, best.alternating


def phase_bits(model: nn.Module) -> float:
    """Return the stored bits a weight, scales included, over the phase layers of a model."""
    tensors = [layer.phase_tensor() for layer in fc.qat.phase_layers(model).values()]
    weights = [math.prod(tensor.shape) for tensor in tensors]
    return sum(t.bits_per_weight * n for t, n in zip(tensors, weights, strict=True)) / sum(weights)


def run_free(study: Study, seed: int, name: str) -> Going:
    """Convert the floating-point model without training, and evaluate the dequantised weights."""
    yield 0.0
    options = dict(FREE[name])
    if "tune" in options:
        options["calibrate"] = study.calibration(options.pop("tune"))
    model = study.fp(seed)
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        packed = Path(scratch) / "packed"
        report = fc.convert(study.directory(seed) / "fp", packed, **options)
        source = open_source(packed)
        state = {
            key: torch.from_numpy(source.dense(key).astype(np.float32)) for key in source.names()
        }
    model.load_state_dict(state)
    return {"loss": evaluate(model, study.windows()), "bits": report.bits_per_weight}


def run_peer(study: Study, seed: int, name: str) -> Going:
    """Round the floating-point model by a peer's rule."""
    yield 0.0
    bits, rule = PEERS[name]
    model = study.fp(seed)
    apply_peer(model, rule)
    return {"loss": evaluate(model, study.windows()), "bits": bits}


def run_auto_round(study: Study, seed: int, name: str) -> Going:
    """Let auto-round quantise the floating-point model, on the windows of other calibrated runs."""
    yield 0.0
    directory = study.directory(seed) / "fp"
    windows = torch.from_numpy(read_windows(directory, study.calibration()).astype(np.int64))
    with quiet_transformers():
        taken, words = load_model(directory), tokenizer(study.corpus)
    state, bits = auto_round(taken, words, windows, AUTO_ROUND[name])
    model = study.fp(seed)
    model.load_state_dict(state)
    return {"loss": evaluate(model, study.windows()), "bits": bits}


def runs(
    study: Study,
    seeds: list[int],
    kinds: tuple[str, ...] = KINDS,
    only: Collection[str] = NAMES,
) -> Iterator[Run]:
    """Yield the runs of some kinds and names in the order in which they are worth having."""

    def trained(seed: int) -> Callable[[], bool]:
        return lambda: (study.directory(seed) / "fp.json").exists()

    def make(seed: int, name: str, go: Callable, ready: Callable[[], bool]) -> Run:
        facts = {"seed": seed, "run": name, "hidden": study.hidden}
        return Run(study.directory(seed), name, facts, go, ready)

    if "fp" in kinds and "fp" in only:
        for seed in seeds:
            yield make(seed, "fp", lambda log, s=seed: run_fp(study, s, log), lambda: True)
    search = []
    if "search" in kinds and study.search_tokens and 0 in seeds:
        for name in (name for name in SEARCH if name in only):
            go = lambda log, n=name: run_more(study, 0, log, n)  # noqa: E731
            search.append(make(0, name, go, trained(0)))
        yield from search
    names = [*(TRAINED if "trained" in kinds else ()), *(PEERS if "free" in kinds else ())]
    names += FREE if "free" in kinds else ()
    if "auto-round" in kinds:
        if why := missing():
            print(f"runs of auto-round left out: {why}", flush=True)
        else:
            names += AUTO_ROUND
    for name in (name for name in names if name in only):
        for seed in seeds[:1] if name in FIRST_SEED_ONLY else seeds:
            ready = trained(seed)
            if name in TRAINED:
                go = lambda log, s=seed, n=name: run_more(study, s, log, n)  # noqa: E731
                ready = lambda first=ready: first() and all(s.over for s in search)  # noqa: E731
            elif name in PEERS:
                go = lambda log, s=seed, n=name: run_peer(study, s, n)  # noqa: E731
            elif name in AUTO_ROUND:
                go = lambda log, s=seed, n=name: run_auto_round(study, s, n)  # noqa: E731
            else:
                go = lambda log, s=seed, n=name: run_free(study, s, n)  # noqa: E731
            yield make(seed, name, go, ready)
