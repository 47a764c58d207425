"""Fine-tuning, in full or by an adapter that is merged: a base model becomes the teacher."""

from collections.abc import Callable, Sequence
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from compress import parallel
from compress.adapters import put_adapter_on
from compress.config import TeachConfig, TrainingConfig
from compress.footprint import rows_that_fit
from compress.gradients import arithmetic, settle, settled
from compress.loop import Scores, Training, checkpoint_activations, train
from compress.parallel import Team
from compress.rows import build_sequences, reference_rows, segments_for
from compress.states import AudioStates, open_states
from halve import artefact
from halve.artefact import Artefact, Draft
from halve.card import write_card
from halve.corpus import Corpus, Segment, read_corpus
from halve.errors import InputError
from halve.families import SourceText
from halve.json_files import append_jsonl
from halve.languages import language
from halve.lineage import earlier_training
from halve.metrics import score
from halve.models import SpeechModel, load_model, quiet, read_config, resolve_model
from halve.origin import origin
from halve.progress import SILENT, Advance, Progress, nowhere
from halve.shards import copy_side_files
from halve.sources import check_sources, segment_limit, warn_of_speech
from halve.translate import TorchTranslator, plan_batches

SCORE_BATCH = 40
"""Segments translated at once when `select` is scored; fewer where a GPU has no room for so many."""


def run_teach(
    config: TeachConfig,
    model: str | Path,
    corpus: Path,
    out: Path,
    progress: Progress = SILENT,
    *,
    states_dir: Path | None = None,
) -> Artefact:
    """Fine-tunes a model on the `train` split, and keeps the state that translates `select` best.

    Writes an ordinary model directory in bfloat16 with `history.jsonl`. A killed run goes on from its last
    checkpoint, on another machine too if the partial directory beside `out` is taken there, and ends with
    the same bytes on the same machine, versions and threads, unless `max_minutes` is set.

    Args:
        states_dir: where the frozen tower's states are kept for other runs; with the resume state if not given.

    Raises:
        InputError: a corpus, model or setting that cannot be used.
    """
    base = resolve_model(model)
    check_unquantised(base)
    recipe = config.recorded()
    parents = {"model": base, "corpus": Path(corpus)}
    team = parallel.team(config.device)
    progress = progress if team.is_main else SILENT
    _check_adapter(config, progress)
    with parallel.writing(team, Path(out), "teacher", recipe, config.seed, parents) as draft:
        speech = load_model(base, dtype=config.weights, device=team.device or config.device)
        adapter = put_adapter_on(config, speech) if config.method == "lora" else None
        data = read_corpus(corpus)
        folder = states_dir or draft.work
        training = _prepare(config, speech, data, draft, folder, team, progress)
        if team.is_main:
            settle("bfloat16" if training.autocast else config.weights, draft.work)
        state = train(training, progress)
        if not team.is_main:
            return parallel.published(team, Path(out), "teacher")
        write_history(draft, state.history)
        draft.extra = {
            "steps": state.step,
            "best_step": state.best_step,
            "arithmetic": "bfloat16" if training.autocast else config.weights,
            "score": state.best_score,
            "langs": list(config.langs),
            "family": speech.family.name,
            "origin": origin(base),
            **carried(base),
        }
        draft.timing("training", state.elapsed_s, steps=state.step)
        if adapter is not None:
            speech.model = adapter.merge_and_unload(safe_merge=True)
        save_model(speech, base, draft.path)
        write_card(draft.path, source=base, kind="teacher", facts=draft.extra)
    return artefact.read(out, "teacher")


_CARRIED = ("removed", "kept", "ranked_by", "ranked_before", "base_model")


def carried(base: Path) -> dict[str, Any]:
    """What a model's record says that holds for what is trained from it."""
    if not (base / artefact.RECORD).is_file():
        return {}
    extra = artefact.read(base).extra
    return {key: extra[key] for key in _CARRIED if key in extra} | earlier_training(base)


def check_unquantised(base: Path) -> None:
    """Refuses a model that is stored in few bits where its own weights are to change, before it is loaded.

    Raises:
        InputError: such a model.
    """
    stored = read_config(base).get("quantization_config")
    if stored is None:
        return
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    raise InputError(
        f"{base} is stored quantised ({method or 'quantization_config in its config.json'})",
        expected="a model in bfloat16, float16 or float32, whose weights can be trained and saved",
        mend="name the model that it was made from, or train an adapter over it with `halve tune --method qlora`",
    )


def _check_adapter(config: TeachConfig, progress: Progress) -> None:
    """Says which settings have no meaning for an adapter, which leaves tower and projector as they are.

    Raises:
        InputError: steps for the projector alone, in which nothing would train.
    """
    if config.method != "lora":
        return
    _check_projector(
        config, frozenset(), "An adapter of the decoder layers leaves the projector out"
    )
    unused = {
        "--no-freeze-audio": not config.freeze_audio,
        "--projector-factor": config.projector_factor != 1.0,
    }
    for option in (name for name, is_given in unused.items() if is_given):
        progress.warn(f"{option} does nothing with --method lora: only the decoder layers train.")


def _check_projector(config: TeachConfig, projector: frozenset[str], why: str) -> None:
    if config.projector_only_steps and not projector:
        raise InputError(
            f"{why}: in {config.projector_only_steps} steps for the projector alone nothing would train",
            expected="a model with a projector of its own, trained with --method full",
            mend="leave --projector-only-steps out",
        )


def _prepare(
    config: TeachConfig,
    speech: SpeechModel,
    corpus: Corpus,
    draft: Draft,
    folder: Path,
    team: Team,
    progress: Progress,
) -> Training:
    segments = segments_for(corpus, "train", config.langs, config.train_segments)
    check_sources(speech.family.reads, corpus, segments)
    warn_of_speech(speech.family.reads, segments, progress)
    if config.transcribe and speech.family.reads == "text":
        raise InputError(
            f"--transcribe, and {speech.family.name} models read: there is nothing to write down",
            expected="a model that listens",
            mend="leave --transcribe out",
        )
    rows = reference_rows(segments, config.langs, config.transcribe)
    # An adapter leaves the tower as it is.
    frozen = config.freeze_audio or config.method == "lora"
    store = folder if frozen else None
    weights, projector = (
        (trainable(speech), frozenset[str]())
        if config.method == "lora"
        else select_weights(speech, frozen)
    )
    # Before the audio is encoded, which may take hours.
    _check_projector(config, projector, f"A {speech.family.name} model has no projector to train")
    audio = team.main_first(lambda: open_states(speech, corpus, segments, store, progress))
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
        audio=audio,
        weights=weights,
        folder=draft.work / "checkpoints",
        evaluate=scorer(config, speech, corpus, folder, frozen, progress) if team.is_main else None,
        team=team,
        projector=projector,
        autocast=config.weights == "float32"
        and settled(arithmetic(config.precision, speech.device, progress), draft.work, progress)
        == "bfloat16",
        max_minutes=config.max_minutes,
        projector_factor=config.projector_factor,
        projector_only_steps=config.projector_only_steps,
    )


def trainable(speech: SpeechModel) -> dict[str, Parameter]:
    """The weights that are not frozen, by name: an adapter's."""
    named = speech.model.named_parameters()
    return {name: each for name, each in named if each.requires_grad}


def select_weights(
    speech: SpeechModel, freeze_audio: bool
) -> tuple[dict[str, Parameter], frozenset[str]]:
    """What full fine-tuning trains, by name, and which of it is the projector; the rest is frozen."""
    tower = f"{speech.family.audio_tower}."
    images = tuple(f"{part}." for part in speech.family.images)
    weights = {}
    for name, parameter in speech.model.named_parameters():
        # The tower's sinusoid positions say themselves that they do not train.
        is_tower = bool(speech.family.audio_tower) and name.startswith(tower)
        sees = name.startswith(images)
        if sees or (is_tower and (freeze_audio or not parameter.requires_grad)):
            parameter.requires_grad_(False)
        else:
            weights[name] = parameter
    prefix = f"{speech.family.projector}."
    return weights, frozenset(name for name in weights if name.startswith(prefix))


def scorer(
    config: TrainingConfig,
    speech: SpeechModel,
    corpus: Corpus,
    folder: Path,
    frozen_audio: bool,
    progress: Progress,
) -> Callable[[], Scores] | None:
    """A function that translates `select` greedily and scores it in each language's selection metric.

    Each language has a sample of its own: in one that is drawn for all of them, a language with few segments may
    have none. Loops are cut short, which spares time while a model knows little. None where nothing is to be
    scored.

    Raises:
        CorpusError: a language has no reference in `select`.
    """
    if config.select_segments == 0:
        return None
    samples = {
        lang: {each.id for each in corpus.split("select", lang, config.select_segments)}
        for lang in config.langs
    }
    ids = set().union(*samples.values())
    segments = [segment for segment in corpus.split("select") if segment.id in ids]
    check_sources(speech.family.reads, corpus, segments)
    audio = open_states(speech, corpus, segments, folder if frozen_audio else None, progress)
    places = {
        lang: [place for place, segment in enumerate(segments) if segment.id in sample]
        for lang, sample in samples.items()
    }

    def evaluate() -> Scores:
        total = sum(map(len, places.values()))
        with progress.task("Scoring select", total) as advance:
            return {
                lang: select_score(speech, segments, audio, places[lang], lang, advance)
                for lang in config.langs
            }

    return evaluate


def select_score(
    speech: SpeechModel,
    segments: Sequence[Segment],
    audio: AudioStates,
    places: Sequence[int],
    lang: str,
    advance: Advance = nowhere,
) -> float:
    """Corpus score of greedy translations into `lang`.

    Args:
        audio: the states of `segments`.
        places: of the segments that are scored, which have a reference in `lang`.
    """
    translator = TorchTranslator(speech, stop_loops=True)
    reads = speech.family.reads
    found: dict[int, str] = {}
    lengths = [
        len(segments[place].source_text) if reads == "text" else audio.lengths[place]
        for place in places
    ]
    limits = [segment_limit(reads, segments[place]) for place in places]
    longest = max(map(add, lengths, limits), default=0)
    # A batch at a time: the projected audio of a whole split need not fit beside the model.
    for batch in plan_batches(lengths, rows_that_fit(speech, longest, SCORE_BATCH)):
        taken = [
            _taken_in(speech, segments[place], audio, place)
            for place in (places[index] for index in batch)
        ]
        rows = translator.translate_embeddings(
            taken, lang, limits=[limits[index] for index in batch], batch_size=len(batch)
        )
        found |= {index: row.text for index, row in zip(batch, rows, strict=True)}
        advance(len(batch))
    references = Corpus.references([segments[place] for place in places], lang)
    texts = [found[index] for index in range(len(places))]
    return score(language(lang).selection_metric, texts, references, lang).score


def _taken_in(
    speech: SpeechModel, segment: Segment, audio: AudioStates, place: int
) -> SourceText | torch.Tensor:
    if speech.family.reads == "text":
        return SourceText(segment.source_text, segment.source_lang)
    with torch.inference_mode():
        return speech.family.project(speech.model, audio.read(place))


def write_history(draft: Draft, history: Sequence[dict[str, object]]) -> None:
    """Writes history.jsonl: a line at each score, with step, loss, learning rate and scores."""
    path = draft.path / "history.jsonl"
    path.unlink(missing_ok=True)
    for line in history:
        append_jsonl(path, line)


def save_model(speech: SpeechModel, base: Path, out: Path) -> None:
    """Writes the model in bfloat16 as stock transformers does, with the base's tokenizer and processor."""
    with quiet():
        speech.model.to(torch.bfloat16).save_pretrained(out)
    # Last: its generation config is the greedy one.
    copy_side_files(base, out)
