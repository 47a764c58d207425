"""Rounds that stop a candidate before every segment is translated.

`bounded` stops what cannot win any more: same order as scoring everything. `racing` stops what will
hardly win, by paired bootstrap, and says how sure it is.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from compress.footprint import Fits
from compress.search import Candidate, Search, Tokens
from halve import metrics

PARTS = {"bounded": 6, "racing": 4}
"""Parts that the segments are cut into, where memory asks for no more: what can be saved is a part, and each part's
rows are decoded apart from the others', which costs the more the smaller it is."""
FIRST = {"bounded": 4, "racing": 1}
"""Parts that are translated together at first: before two thirds nobody is far enough behind for `bounded`."""
SMALLEST_PART = 4
FEWEST_TO_JUDGE = 16
"""Racing judges nobody on fewer segments than this."""
RESAMPLES = 400
"""Racing's resamples; more where the confidence asked for is finer than they can tell."""


def stratify(
    fits: Fits, lengths: Sequence[int], most: int, method: str = "racing"
) -> list[list[int]]:
    """Segments dealt out into as few parts as fit, alike in length, each of at most `most`.

    Those of FIRST are one, where that fits too.
    """
    count = len(lengths)
    order = sorted(range(count), key=lambda row: (-lengths[row], row))
    wanted = min(PARTS[method], count // SMALLEST_PART)
    parts = max(-(-count // most), wanted, 1)
    # The first part, with the longest of each rank, tells nearly always.
    while parts < count and not (fits([order[::parts]]) and fits(_dealt(order, parts))):
        parts += 1
    dealt, first = _dealt(order, parts), FIRST[method]
    together = [row for place, row in enumerate(order) if place % parts < first]
    if first < parts and len(together) <= most and fits([together]):
        return [together, *dealt[first:]]
    return dealt


def _dealt(order: Sequence[int], parts: int) -> list[list[int]]:
    return [list(order[part::parts]) for part in range(parts)]


def bounded(
    search: Search, number: int, kept: Sequence[int], drafts: Tokens, candidates: list[int]
) -> list[Candidate]:
    """Drops a candidate when even perfect translations of the rest would not make it the winner.

    The bound: the statistics of what is translated, plus for each other segment those of its reference
    as its own translation. For chrF nothing can be better: a further n-gram that matches raises every
    order's F-score, one that does not lowers it. For other metrics no bound is claimed, and all are scored.
    """
    chunks = range(len(search.chunks))
    alive = list(candidates)
    done: dict[int, Candidate] = {}
    leader: Candidate | None = None
    for chunk in chunks:
        search.translate(number, kept, drafts, alive, [chunk])
        seen = range(chunk + 1)
        if chunk + 1 == len(chunks):
            break
        bounds = {layer: upper_bound(search, number, layer, seen) for layer in alive}
        first = max(alive, key=lambda layer: (_partial(search, number, layer, seen), -layer))
        if leader is None:
            if min(bounds.values()) >= _partial(search, number, first, seen):
                continue  # nobody can be far enough behind yet to be worth a leader's whole score
            search.translate(number, kept, drafts, [first], chunks)
            leader = _complete(search, number, first)
        for layer in list(alive):
            if (bounds[layer], -layer) < (leader.score, -leader.layer) and layer != leader.layer:
                alive.remove(layer)
                search.skip(len(chunks) - chunk - 1)
                facts = {"settled": "bound", "segments": _count(search, seen)}
                done[layer] = Candidate(number, layer, bounds[layer], facts)
    done |= {layer: _complete(search, number, layer) for layer in alive}
    return [done[layer] for layer in candidates]


def upper_bound(search: Search, number: int, layer: int, seen: Sequence[int]) -> float:
    """The most that a candidate can still score, after the chunks `seen`."""
    task = search.task
    if not task.metric.startswith("chrf"):
        return 100.0
    rows = _rows(search, seen)
    known = set(rows)
    rest = [row for row in range(len(task.ids)) if row not in known]
    sums = _statistics(search, number, layer, seen).sum(axis=0)
    if (sums[0::3] == 0).any():
        # An order without a single n-gram would be left out of the mean: no bound holds.
        return 100.0
    perfect = [task.references[row] for row in rest]
    sums = sums + metrics.segment_statistics(task.metric, perfect, perfect, task.lang).sum(axis=0)
    return metrics.score_from_statistics(task.metric, sums, task.lang)


def racing(
    search: Search,
    number: int,
    kept: Sequence[int],
    drafts: Tokens,
    candidates: list[int],
    *,
    confidence: float,
    seed: int,
) -> list[Candidate]:
    """Drops a candidate when the leader beats it in more than `confidence` of the bootstrap's resamples.

    Paired bootstrap over the segments translated so far (Koehn 2004), after each part. The confidence
    is of each comparison, not of the whole order.
    """
    chunks = len(search.chunks)
    alive = list(candidates)
    done: dict[int, Candidate] = {}
    for chunk in range(chunks):
        search.translate(number, kept, drafts, alive, [chunk])
        seen = range(chunk + 1)
        if chunk + 1 == chunks or _count(search, seen) < FEWEST_TO_JUDGE:
            continue
        generator = np.random.default_rng([seed, number, chunk])
        resamples = max(RESAMPLES, round(4 / (1 - confidence)))
        for layer, sure in _beaten(search, number, alive, seen, generator, resamples).items():
            if sure > confidence:
                alive.remove(layer)
                search.skip(chunks - chunk - 1)
                facts = {"settled": "race", "segments": _count(search, seen), "confidence": sure}
                done[layer] = Candidate(number, layer, _partial(search, number, layer, seen), facts)
    done |= {layer: _complete(search, number, layer) for layer in alive}
    return [done[layer] for layer in candidates]


def _beaten(
    search: Search,
    number: int,
    alive: Sequence[int],
    seen: Sequence[int],
    generator: np.random.Generator,
    resamples: int,
) -> dict[int, float]:
    """For each candidate but the leader, the share of resamples in which the leader scores better.

    The resample at hand counts as one against it (Davison and Hinkley 1997, section 4.2), so that no
    finite number of resamples makes anything certain.
    """
    task = search.task
    statistics = {layer: _statistics(search, number, layer, seen) for layer in alive}
    leader = max(alive, key=lambda layer: (_partial(search, number, layer, seen), -layer))
    count = _count(search, seen)
    weights = generator.multinomial(count, [1 / count] * count, size=resamples).astype(np.float64)
    scores = {
        layer: np.array(
            [metrics.score_from_statistics(task.metric, sums, task.lang) for sums in weights @ rows]
        )
        for layer, rows in statistics.items()
    }
    return {
        layer: float((scores[layer] < scores[leader]).sum() / (resamples + 1))
        for layer in alive
        if layer != leader
    }


def _rows(search: Search, seen: Sequence[int]) -> list[int]:
    return [row for chunk in seen for row in search.chunks[chunk]]


def _count(search: Search, seen: Sequence[int]) -> int:
    return len(_rows(search, seen))


def _statistics(
    search: Search, number: int, layer: int, seen: Sequence[int]
) -> NDArray[np.float64]:
    """Per-segment statistics of what a candidate has translated: (segments, statistics)."""
    task, rows = search.task, _rows(search, seen)
    tokens = search.tokens(number, layer, seen)
    texts = task.texts([tokens[row] for row in rows])
    references = [task.references[row] for row in rows]
    return metrics.segment_statistics(task.metric, texts, references, task.lang)


def _partial(search: Search, number: int, layer: int, seen: Sequence[int]) -> float:
    sums = _statistics(search, number, layer, seen).sum(axis=0)
    return metrics.score_from_statistics(search.task.metric, sums, search.task.lang)


def _complete(search: Search, number: int, layer: int) -> Candidate:
    return Candidate(number, layer, search.task.score(search.tokens(number, layer)).score)
