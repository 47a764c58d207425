"""Audio that several models hear is decoded once, and never more of it kept than is allowed."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import heard
from benchmarks.heard import Heard, read_all
from halve.corpus import Corpus, read_corpus


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The segments that were decoded."""
    found: list[str] = []
    audio = Corpus.audio

    def noted(self: Corpus, segment):
        found.append(segment.id)
        return audio(self, segment)

    monkeypatch.setattr(Corpus, "audio", noted)
    return found


def test_audio_is_decoded_once(tiny_corpus: Path, decoded: list[str]) -> None:
    corpus = read_corpus(tiny_corpus)
    segments = corpus.split("test")
    listen = Heard(corpus, segments)
    first = read_all(listen, range(len(segments)))
    again = read_all(listen, range(len(segments)))
    assert sorted(decoded) == sorted(segment.id for segment in segments)
    expected = [corpus.audio(segment) for segment in segments]
    for found in (first, again):
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_does_not_fit_is_decoded_again(
    tiny_corpus: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = read_corpus(tiny_corpus)
    segments = corpus.split("test")
    monkeypatch.setattr(heard, "KEPT_BYTES", corpus.audio(segments[0]).nbytes)
    decoded.clear()
    listen = Heard(corpus, segments)
    for _ in range(2):
        for place in range(len(segments)):
            listen(place)
    assert decoded.count(segments[0].id) == 1
    assert len(decoded) == 2 * len(segments) - 1
