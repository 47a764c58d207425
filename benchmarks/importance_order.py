"""Compares whole searches: do the fast methods, and the cheap criteria, remove the same layers?

Every method searches the same segments for the same number of removals. What `reference` translated is
compared with `exact` segment by segment; the cheap criteria are judged by the score of the model that
they leave. `reference` may take hours: each finished candidate is kept, and a killed run goes on.

    python -m benchmarks.importance_order --model demo/teacher --corpus demo/corpus --lang de
        --remove 6 --segments 40 --out runs/importance-order-de
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.importance import token_differences
from compress.config import ImportanceConfig
from compress.criteria import blind, by_loss, by_similarity
from compress.exact import ExactTranslator
from compress.importance import by_translation, make_task
from compress.search import Candidate, Ledger, Ranking
from compress.task import SearchTask
from halve import environment
from halve.artefact import Artefact, Draft, read, writing
from halve.corpus import read_corpus
from halve.json_files import write_json
from halve.languages import language
from halve.models import SpeechModel, load_model
from halve.progress import SILENT

SEARCHES = ("reference", "exact", "bounded", "racing")
CRITERIA = ("loss", "block-influence", "angular", "middle", "random")
RESULT = "order.json"


def compare_orders(
    model: Path,
    corpus: Path,
    out: Path,
    *,
    lang: str,
    remove: int,
    segments: int | None,
    reference_ledger: Path | None = None,
) -> Artefact:
    """Runs every method and writes order.json.

    Args:
        segments: so many `select` segments, evenly spaced; all where not given.
        reference_ledger: the ledger of a `reference` search of the same model, segments and language,
            which is then gone on with.

    Raises:
        InputError: unknown language.
        CorpusError: no such segments.
    """
    heard = read_corpus(corpus)
    recipe = {"bench": "importance-order", "lang": lang, "remove": remove, "segments": segments}
    parents = {"model": model, "corpus": corpus}
    with writing(out, "results", recipe, 0, parents) as draft:
        store = draft.work / "reference.jsonl"
        if reference_ledger is not None and not store.exists():
            shutil.copyfile(reference_ledger, store)
        speech = load_model(model)
        chosen = heard.split("select", lang, segments)
        task = make_task(speech, heard, chosen, lang, language(lang).selection_metric)
        write_json(draft.path / RESULT, _compared(speech, task, remove, draft))
        draft.extra.update(bench="importance-order", lang=lang)
    return read(out)


def _compared(speech: SpeechModel, task: SearchTask, remove: int, draft: Draft) -> dict[str, Any]:
    """What order.json holds."""
    searches = {method: _search(method, speech, task, remove, draft) for method in SEARCHES}
    reference, exact = searches["reference"], searches["exact"]
    differences = _differences(speech, task, reference, exact, draft.work)
    return {
        "lang": task.lang,
        "metric": task.metric,
        "signature": exact.signature,
        "segments": list(task.ids),
        "remove": remove,
        "machine": environment.machine(),
        "versions": environment.versions(),
        "baseline": exact.baseline,
        "searches": {
            method: {
                "removed": list(ranking.removed),
                "same_order": ranking.removed == reference.removed,
                "stopped_early": sum("settled" in one.facts for one in ranking.candidates),
                "candidates": [_line(candidate) for candidate in ranking.candidates],
            }
            for method, ranking in searches.items()
        },
        "max_score_difference": _largest_difference(reference, exact),
        "translations_compared": len(task.ids) * len(reference.candidates),
        "differences": differences,
        "criteria": _criteria(speech, task, exact, remove, draft),
    }


def _line(candidate: Candidate) -> dict[str, Any]:
    return {
        "round": candidate.round,
        "layer": candidate.layer,
        "score": candidate.score,
        **candidate.facts,
    }


def _search(
    method: str, speech: SpeechModel, task: SearchTask, remove: int, draft: Draft
) -> Ranking:
    config = ImportanceConfig.model_validate(
        {"remove": remove, "lang": task.lang, "method": method}
    )
    return by_translation(config, speech, task, Ledger(draft.work / f"{method}.jsonl"))


def _largest_difference(reference: Ranking, exact: Ranking) -> float:
    """Of any candidate's score, over the rounds that both searched."""
    wanted = {(one.round, one.layer): one.score for one in reference.candidates}
    found = {(one.round, one.layer): one.score for one in exact.candidates}
    return max(abs(wanted[key] - found[key]) for key in wanted.keys() & found.keys())


def _differences(
    speech: SpeechModel, task: SearchTask, reference: Ranking, exact: Ranking, work: Path
) -> list[dict[str, Any]]:
    """The translations that differ in the rounds whose parents are the same in both searches."""
    num_layers = len(speech.part(speech.family.layers))
    ledgers = {name: Ledger(work / f"{name}.jsonl") for name in ("reference", "exact")}
    listed = []
    for candidate in exact.candidates:
        before = exact.removed[: candidate.round - 1]
        if before != reference.removed[: candidate.round - 1]:
            continue
        without = {*before, candidate.layer}
        kept = [layer for layer in range(num_layers) if layer not in without]
        wanted, found = (
            _tokens(ledgers[name], candidate, len(task.ids)) for name in ("reference", "exact")
        )
        listed += [
            {"round": candidate.round, "layer": candidate.layer, **difference}
            for difference in token_differences(speech, task, kept, wanted, found)
        ]
    return listed


def _tokens(ledger: Ledger, candidate: Candidate, count: int) -> list[list[int]]:
    """A candidate's translations by segment."""
    rows: list[list[int]] = [[] for _ in range(count)]
    for index, chunk in enumerate(ledger.chunks(list)):
        for row, tokens in zip(chunk, ledger[candidate.round, candidate.layer, index], strict=True):
            rows[row] = tokens
    return rows


def _criteria(
    speech: SpeechModel, task: SearchTask, exact: Ranking, remove: int, draft: Draft
) -> dict[str, Any]:
    """What the cheap criteria remove, how much of it `exact` removes too, and the score that is left."""
    num_layers = len(speech.part(speech.family.layers))
    orders: dict[str, Sequence[int]] = {"exact": exact.removed}
    for method in CRITERIA:
        orders[method] = _by_criterion(method, speech, task, remove, num_layers, draft).removed
    scores = _scores_without(speech, task, orders, num_layers)
    return {
        method: {
            "removed": list(removed),
            "shared_with_exact": len(set(removed) & set(exact.removed)),
            "score": scores[method],
        }
        for method, removed in orders.items()
    }


def _by_criterion(
    method: str,
    speech: SpeechModel,
    task: SearchTask,
    remove: int,
    num_layers: int,
    draft: Draft,
) -> Ranking:
    if method in ("middle", "random"):
        return blind(method, num_layers, remove, 0)
    if method == "loss":
        return by_loss(speech, task, remove, Ledger(draft.work / "loss.jsonl"), SILENT)
    return by_similarity(method, speech, task, remove, SILENT)


def _scores_without(
    speech: SpeechModel,
    task: SearchTask,
    orders: Mapping[str, Sequence[int]],
    num_layers: int,
) -> dict[str, float]:
    """The score of the model without each of some sets of layers."""
    rows = range(len(task.ids))
    scores = {}
    with ExactTranslator(speech, task) as translator:
        for method, removed in orders.items():
            kept = [layer for layer in range(num_layers) if layer not in removed]
            (found,) = translator.run(kept, [[] for _ in rows], [[None]], rows)
            scores[method] = task.score(found[None]).score
    return scores


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--lang", required=True)
    parser.add_argument("--remove", type=int, default=6)
    parser.add_argument("--segments", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--reference-ledger", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.threads is not None:
        environment.pin_threads(asked.threads)
    made = compare_orders(
        asked.model,
        asked.corpus,
        asked.out,
        lang=asked.lang,
        remove=asked.remove,
        segments=asked.segments,
        reference_ledger=asked.reference_ledger,
    )
    print(made.path / RESULT)


if __name__ == "__main__":
    main()
