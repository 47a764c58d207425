"""What a trimmed vocabulary keeps for a corpus and further texts, and what a user is told of the rest."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from export.vocabulary import TokenIds, encoded, kept_tokens, unseen_share
from halve.corpus import read_corpus
from halve.errors import InputError
from halve.progress import SILENT, Progress

_MOST_UNSEEN = 0.001
"""Share of tokens not kept from which a user is warned: one translation of 20 tokens in 50."""


def said_in(corpus: Path, langs: Sequence[str], progress: Progress = SILENT) -> list[str]:
    """The corpus's translations into the languages, but for those of `test`."""
    segments = [each for each in read_corpus(corpus).segments if each.split != "test"]
    for code in langs:
        if plain := sum(each.wants(code) and code not in each.references for each in segments):
            progress.warn(
                f"{plain} of {len(segments)} segments have no {code} reference: what their translations alone "
                "would need is trimmed, and the check on `select` does not show it."
            )
    return [each.references[code] for each in segments for code in langs if code in each.references]


def lines_of(files: Iterable[Path]) -> list[str]:
    """The lines of text files that are not empty.

    Raises:
        InputError: one is no text in UTF-8, or holds none.
    """
    found = []
    for path in files:
        try:
            text = path.read_text(encoding="utf8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} cannot be read: {error}", expected="text in UTF-8, a sentence a line"
            ) from None
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{path} holds no text", expected="text in UTF-8, a sentence a line")
        found += lines
    return found


def trimmed(
    tokenizer: Any, texts: Sequence[str], needed: Iterable[int], size: int, progress: Progress
) -> TokenIds:
    """The tokens to keep: see `kept_tokens`. Says how many, and what new translations are expected to lack."""
    ids = encoded(tokenizer, texts)
    kept = kept_tokens(tokenizer, ids, needed, size)
    share = unseen_share(ids)
    told = (
        f"the vocabulary is trimmed to {len(kept)} of {size} tokens, those of {len(ids)} texts; of the tokens of new "
        f"translations about {100 * share:.3g} % are expected not to be among them"
    )
    if share > _MOST_UNSEEN:
        progress.warn(
            f"{told}: the check on `select`, whose references are kept, shows less. More text in the target languages "
            "helps: `halve package --vocab-texts FILE` (in a recipe, vocab_texts), a line each"
        )
    else:
        progress.message(f"package: {told}")
    return kept
