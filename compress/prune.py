"""Layer pruning: a smaller model from a plan, shard by shard, without ever loading the model."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.config import PruneConfig
from halve import artefact, hashing, shards
from halve.artefact import Artefact, languages_of
from halve.audio import SAMPLE_RATE_HZ
from halve.card import write_card
from halve.errors import ArtefactError, InputError, ParityError
from halve.families import Family, SourceText, family_for
from halve.families.base import kept_slices
from halve.json_files import read_json, write_json
from halve.languages import language
from halve.lineage import earlier_ranking, earlier_training
from halve.model_checks import check_tied_head
from halve.models import SpeechModel, check_weights, load_model, read_config, resolve_model
from halve.origin import origin
from halve.progress import SILENT, Progress
from halve.shard_writer import MAX_SHARD_BYTES, Part, raw, unchanged, write_shards
from halve.shards import Stored

if TYPE_CHECKING:
    import torch

LOGIT_TOLERANCE = 1e-4
"""Sliced and reloaded models compute the same sums; what is left is the order of a few of them."""


@dataclass(frozen=True)
class Plan:
    """Which decoder layers go and which stay, as numbered in the teacher, from 0."""

    family: str
    num_layers: int
    removed: tuple[int, ...]
    """In the order of removal."""
    kept: tuple[int, ...]
    """Ascending: the layer map from the student's numbers to the teacher's."""
    method: str | None = None
    """How the layers were ranked; None where they were named."""


def run_prune(
    config: PruneConfig,
    model: Path,
    plan: Path | None,
    out: Path,
    progress: Progress = SILENT,
) -> Artefact:
    """Writes the model without the layers of `config.layers`, or of the plan file.

    Raises:
        InputError: neither or both given, or layers that the model does not have.
        ArtefactError: a plan of another model, or weights missing or damaged.
        ParityError: the pruned model does not compute what the sliced teacher does.
    """
    model = resolve_model(model)
    teacher = read_config(model)
    family = family_for(teacher)
    # First: with a config of a thousand million layers the rest would not end.
    check_teacher(model, family, teacher)
    chosen = choose_plan(config, model, plan, family, teacher)
    family.check_kept(teacher, chosen.kept)
    parents = {"model": model}
    if config.layers is None and plan is not None:
        parents["plan"] = Path(plan)
    recipe = config.model_dump(mode="json")
    with artefact.writing(Path(out), "pruned", recipe, 0, parents) as draft:
        progress.message(f"Removing layers {', '.join(map(str, sorted(chosen.removed)))}")
        written = write_pruned(model, draft.path, family, chosen.kept)
        if config.verify != "none":
            check_structure(model, draft.path, family, chosen.kept)
            check_hashes(written)
        if config.verify == "full":
            check_contents(model, draft.path, family, chosen.kept)
            progress.message("Comparing logits with the sliced teacher")
            draft.extra["max_logit_difference"] = compare_logits(model, draft.path, chosen.kept)
        draft.extra.update(
            origin=origin(model),
            ranked_by=chosen.method,
            **numbered_by_teacher(chosen, model),
            **earlier_ranking(model),
            **earlier_training(model),
        )
        if langs := languages_of(model):
            draft.extra["langs"] = list(langs)
        write_card(draft.path, source=model, kind="pruned", facts=draft.extra)
    return artefact.read(out)


def numbered_by_teacher(chosen: Plan, model: Path) -> dict[str, Any]:
    """What went and what is left, as the first teacher numbers its layers: `model` may be pruned already."""
    gone: list[int] = []
    numbers, total = list(range(chosen.num_layers)), chosen.num_layers
    if (model / artefact.RECORD).is_file():
        before = artefact.read(model).extra
        if len(before.get("kept") or ()) == chosen.num_layers:
            gone, numbers = list(before["removed"]), list(before["kept"])
            total = len(gone) + len(numbers)
    return {
        "removed": [*gone, *(numbers[layer] for layer in chosen.removed)],
        "kept": [numbers[layer] for layer in chosen.kept],
        "num_layers": total,
    }


def check_teacher(model: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Refuses a model whose weights are not those of its config: what is left out would go unnoticed.

    Raises:
        ArtefactError: they disagree; the differing keys are named.
    """
    shapes = shards.tensor_shapes(model)
    family.check_stored(model, shapes)
    if family.num_layers(config) > len(shapes):
        raise ArtefactError(
            f"{model}: config and weights disagree: config.json says {family.num_layers(config):,} decoder "
            f"layers, {len(shapes):,} tensors are stored",
            expected="several tensors for each layer",
            mend="copy or download the model again, or correct its config.json",
        )
    check_tied_head(model, family, config)
    if config.get("quantization_config") is not None:
        return
    stored = sum(
        _numel(shape) for key, (shape, _) in shapes.items() if not family.is_surplus(config, key)
    )
    counts = family.count_parameters(config)
    expected = counts.total + counts.buffers
    if stored != expected:
        check_weights(model)
        raise ArtefactError(
            f"{model}: config and weights disagree: {stored:,} parameters are stored, the config says {expected:,}"
        )


def choose_plan(
    config: PruneConfig,
    model: Path,
    plan: Path | None,
    family: Family,
    teacher: Mapping[str, Any],
) -> Plan:
    """The plan from the layers named, or from the plan file."""
    if (config.layers is None) == (plan is None):
        raise InputError(
            "Neither layers nor a plan are given"
            if plan is None
            else "Both layers and a plan are given",
            expected="either --layers 3,5,6 or --plan DIR/plan.json",
        )
    if config.layers is not None:
        return plan_of_layers(config.layers, family, family.num_layers(teacher))
    return read_plan(Path(plan or ""), family, teacher, model)


def plan_of_layers(layers: Sequence[int], family: Family, num_layers: int) -> Plan:
    """A plan that removes the given layers.

    Raises:
        InputError: layers that the model does not have, named twice, or all it has.
    """
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong or len(set(layers)) != len(layers) or not layers or len(layers) >= num_layers:
        raise InputError(
            f"Layers {', '.join(map(str, layers)) or '(none)'} cannot be removed",
            expected=f"different numbers from 0 to {num_layers - 1}, and at least one layer left",
        )
    kept = tuple(layer for layer in range(num_layers) if layer not in layers)
    return Plan(family.name, num_layers, tuple(layers), kept)


def read_plan(
    path: Path, family: Family, config: Mapping[str, Any], model: Path | None = None
) -> Plan:
    """Reads a plan.json (or the importance directory that holds it) made for this model.

    Args:
        config: the model's config.
        model: the model's directory; where given, a plan that names its model must name this one.

    Raises:
        ArtefactError: no plan, a damaged one, or one of another model.
    """
    file = path / "plan.json" if path.is_dir() else path
    found = read_json(file)
    try:
        plan = Plan(
            family=str(found["family"]),
            num_layers=int(found["num_layers"]),
            removed=tuple(int(layer) for layer in found["removed"]),
            kept=tuple(int(layer) for layer in found["kept"]),
            method=found.get("method"),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtefactError(
            f"{file} is no prune plan ({error!r})",
            expected="family, num_layers, removed and kept",
            mend="make it with `halve importance`",
        ) from None
    _check_model(file, plan, family, config)
    whole = sorted([*plan.removed, *plan.kept]) == list(range(plan.num_layers))
    if not whole or not plan.kept or list(plan.kept) != sorted(plan.kept):
        raise ArtefactError(
            f"{file}: removed {list(plan.removed)} and kept {list(plan.kept)} do not fit together",
            expected=f"each layer from 0 to {plan.num_layers - 1} once, the kept ones in order",
        )
    named = found.get("model")
    if model is not None and named is not None and named != artefact.identity(model):
        raise ArtefactError(
            f"{file} is a plan of another model than {model}, or of another version of it",
            expected="the model whose layers were ranked",
            mend=f"rank this model, or say --layers {','.join(map(str, plan.removed))} if you mean it",
        )
    return plan


def _check_model(file: Path, plan: Plan, family: Family, config: Mapping[str, Any]) -> None:
    layers = family.num_layers(config)
    if plan.family != family.name or plan.num_layers != layers:
        raise ArtefactError(
            f"{file} is a plan of another model: {plan.family} with {plan.num_layers} layers",
            expected=f"{family.name} with {layers} layers",
            mend="give the plan that was made for this model",
        )


def write_pruned(
    model: Path,
    target: Path,
    family: Family,
    kept: Sequence[int],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[Path, str]:
    """Writes config, weights and side files of the model with only the kept layers.

    The kept tensors' bytes go over as they are, piece by piece, without being decoded; but of a tensor
    that holds all layers side by side only the kept ones' slices do.

    Returns:
        the files of weights and the SHA-256 of what was written to each.
    """
    for stale in target.glob("*.safetensors*"):
        stale.unlink()  # of a killed run
    written = write_shards(target, kept_parts(model, family, kept), max_shard_bytes)
    shards.write_config(target, family.kept_config(read_config(model), list(kept)))
    shards.copy_side_files(model, target)
    generation = target / "generation_config.json"
    if generation.is_file():
        settings = read_json(generation)
        new = family.kept_generation(settings, kept)
        if new != settings:
            write_json(generation, new)
    return written


def kept_parts(model: Path, family: Family, kept: Sequence[int]) -> list[Part]:
    """What is left of a model's tensors, in the order of its files."""
    config = read_config(model)
    return [
        _kept_part(stored, new, family, family.num_layers(config), kept)
        for stored in shards.iter_stored(model)
        if not family.is_surplus(config, stored.key)
        and (new := family.kept_key(stored.key, kept)) is not None
    ]


def _kept_part(
    stored: Stored, key: str, family: Family, num_layers: int, kept: Sequence[int]
) -> Part:
    """A tensor as it is, or the kept layers' slices of one that holds all of them."""
    axis = family.stacked_axis(stored.key)
    if axis is None:
        return unchanged(stored, key)
    shape = list(stored.shape)
    shape[axis] = shape[axis] // num_layers * len(kept)
    size_bytes = stored.size_bytes // num_layers * len(kept)

    def pieces() -> Iterator[memoryview]:
        if axis == 0:
            yield raw(kept_slices(stored.tensor(), axis, num_layers, kept))
            return
        for _, rows in stored.rows():
            yield raw(kept_slices(rows, axis, num_layers, kept))

    return Part(key, stored.kind, tuple(shape), size_bytes, pieces)


def check_structure(model: Path, pruned: Path, family: Family, kept: Sequence[int]) -> None:
    """Checks every tensor's name, shape and type on disk against config and teacher.

    Raises:
        ArtefactError: what was written is not what should be there.
    """
    after = shards.tensor_shapes(pruned)
    wanted = {part.key: (part.shape, part.kind) for part in kept_parts(model, family, kept)}
    faults = [f"{key}: missing" for key in sorted(wanted.keys() - after.keys())]
    faults += [f"{key}: not expected" for key in sorted(after.keys() - wanted.keys())]
    faults += [
        f"{key}: {after[key]} instead of {wanted[key]}"
        for key in sorted(wanted.keys() & after.keys())
        if after[key] != wanted[key]
    ]
    config = read_config(pruned)
    counted = family.count_parameters(config)
    stored = sum(_numel(shape) for shape, _ in after.values())
    if counted.decoder_layers != len(kept):
        faults.append(f"config.json has {counted.decoder_layers} layers instead of {len(kept)}")
    expected = counted.total + counted.buffers
    if stored != expected and config.get("quantization_config") is None:
        faults.append(f"{stored} parameters stored, the config says {expected}")
    _refuse(pruned, faults)


def check_hashes(written: Mapping[Path, str]) -> None:
    """Reads files of weights again and compares their SHA-256 with that of the bytes handed to the disk.

    The teacher's bytes were hashed on their way, so that this needs one pass over the student alone.

    Raises:
        ArtefactError: a file does not hold what was written to it.
    """
    found = hashing.sha256_of(written, fresh=True)
    for (path, wanted), digest in zip(written.items(), found, strict=True):
        if digest != wanted:
            raise ArtefactError(
                f"{path.name}: sha256 {digest[:12]}… is read back, {wanted[:12]}… was written",
                expected="the bytes that were written",
                mend="check the disk, then run it again",
            )


def check_contents(model: Path, pruned: Path, family: Family, kept: Sequence[int]) -> None:
    """Reads both models again and compares the bytes of all tensors.

    Raises:
        ArtefactError: a tensor is not the teacher's.
    """
    wanted = {part.key: part for part in kept_parts(model, family, kept)}
    faults = [
        f"{stored.key}: its contents differ from the teacher's"
        for stored in shards.iter_stored(pruned)
        if stored.key in wanted and not _same_bytes(stored, wanted[stored.key])
    ]
    _refuse(pruned, faults)


def _same_bytes(one: Stored, other: Part) -> bool:
    if one.size_bytes != other.size_bytes:
        return False
    digests = [hashlib.sha256(), hashlib.sha256()]
    for digest, pieces in zip(digests, (one.pieces(), other.pieces()), strict=True):
        for piece in pieces:
            digest.update(piece)
    return digests[0].digest() == digests[1].digest()


def _refuse(pruned: Path, faults: Sequence[str]) -> None:
    if faults:
        raise ArtefactError(f"{pruned} was not pruned as planned: {'; '.join(faults[:5])}")


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def compare_logits(model: Path, pruned: Path, kept: Sequence[int]) -> float:
    """The largest difference between the pruned model's logits and those of the teacher sliced in memory.

    Both are loaded with the stock class, one after the other, in their stored precision, and hear a
    second of noise, or read a sentence.

    Raises:
        ParityError: they differ by more than LOGIT_TOLERANCE of the largest logit.
    """
    from compress.reference import only_layers

    teacher = load_model(model, dtype="auto")
    with only_layers(teacher.model, teacher.family, kept):
        wanted = _probe(teacher)
    del teacher
    found = _probe(load_model(pruned, dtype="auto"))
    difference = float((wanted - found).abs().max())
    # Written so that a NaN fails too.
    if not difference <= LOGIT_TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise ParityError(
            f"The pruned model's logits differ by {difference:.2g} from the sliced teacher's",
            expected=f"at most {LOGIT_TOLERANCE:g} of the largest logit",
            mend="check that config.json and weights are of one model",
        )
    return difference


def _probe(speech: SpeechModel) -> "torch.Tensor":
    """Logits (tokens, vocabulary) of a prompt with a second of noise, or a sentence."""
    import torch

    noise = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE_HZ).astype(np.float32)
    family = speech.family
    source = SourceText("A second of noise.") if family.reads == "text" else noise
    dtype = next(speech.model.parameters()).dtype
    instruction = family.instruction(language("de"))
    inputs = family.stock_inputs(speech.processor, source, instruction, dtype)
    with torch.inference_mode():
        output = speech.model(**{key: value.to(speech.device) for key, value in inputs.items()})
    logits: torch.Tensor = output.logits[0].float().cpu()
    return logits
