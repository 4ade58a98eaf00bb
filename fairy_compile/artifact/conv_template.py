"""MLC's ``conv_template`` object, derived from a model's own chat template.

Chat templates are Jinja programs; an MLC engine only glues fixed strings around messages. So the
program is run on marked messages, the strings between the marks are cut out, and the result is
kept only if gluing them gives back what the program printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fairy_compile.artifact.schema import load_object
from fairy_compile.artifact.tokenizer_files import TokenizerFiles
from fairy_compile.errors import ModelFileError

Messages = Sequence[Mapping[str, str]]

DEFAULT_SYSTEM_MESSAGE = "You are a helpful assistant."
"""Used where a template has a system block but no default text: MLC always prints the block."""

_SYSTEM, _USER, _ASSISTANT, _AGAIN = "@@system@@", "@@user@@", "@@assistant@@", "@@again@@"


@dataclass(frozen=True)
class DerivedTemplate:
    """A ``conv_template`` object and how it came about.

    Attributes:
        template: all keys of `contract.CONV_TEMPLATE`.
        reason: why it is the plain template, or ``""`` if it follows the chat template.
        stop_tokens: special tokens that end the assistant's turn, as text.
    """

    template: dict[str, Any]
    reason: str
    stop_tokens: tuple[str, ...] = ()


class _NotSimple(Exception):
    """The chat template is not fixed strings around messages; the text says where."""


@dataclass(frozen=True)
class _Pieces:
    """The fixed strings of a chat template, without the begin-of-text token.

    ``default_system`` is the system text the template prints by itself, None if it prints none.
    """

    takes_system: bool
    system_before: str
    system_after: str
    role_after_system: bool
    default_system: str | None
    user: str
    user_end: str
    assistant: str
    content_gap: str
    empty_gap: str
    assistant_end: str


def chat_template_source(files: TokenizerFiles) -> str | None:
    """Return the Jinja text of the model's chat template, or None if it has none.

    Looked for in ``chat_template.jinja``, ``tokenizer_config.json`` (of a list of named templates
    the one called ``default``) and ``chat_template.json``, in this order.
    """
    jinja = files.directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"cannot read {jinja}: {error}") from error
    source = files.config.get("chat_template")
    if source is None and (files.directory / "chat_template.json").is_file():
        source = load_object(files.directory / "chat_template.json").get("chat_template")
    if isinstance(source, list):
        named = (t for t in source if isinstance(t, dict) and t.get("name") == "default")
        source = next(named, {}).get("template")
    return source if isinstance(source, str) else None


def derive_conv_template(
    files: TokenizerFiles, stop_token_ids: Sequence[int] = ()
) -> DerivedTemplate:
    """Build the ``conv_template`` object of a model.

    Args:
        files: tokenizer files of the model.
        stop_token_ids: ids that end a reply; tokens that end the assistant's turn in the template
            are added.

    Returns:
        The template that follows the model's chat template, or, with a reason, a plain one that
        passes the user's text through.
    """
    source = chat_template_source(files)
    if source is None:
        return _plain(files, stop_token_ids, "the model has no chat template")
    try:
        render = _renderer(source, files)
        pieces = _cut(render, files)
        template = _template(pieces, _begins_with_bos(render, files), files)
        _compare(template, pieces, render, files)
    except _NotSimple as error:
        return _plain(files, stop_token_ids, str(error))
    stops = _turn_ends(pieces.assistant_end, files)
    ids = [*stop_token_ids, *(files.ids[text] for text in stops)]
    template["stop_token_ids"] = sorted(set(ids))
    return DerivedTemplate(template, "", stops)


def render_conv_template(template: Mapping[str, Any], messages: Messages) -> str:
    """Glue messages together the way MLC engines do, without the prefix token ids.

    Args:
        template: a ``conv_template`` object.
        messages: ``{"role", "content"}``; a first ``system`` message replaces the default.

    Returns:
        The prompt, ending where the assistant is to speak.
    """
    system = template["system_message"]
    if messages and messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    text = template["system_template"].replace("{system_message}", system)
    seps = (template["seps"] * 2)[:2]
    for i, message in enumerate(messages):
        role = message["role"]
        if i or not text or template["add_role_after_system_message"]:
            text += template["roles"][role] + template["role_content_sep"]
        slot = "{" + role + "_message}"
        text += template["role_templates"][role].replace(slot, message["content"])
        text += seps[role == "assistant"]
    return text + template["roles"]["assistant"] + template["role_empty_sep"]


def _renderer(source: str, files: TokenizerFiles) -> Any:
    """Return a function messages -> text, running the template in Jinja's sandbox."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks replies for training; its body is printed as it is."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> str:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # Some templates ask whether these two are none, so they must be defined.
    variables = {"add_generation_prompt": True, "tools": None, "documents": None}
    variables |= {key: files.token_text(key) for key in ("bos_token", "eos_token", "pad_token")}
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise _NotSimple(f"the chat template does not compile: {error}") from error

    def render(messages: Messages) -> str:
        try:
            return template.render(messages=messages, **variables)
        except Exception as error:  # a template is a program and may fail in any way
            raise _NotSimple(f"the chat template failed: {error}") from error

    return render


def _say(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


_CONVERSATION = _say(
    ("system", _SYSTEM), ("user", _USER), ("assistant", _ASSISTANT), ("user", _AGAIN)
)


def _split(text: str, marks: Sequence[str]) -> list[str]:
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise _NotSimple(f"the chat template does not print the {mark.strip('@')} text once")
        parts.append(before)
    return [*parts, text]


def _begins_with_bos(render: Any, files: TokenizerFiles) -> bool:
    bos = files.token_text("bos_token")
    return bool(bos) and render(_CONVERSATION[1:]).startswith(bos)


def _cut(render: Any, files: TokenizerFiles) -> _Pieces:
    """Run the template on marked messages and name the strings between the marks."""
    bos = files.token_text("bos_token")
    rest = render(_CONVERSATION[1:]).removeprefix(bos)
    start, to_assistant, to_user, to_reply = _split(rest, (_USER, _ASSISTANT, _AGAIN))
    user_end, to_role = _split_turn(to_assistant, files)
    assistant_end, user = _split_turn(to_user, files)
    if not start.endswith(user):
        user = _common_suffix(start, to_user)
        assistant_end = to_user[: len(to_user) - len(user)]
    if not to_reply.startswith(user_end):
        raise _NotSimple("the chat template ends user messages in different ways")
    to_reply = to_reply[len(user_end) :]
    assistant = _common_prefix(to_role, to_reply)
    takes_system, before, after, role_after, default = True, "", "", True, None
    try:
        marked = render(_CONVERSATION).removeprefix(bos)
        before, after, *_ = _split(marked, (_SYSTEM, _USER, _ASSISTANT, _AGAIN))
    except _NotSimple:
        # No system role in this template: MLC would print a system message as it is.
        takes_system = False
        after = start.removesuffix(user)
    else:
        role_after = after.endswith(user)
        after = after.removesuffix(user)
        block = start.removesuffix(user) if role_after else ""
        if block:
            if not (block.startswith(before) and block.endswith(after)):
                raise _NotSimple("the chat template prints its default system text differently")
            default = block[len(before) : len(block) - len(after)]
    return _Pieces(
        takes_system,
        before,
        after,
        role_after,
        default,
        user,
        user_end,
        assistant,
        to_role[len(assistant) :],
        to_reply[len(assistant) :],
        assistant_end,
    )


def _split_turn(text: str, files: TokenizerFiles) -> tuple[str, str]:
    """Split what lies between two messages into the end of one and the start of the next.

    The end is the leading special token, if there is one, with the white space around it.
    """
    body = text.lstrip()
    special = max(
        (token for token in files.special_tokens() if body.startswith(token)), key=len, default=""
    )
    if not special or not body[len(special) :].strip():
        return "", text
    rest = body[len(special) :].lstrip("\n")
    return text[: len(text) - len(rest)], rest


def _common_prefix(a: str, b: str) -> str:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return a[: min(len(a), len(b))] if same is None else a[:same]


def _common_suffix(a: str, b: str) -> str:
    return _common_prefix(a[::-1], b[::-1])[::-1]


def _turn_ends(assistant_end: str, files: TokenizerFiles) -> tuple[str, ...]:
    """Return the special token that ends the assistant's turn, if there is one."""
    text = assistant_end.strip()
    found = [token for token in files.special_tokens() if token and text.startswith(token)]
    return (max(found, key=len),) if found else ()


def _template(pieces: _Pieces, bos: bool, files: TokenizerFiles) -> dict[str, Any]:
    default = pieces.default_system
    if default is None:
        default = DEFAULT_SYSTEM_MESSAGE if pieces.takes_system else ""
    bos_id = files.token_id("bos_token")
    return _base() | {
        "name": "chat_template",
        "system_template": f"{pieces.system_before}{{system_message}}{pieces.system_after}",
        "system_message": default,
        "system_prefix_token_ids": [bos_id] if bos and bos_id is not None else [],
        "add_role_after_system_message": pieces.role_after_system,
        "roles": {"user": pieces.user, "assistant": pieces.assistant, "tool": pieces.user},
        "role_templates": {
            "user": "{user_message}",
            "assistant": f"{pieces.content_gap}{{assistant_message}}",
            "tool": "{tool_message}",
        },
        "seps": [pieces.user_end, pieces.assistant_end],
        "role_empty_sep": pieces.empty_gap,
    }


def _compare(
    template: Mapping[str, Any], pieces: _Pieces, render: Any, files: TokenizerFiles
) -> None:
    """Check that MLC's gluing gives what the chat template prints."""
    bos = files.token_text("bos_token")
    conversations = []
    if pieces.takes_system:
        conversations += [_CONVERSATION, _CONVERSATION[:2]]
    if pieces.default_system is not None or not pieces.takes_system:
        conversations += [_CONVERSATION[1:], _CONVERSATION[1:2]]
    for messages in conversations:
        if render_conv_template(template, messages) != render(messages).removeprefix(bos):
            raise _NotSimple("the chat template is not fixed strings around messages")


def _base() -> dict[str, Any]:
    return {
        "messages": [],
        "role_content_sep": "",
        "stop_str": [],
        "stop_token_ids": [],
        "function_string": "",
        "use_function_calling": False,
        "strip_reasoning_in_history": False,
    }


def _plain(files: TokenizerFiles, stop_token_ids: Sequence[int], reason: str) -> DerivedTemplate:
    """Return the template of a model without chat format: the user's text as it is."""
    template = _base() | {
        "name": "plain",
        "system_template": "{system_message}",
        "system_message": "",
        "system_prefix_token_ids": files.prefix_ids(),
        "add_role_after_system_message": True,
        "roles": {"user": "", "assistant": "", "tool": ""},
        "role_templates": {
            "user": "{user_message}",
            "assistant": "{assistant_message}",
            "tool": "{tool_message}",
        },
        "seps": [""],
        "role_empty_sep": "",
        "stop_token_ids": sorted(set(stop_token_ids)),
    }
    return DerivedTemplate(template, reason)
