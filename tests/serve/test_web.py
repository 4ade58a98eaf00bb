"""Serving a page and a model's files to browsers: what is handed out, to whom, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from fairy_compile.artifact import Manifest
from fairy_compile.errors import FairyError
from fairy_compile.serve import web
from fairy_compile.serve.hosts import OwnNames
from fairy_compile.serve.web import WebOptions, create_web_app, find_web_llm, serve_web
from tests.artifact.conftest import write_tiny

SECRET = "not for others"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An artifact that says it is for browsers, WebLLM, and a secret beside them."""
    directory, package = tmp_path / "my model", tmp_path / "web-llm"
    directory.mkdir()
    artifact = write_tiny(directory)
    artifact.edit_manifest(lambda m: m["target"].update(device="webgpu", features=["float16"]))
    found = SimpleNamespace(manifest=Manifest.load(directory))
    monkeypatch.setattr(web, "verify", lambda _: found)
    (package / "lib").mkdir(parents=True)
    (package / "lib" / "index.js").write_text("export const version = 1;")
    (tmp_path / "secret.json").write_text(SECRET)
    return SimpleNamespace(directory=directory, web_llm=package, root=tmp_path)


def client(site: SimpleNamespace, address: str = "127.0.0.1", **options) -> TestClient:
    app = create_web_app(site.directory, WebOptions(web_llm=site.web_llm, **options), address)
    return TestClient(app, base_url="http://localhost:8000")


def test_the_page_and_web_llm_have_their_media_types(site: SimpleNamespace) -> None:
    http = client(site)
    for path, kind in (
        ("/", "text/html; charset=utf-8"),
        ("/chat.js", "text/javascript; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/web-llm/index.js", "text/javascript; charset=utf-8"),
        ("/models.json", "application/json"),
    ):
        answer = http.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind), path
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in answer.headers


def test_the_model_lies_where_web_llm_looks_for_it(site: SimpleNamespace) -> None:
    http = client(site)
    (record,) = http.get("/models.json").json()["model_list"]
    assert record["model_id"] == "my-model"
    assert record["required_features"] == ["shader-f16"]
    assert record["model_lib"] == f"{record['model']}resolve/main/lib.so"
    for name in ("mlc-chat-config.json", "tensor-cache.json", "tokenizer.json", "fairy.json"):
        answer = http.get(f"{record['model']}resolve/main/{name}")
        assert answer.status_code == 200, name
        assert answer.content == (site.directory / name).read_bytes()
    shard = http.get(f"{record['model']}resolve/main/params_shard_0.bin")
    assert shard.headers["content-type"] == "application/octet-stream"


def test_another_build_has_another_url(site: SimpleNamespace) -> None:
    before = client(site).get("/models.json").json()["model_list"][0]["model"]
    path = site.directory / "fairy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"created": "later"}))
    assert client(site).get("/models.json").json()["model_list"][0]["model"] != before


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.json",
        "/%2e%2e/secret.json",
        "/..%2fsecret.json",
        "/web-llm/..%2f..%2fsecret.json",
        "/web-llm/%2e%2e/%2e%2e/secret.json",
        "{model}resolve/main/../../../secret.json",
        "{model}resolve/main/..%2fsecret.json",
        "{model}resolve/main/%2e%2e%2fsecret.json",
        "{model}resolve/main/..%5csecret.json",
        "{model}resolve/main//etc/passwd",
        "{model}resolve/main/unlisted.json",
        "{model}resolve/main/link.json",
        "/web-llm/link.json",
        "/web-llm/.hidden/key.json",
        "/web-llm/",
    ],
)
def test_nothing_else_is_handed_out(site: SimpleNamespace, path: str) -> None:
    (site.directory / "unlisted.json").write_text(SECRET)
    lib = site.web_llm / "lib"
    (lib / ".hidden").mkdir()
    (lib / ".hidden" / "key.json").write_text(SECRET)
    for place in (site.directory, lib):
        (place / "link.json").symlink_to(site.root / "secret.json")
    http = client(site)
    model = http.get("/models.json").json()["model_list"][0]["model"]
    answer = http.get(path.format(model=model))
    assert answer.status_code == 404
    assert SECRET not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_sent(site: SimpleNamespace, method: str) -> None:
    for path in ("/", "/models.json", "/web-llm/index.js"):
        assert client(site).request(method, path).status_code == 405


@pytest.mark.parametrize(
    ("address", "host", "served"),
    [
        ("127.0.0.1", "localhost", True),
        ("127.0.0.1", "LOCALHOST.:8000", True),
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("127.0.0.1", "127.1.2.3", True),
        ("127.0.0.1", "[::1]:8000", True),
        ("127.0.0.1", "chat.localhost:8000", True),
        ("127.0.0.1", "evil.example", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "evil.example:8000", False),
        ("127.0.0.1", "192.168.1.7:8000", False),
        ("127.0.0.1", "localhost:80:80", False),
        ("127.0.0.1", "localhost@evil.example", False),
        ("127.0.0.1", "", False),
        ("::1", "[::1]:8000", True),
        ("0.0.0.0", "192.168.1.7:8000", True),
        ("0.0.0.0", "[fe80::1]:8000", True),
        ("0.0.0.0", "evil.example", False),
    ],
)
def test_only_own_host_names_are_answered(
    site: SimpleNamespace, address: str, host: str, served: bool
) -> None:
    assert OwnNames(address).include(host) is served
    answer = client(site, address).get("/models.json", headers={"host": host})
    assert answer.status_code == (200 if served else 403)


def test_further_host_names_can_be_allowed(site: SimpleNamespace) -> None:
    http = client(site, allow_hosts=["Chat.Example"], host="box.lan")
    for host in ("chat.example:8000", "box.lan"):
        assert http.get("/models.json", headers={"host": host}).status_code == 200


def test_other_origins_are_allowed_by_name(site: SimpleNamespace) -> None:
    http = client(site, allow_origins=["https://example.org"])
    for origin, want in (
        ("https://example.org", "https://example.org"),
        ("https://evil.org", None),
    ):
        answer = http.get("/models.json", headers={"origin": origin})
        assert answer.headers.get("access-control-allow-origin") == want
    assert "cross-origin-resource-policy" not in answer.headers


@pytest.mark.parametrize("origin", ["*", "example.org", "https://", "https://example.org/path"])
def test_malformed_origins_are_refused(origin: str) -> None:
    with pytest.raises(FairyError, match="is no origin; give it like"):
        WebOptions(allow_origins=[origin])


def test_artifacts_for_other_devices_are_refused(
    site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = site.root / "cpu"
    other.mkdir()
    write_tiny(other)
    manifest = SimpleNamespace(manifest=Manifest.load(other))
    monkeypatch.setattr(web, "verify", lambda _: manifest)
    with pytest.raises(FairyError, match="built for cpu, which browsers cannot run"):
        serve_web(other, WebOptions(port=0, web_llm=site.web_llm))


def test_without_web_llm_the_command_is_named(
    site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIRY_COMPILE_CACHE", str(site.root / "cache"))
    words = r"@mlc-ai/web-llm is not in .*; install it with: npm install --prefix .*cache/web @mlc"
    with pytest.raises(FairyError, match=words):
        find_web_llm(None, site.root)
    package = site.root / "cache" / "web" / "node_modules" / "@mlc-ai" / "web-llm" / "lib"
    package.mkdir(parents=True)
    (package / "index.js").touch()
    assert find_web_llm(None, site.root) == package.parent


def test_a_page_of_ones_own_needs_an_index(site: SimpleNamespace) -> None:
    with pytest.raises(FairyError, match=r"has no index\.html"):
        client(site, page=site.root)
    (site.root / "index.html").write_text("<p>mine</p>")
    assert client(site, page=site.root).get("/").text == "<p>mine</p>"
