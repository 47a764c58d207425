"""Splits by page, and no `select` or `test` sentence that resembles a `train` sentence.

Help text is full of near duplicates. Two sentences are too alike if their English shares a run
of eight words, or one of two similarities is over 0.8: the cosine of their character-trigram
counts, or difflib's ratio (2 x matching characters / all characters, the better of both
directions), both of the case-folded text. A pair with a trigram cosine under 0.45 is not given to
difflib: a ratio over 0.8 needs long common runs, and those are common trigrams (the least cosine
of such a pair in a sample of 241,000 pairs over 0.25 was 0.57). Equal German or
Chinese references count as too alike as well.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import numpy.typing as npt

from demo.triples import Triple
from halve.errors import CorpusError

NGRAM_WORDS = 8
MAX_SIMILARITY = 0.8
_PREFILTER_COSINE = 0.45
_ROWS_AT_ONCE = 64
# Of the sentences of a page drawn for test, about this part outlives the check against train.
_EXPECTED_SURVIVORS = 0.85


@dataclass(frozen=True)
class Splits:
    """The three splits (train in shuffled order) and what was left out, by reason."""

    select: list[Triple]
    test: list[Triple]
    train: list[Triple]
    counts: dict[str, int]


def words(text: str) -> list[str]:
    """Case-folded words and numbers of a sentence."""
    return re.findall(r"[^\W_]+", text.casefold())


def ngrams(text: str, n: int = NGRAM_WORDS) -> set[tuple[str, ...]]:
    """Runs of `n` words of a sentence."""
    found = words(text)
    return {tuple(found[start : start + n]) for start in range(len(found) - n + 1)}


def difflib_ratio(first: str, second: str) -> float:
    """difflib's similarity of two strings, the better of both directions."""
    return max(
        SequenceMatcher(None, first, second, autojunk=False).ratio(),
        SequenceMatcher(None, second, first, autojunk=False).ratio(),
    )


def _trigram_rows(
    texts: Sequence[str], columns: dict[str, int]
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Per text the column numbers and unit-length counts of its character trigrams."""
    rows = []
    for text in texts:
        padded = f"  {text} "
        counts: dict[int, int] = defaultdict(int)
        for start in range(len(padded) - 2):
            counts[columns.setdefault(padded[start : start + 3], len(columns))] += 1
        values = np.fromiter(counts.values(), np.float32)
        rows.append((np.fromiter(counts, np.int64), values / np.linalg.norm(values)))
    return rows


def too_alike(held_out: Sequence[Triple], others: Sequence[Triple]) -> list[set[int]]:
    """For each held-out triple the indices of `others` that it is too alike to (see above)."""
    alike: list[set[int]] = [set() for _ in held_out]
    _add_equal_pieces(alike, held_out, others)
    columns: dict[str, int] = {}
    other_texts = [" ".join(triple.en.casefold().split()) for triple in others]
    texts = [" ".join(triple.en.casefold().split()) for triple in held_out]
    other_rows = _trigram_rows(other_texts, columns)
    rows = _trigram_rows(texts, columns)
    column_of = np.concatenate([index for index, _ in other_rows])
    value_of = np.concatenate([value for _, value in other_rows])
    starts = np.cumsum([0] + [len(index) for index, _ in other_rows[:-1]])
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        for number, (index, value) in enumerate(rows[start : start + _ROWS_AT_ONCE], start):
            dense = np.zeros(len(columns), np.float32)
            dense[index] = value
            cosines = np.add.reduceat(dense[column_of] * value_of, starts)
            for candidate in np.flatnonzero(cosines > _PREFILTER_COSINE):
                if cosines[candidate] > MAX_SIMILARITY or _ratio_over(
                    texts[number], other_texts[candidate]
                ):
                    alike[number].add(int(candidate))
    return alike


def _ratio_over(first: str, second: str) -> bool:
    shorter, longer = sorted((len(first), len(second)))
    if 2 * shorter <= MAX_SIMILARITY * (shorter + longer):
        return False  # even if the whole of the shorter one matched
    if SequenceMatcher(None, first, second, autojunk=False).quick_ratio() <= MAX_SIMILARITY:
        return False
    return difflib_ratio(first, second) > MAX_SIMILARITY


def _pieces(triple: Triple) -> Iterable[Any]:
    yield "de", triple.de
    yield "zh", triple.zh
    yield from ngrams(triple.en)


def _add_equal_pieces(
    alike: list[set[int]], held_out: Sequence[Triple], others: Sequence[Triple]
) -> None:
    holders: dict[Any, set[int]] = defaultdict(set)
    for number, triple in enumerate(others):
        for piece in _pieces(triple):
            holders[piece].add(number)
    for number, triple in enumerate(held_out):
        for piece in _pieces(triple):
            alike[number] |= holders.get(piece, set())


def _draw_pages(
    pages: dict[str, list[Triple]], order: list[str], sentences: int
) -> tuple[list[str], list[Triple]]:
    """Takes pages off the end of `order` until they hold `sentences` sentences."""
    drawn: list[str] = []
    triples: list[Triple] = []
    while len(triples) < sentences and order:
        drawn.append(order.pop())
        triples += pages[drawn[-1]]
    return drawn, triples


def _without(alike: list[set[int]], triples: list[Triple]) -> list[Triple]:
    return [triple for triple, found in zip(triples, alike, strict=True) if not found]


def split_triples(
    triples: Sequence[Triple], seed: int, select_size: int = 120, test_size: int = 1050
) -> Splits:
    """Pages dealt by chance into select, test and train; then what is too alike goes.

    A held-out sentence that is too alike to more than one `train` sentence is dropped; one that
    is too alike to a single one stays and the `train` sentence is dropped. So little of either
    is lost. `select` is treated in the same way against `test` and `train`.
    """
    rng = random.Random(seed)
    pages: dict[str, list[Triple]] = defaultdict(list)
    for triple in triples:
        pages[triple.page].append(triple)
    # By hash, so that a page keeps its place when others come or go.
    order = sorted(pages, key=lambda page: hashlib.sha256(f"{seed}/{page}".encode()).digest())
    # Very long pages (lists of settings) would make a held-out split of one kind of sentence.
    order.sort(key=lambda page: len(pages[page]) <= 40)
    select_pages, select_pool = _draw_pages(pages, order, int(select_size / _EXPECTED_SURVIVORS))
    test_pages, test_pool = _draw_pages(pages, order, int(test_size / _EXPECTED_SURVIVORS))
    held = set(select_pages) | set(test_pages)
    train = [triple for triple in triples if triple.page not in held]
    counts = {"select drawn": len(select_pool), "test drawn": len(test_pool)}
    counts["train before"] = len(train)

    test, train = _part(test_pool, train, test_size, rng, counts, "test")
    select_pool = _without(too_alike(select_pool, test), select_pool)
    select, train = _part(select_pool, train, select_size, rng, counts, "select")
    rng.shuffle(train)  # so that the first N of train are a fair sample of it
    counts |= {"select": len(select), "test": len(test), "train": len(train)}
    return Splits(select, test, train, counts)


def _part(
    pool: list[Triple],
    train: list[Triple],
    size: int,
    rng: random.Random,
    counts: dict[str, int],
    name: str,
) -> tuple[list[Triple], list[Triple]]:
    """`size` triples of the pool, and the train triples that none of them is too alike to."""
    alike = too_alike(pool, train)
    kept = [number for number, found in enumerate(alike) if len(found) <= 1]
    counts[f"{name} too alike to several of train"] = len(pool) - len(kept)
    if len(kept) < size:
        raise CorpusError(f"only {len(kept)} {name} sentences are left", f"{size} sentences")
    kept = sorted(rng.sample(kept, size))
    gone = set().union(*(alike[number] for number in kept))
    counts[f"train too alike to one of {name}"] = len(gone)
    return (
        [pool[number] for number in kept],
        [triple for number, triple in enumerate(train) if number not in gone],
    )
