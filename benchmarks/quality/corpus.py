"""The text, the tokenizer and the batches of the quality study.

Text is the source of Python's standard library and, where asked for, of installed packages, split
by a hash of each module's path so that no module is on both sides.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

SKIPPED = {"site-packages", "test", "tests", "testing", "idle_test", "encodings", "pydoc_data"}
HELD_OUT = 6  # per cent of modules
END = "<|end|>"
WINDOW = 256
EVAL_TOKENS = 65536
STREAMS = "streams.npz"  # the token streams of both sides, compressed: what travels


def prepare(work: Path, vocab: int, packages: tuple[str, ...] = ()) -> None:
    """Write train.jsonl, held_out.jsonl, tokenizer/ and the token streams, unless all are there.

    Args:
        work: where to.
        vocab: tokens of the tokenizer, trained on the first side.
        packages: installed packages whose sources are added to the standard library's.
    """
    if (work / "corpus.json").exists():
        unpack(work)
        return
    texts: dict[str, list[str]] = {"train": [], "held_out": []}
    for name, path in _modules(packages):
        share = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
        side = "held_out" if share < HELD_OUT else "train"
        texts[side].append(path.read_text(encoding="utf-8", errors="replace"))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts["train"], vocab, special_tokens=[END], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)
    fast.save_pretrained(work / "tokenizer")
    facts: dict = {"packages": {name: metadata.version(name) for name in packages}}
    for side, documents in texts.items():
        with (work / f"{side}.jsonl").open("w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in documents)
        end = bpe.token_to_id(END)
        stream = [token for text in documents for token in [*bpe.encode(text).ids, end]]
        np.save(work / f"{side}.npy", np.array(stream, np.uint16))
        facts[side] = {"bytes": sum(len(t.encode()) for t in documents), "tokens": len(stream)}
    (work / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")


def _modules(packages: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Yield (name, file) of the modules whose source is the text.

    The standard library stands first and in order; with packages all modules are in the order of
    their names' hashes, so that the beginning of either side is a sample of everything.
    """
    paths = sysconfig.get_paths()
    roots = [(Path(paths["stdlib"]), "")]
    roots += [(Path(paths["purelib"]) / package, f"{package}/") for package in packages]
    found = []
    for root, prefix in roots:
        if not root.is_dir():
            raise SystemExit(f"--packages names {root.name}, and there is no {root}; install it")
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if SKIPPED.isdisjoint(inside.parts):
                found.append((prefix + inside.as_posix(), path))
    if packages:
        found.sort(key=lambda module: hashlib.sha256(module[0].encode()).digest())
    yield from found


def pack(work: Path) -> Path:
    """Write both token streams into one compressed file and return it: to take them elsewhere."""
    streams = {side: np.load(work / f"{side}.npy") for side in ("train", "held_out")}
    np.savez_compressed(work / STREAMS, **streams)
    return work / STREAMS


def unpack(work: Path) -> None:
    """Undo `pack` where the plain streams are not there."""
    if (work / STREAMS).exists():
        with np.load(work / STREAMS) as streams:
            for side in streams.files:
                if not (work / f"{side}.npy").exists():
                    np.save(work / f"{side}.npy", streams[side])


def tokenizer(work: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `prepare` trained."""
    return PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")


def held_out(work: Path, tokens: int = EVAL_TOKENS) -> torch.Tensor:
    """Return the windows to evaluate on, int64 (windows, WINDOW)."""
    stream = np.load(work / "held_out.npy")[:tokens]
    windows = len(stream) // WINDOW
    return torch.from_numpy(stream[: windows * WINDOW].astype(np.int64)).reshape(windows, WINDOW)


class Epochs:
    """Batches of training windows, int64 (batch, WINDOW + 1): each epoch covers all text once.

    Every epoch cuts the stream at another offset and shuffles the windows.
    """

    def __init__(self, work: Path, batch: int, seed: int) -> None:
        self.stream = np.load(work / "train.npy", mmap_mode="r")
        self.batch, self.random = batch, np.random.default_rng(seed)
        self.order = np.empty(0, np.int64)
        self.done = 0

    def starts(self) -> np.ndarray:
        """Return where in the stream the windows of the next batch begin, int64 (batch,)."""
        while len(self.order) - self.done < self.batch:
            offset = int(self.random.integers(WINDOW))
            starts = np.arange(offset, len(self.stream) - WINDOW - 1, WINDOW)
            left = self.order[self.done :]
            self.order, self.done = np.concatenate([left, self.random.permutation(starts)]), 0
        self.done += self.batch
        return self.order[self.done - self.batch : self.done]

    def __next__(self) -> torch.Tensor:
        """Return the next batch."""
        rows = [self.stream[start : start + WINDOW + 1] for start in self.starts()]
        return torch.from_numpy(np.stack(rows).astype(np.int64))
