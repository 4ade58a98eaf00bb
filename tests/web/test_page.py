"""The chat page: it loads a model, streams an answer, stops, and looks like a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fairy_compile as fc
from tests.tiny_models import save_model
from tests.web.sizes import SMALL

pytestmark = pytest.mark.slow

_TEXTS = "() => [...document.querySelectorAll('.message')].map((m) => m.textContent)"
_STATE = """() => ({
  model: document.getElementById("model").textContent,
  progress: document.getElementById("progress").value,
  loading: document.getElementById("loading").hidden,
  speed: document.getElementById("speed").textContent,
  failed: document.querySelectorAll(".error").length,
})"""


def test_the_page_chats_and_stops(browse: Callable[..., list[Any]], tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", **SMALL)
    directory, picture = tmp_path / "tiny", tmp_path / "page.png"
    fc.build(source, target="webgpu-f32", act="float", context=256, output=directory)
    ready = ("wait", "#send:not([disabled])")
    results = browse(
        directory,
        [
            ready,
            ("fill", ["#temperature", "1"]),
            ("fill", ["#max-tokens", "6"]),
            ("fill", ["#input", "Return an argument."]),
            ("click", "#send"),
            ("wait", "#stop:not([disabled])"),
            ready,
            ("evaluate", _STATE),
            ("evaluate", _TEXTS),
            ("screenshot", str(picture)),
            ("fill", ["#max-tokens", "200"]),
            ("fill", ["#input", "And another."]),
            ("click", "#send"),
            ("wait", ".message:nth-child(4):not(:empty)"),
            ("click", "#stop"),
            ready,
            ("evaluate", _STATE),
            ("click", "#clear"),
            ready,
            ("evaluate", _TEXTS),
        ],
    )
    first, texts, stopped, cleared = results
    assert (first["model"], first["progress"], first["loading"]) == ("tiny", 1, True)
    assert texts[0] == "Return an argument."
    assert len(texts) == 2
    assert texts[1]
    assert "tok/s, 6 tokens" in first["speed"]
    assert first["failed"] == stopped["failed"] == 0
    assert 0 < int(stopped["speed"].split(" tok/s, ")[1].split()[0]) < 200
    assert cleared == []
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (700, 900, 3)
    # The question's bubble is on the right, blue; the answer's on the left, grey.
    blue = (pixels[..., 2].astype(int) - pixels[..., 0]) > 12
    assert blue[60:300, 450:].sum() > 2000
    assert blue[60:300, 450:].sum() > 10 * blue[60:300, :450].sum()
