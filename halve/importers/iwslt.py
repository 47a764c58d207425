"""The IWSLT layout: a segments YAML of {wav, offset, duration}, one text line a segment, FILE_ORDER.

A source holds one or more sets. A set is a `NAME.yaml` with its text files beside it, in `../txt` or in
`txt/`, named `NAME.de` or `NAME.de.txt`; audio is found by file name anywhere under the source. Where a
directory holds a FILE_ORDER, its YAMLs are one set, one YAML a talk, joined in that order; a single YAML
must then name the files of FILE_ORDER in that order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from halve.errors import CorpusError
from halve.importers.base import (
    AUDIO_SUFFIXES,
    CorpusConfig,
    Row,
    Rows,
    known_language,
    read_lines,
    source_dir,
    split_name,
    wanted_languages,
)

FILE_ORDER = "FILE_ORDER"


@dataclass(frozen=True)
class Entry:
    """One segment of a segments YAML."""

    where: str
    wav: str
    offset_s: float
    duration_s: float
    speaker: str | None = None


def read_segments_yaml(path: Path) -> tuple[list[Entry], list[str]]:
    """The entries of a segments YAML and the faults in it.

    Raises:
        CorpusError: missing, or no YAML list.
    """
    if not path.is_file():
        raise CorpusError(f"{path}: no such segments file")
    try:
        node = yaml.compose(path.read_text(encoding="utf8"), Loader=_LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(node, yaml.SequenceNode):
        raise CorpusError(f"{path}: no list", expected="a list of {wav, offset, duration}")
    entries: list[Entry] = []
    faults: list[str] = []
    for item in node.value:
        where = f"{path}:{item.start_mark.line + 1}"
        try:
            entries.append(_entry(where, _plain(item)))
        except (KeyError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            faults.append(f"{where}: {what}; a segment is {{wav, offset, duration}}")
    return entries, faults


# The C loader reads the tens of thousands of lines of a training set in seconds, not minutes.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _plain(node: Any) -> dict[str, str]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("not a mapping")
    return {key.value: value.value for key, value in node.value}


def _entry(where: str, item: dict[str, str]) -> Entry:
    return Entry(
        where=where,
        wav=item["wav"],
        offset_s=float(item["offset"]),
        duration_s=float(item["duration"]),
        speaker=item.get("speaker_id"),
    )


def in_file_order(entries: list[Entry], order: Path) -> tuple[list[Entry], list[str]]:
    """The entries sorted by the talks' order in FILE_ORDER (order inside a talk is kept)."""
    names = [Path(line.strip()).name for line in read_lines(order) if line.strip()]
    places = {_stem(name): index for index, name in enumerate(names)}
    faults = [
        f"{entry.where}: {entry.wav} is not in {order}"
        for entry in entries
        if _stem(entry.wav) not in places
    ]
    present = {_stem(entry.wav) for entry in entries}
    faults += [
        f"{order}:{number}: no segment of {name}"
        for number, name in enumerate(names, start=1)
        if _stem(name) not in present
    ]
    kept = [entry for entry in entries if _stem(entry.wav) in places]
    return sorted(kept, key=lambda entry: places[_stem(entry.wav)]), faults


def _stem(name: str) -> str:
    # Talks are called 2022.acl-long.268: only a known suffix is one.
    path = Path(name)
    return path.stem if path.suffix.lower() in AUDIO_SUFFIXES else path.name


class AudioIndex:
    """Finds audio by the name a segments YAML gives it."""

    def __init__(self, *folders: Path) -> None:
        self._files: dict[str, list[Path]] = {}
        for path in sorted(entry for folder in folders for entry in folder.rglob("*")):
            if path.suffix.lower() in AUDIO_SUFFIXES:
                self._files.setdefault(_stem(path.name), []).append(path)

    def find(self, wav: str, near: Path) -> Path:
        """The file; where none is there, the path at which it was expected."""
        direct = near / wav
        if direct.is_file():
            return direct
        found = self._files.get(_stem(Path(wav).name), [])
        if not found:
            return direct
        # Two sets may both have a talk1.wav: the nearest one is meant.
        return max(found, key=lambda path: len(_common(path, near)))


def _common(path: Path, near: Path) -> tuple[str, ...]:
    pairs = zip(path.parts, near.parts, strict=False)
    shared: list[str] = []
    for one, other in pairs:
        if one != other:
            break
        shared.append(one)
    return tuple(shared)


@dataclass(frozen=True)
class _Set:
    name: str
    yamls: list[Path]
    order: Path | None


def _sets(root: Path) -> Iterator[_Set]:
    yamls = sorted([*root.rglob("*.yaml"), *root.rglob("*.yml")])
    for folder in sorted({path.parent for path in yamls}):
        here = [path for path in yamls if path.parent == folder]
        order = next(
            (
                place / FILE_ORDER
                for place in (folder, folder.parent)
                if (place / FILE_ORDER).is_file()
            ),
            None,
        )
        if order is not None and len(here) > 1:
            yield _Set(folder.name if folder != root else root.name, here, order)
        else:
            for path in here:
                yield _Set(path.stem, [path], order)


def import_iwslt(source: str, config: CorpusConfig) -> Rows:
    """Reads every set under `source`, or the one of a segments YAML.

    Raises:
        CorpusError: no segments YAML, or no text.
    """
    if Path(source).suffix in (".yaml", ".yml") and Path(source).is_file():
        root = Path(source).parent
        sets = [one for one in _sets(root) if Path(source) in one.yamls]
        folders = [root, root.parent / "wav", root.parent / "audio"]
    else:
        root = source_dir(source, "iwslt")
        sets = list(_sets(root))
        folders = [root]
    if not sets:
        raise CorpusError(
            f"{root} has no segments YAML",
            expected="NAME.yaml (a list of {wav, offset, duration}) with NAME.en, NAME.de, …",
            mend="see docs/own-data.md for the layout",
        )
    found = Rows()
    index = AudioIndex(*folders)
    for one in sets:
        _import_set(one, index, config, found, alone=len(sets) == 1)
    return found


def _import_set(
    one: _Set, index: AudioIndex, config: CorpusConfig, found: Rows, alone: bool
) -> None:
    entries: list[Entry] = []
    for path in one.yamls:
        more, faults = read_segments_yaml(path)
        entries += more
        found.faults += faults
    if one.order is not None:
        entries, faults = in_file_order(entries, one.order)
        found.faults += faults
    near = one.yamls[0].parent
    texts = text_files(near, one.name, config, alone)
    targets = wanted_languages(texts, config)
    lines: dict[str, list[str]] = {}
    for lang in [config.source_lang, *targets]:
        if lang not in texts:
            continue
        lines[lang] = read_lines(texts[lang])
        if len(lines[lang]) != len(entries):
            found.faults.append(
                f"{texts[lang]}: {len(lines[lang])} lines for the {len(entries)} segments of "
                f"{', '.join(path.name for path in one.yamls)}"
            )
            return
    for number, entry in enumerate(entries):
        found.rows.append(
            _row(one, number, entry, lines, targets, index.find(entry.wav, near), config)
        )


def _row(
    one: _Set,
    number: int,
    entry: Entry,
    lines: dict[str, list[str]],
    targets: list[str],
    audio: Path,
    config: CorpusConfig,
) -> Row:
    extra = {} if entry.speaker is None else {"speaker": entry.speaker}
    return Row(
        where=entry.where,
        id=f"{one.name}-{number + 1:05d}",
        audio=audio,
        source_text=lines.get(config.source_lang, [""] * (number + 1))[number].strip(),
        references={lang: lines[lang][number].strip() for lang in targets},
        offset_s=entry.offset_s,
        duration_s=entry.duration_s,
        split=_split_of(one.name),
        group=_stem(entry.wav),
        extra=extra,
    )


def _split_of(name: str) -> str | None:
    return next((split for part in name.split(".") if (split := split_name(part))), None)


def text_files(near: Path, name: str, config: CorpusConfig, alone: bool) -> dict[str, Path]:
    """The text files of a set by language: NAME.de or NAME.de.txt, or, of a lone set, any *.de."""
    found: dict[str, Path] = {}
    for folder in (near, near / "txt", near.parent / "txt", near / "text"):
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            parts = path.name.removesuffix(".txt").rsplit(".", 1)
            stem, lang = (parts[0], parts[1]) if len(parts) == 2 else ("", parts[0])
            code = known_language(lang)
            if code and path.is_file() and (stem == name or alone):
                found.setdefault(code, path)
    return found
