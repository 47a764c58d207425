"""Corpus scores with signatures, their sufficient statistics, and quality retention with its interval.

sacrebleu computes everything; its per-segment statistics are what the bootstrap and the importance
search's bounds are made of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from halve.errors import InputError
from halve.languages import language

METRICS: dict[str, Callable[[str], Any]] = {
    "bleu": lambda lang: BLEU(tokenize=language(lang).bleu_tokenizer),
    "chrf": lambda lang: CHRF(word_order=0),
    "chrf++": lambda lang: CHRF(word_order=2),
    "ter": lambda lang: TER(asian_support=lang in ("zh", "ja"), normalized=lang in ("zh", "ja")),
}
LOWER_IS_BETTER = frozenset({"ter"})
KEPT_ROWS = 1 << 16
"""Statistics of translations that are kept: a result's are asked for whole, by voice and again for intervals (about 40 MB)."""


@dataclass(frozen=True)
class Score:
    """A corpus score and the signature that lets others repeat it."""

    metric: str
    score: float
    signature: str


@dataclass(frozen=True)
class Retention:
    """A student's score as a percentage of its teacher's, with a 95 % interval by paired bootstrap."""

    percent: float | None
    """None, as the interval's ends, where the teacher's score is 0 or, in COMET, below: of nothing there is no share."""
    low: float | None
    high: float | None
    difference: float
    """Student minus teacher, in points."""
    difference_low: float
    difference_high: float
    p_value: float
    """Two-sided, by the bootstrap: how often a resampled difference lies on the other side of zero."""
    p_randomised: float
    """Two-sided, by approximate randomisation (Riezler and Maxwell 2005)."""


@lru_cache
def _metric(name: str, lang: str) -> Any:
    if name not in METRICS:
        raise InputError(f"Unknown metric {name!r}", expected=f"one of {', '.join(METRICS)}")
    return METRICS[name](lang)


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not hypotheses:
        raise InputError(
            f"{len(hypotheses)} hypotheses for {len(references)} references",
            expected="as many of the one as of the other, and at least one",
        )


def score(metric: str, hypotheses: Sequence[str], references: Sequence[str], lang: str) -> Score:
    """The corpus-level score of `hypotheses` against one reference each.

    Raises:
        InputError: unknown metric, or lengths that differ.
    """
    sums = segment_statistics(metric, hypotheses, references, lang).sum(axis=0)
    return Score(metric, score_from_statistics(metric, sums, lang), signature(metric, lang))


@lru_cache
def signature(metric: str, lang: str) -> str:
    """What lets others repeat a score."""
    scorer = _metric(metric, lang)
    scorer.corpus_score(["-"], [["-"]])  # tells it how many references there are
    return str(scorer.get_signature())


def segment_statistics(
    metric: str, hypotheses: Sequence[str], references: Sequence[str], lang: str
) -> NDArray[np.float64]:
    """What each segment adds to the corpus score: shape (segments, statistics); sums are sufficient."""
    _check(hypotheses, references)
    pairs = zip(hypotheses, references, strict=True)
    rows = [_row(metric, lang, hypothesis, reference) for hypothesis, reference in pairs]
    return np.asarray(rows, dtype=np.float64)


@lru_cache(KEPT_ROWS)
def _row(metric: str, lang: str, hypothesis: str, reference: str) -> tuple[float, ...]:
    # sacrebleu's own significance tests are built on this method and on `_compute_score_from_stats`.
    (row,) = _metric(metric, lang)._extract_corpus_statistics([hypothesis], [[reference]])
    return tuple(row)


def score_from_statistics(metric: str, sums: NDArray[np.float64], lang: str) -> float:
    """The corpus score of summed statistics, shape (statistics,)."""
    scorer = _metric(metric, lang)
    return float(scorer._compute_score_from_stats([_number(value) for value in sums]).score)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def retention(
    metric: str,
    teacher_hypotheses: Sequence[str],
    student_hypotheses: Sequence[str],
    references: Sequence[str],
    lang: str,
    resamples: int = 1000,
    seed: int = 0,
) -> Retention:
    """The student's corpus score as a percentage of the teacher's (Koehn 2004, paired bootstrap).

    Both are scored on the same resampled segments; the interval holds the middle 95 % of the ratios. Samples
    in which the teacher scores 0 have none.
    """
    teacher = segment_statistics(metric, teacher_hypotheses, references, lang)
    student = segment_statistics(metric, student_hypotheses, references, lang)
    full = [score_from_statistics(metric, rows.sum(axis=0), lang) for rows in (teacher, student)]
    generator = np.random.default_rng(seed)
    ratios, differences = np.empty(resamples), np.empty(resamples)
    for index in range(resamples):
        chosen = generator.integers(0, len(references), len(references))
        of_teacher = score_from_statistics(metric, teacher[chosen].sum(axis=0), lang)
        of_student = score_from_statistics(metric, student[chosen].sum(axis=0), lang)
        ratios[index] = 100 * of_student / of_teacher if of_teacher else np.nan
        differences[index] = of_student - of_teacher
    kept = share(full[1], full[0], ratios)
    difference_low, difference_high = np.percentile(differences, [2.5, 97.5])
    side = min(float((differences <= 0).mean()), float((differences >= 0).mean()))
    if len(references) < 2:  # every resample is the one segment: nothing was tested
        side = 1.0
    return Retention(
        percent=kept[0],
        low=kept[1],
        high=kept[2],
        difference=full[1] - full[0],
        difference_low=float(difference_low),
        difference_high=float(difference_high),
        p_value=min(1.0, 2 * side),
        p_randomised=randomisation_p(metric, teacher, student, lang, resamples, seed),
    )


def share(
    student: float, teacher: float, ratios: NDArray[np.float64]
) -> tuple[float | None, float | None, float | None]:
    """The student's percentage, and the ends of the middle 95 % of the samples' (NaN where one has none)."""
    # A full score above 0 says that some segment counts; that no sample has it is next to impossible.
    if teacher <= 0 or np.isnan(ratios).all():
        return None, None, None
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return 100.0 * student / teacher, float(low), float(high)


def randomisation_p(
    metric: str,
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    lang: str,
    trials: int = 1000,
    seed: int = 0,
) -> float:
    """How often chance alone makes two systems differ so much (Riezler and Maxwell 2005).

    If the systems were equally good, which of them made which translation would not matter: each trial
    swaps the two translations of about half of the segments and scores both sides again.

    Args:
        first, second: the systems' `segment_statistics`, (segments, statistics) each.

    Returns:
        the two-sided p value, (as great differences + 1) / (trials + 1).
    """
    both = first.sum(axis=0) + second.sum(axis=0)

    def difference(of_first: NDArray[np.float64]) -> float:
        own = score_from_statistics(metric, of_first, lang)
        return abs(own - score_from_statistics(metric, both - of_first, lang))

    observed = difference(first.sum(axis=0))
    generator = np.random.default_rng(seed)
    as_great = 0
    for _ in range(trials):
        swapped = generator.random(len(first)) < 0.5
        drawn = np.where(swapped[:, None], second, first).sum(axis=0)
        as_great += difference(drawn) >= observed - 1e-12
    return (as_great + 1) / (trials + 1)
