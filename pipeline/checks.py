"""What a recipe asks of its model, its corpus and this machine, and cannot have: told before hours of work."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.config import check_family
from halve import environment
from halve.errors import CorpusError, InputError, RecipeError
from halve.families import family_for
from pipeline.console import size
from pipeline.recipe import Recipe
from pipeline.speech import Speech

if TYPE_CHECKING:
    from pipeline.steps import Step

_LOADS_WHOLE = ("importance", "distill")
"""Stages that hold the teacher as they are told to, where others take 16 or 4 bits if they must."""


def check_texts(recipe: Recipe) -> None:
    """Refuses texts for a trimmed vocabulary that are not there.

    Raises:
        InputError: a file is missing.
    """
    for text in (text for package in recipe.packages for text in package.vocab_texts):
        if not Path(text).is_file():
            raise InputError(
                f"The text file {text} does not exist",
                mend="correct `vocab_texts` in the recipe (paths are relative to the recipe)",
            )


def check_fits(recipe: Recipe, config: dict[str, Any]) -> None:
    """Refuses what the recipe asks of its model and cannot have.

    Raises:
        InputError: layers that cannot go, a package or a contest's entry that cannot be made of it, a latency bench
            of a model that reads.
        MissingExtraError: a package that nothing here could run.
    """
    from export.contest import check_contest

    family = family_for(config)
    _check_layers(recipe, config)
    for package in recipe.packages:
        check_family(package, family, config)
        check_contest(package, family)
        if package.target == "gguf":
            from export.gguf_runtime import check_installed

            check_installed()
    if recipe.bench.latency is not None and family.reads == "text":
        raise RecipeError(
            f"{recipe.teacher or recipe.base} reads text, and the latency bench times audio",
            mend="take `latency` out of the recipe's `bench`",
        )


def _check_layers(recipe: Recipe, config: dict[str, Any]) -> None:
    from compress.importance import check_config, check_method
    from compress.prune import plan_of_layers

    family = family_for(config)
    num_layers = family.num_layers(config)
    if recipe.importance is not None:
        check_config(recipe.importance, num_layers, family.must_stay(config))
        check_method(recipe.importance, family)
    if recipe.prune is not None and recipe.prune.layers is not None:
        plan_of_layers(recipe.prune.layers, family, num_layers)


def check_splits(chosen: Sequence["Step"], corpus: Path, speech: Speech) -> None:
    """Refuses stages whose split of the corpus is empty, as far as the corpus is here to be counted.

    Args:
        corpus: where it lies, or will: the stages that have it among their inputs read it.

    Raises:
        CorpusError: there is one.
    """
    if speech.assumed:
        return
    for step in (step for step in chosen if corpus in step.inputs):
        for split in _splits_of(step):
            if not speech.segments.get(split):
                raise CorpusError(
                    f"The corpus has no {split} segment, and the stage {step.name} needs some",
                    expected=", ".join(
                        f"{count} in {name}" for name, count in speech.segments.items()
                    ),
                    mend=f"name segments for {split} in the source, deal all of them out anew (`split: group` under "
                    f"`corpus`), or take {step.name} out of the recipe",
                )


def _splits_of(step: "Step") -> Iterable[str]:
    """The splits of the corpus that a stage cannot do without."""
    config: Any = step.config
    if step.stage == "importance":
        from compress.importance import BLIND

        return () if config.method in BLIND else (config.split,)
    if step.stage == "distill":
        return tuple(config.splits)
    if step.stage in ("teach", "tune"):
        return ("train",) if config.select_segments == 0 else ("train", "select")
    if step.stage in ("merge", "package"):
        return ("select",)
    return (config.split,) if step.stage == "bench" else ()


def check_weights(config: dict[str, Any], todo: Sequence["Step"]) -> None:
    """Refuses stages that would load a teacher for which the device has no room in the numbers asked for.

    Args:
        config: the teacher's.
        todo: the steps that have still to run.

    Raises:
        InputError: there is one.
    """
    from halve.models import pick_device

    if "quantization_config" in config:  # it stays in what it is stored in
        return
    count = family_for(config).count_parameters(config).total
    for step in (step for step in todo if step.stage in _LOADS_WHOLE):
        of_step: Any = step.config
        device = pick_device(getattr(of_step, "device", "auto"))
        is_wide = of_step.dtype == "float32"
        needed, room = count * (4 if is_wide else 2), environment.device_bytes(device)
        if needed > room:
            where = "this machine" if device == "cpu" else "the GPU"
            raise InputError(
                f"The stage {step.name} loads the teacher in {of_step.dtype}: {size(needed)} of weights, "
                f"and {where} has {size(room)}",
                mend=f"`dtype: bfloat16` under `{step.stage}` in the recipe halves that"
                if is_wide
                else "take a larger machine, or a smaller teacher",
            )
