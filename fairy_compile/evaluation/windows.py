"""Cutting a text's tokens into the windows that a model sees."""

from __future__ import annotations

from dataclasses import dataclass

from fairy_compile.errors import FairyError

DEFAULT_CONTEXT = 2048
"""The window length of the GPTQ and Fairy2i evaluations."""


@dataclass(frozen=True)
class Window:
    """Tokens that go through the model as one sequence.

    Attributes:
        start: first token.
        end: token after the last.
        first: first token that is scored, start + 1 at least; all up to ``end`` are.
    """

    start: int
    end: int
    first: int

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return self.end - self.first


def choose_windows(context: int | None, stride: int | None, longest: int) -> tuple[int, int]:
    """Fill in and check window length and stride.

    Args:
        context: tokens of a window; None is `DEFAULT_CONTEXT`, or ``longest`` if that is less.
        stride: tokens from one window to the next; None is ``context``.
        longest: the most the models can take.

    Raises:
        FairyError: a value is out of range.
    """
    if context is None:
        context = min(DEFAULT_CONTEXT, longest)
    if not 2 <= context <= longest:
        raise FairyError(f"--context is {context} tokens; allowed for this model: 2 to {longest}")
    if stride is None:
        stride = context
    if not 1 <= stride <= context:
        raise FairyError(
            f"--stride is {stride} tokens; allowed: 1 to {context}, the length of a window"
        )
    return context, stride


def cut_windows(tokens: int, context: int, stride: int) -> list[Window]:
    """Return the windows of a text.

    Disjoint windows (``stride == context``) are those of the GPTQ code, which the papers use: the
    first token of each is context only, and a shorter rest at the end is left out. Sliding windows
    (``stride < context``) score every token but the first of the text once, each with
    ``context - stride`` tokens before it or more, as far as there are any.

    Args:
        tokens: tokens of the text.
        context: tokens of a window.
        stride: tokens from the start of one window to the next.

    Raises:
        FairyError: there are fewer than two tokens, so none can be scored.
    """
    if tokens < 2:
        raise FairyError(
            f"the text is {tokens} {'token' if tokens == 1 else 'tokens'} long; the first is only "
            "context, so two or more are needed"
        )
    if tokens <= context:
        return [Window(0, tokens, 1)]
    if stride == context:
        return [Window(i, i + context, i + 1) for i in range(0, tokens - context + 1, context)]
    windows, scored = [], 1
    for start in range(0, tokens, stride):
        end = min(start + context, tokens)
        windows.append(Window(start, end, scored))
        scored = end
        if end == tokens:
            break
    return windows
