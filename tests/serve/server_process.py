"""A server with a fake model as a process of its own: DIRECTORY DRAIN_S [MAX_QUEUE].

Its translations wait until DIRECTORY holds a file named go.
"""

import sys
import time
from pathlib import Path

from halve.progress import Progress
from serve.run import run_server
from serve.settings import ServeSettings
from tests.serve.fakes import FakeTranslator


class Slow(FakeTranslator):
    """Takes its time over each batch."""

    def translate(self, audio, lang, **options):
        time.sleep(0.05)
        while not (Path(sys.argv[1]) / "go").exists():
            time.sleep(0.01)
        return super().translate(audio, lang, **options)


class Lines(Progress):
    """Progress as plain lines on stderr."""

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    warn = message


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    model = directory / "fake"
    model.mkdir()
    (model / "package.json").write_text('{"languages": ["de"]}')
    uploads = directory / "uploads"
    uploads.mkdir()
    settings = ServeSettings(
        models=(str(model),),
        port=0,
        drain_s=float(sys.argv[2]),
        max_queue=int(sys.argv[3]) if sys.argv[3:] else 64,
        batch_size=4,
        temp_dir=uploads,
    )
    run_server(settings, Lines(), open_translator=lambda path, settings: Slow())
