"""`halve plan`: which students fit into a number of bytes, and which of them should translate best.

Layers kept, precision of each part and, with a corpus, a trimmed vocabulary are combined; sizes are computed
from exact parameter counts. With the table of an importance search the choices are ranked by the score that
the search measured with so many layers gone; without one, by layers kept. Either says what to try first:
tuning and `halve bench quality` say how good a student is.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from halve.artefact import read
from halve.corpus import read_corpus
from halve.errors import CorpusError, InputError
from halve.families import Family, family_for
from halve.families.base import Counts
from halve.json_files import read_json, read_jsonl
from halve.languages import language
from halve.models import find_config, load_processor, local_model, read_config, resolve_model
from halve.shards import WEIGHTS
from pipeline.console import Result, size, table
from pipeline.forms import Form, forms, stored_bytes, trimmed

_UNITS = {
    "": 1.0,
    "b": 1.0,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


MUCH_UNSEEN = 0.01
"""Share of new translations' tokens that a trimmed vocabulary is expected to lack from which it is ranked last."""

LARGE_BYTES = 8e9
"""Weights in float32 from which a recipe asks for 16 bits, and for what spares memory."""


@dataclass(frozen=True)
class Choice:
    """One student that fits."""

    layers: int
    package: str
    parameters: int
    stored_bytes: float
    note: str
    score: float | None = None
    """Of the pruned model before tuning, from the importance table; None beyond it or without one."""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """What an importance search measured: the score with 0, 1, 2, … layers gone."""

    metric: str
    scores: tuple[float, ...]


def parse_bytes(text: str) -> float:
    """4GB, 500 MB, 3.5GiB.

    Raises:
        InputError: no size.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-z]*)\s*", text.lower())
    try:
        return float(match[1]) * _UNITS[match[2]]  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{text!r} is no size", expected="for example 4GB or 500MB") from None


def choices(
    config: dict[str, Any],
    budget_bytes: float,
    side_bytes: float = 0.0,
    kept_tokens: int | None = None,
    measured: Table | None = None,
    unseen_share: float = 0.0,
) -> list[Choice]:
    """For each way to store a student, the most layers that fit; the most promising first.

    Args:
        side_bytes: of the tokenizer and other files that every package carries.
        kept_tokens: vocabulary after trimming; None where that is not known.
        measured: ranks by the score that is left; without it, more layers come first.
        unseen_share: see `forms`.
    """
    family = family_for(config)
    found = []
    # A model that reads needs the tokens of whatever it will be given.
    trims = kept_tokens is not None and family.reads == "audio"
    for form in forms(trims, unseen_share):
        if form.package.startswith("onnx") and not family.has_onnx(config):
            continue
        for layers in range(family.num_layers(config), 1, -1):
            kept = _some(family, config, layers)
            if kept is None:
                continue
            counts = family.count_parameters(family.kept_config(config, kept))
            if form.trims and kept_tokens is not None:
                counts = trimmed(counts, family, config, kept_tokens)
            stored = stored_bytes(counts, form) + side_bytes
            if stored <= budget_bytes:
                score = _left(measured, family.num_layers(config) - layers, form)
                section = {"target": form.package.split()[0], **form.settings}
                found.append(
                    Choice(layers, form.package, counts.total, stored, form.note, score, section)
                )
                break
    lost = {form.package: form.points_lost for form in forms(True, unseen_share)}

    def rank(choice: Choice) -> tuple[Any, ...]:
        # A vocabulary that lacks one token in a hundred spoils more translations than a few layers.
        lacks = bool(choice.settings.get("trim_vocab")) and unseen_share > MUCH_UNSEEN
        score = choice.score
        return score is None, -(score or 0.0), lacks, -choice.layers, lost[choice.package]

    return sorted(found, key=rank)


def _some(family: Family, config: dict[str, Any], layers: int) -> list[int] | None:
    """So many layers that the family lets stay; None where it cannot be so many."""
    stay = {0, family.num_layers(config) - 1, *family.must_stay(config)}
    if layers < len(stay):
        return None
    others = [layer for layer in range(family.num_layers(config)) if layer not in stay]
    return sorted([*stay, *others[: layers - len(stay)]])


def _left(measured: Table | None, removed: int, form: Form) -> float | None:
    if measured is None or removed >= len(measured.scores):
        return None
    return measured.scores[removed] - form.points_lost


def read_table(importance: Path, model: str, config: dict[str, Any]) -> Table:
    """The scores along the path that a search took.

    Raises:
        ArtefactError: no importance artefact, or one of another model.
        InputError: its method measured no scores.
    """
    from compress.prune import read_plan

    read(importance, "importance")
    local = Path(model) if Path(model).is_dir() else None
    read_plan(importance, family_for(config), config, local)
    plan = read_json(importance / "plan.json")
    rows = {
        (int(row["round"]), int(row["layer"])): row
        for row in read_jsonl(importance / "importance.jsonl")
    }
    steps = [rows.get((number, layer)) for number, layer in enumerate(plan["removed"], start=1)]
    scores = [row["score"] for row in steps if row and row.get("score") is not None]
    if plan.get("baseline") is None or len(scores) != len(steps):
        raise InputError(
            f"{importance} was ranked by {plan.get('method')}, which measures no translations",
            expected="an importance table of method exact, reference, bounded or racing",
        )
    return Table(str(plan["metric"]), (float(plan["baseline"]), *map(float, scores)))


def plan(
    model: str,
    budget: str,
    lang: str | None,
    importance: Path | None = None,
    corpus: Path | None = None,
    choice: int | None = None,
    write: Path | None = None,
) -> Result:
    """The choices as a table; writes one of them as a recipe where asked.

    Args:
        importance: an importance artefact of this model, to rank by.
        corpus: what a trimmed vocabulary must be able to say, and the recipe's corpus.
        choice: which one to write, from 1 as listed.
        write: the recipe's path.

    Raises:
        InputError: no size, an unknown language, nothing fits, or no such choice.
    """
    if choice is not None and write is None:
        raise InputError("--choice says which one to write, and --write is not there")
    budget_bytes = parse_bytes(budget)
    code = language(lang).code if lang is not None else None
    # Of a model on the hub the config tells the sizes, and the tokenizer what its vocabulary can lose.
    place = resolve_model(model, weights=False) if corpus else local_model(model)
    config = find_config(model)
    side_bytes = _side_bytes(place) if place else 0.0
    kept, unseen = _kept_tokens(place, corpus, code) if place and corpus else (None, 0.0)
    measured = read_table(importance, model, config) if importance else None
    found = choices(config, budget_bytes, side_bytes, kept, measured, unseen)
    if not found:
        smallest = choices(config, float("inf"), side_bytes, kept)
        raise InputError(
            f"Nothing of {model} fits into {size(budget_bytes)}",
            expected=f"more: two layers in the smallest form take {size(_least(config, side_bytes, kept))}"
            if smallest
            else "",
        )
    whole = family_for(config).count_parameters(config)
    title = f"{model}: {whole.total:,} parameters in {whole.decoder_layers} layers; what fits into {size(budget_bytes)} (computed, not measured):"
    data: dict[str, Any] = {
        "model": model,
        "logical_parameters": whole.total,
        "budget_bytes": budget_bytes,
        "metric": measured.metric if measured else None,
        "unseen_share": unseen if kept is not None else None,
        "choices": [vars(one) for one in found],
    }
    text = f"{title}\n{_listed(found, whole, measured)}"
    if any(one.settings.get("trim_vocab") for one in found):
        text += (
            f"\nTrimmed to {kept} tokens, those of the corpus's translations: about {100 * unseen:.3g} % of the tokens of "
            "new translations are expected not to be among them. More text (vocab_texts in the recipe's package) keeps more."
        )
    if write is not None:
        chosen = _chosen(found, choice)
        listens = family_for(config).reads == "audio"
        order = read_json(importance / "plan.json")["removed"] if importance else []
        _write_recipe(write, model, corpus, code, chosen, whole, listens, order)
        data["recipe"] = str(write)
        text += f"\n{write}: {chosen.layers} layers, {chosen.package}; halve run {write} --dry-run says what it takes"
    return Result(text, data)


def _listed(found: list[Choice], whole: Counts, measured: Table | None) -> str:
    header = ["", "layers", "remove", "package", "parameters", "stored", "what"]
    header += [f"{measured.metric} before tuning"] if measured else []
    rows = []
    for number, one in enumerate(found, start=1):
        row = [str(number), str(one.layers), str(whole.decoder_layers - one.layers), one.package]
        row += [f"{one.parameters:,}", size(one.stored_bytes), one.note]
        row += (
            [("beyond the table" if one.score is None else f"{one.score:.1f}")] if measured else []
        )
        rows.append(row)
    return table(header, rows, right=(0, 1, 2, 4, 5))


def _chosen(found: list[Choice], number: int | None) -> Choice:
    number = 1 if number is None else number
    if not 1 <= number <= len(found):
        raise InputError(f"There is no choice {number}", expected=f"1 to {len(found)}")
    return found[number - 1]


def _kept_tokens(model: Path, corpus: Path, code: str | None) -> tuple[int, float]:
    """How many tokens a trimmed vocabulary keeps, and the share of new translations' tokens that it is expected to lack."""
    from export.vocabulary import encoded, kept_tokens, unseen_share

    family = family_for(read_config(model))
    processor = load_processor(model)
    segments = [segment for segment in read_corpus(corpus).segments if segment.split != "test"]
    texts = [
        text
        for segment in segments
        for lang, text in segment.references.items()
        if code in (None, lang)
    ]
    if not texts:
        raise CorpusError(
            f"{corpus} has no translations" + (f" into {code}" if code else ""),
            expected="texts that a trimmed vocabulary must be able to say, in train or select",
            mend="name another corpus or --lang, or leave --corpus out",
        )
    vocabulary = int(family.text_config(read_config(model))["vocab_size"])
    tokenizer = getattr(processor, "tokenizer", processor).backend_tokenizer
    ids = encoded(tokenizer, texts)
    return len(kept_tokens(tokenizer, ids, (), vocabulary)), unseen_share(ids)


def _write_recipe(
    path: Path,
    model: str,
    corpus: Path | None,
    code: str | None,
    chosen: Choice,
    whole: Counts,
    listens: bool,
    order: list[int],
) -> None:
    """Writes a recipe; the layers that a search has found in that `order`, where they are enough, are not searched again."""
    if corpus is None or code is None:
        raise InputError("A recipe needs a corpus and a language", mend="name --corpus and --lang")
    if path.exists():
        raise InputError(f"{path} is there already", mend="name another file")
    layers = whole.decoder_layers
    removed = layers - chosen.layers
    is_large = 4 * whole.total > LARGE_BYTES
    half = {"dtype": "bfloat16"} if is_large else {}
    plain = any(
        each.split == "train" and not each.references for each in read_corpus(corpus).segments
    )
    recipe: dict[str, Any] = {
        "lang": code,
        "teacher": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "corpus": {"source": str(Path(corpus).resolve()), "format": "halve", "duplicates": "keep"}
        | ({"untranslated": "keep"} if plain else {}),
    }
    if 0 < removed <= len(order):
        recipe |= {"prune": {"layers": order[:removed]}}
    elif removed:
        recipe |= {"importance": {"remove": removed} | half, "prune": {}}
    recipe |= {
        "distill": half | ({"untranslated": True} if plain else {}),
        "tune": {"method": "qlora"}
        | (
            {"batch_size": 8, "checkpoint_activations": True, "checkpoint_every": 200}
            if is_large
            else {}
        ),
        "merge": {"onto": "auto"},
        "packages": [chosen.settings],
        "bench": _benches(is_large, listens),
    }
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    title = f"# {chosen.layers} of {layers} layers, {chosen.package}: about {size(chosen.stored_bytes)}."
    _write_whole(path, f"{title}\n{text}")


def _benches(is_large: bool, listens: bool) -> dict[str, Any]:
    """Sections of a recipe's `bench`. Latency is of audio; stock code, its yardstick, computes in float32."""
    quality: dict[str, Any] = {"split": "test"} | ({"batch_size": 8} if is_large else {})
    latency = {"latency": {"baseline": False} if is_large else {}}
    return {"quality": quality} | (latency if listens else {})


def _write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it: a full disk leaves nothing behind."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_text(text, encoding="utf8")
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _side_bytes(model: Path) -> float:
    """Tokenizer, processor and other small files, which every package carries."""
    kept = (path for path in model.iterdir() if path.is_file() and path.suffix not in WEIGHTS)
    return float(sum(path.stat().st_size for path in kept))


def _least(config: dict[str, Any], side_bytes: float, kept: int | None) -> float:
    """Bytes of the smallest student there is."""
    family = family_for(config)
    sizes = []
    for form in forms(kept is not None and family.reads == "audio"):
        if form.package.startswith("onnx") and not family.has_onnx(config):
            continue
        layers = next(
            n for n in range(2, family.num_layers(config) + 1) if _some(family, config, n)
        )
        some = _some(family, config, layers) or []
        counts = family.count_parameters(family.kept_config(config, some))
        if form.trims and kept is not None:
            counts = trimmed(counts, family, config, kept)
        sizes.append(stored_bytes(counts, form) + side_bytes)
    return min(sizes)
