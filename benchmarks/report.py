"""`halve report`: results as one page to read, one for the web, and one for machines."""

import base64
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks import compare, conditions, plots, tables
from benchmarks.clips import Clips
from benchmarks.gather import DATA, Gathered, Source, artefacts_in, gather
from benchmarks.longform import longform_table
from benchmarks.package_tables import merge_table, packages_table
from benchmarks.peer_tables import peers_table, ratios_table
from benchmarks.tables import Section
from halve.artefact import Artefact, read, writing
from halve.errors import InputError, MissingExtraError
from halve.json_files import write_json
from halve.languages import language
from halve.progress import SILENT, Progress

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_WORST_SHOWN = 50
_COPIED_BYTES = 20_000_000
"""An artefact's text files are copied into the report up to so much."""
_COPIED_SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".txt")


def run_report(
    results: Sequence[str | Path],
    out: Path,
    progress: Progress = SILENT,
    *,
    corpus: Path | None = None,
) -> Artefact:
    """Makes report.json, report.md and report.html of results, artefacts, runs or earlier reports.

    Small files of what is reported are copied under `data/`, so that a report can be compared with
    another after its sources are gone. Quality results of one language are compared pair by pair.

    Args:
        corpus: lets the page play the worst segments.

    Raises:
        InputError: nothing was given.
        ArtefactError: a path holds nothing that can be shown.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    if not results:
        raise InputError("No results given", expected="directories written by `halve bench`")
    sources, gathered = gather(results)
    parents = {source.label: source.path for source in sources}
    parents |= {"corpus": corpus} if corpus else {}
    clips = Clips(corpus) if corpus else None
    with writing(out, "report", {"results": [s.label for s in sources]}, 0, parents) as draft:
        comparisons = _compare(gathered, progress)
        worst = _regressions(gathered)
        sections = _sections(gathered, comparisons, worst, clips)
        record = {
            "sources": [_described(source) for source in sources],
            **_data(gathered),
            "comparisons": comparisons,
            "segments": worst,
        }
        write_json(draft.path / "report.json", record)
        _write_pages(draft.path, _title(sources), sections)
        for source in sources:
            _copy(source, draft.path / DATA)
    return read(out)


def _title(sources: Sequence[Source]) -> str:
    """Names the runs, or the results where they belong to none."""
    names = list(dict.fromkeys(source.run or source.label for source in sources))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"halve report: {', '.join(names[:3])}{more}"


def _described(source: Source) -> dict[str, Any]:
    artefact = source.artefact
    return {
        "label": source.label,
        "kind": artefact.kind,
        "recipe": artefact.recipe,
        "seed": artefact.seed,
        "versions": artefact.versions,
        "parents": artefact.parents,
        "fingerprint": artefact.fingerprint,
    }


def _data(gathered: Gathered) -> dict[str, Any]:
    """The raw results, by kind and label."""
    return {
        "quality": {source.label: files.result for source, files in gathered.quality},
        "benches": {source.label: result for source, result in gathered.benches},
        "importance": {
            source.label: {"candidates": rows, "plan": plan}
            for source, rows, plan in gathered.searches
        },
        "adapters": {source.label: rows for source, rows in gathered.adapters},
        "packages": {source.label: package for source, package in gathered.packages},
    }


def _compare(gathered: Gathered, progress: Progress) -> list[dict[str, Any]]:
    found = []
    for (a, first), (b, second) in combinations(gathered.quality, 2):
        if first.result["lang"] == second.result["lang"]:
            progress.message(f"compare: {a.label} with {b.label}")
            one = {"first": a.label, "second": b.label, **compare.compare(first, second)}
            if a.home and b.home and a.home != b.home:
                one["changed"] |= compare.changed_recipes(
                    artefacts_in(a.home), artefacts_in(b.home)
                )
            found.append(one)
    return found


def _regressions(gathered: Gathered) -> dict[str, dict[str, list[dict[str, Any]]]]:
    return {
        source.label: {
            student["name"]: tables.regressions(files, student["name"])
            for student in files.result["students"]
        }
        for source, files in gathered.quality
    }


def _sections(
    gathered: Gathered,
    comparisons: Sequence[Mapping[str, Any]],
    worst: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    clips: Clips | None,
) -> list[Section]:
    sections = [_quality_section(s, f.result, worst[s.label], clips) for s, f in gathered.quality]
    sections += _tradeoffs(gathered)
    if comparisons:
        found = [tables.comparison_table(c["first"], c["second"], c) for c in comparisons]
        sections.append(Section("Comparison", tables=found))
    sections += [_latency_section(s, result) for s, result in gathered.of_bench("latency")]
    for source, result in gathered.of_bench("serve"):
        sections.append(Section(f"Serving: {source.label}", tables=[tables.serve_table(result)]))
    for source, result in gathered.of_bench("longform"):
        table = longform_table(result)
        sections.append(Section(f"Whole recordings: {source.label}", tables=[table]))
    sections += [_search_section(*search) for search in gathered.searches]
    for source, result in gathered.of_bench("importance"):
        table = tables.facts_table("Exact search against the paper's procedure", result)
        sections.append(Section(f"Speed of the search: {source.label}", tables=[table]))
    sections += [_adapter_section(source, rows) for source, rows in gathered.adapters]
    sections += [
        Section(f"Merging: {student.label}", tables=[merge_table(student, gathered.packages)])
        for student in gathered.merged
    ]
    if gathered.packages:
        sections.append(Section("Packages", tables=[packages_table(gathered.packages)]))
    return sections


def _quality_section(
    source: Source,
    result: Mapping[str, Any],
    worst: Mapping[str, Sequence[Mapping[str, Any]]],
    clips: Clips | None,
) -> Section:
    name = language(result["lang"]).name
    metric = language(result["lang"]).selection_metric
    title = tables.METRIC_TITLES[metric]
    section = Section(f"Quality into {name}: {source.label}", tables=[tables.quality_table(result)])
    controls = tables.controls_table(result)
    if controls:
        section.tables.append(controls)
    by_condition = conditions.conditions_table(result)
    if by_condition:
        section.tables.append(by_condition)
    section.tables.append(tables.behaviour_table(result))
    if result["students"]:
        section.tables.append(tables.retention_table(result))
        points = _points(result, metric)
        plot = plots.tradeoff_plot(points, "stored size in MB (whole directory)", title)
        caption = f"Stored size against {title} on {result['segments']} segments"
        section.plots.append((f"{caption}, bars: retention's 95 % interval", plot))
    section.tables.append(tables.signatures_table(result))
    section.details = [
        tables.regressions_table(rows, student, title, _WORST_SHOWN, clips)
        for student, rows in worst.items()
    ]
    return section


def _points(
    result: Mapping[str, Any], metric: str, costs: Mapping[str, float] | None = None
) -> list[plots.Point]:
    """The models as points; `costs` as `_costs` has them, megabytes where None; those without are left out."""
    teacher = result["teacher"]
    whole = teacher["scores"][metric]["score"]
    points = []
    models = [teacher, *result["students"]]
    names = Counter(Path(model["path"]).name for model in models)
    for model in models:
        cost = model["stored_bytes"] / 1e6 if costs is None else _cost_of(model, costs, names)
        if cost is None:
            continue
        kept = model.get("retention", {}).get(metric)
        known = kept and kept["low"] is not None
        interval = (
            (whole * kept["low"] / 100, whole * kept["high"] / 100) if known else (None, None)
        )
        label = model["name"] if kept else f"{model['name']} (teacher)"
        points.append(plots.Point(label, cost, model["scores"][metric]["score"], *interval))
    return points


def _costs(timed: Sequence[Mapping[str, Any]], one_run: bool) -> dict[str, float]:
    """Times by the models' paths; within one run by their directories' names, too, where these tell them apart."""
    names = Counter(Path(entry["path"]).name for entry in timed)
    found: dict[str, float] = {}
    for entry in timed:
        path = Path(entry["path"])
        keys = [str(path), *([path.name] if one_run and names[path.name] == 1 else [])]
        found.update(dict.fromkeys(keys, entry["tpot_ms"]["p50"]))
    return found


def _cost_of(
    model: Mapping[str, Any], costs: Mapping[str, float], names: Mapping[str, int]
) -> float | None:
    """A model's time, by its path; by its directory's name only where no other model scored has that."""
    path = Path(model["path"])
    found = costs.get(str(path))
    return costs.get(path.name) if found is None and names[path.name] == 1 else found


def _tradeoffs(gathered: Gathered) -> list[Section]:
    """Latency against quality, for models that both a latency and a quality bench have measured."""
    sections = []
    for timed, latency in gathered.of_bench("latency"):
        for scored, files in gathered.quality:
            if timed.run != scored.run and timed.run and scored.run:
                continue  # models of one name are others there
            if files.result.get("beams", 1) != 1:
                continue  # times are of greedy translations
            metric = language(files.result["lang"]).selection_metric
            # What a GPU does is no point on the processor's plot.
            here = latency["models"][0].get("device", "cpu")
            alike = [entry for entry in latency["models"] if entry.get("device", "cpu") == here]
            points = _points(files.result, metric, _costs(alike, timed.run == scored.run))
            if len(points) < 2:
                continue
            title = tables.METRIC_TITLES[metric]
            plot = plots.tradeoff_plot(points, "ms a token (median, short clip)", title)
            caption = f"Time per output token against {title}, bars: retention's 95 % interval"
            name = f"Latency and quality: {timed.label}, {scored.label}"
            sections.append(Section(name, plots=[(caption, plot)]))
    return sections


def _latency_section(source: Source, result: Mapping[str, Any]) -> Section:
    section = Section(f"Latency: {source.label}")
    clips = sorted(result["clips"], key=lambda name: result["clips"][name]["duration_s"])
    section.tables = [tables.latency_table(result, clip) for clip in clips]
    for make in (peers_table, ratios_table):
        section.tables += [found for clip in clips if (found := make(result, clip))]
    baseline = result.get("baseline")
    entries = [*([baseline] if baseline else []), *result["models"]]
    names = tables.short_names([entry["path"] for entry in result["models"]])
    several = len({entry.get("device", "cpu") for entry in entries}) > 1
    labels = [
        f"{names[entry['path']]}, {entry['precision']}"
        + (f", {entry.get('device', 'cpu')}" if several else "")
        + (" (stock transformers)" if entry is baseline else "")
        for entry in entries
    ]
    medians = [entry["tpot_ms"]["p50"] for entry in entries]
    unit = "ms a token (median, short clip)"
    section.plots.append(("Time per output token", plots.bar_plot(labels, medians, unit)))
    return section


def _search_section(
    source: Source, rows: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]
) -> Section:
    section = Section(
        f"Layer importance: {source.label}", tables=[tables.removed_table(source, rows, plan)]
    )
    if rows:
        caption = "Score by removed layer and round"
        section.plots.append(
            (caption, plots.importance_plot(rows, plan["removed"], plan.get("baseline")))
        )
    return section


def _adapter_section(source: Source, rows: Sequence[Mapping[str, Any]]) -> Section:
    section = Section(f"Tuning: {source.label}")
    most = source.artefact.recipe.get("select_segments")
    if most:
        section.text.append(f"Validated on at most {most} select segments a language.")
    series = [key for key in ("loss", "score") if any(row.get(key) is not None for row in rows)]
    if series and any("step" in row for row in rows):
        known = [row for row in rows if "step" in row]
        plot = plots.history_plot(known, "step", series)
        section.plots.append((f"Tuning: {' and '.join(series)} by step", plot))
    scored = [row for row in rows if isinstance(row.get("score"), (int, float))]
    if scored:
        keys = [k for k in scored[0] if isinstance(scored[0][k], (str, int, float))]
        cells = [[_cell(row.get(key)) for key in keys] for row in scored]
        section.tables.append(tables.Table("Scores on select", keys, cells))
    return section


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write_pages(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Renders both pages; plots go into the HTML page and, for Markdown, beside it as files."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise MissingExtraError("jinja2", "bench") from None
    loader = FileSystemLoader(_TEMPLATES)
    web = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    web.filters["base64"] = lambda text: base64.b64encode(text.encode("utf8")).decode("ascii")
    html = web.get_template("report.html.j2").render(title=title, sections=sections)
    (path / "report.html").write_text(html, encoding="utf8")
    plain = Environment(
        loader=loader,
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    plain.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    text = plain.get_template("report.md.j2").render(
        title=title, sections=_plots_as_files(path, sections)
    )
    (path / "report.md").write_text(text, encoding="utf8")


def _plots_as_files(path: Path, sections: Sequence[Section]) -> list[Section]:
    shown = []
    for place, section in enumerate(sections, start=1):
        files = []
        for number, (caption, svg) in enumerate(section.plots, start=1):
            name = f"plots/{place}-{number}.svg"
            (path / "plots").mkdir(exist_ok=True)
            (path / name).write_text(svg, encoding="utf8")
            files.append((caption, name))
        shown.append(Section(section.title, section.text, section.tables, files))
    return shown


def _copy(source: Source, data: Path) -> None:
    """Copies an artefact whole if it is small and all text; a model's weights stay where they are."""
    files = source.artefact.files
    if sum(record.size_bytes for record in files.values()) > _COPIED_BYTES:
        return
    if not all(name.endswith(_COPIED_SUFFIXES) for name in files):
        return
    name = source.label.replace("/", "-")
    names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    target = next(data / each for each in names if not (data / each).exists())
    for name in [*files, "artefact.json"]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / name, target / name)
