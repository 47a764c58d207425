"""`halve bench importance`: one round of the layer-importance search, as the paper does it and as halve does.

Three runs of the same round, in one process, precision and number of threads: `reference` (each
candidate a deep copy of the model, each segment through the stock processor and stock `generate`), the
stock loop (the same without the copy: is the reference a fair one?), and `exact`, which also has to encode
the audio and translate with the whole model first. Every difference in tokens is looked into.
"""

import json
import lzma
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.config import ImportanceBenchConfig
from compress.config import ImportanceConfig
from compress.importance import by_translation, make_task
from compress.reference import StockTranslator, only_layers
from compress.search import Ledger, Ranking, removable
from compress.task import SearchTask
from export import parity
from halve import environment, metrics
from halve.artefact import Artefact, Draft, read, writing
from halve.corpus import read_corpus
from halve.json_files import append_jsonl, read_jsonl, write_json
from halve.languages import language
from halve.models import SpeechModel, load_model, read_config, resolve_model
from halve.progress import SILENT, Progress
from halve.sources import asked
from halve.stock import generating, greedy_config
from halve.translate import TorchTranslator

RESULT = "importance.json"
MOST_NEAR_TIES = 0.01
"""Of all translations of all candidates."""
MOST_POINTS = 0.01
"""Scores without the segments of near ties may differ by so much."""
Tokens = list[list[int]]


@dataclass(frozen=True)
class Side:
    """One way of running the round."""

    seconds: float
    tokens: dict[int, Tokens]
    """Each candidate's tokens, by layer."""


def run_importance_bench(
    config: ImportanceBenchConfig,
    model: str | Path,
    corpus: Path,
    out: Path,
    progress: Progress = SILENT,
) -> Artefact:
    """Times one round of each method and compares their tokens, scores and order.

    Writes importance.json and the hypotheses beside it. A killed run keeps the candidates that it has
    timed; `exact` and the methods of `also` are always timed whole.

    Raises:
        InputError: unknown language.
        CorpusError: no such segments.
    """
    model = resolve_model(model)
    heard = read_corpus(corpus)
    segments = heard.split("select", config.lang, config.segments)
    if config.threads is not None:
        environment.pin_threads(config.threads)
    parents = {"model": model, "corpus": Path(corpus)}
    settings = config.recorded() | environment.measured_on()
    with writing(Path(out), "results", settings, 0, parents) as draft:
        speech = load_model(model, dtype=config.dtype)
        metric = language(config.lang).selection_metric
        task = make_task(speech, heard, segments, config.lang, metric)
        num_layers = len(speech.part(speech.family.layers))
        stay = speech.family.must_stay(read_config(model))
        layers = removable(range(num_layers), num_layers, stay)
        _warm_up(speech, task)
        with progress.task("importance bench", 2 * len(layers) + 1 + len(config.also)) as advance:
            sides = {
                name: _one_by_one(name, speech, task, layers, draft, advance)
                for name in ("reference", "stock_loop")
            }
            for method in ("exact", *config.also):
                sides[method] = _searched(method, config, speech, task, draft)
                advance(note=method)
        result = _result(config, speech, task, sides)
        result["faithful"] = is_faithful(result)
        if not result["faithful"]:
            progress.message("exact is not the reference's: see differences, near_ties and scores")
        write_json(draft.path / RESULT, result)
        for name, side in sides.items():
            _write_hypotheses(draft.path / f"{name}.jsonl.xz", task, side)
        draft.extra.update(bench="importance", lang=config.lang)
    return read(out)


def _warm_up(speech: SpeechModel, task: SearchTask) -> None:
    """The first pass through the stock code pays for what later ones do not."""
    StockTranslator(speech, task, deep_copy=False).translate(speech.model, 0)


def _one_by_one(
    name: str,
    speech: SpeechModel,
    task: SearchTask,
    layers: Sequence[int],
    draft: Draft,
    advance: Any,
) -> Side:
    """The reference or the stock loop, candidate by candidate; finished ones are not run again."""
    store = draft.work / f"{name}.jsonl"
    done = {record["layer"]: record for record in read_jsonl(store)}
    for layer in layers:
        if layer not in done:
            started = time.perf_counter()
            tokens = _candidate(name, speech, task, layer)
            seconds = time.perf_counter() - started
            done[layer] = {"layer": layer, "seconds": seconds, "tokens": tokens}
            append_jsonl(store, done[layer])
        advance(note=f"{name}, without layer {layer}")
    seconds = sum(done[layer]["seconds"] for layer in layers)
    draft.timing(name, seconds, threads=environment.threads())
    return Side(seconds, {layer: done[layer]["tokens"] for layer in layers})


def _candidate(name: str, speech: SpeechModel, task: SearchTask, layer: int) -> Tokens:
    num_layers = len(speech.part(speech.family.layers))
    kept = [other for other in range(num_layers) if other != layer]
    if name == "reference":
        translator = StockTranslator(speech, task)
        (found,) = translator.run(range(num_layers), [], [[layer]], range(len(task.ids)))
        return found[layer]
    with only_layers(speech.model, speech.family, kept):
        return list(stock_loop(speech, task))


def stock_loop(speech: SpeechModel, task: SearchTask) -> Iterator[list[int]]:
    """What one would write with transformers alone: processor and `generate`, a segment at a time."""
    family, dtype = speech.family, getattr(torch, speech.dtype)
    for source, limit in zip(task.audio, task.limits, strict=True):
        instruction = asked(family, task.lang, source)
        inputs = family.stock_inputs(speech.processor, source, instruction, dtype)
        inputs = {key: value.to(speech.device) for key, value in inputs.items()}
        settings = greedy_config(family, speech.model, limit)
        with torch.inference_mode(), generating(speech.model, settings):
            tokens = family.stock_generate(speech.model, inputs)
        yield tokens


def _searched(
    method: str, config: ImportanceBenchConfig, speech: SpeechModel, task: SearchTask, draft: Draft
) -> Side:
    """One round by one of halve's own methods, from nothing: audio, whole model, every candidate."""
    path = draft.work / f"{method}-ledger.jsonl"
    path.unlink(missing_ok=True)
    settings = ImportanceConfig.model_validate(
        {
            "remove": 1,
            "lang": config.lang,
            "method": method,
            "dtype": config.dtype,
            "memory_gb": config.memory_gb,
        }
    )
    ledger = Ledger(path)
    started = time.perf_counter()
    ranking = by_translation(settings, speech, task, ledger)
    seconds = time.perf_counter() - started
    draft.timing(method, seconds, threads=environment.threads())
    return Side(seconds, _complete(ledger, ranking, task))


def _complete(ledger: Ledger, ranking: Ranking, task: SearchTask) -> dict[int, Tokens]:
    """The tokens of the candidates that were translated in full."""
    chunks = ledger.chunks(list)
    found: dict[int, Tokens] = {}
    for candidate in ranking.candidates:
        if "settled" in candidate.facts:
            continue
        rows: Tokens = [[] for _ in task.ids]
        for index, chunk in enumerate(chunks):
            for row, tokens in zip(chunk, ledger[1, candidate.layer, index], strict=True):
                rows[row] = tokens
        found[candidate.layer] = rows
    return found


def _result(
    config: ImportanceBenchConfig, speech: SpeechModel, task: SearchTask, sides: Mapping[str, Side]
) -> dict[str, Any]:
    """The object that `--json` prints."""
    reference, exact = sides["reference"], sides["exact"]
    differences = _differences(speech, task, reference.tokens, exact.tokens)
    ties = [found for found in differences if found["gap"] < config.tie_gap]
    scores = {name: _scores(task, side.tokens) for name, side in sides.items()}
    unlike = {found["id"] for found in ties}
    steady = [row for row, name in enumerate(task.ids) if name not in unlike]
    rest = {name: _scores(task, sides[name].tokens, steady) for name in ("reference", "exact")}
    same = _order(scores["reference"]) == _order(scores["exact"])
    return {
        "lang": task.lang,
        "metric": task.metric,
        "segments": len(task.ids),
        "candidates": len(reference.tokens),
        "dtype": config.dtype,
        "threads": environment.threads(),
        "device": speech.device,
        "machine": environment.machine(),
        "versions": environment.versions(),
        "reference_s": reference.seconds,
        "stock_loop_s": sides["stock_loop"].seconds,
        "exact_s": exact.seconds,
        "ratio": reference.seconds / exact.seconds,
        "stock_loop_ratio": sides["stock_loop"].seconds / exact.seconds,
        "reference_to_stock_loop": reference.seconds / sides["stock_loop"].seconds,
        "same_order": same,
        "same_order_without_near_ties": _order(rest["reference"]) == _order(rest["exact"]),
        "near_tie_segments": len(ties),
        "near_tie_share": len(ties) / (len(task.ids) * len(reference.tokens)),
        "near_ties": ties,
        "differences": [found for found in differences if found["gap"] >= config.tie_gap],
        "max_score_difference": max(
            (abs(rest["reference"][layer] - score) for layer, score in rest["exact"].items()),
            default=0.0,
        ),
        "order": _order(scores["reference"]),
        "scores": scores,
        "signature": metrics.score(
            task.metric, task.references, task.references, task.lang
        ).signature,
        "also": {
            method: {
                "seconds": sides[method].seconds,
                "ratio": reference.seconds / sides[method].seconds,
                "same_winner": _order(scores[method])[:1] == _order(scores["reference"])[:1],
            }
            for method in config.also
        },
    }


def is_faithful(result: Mapping[str, Any]) -> bool:
    """Whether `exact` says what the reference says, but for at most 1 % of translations that part at a near tie."""
    return bool(
        not result["differences"]
        and result["near_tie_share"] <= MOST_NEAR_TIES
        and result["max_score_difference"] <= MOST_POINTS
        and result["same_order_without_near_ties"]
    )


def _scores(
    task: SearchTask, tokens: Mapping[int, Tokens], rows: Sequence[int] | None = None
) -> dict[int, float]:
    """Each candidate's corpus score, on some of the segments where they are given."""
    chosen = range(len(task.ids)) if rows is None else rows
    references = [task.references[row] for row in chosen]
    if not references:
        return dict.fromkeys(tokens, 0.0)
    return {
        layer: metrics.score(
            task.metric, task.texts([found[row] for row in chosen]), references, task.lang
        ).score
        for layer, found in tokens.items()
    }


def _order(scores: Mapping[int, float]) -> list[int]:
    """Candidates from the best to the worst; the lower layer of equals first."""
    return sorted(scores, key=lambda layer: (-scores[layer], layer))


def _differences(
    speech: SpeechModel, task: SearchTask, wanted: Mapping[int, Tokens], found: Mapping[int, Tokens]
) -> list[dict[str, Any]]:
    """Every translation that differs, over all candidates."""
    num_layers = len(speech.part(speech.family.layers))
    return [
        {"layer": layer, **difference}
        for layer, rows in found.items()
        for difference in token_differences(
            speech,
            task,
            [other for other in range(num_layers) if other != layer],
            wanted[layer],
            rows,
        )
    ]


def token_differences(
    speech: SpeechModel, task: SearchTask, kept: Sequence[int], wanted: Tokens, found: Tokens
) -> list[dict[str, Any]]:
    """One candidate's translations that differ from the reference's.

    Returns:
        for each, the segment, the first token that differs, and the gap there of the reference's best
        two logits.
    """
    listed = []
    for row, (own, theirs) in enumerate(zip(found, wanted, strict=True)):
        if own == theirs:
            continue
        place = next(
            (i for i, pair in enumerate(zip(own, theirs, strict=False)) if pair[0] != pair[1]),
            min(len(own), len(theirs)),
        )
        gap = top_two_gap(speech, task, kept, row, theirs[:place])
        listed.append({"id": task.ids[row], "position": place, "gap": gap})
    return listed


def top_two_gap(
    speech: SpeechModel, task: SearchTask, kept: Sequence[int], row: int, before: Sequence[int]
) -> float:
    """The gap of the best two logits after `before`, of what the model with the `kept` layers may say there."""
    with only_layers(speech.model, speech.family, kept):
        return parity.top_two_gap(TorchTranslator(speech), task.audio[row], task.lang, before)


def _write_hypotheses(path: Path, task: SearchTask, side: Side) -> None:
    """One line a candidate and segment, beside its reference; the same bytes for the same content."""
    lines = [
        {"layer": layer, "id": name, "hypothesis": text, "reference": reference, "tokens": tokens}
        for layer, found in sorted(side.tokens.items())
        for name, text, reference, tokens in zip(
            task.ids, task.texts(found), task.references, found, strict=True
        )
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_bytes(lzma.compress(text.encode("utf8"), preset=9))
