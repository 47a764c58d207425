"""Saves what the page of a running server looks like after a translation.

    python -m tests.serve.screenshot http://127.0.0.1:8000 clip.ogg docs/images/page.png --language de

With --compare, by the first two models; with --dark, as a browser set to dark shows it.
"""

import argparse
import json
import tempfile
from pathlib import Path

from tests.serve import browser
from tests.serve.conftest import eventually


def take(options: argparse.Namespace) -> None:
    """Chooses the audio, translates it, waits until it is done."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        browser.Page(options.url, Path(directory), size=options.size) as page,
    ):
        if options.dark:
            page.prefer_dark()
        eventually(lambda: bool(page.run("document.getElementById('model-a').value")))
        page.choose_file("#file", options.audio.resolve())
        eventually(lambda: not page.run("document.getElementById('translate').disabled"))
        page.run(f"document.getElementById('model-a').selectedIndex = {options.model}")
        if options.compare:
            page.run("document.getElementById('model-b').selectedIndex = 2")
        page.run(f"document.getElementById('language').value = {json.dumps(options.language)}")
        page.run("document.getElementById('form').requestSubmit()")
        eventually(lambda: page.run("running === null"))
        page.run("document.querySelectorAll('details.stretches').forEach(d => d.open = true)")
        page.screenshot(options.image)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("audio", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--language", default="de")
    parser.add_argument("--size", default="1000,760")
    parser.add_argument("--model", type=int, default=0, help="which of the server's, from 0")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--dark", action="store_true")
    take(parser.parse_args())
