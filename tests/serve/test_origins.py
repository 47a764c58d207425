"""Pages on other origins that were let in, and requests that only look at the server."""

import pytest

from tests.serve.conftest import HTTP, wav

PAGE = "https://page.example"
STAINLESS = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"


def test_the_official_client_may_ask_from_a_page(serve_fake) -> None:
    asked = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": STAINLESS,
    }
    with serve_fake(allow_origins=(PAGE,)) as server:
        url = f"{server.url}/v1/audio/translations"
        answer = HTTP.options(url, headers=asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["access-control-allow-headers"] == STAINLESS
        answer = HTTP.options(url, headers={**asked, "origin": "https://evil.example"})
        assert answer.status_code == 400
        assert "access-control-allow-origin" not in answer.headers


def test_a_page_of_the_internet_may_ask_a_server_at_home_if_let_in(serve_fake) -> None:
    asked = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-private-network": "true",
    }
    with serve_fake(allow_origins=(PAGE,)) as server:
        url = f"{server.url}/v1/audio/translations"
        answer = HTTP.options(url, headers=asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-private-network"] == "true"
        answer = HTTP.options(url, headers={**asked, "origin": "https://evil.example"})
        assert answer.status_code == 400
        assert "access-control-allow-origin" not in answer.headers


def test_a_page_may_read_what_halve_adds(serve_fake) -> None:
    with serve_fake(allow_origins=(PAGE,)) as server:
        headers = {"origin": PAGE}
        answer = server.post(wav(0.5), prompt="x", headers=headers)
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        added = {name for name in answer.headers if name.startswith("x-")}
        assert "x-halve-ignored" in added
        assert added - {"x-content-type-options"} <= set(exposed)


def test_a_page_may_read_refusals(serve_fake, tmp_path) -> None:
    (tmp_path / "key").write_text("secret\n")
    settings = {"api_key_file": tmp_path / "key", "max_upload_bytes": 1024, "max_concurrent": 1}
    with serve_fake(allow_origins=(PAGE,), **settings) as server:
        key = {"authorization": "Bearer secret"}
        service = server.service

        def refusal(audio: bytes = b"", **headers: str) -> int:
            answer = server.post(audio, headers={"origin": PAGE, **headers})
            assert answer.headers["access-control-allow-origin"] == PAGE
            return answer.status_code

        assert refusal() == 401
        assert refusal(host="evil.example", **key) == 403
        assert refusal(bytes(200_000), **key) == 413
        service.running += 1
        assert refusal(**key) == 429
        service.running -= 1
        service.is_draining = True
        assert refusal(**key) == 503


def test_a_page_may_read_whether_to_ask_again(serve_fake, fake) -> None:
    fake.gate.clear()
    with serve_fake(allow_origins=(PAGE,), request_timeout_s=0.2) as server:
        answer = server.post(wav(0.5), headers={"origin": PAGE})
        fake.gate.set()
        assert answer.status_code == 504
        assert answer.headers["x-should-retry"] == "false"
        assert "x-should-retry" in answer.headers["access-control-expose-headers"]


def test_a_star_lets_all_pages_in(serve_fake) -> None:
    with serve_fake(allow_origins=("*",)) as server:
        answer = server.post(wav(0.5), headers={"origin": PAGE})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["http://[", "null", "http://", "x"])
def test_an_origin_that_is_no_url_is_refused(serve_fake, origin: str) -> None:
    with serve_fake() as server:
        answer = server.post(wav(0.5), headers={"origin": origin})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "unknown_origin"


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/page/page.js"])
def test_head_is_get_without_the_body(serve_fake, path: str) -> None:
    with serve_fake() as server:
        whole, head = server.get(path), HTTP.head(server.url + path)
        assert head.status_code == whole.status_code == 200
        assert head.headers["content-length"] == whole.headers["content-length"]
        assert head.content == b""
