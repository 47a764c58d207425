"""A report's tables, from results: the same rows for Markdown and for HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import scoring
from benchmarks.clips import Clips
from benchmarks.gather import Source
from halve.languages import language
from halve.metrics import LOWER_IS_BETTER, METRICS

METRIC_TITLES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "chrf++": "chrF++",
    "ter": "TER",
    "comet": "COMET",
    "embedding_similarity": "embedding similarity",
}
_OF_ONE = ("comet", "embedding_similarity")
"""Metrics whose scores are about 1, not about 100."""
RESAMPLES = 1000
"""Of results that do not say how many."""

_CONTROLS_OF_AUDIO = (
    "Does the teacher listen?",
    "heard",
    "the segment's own audio",
    "Shuffled audio: each segment gets the audio of another one of like duration.",
)
_CONTROLS_OF_TEXT = (
    "Does the teacher read?",
    "read",
    "the segment's own text",
    "Shuffled text: each segment gets the source text of another one of like length.",
)
"""Title, head of the first column, its first row, and the note."""

_SPEEDS = ("ttft_ms", "tpot_ms", "rtf")


@dataclass(frozen=True)
class Table:
    """One table with what a reader must know of it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    clips: list[str] = field(default_factory=list)
    """Sound of each row as a data URI, for HTML; none where empty."""


@dataclass
class Section:
    """One part of a report."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[tuple[str, str]] = field(default_factory=list)
    """Caption and SVG of each plot."""
    details: list[Table] = field(default_factory=list)
    """Long tables, folded in HTML and left out of Markdown."""


def megabytes(count: float) -> str:
    """Bytes as MB (10^6 bytes)."""
    return f"{count / 1e6:.1f}"


def segments_text(used: int, total: int | None, split: str) -> str:
    """How many segments a figure stands on: "40 of 120 select segments (a subset)"."""
    if total is None:
        return f"{used} {split} segments"
    if used < total:
        return f"{used} of {total} {split} segments (a subset)"
    return f"all {total} {split} segments"


def quality_table(result: Mapping[str, Any]) -> Table:
    """Models with sizes, scores and the retention that the language is judged by."""
    selection = language(result["lang"]).selection_metric
    metrics = [m for m in METRIC_TITLES if m in result["teacher"]["scores"]]
    teacher_bytes = result["teacher"]["stored_bytes"]
    header = ["model", "target", "precision", "layers", "MB", "% of teacher", "parameters (M)"]
    header += [METRIC_TITLES[metric] for metric in metrics]
    header += [f"{METRIC_TITLES[selection]} kept in % (95 %)", "points"]
    rows = []
    for model in [result["teacher"], *result["students"]]:
        row = [
            model["name"] + (" (teacher)" if model is result["teacher"] else ""),
            model["target"],
            model["precision"],
            str(model["decoder_layers"]),
            megabytes(model["stored_bytes"]),
            f"{100 * model['stored_bytes'] / teacher_bytes:.1f}",
            f"{model['logical_parameters'] / 1e6:.2f}",
        ]
        row += [score_text(metric, model["scores"][metric]["score"]) for metric in metrics]
        row += _kept(selection, model.get("retention", {}).get(selection))
        rows.append(row)
    used = segments_text(result["segments"], result.get("segments_in_split"), result["split"])
    return Table(
        f"{language(result['lang']).name}: {used}",
        header,
        rows,
        note=f"{result['comet']['text']}. {_decoding(result)} Retention: paired bootstrap, "
        f"{result['resamples']} resamples, seed {result['seed']}.",
    )


def _decoding(result: Mapping[str, Any]) -> str:
    beams = result.get("beams", 1)  # earlier results do not say it
    return "Greedy decoding." if beams == 1 else f"Beam search, {beams} beams."


def score_text(metric: str, value: float) -> str:
    """A score with the digits that its metric has."""
    return f"{value:.4f}" if metric in _OF_ONE else f"{value:.2f}"


def _kept(metric: str, retention: Mapping[str, float] | None) -> list[str]:
    digits = 4 if metric in _OF_ONE else 2
    points = f"{retention['difference']:+.{digits}f}" if retention else ""
    return [scoring.kept_text(retention), points]


def retention_table(result: Mapping[str, Any]) -> Table:
    """Retention in every metric."""
    metrics = [m for m in METRIC_TITLES if m in result["teacher"]["scores"]]
    rows = [
        [
            student["name"],
            METRIC_TITLES[metric],
            *_kept(metric, student["retention"][metric]),
            _p_values(student["retention"][metric], result.get("resamples", RESAMPLES)),
        ]
        for student in result["students"]
        for metric in metrics
    ]
    lower = ", ".join(METRIC_TITLES[m] for m in METRICS if m in LOWER_IS_BETTER)
    return Table(
        "Retention in every metric",
        ["student", "metric", "% of the teacher's (95 %)", "points", "p: bootstrap, randomisation"],
        rows,
        note=f"Lower is better for {lower}: there, over 100 % is a loss.",
    )


def _p_values(tested: Mapping[str, float], resamples: int) -> str:
    """Both tests' p values; results of before version 0.2 have only the first."""
    return ", ".join(
        _p(tested[key], resamples) for key in ("p_value", "p_randomised") if key in tested
    )


def _p(value: float, resamples: int) -> str:
    """No test is certain: none of a thousand resamples is less than one of them on either side."""
    if value == 0:
        return f"<{2 / resamples:.2g}"
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def controls_table(result: Mapping[str, Any]) -> Table | None:
    """The teacher's scores when it is given something else: a model that listens, or reads, loses nearly all."""
    controls = result["teacher"].get("controls") or {}
    if not controls:
        return None
    text = "shuffled_text" in controls
    title, given, own, note = _CONTROLS_OF_TEXT if text else _CONTROLS_OF_AUDIO
    metrics = list(METRICS)
    rows_of = [(own, {m: result["teacher"]["scores"][m]["score"] for m in metrics})]
    rows_of += [(name.replace("_", " "), scores) for name, scores in controls.items()]
    rows = [[name, *(f"{scores[metric]:.2f}" for metric in metrics)] for name, scores in rows_of]
    header = [given, *(METRIC_TITLES[metric] for metric in metrics)]
    return Table(title, header, rows, note=note)


def behaviour_table(result: Mapping[str, Any]) -> Table:
    """How often models go wrong."""
    keys = {
        "length_ratio_over_2": "over twice the reference's length %",
        "loops": "repetition loops %",
        "cut_at_limit": "cut at the token limit %",
        "repeats": "repeats itself %",
        "empty": "empty %",
    }
    rows = [
        [
            model["name"],
            # Earlier results do not know every one of them.
            *(f"{100 * shares[key]:.2f}" if key in shares else "-" for key in keys),
        ]
        for model in [result["teacher"], *result["students"]]
        for shares in (model["behaviour"],)
    ]
    return Table("Hallucinations and loops", ["model", *keys.values()], rows)


def signatures_table(result: Mapping[str, Any]) -> Table:
    """What it takes to repeat the scores."""
    scores = result["teacher"]["scores"]
    rows = [[METRIC_TITLES.get(m, m), entry["signature"]] for m, entry in scores.items()]
    return Table("Signatures", ["metric", "signature"], rows)


def regressions(files: scoring.ResultFiles, name: str) -> list[dict[str, Any]]:
    """Every segment with the teacher's and a student's translation, worst regressions first."""
    result = files.result
    metric, lang = language(result["lang"]).selection_metric, result["lang"]
    teacher, student = files.hypotheses(result["teacher"]["name"]), files.hypotheses(name)
    of_teacher = scoring.segment_scores(metric, teacher, files.references, lang)
    of_student = scoring.segment_scores(metric, student, files.references, lang)
    rows = [
        {
            "id": files.ids[i],
            "source": files.sources[i],
            "reference": files.references[i],
            "teacher": teacher[i],
            "student": student[i],
            "teacher_score": of_teacher[i],
            "student_score": of_student[i],
            "difference": round(of_student[i] - of_teacher[i], 2),
        }
        for i in range(len(files.ids))
    ]
    return sorted(rows, key=lambda row: (row["difference"], row["id"]))


def regressions_table(
    rows: Sequence[Mapping[str, Any]], name: str, metric: str, most: int, clips: Clips | None
) -> Table:
    """The worst segments of a student, to read and, with `clips`, to listen to."""
    shown = rows[:most]
    header = ["segment", "source", "reference", "teacher", name]
    header += [f"teacher's {metric}", f"its {metric}", "difference"]
    cells = [
        [
            *(row[key] for key in ("id", "source", "reference", "teacher", "student")),
            f"{row['teacher_score']:.1f}",
            f"{row['student_score']:.1f}",
            f"{row['difference']:+.1f}",
        ]
        for row in shown
    ]
    title = f"{name}: the {len(shown)} worst of {len(rows)} segments against the teacher"
    sounds = clips.sources([str(row["id"]) for row in shown]) if clips else []
    return Table(title, header, cells, note="All are in report.json.", clips=sounds)


def latency_table(result: Mapping[str, Any], clip: str) -> Table:
    """Speed of all models on one clip."""
    header = ["model", "layers", "precision", "load s", "first token ms", "a token ms", "RTF"]
    header += ["tokens", "peak memory MB", "times faster (first token, a token, RTF)"]
    rows = []
    baseline = result.get("baseline")
    gpu = result["machine"].get("gpu")
    names = short_names([entry["path"] for entry in result["models"]])
    stock = [*([baseline] if baseline else []), *result.get("baseline_other_threads", ())]
    for entry in [*stock, *result["models"]]:
        timed = entry["clips"][clip]
        faster = entry.get("times_faster_than_baseline", {}).get(clip, {})
        rows.append(
            [
                names[entry["path"]]
                + _as_stock(entry, result, stock)
                + (" on the GPU" if entry.get("device", "cpu") != "cpu" else ""),
                str(entry["layers"]),
                entry["precision"] + _computed_in(entry),
                f"{entry['load_s']:.2f}",
                _spread(timed["ttft_ms"], 1),
                _spread(timed["tpot_ms"], 2),
                _spread(timed["rtf"], 3),
                str(timed["tokens"]),
                megabytes(entry["peak_memory_bytes"]) + _on_gpu(entry),
                ", ".join(f"{faster[metric]:.1f}" for metric in _SPEEDS if metric in faster),
            ]
        )
    duration_s = result["clips"][clip]["duration_s"]
    return Table(
        f"{clip} clip, {duration_s:.1f} s, {result['threads']} thread(s)",
        header,
        rows,
        note=f"p50 (p95) of {result['repeats']} runs after {result['warmup']} to warm up; each model "
        f"in a process of its own, on {result['machine']['cpu']}{f' and {gpu}' if gpu else ''}."
        + (
            " Times faster: than stock transformers at the better of its numbers of threads."
            if stock[1:]
            else ""
        ),
    )


def _as_stock(
    entry: Mapping[str, Any], result: Mapping[str, Any], stock: Sequence[Mapping[str, Any]]
) -> str:
    if not any(entry is each for each in stock):
        return ""
    threads = entry["threads"]
    other = f", {threads} threads" if threads != result["threads"] else ""
    return f" (stock transformers{other})"


def _on_gpu(entry: Mapping[str, Any]) -> str:
    most = entry.get("peak_gpu_memory_bytes")
    if most:
        return f" + {megabytes(most)} on the GPU"
    return " + not measured on the GPU" if entry.get("device", "cpu") != "cpu" else ""


def _computed_in(entry: Mapping[str, Any]) -> str:
    """Two rows of one precision may compute in different formats: a directory in float32, a bf16 package in bfloat16."""
    arithmetic = entry.get("arithmetic")
    return f", computed in {arithmetic}" if arithmetic else ""


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path; the whole path where two would be called the same."""
    last = [Path(path).name for path in paths]
    return {
        path: name if last.count(name) == 1 else path
        for path, name in zip(paths, last, strict=True)
    }


def _spread(value: Mapping[str, float], digits: int) -> str:
    return f"{value['p50']:.{digits}f} ({value['p95']:.{digits}f})"


def serve_table(result: Mapping[str, Any]) -> Table:
    """Requests to a server, and to the plain one."""
    sides = [("halve serve", result)]
    if result.get("one_at_a_time"):
        sides.append(("the same, one request at a time", result["one_at_a_time"]))
    if result.get("baseline"):
        sides.append(("baseline (--engine plain)", result["baseline"]))
    rows = [
        [
            title,
            key.removeprefix("clients_"),
            f"{side[key]['p50_ms']:.0f}",
            f"{side[key]['p95_ms']:.0f}",
            f"{side[key]['throughput_rps']:.2f}",
            *(str(side.get(name, "")) for name in ("errors", "wrong_texts", "tie_texts")),
        ]
        for title, side in sides
        for key in sorted((k for k in side if k.startswith("clients_")), key=lambda k: int(k[8:]))
    ]
    return Table(
        "Server under load",
        [
            "server",
            "clients",
            "p50 ms",
            "p95 ms",
            "requests/s",
            "errors",
            "wrong texts",
            "from a near tie on",
        ],
        rows,
        note="Errors and texts: of each server in all, at either number of clients.",
    )


def facts_table(title: str, result: Mapping[str, Any]) -> Table:
    """The plain values of a result, one a row."""
    rows = [
        [key, f"{value:.4g}" if isinstance(value, float) else str(value)]
        for key, value in result.items()
        if isinstance(value, (str, int, float, bool))
    ]
    return Table(title, ["what", "value"], rows)


def removed_table(
    source: Source, rows: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]
) -> Table:
    """The order in which layers went, with the score after each."""
    by_round: dict[int, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        by_round.setdefault(int(row["round"]), {})[int(row["layer"])] = row
    cells: list[list[str]] = []
    # What is chosen without a search is all of one round.
    rounds = sorted(by_round) if len(by_round) > 1 else [*by_round] * len(plan["removed"])
    for number, layer in zip(rounds, plan["removed"], strict=False):
        candidates = by_round[number]
        best = candidates.get(layer)
        score = _candidate_score(best) if best else ""
        early = sum("settled" in row for row in candidates.values())
        cells.append([str(len(cells) + 1), str(layer), score, str(len(candidates)), str(early)])
    used = len(plan.get("max_new_tokens", {}))
    total = source.artefact.extra.get("segments_in_split")
    split = source.artefact.recipe.get("split", "select")
    subset = segments_text(used, total, split)
    if total is None and source.artefact.recipe.get("segments"):
        subset += " (a subset: the search was told to use so many)"
    metric = METRIC_TITLES.get(str(rows[0]["metric"]), str(rows[0]["metric"])) if rows else "score"
    return Table(
        f"{source.label}: {len(plan['removed'])} of {plan['num_layers']} decoder layers removed, {subset}",
        ["round", "layer removed", f"{metric} without it", "candidates", "settled early"],
        cells,
        note=_search_note(source, rows, plan) if rows else "",
    )


def _candidate_score(row: Mapping[str, Any]) -> str:
    # Distances and losses are small numbers: two decimals would make them equal.
    return f"{row['score']:.4g}" if row.get("better") == "lower" else f"{row['score']:.2f}"


def _search_note(source: Source, rows: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> str:
    """Signature, direction, baseline, and what an early stop is worth."""
    parts = [f"Signature: {rows[0]['signature']}."]
    parts.append(f"Method: {plan.get('method', 'not recorded')}.")
    if plan.get("baseline") is not None:
        parts.append(f"With every layer: {plan['baseline']:.2f}.")
    if any(row.get("better") == "lower" for row in rows):
        parts.append("The lowest goes first.")
    settled = {row["settled"] for row in rows if "settled" in row}
    if "bound" in settled:
        parts.append("Settled early: even a perfect rest would not have made it the winner.")
    if "race" in settled:
        sure = source.artefact.extra
        parts.append(
            "Settled early: the leader beat it in nearly every resample, in the least sure case in "
            f"{100 * sure.get('least_confidence', 0):.2f} %; all of them right at once: at least "
            f"{100 * sure.get('joint_confidence', 0):.1f} %, as far as the bootstrap can tell."
        )
    return " ".join(parts)


def _interval(metric: str, numbers: Mapping[str, float]) -> str:
    digits = 4 if metric in _OF_ONE else 2
    difference, low, high = (f"{numbers[key]:+.{digits}f}" for key in ("difference", "low", "high"))
    return f"{difference} [{low}, {high}]"


def comparison_table(first: str, second: str, found: Mapping[str, Any]) -> Table:
    """Two results: the second minus the first."""
    rows = [
        [
            pair["first"]
            if pair["first"] == pair["second"]
            else f"{pair['first']} → {pair['second']}",
            METRIC_TITLES[metric],
            _interval(metric, numbers),
            _p_values(numbers, found.get("resamples", RESAMPLES)),
            "yes" if numbers["significant"] else "no",
        ]
        for pair in found["models"]
        for metric, numbers in pair["metrics"].items()
    ]
    changed = "; ".join(f"{key}: {old} → {new}" for key, (old, new) in found["changed"].items())
    changed = "; ".join(
        [
            *([changed] if changed else []),
            *(
                f"{pair['second']} {key}: {old} → {new}"
                for pair in found["models"]
                for key, (old, new) in pair["changed"].items()
            ),
        ]
    )
    note = found["note"] or f"Paired bootstrap on {found['segments']} shared segments."
    return Table(
        f"{first} → {second}",
        [
            "model",
            "metric",
            "difference (95 %)",
            "p: bootstrap, randomisation",
            "significant at 5 %",
        ],
        rows,
        note=f"{note} What else changed, as far as it is on record here: {changed or 'nothing'}.",
    )
