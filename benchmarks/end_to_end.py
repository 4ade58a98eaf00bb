"""Build a model and run it, and record time, peak memory and speed.

    python benchmarks/end_to_end.py /tmp/llama2-7b -o /tmp/artifact --name llama2-7b-w2-cpu

Build and run happen in processes of their own, so that each has its own peak memory. Results go to
``benchmarks/results/NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def measured(command: list[str]) -> tuple[float, float, str]:
    """Run a command; return wall seconds, peak resident GiB of it, and what it printed."""
    script = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); "
        "sys.exit(done.returncode)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr.strip())
    peak = int(done.stderr.rsplit("peak", 1)[1]) / (1 << 20)
    return seconds, peak, done.stdout


def run(directory: Path, prompt: int, tokens: int, repeat: int, threads: int | None) -> dict:
    """Load an artifact and time prefill and decode, ``repeat`` times each."""
    import fairy_compile as fc

    start = time.perf_counter()
    model = fc.load(directory, context=prompt + tokens + 16, max_sequences=1, threads=threads)
    load = time.perf_counter() - start
    engine = model.engine
    prefill, decode = [], []
    for _ in range(repeat):
        sequence = engine.add_sequence()
        start = time.perf_counter()
        logits = engine.prefill(sequence, [1 + i % 200 for i in range(prompt)])
        prefill.append(prompt / (time.perf_counter() - start))
        for _ in range(tokens):
            start = time.perf_counter()
            logits = engine.decode([sequence], [int(logits.argmax())])[0]
            decode.append(1 / (time.perf_counter() - start))
        engine.remove_sequence(sequence)
    return {
        "load_seconds": load,
        "threads": engine.threads,
        "prompt_tokens": prompt,
        "decode_tokens": tokens,
        "prefill_tokens_per_second": spread(prefill),
        "decode_tokens_per_second": spread(decode),
        "kernels": dict(sorted(model.trace_kernels([1, 2, 3]).items())),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict:
    """Describe the machine in public terms."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="artifact directory")
    parser.add_argument("--name", required=True, help="name of the results file")
    parser.add_argument("--quant", default="w2")
    parser.add_argument("--act", default="int8")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--run-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_only:
        figures = run(args.output, args.prompt, args.tokens, args.repeat, args.threads)
        print(json.dumps(figures))
        return
    build = [
        sys.executable, "-m", "fairy_compile.cli", "build", str(args.model), "--target", "cpu",
        "--quant", args.quant, "--act", args.act, "-o", str(args.output), "--force",
    ]  # fmt: skip
    seconds, peak, _ = measured(build)
    _, _, printed = measured([sys.executable, *sys.argv, "--run-only"])
    manifest = json.loads((args.output / "fairy.json").read_text())
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "date": manifest["created"],
        "versions": {k: manifest[k] for k in ("fairy_compile", "tvm", "tvm_ffi")},
        "build": {"seconds": seconds, "peak_rss_gib": peak},
        "artifact_gb": sum(f["bytes"] for f in manifest["files"].values()) / 1e9,
        "run": json.loads(printed.strip().splitlines()[-1]),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
