"""What waits in an engine: stretches of audio, and in which order they go."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from halve.languages import token_limit
from halve.translate import Translation

DUE_PER_AUDIO_S = 0.5
"""A piece is due this long after its request's arrival for each second of audio up to its end."""
LATEST_DUE_S = 240.0
"""…but no later than this: the last stretches of long audio are not overtaken until its time is over."""
LONGER_FACTOR = 2.0
"""A piece joins a batch if it is at most this many times as long as the batch's first…"""
ALWAYS_JOINS_S = 4.0
"""…or no longer than this."""


@dataclass(eq=False)
class Ticket:
    """A request's place in the engine."""

    arrival_s: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    """Set when the client is gone or out of time; its pieces are dropped at the next step."""
    audio_s: float = 0.0
    """Audio that the request has put in so far."""


@dataclass(eq=False)
class Outcome:
    """A piece's translation and what it took."""

    translation: Translation
    wait_s: float
    """In the queue."""
    compute_s: float
    """From leaving the queue to the last token, shared with the batch's other pieces."""
    first_token_s: float
    """From the request's arrival to the first token of this piece (to its text where the runtime
    shows no tokens)."""


@dataclass(eq=False)
class Piece:
    """A stretch of a request's audio that waits for its translation."""

    ticket: Ticket
    samples: NDArray[np.float32]
    """Shape (samples,), 16 kHz mono."""
    duration_s: float
    lang: str
    limit: int | None = None
    """Token limit lower than the usual one."""
    on_text: Callable[[str], None] | None = None
    """Called from the engine's thread with text as it appears."""
    is_first: bool = True
    """Whether the request begins with it."""
    future: "Future[Outcome]" = field(default_factory=Future)
    due_s: float = 0.0
    queued_s: float = field(default_factory=time.monotonic)
    started_s: float = 0.0
    first_token_s: float = 0.0

    def token_limit(self) -> int:
        """The most tokens its translation may take."""
        usual = token_limit(self.duration_s)
        return usual if self.limit is None else min(usual, self.limit)

    def tell(self, text: str) -> None:
        """Passes on new text."""
        if not text:
            return
        self.first_token_s = self.first_token_s or time.monotonic()
        if self.on_text is not None:
            self.on_text(text)


class Watcher:
    """What an engine reports to; `serve.metrics` listens."""

    def queued(self, model: str, pieces: int) -> None:
        """So many pieces wait."""

    def stepped(self, model: str, pieces: int) -> None:
        """So many pieces are computed together."""

    def translated(self, model: str, piece: Piece, outcome: Outcome) -> None:
        """A piece is done."""


def earliest(waiting: list[Piece]) -> list[Piece]:
    """Pieces in the order in which they are due."""
    return sorted(waiting, key=lambda piece: piece.due_s)


def pick_batch(waiting: list[Piece], most: int) -> list[Piece]:
    """The next batch for a runtime that translates whole batches.

    The first due piece, and the next due ones in its language, unless they are much longer: a batch
    lasts as long as its longest piece, and a short request should not.
    """
    order = earliest(waiting)
    first = order[0]
    longest_s = max(ALWAYS_JOINS_S, LONGER_FACTOR * first.duration_s)
    fitting = [p for p in order if p.lang == first.lang and p.duration_s <= longest_s]
    return fitting[:most]
