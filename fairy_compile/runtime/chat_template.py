"""Chat templates: a conversation to the text the model was trained to continue.

Templates are Jinja sources beside the tokenizer, rendered with the variables and extensions that
Hugging Face transformers gives them. They run in Jinja's sandbox, but like a model library they
are part of a model one has chosen to trust.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from fairy_compile.errors import FairyError, ModelFileError

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``; templates may read further keys."""

_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_MAX_FILE_BYTES = 32 << 20


class ChatTemplate:
    """A model's chat template, or plain concatenation where it has none.

    Attributes:
        source: Jinja source, or None.
        special_tokens: e.g. ``{"bos_token": "<s>"}``, variables of the template.
        note: a sentence for the user where the model has no template, else None.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str] | None = None):
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self.note = (
            None
            if source is not None
            else "this model has no chat template: messages are joined by line breaks, and the "
            "model continues the text"
        )

    @classmethod
    def from_directory(cls, directory: Path) -> ChatTemplate:
        """Read ``chat_template.jinja``, else the template of ``tokenizer_config.json``.

        Where that holds several named templates, the one called ``default`` is taken.

        Raises:
            ModelFileError: a file cannot be read or has another form.
        """
        config = _read_json(directory / "tokenizer_config.json")
        file = directory / "chat_template.jinja"
        source = _read(file) if file.is_file() else config.get("chat_template")
        if isinstance(source, list):
            source = _pick_default(source)
        if source is not None and not isinstance(source, str):
            raise ModelFileError(
                f"{directory / 'tokenizer_config.json'}: chat_template is a "
                f"{type(source).__name__}; expected text or a list of named templates"
            )
        return cls(source, _special_tokens(config))

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: the conversation, oldest first.
            add_generation_prompt: end with the markup that begins an answer.
            variables: further variables of the template, e.g. ``tools``.

        Raises:
            FairyError: a message is malformed, or the template refuses the conversation.
        """
        if not isinstance(messages, Iterable):
            raise FairyError(
                f"the chat is {messages!r}; expected a list of messages with role and content"
            )
        for message in messages:
            if not (
                isinstance(message, Mapping)
                and isinstance(message.get("role"), str)
                and "content" in message
            ):
                raise FairyError(
                    f"a chat message is {message!r:.80}; expected an object with role and content"
                )
        if self.source is None:
            return "\n".join(str(message["content"]) for message in messages)
        from jinja2.exceptions import TemplateError

        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **{"tools": None, "documents": None, **self.special_tokens, **variables},
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise FairyError(f"the model's chat template refuses this chat: {error}") from error

    def check_shown(self, messages: Sequence[Message], **variables: Any) -> None:
        """Refuse messages of a role that the template leaves out without a word.

        Args:
            messages: a conversation that `render` takes.
            variables: those given to `render`.

        Raises:
            FairyError: the text is the same whatever the messages of a role say.
        """
        whole = None
        for role in dict.fromkeys(m["role"] for m in messages if m["content"]):
            if role in ("user", "assistant"):
                continue
            whole = self.render(messages, **variables) if whole is None else whole
            # Not left out: a template's own system message may say what the first one does.
            others = [_saying_more(m) if m["role"] == role else m for m in messages]
            try:
                shown = self.render(others, **variables) != whole
            except FairyError:  # what they say matters
                continue
            if not shown:
                raise FairyError(
                    f"the model's chat template shows no messages of the role {role!r:.40}; put "
                    "what they say into a message of the role 'user'"
                )

    @cached_property
    def _template(self) -> Any:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _generation_extension()],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ModelFileError(f"the model's chat template does not parse: {error}") from error


def _saying_more(message: Message) -> Message:
    """Return a message whose text is another one; parts of other kinds stay."""
    content = message["content"]
    more = [*content, {"type": "text", "text": "more"}] if isinstance(content, list) else None
    return {**message, "content": more or f"{content} more"}


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    """Jinja's own filter escapes HTML, which models do not expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _generation_extension() -> type:
    """Return the extension for ``{% generation %}``, which only marks text for training."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja2's interface

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def _pick_default(templates: list[Any]) -> str | None:
    named = {
        entry["name"]: entry.get("template")
        for entry in templates
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }
    if not named:
        return None
    return named.get("default", next(iter(named.values())))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for kind in _SPECIAL_TOKENS:
        value = config.get(f"{kind}_token")
        if isinstance(value, dict):  # a serialised AddedToken
            value = value.get("content")
        if isinstance(value, str):
            tokens[f"{kind}_token"] = value
    return tokens


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ModelFileError(f"{path} is larger than {_MAX_FILE_BYTES} bytes")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"cannot read {path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} holds no JSON object")
    return value
