"""`load` for every artifact; `Model`, a loaded language model: text in, text out."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from fairy_compile.artifact import Manifest, check_loaded_metadata, verify
from fairy_compile.artifact.graph_contract import GRAPH
from fairy_compile.config import is_whole
from fairy_compile.errors import FairyError, nearest
from fairy_compile.paths import as_path
from fairy_compile.runtime import stats
from fairy_compile.runtime.chat_template import ChatTemplate, Message
from fairy_compile.runtime.engine import Engine
from fairy_compile.runtime.generation import Generation
from fairy_compile.runtime.graph_model import GraphModel
from fairy_compile.runtime.machine import check_machine, permit_amx
from fairy_compile.runtime.sampler import Sampler, SamplingParams
from fairy_compile.runtime.text import TextStream, Tokenizer, as_stops

if TYPE_CHECKING:
    from fairy_compile.artifact.manifest import LayerEntry
    from fairy_compile.runtime.chat import ChatSession

DEFAULT_MAX_TOKENS = 128


def load(
    directory: Path | str,
    device: str | None = None,
    *,
    threads: int | None = None,
    cpus: Collection[int] | None = None,
    **options: Any,
) -> Model | GraphModel:
    """Load an artifact that ``fairy_compile build`` wrote.

    The directory is verified first. The model library in it is code that this process will run:
    load artifacts you trust.

    Args:
        directory: the artifact.
        device: TVM device, e.g. ``cpu`` or ``cuda:0``; default the one it was built for.
        threads: CPU threads; default one a physical core.
        cpus: numbers of the CPUs they may run on; default all this process may.
        options: of language models, see `load_language_model`.

    Returns:
        `Model` of a language model, `GraphModel` of a graph (ONNX, PyTorch module).

    Raises:
        ModelFileError: the artifact is incomplete, changed or damaged.
        UnsupportedError: this machine lacks the device or the instructions it was built for.
        FairyError: an argument is out of range, or not for this kind of model.
    """
    directory = as_path("the artifact", directory)
    manifest = Manifest.load(directory)
    common: dict[str, Any] = {"device": device, "threads": threads, "cpus": cpus}
    if manifest.kind != GRAPH:
        known = inspect.signature(load_language_model).parameters
        if unknown := next((name for name in options if name not in known), None):
            allowed = [name for name in known if name != "directory"]
            raise FairyError(
                f"unknown option {unknown!r} of load; allowed: {', '.join(allowed)}."
                f"{nearest(unknown, allowed)}"
            )
        return load_language_model(directory, **common, **options)
    if options:
        raise FairyError(
            f"{next(iter(options))} is for language models; {directory} is a graph, so leave it out"
        )
    report = verify(directory)
    manifest = report.manifest
    check_machine(manifest, device)
    warnings = [*report.warnings, *permit_amx(manifest)]
    common["device"] = device or manifest.target.device
    model = GraphModel(directory, directory / manifest.library, **common, warnings=warnings)
    check_loaded_metadata(manifest, model.metadata)
    return model


def load_language_model(
    directory: Path | str,
    device: str | None = None,
    *,
    threads: int | None = None,
    cpus: Collection[int] | None = None,
    max_sequences: int = 4,
    context: int | None = None,
    kv_tokens: int | None = None,
    prefill_chunk: int | None = None,
) -> Model:
    """Load the artifact of a language model; what `load` returns for one.

    Args:
        directory: the artifact.
        device: TVM device, e.g. ``cpu`` or ``cuda:0``; default the one it was built for.
        threads: CPU threads; default one a physical core.
        cpus: numbers of the CPUs they may run on; default all this process may.
        max_sequences: most sequences at a time; at most what the model was built for.
        context: most tokens of one sequence, prompt and answer; default the model's.
        kv_tokens: tokens the KV cache holds in all; see `Engine`.
        prefill_chunk: most tokens of one prefill call; default what the model was built for.

    Raises:
        ModelFileError: the artifact is incomplete, changed or damaged.
        UnsupportedError: it is a graph, or this machine lacks the device or the instructions it
            was built for.
        FairyError: an argument is out of range.
    """
    directory = as_path("the artifact", directory)
    report = verify(directory)
    manifest = report.manifest
    manifest.check_language_model(directory)
    check_machine(manifest, device)
    engine = Engine(
        directory,
        directory / manifest.library,
        report.chat_config,
        device=device or manifest.target.device,
        threads=threads,
        cpus=cpus,
        max_sequences=_sequences(max_sequences, int(manifest.metadata["max_batch_size"])),
        context=context,
        kv_tokens=kv_tokens,
        prefill_chunk=prefill_chunk,
    )
    check_loaded_metadata(manifest, engine.metadata)
    warnings = [*report.warnings, *permit_amx(manifest)]
    return Model(directory, engine, manifest.layers, warnings)


def _sequences(wanted: int, most: int) -> int:
    """Return how many sequences to make room for; what is no number is left to `Engine`."""
    return min(wanted, most) if is_whole(wanted) else wanted


class Model:
    """A model ready to run. Use it as a context manager, or `close` it, to free its memory.

    Threads may share it, and wait for each other token by token. It cannot be copied or pickled.

    Attributes:
        directory: where it was loaded from.
        engine: the level below: sequences, prefill and decode.
        tokenizer: text to tokens and back.
        template: the chat template.
        sampling: the model's default `SamplingParams`.
        stop_tokens: tokens that end an answer.
        stop_strings: texts that end the answer of a chat.
        warnings: oddities of the artifact that did not prevent loading.
    """

    def __init__(
        self,
        directory: Path,
        engine: Engine,
        layers: Sequence[LayerEntry] = (),
        warnings: Sequence[str] = (),
    ):
        self.directory = directory
        self.warnings = tuple(warnings)
        self._engine: Engine | None = engine
        self._layers = tuple(layers)
        self.tokenizer = Tokenizer(directory / "tokenizer.json")
        self.template = ChatTemplate.from_directory(directory)
        self.sampling = SamplingParams.from_config(engine.config)
        self.stop_tokens = _stop_tokens(engine.config)
        self.stop_strings = tuple(engine.config.get("conv_template", {}).get("stop_str", ()))

    @property
    def engine(self) -> Engine:
        """The level below; raises `FairyError` after `close`."""
        if self._engine is None:
            raise FairyError(f"the model {self.directory} is closed; load it again")
        return self._engine

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free weights, library and KV cache."""
        self._engine = None

    def __reduce__(self) -> NoReturn:
        """Refuse pickling and copying: another process loads the artifact itself."""
        raise FairyError(
            f"a loaded model cannot be pickled or copied; load {self.directory} again where it is "
            "wanted"
        )

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits after each token of a new sequence: float32 [len, vocab].

        Raises:
            FairyError: no tokens, a token outside the vocabulary, or more than the context holds.
        """
        engine = self.engine
        sequence = engine.add_sequence()
        try:
            return engine.prefill_logits(sequence, tokens)
        finally:
            engine.remove_sequence(sequence)

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = DEFAULT_MAX_TOKENS,
        temperature: float | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stream: bool = False,
        *,
        logit_bias: dict[int, float] | None = None,
    ) -> str | Generation:
        """Continue ``prompt``.

        Args:
            prompt: text, or tokens that are taken as they are.
            max_tokens: most tokens to draw.
            temperature: see `SamplingParams`, like the next four; None is the model's default.
            top_p: likewise.
            repetition_penalty: likewise.
            presence_penalty: likewise.
            frequency_penalty: likewise.
            seed: same seed, same text; None draws a new one.
            stop: strings that end the text and are not part of it.
            stream: return an iterator over pieces of text (a `Generation`) instead of a string.
            logit_bias: token -> number added to its logit.

        Raises:
            FairyError: an argument is out of range, or the prompt does not fit the context.
        """
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
        else:
            if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | bytearray):
                raise FairyError(f"the prompt is {prompt!r}; allowed: text, or a list of tokens")
            tokens = self.engine.check_tokens(list(prompt)).tolist()
        params = self.sampling.override(
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            logit_bias=logit_bias,
        )
        # The text goes on where the prompt ends, so its first piece keeps its leading space.
        return self._generate(tokens, params, max_tokens, stop, stream, context=tokens)

    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int = DEFAULT_MAX_TOKENS,
        *,
        stop: Sequence[str] = (),
        stream: bool = False,
        **sampling: Any,
    ) -> str | Generation:
        """Answer a conversation.

        Args:
            messages: ``{"role": ..., "content": ...}``, oldest first.
            max_tokens: most tokens to draw.
            stop: further strings that end the answer.
            stream: return an iterator over pieces of text instead of a string.
            sampling: fields of `SamplingParams`; those left out are the model's defaults.

        Raises:
            FairyError: see `generate` and `encode_chat`.
        """
        params = self.override(**sampling)
        stops = (*self.stop_strings, *as_stops(stop))
        return self._generate(self.encode_chat(messages), params, max_tokens, stops, stream)

    def chat_session(self, system: str | None = None) -> ChatSession:
        """Return a conversation that keeps its history and its KV cache."""
        from fairy_compile.runtime.chat import ChatSession

        return ChatSession(self, system)

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Return the tokens of a conversation, ready for an answer.

        Args:
            messages: the conversation, oldest first.
            variables: further variables of the chat template, e.g. ``tools``.

        Raises:
            FairyError: the template refuses the conversation, or leaves messages of a role out.
        """
        text = self.template.render(messages, **variables)
        self.template.check_shown(messages, **variables)
        # A template writes the start token itself.
        return self.tokenizer.encode(text, special=self.template.source is None)

    def override(self, **sampling: Any) -> SamplingParams:
        """Return the model's defaults with changes; raises `FairyError` for unknown names."""
        unknown = set(sampling) - set(SamplingParams.__dataclass_fields__)
        if unknown:
            raise FairyError(
                f"unknown sampling option {min(unknown)!r}; allowed: "
                f"{', '.join(SamplingParams.__dataclass_fields__)}"
            )
        return self.sampling.override(**sampling)

    def stats(self) -> stats.Stats:
        """Return which functions and kernels ran, how often, how fast, and memory in use."""
        return stats.collect(self.engine, self._layers)

    def trace_kernels(self, tokens: Sequence[int]) -> dict[str, int]:
        """Run one decode step and return how often each kernel was called, as measured.

        Args:
            tokens: one or more; the last is decoded after a prefill of the others.
        """
        engine = self.engine
        sequence = engine.add_sequence()
        try:
            if len(tokens) > 1:
                engine.prefill(sequence, tokens[:-1])
            return engine.trace_decode(sequence, tokens[-1])
        finally:
            engine.remove_sequence(sequence)

    def _generate(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        max_tokens: int,
        stop: Sequence[str],
        stream: bool,
        context: Sequence[int] = (),
    ) -> str | Generation:
        engine = self.engine
        generation = Generation(
            engine,
            engine.add_sequence,
            tokens,
            Sampler(params),
            TextStream(self.tokenizer, context),
            max_tokens=max_tokens,
            stop_tokens=self.stop_tokens,
            stop=stop,
            on_end=engine.remove_sequence,
        )
        return generation if stream else generation.read()


def _stop_tokens(config: Any) -> Collection[int]:
    """Return the tokens that end an answer: the template's, and the end of text."""
    eos = config.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return frozenset([*config.get("conv_template", {}).get("stop_token_ids", ()), *ends])
