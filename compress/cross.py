"""The fast search for encoder-decoder models: what a candidate shares with its parent is computed once.

As in `compress.exact`: audio is encoded once a search, the parent's states below the missing layer are
walked through once for all candidates, and the parent's translation is a draft that the candidate checks in
one pass (Leviathan et al. 2023, arXiv 2211.17192), so that the tokens are those of its own greedy decoding.
What its layers attend to in the encoder's states is the same for every candidate too: those keys and values
are computed once a chunk of segments.

The layers are the stock modules with their own caches. Rows are padded on the right; tokens that follow
stand behind the padding, which a mask hides: learnt positions are added to the inputs, so that the order of
keys in a cache says nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.drafts import Ending
from compress.encoded import held_bytes, take_all
from compress.footprint import Footprint
from compress.task import SearchTask
from halve.models import SpeechModel
from halve.sources import asked

COMPACT_BELOW = 0.5
"""Rows are moved together once fewer of them than this are still decoding: each carries a large cache."""
WINDOW_COPIES = 2
"""How often the encoder's states, their keys and values may stand in memory: for the chunk, for rows decoding."""
TEXT_COPIES = 4
"""Those of prompts and translations: the parent's, the candidate's, and rows decoding, whose steps follow the drafts."""


@dataclass
class _Chunk:
    """Some rows with their drafts, on their way through the parent's layers."""

    rows: list[int]
    drafts: list[list[int]]
    hidden: Tensor
    """Input of the next layer: (rows, tokens, hidden), padded on the right."""
    heard: Tensor
    """The encoder's states: (rows, positions, width)."""
    cross: Any
    """Keys and values of them in every layer."""
    cache: Any
    """The parent's own keys and values so far."""

    @property
    def lengths(self) -> list[int]:
        """How many draft tokens are fed for each row; the last is only ever chosen."""
        return [max(0, len(draft) - 1) for draft in self.drafts]


class CrossTranslator:
    """Translates with layers left out. Open it as a context."""

    def __init__(self, speech: SpeechModel, task: SearchTask) -> None:
        family = speech.family
        self.task = task
        self.layers: Any = speech.part(family.layers)
        self._family, self._model = family, speech.model
        self._decoder = speech.part(family.decoder)
        self._norm = speech.part(family.norm)
        self._table = speech.part(family.embeddings)
        self._device = self._table.weight.device
        self._ending = Ending(task.limits, frozenset(family.end_ids(speech.model)))
        self._blocked, self._blocked_first = family.suppressed(speech.model)
        instruction = asked(family, task.lang, task.audio[0] if task.audio else None)
        before, after = family.prompt_ids(speech.processor, instruction)
        self._prompt = [*before, *after]
        with torch.inference_mode():
            self._heard: list[Tensor] = take_all(speech, task.audio)

    def __enter__(self) -> "CrossTranslator":
        self._mode = torch.inference_mode()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(None, None, None)

    def footprint(self) -> Footprint:
        """The most that the segments take: the encoder's states, their keys and values, and those of tokens.

        The last are padded to the longest row's.
        """
        width = self._table.weight.shape[1]
        item = self._table.weight.element_size()
        of_token = 2 * width * len(self.layers) * item
        of_heard = WINDOW_COPIES * (of_token + width * item)
        return Footprint(
            rows=tuple(of_heard * len(heard) for heard in self._heard),
            held=held_bytes(self._heard, self._device),
            positions=tuple(len(self._prompt) + limit for limit in self.task.limits),
            position_bytes=TEXT_COPIES * of_token,
        )

    def groups(self, candidates: Sequence[int | None]) -> list[list[int | None]]:
        """Each by itself, in the order of the walk; the whole model last."""
        inner = sorted(layer for layer in candidates if layer is not None)
        found: list[list[int | None]] = [[layer] for layer in inner]
        return [*found, [None]] if None in candidates else found

    def run(
        self,
        kept: Sequence[int],
        drafts: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int | None]],
        rows: Sequence[int],
    ) -> Iterator[dict[int | None, list[list[int]]]]:
        """See `ExactTranslator.run`."""
        waiting = {layer for group in candidates for layer in group}
        chunk = self._begin(rows, drafts, kept)
        for index, layer in enumerate(kept):
            if not waiting:
                return
            if layer in waiting:
                waiting.discard(layer)
                yield {layer: self._without(chunk, kept[:index], kept[index + 1 :])}
            chunk.hidden = self._through(chunk.hidden, [layer], chunk.cache, chunk.heard)
        if None in waiting:
            yield {None: self._without(chunk, kept, ())}

    def _begin(
        self, rows: Sequence[int], drafts: Sequence[Sequence[int]], kept: Sequence[int]
    ) -> _Chunk:
        """Feeds prompts and drafts, and computes what layers attend to in the encoder's states."""
        fed = [[*self._prompt, *draft[:-1]] for draft in drafts]
        longest = max(map(len, fed))
        end = min(self._ending.ends)
        ids = torch.tensor([row + [end] * (longest - len(row)) for row in fed], device=self._device)
        places = torch.arange(longest, device=self._device).expand_as(ids)
        heard = torch.stack([self._heard[row] for row in rows]).to(self._device)
        cross = self._family.new_cache().cross_attention_cache
        for layer in kept:
            attention = self.layers[layer].encoder_attn
            shape = (len(rows), heard.shape[1], attention.num_heads, attention.head_dim)
            keys, values = (
                part(heard).view(shape).transpose(1, 2).contiguous()
                for part in (attention.k_proj, attention.v_proj)
            )
            cross.update(keys, values, layer)
        own = self._family.new_cache().self_attention_cache
        return _Chunk(
            rows=list(rows),
            drafts=[list(draft) for draft in drafts],
            hidden=self._enter(ids, places),
            heard=heard,
            cross=cross,
            cache=self._cache(own, cross),
        )

    def _enter(self, ids: Tensor, places: Tensor) -> Tensor:
        """Tokens (rows, tokens) at their places as states (rows, tokens, hidden)."""
        states, _ = self._family.enter(self._decoder, self._family.embed(self._model, ids), places)
        return states

    @staticmethod
    def _cache(own: Any, cross: Any) -> Any:
        """A cache that begins with these two; it knows that the second is complete."""
        from transformers import EncoderDecoderCache

        return EncoderDecoderCache(own, cross)

    def _through(
        self,
        hidden: Tensor,
        layers: Sequence[int],
        cache: Any,
        heard: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """States after the layers; every token sees those before it, or what `mask` says."""
        if mask is None:
            count = hidden.shape[1]
            mask = torch.ones(count, count, dtype=torch.bool, device=hidden.device).tril()
            mask = mask.expand(len(hidden), 1, count, count)
        for layer in layers:
            hidden = self.layers[layer](
                hidden,
                attention_mask=mask,
                encoder_hidden_states=heard,
                past_key_values=cache,
                use_cache=True,
            )
        return hidden

    def _without(
        self, chunk: _Chunk, below: Sequence[int], above: Sequence[int]
    ) -> list[list[int]]:
        """The rows' translations by the layers below, which the chunk has passed, and those above."""
        branch = self._cache(self._family.new_cache().self_attention_cache, chunk.cross)
        hidden = self._through(chunk.hidden, above, branch, chunk.heard)
        found = self._check(chunk, hidden)
        going = [
            place
            for place, row in enumerate(chunk.rows)
            if not self._ending.reached(row, found[place])
        ]
        if going:
            own = self._family.new_cache().self_attention_cache
            index = torch.tensor(going, device=self._device)
            for layers, cache in ((below, chunk.cache), (above, branch)):
                for layer in layers:
                    states = cache.self_attention_cache.layers[layer]
                    own.update(states.keys[index], states.values[index], layer)
            self._decode(chunk, going, found, own, [*below, *above])
        return found

    def _check(self, chunk: _Chunk, hidden: Tensor) -> list[list[int]]:
        """What each row keeps of its draft, because these layers chose it too, and its first own token."""
        first = len(self._prompt) - 1
        found = []
        for place, (row, draft) in enumerate(zip(chunk.rows, chunk.drafts, strict=True)):
            states = hidden[place, first : first + max(1, len(draft))]
            logits = self._logits(states)
            if self._blocked_first:
                logits[0, list(self._blocked_first)] = -torch.inf
            own: list[int] = logits.argmax(-1).tolist()
            found.append(self._ending.kept(row, draft, own))
        return found

    def _logits(self, states: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) of states before the last norm; -inf for what is never said."""
        logits = self._family.logits(self._model, self._norm(states))
        if self._blocked:
            logits[:, list(self._blocked)] = -torch.inf
        return logits

    def _decode(
        self,
        chunk: _Chunk,
        going: list[int],
        found: list[list[int]],
        own: Any,
        layers: Sequence[int],
    ) -> None:
        """Goes on greedily with the rows at the places `going`; adds their tokens to `found`."""
        cross, heard = self._selected(chunk, going, layers)
        cache = self._cache(own, cross)
        width = len(self._prompt) + max(chunk.lengths)
        # A row has said one token more than it has been fed.
        fed = [len(self._prompt) + len(found[place]) - 1 for place in going]
        places = torch.tensor(fed, device=self._device)
        seen = torch.arange(width, device=self._device)[None, :] < places[:, None]
        while any(not self._ending.reached(chunk.rows[place], found[place]) for place in going):
            seen = torch.cat([seen, seen.new_ones(len(going), 1)], dim=1)
            ids = torch.tensor([found[place][-1] for place in going], device=self._device)
            hidden = self._enter(ids[:, None], places[:, None])
            hidden = self._through(hidden, layers, cache, heard, seen[:, None, None, :])
            chosen = self._logits(hidden[:, -1]).argmax(-1).tolist()
            alive = []
            for slot, (place, token) in enumerate(zip(going, chosen, strict=True)):
                # A finished row says the same again, unheard, until the rows are moved together.
                if not self._ending.reached(chunk.rows[place], found[place]):
                    found[place].append(token)
                    alive.append(slot)
            places = (places + 1).clamp(max=self._last_place())
            if len(alive) < COMPACT_BELOW * len(going):
                index = torch.tensor(alive, device=self._device)
                cache.batch_select_indices(index)
                places, seen, heard = places[index], seen[index], heard[index]
                going = [going[slot] for slot in alive]

    def _last_place(self) -> int:
        """The last position that the model knows: finished rows in their slots do not go past it."""
        return int(self._model.config.max_target_positions) - 1

    def _selected(
        self, chunk: _Chunk, going: Sequence[int], layers: Sequence[int]
    ) -> tuple[Any, Tensor]:
        """What the rows at the places `going` attend to."""
        index = torch.tensor(going, device=self._device)
        everyone = len(going) == len(chunk.rows)
        cross = self._family.new_cache().cross_attention_cache
        for layer in layers:
            states = chunk.cross.layers[layer]
            cross.update(states.keys[:, :, :0], states.values[:, :, :0], layer)
            # Where every row goes on, nothing is copied.
            cross.layers[layer].keys = states.keys if everyone else states.keys[index]
            cross.layers[layer].values = states.values if everyone else states.values[index]
        return cross, chunk.heard if everyone else chunk.heard[index]
