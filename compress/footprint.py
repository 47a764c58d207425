"""What segments take in memory while they are worked on, and whether chunks of them have room.

Rows that are decoded together stand in buffers as long as the longest of them: what a chunk takes is more
than what its segments take one by one, the more so the less they are alike in length.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from halve import environment
from halve.errors import InputError
from halve.models import SpeechModel

_PROMPT = 64
"""More positions than an instruction takes."""

Fits = Callable[[Sequence[Sequence[int]]], bool]
"""Whether there is room for chunks of segments, worked on one after the other."""


@dataclass(frozen=True)
class Footprint:
    """What a translator's segments take beside the model, in bytes."""

    rows: tuple[int, ...]
    """Of each segment while it is worked on, at its own length."""
    held: int = 0
    """Of all segments as they were encoded, as long as the search lasts."""
    positions: tuple[int, ...] = ()
    """Positions that each segment may take in a buffer."""
    position_bytes: int = 0
    """Of one position of a row in the buffers, for all candidates that are decoded together."""
    lanes: int = 1
    bins: int = 1
    """In how many lanes, and bins of each, rows are decoded: see `in_lanes`."""

    def most(self, chunks: Sequence[Sequence[int]]) -> int:
        """The most taken at once; a chunk may find the buffers of another one, and uses them."""
        rows = max(sum(self.rows[row] for row in chunk) for chunk in chunks)
        return self.held + rows + max(map(self._buffers, chunks))

    def _buffers(self, chunk: Sequence[int]) -> int:
        if not self.position_bytes:
            return 0
        positions = {row: self.positions[row] for row in chunk}
        parts = [part for lane in in_lanes(positions, self.lanes, self.bins) for part in lane]
        return self.position_bytes * sum(len(part) * positions[part[-1]] for part in parts)


@dataclass(frozen=True)
class Room:
    """A footprint and the bytes that there are for it: in this process, or in a worker."""

    footprint: Footprint
    budget: int

    def fits(self, chunks: Sequence[Sequence[int]]) -> bool:
        """Whether the chunks, worked on one after the other, take no more than there is."""
        return self.footprint.most(chunks) <= self.budget

    def check(self, ids: Sequence[str]) -> None:
        """Refuses a budget that a single segment would exceed.

        Raises:
            InputError: there is one.
        """
        most, held = [self.footprint.most([[row]]) for row in range(len(ids))], self.footprint.held
        largest = max(range(len(ids)), key=most.__getitem__)
        if most[largest] > self.budget:
            beside = f" beside {held / 1e9:.3f} GB of encoded segments" if held else ""
            raise InputError(
                f"Segment {ids[largest]} alone takes {(most[largest] - held) / 1e9:.3f} GB{beside}, "
                f"and {self.budget / 1e9:.3f} GB are allowed",
                expected="room for all encoded segments and for work on the longest, in each worker",
                mend="raise --memory-gb, or use fewer --segments or --workers"
                if held
                else "raise --memory-gb, take --dtype bfloat16 or fewer --workers, or leave so long a segment out",
            )


def checked(rooms: Sequence[Room], ids: Sequence[str]) -> Fits:
    """Whether chunks fit into every room.

    Raises:
        InputError: see `Room.check`.
    """
    for room in rooms:
        room.check(ids)
    return lambda chunks: all(room.fits(chunks) for room in rooms)


def in_lanes(positions: Mapping[int, int], lanes: int, bins: int) -> list[list[list[int]]]:
    """Rows dealt to lanes that are alike, each cut into at most `bins` parts of like length, longest row last.

    Args:
        positions: what each row may take in its buffer.
    """
    order = sorted(positions, key=lambda row: (positions[row], row))
    return [_in_bins(order[lane::lanes], bins) for lane in range(lanes)]


def _in_bins(rows: Sequence[int], count: int) -> list[list[int]]:
    """Rows, in order, in at most so many parts of equal size."""
    size = max(1, -(-len(rows) // count))
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def rows_that_fit(speech: SpeechModel, positions: int, most: int) -> int:
    """Rows of so many positions whose keys and values take a third of what a GPU has beside the weights, `most` of them.

    Of what there is in all, not of what is free: the same batches in each run.
    """
    if not speech.device.startswith("cuda"):
        return most
    held = sum(weight.nbytes for weight in speech.model.parameters())
    room = environment.device_bytes(speech.device) - held
    item = 4 if speech.dtype == "float32" else 2
    row = speech.family.cache_width(speech.model) * item * (positions + _PROMPT)
    return max(1, min(most, int(room) // (3 * row)))
