"""Layer importance: which decoder layers a model can best do without, and the plan to remove them.

Ranks on the corpus's `select` split. The paper's search (Moslem 2025, arXiv 2505.20237) is method
`reference`; `exact` makes the same decisions faster; the others trade certainty for time.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config import ImportanceConfig
from compress.footprint import Footprint, Room, checked
from compress.prune import check_teacher
from halve import artefact, environment, metrics
from halve.artefact import Artefact, Draft
from halve.corpus import Corpus, Segment, read_corpus
from halve.errors import FamilyError, InputError
from halve.families import Family, family_for
from halve.json_files import append_jsonl, write_json
from halve.languages import language
from halve.models import SpeechModel, load_model, load_processor, read_config, resolve_model
from halve.progress import SILENT, Progress
from halve.sources import read_sources, segment_limit, warn_of_speech

if TYPE_CHECKING:
    from compress.search import CandidatePool, CandidateTranslator, Ledger, Ranking, Shortlist
    from compress.task import SearchTask

TRANSLATING = ("exact", "reference", "bounded", "racing")
"""The methods that rank by translations; the others have nothing for workers to do."""
BLIND = ("random", "middle", "spaced")
"""The methods that look at nothing but the number of layers."""
DEFAULT_BUDGET = 0.4
"""Share of the device's memory that a search without a stated budget may take for its caches."""
ACTIVATIONS_SHARE = 0.2
"""Share of a GPU's memory that is left to what one pass computes, where the model leaves twice as much."""


def run_importance(
    config: ImportanceConfig, model: Path, corpus: Path, out: Path, progress: Progress = SILENT
) -> Artefact:
    """Ranks decoder layers and writes importance.jsonl and plan.json.

    Raises:
        InputError: unknown language or metric, a split that must not be ranked on, or more layers to
            remove than can go.
        FamilyError: a criterion that cannot be had of this family.
        CorpusError: no such segments.
    """
    model = resolve_model(model)
    teacher = read_config(model)
    family = family_for(teacher)
    num_layers = family.num_layers(teacher)
    stay = family.must_stay(teacher)
    metric = check_config(config, num_layers, stay)
    check_method(config, family)
    # Here already: a search of hours ends in a plan that pruning would refuse.
    check_teacher(model, family, teacher)
    heard = read_corpus(corpus)
    segments = heard.split(config.split, config.lang, config.segments)
    warn_of_speech(family.reads, segments, progress)
    parents = {"model": model, "corpus": Path(corpus)}
    _say_unused(config, progress)
    recipe = config.recorded()
    with artefact.writing(Path(out), "importance", recipe, config.seed, parents) as draft:
        if config.method in BLIND:
            from compress.criteria import blind

            ranking = blind(config.method, num_layers, config.remove, config.seed, stay)
        else:
            if _on_workers(config):
                # The workers load it; here, texts are made of their tokens.
                speech = SpeechModel(
                    None, load_processor(model), family, model, "cpu", config.dtype
                )
            else:
                speech = load_model(model, dtype=config.dtype)
            task = make_task(speech, heard, segments, config.lang, metric)
            ranking = _search(config, speech, task, draft, progress)
        _write(draft, config, family, num_layers, segments, ranking, artefact.identity(model))
        draft.extra.update(
            removed=list(ranking.removed),
            method=config.method,
            segments=len(segments),
            segments_in_split=len(heard.split(config.split, config.lang)),
            **_stopped(ranking),
        )
    return artefact.read(out)


def _on_workers(config: ImportanceConfig) -> bool:
    asked = config.workers > 1 or config.ray_address is not None
    return asked and config.method in TRANSLATING


def _stopped(ranking: "Ranking") -> dict[str, Any]:
    """How many candidates were stopped early; racing's also how sure it was of each, and of all at once.

    All at once: one minus the sum of the doubts (Bonferroni), which holds however they depend on each
    other; it takes the bootstrap at its word.
    """
    stopped = [candidate for candidate in ranking.candidates if "settled" in candidate.facts]
    if not stopped:
        return {}
    facts: dict[str, Any] = {"stopped_early": len(stopped), "candidates": len(ranking.candidates)}
    sure = [one.facts["confidence"] for one in stopped if "confidence" in one.facts]
    if sure:
        facts["least_confidence"] = round(min(sure), 6)
        facts["joint_confidence"] = round(max(0.0, 1 - sum(1 - one for one in sure)), 6)
    return facts


def check_config(
    config: ImportanceConfig, num_layers: int, stay: Mapping[int, str] | None = None
) -> str:
    """Refuses what cannot be ranked; returns the metric to rank by."""
    target = language(config.lang)
    if config.split == "test":
        raise InputError(
            "Layers cannot be ranked on the test split",
            expected="select: what chooses must not be what reports",
            mend="leave --split out, or give the corpus a select split",
        )
    metric = (config.metric or target.selection_metric).lower()
    if metric not in metrics.METRICS or metric in metrics.LOWER_IS_BETTER:
        usable = [name for name in metrics.METRICS if name not in metrics.LOWER_IS_BETTER]
        raise InputError(
            f"Layers cannot be ranked by {metric!r}", expected=f"one of {', '.join(usable)}"
        )
    ends = {0, num_layers - 1}
    reasons = {layer: why for layer, why in (stay or {}).items() if layer not in ends}
    most = max(0, num_layers - len(ends) - len(reasons))
    if config.remove > most:
        also = [f"layer {layer} ({why})" for layer, why in sorted(reasons.items())]
        raise InputError(
            f"{config.remove} layers cannot be removed from {num_layers}",
            expected=f"at most {most}: {', '.join(['the first and the last layer', *also])} always stay",
        )
    return metric


def check_method(config: ImportanceConfig, family: Family) -> None:
    """Refuses criteria that do not translate where layers attend to an encoder: they cannot walk through such a model.

    Raises:
        FamilyError: the method, or the shortlist's, is one of them.
    """
    if not family.attends_to_encoder:
        return
    translates = config.method in TRANSLATING
    if config.method not in BLIND and not (translates and config.shortlist is None):
        walks = (
            f"--shortlist (by {config.shortlist_by})" if translates else f"--method {config.method}"
        )
        raise FamilyError(
            f"{walks} is not supported for {family.name}: its decoder layers attend to an encoder",
            expected=f"--method {', '.join([*TRANSLATING, *BLIND])}, without a shortlist",
        )


def make_task(
    speech: SpeechModel, corpus: Corpus, segments: Sequence[Segment], lang: str, metric: str
) -> "SearchTask":
    """Reads the segments' audio, or text for a model that reads, and settles their token limits."""
    from compress.task import SearchTask

    return SearchTask(
        lang=lang,
        metric=metric,
        ids=tuple(segment.id for segment in segments),
        audio=tuple(read_sources(speech.family.reads, corpus, segments)),
        references=tuple(corpus.references(segments, lang)),
        limits=tuple(segment_limit(speech.family.reads, segment) for segment in segments),
        decode=lambda tokens: speech.family.decode_text(speech.processor, tokens),
    )


def _say_unused(config: ImportanceConfig, progress: Progress) -> None:
    """Names the settings that this method does nothing with."""
    translates = config.method in TRANSLATING
    unused = {
        "--workers": not translates and config.workers > 1,
        "--ray-address": not translates and config.ray_address is not None,
        "--shortlist": not translates and config.shortlist is not None,
        "--shortlist-by": config.shortlist is None
        and config.shortlist_by != config.default("shortlist_by"),
        "--memory-gb": config.memory_gb is not None and config.method in ("reference", *BLIND),
        "--metric": not translates and config.metric is not None,
        "--confidence": config.method != "racing"
        and config.confidence != config.default("confidence"),
    }
    if given := [option for option, is_unused in unused.items() if is_unused]:
        progress.warn(f"--method {config.method} does nothing with {', '.join(given)}")


def _search(
    config: ImportanceConfig,
    speech: SpeechModel,
    task: "SearchTask",
    draft: Draft,
    progress: Progress,
) -> "Ranking":
    """Runs the method that the config names."""
    from compress.search import Ledger

    started = time.monotonic()
    ledger = Ledger(draft.work / "ledger.jsonl")
    if config.method in TRANSLATING:
        cheap = Ledger(draft.work / "shortlist.jsonl")
        shortlist = _shortlist(config, speech, task, cheap, progress)
        ranking = by_translation(config, speech, task, ledger, progress, shortlist)
    else:
        ranking = _cheap(config, config.method, speech, task, config.remove, ledger, progress)
    draft.timing(
        "search",
        time.monotonic() - started,
        method=config.method,
        layers=_num_layers(speech),
        segments=len(task.ids),
        threads=environment.threads(),
        workers=config.workers,
        device=speech.device,
        resumed=draft.resumed,  # then it is the last process's alone
    )
    return ranking


def _cheap(
    config: ImportanceConfig,
    method: str,
    speech: SpeechModel,
    task: "SearchTask",
    remove: int,
    ledger: "Ledger",
    progress: Progress,
) -> "Ranking":
    from compress import criteria
    from compress.search import plan_chunks

    budget = budget_bytes(config.memory_gb, speech)

    def cut(footprint: Footprint, lengths: Sequence[int]) -> list[list[int]]:
        fits = checked([Room(footprint, budget)], task.ids)
        return plan_chunks(fits, lengths, config.batch_size)

    if method == "loss":
        return criteria.by_loss(speech, task, remove, ledger, progress, cut)
    return criteria.by_similarity(method, speech, task, remove, progress, cut)


def _shortlist(
    config: ImportanceConfig,
    speech: SpeechModel,
    task: "SearchTask",
    ledger: "Ledger",
    progress: Progress,
) -> "Shortlist | None":
    """The layers that a cheap criterion would remove first, where the config asks for that."""
    if config.shortlist is None:
        return None
    from compress.search import Shortlist

    if speech.model is None:
        speech = load_model(speech.path, dtype=speech.dtype)
    ranking = _cheap(config, config.shortlist_by, speech, task, 1, ledger, progress)
    del speech  # with workers, a model of this process's own: the GPU is theirs
    environment.release_gpu_memory()
    order = sorted(ranking.candidates, key=lambda candidate: (candidate.score, candidate.layer))
    return Shortlist(tuple(candidate.layer for candidate in order), config.shortlist)


def by_translation(
    config: ImportanceConfig,
    speech: SpeechModel,
    task: "SearchTask",
    ledger: "Ledger",
    progress: Progress = SILENT,
    shortlist: "Shortlist | None" = None,
) -> "Ranking":
    """Runs one of the methods that translate: reference, exact, bounded or racing.

    With workers, `speech` need not hold the model: each worker loads it from its directory.

    Raises:
        InputError: the budget is too small for one segment; workers that cannot work.
        MissingExtraError, WorkersDiedError: see `compress.workers`.
    """
    from compress.racing import bounded, racing, stratify
    from compress.search import Search, every_candidate, greedy, plan_chunks, removable

    plays = {
        "bounded": bounded,
        "racing": lambda *round_: racing(*round_, confidence=config.confidence, seed=config.seed),
    }
    if not ledger.started:
        progress.message(f"Encoding {len(task.ids)} segments")
    with _opened(config, speech, task, progress) as (pool, rooms):
        fits = checked(rooms, task.ids)
        cut = partial(stratify, method=config.method) if config.method in plays else plan_chunks
        lengths = [len(audio) for audio in task.audio]
        chunks = ledger.chunks(lambda: cut(fits, lengths, config.batch_size))
        if not fits(chunks):
            progress.warn(
                "The search was begun with room for more segments at once than there is now (fewer workers, or a larger "
                "device): it goes on with them, and may take more memory than it is allowed"
            )
        num_layers = _num_layers(speech)
        most = config.shortlist or num_layers
        stay = speech.family.must_stay(speech.config)
        inner = len(removable(range(num_layers), num_layers, stay))
        tried = sum(min(most, inner - done) for done in range(config.remove))
        with progress.task("importance", len(chunks) * tried, done=ledger.pieces()) as advance:
            search = Search(pool, task, ledger, chunks, advance)
            play = plays.get(config.method, every_candidate)
            return greedy(search, num_layers, config.remove, play, shortlist, stay)


def _num_layers(speech: SpeechModel) -> int:
    if speech.model is None:
        return speech.family.num_layers(speech.config)
    return len(speech.part(speech.family.layers))


@contextmanager
def _opened(
    config: ImportanceConfig, speech: SpeechModel, task: "SearchTask", progress: Progress
) -> "Iterator[tuple[CandidateTranslator | CandidatePool, list[Room]]]":
    """What translates, and the rooms that chunks must fit into."""
    if _on_workers(config):
        from compress.workers import RayWorkers

        with RayWorkers(
            speech.path,
            task,
            method=config.method,
            dtype=config.dtype,
            workers=config.workers,
            address=config.ray_address,
            memory_gb=config.memory_gb,
            progress=progress,
        ) as pool:
            yield pool, pool.rooms()
        return
    from compress.search import translator_for

    with translator_for(config.method, speech, task) as translator:
        budget = budget_bytes(config.memory_gb, speech)
        yield translator, [room_for(translator, budget)]


def room_for(translator: "CandidateTranslator", budget: int) -> Room:
    """What a translator's segments take of a budget; an exact one decodes fewer candidates together where it must."""
    from compress.exact import ExactTranslator

    if isinstance(translator, ExactTranslator):
        return Room(translator.fit(budget), budget)
    return Room(translator.footprint(), budget)


def budget_bytes(memory_gb: float | None, speech: SpeechModel, models: int = 1) -> int:
    """What the search's caches may take: as stated, or a share of the device's memory.

    On a GPU no more than is left beside the model, less a fifth for activations (half of it where that is less).

    Args:
        models: how many lie on the same GPU.
    """
    if memory_gb is not None:
        return int(memory_gb * 1e9)
    if not speech.device.startswith("cuda"):
        return int(DEFAULT_BUDGET * environment.memory_bytes())
    import torch

    total = torch.cuda.get_device_properties(speech.device).total_memory
    held = sum(weight.nbytes for weight in speech.model.parameters())
    return default_gpu_budget(total, models * held)


def default_gpu_budget(total_bytes: int, model_bytes: int) -> int:
    """The search's share of a GPU of so much memory that holds models of so many bytes."""
    beside = total_bytes - model_bytes
    # Where little is left, chunks are short, and so is what one pass computes: half of it is theirs.
    left = beside - min(ACTIVATIONS_SHARE * total_bytes, beside / 2)
    return int(max(0, min(DEFAULT_BUDGET * total_bytes, left)))


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
        append_jsonl(lines, record)
    plan = {
        "family": family.name,
        "model": model_identity,
        "num_layers": num_layers,
        "removed": list(ranking.removed),
        "kept": [layer for layer in range(num_layers) if layer not in ranking.removed],
        "lang": config.lang,
        "split": config.split,
        "method": config.method,
        "metric": ranking.metric,
        "signature": ranking.signature,
        "baseline": ranking.baseline,
        **(
            {"shortlist": {"size": config.shortlist, "by": config.shortlist_by}}
            if config.shortlist and config.method in TRANSLATING
            else {}
        ),
        "max_new_tokens": {
            segment.id: segment_limit(family.reads, segment) for segment in segments
        },
    }
    write_json(draft.path / "plan.json", plan)
