"""The text, the tokenizer and the batches of the quality study.

Text is the source of Python's standard library, split by a hash of each module's path so that no
module is on both sides.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
HELD_OUT = 6  # per cent of modules
END = "<|end|>"
WINDOW = 256
EVAL_TOKENS = 65536


def prepare(work: Path, vocab: int) -> None:
    """Write train.jsonl, held_out.jsonl, tokenizer/ and the token streams, unless all are there."""
    if (work / "corpus.json").exists():
        return
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[str]] = {"train": [], "held_out": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts):
            share = int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % 100
            side = "held_out" if share < HELD_OUT else "train"
            texts[side].append(path.read_text(encoding="utf-8", errors="replace"))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts["train"], vocab, special_tokens=[END], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)
    fast.save_pretrained(work / "tokenizer")
    facts = {}
    for side, documents in texts.items():
        with (work / f"{side}.jsonl").open("w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in documents)
        end = bpe.token_to_id(END)
        stream = [token for text in documents for token in [*bpe.encode(text).ids, end]]
        np.save(work / f"{side}.npy", np.array(stream, np.uint16))
        facts[side] = {"bytes": sum(len(t.encode()) for t in documents), "tokens": len(stream)}
    (work / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")


def tokenizer(work: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `prepare` trained."""
    return PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")


def held_out(work: Path) -> torch.Tensor:
    """Return the windows to evaluate on, int64 (windows, WINDOW)."""
    stream = np.load(work / "held_out.npy")[:EVAL_TOKENS]
    windows = len(stream) // WINDOW
    return torch.from_numpy(stream[: windows * WINDOW].astype(np.int64)).reshape(windows, WINDOW)


class Epochs:
    """Batches of training windows, int64 (batch, WINDOW + 1): each epoch covers all text once.

    Every epoch cuts the stream at another offset and shuffles the windows.
    """

    def __init__(self, work: Path, batch: int, seed: int) -> None:
        self.stream = np.load(work / "train.npy").astype(np.int64)
        self.batch, self.random = batch, np.random.default_rng(seed)
        self.order: list[int] = []

    def __next__(self) -> torch.Tensor:
        """Return the next batch."""
        while len(self.order) < self.batch:
            offset = int(self.random.integers(WINDOW))
            starts = np.arange(offset, len(self.stream) - WINDOW - 1, WINDOW)
            self.order += self.random.permutation(starts).tolist()
        starts, self.order = self.order[: self.batch], self.order[self.batch :]
        return torch.from_numpy(np.stack([self.stream[s : s + WINDOW + 1] for s in starts]))
