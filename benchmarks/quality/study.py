"""What phase codes cost a small language model, beside what other codes cost it.

    python benchmarks/quality/study.py -o WORK              # all runs, one after the other
    python benchmarks/quality/study.py -o WORK --threads 1  # in several shells: runs are shared
    python benchmarks/quality/table.py WORK                 # Markdown and a plot

    python benchmarks/quality/study.py -o WORK --device cuda --processes 3 --lanes 3 --seconds 220

For every seed a Llama is trained in floating point on Python sources; then the same model is
trained on as it is (the control) and through the rule of each method, and it is converted without
training, by auto-round too where that is installed (`pip install auto-round`).
With --search-tokens settings of the training are looked for first. A finished run is kept as
WORK/seed-N/NAME.json and not repeated; a stopped one starts anew. With several widths WORK/dWIDTH
stands for WORK.
"""

from __future__ import annotations

import argparse
import fcntl
import subprocess
import sys
import time
from pathlib import Path

import torch
from corpus import EVAL_TOKENS, prepare
from runs import KINDS, NAMES, Study, runs
from schedule import work_through

_GRACE = 10.0  # seconds that processes have beyond the deadline to stop by themselves


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="WORK")
    add("--corpus", type=Path, help="directory of the text  [default: WORK]")
    add("--packages", nargs="*", default=[], help="whose sources are added to the text")
    add("--hidden", type=int, nargs="+", default=[128], help="widths")
    add("--vocab", type=int, default=2048)
    add("--fp-tokens", type=int, default=15_000_000)
    add("--more-tokens", type=int, default=3_000_000)
    add("--search-tokens", type=int, default=0)
    add("--eval-tokens", type=int, default=EVAL_TOKENS)
    add("--fp-batch", type=int, default=16, help="windows a step in floating point")
    add("--batch", type=int, default=16, help="windows a step of the other runs")
    add("--seeds", type=int, nargs="*", default=[0, 1, 2])
    add("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    add("--runs", nargs="*", choices=NAMES, default=list(NAMES), metavar="NAME",
        help="of these kinds, those of these names")  # fmt: skip
    add("--half", action="store_true", help="round the floating-point model to bfloat16")
    add("--device", default="cpu", help="cpu or cuda; training-free runs compute on the CPU")
    add("--eager", action="store_true", help="no CUDA graphs")
    add("--lanes", type=int, default=1, help="runs side by side in a process, on CUDA")
    add("--processes", type=int, default=1)
    add("--seconds", type=float, default=float("inf"), help="stop after so long")
    add("--threads", type=int, default=torch.get_num_threads())
    help_ = "torch.compile the floating-point runs on a CPU; those with rules gain nothing"
    add("--compile", action="store_true", help=help_)
    return parser


def studies(args: argparse.Namespace) -> list[Study]:
    """Return one study a width."""
    corpus = args.corpus or args.output
    several = len(args.hidden) > 1
    return [
        Study(
            work=args.output / f"d{hidden}" if several else args.output,
            corpus=corpus,
            hidden=hidden,
            vocab=args.vocab,
            fp_tokens=args.fp_tokens,
            more_tokens=args.more_tokens,
            search_tokens=args.search_tokens,
            eval_tokens=args.eval_tokens,
            fp_batch=args.fp_batch,
            batch=args.batch,
            compiled=args.compile,
            device=args.device,
            half=args.half,
            eager=args.eager,
        )
        for hidden in args.hidden
    ]


def spread(processes: int, deadline: float) -> bool:
    """Run this command in several processes, and stop those that do not stop in time."""
    command = [sys.executable, *sys.argv, "--processes", "1"]
    if deadline < float("inf"):
        command += ["--seconds", str(deadline - time.monotonic())]
    children = [subprocess.Popen(command) for _ in range(processes)]
    for child in children:
        left = deadline + _GRACE - time.monotonic()
        try:
            child.wait(None if left == float("inf") else max(0.0, left))
        except subprocess.TimeoutExpired:
            child.kill()
    return all(child.wait() == 0 for child in children)


def main() -> None:
    begun = time.monotonic()
    parser = arguments()
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device is {args.device} and PyTorch sees no GPU; allowed here: cpu")
    if args.lanes > 1 and args.device == "cpu":
        parser.error("--lanes puts runs on CUDA streams; on the CPU start several processes")
    torch.set_num_threads(args.threads)
    corpus = args.corpus or args.output
    corpus.mkdir(parents=True, exist_ok=True)
    with (corpus / "corpus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare(corpus, args.vocab, tuple(args.packages))
    all_studies = studies(args)
    for study in all_studies:
        study.note()
        for kind in ("late", "failed"):
            for path in study.work.glob(f"seed-*/*.{kind}"):
                path.unlink(missing_ok=True)
    if args.processes > 1:
        fine = spread(args.processes, begun + args.seconds)
    else:
        kinds, only = tuple(args.kinds), args.runs
        order = (run for s in all_studies for run in runs(s, args.seeds, kinds, only))
        fine = work_through(
            order, lanes=args.lanes, cuda=args.device != "cpu", deadline=begun + args.seconds
        )
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
