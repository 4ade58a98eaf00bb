"""Memory and time of a calibrated conversion, layer by layer, at the width of a real model.

    python benchmarks/calibrate_memory.py llama2-7b --layers 4 -o WORK

Weights are random, and so is the text; neither changes how much memory or time it takes. Resident
memory is the process's own figure, read from the kernel ten times a second, the pages of mapped
files included; they are given apart, since the kernel drops them when memory is short. Where there
is a GPU, layers are solved on it, and its memory is given too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

import fairy_compile as fc
from fairy_compile.calibrate import Calibration


def resident() -> tuple[int, int]:
    """Return (all, of mapped files) resident bytes of this process; Linux only."""
    fields = Path("/proc/self/status").read_text().splitlines()
    found = {f.split(":")[0]: int(f.split()[1]) for f in fields if f.startswith(("VmRSS", "RssF"))}
    return found["VmRSS"] << 10, found["RssFile"] << 10


class Watch(threading.Thread):
    """Keeps the largest figures since the last `take`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.own = 0, 0
        self.start()

    def run(self) -> None:
        """Look ten times a second."""
        while True:
            everything, mapped = resident()
            self.peak, self.own = max(self.peak, everything), max(self.own, everything - mapped)
            time.sleep(0.1)

    def take(self) -> tuple[int, int]:
        """Return (peak, peak without mapped files) in bytes, and begin anew."""
        seen = self.peak, self.own
        self.peak = self.own = 0
        return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--quant", default="w2")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    work = args.output
    work.mkdir(parents=True, exist_ok=True)
    model, text = work / f"{args.shape}-{args.layers}", work / "text.txt"
    if not model.exists():
        make = [sys.executable, str(Path(__file__).with_name("make_synthetic.py")), args.shape]
        make += ["--layers", str(args.layers), "--vocab", str(args.vocab), "-o", str(model)]
        subprocess.run(make, check=True)
    letters = np.random.default_rng(0).integers(97, 123, 16 * args.tokens + 1, np.uint8)
    text.write_bytes(letters.tobytes())
    watch, lines, begun = Watch(), [], time.monotonic()
    last: list = ["open", begun]

    def progress(words: str, done: int, parts: int) -> None:
        peak, own = watch.take()
        now = time.monotonic()
        line = {"part": last[0], "seconds": round(now - last[1], 1)}
        line |= {"peak_gib": round(peak / 2**30, 2), "own_gib": round(own / 2**30, 2)}
        if torch.cuda.is_available():
            line["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            torch.cuda.reset_peak_memory_stats()
        lines.append(line)
        print(json.dumps(line), flush=True)
        last[:] = [words.split(", about")[0].split(", peak")[0], now]

    calibration = Calibration(str(text), args.tokens, args.window)
    packed = work / f"{model.name}-{args.quant}"
    report = fc.convert(
        model, packed, quant=args.quant, calibrate=calibration, force=True, progress=progress
    )
    progress("end", 0, 0)
    errors = [layer.output_error for layer in report.layers if layer.output_error is not None]
    total = {"seconds": round(time.monotonic() - begun, 1), "bits": report.bits_per_weight}
    total |= {"output_error": [min(errors), max(errors)]}
    print(json.dumps(total))
    (work / f"{packed.name}.json").write_text(json.dumps([*lines, total], indent=1) + "\n")


if __name__ == "__main__":
    main()
