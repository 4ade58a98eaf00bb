"""The bytes each token stands for, which log-probabilities report beside its text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fairy_compile.runtime.text import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Token id -> bytes.

    Byte-level vocabularies spell a byte as a letter (GPT-2); those with byte fallback spell text as
    it is, a space as ``▁`` and a lone byte as ``<0x0A>`` (SentencePiece).
    """

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any]):
        """Read the vocabulary; ``config`` is mlc-chat-config.json, which names its kind."""
        self._tokens = {number: token for token, number in tokenizer.vocabulary().items()}
        kind = config.get("tokenizer_info", {}).get("token_postproc_method", "byte_fallback")
        self._letters = _byte_letters() if kind == "byte_level" else None

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of ``token``; those of its name for a special one."""
        text = self._tokens.get(token, "")
        if self._letters is not None:
            if all(letter in self._letters for letter in text):
                return bytes(self._letters[letter] for letter in text)
            return text.encode()
        match = _BYTE_TOKEN.fullmatch(text)
        return bytes([int(match[1], 16)]) if match else text.replace("▁", " ").encode()

    def text_of(self, token: int) -> str:
        """Return the text of ``token``, with replacement characters for parts of characters."""
        return self.bytes_of(token).decode("utf-8", errors="replace")


def _byte_letters() -> dict[str, int]:
    """Return GPT-2's letter -> byte: printable Latin-1 stands for itself, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}
