"""What is refused of a model directory, and in which words: damaged configs, foreign and unusable weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halve.errors import ArtefactError
from halve.families import FAMILIES, Family
from halve.json_files import read_json
from halve.shards import GENERATION, Stored, iter_stored

MOST_LAYERS = 1000
"""A config that says more decoder layers is damaged."""
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""What a decoder's config gives as a number above zero, where it gives it."""


def check_config(file: Path, config: Any) -> None:
    """Refuses what is no config, or lacks the part that tells how many layers there are."""
    if not isinstance(config, dict):
        raise ArtefactError(f"{file} holds no settings", expected="a model's config.json")
    kind = str(config.get("model_type"))
    for family in FAMILIES.values():
        if kind not in family.model_types:
            continue
        try:
            _check_sizes(family, config)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ArtefactError(
                f"{file} is damaged ({type(error).__name__}: {error})",
                expected=f"the whole config of a {kind} model",
                mend="copy it again from where the model is from",
            ) from None


def _check_sizes(family: Family, config: dict[str, Any]) -> None:
    """Raises where a size is no number, or there are so many layers that nothing would end."""
    text = family.text_config(config)
    for name in _SIZES:
        if name in text and (type(text[name]) is not int or text[name] < 1):
            raise ValueError(f"{name} is {text[name]!r}")
    if family.num_layers(config) > MOST_LAYERS:
        raise ValueError(f"{family.num_layers(config):,} decoder layers")


def check_generation(path: Path) -> None:
    """Refuses a damaged generation config, which transformers passes over in silence."""
    file = path / GENERATION
    if file.is_file() and not isinstance(read_json(file), dict):
        raise ArtefactError(
            f"{file} holds no settings",
            expected="a model's generation_config.json",
            mend="copy it again from where the model is from",
        )


def check_loading(path: Path, info: dict[str, Any]) -> None:
    """Refuses weights that are not those of the config, by name."""
    faults = [
        f"{kind} {', '.join(sorted(map(_named, info[key]))[:4])}{' …' if len(info[key]) > 4 else ''}"
        for key, kind in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unexpected"),
            ("mismatched_keys", "of another shape"),
        )
        if info.get(key)
    ]
    if faults:
        raise ArtefactError(
            f"{path}: config and weights disagree: {'; '.join(faults)}",
            expected="every tensor of the config, and no other",
            mend="copy or download the model again, or correct its config.json",
        )


def check_finite(path: Path, model: Any) -> None:
    """Refuses weights that are no numbers: such a model says something all the same, and would be scored."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            continue
        # A sum takes no memory; it may overflow where every number is finite.
        total = parameter.detach().sum(dtype=torch.float32)
        if not total.isfinite() and not parameter.isfinite().all():
            raise ArtefactError(
                f"{path}: {name} holds values that are no numbers",
                expected="finite weights",
                mend="copy or make the model again",
            )


def _named(key: Any) -> str:
    """A differing key; one of another shape comes with what is stored and what the config asks for."""
    if isinstance(key, str):
        return key
    name, stored, wanted = key
    return f"{name} ({' x '.join(map(str, stored))} stored, {' x '.join(map(str, wanted))} by the config)"


def check_tied_head(model: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Refuses a stored head that is to be left behind as a copy of the embeddings, and is none.

    Raises:
        ArtefactError: the two differ; stock code then uses both, whatever the config says.
    """
    head, table = f"{family.disk_head}weight", f"{family.disk_embeddings}weight"
    # Where the family has no head on disk, both names are the embeddings'.
    if head == table or not family.is_surplus(config, head):
        return
    stored = {each.key: each for each in iter_stored(model) if each.key in (head, table)}
    if len(stored) == 2 and not _equal_bytes(stored[head], stored[table]):
        raise ArtefactError(
            f"{model}: config and weights disagree: config.json ties {head} to {table}, and two different "
            "tables are stored",
            expected="equal tables, or a config that does not tie them",
            mend='write "tie_word_embeddings": false into its config.json: stock code uses both tables as they are',
        )


def _equal_bytes(one: Stored, other: Stored) -> bool:
    if (one.shape, one.kind) != (other.shape, other.kind):
        return False
    return all(mine == its for mine, its in zip(one.pieces(), other.pieces(), strict=True))
