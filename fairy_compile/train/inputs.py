"""The inputs of a run, made ready: tokenizer, vocabulary, block length, blocks of tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fairy_compile.artifact.tokenizer_files import TokenizerFiles
from fairy_compile.errors import FairyError
from fairy_compile.frontends import complex_layers
from fairy_compile.frontends.files import read_config
from fairy_compile.paths import as_path
from fairy_compile.train.blocks import Blocks, split, write_tokens
from fairy_compile.train.config import TrainConfig

_BLOCK = 1024


def read_blocks(
    config: TrainConfig, directory: Path, tokenizer: Path, run: Path, *, resuming: bool
) -> tuple[Blocks, Blocks | None]:
    """Return the blocks to train on and those to evaluate on, tokenised into the run directory.

    Raises:
        FairyError: see `fairy_compile.train.blocks`.
    """
    eos = end_token(directory, tokenizer)
    options = {"eos": eos, "field": config.text_field, "resuming": resuming}
    tokens = write_tokens(config.data, tokenizer, run / "train.tokens", **options)
    if config.eval_data is None:
        return split(tokens, config.block, config.eval_share)
    trained, _ = split(tokens, config.block, 0.0)
    tokens = write_tokens(config.eval_data, tokenizer, run / "eval.tokens", **options)
    held, _ = split(tokens, config.block, 0.0)
    return trained, held


def end_token(directory: Path, tokenizer: Path) -> int | None:
    """Return the token that ends a text: the tokenizer's, else the first of config.json."""
    if (token := TokenizerFiles.read(tokenizer).token_id("eos_token")) is not None:
        return token
    value = read_config(directory).get("eos_token_id")
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) and 0 <= value < vocabulary(directory) else None


def tokenizer_directory(config: TrainConfig, directory: Path) -> Path:
    """Return the directory of the tokenizer: the one asked for, or the model's."""
    return as_path("the tokenizer", config.tokenizer) if config.tokenizer else directory


def vocabulary(directory: Path) -> int:
    """Return the size of a model's vocabulary."""
    size = read_config(directory).get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise FairyError(
            f"{directory}/config.json has vocab_size = {size!r}; expected a positive integer"
        )
    return size


def with_native_terms(config: TrainConfig, directory: Path) -> tuple[TrainConfig, str | None]:
    """Return the run with the terms its model's layers have, and a sentence where that changes it.

    Natively complex models (iFairy) train the W term with T = 1. A `QuantConfig` that asks for
    this term is left as it is, whatever its T.
    """
    kind = read_config(directory).get("model_type")
    if kind not in complex_layers.MODEL_TYPES or config.quant.terms == ("W",):
        return config, None
    quant = dataclasses.replace(config.quant, quant=complex_layers.PUBLISHED.quant, terms=("W",))
    note = f"{kind} is natively complex: its layers train with the W term and T = 1"
    return dataclasses.replace(config, quant=quant), note


def with_block(config: TrainConfig, directory: Path) -> TrainConfig:
    """Fill in the block length, or check it against the model's context."""
    longest = read_config(directory).get("max_position_embeddings")
    if not isinstance(longest, int) or longest < 2:
        longest = None
    if config.block is None:
        return dataclasses.replace(config, block=min(_BLOCK, longest or _BLOCK))
    if longest and config.block > longest:
        raise FairyError(
            f"--block {config.block} is longer than the model's context of {longest} tokens; "
            f"allowed: 2 to {longest}"
        )
    return config
