from __future__ import annotations

import pytest

from fairy_compile.artifact.schema import (
    MapOf,
    OneOf,
    check,
    dump_json,
    load_json,
    load_object,
    require,
    show,
)
from fairy_compile.errors import ModelFileError


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        (1, int),
        (1, float),
        (1.5, float),
        ("a", str),
        (True, bool),
        (None, None),
        ("chat", "chat"),
        ([1, 2], [int]),
        ({"a": 1, "other": 2}, {"a": int}),
        ({}, {"a?": int}),
        ({"x": 1}, MapOf(int)),
        (None, OneOf(int, None)),
    ],
)
def test_fits(value, schema):
    assert check(value, schema, "v") == []
    require(value, schema, "v")


@pytest.mark.parametrize(
    ("value", "schema", "message"),
    [
        (1.0, int, "v is 1.0; expected an integer"),
        (True, int, "v is True; expected an integer"),
        (True, float, "v is True; expected a finite number"),
        (10**400, float, "v is an integer of 1329 bits; expected a finite number"),
        (1, bool, "v is 1; expected true or false"),
        (1, True, "v is 1; expected True"),
        ("b", "chat", "v is 'b'; expected 'chat'"),
        ([1, "2"], [int], "v[1] is '2'; expected an integer"),
        ({}, {"a": int}, "v lacks the key 'a'"),
        ({"a": {"b": 1}}, {"a": {"b": str}}, "v: a: b is 1; expected a string"),
        ({"a": ""}, {"a?": int}, "v: a is ''; expected an integer"),
        ({"x": "1"}, MapOf(int), "v['x'] is '1'; expected an integer"),
        (1, OneOf(str, None, [int]), "v is 1; expected a string or null or an array of (an int"),
        ([], {}, "v is []; expected an object"),
        ({}, [int], "v is {}; expected an array"),
    ],
)
def test_says_what_is_wrong(value, schema, message):
    (problem,) = check(value, schema, "v")
    assert problem.startswith(message)
    with pytest.raises(ModelFileError):
        require(value, schema, "v")


def test_shown_values_are_short_and_printable():
    assert show("a\n\x1b[31m\ud800") == "'a\\n\\x1b[31m\\ud800'"
    assert len(show("x" * 1000)) == 60
    assert show(2**200) == "an integer of 201 bits"


def test_file_larger_than_the_limit(tmp_path):
    path = tmp_path / "a.json"
    dump_json(path, {"a": "é"})
    assert load_json(path) == {"a": "é"}
    with pytest.raises(ModelFileError, match="at most 5"):
        load_json(path, limit=5)


def test_top_level_that_is_no_object(tmp_path):
    dump_json(tmp_path / "a.json", [1])
    with pytest.raises(ModelFileError, match="expected a JSON object"):
        load_object(tmp_path / "a.json")


def test_directory_in_place_of_a_file(tmp_path):
    with pytest.raises(ModelFileError, match="cannot read"):
        load_json(tmp_path)


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json(tmp_path / "a.json", float("nan"))
