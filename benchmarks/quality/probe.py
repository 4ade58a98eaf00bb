"""Does the study work on this GPU, and how much of it fits into a time?

    python benchmarks/quality/probe.py --corpus DIR --seconds 200 -o probe.json > flags
    python benchmarks/quality/study.py ... $(cat flags)

Compares steps replayed from a CUDA graph with the same steps without one, measures both, and prints
the flags that size a study so that it fits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from corpus import WINDOW, unpack
from graph import ATTENTION, GraphSteps
from runs import SEARCH
from training import BatchLoss, Recipe, new_model, parameter_groups

BATCH = 32
# Tokens of a floating-point run, of one that goes on, and of one that searches, in millions; how
# many of these there are; and what of the time is lost to starting, evaluating and ends.
SIZES, COUNTS = (96.0, 16.0, 6.0), (3, 15, 18)
SCALES = (1.5, 1.25, 1.0, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
OVERHEAD = 40.0
# bf16 rounds logits to 1/256 of themselves; the mean over 8192 tokens agrees far better.
AGREE = 0.01


def stepper(corpus: Path, hidden: int, vocab: int, method: str, captured: bool) -> GraphSteps:
    """Return steps of a new model on CUDA."""
    model = new_model(hidden, vocab, 0)
    model.set_attn_implementation(ATTENTION)
    model.cuda()
    if method:
        SEARCH[method].apply(model)
    model.train()
    recipe = Recipe(400 * BATCH * WINDOW, 1e-3, 20, 0.0, BATCH)
    loss = BatchLoss(model, 0.0, None)
    groups = parameter_groups(model, recipe)
    return GraphSteps(model, corpus, recipe, 0, loss, groups, captured=captured)


def per_step(steppers: list[GraphSteps], streams: list[torch.cuda.Stream], count: int) -> float:
    """Return the seconds of one step of each, side by side."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(count):
        for steps, stream in zip(steppers, streams, strict=True):
            with torch.cuda.stream(stream):
                steps.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / count


def losses(steps: GraphSteps, stream: torch.cuda.Stream, count: int) -> torch.Tensor:
    """Do steps and return their losses."""
    with torch.cuda.stream(stream):
        for _ in range(count):
            steps.step()
    torch.cuda.synchronize()
    return steps._losses[:count].cpu()


def measure(make: Callable[[str, bool], GraphSteps], lanes: int, seen: dict) -> None:
    """Note differences of losses and seconds a step, one alone and several, in ``seen``."""
    streams = [torch.cuda.Stream() for _ in range(lanes)]
    seen["gpu"] = torch.cuda.get_device_name()
    for kind, method in (("fp", ""), ("w2", "search-base")):
        runners: list[GraphSteps] = []
        for captured in (False, *([True] * lanes)):
            with torch.cuda.stream(streams[max(0, len(runners) - 1)]):
                runners.append(make(method, captured))
        plain, graphs = runners[0], runners[1:]
        want = losses(plain, streams[0], 10)
        seen[f"{kind}_eager"] = per_step([plain], streams[:1], 20)
        got = losses(graphs[0], streams[0], 10)
        seen[f"{kind}_difference"] = (want - got).abs().max().item()
        for steps, stream in zip(graphs[1:], streams[1:], strict=True):
            losses(steps, stream, 5)
        seen[f"{kind}_one"] = per_step(graphs[:1], streams[:1], 60)
        seen[f"{kind}_lanes"] = per_step(graphs, streams, 60)


def flags(seen: dict, seconds: float, lanes: int, processes: int) -> list[str]:
    """Return the flags of a study that fits."""
    good = all(seen.get(f"{kind}_difference", 1.0) < AGREE for kind in ("fp", "w2"))
    tokens = BATCH * WINDOW
    if good:  # processes take turns on the GPU; runs of one share it
        rates = [lanes * tokens / seen[f"{kind}_lanes"] for kind in ("fp", "w2")]
    else:
        lanes, processes = 1, 10
        rates = [3 * tokens / seen.get(f"{kind}_eager", 0.05) for kind in ("fp", "w2")]
    rates = [rates[0], rates[1], rates[1]]
    costs = [n * s * 1e6 / r for n, s, r in zip(COUNTS, SIZES, rates, strict=True)]
    fits = [s for s in SCALES if s * sum(costs) < seconds - OVERHEAD]
    scale = max(fits, default=SCALES[-1])
    seen |= {"scale": scale, "tokens_per_second": rates, "graphs": good}
    fp, more, search = (round(scale * size * 1e6) for size in SIZES)
    words = [f"--fp-tokens {fp}", f"--more-tokens {more}", f"--search-tokens {search}"]
    words += [f"--lanes {lanes}", f"--processes {processes}"]
    return words if good else [*words, "--eager"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--seconds", type=float, required=True, help="of the study")
    parser.add_argument("--lanes", type=int, default=3)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    unpack(args.corpus)
    seen: dict = {}
    try:
        make = lambda method, captured: stepper(  # noqa: E731
            args.corpus, args.hidden, args.vocab, method, captured
        )
        measure(make, args.lanes, seen)
    except RuntimeError:
        seen["error"] = traceback.format_exc()
        print(seen["error"], file=sys.stderr)
    print(" ".join(flags(seen, args.seconds, args.lanes, args.processes)))
    args.output.write_text(json.dumps(seen, indent=2) + "\n")
    print(json.dumps(seen), file=sys.stderr)


if __name__ == "__main__":
    main()
