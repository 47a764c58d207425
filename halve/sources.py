"""What a model is given for a segment of a corpus, and how much it may say about it."""

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from halve import environment
from halve.audio import SAMPLE_RATE_HZ
from halve.corpus import Corpus, Segment
from halve.errors import CorpusError
from halve.families import Family, Source, SourceText
from halve.languages import ENGLISH, LANGUAGES, Language, language, token_limit
from halve.progress import Progress

TOKENS_BEFORE_TEXT = 24
TOKENS_PER_BYTE = 1.6
"""Of the source in UTF-8: Thai or Persian in Mistral's 32,000 tokens take over one a byte of English."""


def read_source(reads: str, corpus: Corpus, segment: Segment) -> Source:
    """The segment's audio, or for a model that reads, its source text.

    Args:
        reads: audio or text, as the model's family says.

    Raises:
        CorpusError: the segment has none.
    """
    check_sources(reads, corpus, [segment])
    if reads == "text":
        return SourceText(segment.source_text.strip(), segment.source_lang)
    return corpus.audio(segment)


def check_sources(reads: str, corpus: Corpus, segments: Sequence[Segment]) -> None:
    """Refuses segments without what a model is given, before anything is computed.

    Raises:
        CorpusError: as `read_source`, of the first segment that has none.
    """
    for segment in segments:
        if reads == "text" and not segment.source_text.strip():
            raise CorpusError(
                f"Segment {segment.id} of {corpus.path} has no source text",
                expected="a transcript for every segment: a text model reads it",
                mend="import the corpus with its transcripts, or with --faulty drop",
            )
        if reads == "audio" and not segment.audio:
            raise CorpusError(
                f"Segment {segment.id} of {corpus.path} has no audio",
                expected="a corpus of speech: this model listens",
                mend="name a corpus with audio, or a text model",
            )


def read_sources(reads: str, corpus: Corpus, segments: Sequence[Segment]) -> list[Source]:
    """What `read_source` gives of each segment; audio is decoded on all cores.

    Raises:
        CorpusError: as `read_source`, of the first segment that has none.
    """
    read = partial(read_source, reads, corpus)
    if reads == "text" or len(segments) < 2:
        return [read(segment) for segment in segments]
    with ThreadPoolExecutor(environment.cores()) as pool:
        return list(pool.map(read, segments))


def source_language(source: object) -> Language:
    """The language that a source is in: English for audio, whose prompt is the paper's."""
    return spoken(source.lang) if isinstance(source, SourceText) else ENGLISH


def spoken(code: str) -> Language:
    """A segment's language; English where halve has no name for it."""
    return language(code) if code in LANGUAGES else ENGLISH


def warn_of_speech(reads: str, segments: Sequence[Segment], progress: Progress) -> None:
    """Says so where the prompt calls speech English that is not: see `source_language`."""
    if reads == "text":
        return
    spoken = Counter(each.source_lang for each in segments)
    others = sorted(set(spoken) - {ENGLISH.code})
    if others:
        count = sum(spoken[lang] for lang in others)
        progress.warn(
            f"{count} of {len(segments)} segments are spoken in {', '.join(others)}, and the model is asked to "
            "translate English speech: halve knows no other prompt for audio. Tuning can teach the model what "
            "is meant; an untuned one may do worse than it could."
        )


def asked(family: Family, lang: str, source: object) -> str:
    """The instruction to translate a source, or what the family took in of it, into `lang`."""
    return family.instruction(language(lang), source_language(source))


def text_limit(text: str) -> int:
    """The most tokens that the translation of a text may take: only a runaway loop meets this."""
    return TOKENS_BEFORE_TEXT + math.ceil(TOKENS_PER_BYTE * len(text.strip().encode()))


def segment_limit(reads: str, segment: Segment) -> int:
    """The most tokens that a segment's translation may take."""
    if reads == "text":
        return text_limit(segment.source_text)
    return token_limit(segment.duration_s)


def limits_for(sources: Sequence[Source], limits: Sequence[int] | None) -> list[int]:
    """Token limits: those given, else by each source's length."""
    if limits is not None:
        return list(limits)
    return [
        text_limit(source.text)
        if isinstance(source, SourceText)
        else token_limit(len(source) / SAMPLE_RATE_HZ)
        for source in sources
    ]
