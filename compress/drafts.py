"""What a candidate keeps of its parent's translation, and where a translation ends."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ending:
    """Where each segment's translation stops, for whoever writes it token by token."""

    limits: Sequence[int]
    """The most tokens of each segment."""
    ends: frozenset[int]
    """Tokens that end a translation."""

    def kept(self, row: int, draft: Sequence[int], own: Sequence[int]) -> list[int]:
        """The draft's tokens as far as the candidate chose them too, and its first own token.

        Args:
            own: what the candidate chooses after each token of the prompt's last and the draft.
        """
        agreed = 0
        while agreed < len(draft) and own[agreed] == draft[agreed]:
            agreed += 1
        tokens = own[: min(agreed + 1, self.limits[row])]
        for place, token in enumerate(tokens):
            if token in self.ends:  # a draft may go on past it
                return list(tokens[: place + 1])
        return list(tokens)

    def reached(self, row: int, tokens: Sequence[int]) -> bool:
        """Whether the translation so far is complete."""
        return tokens[-1] in self.ends or len(tokens) >= self.limits[row]
