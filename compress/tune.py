"""Tuning the pruned model on references and the teacher's translations: QLoRA, LoRA, or in full.

The adapter (Hu et al. 2021; QLoRA: Dettmers et al. 2023) goes on the linear parts of the decoder layers
and nowhere else: the audio tower, the projector, the embeddings and the head stay the teacher's.
"""

from pathlib import Path
from typing import Any

from torch.nn import Parameter

from compress import parallel
from compress.adapters import decoder_linears, put_adapter_on
from compress.checkpoints import RunState
from compress.config import TuneConfig
from compress.gradients import arithmetic, settle, settled
from compress.logits import LogitLoss, StoredLogits
from compress.loop import Training, checkpoint_activations, train
from compress.parallel import Team
from compress.rows import Row, build_sequences, read_rows, reference_rows, segments_for
from compress.states import open_states
from compress.teach import (
    carried,
    check_unquantised,
    run_teach,
    save_model,
    scorer,
    select_weights,
    trainable,
    write_history,
)
from halve import artefact
from halve.artefact import Artefact, Draft
from halve.card import write_card
from halve.corpus import Corpus, Segment, evenly, read_corpus
from halve.errors import ArtefactError, CorpusError, InputError
from halve.languages import language
from halve.metrics import signature
from halve.models import SpeechModel, load_model, resolve_model
from halve.origin import origin
from halve.progress import SILENT, Progress
from halve.sources import check_sources, warn_of_speech


def run_tune(
    config: TuneConfig,
    model: str | Path,
    corpus: Path,
    translations: Path | None,
    out: Path,
    progress: Progress = SILENT,
    *,
    states_dir: Path | None = None,
) -> Artefact:
    """Tunes a model on the `train` split and keeps the state that translates `select` best.

    The untuned model competes as step 0: tuning never makes a model that scores worse than it was. Writes
    a stock peft directory (kind adapter); with method "full", which has nothing to merge, a model directory
    (kind student). Both have `history.jsonl`. A killed run goes on from its last checkpoint and ends with
    the same bytes.

    Args:
        translations: rows to learn, made by `distill`; the corpus's references if not given.
        states_dir: where the tower's states are kept for other runs; with the resume state if not given.

    Raises:
        InputError: a corpus, model, or setting that cannot be used.
        ArtefactError: translations of another corpus.
        MissingExtraError: peft or bitsandbytes is not installed.
    """
    base = resolve_model(model)
    if config.method == "full":
        check_unquantised(base)
    parents = {"model": base, "corpus": Path(corpus)}
    if translations is not None:
        _check_corpus(translations, Path(corpus))
        parents["translations"] = Path(translations)
    soft = _soft_loss(config, translations)
    kind = "student" if config.method == "full" else "adapter"
    recipe = config.recorded()
    team = parallel.team(config.device)
    progress = progress if team.is_main else SILENT
    with parallel.writing(team, Path(out), kind, recipe, config.seed, parents) as draft:
        if config.weights == "bfloat16":
            computed = "bfloat16"
        else:
            computed = arithmetic(config.precision, team.device or config.device, progress)
        computed = settled(computed, draft.work, progress)
        speech = _load(config, base, team, computed)
        data = read_corpus(corpus)
        segments, rows = _material(config, data, translations)
        adapter = None if config.method == "full" else put_adapter_on(config, speech)
        folder = states_dir or draft.work
        training = _prepare(config, speech, data, segments, rows, draft, folder, team, progress)
        training.soft = soft
        training.autocast = computed == "bfloat16" and config.weights == "float32"
        if team.is_main:
            settle(computed, draft.work)
        state = train(training, progress)
        if not team.is_main:
            return parallel.published(team, Path(out), kind)
        write_history(draft, state.history)
        draft.extra = _facts(config, training, rows, base) | {
            "arithmetic": computed,
            "steps": state.step,
            "best_step": state.best_step,
            "score": state.best_score,
            "untuned_score": state.history[0].get("score"),
        }
        draft.extra["tuned"]["scores"] = _best_scores(state)
        draft.timing("training", state.elapsed_s, steps=state.step)
        if adapter is None:
            save_model(speech, base, draft.path)
            draft.extra["origin"] = origin(base)
            write_card(draft.path, source=base, kind="tuned", facts=draft.extra)
        else:
            save_adapter(adapter, base, draft.path)
    return artefact.read(out, kind)


def _best_scores(state: RunState) -> dict[str, Any]:
    """The kept state's scores on `select`, each with what lets others repeat it."""
    best: Any = next((row for row in state.history if row["step"] == state.best_step), {})
    metrics = {lang: language(lang).selection_metric for lang in best.get("scores") or ()}
    return {
        lang: {
            "metric": metric,
            "score": best["scores"][lang],
            "signature": signature(metric, lang),
        }
        for lang, metric in metrics.items()
    }


def _check_corpus(translations: Path, corpus: Path) -> None:
    """Refuses translations of another corpus: segments are named alike in all, so that texts would meet the wrong audio."""
    made_from = artefact.read(translations, "translations").parents.get("corpus")
    if made_from != artefact.identity(corpus):
        raise ArtefactError(
            f"{translations} was made from another corpus than {corpus}, or from another version of it",
            expected="translations of this very corpus",
            mend="name that corpus, or run `halve distill` with this one",
        )


def _load(config: TuneConfig, base: Path, team: Team, computed: str) -> SpeechModel:
    device = team.device or config.device
    if config.method == "full":
        return load_model(base, dtype=config.weights, device=device)
    quantization = "nf4" if config.method == "qlora" else None
    return load_model(base, dtype=computed, device=device, quantization=quantization)


def _material(
    config: TuneConfig, corpus: Corpus, translations: Path | None
) -> tuple[list[Segment], list[Row]]:
    """What is trained on. Of translations that cover a part of the segments, that part alone."""
    langs = config.langs
    if translations is None:
        segments = segments_for(corpus, "train", langs, config.train_segments)
        return segments, reference_rows(segments, langs)
    segments = segments_for(corpus, "train", langs, None, untranslated=True)
    rows = read_rows(translations / "rows.jsonl", segments, langs)
    covered = {row.id for row in rows}
    chosen = evenly([each for each in segments if each.id in covered], config.train_segments)
    ids = {segment.id for segment in chosen}
    taken = [row for row in rows if row.id in ids]
    if missing := set(langs) - {row.lang for row in taken}:
        raise CorpusError(
            f"Of {len(chosen)} train segments none has a text in {', '.join(sorted(missing))}",
            expected="texts in every language",
            mend="raise --train-segments, or name the other languages alone",
        )
    return chosen, taken


def _soft_loss(config: TuneConfig, translations: Path | None) -> LogitLoss | None:
    if not config.logit_weight:
        return None
    if translations is None:
        raise InputError(
            f"A logit weight of {config.logit_weight} and no translations",
            expected="translations that hold the teacher's distributions",
            mend="make them with `halve distill --logits 8`",
        )
    store = StoredLogits(Path(translations))
    return LogitLoss(store, config.logit_weight, config.divergence)


def _prepare(
    config: TuneConfig,
    speech: SpeechModel,
    corpus: Corpus,
    segments: list[Segment],
    rows: list[Row],
    draft: Draft,
    folder: Path,
    team: Team,
    progress: Progress,
) -> Training:
    check_sources(speech.family.reads, corpus, segments)
    warn_of_speech(speech.family.reads, segments, progress)
    weights, projector = _weights(config, speech)
    if config.checkpoint_activations:
        checkpoint_activations(speech)
    progress.message(
        f"{len(segments)} segments, {len(rows)} rows, "
        f"{sum(parameter.numel() for parameter in weights.values()):,} weights to train"
    )
    return Training(
        speech=speech,
        config=config,
        sequences=build_sequences(speech, segments, rows, config.share_audio),
        audio=team.main_first(lambda: open_states(speech, corpus, segments, folder, progress)),
        weights=weights,
        folder=draft.work / "checkpoints",
        evaluate=scorer(config, speech, corpus, folder, True, progress) if team.is_main else None,
        score_start=True,
        team=team,
        projector=projector,
    )


def _weights(
    config: TuneConfig, speech: SpeechModel
) -> tuple[dict[str, Parameter], frozenset[str]]:
    if config.method == "full":
        return select_weights(speech, freeze_audio=True)
    return trainable(speech), frozenset()


def save_adapter(adapter: Any, base: Path, out: Path) -> None:
    """Writes a peft directory that names its base as the hub or the folder does, without any path."""
    adapter.peft_config["default"].base_model_name_or_path = base_name(base)
    # Told not to look for resized embeddings, peft asks no hub about the base.
    adapter.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)  # a form with nothing filled in


def base_name(base: Path) -> str:
    """The hub id of a hub snapshot, else the folder's name."""
    for part in base.resolve().parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return base.resolve().name


def _facts(config: TuneConfig, training: Training, rows: list[Row], base: Path) -> dict[str, Any]:
    """What the artefact's record says beside its files."""
    origins = [row.origin for row in rows]
    return {
        **carried(base),
        "method": config.method,
        "langs": list(config.langs),
        "family": training.speech.family.name,
        "rows": {origin: origins.count(origin) for origin in sorted(set(origins))},
        "tuned": {
            "method": config.method,
            "distilled": "teacher" in origins,
            "logits": bool(config.logit_weight),
        },
        "trainable_parameters": sum(each.numel() for each in training.weights.values()),
    }


__all__ = [
    "base_name",
    "decoder_linears",
    "put_adapter_on",
    "run_teach",
    "run_tune",
    "save_adapter",
]
