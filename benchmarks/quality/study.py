"""What phase codes cost a small language model, beside what other codes cost it.

    python benchmarks/quality/study.py -o WORK              # all runs, one after the other
    python benchmarks/quality/study.py -o WORK --threads 1  # in several shells: runs are shared
    python benchmarks/quality/table.py WORK                 # Markdown and a plot

For every seed a Llama is trained in floating point on the sources of Python's standard library;
then the same model is trained on for one more epoch as it is (the control) and through the rule of
each method, and it is converted without training. A finished run is kept as WORK/seed-N/NAME.json
and not repeated; a stopped one starts anew.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from corpus import EVAL_TOKENS, WINDOW, held_out, prepare, tokenizer
from training import (
    Recipe,
    apply_peer,
    evaluate,
    group_rule,
    new_model,
    prepare_phase,
    save,
    sign_rule,
    ternary_rule,
    train,
)
from transformers import LlamaForCausalLM

import fairy_compile as fc
from fairy_compile.calibrate import Calibration
from fairy_compile.frontends import open_source
from fairy_compile.train.models import load_model, quiet_transformers

HEAD2 = {"lm_head": 2}  # training-free methods raise the head to T = 3 unless told otherwise
QAT: dict[str, Callable[[LlamaForCausalLM], None]] = {
    "control": lambda model: None,
    "qat-w2": lambda model: prepare_phase(model, "w2", {}),
    "qat-ternary": lambda model: apply_peer(model, ternary_rule),
    "qat-w1": lambda model: prepare_phase(model, "w1", {}),
    "qat-sign": lambda model: apply_peer(model, sign_rule),
    "qat-w2-head3": lambda model: prepare_phase(model, "w2", {"lm_head": 3}),
}
FREE: dict[str, dict] = {  # options of `fc.convert`; "tokens" calibrates, "tune" counts steps
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
LAST = ("qat-w1", "qat-sign", "qat-w2-head3")  # run when all else is done
PEERS = {  # name -> (bits a weight, rule); real weights rounded to nearest, minimum and step in f16
    "free-ternary": (1.58, ternary_rule),
    "free-rtn2-g32": (3.0, group_rule(2, 32)),
    "free-rtn3-g32": (4.0, group_rule(3, 32)),
    "free-rtn4-g32": (5.0, group_rule(4, 32)),
}


@dataclass(frozen=True)
class Study:
    """Where the study is and how big: see `main` for the defaults."""

    work: Path
    hidden: int
    vocab: int
    fp_tokens: int
    more_tokens: int
    compiled: bool

    def directory(self, seed: int) -> Path:
        """Return the directory of a seed's runs."""
        return self.work / f"seed-{seed}"

    def fp(self, seed: int) -> LlamaForCausalLM:
        """Return the floating-point model of a seed, float32."""
        with quiet_transformers():
            return load_model(self.directory(seed) / "fp")


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Yield whether this process alone holds ``path``; a process that dies lets go of it."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False


def run_fp(study: Study, seed: int, log: Path) -> dict:
    """Train the floating-point model."""
    model = new_model(study.hidden, study.vocab, seed)
    recipe = Recipe(study.fp_tokens, 3e-3, 100, 0.05)
    loss = train(model, study.work, recipe, seed, log, study.compiled)
    save(model, study.work, study.directory(seed) / "fp")
    return {"loss": loss, "bits": 32.0, "tokens": recipe.tokens}


def run_more(study: Study, seed: int, log: Path, name: str) -> dict:
    """Train the floating-point model on under a method's rule; all methods see the same batches."""
    model = study.fp(seed)
    QAT[name](model)
    recipe = Recipe(study.more_tokens, 1e-3, 20, 0.0)
    loss = train(model, study.work, recipe, 1000 + seed, log, compiled=False)
    bits = {"control": 32.0, "qat-ternary": 1.58, "qat-sign": 1.0}.get(name)
    if bits is None:
        bits = phase_bits(model)
        with quiet_transformers():
            fc.qat.export(model, study.directory(seed) / name, tokenizer=tokenizer(study.work))
    return {"loss": loss, "bits": bits, "tokens": recipe.tokens}


def phase_bits(model: LlamaForCausalLM) -> float:
    """Return the stored bits a weight, scales included, over the phase layers of a model."""
    tensors = [layer.phase_tensor() for layer in fc.qat.phase_layers(model).values()]
    weights = [math.prod(tensor.shape) for tensor in tensors]
    return sum(t.bits_per_weight * n for t, n in zip(tensors, weights, strict=True)) / sum(weights)


def run_free(study: Study, seed: int, name: str) -> dict:
    """Convert the floating-point model without training, and evaluate the dequantised weights."""
    options = dict(FREE[name])
    if "tune" in options:
        options["calibrate"] = Calibration(
            str(study.work / "train.jsonl"), 65536, WINDOW, tune=options.pop("tune")
        )
    model = study.fp(seed)
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        packed = Path(scratch) / "packed"
        report = fc.convert(study.directory(seed) / "fp", packed, **options)
        source = open_source(packed)
        state = {
            key: torch.from_numpy(source.dense(key).astype(np.float32)) for key in source.names()
        }
    model.load_state_dict(state, assign=True)
    return {"loss": evaluate(model, held_out(study.work)), "bits": report.bits_per_weight}


def run_peer(study: Study, seed: int, name: str) -> dict:
    """Round the floating-point model by a peer's rule."""
    bits, rule = PEERS[name]
    model = study.fp(seed)
    apply_peer(model, rule)
    return {"loss": evaluate(model, held_out(study.work)), "bits": bits}


def runs(study: Study, seeds: list[int]) -> Iterator[tuple[int, str, Callable[[Path], dict]]]:
    """Yield (seed, name, run), in the order in which they are worth having."""
    for seed in seeds:
        yield seed, "fp", lambda log, s=seed: run_fp(study, s, log)
    names = [*QAT, *PEERS, *FREE]
    for name in sorted(names, key=LAST.__contains__):
        for seed in seeds:
            if name in QAT:
                yield seed, name, lambda log, s=seed, n=name: run_more(study, s, log, n)
            elif name in PEERS:
                yield seed, name, lambda log, s=seed, n=name: run_peer(study, s, n)
            else:
                yield seed, name, lambda log, s=seed, n=name: run_free(study, s, n)


def work_through(study: Study, seeds: list[int]) -> None:
    """Do every run that no other process has done or is doing; wait where one is needed first."""
    while True:
        waiting = False
        for seed, name, run in runs(study, seeds):
            place = study.directory(seed)
            place.mkdir(exist_ok=True)
            done = place / f"{name}.json"
            if done.exists():
                continue
            if name != "fp" and not (place / "fp.json").exists():
                waiting = True
                continue
            with claimed(place / f"{name}.lock") as mine:
                if not mine or done.exists():
                    continue
                log = place / f"{name}.log"
                log.unlink(missing_ok=True)
                begun = time.monotonic()
                figures = {"seed": seed, "run": name, **run(log)}
                figures["seconds"] = round(time.monotonic() - begun)
                done.write_text(json.dumps(figures) + "\n")
                print(json.dumps(figures), flush=True)
            break  # begin anew at the top, where what is worth most stands
        else:
            if not waiting:
                return
            time.sleep(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="WORK")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--fp-tokens", type=int, default=15_000_000)
    parser.add_argument("--more-tokens", type=int, default=3_000_000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    help_ = "torch.compile the floating-point runs; those with rules gain nothing"
    parser.add_argument("--compile", action="store_true", help=help_)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "corpus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare(args.output, args.vocab)
    sizes = (args.hidden, args.vocab, args.fp_tokens, args.more_tokens, args.compile)
    study = Study(args.output, *sizes)
    shape = {"hidden": args.hidden, "vocab": args.vocab, "fp_tokens": args.fp_tokens}
    shape |= {"more_tokens": args.more_tokens, "eval_tokens": EVAL_TOKENS, "window": WINDOW}
    (args.output / "study.json").write_text(json.dumps(shape, indent=2) + "\n")
    work_through(study, args.seeds)


if __name__ == "__main__":
    main()
