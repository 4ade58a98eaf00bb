"""Strict JSON: reading files that may be hostile, and checking values against a small schema.

A schema is plain data:

    str, bool, dict, list       a value of that JSON type
    int                         a JSON integer: 256, neither 256.0 nor true
    float                       a finite JSON number
    None, "chat", -1            exactly this value
    [schema]                    an array of such values
    {"key": schema, "key?": …}  an object with these members, "?" marking the optional ones;
                                members that are not named are allowed
    MapOf(schema)               an object with any member names
    OneOf(schema, …)            any of these
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairy_compile.errors import ModelFileError

MAX_JSON_BYTES = 64 << 20

_TYPE_NAMES = {
    str: "a string",
    bool: "true or false",
    dict: "an object",
    list: "an array",
    int: "an integer",
    float: "a finite number",
}


@dataclass(frozen=True)
class MapOf:
    """Schema of an object whose member names are free."""

    value: Any


class OneOf:
    """Schema of a value that fits any of several schemas."""

    def __init__(self, *choices: Any):
        self.choices = choices


def show(value: Any, limit: int = 60) -> str:
    """Return a short one-line text of a value from a file, safe to print."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    # ascii, not repr: names from files may hold control characters or lone surrogates.
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def load_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file, refusing what JSON does not define.

    Raises:
        ModelFileError: the file is missing, longer than ``limit`` bytes, not UTF-8, or not JSON;
            or it has duplicate member names, NaN, infinities, or is nested too deeply.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise ModelFileError(f"{path} has {size} bytes; allowed: at most {limit}")
        return json.loads(
            path.read_bytes().decode("utf-8"),
            object_pairs_hook=_unique_members,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing") from None
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not valid JSON: {error}") from error


def load_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Like `load_json`, for files whose top level must be an object."""
    value = load_json(path, limit)
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} holds {show(value)}; expected a JSON object")
    return value


def dump_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON with a final newline."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def check(value: Any, schema: Any, where: str) -> list[str]:
    """Return what is wrong with ``value``, in words; an empty list if it fits ``schema``.

    Args:
        value: parsed JSON.
        schema: see the module docstring.
        where: how messages call the value, e.g. ``fairy.json``.
    """
    if isinstance(schema, OneOf):
        if any(not check(value, choice, where) for choice in schema.choices):
            return []
        return [f"{where} is {show(value)}; expected {_describe(schema)}"]
    if isinstance(schema, dict | MapOf):
        if not isinstance(value, dict):
            return [f"{where} is {show(value)}; expected an object"]
        return _check_members(value, schema, where)
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where} is {show(value)}; expected an array"]
        (item,) = schema
        return [
            problem
            for i, element in enumerate(value)
            for problem in check(element, item, f"{where}[{i}]")
        ]
    return (
        [] if _fits(value, schema) else [f"{where} is {show(value)}; expected {_describe(schema)}"]
    )


def require(value: Any, schema: Any, where: str) -> None:
    """Raise `ModelFileError` with the first violation of ``schema``, if there is one."""
    problems = check(value, schema, where)
    if problems:
        raise ModelFileError(problems[0])


def _check_members(value: dict[str, Any], schema: Any, where: str) -> list[str]:
    if isinstance(schema, MapOf):
        return [p for k, v in value.items() for p in check(v, schema.value, f"{where}[{show(k)}]")]
    problems = []
    for key, member in schema.items():
        name = key.removesuffix("?")
        if name in value:
            problems += check(value[name], member, f"{where}: {name}")
        elif name == key:
            problems.append(f"{where} lacks the key {name!r}")
    return problems


def _fits(value: Any, schema: Any) -> bool:
    if schema is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if schema is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # An integer too large for a double is no number C++ readers can hold.
        return number and abs(value) < 1e300
    if isinstance(schema, type):
        return isinstance(value, schema)
    return type(value) is type(schema) and value == schema


def _describe(schema: Any) -> str:
    if isinstance(schema, OneOf):
        return " or ".join(_describe(choice) for choice in schema.choices)
    if isinstance(schema, list):
        return f"an array of ({_describe(schema[0])})"
    if isinstance(schema, dict | MapOf):
        return "an object"
    return _TYPE_NAMES.get(schema) or ("null" if schema is None else repr(schema))


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {show(twice)} appears twice in one object")
    return members


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is outside the range of a double")
    return number
