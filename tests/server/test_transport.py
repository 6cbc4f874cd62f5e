"""How callers reach the server: from web pages of other origins, and over TLS."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from starlette.middleware.base import BaseHTTPMiddleware

from saccade.backends import Backend
from saccade.errors import InvalidInput
from server import keys, tls
from server.app import create_app
from server.settings import Settings
from tests.server.house import files, running
from tests.server.process import listening
from tests.server.test_process import refusal

PAGE = "https://page.example"


def cross(backend: Backend, origin: str, method: str, path: str, **settings: object) -> httpx.Response:
    async def once() -> httpx.Response:
        async with running(backend, **settings) as house:
            asked = {"Origin": origin}
            if method == "OPTIONS":
                asked |= {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            return await house.client.request(method, path, headers=asked)

    return asyncio.run(once())


def test_a_page_of_another_origin_may_ask_where_it_is_listed(backend: Backend, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(keys.entry("page", keys.new(), None, None, 10))
    listed = {"cors_origins": f"{PAGE}, https://other.example", "keys_file": file}
    before = cross(backend, PAGE, "OPTIONS", "/depth", **listed)
    assert before.status_code == 200  # a browser sends no key with its question
    assert before.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in before.headers["access-control-allow-headers"].lower()
    refused = cross(backend, PAGE, "POST", "/depth", **listed)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    assert "X-Request-ID" in refused.headers["access-control-expose-headers"]


def test_a_page_that_is_not_listed_is_told_nothing(backend: Backend) -> None:
    for settings in ({}, {"cors_origins": "https://other.example"}):
        for method, path in (("OPTIONS", "/depth"), ("GET", "/models")):
            response = cross(backend, PAGE, method, path, **settings)
            assert "access-control-allow-origin" not in response.headers
    assert cross(backend, PAGE, "GET", "/models", cors_origins="*").headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origins", ["page.example", "https://page.example/path", "https://a.example;b"])
def test_what_is_no_origin_is_refused_at_start(origins: str) -> None:
    with pytest.raises(InvalidInput, match="cors_origins"):
        Settings.load(cors_origins=origins)


def test_no_layer_hides_that_a_client_leaves(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").touch()
    app = create_app(
        Settings.load(keys_file=tmp_path / "keys.toml", cors_origins="*", otlp_endpoint="http://127.0.0.1:9")
    )
    layers = [layer.cls for layer in app.user_middleware]
    assert len(layers) >= 9
    assert not any(isinstance(layer, type) and issubclass(layer, BaseHTTPMiddleware) for layer in layers)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate for 127.0.0.1, which vouches for itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is not here")
    folder = tmp_path_factory.mktemp("tls")
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    made += ["-subj", "/CN=saccade"]
    named = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run(["openssl", *made, *named], check=True, capture_output=True)
    return folder


def files_of(folder: Path) -> dict[str, object]:
    return {"tls_certificate": folder / "cert.pem", "tls_key": folder / "key.pem"}


@contextmanager
def served(repository: Path, trusting: ssl.SSLContext, **settings: object) -> Iterator[httpx.Client]:
    with listening(repository, **settings) as server, httpx.Client(base_url=server.url, verify=trusting) as client:
        server.until(lambda: answers(client))
        yield client


def answers(client: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return client.get("/livez").status_code == 200
    return False


def test_https_with_a_certificate_and_nothing_else(toy_repository: Path, authority: Path) -> None:
    trusting = ssl.create_default_context(cafile=str(authority / "cert.pem"))
    with served(toy_repository, trusting, **files_of(authority)) as client:
        assert client.post("/depth", files=files("depth")).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(client.base_url.copy_with(scheme="http"))


def test_only_clients_with_a_certificate_where_an_authority_is_named(toy_repository: Path, authority: Path) -> None:
    trusting = ssl.create_default_context(cafile=str(authority / "cert.pem"))
    known = ssl.create_default_context(cafile=str(authority / "cert.pem"))
    known.load_cert_chain(authority / "cert.pem", authority / "key.pem")
    demanding = files_of(authority) | {"tls_client_ca": authority / "cert.pem"}
    with served(toy_repository, known, **demanding) as client:
        assert client.get("/livez").status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(client.base_url, verify=trusting)


def test_a_change_of_the_authorities_is_noticed(tmp_path: Path) -> None:
    names = ("tls_certificate", "tls_key", "tls_client_ca")
    chosen = {name: tmp_path / name for name in names}
    settings = Settings.load(**chosen)
    seen = [tls._stamps(settings)]
    for file in chosen.values():
        file.write_text("x")
        seen.append(tls._stamps(settings))
    assert len(set(seen)) == 4


def test_a_certificate_that_will_not_do_is_one_plain_line(
    toy_repository: Path, authority: Path, tmp_path: Path
) -> None:
    for settings in (
        {"tls_certificate": tmp_path / "nowhere.pem"},
        {"tls_certificate": authority / "key.pem"},
        {"tls_key": authority / "key.pem"},
    ):
        refusal(toy_repository, tmp_path / "log", "tls" if "tls_key" in settings else "TLS certificate", **settings)
