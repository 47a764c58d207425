"""Recipes: one YAML file that says a whole run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import Field

from benchmarks.config import LatencyConfig, QualityConfig
from compress.config import (
    DistillConfig,
    ImportanceConfig,
    PruneConfig,
    TeachConfig,
    TuneConfig,
)
from export.config import MergeConfig, PackageConfig, check_possible
from halve.config import Config
from halve.errors import InputError, RecipeError
from halve.importers.base import CorpusConfig
from halve.languages import language
from pipeline.failures import fault_text


class CorpusSection(CorpusConfig):
    """Where the corpus comes from."""

    source: str
    """A directory or table, relative to the recipe, or (hf) the id of a data set on the hub."""


class PackageSection(PackageConfig):
    """One package of the student."""

    vocab_texts: tuple[str, ...] = ()
    """With trim_vocab: files of more text in the target languages, a sentence a line, relative to the recipe."""


class BenchSection(Config):
    """What is measured."""

    quality: QualityConfig | None = None
    """Scores on a split that nothing was chosen on."""
    latency: LatencyConfig | None = None
    """Time and memory."""


class Recipe(Config):
    """One run. A stage whose section is left out does not take place."""

    lang: tuple[str, ...] = Field(min_length=1)
    """Target languages; the first one is what layers are ranked by. Sections take it where they name none."""
    seed: int = 0
    """Sections take it where they name none."""
    teacher: str | None = None
    """The in-domain model: a directory relative to the recipe, or a hub id."""
    base: str | None = None
    """In place of a teacher: the model that the teach section makes one of."""
    corpus: CorpusSection
    """Speech and translations."""
    teach: TeachConfig | None = None
    """Fine-tuning the base model."""
    importance: ImportanceConfig | None = None
    """Ranking the decoder layers."""
    prune: PruneConfig | None = None
    """Cutting layers out."""
    distill: DistillConfig | None = None
    """The teacher's own translations."""
    tune: TuneConfig | None = None
    """Tuning what is left."""
    merge: MergeConfig | None = None
    """Merging the adapter; taken with its defaults after tuning."""
    packages: tuple[PackageSection, ...] = ()
    """What the student is packaged as."""
    bench: BenchSection = BenchSection()
    """What is measured."""

    @pydantic.field_validator("lang", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        faults = [fault for _, fault in misfits(self.model_dump(exclude_none=True))]
        if faults:
            raise ValueError("; ".join(faults))
        return self


Place = tuple[str | int, ...]


def misfits(values: Mapping[str, Any]) -> list[tuple[Place, str]]:
    """What does not fit together in a recipe's sections, which may be faulty themselves, each with its place."""
    # An empty section is a fault of its own; here it counts as there.
    has = {name for name, value in values.items() if value is not None or name in _SECTIONS}
    rules: list[tuple[bool, Place, str]] = [
        (
            ("teacher" in has) == ("base" in has),
            ("teacher",),
            "name either a teacher, or a base with a teach section",
        ),
        (
            "teach" in has and "base" not in has,
            ("teach",),
            "the teach section needs a base to start from",
        ),
        ("base" in has and "teach" not in has, ("base",), "a base needs a teach section"),
        (
            "importance" in has and "prune" not in has,
            ("importance",),
            "importance ranks layers that no prune section removes (prune: {} does)",
        ),
        (
            "prune" in has and "importance" not in has and not _of(values, "prune", "layers"),
            ("prune",),
            "prune needs layers, or an importance section that finds them",
        ),
        (
            {"importance", "prune"} <= has and bool(_of(values, "prune", "layers")),
            ("prune", "layers"),
            "prune.layers settles what goes: leave it, or the importance section, out",
        ),
        ("merge" in has and "tune" not in has, ("merge",), "merge needs a tune section"),
        (
            bool(_of(values, "tune", "logit_weight")) and not _of(values, "distill", "logits"),
            ("tune", "logit_weight"),
            "tune.logit_weight needs the teacher's distributions: distill: {logits: 8}",
        ),
    ]
    return [(place, fault) for broken, place, fault in rules if broken] + _packages_misfit(values)


def _of(values: Mapping[str, Any], section: str, name: str) -> Any:
    found = values.get(section)
    return found.get(name) if isinstance(found, Mapping) else None


def _packages_misfit(values: Mapping[str, Any]) -> list[tuple[Place, str]]:
    found: list[tuple[Place, str]] = []
    names: set[str] = set()
    sections = values.get("packages")
    for index, section in enumerate(sections if isinstance(sections, list | tuple) else ()):
        try:
            package = PackageSection.model_validate(section)
        except pydantic.ValidationError:  # told as a fault of its own
            continue
        if fault := _impossible(package):
            found.append((("packages", index), f"packages: {fault}"))
        if package_name(package) in names:
            found.append((("packages", index), "packages: the same target and precision twice"))
        names.add(package_name(package))
    return found


def _impossible(config: PackageSection) -> str:
    """Why no student can be packaged so; nothing where it can."""
    if config.vocab_texts and not config.trim_vocab:
        return "vocab_texts without trim_vocab: true"
    try:
        check_possible(config)
    except InputError as error:
        return error.found
    return ""


def package_name(config: PackageConfig) -> str:
    """A package's folder: target-precision."""
    return f"{config.target}-{config.precision}"


LANGUAGE_SETTINGS = ("lang", "langs", "source_lang")
"""Settings of all sections that name languages."""
_PATHS = (
    ("teacher",),
    ("base",),
    ("corpus", "source"),
    ("bench", "quality", "comet_checkpoint"),
    ("bench", "quality", "comet_python"),
    ("bench", "quality", "embedding_model"),
    ("bench", "latency", "peer_folder"),
)


_SECTIONS: dict[str, type[Config]] = {
    "teach": TeachConfig,
    "importance": ImportanceConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "tune": TuneConfig,
    "merge": MergeConfig,
    "corpus": CorpusSection,
}


def read_recipe(path: str | Path) -> Recipe:
    """Reads a recipe; its paths become relative to where it lies.

    Raises:
        RecipeError: not there, not YAML, or faulty; every fault is named with its place.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path} is no recipe file", mend="name a YAML file, see recipes/")
    try:
        text = path.read_text(encoding="utf8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_loops(path, node)
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise RecipeError(f"{path} is not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise RecipeError(
            f"{path} is nested too deeply", expected="a recipe, see recipes/"
        ) from None
    if not isinstance(raw, dict) or node is None:
        raise RecipeError(f"{path} holds no settings", expected="a mapping, see recipes/")
    lines, faults = _lines(node)
    raw, unknown = _with_codes(raw, lines)
    faults += [*unknown, *_empty(raw, lines)]
    values = _with_defaults(raw)
    faults += [f"line {_line(place, lines)}, {fault}" for place, fault in misfits(values)]
    try:
        recipe = Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        # What does not fit together has no place in pydantic's list, and stands in it only where all else is well.
        told = error.errors(include_url=False)
        faults += [_fault(each, lines) for each in told if each["loc"]]
        faults = faults or [fault_text(each) for each in told]
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise RecipeError(f"{path}: {count}:\n{listed}")
    return _with_paths(recipe, path.parent)


def _refuse_loops(path: Path, root: yaml.Node | None) -> None:
    """Refuses a document in which an alias stands inside what it means."""

    def walk(node: Any, above: frozenset[int]) -> None:
        if id(node) in above:
            raise RecipeError(
                f"{path}, line {node.start_mark.line + 1}: contains itself by an alias"
            )
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        else:
            parts = node.value if isinstance(node, yaml.SequenceNode) else []
        for part in parts:
            walk(part, above | {id(node)})

    walk(root, frozenset())


def _lines(root: yaml.Node) -> tuple[dict[Place, int], list[str]]:
    """The line of every key in a YAML document, and keys given twice."""
    lines: dict[Place, int] = {}
    faults: list[str] = []

    def walk(node: yaml.Node, place: Place) -> None:
        lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*place, str(key.value))
                if inner in lines:
                    faults.append(f"line {key.start_mark.line + 1}, {_dotted(inner)}: given twice")
                lines[inner] = key.start_mark.line + 1
                walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*place, index))

    walk(root, ())
    return lines, faults


def _empty(raw: dict[str, Any], lines: dict[Place, int]) -> list[str]:
    """Sections that are named and hold nothing: left out or with their defaults, both could be meant."""
    bench = raw.get("bench")
    inside = (
        {("bench", name): value for name, value in bench.items()} if isinstance(bench, dict) else {}
    )
    sections = {(name,): value for name, value in raw.items() if name in _SECTIONS} | inside
    return [
        f"line {lines.get(place) or lines[place[:1]]}, {_dotted(place)}: is empty; write {{}} for its defaults, or leave it out"
        for place, value in sections.items()
        if value is None
    ]


def _dotted(place: Place) -> str:
    return ".".join(str(part) for part in place)


def _fault(fault: Any, lines: dict[Place, int]) -> str:
    place: Place = tuple(fault["loc"])
    return f"line {_line(place, lines)}, {_dotted(place)}: {fault_text(fault)}"


def _line(place: Place, lines: dict[Place, int]) -> int:
    """The line of a place, or of what it is inside of."""
    while place not in lines:
        place = place[:-1]
    return lines[place]


def _with_codes(raw: dict[str, Any], lines: dict[Place, int]) -> tuple[dict[str, Any], list[str]]:
    """The recipe with every language by its code, as the command line takes it, and the faults in them.

    DE and de-AT become de; a language named twice is meant once.
    """
    faults: list[str] = []

    def codes(value: Any, place: Place) -> Any:
        found = []
        for one in value if isinstance(value, list) else [value]:
            try:
                if not isinstance(one, str):
                    raise InputError(f"{str(one)!r} is no language code")
                found.append(language(one).code)
            except InputError as error:
                faults.append(f"line {_line(place, lines)}, {_dotted(place)}: {error.found}")
                found.append("en")  # so that the other faults are found too
        return list(dict.fromkeys(found)) if isinstance(value, list) else found[0]

    def walk(value: Any, place: Place) -> Any:
        if isinstance(value, list):
            return [walk(each, (*place, index)) for index, each in enumerate(value)]
        if not isinstance(value, dict):
            return value
        return {
            key: codes(each, (*place, key))
            if key in LANGUAGE_SETTINGS and each is not None
            else walk(each, (*place, str(key)))
            for key, each in value.items()
        }

    return walk(raw, ()), faults


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Gives each section the recipe's languages and seed where it has none of its own."""
    langs = raw.get("lang")
    langs = [langs] if isinstance(langs, str) else langs
    filled = dict(raw)
    for name, kind in _SECTIONS.items():
        filled[name] = _section(raw.get(name), kind, langs, raw.get("seed"))
    if isinstance(raw.get("packages"), list):
        filled["packages"] = [
            _section(one, PackageSection, langs, raw.get("seed")) for one in raw["packages"]
        ]
    if isinstance(raw.get("bench"), dict):
        benches: dict[str, type[Config]] = {"quality": QualityConfig, "latency": LatencyConfig}
        filled["bench"] = dict(raw["bench"]) | {
            name: _section(raw["bench"][name], kind, langs, raw.get("seed"))
            for name, kind in benches.items()
            if name in raw["bench"]
        }
    return {key: value for key, value in filled.items() if value is not None or key in raw}


def _section(values: Any, kind: type[Config], langs: Any, seed: Any) -> Any:
    if not isinstance(values, dict):
        return values
    filled = dict(values)
    # The corpus keeps every language it has: a later run may want another.
    if langs and not issubclass(kind, CorpusConfig):
        for key, value in (("langs", langs), ("lang", langs[0])):
            if key in kind.model_fields:
                filled.setdefault(key, value)
    if seed is not None and "seed" in kind.model_fields:
        filled.setdefault("seed", seed)
    return filled


def _with_paths(recipe: Recipe, root: Path) -> Recipe:
    values = recipe.model_dump(exclude_unset=True)  # what was not said stays unsaid
    for place in _PATHS:
        holder: Any = values
        for part in place[:-1]:
            holder = (holder or {}).get(part)
        if holder and isinstance(holder.get(place[-1]), str):
            is_named = place in (("teacher",), ("base",)) or (
                place == ("corpus", "source") and holder.get("format") == "hf"
            )
            holder[place[-1]] = _placed(holder[place[-1]], root, is_named)
    for package in values.get("packages", ()):
        texts = package.get("vocab_texts", ())
        package["vocab_texts"] = tuple(_placed(text, root, False) for text in texts)
    return Recipe.model_validate(values)


def _placed(text: str, root: Path, may_be_id: bool) -> str:
    """A path from the recipe's folder, written so that it is taken for nothing else; the id of something on the hub stays."""
    try:
        path = root / Path(text).expanduser()
    except RuntimeError:
        raise RecipeError(f"{text}: there is no such user") from None
    looks_like_id = may_be_id and text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if looks_like_id and not path.exists():
        return text
    return str(path) if path.is_absolute() or str(path).startswith(".") else f"./{path}"
