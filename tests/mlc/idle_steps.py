"""Run an artifact in MLC's engine on a CUDA driver that does nothing; print what was asked of it.

python -m tests.mlc.idle_steps ARTIFACT      # with idle_driver.c's libraries in the path
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

from tests.emulation.idle_steps import FIELDS, Counts
from tests.mlc.engine import MlcEngine
from tests.mlc.installed import load_engine


def main() -> None:
    """Count what greedy, sampled and penalised answers ask for."""
    library = ctypes.CDLL("libcuda.so.1")
    counts = Counts.in_dll(library, "idle_counts")
    violation = (ctypes.c_char * 256).in_dll(library, "idle_violation")
    load_engine()
    engine = MlcEngine(Path(sys.argv[1]), "cuda", max_total_sequence_length=2048)
    rows = []
    for settings in (
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "repetition_penalty": 1.2, "logprobs": True},
    ):
        for prompts in ([[1, 2, 3]], [[1, 2, 3], [5] * 90, [7] * 3]):
            before = {name: getattr(counts, name) for name in FIELDS}
            engine.generate(prompts, max_tokens=6, **settings)
            rows.append({name: getattr(counts, name) - before[name] for name in FIELDS})
    found = {"rows": rows, "violations": counts.violations, "violation": violation.value.decode()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
