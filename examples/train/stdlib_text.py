"""Write text to train on: the sources of this Python's standard library, one JSON line a module.

python examples/train/stdlib_text.py stdlib.jsonl
"""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}


def main(output: Path) -> None:
    """Write the file ``output``."""
    root = Path(sysconfig.get_paths()["stdlib"])
    with output.open("w", encoding="utf-8") as out:
        for path in sorted(root.rglob("*.py")):
            if SKIPPED.isdisjoint(path.relative_to(root).parts):
                text = path.read_text(encoding="utf-8", errors="replace")
                out.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
