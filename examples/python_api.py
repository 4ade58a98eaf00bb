"""Build the bundled model, continue a prompt, and show which kernels ran.

python examples/python_api.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import fairy_compile as fc

MODEL = Path(__file__).parent / "bundled" / "model"


def main() -> None:
    """Build into a temporary directory, generate, and print statistics."""
    with tempfile.TemporaryDirectory() as directory:
        report = fc.build(MODEL, target="cpu", output=Path(directory) / "artifact")
        print("kernels:", report.kernels())
        with fc.load(report.output) as model:
            print(model.generate("import os\n\ndef ", max_tokens=60, temperature=0.0))
            print(model.chat([{"role": "user", "content": "Hello"}], max_tokens=60))
            print(model.stats())


if __name__ == "__main__":
    main()
