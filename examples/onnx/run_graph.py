"""Run a compiled graph on random inputs and tell what it takes, gives and how long that takes.

python examples/onnx/run_graph.py dist/model --size 8
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import fairy_compile as fc


def main() -> None:
    """Load the artifact, run it twice, time the second run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="what `fairy_compile build model.onnx` wrote")
    parser.add_argument("--size", type=int, default=8, help="of every dimension that may change")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with fc.load(options.directory) as model:
        inputs = {}
        for info in model.inputs:
            shape = [dim if isinstance(dim, int) else options.size for dim in info.shape]
            if np.issubdtype(np.dtype(info.dtype), np.floating):
                inputs[info.name] = rng.standard_normal(shape).astype(info.dtype)
            else:  # token ids and masks
                inputs[info.name] = rng.integers(0, 2, shape).astype(info.dtype)
            print(f"input  {info.name}: {info.dtype} {shape}")
        model.run(inputs)  # the first run makes threads and memory pools
        start = time.perf_counter()
        outputs = model.run(inputs)
        seconds = time.perf_counter() - start
    for name, array in outputs.items():
        print(f"output {name}: {array.dtype} {list(array.shape)}, {array.ravel()[:4]} ...")
    print(f"{1000 * seconds:.3f} ms")


if __name__ == "__main__":
    main()
