"""Embedding similarity: the cosine of a hypothesis's and its reference's sentence embeddings.

The embedding is the mean of a text encoder's last states over the sentence's tokens, as in Sentence-BERT
(Reimers and Gurevych 2019); a multilingual one (LaBSE, multilingual-e5) suits translations. It says how near
two texts are to that encoder and no more: it is neither COMET nor a measure of translation quality, and is
never shown under such a name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve import artefact
from halve.errors import InputError
from halve.models import quiet
from halve.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

METRIC = "embedding_similarity"


@dataclass(frozen=True)
class Similarity:
    """Cosines by system, one a segment, and what they were computed with."""

    scores: dict[str, list[float]] = field(default_factory=dict)
    signature: str = ""


def measure(
    model: str | None,
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    *,
    batch_size: int = 32,
    progress: Progress = SILENT,
) -> Similarity:
    """Scores every system; nothing where no model is given.

    Args:
        model: directory of a text encoder that stock transformers loads.
        systems: hypotheses by system name, each as long as `references`.

    Returns:
        cosines from -1 to 1; 0 where a text is empty, which has no direction.

    Raises:
        InputError: there is no such encoder.
    """
    if model is None:
        return Similarity()
    encoder, tokenizer = _load(Path(model))
    wanted = _embed(encoder, tokenizer, references, batch_size)
    scores = {}
    with progress.task("Embedding similarity", len(systems)) as advance:
        for name, hypotheses in systems.items():
            found = _embed(encoder, tokenizer, hypotheses, batch_size)
            scores[name] = [
                float(value) if said and reference else 0.0
                for value, said, reference in zip(
                    (found * wanted).sum(dim=1), hypotheses, references, strict=True
                )
            ]
            advance()
    return Similarity(scores, _signature(Path(model)))


def check(model: str) -> None:
    """Refuses what embeds no text: no encoder, one without a token that fills a batch, one that must be told what to say.

    Raises:
        InputError: it cannot be loaded, or used.
    """
    encoder, tokenizer = _load(Path(model))
    try:
        _embed(encoder, tokenizer, ["one text", "and another, longer one"], 2)
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{model} embeds no text: {said}",
            expected="a text encoder, as LaBSE or multilingual-e5",
        ) from None


def _load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    expected = "a directory with config.json, weights and tokenizer of a text encoder"
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is no embedding model", expected=expected)
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(path)
            encoder = AutoModel.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{path} cannot be loaded: {said[0][:200]}", expected=expected) from None
    return encoder.eval(), tokenizer


def _embed(encoder: Any, tokenizer: Any, texts: Sequence[str], batch_size: int) -> "torch.Tensor":
    """Unit vectors, (texts, hidden); anything for an empty text, which may have no token at all."""
    import torch

    rows = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            [text or "." for text in texts[start : start + batch_size]],
            padding=True,
            truncation=True,
            max_length=_longest(encoder, tokenizer),
            return_tensors="pt",
        )
        with torch.inference_mode():
            states = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        rows.append((states * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=1)


def _longest(encoder: Any, tokenizer: Any) -> int:
    """Tokens that both can take; RoBERTa's kind loses two positions to padding, which its tokenizer knows."""
    positions = int(getattr(encoder.config, "max_position_embeddings", None) or 512)
    return min(positions, int(tokenizer.model_max_length), 512)


def _signature(path: Path) -> str:
    import transformers

    return (
        f"{METRIC}|model:{path.resolve().name}|sha256:{artefact.identity(path)[:12]}"
        f"|pooling:mean|transformers:{transformers.__version__}"
    )
