"""Sequence-level knowledge distillation: the teacher's translations become training rows.

As in Moslem (2025) greedy translations of the training audio join the references; if asked, the best one or few of a beam
search, after Kim and Rush (2016). What would teach the student something wrong is dropped, each with its reason on record.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compress.config import DistillConfig
from compress.footprint import rows_that_fit
from compress.logits import store_logits
from compress.rows import Row, build_sequences, read_rows, segments_for
from compress.states import open_states
from halve import artefact
from halve.artefact import Artefact, Draft
from halve.corpus import Corpus, Segment, read_corpus
from halve.errors import InputError
from halve.json_files import append_jsonl, read_jsonl
from halve.languages import language
from halve.metrics import score
from halve.models import family_of, load_model, resolve_model
from halve.progress import SILENT, Progress
from halve.sources import check_sources, read_sources, segment_limit, warn_of_speech
from halve.translate import TorchTranslator, Translation, plan_batches

REPEATS = 4
"""So many copies of one unit in a row are a loop …"""
REPEATED_TOKENS = 12
"""… if they cover so many tokens: "2000" and "no, no, no" are none."""
_LONGEST_UNIT = 16
SLACK_CHARACTERS = 8
"""Lengths may differ by so much at any ratio: a word more or less says nothing."""

_AFTER = {"min_score", "max_length_ratio", "logits"}
"""Settings that say what becomes of translations: the teacher says the same for all."""

Key = tuple[str, str]
"""Segment id and language."""


def run_distill(
    config: DistillConfig,
    model: str | Path,
    corpus: Path,
    out: Path,
    progress: Progress = SILENT,
    *,
    states_dir: Path | None = None,
) -> Artefact:
    """Translates the training audio, batch by batch, and joins what is good with the references.

    Writes `translations.jsonl` (all of the teacher's, every beam's), `rows.jsonl` (what a student learns),
    `dropped.jsonl` (what was looked at and is not, and why) and, if asked, the teacher's distributions over the rows' tokens. Batches are the same in every run and each is on disk once
    it is translated: a killed run goes on there and ends with the same bytes.

    Args:
        states_dir: where the tower's states are kept for other runs; with the resume state if not given.

    Raises:
        InputError: a corpus, model or setting that cannot be used.
    """
    base = resolve_model(model)
    recipe = config.recorded()
    parents = {"model": base, "corpus": Path(corpus)}
    made = _made(Path(out), config, parents)
    translating = (set(recipe) - _AFTER, set(parents))
    with artefact.writing(
        Path(out), "translations", recipe, config.seed, parents, work_needs=translating
    ) as draft:
        data = read_corpus(corpus)
        segments = [
            segment
            for split in dict.fromkeys(config.splits)  # named twice is meant once
            for segment in segments_for(
                data, split, config.langs, config.limit, config.untranslated
            )
        ]
        check_sources(family_of(base).reads, data, segments)
        _tell_of_untranslated(config, data, segments, progress)
        if made is None:
            _translate(config, base, data, segments, draft, progress)
            made = [line for batch in read_jsonl(_log(draft)) for line in batch]
        found = _by_key(made)
        counts = write_rows(config, segments, found, draft.path)
        _check_rows(config, draft.path, counts)
        if config.logits:
            folder = states_dir or draft.work
            _keep_logits(config, base, data, segments, draft, folder, progress)
        draft.extra = {"langs": list(config.langs), **counts}
        progress.message(_told(counts))
    return artefact.read(out, "translations")


def _made(
    out: Path, config: DistillConfig, parents: Mapping[str, Path]
) -> list[dict[str, Any]] | None:
    """What the teacher said for a finished artefact that differs only in what becomes of it, if `out` is one."""
    if not (out / artefact.RECORD).is_file():
        return None
    earlier = artefact.read(out)
    # Of these inputs, and by the code that is here: its own fingerprint, taken anew, says so.
    now = artefact.fingerprint("translations", earlier.recipe, earlier.seed, parents)
    is_same = earlier.fingerprint == now and not config.differs_from(earlier.recipe, _AFTER)
    return read_jsonl(out / "translations.jsonl") if is_same else None


def _log(draft: Draft) -> Path:
    return draft.work / "batches.jsonl"


def _by_key(lines: Iterable[Mapping[str, Any]]) -> dict[Key, list[Translation]]:
    """Translations by segment and language, the best first."""
    found: dict[Key, list[Translation]] = {}
    for line in lines:
        translation = Translation(line["text"], line["tokens"], line["stopped"])
        found.setdefault((line["id"], line["lang"]), []).append(translation)
    return found


def _translate(
    config: DistillConfig,
    base: Path,
    corpus: Corpus,
    segments: Sequence[Segment],
    draft: Draft,
    progress: Progress,
) -> None:
    """Has every segment translated into every language that is wanted of it, and notes it."""
    log = _log(draft)
    done = read_jsonl(log)
    reads = family_of(base).reads
    warn_of_speech(reads, segments, progress)
    lengths = [
        len(each.source_text) if reads == "text" else round(1000 * each.duration_s)
        for each in segments
    ]
    batches = plan_batches(lengths, config.batch_size)
    if len(done) < len(batches):
        speech = load_model(base, dtype=config.dtype, device=config.device)
        translator = TorchTranslator(speech, stop_loops=True)
        translate = partial(_translate_batch, config, translator, corpus, segments)
        with (
            progress.task("Translating", len(batches), len(done)) as advance,
            translator.lanes(len(batches), max(config.batch_size, config.width)) as crew,
        ):
            for start in range(len(done), len(batches), crew.size):
                wave = batches[start : start + crew.size]
                for batch, lines in zip(wave, crew.map(translate, wave), strict=True):
                    append_jsonl(log, lines)
                    advance(1, note=f"{len(batch)} segments")
        translator.close()


def _translate_batch(
    config: DistillConfig,
    translator: TorchTranslator,
    corpus: Corpus,
    all_segments: Sequence[Segment],
    batch: Sequence[int],
) -> list[dict[str, Any]]:
    segments = [all_segments[place] for place in batch]
    reads = translator.speech.family.reads
    embeddings = translator.encode_all(read_sources(reads, corpus, segments))
    lines = []
    for lang in config.langs:
        places = [place for place, each in enumerate(segments) if _is_wanted(config, each, lang)]
        if not places:
            continue
        found = _hypotheses(
            config,
            translator,
            [embeddings[place] for place in places],
            lang,
            [segment_limit(reads, segments[place]) for place in places],
        )
        for place, translations in zip(places, found, strict=True):
            lines += [_line(segments[place].id, lang, each) for each in translations]
    return lines


def _hypotheses(
    config: DistillConfig,
    translator: TorchTranslator,
    embeddings: list[Any],
    lang: str,
    limits: list[int],
) -> list[list[Translation]]:
    """The translations of each source, the best first; a GPU that does not hold a batch's keys and values has parts of it."""
    longest = max(len(taken) + limit for taken, limit in zip(embeddings, limits, strict=True))
    most = config.batch_size if config.width > 1 else len(embeddings)
    rows = rows_that_fit(translator.speech, longest, most)
    if config.width > 1:
        found = []
        sources = max(1, rows // config.width)  # every beam is a row
        for start in range(0, len(embeddings), sources):
            part = slice(start, start + sources)
            found += translator.hypotheses(
                embeddings[part], lang, limits=limits[part], beams=config.width
            )
        return found
    greedy = translator.translate_embeddings(embeddings, lang, limits=limits, batch_size=rows)
    return [[translation] for translation in greedy]


def _is_wanted(config: DistillConfig, segment: Segment, lang: str) -> bool:
    """Whether a segment is translated into a language: it has a reference, or needs none and is not in it."""
    return segment.wants(lang) if config.untranslated else lang in segment.references


def _tell_of_untranslated(
    config: DistillConfig, corpus: Corpus, segments: Sequence[Segment], progress: Progress
) -> None:
    if not config.untranslated:
        left = sum(
            each.split in config.splits
            and not any(lang in each.references for lang in config.langs)
            for each in corpus.segments
        )
        if left:
            progress.message(f"{left} segments without a reference are left out: --untranslated")
        return
    for lang in config.langs:
        if without := sum(
            each.wants(lang) and not each.references.get(lang, "").strip() for each in segments
        ):
            progress.message(
                f"{without} segments have no {lang} reference: the teacher's word alone"
            )


def _line(segment_id: str, lang: str, found: Translation) -> dict[str, Any]:
    return {
        "id": segment_id,
        "lang": lang,
        "text": found.text,
        "tokens": found.tokens,
        "stopped": found.stopped,
    }


def write_rows(
    config: DistillConfig,
    segments: Sequence[Segment],
    found: dict[Key, list[Translation]],
    folder: Path,
) -> dict[str, Any]:
    """Writes the three files in the segments' order; returns counts."""
    translations, rows, dropped = [], [], []
    for segment in segments:
        for lang in config.langs:
            if not _is_wanted(config, segment, lang):
                continue
            reference = segment.references.get(lang, "").strip()
            if reference:
                rows.append(Row(segment.id, lang, reference, "reference").record())
            taken, left = {reference}, config.hypotheses
            for translation in found[segment.id, lang]:
                translations.append(_line(segment.id, lang, translation))
                if not left:
                    continue
                reason = drop_reason(config, translation, reference or None, lang)
                text = translation.text
                if reason is None and text.strip() in taken:
                    reason = "duplicate"  # of a better hypothesis
                is_reference = reason == "duplicate" and text.strip() == reference
                if reason is None or is_reference:  # the reference teaches what it would
                    left -= 1
                if reason is None:
                    taken.add(text.strip())
                    rows.append(Row(segment.id, lang, text, "teacher").record())
                else:
                    line = {"id": segment.id, "lang": lang, "text": text, "reason": reason}
                    dropped.append(line)
    _write_jsonl(folder / "translations.jsonl", translations)
    _write_jsonl(folder / "rows.jsonl", rows)
    _write_jsonl(folder / "dropped.jsonl", dropped)
    reasons = [line["reason"] for line in dropped]
    return {
        "translations": len(translations),
        "rows": len(rows),
        "dropped": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
    }


def drop_reason(
    config: DistillConfig, translation: Translation, reference: str | None, lang: str
) -> str | None:
    """Why a translation is no training row; None for a good one.

    empty; looping: it repeats itself, or met its token limit; too long, too short: against the reference;
    wrong: it has hardly anything of the reference; duplicate: it is the reference. Without a reference only
    the first two can be told.
    """
    text = translation.text.strip()
    if not text:
        return "empty"
    if translation.stopped != "end" or repeats_itself(translation.tokens):
        return "looping"
    return None if reference is None else _against(config, text, reference, lang)


def _against(config: DistillConfig, text: str, reference: str, lang: str) -> str | None:
    longest = config.max_length_ratio * len(reference) + SLACK_CHARACTERS
    shortest = (len(reference) - SLACK_CHARACTERS) / config.max_length_ratio
    tests: dict[str, Callable[[], bool]] = {
        "duplicate": lambda: text == reference,
        "too long": lambda: len(text) > longest,
        "too short": lambda: len(text) < shortest,
        "wrong": lambda: _sentence_score(text, reference, lang) < config.min_score,
    }
    return next((reason for reason, applies in tests.items() if applies()), None)


def _sentence_score(text: str, reference: str, lang: str) -> float:
    return score(language(lang).selection_metric, [text], [reference], lang).score


def repeats_itself(tokens: Sequence[int]) -> bool:
    """Whether one unit of tokens stands REPEATS times in a row anywhere, over REPEATED_TOKENS or more."""
    for unit in range(1, _LONGEST_UNIT + 1):
        needed = max(REPEATS * unit, REPEATED_TOKENS) - unit
        run = 0
        for before, token in zip(tokens, tokens[unit:], strict=False):
            run = run + 1 if before == token else 0
            if run >= needed:
                return True
    return False


def _check_rows(config: DistillConfig, folder: Path, counts: dict[str, Any]) -> None:
    """Refuses a language in which nothing is left to learn, as without references where the teacher only loops."""
    having = {row["lang"] for row in read_jsonl(folder / "rows.jsonl")}
    if missing := [lang for lang in config.langs if lang not in having]:
        raise InputError(
            f"Nothing is left to learn in {', '.join(missing)}: of {counts['translations']} translations were dropped: "
            + ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items()),
            expected="a teacher that translates into each of the languages",
            mend="name the languages that it was taught, or another teacher",
        )


def _keep_logits(
    config: DistillConfig,
    base: Path,
    corpus: Corpus,
    segments: Sequence[Segment],
    draft: Draft,
    folder: Path,
    progress: Progress,
) -> None:
    """The teacher reads every row and says what else it would have written."""
    speech = load_model(base, dtype=config.dtype, device=config.device)
    rows = read_rows(draft.path / "rows.jsonl", segments, config.langs)
    taught = {row.id for row in rows}
    segments = [each for each in segments if each.id in taught]  # as `tune` hears them
    sequences = build_sequences(speech, segments, rows, share_audio=True)
    audio = open_states(speech, corpus, segments, folder, progress)
    store_logits(speech, sequences, audio, draft.path, config.logits, progress)


def _write_jsonl(path: Path, lines: list[Any]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
    path.write_text(text, encoding="utf8")


def _told(counts: dict[str, Any]) -> str:
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items())
    return (
        f"{counts['rows']} rows from {counts['translations']} translations and their references; "
        f"dropped: {dropped or 'none'}"
    )
