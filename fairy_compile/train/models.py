"""Getting the models of a run: the student with its latents, the teacher, and their directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import fairy_compile.qat.ifairy  # noqa: F401  registers the model with transformers
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.frontends.files import read_config
from fairy_compile.frontends.learned_scales import SUFFIX
from fairy_compile.frontends.method import LATENT_QUANT_METHOD
from fairy_compile.frontends.packed import is_packed
from fairy_compile.frontends.source import open_source
from fairy_compile.paths import as_path
from fairy_compile.qat.export import LATENTS


def model_directory(model: str, *, scratch: bool = False) -> Path:
    """Return the local directory of a model to train.

    Args:
        model: directory or hub id; of a QAT export the master weights are taken.
        scratch: only config.json is needed.

    Raises:
        FairyError: there is no such model, or it holds codes without master weights.
    """
    path = as_path("the model", model)
    if path.is_dir():
        if (path / LATENTS / "config.json").is_file():
            path = path / LATENTS
        config = read_config(path)
        if is_packed(config) and not scratch:
            raise FairyError(
                f"{path} is a packed checkpoint: it holds phase codes and no master weights to "
                "train; give the checkpoint it was made from"
            )
    elif scratch:
        raise FairyError(
            f"there is no directory {path.absolute()}; training from scratch starts from a "
            "directory with config.json and tokenizer.json"
        )
    else:
        source = open_source(model)
        if source.kind != "huggingface":
            raise FairyError(
                f"{source.origin} holds phase codes and no master weights to train; give the "
                "checkpoint it was made from"
            )
        path = source.directory
    return path


_HINT = "; --from-scratch starts from random weights"


def load_model(directory: Path, *, scratch: bool = False, hint: str = _HINT) -> Any:
    """Return a float32 causal language model.

    Args:
        directory: with config.json and, unless ``scratch``, weights.
        scratch: random weights; seed PyTorch before.
        hint: end of the error where weights cannot be read.

    Raises:
        FairyError: transformers cannot read it, or weights are missing.
        UnsupportedError: transformers has no such causal language model.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UnsupportedError(
            f"transformers {transformers.__version__} does not read {directory}/config.json: "
            f"{_first_line(error)}"
        ) from error
    mark = getattr(config, "quantization_config", None)
    if scratch and mark is not None:
        del config.quantization_config  # how weights were stored that are not read
    elif isinstance(mark, dict) and mark.get("quant_method") == LATENT_QUANT_METHOD:
        del config.quantization_config  # else transformers warns of a method it does not know
    auto = transformers.AutoModelForCausalLM
    try:
        if scratch:
            return auto.from_config(config, dtype=torch.float32)
        model, info = auto.from_pretrained(
            directory, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise FairyError(
            f"transformers cannot load {directory}: {_first_line(error)}{'' if scratch else hint}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise FairyError(
            f"{directory} lacks {len(missing)} weights of its model, among them {missing[0]}; the "
            "checkpoint is damaged, or its config.json is another model's"
        )
    if learned := [name for name in info["unexpected_keys"] if name.endswith(SUFFIX)]:
        raise FairyError(
            f"{directory} has learned scales ({sorted(learned)[0]}), which PyTorch's model has no "
            "place for; build or convert the model, and compare with the packed checkpoint that "
            f"`fairy_compile convert` writes{hint}"
        )
    return model


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing bars and notes into ours."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
