"""README's tables, from the newest results that the repository carries.

    python -m benchmarks.readme            prints them
    python -m benchmarks.readme --write    puts them into README.md

`make bench` and `benchmarks/students.sh` make such results; once committed under benchmarks/results, one command remakes every table.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scoring import kept_text
from benchmarks.students import LANGS
from benchmarks.tables import megabytes
from halve.errors import ArtefactError, HalveError
from halve.json_files import read_json
from halve.languages import language

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STUDENTS = {
    "teacher-int4": "teacher, ONNX int4",
    "teacher-int4-A": "teacher, ONNX int4, tower and head in 8 bits",
    "teacher-int4-fine": "teacher, ONNX int4, tower and head in 8 bits, finer blocks",
    "A-fine-2": "nothing pruned, QLoRA, ONNX int4, tower and head in 8 bits, finer blocks",
    "A-mean-fine": "nothing pruned, mean of three seeds' QLoRA, else the same",
    "B-long-mean-head4": "a quarter of the layers pruned, mean of three seeds' QLoRA, ONNX int4, tower in 8 bits, finer blocks",
    "C-0": "half of the layers pruned, trained in full, bf16",
    "D-0": "half of the layers pruned, trained in full, ONNX int4, head in 8 bits",
}
"""The students that README shows, in its order."""
DEMO = {
    "student": "student, bf16",
    "checkpoint-nf4": "student, NF4 checkpoint",
    "onnx-fp32": "student, ONNX fp32",
    "onnx-int4": "student, ONNX int4",
}


def newest(name: str, file: str) -> dict[str, Any]:
    """The result of that name with the latest date.

    Raises:
        ArtefactError: none is committed.
    """
    found = sorted(RESULTS.glob(f"????-??-??-{name}/{file}"))
    if not found:
        raise ArtefactError(f"No result {name} under {RESULTS}", expected=f"DATE-{name}/{file}")
    result: dict[str, Any] = read_json(found[-1])
    return result


def _all_there(wanted: Iterable[str], found: Iterable[str], where: str) -> None:
    there = set(found)
    if missing := [name for name in wanted if name not in there]:
        raise ArtefactError(
            f"{', '.join(missing)} not in {where}",
            expected="the models that README shows",
            mend="measure them, or change the names in benchmarks/readme.py",
        )


def demo_table() -> str:
    """Quality and latency of `make demo`, one row a model."""
    quality, latency = (
        newest("demo-quality-de", "quality.json"),
        newest("demo-latency", "latency.json"),
    )
    speeds = {Path(model["path"]).name: model for model in latency["models"]}
    _all_there(DEMO, [student["name"] for student in quality["students"]], "the demo's quality")
    _all_there(["teacher", *DEMO], speeds, "the demo's latency")
    lines = [
        "| model | stored | % of teacher | BLEU | chrF++ | chrF++ kept (95 %) | first token | a token | tokens said of a 5 s clip | times faster | at as many tokens | peak memory |",
        "|---" * 12 + "|",
        f"| teacher, stock transformers fp32 | | | | | | {_speed_cells(latency['baseline'], None)} |",
    ]
    teacher = quality["teacher"]
    rows = [("teacher, bf16 (halve)", teacher)]
    students = {student["name"]: student for student in quality["students"]}
    rows += [(label, students[name]) for name, label in DEMO.items()]
    for label, row in rows:
        model = speeds[Path(row["path"]).name]
        share = f"{100 * row['stored_bytes'] / teacher['stored_bytes']:.0f} %"
        scores = " | ".join(f"{row['scores'][name]['score']:.2f}" for name in ("bleu", "chrf++"))
        faster = float(model["times_faster_than_baseline"]["short"]["rtf"])
        said = latency["baseline"]["clips"]["short"]["tokens"]
        times = f"{faster:.1f} | {faster * slowed(model['clips']['short'], said):.1f}"
        lines.append(
            f"| {label} | {megabytes(row['stored_bytes'])} MB | {share} | {scores} "
            f"| {_kept(row.get('retention'), 'chrf++')} | {_speed_cells(model, times)} |"
        )
    return "\n".join(lines)


def _speed_cells(model: Mapping[str, Any], times: str | None) -> str:
    short = model["clips"]["short"]
    first, later = (short[name]["p50"] for name in ("ttft_ms", "tpot_ms"))
    memory = f"{model['peak_memory_bytes'] / 1e6:.0f} MB"
    return f"{first:.0f} ms | {later:.2f} ms | {short['tokens']} | {times or '1 | 1'} | {memory}"


def slowed(timed: Mapping[str, Any], tokens: int) -> float:
    """What a clip's time is of the time that it would take if so many tokens were said of it."""
    own_s = timed["rtf"]["p50"] * timed["duration_s"]
    more_s = (tokens - timed["tokens"]) * timed["tpot_ms"]["p50"] / 1000
    return float(own_s / (own_s + more_s))


def _kept(retention: Mapping[str, Any] | None, metric: str) -> str:
    if retention is None:
        return ""
    return kept_text(retention[metric]).replace(" [", " % [")


def students_table() -> str:
    """The students of all the demo's speech, one row each, both languages."""
    result = newest("students", "students.json")
    teacher = result["teacher"]
    metrics = {lang: language(lang).selection_metric for lang in LANGS}
    own = [f"{teacher['scores'][lang][metrics[lang]]:.2f}" for lang in LANGS]
    lines = [
        "| model | layers | stored | % of teacher | chrF++ German, kept (95 %) | chrF Chinese, kept (95 %) |",
        "|---" * 6 + "|",
        f"| teacher, bf16 | 12 | {megabytes(teacher['stored_bytes'])} MB | 100 % | {' | '.join(own)} |",
    ]
    students = {student["name"]: student for student in result["students"]}
    _all_there(STUDENTS, students, "the students' result")
    for name, label in STUDENTS.items():
        student = students[name]
        cells = [
            f"{found['scores'][metrics[lang]]:.2f}, {_kept({lang: found['retention']}, lang)}"
            for lang, found in student["langs"].items()
        ]
        lines.append(
            f"| {label} | {student['decoder_layers']} | {megabytes(student['stored_bytes'])} MB "
            f"| {student['bytes_percent']:.0f} % | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


TABLES = {"demo": demo_table, "students": students_table}


def filled(readme: str) -> str:
    """README's text with every table made anew.

    Raises:
        ArtefactError: README has no place for one of them.
    """
    for name, make in TABLES.items():
        before, start, rest = readme.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("\n<!-- end -->")
        if not start or not end:
            raise ArtefactError(f"README.md has no place for the table {name}")
        readme = before + start + make() + end + after
    return readme


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    try:
        if options.write:
            path.write_text(filled(path.read_text(encoding="utf8")), encoding="utf8")
        else:
            print("\n\n".join(make() for make in TABLES.values()))
    except HalveError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
