"""Merges an adapter into its base model: the student, an ordinary Hugging Face directory."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import nf4
from export.adapter import Adapter, is_adapter, mean_of, read_adapter
from export.checkpoint import Change, Rows, mean_of_models, write_nf4, write_plain
from export.config import MergeConfig
from export.scoring import SelectSet, open_select_sets
from halve import artefact, environment
from halve.arithmetic import roomy_dtype
from halve.artefact import Artefact, Draft, languages_of
from halve.card import write_card
from halve.errors import ArtefactError, InputError
from halve.families import Family, family_for
from halve.json_files import append_jsonl, read_jsonl
from halve.lineage import TUNED, earlier_training
from halve.metrics import Score
from halve.models import SpeechModel, load_model, pick_device, read_config
from halve.origin import origin
from halve.progress import SILENT, Advance, Progress
from halve.shards import Stored, tensor_shapes
from halve.translate import TorchTranslator

if TYPE_CHECKING:
    import torch

BASES = ("base", "dequantized")


def run_merge(
    config: MergeConfig,
    model: Path,
    adapter: Path,
    corpus: Path | None,
    out: Path,
    progress: Progress = SILENT,
    *,
    others: Sequence[Path] = (),
) -> Artefact:
    """Makes a student of a (pruned) model and the adapter tuned on it.

    The merge goes shard by shard and never holds the model. A fully tuned model in place of an adapter
    is the student already: it is only cast. Of several the mean is taken; the model that they started from may be
    one of them (Wortsman et al. 2022, arXiv 2203.05482 and 2109.01903).

    Args:
        corpus: needed by ``onto="auto"`` alone.
        others: further adapters tuned on the same model, as with other seeds, or further fully tuned models.

    Raises:
        ArtefactError: an adapter was tuned on another model or does not fit this one, or files are damaged.
        InputError: ``auto`` without a corpus, or a fully tuned model among several adapters.
    """
    adapters = [adapter, *others]
    for each in adapters:
        _check_adapter(model, each)
    if len(set(map(is_adapter, adapters))) > 1:
        raise InputError(
            f"Among {len(adapters)} adapters one is a whole model",
            expected="adapters to take the mean of, or whole models",
        )
    names = [f"adapter {place}" for place in range(len(adapters))] if others else ["adapter"]
    parents = {"model": model, **dict(zip(names, adapters, strict=True))}
    if config.onto == "auto" and is_adapter(adapter):
        if corpus is None:
            raise InputError(
                "Choosing a base by score needs a corpus", mend="name --corpus or --onto"
            )
        parents["corpus"] = corpus
    recipe = config.model_dump(mode="json")
    with artefact.writing(out, "student", recipe, 0, parents) as draft:
        if not is_adapter(adapter):
            progress.message(
                f"The mean of {len(adapters)} whole models is the student"
                if others
                else f"{adapter} is a whole model: it is the student as it is"
            )
            mean = mean_of_models(adapters)
            write_plain(adapter, draft.path, config.dtype, config.max_shard_bytes, mean)
            draft.extra["onto"] = "none (fully tuned)"
        elif config.onto == "auto" and corpus is not None:
            _merge_better(config, model, adapters, corpus, draft, progress)
        else:
            _merge(config, model, adapters, config.onto, draft.path)
            draft.extra["onto"] = config.onto
        if others:
            draft.extra["mean_of"] = len(adapters)
        draft.extra |= _carried(model)
        _note_tuning(draft.extra, model, adapters)
        _verify(config, model, draft.path)
        langs = config.langs or _languages(adapters) or languages_of(model)
        if langs:
            draft.extra["langs"] = list(langs)
        facts = {**draft.extra, "languages": langs}
        write_card(draft.path, source=model, kind="student", facts=facts)
    return artefact.read(out, "student")


def _check_adapter(model: Path, adapter: Path) -> None:
    """Refuses what is neither an adapter nor a model, or on record as tuned on another model; what was made elsewhere has no record."""
    if not is_adapter(adapter) and not (adapter / "config.json").is_file():
        raise ArtefactError(
            f"{adapter} holds neither an adapter nor a model"
            if adapter.is_dir()
            else f"{adapter} is no directory",
            expected="what `halve tune` wrote",
        )
    if not (adapter / artefact.RECORD).is_file():
        return
    base = artefact.read(adapter).parents.get("model")
    started_from = artefact.identity(model)
    if base not in (None, started_from) and artefact.identity(adapter) != started_from:
        raise ArtefactError(
            f"{adapter} was tuned on another model than {model}, or on another version of it",
            expected="the model that `halve tune` started from",
            mend="name that model, or tune this one; if you mean it, merge a copy of the adapter without "
            f"its {artefact.RECORD}",
        )


def _note_tuning(extra: dict[str, Any], model: Path, adapters: Sequence[Path]) -> None:
    """Notes how the adapter was trained, for those who must state it; of several, what any of them learnt, and no scores: they
    are not the mean's. Those trained in another way than the first stand among the earlier stages."""
    stages, started_from = [], artefact.identity(model)
    for adapter in adapters:
        if not (adapter / artefact.RECORD).is_file() or artefact.identity(adapter) == started_from:
            continue
        of_it = artefact.read(adapter).extra
        distilled = bool(of_it.get("rows", {}).get("teacher"))
        earlier = {"method": of_it.get("method", "an adapter"), "distilled": distilled}
        stages.append(dict(of_it.get("tuned", earlier)))
    if not stages:
        return
    found = stages[0]
    others = {stage["method"]: stage for stage in stages if stage["method"] != found["method"]}
    if len(adapters) > 1:
        for stage in stages:
            stage.pop("scores", None)
        found |= {key: any(stage.get(key) for stage in stages) for key in ("distilled", "logits")}
    extra["tuned"] = found
    if others:
        extra[TUNED] = [*extra.get(TUNED, ()), *others.values()]


def _languages(adapters: Sequence[Path]) -> tuple[str, ...]:
    """All that the adapters were tuned for, the first one's first."""
    return tuple(dict.fromkeys(lang for each in adapters for lang in languages_of(each)))


def _merge(
    config: MergeConfig, model: Path, adapters: Sequence[Path], onto: str, folder: Path
) -> None:
    base = read_config(model)
    family = family_for(base)
    stored = tensor_shapes(model)
    family.check_stored(model, stored)
    # An adapter of what stock code ignores (a second copy of a tied head) would be lost without a word.
    shapes = {key: found for key, found in stored.items() if not family.is_surplus(base, key)}
    read = mean_of([read_adapter(each, family, shapes) for each in adapters])
    change = _change(family, read, _arithmetic(adapters) if onto == "dequantized" else None)
    write_plain(model, folder, config.dtype, config.max_shard_bytes, change)


def _arithmetic(adapters: Sequence[Path]) -> str:
    """What the adapters' base computed in while they were trained; QLoRA's bfloat16 where no record says.

    Raises:
        InputError: not the same for all: their bases were rounded to different numbers.
    """
    found = {}
    for each in adapters:
        is_known = (each / artefact.RECORD).is_file()
        extra = artefact.read(each).extra if is_known else {}
        found[str(extra.get("arithmetic", "bfloat16"))] = each
    if len(found) > 1:
        said = " and ".join(f"{each} in {kind}" for kind, each in found.items())
        raise InputError(
            f"{said}: their 4-bit bases are not the same",
            expected="adapters tuned in one arithmetic",
            mend="merge them --onto base, or tune all with the same --precision",
        )
    return next(iter(found))


def _change(family: Family, adapter: Adapter, arithmetic: str | None) -> Change:
    """What merging does to a tensor; nothing where neither the adapter nor 4-bit rounding changes it.

    Args:
        arithmetic: what weights were rounded to 4 bits in; None leaves them as they are stored.
    """

    def change(stored: Stored) -> Rows | None:
        if arithmetic is not None and nf4.is_quantised(family, stored):
            return lambda: adapter.added(stored.key, _rounded(stored, arithmetic))
        if stored.key in adapter.factors:
            return lambda: adapter.added(stored.key, stored.rows())
        return None

    return change


def _rounded(stored: Stored, arithmetic: str) -> "Iterator[tuple[int, torch.Tensor]]":
    """A weight as NF4 rounds it, a thousand rows at a time. Its scales' mean needs the whole weight."""
    whole = nf4.rounded(stored, arithmetic)
    for first in range(0, len(whole), 1024):
        yield first, whole[first : first + 1024]


def _merge_better(
    config: MergeConfig,
    model: Path,
    adapters: Sequence[Path],
    corpus: Path,
    draft: Draft,
    progress: Progress,
) -> None:
    """Makes both students, scores both on `select`, keeps the better (the unquantised base on a tie).

    Each score is on disk once it is made: a killed run goes on with the next.
    """
    langs = config.langs or _languages(adapters)
    reads = family_for(read_config(model)).reads
    scoring = _Scoring(config, open_select_sets(corpus, langs, config.select_segments, reads))
    folders = {onto: draft.work / onto for onto in BASES}
    dtype = roomy_dtype(model, progress=progress)
    # Of several adapters no one is on.
    alone = config.requantized and len(adapters) == 1
    forms = (1 + config.requantized) * len(BASES) + alone
    with progress.task("merge: score both bases", total=forms * scoring.segments) as advance:
        scoring.open(draft.work / "rows.jsonl", advance)
        if alone:
            scoring.add("adapter on", "dequantized", "nf4", lambda: _on(model, adapters[0]))
        for onto, folder in folders.items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _merge(config, model, adapters, onto, folder)
            merged = partial(load_model, folder, dtype=dtype)
            scoring.add("merged", onto, config.dtype, merged)
            if config.requantized:
                scoring.add("merged, quantised", onto, "nf4", partial(_quantised, config, folder))
                shutil.rmtree(_nf4_folder(folder), ignore_errors=True)
    # A student that will be stored in 4 bits is judged by what it then says.
    judged = "merged, quantised" if config.requantized else "merged"
    means = {row["onto"]: _mean(row) for row in scoring.rows if row["form"] == judged}
    better = "dequantized" if means["dequantized"] > means["base"] else "base"
    for entry in folders[better].iterdir():
        entry.rename(draft.path / entry.name)
    draft.extra |= {
        "onto": better,
        "merge": {
            "judged": judged,
            "split": "select",
            "segments": len(scoring.sets[0].segments),
            "rows": scoring.rows,
        },
    }


class _Scoring:
    """Scores of the forms of a student, each noted in a file at once."""

    def __init__(self, config: MergeConfig, sets: list[SelectSet]) -> None:
        self.sets = sets
        self.rows: list[dict[str, Any]] = []
        self._config = config

    @property
    def segments(self) -> int:
        """How many each form translates."""
        return sum(len(each.segments) for each in self.sets)

    def open(self, log: Path, advance: Advance) -> None:
        """Takes over what an earlier run has scored."""
        self._log, self._advance = log, advance
        self._known = {(row["form"], row["onto"]): row for row in read_jsonl(log)}

    def add(self, form: str, onto: str, precision: str, load: Callable[[], SpeechModel]) -> None:
        """Scores what `load` loads, if that is not known."""
        row = self._known.get((form, onto))
        if row is None:
            row = _row(form, onto, precision, self._scores(load()))
            append_jsonl(self._log, row)
        else:
            self._advance(self.segments)
        self.rows.append(row)
        self._advance(0, note=f"{form} ({onto}): {_shown(row)}")

    def _scores(self, speech: SpeechModel) -> dict[str, Score]:
        translator = TorchTranslator(speech)
        size = self._config.batch_size
        found = {
            each.lang: each.scored(each.translate(translator, size, self._advance))
            for each in self.sets
        }
        translator.close()
        return found


def _on(model: Path, adapter: Path) -> SpeechModel:
    """What QLoRA trained: the adapter on the base in NF4."""
    return load_model(model, dtype=_dtype(), quantization="nf4", adapter=adapter)


def _row(form: str, onto: str, precision: str, scores: Mapping[str, Score]) -> dict[str, Any]:
    return {
        "form": form,
        "onto": onto,
        "precision": precision,
        "scores": {lang: asdict(found) for lang, found in scores.items()},
    }


def _mean(row: Mapping[str, Any]) -> float:
    return sum(found["score"] for found in row["scores"].values()) / len(row["scores"])


def _quantised(config: MergeConfig, student: Path) -> SpeechModel:
    """A student in the files of an NF4 package; other 4-bit packages round a little differently."""
    folder = _nf4_folder(student)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_nf4(student, folder, config.max_shard_bytes)
    return load_model(folder, dtype=_dtype())


def _nf4_folder(student: Path) -> Path:
    return student.with_name(f"{student.name}-nf4")


def _dtype() -> str:
    """What weights in 4 bits are computed with here."""
    return environment.quick_dtype(pick_device("auto"))


def _shown(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{lang} {found['score']:.2f}" for lang, found in row["scores"].items())


def _carried(model: Path) -> dict[str, Any]:
    """What the base model's record says of its making, for the student's own."""
    carried = {"origin": origin(model)}
    if (model / artefact.RECORD).is_file():
        extra = artefact.read(model).extra
        keys = ("removed", "kept", "ranked_by", "ranked_before")
        carried |= {key: extra[key] for key in keys if key in extra} | earlier_training(model)
    return carried


def _verify(config: MergeConfig, model: Path, student: Path) -> None:
    """Raises ArtefactError where the student does not hold what its config asks for."""
    if config.verify == "full":
        speech = load_model(student, dtype=config.dtype, device="cpu")
        del speech
        return
    config_of = read_config(model)
    family = family_for(config_of)
    shapes = [
        {
            key: shape
            for key, (shape, _) in tensor_shapes(path).items()
            if not family.is_surplus(config_of, key)
        }
        for path in (model, student)
    ]
    if shapes[0] != shapes[1]:
        raise ArtefactError(f"{student}: the merged tensors are not those of {model}")
