"""`Answer`: one request while it runs, from logits to events."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fairy_compile.runtime.sampler import Sampler
from fairy_compile.runtime.text import StopFilter, TextStream, Tokenizer
from fairy_compile.serve.logprobs import token_logprob
from fairy_compile.serve.request import Finished, FinishReason, Piece, Request, TokenLogprob


class Answer:
    """Draws the tokens of one request and tells its client.

    Stops and text follow `fairy_compile.runtime.Generation`, so that both give the same answer.

    Attributes:
        request: what was asked.
        sequence: its id in the KV cache.
        position: tokens of the prompt that have been run.
        last_token: the token to feed next, once the prompt has been run.
        drawn: tokens drawn, without an end token.
        tokens: the prompt and what was drawn.
        finish_reason: None while running.
        cached_tokens: tokens of the prompt that came from another sequence.
    """

    def __init__(
        self,
        request: Request,
        sequence: int,
        tokenizer: Tokenizer,
        stop_tokens: Collection[int],
        context: int,
    ):
        self.request = request
        self.sequence = sequence
        self.position = 0
        self.last_token: int | None = None
        self.drawn = 0
        self.tokens = list(request.prompt)
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self._sampler = Sampler(request.sampling)
        self._stream = TextStream(tokenizer, request.prompt if request.continues_prompt else ())
        self._filter = StopFilter(request.stop)
        self._stop_tokens = frozenset(stop_tokens)
        # The last token of a full context is drawn but need not be fed.
        self._most = min(request.max_tokens, context + 1 - len(request.prompt))
        self._logprobs: list[TokenLogprob] = []
        self._matcher = request.grammar.matcher() if request.grammar else None

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt has been run."""
        return self.position == len(self.request.prompt)

    def advance(self, logits: np.ndarray) -> None:
        """Draw the next token from ``logits``, float32 [vocab]; sends what can be shown.

        Raises:
            FairyError: the logits are damaged, or ``logit_bias`` names no token.
        """
        allowed = logits if self._matcher is None else self._matcher.mask(logits)
        token = self._sampler.sample(allowed)
        if token in self._stop_tokens:
            self._end("stop")
            return
        if self._matcher is not None:
            self._matcher.accept(token)
        self.drawn += 1
        self.last_token = token
        self.tokens.append(token)
        if self.request.logprobs is not None:
            self._logprobs.append(token_logprob(logits, token, self.request.logprobs))
        text = self._filter.push(self._stream.push(token))
        if self._filter.stopped:
            self._send(text)
            self._finish("stop")
        elif self.drawn >= self._most:
            self._end("length", text)
        elif self._matcher is not None and self._matcher.done:
            self._end("stop", text)
        else:
            self._send(text)

    def cancel(self) -> None:
        """End the answer without further text."""
        self._finish("cancelled")

    def _end(self, reason: FinishReason, text: str = "") -> None:
        text += self._filter.push(self._stream.finish())
        if self._filter.stopped:
            reason = "stop"
        self._send(text + self._filter.finish())
        self._finish(reason)

    def _send(self, text: str) -> None:
        if text:
            self.request.notify(Piece(text, tuple(self._logprobs)))
            self._logprobs.clear()

    def _finish(self, reason: FinishReason) -> None:
        if self._logprobs:  # tokens without text
            self.request.notify(Piece("", tuple(self._logprobs)))
        self.finish_reason = reason
        self.request.notify(
            Finished(reason, len(self.request.prompt), self.drawn, self.cached_tokens)
        )
