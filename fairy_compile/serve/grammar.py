"""Text that conforms to a JSON schema, through xgrammar's masks over the vocabulary."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.runtime.text import Tokenizer
from fairy_compile.serve.request import UnanswerableError

MAX_SCHEMA_BYTES = 64 << 10
_CACHE_BYTES = 64 << 20
MAX_WHITESPACE = 24  # spaces in a row; small models like to go on with them for ever


class GrammarCompiler:
    """Compiles schemas for one vocabulary; compiled ones are kept.

    xgrammar is imported with the first schema, since it brings PyTorch along.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Collection[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_tokens = sorted(stop_tokens)
        self._lock = threading.Lock()
        self._compiler: Any = None

    def compile(self, schema: Mapping[str, Any], *, strict: bool = False) -> CompiledGrammar:
        """Return the grammar of the JSON texts that ``schema`` allows.

        Args:
            schema: a JSON schema.
            strict: properties that the schema does not name are forbidden.

        Raises:
            FairyError: xgrammar cannot use the schema.
            UnsupportedError: xgrammar is not installed.
        """
        text = _checked(schema, "the JSON schema has")
        return self._compile(
            lambda compiler: compiler.compile_json_schema(
                text, strict_mode=strict, max_whitespace_cnt=MAX_WHITESPACE
            )
        )

    def compile_structure(self, structure: Mapping[str, Any]) -> CompiledGrammar:
        """Return the grammar of texts with parts that conform to schemas.

        Args:
            structure: xgrammar's structural tag, see `serve.tools`.

        Raises:
            FairyError: xgrammar cannot use a schema.
            UnsupportedError: xgrammar is not installed.
        """
        text = _checked(structure, "the schemas have")
        return self._compile(lambda compiler: compiler.compile_structural_tag(text))

    def _compile(self, compile_with: Callable[[Any], Any]) -> CompiledGrammar:
        with self._lock:
            if self._compiler is None:
                self._compiler = self._create()
            try:
                compiled = compile_with(self._compiler)
            except (RuntimeError, ValueError, TypeError) as error:
                raise FairyError(f"unusable JSON schema: {_reason(error)}") from error
        grammar = CompiledGrammar(compiled, self._vocab_size)
        # Schemas without an end, such as {"$ref": "#"}, compile and allow nothing.
        grammar.matcher().mask(np.zeros(self._vocab_size, np.float32))
        return grammar

    def _create(self) -> Any:
        try:
            import xgrammar
        except ImportError as error:
            raise UnsupportedError(
                f"answers of a given form need xgrammar ({error}); run "
                "pip install 'fairy-compile[serve]' where the server runs"
            ) from error
        tokens = [""] * self._vocab_size
        for token, number in self._tokenizer.vocabulary().items():
            if number < len(tokens):
                tokens[number] = token
        found = xgrammar.TokenizerInfo._detect_metadata_from_hf(self._tokenizer.to_json())
        info = xgrammar.TokenizerInfo(
            tokens,
            found["vocab_type"],
            vocab_size=self._vocab_size,
            stop_token_ids=self._stop_tokens,
            add_prefix_space=found["add_prefix_space"],
        )
        return xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE_BYTES)


def _checked(value: Mapping[str, Any], what: str) -> str:
    text = json.dumps(value)
    if len(text) > MAX_SCHEMA_BYTES:
        raise FairyError(f"{what} {len(text)} bytes; allowed: {MAX_SCHEMA_BYTES}")
    return text


def _reason(error: Exception) -> str:
    """Return xgrammar's message without the place in its source."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", lines[0])


class CompiledGrammar:
    """A grammar for one vocabulary, shared by the answers that use it."""

    def __init__(self, compiled: Any, vocab_size: int):
        self._compiled = compiled
        self._vocab_size = vocab_size

    def matcher(self) -> Matcher:
        """Return the state of a new answer."""
        import xgrammar

        return Matcher(xgrammar.GrammarMatcher(self._compiled), self._vocab_size)


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bits = np.full((1, -(-vocab_size // 32)), -1, np.int32)

    @property
    def done(self) -> bool:
        """Whether nothing may follow any more."""
        return bool(self._matcher.is_terminated())

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """Return a copy of ``logits`` with -inf for tokens that may not follow.

        Raises:
            UnanswerableError: none may.
        """
        if not self._matcher.fill_next_token_bitmask(self._bits):
            return logits
        allowed = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")[: self._vocab_size]
        if not allowed.any():
            raise UnanswerableError("no text of this model's tokens conforms to the JSON schema")
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Go on by ``token``."""
        if not self._matcher.accept_token(token):
            raise FairyError(f"token {token} does not conform to the grammar of the answer")
