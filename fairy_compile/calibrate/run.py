"""Calibrating a model layer by layer: what `convert` does with text, and where it goes on.

The floating-point model runs on the calibration windows, one decoder layer's weights at a time;
hidden states between layers lie on disk. A layer that has run is solved and written to a file of
its own, and then noted as done, so that a killed conversion repeats at most one layer. All layers
see the inputs of the floating-point model: feeding them those of the quantised layers before
brought nothing in measurements.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from fairy_compile import __version__
from fairy_compile.artifact.files import human_bytes
from fairy_compile.bench.machine import peak_resident_bytes
from fairy_compile.calibrate.gptq import Solved, quantize_gptq
from fairy_compile.calibrate.sensitivity import Losses, estimate_losses, state_tokens
from fairy_compile.calibrate.skeleton import Skeleton
from fairy_compile.calibrate.solutions import Solutions
from fairy_compile.calibrate.stream import Grams, HiddenStates, run_layer
from fairy_compile.config import MAX_STAGES, QuantConfig
from fairy_compile.frontends.plan import RECOVERED, method_words, recover_layer
from fairy_compile.frontends.source import ModelSource

Progress = Callable[[str, int, int], None]
Solution = dict[int, tuple[Solved, str]]  # T -> (solution, how)

_STATE = "state.json"
_LOSSES = "losses.json"


def device() -> torch.device:
    """Return the device calibration computes on: the first GPU of CUDA, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def resume_key(
    source: ModelSource,
    quant: QuantConfig,
    windows: np.ndarray,
    *,
    by_budget: bool,
    tune: int = 0,
) -> str:
    """Return what decides the result: an interrupted conversion goes on only with the same."""
    facts = [
        source.sha256(),
        quant.to_json(),
        by_budget,
        tune,
        type(source).__name__,  # a rotated one has the files of its source
        list(windows.shape),
        hashlib.sha256(windows.tobytes()).hexdigest(),
        str(device()),
        __version__,
        {name: metadata.version(name) for name in ("torch", "transformers")},
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def work_bytes(source: ModelSource, windows: np.ndarray, *, by_budget: bool) -> int:
    """Return an estimate of the disk space `solve_model` needs."""
    hidden, layers = (
        int(source.config.get(key) or 0) for key in ("hidden_size", "num_hidden_layers")
    )
    weights = sum(int(np.prod(source.shape(name))) for name in source.names())
    bits = sum(range(1, MAX_STAGES + 1)) if by_budget else MAX_STAGES
    states = max(2 * windows.size, state_tokens(windows) * (layers + 1) if by_budget else 0)
    return 4 * hidden * states + weights * bits // 8


def solve_model(
    source: ModelSource,
    quant: QuantConfig,
    windows: np.ndarray,
    work: Path,
    *,
    by_budget: bool = False,
    progress: Progress | None = None,
) -> tuple[Solutions, Losses]:
    """Solve all linear layers of a model, or those that are left.

    Args:
        source: the floating-point model.
        quant: settled; says which layers stay dense, T and granularity.
        windows: uint32 (windows, length), see `calibrate.windows`.
        work: directory for files; one that a killed call left, with the same arguments, is gone
            on in.
        by_budget: solve for every T from 1 to 4 where ``quant.stages_for`` does not name a layer,
            and estimate the losses of all candidates.
        progress: called before every part with words, number and how many there are.

    Returns:
        The solutions, and layer -> T -> estimated loss, empty unless ``by_budget``.

    Raises:
        FairyError: a weight is missing, misshapen or not finite.
        UnsupportedError: the model is not one of decoder layers.
    """
    work.mkdir(exist_ok=True)
    run = _Run(source, quant, windows, work, by_budget, progress)
    run.go()
    return run.solutions, run.losses() if by_budget else {}


class _Run:
    """The state of `solve_model`, whose arguments it takes."""

    def __init__(
        self,
        source: ModelSource,
        quant: QuantConfig,
        windows: np.ndarray,
        work: Path,
        by_budget: bool,
        progress: Progress | None,
    ) -> None:
        self.source, self.quant, self.windows, self.work = source, quant, windows, work
        self.by_budget = by_budget
        self.device = device()
        self.skeleton = Skeleton(source, self.device)
        self.solutions = Solutions(work)
        self.shape = (*windows.shape, self.skeleton.hidden)
        parts = len(self.skeleton.layers) + 1
        self.clock = _Clock(progress, parts + (2 * parts - 1 if by_budget else 0))

    def go(self) -> None:
        """Solve what is not solved yet."""
        done = self._done()
        for part in range(done):
            self.solutions.load(part)
            self.clock.skip()
        count = len(self.skeleton.layers)
        if done == 0:
            HiddenStates.of(self._states(0), self.shape, self.skeleton.embed(self.windows))
        if done < count:
            contexts = self.skeleton.contexts(self.windows.shape[1])
        for part in range(done, count):
            self.clock.step(f"decoder layer {part + 1} of {count}")
            grams = self._run(part, contexts[part])
            solved: dict[str, Solution] = {}
            for leader, layers in grams.groups().items():
                gram = grams.take(leader)
                for layer in layers:
                    solved |= self._solve(layer, gram)
                del gram
            self._finish(part, solved)
        if done <= count:
            self.clock.step("output head")
            name = self.skeleton.name(self.skeleton.head)
            self._finish(count, self._solve(name, self._head_gram()))

    def _states(self, part: int) -> Path:
        return self.work / f"hidden-{part}.f32"

    def _done(self) -> int:
        path = self.work / _STATE
        return json.loads(path.read_text())["done"] if path.is_file() else 0

    def _finish(self, part: int, solved: dict[str, Solution]) -> None:
        """Write the solutions of a part, and only then note that it is done."""
        self.solutions.save(part, solved)
        partial = self.work / f"{_STATE}.partial"
        partial.write_text(json.dumps({"done": part + 1}) + "\n")
        partial.replace(self.work / _STATE)
        self._states(part).unlink(missing_ok=True)

    def losses(self) -> Losses:
        """Estimate the losses of all candidates, or read what was estimated before."""
        path = self.work / _LOSSES
        if not path.is_file():
            found = estimate_losses(
                self.skeleton, self.solutions, self.windows, self.work, self.clock.step
            )
            partial = self.work / f"{_LOSSES}.partial"
            partial.write_text(json.dumps(found) + "\n")
            partial.replace(path)
        stored = json.loads(path.read_text())
        return {name: {int(t): loss for t, loss in by.items()} for name, by in stored.items()}

    def _run(self, part: int, context: dict) -> Grams:
        """Run a decoder layer over all windows; write its hidden states, return its Grams."""
        layer = self.skeleton.layers[part]
        before = HiddenStates(self._states(part), self.shape)
        after = HiddenStates(self._states(part + 1), self.shape, create=True)
        with self.skeleton.loaded(layer):
            grams = Grams(self.skeleton.linears(layer))
            run_layer(layer, context, before, after, self.device, grams)
            grams.close()
        return grams

    @torch.no_grad()
    def _head_gram(self) -> torch.Tensor:
        before = HiddenStates(self._states(len(self.skeleton.layers)), self.shape)
        hidden = self.shape[2]
        gram = torch.zeros(hidden, hidden, device=self.device)
        with self.skeleton.loaded(self.skeleton.norm):
            for which in before.batches():
                x = self.skeleton.norm(before.read(which, self.device)).reshape(-1, hidden)
                gram.addmm_(x.T, x)
        return gram.div_(self.windows.size)

    def _solve(self, layer: str, gram: torch.Tensor) -> dict[str, Solution]:
        """Return {layer: its solutions}, empty for a layer that stays dense."""
        if not self.source.plan(layer, self.quant).phase:
            return {}
        weight = self.source.dense(f"{layer}.weight")
        planned = self.quant.stages(layer)
        baked = recover_layer(weight, layer, self.quant)
        if baked is not None:
            return {layer: {planned: (Solved.measure(weight, gram, baked), RECOVERED)}}
        free = self.by_budget and not self.quant.names_stages(layer)
        return {
            layer: {
                stages: (
                    quantize_gptq(weight, gram, stages, self.quant.scale),
                    method_words(self.quant, stages),
                )
                for stages in (range(1, MAX_STAGES + 1) if free else (planned,))
            }
        }


class _Clock:
    """Tells the caller how far the parts are, how long they will take and how much memory."""

    def __init__(self, progress: Progress | None, parts: int) -> None:
        self._progress, self._parts = progress, parts
        self._start = time.monotonic()
        self._done = self._timed = 0

    def skip(self) -> None:
        """Count a part that an earlier call did."""
        self._done += 1

    def step(self, words: str) -> None:
        """Begin a part."""
        if self._progress is not None:
            if self._timed:
                each = (time.monotonic() - self._start) / self._timed
                left = timedelta(seconds=round(each * (self._parts - self._done)))
                words += f", about {left} left"
            if (peak := peak_resident_bytes()) is not None:
                words += f", peak memory {human_bytes(peak)}"
            self._progress(f"calibrate: {words}", self._done, self._parts)
        self._done += 1
        self._timed += 1
