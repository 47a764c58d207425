"""The greedy search over decoder layers, and its memory of what is already translated.

A round translates the segments once without each layer that may go, scores the translations, and drops
the layer whose absence scores best (Moslem 2025; iteratively: Moslem, Al Farouq and Kelleher 2025).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from compress.task import SearchTask
from halve.artefact import append_jsonl, read_jsonl
from halve.progress import Advance

Tokens = list[list[int]]


class CandidateTranslator(Protocol):
    """Translates segments with a layer left out."""

    def row_bytes(self) -> list[int]:
        """The most memory that each segment takes while it is worked on."""
        ...

    def run(
        self,
        kept: Sequence[int],
        drafts: Sequence[Sequence[int]],
        candidates: Sequence[int | None],
        rows: Sequence[int],
    ) -> Iterator[tuple[int | None, Tokens]]:
        """See `ExactTranslator.run`."""
        ...


@dataclass(frozen=True)
class Candidate:
    """One line of importance.jsonl: the teacher without a layer, and how well it does."""

    round: int
    """From 1."""
    layer: int
    """As numbered in the teacher."""
    score: float
    facts: dict[str, Any] = field(default_factory=dict)
    """What the method adds: a bound instead of a score, how many segments it saw, …"""


@dataclass(frozen=True)
class Ranking:
    """What a search found."""

    removed: tuple[int, ...]
    """In the order of removal."""
    candidates: tuple[Candidate, ...]
    """By round, then by layer."""
    metric: str
    signature: str
    baseline: float | None = None
    """The score with no layer removed."""


def removable(kept: Sequence[int], num_layers: int) -> list[int]:
    """The layers of `kept` that may go: all but the teacher's first and last."""
    return [layer for layer in kept if layer not in (0, num_layers - 1)]


class Ledger:
    """Every finished piece of work, on disk as soon as it is done: a killed search repeats none of it.

    One line a piece: the round, the layer left out (null for none), the chunk of segments, and what was
    found. The chunks stand in the first line, so that a resumed search cuts the segments as before.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks: list[list[int]] | None = None
        self._found: dict[tuple[int, int | None, int], Any] = {}
        for record in read_jsonl(path):
            if "chunks" in record:
                self._chunks = record["chunks"]
            else:
                self._found[record["round"], record["layer"], record["chunk"]] = record["found"]

    def chunks(self, plan: Callable[[], list[list[int]]]) -> list[list[int]]:
        """The chunks of an earlier run, or new ones."""
        if self._chunks is None:
            self._chunks = plan()
            append_jsonl(self._path, {"chunks": self._chunks})
        return self._chunks

    @property
    def started(self) -> bool:
        """Whether an earlier run left something."""
        return self._chunks is not None

    def __contains__(self, key: tuple[int, int | None, int]) -> bool:
        return key in self._found

    def __getitem__(self, key: tuple[int, int | None, int]) -> Any:
        return self._found[key]

    def add(self, key: tuple[int, int | None, int], found: Any) -> None:
        """Records one piece of work."""
        record = {"round": key[0], "layer": key[1], "chunk": key[2], "found": found}
        append_jsonl(self._path, record)
        self._found[key] = found

    def pieces(self) -> int:
        """How many pieces of candidates are done (the whole model's translation is not one)."""
        return sum(layer is not None for _, layer, _ in self._found)


def plan_chunks(
    row_bytes: Sequence[int], lengths: Sequence[int], most: int, budget: int
) -> list[list[int]]:
    """Segments of like length in chunks of at most `most` that take at most `budget` bytes each."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    chunks: list[list[int]] = []
    room = 0
    for row in order:
        if not chunks or len(chunks[-1]) >= most or row_bytes[row] > room:
            chunks.append([])
            room = budget
        chunks[-1].append(row)
        room -= row_bytes[row]
    return chunks


class Search:
    """One search under way: runs candidates on chunks of segments, and remembers."""

    def __init__(
        self,
        translator: CandidateTranslator,
        task: SearchTask,
        ledger: Ledger,
        chunks: list[list[int]],
        advance: Advance,
    ) -> None:
        self.task = task
        self.chunks = chunks
        self._translator = translator
        self._ledger = ledger
        self._advance = advance

    def translate(
        self,
        number: int,
        kept: Sequence[int],
        drafts: Sequence[Sequence[int]],
        candidates: Iterable[int | None],
        chunk: int,
    ) -> None:
        """Makes sure that a chunk is translated without each candidate, in round `number`."""
        rows = self.chunks[chunk]
        todo = [layer for layer in candidates if (number, layer, chunk) not in self._ledger]
        if not todo:
            return
        own = [drafts[row] for row in rows]
        for layer, tokens in self._translator.run(kept, own, todo, rows):
            self._ledger.add((number, layer, chunk), tokens)
            self._advance(1 if layer is not None else 0, note=_note(number, layer))

    def tokens(self, number: int, layer: int | None, chunks: Iterable[int] | None = None) -> Tokens:
        """A candidate's translations of the given chunks, by segment; unfinished ones are empty."""
        found: Tokens = [[] for _ in self.task.ids]
        for chunk in range(len(self.chunks)) if chunks is None else chunks:
            for row, tokens in zip(
                self.chunks[chunk], self._ledger[number, layer, chunk], strict=True
            ):
                found[row] = tokens
        return found

    def skip(self, pieces: int) -> None:
        """Tells the progress of work that need not be done."""
        self._advance(pieces)


def _note(number: int, layer: int | None) -> str:
    return f"round {number}, without layer {layer}" if layer is not None else "the whole model"


Round = Callable[[Search, int, Sequence[int], Tokens, list[int]], list[Candidate]]
"""Ranks one round: (search, number, kept, drafts, candidates) -> candidates, each complete or settled."""


def every_candidate(
    search: Search, number: int, kept: Sequence[int], drafts: Tokens, candidates: list[int]
) -> list[Candidate]:
    """Scores every candidate on every segment."""
    for chunk in range(len(search.chunks)):
        search.translate(number, kept, drafts, candidates, chunk)
    return [
        Candidate(number, layer, search.task.score(search.tokens(number, layer)).score)
        for layer in candidates
    ]


def best(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate that scores best, the lowest layer of equals; settled ones cannot win."""
    complete = [candidate for candidate in candidates if "settled" not in candidate.facts]
    return max(complete, key=lambda candidate: (candidate.score, -candidate.layer))


def greedy(search: Search, num_layers: int, remove: int, play: Round = every_candidate) -> Ranking:
    """Removes `remove` layers one after the other."""
    kept = list(range(num_layers))
    nothing: Tokens = [[] for _ in search.task.ids]
    for chunk in range(len(search.chunks)):
        search.translate(0, kept, nothing, [None], chunk)
    drafts = search.tokens(0, None)
    baseline = search.task.score(drafts)
    found: list[Candidate] = []
    removed: list[int] = []
    for number in range(1, remove + 1):
        candidates = play(search, number, kept, drafts, removable(kept, num_layers))
        winner = best(candidates)
        drafts = search.tokens(number, winner.layer)
        removed.append(winner.layer)
        kept.remove(winner.layer)
        found += candidates
    return Ranking(
        tuple(removed), tuple(found), baseline.metric, baseline.signature, baseline.score
    )
