"""Greedy decoding and beam search in a batch whose rows come and go, whatever computes the logits.

A new row's prompt is read alone, unpadded, so that it computes what it computes without neighbours; from
then on all rows take a step together. A row that stops makes way at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from export.geometry import Geometry
from export.vocabulary import WHOLE, Vocabulary
from halve.beams import BeamSearch
from halve.errors import InputError
from halve.translate import is_looping

FloatArray = NDArray[np.float32]


@dataclass
class Row:
    """One translation under way."""

    limit: int
    tokens: list[int] = field(default_factory=list)
    stopped: str = ""
    """end, limit or loop; empty while it goes on."""
    length: int = 0
    """Positions in the cache."""


class Decoder:
    """What a decoder may say and when it stops; a runtime adds how it computes."""

    def __init__(
        self,
        geometry: Geometry,
        embed: Callable[[Sequence[int]], FloatArray],
        end_ids: Sequence[int],
        stop_loops: bool = False,
        vocabulary: Vocabulary = WHOLE,
    ) -> None:
        """`vocabulary`: what its logits stand for, and which are never chosen."""
        self.geometry = geometry
        self.embed = embed
        self.ends = frozenset(end_ids)
        """Tokens that end a translation."""
        self._stop_loops = stop_loops
        self._vocabulary = vocabulary
        # As in stock code, an id beyond the vocabulary (or -1) forbids nothing.
        always, at_first = (
            [place for place in places if 0 <= place < geometry.vocabulary]
            for places in vocabulary.blocked
        )
        self._blocked = always, at_first

    def choose(self, logits: FloatArray, first: bool) -> list[int]:
        """The most likely token of each row of logits, (rows, vocabulary), of those that it may say.

        Args:
            logits: are changed: see `block`.
            first: whether a translation begins with it.
        """
        self.block(logits, first)
        return self._vocabulary.tokens(logits.argmax(axis=1))

    def block(self, logits: FloatArray, first: bool) -> None:
        """Makes -inf of the logits, (…, vocabulary), of what stock `generate` does not say."""
        always, at_first = self._blocked
        for places in (always, at_first if first else []):
            if places:
                logits[..., places] = -np.inf

    def beam_search(self, beams: int, limit: int) -> BeamSearch:
        """A search over this decoder's tokens."""
        loops = is_looping if self._stop_loops else None
        return BeamSearch(beams, limit, self.ends, self._vocabulary.kept, loops, self._blocked)

    def take(self, row: Row, token: int) -> None:
        """Notes the token a row says next, and whether it stops there."""
        if token in self.ends:
            row.stopped = "end"
            return
        row.tokens.append(token)
        if len(row.tokens) >= row.limit:
            row.stopped = "limit"
        elif self._stop_loops and is_looping(row.tokens):
            row.stopped = "loop"


class RowBatch(ABC):
    """Up to `slots` rows that take their steps together; row number i keeps its cache in slot i."""

    def __init__(self, decoder: Decoder, slots: int) -> None:
        self._decoder = decoder
        self._slots = slots
        self.rows: list[Row] = []

    @abstractmethod
    def logits_after(self, inputs: FloatArray) -> FloatArray:
        """Logits (vocabulary,) of the token after a prompt, which is read into the next free slot."""

    @abstractmethod
    def _run(self, tokens: list[int], lengths: list[int]) -> FloatArray:
        """Reads one token into each of the first slots; the logits that follow, (rows, vocabulary)."""

    @abstractmethod
    def _copy_rows(
        self, sources: list[int], targets: list[int], length: int, first: int = 0
    ) -> None:
        """Copies the positions from `first` up to `length` of slots to other slots, all at once.

        Those before `first` are alike in all of them.
        """

    @abstractmethod
    def _make_room(self, positions: int) -> None:
        """Makes every slot hold at least so many positions."""

    def reserve(self, positions: int) -> None:
        """Takes the memory of so many positions in every slot now, and not when rows first need it."""
        self._make_room(positions)

    @property
    def free(self) -> int:
        """Slots without a row."""
        return self._slots - len(self.rows)

    def add(self, inputs: FloatArray, limit: int) -> Row:
        """Reads a prompt and takes its first token; the row stays unless it stops with that.

        Args:
            inputs: embeddings of prompt and audio, (positions, hidden).

        Raises:
            InputError: no slot is free, or the row cannot fit the model's positions.
        """
        if not self.free:
            raise InputError(f"All {self._slots} slots are taken", expected="one free slot")
        self._reserve(len(inputs), limit)
        row = Row(limit, length=len(inputs))
        (token,) = self._decoder.choose(self.logits_after(inputs)[None], first=True)
        self._decoder.take(row, token)
        if not row.stopped:
            self.rows.append(row)
        return row

    def step(self) -> list[Row]:
        """One token for every row; returns the rows that stopped, which have left."""
        if not self.rows:
            return []
        tokens = [row.tokens[-1] for row in self.rows]
        logits = self._run(tokens, [row.length for row in self.rows])
        chosen = self._decoder.choose(logits, first=False)
        for row, token in zip(self.rows, chosen, strict=True):
            row.length += 1
            self._decoder.take(row, token)
        stopped = [row for row in self.rows if row.stopped]
        for row in stopped:
            self.remove(row)
        return stopped

    def remove(self, row: Row) -> None:
        """Frees a row's slot (a cancelled row, or one that stopped); the last row moves into it."""
        slot = next(i for i, kept in enumerate(self.rows) if kept is row)
        last = self.rows.pop()
        if last is row:
            return
        self.rows[slot] = last
        self._copy_rows([len(self.rows)], [slot], last.length)

    def search(self, inputs: FloatArray, limit: int, beams: int) -> Row:
        """Beam search for one prompt in a batch without rows; each beam takes a slot.

        Raises:
            InputError: the row cannot fit the model's positions.
        """
        decoder = self._decoder
        if self.rows or beams > self._slots:
            raise InputError(f"{beams} beams", expected=f"at most {self._slots}, and no other rows")
        self._reserve(len(inputs), limit)
        length, ready = len(inputs), 1

        def step(tokens: list[int], parents: list[int]) -> FloatArray:
            nonlocal length, ready
            places = list(range(len(parents)))
            if parents != places:
                # Slots that have the prompt need no more than what was said since.
                first = len(inputs) if len(places) <= ready else 0
                self._copy_rows(parents, places, length, first)
                ready = max(ready, len(places))
            if len(tokens) == 1:
                ready = 1  # an idle row beside it may have written to the next slot
            logits = self._run(tokens, [length] * len(tokens))
            length += 1
            return logits

        found = decoder.beam_search(beams, limit).run(self.logits_after(inputs), step)
        return Row(limit, found.tokens, found.stopped, length)

    def _reserve(self, positions: int, limit: int) -> None:
        """Makes room for a prompt of so many positions and for new tokens."""
        need, most = positions + limit, self._decoder.geometry.max_positions
        if need > most:
            raise InputError(
                f"{positions} positions of prompt and audio and {limit} new tokens",
                expected=f"at most {most} positions together",
                mend="cut the audio, or lower the token limit",
            )
        self._make_room(need)
