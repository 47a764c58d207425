"""A report's audio: segments as data that an HTML page can play, with no file beside it."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import soundfile

from halve.audio import SAMPLE_RATE_HZ, probe
from halve.corpus import Corpus, Segment, read_corpus
from halve.errors import CorpusError

_SLACK_S = 0.1
"""A file so much longer than its segment has more in it."""
_AS_IS_BYTES = 60_000
"""A recording that is one whole segment goes in as it is up to so many bytes; others as FLAC."""
_TYPES = {".opus": "audio/ogg", ".ogg": "audio/ogg", ".mp3": "audio/mpeg", ".flac": "audio/flac"}


class Clips:
    """Plays segments of a corpus by id; ids that it has not, or cannot read, have no sound."""

    def __init__(self, corpus: Path) -> None:
        """Raises CorpusError where `corpus` is none."""
        self._corpus: Corpus = read_corpus(corpus)
        self._segments = {segment.id: segment for segment in self._corpus.segments}
        uses = Counter(segment.audio for segment in self._corpus.segments)
        self._shared = {name for name, count in uses.items() if count > 1}
        self._made: dict[str, str] = {}

    def sources(self, ids: Sequence[str]) -> list[str]:
        """A data URI for each id, empty where there is no sound."""
        return [self._source(name) for name in ids]

    def _source(self, name: str) -> str:
        if name not in self._made:
            segment = self._segments.get(name)
            self._made[name] = self._encoded(segment) if segment and segment.audio else ""
        return self._made[name]

    def _encoded(self, segment: Segment) -> str:
        path = self._corpus.path / segment.audio
        kind = _TYPES.get(path.suffix.lower())
        try:
            whole = segment.audio not in self._shared and segment.offset_s == 0.0
            whole = whole and abs(probe(path).duration_s - segment.duration_s) < _SLACK_S
            if kind and whole and path.stat().st_size <= _AS_IS_BYTES:
                return _uri(kind, path.read_bytes())
            sound = io.BytesIO()
            soundfile.write(sound, self._corpus.audio(segment), SAMPLE_RATE_HZ, format="FLAC")
            return _uri("audio/flac", sound.getvalue())
        except (CorpusError, OSError):
            return ""


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
