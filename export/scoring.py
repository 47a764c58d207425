"""Scores on `select`: what merging chooses by, and what packages are judged by."""

from collections.abc import Sequence
from pathlib import Path

from halve.corpus import Corpus, Segment, read_corpus
from halve.errors import CorpusError, InputError
from halve.families import Source
from halve.languages import language
from halve.metrics import Score, score
from halve.progress import Advance, nowhere
from halve.sources import read_sources
from halve.translate import Translation, Translator, plan_batches

_BATCHES = 8
"""Batches that are translated between two signs of life."""


class SelectSet:
    """The segments of `select` in one language, with their audio, or their text for a model that reads."""

    def __init__(self, corpus: Corpus, lang: str, limit: int | None, reads: str = "audio") -> None:
        self.lang = language(lang).code
        self.metric = language(lang).selection_metric
        self.segments: list[Segment] = corpus.split("select", self.lang, limit)
        self.audio: list[Source] = read_sources(reads, corpus, self.segments)
        self.references = corpus.references(self.segments, self.lang)

    def translate(
        self, translator: Translator, batch_size: int, advance: Advance = nowhere
    ) -> list[Translation]:
        """All segments' translations, under the limits that their durations give."""
        found: dict[int, Translation] = {}
        # The batches are those of a single call: of like length, longest first.
        for places in plan_batches([len(each) for each in self.audio], _BATCHES * batch_size):
            sources = [self.audio[place] for place in places]
            rows = translator.translate(sources, self.lang, batch_size=batch_size)
            found.update(zip(places, rows, strict=True))
            advance(len(places))
        return [found[place] for place in range(len(self.audio))]

    def scored(self, translations: Sequence[Translation]) -> Score:
        """The corpus score by the language's selection metric, with its signature."""
        texts = [translation.text for translation in translations]
        return score(self.metric, texts, self.references, self.lang)


def languages_of(corpus: Corpus) -> list[str]:
    """The languages that `select` has references in."""
    found = {code for s in corpus.segments if s.split == "select" for code in s.references}
    return sorted(found)


def open_select_sets(
    corpus_path: Path | None, langs: Sequence[str], limit: int | None, reads: str = "audio"
) -> list[SelectSet]:
    """The select sets of `langs`, of all the corpus's languages where that is empty.

    Args:
        reads: audio or text, as the model's family says.

    Raises:
        InputError: there is no corpus.
        CorpusError: it has no such segments.
    """
    if corpus_path is None:
        raise InputError(
            "Scoring needs a corpus",
            expected="a corpus with a `select` split",
            mend="name --corpus",
        )
    corpus = read_corpus(corpus_path)
    wanted = langs or languages_of(corpus)
    if not wanted:
        corpus.split("select")  # says where there is none at all
        raise CorpusError(
            f"{corpus.path}: no select segment has a translation",
            expected="references in `select` to score with",
            mend="name another corpus",
        )
    return [SelectSet(corpus, lang, limit, reads) for lang in wanted]
