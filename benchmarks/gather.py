"""Reads the artefacts that a report is made of."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import scoring
from halve.artefact import RECORD, Artefact, read
from halve.errors import ArtefactError
from halve.json_files import read_json, read_jsonl

DATA = "data"
"""Folder of a report with copies of the small artefacts it was made of."""
HISTORY = "history.jsonl"
"""Scores while tuning: beside an adapter, or a student that was tuned in full."""
_BENCHES = ("quality", "latency", "serve", "importance", "longform")
_SHOWN = ("results", "importance", "pruned", "adapter", "package", "report")


@dataclass(frozen=True)
class Source:
    """One artefact under the name that the report calls it by."""

    label: str
    run: str
    """The run or report that it belongs to, empty if it was named alone."""
    artefact: Artefact
    home: Path | None = None
    """The directory of that run or report."""

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.artefact.path


@dataclass
class Gathered:
    """Everything a report shows, by kind."""

    quality: list[tuple[Source, scoring.ResultFiles]] = field(default_factory=list)
    benches: list[tuple[Source, dict[str, Any]]] = field(default_factory=list)
    """Other benches' results: latency, serve, importance."""
    searches: list[tuple[Source, list[dict[str, Any]], dict[str, Any]]] = field(
        default_factory=list
    )
    """Importance searches: candidates' scores and plan."""
    adapters: list[tuple[Source, list[dict[str, Any]]]] = field(default_factory=list)
    """What was tuned, adapters and whole students, with the scores on the way."""
    packages: list[tuple[Source, dict[str, Any]]] = field(default_factory=list)
    pruned: list[Source] = field(default_factory=list)
    merged: list[Source] = field(default_factory=list)
    """Students whose merge was chosen by scores."""

    def of_bench(self, name: str) -> list[tuple[Source, dict[str, Any]]]:
        """The results of one bench."""
        return [(source, result) for source, result in self.benches if result["bench"] == name]


def gather(paths: Sequence[str | Path]) -> tuple[list[Source], Gathered]:
    """Reads artefacts, directories of artefacts (a run), and earlier reports.

    Raises:
        ArtefactError: a path holds nothing that a report can show.
    """
    sources = _labelled([found for path in paths for found in _expand(Path(path))])
    gathered = Gathered()
    for source in sources:
        _sort(source, gathered)
    return sources, gathered


def _expand(path: Path) -> Iterator[tuple[Path | None, Artefact]]:
    if not (path / RECORD).is_file():
        yield from _children(path, path.resolve())
        return
    artefact = read(path)
    if artefact.kind == "report":
        yield from _children(path / DATA, path.resolve())
    elif _is_shown(artefact):
        yield None, artefact
    else:
        raise ArtefactError(
            f"{path} is of kind {artefact.kind}", expected=f"one of {', '.join(_SHOWN)}"
        )


def artefacts_in(run: Path) -> list[Artefact]:
    """All artefacts directly inside a run's directory, or inside a report's data."""
    path = run / DATA if (run / RECORD).is_file() else run
    records = sorted(path.glob(f"*/{RECORD}")) + sorted(path.glob(f"*/*/{RECORD}"))
    return [read(record.parent) for record in records]


def _children(path: Path, home: Path) -> Iterator[tuple[Path, Artefact]]:
    """Those of a run's artefacts that a report shows."""
    shown = [each for each in artefacts_in(home) if _is_shown(each) and each.kind != "report"]
    if not shown:
        raise ArtefactError(
            f"{path} holds no results" if path.exists() else f"{path} does not exist",
            expected="results of `halve bench`, an artefact of a stage, a run's directory or a report",
        )
    for artefact in shown:
        yield home, artefact


def _is_shown(artefact: Artefact) -> bool:
    """Of students, those alone that were tuned in full, or whose merge was chosen by scores."""
    return artefact.kind in _SHOWN or (
        artefact.kind == "student" and ("merge" in artefact.extra or _is_tuned_in_full(artefact))
    )


def _is_tuned_in_full(artefact: Artefact) -> bool:
    return (artefact.path / HISTORY).is_file()


def _run_names(homes: Iterable[Path]) -> dict[Path, str]:
    """A name for each run: its directory's, with the parent's where two would be called the same."""
    names: dict[Path, str] = {}
    for home in dict.fromkeys(homes):
        parts = home.parts
        names[home] = next(
            name
            for name in ("/".join(parts[-count:]) for count in range(1, len(parts) + 1))
            if name not in names.values()
        )
    return names


def _labelled(found: Sequence[tuple[Path | None, Artefact]]) -> list[Source]:
    """Labels by directory name, with the run's or the parent's name where that is not enough."""
    sources: list[Source] = []
    taken: set[str] = set()
    names = _run_names(home for home, _ in found if home)
    for home, artefact in found:
        run = names[home] if home else ""
        path = artefact.path.resolve()
        if any(source.path.resolve() == path for source in sources):
            continue
        candidates = [path.name, f"{run or path.parent.name}/{path.name}"]
        candidates += ["/".join(path.parts[-count:]) for count in range(3, len(path.parts))]
        candidates += [f"{candidates[1]} ({number})" for number in range(2, len(found) + 2)]
        label = next(name for name in candidates if name not in taken)
        taken.add(label)
        sources.append(Source(label, run, artefact, home))
    return sources


def _sort(source: Source, gathered: Gathered) -> None:
    path, kind = source.path, source.artefact.kind
    if kind == "importance":
        gathered.searches.append(
            (source, read_jsonl(path / "importance.jsonl"), read_json(path / "plan.json"))
        )
    elif kind == "adapter" or (kind == "student" and _is_tuned_in_full(source.artefact)):
        gathered.adapters.append((source, read_jsonl(path / HISTORY)))
    elif kind == "package":
        gathered.packages.append((source, read_json(path / "package.json")))
    elif kind == "pruned":
        gathered.pruned.append(source)
    elif kind == "student":
        gathered.merged.append(source)
    elif (path / scoring.RESULT).is_file():
        gathered.quality.append((source, scoring.read_result(path)))
    else:
        gathered.benches.append((source, _bench(path)))


def _bench(path: Path) -> dict[str, Any]:
    for name in _BENCHES:
        if (path / f"{name}.json").is_file():
            return {"bench": name, **read_json(path / f"{name}.json")}
    raise ArtefactError(
        f"{path} holds no result that a report can show",
        expected=" or ".join(f"{name}.json" for name in _BENCHES),
    )
