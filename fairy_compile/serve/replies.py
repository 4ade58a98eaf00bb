"""The objects of replies: completions and chats, whole and as streams."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from fairy_compile.serve.api_error import ApiError
from fairy_compile.serve.exchange import Exchange
from fairy_compile.serve.request import Failed, Finished, Piece, TokenLogprob
from fairy_compile.serve.token_bytes import TokenBytes
from fairy_compile.serve.tools import Arguments, CallBegins, Part, Text, ToolReader


class Reply(ABC):
    """One reply; knows the form its kind of request wants.

    Attributes:
        id: sent with every part.
    """

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, token_bytes: TokenBytes, *, logprobs: bool, usage: bool):
        """Prepare a reply.

        Args:
            model: name of the model.
            token_bytes: for log-probabilities.
            logprobs: whether choices carry log-probabilities.
            usage: whether a stream ends with its usage.
        """
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.tokens = token_bytes
        self.logprobs = logprobs
        self._usage = usage
        self._head = {"id": self.id, "created": int(time.time()), "model": model}

    async def whole(self, exchange: Exchange) -> dict[str, Any]:
        """Return the reply once all answers have ended.

        Raises:
            ApiError: an answer failed.
        """
        texts: dict[int, list[Piece]] = {i: [] for i in range(len(exchange.requests))}
        reasons: dict[int, str] = {}
        async for index, event in exchange.events():
            if isinstance(event, Failed):
                raise _error(event)
            if isinstance(event, Piece):
                texts[index].append(event)
            else:
                reasons[index] = event.reason
        choices = []
        for index, pieces in texts.items():
            logprobs = [entry for piece in pieces for entry in piece.logprobs]
            text = "".join(piece.text for piece in pieces)
            choices.append(self.choice(index, text, logprobs, reasons[index]))
        return {
            **self._head,
            "object": self.whole_object,
            "choices": choices,
            "usage": exchange.usage.to_json(),
        }

    async def stream(self, exchange: Exchange) -> AsyncIterator[bytes]:
        """Yield the server-sent events of the reply."""
        events = exchange.events()
        try:
            for index in range(len(exchange.requests)):
                for choice in self.opening(index):
                    yield self._chunk([choice])
            async for index, event in events:
                if isinstance(event, Failed):
                    error = _error(event)
                    yield _sse(error.body())
                    return
                for delta in self.deltas(index, event):
                    yield self._chunk([delta])
            if self._usage:
                yield self._chunk([], usage=exchange.usage.to_json())
            yield b"data: [DONE]\n\n"
        finally:
            await events.aclose()

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage = {"usage": None} if self._usage and "usage" not in more else {}
        return _sse(
            {**self._head, "object": self.chunk_object, "choices": choices, **usage, **more}
        )

    def deltas(self, index: int, event: Piece | Finished) -> list[dict[str, Any]]:
        """Return the choices of one part of a stream."""
        if isinstance(event, Finished):
            return [self.part(index, None, (), event.reason)]
        return [self.part(index, event.text, event.logprobs, None)]

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Return choices that come before the first text of a stream."""
        return []

    @abstractmethod
    def choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str
    ) -> dict[str, Any]:
        """Return a whole choice."""

    @abstractmethod
    def part(
        self, index: int, text: str | None, logprobs: Sequence[TokenLogprob], reason: str | None
    ) -> dict[str, Any]:
        """Return a choice of a stream; ``text`` is None in the last one."""


class CompletionReply(Reply):
    """Reply to ``/v1/completions``."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._offsets: dict[int, int] = {}

    def choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str
    ) -> dict[str, Any]:
        """See `Reply.choice`."""
        return self.part(index, text, logprobs, reason)

    def part(
        self, index: int, text: str | None, logprobs: Sequence[TokenLogprob], reason: str | None
    ) -> dict[str, Any]:
        """See `Reply.part`."""
        return {
            "index": index,
            "text": text or "",
            "logprobs": self._logprobs(index, logprobs) if self.logprobs and logprobs else None,
            "finish_reason": reason,
        }

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        text_of, offset = self.tokens.text_of, self._offsets.get(index, 0)
        offsets = []
        for entry in entries:
            offsets.append(offset)
            offset += len(text_of(entry.token))
        self._offsets[index] = offset
        return {
            "tokens": [text_of(entry.token) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            # Likeliest last, so that of tokens with one text the likeliest stays.
            "top_logprobs": [
                {text_of(token): value for token, value in reversed(entry.top)} for entry in entries
            ],
            "text_offset": offsets,
        }


class ChatReply(Reply):
    """Reply to ``/v1/chat/completions``."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, *args: Any, readers: Sequence[ToolReader] | None = None, **options: Any):
        """Prepare a reply.

        Args:
            args, options: see `Reply`.
            readers: one a choice, where answers may call tools.
        """
        super().__init__(*args, **options)
        self._readers = readers

    def choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str
    ) -> dict[str, Any]:
        """See `Reply.choice`."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._readers:
            reader = self._readers[index]
            parts = [*reader.push(text), *reader.finish()]
            message["content"] = "".join(p.text for p in parts if isinstance(p, Text)) or None
            if reader.calls:
                message["tool_calls"] = _calls(parts)
            reason = _reason(reader, reason)
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": reason,
        }

    def deltas(self, index: int, event: Piece | Finished) -> list[dict[str, Any]]:
        """See `Reply.deltas`."""
        if not self._readers:
            return super().deltas(index, event)
        reader = self._readers[index]
        if isinstance(event, Piece):
            return [self._tool_part(index, part) for part in reader.push(event.text)]
        parts = [self._tool_part(index, part) for part in reader.finish()]
        return [*parts, self.part(index, None, (), _reason(reader, event.reason))]

    def _tool_part(self, index: int, part: Part) -> dict[str, Any]:
        if isinstance(part, Text):
            return self.part(index, part.text, (), None)
        delta = {"tool_calls": [_call_delta(part)]}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Return the choice that names the speaker."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def part(
        self, index: int, text: str | None, logprobs: Sequence[TokenLogprob], reason: str | None
    ) -> dict[str, Any]:
        """See `Reply.part`."""
        return {
            "index": index,
            "delta": {} if text is None else {"content": text},
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": reason,
        }

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {
                **self._token(entry.token, entry.logprob),
                "top_logprobs": [self._token(token, value) for token, value in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokens.bytes_of(token)
        return {
            "token": data.decode("utf-8", errors="replace"),
            "logprob": logprob,
            "bytes": list(data),
        }


def _reason(reader: ToolReader, reason: str) -> str:
    """Return why an answer ended: for its calls, unless it was cut off before they were whole."""
    whole = reader.calls > 0 and reader.complete == reader.calls
    return "tool_calls" if whole and reason == "stop" else reason


def _call_delta(part: CallBegins | Arguments) -> dict[str, Any]:
    if isinstance(part, Arguments):
        return {"index": part.index, "function": {"arguments": part.text}}
    return {
        "index": part.index,
        "id": f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": part.name, "arguments": ""},
    }


def _calls(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return the whole calls of an answer."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, CallBegins):
            call = _call_delta(part)
            calls.append({key: value for key, value in call.items() if key != "index"})
        elif isinstance(part, Arguments):
            calls[part.index]["function"]["arguments"] += part.text
    return calls


def _error(failed: Failed) -> ApiError:
    kind = "server_error" if failed.status >= 500 else "invalid_request_error"
    return ApiError(failed.status, failed.message, kind=kind)


def _sse(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
