"""Beam search, apart from what computes the logits: the same hypotheses as stock `generate`.

Follows generate(num_beams=…, length_penalty=1, early_stopping=False) for one sequence: a finished
hypothesis scores its mean log-probability, its end token included, and the search ends once no running
one, at its present mean, beats the worst of the finished.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from halve.errors import InputError

FloatArray = NDArray[np.float32]
Step = Callable[[list[int], list[int]], FloatArray]
"""Given each running hypothesis's newest token, and the place among the earlier ones that it continues:
the logits that follow, (beams, vocabulary)."""


@dataclass(frozen=True)
class Hypothesis:
    """A token sequence, without the token that ended it."""

    tokens: list[int]
    score: float
    """Sum of log-probabilities while it runs, their mean once it has stopped."""
    stopped: str = ""
    """end, limit or loop; empty while it runs."""


@dataclass
class BeamSearch:
    """One search.

    Raises:
        InputError: fewer than two beams.
    """

    beams: int
    limit: int
    ends: Collection[int]
    vocabulary: NDArray[np.int64] | None = None
    """Token id of each logit; its place where None."""
    loops: Callable[[Sequence[int]], bool] | None = None
    """Says which hypotheses are stuck and stop; none where None."""
    blocked: tuple[Sequence[int], Sequence[int]] = ((), ())
    """Places in the logits that are never chosen, and those that are not chosen first."""
    finished: list[Hypothesis] = field(default_factory=list)
    """Best first."""
    running: list[Hypothesis] = field(default_factory=lambda: [Hypothesis([], 0.0)])

    def __post_init__(self) -> None:
        if self.beams < 2:
            raise InputError(f"{self.beams} beams", expected="at least 2; one beam is greedy")

    def run(self, first: FloatArray, step: Step) -> Hypothesis:
        """The best hypothesis.

        Args:
            first: logits after the prompt, (vocabulary,).
        """
        going = self.advance(first[None])
        while going:
            going = self.advance(step(*going))
        return self.finished[0]

    def advance(self, logits: FloatArray) -> tuple[list[int], list[int]] | None:
        """Takes the logits after the running hypotheses, (running, vocabulary); see `advance_among`."""
        scores = log_softmax(logits)
        # As in stock code, what is blocked keeps its share of the probability.
        scores[:, self.never()] = -np.inf
        return self.advance_among(scores)

    def never(self) -> list[int]:
        """Places in the logits that no running hypothesis goes on with."""
        always, at_first = self.blocked
        return [*always, *(() if self.running[0].tokens else at_first)]

    @property
    def candidates(self) -> int:
        """So many continuations that enough go on even if all others end."""
        return (1 + max(1, len(self.ends))) * self.beams

    def advance_among(
        self, scores: FloatArray, places: NDArray[np.int64] | None = None
    ) -> tuple[list[int], list[int]] | None:
        """Goes on with the likeliest continuations.

        Args:
            scores: log-probabilities of each running hypothesis's continuations, (running, any number of them).
            places: which places in the logits they have, of the same shape; all, in their order, where None. The
                `candidates` likeliest of each hypothesis are enough.

        Returns:
            Each running hypothesis's newest token, and the place among those before that it continues; None once
            the search is over.
        """
        length = len(self.running[0].tokens) + 1
        candidates = self._candidates(scores, places)
        for _, one in candidates[: self.beams]:
            if one.stopped:
                self._finish(one, length)
        going = [(parent, one) for parent, one in candidates if not one.stopped]
        going = going[: self.beams]
        if not going or not self._can_improve(going[0][1].score / length):
            return None
        self.running = [one for _, one in going]
        return [one.tokens[-1] for one in self.running], [parent for parent, _ in going]

    def _candidates(
        self, scores: FloatArray, places: NDArray[np.int64] | None
    ) -> list[tuple[int, Hypothesis]]:
        """The best continuations, best first, each with the place of what it continues."""
        running = self.running
        totals = scores + np.array([[one.score] for one in running], np.float32)
        flat = totals.reshape(-1)
        count = min(self.candidates, len(flat))
        best = np.argpartition(-flat, count - 1)[:count]
        best = best[np.argsort(-flat[best], kind="stable")]
        found = []
        for each in best:
            row, column = divmod(int(each), scores.shape[1])
            place = column if places is None else int(places[row, column])
            found.append((row, self._continued(running[row], place, flat[each])))
        return found

    def _continued(self, one: Hypothesis, place: int, score: np.float32) -> Hypothesis:
        token = int(place if self.vocabulary is None else self.vocabulary[place])
        if token in self.ends:
            return Hypothesis(one.tokens, float(score), "end")
        tokens = [*one.tokens, token]
        stopped = ""
        if len(tokens) >= self.limit:
            stopped = "limit"
        elif self.loops and self.loops(tokens):
            stopped = "loop"
        return Hypothesis(tokens, float(score), stopped)

    def _finish(self, one: Hypothesis, length: int) -> None:
        self.finished.append(Hypothesis(one.tokens, one.score / length, one.stopped))
        self.finished.sort(key=lambda each: -each.score)
        del self.finished[self.beams :]

    def _can_improve(self, best: float) -> bool:
        return len(self.finished) < self.beams or best > self.finished[-1].score


def log_softmax(logits: FloatArray) -> FloatArray:
    """Log-probabilities of logits, (rows, vocabulary)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found
