"""The page works without a network and without a mouse."""

import re
from html.parser import HTMLParser

import pytest

from serve.app import PAGE, PAGE_FILES
from tests.serve import browser
from tests.serve.conftest import eventually, wav


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_served_with_everything_it_refers_to(serve_fake) -> None:
    with serve_fake() as server:
        page = server.get("/")
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
            assert server.get(path).status_code == 200


def test_nothing_comes_from_elsewhere() -> None:
    assert {path.name for path in PAGE.iterdir()} == {name for name, _ in PAGE_FILES.values()}
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf8")
        assert not re.search(r"https?://|(?:src|href)=.//|@import|url\(", text), path.name


def test_usable_by_keyboard_and_screen_reader() -> None:
    elements = Elements((PAGE / "index.html").read_text(encoding="utf8")).found
    assert ("html", {"lang": "en"}) in elements
    assert any(attributes.get("aria-live") for _, attributes in elements)
    assert not any(
        "onclick" in attributes or "tabindex" in attributes for _, attributes in elements
    )
    assert {tag for tag, _ in elements} >= {"main", "h1", "form", "button", "label", "select"}


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no headless Chromium is installed")
def test_in_a_browser(serve_fake, tmp_path) -> None:
    recording = tmp_path / "recording.wav"
    recording.write_bytes(wav(1.5))
    with serve_fake() as server, browser.Page(server.url, tmp_path) as page:
        eventually(lambda: page.run("document.getElementById('model-a').value") == "fake")
        page.choose_file("#file", recording)
        eventually(lambda: not page.run("document.getElementById('translate').disabled"))
        page.run("document.getElementById('model-b').value = 'fake'")
        page.run("document.getElementById('translate').focus()")
        page.press("Enter")
        eventually(lambda: page.run("document.getElementById('status').textContent") == "Done.")
        texts = page.run("[...document.querySelectorAll('.result .text')].map(e => e.textContent)")
        assert texts == ["de 1.50", "de 1.50"]
        assert page.run("document.querySelectorAll('.facts dd').length") == 10
        assert not page.faults
