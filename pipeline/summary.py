"""What a run, a plan of a run and a bench say at the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halve.artefact import Artefact
from halve.languages import language
from pipeline.console import Result, duration, size, table
from pipeline.costs import Cost, Estimator
from pipeline.stages import Planned, Run, total

BYTES = 2
"""Of a parameter in bfloat16, as models are stored."""


def of_plan(run: Run, planned: list[Planned], estimator: Estimator) -> Result:
    """`halve run --dry-run`: sizes before and after, and what each stage will cost here."""
    rows = [
        [
            one.step.name,
            "up to date" if one.done else "to run",
            *_cost(one.cost),
            str(one.step.out),
        ]
        for one in planned
    ]
    header = ["stage", "state", "time", "memory", "disk", "directory"]
    text = [
        _sizes(estimator),
        _speech(estimator),
        table(header, rows, right=(2, 3, 4)),
        total(planned),
    ]
    return Result("\n".join(part for part in text if part), _plan_data(run, planned, estimator))


def _cost(cost: Cost) -> list[str]:
    if cost.time_s is None:
        return ["?", "?", "?"]
    return [duration(max(cost.time_s, 1)), size(cost.memory_bytes or 0), size(cost.disk_bytes or 0)]


def _sizes(estimator: Estimator) -> str:
    if estimator.teacher is None or estimator.student is None:
        return f"The model's sizes are not known: {estimator.unknown}."
    teacher, student = estimator.teacher, estimator.student
    return (
        f"Teacher: {teacher.total:,} parameters, {teacher.decoder_layers} decoder layers, "
        f"{size(teacher.total * BYTES)} in bfloat16; student: {student.total:,} parameters, "
        f"{student.decoder_layers} decoder layers, {size(student.total * BYTES)} in bfloat16 (exact, from the config)."
    )


def _speech(estimator: Estimator) -> str:
    speech = estimator.speech
    counts = ", ".join(f"{count} {split}" for split, count in sorted(speech.segments.items()))
    known = (
        f"assumed: {speech.why}"
        if speech.assumed
        else f"{speech.mean_s:.1f} s on average{', assumed' if speech.why else ''}"
    )
    return f"Corpus: {counts} segments ({known}). Times are estimates for this machine."


def _plan_data(run: Run, planned: list[Planned], estimator: Estimator) -> dict[str, Any]:
    teacher, student = estimator.teacher, estimator.student
    return {
        "out": str(run.out),
        "teacher_parameters": teacher.total if teacher else None,
        "student_parameters": student.total if student else None,
        "teacher_bytes": teacher.total * BYTES if teacher else None,
        "student_bytes": student.total * BYTES if student else None,
        "corpus": vars(estimator.speech),
        "stages": [
            {
                "stage": one.step.name,
                "done": one.done,
                "directory": str(one.step.out),
                "time_s": one.cost.time_s,
                "memory_bytes": one.cost.memory_bytes,
                "disk_bytes": one.cost.disk_bytes,
            }
            for one in planned
        ],
    }


def of_run(run: Run, ran: list[Planned]) -> Result:
    """`halve run`: what was made, and where."""
    rows = [[one.step.name, "up to date" if one.done else "made", str(one.step.out)] for one in ran]
    lines = [table(["stage", "state", "directory"], rows)]
    page = run.out / "report" / "report.html"
    is_new = page.is_file() and any(one.step.stage == "report" for one in ran)
    if is_new:
        lines.append(f"Report: {page}")
    data = {
        "out": str(run.out),
        "report": str(page) if is_new else None,
        "stages": [
            {"stage": one.step.name, "made": not one.done, "directory": str(one.step.out)}
            for one in ran
        ],
    }
    return Result("\n".join(lines), data)


def of_bench(made: Artefact, data: Mapping[str, Any]) -> Result:
    """A bench: its object for machines, its main table for people."""
    texts = {"quality": _quality, "latency": _latency, "longform": _longform}
    find = texts.get(str(data.get("bench") or made.extra.get("bench")), _facts)
    table_text = find(data)
    return Result(f"{table_text}\nresults: {made.path}".strip(), data)


def _quality(data: Mapping[str, Any]) -> str:
    from benchmarks.scoring import kept_text
    from benchmarks.tables import METRIC_TITLES, score_text, segments_text

    metric = language(data["lang"]).selection_metric
    metrics = [each for each in METRIC_TITLES if each in data["teacher"]["scores"]]
    rows = []
    for model in [data["teacher"], *data["students"]]:
        scores = [score_text(each, model["scores"][each]["score"]) for each in metrics]
        retained = kept_text(model.get("retention", {}).get(metric))
        rows.append([model["name"], size(model["stored_bytes"]), *scores, retained])
    for name, scores_of in (data["teacher"].get("controls") or {}).items():
        scores = [
            score_text(each, _score(scores_of[each])) if each in scores_of else ""
            for each in metrics
        ]
        rows.append([f"teacher, {name.replace('_', ' ')}", "", *scores, ""])
    titles = [METRIC_TITLES[each] for each in metrics]
    header = ["model", "stored", *titles, f"% of teacher's {metric} (95 %)"]
    used = segments_text(data["segments"], data.get("segments_in_split"), data["split"])
    shown = table(header, rows, right=tuple(range(1, 2 + len(metrics))))
    comet = data.get("comet") or {}
    is_missing = not comet.get("measured") and "no checkpoint was given" not in comet.get(
        "text", ""
    )
    note = f"\n{comet['text']}" if comet.get("text") and is_missing else ""
    return f"{used}, {data['lang']}\n{shown}{note}"


def _longform(data: Mapping[str, Any]) -> str:
    from benchmarks.longform import longform_table

    shown = longform_table(data)
    return f"{shown.title}\n{table(shown.header, shown.rows, right=(1, 2, 3, 4))}"


def _facts(data: Mapping[str, Any]) -> str:
    """A bench's figures, one a line; figures of one regime on one line."""
    lines = []
    for key, value in sorted(data.items()):
        if isinstance(value, Mapping):
            inner = (f"{name} {_figure(part)}" for name, part in value.items())
            lines.append(f"{key}: {', '.join(inner)}")
        elif not isinstance(value, list):
            lines.append(f"{key}: {_figure(value)}")
    return "\n".join(lines)


def _figure(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({', '.join(f'{name} {_figure(part)}' for name, part in value.items())})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _score(value: Any) -> float:
    return float(value["score"] if isinstance(value, Mapping) else value)


def _latency(data: Mapping[str, Any]) -> str:
    entries = [("stock transformers, ", data["baseline"])] if data.get("baseline") else []
    entries += [("", model) for model in data["models"]]
    rows = [
        [
            f"{kind}{Path(model['path']).name}",
            f"{model['load_s']:.2f}",
            f"{model['ttft_ms']['p50']:.0f}",
            f"{model['tpot_ms']['p50']:.1f}",
            f"{model['rtf']['p50']:.3f}",
            size(model["peak_memory_bytes"]),
        ]
        for kind, model in entries
    ]
    header = ["model", "load s", "TTFT ms", "TPOT ms", "RTF", "peak memory"]
    return table(header, rows, right=(1, 2, 3, 4, 5))
