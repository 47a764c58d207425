"""Layer importance: which decoder layers a model can best do without, and the plan to remove them.

Ranks on the corpus's `select` split. The paper's search (Moslem 2025, arXiv 2505.20237) is method
`reference`; `exact` makes the same decisions faster; the others trade certainty for time.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config import ImportanceConfig
from halve import artefact, environment, metrics
from halve.artefact import Artefact, Draft
from halve.corpus import Corpus, Segment, read_corpus
from halve.errors import InputError
from halve.families import Family, family_for
from halve.languages import language, token_limit
from halve.models import SpeechModel, load_model, read_config, resolve_model
from halve.progress import SILENT, Progress

if TYPE_CHECKING:
    from compress.search import CandidateTranslator, Ledger, Ranking
    from compress.task import SearchTask

DEFAULT_BUDGET = 0.4
"""Share of the device's memory that a search without a stated budget may take for its caches."""


def run_importance(
    config: ImportanceConfig, model: Path, corpus: Path, out: Path, progress: Progress = SILENT
) -> Artefact:
    """Ranks decoder layers and writes importance.jsonl and plan.json.

    Raises:
        InputError: unknown language or metric, a split that must not be ranked on, or more layers to
            remove than can go.
        CorpusError: no such segments.
    """
    model = resolve_model(model)
    teacher = read_config(model)
    family = family_for(teacher)
    num_layers = family.num_layers(teacher)
    metric = check_config(config, num_layers)
    heard = read_corpus(corpus)
    segments = heard.split(config.split, config.lang, config.segments)
    parents = {"model": model, "corpus": Path(corpus)}
    recipe = config.model_dump(mode="json")
    with artefact.writing(Path(out), "importance", recipe, config.seed, parents) as draft:
        if config.method in ("random", "middle"):
            from compress.criteria import blind

            ranking = blind(config.method, num_layers, config.remove, config.seed)
        else:
            speech = load_model(model, dtype=config.dtype)
            task = make_task(speech, heard, segments, config.lang, metric)
            ranking = _search(config, speech, task, draft, progress)
        _write(draft, config, family, num_layers, segments, ranking, artefact.identity(model))
        draft.extra.update(removed=list(ranking.removed), method=config.method)
    return artefact.read(out)


def check_config(config: ImportanceConfig, num_layers: int) -> str:
    """Refuses what cannot be ranked; returns the metric to rank by."""
    target = language(config.lang)
    if config.split == "test":
        raise InputError(
            "Layers cannot be ranked on the test split",
            expected="select: what chooses must not be what reports",
            mend="leave --split out, or give the corpus a select split",
        )
    metric = config.metric or target.selection_metric
    if metric not in metrics.METRICS or metric in metrics.LOWER_IS_BETTER:
        usable = [name for name in metrics.METRICS if name not in metrics.LOWER_IS_BETTER]
        raise InputError(
            f"Layers cannot be ranked by {metric!r}", expected=f"one of {', '.join(usable)}"
        )
    most = max(0, num_layers - 2)
    if config.remove > most:
        raise InputError(
            f"{config.remove} layers cannot be removed from {num_layers}",
            expected=f"at most {most}: the first and the last layer always stay",
        )
    return metric


def make_task(
    speech: SpeechModel, corpus: Corpus, segments: Sequence[Segment], lang: str, metric: str
) -> "SearchTask":
    """Reads the segments' audio and settles their token limits."""
    from compress.task import SearchTask

    return SearchTask(
        lang=lang,
        metric=metric,
        ids=tuple(segment.id for segment in segments),
        audio=tuple(corpus.audio(segment) for segment in segments),
        references=tuple(corpus.references(segments, lang)),
        limits=tuple(token_limit(segment.duration_s) for segment in segments),
        decode=lambda tokens: speech.family.decode_text(speech.processor, tokens),
    )


def _search(
    config: ImportanceConfig,
    speech: SpeechModel,
    task: "SearchTask",
    draft: Draft,
    progress: Progress,
) -> "Ranking":
    """Runs the method that the config names."""
    from compress import criteria
    from compress.search import Ledger

    ledger = Ledger(draft.work / "ledger.jsonl")
    started = time.monotonic()
    num_layers = len(speech.part(speech.family.layers))
    if config.method in ("block-influence", "angular"):
        ranking = criteria.by_similarity(config.method, speech, task, config.remove, progress)
    elif config.method == "loss":
        ranking = criteria.by_loss(speech, task, config.remove, ledger, progress)
    else:
        ranking = by_translation(config, speech, task, ledger, progress)
    draft.timing(
        "search",
        time.monotonic() - started,
        method=config.method,
        layers=num_layers,
        segments=len(task.ids),
        threads=environment.threads(),
        device=speech.device,
    )
    return ranking


def by_translation(
    config: ImportanceConfig,
    speech: SpeechModel,
    task: "SearchTask",
    ledger: "Ledger",
    progress: Progress = SILENT,
) -> "Ranking":
    """Runs one of the methods that translate: reference, exact, bounded or racing."""
    from compress.exact import ExactTranslator
    from compress.racing import bounded, racing, stratify
    from compress.reference import StockTranslator
    from compress.search import Search, every_candidate, greedy, plan_chunks

    makers: dict[str, Callable[[SpeechModel, SearchTask], Any]] = {"reference": StockTranslator}
    plays = {
        "bounded": bounded,
        "racing": lambda *round_: racing(*round_, confidence=config.confidence, seed=config.seed),
    }
    if not ledger.started:
        progress.message(f"Encoding {len(task.ids)} segments")
    with makers.get(config.method, ExactTranslator)(speech, task) as translator:
        budget = budget_bytes(config.memory_gb, speech.device)
        lengths = [len(audio) for audio in task.audio]

        def plan() -> list[list[int]]:
            most = config.batch_size
            if config.method in plays:
                return stratify(_rows(translator), lengths, most, budget)
            return plan_chunks(_rows(translator), lengths, most, budget)

        chunks = ledger.chunks(plan)
        num_layers = len(speech.part(speech.family.layers))
        total = len(chunks) * sum(num_layers - 2 - done for done in range(config.remove))
        with progress.task("importance", total, done=ledger.pieces()) as advance:
            search = Search(translator, task, ledger, chunks, advance)
            play = plays.get(config.method, every_candidate)
            return greedy(search, num_layers, config.remove, play)


def _rows(translator: "CandidateTranslator") -> list[int]:
    return translator.row_bytes()


def budget_bytes(memory_gb: float | None, device: str) -> int:
    """What the search's caches may take: as stated, or a share of the device's memory."""
    if memory_gb is not None:
        return int(memory_gb * 1e9)
    if device.startswith("cuda"):
        import torch

        return int(DEFAULT_BUDGET * torch.cuda.get_device_properties(device).total_memory)
    return int(DEFAULT_BUDGET * environment.memory_bytes())


def _write(
    draft: Draft,
    config: ImportanceConfig,
    family: Family,
    num_layers: int,
    segments: Sequence[Segment],
    ranking: "Ranking",
    model_identity: str,
) -> None:
    """Writes importance.jsonl, one line a candidate, and plan.json."""
    lines = draft.path / "importance.jsonl"
    lines.unlink(missing_ok=True)
    for candidate in ranking.candidates:
        record = {
            "round": candidate.round,
            "layer": candidate.layer,
            "metric": ranking.metric,
            "signature": ranking.signature,
            "score": candidate.score,
            **candidate.facts,
        }
        artefact.append_jsonl(lines, record)
    plan = {
        "family": family.name,
        "model": model_identity,
        "num_layers": num_layers,
        "removed": list(ranking.removed),
        "kept": [layer for layer in range(num_layers) if layer not in ranking.removed],
        "lang": config.lang,
        "method": config.method,
        "metric": ranking.metric,
        "signature": ranking.signature,
        "baseline": ranking.baseline,
        "max_new_tokens": {segment.id: token_limit(segment.duration_s) for segment in segments},
    }
    artefact.write_json(draft.path / "plan.json", plan)
