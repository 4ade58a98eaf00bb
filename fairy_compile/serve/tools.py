"""Tool calls: how a model writes them, grammars that hold it to that, reading them as they come.

A model's chat template shows it the functions and tells it to answer with calls in some form. The
text is held to that form by a grammar, so that names are of given functions and arguments conform
to their schemas, whatever the model; reading it needs no guesses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of arguments of a function that gives none: it takes none."""


@dataclass(frozen=True)
class ToolForm:
    """How a family of chat templates has calls written.

    Attributes:
        mark: text of a template that asks for this form.
        trigger: how every call begins; other text does not contain it.
        before, between, after: around the name and the arguments, which are JSON.
    """

    mark: str
    trigger: str
    before: str
    between: str
    after: str

    def begin(self, name: str) -> str:
        """Return how a call of a function begins."""
        return f"{self.before}{name}{self.between}"


FORMS = (
    # Qwen 2.5 and 3, Hermes.
    ToolForm(
        mark="<tool_call>",
        trigger="<tool_call>",
        before='<tool_call>\n{"name": "',
        between='", "arguments": ',
        after="}\n</tool_call>",
    ),
    # Llama 3.1 and later.
    ToolForm(
        mark='"parameters"',
        trigger='{"name": "',
        before='{"name": "',
        between='", "parameters": ',
        after="}",
    ),
)


def form_of(template: str | None) -> ToolForm | None:
    """Return the form a chat template asks for; None if it shows no tools, or asks for another."""
    if template is None or not re.search(r"\btools\b", template):
        return None
    return next((form for form in FORMS if form.mark in template), None)


def structure(
    form: ToolForm,
    functions: Sequence[tuple[str, dict[str, Any]]],
    *,
    required: bool,
    parallel: bool,
    max_whitespace: int,
) -> dict[str, Any]:
    """Return what xgrammar calls a structural tag: text with calls of functions.

    Args:
        form: how calls are written.
        functions: names, and JSON schemas of arguments.
        required: the answer begins with a call.
        parallel: there may be several.
        max_whitespace: characters of white space in a row, in arguments.
    """
    tags = [
        {
            "type": "tag",
            "begin": form.begin(name),
            "content": {
                "type": "json_schema",
                "json_schema": schema,
                "max_whitespace_cnt": max_whitespace,
            },
            "end": form.after,
        }
        for name, schema in functions
    ]
    calls: dict[str, Any]
    if required:
        calls = {
            "type": "tags_with_separator",
            "tags": tags,
            "separator": "\n",
            "at_least_one": True,
            "stop_after_first": not parallel,
        }
    else:
        calls = {
            "type": "triggered_tags",
            "triggers": [form.trigger],
            "tags": tags,
            "stop_after_first": not parallel,
        }
    return {"type": "structural_tag", "format": calls}


@dataclass(frozen=True)
class Text:
    """Text outside of calls."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """A call, the ``index``-th of its answer, of the function ``name``."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the arguments of a call, JSON."""

    index: int
    text: str


Part: TypeAlias = Text | CallBegins | Arguments


class ToolReader:
    """Tells calls from text, piece by piece.

    Attributes:
        calls: how many have begun.
        complete: how many have ended.
    """

    def __init__(self, form: ToolForm, names: Collection[str]):
        self._form = form
        self._begins = {form.begin(name): name for name in names}
        self._held = ""  # may be part of what begins a call, or of the white space before one
        self._json: _JsonEnd | None = None  # while inside arguments
        self._after = ""  # what is left of the end of a call
        self.calls = 0
        self.complete = 0

    def push(self, text: str) -> list[Part]:
        """Return what can be told after some more text."""
        parts: list[Part] = []
        while text:
            if self._json is not None:
                text = self._read_arguments(text, parts)
            elif self._after:
                common = min(len(self._after), len(text))
                self._after, text = self._after[common:], text[common:]
            else:
                text = self._read_text(text, parts)
        return parts

    def finish(self) -> list[Part]:
        """Return what was held back, at the end of an answer."""
        held, self._held = self._held, ""
        return [Text(held)] if held and not (self.calls and held.isspace()) else []

    def _read_arguments(self, text: str, parts: list[Part]) -> str:
        end = self._json.find(text) if self._json else None
        taken = text if end is None else text[:end]
        parts.append(Arguments(self.calls - 1, taken))
        if end is None:
            return ""
        self._json, self._after = None, self._form.after
        self.complete += 1
        return text[end:]

    def _read_text(self, text: str, parts: list[Part]) -> str:
        text = self._held + text
        at = text.find(self._form.trigger)
        if at < 0:
            keep = _overlap(text, self._form.trigger)
            shown = text[: len(text) - keep]
            spaces = len(shown) - len(shown.rstrip())
            shown, self._held = shown[: len(shown) - spaces], text[len(shown) - spaces :]
            self._show(shown, parts)
            return ""
        found = next((b for b in self._begins if text.startswith(b, at)), None)
        if found is None:  # the rest of it is still to come
            self._show(text[:at].rstrip(), parts)
            self._held = text[at:]
            return ""
        self._show(text[:at].rstrip(), parts)
        self._held = ""
        parts.append(CallBegins(self.calls, self._begins[found]))
        self.calls += 1
        self._json = _JsonEnd()
        return text[at + len(found) :]

    @staticmethod
    def _show(text: str, parts: list[Part]) -> None:
        if text:
            parts.append(Text(text))


class _JsonEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    def find(self, text: str) -> int | None:
        """Return where the object ends in ``text``, None if it goes on."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return i + 1
        return None


def _overlap(text: str, begin: str) -> int:
    """Return the length of the longest end of ``text`` with which ``begin`` begins."""
    return next(n for n in range(min(len(text), len(begin)), -1, -1) if text.endswith(begin[:n]))


def with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its calls as objects, as chat templates expect them.

    Raises:
        ValueError: ``tool_calls`` has another form, or arguments are no JSON object.
    """
    calls = message.get("tool_calls")
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    converted = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("a tool call needs a function with a name")
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise ValueError(
                    f"arguments of a call of {function['name']} are no JSON: {error}"
                ) from error
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments of a call of {function['name']} are no JSON object")
        converted.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": converted}
