"""A compiled model as a model of the lm-eval harness, under the name ``fairy_compile``.

    import lm_eval
    import fairy_compile.evaluation.lm_eval_model
    lm_eval.simple_evaluate("fairy_compile", {"directory": "dist/model"}, tasks=["hellaswag"])

Tokens are counted and cut as by the harness's own models for Hugging Face transformers, so that
results can be compared: contexts lose tokens at the left, the rolling log-likelihood is of disjoint
windows (the last gets all the context that fits), and before a text stands the start token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from fairy_compile.errors import FairyError
from fairy_compile.evaluation.models import prefix_of
from fairy_compile.evaluation.scores import log_softmax
from fairy_compile.runtime import Model, load_language_model

DEFAULT_GEN_TOKENS = 256
_BLOCK = 256


@register_model("fairy_compile")
class FairyCompileLM(TemplateLM):
    """The harness's view of an artifact.

    Attributes:
        model: the loaded model.
    """

    def __init__(
        self,
        directory: str | Path | Model,
        device: str | None = None,
        threads: int | None = None,
        context: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ):
        """Load an artifact, or take a loaded model.

        Args:
            directory: artifact or model.
            device: TVM device; default the one it was built for.
            threads: CPU threads.
            context: most tokens of a sequence.
            batch_size: the harness gives it; requests run one by one, whatever it is.
            max_batch_size: likewise.
        """
        super().__init__()
        if isinstance(directory, Model):
            self.model = directory
        else:
            self.model = load_language_model(
                directory, device, threads=threads, max_sequences=1, context=context
            )
        self._prefix = prefix_of(self.model.directory)

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence."""
        return self.model.engine.context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            FairyError: the model has none.
        """
        eos = self.model.engine.config.get("eos_token_id")
        token = eos[0] if isinstance(eos, list) and eos else eos
        if not isinstance(token, int):
            raise FairyError(
                f"{self.model.directory} names no end of text (eos_token_id), which lm-eval needs; "
                "add it to the model's config.json and build again"
            )
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token before a text: the start token, else the end of the text before."""
        return self._prefix[-1] if self._prefix else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text; the start token is not put before one that has it."""
        ids = self.model.tokenizer.encode(string, special=False)
        if add_special_tokens is None:
            add_special_tokens = ids[: len(self._prefix)] != self._prefix
        return [*self._prefix, *ids] if add_special_tokens else ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) of each continuation, in the order given.

        Requests of one context, the choices of a question, share its prefill.
        """
        cut = [self._fit(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(cut)), key=lambda i: cut[i])
        results: list[tuple[float, bool]] = [(0.0, True)] * len(cut)
        engine = self.model.engine
        sequence: int | None = None
        held: list[int] = []
        last = np.empty(0, np.float32)
        try:
            for i in tqdm(order, desc="fairy_compile loglikelihood", disable=disable_tqdm):
                context, continuation = cut[i]
                if sequence is None or context != held:
                    if sequence is not None:
                        engine.remove_sequence(sequence)
                    sequence = engine.add_sequence()
                    last, held = engine.prefill(sequence, context), context
                results[i] = self._continue(sequence, last, continuation)
                if requests[i][0] is not None:  # not a window of the rolling log-likelihood
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        finally:
            if sequence is not None:
                engine.remove_sequence(sequence)
        return results

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Cut a context at the left, so that it and all of the continuation but its end fit."""
        room = self.max_length + 1 - len(continuation)
        if not context or room < 1:
            raise FairyError(
                f"a request has {len(context)} tokens of context and {len(continuation)} to score; "
                f"the model's context of {self.max_length} tokens must hold them, and at least one "
                "token must come before"
            )
        return context[-room:], continuation

    def _continue(
        self, sequence: int, last: np.ndarray, continuation: list[int]
    ) -> tuple[float, bool]:
        """Score a continuation of a sequence, whose last logits are ``last``, and take it back."""
        if not continuation:
            return 0.0, True
        engine = self.model.engine
        ids = np.asarray(continuation)
        total, greedy = self._score(last[None], ids[:1])
        for start in range(0, len(ids) - 1, _BLOCK):
            part = ids[:-1][start : start + _BLOCK]
            logits = engine.prefill_logits(sequence, part)
            more, same = self._score(logits, ids[start + 1 : start + 1 + len(part)])
            total, greedy = total + more, greedy and same
        engine.popn(sequence, len(ids) - 1)
        return total, greedy

    @staticmethod
    def _score(logits: np.ndarray, targets: np.ndarray) -> tuple[float, bool]:
        total = float(log_softmax(logits)[np.arange(len(targets)), targets].sum())
        return total, bool((logits.argmax(axis=1) == targets).all())

    def loglikelihood_rolling(
        self, requests: Iterable[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in disjoint windows."""
        totals = []
        for request in tqdm(
            list(requests), desc="fairy_compile rolling loglikelihood", disable=disable_tqdm
        ):
            (text,) = request.args
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
            scores = self._loglikelihood_tokens(
                [(None, *window) for window in windows],  # type: ignore[misc]
                disable_tqdm=True,
            )
            totals.append(sum(score for score, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a text for each request, which ends before its stop strings.

        Raises:
            FairyError: no room is left for the answer.
        """
        texts = []
        for request in tqdm(
            list(requests), desc="fairy_compile generate_until", disable=disable_tqdm
        ):
            prompt, asked = request.args
            until, most, sampling = _generation(asked)
            room = self.max_length - most
            if room < 1:
                raise FairyError(
                    f"a task asks for {most} tokens of answer, but the model's context is "
                    f"{self.max_length} tokens; load it with a longer one, or lower the task's "
                    "max_gen_toks"
                )
            texts.append(
                self.model.generate(self.tok_encode(prompt)[-room:], most, stop=until, **sampling)
            )
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    @property
    def tokenizer_name(self) -> str:
        """Name that tells the harness's caches tokenizers and templates apart."""
        return str(self.model.directory.resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the model's template."""
        return (self.model.template.source or "") if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the text of a prompt.

        Raises:
            FairyError: the conversation ends in the middle of an answer.
        """
        if not add_generation_prompt:
            raise FairyError(
                "the chat templates of compiled models cannot go on with an answer that was begun; "
                "leave out what fills the assistant's turn (gen_prefix of the task)"
            )
        return self.model.template.render(chat_history)


def _generation(asked: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """Return stop strings, most tokens and sampling parameters of a request's arguments."""
    left = dict(asked)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    most = DEFAULT_GEN_TOKENS
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        most = int(left.pop(name, most))
    sample = left.pop("do_sample", None)
    temperature = float(left.pop("temperature", 1.0 if sample else 0.0))
    sampling: dict[str, Any] = {"temperature": temperature if sample is not False else 0.0}
    # A model's own defaults, such as a repetition penalty, are for chats, not for measurements.
    sampling |= {"top_p": float(left.pop("top_p", 1.0)), "repetition_penalty": 1.0}
    sampling |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    if "repetition_penalty" in left:
        sampling["repetition_penalty"] = float(left.pop("repetition_penalty"))
    if left:
        raise FairyError(
            f"a task asks for the generation option {min(left)!r}; allowed: until, max_gen_toks, "
            "do_sample, temperature, top_p, repetition_penalty"
        )
    return [text for text in until if text], most, sampling
