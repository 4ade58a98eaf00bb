"""The bodies of requests, as OpenAI's API has them.

Fields without influence on the text (``user``, ``store``, ...) are ignored. Those that ask for what
this server cannot do are refused by name: an answer that silently lacks it would be wrong.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fairy_compile.serve.tools import with_objects

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_TOOLS = 128

Token = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[str], Field(max_length=MAX_CHOICES)]
TokenLists = Annotated[list[list[Token]], Field(max_length=MAX_CHOICES)]


class StreamOptions(BaseModel):
    """What a stream tells beside its text."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A named JSON schema."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = "answer"
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_given(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format of type json_schema needs json_schema")
        return self


class _Sampled(BaseModel):
    """Fields both kinds of request have; None takes the model's default."""

    model_config = ConfigDict(extra="allow")
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """Take null for left out, as OpenAI's API does: it is how clients write a default."""
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}

    @model_validator(mode="after")
    def _nothing_unsupported(self) -> _Sampled:
        for name, harmless in self.unsupported.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in harmless:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self


class CompletionRequest(_Sampled):
    """Body of ``POST /v1/completions``."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "echo": (False,),
        "suffix": ("",),
        "best_of": (1,),
    }

    prompt: str | list[Token] | Texts | TokenLists
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, texts or tokens."""
        if not self.prompt or isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(BaseModel):
    """A part of a message; others than text are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation; the chat template may read further keys."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, Any]:
        """Return the message with its parts joined, as chat templates expect it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message = {**(self.model_extra or {}), "role": self.role, "content": content or ""}
        return with_objects(message)


class Function(BaseModel):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; there are only functions."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class FunctionName(BaseModel):
    """The name of a function."""

    name: str


class NamedTool(BaseModel):
    """A choice of one tool."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(_Sampled):
    """Body of ``POST /v1/chat/completions``; ``max_tokens`` is the older name of the limit."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "audio": (),
        "modalities": (["text"],),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    tools: Annotated[list[Tool] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        if not self.tools or self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools if tool.function.name == name]
        return self.tools

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def limit(self) -> int | None:
        """Most tokens to draw, or None for as many as fit."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _logprobs_fit(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    @model_validator(mode="after")
    def _tools_fit(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have one name; give each its own")
        if self.must_call and not self.callable_tools:
            raise ValueError("tool_choice asks for a tool that is not among tools")
        if self.callable_tools:
            form = self.response_format
            if form is not None and form.type != "text":
                raise ValueError("response_format is only allowed where no tool may be called")
            if self.logprobs:
                raise ValueError("logprobs is only allowed where no tool may be called")
        return self
