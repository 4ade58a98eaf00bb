"""`Service`: from the body of a request to requests of the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.runtime.sampler import SamplingParams
from fairy_compile.serve.api_error import ApiError
from fairy_compile.serve.exchange import Exchange
from fairy_compile.serve.grammar import MAX_WHITESPACE, CompiledGrammar, GrammarCompiler
from fairy_compile.serve.metrics import Metrics
from fairy_compile.serve.protocol import ChatRequest, CompletionRequest, ResponseFormat
from fairy_compile.serve.request import ClosingError, QueueFullError, Request
from fairy_compile.serve.token_bytes import TokenBytes
from fairy_compile.serve.tools import NO_ARGUMENTS, ToolReader, form_of, structure
from fairy_compile.serve.worker import EngineThread

_RETRY_SECONDS = 1
_SEEDS = 1 << 63


class Service:
    """One model behind an API.

    Attributes:
        engine: runs requests.
        metrics: counts them.
        model_name: what clients call the model.
        created: when the server started, in seconds since 1970.
        token_bytes: for log-probabilities.
    """

    def __init__(self, engine: EngineThread, metrics: Metrics, model_name: str):
        self.engine = engine
        self.metrics = metrics
        self.model_name = model_name
        self.created = int(time.time())
        self._model = engine.model
        self._config = engine.model.engine.config
        self._context = engine.model.engine.context
        self._vocab_size = engine.model.engine.vocab_size
        self._grammars = GrammarCompiler(
            self._model.tokenizer, self._vocab_size, self._model.stop_tokens
        )
        self._tool_form = form_of(self._model.template.source)
        self.token_bytes = TokenBytes(self._model.tokenizer, self._config)

    def check_room(self) -> None:
        """Raise `ApiError` if the queue is full, before a prompt costs anything."""
        if self.engine.full:
            raise _queue_full(f"{self.engine.capacity} requests run or wait; try again later")

    def completion_requests(self, body: CompletionRequest) -> list[Request]:
        """Return the requests of a completion: ``n`` for every prompt, in order.

        Slow for long prompts: to be called outside the event loop.

        Raises:
            ApiError: a prompt does not fit the context, or a token is outside the vocabulary.
        """
        self._check_model(body.model)
        grammar = self._grammar(body.response_format)
        requests = []
        for prompt in body.prompts:
            tokens = self._model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            self._check_prompt(tokens, "prompt")
            for choice in range(body.n):
                requests.append(
                    Request(
                        prompt=tokens,
                        sampling=self._sampling(body, choice),
                        max_tokens=body.max_tokens,
                        stop=body.stops,
                        continues_prompt=True,
                        logprobs=body.logprobs,
                        grammar=grammar,
                    )
                )
        return requests

    def chat_requests(self, body: ChatRequest) -> list[Request]:
        """Return the ``n`` requests of a chat; see `completion_requests`."""
        self._check_model(body.model)
        tools = body.callable_tools
        grammar = self._tool_grammar(body) if tools else self._grammar(body.response_format)
        try:
            messages = [message.plain() for message in body.messages]
            shown = [tool.plain() for tool in tools] or None
            tokens = self._model.encode_chat(messages, tools=shown)
        except (FairyError, ValueError) as error:
            raise ApiError(400, str(error), param="messages") from error
        self._check_prompt(tokens, "messages")
        return [
            Request(
                prompt=tokens,
                sampling=self._sampling(body, choice),
                max_tokens=body.limit or self._context,
                stop=[*self._model.stop_strings, *body.stops],
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                grammar=grammar,
            )
            for choice in range(body.n)
        ]

    def tool_readers(self, body: ChatRequest) -> list[ToolReader] | None:
        """Return what reads the calls of each choice of a chat; None if it may call no tools."""
        if not body.callable_tools or self._tool_form is None:
            return None
        names = [tool.function.name for tool in body.callable_tools]
        return [ToolReader(self._tool_form, names) for _ in range(body.n)]

    def start(self, requests: Sequence[Request], choices: int, stream: bool) -> Exchange:
        """Queue requests; to be called on the event loop.

        Raises:
            ApiError: 429 if the queue is full, 503 if the server is shutting down.
        """
        if len(requests) > self.engine.capacity:
            raise ApiError(
                400,
                f"{len(requests)} answers were asked for at once; this server takes "
                f"{self.engine.capacity}",
                param="n",
            )
        exchange = Exchange(self.engine, self.metrics, choices, stream)
        for request in requests:
            exchange.add(request)
        try:
            exchange.start()
        except QueueFullError as error:
            raise _queue_full(str(error)) from error
        except ClosingError as error:
            raise ApiError(503, str(error), kind="server_error", code="closing") from error
        return exchange

    def _check_model(self, name: str) -> None:
        if name != self.model_name:
            raise ApiError(
                404,
                f"there is no model {name!r} here; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def _check_prompt(self, tokens: Sequence[int], param: str) -> None:
        if not tokens:
            raise ApiError(400, "the prompt has no tokens; give at least one", param=param)
        if len(tokens) > self._context:
            raise ApiError(
                400,
                f"the prompt has {len(tokens)} tokens, but the context holds {self._context}; "
                "shorten the prompt",
                param=param,
                code="context_length_exceeded",
            )
        if max(tokens) >= self._vocab_size:
            raise ApiError(
                400,
                f"token {max(tokens)} is outside the vocabulary; allowed: 0 to "
                f"{self._vocab_size - 1}",
                param=param,
            )

    def _sampling(self, body: CompletionRequest | ChatRequest, choice: int) -> SamplingParams:
        bias = body.logit_bias or {}
        if bias and max(bias) >= self._vocab_size:
            raise ApiError(
                400,
                f"logit_bias names token {max(bias)}; allowed: 0 to {self._vocab_size - 1}",
                param="logit_bias",
            )
        return self._model.override(
            temperature=body.temperature,
            top_p=body.top_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=bias or None,
            # Choices with one seed would all be the same.
            seed=None if body.seed is None else (body.seed + choice) % _SEEDS,
        )

    def _grammar(self, form: ResponseFormat | None) -> CompiledGrammar | None:
        if form is None or form.type == "text":
            return None
        try:
            if form.json_schema is None:
                return self._grammars.compile({"type": "object"})
            return self._grammars.compile(
                form.json_schema.schema_, strict=bool(form.json_schema.strict)
            )
        except UnsupportedError as error:
            raise ApiError(501, str(error), param="response_format") from error
        except FairyError as error:
            raise ApiError(400, str(error), param="response_format") from error

    def _tool_grammar(self, body: ChatRequest) -> CompiledGrammar:
        if self._tool_form is None:
            raise ApiError(
                400,
                "the model's chat template shows no tools, or wants calls in a form that this "
                "server does not know; leave tools out",
                param="tools",
            )
        functions = [tool.function for tool in body.callable_tools]
        try:
            return self._grammars.compile_structure(
                structure(
                    self._tool_form,
                    [(f.name, f.parameters or NO_ARGUMENTS) for f in functions],
                    required=body.must_call,
                    parallel=body.parallel_tool_calls is not False,
                    max_whitespace=MAX_WHITESPACE,
                )
            )
        except UnsupportedError as error:
            raise ApiError(501, str(error), param="tools") from error
        except FairyError as error:
            raise ApiError(400, str(error), param="tools") from error


def _queue_full(message: str) -> ApiError:
    return ApiError(
        429,
        message,
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(_RETRY_SECONDS)},
    )
