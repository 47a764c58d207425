"""Scores under other conditions: with noise, and apart for voices that the corpus trains on and those it does not."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import scoring
from benchmarks.tables import METRIC_TITLES, Table
from benchmarks.workload import FloatArray
from halve.corpus import Corpus, Segment
from halve.languages import language
from halve.metrics import METRICS

NOISE = "noise"
"""The hypotheses made from noisy audio stand in NAME.noise.txt."""
VOICES = "voices.txt"
_TRAINED, _UNTRAINED = "trained", "untrained"
_LEAST = 2
"""Segments that a corpus score needs."""


def with_noise(samples: FloatArray, snr_db: float, name: str) -> FloatArray:
    """The clip with pink noise, whose power falls by 3 dB an octave, like that of many real surroundings.

    Args:
        samples: mono audio.
        snr_db: signal-to-noise ratio over the whole clip in dB.
        name: draws the noise: the same for the same name, on every machine.

    Returns:
        the sum, same length; it may exceed 1, which is not clipped. A silent clip stays silent.
    """
    power = float(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0
    if power == 0.0:
        return samples
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    white = np.fft.rfft(np.random.default_rng(seed).standard_normal(len(samples)))
    pink = np.fft.irfft(white / np.sqrt(np.maximum(np.arange(len(white)), 1)), len(samples))
    pink *= np.sqrt(power / 10 ** (snr_db / 10) / np.mean(np.square(pink)))
    return (samples + pink).astype(np.float32)


def voices(corpus: Corpus, segments: Sequence[Segment]) -> list[str]:
    """For each segment whether its voice (manifest key `voice`) is one of `train`'s.

    Returns:
        "trained" or "untrained"; empty if a segment has no voice or the corpus carries no training segments.
    """
    trained = {
        s.extra["voice"] for s in corpus.segments if s.split == "train" and s.extra.get("voice")
    }
    if not trained or not all(segment.extra.get("voice") for segment in segments):
        return []
    return [_TRAINED if s.extra["voice"] in trained else _UNTRAINED for s in segments]


def by_voice(
    texts: Sequence[str],
    references: Sequence[str],
    heard: Sequence[str],
    lang: str,
    metrics: Iterable[str] = METRICS,
) -> dict[str, dict[str, Any]]:
    """Corpus scores of either kind of voice: {kind: {segments, metric: score, …}}."""
    found: dict[str, dict[str, Any]] = {}
    for kind in (_TRAINED, _UNTRAINED):
        places = [place for place, voice in enumerate(heard) if voice == kind]
        if len(places) < _LEAST:
            continue
        scores = scoring.score_all(
            [texts[p] for p in places], [references[p] for p in places], lang, metrics
        )
        found[kind] = {"segments": len(places)} | {m: s["score"] for m, s in scores.items()}
    return found


def faults(
    files: scoring.ResultFiles, tolerance: float = 1e-4, metrics: Iterable[str] = METRICS
) -> list[str]:
    """Where what a result says of noise and voices, in some metrics, differs from its own files; empty when they agree."""
    lang, found, metrics = str(files.result["lang"]), [], tuple(metrics)
    for model in files.models:
        stated, again = {}, {}
        if "noisy" in model:
            stated["noise"] = model["noisy"]["scores"]
            texts = files.hypotheses(f"{model['name']}.{NOISE}")
            scores = scoring.score_all(texts, files.references, lang, metrics)
            again["noise"] = {metric: score["score"] for metric, score in scores.items()}
        if "by_voice" in model:
            stated |= model["by_voice"]
            heard = scoring.read_lines(files.path / VOICES)
            texts = files.hypotheses(model["name"])
            again |= by_voice(texts, files.references, heard, lang, metrics)
        found += [
            f"{model['name']}, {kind}, {metric}: {values[metric]} stated, {computed} computed"
            for kind, values in stated.items()
            for metric, computed in again[kind].items()
            if abs(values[metric] - computed) > tolerance
        ]
    return found


def conditions_table(result: Mapping[str, Any]) -> Table | None:
    """The selection metric's score of each model with noise and by voice."""
    metric = language(result["lang"]).selection_metric
    models = [result["teacher"], *result["students"]]
    if not any(key in model for model in models for key in ("noisy", "by_voice")):
        return None
    titles, columns = ["all"], [[m["scores"][metric]["score"] for m in models]]
    kinds = {_TRAINED: "voices in train", _UNTRAINED: "other voices"}
    for kind, title in kinds.items():
        parts = [model.get("by_voice", {}).get(kind) for model in models]
        if all(parts):
            titles.append(f"{title} ({parts[0]['segments']})")
            columns.append([part[metric] for part in parts])
    if noisy := [model["noisy"] for model in models if "noisy" in model]:
        titles.append(f"pink noise, {noisy[0]['snr_db']:g} dB")
        # A model that reads hears none.
        columns.append([model.get("noisy", {}).get("scores", {}).get(metric) for model in models])
    rows = [
        [
            model["name"],
            *("-" if column[place] is None else f"{column[place]:.2f}" for column in columns),
        ]
        for place, model in enumerate(models)
    ]
    return Table(f"{METRIC_TITLES[metric]} by condition", ["model", *titles], rows)


def noisy_entry(
    texts: Sequence[str],
    teacher: Sequence[str] | None,
    references: Sequence[str],
    lang: str,
    snr_db: float,
    drawn: Mapping[str, int],
) -> dict[str, Any]:
    """Scores on noisy audio, and how much of the teacher's on the same audio a student keeps."""
    scores = scoring.score_all(texts, references, lang)
    entry: dict[str, Any] = {"snr_db": snr_db, "noise": "pink"}
    entry["scores"] = {metric: scores[metric]["score"] for metric in METRICS}
    if teacher is not None:
        entry["retention"] = scoring.retention_all(
            teacher, texts, references, lang, resamples=drawn["resamples"], seed=drawn["seed"]
        )
    return entry
