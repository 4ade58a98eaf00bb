"""`ChatSession`: a conversation that keeps its history and its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fairy_compile.errors import FairyError
from fairy_compile.runtime.generation import Generation
from fairy_compile.runtime.sampler import Sampler
from fairy_compile.runtime.text import TextStream, as_stops

if TYPE_CHECKING:
    from fairy_compile.runtime.model import Model

DEFAULT_MAX_TOKENS = 512


class ChatSession:
    """A conversation with a model.

    The sequence of the last turn stays in the KV cache. A new turn is rendered as a whole, and
    only the tokens after the part it shares with that sequence are run.

    Attributes:
        messages: the history, system message included.
        reused_tokens: tokens of the last prompt that came from the KV cache.
    """

    def __init__(self, model: Model, system: str | None = None):
        self._model = model
        self._system = system
        self._sequence: int | None = None
        self._cached: list[int] = []
        self._running: Generation | None = None
        self.reused_tokens = 0
        self.messages: list[dict[str, Any]] = self._first_messages()

    def _first_messages(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self._system}] if self._system else []

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.close()
        self.messages = self._first_messages()

    def close(self) -> None:
        """Stop a running answer and free the KV cache."""
        if self._running is not None:
            self._running.close()
        if self._sequence is not None:
            self._model.engine.remove_sequence(self._sequence)
        self._sequence, self._cached = None, []

    def __del__(self) -> None:
        """Free the KV cache of a conversation that nothing refers to any more."""
        with suppress(FairyError):  # the model may be closed
            self.close()

    def send(
        self,
        text: str,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        *,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Generation:
        """Add a message of the user and return the answer as an iterator over pieces of text.

        The history takes both when the answer ends, also when it is closed early: then it holds
        what was given out, or nothing of this turn if there was no text yet.

        Raises:
            FairyError: the conversation does not fit the context (the history is unchanged), or
                an argument is out of range.
        """
        if self._running is not None:
            self._running.close()
        model, engine = self._model, self._model.engine
        params = model.override(**sampling)
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = model.encode_chat(messages)
        if len(tokens) >= engine.context:
            raise FairyError(
                f"the conversation has {len(tokens)} tokens, and the context holds "
                f"{engine.context} with the answer; start a new one (/reset), shorten the "
                "message, or load the model with a larger context"
            )
        shared = min(_common_prefix(self._cached, tokens), len(tokens) - 1)
        generation = Generation(
            engine,
            lambda: self._begin(messages, shared),
            tokens[shared:],
            Sampler(params),
            TextStream(model.tokenizer),
            max_tokens=max_tokens,
            stop_tokens=model.stop_tokens,
            stop=(*model.stop_strings, *as_stops(stop)),
            on_end=lambda _: self._end(),
            on_feed=self._cached.extend,
        )
        self._running = generation
        return generation

    def _begin(self, messages: list[dict[str, Any]], shared: int) -> int:
        """Cut the cached sequence to its first ``shared`` tokens and return it."""
        engine = self._model.engine
        if self._sequence is None:
            self._sequence = engine.add_sequence()
        engine.popn(self._sequence, len(self._cached) - shared)
        del self._cached[shared:]
        self.messages, self.reused_tokens = messages, shared
        return self._sequence

    def _end(self) -> None:
        # Not an argument: an answer that referred to itself would keep the conversation alive.
        generation, self._running = self._running, None
        engine = None
        with suppress(FairyError):  # the model may be closed, and the cache with it
            engine = self._model.engine
        if engine is not None:
            # A prefill that failed half-way left tokens that are not in `_cached`.
            engine.popn(self._sequence, engine.length(self._sequence) - len(self._cached))
        if generation.finish_reason == "cancelled" and not generation.text:
            self.messages.pop()  # no turn without an answer
        else:
            self.messages.append({"role": "assistant", "content": generation.text})


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two lists share at their start."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
