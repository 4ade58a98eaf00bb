"""What the activation contracts and the KV cache's dtype cost: the bundled model on held-out text.

    python benchmarks/activation_contracts.py

Builds ``examples/bundled/model`` with ``--act float``, ``int16`` and ``int8``, each with a float16
and a float32 KV cache, and evaluates it on the modules of this Python's standard library that its
training held out. Everything is compared with float activations and a float32 cache, and that with
PyTorch. The table goes to ``benchmarks/results/activations.md``. Needs extra ``train``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import fairy_compile as fc
from fairy_compile.artifact.manifest import Manifest
from fairy_compile.bench.machine import PACKAGES, Machine, versions
from fairy_compile.evaluation.result import EvalResult
from fairy_compile.evaluation.text import TextFacts
from fairy_compile.results import bullets, markdown_table
from fairy_compile.targets import host_features, load_target

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "examples" / "bundled"
RESULTS = Path(__file__).parent / "results"

REFERENCE = ("float", "float32")
VARIANTS = [("float", "float16"), ("int16", "float32"), ("int16", "float16")]
VARIANTS += [("int8", "float32"), ("int8", "float16")]
OTHER_TARGET = "x86-64-v3"
TITLES = ["activations", "KV cache", "target", "perplexity", "delta nats", "KL nats", "same top-1"]
TITLES += ["max logit diff"]


def write_text(path: Path) -> None:
    """Write the held-out modules, one JSON line each."""
    sys.path.insert(0, str(BUNDLED))
    from corpus import read_documents

    _, held_out = read_documents()
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in held_out.source)


class Bench:
    """Builds and evaluates variants in a temporary directory."""

    def __init__(self, directory: Path, max_tokens: int, threads: int | None) -> None:
        self.directory, self.threads, self.max_tokens = directory, threads, max_tokens
        self.text = directory / "held_out.jsonl"
        write_text(self.text)

    def build(self, act: str, kv_dtype: str, target: str = "cpu") -> Path:
        """Build a variant once; return its artifact."""
        output = self.directory / f"{act}-{kv_dtype}-{target}"
        if not output.exists():
            print(f"building {output.name}", file=sys.stderr)
            fc.build(BUNDLED / "model", target=target, act=act, kv_dtype=kv_dtype, output=output)
        return output

    def planned_kernels(self, act: str, kv_dtype: str, target: str) -> set[str]:
        """Return the kernel families a variant would use."""
        planned = fc.build(
            BUNDLED / "model", target=target, act=act, kv_dtype=kv_dtype, dry_run=True
        )
        return {layer.kernel for layer in planned.layers}

    def evaluate(self, artifact: Path, against: Path | None) -> EvalResult:
        """Evaluate an artifact as the bundled model was: modules end with the end-of-text token."""
        print(f"evaluating {artifact.name}", file=sys.stderr)
        return fc.evaluate(
            artifact,
            self.text,
            against=against,
            join="<|end|>",
            max_tokens=self.max_tokens,
            threads=self.threads,
        )


def kernels(artifact: Path) -> set[str]:
    """Return the kernel families an artifact uses."""
    return {layer.kernel for layer in Manifest.load(artifact).layers}


def row(act: str, kv_dtype: str, target: str, result: EvalResult) -> list[str]:
    """Return a line of the table."""
    found = result.against
    assert found is not None
    return [
        act,
        kv_dtype,
        target,
        result.score.show_perplexity(),
        found.delta.show_small("+"),
        found.kl.show_small(),
        f"{found.agreement.show(2, scale=100)} %",
        f"{found.max_logit_difference:.2g}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max-tokens", type=int, default=65_536, help="tokens of text")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "activations.md")
    args = parser.parse_args()
    machine = Machine.here()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), args.max_tokens, args.threads)
        reference = bench.build(*REFERENCE)
        checked = bench.evaluate(reference, BUNDLED / "model")
        figures = row(*REFERENCE, "cpu", checked)
        pytorch = checked.against.score.show_perplexity()
        rows = [
            [*figures[:4], *["reference"] * 4],
            ["PyTorch, same codes", "float32", "-", pytorch, *figures[4:]],
        ]
        used, same = set(), []
        for act, kv_dtype in VARIANTS:
            artifact = bench.build(act, kv_dtype)
            rows.append(row(act, kv_dtype, "cpu", bench.evaluate(artifact, reference)))
            used |= kernels(artifact)
            if not load_target(OTHER_TARGET).runs_here():
                continue
            if bench.planned_kernels(act, kv_dtype, OTHER_TARGET) == kernels(artifact):
                same.append(f"{act} with {kv_dtype}")
                continue
            other = bench.build(act, kv_dtype, OTHER_TARGET)
            found = bench.evaluate(other, reference)
            rows.append(row(act, kv_dtype, OTHER_TARGET, found))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(report(rows, checked, machine, sorted(used), same))
    print(args.output.read_text())


def report(
    rows: list[list[str]], result: EvalResult, machine: Machine, used: list[str], same: list[str]
) -> str:
    """Return the Markdown of the results file."""
    text: TextFacts = result.text
    wide = sorted(host_features() & {"avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx-int8"})
    lines = [
        "delta: nats a token more than the reference, with the standard error of pairs of windows; "
        "KL: KL(reference || variant); ± is the standard error over windows",
        f"text: modules of the standard library of Python {platform.python_version()} that the "
        f"bundled model's training held out, {text.tokens} tokens (sha256 "
        f"{text.tokens_sha256[:16]}), {result.windows} disjoint windows of {result.context}, "
        f"{result.scored} tokens scored",
        "the row of PyTorch compares the reference with it: delta is the reference less PyTorch, "
        "KL is KL(PyTorch || reference)",
        f"kernels on this machine: {', '.join(used)}",
        f"machine: {machine.cpu}, {machine.cores} cores, {machine.system}, of the instructions the "
        f"kernels look for it has {', '.join(wide) or 'none'}",
        "versions: " + ", ".join(f"{k} {v}" for k, v in versions((*PACKAGES, "torch")).items()),
        f"{datetime.now(timezone.utc).date().isoformat()}, command: python "
        f"benchmarks/activation_contracts.py {' '.join(sys.argv[1:])}".rstrip(),
    ]
    if same:
        words = (
            f"target {OTHER_TARGET} has the kernels of target cpu here and was not evaluated for: "
        )
        lines.insert(4, words + ", ".join(same))
    table = markdown_table(TITLES, rows, set(TITLES[3:]))
    return f"# What activations and KV cache cost\n\n{table}\n\n{bullets(lines, 'md')}\n"


if __name__ == "__main__":
    main()
