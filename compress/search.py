"""The greedy search over decoder layers, and its memory of what is already translated.

A round translates the segments once without each layer that may go, scores the translations, and drops
the layer whose absence scores best (Moslem 2025; iteratively: Moslem, Al Farouq and Kelleher 2025).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from compress.footprint import Fits, Footprint
from compress.task import SearchTask
from halve.json_files import append_jsonl, read_jsonl
from halve.models import SpeechModel
from halve.progress import Advance

Tokens = list[list[int]]


class CandidateTranslator(Protocol):
    """Translates segments with a layer left out."""

    def footprint(self) -> Footprint:
        """The most memory that the segments take while they are worked on."""
        ...

    def groups(self, candidates: Sequence[int | None]) -> list[list[int | None]]:
        """The candidates in groups that are worked on together."""
        ...

    def run(
        self,
        kept: Sequence[int],
        drafts: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int | None]],
        rows: Sequence[int],
    ) -> Iterator[dict[int | None, Tokens]]:
        """See `ExactTranslator.run`."""
        ...


@dataclass(frozen=True)
class Work:
    """A chunk of segments that is to be translated without each of some candidates."""

    chunk: int
    rows: Sequence[int]
    """The chunk's segments."""
    kept: Sequence[int]
    """The parent's layers."""
    drafts: Sequence[Sequence[int]]
    """The parent's translation of each row, or empty ones."""
    groups: Sequence[Sequence[int | None]]
    """The candidates, in the groups that are worked on together."""


Found = dict[int | None, Tokens]
"""The translations of a chunk's rows, by the layer left out."""


class CandidatePool(ABC):
    """Whatever carries work out: the model in this process, or several processes with a model each."""

    @abstractmethod
    def groups(self, candidates: Sequence[int | None]) -> list[list[int | None]]:
        """The candidates in groups that are worked on together."""

    @abstractmethod
    def run_all(self, works: Sequence[Work]) -> Iterator[tuple[int, Found]]:
        """Yields (chunk, what was found) for every group of every work, in any order."""


class InTurn(CandidatePool):
    """Carries work out in this process, one chunk after the other."""

    def __init__(self, translator: CandidateTranslator) -> None:
        self._translator = translator

    def groups(self, candidates: Sequence[int | None]) -> list[list[int | None]]:
        """See CandidatePool."""
        return self._translator.groups(candidates)

    def run_all(self, works: Sequence[Work]) -> Iterator[tuple[int, Found]]:
        """See CandidatePool."""
        for work in works:
            for found in self._translator.run(work.kept, work.drafts, work.groups, work.rows):
                yield work.chunk, found


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


def translator_for(method: str, speech: SpeechModel, task: SearchTask) -> Any:
    """The translator of a method, to be opened as a context."""
    if method == "reference":
        from compress.reference import StockTranslator

        return StockTranslator(speech, task)
    if speech.family.attends_to_encoder:
        from compress.cross import CrossTranslator

        return CrossTranslator(speech, task)
    from compress.exact import ExactTranslator

    return ExactTranslator(speech, task)


def removable(kept: Sequence[int], num_layers: int, stay: Container[int] = ()) -> list[int]:
    """The layers of `kept` that may go: all but the teacher's first and last, and those that must `stay`."""
    return [layer for layer in kept if layer not in (0, num_layers - 1) and layer not in stay]


Key = tuple[int, int | None, int]
"""Round (0: the whole model), layer left out (None: none), chunk of segments."""


class Ledger:
    """Every finished piece of work, on disk as soon as it is done: a killed search repeats none of it.

    One line a group of candidates that were worked on together, so that a resumed search computes the
    others in the same company, and so to the last bit the same. The chunks stand in the first line: a
    resumed search cuts the segments as before.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks: list[list[int]] | None = None
        self._found: dict[Key, Any] = {}
        for record in read_jsonl(path):
            if "chunks" in record:
                self._chunks = record["chunks"]
            else:
                self._remember(record["round"], record["chunk"], record["found"])

    def _remember(self, number: int, chunk: int, found: Sequence[tuple[int | None, Any]]) -> None:
        for layer, value in found:
            self._found[number, layer, chunk] = value

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

    def __contains__(self, key: Key) -> bool:
        return key in self._found

    def __getitem__(self, key: Key) -> Any:
        return self._found[key]

    def add(self, number: int, chunk: int, found: Mapping[int | None, Any]) -> None:
        """Records what was found without each of some candidates, all at once."""
        pairs = list(found.items())
        append_jsonl(self._path, {"round": number, "chunk": chunk, "found": pairs})
        self._remember(number, chunk, pairs)

    def pieces(self) -> int:
        """How many pieces of candidates are done (the whole model's translation is not one)."""
        return sum(layer is not None for _, layer, _ in self._found)


def plan_chunks(fits: Fits, lengths: Sequence[int], most: int) -> list[list[int]]:
    """Segments of like length in chunks of at most `most`, each of which fits."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    chunks: list[list[int]] = []
    for row in order:
        if not chunks or len(chunks[-1]) >= most or not fits([[*chunks[-1], row]]):
            chunks.append([])
        chunks[-1].append(row)
    return chunks


class Search:
    """One search under way: runs candidates on chunks of segments, and remembers."""

    def __init__(
        self,
        translator: CandidateTranslator | CandidatePool,
        task: SearchTask,
        ledger: Ledger,
        chunks: list[list[int]],
        advance: Advance,
    ) -> None:
        self.task = task
        self.chunks = chunks
        self._pool = translator if isinstance(translator, CandidatePool) else InTurn(translator)
        self._ledger = ledger
        self._advance = advance

    def translate(
        self,
        number: int,
        kept: Sequence[int],
        drafts: Sequence[Sequence[int]],
        candidates: Iterable[int | None],
        chunks: Iterable[int],
    ) -> None:
        """Makes sure that chunks are translated without each candidate, in round `number`."""
        groups = self._pool.groups(list(candidates))
        works = []
        for chunk in chunks:
            todo = [
                group
                for group in groups
                if any((number, layer, chunk) not in self._ledger for layer in group)
            ]
            if todo:
                rows = self.chunks[chunk]
                works.append(Work(chunk, rows, list(kept), [drafts[row] for row in rows], todo))
        if not works:
            return
        for chunk, found in self._pool.run_all(works):
            self._ledger.add(number, chunk, found)
            layers = [layer for layer in found if layer is not None]
            self._advance(len(layers), note=_note(number, layers))

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


def _note(number: int, layers: Sequence[int]) -> str:
    if not layers:
        return "the whole model"
    return f"round {number}, up to layer {max(layers)}"


@dataclass(frozen=True)
class Shortlist:
    """The layers that a cheap criterion would remove first: only these are tried."""

    order: tuple[int, ...]
    """All layers that may go, the most dispensable first."""
    size: int
    """How many are tried in a round."""

    def of(self, layers: Sequence[int]) -> list[int]:
        """Those of `layers` that are tried, in ascending order."""
        return sorted([layer for layer in self.order if layer in layers][: self.size])


Round = Callable[[Search, int, Sequence[int], Tokens, list[int]], list[Candidate]]
"""Ranks one round: (search, number, kept, drafts, candidates) -> candidates, each complete or settled."""


def every_candidate(
    search: Search, number: int, kept: Sequence[int], drafts: Tokens, candidates: list[int]
) -> list[Candidate]:
    """Scores every candidate on every segment."""
    search.translate(number, kept, drafts, candidates, range(len(search.chunks)))
    return [
        Candidate(number, layer, search.task.score(search.tokens(number, layer)).score)
        for layer in candidates
    ]


def best(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate that scores best, the lowest layer of equals; settled ones cannot win."""
    complete = [candidate for candidate in candidates if "settled" not in candidate.facts]
    return max(complete, key=lambda candidate: (candidate.score, -candidate.layer))


def greedy(
    search: Search,
    num_layers: int,
    remove: int,
    play: Round = every_candidate,
    shortlist: Shortlist | None = None,
    stay: Container[int] = (),
) -> Ranking:
    """Removes `remove` layers one after the other, none of those that must `stay`."""
    kept = list(range(num_layers))
    nothing: Tokens = [[] for _ in search.task.ids]
    search.translate(0, kept, nothing, [None], range(len(search.chunks)))
    drafts = search.tokens(0, None)
    baseline = search.task.score(drafts)
    found: list[Candidate] = []
    removed: list[int] = []
    for number in range(1, remove + 1):
        inner = removable(kept, num_layers, stay)
        asked = shortlist.of(inner) if shortlist else inner
        candidates = play(search, number, kept, drafts, asked)
        winner = best(candidates)
        drafts = search.tokens(number, winner.layer)
        removed.append(winner.layer)
        kept.remove(winner.layer)
        found += candidates
    return Ranking(
        tuple(removed), tuple(found), baseline.metric, baseline.signature, baseline.score
    )
