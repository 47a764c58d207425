"""Buffers in which candidates' rows are decoded on: a lane for each thread, kept from group to group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from compress.footprint import in_lanes
from compress.packing import DecodingRows, SlotBin

BINS = {"cpu": 3, "cuda": 2}
"""Parts of like length that a lane's rows attend in: less is read in vain, for a few more operations."""
Key = tuple[int | None, int]
"""Candidate and row."""


@dataclass
class Lane:
    """Some rows of one group of candidates, decoded apart from the others'."""

    slots: DecodingRows
    bin_of: dict[int, int]
    """The bin of each of its rows."""
    found: dict[Key, list[int]] = field(default_factory=dict)
    """Tokens so far."""
    waiting: list[list[Key]] = field(default_factory=list)
    """Who uses each slot, by bin."""

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets the group; the slots stay."""
        self.found, self.waiting = {}, [[] for _ in self.slots.bins]


class LanePool:
    """The lanes' buffers, made anew only when larger ones are needed."""

    def __init__(self, lanes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = lanes
        self.bins = BINS.get(device.type, BINS["cpu"])
        self._dtype, self._device = dtype, device
        self.free()

    def free(self) -> None:
        """Gives the memory back."""
        self._slots: list[DecodingRows] = []
        self._shape: list[list[tuple[int, int]]] = []

    def lanes(self, positions: Mapping[int, int], together: int) -> dict[int, Lane]:
        """Each row's lane.

        Args:
            positions: what each row may take in its buffer.
            together: candidates whose rows are decoded at once.
        """
        parts = in_lanes(positions, self.size, self.bins)
        shape = [
            [(len(part) * together, positions[part[-1]]) for part in of_lane] for of_lane in parts
        ]
        if not (len(self._slots) == len(shape) and all(map(_fits, shape, self._shape))):
            self.free()  # the old ones first
            self._slots = [
                DecodingRows([SlotBin(*part, self._dtype, self._device) for part in of_lane])
                for of_lane in shape
            ]
            self._shape = shape
        found: dict[int, Lane] = {}
        for slots, of_lane in zip(self._slots, parts, strict=True):
            bin_of = {row: index for index, part in enumerate(of_lane) for row in part}
            found |= dict.fromkeys(bin_of, Lane(slots, bin_of))
        return found


def _fits(need: Sequence[tuple[int, int]], have: Sequence[tuple[int, int]]) -> bool:
    """Whether bins of (slots, capacity) are as large as those that are needed."""
    return len(need) <= len(have) and all(
        slots <= own_slots and capacity <= own_capacity
        for (slots, capacity), (own_slots, own_capacity) in zip(need, have, strict=False)
    )
