"""The page works without a network and without a mouse."""

import base64
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from export.runtime import open_translator
from halve.audio import read_audio
from halve.corpus import read_corpus
from serve.app import PAGE, PAGE_FILES
from serve.settings import ServeSettings
from tests.serve import browser
from tests.serve.conftest import eventually, serving, wav

ROOT = Path(__file__).parents[2]
CONTROLS = ("file", "record", "language", "model-a", "model-b", "translate")
"""What Tab reaches, in this order (the player between them has controls of its own)."""


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


in_a_browser = pytest.mark.skipif(
    browser.find() is None, reason="no headless Chromium is installed"
)


def value(page: browser.Page, element: str, what: str = "value") -> Any:
    return page.run(f"document.getElementById('{element}').{what}")


def texts(page: browser.Page) -> list[str]:
    return page.run("[...document.querySelectorAll('.result .text')].map(e => e.textContent)")


@pytest.fixture(scope="module")
def speech_clip() -> Path:
    """One real recording of the bundled corpus, Ogg Opus."""
    corpus = read_corpus(ROOT / "demo" / "corpus")
    return corpus.path / corpus.split("test", "de", 1)[0].audio


@in_a_browser
def test_a_real_recording_by_keyboard_alone(
    tiny_model: Path, speech_clip: Path, tmp_path: Path
) -> None:
    audio = read_audio(speech_clip)
    translator = open_translator(tiny_model, threads=1)
    expected = translator.translate([audio], "de")[0].text
    translator.close()
    settings = ServeSettings(models=(str(tiny_model),), threads=1)
    with serving(settings) as server, browser.Page(server.url, tmp_path) as page:
        eventually(lambda: value(page, "model-a") == "tiny")
        page.choose_file("#file", speech_clip)
        eventually(lambda: not value(page, "translate", "disabled"))
        reached = []
        while "translate" not in reached:
            page.press("Tab")
            reached.append(page.run("document.activeElement.id"))
            assert len(reached) < 20, reached
        order = [name for name in reached if name in CONTROLS]
        assert order == list(CONTROLS)
        page.run("document.getElementById('language').value = 'de'")
        page.run("document.getElementById('model-b').value = 'tiny'")
        page.press("Enter")
        eventually(lambda: value(page, "status", "textContent") == "Done.")
        assert texts(page) == [expected, expected]
        assert page.run("document.querySelectorAll('.facts dd').length") >= 10
        assert re.search(
            r"tiny was [\d.]+ times as fast as tiny", value(page, "comparison", "textContent")
        )
        assert not page.faults


@in_a_browser
def test_a_model_that_had_to_be_loaded_is_not_called_slow(
    tiny_model: Path, speech_clip: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    settings = ServeSettings(models=(str(tiny_model), str(other)), threads=1)
    with serving(settings) as server, browser.Page(server.url, tmp_path) as page:
        eventually(lambda: value(page, "model-a") == "tiny")
        page.choose_file("#file", speech_clip)
        eventually(lambda: not value(page, "translate", "disabled"))
        page.run("document.getElementById('language').value = 'de'")
        page.run("document.getElementById('model-b').value = 'other'")
        for says in ("^other had to be loaded first", r"times as fast as"):
            page.run("document.getElementById('form').requestSubmit()")
            eventually(lambda: page.run("running === null"))
            assert len(texts(page)) == 2
            assert re.search(says, value(page, "comparison", "textContent"))
        assert not page.faults


@in_a_browser
def test_what_the_microphone_hears_is_sent(serve_fake, tmp_path: Path) -> None:
    microphone = tmp_path / "microphone.wav"
    microphone.write_bytes(wav(2.0))
    with (
        serve_fake() as server,
        browser.Page(server.url, tmp_path, microphone=microphone) as page,
    ):
        eventually(lambda: value(page, "model-a") == "fake")
        page.run("document.getElementById('record').click()")
        eventually(lambda: value(page, "record", "textContent") == "Stop recording")
        time.sleep(2.0)  # a recording takes its time
        page.run("document.getElementById('record').click()")
        eventually(lambda: not value(page, "translate", "disabled"))
        assert "recording.wav" in value(page, "chosen", "textContent")
        page.run("document.getElementById('form').requestSubmit()")
        eventually(lambda: value(page, "status", "textContent") == "Done.")
        (text,) = texts(page)
        assert 0.2 < float(text.removeprefix("de ")) < 60
        assert not page.faults


@in_a_browser
def test_a_dropped_file_is_sent(serve_fake, tmp_path: Path) -> None:
    content = base64.b64encode(wav(1.5)).decode()
    with serve_fake() as server, browser.Page(server.url, tmp_path) as page:
        eventually(lambda: value(page, "model-a") == "fake")
        page.run(
            f"var bytes = Uint8Array.from(atob('{content}'), (c) => c.charCodeAt(0));"
            "var dataTransfer = new DataTransfer();"
            "dataTransfer.items.add(new File([bytes], 'dropped.wav'));"
            "document.body.dispatchEvent("
            " new DragEvent('drop', { dataTransfer, bubbles: true, cancelable: true }));"
        )
        eventually(lambda: not value(page, "translate", "disabled"))
        assert "dropped.wav" in value(page, "chosen", "textContent")
        page.run("document.getElementById('form').requestSubmit()")
        eventually(lambda: value(page, "status", "textContent") == "Done.")
        (text,) = texts(page)
        assert float(text.removeprefix("de ")) == pytest.approx(1.5, abs=0.05)
        assert not page.faults


@in_a_browser
def test_the_microphone_is_asked_for_once(serve_fake, tmp_path: Path) -> None:
    with serve_fake() as server, browser.Page(server.url, tmp_path) as page:
        eventually(lambda: value(page, "model-a") == "fake")
        page.run(
            "var asked = 0; var refuse; var button = document.getElementById('record');"
            "navigator.mediaDevices.getUserMedia = () =>"
            " { asked += 1; return new Promise((_, no) => { refuse = no; }); }"
        )
        page.run("button.focus(); button.click(); button.click()")
        assert page.run("asked") == 1
        assert value(page, "record", "disabled")
        page.run("refuse()")
        eventually(lambda: not value(page, "record", "disabled"))
        assert "no microphone" in value(page, "status", "textContent")
        assert page.run("document.activeElement.id") == "record"
        page.run("button.click()")
        assert page.run("asked") == 2


@in_a_browser
def test_languages_that_loading_tells_can_be_chosen(serve_fake, tmp_path: Path) -> None:
    """The first request does not say which, and is refused; it has loaded the model."""
    (tmp_path / "fake" / "package.json").write_text("{}")
    audio = tmp_path / "clip.wav"
    audio.write_bytes(wav(1.0))
    languages = "[...document.getElementById('language').options].map(o => o.value).join()"
    other = tmp_path / "other"
    other.mkdir()
    with (
        serve_fake(models=(str(tmp_path / "fake"), str(other))) as server,
        browser.Page(server.url, tmp_path) as page,
    ):
        eventually(lambda: value(page, "model-a") == "fake")
        page.run("document.getElementById('model-a').value = 'other'; showLanguages()")
        assert page.run(languages) == ""
        page.choose_file("#file", audio)
        eventually(lambda: not value(page, "translate", "disabled"))
        page.run("document.getElementById('form').requestSubmit()")
        eventually(lambda: page.run(languages) == "de,zh")
        assert "Say which language" in value(page, "status", "textContent")
        page.run("document.getElementById('form').requestSubmit()")
        eventually(lambda: value(page, "status", "textContent") == "Done.")
        assert texts(page) == ["de 1.00"]


@in_a_browser
def test_faults_are_told(serve_fake, tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.wav"
    nonsense.write_bytes(b"this is no audio")
    with serve_fake() as server, browser.Page(server.url, tmp_path) as page:
        eventually(lambda: value(page, "model-a") == "fake")
        page.choose_file("#file", nonsense)
        eventually(lambda: not value(page, "translate", "disabled"))
        page.run("document.getElementById('form').requestSubmit()")
        eventually(lambda: "not audio" in value(page, "status", "textContent"))
        assert value(page, "status", "className") == "fault"
