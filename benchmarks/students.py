"""Chooses the layers of students.sh, and puts its students side by side.

    python -m benchmarks.students plan runs/students --quarter 3 --half 6
    python -m benchmarks.students table runs/students

`plan` makes one order of removal for both languages of the orders that the search found for each: by the sum of a
layer's places. `table` reads the two runs of `halve bench quality` on `test` and says which bars are met.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import scoring
from halve import artefact
from halve.errors import ArtefactError, HalveError
from halve.json_files import read_json, read_jsonl, write_json
from halve.languages import language

LANGS = ("de", "zh")
LOWEST_BELOW_BAR = 3.0
"""How far the interval's low end may lie below the bar."""


@dataclass(frozen=True)
class Bar:
    """What a student is held to."""

    what: str
    bytes_percent: float | None
    """Of the teacher's stored bytes; None where half of the decoder's parameters is the bar."""
    retention_percent: float


BARS = {
    "A": Bar("no layer pruned, QLoRA + distillation, 4 bits", 45, 100),
    "B": Bar("a quarter of the layers pruned, QLoRA + distillation, 4 bits", 40, 98),
    "C": Bar("half of the layers pruned, distilled, bf16", None, 97),
    "D": Bar("half of the layers pruned, distilled, 4 bits (ONNX)", 27, 95),
}


def joint_order(orders: Sequence[Sequence[int]]) -> list[int]:
    """One order of removal: layers by the sum of their places, ties to the lower layer.

    A layer that an order does not hold counts as removed after all of its own.
    """
    layers = sorted({layer for order in orders for layer in order})
    places = {
        layer: sum(order.index(layer) if layer in order else len(order) for order in orders)
        for layer in layers
    }
    return sorted(layers, key=lambda layer: (places[layer], layer))


def write_plan(folder: Path, quarter: int, half: int) -> dict[str, list[int]]:
    """Writes layers-quarter.txt and layers-half.txt out of the searches in `folder`.

    Raises:
        ArtefactError: a search is missing.
    """
    orders = []
    for lang in LANGS:
        plan = folder / f"importance-{lang}" / "plan.json"
        if not plan.is_file():
            raise ArtefactError(f"{plan} is missing", mend="run the step `plans` of students.sh")
        orders.append(read_json(plan)["removed"])
    order = joint_order(orders)
    found = {"quarter": sorted(order[:quarter]), "half": sorted(order[:half])}
    for name, layers in found.items():
        text = ",".join(map(str, layers)) + "\n"
        (folder / f"layers-{name}.txt").write_text(text, encoding="utf8")
    return found


def collect(folder: Path) -> dict[str, Any]:
    """Students by name with what they were measured at in each language.

    Raises:
        ArtefactError: a quality run is missing.
    """
    groups = sorted(
        path.name.removeprefix(f"test-{LANGS[0]}-")
        for path in folder.glob(f"test-{LANGS[0]}-*")
        if _is_greedy(path)
    )
    if not groups:
        raise ArtefactError(
            f"{folder} holds no quality run on `test`", mend="run the step `test` of students.sh"
        )
    students, teacher = [], None
    segments: dict[str, int] = {}
    for group in groups:
        runs = {lang: _quality(folder, lang, group) for lang in LANGS}
        teacher = _same_teacher(teacher, runs)
        here = {lang: run["segments"] for lang, run in runs.items()}
        if segments not in ({}, here):
            raise ArtefactError(
                f"{group} was measured on {here} segments, the groups before on {segments}",
                mend="measure all groups on the same segments",
            )
        segments = here
        students += [_student(one["name"], group, runs) for one in runs[LANGS[0]]["students"]]
    names = [student["name"] for student in students]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArtefactError(
            f"Measured twice on `test`: {', '.join(twice)}",
            expected="each student in one group",
            mend=f"remove one of the groups in {folder}",
        )
    return {
        "segments": segments,
        "teacher": teacher,
        "students": sorted(students, key=lambda student: -student["stored_bytes"]),
        "layers": {
            name: (folder / f"layers-{name}.txt").read_text(encoding="utf8").strip()
            for name in ("quarter", "half")
            if (folder / f"layers-{name}.txt").is_file()
        },
        # Groups may have been measured in different places, on different days.
        "measured": {
            group: {lang: _measured(folder / f"test-{lang}-{group}") for lang in LANGS}
            for group in groups
        },
    }


def _measured(result: Path) -> dict[str, Any]:
    """Which result, where and when: of its own record."""
    if not (result / artefact.RECORD).is_file():
        return {}
    lines = read_jsonl(result / artefact.TIMINGS)
    last = [line for line in lines if line["event"] == "stage"][-1]
    keys = ("cpu", "instructions", "cores", "gpu", "date")
    return {
        "result": artefact.identity(result),
        **{key: last[key] for key in keys if key in last},
    }


def _is_greedy(result: Path) -> bool:
    """Of students translated once more with beams there is another table."""
    path = result / "quality.json"
    return not path.is_file() or read_json(path).get("beams", 1) == 1


def _quality(folder: Path, lang: str, group: str) -> dict[str, Any]:
    path = folder / f"test-{lang}-{group}" / "quality.json"
    if not path.is_file():
        raise ArtefactError(f"{path} is missing", mend="run the step `test` of students.sh")
    found: dict[str, Any] = read_json(path)
    return found


def _same_teacher(known: dict[str, Any] | None, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The teacher of all groups.

    Raises:
        ArtefactError: this group's is another than the one before.
    """
    found = {
        "stored_bytes": runs[LANGS[0]]["teacher"]["stored_bytes"],
        "scores": {lang: _scores(run["teacher"], lang) for lang, run in runs.items()},
    }
    if known not in (None, found):
        raise ArtefactError(
            f"Students of different teachers: {known} and {found}",
            mend="measure all groups against one teacher",
        )
    return found


def _scores(entry: dict[str, Any], lang: str) -> dict[str, float]:
    wanted = ("bleu", language(lang).selection_metric)
    return {name: entry["scores"][name]["score"] for name in wanted}


def _entry(name: str, group: str, lang: str, run: dict[str, Any]) -> dict[str, Any]:
    for entry in run["students"]:
        if entry["name"] == name:
            return dict(entry)
    raise ArtefactError(
        f"{name} is not in test-{lang}-{group}", mend="measure the same students in every language"
    )


def _student(name: str, group: str, runs: dict[str, Any]) -> dict[str, Any]:
    teacher = runs[LANGS[0]]["teacher"]
    first = _entry(name, group, LANGS[0], runs[LANGS[0]])
    found = {
        "name": first["name"],
        "stored_bytes": first["stored_bytes"],
        "bytes_percent": 100 * first["stored_bytes"] / teacher["stored_bytes"],
        "logical_parameters": first["logical_parameters"],
        "decoder_layers": first["decoder_layers"],
        "precision": first["precision"],
        "langs": {},
    }
    for lang, run in runs.items():
        entry = _entry(name, group, lang, run)
        kept = entry["retention"][language(lang).selection_metric]
        found["langs"][lang] = {
            "scores": _scores(entry, lang),
            "retention": {key: kept[key] for key in ("percent", "low", "high")},
            "points": kept["difference"],
        }
    bar = BARS.get(first["name"][0]) if first["name"][1:2] == "-" else None
    if bar is not None:
        found["bar"] = {
            "what": bar.what,
            "bytes_percent": bar.bytes_percent,
            "retention_percent": bar.retention_percent,
            "met": meets(bar, found),
        }
    return found


def meets(bar: Bar, student: dict[str, Any]) -> bool:
    """Whether a student is as small as its bar says, and keeps enough in every language."""
    small = bar.bytes_percent is None or student["bytes_percent"] <= bar.bytes_percent
    kept = [each["retention"] for each in student["langs"].values()]
    return small and all(
        one["percent"] is not None  # of a teacher that scored 0 nothing can be kept
        and one["percent"] >= bar.retention_percent
        and one["low"] >= bar.retention_percent - LOWEST_BELOW_BAR
        for one in kept
    )


def table(result: dict[str, Any]) -> str:
    """The students as Markdown."""
    of_teacher = result["teacher"]
    segments = next(iter(result["segments"].values()))
    heads = " | ".join(
        f"BLEU {lang} | {language(lang).selection_metric} {lang} | kept (95 %) | points"
        for lang in LANGS
    )
    cells = " | ".join(
        " | ".join(f"{value:.2f}" for value in of_teacher["scores"][lang].values()) + " | | "
        for lang in LANGS
    )
    lines = [
        f"All {segments} `test` segments, once. Bytes are of the whole directory, of the teacher's in bf16.",
        "",
        f"| student | layers | stored MB | % | {heads} | bar |",
        "|---" * (5 + 4 * len(LANGS)) + "|",
        f"| teacher, bf16 | | {of_teacher['stored_bytes'] / 1e6:.1f} | 100 | {cells} | |",
    ]
    for student in result["students"]:
        cells = " | ".join(_language_cells(student["langs"][lang]) for lang in LANGS)
        lines.append(
            f"| {student['name']} ({student['precision']}) | {student['decoder_layers']} "
            f"| {student['stored_bytes'] / 1e6:.1f} | {student['bytes_percent']:.1f} | {cells} "
            f"| {_bar_cell(student)} |"
        )
    return "\n".join(lines) + "\n"


def _language_cells(found: dict[str, Any]) -> str:
    kept = scoring.kept_text(found["retention"]).replace(" [", " % [")
    scores = " | ".join(f"{value:.2f}" for value in found["scores"].values())
    return f"{scores} | {kept} | {found['points']:+.2f}"


def _bar_cell(student: dict[str, Any]) -> str:
    bar = student.get("bar")
    if bar is None:
        return ""
    size = "" if bar["bytes_percent"] is None else f"at most {bar['bytes_percent']:g} %, "
    return f"{size}{bar['retention_percent']:g} % kept: {'met' if bar['met'] else 'missed'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("plan", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quarter", type=int, default=3)
    parser.add_argument("--half", type=int, default=6)
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except HalveError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    if options.what == "plan":
        for name, layers in write_plan(options.folder, options.quarter, options.half).items():
            print(f"{name}: without layers {', '.join(map(str, layers))}")
        return 0
    result = collect(options.folder)
    write_json(options.folder / "students.json", result)
    page = table(result)
    (options.folder / "README.md").write_text(page, encoding="utf8")
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
