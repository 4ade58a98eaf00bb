"""What training-free quantisation costs a model: loss gaps on held-out text.

    python benchmarks/training_free.py MODEL --calibrate train.jsonl --eval held_out.jsonl

MODEL is a Hugging Face directory of floating-point weights, small enough to be held in memory.
Every row is a conversion by `fairy_compile.convert`, dequantised and run by PyTorch in float32:
activations are exact, so the gaps are those of the weights alone. Text to calibrate on and text to
evaluate on must differ. Prints a Markdown table; ``--json FILE`` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import fairy_compile as fc
from fairy_compile.calibrate import Calibration
from fairy_compile.calibrate.windows import read_windows
from fairy_compile.frontends import open_source
from fairy_compile.train.models import load_model, quiet_transformers

W2 = {"lm_head": 2}  # keeps the head at T = 2, which training-free methods raise to 3
ROWS: dict[str, tuple[dict, bool]] = {  # name -> (options of convert, whether it is calibrated)
    "T1 plain rule": ({"quant": fc.QuantConfig("w1", method="phase")}, False),
    "T1 gptq (fitted scales)": ({"quant": fc.QuantConfig("w1", stages_for={"lm_head": 1})}, True),
    "T2 plain rule": ({"quant": fc.QuantConfig("w2", method="phase")}, False),
    "T2 alternating": (
        {"quant": fc.QuantConfig("w2", method="alternating", stages_for=W2)},
        False,
    ),
    "T2 alternating, head T3": ({"quant": fc.QuantConfig("w2", method="alternating")}, False),
    "T2 gptq": ({"quant": fc.QuantConfig("w2", stages_for=W2)}, True),
    "T2 gptq, head T3": ({"quant": fc.QuantConfig("w2")}, True),
    "T2 gptq, head T3, rows": ({"quant": fc.QuantConfig("w2", scale="row")}, True),
    "T2 gptq, head T3, rows, tuned": (
        {"quant": fc.QuantConfig("w2", scale="row"), "tune": 60},
        True,
    ),
    "T2 alternating, head T3, rotated": (
        {"quant": fc.QuantConfig("w2", method="alternating"), "rotate": True},
        False,
    ),
    "T2 gptq, head T3, rotated": ({"quant": fc.QuantConfig("w2"), "rotate": True}, True),
    "2.2 bits by weight errors": ({"bits": 2.2}, False),
    "2.2 bits by estimated loss": ({"bits": 2.2}, True),
    "2.5 bits by estimated loss": ({"bits": 2.5}, True),
    "T3 gptq": ({"quant": fc.QuantConfig("w3")}, True),
}


@torch.no_grad()
def loss(model: torch.nn.Module, windows: np.ndarray) -> float:
    """Return the mean cross-entropy, nats a token."""
    total = 0.0
    for window in windows:
        tokens = torch.from_numpy(window.astype(np.int64))[None]
        logits = model(tokens, use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))
    return total / len(windows)


def put_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Give a model the weights of a packed checkpoint, dequantised."""
    source = open_source(checkpoint)
    state = {
        name: torch.from_numpy(source.dense(name).astype(np.float32)) for name in source.names()
    }
    model.load_state_dict(state, assign=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", required=True, metavar="TEXT")
    parser.add_argument("--eval", required=True, metavar="TEXT")
    parser.add_argument("--calibrate-tokens", type=int, default=65536)
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--window", type=int)
    parser.add_argument("--rows", nargs="*", metavar="WORD", help="only rows with such a word")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    held = read_windows(args.model, Calibration(args.eval, args.eval_tokens, args.window))
    with quiet_transformers():
        model = load_model(args.model).eval()
        start = loss(model, held)
    print(
        f"{args.model.name}: loss {start:.4f} (perplexity {math.exp(start):.2f}) on {held.size:,}"
    )
    print("\n| method | bits a weight | loss gap, nats | seconds |\n|---|---|---|---|")
    figures = {"model": args.model.name, "loss": start, "eval_tokens": int(held.size), "rows": []}
    for name, (options, calibrated) in ROWS.items():
        if args.rows and not any(word in name for word in args.rows):
            continue
        options = dict(options)
        tune = options.pop("tune", 0)
        if calibrated:
            options["calibrate"] = Calibration(
                args.calibrate, args.calibrate_tokens, args.window, tune=tune
            )
        with tempfile.TemporaryDirectory() as work, quiet_transformers():
            begun = time.monotonic()
            report = fc.convert(args.model, Path(work) / "packed", **options)
            seconds = time.monotonic() - begun
            put_weights(model, Path(work) / "packed")
        gap = loss(model, held) - start
        print(f"| {name} | {report.bits_per_weight:.3f} | {gap:.3f} | {seconds:.0f} |", flush=True)
        row = {"method": name, "bits": report.bits_per_weight, "gap": gap, "seconds": seconds}
        figures["rows"].append(row)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
