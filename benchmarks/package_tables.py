"""A report's tables of what was exported: merged students and packages, on `select`."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gather import Source
from benchmarks.tables import METRIC_TITLES, Table, megabytes

Packages = Sequence[tuple[Source, Mapping[str, Any]]]


def packages_table(packages: Packages) -> Table:
    """Packages with their parity to the student."""
    rows = [
        [
            source.label,
            package["target"],
            package["precision"],
            ", ".join(package.get("languages", [])),
            megabytes(sum(record.size_bytes for record in source.artefact.files.values())),
            _parity(package.get("parity") or {}),
        ]
        for source, package in packages
    ]
    return Table("Packages", ["package", "target", "precision", "languages", "MB", "parity"], rows)


def _parity(parity: Mapping[str, Any]) -> str:
    if parity.get("reason"):
        return str(parity["reason"])
    found = [
        f"{lang}: same tokens in {of['equal']} of {of['segments']} select segments, "
        f"{METRIC_TITLES.get(of['metric'], of['metric'])} {of['difference']:+.2f} "
        f"[{of['difference_low']:+.2f}, {of['difference_high']:+.2f}]"
        for lang, of in parity.get("languages", {}).items()
    ]
    if parity.get("forced"):
        found.append("kept by force")
    return "; ".join(found) or "not recorded"


def merge_table(student: Source, packages: Packages) -> Table:
    """The adapter on its base, both merges and, if made, what is left when they are stored in few bits.

    Packages of the same run stand below: what was tuned on 4-bit weights may lose its gain when it is
    merged and quantised again.
    """
    merge = student.artefact.extra["merge"]
    langs = sorted(merge["rows"][0]["scores"])
    cells = [
        [
            row["form"],
            row["onto"],
            row["precision"],
            *(_scored(row["scores"].get(lang)) for lang in langs),
            str(merge["segments"]),
        ]
        for row in merge["rows"]
    ]
    for source, package in packages:
        parity = (package.get("parity") or {}).get("languages", {})
        if source.run != student.run or not parity:
            continue
        scores = [
            {"metric": parity[lang]["metric"], "score": parity[lang]["package_score"]}
            if lang in parity
            else None
            for lang in langs
        ]
        segments = {str(of["segments"]) for of in parity.values()}
        shown = [package["target"] + " package", student.artefact.extra["onto"]]
        cells.append(
            [*shown, package["precision"], *map(_scored, scores), "/".join(sorted(segments))]
        )
    kept = student.artefact.extra["onto"]
    return Table(
        f"{student.label}: merging, on `{merge['split']}`",
        ["form", "onto the base", "weights", *langs, "segments"],
        cells,
        note=f"Kept: onto {kept}. One run, no interval. Only rows on the same segments compare.",
    )


def _scored(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    return f"{METRIC_TITLES.get(score['metric'], score['metric'])} {score['score']:.2f}"
