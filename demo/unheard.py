"""Speech that the demo teacher was not trained on, without translations, for `halve distill --untranslated`.

    python -m demo.unheard --corpus runs/demo-corpus --out runs/unheard [--segments 6000]

English sentences of the GIMP help, read aloud by the training voices of demo/voices.py, as `train`; `select` is the
demo corpus's own. No sentence that is too alike to one of `select` or `test` is taken (demo/splits.py), nor one that
the teacher heard. The text is under the GNU Free Documentation License; the corpus is not committed.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

from demo.build_corpus import DEFAULT_CACHE, DEFAULT_OUT, Utterance, facts, say, synthesise_all
from demo.packages import GIMP_VERSION, fetch_gimp_help, require_voices
from demo.splits import too_alike
from demo.triples import (
    MIN_WORDS,
    UNSPEAKABLE,
    Triple,
    english_can_be_spoken,
    split_sentences,
    tidy,
)
from halve.artefact import writing
from halve.corpus import Corpus, Segment, read_corpus, write_manifest
from halve.errors import CorpusError, HalveError
from halve.json_files import append_jsonl

MAX_WORDS = 20
_CODE_TAGS = frozenset({"code", "tt", "kbd", "img", "sup", "sub"})


class _Paragraphs(HTMLParser):
    """Collects the text of each `<p>` of a DocBook page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._pieces: list[str] | None = None
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self._pieces, self._skipped = [], 0
        elif self._pieces is not None and tag in _CODE_TAGS:
            self._pieces.append(UNSPEAKABLE)
            self._skipped += tag != "img"

    def handle_endtag(self, tag: str) -> None:
        if self._pieces is None:
            return
        if tag == "p":
            self.found.append(" ".join("".join(self._pieces).split()))
            self._pieces = None
        elif tag in _CODE_TAGS and tag != "img":
            self._skipped = max(0, self._skipped - 1)

    def handle_data(self, data: str) -> None:
        if self._pieces is not None and not self._skipped:
            self._pieces.append(data)


def sentences(html: str) -> list[str]:
    """The sentences of a page that can be said aloud, of 3 to 20 words."""
    parser = _Paragraphs()
    parser.feed(html)
    parser.close()
    tidied = [
        tidy(sentence, "en") for text in parser.found for sentence in split_sentences(text, "en")
    ]
    return [
        text
        for text in tidied
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS
        and text[-1] in ".!?"
        and english_can_be_spoken(text)
    ]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def untranslated(help_root: Path, heard: Corpus, seed: int) -> list[Triple]:
    """Sentences of the help, shuffled; German and Chinese are empty.

    Args:
        help_root: the folder of the English pages.
        heard: the corpus whose sentences are left out: those of `train` where equal, of `select` and `test` where alike.
    """
    seen = {_plain(segment.source_text) for segment in heard.segments}
    found: list[Triple] = []
    for page in sorted(help_root.glob("*.html")):
        for index, text in enumerate(sentences(page.read_text(encoding="utf-8"))):
            if _plain(text) not in seen:
                seen.add(_plain(text))
                found.append(Triple(f"{page.stem}#{index}", f"gimp/{page.stem}", text, "", ""))
    held_out = [
        Triple(each.id, each.group, each.source_text, *map(each.references.get, ("de", "zh")))  # type: ignore[arg-type]
        for each in heard.segments
        if each.split != "train"
    ]
    alike = set().union(*too_alike(held_out, found))
    kept = [triple for number, triple in enumerate(found) if number not in alike]
    say(f"{len(found)} sentences, {len(found) - len(kept)} of them too alike to select or test")
    random.Random(seed).shuffle(kept)
    return kept


def _spoken(triples: Sequence[Triple]) -> list[Utterance]:
    return [
        Utterance(f"unheard-{number:05d}", "train", triple)
        for number, triple in enumerate(triples, 1)
    ]


def build(heard: Corpus, triples: Sequence[Triple], out: Path, seed: int, processes: int) -> None:
    """Makes the corpus artefact in `out`; files that a killed build left are not spoken again."""
    recipe = {
        "source": f"GIMP help {GIMP_VERSION}, spoken by espeak-ng and flite, untranslated",
        "segments": len(triples),
    }
    with writing(out, "corpus", recipe, seed, {"select": heard.path}) as draft:
        started = time.monotonic()
        journal = (
            draft.work / "spoken.jsonl"
        )  # a build that is stopped, and not only killed, keeps its files
        segments = list(_copied(heard, draft.path))
        for segment in synthesise_all(_spoken(triples), draft.path, seed, processes):
            append_jsonl(journal, segment.id)
            segments.append(_without_text(segment))
        draft.timing("synthesis", time.monotonic() - started, segments=len(triples))
        write_manifest(draft.path, segments)
        draft.extra = facts(segments)


def _without_text(segment: Segment) -> Segment:
    """As speech comes that nobody wrote down: what was said is the synthesiser's alone."""
    return Segment(**(vars(segment) | {"source_text": "", "references": {}}))


def _copied(heard: Corpus, folder: Path) -> Iterator[Segment]:
    for segment in heard.split("select"):
        target = folder / segment.audio
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(heard.path / segment.audio, target)
        yield segment


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speech that the demo teacher never heard.")
    parser.add_argument("--corpus", type=Path, default=DEFAULT_OUT, help="the whole demo corpus")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for the packages")
    parser.add_argument("--segments", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _arguments(argv)
    try:
        heard = read_corpus(arguments.corpus)
        found = untranslated(fetch_gimp_help(arguments.cache), heard, arguments.seed)
        if len(found) < arguments.segments:
            raise CorpusError(
                f"the help has {len(found)} sentences to speak", f"{arguments.segments} of them"
            )
        require_voices()
        chosen = found[: arguments.segments]
        build(heard, chosen, arguments.out, arguments.seed, arguments.processes)
    except HalveError as error:
        say(f"error: {error}")
        return error.exit_code
    say(f"the corpus is in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
