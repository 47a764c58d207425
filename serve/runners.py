"""How pieces are computed: step by step where the runtime allows it, else batch by batch."""

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from halve.languages import token_limit
from halve.translate import TextStream, Translation, Translator
from serve.errors import internal, unavailable
from serve.pieces import Outcome, Piece, earliest, pick_batch

log = logging.getLogger("halve.serve")

ENCODED_AHEAD = 2
"""Pieces whose audio is encoded before their turn: one ready while the next is in work."""


@dataclass(eq=False)
class Finished:
    """A piece that has left its runner, translated or failed."""

    piece: Piece
    translation: Translation | None = None
    error: Exception | None = None

    def outcome(self) -> Outcome:
        """The translation with its times."""
        piece, now_s = self.piece, time.monotonic()
        assert self.translation is not None
        return Outcome(
            self.translation,
            wait_s=piece.started_s - piece.queued_s,
            compute_s=now_s - piece.started_s,
            first_token_s=(piece.first_token_s or now_s) - piece.ticket.arrival_s,
        )


class Runner(Protocol):
    """Computes pieces; used by one thread."""

    @property
    def is_busy(self) -> bool:
        """Whether a step has something to do."""
        ...

    @property
    def stepped(self) -> int:
        """Pieces that the last step computed together."""
        ...

    def choose(self, waiting: list[Piece]) -> list[Piece]:
        """Which of the waiting pieces (at least one) to add before the next step."""
        ...

    def add(self, piece: Piece) -> None:
        """Takes a piece in."""
        ...

    def step(self, crowded: bool) -> list[Finished]:
        """Computes; returns the pieces that left. `crowded`: more pieces wait outside."""
        ...

    def abandon(self) -> None:
        """Gives up what is in it."""
        ...


def runner_for(translator: Translator, batch_size: int, reserve: bool = False) -> Runner:
    """The best way to drive a runtime.

    Args:
        reserve: takes the memory of a full batch of the longest clips now, where the runtime has rows.
    """
    if hasattr(translator, "open_batch"):
        return ContinuousRunner(translator, batch_size, reserve)
    if reserve:
        log.warning(
            "nothing is reserved: only packages in ONNX or GGUF have rows to reserve memory for"
        )
    return BatchRunner(translator, batch_size)


class ContinuousRunner:
    """Rows join at any step and leave when they end or when their client does.

    Audio is encoded in a thread of its own while the rows take their steps, so that two cores have
    work and a new request holds nobody up for longer than the reading of its prompt.
    """

    def __init__(self, translator: Any, batch_size: int, reserve: bool = False) -> None:
        self._translator = translator
        self._batch = translator.open_batch(batch_size)
        if reserve:
            self._take_all()
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._encoding: deque[tuple[Piece, Future[Any]]] = deque()
        self._rows: list[tuple[Piece, Any, TextStream]] = []
        self._left: list[Finished] = []
        self._stepped = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._rows or self._left or self._encoding)

    @property
    def stepped(self) -> int:
        return self._stepped

    def choose(self, waiting: list[Piece]) -> list[Piece]:
        places = min(ENCODED_AHEAD, self._batch.free) - len(self._encoding)
        return earliest(waiting)[: max(0, places)]

    def add(self, piece: Piece) -> None:
        encoded = self._encoder.submit(self._encode, piece)
        self._encoding.append((piece, encoded))

    def _take_all(self) -> None:
        """Hears the longest clip once, and takes the memory of rows as long as it in every slot."""
        longest_s = self._translator.max_audio_s
        silence = np.zeros(round(longest_s * self._translator.sample_rate_hz), np.float32)
        inputs = self._translator.inputs(silence, self._translator.languages[0])
        self._batch.reserve(len(inputs) + token_limit(longest_s))
        self._batch.add(inputs, 1)  # stops at once: its first token is its last

    def _encode(self, piece: Piece) -> Any:
        if piece.ticket.cancelled:
            return None
        return self._translator.inputs(piece.samples, piece.lang)

    def step(self, crowded: bool) -> list[Finished]:
        for entry in [entry for entry in self._rows if entry[0].ticket.cancelled]:
            self._rows.remove(entry)
            self._batch.remove(entry[1])
            self._left.append(_cancelled(entry[0]))
        # One a step: reading a prompt holds up the rows that are being written.
        if self._encoding and (self._encoding[0][1].done() or not (self._rows or self._left)):
            self._join(*self._encoding.popleft())
        self._stepped = len(self._rows)
        try:
            self._batch.step()
            self._read_rows()
        except Exception:
            # Of those in the batch nothing is left; those that have left it are done.
            log.exception("a step of %d rows failed", len(self._rows))
            failed = [Finished(piece, error=internal()) for piece in self._drop()]
            self._left += failed
        left, self._left = self._left, []
        return left

    def _read_rows(self) -> None:
        """Lets the rows that have stopped leave, and tells of the others' text."""
        for entry in list(self._rows):
            if entry[1].stopped:
                self._left.append(self._end(*entry))
                self._rows.remove(entry)
            else:
                self._tell(*entry)

    def _join(self, piece: Piece, encoded: "Future[Any]") -> None:
        """Reads a prompt, whose encoding is waited for if there is nothing else to do."""
        try:
            inputs = encoded.result()
            if piece.ticket.cancelled:
                self._left.append(_cancelled(piece))
                return
            row = self._batch.add(inputs, piece.token_limit())
        except Exception:
            log.exception("a piece of %.1f s failed", piece.duration_s)
            self._left.append(Finished(piece, error=internal()))
            return
        # The prompt's reading gave the first token.
        piece.first_token_s = time.monotonic()
        entry = (piece, row, TextStream(self._translator.text))
        if row.stopped:
            self._left.append(self._end(*entry))
        else:
            self._rows.append(entry)
            self._tell(*entry)

    def _tell(self, piece: Piece, row: Any, stream: TextStream) -> None:
        # Turning tokens into text at each step costs time: only for those who watch it appear.
        if piece.on_text is not None:
            piece.tell(stream.push(row.tokens))

    def _end(self, piece: Piece, row: Any, stream: TextStream) -> Finished:
        if piece.on_text is not None:
            piece.tell(stream.push(row.tokens, last=True))
        text = self._translator.text(row.tokens)
        return Finished(piece, Translation(text, list(row.tokens), row.stopped))

    def abandon(self) -> None:
        self._left = []
        self._drop()

    def _drop(self) -> list[Piece]:
        """Empties the batch and gives up what is encoded for it."""
        pieces = [piece for piece, _, _ in self._rows] + [piece for piece, _ in self._encoding]
        # The model must not be freed under its encoder.
        wait([encoded for _, encoded in self._encoding])
        rows, self._rows = self._rows, []
        self._encoding.clear()
        for _, row, _ in rows:
            if not row.stopped:
                try:
                    self._batch.remove(row)
                except (
                    Exception
                ):  # what failed before may fail at this, too; the row has left all the same
                    log.exception("a row could not be removed")
        return pieces


def _cancelled(piece: Piece) -> Finished:
    return Finished(piece, error=unavailable("The request was cancelled."))


class BatchRunner:
    """Whole batches, one after another; a piece alone shows its text as it appears."""

    def __init__(self, translator: Translator, batch_size: int) -> None:
        self._translator = translator
        self._batch_size = batch_size
        self._batch: list[Piece] = []
        self._stepped = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._batch)

    @property
    def stepped(self) -> int:
        return self._stepped

    def choose(self, waiting: list[Piece]) -> list[Piece]:
        return pick_batch(waiting, self._batch_size)

    def add(self, piece: Piece) -> None:
        self._batch.append(piece)

    def step(self, crowded: bool) -> list[Finished]:
        batch, self._batch = self._batch, []
        self._stepped = len(batch)
        if not batch:
            return []
        # Text as it appears costs the others their batch, so it is given while nobody waits.
        if len(batch) == 1 and batch[0].on_text is not None and not crowded:
            return [self._stream(batch[0])]
        try:
            return self._translate(batch)
        except Exception:
            log.exception("a batch of %d failed", len(batch))
        if len(batch) == 1:
            return [Finished(batch[0], error=internal())]
        # Each by itself, so that one cannot fail the others.
        return [finished for piece in batch for finished in self._alone(piece)]

    def _alone(self, piece: Piece) -> list[Finished]:
        self._batch = [piece]
        return self.step(crowded=True)

    def _translate(self, batch: list[Piece]) -> list[Finished]:
        samples, lang = [piece.samples for piece in batch], batch[0].lang
        limits = [piece.token_limit() for piece in batch]
        # Where the runtime allows it, a row leaves when its client does.
        translate_while = getattr(self._translator, "translate_while", None)
        if translate_while is not None:
            translations = translate_while(
                samples, lang, limits=limits, gone=lambda index: batch[index].ticket.cancelled
            )
        else:
            translations = self._translator.translate(
                samples, lang, limits=limits, batch_size=len(batch)
            )
        return [self._end(*pair) for pair in zip(batch, translations, strict=True)]

    def _end(self, piece: Piece, translation: Translation) -> Finished:
        if translation.stopped == "gone":
            return _cancelled(piece)
        piece.tell(translation.text)
        return Finished(piece, translation)

    def _stream(self, piece: Piece) -> Finished:
        texts: list[str] = []
        limit = piece.token_limit()
        stream = self._translator.stream(piece.samples, piece.lang, limit=limit)
        try:
            while not piece.ticket.cancelled:
                text = next(stream)
                texts.append(text)
                piece.tell(text)
        except StopIteration as end:
            # Its return value, where a runtime gives one, says how the translation stopped.
            return Finished(piece, end.value or Translation("".join(texts), [], "end"))
        except Exception:
            log.exception("a stream failed")
            return Finished(piece, error=internal())
        return _cancelled(piece)

    def abandon(self) -> None:
        self._batch = []
