"""Controls and clips."""

import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.workload import long_clip, short_clip, shuffled_partners, silence_like
from halve.corpus import read_corpus
from halve.errors import CorpusError


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.3, 30), min_size=2, max_size=60))
def test_partners_are_a_derangement(durations_s: list[float]) -> None:
    texts = [str(index) for index in range(len(durations_s))]
    partners = shuffled_partners(durations_s, texts)
    assert sorted(partners) == list(range(len(durations_s)))
    assert all(index != partner for index, partner in enumerate(partners))
    assert partners == shuffled_partners(durations_s, texts)


def test_partners_have_like_durations() -> None:
    generator = random.Random(3)
    durations_s = [generator.uniform(1, 12) for _ in range(1000)]
    partners = shuffled_partners(durations_s, [str(i) for i in range(1000)])
    gaps = [abs(durations_s[i] - durations_s[p]) for i, p in enumerate(partners)]
    assert max(gaps) < 0.25


def test_partners_do_not_say_the_same_words() -> None:
    # Neighbours by duration say the same: the next but one is taken.
    texts = ["a", "a", "b", "b", "c", "c", "d", "d"]
    partners = shuffled_partners([1.0 + i / 100 for i in range(8)], texts)
    assert all(texts[i] != texts[p] for i, p in enumerate(partners))


def test_one_segment_cannot_be_shuffled() -> None:
    with pytest.raises(CorpusError, match="at least 2"):
        shuffled_partners([1.0], ["a"])


def test_silence_is_as_long() -> None:
    audio = np.ones(160, dtype=np.float32)
    assert silence_like(audio).shape == audio.shape
    assert not silence_like(audio).any()


def test_clips_are_real_segments(tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = read_corpus(tiny_corpus)
    segments = corpus.split("train", "de")
    short = short_clip(corpus, segments, 1.0)
    nearest = min(segments, key=lambda s: abs(s.duration_s - 1.0))
    assert short.segments == (nearest.id,)
    long = long_clip(corpus, segments, 6.0, 0.3)
    pauses_s = 0.3 * (len(long.segments) - 1)
    spoken_s = sum(s.duration_s for s in segments if s.id in long.segments)
    assert len(long.segments) > 2
    assert long.duration_s == pytest.approx(spoken_s + pauses_s, abs=0.01)
    assert 4.5 < long.duration_s <= 6.01
    assert soundfile.info(long.write(tmp_path)).duration == pytest.approx(long.duration_s)
