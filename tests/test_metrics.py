"""Golden scores with their signatures, and intervals that mean something."""

import numpy as np
import pytest

from halve import metrics
from halve.errors import InputError

HYPOTHESES = [
    "Öffnen Sie die Datei im Menü.",
    "Wählen Sie eine Tabelle aus.",
    "Der Text wird gelöscht.",
]
REFERENCES = [
    "Öffnen Sie die Datei über das Menü.",
    "Wählen Sie die Tabelle aus.",
    "Der Text wird gelöscht.",
]
GOLDEN = {
    "bleu": (54.31, "tok:13a"),
    "chrf": (78.94, "nc:6|nw:0"),
    "chrf++": (78.55, "nc:6|nw:2"),
    "ter": (18.75, "tok:tercom"),
}


@pytest.mark.parametrize("metric", list(metrics.METRICS))
def test_golden_scores(metric: str) -> None:
    found = metrics.score(metric, HYPOTHESES, REFERENCES, "de")
    value, signature = GOLDEN[metric]
    assert found.score == pytest.approx(value, abs=0.005)
    assert signature in found.signature
    assert "version:2.6.0" in found.signature


@pytest.mark.parametrize("metric", list(metrics.METRICS))
def test_statistics_sum_to_the_corpus_score(metric: str) -> None:
    rows = metrics.segment_statistics(metric, HYPOTHESES, REFERENCES, "de")
    summed = metrics.score_from_statistics(metric, rows.sum(axis=0), "de")
    assert summed == pytest.approx(metrics.score(metric, HYPOTHESES, REFERENCES, "de").score)


def test_chinese_bleu_needs_no_spaces() -> None:
    found = metrics.score("bleu", ["打开这个文件菜单"], ["打开这个文件菜单"], "zh")
    assert found.score == pytest.approx(100)
    assert "tok:zh" in found.signature


def test_equal_systems_retain_everything() -> None:
    kept = metrics.retention("chrf++", HYPOTHESES, HYPOTHESES, REFERENCES, "de", resamples=100)
    assert (kept.percent, kept.low, kept.high, kept.difference) == (100, 100, 100, 0)
    assert kept.p_value == 1


def test_the_interval_covers_and_the_seed_repeats() -> None:
    generator = np.random.default_rng(1)
    references = [" ".join(generator.choice(list("abcdefgh"), 8)) for _ in range(80)]
    teacher = [reference[:12] for reference in references]
    student = [reference[:9] for reference in references]
    kept = metrics.retention("chrf", teacher, student, references, "de", resamples=300, seed=5)
    again = metrics.retention("chrf", teacher, student, references, "de", resamples=300, seed=5)
    assert kept == again
    assert kept.low <= kept.percent <= kept.high < 100
    assert kept.p_value < 0.05


def test_bad_calls_are_refused() -> None:
    with pytest.raises(InputError, match="Unknown metric"):
        metrics.score("rouge", HYPOTHESES, REFERENCES, "de")
    with pytest.raises(InputError, match="hypotheses for"):
        metrics.score("bleu", HYPOTHESES[:2], REFERENCES, "de")


def test_one_segment_tells_nothing_from_chance() -> None:
    found = metrics.retention(
        "chrf++", ["Öffnen Sie die Datei."], ["Datei"], ["Öffnen Sie die Datei."], "de"
    )
    assert found.percent is not None and found.percent < 100
    assert (found.p_value, found.p_randomised) == (1.0, 1.0)


def test_randomisation_agrees_with_the_bootstrap() -> None:
    references = [
        f"der {noun} steht im Haus und wartet" for noun in ["Hund", "Mann", "Baum", "Stuhl"]
    ] * 8
    worse = [text.replace("steht", "liegt") if i % 3 else text for i, text in enumerate(references)]
    clear = metrics.retention("chrf++", references, worse, references, "de", resamples=200)
    assert clear.p_randomised == pytest.approx(1 / 201)
    # Each side has the same faults elsewhere: nothing to choose between them.
    mirrored = [
        text.replace("steht", "liegt") if i % 2 else text for i, text in enumerate(references)
    ]
    other = [text if i % 2 else text.replace("steht", "liegt") for i, text in enumerate(references)]
    even = metrics.retention("chrf++", mirrored, other, references, "de", resamples=200)
    assert even.p_randomised > 0.5
    same = metrics.retention("chrf++", worse, worse, references, "de", resamples=100)
    assert same.p_randomised == 1
