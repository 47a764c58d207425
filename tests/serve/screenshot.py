"""Saves what the page of a running server looks like after a translation.

    python -m tests.serve.screenshot http://127.0.0.1:8000 clip.ogg docs/images/page.png [LANGUAGE]

Compares the first two models where there are two.
"""

import json
import sys
import tempfile
from pathlib import Path

from tests.serve import browser
from tests.serve.conftest import eventually


def take(url: str, audio: Path, image: Path, language: str) -> None:
    """Chooses the audio, translates it, waits until it is done."""
    with (
        tempfile.TemporaryDirectory() as directory,
        browser.Page(url, Path(directory), size="1000,760") as page,
    ):
        eventually(lambda: bool(page.run("document.getElementById('model-a').value")))
        page.choose_file("#file", audio.resolve())
        eventually(lambda: not page.run("document.getElementById('translate').disabled"))
        page.run("document.getElementById('model-b').selectedIndex = models.length > 1 ? 2 : 0")
        page.run(f"document.getElementById('language').value = {json.dumps(language)}")
        page.run("document.getElementById('form').requestSubmit()")
        eventually(lambda: page.run("running === null"))
        page.screenshot(image)


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), (sys.argv[4:] or ["de"])[0])
