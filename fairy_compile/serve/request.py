"""What a request asks of the engine thread, and what it hears back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from fairy_compile.errors import FairyError
from fairy_compile.runtime.sampler import SamplingParams

if TYPE_CHECKING:
    from fairy_compile.serve.grammar import CompiledGrammar

FinishReason = Literal["stop", "length", "cancelled"]


class QueueFullError(FairyError):
    """As many requests run and wait as are allowed; try again later."""


class ClosingError(FairyError):
    """The server is shutting down or its engine has stopped."""


class UnanswerableError(FairyError):
    """No answer can be what the request asks for."""


@dataclass(frozen=True)
class TokenLogprob:
    """A drawn token under the model's own distribution: temperature 1, no penalties, no grammar.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens at its place, likeliest first, as (id, logprob).
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that can be shown now, and the tokens drawn since the last piece."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The answer has ended.

    Attributes:
        reason: ``stop`` (end token or stop string), ``length`` (max_tokens, or the context is
            full), or ``cancelled``.
        prompt_tokens: length of the prompt.
        completion_tokens: tokens drawn, without the one that ended the answer.
        cached_tokens: tokens of the prompt that another request had run already.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Failed:
    """The answer cannot go on; the message is for the client, with its HTTP status."""

    message: str
    status: int = 500


Event: TypeAlias = Piece | Finished | Failed


@dataclass(eq=False)
class Request:
    """One answer to generate.

    Attributes:
        prompt: tokens, one or more and at most the context.
        sampling: how tokens are drawn.
        max_tokens: most tokens to draw.
        notify: called from the engine thread with every event; must not block.
        stop: strings that end the answer and are not shown.
        continues_prompt: decode the first token as the continuation of the prompt's text.
        logprobs: None, or how many of the likeliest tokens to report beside every drawn one.
        grammar: what the text must conform to.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    max_tokens: int
    notify: Callable[[Event], None] = lambda event: None
    stop: Sequence[str] = ()
    continues_prompt: bool = False
    logprobs: int | None = None
    grammar: CompiledGrammar | None = None
    cancelled: bool = field(default=False, init=False)
