"""Between tokens and text: the tokenizer, and streaming text out of a growing list of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fairy_compile.errors import FairyError, ModelFileError

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_MAX_CONTEXT_TOKENS = 32


class Tokenizer:
    """The model's tokenizer.json."""

    def __init__(self, path: Path):
        """Read ``path``.

        Raises:
            ModelFileError: the file is missing or is not a tokenizer.
        """
        from tokenizers import Tokenizer as FastTokenizer

        if not path.is_file():
            raise ModelFileError(
                f"{path} is missing; the runtime needs the tokenizer.json of the model"
            )
        try:
            # Not by its path, which need not be Unicode.
            self._fast = FastTokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # the Rust binding raises plain Exception
            raise ModelFileError(f"{path} is not a valid tokenizer: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._fast.get_vocab_size()

    def vocabulary(self) -> dict[str, int]:
        """Return token -> id, added tokens included."""
        return self._fast.get_vocab(with_added_tokens=True)

    def to_json(self) -> str:
        """Return the content of tokenizer.json."""
        return self._fast.to_str()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of ``text``.

        Args:
            text: any text; markup such as ``<s>`` in it becomes the special token it names.
            special: add what the tokenizer adds to every text, usually the token of its start.
                False for text that a chat template wrote, which has it already.
        """
        if not isinstance(text, str):
            raise FairyError(f"text to encode is a {type(text).__name__}; expected str")
        try:
            return self._fast.encode(text, add_special_tokens=special).ids
        except (UnicodeError, TypeError) as error:  # lone surrogates have no UTF-8 form
            raise FairyError(f"the text is not valid Unicode: {error}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``; special tokens have none."""
        return self._fast.decode(list(tokens), skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        """Return the id of the token spelled ``token``, or None."""
        return self._fast.token_to_id(token)


class TextStream:
    """Turns tokens into text piece by piece; the pieces join to the whole text's decoding.

    A piece never ends inside a UTF-8 character: text is held back while the decoding ends in a
    replacement character. Where a tokenizer drops a leading space, only the first piece of a text
    loses it, because each piece is decoded together with the one before.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        """Start a stream.

        Args:
            tokenizer: decodes.
            context: tokens the stream continues; their text is not repeated.
        """
        self._tokenizer = tokenizer
        self._shown = self._tail(context)
        self._pending: list[int] = []

    def _tail(self, context: Sequence[int]) -> list[int]:
        """Return the fewest last tokens of ``context`` that begin with a whole character."""
        best: list[int] = []
        for count in range(1, min(len(context), _MAX_CONTEXT_TOKENS) + 1):
            tail = list(context[-count:])
            text = self._tokenizer.decode(tail)
            if not text.startswith(_BROKEN):
                best = tail
                if text:
                    break
        return best

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes; empty if it ends inside a character."""
        self._pending.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """Return what is held back, broken characters and all."""
        return self._take(final=True) if self._pending else ""

    def _take(self, final: bool) -> str:
        before = self._tokenizer.decode(self._shown)
        text = self._tokenizer.decode(self._shown + self._pending)
        if not final and (text.endswith(_BROKEN) or len(text) <= len(before)):
            return ""
        pending = self._pending
        self._shown, self._pending = pending, []
        if text.startswith(before):
            return text[len(before) :]
        # Bytes that are no character can spoil the decoding of the good ones before them, which
        # are out already.
        return self._tokenizer.decode(pending)


def as_stops(stops: Iterable[str]) -> tuple[str, ...]:
    """Return stop strings as a tuple; one string is one of them.

    Raises:
        FairyError: a stop string is empty or not a string.
    """
    if isinstance(stops, str):
        stops = [stops]
    if not isinstance(stops, Iterable):
        raise FairyError(f"stop is {stops!r}; allowed: a string, or a list of strings")
    found = tuple(stops)
    for stop in found:
        if not isinstance(stop, str) or not stop:
            raise FairyError(f"a stop string is {stop!r}; expected text of a character or more")
    return found


class StopFilter:
    """Passes streamed text on until a stop string, which is never shown.

    Text that may turn out to be the beginning of a stop string is held back. Where pieces break
    has no influence on the result.
    """

    def __init__(self, stops: Iterable[str] = ()):
        """Watch for ``stops``.

        Raises:
            FairyError: a stop string is empty or not a string.
        """
        self._stops = as_stops(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Return the text that may be shown now; sets `stopped` at a stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(text.find(stop), stop) for stop in self._stops]
        # The one that is complete first wins, as it would if text came letter by letter.
        ends = [(start + len(stop), start) for start, stop in found if start >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        cut = len(text) - self._undecided(text)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """Return what is held back, now that no stop string can follow."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop string."""
        longest = max(map(len, self._stops), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
