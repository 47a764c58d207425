"""Corpora in: each importer reads one layout; `run_corpus` checks, splits and writes a complete corpus."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from halve import artefact
from halve.artefact import Artefact
from halve.audio import probe
from halve.corpus import Segment, check_segments, write_manifest
from halve.errors import CorpusError
from halve.families import FAMILIES
from halve.importers.acl6060 import import_acl6060
from halve.importers.base import CorpusConfig, Importer, Row, Rows, Sound
from halve.importers.iwslt import import_iwslt
from halve.importers.parallel import import_text
from halve.importers.splits import divide, own_group
from halve.importers.tables import import_halve, import_hf, import_tsv
from halve.progress import SILENT, Advance, Progress

__all__ = ["IMPORTERS", "CorpusConfig", "Row", "Rows", "Sound", "read_source", "run_corpus"]

IMPORTERS: dict[str, Importer] = {
    "iwslt": import_iwslt,
    "acl6060": import_acl6060,
    "hf": import_hf,
    "tsv": import_tsv,
    "text": import_text,
    "halve": import_halve,
}


def read_source(config: CorpusConfig, source: str | Path) -> Rows:
    """The segments of a source, unchecked, and the faults met while reading it.

    Raises:
        CorpusError: the source is not of the layout.
    """
    return IMPORTERS[config.format](str(source), config)


def run_corpus(
    config: CorpusConfig, source: str | Path, out: Path, progress: Progress = SILENT
) -> Artefact:
    """Imports a source as a corpus that is complete by itself: manifest and audio.

    Args:
        source: a directory, a TSV file, or (hf) the id of a data set on the hub.

    Raises:
        CorpusError: the source is not of the layout, or segments are faulty; every fault is named.
    """
    local = Path(source).exists()
    parents = {"source": Path(source)} if local else {}
    recipe = config.model_dump(mode="json") | ({} if local else {"source": str(source)})
    max_audio_s = _max_audio_s(config)
    progress.message(f"Reading {source}")
    with artefact.writing(out, "corpus", recipe, config.seed, parents) as draft:
        found = read_source(config, source)
        with progress.task("Checking segments", len(found.rows)) as advance:
            segments = [_segment(row, draft.path, config, advance) for row in found.rows]
        where = [row.where for row in found.rows]
        checks = check_segments(Path("/"), segments, max_audio_s, where)
        faults = [*found.faults, *checks, *_duplicates(found.rows, config)]
        faults += _straddling(found.rows, config)
        rows = _without_faulty(found.rows, faults, config, progress)
        if faults:
            artefact.write_json(draft.path / "dropped.json", {"faults": faults})
        segments_by_id = dict(zip((row.where for row in found.rows), segments, strict=True))
        divided = divide(rows, config)
        final = [_placed(row, segments_by_id[row.where]) for row in divided]
        _check_groups(final)
        final = _take_audio(final, Path(source), draft.path)
        write_manifest(draft.path, final)
        draft.extra.update(_facts(final, faults))
        if config.split in ("paper", "segment"):
            progress.warn(
                "Talks straddle the splits: scores on test are higher than on unheard talks."
            )
    return artefact.read(out, "corpus")


def _max_audio_s(config: CorpusConfig) -> float:
    if config.family not in FAMILIES:
        raise CorpusError(
            f"Unknown family {config.family!r}", expected=f"one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[config.family].max_audio_s


def _segment(row: Row, partial: Path, config: CorpusConfig, advance: Advance) -> Segment:
    """The row with an absolute audio path; its length read from the file where the source tells none."""
    if row.audio is None:
        advance()
        return _text_segment(row, config)
    if isinstance(row.audio, Sound):
        path = partial / "audio" / _safe(row.audio.name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(row.audio.data)
    else:
        path = row.audio
    duration_s = row.duration_s
    if duration_s is None:
        try:
            duration_s = max(0.0, probe(path).duration_s - row.offset_s)
        except CorpusError:  # check_segments names it with the others
            duration_s = 0.0
    advance()
    return Segment(
        id=row.id,
        audio=str(path.absolute()),
        offset_s=row.offset_s,
        duration_s=round(duration_s, 6),
        source_lang=config.source_lang,
        source_text=row.source_text,
        references=row.references,
        split=row.split or "train",
        # Groups are checked once the splits are known; until then each segment is its own.
        group=row.where,
        extra=row.extra,
    )


def _text_segment(row: Row, config: CorpusConfig) -> Segment:
    """A segment without audio."""
    return Segment(
        id=row.id,
        audio="",
        offset_s=0.0,
        duration_s=0.0,
        source_lang=config.source_lang,
        source_text=row.source_text,
        references=row.references,
        split=row.split or "train",
        group=row.where,
        extra=row.extra,
    )


def _duplicates(rows: Sequence[Row], config: CorpusConfig) -> list[str]:
    if config.duplicates == "keep":
        return []
    seen: dict[tuple[str, ...], Row] = {}
    faults = []
    for row in rows:
        key = (row.source_text.casefold(), *(text for _, text in sorted(row.references.items())))
        first = seen.setdefault(key, row)
        if first is not row and any(text.strip() for text in key):
            faults.append(f"{row.where}: same text as {first.where}")
    return faults


def _straddling(rows: Sequence[Row], config: CorpusConfig) -> list[str]:
    """Groups that the source itself puts in more than one split, at the first line that does.

    Leaving that line out would not mend it: under ``faulty="drop"`` they are refused on their own.
    """
    given = config.split in (None, "given") and all(row.split for row in rows)
    if not given or config.faulty == "drop":
        return []
    first: dict[str, dict[str, str]] = {}
    faults = []
    for row in rows:
        group, split = row.group or own_group(row), str(row.split)
        places = first.setdefault(group, {})
        if places and split not in places:
            other, where = next(iter(places.items()))
            faults.append(f"{row.where}: group {group!r} is in {split}, and in {other} at {where}")
        places.setdefault(split, row.where)
    return faults


def _without_faulty(
    rows: Sequence[Row], faults: list[str], config: CorpusConfig, progress: Progress
) -> list[Row]:
    if not faults:
        if not rows:
            raise CorpusError("The source has no segment")
        return list(rows)
    if config.faulty == "refuse":
        raise CorpusError(
            f"{len(faults)} faults in the corpus; nothing was written",
            mend="mend the source, or leave faulty segments out with --faulty drop (and keep repeated "
            "sentences with --duplicates keep)",
            faults=faults,
        )
    faulty = {row.where for row in rows for fault in faults if fault.startswith(f"{row.where}: ")}
    kept = [row for row in rows if row.where not in faulty]
    if not kept:
        raise CorpusError("Every segment is faulty", faults=faults)
    progress.warn(f"{len(rows) - len(kept)} faulty segments left out; dropped.json lists them.")
    return kept


def _placed(row: Row, segment: Segment) -> Segment:
    return replace(segment, split=str(row.split), group=str(row.group), extra=row.extra)


def _check_groups(segments: Sequence[Segment]) -> None:
    """Raises CorpusError when segments of one group are in two splits."""
    splits: dict[str, set[str]] = {}
    for segment in segments:
        splits.setdefault(segment.group, set()).add(segment.split)
    faults = [
        f"group {group!r} is in {' and '.join(sorted(names))}"
        for group, names in sorted(splits.items())
        if len(names) > 1
    ]
    if faults:
        raise CorpusError(
            f"{len(faults)} groups are in more than one split",
            expected="each talk, page or speaker in one split only, or test is no test",
            mend="mend the splits of the source, or use --split group",
            faults=faults,
        )


def _take_audio(segments: Sequence[Segment], source: Path, partial: Path) -> list[Segment]:
    """Hard-links (else copies) each file into `audio/` and makes the paths relative."""
    root = (source if source.is_dir() else source.parent).absolute()
    names: dict[str, str] = {}
    for segment in segments:
        if segment.audio and segment.audio not in names:
            names[segment.audio] = _name(Path(segment.audio), root, partial, set(names.values()))
            _link(Path(segment.audio), partial / names[segment.audio])
    kept = {partial / name for name in names.values()}
    for path in sorted((partial / "audio").rglob("*")):
        if path.is_file() and path not in kept:  # bytes of a segment that was left out
            path.unlink()
    return [
        replace(segment, audio=names[segment.audio] if segment.audio else "")
        for segment in segments
    ]


def _name(path: Path, root: Path, partial: Path, taken: set[str]) -> str:
    if path.is_relative_to(partial.absolute()):
        return path.relative_to(partial.absolute()).as_posix()
    inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    parts = [_safe(part) for part in inside.parts]
    if parts[0] != "audio":
        parts.insert(0, "audio")
    name, count = "/".join(parts), 1
    while name in taken:
        count += 1
        name = "/".join([*parts[:-1], f"{Path(parts[-1]).stem}-{count}{Path(parts[-1]).suffix}"])
    return name


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "audio"


def _link(path: Path, target: Path) -> None:
    if path == target.absolute() or target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), target)
    except OSError:  # another file system, or one without hard links
        fresh = target.with_name(f".{target.name}.new")
        shutil.copyfile(path, fresh)
        fresh.replace(target)


def _facts(segments: Sequence[Segment], faults: Sequence[str]) -> dict[str, object]:
    return {
        "segments": dict(sorted(Counter(segment.split for segment in segments).items())),
        "groups": len({segment.group for segment in segments}),
        "audio_s": round(sum(segment.duration_s for segment in segments), 3),
        "languages": sorted({lang for segment in segments for lang in segment.references}),
        "faults_dropped": len(faults),
    }
