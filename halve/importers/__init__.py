"""Corpora in: each importer reads one layout; `run_corpus` checks, splits and writes a complete corpus."""

import errno
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from halve import artefact
from halve.artefact import Artefact
from halve.audio import AudioInfo
from halve.corpus import Segment, decode_all, segment_faults, write_manifest
from halve.errors import CorpusError
from halve.families import FAMILIES
from halve.importers.acl6060 import import_acl6060
from halve.importers.base import CorpusConfig, Importer, Row, Rows, Sound
from halve.importers.hf import import_hf
from halve.importers.iwslt import import_iwslt, read_beside
from halve.importers.parallel import import_text
from halve.importers.splits import divide, is_dealt, own_groups
from halve.importers.tables import import_halve, import_tsv
from halve.json_files import write_json
from halve.progress import SILENT, Progress

__all__ = [
    "IMPORTERS",
    "CorpusConfig",
    "Row",
    "Rows",
    "Sound",
    "inputs_of",
    "read_source",
    "run_corpus",
]

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


def inputs_of(config: CorpusConfig, source: str | Path) -> dict[str, Path]:
    """The files and directories on this machine that decide what is imported, each with a name."""
    path = Path(source)
    if not path.exists():
        return {}
    beside = read_beside(path, config) if config.format == "iwslt" else {}
    return {"source": path, **beside}


def noted_of(config: CorpusConfig, source: str | Path) -> dict[str, str]:
    """What is put on record of a source that has no files here to be told by: its name."""
    return {} if inputs_of(config, source) else {"source": str(source)}


def run_corpus(
    config: CorpusConfig, source: str | Path, out: Path, progress: Progress = SILENT
) -> Artefact:
    """Imports a source as a corpus that is complete by itself: manifest and audio.

    Args:
        source: a directory, a TSV file, or (hf) the id of a data set on the hub.

    Raises:
        CorpusError: the source is not of the layout, or segments are faulty; every fault is named.
    """
    parents = inputs_of(config, source)
    recipe = config.recorded() | noted_of(config, source)
    _max_audio_s(config)  # an unknown family is refused before anything is read
    progress.message(f"Reading {source}")
    with artefact.writing(out, "corpus", recipe, config.seed, parents) as draft:
        found = read_source(config, source)
        if config.untranslated == "keep":
            dealt = is_dealt(found.rows, config)
            found.rows = [_with_what_is_translated(row, dealt) for row in found.rows]
        for warning in found.warnings:
            progress.warn(warning)
        paths = [_audio_path(row, draft.path) for row in found.rows]
        heard = decode_all(list(dict.fromkeys(path for path in paths if path)), progress)
        segments = [
            _segment(row, path, heard, config) for row, path in zip(found.rows, paths, strict=True)
        ]
        faults, kept = _without_faulty(found, segments, heard, config, progress)
        divided = divide([found.rows[index] for index in kept], config)
        # By place, not by line: several segments may stand on one.
        final = [_placed(row, segments[index]) for index, row in zip(kept, divided, strict=True)]
        _check_groups(final)
        final, apart = _apart(final, progress)
        if faults := [*faults, *apart]:
            write_json(draft.path / "dropped.json", {"faults": faults})
        final = _take_audio(final, Path(source), draft.path)
        write_manifest(draft.path, final)
        draft.extra.update(_facts(final, faults))
        if config.split in ("paper", "segment"):
            progress.warn(
                "Talks straddle the splits: scores on test are higher than on unheard talks."
            )
        named = config.split in (None, "given") and any(row.split for row in found.rows)
        _say_unused(config, named, progress)
        _warn_of_empty(final, named, progress)
    return artefact.read(out, "corpus")


def _with_what_is_translated(row: Row, dealt: bool) -> Row:
    """A train row without its empty translations; in `select` and `test` they stay faults.

    Args:
        dealt: halve deals the splits out: such a row goes to train then.
    """
    if not dealt and row.split != "train":
        return row
    texts = {lang: text for lang, text in row.references.items() if text.strip()}
    return replace(
        row, references=texts, stays_in_train=dealt and (not texts or texts != row.references)
    )


_TOUCHING_S = 0.001
"""Segments that overlap by less stand beside each other."""


def _held_out_too(segments: Sequence[Segment]) -> Iterator[tuple[int, str]]:
    """Untranslated segments of `train` whose speech or words are in `select` or `test`: nobody could see that they are learnt."""
    spoken: dict[str, list[Segment]] = {}
    words: dict[str, Segment] = {}
    for each in segments:
        if each.split != "train":
            if each.audio:
                spoken.setdefault(each.audio, []).append(each)
            words.setdefault(_words(each), each)
    for index, each in enumerate(segments):
        if each.split != "train" or each.references:
            continue
        end_s = each.offset_s + each.duration_s - _TOUCHING_S
        same = [
            other
            for other in spoken.get(each.audio, ())
            if other.offset_s < end_s
            and each.offset_s < other.offset_s + other.duration_s - _TOUCHING_S
        ]
        other = same[0] if same else words.get(_words(each)) if _words(each) else None
        if other is not None:
            yield index, f"{each.id}: also in {other.split}, as {other.id}; left out"


def _apart(segments: list[Segment], progress: Progress) -> tuple[list[Segment], list[str]]:
    """The segments without untranslated ones that are held out as well, and a line for each that goes."""
    gone = dict(_held_out_too(segments))
    if gone:
        progress.warn(
            f"{len(gone)} untranslated segments are also in select or test and are left out; dropped.json lists them."
        )
    kept = [each for index, each in enumerate(segments) if index not in gone]
    return kept, list(gone.values())


def _words(segment: Segment) -> str:
    return " ".join(segment.source_text.casefold().split())


def _say_unused(config: CorpusConfig, named: bool, progress: Progress) -> None:
    """Names the settings that this source does nothing with."""
    of_others = ["select_share", "test_share"] if named else []
    if config.format != "hf":
        of_others += ["subset", "audio_column", "text_column", "group_column"]
    given = [name for name in of_others if getattr(config, name) != config.default(name)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        why = (
            "a source that names its splits"
            if named and "share" in options
            else f"--format {config.format}"
        )
        progress.warn(f"{options}: nothing is done with it for {why}")


def _warn_of_empty(segments: Sequence[Segment], named: bool, progress: Progress) -> None:
    """Says which splits the source left empty: the stages that need them fail much later."""
    present = {segment.split for segment in segments}
    lacking = [name for name in ("train", "select", "test") if name not in present]
    if lacking and named:
        progress.warn(
            f"No segment is in {' or '.join(lacking)}, as the source names the splits. `--split group` deals out all "
            "anew; `importance`, `tune` and `package` need select, `bench quality` test."
        )


def _max_audio_s(config: CorpusConfig) -> float:
    if config.family not in FAMILIES:
        raise CorpusError(
            f"Unknown family {config.family!r}", expected=f"one of {', '.join(FAMILIES)}"
        )
    # A family that reads hears nothing, and sets no limit.
    return FAMILIES[config.family].max_audio_s or math.inf


def _audio_path(row: Row, partial: Path) -> Path | None:
    """The absolute path of the row's audio; bytes from a data set become a file of the draft."""
    if row.audio is None:
        return None
    if isinstance(row.audio, Path):
        return row.audio.absolute()
    path = partial / "audio" / _safe(row.audio.name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(row.audio.data)
    return path.absolute()


def _segment(
    row: Row, path: Path | None, heard: Mapping[Path, AudioInfo | str], config: CorpusConfig
) -> Segment:
    """The row with an absolute audio path; its length that of the file where the source tells none."""
    duration_s = row.duration_s
    if path is None:
        duration_s = 0.0
    elif duration_s is None:
        info = heard[path]  # a text is a fault, which is named with the others
        duration_s = 0.0 if isinstance(info, str) else max(0.0, info.duration_s - row.offset_s)
    return Segment(
        id=row.id,
        audio="" if path is None else str(path),
        offset_s=0.0 if path is None else row.offset_s,
        duration_s=round(duration_s, 6),
        source_lang=row.source_lang or config.source_lang,
        source_text=row.source_text,
        references=row.references,
        split="train" if row.stays_in_train else row.split or "train",
        # Groups are known once the splits are: until then each segment is its own.
        group=row.where,
        extra=row.extra,
    )


def _duplicates(
    rows: Sequence[Row], config: CorpusConfig, faulty: Set[int]
) -> Iterator[tuple[int, str]]:
    """Rows that say what one before them says; a `faulty` one has no copy."""
    if config.duplicates == "keep":
        return
    seen: dict[tuple[str, ...], Row] = {}
    for index, row in enumerate(rows):
        if index in faulty:
            continue
        key = (row.source_text.casefold(), *(text for _, text in sorted(row.references.items())))
        first = seen.setdefault(key, row)
        if first is not row and any(text.strip() for text in key):
            yield index, f"same text as {first.where}"


def _straddling(rows: Sequence[Row], config: CorpusConfig) -> Iterator[tuple[int, str]]:
    """Groups that the source itself puts in more than one split, at the first line that does.

    Leaving that line out would not mend it: under ``faulty="drop"`` they are refused on their own.
    """
    given = config.split in (None, "given") and all(row.split for row in rows)
    if not given or config.faulty == "drop":
        return
    first: dict[str, dict[str, str]] = {}
    for index, (row, own) in enumerate(zip(rows, own_groups(rows), strict=True)):
        group, split = row.group or own, str(row.split)
        places = first.setdefault(group, {})
        if places and split not in places:
            other, where = next(iter(places.items()))
            yield index, f"group {group!r} is in {split}, and in {other} at {where}"
        places.setdefault(split, row.where)


def _without_faulty(
    found: Rows,
    segments: Sequence[Segment],
    heard: Mapping[Path, AudioInfo | str],
    config: CorpusConfig,
    progress: Progress,
) -> tuple[list[str], list[int]]:
    """The faults of segments that were left out, and the indices of the rows that are kept.

    Raises:
        CorpusError: faults, and none may be left out or leaving segments out would not mend them.
    """
    rows = found.rows
    audio = {str(path): info for path, info in heard.items()}
    places = [row.where for row in rows]
    dropping = config.faulty == "drop"
    kept_plain = config.untranslated == "keep"
    own = list(segment_faults(segments, _max_audio_s(config), places, audio, kept_plain, dropping))
    apart = {index for index, _ in own} if dropping else set()
    of_rows = [*own, *_duplicates(rows, config, apart), *_straddling(rows, config)]
    faults = [*found.faults, *(f"{places[index]}: {fault}" for index, fault in of_rows)]
    _refuse(found, faults, config)
    faulty = {index for index, _ in of_rows}
    kept = [index for index in range(len(rows)) if index not in faulty]
    if not kept:
        raise CorpusError("Every segment is faulty", faults=faults)
    if faults:
        left_out = len(faulty) + len(found.faults)
        progress.warn(f"{left_out} faulty segments left out; dropped.json lists them.")
    return faults, kept


def _refuse(found: Rows, faults: list[str], config: CorpusConfig) -> None:
    """Raises CorpusError where faults stop the import."""
    every = [*found.set_faults, *faults]
    if every and config.faulty == "refuse":
        raise CorpusError(
            f"{len(every)} faults in the corpus; nothing was written",
            mend="mend the source, or leave faulty segments out with --faulty drop (and keep repeated "
            "sentences with --duplicates keep)",
            faults=every,
        )
    if found.set_faults:
        raise CorpusError(
            f"{len(found.set_faults)} faults of whole files; nothing was written",
            expected="faults of single segments, which are all that --faulty drop can leave out",
            mend="mend the files, or take them out of the source",
            faults=found.set_faults,
        )
    if not found.rows and not faults:
        raise CorpusError("The source has no segment")


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
    taken = _Taken()
    files = dict.fromkeys(Path(segment.audio) for segment in segments if segment.audio)
    # Those that lie in the draft already have their names: the others go round them.
    for path in sorted(files, key=lambda path: not path.is_relative_to(partial.absolute())):
        names[str(path)] = _name(path, root, partial, taken)
        _link(path, partial / names[str(path)])
    kept = {partial / name for name in names.values()}
    for path in sorted((partial / "audio").rglob("*")):
        if path.is_file() and path not in kept:  # bytes of a segment that was left out
            path.unlink()
    return [
        replace(segment, audio=names[segment.audio] if segment.audio else "")
        for segment in segments
    ]


@dataclass
class _Taken:
    """Names that are given away: of files, and of the folders that hold them."""

    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)

    def add(self, name: str) -> str:
        self.files.add(name)
        self.folders.update(parent.as_posix() for parent in PurePosixPath(name).parents)
        return name


def _name(path: Path, root: Path, partial: Path, taken: _Taken) -> str:
    """A file's name in the corpus: its own as far as no other file or folder has it."""
    if path.is_relative_to(partial.absolute()):
        return taken.add(path.relative_to(partial.absolute()).as_posix())
    inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    parts = [_safe(part) for part in inside.parts]
    # `audio/` becomes the corpus's own; a file of that name does not.
    if parts[0] != "audio" or len(parts) == 1:
        parts.insert(0, "audio")
    name = ""
    for at, part in enumerate(parts):
        clashes = taken.files if at < len(parts) - 1 else taken.files | taken.folders
        name = _free(name, part, clashes)
    return taken.add(name)


def _free(folder: str, part: str, clashes: Set[str]) -> str:
    name = f"{folder}/{part}".lstrip("/")
    count = 1
    while name in clashes:
        count += 1
        name = f"{folder}/{Path(part).stem}-{count}{Path(part).suffix}"
    return name


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "audio"


_TARGET_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def _link(path: Path, target: Path) -> None:
    if path == target.absolute() or target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), target)
    except OSError:  # another file system, or one without hard links
        fresh = target.with_name(f".{target.name}.new")
        try:
            shutil.copyfile(path, fresh)
        except OSError as error:
            if error.errno in _TARGET_ERRORS:  # Python names the file that was read
                raise OSError(error.errno, error.strerror, str(target)) from None
            raise
        fresh.replace(target)


def _facts(segments: Sequence[Segment], faults: Sequence[str]) -> dict[str, object]:
    return {
        "segments": dict(sorted(Counter(segment.split for segment in segments).items())),
        "groups": len({segment.group for segment in segments}),
        "audio_s": round(sum(segment.duration_s for segment in segments), 3),
        "languages": sorted({lang for segment in segments for lang in segment.references}),
        "faults_dropped": len(faults),
    }
