"""Compares two quality results: what changed, and is the difference more than chance."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import scoring
from halve.artefact import RECORD, Artefact, read
from halve.metrics import METRICS, retention

_SIGNIFICANT = 0.05
_SIZES = ("stored_bytes", "logical_parameters", "decoder_layers", "precision", "target")


def compare(
    first: scoring.ResultFiles,
    second: scoring.ResultFiles,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the models that both results have, on the segments that both scored.

    Models are paired by name; where no student's name is shared, the students are paired in order.
    The interval and p value come from the paired bootstrap of `halve.metrics.retention`, a second p
    value from approximate randomisation; significant is what both call so.

    Returns:
        segments: how many were compared; changed: settings that differ {key: [first, second]};
        models: one comparison a pair, each with its metrics' difference (second minus first),
        interval, p value and whether it is significant at 5 %. No models where the languages differ
        or no segment is shared, with the reason in `note`.
    """
    changed = _changed(_settings(first), _settings(second))
    places = _shared(first, second)
    note = ""
    if first.result["lang"] != second.result["lang"]:
        note = "the target languages differ"
    elif not places:
        note = "no segment is in both with the same reference"
    models = (
        []
        if note
        else [
            _compare_models(first, second, a, b, places, resamples, seed)
            for a, b in _pairs(first, second)
        ]
    )
    return {
        "segments": len(places),
        "resamples": resamples,
        "changed": changed,
        "models": models,
        "note": note,
    }


def _settings(files: scoring.ResultFiles) -> dict[str, Any]:
    result = files.result
    keys = ("lang", "split", "segments", "resamples", "seed")
    versions = {f"version of {name}": value for name, value in result.get("versions", {}).items()}
    beams = {"beams": result.get("beams", 1)}  # earlier results were all greedy
    return {key: result.get(key) for key in keys} | beams | versions | _on_record(files.path)


def _on_record(path: Path) -> dict[str, Any]:
    """What a result's record says beside it: segments of one id and reference may have other audio in another corpus."""
    if not (path / RECORD).is_file():
        return {}
    made = read(path)
    used = {key: made.recipe.get(key) for key in ("batch_size", "threads", "noise_db", "limit")}
    return {"corpus": str(made.parents.get("corpus", ""))[:12]} | used


def changed_recipes(first: Sequence[Artefact], second: Sequence[Artefact]) -> dict[str, list[Any]]:
    """Settings and seeds that differ between two runs' artefacts of the same kind and name, but for their benches."""
    others = {(one.kind, one.path.name): one for one in second}
    found: dict[str, list[Any]] = {}
    for one in first:
        other = others.get((one.kind, one.path.name))
        if other is not None and one.kind not in ("results", "report"):
            named = _changed(_made(one), _made(other))
            found |= {f"{one.path.name} {key}": values for key, values in named.items()}
    return found


def _made(one: Artefact) -> dict[str, Any]:
    facts: dict[str, Any] = {key: one.extra[key] for key in ("removed", "onto") if key in one.extra}
    return {**one.recipe, **facts, "seed": one.seed}


def _changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    keys = sorted({*first, *second})
    return {
        key: [first.get(key), second.get(key)] for key in keys if first.get(key) != second.get(key)
    }


def _shared(first: scoring.ResultFiles, second: scoring.ResultFiles) -> list[tuple[int, int]]:
    """Places of the segments that both scored against the same reference."""
    known = {name: place for place, name in enumerate(second.ids)}
    return [
        (place, known[name])
        for place, name in enumerate(first.ids)
        if name in known and first.references[place] == second.references[known[name]]
    ]


def _pairs(
    first: scoring.ResultFiles, second: scoring.ResultFiles
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = [(first.result["teacher"], second.result["teacher"])]
    students = {model["name"]: model for model in second.result["students"]}
    named = [
        (model, students[model["name"]])
        for model in first.result["students"]
        if model["name"] in students
    ]
    in_order = list(zip(first.result["students"], second.result["students"], strict=False))
    return pairs + (named or in_order)


def _of_segments(
    first: scoring.ResultFiles,
    second: scoring.ResultFiles,
    name: str,
    other: str,
    places: list[tuple[int, int]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Metrics that are means of segment scores, where both results have them of the same model that scores."""
    found = {}
    for metric in ("comet", "embedding_similarity"):
        kinds = [
            one.result["teacher"]["scores"].get(metric, {}).get("signature")
            for one in (first, second)
        ]
        if kinds[0] is None or kinds[0] != kinds[1]:
            continue
        one, two = (
            [float(line) for line in scoring.read_lines(files.path / metric / f"{of}.txt")]
            for files, of in ((first, name), (second, other))
        )
        numbers = scoring.mean_retention(
            [one[i] for i, _ in places], [two[j] for _, j in places], resamples=resamples, seed=seed
        )
        found[metric] = {
            "difference": numbers["difference"],
            "low": numbers["difference_low"],
            "high": numbers["difference_high"],
            "p_value": numbers["p_value"],
            "p_randomised": numbers["p_randomised"],
            "significant": max(numbers["p_value"], numbers["p_randomised"]) < _SIGNIFICANT,
        }
    return found


def _compare_models(
    first: scoring.ResultFiles,
    second: scoring.ResultFiles,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    places: list[tuple[int, int]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    of_a, of_b = first.hypotheses(a["name"]), second.hypotheses(b["name"])
    texts_a, texts_b = [of_a[i] for i, _ in places], [of_b[j] for _, j in places]
    references = [first.references[i] for i, _ in places]
    lang = str(first.result["lang"])
    metrics = {}
    for metric in METRICS:
        found = asdict(retention(metric, texts_a, texts_b, references, lang, resamples, seed))
        numbers = scoring.rounded(found)
        metrics[metric] = {
            "difference": numbers["difference"],
            "low": numbers["difference_low"],
            "high": numbers["difference_high"],
            "p_value": numbers["p_value"],
            "p_randomised": numbers["p_randomised"],
            "significant": texts_a != texts_b
            and max(numbers["p_value"], numbers["p_randomised"]) < _SIGNIFICANT,
        }
    metrics |= _of_segments(first, second, a["name"], b["name"], places, resamples, seed)
    return {
        "first": a["name"],
        "second": b["name"],
        "changed": _changed({k: a.get(k) for k in _SIZES}, {k: b.get(k) for k in _SIZES}),
        "texts_changed": sum(x != y for x, y in zip(texts_a, texts_b, strict=True)),
        "metrics": metrics,
    }
