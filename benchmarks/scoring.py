"""Scores of hypotheses, and the files beside a quality result from which anyone can compute them again.

A result keeps `ids.txt`, `sources.txt`, `references.txt` and `hypotheses/NAME.txt`, one segment a
line in one order. `recompute` scores those files alone: no model, no audio.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halve.errors import ArtefactError
from halve.json_files import read_json
from halve.metrics import (
    METRICS,
    retention,
    score,
    score_from_statistics,
    segment_statistics,
    share,
)

RESULT = "quality.json"
CONTROLS = ("shuffled_audio", "silence", "shuffled_text")
_DIGITS = 6
_REPEAT = re.compile(r"(.{2,32}?)\1{3,}")


def one_line(text: str) -> str:
    """The text with every run of white space, line ends among it, as one blank."""
    return " ".join(text.split())


def score_all(
    hypotheses: Sequence[str],
    references: Sequence[str],
    lang: str,
    metrics: Iterable[str] = METRICS,
) -> dict[str, dict[str, Any]]:
    """Corpus scores in every metric: {metric: {score, signature}}."""
    found = {}
    for metric in metrics:
        result = score(metric, hypotheses, references, lang)
        found[metric] = {"score": round(result.score, _DIGITS), "signature": result.signature}
    return found


def retention_all(
    teacher: Sequence[str],
    student: Sequence[str],
    references: Sequence[str],
    lang: str,
    *,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Quality retention in every metric: {metric: {percent, low, high, difference, …}}; see `Retention` for None."""
    return {
        metric: rounded(
            asdict(retention(metric, teacher, student, references, lang, resamples, seed))
        )
        for metric in METRICS
    }


def rounded(numbers: Mapping[str, float | None]) -> dict[str, Any]:
    """The numbers, if any, with six decimals: enough for any use, and the same text on every machine."""
    return {
        key: None if value is None else round(float(value), _DIGITS)
        for key, value in numbers.items()
    }


def kept_text(retention: Mapping[str, Any] | None) -> str:
    """Retention as tables show it: percent [low, high]; - where the teacher scored 0."""
    if not retention:
        return ""
    if retention["percent"] is None:
        return "-"
    return f"{retention['percent']:.1f} [{retention['low']:.1f}, {retention['high']:.1f}]"


def mean_retention(
    teacher: Sequence[float], student: Sequence[float], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Retention of a metric that is the mean of segment scores (COMET), by the same bootstrap."""
    of_teacher, of_student = np.asarray(teacher), np.asarray(student)
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, len(of_teacher), (resamples, len(of_teacher)))
    teacher_means, student_means = of_teacher[chosen].mean(axis=1), of_student[chosen].mean(axis=1)
    differences = student_means - teacher_means
    ratios = np.full(resamples, np.nan)
    np.divide(100 * student_means, teacher_means, out=ratios, where=teacher_means > 0)
    percent, low, high = share(of_student.mean(), of_teacher.mean(), ratios)
    difference_low, difference_high = np.percentile(differences, [2.5, 97.5])
    side = min(float((differences <= 0).mean()), float((differences >= 0).mean()))
    if len(of_teacher) < 2:  # every resample is the one segment: nothing was tested
        side = 1.0
    return rounded(
        {
            "percent": percent,
            "low": low,
            "high": high,
            "difference": of_student.mean() - of_teacher.mean(),
            "difference_low": difference_low,
            "difference_high": difference_high,
            "p_value": min(1.0, 2 * side),
            "p_randomised": _randomisation_p(of_student - of_teacher, resamples, seed),
        }
    )


def _randomisation_p(differences: NDArray[np.float64], trials: int, seed: int) -> float:
    """Approximate randomisation for a mean of segment scores: swapping a pair turns its sign."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (trials, len(differences)))
    observed = abs(differences.mean())
    as_great = int((abs((signs * differences).mean(axis=1)) >= observed - 1e-12).sum())
    return (as_great + 1) / (trials + 1)


def segment_scores(
    metric: str, hypotheses: Sequence[str], references: Sequence[str], lang: str
) -> list[float]:
    """Each segment's own score in a metric."""
    rows = segment_statistics(metric, hypotheses, references, lang)
    return [round(score_from_statistics(metric, row, lang), 2) for row in rows]


def behaviour(
    hypotheses: Sequence[str], references: Sequence[str], stopped: Mapping[str, str]
) -> dict[str, float]:
    """How a model goes wrong, as shares of all segments.

    Args:
        stopped: "limit" or "loop" by segment, for those that did not end by themselves.

    Returns:
        length_ratio_over_2: more than twice as many characters as the reference (hallucination);
        empty: nothing said; cut_at_limit: still going on at the token limit; loops: of those, the
        ones that ended in a repetition; repeats: wherever it stands, a unit of two or more characters said four times or
        more in a row, and not so in the reference.
    """
    count = len(references)
    pairs = list(zip(hypotheses, references, strict=True))
    loops = list(stopped.values()).count("loop")
    return rounded(
        {
            "length_ratio_over_2": sum(len(h) > 2 * len(r) for h, r in pairs) / count,
            "empty": sum(not h for h in hypotheses) / count,
            "cut_at_limit": len(stopped) / count,
            "loops": loops / count,
            "repeats": sum(bool(_REPEAT.search(h) and not _REPEAT.search(r)) for h, r in pairs)
            / count,
        }
    )


@dataclass(frozen=True)
class ResultFiles:
    """A quality result with the lines it scored."""

    path: Path
    result: dict[str, Any]
    ids: list[str]
    sources: list[str]
    references: list[str]

    @property
    def models(self) -> list[dict[str, Any]]:
        """The teacher's entry, then the students'."""
        return [self.result["teacher"], *self.result["students"]]

    def hypotheses(self, name: str) -> list[str]:
        """The translations of a model, or of a control ("NAME.silence"), one a segment."""
        return read_lines(self.path / "hypotheses" / f"{name}.txt")


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes one line a segment, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{one_line(text)}\n" for text in lines).encode("utf8"))


def read_lines(path: Path) -> list[str]:
    """Reads what `write_lines` wrote.

    Raises:
        ArtefactError: no such file.
    """
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file", mend="measure the result again")
    return path.read_bytes().decode("utf8").split("\n")[:-1]


def read_result(path: str | Path) -> ResultFiles:
    """Opens a quality result.

    Raises:
        ArtefactError: a file is missing.
    """
    path = Path(path)
    return ResultFiles(
        path=path,
        result=read_json(path / RESULT),
        ids=read_lines(path / "ids.txt"),
        sources=read_lines(path / "sources.txt"),
        references=read_lines(path / "references.txt"),
    )


def recompute(
    path: str | Path, metrics: Iterable[str] = METRICS
) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores a result's hypotheses again from its files: {name: {metric: {score, signature}}}.

    Controls are named "NAME.shuffled_audio" and "NAME.silence".
    """
    files = read_result(path)
    names = [str(model["name"]) for model in files.models]
    teacher = files.result["teacher"]
    names += [f"{teacher['name']}.{control}" for control in teacher.get("controls", {})]
    lang = str(files.result["lang"])
    chosen = tuple(metrics)
    return {
        name: score_all(files.hypotheses(name), files.references, lang, chosen) for name in names
    }


def recompute_faults(
    path: str | Path, tolerance: float = 1e-4, metrics: Iterable[str] = METRICS
) -> list[str]:
    """Where a result's scores in some metrics differ from those of its own files; empty when they agree."""
    files = read_result(path)
    again = recompute(path, metrics)
    faults = []
    for model in files.models:
        for metric, entry in again[model["name"]].items():
            stated = model["scores"][metric]
            if abs(stated["score"] - entry["score"]) > tolerance:
                faults.append(
                    f"{model['name']} {metric}: {stated['score']} stated, {entry['score']} computed"
                )
            if stated["signature"] != entry["signature"]:
                faults.append(f"{model['name']} {metric}: signature {entry['signature']} computed")
    teacher = files.result["teacher"]
    for control, scores in teacher.get("controls", {}).items():
        for metric, entry in again[f"{teacher['name']}.{control}"].items():
            value, computed = scores[metric], entry["score"]
            if abs(value - computed) > tolerance:
                faults.append(f"{control} {metric}: {value} stated, {computed} computed")
    return faults
