"""What a search works on: segments, their audio and references, token limits, and how they are scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halve import metrics
from halve.families import Source
from halve.metrics import Score


@dataclass(frozen=True)
class SearchTask:
    """The segments that candidates are judged on. All sequences are in the same order."""

    lang: str
    metric: str
    ids: tuple[str, ...]
    audio: tuple[Source, ...]
    """16 kHz mono samples of each segment, shape (samples,); its text for a model that reads."""
    references: tuple[str, ...]
    limits: tuple[int, ...]
    """The most tokens that each segment's translation may take (`halve.languages.token_limit`)."""
    decode: Callable[[Sequence[int]], str]
    """The text of generated tokens."""

    def texts(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Hypotheses of generated tokens, in their order."""
        return [self.decode(row) for row in tokens]

    def score(self, tokens: Sequence[Sequence[int]]) -> Score:
        """The corpus-level score of translations of all segments."""
        return metrics.score(self.metric, self.texts(tokens), self.references, self.lang)
