"""The fast search: a candidate computes only what it does not share with its parent.

What the model without layer n shares with its parent, and is therefore computed once:

- the audio: encoded once a search, on its valid frames;
- prompt and draft below layer n: the parent's hidden states, keys and values, while candidates are
  walked from the first layer to the last;
- most of the translation: the parent's one is a draft that the child checks in one pass. The longest
  prefix that it would have chosen itself is kept, and it goes on from there by itself.

Checking a draft is speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) with greedy choice:
the tokens are those of the child's own greedy decoding, whatever the draft. Rows are packed without
padding and decoded together; a finished row leaves. Floating-point sums may be ordered otherwise than in
stock `generate`, so that a choice between two all but equal logits can differ.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from compress.drafts import Ending
from compress.encoded import common_start, embed_prompts, held_bytes
from compress.footprint import Footprint
from compress.lanes import Lane, LanePool
from compress.layers import LayerRunner, Rotary, open_layers
from compress.packing import PackedRows, RowAttention, Tail, packed_attention
from compress.task import SearchTask
from halve.crew import Crew
from halve.models import SpeechModel

TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}
"""Tokens packed into one forward pass: small enough for a CPU's caches, large enough to fill a GPU."""
LOGITS_PER_PASS = 1 << 25
"""The most logits held at once."""
DECODED_TOGETHER = 5
"""Candidates whose rows are decoded in one batch where memory allows it; also what a killed search may lose."""
COMPACT_BELOW = 0.75
"""Slots are moved together once fewer of them than this are still decoding."""


@dataclass
class Pack:
    """Some rows with their drafts, on their way through the layers."""

    rows: list[int]
    drafts: list[list[int]]
    prompts: list[int]
    """Prompt length of each row in tokens, audio and stem included."""
    hidden: Tensor
    """Input of the next layer: (tokens, hidden). What all prompts begin with stands once before the rows."""
    rotary: Rotary
    """What tells each token its position in its row."""
    tail: Tail
    """The tokens whose logits choose a draft's tokens: one a draft token, at least one a row."""
    attention: PackedRows
    """The parent's keys and values so far."""


class ExactTranslator:
    """Translates with layers left out. Open it as a context: the decoder attends its own way inside."""

    def __init__(self, speech: SpeechModel, task: SearchTask) -> None:
        family = speech.family
        self.task = task
        self.layers: Any = speech.part(family.layers)
        self._decoder = speech.part(family.decoder)
        self._norm = speech.part(family.norm)
        self._family, self._model = family, speech.model
        self._table = speech.part(family.embeddings)
        self._ending = Ending(task.limits, frozenset(family.end_ids(speech.model)))
        self._blocked = [list(tokens) for tokens in family.suppressed(speech.model)]
        self._config = self.layers[0].self_attn.config
        self._device = self._table.weight.device
        self._pass_tokens = TOKENS_PER_PASS.get(self._device.type, TOKENS_PER_PASS["cpu"])
        self._context = ExitStack()
        self._crew = Crew(self._device)
        self._layers: list[LayerRunner] = []
        self.together = DECODED_TOGETHER
        """Candidates that are decoded in one batch; see `fit`."""
        self._pool = LanePool(self._crew.size, self._table.weight.dtype, self._device)
        self._prompts = embed_prompts(speech, task, self._crew)
        # Where the decoder attends to an encoder, equal inputs do not make equal states.
        self._stem = 0 if family.attends_to_encoder else common_start(self._prompts)

    def __enter__(self) -> "ExactTranslator":
        opened: list[AbstractContextManager[Any]] = [
            packed_attention(self._config),
            torch.inference_mode(),
            self._crew,
        ]
        for context in opened:
            self._context.enter_context(context)
        if not self._layers:
            self._layers = open_layers(self.layers, self._decoder, self._family)
        return self

    def __exit__(self, *error: object) -> None:
        self._context.close()
        self._pool.free()

    # Memory

    def footprint(self, *, decodes: bool = True) -> Footprint:
        """The most that the segments take: all as they were encoded, states, and the parent's keys and values.

        Args:
            decodes: those of the candidate that is checked and the slots of a group, too.
        """
        item = self._table.weight.element_size()
        of_token = self._family.cache_width(self._model) * item
        of_states = 2 * self._prompts[0].shape[1] * item
        positions = tuple(map(self._positions, range(len(self._prompts))))
        held = held_bytes(self._prompts, self._device)
        if not decodes:
            return Footprint(tuple(count * (of_token + of_states) for count in positions), held)
        return Footprint(
            held=held,
            rows=tuple(count * (2 * of_token + of_states) for count in positions),
            positions=positions,
            position_bytes=self.together * of_token,
            lanes=self._pool.size,
            bins=self._pool.bins,
        )

    def fit(self, budget: int) -> Footprint:
        """Decodes fewer candidates together where the longest segment would not fit into so many bytes otherwise.

        What a candidate says does not depend on it; a step takes as long for one as for several.
        """
        while self.together > 1 and self._most_alone() > budget:
            self.together -= 1
        return self.footprint()

    def _most_alone(self) -> int:
        found = self.footprint()
        return max(found.most([[row]]) for row in range(len(self._prompts)))

    def _positions(self, row: int) -> int:
        """The most that a segment grows to."""
        return len(self._prompts[row]) + self.task.limits[row]

    # Packing

    def pack(self, rows: Sequence[int], drafts: Sequence[Sequence[int]]) -> list[Pack]:
        """Packs of rows with drafts, longest rows first, each of at most one pass's tokens.

        They are alike in size and as many for each thread, as far as rows allow it: threads wait for one another.
        """
        lengths = [
            len(self._prompts[row]) - self._stem + max(0, len(draft) - 1)
            for row, draft in zip(rows, drafts, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda index: (-lengths[index], rows[index]))
        least = -(-sum(lengths) // self._pass_tokens)
        count = min(len(rows), -(-least // self._crew.size) * self._crew.size)
        share = -(-sum(lengths) // count)
        packs: list[Pack] = []
        chosen: list[int] = []
        total, done = 0, 0
        for index in order:
            # A pack ends where the next row would take it further from its share than it is.
            is_full = done + total + lengths[index] / 2 > share * (len(packs) + 1)
            if chosen and (is_full or total + lengths[index] > self._pass_tokens):
                packs.append(self._pack(chosen, rows, drafts))
                done += total
                chosen, total = [], 0
            chosen.append(index)
            total += lengths[index]
        return [*packs, self._pack(chosen, rows, drafts)]

    def _pack(
        self, chosen: Sequence[int], rows: Sequence[int], drafts: Sequence[Sequence[int]]
    ) -> Pack:
        stem = self._stem
        parts = [self._prompts[rows[chosen[0]]][:stem].to(self._device)]
        places = [torch.arange(stem)]
        choices, counts, lengths = [], [], []
        start = stem
        for index in chosen:
            prompt, draft = self._prompts[rows[index]][stem:].to(self._device), drafts[index]
            parts.append(prompt)
            # The last token of a draft is only ever chosen, never looked back to.
            if len(draft) > 1:
                parts.append(self._embed(torch.tensor(draft[:-1], device=self._device)))
            length, count = len(prompt) + max(0, len(draft) - 1), max(1, len(draft))
            places.append(torch.arange(stem, stem + length))
            choices.append(torch.arange(start + length - count, start + length))
            counts.append(count)
            lengths.append(length)
            start += length
        hidden, rotary = self._enter(torch.cat(parts), torch.cat(places).to(self._device))
        return Pack(
            rows=[rows[index] for index in chosen],
            drafts=[list(drafts[index]) for index in chosen],
            prompts=[len(self._prompts[rows[index]]) for index in chosen],
            hidden=hidden,
            rotary=rotary,
            tail=Tail(torch.cat(choices).to(self._device), counts),
            attention=PackedRows(lengths, stem),
        )

    def _embed(self, tokens: Tensor) -> Tensor:
        """Decoder inputs of tokens (tokens,)."""
        return self._family.embed(self._model, tokens)

    def _enter(self, inputs: Tensor, places: Tensor) -> tuple[Tensor, Rotary]:
        """Decoder inputs at their positions (tokens,) as the first layer's states, and what goes beside them."""
        return self._family.enter(self._decoder, inputs, places)

    def advance(self, pack: Pack, layer: int) -> None:
        """Takes the parent's states through one layer."""
        pack.hidden = self._layers[layer](pack.hidden, pack.rotary, pack.attention)

    def branch(self, pack: Pack, layers: Sequence[int]) -> tuple[Tensor, PackedRows]:
        """The parent's states taken through the layers that are left, without the parent noticing.

        Returns:
            the final states of the tail, shape (tail tokens, hidden), and the branch's own attention.
        """
        rows = PackedRows(pack.attention.lengths, self._stem)
        rows.shared = dict(pack.attention.shared)
        if not layers:
            return pack.hidden[pack.tail.tokens], rows
        hidden = pack.hidden
        for layer in layers[:-1]:
            hidden = self._layers[layer](hidden, pack.rotary, rows)
        # Of the last layer's output only the tail is looked at; the rest gives keys and values.
        return self._layers[layers[-1]](hidden, pack.rotary, rows, pack.tail), rows

    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of states (tokens, hidden), in blocks (some tokens, vocabulary)."""
        for block in torch.split(hidden, max(1, LOGITS_PER_PASS // self._table.num_embeddings)):
            yield self._family.logits(self._model, self._norm(block))

    def _choose(self, hidden: Tensor, first: Sequence[int] = ()) -> Tensor:
        """The most likely tokens (tokens,) after states, of those that stock `generate` may say.

        Args:
            first: which of the states choose a translation's first token.
        """
        always, at_first = self._blocked
        chosen, start = [], 0
        for block in self.logits(hidden):
            if always:
                block[:, always] = -torch.inf
            if at_first:
                here = [place - start for place in first if 0 <= place - start < len(block)]
                block[torch.tensor(here, dtype=torch.long)[:, None], at_first] = -torch.inf
            chosen.append(block.argmax(-1))
            start += len(block)
        return torch.cat(chosen)

    # Translating

    def groups(self, candidates: Sequence[int | None]) -> list[list[int | None]]:
        """The candidates whose rows are decoded together: a step costs little more for several."""
        inner = sorted(layer for layer in candidates if layer is not None)
        size = self.together
        found: list[list[int | None]] = [
            list(inner[start : start + size]) for start in range(0, len(inner), size)
        ]
        return [*found, [None]] if None in candidates else found

    def run(
        self,
        kept: Sequence[int],
        drafts: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int | None]],
        rows: Sequence[int],
    ) -> Iterator[dict[int | None, list[list[int]]]]:
        """Translates the segments `rows` once without each of the candidates.

        Args:
            kept: the parent's layers.
            drafts: the parent's translation of each row, or empty ones.
            candidates: layers to leave out, one at a time, in groups of `groups`; None leaves out
                nothing.

        Yields:
            for each group, the candidates' tokens for each row, the end token included.
        """
        packs = self.pack(rows, drafts)
        waiting = [list(group) for group in candidates]
        lanes = self._begin(rows, waiting)
        for index, layer in enumerate(kept):
            if not waiting:
                return
            below, above = kept[:index], kept[index + 1 :]
            if layer in waiting[0]:
                self._verify(layer, packs, below, above, lanes)
                if layer == waiting[0][-1]:
                    del waiting[0]
                    yield self._decode(lanes, kept, rows)
            if above and waiting:
                self._crew.map(partial(self.advance, layer=layer), packs)
        if waiting:
            self._verify(None, packs, kept[:-1], kept[-1:], lanes)
            yield self._decode(lanes, kept, rows)

    def _verify(
        self,
        candidate: int | None,
        packs: Sequence[Pack],
        below: Sequence[int],
        above: Sequence[int],
        lanes: Mapping[int, Lane],
    ) -> None:
        """Checks one candidate's drafts; rows that must go on get a slot each.

        As many packs at a time as there are threads: a candidate's own keys and values are held for these alone.
        """
        for start in range(0, len(packs), self._crew.size):
            wave = packs[start : start + self._crew.size]
            seen = self._crew.map(partial(self._see, layers=above), wave)
            fills: list[Callable[[], None]] = []
            for pack, (chosen, attention) in zip(wave, seen, strict=True):
                for place, tokens in enumerate(self._check(pack, chosen)):
                    row = pack.rows[place]
                    lane = lanes[row]
                    lane.found[candidate, row] = tokens
                    if self._ending.reached(row, tokens):
                        continue
                    # Prompt and agreed tokens; a row's newest token is the next step's input.
                    length = pack.prompts[place] + len(tokens) - 1
                    waiting = lane.waiting[lane.bin_of[row]]
                    slots = lane.slots.bins[lane.bin_of[row]]
                    for source, layers in ((pack.attention, below), (attention, above)):
                        slots.prepare(source, layers)
                        fill = partial(slots.fill, len(waiting), source, layers, place, length)
                        fills.append(fill)
                    waiting.append((candidate, row))
            self._crew.map(lambda fill: fill(), fills)

    def _see(self, pack: Pack, layers: Sequence[int]) -> tuple[list[int], PackedRows]:
        """The tokens that a candidate chooses in place of its drafts' tokens, and its keys and values."""
        hidden, attention = self.branch(pack, layers)
        starts = list(accumulate(pack.tail.counts[:-1], initial=0))
        return self._choose(hidden, starts).tolist(), attention

    def _check(self, pack: Pack, chosen: Sequence[int]) -> list[list[int]]:
        """What each row keeps of its draft, because the candidate chose it too, and its first own token."""
        found, start = [], 0
        for row, draft, count in zip(pack.rows, pack.drafts, pack.tail.counts, strict=True):
            own = chosen[start : start + count]
            start += count
            found.append(self._ending.kept(row, draft, own))
        return found

    def _begin(
        self, rows: Sequence[int], groups: Sequence[Sequence[int | None]]
    ) -> dict[int, Lane]:
        """Each row's lane, one a thread."""
        positions = {row: self._positions(row) for row in rows}
        return self._pool.lanes(positions, max(map(len, groups), default=0))

    def _decode(
        self, lanes: Mapping[int, Lane], kept: Sequence[int], rows: Sequence[int]
    ) -> dict[int | None, list[list[int]]]:
        """Decodes all waiting rows on greedily; the lanes are then free for the next group."""
        distinct = list({id(lane): lane for lane in lanes.values()}.values())
        self._crew.map(partial(self._decode_lane, kept=kept), distinct)
        found = {key: tokens for lane in distinct for key, tokens in lane.found.items()}
        for lane in distinct:
            lane.clear()
        layers = dict.fromkeys(layer for layer, _ in found)
        return {layer: [found[layer, row] for row in rows] for layer in layers}

    def _decode_lane(self, lane: Lane, kept: Sequence[int]) -> None:
        """Decodes a lane's rows; those of each candidate pass by its layer.

        Each slot holds a row up to its last token.
        """
        found, slots = lane.found, lane.slots
        slots.use([len(part) for part in lane.waiting])
        waiting = [key for part in lane.waiting for key in part]
        in_slot: list[tuple[int | None, int] | None] = list(waiting)
        tokens = torch.tensor([found[key][-1] for key in waiting], device=self._device)
        places = torch.tensor(
            [len(self._prompts[key[1]]) + len(found[key]) - 1 for key in waiting],
            device=self._device,
        )
        left_out = torch.tensor(
            [-1 if key[0] is None else key[0] for key in waiting], device=self._device
        )
        passing = _passing(left_out)
        active = len(in_slot)
        while active:
            slots.begin_step(places)
            hidden = self._step(self._embed(tokens), places, slots, kept, passing)
            tokens = self._choose(hidden)
            for slot, token in enumerate(tokens.tolist()):
                key = in_slot[slot]
                if key is None:
                    continue
                found[key].append(token)
                if self._ending.reached(key[1], found[key]):
                    in_slot[slot] = None
                    active -= 1
            going = [key is not None for key in in_slot]
            # A finished row in its slot stays where it is, so that it never outgrows the buffers.
            places = places + torch.tensor(going, device=self._device).long()
            if active and active < COMPACT_BELOW * len(in_slot):
                order = slots.keep(going)
                in_slot = [in_slot[slot] for slot in order]
                moved = torch.tensor(order, device=self._device)
                tokens, places, left_out = tokens[moved], places[moved], left_out[moved]
                passing = _passing(left_out)

    def _step(
        self,
        inputs: Tensor,
        places: Tensor,
        rows: RowAttention,
        layers: Sequence[int],
        passing: Mapping[int, Tensor],
    ) -> Tensor:
        """States after the layers; rows that `passing` names for a layer stay as they were before it."""
        hidden, rotary = self._enter(inputs, places)
        for layer in layers:
            before = hidden
            hidden = self._layers[layer](hidden, rotary, rows)
            if layer in passing:
                hidden[passing[layer]] = before[passing[layer]]
        return hidden


def _passing(left_out: Tensor) -> dict[int, Tensor]:
    """For each layer, the slots whose rows pass by it; -1 passes by none."""
    return {
        layer: (left_out == layer).nonzero()[:, 0]
        for layer in sorted(set(left_out.tolist()))
        if layer >= 0
    }
