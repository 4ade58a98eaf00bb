"""Networks that are no language models, on a CPU: beside onnxruntime in float32 and in int8.

    python benchmarks/onnx_cpu.py --threads 1             # all models: some minutes
    python benchmarks/onnx_cpu.py --models encoder        # all cores

Three networks with random weights are exported to ONNX: an MLP, an encoder of BERT-base's size and
a small convolutional net. Each is built with W2 weights (int8 and float activations) and given to
onnxruntime as it is and after its dynamic int8 quantisation. Runs take turns, so that all meet the
same machine; with several threads those of one runtime may still spin while the other runs, so
compare on one. Besides times and sizes on disk the table has the error of our float build against
onnxruntime on the same dequantised weights. Needs extras ``onnx`` and ``test``. The table goes to
``benchmarks/results/onnx-cpu.md``; quote it only from a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fairy_compile as fc
from fairy_compile.artifact import human_bytes
from fairy_compile.bench.machine import PACKAGES, Machine, versions
from fairy_compile.bench.spread import Spread
from fairy_compile.results import bullets, markdown_table
from fairy_compile.runtime.threads import default_threads

RESULTS = Path(__file__).parent / "results" / "onnx-cpu.md"
TITLES = ["network", "runtime", "weights", "on disk", "ms a run (median)", "spread", "error"]


class MLP(nn.Module):
    """Four layers of width 4096."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [1024, 4096, 4096, 4096, 1024]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(sizes)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


class Block(nn.Module):
    """One encoder layer, post-norm as in BERT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        size = width // self.heads
        q, k, v = (
            self.qkv(x).view(batch, length, 3, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        )
        scores = torch.softmax((q @ k.transpose(-1, -2)) * size**-0.5, -1)
        x = self.norm1(x + self.out((scores @ v).transpose(1, 2).reshape(batch, length, width)))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class Encoder(nn.Module):
    """BERT-base's shapes: 12 layers of width 768 with 12 heads; 85 M weights without embeddings."""

    def __init__(self, width: int = 768, layers: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width, 12) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ConvNet(nn.Module):
    """Three convolutions and two linear layers, for images of 64 x 64."""

    def __init__(self) -> None:
        super().__init__()
        channels = [3, 32, 64, 128]
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(channels)])
        self.hidden, self.head = nn.Linear(128 * 64, 1024), nn.Linear(1024, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.head(torch.relu(self.hidden(torch.flatten(x, 1))))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (MLP, (1, 1024)),
    "mlp, 64 rows": (MLP, (64, 1024)),
    "encoder, 128 tokens": (Encoder, (1, 128, 768)),
    "convnet": (ConvNet, (1, 3, 64, 64)),
}


@dataclass
class Contender:
    """One way to run a network: what it is called, how big it is, how it runs."""

    runtime: str
    weights: str
    nbytes: int
    run: Callable[[np.ndarray], np.ndarray]
    error: str = "-"


def export(module: nn.Module, x: torch.Tensor, path: Path) -> None:
    """Write a module as ONNX with static shapes."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (x,), path, dynamo=True, verbose=False, external_data=False,
            input_names=["x"], output_names=["y"],
        )  # fmt: skip


def session(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that runs an ONNX file in onnxruntime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    opened = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: opened.run(None, {"x": x})[0]


def contenders(module: nn.Module, x: torch.Tensor, work: Path, threads: int) -> list[Contender]:
    """Return all ways to run a network, built in ``work``."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, int8, phase = work / "plain.onnx", work / "int8.onnx", work / "phase.onnx"
    export(module, x, plain)
    quantize_dynamic(plain, int8, weight_type=QuantType.QInt8)
    found = [
        Contender("onnxruntime", "float32", plain.stat().st_size, session(plain, threads)),
        Contender("onnxruntime", "int8, dynamic", int8.stat().st_size, session(int8, threads)),
    ]
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                values = fc.quantize(layer.weight.detach(), "w2", method="phase").dequantize()
                layer.weight.copy_(torch.from_numpy(values))
    export(module, x, phase)  # its weights hold phase values, so both runtimes have the same
    want = session(phase, threads)(x.numpy())
    for act in ("int8", "float"):
        out = work / act
        fc.build(phase, method="phase", act=act, output=out)
        model = fc.load(out, threads=threads)
        size = sum(path.stat().st_size for path in out.iterdir())
        found.append(Contender("fairy_compile", f"w2, {act} activations", size, _run(model)))
        error = np.abs(found[-1].run(x.numpy()) - want).max() / np.abs(want).max()
        found[-1].error = f"{error:.1e}"
    return found


def _run(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: model.run(x)["y"]


def measure(ways: list[Contender], x: np.ndarray, seconds: float) -> list[list[float]]:
    """Return milliseconds a run of every contender, run in turns for ``seconds`` each."""
    for way in ways:
        way.run(x)
        way.run(x)
    samples: list[list[float]] = [[] for _ in ways]
    end = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < end:
        for way, own in zip(ways, samples, strict=True):
            start = time.perf_counter()
            way.run(x)
            own.append(1000 * (time.perf_counter() - start))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", help=f"some of: {', '.join(MODELS)} (by beginning)")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="a contender and network")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = []
    for name, (make, shape) in MODELS.items():
        if options.models and not any(name.startswith(asked) for asked in options.models):
            continue
        torch.manual_seed(0)
        module, x = make().eval(), torch.randn(shape)
        with tempfile.TemporaryDirectory() as work:
            ways = contenders(module, x, Path(work), options.threads)
            for way, samples in zip(ways, measure(ways, x.numpy(), options.seconds), strict=True):
                spread = Spread.of(samples)
                times = [f"{spread.median:.2f}", f"{spread.low:.2f}-{spread.high:.2f}"]
                rows.append(
                    [name, way.runtime, way.weights, human_bytes(way.nbytes), *times, way.error]
                )
                print(*rows[-1], sep="  ", flush=True)
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "machine": Machine.here().to_json(),
        "threads": options.threads,
        "versions": versions((*PACKAGES, "onnx", "onnxruntime")),
        "error": "largest difference to onnxruntime on the same weights, of the largest output",
    }
    table = markdown_table(TITLES, rows, set(TITLES[3:]))
    lines = [f"{title}: {value}" for title, value in facts.items()]
    text = f"# Beside onnxruntime on a CPU\n\n{table}\n\n{bullets(lines, 'md')}\n"
    options.output.write_text(text, "utf-8")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
