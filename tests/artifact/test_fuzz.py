"""Random damage ends in success or in a `FairyError`, never in another exception."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from fairy_compile.artifact import inspect, read_params, verify
from fairy_compile.errors import FairyError

VALUES = [None, True, 0, -1, 1.5, 2**63, 10**400, "", "../x", "\ud800", [], {}, [[]], {"a": []}]


def load_all(directory: Any) -> bool:
    """Verify, inspect and read everything; tell whether it was accepted."""
    message = ""
    try:
        verify(directory, hashes=False)
        inspect(directory)
        for _, array in read_params(directory):
            array.tobytes()
    except FairyError as error:
        message = str(error)
    assert b"\n" not in message.encode("utf-8")
    return not message


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value inside ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, member in items:
        found.append((value, key))
        if isinstance(member, dict | list):
            found += places(member)
    return found


@pytest.mark.parametrize("name", ["tensor-cache.json", "fairy.json", "mlc-chat-config.json"])
def test_flipped_bytes(artifact, name):
    rng = random.Random(name)
    path = artifact.directory / name
    manifest = (artifact.directory / "fairy.json").read_bytes()
    good = path.read_bytes()
    for _ in range(250):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(good))] = rng.randrange(256)
        (artifact.directory / "fairy.json").write_bytes(manifest)
        path.write_bytes(damaged)
        if name != "fairy.json":
            artifact.sign(name)
        load_all(artifact.directory)


@pytest.mark.parametrize("name", ["tensor-cache.json", "fairy.json", "mlc-chat-config.json"])
def test_replaced_values(artifact, name):
    rng = random.Random(name)
    good = json.dumps(artifact.read(name))
    accepted = 0
    for _ in range(250):
        value = json.loads(good)
        container, key = rng.choice(places(value))
        if rng.random() < 0.2:
            del container[key]
        else:
            container[key] = rng.choice(VALUES)
        (artifact.directory / name).write_text(json.dumps(value))
        if name != "fairy.json":
            artifact.sign(name)
        accepted += load_all(artifact.directory)
    assert accepted < 125
