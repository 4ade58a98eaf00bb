"""Options of ``serve`` that belong to one of its two kinds only."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--web", "--api-key", "secret"], "--api-key means nothing with --web; leave it out"),
        (["--web", "--max-queue", "3"], "--max-queue means nothing with --web"),
        (["--page", "."], "--page is for --web; add that, or leave it out"),
        (["--allow-origin", "https://a.example"], "--allow-origin is for --web"),
        (["--web", "--allow-origin", "*"], "--allow-origin * is no origin"),
        (["--web", "--port", "70000"], "port is 70000; allowed: 0 to 65535"),
    ],
)
def test_options_of_the_other_kind_are_refused(cli, tmp_path, arguments, words):
    result = cli("serve", tmp_path, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_web_page_needs_an_artifact(cli, tmp_path):
    result = cli("serve", tmp_path, "--web", "--port", "0")
    assert result.exit_code == 2
    assert "fairy.json" in result.stderr
