"""Whether a quality result says what its own files say: no model, no audio.

    python -m benchmarks.recheck RESULT [RESULT…] [--intervals]

Scores, signatures, controls, noise, voices, and means of segment scores; with --intervals each retention with
its interval and p values as well, drawn again with the result's own seed (seconds to minutes a student).
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import conditions, scoring
from halve.errors import HalveError
from halve.metrics import METRICS, retention

TOLERANCE = 1e-4
INTERVAL_TOLERANCE = 1e-3
"""Of percentages and points: resamples are the same, sums are not to the last digit on every machine."""


def faults(
    path: str | Path, metrics: Iterable[str] = METRICS, *, intervals: bool = False
) -> list[str]:
    """Where a result differs from its own files, in words; empty when they agree.

    Args:
        metrics: of sacrebleu; means of segment scores (COMET, embedding similarity) are always checked.
        intervals: retentions, too.

    Raises:
        ArtefactError: a file is missing.
    """
    metrics = tuple(metrics)
    files = scoring.read_result(path)
    found = scoring.recompute_faults(path, TOLERANCE, metrics)
    found += conditions.faults(files, TOLERANCE, metrics)
    found += _means(files)
    if intervals:
        found += _retentions(files, metrics)
    return found


def _segment_scores(files: scoring.ResultFiles, metric: str, name: str) -> list[float]:
    return [float(line) for line in scoring.read_lines(files.path / metric / f"{name}.txt")]


def _means(files: scoring.ResultFiles) -> Iterator[str]:
    """Metrics that are the mean of what a model said of each segment."""
    for model in files.models:
        for metric in set(model["scores"]) - set(METRICS):
            own = _segment_scores(files, metric, model["name"])
            stated, computed = model["scores"][metric]["score"], sum(own) / len(own)
            if abs(stated - computed) > TOLERANCE:
                yield f"{model['name']} {metric}: {stated} stated, {computed:.6f} computed"


def _retentions(files: scoring.ResultFiles, metrics: Sequence[str]) -> Iterator[str]:
    teacher = str(files.result["teacher"]["name"])
    drawn = {key: int(files.result[key]) for key in ("resamples", "seed")}
    for student in files.result["students"]:
        name = str(student["name"])
        for metric, stated in student["retention"].items():
            if metric in METRICS and metric not in metrics:
                continue
            again = (
                _again(files, metric, teacher, name, drawn)
                if metric in METRICS
                else scoring.mean_retention(
                    _segment_scores(files, metric, teacher),
                    _segment_scores(files, metric, name),
                    resamples=drawn["resamples"],
                    seed=drawn["seed"],
                )
            )
            yield from _differences(f"{name} {metric}", stated, again)
        noisy = student.get("noisy", {}).get("retention", {})
        for metric in set(noisy) & set(metrics):
            pair = [f"{each}.{conditions.NOISE}" for each in (teacher, name)]
            again = _again(files, metric, pair[0], pair[1], drawn)
            yield from _differences(f"{name} {metric} with noise", noisy[metric], again)


def _again(
    files: scoring.ResultFiles, metric: str, teacher: str, student: str, drawn: Mapping[str, int]
) -> Mapping[str, Any]:
    return asdict(
        retention(
            metric,
            files.hypotheses(teacher),
            files.hypotheses(student),
            files.references,
            str(files.result["lang"]),
            drawn["resamples"],
            drawn["seed"],
        )
    )


def _differences(what: str, stated: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[str]:
    # Results of before version 0.2 state less.
    for key, value in stated.items():
        computed = again[key]
        is_same = (
            value == computed
            if value is None or computed is None
            else abs(value - computed) <= INTERVAL_TOLERANCE
        )
        if not is_same:
            yield f"{what}, {key}: {value} stated, {computed} computed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints each fault; exits with 1 where there is one, with 2 where a result cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", metavar="RESULT")
    parser.add_argument("--intervals", action="store_true", help="retentions, too")
    options = parser.parse_args(arguments)
    count = 0
    try:
        for result in options.results:
            for fault in faults(result, intervals=options.intervals):
                print(f"{result}: {fault}")
                count += 1
    except HalveError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(options.results)} results, {count} faults")
    return min(count, 1)


if __name__ == "__main__":
    raise SystemExit(main())
