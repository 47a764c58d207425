"""Training rows: which texts a model learns from which segment, and their tokens."""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from compress.collate import Branch, TrainingSequence
from halve.corpus import Corpus, Segment, evenly
from halve.errors import ArtefactError, CorpusError, FamilyError
from halve.families import SourceText
from halve.families.text import written_chat
from halve.json_files import read_jsonl
from halve.languages import language
from halve.models import SpeechModel
from halve.sources import asked as asked_for
from halve.sources import spoken


@dataclass(frozen=True)
class Row:
    """One text of one segment."""

    id: str
    """The segment's id."""
    lang: str
    text: str
    origin: str
    """reference, teacher, or transcript."""
    number: int = -1
    """Its line in rows.jsonl, from 0; -1 where it comes from elsewhere."""

    def record(self) -> dict[str, str]:
        """The line of rows.jsonl."""
        return {"id": self.id, "lang": self.lang, "text": self.text, "origin": self.origin}


def segments_for(
    corpus: Corpus,
    split: str,
    langs: Sequence[str],
    limit: int | None,
    untranslated: bool = False,
) -> list[Segment]:
    """Segments of a split that have a reference in any of the languages, in the manifest's order.

    Args:
        untranslated: those without any reference, too.

    Raises:
        CorpusError: a language has none at all, or none among so few.
    """
    if untranslated:
        return evenly(_worth_translating(corpus, split, langs), limit)
    wanted = {segment.id for lang in langs for segment in corpus.split(split, lang)}
    found = [segment for segment in corpus.split(split) if segment.id in wanted]
    found = evenly(found, limit)
    for lang in langs:
        if not any(lang in segment.references for segment in found):
            raise CorpusError(
                f"Of {limit} {split} segments none has a {lang} reference",
                expected=f"some of the {len(corpus.split(split, lang))} that have one",
                mend="raise the limit, or name this language alone",
            )
    return found


def _worth_translating(corpus: Corpus, split: str, langs: Sequence[str]) -> list[Segment]:
    """Segments of a split that need no reference: those that are not in the wanted language already.

    Raises:
        CorpusError: no segment of the corpus has a reference in one of the languages, so that nothing made for
            it could be scored; or the split has none that could be translated.
    """
    for lang in langs:
        if not any(lang in segment.references for segment in corpus.segments):
            corpus.split(split, lang)  # says which languages there are
    found = [segment for segment in corpus.split(split) if any(map(segment.wants, langs))]
    if not found:
        raise CorpusError(
            f"{corpus.path}: every {split} segment is spoken in {', '.join(langs)} already",
            expected="segments in another language than they are translated into",
        )
    return found


def reference_rows(
    segments: Iterable[Segment], langs: Sequence[str], transcribe: bool = False
) -> list[Row]:
    """The segments' references, and their transcripts if asked."""
    rows = []
    for segment in segments:
        for lang in langs:
            if segment.references.get(lang, "").strip():
                rows.append(Row(segment.id, lang, segment.references[lang].strip(), "reference"))
        if transcribe and segment.source_text.strip():
            text = segment.source_text.strip()
            rows.append(Row(segment.id, segment.source_lang, text, "transcript"))
    return rows


def read_rows(path: Any, segments: Sequence[Segment], langs: Sequence[str]) -> list[Row]:
    """The rows.jsonl of a translations artefact, for these segments and languages.

    Raises:
        CorpusError: none of its rows fits, or none in one of the languages.
        ArtefactError: a line that is no row.
    """
    ids = {segment.id for segment in segments}
    rows = [_row(path, number, record) for number, record in enumerate(read_jsonl(path))]
    found = [row for row in rows if row.id in ids and row.lang in langs]
    if missing := set(langs) - {row.lang for row in found}:
        raise CorpusError(
            f"{path} has no row for this corpus in {', '.join(sorted(missing))}",
            expected="translations made from the same corpus and language",
            mend="run `halve distill` with this corpus and --lang",
        )
    return found


def _row(path: Any, number: int, record: Any) -> Row:
    names = {"id", "lang", "text", "origin"}
    fits = isinstance(record, dict) and record.keys() == names
    if not fits or not all(isinstance(value, str) for value in record.values()):
        raise ArtefactError(
            f"{path}, line {number + 1}: no training row",
            expected="an object with id, lang, text and origin, all of them text",
            mend="run `halve distill` again",
        )
    return Row(**record, number=number)


def build_sequences(
    speech: SpeechModel, segments: Sequence[Segment], rows: Sequence[Row], share_audio: bool
) -> list[TrainingSequence]:
    """Rows as token sequences, in the segments' order; a segment's rows share one if asked.

    Raises:
        FamilyError: the prompt leaves nothing to predict the first token from.
        CorpusError: a text is longer than the decoder has places for.
    """
    # Whisper learns a vector for each place; other decoders turn theirs, and have no such end.
    places = getattr(speech.part(speech.family.decoder).config, "max_target_positions", None)
    by_segment: dict[str, list[Row]] = {}
    for row in rows:
        by_segment.setdefault(row.id, []).append(row)
    end = end_token(speech)
    prompts: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    sequences = []
    for place, segment in enumerate(segments):
        heads: dict[tuple[int, ...], list[Branch]] = {}
        for row in by_segment.get(segment.id, ()):
            head, tail = _prompt(speech, segment, row, prompts)
            target = (*_tokens(speech, row.text), end)
            if places is not None and len(head) + len(tail) + len(target) > places + 1:
                raise CorpusError(
                    f"The {row.lang} text of segment {segment.id} has {len(target)} tokens",
                    expected=f"at most {places + 1 - len(head) - len(tail)}: the decoder has {places} places",
                    mend="leave this segment out of the corpus, or cut it into shorter ones",
                )
            heads.setdefault(head, []).append(Branch(tail, target, row.number))
        for head, branches in heads.items():
            parts = [tuple(branches)] if share_audio else [(branch,) for branch in branches]
            sequences += [TrainingSequence(place, head, part) for part in parts]
    return sequences


def end_token(speech: SpeechModel) -> int:
    """The token that a translation is taught to end with.

    The one that ends a turn in the model's chat template (Gemma's is not its tokenizer's own); without a
    template the tokenizer's own, if generation stops there.
    """
    ends = speech.family.end_ids(speech.model)
    tokenizer = speech.processor.tokenizer
    own = tokenizer.eos_token_id
    if not getattr(tokenizer, "chat_template", None):
        # Older releases keep it in a file that the processor alone reads: the prompt is made of that.
        tokenizer = copy(tokenizer)
        tokenizer.chat_template = getattr(speech.processor, "chat_template", None)
    found = _end_of_turn(tokenizer, ends)
    if found is not None:
        return found
    return own if own in ends else ends[0]


_ANSWER = "translation"


def _end_of_turn(tokenizer: Any, ends: Sequence[int]) -> int | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]
    try:
        written = written_chat(tokenizer, chat, add_generation_prompt=False)
    except TemplateError:  # one that takes no plain text
        return None
    _, _, after = written.rpartition(_ANSWER)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in ends), None)


def _prompt(
    speech: SpeechModel,
    segment: Segment,
    row: Row,
    known: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    family = speech.family
    if family.reads == "text":
        source = SourceText(segment.source_text, segment.source_lang)
        ids = family.source_ids(speech.processor, asked_for(family, row.lang, source), source)
        # The last token is what the first one of the translation is predicted from.
        return tuple(ids[:-1]), (ids[-1],)
    asked = (
        family.transcription(spoken(segment.source_lang))
        if row.origin == "transcript"
        else family.instruction(language(row.lang))
    )
    if asked not in known:
        head, tail = family.prompt_ids(speech.processor, asked)
        if not tail:
            raise FamilyError(f"The {family.name} prompt has no token after the audio")
        known[asked] = (tuple(head), tuple(tail))
    return known[asked]


def _tokens(speech: SpeechModel, text: str) -> list[int]:
    encoded: Mapping[str, list[int]] = speech.processor.tokenizer(
        speech.family.said(text), add_special_tokens=False
    )
    return list(encoded["input_ids"])
