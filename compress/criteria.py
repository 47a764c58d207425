"""Cheap criteria that translate nothing: for comparison, and as a shortcut on large models.

The distances are pure functions; the walks below feed them with the decoder's states on the prompt, the
audio and the reference translation of each segment. Here as everywhere the first and the last layer stay.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compress.exact import ExactTranslator, Pack
from compress.footprint import Footprint
from compress.rows import end_token
from compress.search import Candidate, Ledger, Ranking, plan_chunks, removable
from compress.task import SearchTask
from halve.errors import InputError
from halve.models import SpeechModel
from halve.progress import Advance, Progress

LOWER = {"better": "lower"}

Cut = Callable[[Footprint, Sequence[int]], list[list[int]]]
"""Cuts rows into chunks, by what they take and by their lengths."""


def blind(
    method: str, num_layers: int, remove: int, seed: int, stay: Container[int] = ()
) -> Ranking:
    """Layers chosen without looking at the model: the floor that a criterion must beat.

    `random` draws them; `middle` takes the block around the middle, as the paper's ablation does
    (Moslem 2025, arXiv 2505.20237); `spaced` keeps layers as far apart as can be, as Distil-Whisper does
    (Gandhi et al. 2023, arXiv 2311.00430, section 3.1).
    """
    inner = removable(range(num_layers), num_layers, stay)
    if method == "random":
        drawn = np.random.default_rng(seed).permutation(inner)[:remove]
        removed = tuple(int(layer) for layer in drawn)
    elif method == "spaced":
        removed = spaced(num_layers, inner, remove)
    else:
        first = (len(inner) - remove) // 2
        removed = tuple(inner[first : first + remove])
    candidates = [Candidate(1, layer, float(layer in removed)) for layer in inner]
    return Ranking(removed, tuple(candidates), method, f"halve|{method}|seed:{seed}")


def spaced(num_layers: int, inner: Sequence[int], remove: int) -> tuple[int, ...]:
    """The layers that go so that the others, the first and the last among them, are evenly spread.

    Args:
        inner: the layers that may go.
    """
    wanted = np.linspace(0, num_layers - 1, num_layers - remove).astype(int)
    gone = [layer for layer in inner if layer not in wanted]
    # Where some must stay, others go in their place, the last first.
    more = [layer for layer in reversed(inner) if layer not in gone]
    return tuple(sorted([*gone[:remove], *more[: max(0, remove - len(gone))]]))


def in_128s(footprint: Footprint, lengths: Sequence[int]) -> list[list[int]]:
    """Chunks of 128 rows, whatever they take."""
    return plan_chunks(lambda chunks: True, lengths, 128)


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """How much a layer changes its input: one minus the cosine of input and output.

    ShortGPT (Men et al. 2024, arXiv 2403.03853), equation 1; its layers of least influence go, all at once.

    Args:
        before, after: a layer's input and output, shape (tokens, hidden).

    Returns:
        shape (tokens,).
    """
    return 1 - functional.cosine_similarity(before.float(), after.float(), dim=-1)


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """The angle between the states before and after a block of layers, as a share of a half turn.

    Gromov et al. 2024 (arXiv 2403.17887), equation 7, taken at each row's last token; the block of the
    wanted length with the least distance goes.

    Args:
        before, after: shape (rows, hidden).

    Returns:
        shape (rows,).
    """
    cosine = functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return torch.arccos(cosine.clamp(-1, 1)) / math.pi


def by_similarity(
    method: str,
    speech: SpeechModel,
    task: SearchTask,
    remove: int,
    progress: Progress,
    cut: Cut = in_128s,
) -> Ranking:
    """Ranks by block influence or angular distance in one walk through the whole model.

    Args:
        cut: puts segments into chunks that there is room for, one at a time.
    """
    texts = reference_tokens(speech, task)
    num_layers = len(speech.part(speech.family.layers))
    inner = removable(range(num_layers), num_layers, speech.family.must_stay(speech.config))
    influence = np.zeros(num_layers)
    last: list[list[Tensor]] = [[] for _ in range(num_layers + 1)]
    with ExactTranslator(speech, task) as walker:
        lengths = [len(audio) for audio in task.audio]
        chunks = cut(walker.footprint(decodes=False), lengths)
        tokens = 0.0
        with progress.task(method, len(texts)) as advance:
            for pack in (
                pack for rows in chunks for pack in walker.pack(rows, [texts[row] for row in rows])
            ):
                tokens += float(_weights(pack).sum())
                ends = [end - 1 for end in pack.attention.starts[1:]]
                for layer in range(num_layers):
                    before = pack.hidden
                    last[layer].append(before[ends].clone())
                    walker.advance(pack, layer)
                    influence[layer] += float(block_influence(before, pack.hidden) @ _weights(pack))
                last[num_layers].append(pack.hidden[ends].clone())
                _forget(pack)
                advance(len(pack.rows))
        if method == "block-influence":
            return _least_influence(influence / tokens, remove, inner, len(texts))
        return _nearest_block([torch.cat(rows) for rows in last], remove, inner)


def _forget(pack: Pack) -> None:
    """Drops the keys and values of the layers behind: nothing is decoded here, so that nothing looks back at them."""
    pack.attention.keys.clear()
    pack.attention.values.clear()


def check_finite(criterion: str, scores: Mapping[int, float]) -> None:
    """Refuses scores that are no numbers: any order of them would look like a ranking.

    Raises:
        InputError: a layer's score is not finite.
    """
    wrong = [layer for layer, score in scores.items() if not math.isfinite(score)]
    if wrong:
        raise InputError(
            f"Criterion {criterion} of layer {wrong[0]} is {scores[wrong[0]]:g}",
            expected="a finite number for every layer",
            mend="use --dtype float32 or bfloat16; if it stays so, the model's weights are damaged",
        )


def _weights(pack: Pack) -> Tensor:
    """In how many of the pack's rows each token stands: shape (tokens,)."""
    weights = torch.ones(len(pack.hidden), device=pack.hidden.device)
    weights[: pack.attention.stem] = len(pack.rows)
    return weights


def _least_influence(
    influence: "np.ndarray", remove: int, inner: Sequence[int], segments: int
) -> Ranking:
    check_finite("block-influence", {layer: float(influence[layer]) for layer in inner})
    order = sorted(inner, key=lambda layer: (influence[layer], layer))
    candidates = [Candidate(1, layer, float(influence[layer]), LOWER) for layer in inner]
    signature = f"halve|block-influence|segments:{segments}"
    return Ranking(tuple(order[:remove]), tuple(candidates), "block-influence", signature)


def _nearest_block(states: Sequence[Tensor], remove: int, inner: Sequence[int]) -> Ranking:
    """Candidates are the first layers of the blocks whose layers may all go.

    Raises:
        InputError: there is no such block.
    """
    firsts = [layer for layer in inner if set(range(layer, layer + remove)) <= set(inner)]
    if not firsts:
        raise InputError(
            f"No {remove} layers in a row may go",
            expected=f"a block among layers {', '.join(map(str, inner))}",
            mend="remove fewer, or rank by another method",
        )
    candidates = [
        Candidate(
            1, layer, float(angular_distance(states[layer], states[layer + remove]).mean()), LOWER
        )
        for layer in firsts
    ]
    check_finite("angular", {candidate.layer: candidate.score for candidate in candidates})
    first = min(candidates, key=lambda candidate: (candidate.score, candidate.layer)).layer
    signature = f"halve|angular|block:{remove}|segments:{len(states[0])}"
    return Ranking(tuple(range(first, first + remove)), tuple(candidates), "angular", signature)


def reference_tokens(speech: SpeechModel, task: SearchTask) -> list[list[int]]:
    """Each reference as the model would write it, its end token included."""
    end = end_token(speech)
    tokenizer = speech.processor.tokenizer
    return [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in task.references
    ]


def by_loss(
    speech: SpeechModel,
    task: SearchTask,
    remove: int,
    ledger: Ledger,
    progress: Progress,
    cut: Cut = in_128s,
) -> Ranking:
    """Greedy removal of the layer without which the references stay most likely.

    Mean negative log-likelihood of a reference token, in nats, with the true tokens before it (teacher
    forcing). As SLEB (Song et al. 2024, arXiv 2402.09025), which takes perplexity on running text.
    """
    texts = reference_tokens(speech, task)
    lengths = [len(text) for text in texts]
    num_layers = len(speech.part(speech.family.layers))
    kept, removed, found = list(range(num_layers)), [], []
    stay = speech.family.must_stay(speech.config)
    inner = len(removable(kept, num_layers, stay))
    tried = sum(inner - done for done in range(remove))
    with ExactTranslator(speech, task) as walker:
        chunks = ledger.chunks(lambda: cut(walker.footprint(decodes=False), lengths))
        with progress.task("loss", len(chunks) * tried, done=ledger.pieces()) as advance:
            for number in range(1, remove + 1):
                layers = removable(kept, num_layers, stay)
                _play(walker, texts, chunks, number, kept, layers, ledger, advance)
                losses = {
                    layer: sum(ledger[number, layer, chunk] for chunk in range(len(chunks)))
                    / sum(lengths)
                    for layer in layers
                }
                found += [Candidate(number, layer, losses[layer], LOWER) for layer in layers]
                removed.append(min(layers, key=lambda layer: (losses[layer], layer)))
                kept.remove(removed[-1])
    return Ranking(tuple(removed), tuple(found), "loss", f"halve|loss|segments:{len(texts)}")


def _play(
    walker: ExactTranslator,
    texts: Sequence[Sequence[int]],
    chunks: Sequence[Sequence[int]],
    number: int,
    kept: Sequence[int],
    layers: Sequence[int],
    ledger: Ledger,
    advance: Advance,
) -> None:
    """One round: every chunk's loss without each of `layers`, as far as the ledger does not hold it."""
    for chunk, rows in enumerate(chunks):
        todo = [layer for layer in layers if (number, layer, chunk) not in ledger]
        packs = walker.pack(rows, [texts[row] for row in rows])
        for layer, loss in _losses(walker, packs, kept, todo):
            # Before it is remembered: a resumed search would take it as it stands.
            check_finite("loss", {layer: loss})
            ledger.add(number, chunk, {layer: loss})
            advance(note=f"round {number}, without layer {layer}")


def _losses(
    walker: ExactTranslator, packs: Sequence[Pack], kept: Sequence[int], todo: Sequence[int]
) -> "list[tuple[int, float]]":
    """The summed loss of all rows without each layer of `todo`, what lies below it computed once."""
    found = []
    for index, layer in enumerate(kept):
        if not todo or layer > max(todo):
            break
        if layer in todo:
            found.append((layer, sum(_loss(walker, pack, kept[index + 1 :]) for pack in packs)))
        for pack in packs:
            walker.advance(pack, layer)
            _forget(pack)
    return found


def _loss(walker: ExactTranslator, pack: Pack, above: Sequence[int]) -> float:
    hidden, _ = walker.branch(pack, above)
    wanted = torch.tensor([token for draft in pack.drafts for token in draft], device=hidden.device)
    total, start = 0.0, 0
    for block in walker.logits(hidden):
        labels = wanted[start : start + len(block)]
        start += len(block)
        total += float(functional.cross_entropy(block.float(), labels, reduction="sum"))
    return total
